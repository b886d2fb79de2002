"""How many groups are fed beyond the batch that is being cut, so that the next one is ready when the trainer asks for it.

Each group fed ahead is played by an older policy than the one that learns from it, so no more are fed than keep the trainer busy:
one batch at first, more as soon as the trainer had to wait for groups, fewer when groups lay about finished. `max_staleness`
bounds it: 0 feeds nothing ahead.
"""

from __future__ import annotations


class Lookahead:
    def __init__(self, groups_per_step: int, max_staleness: int) -> None:
        self.least = min(1, max_staleness) * groups_per_step
        self.most = max_staleness * groups_per_step
        self.groups = self.least
        """To be fed beyond the batch that is being cut."""

    def note(self, missing: int, spare: int) -> None:
        """What cutting a batch showed: `missing` groups of it had to be waited for, `spare` ones beyond it were finished."""
        change = missing or -((spare + 1) // 2)  # a trainer that waits costs more than a group that is a version older
        self.groups = max(self.least, min(self.most, self.groups + change))
