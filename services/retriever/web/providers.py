"""What each search provider is asked, and how its answer is read. Nothing here does I/O.

| provider | request                                                | results                                      |
|----------|--------------------------------------------------------|----------------------------------------------|
| serper   | POST /search, JSON q, num, page, gl, hl; X-API-KEY     | organic[].{title, link, snippet}             |
| google   | GET /customsearch/v1, key, cx, q, num, start, gl, hl   | items[].{title, link, snippet}, 100 at most  |
| serpapi  | GET /search.json, api_key, engine, q, start, gl, hl    | answer_box, organic_results[] likewise       |

All are asked for pages of ten results: Google gives no more at once, and a page costs the same however few are used of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.contract.config.retriever import WebConfig

PAGE_SIZE = 10
MAX_PAGES = 10
"""Google refuses what lies beyond 100 results."""


class Unreadable(Exception):
    """The provider's answer is no list of results; the message is the provider's own reason, if it gave one."""


@dataclass(frozen=True)
class Hit:
    """One result as the provider gave it: no field is missing, an empty string stands for what was."""

    url: str
    title: str
    snippet: str


@dataclass(frozen=True)
class Ask:
    """One HTTP request to the provider."""

    method: str
    headers: dict[str, str] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)
    json: dict[str, Any] | None = None


@dataclass(frozen=True)
class Provider:
    url: str
    ask: Callable[[WebConfig, str, str, int], Ask]
    """From the configuration, the key, the query and the page of results, from 0."""
    read: Callable[[dict[str, Any]], list[Hit]]
    """From the JSON of a 200. Raises Unreadable, so that an empty list means: nothing was found."""


def _ask_serper(config: WebConfig, key: str, query: str, page: int) -> Ask:
    body = {"q": query, "num": PAGE_SIZE, "page": page + 1, "gl": config.country, "hl": config.language}
    return Ask("POST", headers={"X-API-KEY": key}, json=body)


def _read_serper(answer: dict[str, Any]) -> list[Hit]:
    if "organic" not in answer and "searchParameters" not in answer:
        raise Unreadable(reason(answer))
    return hits(answer.get("organic", []))


def _ask_google(config: WebConfig, key: str, query: str, page: int) -> Ask:
    place = {"num": str(PAGE_SIZE), "start": str(page * PAGE_SIZE + 1), "gl": config.country, "hl": config.language}
    return Ask("GET", query={"key": key, "cx": config.engine_id or "", "q": query, **place})


def _read_google(answer: dict[str, Any]) -> list[Hit]:
    if "items" not in answer and "searchInformation" not in answer and "queries" not in answer:
        raise Unreadable(reason(answer))
    return hits(answer.get("items", []))


def _ask_serpapi(config: WebConfig, key: str, query: str, page: int) -> Ask:
    """Other engines than Google's name place and page differently; they answer with their first page alone."""
    place = {"gl": config.country, "hl": config.language, "start": str(page * PAGE_SIZE)}
    return Ask("GET", query={"api_key": key, "engine": config.engine, "q": query, **(place if config.engine == "google" else {})})


def _read_serpapi(answer: dict[str, Any]) -> list[Hit]:
    """It says "nothing found" in the field `error` too, but with the status Success."""
    if "organic_results" not in answer and _dict(answer.get("search_metadata")).get("status") != "Success":
        raise Unreadable(reason(answer))
    return _answer_box(answer.get("answer_box")) + hits(answer.get("organic_results", []))


def _answer_box(box: Any) -> list[Hit]:
    """The answer that stands above the results. Without a page that it comes from (a sum, the weather) it is no passage."""
    box = _dict(box)
    texts = dict.fromkeys(text for name in ("answer", "result", "snippet") if (text := clean(box.get(name))))
    return hits([{**box, "snippet": " ".join(texts)}]) if texts else []


PROVIDERS: dict[str, Provider] = {
    "serper": Provider("https://google.serper.dev/search", _ask_serper, _read_serper),
    "google": Provider("https://www.googleapis.com/customsearch/v1", _ask_google, _read_google),
    "serpapi": Provider("https://serpapi.com/search.json", _ask_serpapi, _read_serpapi),
}


def pages_for(topk: int, config: WebConfig) -> int:
    """Pages of results to ask for at most. Half-empty ones are not made up for: it would double the price of most queries."""
    if config.provider == "serpapi" and config.engine != "google":
        return 1
    return min(math.ceil(topk / PAGE_SIZE), MAX_PAGES)


def hits(results: Any) -> list[Hit]:
    """The results that have a web address; nothing could be cited or fetched of the others."""
    if not isinstance(results, list):
        raise Unreadable(f"its results are no list but {type(results).__name__}")
    found = [Hit(clean(r.get("link")), clean(r.get("title")), clean(r.get("snippet"))) for r in results if isinstance(r, dict)]
    return [hit for hit in found if re.match(r"https?://", hit.url, re.IGNORECASE)]


def distinct(found: Sequence[Hit]) -> list[Hit]:
    """The first hit of each address. `#part`, a slash at the end, the scheme and the case of the host make no other page."""
    first: dict[str, Hit] = {}
    for hit in found:
        first.setdefault(_page(hit.url), hit)
    return list(first.values())


def _page(url: str) -> str:
    host, slash, path = url.split("#")[0].split("://", 1)[1].partition("/")
    return host.lower() + (slash + path).rstrip("/")


def reason(answer: Any) -> str:
    """The provider's own words about what went wrong; each has a place of its own for them."""
    if not isinstance(answer, dict):
        return f"its answer is no JSON object but {type(answer).__name__}"
    error = answer.get("error") or answer.get("message")
    text = clean(_dict(error).get("message")) or clean(error)
    return text or f"its answer has none of the fields that results come in, but {', '.join(sorted(answer)[:8]) or 'nothing'}"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def clean(text: Any) -> str:
    """One line, whatever the provider put there: null, a number, half a surrogate pair where it cut a snippet."""
    if not isinstance(text, str | int | float):
        return ""
    return " ".join(str(text).encode("utf-8", "ignore").decode().split())
