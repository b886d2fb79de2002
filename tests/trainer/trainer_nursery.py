"""Starts trainers quickly, by forking a process that has imported everything, and kills them at points that a test names.

    python -m tests.trainer.trainer_nursery

Reads a job a line (`Job`), runs it to its end and writes a line with the exit codes of its ranks. What runs is the program
itself (`services.trainer.__main__.main`); only the functions of a job's `kill_at` are wrapped, in that process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Literal

import msgspec

DIES_WITH_ITS_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


class Point(msgspec.Struct, frozen=True):
    """The `call`-th call (from 1) of a function, before or after it has run."""

    function: str
    """Module and name, as `services.trainer.run:Run.publish`."""
    call: int = 1
    when: Literal["before", "after"] = "before"


class Job(msgspec.Struct, frozen=True):
    config: str
    log: str
    environments: list[dict[str, str]]
    """One a rank."""
    kill_at: list[Point] = []
    """Calls are counted from when the point before it was reached; at the last one the process sends itself the signal."""
    signal: int = signal.SIGKILL


WAIT_FOR_ROOM_S = 0.5
"""Instead of half a minute; the one setting that these trainers do not share with others."""


def main() -> None:
    for module in ("main", "run", "publishing.publish", "megatron.distributed"):
        importlib.import_module(f"services.trainer.{module}")
    importlib.import_module("torch.utils.tensorboard")
    importlib.import_module("transformers.models.auto.tokenization_auto")
    setattr(importlib.import_module("services.trainer.durable.room"), "WAIT_S", WAIT_FOR_ROOM_S)  # noqa: B010 - a setting replaced on purpose
    decode = msgspec.json.Decoder(Job).decode
    for line in sys.stdin.buffer:
        job = decode(line)
        print(msgspec.json.encode(_run(job)).decode(), flush=True)


def _run(job: Job) -> list[int]:
    """Exit code of each rank; -9 for one that was killed. As torchrun does, the others go when one fails."""
    children = [_fork(job, environment) for environment in job.environments]
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in children]


def _fork(job: Job, environment: dict[str, str]) -> int:
    if pid := os.fork():
        return pid
    ctypes.CDLL(None).prctl(DIES_WITH_ITS_PARENT, signal.SIGKILL)
    output = os.open(job.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    sys.argv = ["services.trainer", "--config", job.config]
    code = 70
    try:
        _wrap(job)
        importlib.import_module("services.trainer.__main__").main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001 - nothing of this process may run on in its copy
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(code)


def _wrap(job: Job) -> None:
    """Replace each point's function by one that counts its calls while its turn has come."""
    reached: list[Point] = []

    def reach(point: Point) -> None:
        reached.append(point)
        if len(reached) == len(job.kill_at):
            os.kill(os.getpid(), job.signal)

    for turn, point in enumerate(job.kill_at):
        owner, name = _owner(point.function)
        setattr(owner, name, _counting(getattr(owner, name), point, lambda turn=turn: len(reached) == turn, reach))


def _counting(function: Callable, point: Point, its_turn: Callable[[], bool], reach: Callable[[Point], None]) -> Callable:
    calls = 0

    @functools.wraps(function)
    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += its_turn()
        hit = its_turn() and calls == point.call
        if hit and point.when == "before":
            reach(point)
        result = function(*arguments, **options)
        if hit and point.when == "after":
            reach(point)
        return result

    return counted


def _owner(function: str) -> tuple[Any, str]:
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


if __name__ == "__main__":
    main()
