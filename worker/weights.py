"""Building the transformers module on its device: weights from safetensors, or random ones from the config alone."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .attention.registry import ATTENTION_NAME
from .loading import Progress
from .sources import LoadError, ModelSource


def dummy_module(
    source: ModelSource, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, experts: str | None
) -> PreTrainedModel:
    """Random weights as the model's own initialisation gives them, made on the device in dtype; the same for the same
    seed and device. torch's global random state is left as it was."""
    with (
        _named_failures(source, "it cannot be built"),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.device(device),
    ):
        torch.manual_seed(source.seed)
        module: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=source.trust_remote_code,
            **_experts(experts),
        )
    return _frozen(module)


def safetensors_module(
    source: ModelSource,
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    experts: str | None,
    progress: Progress,
) -> PreTrainedModel:
    """The model's weights from `folder`. A LoadError names weights that the files lack."""
    options = _experts(experts)
    # With accelerate, transformers copies each tensor straight to the device; without it, through host memory.
    direct = device.type != "cpu" and importlib.util.find_spec("accelerate") is not None
    if direct:
        options["device_map"] = {"": device}
    loaded: Any
    with _named_failures(source, "its weights cannot be loaded"), _reporting(progress):
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    module, info = loaded
    sizes = sorted((str(name), tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"])
    for kind, names in (
        ("missing_keys", sorted(map(str, info["missing_keys"]))),
        ("mismatched_keys", [f"{name} has shape {stored} instead of {wanted}" for name, stored, wanted in sizes]),
    ):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise LoadError(f"{source.model}: its weight files do not fit its config ({kind}: {shown})")
    return _frozen(module if direct else module.to(device))


@contextmanager
def _named_failures(source: ModelSource, what: str) -> Iterator[None]:
    """Whatever transformers raises over a model becomes a LoadError that names it; a full device stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except KeyError as error:
        if error.args != (ATTENTION_NAME,):
            raise LoadError(f"{source.model}: {what}: KeyError {error}") from error
        raise LoadError(
            f"{source.model}: {what}: its code chooses among attention classes of its own and does not call "
            "transformers' attention registry"
        ) from error
    except Exception as error:
        raise LoadError(f"{source.model}: {what}: {error}") from error


def _experts(implementation: str | None) -> dict[str, Any]:
    """The option that chooses how transformers runs a mixture of experts; None leaves the choice to it."""
    return {} if implementation is None else {"experts_implementation": implementation}


def _frozen(module: PreTrainedModel) -> PreTrainedModel:
    module.train(False)
    module.requires_grad_(False)
    return module


@contextmanager
def _reporting(progress: Progress) -> Iterator[None]:
    """Turn transformers' progress bars of this thread into calls of `progress` while loading.

    transformers' hook is global; bars of other threads go on as they were."""
    thread = threading.get_ident()

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() == thread:
            return _Reporter(progress, *args, **kwargs)
        return previous(factory, args, kwargs) if previous is not None else factory(*args, **kwargs)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _Reporter:
    """As much of tqdm as transformers uses."""

    def __init__(
        self, progress: Progress, iterable: Iterable[Any] = (), *, desc: str = "", total: int | None = None, **_: Any
    ) -> None:
        self._progress = progress
        self._items = iterable
        self._what = desc or "loading weights"
        self._total = total or (len(iterable) if isinstance(iterable, Sized) else 0)
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self._done += n
        if self._total:
            self._progress(self._what, min(1.0, self._done / self._total))

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def set_description(self, desc: str, **_: Any) -> None:
        self._what = desc

    def set_postfix(self, *_: Any, **__: Any) -> None:
        pass
