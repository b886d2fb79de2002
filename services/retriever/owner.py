"""One thread owns a model or an index: it loads it, gathers the keys of all requests into batches, and answers.

FAISS on a GPU is not safe to call from several threads, and a batch costs little more than one query. So nobody else ever
touches the resource. A key is whatever the resource answers: a query and its topk, or a query and a text to score.

| state    | who moves it on                          | `submit`                      |
|----------|------------------------------------------|-------------------------------|
| loading  | the thread, when the resource is there   | NotReady with the progress    |
| ready    | `close`                                  | queued, or QueueFull          |
| failed   | nobody: loading raised, the service ends | NotReady with the reason      |
| closing  | the thread, when the queue is empty or   | NotReady                      |
|          | the grace has run out                    |                               |
| closed   | nobody; what still waited got NotReady   | NotReady                      |
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from services.contract.config import RetrieverConfig
from services.retriever.errors import BackendFailure, DeadlinePassed, NotReady, QueueFull, RetrieverError
from services.retriever.metrics import Metrics
from services.retriever.saying import Say

log = logging.getLogger("retriever")

State = Literal["loading", "ready", "failed", "closing", "closed"]
K = TypeVar("K", bound=Hashable)
A = TypeVar("A")


class Resource(Protocol[K, A]):
    """What an owner's thread drives; only that thread calls it."""

    @property
    def info(self) -> dict[str, Any]:
        """What /info answers about it."""
        ...

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage of the last `answer` took."""
        ...

    def canary(self) -> K:
        """A key that must be answered when all is well."""
        ...

    def answer(self, keys: Sequence[K]) -> list[A]:
        """One answer a key, in order."""
        ...


@dataclass(eq=False)
class Request(Generic[K, A]):
    """The keys of one HTTP request. Its future ends with all answers, or with the first failure."""

    keys: list[K]
    deadline: float
    """By `time.monotonic`."""
    answers: dict[int, A]
    """By place in `keys`; all there when the future is set."""
    future: Future[list[A]] = field(default_factory=Future)

    @property
    def over(self) -> bool:
        """Answered, failed or given up; a deadline that has passed ends it here."""
        if not self.future.done() and time.monotonic() > self.deadline:
            self.fail(DeadlinePassed("the request's deadline passed while it waited"))
        return self.future.done()

    def fill(self, place: int, answer: A) -> None:
        self.answers[place] = answer
        self.finish_if_full()

    def finish_if_full(self) -> None:
        if len(self.answers) == len(self.keys):
            with suppress(InvalidStateError):  # cancelled, or failed with an earlier batch
                self.future.set_result([self.answers[place] for place in range(len(self.keys))])

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Owner(Generic[K, A]):
    def __init__(
        self, name: str, config: RetrieverConfig, metrics: Metrics, load: Callable[[Say], Resource[K, A]], per_query: int = 1
    ) -> None:
        """`per_query`: keys that one query may bring; queue and cache are that much larger."""
        self.name, self.config, self.metrics = name, config, metrics
        self.queue_size, self.cache_size = config.queue_size * per_query, config.cache_size * per_query
        self.state: State = "loading"
        self.detail = "starting"
        """The state in words: what is being loaded, or why it failed."""
        self.resource: Resource[K, A] | None = None
        self.last_error: str | None = None
        """Why the last batch failed; None once a batch has worked again."""
        self._hits, self._misses = metrics.cache_hits.labels(name), metrics.cache_misses.labels(name)
        self._load = load
        self._waiting: deque[tuple[Request[K, A], int]] = deque()
        """Requests, each with the place of one of its keys."""
        self._changed = threading.Condition()
        self._cache: OrderedDict[K, A] = OrderedDict()
        self._last_batch = 1
        self._closes_at = float("inf")
        self._thread = threading.Thread(target=self._run, name=f"owner-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def depth(self) -> int:
        return len(self._waiting)

    def submit(self, keys: Sequence[K], deadline: float = float("inf"), use_cache: bool = True) -> Future[list[A]]:
        """Queue the keys that are not in the cache. Raises NotReady or QueueFull at once, and queues nothing then."""
        with self._changed:
            if self.state != "ready":
                raise NotReady(f"{self.name} is not ready: {self.detail}")
            cached = {place: self._cached(key) for place, key in enumerate(keys)} if use_cache else {}
            request = Request(list(keys), deadline, {place: answer for place, answer in cached.items() if answer is not None})
            missing = [place for place in range(len(keys)) if place not in request.answers]
            if len(self._waiting) + len(missing) > self.queue_size:
                raise QueueFull(f"{len(self._waiting)} queries are waiting for {self.name}, {self.queue_size} at most")
            self._hits.inc(len(keys) - len(missing))
            self._misses.inc(len(missing))
            if missing:
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
            self._closes_at = min(self._closes_at, time.monotonic() + grace_s)
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
        resource = self._load(self._say)
        gc.collect()
        gc.freeze()  # what was loaded stays: a collector that walks it again and again holds up every request for 0.2 s
        with self._changed:
            self.resource = resource
            if self.state == "loading":
                self.state, self.detail = "ready", "ready"
                log.info("%s is ready: %s", self.name, resource.info.get("passages") or resource.info.get("model"))

    def _say(self, text: str) -> None:
        if self.state != "loading":
            raise NotReady("stopped while loading")
        self.detail = text

    def _take(self) -> list[tuple[Request[K, A], int]]:
        """The next batch; empty when the thread shall end.

        After a batch of n, up to n keys are awaited for `batch_wait_ms`: clients that were just answered are about to
        ask again. After a batch of one nobody is awaited, so a lone client pays nothing for batching.
        """
        with self._changed:
            while self._wait_for_company():
                batch: list[tuple[Request[K, A], int]] = []
                while self._waiting and len(batch) < self.config.max_batch:
                    request, place = self._waiting.popleft()
                    if not request.over:
                        batch.append((request, place))
                if batch:
                    self._last_batch = len(batch)
                    return batch
            return []

    def _wait_for_company(self) -> bool:
        """False when there is nothing more to do: closed, and nothing waits or the grace has run out."""
        self._changed.wait_for(lambda: self._waiting or self.state != "ready")
        company = min(self._last_batch, self.config.max_batch)
        self._changed.wait_for(lambda: len(self._waiting) >= company or self.state != "ready", self.config.batch_wait_ms / 1000)
        return bool(self._waiting) and time.monotonic() <= self._closes_at

    def _answer(self, batch: list[tuple[Request[K, A], int]]) -> None:
        """Compute each distinct key once, unless the batch before this one has brought it."""
        wanted = [(request, place, request.keys[place]) for request, place in batch]
        with self._changed:
            found = {key: answer for _, _, key in wanted if (answer := self._cached(key)) is not None}
        keys = list(dict.fromkeys(key for _, _, key in wanted if key not in found))
        try:
            found.update(zip(keys, self._compute(keys), strict=True))
        except Exception as error:  # a failing backend must reach the clients as an error, not end the thread
            self.last_error = f"{type(error).__name__}: {error}"
            log.error("%s: a batch of %d queries failed: %s", self.name, len(keys), self.last_error)
            for request, _, _ in wanted:
                request.fail(BackendFailure(f"{self.name}: {self.last_error}"))
            return
        self._remember({key: found[key] for key in keys})
        for request, place, key in wanted:
            request.fill(place, found[key])

    def _compute(self, keys: list[K]) -> list[A]:
        if not keys:
            return []
        assert self.resource is not None
        answers = self.resource.answer(keys)
        self.last_error = None
        self.metrics.batch_size.labels(self.name).observe(len(keys))
        for stage, seconds in self.resource.seconds.items():
            self.metrics.stage_seconds.labels(self.name, stage).observe(seconds)
        return answers

    def _cached(self, key: K) -> A | None:
        answer = self._cache.get(key)
        if answer is not None:
            self._cache.move_to_end(key)
        return answer

    def _remember(self, answers: dict[K, A]) -> None:
        with self._changed:
            self._cache.update(answers)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)

    def _refuse_rest(self) -> None:
        with self._changed:
            while self._waiting:
                self._waiting.popleft()[0].fail(NotReady("the retriever is shutting down"))
