"""The HTTP face: Search-R1's /retrieve, and /health, /ready, /metrics, /info. Imports neither torch nor faiss.

| what happens                                   | status | answer                                     |
|------------------------------------------------|--------|--------------------------------------------|
| a body that breaks type or limit               | 422    | `detail`: [{loc, msg, type}]               |
| loading, failed to load, shutting down         | 503    | `detail`, Retry-After                      |
| queue full                                     | 503    | `detail`, Retry-After                      |
| `deadline_ms` passed                           | 504    | `detail`                                   |
| encoding, searching, a web provider failed     | 502    | `detail`: the reason; never an empty list  |
| else                                           | 200    | `result`: per query, in order, best first  |

The shape of an item depends on `return_scores` alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from services.contract.config import RetrieverConfig
from services.retriever.errors import BackendFailure, DeadlinePassed, NotReady, QueueFull
from services.retriever.metrics import Metrics
from services.retriever.passages import Passage, render
from services.retriever.requests import RetrieveRequest, max_body_bytes, problem, problems, request_model
from services.retriever.service import Loaders, Service

RETRY_AFTER_S = 1
CLOSE_GRACE_S = 4
"""To answer what waits at the stop; all in all it must fit into the 10 s that Docker gives."""
REFUSALS: dict[type[Exception], tuple[int, str]] = {
    NotReady: (503, "not_ready"),
    QueueFull: (503, "queue_full"),
    DeadlinePassed: (504, "deadline"),
    BackendFailure: (502, "backend"),
}
"""HTTP status, and the metric's name for it."""

_DETAIL = {"application/json": {"schema": {"type": "object", "required": ["detail"], "properties": {"detail": {}}}}}
_DOCUMENT = {"type": "object", "required": ["contents"], "properties": {"id": {}, "contents": {"type": "string"}}}
_SCORED = {
    "type": "object",
    "required": ["document", "score"],
    "properties": {"document": _DOCUMENT, "score": {"type": "number"}},
}
_ITEMS = {"type": "array", "items": {"type": "array", "items": {"anyOf": [_SCORED, _DOCUMENT]}}}
_RESULT = {"type": "object", "required": ["result"], "properties": {"result": _ITEMS}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "For each query its passages, best first.", "content": {"application/json": {"schema": _RESULT}}},
    422: {"description": "The body breaks a type or a limit.", "content": _DETAIL},
    502: {"description": "Encoding, searching or a web provider failed.", "content": _DETAIL},
    503: {"description": "Not ready, or the queue is full: come back after Retry-After seconds.", "content": _DETAIL},
    504: {"description": "`deadline_ms` passed.", "content": _DETAIL},
}


class BadBody(Exception):
    """HTTP 422."""

    def __init__(self, detail: list[dict[str, Any]]) -> None:
        super().__init__(detail)
        self.detail = detail


def create_app(config: RetrieverConfig, loaders: Loaders) -> FastAPI:
    """The app and its service (`app.state.service`), which starts to load when the app does."""
    service = Service(config, Metrics(), loaders)
    app = FastAPI(title="Forage retriever", description=__doc__ or "", lifespan=_lifespan)
    app.state.service = service
    _add_retrieve(app, config, service)
    _add_status(app, service)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.start()
    yield
    service.close(CLOSE_GRACE_S)
    await service.join(CLOSE_GRACE_S)


def _add_retrieve(app: FastAPI, config: RetrieverConfig, service: Service) -> None:
    model = request_model(config)
    body_schema = {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}

    @app.post("/retrieve", openapi_extra={"requestBody": body_schema}, responses=RESPONSES, response_model=None)
    async def retrieve(request: Request) -> Response:
        started = time.perf_counter()
        response = await _retrieve(request, config, model, service)
        service.metrics.requests(str(response.status_code)).inc()
        service.metrics.request_seconds.observe(time.perf_counter() - started)
        return response


async def _retrieve(request: Request, config: RetrieverConfig, model: type[RetrieveRequest], service: Service) -> Response:
    received = time.monotonic()
    try:
        body = parse_body(await _read_body(request, max_body_bytes(config)), model)
        deadline = received + body.deadline_ms / 1000 if body.deadline_ms else float("inf")
        found = await _find(service, body, body.topk or config.topk, deadline)
    except BadBody as error:
        return _refusal(service, 422, "bad_request", error.detail)
    except tuple(REFUSALS) as error:
        return _refusal(service, *REFUSALS[type(error)], str(error))
    service.metrics.queries(body.backend or config.backends[0]).inc(len(found))
    return Response(render(found, body.return_scores), media_type="application/json")


async def _find(service: Service, body: RetrieveRequest, topk: int, deadline: float) -> list[list[Passage]]:
    """Raises DeadlinePassed also when the answer is still being computed: nobody waits for it any more."""
    source = service.source(body.backend, body.rerank)
    try:
        async with asyncio.timeout(deadline - time.monotonic() if body.deadline_ms else None):
            return await source.retrieve(body.queries, topk, deadline)
    except TimeoutError:
        raise DeadlinePassed(f"no answer within {body.deadline_ms} ms") from None


def _refusal(service: Service, status: int, reason: str, detail: object) -> Response:
    service.metrics.errors.labels(reason).inc()
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse({"detail": detail}, status, headers)


async def _read_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BadBody([problem((), f"the body is larger than {limit} bytes; send fewer queries a request", "too_long")])
    return bytes(body)


def parse_body(body: bytes, model: type[RetrieveRequest]) -> RetrieveRequest:
    """Whatever the content type says: `curl -d` calls its JSON a form."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise BadBody(problems(error)) from None


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive; nothing is said about the index."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: RESPONSES[503]})
    async def ready() -> JSONResponse:
        """200 when queries are answered; 503 with what is being loaded, or what is wrong."""
        problem = await service.why_not_ready()
        text = {"status": service.state, "detail": problem or service.detail}
        return JSONResponse(text, 503, {"Retry-After": str(RETRY_AFTER_S)}) if problem else JSONResponse(text)

    @app.get("/info", responses={503: RESPONSES[503]})
    async def info() -> JSONResponse:
        """What is being served."""
        if (served := service.info()) is None:
            return JSONResponse({"detail": service.detail}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse(served)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
