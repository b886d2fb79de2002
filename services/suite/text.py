"""Text that others wrote, made safe to print: a passage or a policy must not steer the terminal.

Rich markup is no danger here because strings reach rich only inside `Text`; what is left are characters that a terminal acts on.

| character                                          | shown as                       |
|----------------------------------------------------|--------------------------------|
| newline                                            | itself, or ``␊`` where a line must stay one |
| tab                                                | four spaces                    |
| other C0 controls (escape, bell, carriage return), DEL | their control pictures, such as ``␛`` |
| C1 controls, direction overrides, line separators, lone surrogates | an escape, such as ``\\u202e`` |
"""

from __future__ import annotations

import os
import re
import sys

from rich.console import Console, RenderableType
from rich.text import Text

PIPE_WIDTH = 160
"""Columns where no terminal says how many it has."""

_DELETE = 0x7F
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with everything that a terminal would act on written out. Newlines stay."""
    return _UNSAFE.sub(_shown, text)


def one_line(text: str) -> str:
    """The same, on one line."""
    return visible(text).replace("\n", "␊")


def _shown(match: re.Match[str]) -> str:
    character = match[0]
    if character == "\n":
        return character
    if character == "\t":
        return "    "
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == _DELETE else f"\\u{code:04x}"


def cell(text: object, style: str = "") -> Text:
    """A table cell or a line of somebody else's text."""
    return Text(one_line(str(text)), style=style)


def make_console() -> Console:
    """The terminal, or a pipe: then without colours, wide, and never failing on a character that its encoding lacks."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def say(what: RenderableType) -> None:
    """Print a drawing; into a pipe without the spaces that fill its lines."""
    console = make_console()
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as capture:
        console.print(what)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
