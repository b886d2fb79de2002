"""The HTTP face: Search-R1's /retrieve, and /health, /ready, /metrics, /info. Imports neither torch nor faiss.

| what happens                                   | status | answer                                     |
|------------------------------------------------|--------|--------------------------------------------|
| a body that breaks type or limit               | 422    | `detail`: [{loc, msg, type}]               |
| loading, failed to load, shutting down         | 503    | `detail`, Retry-After                      |
| queue full                                     | 503    | `detail`, Retry-After                      |
| encoding or searching raised                   | 500    | `detail`: the reason; never an empty list  |
| else                                           | 200    | `result`: per query, in order, best first  |

The shape of an item depends on `return_scores` alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from services.contract.config import RetrieverConfig
from services.retriever.errors import BackendFailure, NotReady, QueueFull
from services.retriever.metrics import Metrics
from services.retriever.owner import Owner
from services.retriever.requests import RetrieveRequest, max_body_bytes, problem, problems, request_model

if TYPE_CHECKING:
    from services.retriever.backend import Backend, Say
    from services.retriever.corpus import Corpus
    from services.retriever.index import Hit

RETRY_AFTER_S = 1
CANARY_TIMEOUT_S = 30
CLOSE_GRACE_S = 4
"""To answer what waits at the stop; all in all it must fit into the 10 s that Docker gives."""


class BadBody(Exception):
    """HTTP 422."""

    def __init__(self, detail: list[dict[str, Any]]) -> None:
        super().__init__(detail)
        self.detail = detail


def create_app(config: RetrieverConfig, load: Callable[[Say], Backend]) -> FastAPI:
    """The app and its owner thread (`app.state.owner`), which starts to `load` when the app does."""
    metrics = Metrics()
    owner = Owner(config, metrics, load)
    metrics.watch(depth=lambda: owner.depth, passages=lambda: len(owner.backend.corpus) if owner.backend else 0)
    app = FastAPI(title="Forage retriever", description=__doc__ or "", lifespan=_lifespan)
    app.state.owner = owner
    _add_retrieve(app, config, owner)
    _add_status(app, owner)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    owner: Owner = app.state.owner
    owner.start()
    yield
    owner.close(CLOSE_GRACE_S)
    await asyncio.to_thread(owner.join, CLOSE_GRACE_S)


def _add_retrieve(app: FastAPI, config: RetrieverConfig, owner: Owner) -> None:
    model = request_model(config)
    body_schema = {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}

    @app.post("/retrieve", openapi_extra={"requestBody": body_schema})
    async def retrieve(request: Request) -> Response:
        started = time.perf_counter()
        response = await _retrieve(request, config, model, owner)
        owner.metrics.requests.labels(str(response.status_code)).inc()
        owner.metrics.request_seconds.observe(time.perf_counter() - started)
        return response


async def _retrieve(request: Request, config: RetrieverConfig, model: type[RetrieveRequest], owner: Owner) -> Response:
    try:
        body = parse_body(await _read_body(request, max_body_bytes(config)), model)
        hits = await asyncio.wrap_future(owner.submit(body.queries, body.topk or config.topk))
    except BadBody as error:
        return _refusal(owner, 422, "bad_request", error.detail)
    except (NotReady, QueueFull) as error:
        return _refusal(owner, 503, "queue_full" if isinstance(error, QueueFull) else "not_ready", str(error))
    except BackendFailure as error:
        return _refusal(owner, 500, "backend", f"the retrieval backend failed: {error}")
    assert owner.backend is not None
    owner.metrics.queries.inc(len(hits))
    return Response(render(hits, owner.backend.corpus, body.return_scores), media_type="application/json")


def _refusal(owner: Owner, status: int, reason: str, detail: object) -> Response:
    owner.metrics.errors.labels(reason).inc()
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


def render(hits: list[list[Hit]], corpus: Corpus, return_scores: bool) -> bytes:
    """The corpus's own lines are put in as they stand: whole rows, no parsing."""

    def item(hit: Hit) -> object:
        document = msgspec.Raw(corpus.line(hit.row))
        return {"document": document, "score": hit.score} if return_scores else document

    return msgspec.json.encode({"result": [[item(hit) for hit in found] for found in hits]})


def _add_status(app: FastAPI, owner: Owner) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive; nothing is said about the index."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 when queries are answered; 503 with what is being loaded, or what is wrong."""
        problem = await _why_not_ready(owner)
        text = {"status": owner.state, "detail": problem or owner.detail}
        return JSONResponse(text, 503, {"Retry-After": str(RETRY_AFTER_S)}) if problem else JSONResponse(text)

    @app.get("/info")
    async def info() -> JSONResponse:
        """What is being served."""
        if owner.backend is None:
            return JSONResponse({"detail": owner.detail}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        limits = {name: getattr(owner.config, name) for name in ("topk", "max_topk", "max_queries", "max_query_chars")}
        return JSONResponse({**owner.backend.info, **limits})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(owner.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _why_not_ready(owner: Owner) -> str | None:
    """None when ready. After a failed batch the canary query decides, so that a mended backend becomes ready again."""
    if owner.state != "ready" or owner.backend is None:
        return owner.detail
    if owner.last_error is None:
        return None
    try:
        future = owner.submit([owner.backend.corpus.canary()], 1, use_cache=False)
        await asyncio.wait_for(asyncio.wrap_future(future), CANARY_TIMEOUT_S)
    except (BackendFailure, NotReady, QueueFull, TimeoutError) as error:
        return f"the last batch failed: {owner.last_error or error}"
    return None
