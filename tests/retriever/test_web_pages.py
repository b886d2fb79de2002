"""Page mode through the real service: what becomes of a page, and that nothing inside is ever read."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from aiohttp import web

from services.contract.config.retriever import WebConfig
from services.retriever.metrics import Metrics
from services.retriever.web.source import Web
from tests.retriever.conftest import Running, until
from tests.retriever.web_internet import (
    Gate,
    Internet,
    cut,
    internet,  # noqa: F401 - a fixture
    json_answer,
    no_index,
    redirect,
    serper,
    slow,
    text_answer,
    web_config,
)

STORY = " ".join(f"The mill number {number} stood by the water." for number in range(200))
FACT = "The miller of Arden was called Aurelius Finch."
ARTICLE = f"<html><body><article><p>{STORY}</p><p>{FACT}</p><p>{STORY}</p></article></body></html>"
SNIPPET = "... miller of Arden ... Aurelius ..."


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Internet, Running]]:
    """One service in page mode for all tests that only look at one page each."""
    net = Internet()
    running = Running(web_config(net, pages=True, page_chars=300, page_redirects=3, extract_timeout_s=30), no_index)
    yield net, running.wait_ready()
    running.stop()
    net.stop()


def look(world: tuple[Internet, Running], url: str, snippet: str = SNIPPET) -> tuple[str, str]:
    """The text that the service returns for a hit at `url`, and the outcome that it counted."""
    net, running = world
    before = outcomes(running)
    net.answer(serper({"link": url, "title": "Mill", "snippet": snippet}))
    answer = running.retrieve(f"query {time.monotonic_ns()}")
    assert answer.status_code == 200, answer.text
    (item,) = answer.json()["result"][0]
    (outcome,) = {name for name, count in outcomes(running).items() if count != before.get(name, 0)}
    return item["contents"].removeprefix('"Mill"\n'), outcome


def outcomes(running: Running) -> dict[str, float]:
    (family,) = running.server.service.metrics.web_pages.collect()
    return {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total")}


def put(world: tuple[Internet, Running], handler: Any) -> str:
    """A page at an address that was never used before."""
    path = f"/page{time.monotonic_ns()}"
    world[0].pages[path] = handler
    return world[0].host + path


def test_the_page_s_words_around_the_snippet_are_returned(world: Any) -> None:
    text, outcome = look(world, put(world, text_answer(ARTICLE)))
    assert outcome == "ok"
    assert FACT in text
    assert len(text) <= 300


def test_without_a_snippet_the_query_s_words_are_looked_for(internet: Internet, serve: Any) -> None:  # noqa: F811
    internet.pages["/a"] = text_answer(ARTICLE)
    internet.answer(serper({"link": internet.host + "/a"}))
    running = serve(web_config(internet, pages=True, page_chars=200, extract_timeout_s=30), no_index)
    assert "Aurelius Finch" in running.retrieve("who was the miller of Arden").json()["result"][0][0]["contents"]


def test_plain_text_is_returned(world: Any) -> None:
    url = put(world, text_answer("It was Aurelius Finch, the miller.", content_type="text/plain; charset=utf-8"))
    assert look(world, url) == ("It was Aurelius Finch, the miller.", "ok")


def test_redirects_are_followed(world: Any) -> None:
    last = put(world, text_answer(ARTICLE))
    relative = put(world, redirect(last.removeprefix(world[0].host), 301))
    text, outcome = look(world, put(world, redirect(relative, 307)))
    assert outcome == "ok"
    assert "Aurelius" in text


GZIP = {"Content-Encoding": "gzip"}
BOMB = gzip.compress(bytes(300_000_000), compresslevel=9)


async def drip(request: web.Request) -> web.StreamResponse:
    """Never silent for long, never done."""
    response = web.StreamResponse(headers={"Content-Type": "text/html"})
    await response.prepare(request)
    while True:
        await response.write(b"<p>more</p>")
        await asyncio.sleep(0.05)


async def garbage(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.write(b"not http at all\r\n\r\n")
    request.transport.close()
    return web.Response()


BAD_PAGES = {
    "missing": (text_answer("gone", 404), "status"),
    "broken": (text_answer(ARTICLE, 500), "status"),
    "no content": (text_answer("", 204), "status"),
    "pdf": (text_answer(b"%PDF", content_type="application/pdf"), "content_type"),
    "json": (json_answer({"a": "Aurelius"}), "content_type"),
    "image as html": (text_answer(bytes(range(256)) * 4, content_type="image/png"), "content_type"),
    "huge": (text_answer("<p>Aurelius</p>" * 200_000), "too_large"),
    "bomb": (text_answer(BOMB, headers=GZIP), "too_large"),
    "broken gzip": (text_answer(b"this is no gzip", headers=GZIP), "connection"),
    "slow": (slow(60, text_answer(ARTICLE)), "timeout"),
    "drip": (drip, "timeout"),
    "cut": (cut, "connection"),
    "garbage": (garbage, "connection"),
    "nothing": (text_answer(""), "empty"),
    "only scripts": (text_answer("<html><body><script>var a</script></body></html>"), "empty"),
    "nowhere": (text_answer("", 302), "redirects"),
    "no address": (redirect("http://["), "redirects"),
    "file": (redirect("file:///etc/passwd"), "refused"),
    "password": (redirect("http://user:password@127.0.0.1/"), "refused"),
}


@pytest.mark.parametrize("name", BAD_PAGES)
def test_a_bad_page_is_replaced_by_its_snippet_and_counted(world: Any, name: str) -> None:
    handler, expected = BAD_PAGES[name]
    started = time.monotonic()
    assert look(world, put(world, handler)) == (SNIPPET, expected)
    assert time.monotonic() - started < 30


def test_a_bad_charset_is_read_as_well_as_can_be(world: Any) -> None:
    url = put(world, text_answer("Aurelius café".encode(), content_type="text/plain; charset=nonsense-8"))
    assert look(world, url) == ("Aurelius café", "ok")


def test_endless_redirects_end(world: Any) -> None:
    net, _ = world
    path = f"/loop{time.monotonic_ns()}"
    net.pages[path] = redirect(path)
    assert look(world, net.host + path) == (SNIPPET, "redirects")
    assert net.fetched.count(path) == 4


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2:{port}/secret",
        "http://localhost:{port}/secret",
        "http://[::1]:{port}/secret",
        "http://[::ffff:127.0.0.2]:{port}/secret",
        "http://2130706434:{port}/secret",
        "http://0x7f.0.0.2:{port}/secret",
        "http://0.0.0.0:{port}/secret",
        "http://169.254.169.254:{port}/latest/meta-data/",
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:22/",
    ],
)
def test_the_inside_is_never_read(world: Any, target: str) -> None:
    net, _ = world
    net.pages["/secret"] = text_answer("<p>Aurelius secret</p>")
    url = target.format(port=net.port)
    assert look(world, url) == (SNIPPET, "refused")
    assert look(world, put(world, redirect(url))) == (SNIPPET, "refused")
    assert look(world, put(world, redirect(url.removeprefix("http:"), 308))) == (SNIPPET, "refused")
    assert net.inside == []


async def test_a_name_of_the_inside_is_never_read(internet: Internet) -> None:  # noqa: F811
    internet.pages["/secret"] = text_answer("<p>Aurelius secret</p>")
    internet.answer(serper({"link": f"http://nice.example:{internet.port}/secret", "title": "t", "snippet": "s"}))
    config = web_config(internet, pages=True).web
    found = Web(config, Metrics(), lambda host, port: ["127.0.0.2", "10.0.0.1"])
    try:
        ((only,),) = await found.retrieve(["q"], 3, float("inf"))
    finally:
        await found.close()
    assert b'"\\"t\\"\\ns"' in only.document
    assert internet.fetched == []


def test_a_page_s_passage_is_kept(internet: Internet, serve: Any) -> None:  # noqa: F811
    internet.pages["/a"] = text_answer(ARTICLE)
    internet.pages["/b"] = text_answer("", 500)
    internet.answer(serper(*[{"link": internet.host + path, "title": "t", "snippet": SNIPPET} for path in ("/a", "/b")]))
    running = serve(web_config(internet, pages=True, extract_timeout_s=30), no_index)
    first = running.retrieve("one").json()
    assert running.retrieve("one").json() == running.retrieve("another").json() == first
    assert sorted(internet.fetched) == ["/a", "/b"]


@pytest.mark.parametrize(("settings", "most"), [({"pages_per_host": 2}, 2), ({"pages_per_host": 9, "page_concurrency": 3}, 3)])
def test_no_more_pages_are_fetched_at_a_time(internet: Internet, serve: Any, settings: dict[str, Any], most: int) -> None:  # noqa: F811
    for number in range(8):
        internet.pages[f"/{number}"] = slow(0.3, text_answer("words", content_type="text/plain"))
    internet.answer(serper(*[{"link": f"{internet.host}/{number}", "title": "t", "snippet": "s"} for number in range(8)]))
    running = serve(web_config(internet, pages=True, page_timeout_s=5, extract_timeout_s=30, **settings), no_index)
    found = running.retrieve("q", topk=8).json()["result"][0]
    assert [passage["contents"] for passage in found] == ['"t"\nwords'] * 8
    assert internet.most_under_way == most


def test_a_slow_page_holds_up_nobody_else(internet: Internet, serve: Any) -> None:  # noqa: F811
    async def by_query(request: Any) -> Any:
        path = (await request.json())["q"]
        return await serper({"link": internet.host + path, "title": "t", "snippet": "s"})(request)

    gate = Gate(text_answer("late", content_type="text/plain"))
    internet.answer(by_query)
    internet.pages |= {"/slow": gate, "/quick": text_answer("words", content_type="text/plain")}
    running = serve(web_config(internet, pages=True, page_timeout_s=60, extract_timeout_s=30), no_index)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(running.retrieve, "/slow")
        until(lambda: gate.waiting == 1)
        assert running.retrieve("/quick").status_code == 200
        assert running.retrieve("/slow", deadline_ms=100).status_code == 504
        assert not waiting.done()
        gate.open()
        assert waiting.result().json()["result"][0][0]["contents"] == '"t"\nlate'


def test_a_page_that_cannot_be_parsed_in_time_is_replaced(internet: Internet, serve: Any) -> None:  # noqa: F811
    internet.pages["/a"] = text_answer(ARTICLE * 80)
    internet.answer(serper({"link": internet.host + "/a", "title": "t", "snippet": SNIPPET}))
    running = serve(web_config(internet, pages=True, extract_timeout_s=0.01), no_index)
    assert running.retrieve("q").json()["result"][0][0]["contents"] == f'"t"\n{SNIPPET}'
    assert outcomes(running) == {"extract_slow": 1}


def test_the_networks_let_through_are_none_by_default() -> None:
    assert WebConfig().page_networks == []
    assert WebConfig().page_ports == [80, 443]
