"""The picture of a table of evaluations; needs matplotlib, which is the extra `plots`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from services.suite.published import PublishedRow
from services.suite.score_table import ScoreTable, TableRow

PICTURED = 7
"""Published rows in a picture, the first of the table: more marks than that cannot be told apart."""
MARKS = ("D", "o", "s", "^", "v", "P", "X")
SHADES = ("#252525", "#525252", "#737373", "#6a3d9a", "#b15928", "#e31a1c", "#1b7837")
BARS = ("#9ecae1", "#fdae6b", "#74c476", "#3182bd", "#e6550d", "#31a354", "#756bb1", "#636363")
ROOM = 0.8
"""Of a set's width, what its bars take together."""


def matplotlib_is_there() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_table(table: ScoreTable, target: Path) -> None:
    """Exact match of each row by set, with 95 % intervals, and of the first published rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = table.columns
    figure, axis = plt.subplots(figsize=(max(6.0, 2.0 + 1.5 * len(columns)), 5.0))
    for place, row in enumerate(table.rows):
        _bars(axis, row, columns, place, len(table.rows))
    for place, row in enumerate(table.published[:PICTURED]):
        _marks(axis, table, row, place)
    axis.set_xticks(range(len(columns)), [_label(table, column) for column in columns])
    axis.set(ylabel="exact match %", ylim=(0, None), title="bars: measured, with 95 % intervals" + _told(table))
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    _legend(axis, columns=min(3, len(columns)))
    figure.savefig(target, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _legend(axis: Any, columns: int) -> None:
    """Below the picture, the bars first."""
    named = sorted(zip(*axis.get_legend_handles_labels(), strict=True), key=lambda pair: hasattr(pair[0], "get_marker"))
    handles, labels = zip(*named, strict=True)
    axis.legend(handles, labels, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, frameon=False)


def _told(table: ScoreTable) -> str:
    return "; marks: published" if table.published else ""


def _label(table: ScoreTable, column: str) -> str:
    return f"{column}\nn = {table.asked(column)}"


def _bars(axis: Any, row: TableRow, columns: list[str], place: int, rows: int) -> None:
    width = ROOM / rows
    found = [(x, scores) for x, column in enumerate(columns) if (scores := row.scores(column))]
    heights = [100 * scores.figures["exact_match"] for _, scores in found]
    below = [height - 100 * scores.intervals["exact_match"][0] for height, (_, scores) in zip(heights, found, strict=True)]
    above = [100 * scores.intervals["exact_match"][1] - height for height, (_, scores) in zip(heights, found, strict=True)]
    errors = [[max(0.0, value) for value in side] for side in (below, above)]
    middles = [x - ROOM / 2 + (place + 0.5) * width for x, _ in found]
    colour = BARS[place % len(BARS)]
    axis.bar(middles, heights, width * 0.92, yerr=errors, color=colour, label=row.name, capsize=2, error_kw={"lw": 1})


def _marks(axis: Any, table: ScoreTable, row: PublishedRow, place: int) -> None:
    """Side by side within a set's width, so that equal ones do not hide each other."""
    shift = ROOM * ((place + 0.5) / min(len(table.published), PICTURED) - 0.5)
    shares = [table.published_share(row, column) for column in table.columns]
    points = [(x + shift, 100 * share) for x, share in enumerate(shares) if share is not None]
    style = {"marker": MARKS[place], "color": SHADES[place], "markeredgecolor": "white", "markersize": 6, "linestyle": "none"}
    axis.plot([x for x, _ in points], [y for _, y in points], label=row.name, zorder=3, **style)
