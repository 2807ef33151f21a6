"""Options of the scheduler process. The command line's flags are generated from these fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..protocol.logs import LogFormat
from .policy import Policy


class SchedulerConfig(BaseModel):
    """One scheduler. Unknown options are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: Annotated[str, Field(description="Where clients connect: ipc:///directory or tcp://host:port.")]
    worker_address: Annotated[
        str | None,
        Field(description="Where workers connect; with a tcp address they need one of their own."),
    ] = None
    keys: Annotated[
        str | None,
        Field(
            description="Directory of the keys that tcp addresses need (see `tandem keys`); default: $TANDEM_KEYS or "
            "~/.config/tandem/keys."
        ),
    ] = None
    insecure: Annotated[
        bool, Field(description="Allow TCP without keys: nothing is encrypted, and who reaches the port is served.")
    ] = False
    client_lease: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="Seconds without a word after which a client is gone and its requests are cancelled.",
        ),
    ] = 15.0
    worker_lease: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="Seconds without a result or a sign of idleness after which a worker is lost, beyond ten "
            "times what its step should take.",
        ),
    ] = 10.0
    worker_lease_limit: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="Seconds that a worker's lease is at most, however long its steps should take; --worker-lease "
            "if that is more.",
        ),
    ] = 120.0
    max_waiting_requests: Annotated[
        int, Field(ge=1, le=1_000_000, description="Requests that may wait; more are refused at once.")
    ] = 10_000
    max_waiting_tokens: Annotated[
        int,
        Field(
            ge=1, le=2**31 - 1, description="Known tokens of all waiting requests together; more are refused at once."
        ),
    ] = 64_000_000
    max_requests_per_client: Annotated[
        int, Field(ge=1, le=1_000_000, description="Open requests of one client; more are refused at once.")
    ] = 8_192
    max_n: Annotated[int, Field(ge=1, le=65_536, description="Samples that one request may ask for.")] = 128
    enable_prefix_caching: Annotated[
        bool, Field(description="Keep the blocks of requests that ended, for others that begin with the same tokens.")
    ] = True
    priority_aging_s: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="Seconds of waiting that make up for one class of priority, so that no class starves.",
        ),
    ] = 30.0
    mixed_step_target_s: Annotated[
        float,
        Field(
            ge=0,
            le=3_600,
            description="Seconds that a step with prompts beside decoding requests should at most take: prompts are "
            "cut into chunks small enough, going by the steps before. 0 for no limit.",
        ),
    ] = 0.1
    delivery_interval_s: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Seconds that tokens may be held, under load, so that a client gets more of them in one "
            "message. 0 sends each step's at once.",
        ),
    ] = 0.02
    watermark: Annotated[
        float,
        Field(
            ge=0.0,
            le=0.5,
            description="Share of a worker's blocks that stays free when a request is admitted beside others.",
        ),
    ] = 0.01
    log_level: Annotated[
        str, Field(description="debug, info, warning or error.", pattern="^(debug|info|warning|error)$")
    ] = "info"
    trace_dir: Annotated[
        str | None,
        Field(description="Directory to write, at the end, when this process did what (docs/benchmarks.md)."),
    ] = None
    log_format: Annotated[LogFormat, Field(description="Log lines as text, or as a JSON object each.")] = "text"
    log_requests: Annotated[bool, Field(description="Log a line for each request when it ends, at level info.")] = True

    @property
    def policy(self) -> Policy:
        return Policy(
            max_waiting_requests=self.max_waiting_requests,
            max_waiting_tokens=self.max_waiting_tokens,
            max_requests_per_client=self.max_requests_per_client,
            max_n=self.max_n,
            watermark=self.watermark,
            enable_prefix_caching=self.enable_prefix_caching,
            priority_aging_s=self.priority_aging_s,
            mixed_step_target_s=self.mixed_step_target_s,
        )
