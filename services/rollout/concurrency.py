"""How many episodes an engine gets: more while it has room, fewer when it queues (AIMD, as TCP's congestion window).

| the engine                                       | the window                                                         |
|--------------------------------------------------|--------------------------------------------------------------------|
| queues requests, or its KV cache is full         | × 0.75, once until the episodes over the new window have ended     |
| has room, the window is used, never backed off   | doubled (slow start)                                               |
| has room, the window is used, has backed off     | + 1/16, at least 1                                                 |
| has no room for a larger window, or it is not used | as it is                                                         |
| tells no load                                    | the upper bound                                                    |

An episode that waits for the retriever holds no KV, so the window counts episodes and the engine's own figures decide.
"""

from __future__ import annotations

import msgspec

from services.rollout.engine import EngineLoad

FULL = 0.95
"""KV use above which SGLang is about to retract running requests; a window is not grown towards it either."""
QUEUE_SHARE = 0.05
"""Queued requests, as a share of the window, that count as a queue: prefills come in bursts and wait a step."""
BACK_OFF = 0.75
STEP_SHARE = 16


class Window(msgspec.Struct, frozen=True):
    limit: int
    backed_off: bool = False


def next_window(window: Window, load: EngineLoad | None, in_flight: int, least: int, most: int) -> Window:
    """The window after one look at the engine. `in_flight`: this worker's episodes there; 1 <= least <= most."""
    if load is None:
        return Window(most)
    limit = window.limit
    if load.kv_use > FULL or load.queued > max(1, QUEUE_SHARE * limit):
        if in_flight > limit:
            return window
        return Window(max(least, int(min(limit, in_flight) * BACK_OFF)), backed_off=True)
    larger = min(most, limit + max(1, limit // STEP_SHARE) if window.backed_off else 2 * limit)
    if in_flight < limit or load.kv_use * larger > FULL * in_flight:
        return window
    return msgspec.structs.replace(window, limit=larger)
