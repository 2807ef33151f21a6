"""A model folder that brings Python code of its own: a small Llama whose layers see twice what the embedding gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel

from support.tiny_models import save_tiny

MARK: Final = "code-ran"
"""A file of this name beside the model tells that its code has run."""

_CONFIGURATION: Final = """
from pathlib import Path
from transformers import LlamaConfig

Path({mark!r}).touch()

class DoubledConfig(LlamaConfig):
    model_type = "doubled-llama"
"""
_MODELING: Final = """
from torch import nn
from transformers import LlamaForCausalLM
from .configuration_doubled import DoubledConfig

class DoubledEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2

class DoubledForCausalLM(LlamaForCausalLM):
    config_class = DoubledConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens = DoubledEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.post_init()
"""


def save_with_code(folder: Path) -> PreTrainedModel:
    """Writes the model and its code; returns a plain Llama that computes the same."""
    model = save_tiny("llama", folder)
    (folder / "configuration_doubled.py").write_text(_CONFIGURATION.format(mark=str(folder / MARK)))
    (folder / "modeling_doubled.py").write_text(_MODELING)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "doubled-llama",
        "architectures": ["DoubledForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_doubled.DoubledConfig",
            "AutoModelForCausalLM": "modeling_doubled.DoubledForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        for parameter in model.get_input_embeddings().parameters():
            parameter.mul_(2)
    return model
