"""`python -m tandem.worker.main --config-json '{…}'`: a worker process."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
from typing import Any

import torch
from pydantic import ValidationError

from ..protocol.errors import ConfigurationError, TandemError
from ..protocol.messages import PROTOCOL_VERSION, WorkerHello
from ..protocol.status import StatusPipe
from ..protocol.transport import Address
from . import invariance
from .config import WorkerConfig
from .describe import choose_max_model_len, describe, file_infos
from .link import Failure, Link, Stop
from .loading import LoadError, ModelSource, tokenizer_files
from .memory import count_blocks
from .model import PagedModel, load_model
from .pipeline import Pipeline
from .session import Results, Session
from .warmup import warm_up

log = logging.getLogger(__name__)


def run(config: WorkerConfig, status: StatusPipe | None = None) -> int:
    """Loads the model and serves until SIGTERM or SIGINT. Returns the exit code: 0; 1 if a step failed or the scheduler
    refused the worker; 2 if the model or the options cannot work."""
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    status = status or StatusPipe(None)
    try:
        return _Worker(config, status).run()
    except (ConfigurationError, LoadError) as error:
        return _fail(status, str(error), 2)
    except TandemError as error:
        return _fail(status, str(error), 1)
    except torch.cuda.OutOfMemoryError as error:
        return _fail(
            status, f"out of GPU memory: {error}; lower --gpu-memory-utilization or --max-num-batched-tokens", 1
        )


def _fail(status: StatusPipe, message: str, code: int) -> int:
    status.error(message)
    sys.stderr.write(f"tandem worker: {message}\n")
    return code


class _Worker:
    """The pieces of the process, put together in order."""

    def __init__(self, config: WorkerConfig, status: StatusPipe) -> None:
        self._config = config
        self._status = status
        self._address = Address(config.scheduler)
        self._address.require_safe(config.insecure)

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _interrupt)
        try:
            hello, model, files = self._load()
        except KeyboardInterrupt:
            return 0  # asked to stop while loading
        link = Link(self._address.endpoint("workers"))
        results = Results(link)
        pipeline = self._open_pipeline(model, hello, link, results)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: link.inbox.put(Stop()))
        self._status.ready(name=hello.name, num_blocks=hello.num_blocks)
        try:
            with link.outbox() as outbox:
                Session(link, outbox, pipeline, hello, files).run()
            pipeline.close()
        finally:
            results.close()
            link.close()
        return 0

    def _load(self) -> tuple[WorkerHello, PagedModel, dict[str, bytes]]:
        config = self._config
        device = _device(config.device)
        if config.batch_invariant:
            invariance.configure_threads(config.threads)
        elif config.threads:
            torch.set_num_threads(config.threads)
        elif device.type == "cpu":
            # Threads that share a product wait for each other busily, so one whose core is taken by the scheduler or a
            # client holds up all.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
        source = ModelSource(
            model=config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            load_format=config.load_format,
            seed=config.seed,
        )
        model = load_model(
            source,
            dtype=config.dtype,
            device=device,
            attention_backend=config.attention_backend,
            batch_invariant=config.batch_invariant,
            lanes=config.lookahead + 1,
            progress=self._status.progress,
        )
        max_model_len = choose_max_model_len(config, model)
        num_blocks = count_blocks(config, model, max_model_len, self._status.progress)
        model.allocate_kv_cache(num_blocks, config.block_size)
        warm_up(config, model, self._status.progress)
        files = tokenizer_files(source)
        hello = WorkerHello(
            version=PROTOCOL_VERSION,
            name=config.name or f"{socket.gethostname()}-{os.getpid()}",
            pid=os.getpid(),
            instance=secrets.randbits(62),
            model=describe(config, source, model, max_model_len),
            files=file_infos(files),
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            lookahead=config.lookahead,
        )
        return hello, model, files

    def _open_pipeline(self, model: PagedModel, hello: WorkerHello, link: Link, results: Results) -> Pipeline:
        return Pipeline(
            model,
            num_blocks=hello.num_blocks,
            block_size=hello.block_size,
            slots=hello.max_num_seqs,
            max_model_len=hello.model.max_model_len,
            max_tokens=hello.max_num_batched_tokens,
            lookahead=hello.lookahead,
            on_result=results.send,
            on_failure=lambda error: link.inbox.put(Failure(error)),
        )


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: this machine has no usable CUDA GPU; use --device cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tandem worker")
    parser.add_argument("--config-json", required=True, help="the fields of WorkerConfig as a JSON object")
    parser.add_argument("--status-fd", type=int, default=None, help="file descriptor that takes status lines (JSON)")
    arguments = parser.parse_args(argv)
    status = StatusPipe(arguments.status_fd)
    try:
        config = WorkerConfig.model_validate_json(arguments.config_json)
    except ValidationError as error:
        return _fail(status, str(error), 2)
    return run(config, status)


if __name__ == "__main__":
    sys.exit(main())
