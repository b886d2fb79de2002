"""The rollout worker against what it could be at best; each prints a ratio against a named baseline, measured in one run.

    python -m benchmarks.rollout cpu      worker CPU per trajectory, engine and retriever simulated; JSON and msgpack shown
    python -m benchmarks.rollout flight   a thousand episodes in flight on one worker, against the simulated engine's own rate
    python -m benchmarks.rollout engine   tokens/s with real SGLang, against a bare client that has the same lengths sampled
    python -m benchmarks.rollout update   in-place updates of real SGLang against drained ones, and the share of the pause
    python -m benchmarks.rollout overlap  staleness 1 and 4 against 0: real queue, feed and collect; simulated engine and learner

Run it from the root of the repository: the simulated engine, the simulated retriever and the tiny model are the tests' own.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop

from benchmarks.rollout_learner import run_overlap
from benchmarks.rollout_parts import Clock, Parts, make_group, trajectories, until, worker
from benchmarks.rollout_update import run_update
from services.contract.codec import Codec
from services.contract.messages import Trajectory, decode_trajectory, encode
from services.rollout.generation import read_answer

SAMPLES = 8
SEARCH_PROMPT = [
    {"role": "system", "content": "You answer questions by searching."},
    {
        "role": "user",
        "content": "Search with <search>query</search>. When you know, answer with <answer>short answer</answer>.\n"
        "Question: What is the capital of France?",
    },
]
"""That of the quickstart, for a model that its warm start has taught the tags."""


def main() -> None:
    names = {"cpu": run_cpu, "flight": run_flight, "engine": run_engine, "update": run_update, "overlap": run_overlap}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=names)
    parser.add_argument("--model", type=Path, help="for `engine` and `update`: a quickstart's final model; default: a tiny one")
    parser.add_argument("--groups", type=int, default=0, help="how many groups of 8 (or, for `overlap`, steps); 0: as suits each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder), arguments.model)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the service's own loop
                runner.run(names[arguments.name](parts, arguments.groups))
        finally:
            parts.close()


def search_turns(codec: Codec, tokens: int) -> list[list[int]]:
    """Two searches and an answer of about `tokens` tokens each."""

    def turn(text: str) -> list[int]:
        filler = " thinking" * tokens
        ids = codec.encode(f"<think>{filler}</think>")
        return [*ids[: tokens - 24], *codec.encode(f"</think>{text}")]

    texts = ["<search>capital of France</search>", "<search>city of France</search>", "<answer>Paris</answer>"]
    return [turn(text) for text in texts]


async def run_cpu(parts: Parts, groups: int) -> None:
    """Budget: 4 ms a trajectory with two searches and 1,500 tokens."""
    parts.simulate(search_turns(parts.codec, 150), turn_s=0.05, passage=200)
    config = parts.configure(concurrency=64, least_concurrency=64)
    store, board = parts.streams(config)
    sent = [make_group(index, SAMPLES) for index in range(groups or 60)]
    async with worker(config, board):
        await play(store, [make_group(10_000 + index, SAMPLES) for index in range(4)])  # warm: imports, connections
        clock = Clock()
        await play(store, sent)
        cpu, wall = clock.cpu, clock.wall
    played = trajectories(store, sent)
    tokens = sum(len(t.response_ids) for t in played) / len(played)
    searches = sum(t.searches for t in played) / len(played)
    each_ms = 1000 * cpu / len(played)
    print(f"{len(played)} trajectories, {searches:.1f} searches and {tokens:.0f} tokens each, {len(played) / wall:.0f}/s")
    for name, milliseconds in codec_costs(played[0]).items():
        print(f"  {name:<42} {milliseconds:6.3f} ms a trajectory")
    print(f"worker CPU {each_ms:.2f} ms a trajectory = {each_ms / 4:.2f} x the budget of 4 ms")


async def play(store: Any, groups: list[Any]) -> None:
    before = store.accounts().finished
    for group in groups:
        store.feed(group)
    await until(lambda: store.accounts().finished - before >= len(groups), 0.25)


def codec_costs(trajectory: Trajectory) -> dict[str, float]:
    """What reading and writing one trajectory's bodies costs, alone in a loop."""
    turns = [span for span in trajectory.spans if span.kind == "model"]
    bodies, requests = [], []
    for span in turns:
        ids = trajectory.response_ids[span.start : span.end]
        meta = {"finish_reason": {"type": "stop"}, "weight_version": "0", "output_token_logprobs": [[-0.5, i, None] for i in ids]}
        bodies.append(msgspec.json.encode({"output_ids": ids, "meta_info": meta}))
        requests.append({"input_ids": trajectory.prompt_ids + trajectory.response_ids[: span.start]})
    body = encode(trajectory)
    return {
        "JSON: requests to /generate": timed(lambda: [msgspec.json.encode(request) for request in requests]),
        "JSON: answers of /generate, checked": timed(lambda: [read_answer(body) for body in bodies]),
        "msgpack: trajectory to bytes": timed(lambda: encode(trajectory)),
        f"msgpack: {len(body):,} bytes to trajectory, checked": timed(lambda: decode_trajectory(body)),
    }


def timed(work: Any, repeats: int = 300) -> float:
    """Milliseconds of CPU."""
    started = time.process_time()
    for _ in range(repeats):
        work()
    return 1000 * (time.process_time() - started) / repeats


async def run_flight(parts: Parts, groups: int) -> None:
    """A decoding step of 50 ms, whatever the batch: a turn of 100 tokens takes 5 s, an episode of three turns 15 s.

    The rate is taken between the first and the last quarter of the run, in which a thousand episodes are always in flight.
    """
    turn_s, spread, turns, episodes = 5.0, 0.25, search_turns(parts.codec, 100), 1000
    parts.simulate(turns, turn_s, spread)
    config = parts.configure(concurrency=episodes, least_concurrency=episodes, retrieval_concurrency=256)
    store, board = parts.streams(config)
    sent = [make_group(index, SAMPLES) for index in range(groups or 4 * episodes // SAMPLES)]
    async with worker(config, board):
        clock, most, seen = Clock(), 0, [(0.0, 0)]
        feeding = asyncio.create_task(play(store, sent))
        while not feeding.done():
            most = max(most, *(report.in_flight for report in await asyncio.to_thread(board.live_engines)), 0)
            seen.append((clock.wall, (await asyncio.to_thread(store.accounts)).finished))
            await asyncio.sleep(0.25)
        wall, cpu = clock.wall, clock.cpu
    begin, end = (next(row for row in seen if row[1] >= len(sent) * share) for share in (0.25, 0.75))
    rate = SAMPLES * (end[1] - begin[1]) / (end[0] - begin[0])
    ideal = episodes / (len(turns) * turn_s * math.exp(spread**2 / 2))
    played = len(trajectories(store, sent))
    print(f"{played} of {len(sent) * SAMPLES} episodes finished in {wall:.1f} s, {most} in flight, worker CPU {cpu / wall:.0%}")
    print(f"{rate:.1f} episodes/s = {rate / ideal:.2f} x the {ideal:.1f} that the engine alone allows")


async def run_engine(parts: Parts, groups: int) -> None:
    """Worker and bare client in turns, twice, on the same engine and at the same concurrency."""
    from services.rollout.engine_process import free_port

    parts.simulate_retriever(passage=300)
    port = free_port("127.0.0.1")
    own = {"port": port, "threads": 1, "max_total_tokens": 65_536}
    config = parts.configure(own, concurrency=16, least_concurrency=16, max_turn_tokens=64)
    store, board = parts.streams(config)
    rates: dict[str, list[float]] = {"worker": [], "bare": []}
    count, prompt = groups or 12, SEARCH_PROMPT if parts.trained else None
    async with worker(config, board):
        for part in range(3):
            sent = [make_group(1000 * part + index, SAMPLES, prompt, max_turn_tokens=64, topk=2) for index in range(count)]
            url = f"http://127.0.0.1:{port}"
            await forget_prefixes(url)
            clock = Clock()
            await play(store, sent)
            seconds, played = clock.wall, trajectories(store, sent)
            tokens = sum(sum(t.loss_mask) for t in played)
            await forget_prefixes(url)
            bare = await replay(url, played, 16)
            if part:  # the first one warms everything
                rates["worker"].append(tokens / seconds)
                rates["bare"].append(tokens / bare)
            print(f"{tokens} tokens: worker {tokens / seconds:.0f}/s, bare client {tokens / bare:.0f}/s")
    print(f"worker {sum(rates['worker']) / sum(rates['bare']):.3f} x a bare asyncio client's tokens/s")


async def forget_prefixes(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/flush_cache") as answer:
        answer.raise_for_status()


async def replay(url: str, played: list[Trajectory], concurrency: int) -> float:
    """Seconds to have sequences of the same lengths sampled, turn by turn, with as many requests under way.

    Each turn goes on from what the engine itself wrote before, as an episode does, so that both find the same prefixes cached.
    """
    slots = asyncio.Semaphore(concurrency)

    async def one(session: aiohttp.ClientSession, trajectory: Trajectory) -> None:
        ids = list(trajectory.prompt_ids)
        async with slots:
            for span in trajectory.spans:
                if span.kind == "observation":
                    ids += trajectory.response_ids[span.start : span.end]
                    continue
                params = {"max_new_tokens": span.end - span.start, "ignore_eos": True, "temperature": 1.0}
                body = {"input_ids": ids, "sampling_params": params, "return_logprob": True}
                async with session.post(f"{url}/generate", json=body) as answer:
                    ids = ids + (await answer.json())["output_ids"]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        clock = Clock()
        await asyncio.gather(*(one(session, trajectory) for trajectory in played))
        return clock.wall


if __name__ == "__main__":
    main()
