"""What is being done, said on the log and to people who wait on /ready."""

from __future__ import annotations

from collections.abc import Callable

from services.contract.telemetry import Progress

Say = Callable[[str], None]
"""Hears what a part is doing while it loads. Raises NotReady when the service was told to stop meanwhile."""


def said_progress(label: str, total: int, unit: str, say: Say) -> Callable[[int], None]:
    """A bar with an ETA: call the result with every advance."""
    bar = Progress(label, total, unit)

    def advance(count: int) -> None:
        bar.advance(count)
        say(bar.line())

    return advance
