"""A worker from its options to its last step: loads the model, compiles it, sees how much KV cache there is room for,
runs steps that nobody asked for, captures graphs, and serves."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from ..protocol.errors import ConfigurationError, TandemError
from ..protocol.messages import MAX_BLOCKS, PROTOCOL_VERSION, WorkerHello
from ..protocol.process import started_at
from ..protocol.status import StatusPipe
from ..protocol.tracing import Tracer
from . import invariance, products
from .compiling import cache_folder, keep_compiled_code
from .config import WorkerConfig
from .describe import choose_max_model_len, describe, file_infos
from .grammars.book import GrammarBook
from .grammars.checker import GrammarChecker
from .graphs import LARGEST_GRAPH, graph_sizes
from .link import Failure, Link
from .loading import tokenizer_files
from .memory import copy_bandwidth, count_blocks, weight_bytes_per_step
from .model import PagedModel, load_model
from .pieces import piece_sizes
from .pipeline import Pipeline
from .session import Session
from .sources import ModelSource
from .stopping import StopSignals
from .warmup import longest_step_s, warm_up

CLOSE_S: Final = 1.0
"""How long the end of the process waits for steps that the session has given up."""


def serve(config: WorkerConfig, status: StatusPipe, link: Link, stopping: StopSignals, tracer: Tracer) -> None:
    """Until asked to stop. Raises ConfigurationError if the options or the model cannot work, and whatever ends the
    session; the scheduler has been told then."""
    with _full_device_explained():
        hello, model, files = _load(config, status)
        stopping.tell(link.inbox)
        grammars = GrammarBook(files.get("tokenizer.json"), hello.model.vocab_size, hello.model.eos_token_ids)
        checker = GrammarChecker(grammars)
        pipeline = Pipeline(
            model,
            num_blocks=hello.num_blocks,
            block_size=hello.block_size,
            slots=hello.max_num_seqs,
            max_model_len=hello.model.max_model_len,
            max_tokens=hello.max_num_batched_tokens,
            lookahead=hello.lookahead,
            on_result=link.send,
            on_failure=lambda error: link.inbox.put(Failure(error)),
            grammars=grammars,
            tracer=tracer,
            nvtx=config.nvtx,
        )
        try:
            if model.capturable and not config.enforce_eager:
                pipeline.capture(_graph_sizes(config), status.progress)
            status.ready(name=hello.name, num_blocks=hello.num_blocks)
            session = Session(link, pipeline, hello, files, checker)
            session.run()
            if session.drained:
                status.drained()
        finally:
            checker.close()
            pipeline.close(CLOSE_S)


@contextmanager
def _full_device_explained() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        raise TandemError(
            f"out of GPU memory: {first_line} Lower --gpu-memory-utilization or --max-num-batched-tokens"
        ) from error


def _load(config: WorkerConfig, status: StatusPipe) -> tuple[WorkerHello, PagedModel, dict[str, bytes]]:
    device = choose_device(config)
    _set_threads(config, device)
    source = ModelSource(
        model=config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        load_format=config.load_format,
        seed=config.seed or 0,
    )
    if device.type == "cuda" and (config.batch_invariant or not config.enforce_eager):
        keep_compiled_code()
    model = load_model(
        source,
        dtype=config.dtype,
        device=device,
        attention_backend=config.attention_backend,
        batch_invariant=config.batch_invariant,
        lanes=config.lookahead + 1,
        progress=status.progress,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
    )
    weight_bytes, bandwidth = weight_bytes_per_step(model), copy_bandwidth(device)
    if device.type == "cuda" and not config.enforce_eager and not config.batch_invariant:
        status.progress("compiling the model", 0.0)
        model.compile(cache_folder() / "traces")
        if products.TUNED and model.compiled:
            rows = _graph_sizes(config)
            tokens = sorted({*rows, *piece_sizes(config.max_num_batched_tokens)})
            model.tune_products(rows, tokens, cache_folder() / "products", status.progress)
    max_model_len = choose_max_model_len(config, model)
    num_blocks = min(MAX_BLOCKS, count_blocks(config, model, max_model_len, status.progress))
    model.allocate_kv_cache(num_blocks, config.block_size)
    warm_up(config, model, status.progress)
    longest_s = longest_step_s(config, model, max_model_len, status.progress)
    files = tokenizer_files(source)
    hello = WorkerHello(
        version=PROTOCOL_VERSION,
        name=config.name or f"{socket.gethostname()}-{os.getpid()}",
        pid=os.getpid(),
        started=started_at(os.getpid()),
        instance=secrets.randbits(62),
        model=describe(config, source, model, max_model_len),
        files=file_infos(files),
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        lookahead=config.lookahead,
        longest_step_s=longest_s,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=model.kv_bytes_per_block(1),
        memory_bandwidth=bandwidth,
    )
    return hello, model, files


def _graph_sizes(config: WorkerConfig) -> list[int]:
    return graph_sizes(config.max_cudagraph_capture_size or min(config.max_num_seqs, LARGEST_GRAPH))


def _set_threads(config: WorkerConfig, device: torch.device) -> None:
    if config.batch_invariant and device.type == "cpu":
        invariance.configure_threads(config.threads)
    elif config.threads:
        torch.set_num_threads(config.threads)
    elif device.type == "cpu":
        # Threads that share a product wait for each other busily, so one whose core is taken by the scheduler or a
        # client holds up all.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))


def choose_device(config: WorkerConfig) -> torch.device:
    """Where the worker computes. Raises ConfigurationError for options that do not fit the machine."""
    device = _named_device(config)
    if config.batch_invariant and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigurationError(
            "--batch-invariant on a GPU needs the package triton, which comes with torch's builds for CUDA; leave it "
            "out, or add --device cpu"
        )
    return device


def _named_device(config: WorkerConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: this machine has no usable CUDA GPU; use --device cpu")
    if name == "cpu" and config.gpu_memory_utilization is not None:
        raise ConfigurationError(
            f"--gpu-memory-utilization {config.gpu_memory_utilization:g} is given, but this machine has no usable CUDA "
            "GPU; --kv-cache-memory-bytes sizes the cache of a CPU worker"
        )
    if name == "cpu" and config.max_cudagraph_capture_size is not None:
        raise ConfigurationError(
            f"--max-cudagraph-capture-size {config.max_cudagraph_capture_size} is given, but this machine has no "
            "usable CUDA GPU"
        )
    if name == "cpu" and config.nvtx:
        raise ConfigurationError("--nvtx is given, but this machine has no usable CUDA GPU")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)
