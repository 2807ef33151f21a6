"""From a folder or a hub id to a config, weights and tokenizer files, with what the worker lacks refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .sources import LoadError, ModelSource, alike, folder_here

Progress = Callable[[str, float], None]
"""Called with what is going on and the share of it that is done, 0 to 1."""

_SMALL_FILES: Final = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_FOREIGN_TOKENIZERS: Final = ("*.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")
_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
_WEIGHT_KINDS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def local_folder(source: ModelSource) -> Path:
    """The folder that holds the model's small files (config, tokenizer), fetched from the hub if need be."""
    folder = folder_here(source)
    if folder is not None:
        return folder
    return _fetch(source, _SMALL_FILES + (["*.py"] if source.trust_remote_code else []), source.revision)


def weight_files(source: ModelSource, folder: Path, progress: Progress) -> list[Path]:
    """The model's safetensors files, fetched from the hub if `folder` is a hub snapshot without them."""
    index, whole = folder / "model.safetensors.index.json", "model.safetensors"
    sharded = index.is_file() and not (folder / whole).is_file()  # transformers prefers a whole one too
    names = _shards(source, index) if sharded else [whole]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not Path(source.model).expanduser().is_dir():
        for done, name in enumerate(missing):
            progress(f"downloading {name} ({done + 1} of {len(missing)})", done / len(missing))
            _fetch(source, [name], folder.name)  # of the same commit as the config
        missing = [name for name in names if not (folder / name).is_file()]
    if missing and sharded:
        raise LoadError(
            f"{source.model} lacks {len(missing)} of the {len(names)} files that {index.name} names "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); copy or download them again"
        )
    if missing:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f" (found {', '.join(others[:3])}, formats the worker does not load)" if others else ""
        raise LoadError(
            f"{source.model} lacks {missing[0]}{found}; convert the weights to safetensors, "
            "or use load format 'dummy' for random weights"
        )
    return [folder / name for name in names]


def _shards(source: ModelSource, index: Path) -> list[str]:
    """The names of the files that an index of sharded weights tells, each once. Raises LoadError for one that
    transformers could not follow, or that leads out of the model's folder."""
    try:
        given = json.loads(index.read_bytes())
    except ValueError as error:
        raise LoadError(f"{source.model}: {index.name} cannot be read: {error}; download it again") from error
    of = given.get("weight_map") if isinstance(given, dict) else None
    if not isinstance(of, dict) or not of or not all(isinstance(name, str) for name in of.values()):
        raise LoadError(f"{source.model}: {index.name} has no weight_map from tensors to files; download it again")
    if not isinstance(given.get("metadata"), dict):
        raise LoadError(
            f"{source.model}: {index.name} has no metadata, without which transformers does not read it; add "
            '"metadata": {}'
        )
    names = sorted(set(of.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or Path(name).suffix != ".safetensors":
            raise LoadError(f"{source.model}: {index.name} names {name!r:.100}, which is no weight file of the model")
    return names


def read_config(source: ModelSource, folder: Path) -> PretrainedConfig:
    """The model's config, checked by `check_config`."""
    _require_trust(source, folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:
        why = " ".join(str(error).split())
        raise LoadError(f"{source.model}: its config cannot be read: {type(error).__name__}: {why}") from error
    if not isinstance(config, PretrainedConfig):
        raise LoadError(f"{source.model}: its config is not a transformers config but a {type(config).__name__}")
    check_config(config)
    return config


def _require_trust(source: ModelSource, folder: Path) -> None:
    """LoadError if only code that comes with the model can build it, and nobody has said that it may run."""
    if source.trust_remote_code:
        return
    try:
        given = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError):
        return  # transformers says what is wrong
    code = given.get("auto_map") if isinstance(given, dict) else None
    if isinstance(code, dict) and str(given.get("model_type")) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names = ", ".join(map(str, code.values()))
        raise LoadError(
            f"{source.model} can only be built by Python code that comes with it ({names}). Read that code, and if it "
            "may do whatever you may, pass --trust-remote-code (trust_remote_code=True to LLM)"
        )


def check_config(config: PretrainedConfig) -> None:
    """Refuse, by LoadError, what a config alone shows that the worker lacks."""
    for reason in (
        _architecture_problem(config),
        _attention_problem(config),
        "it is quantized (quantization_config)" if getattr(config, "quantization_config", None) else None,
    ):
        if reason is not None:
            raise LoadError(f"the worker does not support this {config.model_type or 'custom'} model: {reason}")


def _architecture_problem(config: PretrainedConfig) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoder-only models are supported"
    if config.get_text_config() is not config or hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return "it is multimodal; use its text-only checkpoint"
    if getattr(config, "auto_map", None):
        return None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "transformers has no causal language model for it"
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    accepted = {classes} if isinstance(classes, str) else set(classes)
    named = getattr(config, "architectures", None) or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return f"its architectures are no list of names: {named!r:.100}"
    if named and not accepted & set(named):
        return f"it is a {named[0]}, not a causal language model ({', '.join(sorted(accepted))})"
    return None


def _attention_problem(config: PretrainedConfig) -> str | None:
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        return f"it has layers of type {', '.join(map(repr, unknown))} (supported: {', '.join(sorted(_LAYER_TYPES))})"
    if getattr(config, "attention_chunk_size", None):
        return "it uses chunked attention (attention_chunk_size)"
    return None


def resolve_dtype(
    requested: str | torch.dtype, config: PretrainedConfig, device: torch.device, weights: list[Path]
) -> torch.dtype:
    """The dtype of weights and activations. auto: the config's, else the first weight's; on a CPU float32, because most
    CPUs have no 16-bit arithmetic to speak of: the built-in model reads a prompt many times slower in bfloat16."""
    if isinstance(requested, torch.dtype):
        return requested
    if requested != "auto":
        if requested not in _DTYPES:
            raise LoadError(f"dtype {requested!r} is unknown; choose auto, {', '.join(_DTYPES)}")
        return _DTYPES[requested]
    if device.type == "cpu":
        return torch.float32
    given = config.dtype
    dtype = _DTYPES.get(str(given).removeprefix("torch.")) if given is not None else _first_dtype(weights)
    return torch.bfloat16 if dtype is None else dtype


def _first_dtype(weights: list[Path]) -> torch.dtype | None:
    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for path in weights[:1]:
        return next((names[kind] for kind in _stored(path).values() if kind in names), None)
    return None


def check_weights(weights: list[Path]) -> None:
    """Raises LoadError for a safetensors file that is damaged, or holds weights that are no floating-point numbers of
    16 bits or more: transformers would take them for such, and leave their scales out."""
    for path in weights:
        for name, kind in _stored(path).items():
            if name.endswith(".weight") and kind not in _WEIGHT_KINDS:
                raise LoadError(
                    f"{path}: {name} is kept as {kind}: it is quantized, though the config has no quantization_config, "
                    "and the worker loads unquantized weights only (F64, F32, F16, BF16)"
                )


def _stored(path: Path) -> dict[str, str]:
    """The names of a safetensors file's tensors with what their numbers are kept as. Raises LoadError."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        with path.open("rb") as begin:
            pointer = begin.read(32).startswith(b"version https://git-lfs")
        remedy = "it is a Git LFS pointer: run git lfs pull there" if pointer else "copy or download it again"
        raise LoadError(f"{path} is no whole safetensors file: {error}; {remedy}") from error


def max_positions(config: PretrainedConfig) -> int | None:
    """Most tokens of a sequence that the model's config allows; None if it sets no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit and limit > 0 else None


def tokenizer_files(source: ModelSource) -> dict[str, bytes]:
    """The files from which a client builds the tokenizer and chat template, by name.

    Always with tokenizer.json when the model has a tokenizer at all: other formats are converted by transformers, or
    refused with a LoadError. A model without any tokenizer file gives none (it can be used with token ids).
    """
    folder = local_folder(source)
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    legacy_template = folder / "chat_template.json"
    if "chat_template.jinja" not in files and legacy_template.is_file():
        files["chat_template.jinja"] = _legacy_template(source, legacy_template)
    foreign = sorted(path.name for pattern in _FOREIGN_TOKENIZERS for path in folder.glob(pattern))
    if "tokenizer.json" not in files and foreign:
        files["tokenizer.json"] = _convert_tokenizer(source, folder, foreign)
    return files


def _legacy_template(source: ModelSource, path: Path) -> bytes:
    try:
        template = json.loads(path.read_bytes())["chat_template"]
        if not isinstance(template, str):
            raise TypeError(f"chat_template is a {type(template).__name__}, not a string")
        return template.encode()
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{source.model}: {path.name} cannot be used: {type(error).__name__}: {error}; mend or remove it"
        ) from error


def _convert_tokenizer(source: ModelSource, folder: Path, found: list[str]) -> bytes:
    remedy = "save the tokenizer as tokenizer.json (AutoTokenizer...save_pretrained) next to the model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (ValueError, OSError, ImportError, KeyError, TypeError, RuntimeError) as error:
        raise LoadError(
            f"{source.model}: its tokenizer ({', '.join(found)}) cannot be converted to tokenizer.json: {error}; "
            f"{remedy}"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LoadError(
            f"{source.model}: its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json form; {remedy}"
        )
    return str(backend.to_str()).encode()


def _fetch(source: ModelSource, patterns: list[str], revision: str | None) -> Path:
    try:
        return Path(snapshot_download(source.model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise LoadError(
            f"{source.model} is neither a folder here nor could it be fetched from the hub{alike(source.model)}: "
            f"{error} "
            "(a hub id is written OWNER/NAME, and without a model the small built-in one is served; HF_TOKEN gives "
            "access to gated models; HF_HUB_OFFLINE allows only what is cached)"
        ) from error
