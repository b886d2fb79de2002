"""What a worker has done, for its summary line and its heartbeat."""

from __future__ import annotations

import time

from services.contract.messages import Trajectory


class Statistics:
    """Counts since the last summary."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.episodes = self.tokens = self.searches = self.answered = 0
        self._since = time.monotonic()

    def count(self, trajectory: Trajectory) -> None:
        self.episodes += 1
        self.tokens += sum(span.end - span.start for span in trajectory.spans if span.kind == "model")
        self.searches += trajectory.searches
        self.answered += trajectory.answer is not None

    def summary(self, in_flight: int) -> str | None:
        """One line on the time since the last summary; None when nothing happened. `in_flight`: episodes being played now."""
        minutes = (time.monotonic() - self._since) / 60
        if not (self.episodes or in_flight) or minutes == 0:
            self._reset()
            return None
        rates = f"{self.episodes / minutes:.0f} episodes/min, {self.tokens / minutes / 60:.0f} tokens/s"
        line = f"{rates}, {self.searches} searches, {self.answered} of {self.episodes} answered, {in_flight} in flight"
        self._reset()
        return line
