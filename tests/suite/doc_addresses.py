"""Whether an address or a body in the docs is one that the retriever answers, by its own description. Nothing is started."""

from __future__ import annotations

import json
from functools import cache
from urllib.parse import urlsplit

from pydantic import ValidationError

from services.contract.config import Config
from services.retriever.app import create_app
from services.retriever.loading import loaders
from services.retriever.requests import request_model


@cache
def routes() -> set[tuple[str, str]]:
    """(method, path)."""
    app = create_app(Config().retriever, loaders(Config(), ""))  # what it loads, it loads when it starts
    return {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}


def curl_problem(words: list[str]) -> str | None:
    """Of curl's words: what is wrong with the address on localhost or the body after -d."""
    url = next((word for word in words if word.startswith("localhost:")), None)
    if url is None:
        return "no address on localhost"
    address = urlsplit(f"http://{url}")
    if address.port != Config().retriever.port:
        return f"the retriever is on port {Config().retriever.port}, not {address.port}"
    posts = "-d" in words
    if not any(path == address.path and (method == "POST" or not posts) for method, path in routes()):
        return f"the retriever has no {address.path} of that kind"
    return _body_problem(words[words.index("-d") + 1]) if posts else None


def _body_problem(body: str) -> str | None:
    model = request_model(Config().retriever)
    try:
        model.model_validate_json(body)
    except ValidationError as error:
        return f"the retriever refuses the body: {error}"
    unknown = set(json.loads(body)) - set(model.model_fields)
    return f"the retriever ignores {', '.join(unknown)}" if unknown else None
