"""Tiny random models of every supported architecture, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB: Final = 160
EOS: Final = 1
WINDOW: Final = 24

COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 2,
    # Far larger than trained models start with: near-equal logits would make greedy tokens a matter of rounding.
    "initializer_range": 0.3,
}

_CONFIGS: Final[dict[str, tuple[type[PretrainedConfig], dict[str, Any]]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": WINDOW, "head_dim": 16}),
    "gemma2": (
        Gemma2Config,
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (Phi3Config, {}),
    "olmo2": (Olmo2Config, {}),
}

ARCHITECTURES: Final = tuple(_CONFIGS)


def tiny_config(arch: str) -> PretrainedConfig:
    """A float32 config of `arch` with a vocabulary of VOCAB tokens and a context of 1,024."""
    kind, changes = _CONFIGS[arch]
    config = kind(**{**COMMON, **changes})
    config.dtype = torch.float32
    return config


def tiny_model(arch: str, seed: int = 0) -> PreTrainedModel:
    """transformers' own model of `tiny_config(arch)`, with random weights of this seed, in float32 on the CPU.

    With eager attention: some versions' SDPA leaves out Gemma2's soft cap.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            tiny_config(arch), dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide mistakes
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.train(False)
    return model


def save_tiny(arch: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Write config.json, model.safetensors, generation_config.json and a tokenizer into folder; returns the model."""
    model = tiny_model(arch, seed)
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return model


def tiny_tokenizer() -> Tokenizer:
    """Ids 0 to 2 are <s>, </s> and <pad>; the other VOCAB - 3 are single characters, printable ASCII first."""
    vocab = {"<s>": 0, "</s>": EOS, "<pad>": 2, "<unk>": 3}
    for code in [*range(0x21, 0x7F), *range(0xA1, 0x200)]:
        if len(vocab) < VOCAB - 1:
            vocab.setdefault(chr(code), len(vocab))
    vocab["▁"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return tokenizer


def save_flashinfer_sized(folder: Path) -> None:
    """A Llama whose heads FlashInfer has kernels for."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
    )
    config.save_pretrained(folder)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
