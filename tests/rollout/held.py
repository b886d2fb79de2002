"""Runs a service as it is, but for two places where it can be held, so that a test can kill something exactly there.

    HOLDS=folder python -m tests.rollout.held rollout --config run.toml

| place       | in which service | between what                                                   |
|-------------|------------------|----------------------------------------------------------------|
| before_task | rollout          | a trajectory is stored, its task is not sent yet               |
| before_ack  | reward           | a trajectory is graded and announced, its task not acknowledged |

While the file `folder/<place>` exists, whoever comes to that place writes `folder/<place>.<process id>` and waits.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def hold(place: str) -> None:
    folder = Path(os.environ["HOLDS"])
    if (folder / place).exists():
        (folder / f"{place}.{os.getpid()}").touch()
        while (folder / place).exists():
            time.sleep(0.01)


def hold_before_task() -> None:
    from services.rollout.grading import Grading

    request = Grading.request

    def held(self: Grading, trajectory_ids: list[str]) -> None:
        hold("before_task")
        request(self, trajectory_ids)

    Grading.request = held


def hold_before_ack() -> None:
    from services.contract.groups import GroupStore

    grade = GroupStore.grade

    def held(self: GroupStore, *arguments: Any) -> bool:
        graded = grade(self, *arguments)
        hold("before_ack")
        return graded

    GroupStore.grade = held


if __name__ == "__main__":
    service = sys.argv.pop(1)
    {"rollout": hold_before_task, "reward": hold_before_ack}[service]()
    runpy.run_module(f"services.{service}", run_name="__main__")
