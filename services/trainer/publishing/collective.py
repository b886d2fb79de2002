"""The trainer's end of a push (`services/contract/push.py` has the table): rank 0 of a group with all engines.

The group is kept from push to push and made anew when an engine has come or gone, or when a push has failed. A push that fails
closes its group: with the lead's sockets gone, every engine that still waits in a collective is let go with an error at once,
and its worker brings it back to a whole version. Whatever goes wrong is a `PushFailed`; the caller publishes over the volume.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import msgspec
import redis
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import distributed_c10d as c10d

from services.contract.config import Config
from services.contract.policy import EngineReport, PolicyBoard
from services.contract.push import Push, WeightGroup
from services.contract.store import RedisAway
from services.trainer.publishing.buckets import Bucket, engine_checksums

logger = logging.getLogger("trainer")

T = TypeVar("T")
LOOK_S = 0.02
CLEAN_UP_S = 1.0


class PushFailed(Exception):
    """This version did not reach every engine; none of them serves half of it."""


@dataclass(frozen=True)
class PushTimes:
    """Seconds of each part."""

    pausing: float
    sending: float
    checking: float
    """After the last byte was sent: loading the last bucket, comparing checksums."""


class EngineGroup:
    """The process group, seen from the lead."""

    def __init__(self, members: list[EngineReport], config: Config) -> None:
        """Begin to listen; nobody has joined yet. Raises OSError when the address cannot be listened on."""
        weights = config.weights
        self._timeout = timedelta(seconds=weights.push_timeout_s)
        self._cuda = config.trainer.device == "cuda"
        address = weights.push_address or socket.gethostbyname(socket.gethostname())
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self._store: Store | None = store
        self._group: dist.ProcessGroup | None = None
        self.plan = WeightGroup(
            name=f"weights-{secrets.token_hex(4)}",
            address=address,
            port=store.port,
            backend="nccl" if self._cuda else "gloo",
            ranks=first_ranks(members),
            size=1 + sum(member.tensor_parallel for member in members),
        )

    @property
    def joined(self) -> bool:
        return self._group is not None

    def join(self) -> None:
        """Wait until every rank is there. Raises PushFailed after `push_timeout_s`.

        The keys in the store are those under which SGLang's engines look for rank 0.
        """
        assert self._store is not None, "the group was closed"
        store = c10d.PrefixStore(self.plan.name, self._store)
        backend = c10d.Backend(self.plan.backend)
        name = c10d.GroupName(self.plan.name)
        group, _ = _attempt(
            lambda: c10d._new_process_group_helper(self.plan.size, 0, [], backend, store, name, timeout=self._timeout),
            "not every engine joined within weights.push_timeout_s",
        )
        assert group is not None, "rank 0 belongs to it"
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self.plan.size)}
        self._group = group

    def broadcast(self, flat: Tensor) -> None:
        """Send `flat`, [bytes] uint8, to every engine. Raises PushFailed when one is gone or too slow."""
        _attempt(lambda: self._broadcast(flat), "sending broke off")

    def _broadcast(self, flat: Tensor) -> None:
        dist.broadcast(flat.cuda() if self._cuda else flat, src=0, group=self._group)
        if self._cuda:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Leave without asking anybody. What closes the sockets is that nothing refers to the group and the store any more."""
        group, self._group = self._group, None
        with contextlib.suppress(RuntimeError, ValueError):
            if group is not None:
                group.abort()
                dist.destroy_process_group(group)
        del group
        self._store = None


def first_ranks(members: list[EngineReport]) -> dict[str, int]:
    """Engine id to the first of its ranks; rank 0 is the trainer's."""
    ranks, following = {}, 1
    for member in members:
        ranks[member.engine_id] = following
        following += member.tensor_parallel
    return ranks


def members_of(engines: list[EngineReport]) -> list[EngineReport]:
    """The engines that a push goes to: those that serve, each once, although several workers may be attached to it."""
    by_url: dict[str, EngineReport] = {}
    for engine in sorted(engines, key=lambda engine: engine.engine_id):
        if engine.state != "loading":
            by_url.setdefault(engine.url, engine)
    return list(by_url.values())


class Pusher:
    def __init__(self, config: Config, board: PolicyBoard, check_stop: Callable[[], None]) -> None:
        self.config, self.board, self.check_stop = config, board, check_stop
        self._group: EngineGroup | None = None

    def push(self, version: int, buckets: list[Bucket], commit: Callable[[], None]) -> PushTimes:
        """Bring `version` into every serving engine and call `commit` once all of them have it whole.

        The engines are paused from the order `send` until `commit`. Raises PushFailed when nothing was committed.
        """
        members = members_of(self.board.live_engines())
        if not members:
            raise PushFailed("no engine serves")
        # checksums of a GPU's engines follow another formula, and of split ones each rank has its own
        plain = self.config.trainer.device == "cpu"
        checksums = engine_checksums(buckets) if plain else {}
        try:
            group = self._group_of(members)
            order = Push(version, "ready", group.plan, [bucket.layout for bucket in buckets], checksums)
            with self._lease(order):
                times = self._send(order, group, buckets)
                if not self.board.pushes.renew(self.config.weights.push_lease_s):
                    raise PushFailed("the trainer was silent for longer than weights.push_lease_s")
                commit()
            return times
        except BaseException:
            self.close()
            raise

    def _group_of(self, members: list[EngineReport]) -> EngineGroup:
        """The present group if it is just that of `members`, or a new one."""
        group = self._group
        together = group and first_ranks(members) == group.plan.ranks and all(m.group == group.plan.name for m in members)
        if not (group and together):
            self.close()
            listen = lambda: EngineGroup(members, self.config)  # noqa: E731
            group = self._group = _attempt(listen, "the lead cannot listen for engines, see weights.push_address")
        return group

    def _send(self, order: Push, group: EngineGroup, buckets: list[Bucket]) -> PushTimes:
        version, ids = order.version, list(group.plan.ranks)
        self._until(version, ids, lambda engine: engine.following == version, "answer")
        if not group.joined:
            self._order(msgspec.structs.replace(order, order="join"))
            group.join()
            self._until(version, ids, lambda engine: engine.group == group.plan.name, "join the group")
        started = time.monotonic()
        self._order(msgspec.structs.replace(order, order="send"))
        self._until(version, ids, lambda engine: engine.receiving == version, "pause")
        paused = time.monotonic()
        for bucket in buckets:
            group.broadcast(bucket.flat)
        sent = time.monotonic()
        self._until(version, ids, lambda engine: engine.staged >= version, "check what it received")
        times = PushTimes(paused - started, sent - paused, time.monotonic() - sent)
        size = sum(bucket.flat.numel() for bucket in buckets) / 1e9
        parts = f"pausing {times.pausing:.2f} s, sending {times.sending:.2f} s, checking {times.checking:.2f} s"
        logger.info("version %d pushed: engines %d, %.2f GB, %s", version, len(ids), size, parts)
        return times

    def _until(self, version: int, ids: list[str], done: Callable[[EngineReport], bool], what: str) -> None:
        """Wait until every member is `done`. Raises PushFailed when one is gone, refuses, or takes too long."""
        deadline = time.monotonic() + self.config.weights.push_timeout_s
        while True:
            found = {engine.engine_id: engine for engine in self.board.live_engines()}
            if gone := [name for name in ids if name not in found or found[name].state == "loading"]:
                raise PushFailed(f"{', '.join(gone)} went away")
            if refused := [name for name in ids if found[name].refused == version]:
                raise PushFailed(f"{', '.join(refused)} could not go on; its worker's log says why")
            waiting = [name for name in ids if not done(found[name])]
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise PushFailed(f"{', '.join(waiting)} did not {what} within weights.push_timeout_s")
            self.check_stop()
            time.sleep(LOOK_S)

    def _order(self, order: Push) -> None:
        self.board.pushes.order(order, self.config.weights.push_lease_s)

    @contextlib.contextmanager
    def _lease(self, order: Push) -> Iterator[None]:
        """Order the push and renew its lease until the end; also from within a broadcast, hence the thread."""
        seconds, over = self.config.weights.push_lease_s, threading.Event()
        self._order(order)

        def renew() -> None:
            with contextlib.suppress(RedisAway, redis.RedisError):
                while not over.wait(seconds / 4):
                    self.board.pushes.renew(seconds)

        thread = threading.Thread(target=renew, name="push lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(CLEAN_UP_S)
            self.board.pushes.end()

    def close(self) -> None:
        """Give the group up; the next push makes a new one."""
        group, self._group = self._group, None
        if group:
            group.close()


def _attempt(work: Callable[[], T], told: str) -> T:
    """Do `work`; make what torch or the network raises a PushFailed.

    Not from within `except`: an error's frames would hold the process group, and it is only its end that closes the sockets on
    which the other engines wait.
    """
    try:
        return work()
    except (RuntimeError, OSError) as error:
        problem = f"{told}: {str(error).partition(chr(10))[0]}"
    raise PushFailed(problem)
