"""What a page of Markdown holds, as far as the tests of the docs need it: headings, links, code blocks, words in back-ticks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")


@dataclass(frozen=True)
class Page:
    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path, path.read_text())

    @cached_property
    def prose(self) -> str:
        """All but the code blocks."""
        return FENCE.sub("", self.text)

    @cached_property
    def paragraphs(self) -> list[str]:
        """Paragraphs, and rows of tables. What stands left of a column "here" speaks of other projects and is left out."""
        found: list[str] = []
        for block in re.split(r"\n\s*\n", self.prose):
            lines = block.strip().split("\n")
            found += _our_cells(lines) if lines[0].startswith("|") else [block]
        return found

    @cached_property
    def spans(self) -> list[str]:
        """What stands in back-ticks, with every break of a line as one space."""
        return [" ".join(span.split()) for paragraph in self.paragraphs for span in SPAN.findall(paragraph)]

    @cached_property
    def links(self) -> list[str]:
        return LINK.findall(SPAN.sub("", self.prose))

    @cached_property
    def anchors(self) -> set[str]:
        return {slug(line.lstrip("#")) for line in self.prose.split("\n") if re.match(r"#{1,6} ", line)}

    def blocks(self, *languages: str) -> list[str]:
        """The code blocks of these languages."""
        return [body for language, body in FENCE.findall(self.text) if language in languages]

    @cached_property
    def tables(self) -> list[list[list[str]]]:
        """Rows of cells; the first row is the head."""
        blocks = [block.strip().split("\n") for block in re.split(r"\n\s*\n", self.prose)]
        return [[_cells(line) for line in lines if not _is_rule(line)] for lines in blocks if lines[0].startswith("|")]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _is_rule(line: str) -> bool:
    return set(line) <= set("|-: ")


def _our_cells(lines: list[str]) -> list[str]:
    head = _cells(lines[0])
    first = head.index("here") if "here" in head else 0
    return [" | ".join(_cells(line)[first:]) for line in lines if not _is_rule(line)]
