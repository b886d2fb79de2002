"""The body of /retrieve and its limits; what breaks them is answered 422 with place and reason.

Search-R1's and slime's fields and defaults. Stricter than theirs where they guess: a topk of 0 and an empty list of
queries are refused, types are not converted. `backend`, `rerank` and `deadline_ms` are ours. Unknown fields are ignored, as
theirs do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    create_model,
)

from services.contract.config import RetrieverConfig

MAX_DEADLINE_MS = 3_600_000
NOT_BLANK: dict[str, Any] = {"pattern": r"[^\s\u001c-\u001f\u0085]"}
"""What `str.strip` leaves, as JSON Schema says it."""


def _whole(value: object) -> object:
    """JSON has one kind of number: 3.0 is 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_number(low: int, high: int) -> Any:
    return Annotated[StrictInt, Field(ge=low, le=high), BeforeValidator(_whole)]


def _not_wanted(wanted: bool) -> bool:
    if wanted:
        raise ValueError("no reranker is loaded: set retriever.rerank.model")
    return wanted


NoReranker = Annotated[StrictBool, Field(json_schema_extra={"enum": [False]}), AfterValidator(_not_wanted)]


class RetrieveRequest(BaseModel):
    """`request_model` adds the limits of one configuration."""

    model_config = ConfigDict(extra="ignore")

    queries: list[str]
    topk: int | None
    return_scores: bool
    backend: str | None
    rerank: bool | None
    deadline_ms: int | None


def request_model(config: RetrieverConfig) -> type[RetrieveRequest]:
    query = Annotated[StrictStr, Field(max_length=config.max_query_chars, json_schema_extra=NOT_BLANK), AfterValidator(_has_text)]
    queries = Field(min_length=1, max_length=config.max_queries, description="Answered in this order.")
    topk = Field(None, description=f"Passages per query. Null: {config.topk}.")
    scores = Field(False, description="Items are {document, score} if true, else bare documents.")
    backend = Field(None, description=f"Null: {config.backends[0]}.")
    rerank = Field(
        None, description=f"Order by the cross-encoder. Null: {config.rerank.model is not None and config.rerank.always}."
    )
    deadline = Field(None, description="Milliseconds after which nobody waits for the answer: then 504.")
    fields: dict[str, Any] = {
        "queries": (list[query], queries),
        "topk": (Optional[whole_number(1, config.max_topk)], topk),  # noqa: UP045 - pyright reads `|` on an Annotated as an operator
        "return_scores": (StrictBool, scores),
        "backend": (Optional[Literal[tuple(config.backends)]], backend),  # noqa: UP045
        "rerank": (Optional[StrictBool if config.rerank.model else NoReranker], rerank),  # noqa: UP045
        "deadline_ms": (Optional[whole_number(1, MAX_DEADLINE_MS)], deadline),  # noqa: UP045
    }
    return create_model("RetrieveRequest", __base__=RetrieveRequest, **fields)


def _has_text(query: str) -> str:
    if not query.strip():
        raise ValueError("a query must not be empty or blank")
    return query


def max_body_bytes(config: RetrieverConfig) -> int:
    """Above this no valid body can be: a character takes at most 12 bytes (two escapes), plus room for the rest."""
    return config.max_queries * (12 * config.max_query_chars + 8) + 65_536


def problems(error: ValidationError) -> list[dict[str, Any]]:
    """FastAPI's form of a 422, without echoing the input back."""
    return [problem(e["loc"], e["msg"].removeprefix("Value error, "), e["type"]) for e in error.errors(include_input=False)]


def problem(loc: tuple[int | str, ...], message: str, kind: str) -> dict[str, Any]:
    return {"loc": ["body", *loc], "msg": message, "type": kind}
