"""`python -m tandem.worker.probe --config-json '{…}'`: what a worker with these options would use, as JSON on stdout,
found without loading weights: the model is built without data. For `tandem doctor`."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..protocol.errors import ConfigurationError
from . import inspection
from .attention import flashinfer, registry
from .config import WorkerConfig
from .describe import choose_max_model_len
from .kv_cache import kv_bytes_per_block
from .loading import local_folder, read_config, resolve_dtype, weight_files
from .memory import CPU_CACHE_BYTES, GPU_MEMORY_UTILIZATION, fit_blocks
from .model import choose_backend
from .process import choose_device
from .quantization import FP8
from .quantization import problem as quantization_problem
from .sources import ModelSource
from .trunk import trunk_and_head


def probe(config: WorkerConfig) -> dict[str, Any]:
    """Whatever can be told; `problem` says why a worker with these options would not start."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, **_gpus()}
    try:
        device = choose_device(config)
        found["device"] = str(device)
        _look_at_model(config, device, found)
    except ConfigurationError as error:
        found["problem"] = str(error)
    return found


def _gpus() -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    gpus = []
    for index in range(torch.cuda.device_count() if usable else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {"cuda_usable": usable, "cuda_said": " ".join(str(one.message) for one in told), "gpus": gpus}


def _look_at_model(config: WorkerConfig, device: torch.device, found: dict[str, Any]) -> None:
    """Adds to `found`, as far as it gets. Raises ConfigurationError."""
    source = ModelSource(
        model=config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        load_format=config.load_format,
        seed=config.seed or 0,
    )
    folder = local_folder(source)
    read = read_config(source, folder)
    needs_weights = config.load_format != "dummy" and config.dtype == "auto" and read.dtype is None
    weights = weight_files(source, folder, lambda _stage, _done: None) if needs_weights else []
    dtype = resolve_dtype(config.dtype, read, device, weights)
    registry.register()
    with torch.device("meta"):
        module: PreTrainedModel = AutoModelForCausalLM.from_config(
            read,
            dtype=dtype,
            attn_implementation=registry.ATTENTION_NAME,
            trust_remote_code=config.trust_remote_code,
            # Of the ways to run a mixture of experts the one that does not look at values, which there are none of.
            experts_implementation="batched_mm",
        )
    trunk, _ = trunk_and_head(module)
    with inspection.named_failures(module):
        spec = inspection.inspect_layers(module, trunk, torch.device("meta"))
    backend = choose_backend(config.attention_backend, spec, dtype, device, config.batch_invariant)
    refused = quantization_problem(device, dtype) if config.quantization else None
    if refused is not None:
        raise ConfigurationError(f"--quantization fp8 cannot be used: {refused}")
    weight_bytes = sum(parameter.nbytes for parameter in module.parameters())
    if config.quantization:
        linears = (one for one in trunk.modules() if isinstance(one, nn.Linear))
        weight_bytes -= sum(one.weight.numel() * (dtype.itemsize - 1) for one in linears)
    kv_dtype = FP8 if config.kv_cache_dtype == "fp8" else dtype
    per_block = kv_bytes_per_block(spec, config.block_size, kv_dtype)
    max_model_len = choose_max_model_len(config, module)
    found |= {
        "architecture": type(module).__name__,
        "layers": len(spec),
        "dtype": str(dtype).removeprefix("torch."),
        "kv_dtype": str(kv_dtype).removeprefix("torch."),
        "weight_bytes": weight_bytes,
        "max_model_len": max_model_len,
        "block_bytes": per_block,
        "measured_at_start": device.type == "cuda"
        and config.num_gpu_blocks_override is None
        and config.kv_cache_memory_bytes is None,
        "attention_backend": backend,
        "why_not_flashinfer": None if backend == "flashinfer" else _why_not(config, spec, dtype, device),
        "captures": device.type == "cuda" and not config.enforce_eager,
        "compiles": device.type == "cuda" and not config.enforce_eager and not config.batch_invariant,
    }
    found["num_blocks"] = fit_blocks(config, per_block, max_model_len, lambda: _room(config, device, weight_bytes))


def _why_not(config: WorkerConfig, spec: Any, dtype: torch.dtype, device: torch.device) -> str:
    if config.attention_backend == "reference":
        return "--attention-backend reference"
    if config.batch_invariant:
        return "it is not batch-invariant"
    return flashinfer.problem(spec, dtype, device) or ""


def _room(config: WorkerConfig, device: torch.device, weight_bytes: int) -> tuple[int, str]:
    """Bytes for the KV cache, on CUDA before the largest step takes its own."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES, f"the CPU's default of {CPU_CACHE_BYTES} bytes"
    free, total = torch.cuda.mem_get_info(device)
    share = GPU_MEMORY_UTILIZATION if config.gpu_memory_utilization is None else config.gpu_memory_utilization
    gib, used = 2**30, total - free
    return (
        int(total * share) - used - weight_bytes,
        f"{share:.0%} of {total / gib:.1f} GiB, less {used / gib:.1f} GiB in use and {weight_bytes / gib:.1f} GiB of "
        "weights",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tandem doctor")
    parser.add_argument("--config-json", required=True, help="the fields of WorkerConfig as a JSON object")
    config = WorkerConfig.model_validate_json(parser.parse_args().config_json)
    print(json.dumps(probe(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
