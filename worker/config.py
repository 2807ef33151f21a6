"""Options of a worker process. The command line's flags are generated from these fields, named as vLLM's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..protocol.logs import LogFormat
from ..protocol.messages import MAX_BLOCKS, MAX_CONTEXT, MAX_SLOTS


class WorkerConfig(BaseModel):
    """One worker. Unknown options are refused, and options that do not fit together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheduler: Annotated[
        str, Field(description="The scheduler's address for workers: ipc:///directory or tcp://host:port.")
    ]
    keys: Annotated[
        str | None,
        Field(
            description="Key file or directory for a tcp address (see `tandem keys`); default: $TANDEM_KEYS, else "
            "~/.config/tandem/keys."
        ),
    ] = None
    insecure: Annotated[bool, Field(description="Allow TCP without keys.")] = False
    name: Annotated[str, Field(max_length=256, description="The worker's name in logs.")] = ""

    model: Annotated[
        str, Field(description="Folder or hub id of a transformers model; without it, the built-in model.")
    ]
    revision: Annotated[str | None, Field(description="Branch, tag or commit of a hub model.")] = None
    trust_remote_code: Annotated[bool, Field(description="Run Python code that comes with the model.")] = False
    served_model_name: Annotated[str | None, Field(max_length=256, description="What clients call the model.")] = None
    load_format: Annotated[
        Literal["auto", "safetensors", "dummy"],
        Field(description="auto: the model's weights; dummy: random weights from its config alone."),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Field(description="Weights and activations; auto: as the model says, float32 on a CPU."),
    ] = "auto"
    seed: Annotated[int | None, Field(ge=0, le=2**63 - 1, description="Seed of dummy weights; default: 0.")] = None
    quantization: Annotated[
        Literal["fp8"] | None,
        Field(description="fp8: weights of linear layers, and what they are multiplied by, in 8 bits."),
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"], Field(description="auto: as the activations; fp8: half the memory, rounded.")
    ] = "auto"

    device: Annotated[Literal["auto", "cuda", "cpu"], Field(description="auto: CUDA if there is a GPU.")] = "auto"
    attention_backend: Annotated[
        Literal["auto", "flashinfer", "reference"],
        Field(description="auto: FlashInfer on CUDA in 16 bits, else the reference."),
    ] = "auto"
    batch_invariant: Annotated[
        bool,
        Field(description="Tokens and logprobs are the same bits however a request was batched; slower."),
    ] = False
    threads: Annotated[
        int, Field(ge=0, le=1024, description="CPU threads of the computation; 0: one less than there are cores.")
    ] = 0

    max_model_len: Annotated[
        int | None,
        Field(ge=2, le=MAX_CONTEXT, description="Most tokens of a request, prompt and output; default: the model's."),
    ] = None
    max_num_seqs: Annotated[int, Field(ge=1, le=MAX_SLOTS, description="Most requests that run at once.")] = 256
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=2**20, description="Most tokens of one step.")] = 2048
    block_size: Annotated[Literal[8, 16, 32, 64, 128], Field(description="Tokens of a KV cache block.")] = 16
    gpu_memory_utilization: Annotated[
        float | None,
        Field(gt=0.0, le=1.0, description="Share of the GPU's memory that the worker may use in all; default: 0.9."),
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None,
        Field(ge=1, description="Size of the KV cache; default: what gpu_memory_utilization leaves, 1 GiB on a CPU."),
    ] = None
    num_gpu_blocks_override: Annotated[
        int | None, Field(ge=1, le=MAX_BLOCKS, description="Number of KV cache blocks, whatever memory there is.")
    ] = None
    enforce_eager: Annotated[
        bool, Field(description="Run the model's operations one by one: no compiled code and no CUDA graphs.")
    ] = False
    max_cudagraph_capture_size: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Most rows of a decode step that runs as a CUDA graph; default: 512."),
    ] = None
    lookahead: Annotated[
        int, Field(ge=0, le=8, description="Steps queued ahead of the running one; 0 is synchronous.")
    ] = 1
    log_level: Annotated[
        str, Field(description="debug, info, warning or error.", pattern="^(debug|info|warning|error)$")
    ] = "info"
    trace_dir: Annotated[
        str | None,
        Field(description="Directory to write, at the end, when this process did what (docs/benchmarks.md)."),
    ] = None
    nvtx: Annotated[bool, Field(description="Mark steps and their parts as NVTX ranges, for Nsight (CUDA).")] = False
    log_format: Annotated[LogFormat, Field(description="Log lines as text, or as a JSON object each.")] = "text"

    @model_validator(mode="after")
    def _fit_together(self) -> WorkerConfig:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running request gets a token in every step"
            )
        if self.seed is not None and self.load_format != "dummy":
            raise ValueError(
                f"seed ({self.seed}) is the seed of dummy weights, but load_format is {self.load_format!r}; leave it "
                "out, or use load_format 'dummy'"
            )
        sizes = [
            f"{name} ({value})"
            for name in ("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override")
            if (value := getattr(self, name)) is not None
        ]
        if len(sizes) > 1:
            raise ValueError(f"{' and '.join(sizes)} each say how large the KV cache is; give one of them")
        if self.max_cudagraph_capture_size is not None and self.enforce_eager:
            raise ValueError(
                f"max_cudagraph_capture_size ({self.max_cudagraph_capture_size}) is given, but enforce_eager leaves "
                "CUDA graphs out; give one of them"
            )
        if self.max_cudagraph_capture_size is not None and self.max_cudagraph_capture_size > self.max_num_seqs:
            raise ValueError(
                f"max_cudagraph_capture_size ({self.max_cudagraph_capture_size}) must be at most max_num_seqs "
                f"({self.max_num_seqs}): no step decodes for more requests than run at once"
            )
        if self.max_cudagraph_capture_size is not None and self.device == "cpu":
            raise ValueError(
                f"max_cudagraph_capture_size ({self.max_cudagraph_capture_size}) needs a GPU, but device is 'cpu'"
            )
        if self.nvtx and self.device == "cpu":
            raise ValueError("nvtx needs a GPU, but device is 'cpu'")
        if self.gpu_memory_utilization is not None and self.device == "cpu":
            raise ValueError(
                f"gpu_memory_utilization ({self.gpu_memory_utilization:g}) needs a GPU, but device is 'cpu'; "
                "kv_cache_memory_bytes sizes the cache of a CPU worker"
            )
        return self
