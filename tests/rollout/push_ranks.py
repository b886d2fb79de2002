"""Trainers of several ranks that push a policy: real Megatron ranks over gloo, forked by a process that has imported everything.

    python -m tests.rollout.push_ranks

Reads a job a line (`Job`), runs it to its end and writes a line with the exit codes of its ranks. When one rank fails, the
others are asked to end (SIGTERM) and after half a minute are ended, as torchrun does it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch.distributed as dist
import torch.multiprocessing as mp

from services.contract.config import Config
from services.contract.policy import PolicyBoard
from services.contract.store import connect
from services.trainer.megatron import distributed
from services.trainer.megatron.learner import Learner
from services.trainer.publishing.collective import EngineGroup
from services.trainer.publishing.publish import Publisher
from services.trainer.ranks import StopFlag, StopRequested, is_lead, on_lead_with_export
from tests.conftest import free_port

Death = Literal["", "and the push is over before that is noticed", "and the lead is asked to stop"]


class Job(msgspec.Struct, frozen=True):
    config: str
    """As JSON; `trainer.processes` ranks are started."""
    model: str
    version: int
    rank_1_dies: Death = ""
    """When the lead is about to send the second bucket."""


def main() -> None:
    decode = msgspec.json.Decoder(Job).decode
    for line in sys.stdin.buffer:
        print(msgspec.json.encode(run(decode(line))).decode(), flush=True)


def run(job: Job) -> list[int]:
    """Exit code of each rank."""
    world = Config.model_validate_json(job.config).trainer.processes
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = mp.start_processes(be_a_rank, args=(job,), nprocs=world, join=False, start_method="fork")
    assert ranks is not None
    try:
        while not ranks.join():
            pass
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        print(error, file=sys.stderr, flush=True)
    return [process.exitcode or 0 for process in ranks.processes]


def be_a_rank(rank: int, job: Job) -> None:
    """What `Run.publish` does, with the weights of a folder for those of a step."""
    os.environ["RANK"] = str(rank)
    stop = StopFlag()
    stop.install()
    config = Config.model_validate_json(job.config)
    distributed.init(config)
    learner = Learner(config, Path(job.model))
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if job.rank_1_dies:
        _kill_in_the_push(pids[1], stop if "stop" in job.rank_1_dies else None)
    board = PolicyBoard(connect(config.redis), config.run.name)
    publisher = Publisher(config, board, stop.check) if is_lead() else None

    def publish(begin: Any) -> None:
        assert publisher
        publisher.publish(job.version, job.version - 1, begin)

    on_lead_with_export(publish, learner.export)
    if publisher:
        publisher.close()
    distributed.shutdown()


def _kill_in_the_push(pid: int, stop: StopFlag | None) -> None:
    """Kill that process before the second bucket; with `stop`, go on only when that has brought the lead a signal of its own."""
    sent, send = [], EngineGroup.broadcast
    if not stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this push takes less time than noticing does

    def broadcast(group: EngineGroup, flat: Any) -> None:
        if len(sent) == 1:
            os.kill(pid, signal.SIGKILL)
            while stop and not _is_set(stop):
                time.sleep(0.01)
        sent.append(flat)
        send(group, flat)

    setattr(EngineGroup, "broadcast", broadcast)  # noqa: B010 - a method is replaced on purpose


def _is_set(stop: StopFlag) -> bool:
    try:
        stop.check()
    except StopRequested:
        return True
    return False


if __name__ == "__main__":
    main()
