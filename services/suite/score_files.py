"""A table of evaluations as files.

| file         | holds                                                                                               |
|--------------|-----------------------------------------------------------------------------------------------------|
| `table.md`   | exact match of every row and set with its interval, published rows below; then all figures          |
| `table.json` | the same as data (`ScoreTable`)                                                                     |
| `table.png`  | exact match as bars with their intervals, published rows as marks; only where matplotlib is         |
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from services.suite.score_plot import matplotlib_is_there, plot_table
from services.suite.score_table import ScoreTable, as_markdown

TABLE_MD, TABLE_JSON, TABLE_PNG = "table.md", "table.json", "table.png"


def write_table(table: ScoreTable, folder: Path) -> list[Path]:
    """`table.md`, `table.json` and, where matplotlib is, `table.png`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE_MD).write_text(as_markdown(table) + "\n")
    (folder / TABLE_JSON).write_bytes(msgspec.json.format(msgspec.json.encode(table)))
    written = [folder / TABLE_MD, folder / TABLE_JSON]
    if matplotlib_is_there():
        plot_table(table, folder / TABLE_PNG)
        written.append(folder / TABLE_PNG)
    return written
