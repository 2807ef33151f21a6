"""Weights and activations in 8 bits (float8 e4m3: Micikevicius et al. 2022, FP8 formats for deep learning).

Each output channel of a weight has a scale, so has each row of activations, chosen when it is computed: the largest
magnitude becomes the largest number of the format. Products add up in float32 and are scaled afterwards. Embedding,
norms, attention and the head stay as they are.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from . import operators
from .sources import LoadError

FP8: Final = torch.float8_e4m3fn
MULTIPLE: Final = 16
"""Rows and columns of a weight must be a multiple of this: the library's kernels take no others."""


class Fp8Linear(nn.Module):
    """A linear layer whose weight [N, K] is kept in 8 bits with a scale for each of its N channels."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_channels(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        rows, row_scale = torch.ops.tandem.quantize_rows(input.flatten(0, -2))
        out: Tensor = torch.ops.tandem.scaled_product(rows, row_scale, self.weight, self.scale, input.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], out.shape[-1])


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] as float8 and its scales [N] float32: weight ≈ float8 * scale[:, None]."""
    quantized, scale = operators.quantize_rows_plain(weight)
    return quantized, scale


def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why 8 bits cannot be used here; None if they can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"activations must have 16 bits, not {str(dtype).removeprefix('torch.')}; add --dtype bfloat16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no arithmetic in 8 bits (it came with compute capability 8.9)"
    return None


@torch.no_grad()
def quantize_linears(trunk: nn.Module) -> int:
    """Puts an Fp8Linear in the place of every linear layer of `trunk`, one by one, so that the weights are never there
    twice; returns how many.

    Raises LoadError, naming the layer, for weights that would stay as they are (experts that are kept as one tensor,
    shapes that the kernels do not take).
    """
    replaced = 0
    for name, module in list(trunk.named_modules()):
        for part, child in list(module.named_children()):
            if type(child) is nn.Linear:
                _require_fit(f"{name}.{part}".lstrip("."), child)
                setattr(module, part, Fp8Linear(child))
                replaced += 1
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2:
                raise LoadError(
                    f"--quantization fp8: {name}.{part} {list(parameter.shape)} holds the weights of several experts, "
                    "which are not quantised yet; leave the option out"
                )
    if not replaced:
        raise LoadError(f"--quantization fp8: {type(trunk).__name__} has no linear layers to quantise")
    return replaced


def _require_fit(name: str, linear: nn.Linear) -> None:
    if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
        raise LoadError(
            f"--quantization fp8: {name} is {linear.out_features} x {linear.in_features}, and both must be multiples "
            f"of {MULTIPLE}; leave the option out"
        )
