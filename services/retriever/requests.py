"""The body of /retrieve and its limits; what breaks them is answered 422 with place and reason.

Search-R1's and slime's fields and defaults. Stricter than theirs where they guess: a topk of 0 and an empty list of
queries are refused, types are not converted. Unknown fields are ignored, as theirs do.
"""

from __future__ import annotations

from typing import Annotated, Any, Optional

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, create_model

from services.contract.config import RetrieverConfig


class RetrieveRequest(BaseModel):
    """`request_model` adds the limits of one configuration."""

    model_config = ConfigDict(extra="ignore")

    queries: list[str]
    topk: int | None
    return_scores: bool


def request_model(config: RetrieverConfig) -> type[RetrieveRequest]:
    query = Annotated[StrictStr, Field(max_length=config.max_query_chars), AfterValidator(_has_text)]
    queries = Field(min_length=1, max_length=config.max_queries, description="Answered in this order.")
    topk = Field(None, ge=1, le=config.max_topk, description=f"Passages per query. Null: {config.topk}.")
    scores = Field(False, description="Items are {document, score} if true, else bare documents.")
    fields: dict[str, Any] = {
        "queries": (list[query], queries),
        "topk": (Optional[StrictInt], topk),  # noqa: UP045 - pyright reads `|` on an Annotated as an operator
        "return_scores": (StrictBool, scores),
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
