"""What `benchmarks.queue` sends, and the three ways in which it sends it (the table there)."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from typing import Any, NamedTuple

import redis

from services.contract.config import Config
from services.contract.grading import grading_app, send_for_grading
from services.contract.groups import GroupStore, Lease
from services.contract.messages import GradedNotice, PromptGroup, Reward, Sampling, Span, Trajectory, VersionSpan, encode

RUN, CONSUMERS, POLL_S = "benchmark", "consumers", 0.01
SAMPLING = Sampling(1.0, 1.0, 500, 2000, 500, 3, 3)


# -- what is sent ------------------------------------------------------------------------------------------------------


def make_group(number: int, samples: int, prompt_bytes: int) -> PromptGroup:
    question = f"Question {number}: ".ljust(prompt_bytes, "x")
    return PromptGroup(f"t{number:08d}", "train", f"q:{number}", "q", question, ["Paris"], "", samples, SAMPLING, 0, 1800.0)


def make_trajectory(group: PromptGroup, sample: int, tokens: int) -> Trajectory:
    """Two searches and an answer: three model spans and two observations, a fifth of the tokens each."""
    draw = random.Random(sample)
    fifth = tokens // 5
    ends = [fifth * (i + 1) for i in range(4)] + [tokens]
    spans = []
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        text = ("<answer>Paris</answer>" if i == 4 else "<search>x</search>").rjust(4 * (end - start), "w")
        own = [VersionSpan(0, start, end)]
        spans.append(Span("observation", start, end, text, query="x") if i % 2 else Span("model", start, end, text, own))
    mask = [span.kind == "model" for span in spans for _ in range(span.start, span.end)]
    return Trajectory(
        id=f"{group.group_id}/{sample}",
        group_id=group.group_id,
        prompt_ids=[draw.randrange(50_000) for _ in range(256)],
        response_ids=[draw.randrange(50_000) for _ in range(tokens)],
        logprobs=[-draw.random() if own else 0.0 for own in mask],
        spans=spans,
        status="completed",
        stop_reason="answered",
        temperature=1.0,
        question=group.question[:64],
        golden_answers=group.golden_answers,
        answer="Paris",
    )


class Load(NamedTuple):
    groups: list[PromptGroup]
    trajectories: dict[str, Trajectory]
    bodies: dict[str, bytes]
    """The same, encoded."""
    threads: int

    @property
    def size(self) -> int:
        return len(self.bodies)


def make_load(options: argparse.Namespace) -> Load:
    groups = [make_group(number, options.samples, options.prompt_bytes) for number in range(options.groups)]
    made = [make_trajectory(group, sample, options.tokens) for group in groups for sample in range(group.samples)]
    return Load(groups, {t.id: t for t in made}, {t.id: encode(t) for t in made}, options.threads)


# -- the contenders ----------------------------------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in so many threads; raises what one of them raised."""
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, i) for i in range(count)]:
            done.result()


def send(store: GroupStore, load: Load, ask: Callable[[list[str]], object]) -> None:
    """A feeder's and a rollout worker's part: every group fed, leased, stored, asked for and finished."""
    for group in load.groups:
        store.feed(group)

    def work(thread: int) -> None:
        while leases := store.lease(f"worker-{thread}", 1, 1):
            play(leases[0])

    def play(lease: Lease) -> None:
        names = lease.group.trajectory_ids()
        store.store_many([(load.trajectories[name], lease) for name in names])  # as a busy worker does
        ask(names)
        store.finish(lease)

    in_threads(load.threads, work)


def durable(config: Config, client: Any, load: Load) -> None:
    store, app = GroupStore(client, RUN), grading_app(config)
    send(store, load, lambda names: send_for_grading(app, *names))
    while client.xlen(store.keys.graded) < load.size:
        time.sleep(POLL_S)


def moves(config: Config, client: Any, load: Load) -> None:
    store = GroupStore(client, RUN)

    def grade(names: list[str]) -> None:
        for name in names:
            body = client.get(store.keys.trajectory(name))
            store.grade(name, body, Reward(1.0, {"exact_match": 1.0}))

    send(store, load, grade)


def plain(config: Config, client: Any, load: Load) -> None:
    names = iter(list(load.bodies))
    for stream in ("prompts", "todo", "graded"):
        client.xgroup_create(stream, CONSUMERS, id="0", mkstream=True)
    for group in load.groups:
        client.xadd("prompts", {"body": encode(group)})

    def work(thread: int) -> None:
        while reply := client.xreadgroup(CONSUMERS, f"worker-{thread}", {"prompts": ">"}, count=1):
            for _ in range(load.size // len(load.groups)):
                name = next(names)
                client.set(name, load.bodies[name])
                client.xadd("todo", {"body": name})
            client.xack("prompts", CONSUMERS, reply[0][1][0][0])

    in_threads(load.threads, work)
    while client.xlen("graded") < load.size:
        time.sleep(POLL_S)


def plain_grader(url: str, ready: Event) -> None:
    """The second process of `plain`: it moves bodies and looks at none. Until it is killed."""
    client: Any = redis.Redis.from_url(url)
    notice = encode(GradedNotice("t00000000/0", "t00000000", 1.0))
    ready.set()
    while True:
        try:
            reply = client.xreadgroup(CONSUMERS, "grader", {"todo": ">"}, count=1, block=100)
        except redis.ResponseError:  # the round has not begun: there are no streams yet
            time.sleep(POLL_S)
            continue
        for entry_id, fields in reply[0][1] if reply else []:
            client.set(fields[b"body"], client.get(fields[b"body"]))
            client.xadd("graded", {"body": notice})
            client.xack("todo", CONSUMERS, entry_id)
