"""In-place updates of real SGLang against drained ones: tokens under the same load and the same number of updates.

Turns of different lengths run all the time; the policy changes every dozen seconds. An update is all of it: the version written
and synced, its digests checked, the engine paused, loaded and resumed. In the pause the engine decodes nothing.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.rollout_parts import Clock, Parts
from services.contract import weights
from services.contract.messages import Sampling
from services.rollout.own_engine import OwnEngine

CONCURRENCY, TURN_TOKENS = 16, 64
EVERY_S, UPDATES, ROUNDS = 12.0, 4, 2


async def run_update(parts: Parts, rounds: int) -> None:
    config = parts.configure({"threads": 1, "max_total_tokens": 65_536}, concurrency=CONCURRENCY)
    engine = OwnEngine(config, parts.folder / "engine.log")
    await engine.start(str(parts.model), 0)
    rates: dict[str, list[float]] = {"in_place": [], "drain": []}
    shares: dict[str, list[float]] = {"in_place": [], "drain": []}
    try:
        for part in range(rounds or ROUNDS):
            for mode in ("drain", "in_place") if part % 2 else ("in_place", "drain"):
                engine.config = config.rollout.model_copy(update={"update_mode": mode})
                rate, share = await under_load(engine, parts, config.weights_folder)
                rates[mode].append(rate)
                shares[mode].append(share)
                print(f"{mode}: {rate:.0f} tokens/s, the engine's part of an update {share:.0%}")
    finally:
        await engine.stop()
    pause = sum(shares["in_place"]) / len(shares["in_place"])
    gained = sum(rates["in_place"]) / sum(rates["drain"])
    print(f"in place {gained:.2f} x the tokens/s of draining; paused {pause:.0%} of an update")


async def under_load(engine: OwnEngine, parts: Parts, root: Path) -> tuple[float, float]:
    """Tokens/s over a few updates, and the share of an update that the engine takes (pause to resume, or the drain)."""
    tokens = 0
    sampling = Sampling(1.0, 1.0, TURN_TOKENS, TURN_TOKENS, 1, 0, 1)

    may_send = asyncio.Event()
    may_send.set()

    async def turns(number: int) -> None:
        nonlocal tokens
        while True:  # of different lengths, so that a drain has to wait for the longest
            await may_send.wait()
            length = TURN_TOKENS // (1 + number % 4)
            tokens += len((await engine.generate(list(range(10 + number, 40 + number)), sampling, length)).ids)

    loads = [asyncio.create_task(turns(number)) for number in range(CONCURRENCY)]
    await asyncio.sleep(1)
    clock, tokens, engine_s, update_s = Clock(), 0, 0.0, 0.0
    for _ in range(UPDATES):
        started = time.perf_counter()
        version = 1 + max([0, *weights.published_versions(root)])
        path = await asyncio.to_thread(weights.publish, root, version, version - 1, lambda folder: copy(parts.model, folder))
        await asyncio.to_thread(weights.verify, path)
        handed_over = time.perf_counter()
        if engine.config.update_mode == "drain":
            may_send.clear()  # as `Member.serves` says
        await engine.update(str(path), version)
        may_send.set()
        engine_s += time.perf_counter() - handed_over
        update_s += time.perf_counter() - started
        await asyncio.to_thread(weights.collect_garbage, root, 2, [])
        await asyncio.sleep(max(EVERY_S - (time.perf_counter() - started), 0))
    rate = tokens / clock.wall
    for load in loads:
        load.cancel()
    results: list[Any] = await asyncio.gather(*loads, return_exceptions=True)
    problems = [result for result in results if not isinstance(result, asyncio.CancelledError)]
    assert not problems, problems
    return rate, engine_s / update_s


def copy(model: Path, folder: Path) -> None:
    for path in model.iterdir():
        if path.is_file() and path.name != weights.MANIFEST:
            shutil.copyfile(path, folder / path.name)
