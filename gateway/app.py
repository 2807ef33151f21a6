"""The routes, and the OpenAPI document that describes them (`/openapi.json`, `/docs`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute

from ..protocol.errors import TandemError
from .backend import Backend
from .body import read
from .chat import chat
from .chat_schema import ChatChunk, ChatRequest, ChatResponse
from .completion import complete
from .completion_schema import CompletionChunk, CompletionRequest, CompletionResponse
from .config import GatewayConfig
from .document import examples_of, say_alternatives, say_bounds, stream_of
from .errors import CLIENT_CLOSED_REQUEST, ApiError, ErrorBody, as_api_error, unavailable
from .guard import ClientGone
from .metrics import GatewayMetrics
from .responses import respond
from .responses_schema import ResponsesRequest, ResponsesResponse, ResponseStreamEvent
from .tokenizing import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    detokenize,
    tokenize,
)
from .turns import Turns
from .wire import Answer, json_response, now

REF = "#/components/schemas/{model}"
FAILURES = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


class ModelCard(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tandem"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(Answer):
    version: str


class Health(Answer):
    status: Literal["ok"] = "ok"


REQUESTS: list[type[BaseModel]] = [
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    TokenizeRequest,
    DetokenizeRequest,
]
EVENTS: list[type[BaseModel]] = [CompletionChunk, ChatChunk, ResponseStreamEvent]
"""What streams consist of."""


def make_app(config: GatewayConfig, backend: Backend, metrics: GatewayMetrics) -> FastAPI:
    """The application, without its guard."""
    app = FastAPI(
        title="Tandem",
        version=own_version(),
        summary="OpenAI-compatible HTTP",
        redoc_url=None,
        redirect_slashes=False,  # a redirect's address would be a guess at what stands before this gateway
    )
    started, turns = now(), Turns()

    def card() -> ModelCard:
        model = backend.client.model
        return ModelCard(id=model.name, created=started, root=model.name, max_model_len=model.max_model_len)

    async def completions(request: Request) -> Response:
        """Text that goes on from a prompt."""
        return await complete(request, backend, await read(request, CompletionRequest, config, turns), config)

    async def chat_completions(request: Request) -> Response:
        """The model's answer to a chat."""
        return await chat(request, backend, await read(request, ChatRequest, config, turns), config, turns)

    async def responses(request: Request) -> Response:
        """The model's answer to messages, as OpenAI's newer API has it; nothing is stored."""
        return await respond(request, backend, await read(request, ResponsesRequest, config, turns), config, turns)

    async def tokenize_(request: Request) -> Response:
        """The token ids of a text or a chat."""
        return await tokenize(backend, await read(request, TokenizeRequest, config, turns), turns)

    async def detokenize_(request: Request) -> Response:
        """The text of token ids."""
        return await detokenize(backend, await read(request, DetokenizeRequest, config, turns))

    async def models() -> Response:
        """What is served."""
        return json_response(ModelList(data=[card()]))

    async def model(model: str) -> Response:
        """One model that is served."""
        backend.model(model)
        return json_response(card())

    async def health() -> Response:
        """200 if requests can be expected to be answered: some worker makes progress, or would."""
        trouble = await backend.health()
        if trouble is not None:
            raise unavailable(trouble, retry_after=5)
        return json_response(Health())

    async def version_() -> Response:
        """Tandem's version."""
        return json_response(Version(version=own_version()))

    async def metrics_() -> Response:
        """Prometheus metrics."""
        return Response(metrics.page(*await backend.figures()), media_type=CONTENT_TYPE_LATEST)

    post = _Adder(app, "POST")
    post("/v1/completions", completions, CompletionResponse, CompletionRequest, CompletionChunk, "[DONE]")
    post("/v1/chat/completions", chat_completions, ChatResponse, ChatRequest, ChatChunk, "[DONE]")
    post("/v1/responses", responses, ResponsesResponse, ResponsesRequest, ResponseStreamEvent)
    post("/tokenize", tokenize_, TokenizeResponse, TokenizeRequest)
    post("/detokenize", detokenize_, DetokenizeResponse, DetokenizeRequest)
    get = _Adder(app, "GET")
    get("/v1/models", models, ModelList)
    get("/v1/models/{model:path}", model, ModelCard)
    get("/health", health, Health)
    get("/ping", health, Health)
    get("/version", version_, Version)
    app.add_api_route("/metrics", metrics_, methods=["GET"], response_class=PlainTextResponse)
    app.add_api_route("/metrics", metrics_, methods=["HEAD"], response_class=PlainTextResponse, include_in_schema=False)
    app.openapi = _with_schemas(app)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _http_errors({path for route in app.routes if (path := _path(route))}))
    for kind in (ApiError, TandemError, ClientGone, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _error)
    return app


def own_version() -> str:
    try:
        return version("tandem-serve")
    except PackageNotFoundError:
        return "unknown"


class _Adder:
    """Adds routes of one method. Bodies are read by the routes themselves (fields.read), so here they are described."""

    def __init__(self, app: FastAPI, method: str) -> None:
        self._app = app
        self._method = method

    def __call__(
        self,
        path: str,
        endpoint: Callable[..., Awaitable[Response]],
        answer: type[BaseModel],
        body: type[BaseModel] | None = None,
        event: type[BaseModel] | None = None,
        last: str | None = None,
    ) -> None:
        """`event`: the data of each event of a streamed answer, but for the `last` one."""
        answers: dict[int | str, dict[str, Any]] = {200: {"model": answer}}
        if event is not None:
            kinds = [REF.format(model=kind.__name__) for kind in (event, ErrorBody)]
            answers[200]["content"] = {"text/event-stream": {"schema": stream_of(*kinds, ends_with=last)}}
        answers |= {status: {"model": ErrorBody} for status in FAILURES}
        extra = None
        if body is not None:
            schema = {"$ref": REF.format(model=body.__name__)}
            content = {"application/json": {"schema": schema, "examples": examples_of(body.__name__)}}
            extra = {"requestBody": {"required": True, "content": content}}
        self._app.add_api_route(
            path,
            endpoint,
            methods=[self._method],
            response_model=None,
            responses=answers,
            openapi_extra=extra,
            name=endpoint.__name__.rstrip("_"),
        )
        if self._method == "GET":  # RFC 9110: what can be got can be asked for its head; probes do
            self._app.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)


def _with_schemas(app: FastAPI) -> Callable[[], dict[str, Any]]:
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if CompletionRequest.__name__ not in schemas:
            _, found = models_json_schema([(model, "validation") for model in (*REQUESTS, *EVENTS)], ref_template=REF)
            for name, schema in found["$defs"].items():
                schemas.setdefault(name, schema)  # parts of answers are there already
            say_bounds(schemas)
            say_alternatives(schemas)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # every fault of a request is a 400 here
        return document

    return openapi


async def _error(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone | ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return as_api_error(error).response()


def _path(route: BaseRoute) -> str:
    return getattr(route, "path", "")


def _http_errors(paths: Collection[str]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """What answers a request that no route takes; `paths` are those that there are."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, method = request.scope["path"][:200], request.method
        if error.status_code == 404:
            # The commonest mistake is a base URL that lacks /v1, or has it where the client adds it.
            meant = next((one for one in (f"/v1{path}", path.removeprefix("/v1")) if one in paths), None)
            hint = "" if meant is None else f"; {meant} is there"
            return ApiError(404, f"there is nothing at {path}{hint}", code="not_found").response()
        if error.status_code == 405:
            fault = f"{path} does not take {method}"
            return ApiError(405, fault, code="method_not_allowed", headers=dict(error.headers or {})).response()
        return ApiError(error.status_code, str(error.detail)).response()

    return answer
