"""Short facts in a row that breaks between them and not inside them, however narrow the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from services.suite.text import cell, one_line

GAP = "  "


class Facts:
    """Draws each text whole where the width allows it."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = [one_line(text) for text in texts]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from (Text(line, overflow="fold") for line in lines(self.texts, options.max_width))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widths = [len(text) for text in self.texts]
        whole = sum(widths) + len(GAP) * max(len(widths) - 1, 0)
        return Measurement(min(max(widths, default=0), options.max_width), min(whole, options.max_width))


def lines(texts: list[str], width: int) -> list[str]:
    """As many texts on each line as fit; one that is longer than `width` has a line of its own."""
    drawn: list[str] = []
    for text in texts:
        if drawn and len(drawn[-1]) + len(GAP) + len(text) <= width:
            drawn[-1] += GAP + text
        else:
            drawn.append(text)
    return drawn


def facts_table(rows: Iterable[tuple[str, Facts | Text]]) -> Table:
    """A name and its facts, one row each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, facts in rows:
        table.add_row(cell(name), facts)
    return table
