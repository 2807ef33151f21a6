"""Where a gateway listens: a port of its own, or one that several gateways share."""

from __future__ import annotations

import errno
import socket

from ..protocol.errors import ConfigurationError
from .config import GatewayConfig

BACKLOG = 2_048
"""Connections that may wait to be accepted."""


def listen(config: GatewayConfig) -> socket.socket:
    """A socket that listens, or is only bound if the port is shared. Raises ConfigurationError telling what to do if it
    cannot be had."""
    listener = _bound(config, shared=config.reuse_port)
    try:
        if not config.reuse_port:  # else whoever listens is given connections
            listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _refusal(config, error) from error
    listener.setblocking(False)
    return listener


def reserve(config: GatewayConfig) -> socket.socket:
    """A port that gateways of this user with `reuse_port` can listen at as long as the socket is open. Nobody listens
    there yet: the port is bound alone and shared from then on, so that it is never one of another service. The kernel
    gives connections to sockets that listen, which this one never does. Raises ConfigurationError as `listen`."""
    reserved = _bound(config, shared=False)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return reserved


def _bound(config: GatewayConfig, *, shared: bool) -> socket.socket:
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigurationError(f"--host {config.host}: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _refusal(config, error) from error
    return bound


def _refusal(config: GatewayConfig, error: OSError) -> ConfigurationError:
    if error.errno == errno.EADDRINUSE:
        return ConfigurationError(
            f"HTTP: port {config.port} of {config.host} is taken by another process; --port names another "
            "(0 picks a free one)"
        )
    return ConfigurationError(f"HTTP: cannot listen at {config.host} port {config.port}: {error.strerror}")


def url_of(config: GatewayConfig, listener: socket.socket) -> str:
    """Where clients reach it from this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if config.ssl_certfile else 'http'}://{host}:{port}"
