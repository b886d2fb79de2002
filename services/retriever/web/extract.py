"""A process of its own that finds the passage of a page: `python -m services.retriever.web.extract`.

Parsing strangers' HTML can take for ever or all memory, so it happens where it can be killed, within limits of memory, and
without our environment, which holds the provider's key.

Frames of 4 bytes big-endian length and content, both ways. In: `Task` as JSON, a zero byte, the page as it came. Out: the
passage in UTF-8, empty if there is no text; the very first frame is empty and says that the imports are done.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from typing import BinaryIO

from services.retriever.web.passage import choose_passage

LENGTH = struct.Struct(">I")
MEMORY_BYTES = 2 << 30
CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
META_BYTES = 4096
"""Browsers look no further for the charset either."""


@dataclass(frozen=True)
class Task:
    content_type: str
    """As the header says it."""
    clues: str
    """The snippet, or what else the passage is looked for by."""
    chars: int
    """Of the passage, at most."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too; we end when the service closes our input
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()  # trafilatura complains of bad pages; they are counted by who asked
    from trafilatura import extract  # noqa: F401 - seconds of imports, before the first page rather than within its time

    pages, texts = sys.stdin.buffer, sys.stdout.buffer
    write_frame(texts, b"")
    while (frame := read_frame(pages)) is not None:
        task, _, page = frame.partition(b"\0")  # JSON has no zero bytes
        write_frame(texts, passage(page, Task(**json.loads(task))).encode("utf-8", "ignore"))


def passage(page: bytes, task: Task) -> str:
    """Empty if the page has no text."""
    return choose_passage(main_text(page, task.content_type), task.clues, task.chars)


def read_frame(stream: BinaryIO) -> bytes | None:
    """None at the end."""
    head = stream.read(LENGTH.size)
    return stream.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else None


def write_frame(stream: BinaryIO, content: bytes) -> None:
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


def main_text(page: bytes, content_type: str) -> str:
    """Article, tables and lists without what stands around them; one line a paragraph. Empty if nothing is found."""
    from trafilatura import extract, html2txt

    text = decode(page, content_type)
    if content_type.startswith("text/plain"):
        return tidy(text)
    try:
        return tidy(extract(text, include_comments=False, include_tables=True) or html2txt(text))
    except (MemoryError, RecursionError, ValueError):  # of lxml and trafilatura, for pages no browser would like either
        return ""


def decode(page: bytes, content_type: str) -> str:
    """By the byte order mark, the header, the page's own word, else as UTF-8 or Windows-1252: browsers' order."""
    for mark, name in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if page.startswith(mark):
            return page[len(mark) :].decode(name, "replace")
    for place in (content_type, page[:META_BYTES].decode("latin-1")):
        if (found := CHARSET.search(place)) and (name := _codec(found[1])):
            return page.decode(name, "replace")
    try:
        return page.decode("utf-8")
    except UnicodeDecodeError:
        return page.decode("cp1252", "replace")


def _codec(charset: str) -> str | None:
    """None for a charset that does not exist, or that is no charset (Python also has `rot13` and `zip`)."""
    try:
        name = codecs.lookup(charset).name
        "".encode(name)
    except LookupError:
        return None
    return "cp1252" if name in ("iso8859-1", "ascii") else name  # as browsers read them


def tidy(text: str) -> str:
    """Neither empty lines nor runs of spaces: they would fill the passage and say nothing."""
    return "\n".join(line for raw in text.splitlines() if (line := " ".join(raw.split())))


if __name__ == "__main__":
    main()
