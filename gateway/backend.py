"""The service behind a gateway: the SDK's client, connected as soon as there is a model, and how the service does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from ..client.aio import AsyncClient
from ..client.tokenizer import Tokenizer
from ..protocol.errors import AuthenticationError, ConfigurationError, ServiceUnavailable, VersionMismatch
from ..protocol.messages import ModelDescription, Stats
from .config import GatewayConfig
from .errors import ApiError, unavailable

log = logging.getLogger(__name__)

POLL_S = 2.0
STATS_TIMEOUT_S = 5.0
ASIDE = 2
"""How many texts are made tokens of, or tokens text, at a time beside those that the client makes tokens of."""

_T = TypeVar("_T")


@dataclass(slots=True)
class Progress:
    """What is known of one registration of a worker."""

    steps: int = -1
    busy: bool = False
    since: float = field(default=0.0)
    """Loop time at which it last finished a step, or had nothing to do."""


class Backend:
    """`run()` keeps it connected; `client` is what requests use."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._client: AsyncClient | None = None
        self._workers: dict[int, Progress] = {}
        self._asked_at: float | None = None
        self._trouble = "no worker has loaded a model yet, or the service does not run"
        self._model_name = ""
        self.draining = False
        """No new requests are taken."""
        self.connected = asyncio.Event()
        self._threads = ThreadPoolExecutor(ASIDE, "tandem-aside")

    async def run(self) -> None:
        """Connects, however long that takes, and watches the service until it is cancelled. Raises what waiting cannot
        mend: ConfigurationError, VersionMismatch, AuthenticationError."""
        while self._client is None:
            await self._connect()
        while True:
            await self.look()
            await asyncio.sleep(POLL_S)

    async def _connect(self) -> None:
        client = AsyncClient(
            self._config.scheduler,
            keys=self._config.keys,
            insecure=self._config.insecure,
            connect_timeout=self._config.reconnect_timeout,
            reconnect_timeout=self._config.reconnect_timeout,
            name="gateway",
        )
        try:
            await client.connect(patiently=True)
            await client.tokenizer()
        except (VersionMismatch, AuthenticationError, ConfigurationError):
            await client.close()
            raise
        except ServiceUnavailable as error:  # it went away while its tokenizer was being fetched
            self._trouble = str(error)
            await client.close()
            await asyncio.sleep(POLL_S)
            return
        except BaseException:
            await client.close()
            raise
        self._client = client
        self._model_name = client.model.name
        self.connected.set()

    async def close(self) -> None:
        """Ends open requests; idempotent."""
        self._threads.shutdown(wait=False)
        if self._client is not None:
            await self._client.close()

    # --- for requests ----------------------------------------------------------------------------------------------

    @property
    def client(self) -> AsyncClient:
        """Raises ApiError 503 while no model is served, or when this gateway takes no more requests."""
        if self.draining:
            raise unavailable("this gateway is shutting down")
        if self._client is None:
            raise unavailable(self._trouble, retry_after=5)
        return self._client

    def model(self, name: str | None) -> ModelDescription:
        """The served model. Raises ApiError 404 if `name` is another one's."""
        model = self.client.model
        if name is not None and name != model.name:
            raise ApiError(
                404,
                f"The model `{name[:200]}` does not exist; `{model.name}` is served here.",
                param="model",
                code="model_not_found",
            )
        return model

    async def tokenizer(self) -> Tokenizer:
        """Raises ApiError 400 if the model has none."""
        tokenizer = await self.client.tokenizer()
        if tokenizer is None:
            raise ApiError(400, "the model comes without a tokenizer: there is no text, only token ids")
        return tokenizer

    async def aside(self, work: Callable[[], _T]) -> _T:
        """What `work` returns, on a thread where nothing waits for it that the client does."""
        if self.draining:
            raise unavailable("this gateway is shutting down")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # --- health ----------------------------------------------------------------------------------------------------

    async def health(self) -> str | None:
        """What is wrong; None if requests can be expected to be answered."""
        if self.draining:
            return "this gateway is shutting down"
        if self._client is None:
            return self._trouble
        now = asyncio.get_running_loop().time()
        if self._asked_at is None or now - self._asked_at > POLL_S:
            await self.look()
        return self._trouble or None

    async def figures(self) -> tuple[Stats | None, str]:
        """The service's figures, if the scheduler answers, and the model's name, for metrics."""
        if self._client is None:
            return None, ""
        try:
            return await self._client.stats(STATS_TIMEOUT_S), self._client.model.name
        except ServiceUnavailable:
            return None, self._model_name

    async def look(self) -> None:
        """Asks the scheduler how it is."""
        if self._client is None:
            return
        try:
            stats = await self._client.stats(STATS_TIMEOUT_S)
        except ServiceUnavailable as error:
            self._trouble = f"the scheduler does not answer: {error}"
            return
        now = asyncio.get_running_loop().time()
        self._asked_at = now
        self._trouble = self._judge(stats, now)

    def _judge(self, stats: Stats, now: float) -> str:
        """A frozen worker holds requests and finishes no step. Requests that wait while nobody runs any are no sign of
        progress either: they would run."""
        known = {worker.registration: worker for worker in stats.workers}
        self._workers = {key: progress for key, progress in self._workers.items() if key in known}
        for key, worker in known.items():
            progress = self._workers.setdefault(key, Progress())
            busy = worker.running > 0 or stats.waiting > 0
            if not busy or worker.steps != progress.steps:
                progress.since = now
            progress.steps, progress.busy = worker.steps, busy
        if not known:
            return "no worker is connected"
        longest = min(now - progress.since for progress in self._workers.values())
        if longest > self._config.health_stall_s:
            return f"no worker has finished a step for {longest:.0f} s, though requests wait for them"
        return ""
