"""The gateways of one service: one, or several that share a port."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence

from ..gateway.config import KEY_VARIABLE, SHARED_METRICS, GatewayConfig
from ..protocol.errors import ConfigurationError
from ..protocol.transport import Address
from .child import ChildSpec
from .config import Options, build
from .directory import PrivateDirectory
from .restarts import RestartPolicy
from .supervisor import GRACE_S

GATEWAY = "gateway"
GATEWAY_NAME = re.compile(rf"{GATEWAY}(-[0-9]+)?")
GATEWAY_READY_S = 60.0
"""After the workers are ready."""
MOST_GATEWAYS = 256


class Gateways:
    """Processes that serve HTTP for the service at one address. Several have one port: the kernel spreads connections
    over them. They count in files that they share, so that whichever is scraped tells of all."""

    def __init__(self, options: Options, address: str, count: int = 1, api_keys: Sequence[str] = ()) -> None:
        """Checks the options, and opens nothing. Raises ConfigurationError."""
        if not 1 <= count <= MOST_GATEWAYS:
            raise ConfigurationError(f"--api-server-count: must be from 1 to {MOST_GATEWAYS}, not {count}")
        own = {"keys": None} if Address(address).is_ipc else {}  # keys are for the workers' port then
        self.config = build(GatewayConfig, {**options, **own, "scheduler": address})
        self.names = [GATEWAY] if count == 1 else [f"{GATEWAY}-{index}" for index in range(count)]
        self._api_keys = api_keys
        self._reserved: socket.socket | None = None
        self._metrics: PrivateDirectory | None = None

    def open(self, restart: RestartPolicy | None) -> list[ChildSpec]:
        """The processes to start. They end first, so that what they stream may end. `close` is to be called when they
        are gone. Raises ConfigurationError if several are to share a port that cannot be had."""
        config = self.config
        environment = {KEY_VARIABLE: ",".join(self._api_keys)}  # not an argument: anybody sees command lines
        if len(self.names) > 1:
            from ..gateway.listening import reserve

            self._reserved = reserve(config)
            config = config.model_copy(update={"port": self._reserved.getsockname()[1], "reuse_port": True})
            self._metrics = PrivateDirectory()
            environment[SHARED_METRICS] = str(self._metrics.path)
        return [
            ChildSpec(
                name,
                "tandem.gateway.main",
                ["--config-json", config.model_dump_json()],
                environment,
                first=True,
                grace_s=config.shutdown_timeout + GRACE_S,
                restart=restart,
            )
            for name in self.names
        ]

    def close(self) -> None:
        """Gives the port back, and removes what they counted. Idempotent."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
