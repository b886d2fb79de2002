"""Pages to text, here and in the process that may be killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from services.retriever.web.extract import Task, decode, main_text, tidy
from services.retriever.web.extractors import ExtractionFailed, Extractors, environment

SENTENCES = " ".join(f"The lighthouse number {number} was built by the river people." for number in range(20))
PAGE = f"""<html><head><title>T</title><script>var secret = 1;</script><style>p {{}}</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/shop">Shop</a></li></ul></nav>
<article><h1>Lighthouses</h1><p>{SENTENCES}</p><p>Caf\u00e9 &amp; tea.</p></article><footer>Copyright, all rights</footer>
</body></html>"""


def test_the_main_text_is_found() -> None:
    text = main_text(PAGE.encode(), "text/html")
    assert "lighthouse number 19" in text
    assert "Café & tea." in text
    assert not any(word in text for word in ("secret", "Shop", "Copyright", "<p>", "&amp;"))


def test_a_page_of_one_line_has_a_text() -> None:
    assert main_text(b"<html><body><div>It is 42.</div></body></html>", "text/html") == "It is 42."


def test_plain_text_is_left_alone() -> None:
    assert main_text(b"a <b>  c\n\n\n d", "text/plain; charset=utf-8") == "a <b> c\nd"


@pytest.mark.parametrize("page", [b"", b"   ", b"<html></html>", b"<html><body><script>1</script></body></html>", b"\x00" * 100])
def test_a_page_without_text_is_empty(page: bytes) -> None:
    assert main_text(page, "text/html").strip("\x00") == ""


@pytest.mark.parametrize("page", [b"<" * 50_000, b"<div>" * 50_000, b"<a href='" * 20_000, os.urandom(20_000), b"<!--" * 9_999])
def test_broken_html_is_survived(page: bytes) -> None:
    assert isinstance(main_text(page, "text/html"), str)


@pytest.mark.parametrize(
    ("page", "content_type", "text"),
    [
        ("é".encode(), "text/html; charset=utf-8", "é"),
        ("é".encode("latin-1"), "text/html; charset=ISO-8859-1", "é"),
        ("é€".encode("cp1252"), "text/html; charset=latin-1", "é€"),
        ("é€".encode("cp1252"), "text/html", "é€"),
        ("é".encode(), "text/html", "é"),
        ("é".encode(), "text/html; charset=no-such-charset", "é"),
        ("é".encode(), "text/html; charset=rot13", "é"),
        ("é".encode(), "text/html; charset=base64", "é"),
        ("日本".encode("shift_jis"), 'text/html; charset="Shift_JIS"', "日本"),
        (b'<meta charset="euc-jp">' + "日本".encode("euc-jp"), "text/html", '<meta charset="euc-jp">日本'),
        (b"\xef\xbb\xbf" + "é".encode(), "text/html; charset=latin-1", "é"),
        ("é".encode("utf-16"), "text/html", "é"),
        (b"a\xffb", "text/html; charset=utf-8", "a\ufffdb"),
    ],
)
def test_the_charset_is_found_as_browsers_find_it(page: bytes, content_type: str, text: str) -> None:
    assert decode(page, content_type) == text


def test_tidy_drops_empty_lines_and_runs_of_spaces() -> None:
    assert tidy("  a \t b\n\n \n c\r\n") == "a b\nc"


async def test_a_process_answers_one_page_after_the_other() -> None:
    extractors = Extractors(1, 20)
    try:
        first = await extractors.passage(PAGE.encode(), Task("text/html", "river people number 7", 300))
        second = await extractors.passage(b"plain words", Task("text/plain", "", 300))
        assert "lighthouse number 7 was" in first
        assert len(first) <= 300
        assert second == "plain words"
    finally:
        await extractors.close()


async def test_a_page_that_takes_too_long_is_given_up_and_the_next_is_answered() -> None:
    extractors = Extractors(1, 20)
    try:
        assert await extractors.passage(b"one", Task("text/plain", "", 300)) == "one"
        (process,) = extractors._started
        process.send_signal(signal.SIGSTOP)  # busy for ever
        extractors._timeout_s = 0.2
        with pytest.raises(ExtractionFailed) as failed:
            await extractors.passage(b"two", Task("text/plain", "", 300))
        assert failed.value.timeout
        extractors._timeout_s = 20
        assert await extractors.passage(b"three", Task("text/plain", "", 300)) == "three"
    finally:
        await extractors.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_process_that_dies_fails_its_page_only(run: Callable[[Coroutine[None, None, None]], None]) -> None:
    """On both event loops that uvicorn may take: they have different words for a closed pipe."""

    async def die() -> None:
        extractors = Extractors(1, 20)
        assert await extractors.passage(b"one", Task("text/plain", "", 300)) == "one"
        (process,) = extractors._started
        process.kill()
        await process.wait()
        with pytest.raises(ExtractionFailed) as failed:
            await extractors.passage(b"two", Task("text/plain", "", 300))
        assert not failed.value.timeout
        assert await extractors.passage(b"three", Task("text/plain", "", 300)) == "three"
        await extractors.close()

    run(die())


async def test_a_given_up_page_does_not_answer_for_the_next() -> None:
    extractors = Extractors(1, 20)
    try:
        await extractors.passage(b"start", Task("text/plain", "", 300))
        gone = asyncio.create_task(extractors.passage(PAGE.encode() * 50, Task("text/html", "x", 100)))
        await asyncio.sleep(0.01)
        gone.cancel()
        assert await extractors.passage(b"mine", Task("text/plain", "", 300)) == "mine"
    finally:
        await extractors.close()


def test_the_process_does_not_know_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORAGE_RETRIEVER__WEB__API_KEY", "secret")
    assert "secret" not in environment().values()


def test_the_process_ends_with_its_input() -> None:
    command = [sys.executable, "-m", "services.retriever.web.extract"]
    ended = subprocess.run(command, input=b"", capture_output=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, bytes(4), b"")
