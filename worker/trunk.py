"""A transformers model in two: the trunk, which a step runs, and the head, which makes logits of the rows that want a
token.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .sources import LoadError


def trunk_and_head(module: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The trunk, and the head: the same model, sharing its weights, whose trunk only passes rows on. So whatever the
    model does to its logits (soft caps, scales) is done by its own code."""
    prefix = module.base_model_prefix
    trunk = getattr(module, prefix, None)
    if not isinstance(trunk, nn.Module) or trunk is module:
        raise LoadError(f"{type(module).__name__} has no trunk named {prefix!r} apart from its head")
    head = copy.copy(module)
    head._modules = {**module._modules, prefix: _GivenRows()}
    return trunk, head


class _GivenRows(nn.Module):
    """Stands where a model's trunk was, or where some have it, its decoder: hands back the rows it is given."""

    @property
    def decoder(self) -> _GivenRows:
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _GivenOutput:
        return _GivenOutput(inputs_embeds)


class _GivenOutput:
    """A trunk's output with nothing in it but rows; whatever else a head copies from it is None."""

    def __init__(self, rows: Tensor) -> None:
        self.last_hidden_state = rows

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
