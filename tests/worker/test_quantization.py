"""Weights, activations and KV cache in 8 bits: how far they are off, what is rewritten, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tandem.worker.kv_cache import KVCache, LayerKV
from tandem.worker.operators import LARGEST, quantize_rows
from tandem.worker.quantization import Fp8Linear, quantize_linears
from tandem.worker.sources import LoadError

from support.compiled import calls, compiled_beside_own, paged
from support.paged import Sequences, compute_randomly, load, random_tokens
from support.tiny_models import VOCAB, save_flashinfer_sized, save_tiny

HALF_STEP = 2.0**-4
"""Largest relative error of rounding to three bits after the leading one."""


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_rows_are_scaled_to_the_largest_number_and_rounded() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 64) * torch.tensor([1e-30, 1e-6, 1.0, 1e4, 0.0])[:, None]
    quantized, scale = quantize_rows(rows)
    assert quantized.dtype == torch.float8_e4m3fn
    back = quantized.float() * scale[:, None]
    for row in (1, 2, 3):
        assert quantized[row].float().abs().max() == LARGEST
        large = rows[row].abs() > rows[row].abs().max() * 2**-6
        assert ((back[row] - rows[row]).abs() <= HALF_STEP * rows[row].abs())[large].all()
    assert back[4].eq(0).all()
    assert back[0].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_its_product_in_8_bits(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 48, bias=bias).bfloat16().requires_grad_(False)
    layer = Fp8Linear(linear)
    inputs = torch.randn(2, 3, 96).bfloat16()
    got = layer(inputs)
    assert got.shape == (2, 3, 48)
    assert got.dtype == torch.bfloat16
    quantized, scale = quantize_rows(inputs.flatten(0, 1))
    exact = (quantized.double() * scale[:, None]) @ (layer.weight.double() * layer.scale[:, None]).t()
    if bias:
        exact = exact + linear.bias.double()
    assert relative(got.flatten(0, 1), exact) < 5e-3
    assert relative(got, linear(inputs)) < 0.05


def quantized_llama(folder: Path) -> PreTrainedModel:
    model = paged("llama", folder, torch.bfloat16)
    quantize_linears(model.get_decoder())
    return model


def test_a_llama_in_8_bits_is_rewritten_whole_and_computes_the_same(tmp_path: Path) -> None:
    model = quantized_llama(tmp_path)
    graph, compiled, own = compiled_beside_own(model)
    count = model.config.num_hidden_layers
    assert calls(graph, "rotate_attend") == count
    assert calls(graph, "scaled_gated_product") == count
    assert calls(graph, "scaled_product") == 3 * count  # query, key and value in one; output; down
    assert calls(graph, "add_norm_quantize") == 2 * count - 1  # all but the first and the last norm
    assert calls(graph, "add_norm") == 1
    assert calls(graph, "quantize_rows") == 2 * count + 1  # attention's output, the gate's, and the first norm's
    for tokens in (1, 7, 37):
        ids = torch.arange(tokens) * 31 % VOCAB
        assert relative(compiled(ids, torch.arange(tokens)), own(ids, torch.arange(tokens))) < 0.03


def test_logits_are_near_those_in_16_bits(tmp_path: Path) -> None:
    save_flashinfer_sized(tmp_path)
    results, bytes_per_block = {}, {}
    for name, options in {
        "exact": {},
        "weights": {"quantization": "fp8"},
        "cache": {"kv_cache_dtype": "fp8"},
        "both": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    }.items():
        model = load(tmp_path, dtype="bfloat16", **options)
        bytes_per_block[name] = model.kv_bytes_per_block(16)
        sequences = Sequences(model, block_size=16)
        for number, length in enumerate((1, 16, 17, 41, 90)):
            sequences.add(random_tokens(length, VOCAB, number))
        results[name] = torch.cat(compute_randomly(sequences, seed=2))
    off = {name: relative(logits, results["exact"]) for name, logits in results.items()}
    assert 1e-3 < off["weights"] < 0.15
    assert 1e-4 < off["cache"] < 0.1
    assert off["both"] < 0.2
    assert bytes_per_block["exact"] == bytes_per_block["weights"] == 2 * bytes_per_block["both"]


def test_a_cache_in_8_bits_holds_the_nearest_numbers_and_no_nan() -> None:
    layer = LayerKV(0, 2, 2, 32, 32, None, 1.0, None)
    cache = KVCache((layer,), 3, 8, dtype=torch.float8_e4m3fn, device=torch.device("cpu"))
    key = torch.randn(4, 2, 32) * torch.tensor([1.0, 100.0, 1e3, 1e6])[:, None, None]
    slots = torch.tensor([9, 0, 23, 17])
    cache.append(0, slots, key.bfloat16(), key.bfloat16())
    held = cache.flat(0)[0].float()
    assert held.isfinite().all()
    assert torch.equal(held[slots], key.bfloat16().float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float())
    others = [slot for slot in range(32) if slot not in slots.tolist()]
    assert not held[others].any()


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("llama", {"dtype": "float32"}, "activations must have 16 bits, not float32"),
        ("qwen3_moe", {"dtype": "bfloat16"}, "experts"),
        ("llama", {"dtype": "bfloat16", "batch_invariant": True}, "batch-invariant"),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    arch: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_tiny(arch, tmp_path)
    with pytest.raises(LoadError, match=message):
        load(tmp_path, quantization="fp8", **options)
