"""What a worker tells the scheduler, and through it the clients, about its model."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Final

from transformers import PreTrainedModel

from ..protocol.messages import MAX_CONTEXT, FileInfo, ModelDescription
from .config import WorkerConfig
from .generation_config import default_sampling, stop_token_ids
from .loading import local_folder, max_positions, weight_files
from .model import PagedModel
from .rope import fixed_positions
from .sources import LoadError, ModelSource

log = logging.getLogger(__name__)

SAMPLES: Final = 33
SAMPLE_BYTES: Final = 64 * 1024


def describe(config: WorkerConfig, source: ModelSource, model: PagedModel, max_model_len: int) -> ModelDescription:
    return ModelDescription(
        name=config.served_model_name or default_name(config.model),
        architecture=str((getattr(model.config, "architectures", None) or [type(model.config).__name__])[0]),
        dtype=_precision(config, model),
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=stop_token_ids(source, model.config),
        default_sampling=default_sampling(source),
        weights=fingerprint(source),
        batch_invariant=config.batch_invariant,
    )


def _precision(config: WorkerConfig, model: PagedModel) -> str:
    """bfloat16, or bfloat16+fp8 (weights), bfloat16+fp8kv (KV cache), bfloat16+fp8+fp8kv."""
    parts = [str(model.dtype).removeprefix("torch.")]
    if config.quantization is not None:
        parts.append(config.quantization)
    if config.kv_cache_dtype != "auto":
        parts.append(f"{config.kv_cache_dtype}kv")
    return "+".join(parts)


def default_name(model: str) -> str:
    """What clients call a model that was given no name: a hub id in full, a folder by its last part."""
    folder = Path(model).expanduser()
    return folder.resolve().name or model if folder.is_dir() else model


def choose_max_model_len(config: WorkerConfig, model: PagedModel | PreTrainedModel) -> int:
    """The option, or what the model's config allows (see also `rope.fixed_positions`). Raises LoadError if the option
    is more than that, or neither says."""
    allowed, fixed, asked = max_positions(model.config), fixed_positions(model.config), config.max_model_len
    if allowed is not None and asked is not None and asked > allowed:
        raise LoadError(f"--max-model-len {asked} is over the {allowed} positions of the model's config")
    if fixed is not None and asked is not None and asked > fixed[0]:
        raise LoadError(
            f"--max-model-len {asked} is over {fixed[0]} tokens, beyond which the model's rope type {fixed[1]!r} would "
            f"follow the longest sequence of a batch, so that requests changed each other; give at most {fixed[0]}"
        )
    if asked is not None:
        return asked
    if allowed is None:
        raise LoadError("the model's config does not say how long a sequence may be; give --max-model-len")
    if fixed is not None:
        log.warning(
            "sequences may have %d tokens instead of %d: beyond, rope type %r would follow the longest one of a batch",
            fixed[0], allowed, fixed[1],
        )  # fmt: skip
    return min(allowed, MAX_CONTEXT, allowed if fixed is None else fixed[0])


def fingerprint(source: ModelSource) -> str:
    """A hash that two workers share if they loaded the same thing: config and weight files by name, size and content,
    or the seed of dummy weights. Of a large file's content SAMPLES pieces are hashed, evenly spread from its start to
    its end: the weights of a fine-tune differ from its model's in most places, but need not in any certain one."""
    folder = local_folder(source)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if source.load_format == "dummy":
        digest.update(f"dummy {source.seed}".encode())
    else:
        for path in weight_files(source, folder, lambda stage, done: None):
            digest.update(f"{path.name} {os.path.getsize(path)}".encode())
            _hash_samples(path, digest)
    return digest.hexdigest()


def _hash_samples(path: Path, digest: hashlib._Hash) -> None:
    last = os.path.getsize(path) - SAMPLE_BYTES
    with path.open("rb") as file:
        if last <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
            return
        for index in range(SAMPLES):
            file.seek(last * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def file_infos(files: dict[str, bytes]) -> tuple[FileInfo, ...]:
    return tuple(
        FileInfo(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in sorted(files.items())
    )
