"""Pages of other origins: what browsers are told that they may do here (CORS)."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from .config import GatewayConfig

EXPOSED = ("x-request-id", "retry-after")
"""Headers of answers that pages may read, beside those that they always may."""


def with_cors(app: ASGIApp, config: GatewayConfig) -> ASGIApp:
    """`app` itself if no origins are allowed. Stands before the guard: a preflight brings no key, and tells nothing
    but these options; a refusal for want of a key must be readable to the page that forgot it."""
    if not config.allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=config.allowed_origins,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=EXPOSED,
    )
