"""The durable path of a trajectory, prompt to graded, against the same bodies through plain Redis commands, in one run.

    python -m benchmarks.queue

| contender | what it does with every group                                                                              |
|-----------|------------------------------------------------------------------------------------------------------------|
| durable   | feed, lease, store, ask for grading, finish; a real grading worker (`python -m services.reward`) grades    |
| moves     | the same moves without Celery and without a grader: the sender writes a reward of its own                  |
| plain     | XADD and XREADGROUP a prompt, SET a body, XADD its id; a second process XREADGROUPs it, GETs, SETs, XADDs, XACKs |

All three send from one process with the same threads, to the same Redis server, which syncs every write as the suite's does.
Rounds alternate, so that a busy machine slows all alike; the best of each counts. A last durable round asks for the accounts
all the time and fails when one of them does not add up. Redis's share is `INFO commandstats` (time inside commands) and
`INFO cpu` (all that the server computes, sockets and file included).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import redis

from benchmarks.queue_paths import RUN, Load, durable, make_load, moves, plain, plain_grader
from services.contract.config import Config, load_config
from services.contract.groups import GroupStore
from services.contract.redis_binary import redis_binary
from services.contract.store import connect


class Cost(NamedTuple):
    """Of one round. Seconds of the clock, and CPU seconds of each party."""

    wall: float
    sender: float
    grader: float
    server: float
    commands: float
    """Seconds inside Redis commands."""
    stored: int
    """Bytes of Redis's memory for all of it, graded and not yet released."""


# -- servers -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def redis_server(folder: Path, fsync: str) -> Iterator[tuple[str, psutil.Process]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
    with (folder / "redis.log").open("w") as log:
        process = subprocess.Popen([redis_binary(), *options, "--appendfsync", fsync], stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(port))
        yield f"redis://127.0.0.1:{port}/0", psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def plain_grading_process(url: str) -> Iterator[psutil.Process]:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=plain_grader, args=(url, ready), daemon=True)
    process.start()
    try:
        ready.wait()
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def grading_worker(folder: Path, environment: dict[str, str]) -> Iterator[psutil.Process]:
    heartbeat = folder / "heartbeat"
    with (folder / "reward.log").open("w") as log:
        command = [sys.executable, "-m", "services.reward"]
        environment = os.environ | environment | {"FORAGE_HEARTBEAT_FILE": str(heartbeat)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: heartbeat.exists() and heartbeat.read_text().startswith("ready"))
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(redis.Redis(port=port).ping())
    return False


def wait_until(holds: Callable[[], object]) -> None:
    while not holds():
        time.sleep(0.05)


# -- measuring ---------------------------------------------------------------------------------------------------------


def cpu(process: psutil.Process) -> float:
    """CPU seconds of a process and of what it has started."""
    family = [process, *process.children(recursive=True)]
    return sum(times.user + times.system for times in (member.cpu_times() for member in family))


def in_commands(client: Any) -> float:
    return sum(row["usec"] for row in client.info("commandstats").values()) / 1e6


def measure(work: Callable[[], None], client: Any, server: psutil.Process, grader: psutil.Process) -> Cost:
    client.flushall()
    empty = client.info("memory")["used_memory"]
    before = in_commands(client), cpu(server), cpu(grader), time.process_time(), time.perf_counter()
    work()
    after = in_commands(client), cpu(server), cpu(grader), time.process_time(), time.perf_counter()
    commands, served, graded, sent, wall = (b - a for a, b in zip(before, after, strict=True))
    return Cost(wall, sent, graded, served, commands, client.info("memory")["used_memory"] - empty)


def check_accounts(client: Any, until: threading.Event, looks: list[int]) -> None:
    """Ask all the time; raises AssertionError when a group is missing."""
    store = GroupStore(client, RUN)
    while not until.is_set():
        store.accounts().check()
        looks.append(1)


def checked(config: Config, client: Any, load: Load) -> int:
    """A durable round under the eyes of `check_accounts`; returns how often they looked."""
    client.flushall()
    until, looks = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(check_accounts, client, until, looks)
        try:
            durable(config, client, load)
        finally:
            until.set()
        watching.result()
    accounts = GroupStore(client, RUN).accounts()
    assert accounts.graded_waiting == len(load.groups), f"not every group was graded: {accounts}"
    return len(looks)


# -- telling -----------------------------------------------------------------------------------------------------------


def line(name: str, cost: Cost, count: int) -> str:
    parts = {"sender": cost.sender, "grader": cost.grader, "Redis": cost.server, "of it in commands": cost.commands}
    shares = ", ".join(f"{part} {1e6 * seconds / count:.0f}" for part, seconds in parts.items())
    return f"{name:8} {count / cost.wall:6.0f} trajectories/s  {1e6 * cost.wall / count:6.0f} µs each  CPU µs each: {shares}"


def report(best: dict[str, Cost], load: Load) -> None:
    for name, cost in best.items():
        print(line(name, cost, load.size))
    ours = best["durable"]
    for name in ("moves", "plain"):
        cpu_ratio = sum(ours[1:4]) / sum(best[name][1:4])
        print(f"durable / {name}: {ours.wall / best[name].wall:.2f} × the time, {cpu_ratio:.2f} × the CPU")
    print(f"Redis's share of the durable path: {ours.commands / ours.wall:.1%} of the time inside commands, ", end="")
    print(f"{ours.server / sum(ours[1:4]):.1%} of all CPU")
    body = len(next(iter(load.bodies.values())))
    print(f"{ours.stored / load.size:.0f} bytes of Redis's memory for a graded trajectory, its body of {body} bytes included")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--prompt-bytes", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=8, help="of the sender")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fsync", choices=["always", "everysec", "no"], default="always")
    return parser.parse_args()


def main() -> None:
    options = parse()
    load = make_load(options)
    print(f"{load.size} trajectories of {options.tokens} tokens in groups of {options.samples}, appendfsync {options.fsync}")
    with tempfile.TemporaryDirectory() as name, redis_server(Path(name), options.fsync) as (url, server):
        settings = {"FORAGE_REDIS__URL": url, "FORAGE_RUN__NAME": RUN}
        config = load_config(None, settings)
        client: Any = connect(config.redis)
        with grading_worker(Path(name), settings) as grader:
            costs: dict[str, list[Cost]] = {"durable": [], "moves": [], "plain": []}
            for _ in range(options.rounds):
                for path in (durable, moves):
                    costs[path.__name__].append(measure(lambda path=path: path(config, client, load), client, server, grader))
                with plain_grading_process(url) as other:
                    costs["plain"].append(measure(lambda: plain(config, client, load), client, server, other))
            report({name: min(found) for name, found in costs.items()}, load)
            looks = checked(config, client, load)
    print(f"accounts asked for {looks} times while {load.size} trajectories went through: every time they added up")


if __name__ == "__main__":
    main()
