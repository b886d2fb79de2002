"""How many episodes an engine gets: each row of the table in services/rollout/concurrency.py, and what it comes to over time."""

from __future__ import annotations

import pytest

from services.rollout.concurrency import Window, next_window
from services.rollout.engine import EngineLoad

CALM = EngineLoad(running=10, queued=0, kv_use=0.2)


@pytest.mark.parametrize(
    ("situation", "window", "load", "in_flight", "after"),
    [
        ("queues", Window(100), EngineLoad(60, 40, 0.9), 100, Window(75, True)),
        ("its KV cache is full", Window(100), EngineLoad(60, 0, 0.97), 100, Window(75, True)),
        ("queues, and the last step back has not worked yet", Window(75, True), EngineLoad(60, 30, 0.9), 100, Window(75, True)),
        ("queues with few of ours: others fill it", Window(64, True), EngineLoad(60, 40, 0.9), 20, Window(15, True)),
        ("queues and we are at the least", Window(8, True), EngineLoad(60, 40, 0.9), 8, Window(8, True)),
        ("a prefill waits for a step", Window(100, True), EngineLoad(90, 4, 0.3), 100, Window(106, True)),
        ("has room, never backed off", Window(16), CALM, 16, Window(32)),
        ("has room, near the most", Window(200), CALM, 200, Window(256)),
        ("has room, has backed off", Window(64, True), CALM, 64, Window(68, True)),
        ("has room, has backed off, small", Window(8, True), CALM, 8, Window(9, True)),
        ("has room that nobody uses", Window(16), CALM, 15, Window(16)),
        ("would be full with a larger window", Window(100), EngineLoad(90, 0, 0.6), 100, Window(100)),
        ("would not be full with a slightly larger window", Window(100, True), EngineLoad(90, 0, 0.6), 100, Window(106, True)),
        ("tells no load", Window(16), None, 3, Window(256)),
    ],
)
def test_the_window_follows_the_table(
    situation: str, window: Window, load: EngineLoad | None, in_flight: int, after: Window
) -> None:
    assert next_window(window, load, in_flight, least=8, most=256) == after, situation


@pytest.mark.parametrize("capacity", [5, 40, 300, 10_000])
def test_it_settles_at_what_the_engine_can_hold(capacity: int) -> None:
    """An engine for `capacity` episodes, always enough to play: after a while the window stays near it, within its bounds."""
    window, seen = Window(8), []
    for _ in range(200):
        in_flight = window.limit
        queued = max(0, in_flight - capacity)
        window = next_window(
            window, EngineLoad(in_flight - queued, queued, min(1.0, 0.9 * in_flight / capacity)), in_flight, 8, 512
        )
        seen.append(window.limit)
    target = min(max(capacity, 8), 512)
    assert all(0.7 * target <= limit <= 1.15 * target for limit in seen[-100:]), seen[-100:]
