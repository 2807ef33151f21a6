"""Options of a gateway process. The command line's flags are generated from these fields."""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..protocol.logs import LogFormat

KEY_VARIABLE = "TANDEM_API_KEY"
"""Environment variable with the API keys, separated by commas: other users of the machine see no environment, but they
see command lines."""

SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable by which prometheus_client knows the directory of several processes' metrics."""

ToolCallParser = Literal["auto", "hermes", "llama3_json", "none"]


_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s,*]+")


def _listed(value: Any) -> Any:
    """A JSON list on the command line, as vLLM takes it; a single text without its brackets is a list of one."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return (value,)
    try:
        return tuple(json.loads(value))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'expected a JSON list of texts such as \'["a", "b"]\': {error}') from error


Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class GatewayConfig(BaseModel):
    """One gateway. Unknown options are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheduler: Annotated[str, Field(description="The service's address: ipc:///directory or tcp://host:port.")]
    keys: Annotated[
        str | None,
        Field(
            description="Key file or directory for a tcp address (see `tandem keys`); default: $TANDEM_KEYS, else "
            "~/.config/tandem/keys."
        ),
    ] = None
    insecure: Annotated[bool, Field(description="Allow TCP without keys.")] = False
    host: Annotated[str, Field(description="Where HTTP listens: a name or an address of this machine.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535, description="Port of HTTP; 0 picks a free one.")] = 8000
    reuse_port: Annotated[
        bool,
        Field(description="Share the port with this user's other gateways that do; each takes a part of the load."),
    ] = False
    ssl_certfile: Annotated[str | None, Field(description="Certificate chain (PEM): HTTPS instead of HTTP.")] = None
    ssl_keyfile: Annotated[str | None, Field(description="The certificate's private key (PEM).")] = None
    max_connections: Annotated[
        int, Field(ge=1, le=1_000_000, description="Open HTTP connections; more are answered with 503 and closed.")
    ] = 4_096
    max_request_bytes: Annotated[
        int, Field(ge=1_024, le=1 << 30, description="Most bytes of an HTTP request's body; more is answered with 413.")
    ] = 16 << 20
    max_request_values: Annotated[
        int,
        Field(
            ge=1_024,
            le=1 << 30,
            description="Most numbers, texts, lists and objects in a body; more is answered with 413. While a body of "
            "so many is read, nothing else is served.",
        ),
    ] = 300_000
    max_request_samples: Annotated[
        int, Field(ge=1, le=1 << 20, description="Samples that one HTTP request may ask for: its prompts times n.")
    ] = 4_096
    read_timeout_s: Annotated[
        float,
        Field(gt=0, le=86_400, description="Seconds that a client may take to send a request's head, and its body."),
    ] = 30.0
    write_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="Seconds that a client may leave an answer unread before its request is cancelled.",
        ),
    ] = 60.0
    timeout_keep_alive: Annotated[
        int, Field(ge=1, le=86_400, description="Seconds that an idle HTTP connection stays open.")
    ] = 30
    shutdown_timeout: Annotated[
        float,
        Field(ge=0, le=86_400, description="Seconds that open HTTP answers have to end after SIGTERM."),
    ] = 10.0
    reconnect_timeout: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="Seconds that requests, open ones too, wait for a service that is away before they fail.",
        ),
    ] = 10.0
    health_stall_s: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="Seconds without a finished step after which a worker that has work counts as unhealthy.",
        ),
    ] = 30.0
    tool_call_parser: Annotated[
        ToolCallParser,
        Field(description="How the model writes tool calls; auto goes by its chat template, none refuses tools."),
    ] = "auto"
    trust_request_chat_template: Annotated[
        bool, Field(description="Let a chat request bring its own chat template (it is rendered in a sandbox).")
    ] = False
    allowed_origins: Annotated[
        Texts,
        Field(
            description="Origins whose pages a browser lets use this service (CORS): a JSON list such as "
            "'[\"https://chat.example\"]', or '[\"*\"]' for all; none by default."
        ),
    ] = ()
    allowed_methods: Annotated[Texts, Field(description="Methods that these pages may use: a JSON list.")] = ("*",)
    allowed_headers: Annotated[Texts, Field(description="Request headers that they may send: a JSON list.")] = ("*",)
    allow_credentials: Annotated[
        bool, Field(description="Let these pages send the browser's credentials (cookies, client certificates).")
    ] = False
    log_level: Annotated[
        str, Field(description="debug, info, warning or error.", pattern="^(debug|info|warning|error)$")
    ] = "info"
    log_format: Annotated[LogFormat, Field(description="Log lines as text, or as a JSON object each.")] = "text"

    @model_validator(mode="after")
    def _port_can_be_shared(self) -> Self:
        if self.reuse_port and self.port == 0:
            raise ValueError("--reuse-port: needs a --port; 0 picks one that nobody knows to share")
        return self

    @model_validator(mode="after")
    def _origins_make_sense(self) -> Self:
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"--allowed-origins: {origin[:100]!r} is no origin: scheme://host or scheme://host:port in lower "
                    "case with nothing behind, or *"
                )
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError("--allow-credentials: not with all origins (*): name those that may use them")
        if not self.allowed_origins:
            for name in ("allowed_methods", "allowed_headers", "allow_credentials"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"--{name.replace('_', '-')}: needs --allowed-origins, or it has no effect")
        return self


def keys_in_environment() -> list[str]:
    """The API keys of this process; none means that everybody may."""
    return [key for part in os.environ.get(KEY_VARIABLE, "").split(",") if (key := part.strip())]
