"""One thread owns encoder and index: it loads them, gathers queries from all connections into batches, and answers.

FAISS on a GPU is not safe to call from several threads, and a batch of queries costs little more than one. So nobody
else ever touches the backend.

| state    | who moves it on                          | `submit`                      |
|----------|------------------------------------------|-------------------------------|
| loading  | the thread, when the backend is there    | NotReady with the progress    |
| ready    | `close`                                  | queued, or QueueFull          |
| failed   | nobody: loading raised, the service ends | NotReady with the reason      |
| closing  | the thread, when the queue is empty or   | NotReady                      |
|          | the grace has run out                    |                               |
| closed   | nobody; what still waited got NotReady   | NotReady                      |
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from services.contract.config import RetrieverConfig
from services.retriever.errors import BackendFailure, NotReady, QueueFull, RetrieverError
from services.retriever.metrics import Metrics

if TYPE_CHECKING:
    from services.retriever.backend import Backend, Say
    from services.retriever.index import Hit

log = logging.getLogger("retriever")

State = Literal["loading", "ready", "failed", "closing", "closed"]
Key = tuple[str, int]
"""A query and its topk."""


@dataclass(eq=False)
class Request:
    """The queries of one HTTP request. Its future ends with all hits, or with the first failure."""

    keys: list[Key]
    hits: dict[int, list[Hit]]
    """By place in `keys`; all there when the future is set."""
    future: Future[list[list[Hit]]] = field(default_factory=Future)

    def fill(self, place: int, hits: list[Hit]) -> None:
        self.hits[place] = hits
        self.finish_if_full()

    def finish_if_full(self) -> None:
        if len(self.hits) == len(self.keys):
            with suppress(InvalidStateError):  # cancelled, or failed with an earlier batch
                self.future.set_result([self.hits[place] for place in range(len(self.keys))])

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


Waiting = tuple[Request, int]
"""A request and the place of one of its queries."""


class Owner:
    def __init__(self, config: RetrieverConfig, metrics: Metrics, load: Callable[[Say], Backend]) -> None:
        self.config, self.metrics = config, metrics
        self.state: State = "loading"
        self.detail = "starting"
        """The state in words: what is being loaded, or why it failed."""
        self.backend: Backend | None = None
        self.last_error: str | None = None
        """Why the last batch failed; None once a batch has worked again."""
        self._load = load
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._cache: OrderedDict[Key, list[Hit]] = OrderedDict()
        self._last_batch = 1
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="retriever-owner", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def depth(self) -> int:
        return len(self._waiting)

    def submit(self, queries: Sequence[str], topk: int, use_cache: bool = True) -> Future[list[list[Hit]]]:
        """Queue the queries that are not in the cache. Raises NotReady or QueueFull at once, and queues nothing then."""
        keys = [(query, topk) for query in queries]
        with self._changed:
            if self.state != "ready":
                raise NotReady(f"the retriever is not ready: {self.detail}")
            cached = {place: self._cached(key) for place, key in enumerate(keys)} if use_cache else {}
            request = Request(keys, {place: hits for place, hits in cached.items() if hits is not None})
            missing = [place for place in range(len(keys)) if place not in request.hits]
            if len(self._waiting) + len(missing) > self.config.queue_size:
                raise QueueFull(f"{len(self._waiting)} queries are waiting, {self.config.queue_size} at most")
            self.metrics.cache_hits.inc(len(keys) - len(missing))
            self.metrics.cache_misses.inc(len(missing))
            self._waiting.extend((request, place) for place in missing)
            self._changed.notify()
            if not missing:
                request.finish_if_full()
        return request.future

    def close(self, grace_s: float) -> None:
        """Take no more; answer what waits for at most `grace_s`, then tell the rest. Returns at once."""
        with self._changed:
            if self.state in ("loading", "ready"):
                self.state, self.detail = "closing", "shutting down"
            self._deadline = min(self._deadline, time.monotonic() + grace_s)
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._become_ready()
            while batch := self._take():
                self._answer(batch)
        except Exception as error:  # whatever ends this thread must be seen on /ready
            self._end_with(error)
        else:
            self.state = "closed"
        self._refuse_rest()

    def _end_with(self, error: Exception) -> None:
        if self.state == "closing":  # told to stop while it was loading
            self.state = "closed"
            return
        self.state, self.detail = "failed", str(error) or repr(error)
        log.error("%s", self.detail, exc_info=not isinstance(error, RetrieverError))

    def _become_ready(self) -> None:
        backend = self._load(self._say)
        with self._changed:
            self.backend = backend
            if self.state == "loading":
                self.state, self.detail = "ready", f"{len(backend.corpus):,} passages"
                log.info("ready: %s", self.detail)

    def _say(self, text: str) -> None:
        if self.state != "loading":
            raise NotReady("stopped while loading")
        self.detail = text

    def _take(self) -> list[Waiting]:
        """The next batch; empty when the thread shall end.

        After a batch of n, up to n queries are awaited for `batch_wait_ms`: clients that were just answered are about to
        ask again. After a batch of one nobody is awaited, so a lone client pays nothing for batching.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.state != "ready")
            company = min(self._last_batch, self.config.max_batch)
            self._changed.wait_for(lambda: len(self._waiting) >= company or self.state != "ready", self.config.batch_wait_ms / 1000)
            if time.monotonic() > self._deadline:
                return []
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.config.max_batch))]
            self._last_batch = len(batch)
            return batch

    def _answer(self, batch: list[Waiting]) -> None:
        """Search each distinct query once, unless the batch before this one has brought it."""
        wanted = [(request, place, request.keys[place]) for request, place in batch if not request.future.done()]
        with self._changed:
            found = {key: hits for _, _, key in wanted if (hits := self._cached(key)) is not None}
        keys = list(dict.fromkeys(key for _, _, key in wanted if key not in found))
        try:
            found.update(zip(keys, self._search(keys), strict=True))
        except Exception as error:  # a failing backend must reach the clients as an error, not end the thread
            self.last_error = f"{type(error).__name__}: {error}"
            log.error("a batch of %d queries failed: %s", len(keys), self.last_error)
            for request, _, _ in wanted:
                request.fail(BackendFailure(self.last_error))
            return
        self._remember({key: found[key] for key in keys})
        for request, place, key in wanted:
            request.fill(place, found[key])

    def _search(self, keys: list[Key]) -> list[list[Hit]]:
        if not keys:
            return []
        assert self.backend is not None
        hits = self.backend.search([query for query, _ in keys], [topk for _, topk in keys])
        self.last_error = None
        self.metrics.batch_size.observe(len(keys))
        for stage, seconds in self.backend.seconds.items():
            self.metrics.stage_seconds[stage].observe(seconds)
        return hits

    def _cached(self, key: Key) -> list[Hit] | None:
        hits = self._cache.get(key)
        if hits is not None:
            self._cache.move_to_end(key)
        return hits

    def _remember(self, answers: dict[Key, list[Hit]]) -> None:
        with self._changed:
            self._cache.update(answers)
            while len(self._cache) > self.config.cache_size:
                self._cache.popitem(last=False)

    def _refuse_rest(self) -> None:
        with self._changed:
            while self._waiting:
                self._waiting.popleft()[0].fail(NotReady("the retriever is shutting down"))
