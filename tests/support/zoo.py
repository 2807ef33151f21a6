"""Tiny configs of architectures beyond those of tiny_models.py: what can be told apart by their attention, their
positions or the way they are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from support.tiny_models import COMMON, WINDOW


def _of(kind: str, **changes: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, kind)(**{**COMMON, **changes})


def _only(kind: str, **sizes: Any) -> Callable[[], PretrainedConfig]:
    """Of a config with names of its own for its sizes."""
    return lambda: getattr(transformers, kind)(vocab_size=COMMON["vocab_size"], bos_token_id=0, eos_token_id=1, **sizes)


_MOE: Final[dict[str, Any]] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_MLA: Final[dict[str, Any]] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_GROUPS: Final[dict[str, Any]] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_GPT2: Final[dict[str, Any]] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024, "initializer_range": 0.3}
_GEMMA4: Final[dict[str, Any]] = {
    "num_hidden_layers": 6,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": WINDOW,
    "vocab_size_per_layer_input": COMMON["vocab_size"],
    "hidden_size_per_layer_input": 8,
}
_LONGROPE: Final[dict[str, Any]] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 96,
}

ZOO: Final[dict[str, Callable[[], PretrainedConfig]]] = {
    "phimoe: windows told by masks alone": _of("PhimoeConfig", num_local_experts=4, sliding_window=WINDOW),
    "afmoe: gated attention": _of("AfmoeConfig", num_dense_layers=1, head_dim=16, sliding_window=WINDOW, **_MOE),
    "opt: a decoder in the trunk": _only(
        "OPTConfig", hidden_size=64, num_hidden_layers=3, ffn_dim=96, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=32, init_std=0.3,
    ),
    "deepseek_v3: latent attention": _of(
        "DeepseekV3Config", first_k_dense_replace=1, n_routed_experts=8, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1, **_MLA,
    ),
    "gpt2: learned positions": _only("GPT2Config", scale_attn_by_inverse_layer_idx=True, **_GPT2),
    "gemma4: shared keys": _of("Gemma4TextConfig", global_head_dim=16, num_kv_shared_layers=2, **_GEMMA4),
    "phi3: longrope": _of("Phi3Config", original_max_position_embeddings=96, rope_parameters=_LONGROPE),
    "llama: dynamic": _of("LlamaConfig", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
    "apertus": _of("ApertusConfig"),
    "aria_text": _of("AriaTextConfig", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "axk1": _of("AXK1Config", head_dim=8, **_MLA, **_GROUPS),
    "bert: a decoder": _of("BertConfig", is_decoder=True),
    "arcee": _of("ArceeConfig"),
    "biogpt": _of("BioGptConfig"),
    "bitnet": _of("BitNetConfig"),
    "cohere": _of("CohereConfig"),
    "cohere2": _of("Cohere2Config", num_hidden_layers=4, sliding_window=WINDOW),
    "cohere2_moe": _of("Cohere2MoeConfig", num_hidden_layers=4, head_dim=16, sliding_window=WINDOW, **_MOE),
    "ctrl": _only("CTRLConfig", n_embd=64, n_layer=3, n_head=4, dff=96, n_positions=512, initializer_range=0.3),
    "cwm": _of("CwmConfig", num_hidden_layers=4, head_dim=16, sliding_window=WINDOW),
    "deepseek_v2": _of(
        "DeepseekV2Config", first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=48, n_shared_experts=1, **_MLA,
    ),
    "dots1": _of(
        "Dots1Config", n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1,
        first_k_dense_replace=1, n_group=2, topk_group=1, sliding_window=WINDOW,
    ),
    "ernie4_5": _of("Ernie4_5Config", head_dim=16),
    "ernie4_5_moe": _of(
        "Ernie4_5_MoeConfig", moe_num_experts=4, moe_k=2, moe_intermediate_size=48, moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "exaone4": _of("Exaone4Config", num_hidden_layers=4, sliding_window=WINDOW),
    "exaone_moe": _of(
        "ExaoneMoeConfig", num_hidden_layers=4, head_dim=16, sliding_window=WINDOW, num_experts=8, **_GROUPS
    ),
    "flex_olmo": _of("FlexOlmoConfig", num_experts=4, num_experts_per_tok=2),
    "gemma": _of("GemmaConfig", head_dim=16),
    "gemma3": _of("Gemma3TextConfig", num_hidden_layers=6, head_dim=16, sliding_window=WINDOW),
    "gemma4: keys are values": _of(
        "Gemma4TextConfig", global_head_dim=32, num_kv_shared_layers=0, attention_k_eq_v=True, **_GEMMA4
    ),
    "glm": _of("GlmConfig", head_dim=16),
    "glm4": _of("Glm4Config", head_dim=16),
    "glm4_moe": _of(
        "Glm4MoeConfig", n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1,
        first_k_dense_replace=1, n_group=2, topk_group=1, head_dim=16,
    ),
    "glm4_moe_lite": _of("Glm4MoeLiteConfig", head_dim=8, **_MLA, **_GROUPS),
    "gpt2: upcast": _only("GPT2Config", reorder_and_upcast_attn=True, **_GPT2),
    "gpt2: unscaled": _only("GPT2Config", scale_attn_weights=False, **_GPT2),
    "gpt_bigcode": _only("GPTBigCodeConfig", **_GPT2),
    "gpt_neox": _of("GPTNeoXConfig"),
    "granite": _of(
        "GraniteConfig", attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=3.0
    ),
    "granitemoe": _of("GraniteMoeConfig", num_local_experts=4),
    "granitemoeshared": _of("GraniteMoeSharedConfig", num_local_experts=4, shared_intermediate_size=48),
    "helium": _of("HeliumConfig", head_dim=16),
    "hunyuan_v1_dense": _of("HunYuanDenseV1Config", head_dim=16),
    "hunyuan_v1_moe": _of("HunYuanMoEV1Config", head_dim=16, num_experts=4, moe_topk=2),
    "hy_v3": _of("HYV3Config", head_dim=16, **_MOE),
    "hyperclovax": _of("HyperCLOVAXConfig", head_dim=16),
    "jais2": _of("Jais2Config", head_dim=16),
    "jetmoe": _of("JetMoeConfig", num_key_value_heads=4, kv_channels=16, num_local_experts=4),
    "laguna": _of(
        "LagunaConfig", num_hidden_layers=4, head_dim=16, sliding_window=WINDOW, shared_expert_intermediate_size=48,
        layer_types=["sliding_attention", "full_attention"] * 2, **_MOE,
    ),
    "llama: biases": _of("LlamaConfig", attention_bias=True, mlp_bias=True),
    "llama: llama3": _of(
        "LlamaConfig",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama: yarn": _of(
        "LlamaConfig",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256
        },
    ),
    "longcat_flash": _of(
        "LongcatFlashConfig", head_dim=8, ffn_hidden_size=96, expert_ffn_hidden_size=48, n_routed_experts=8, moe_topk=2,
        num_layers=2, **_MLA,
    ),
    "mellum": _of("MellumConfig", head_dim=16, **_MOE),
    "minicpm3": _of("MiniCPM3Config", **_MLA),
    "minimax_m2": _of("MiniMaxM2Config", head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "ministral": _of("MinistralConfig", head_dim=16, sliding_window=WINDOW),
    "ministral3: queries scaled by position": _of(
        "Ministral3Config",
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    ),
    "mixtral": _of("MixtralConfig", num_local_experts=4, sliding_window=WINDOW),
    "modernbert-decoder": _of("ModernBertDecoderConfig", num_hidden_layers=4, local_attention=WINDOW),
    "nanochat": _of("NanoChatConfig"),
    "olmo": _of("OlmoConfig"),
    "olmo3": _of("Olmo3Config", num_hidden_layers=4, sliding_window=WINDOW),
    "olmoe": _of("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "persimmon": _of("PersimmonConfig"),
    "phi": _of("PhiConfig", partial_rotary_factor=0.5, qk_layernorm=True),
    "qwen2: windows in some layers": _of(
        "Qwen2Config", num_hidden_layers=4, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen2_moe": _of("Qwen2MoeConfig", shared_expert_intermediate_size=48, **_MOE),
    "seed_oss": _of("SeedOssConfig", head_dim=16),
    "smollm3: no positions in some layers": _of("SmolLM3Config", num_hidden_layers=4, no_rope_layer_interval=2),
    "solar_open": _of("SolarOpenConfig", head_dim=16, **_GROUPS),
    "starcoder2": _of("Starcoder2Config", sliding_window=WINDOW),
    "vaultgemma": _of("VaultGemmaConfig", num_hidden_layers=4, head_dim=16, sliding_window=WINDOW),
    "youtu": _of("YoutuConfig", head_dim=8, **_MLA),
}  # fmt: skip

REFUSED: Final[dict[str, tuple[Callable[[], PretrainedConfig], str]]] = {
    "gpt_oss": (
        _of("GptOssConfig", num_hidden_layers=4, head_dim=16, sliding_window=WINDOW, num_local_experts=4),
        "attention sinks",
    ),
    "gemma3, bidirectional": (
        _of("Gemma3TextConfig", num_hidden_layers=4, head_dim=16, use_bidirectional_attention=True),
        "is not causal",
    ),
    "diffllama": (_of("DiffLlamaConfig"), "attends twice"),
    "mpt": (_only("MptConfig", d_model=64, n_heads=4, n_layers=2, max_seq_len=1024), "MptForCausalLM cannot be run"),
    "bloom": (_only("BloomConfig", hidden_size=64, n_layer=2, n_head=4), "0 of them call transformers' attention"),
    "bert": (_of("BertConfig"), "is not causal"),
    "mamba": (_only("MambaConfig", hidden_size=64, num_hidden_layers=2), "'linear_attention'"),
}
"""What the worker lacks for them, as it says."""


def zoo_model(config: PretrainedConfig) -> PreTrainedModel:
    """transformers' own, with random weights in float32 on the CPU and eager attention."""
    config.dtype = torch.float32
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.train(False)
    return model
