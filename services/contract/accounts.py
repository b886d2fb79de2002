"""Where every group is. At any instant

    fed = waiting + leased + finished + dead
    finished = collected + graded_waiting + ungraded + released

States live in one hash of Redis until release; what was released or died is only counted.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Accounts(msgspec.Struct, frozen=True):
    """Counts of groups since the run began; `waiting`, `leased`, `collected` … are those of this instant."""

    fed: int
    waiting: int
    leased: int
    dead: int
    ungraded: int
    graded_waiting: int
    collected: int
    released: int

    @property
    def finished(self) -> int:
        return self.ungraded + self.graded_waiting + self.collected + self.released

    def check(self) -> None:
        """Raise AssertionError unless every group that was fed is somewhere."""
        assert self.fed == self.waiting + self.leased + self.finished + self.dead, f"groups are missing: {self}"


def count_groups(reply: list[Any]) -> Accounts:
    """From the reply of the script `ACCOUNTS`: [id, state, graded samples] of every group in one list; leased; the stream's length;
    [fed, dead, released]."""
    flat, leased, depth, counters = reply
    states, graded = flat[1::3], [int(samples) for samples in flat[2::3]]
    complete = [n >= int(state.split()[1]) for state, n in zip(states, graded, strict=True) if state.startswith(b"finished")]
    fed, dead, released = map(int, counters)
    return Accounts(
        fed=fed,
        waiting=depth - leased,  # acknowledged entries are deleted at once, so the stream holds waiting and leased only
        leased=leased,
        dead=dead,
        ungraded=complete.count(False),
        graded_waiting=complete.count(True),
        collected=states.count(b"collected"),
        released=released,
    )
