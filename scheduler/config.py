"""Options of the scheduler process. The command line's flags are generated from these fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class SchedulerConfig(BaseModel):
    """One scheduler. Unknown options are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: Annotated[str, Field(description="Where clients connect: ipc:///directory or tcp://host:port.")]
    worker_address: Annotated[
        str | None,
        Field(description="Where workers connect; with a tcp address they need one of their own."),
    ] = None
    insecure: Annotated[
        bool,
        Field(description="Allow TCP, which is not encrypted or authenticated: anyone who reaches the port is served."),
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
            description="Seconds without a result or a sign of idleness after which a worker is lost; "
            "never less than ten of its longest steps.",
        ),
    ] = 60.0
    max_waiting_requests: Annotated[
        int, Field(ge=1, le=1_000_000, description="Requests that may wait; more are refused at once.")
    ] = 10_000
    max_waiting_tokens: Annotated[
        int,
        Field(
            ge=1, le=2**31 - 1, description="Known tokens of all waiting requests together; more are refused at once."
        ),
    ] = 64_000_000
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
