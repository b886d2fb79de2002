"""A push: a policy version that goes from the trainer straight into the engines, over a process group that all of them share.

Rank 0 of the group is the trainer's lead; every engine has as many ranks as it has tensor-parallel parts. The trainer orders a
push on the board and each engine's worker carries it out on its engine, so that nobody but a worker ever pauses one. A push
lives as long as its trainer renews the lease; whatever it has not brought to its end by then never happened.

| order | the trainer gives it when    | an engine's worker                                   | if the push ends here              |
|-------|------------------------------|------------------------------------------------------|------------------------------------|
| ready | it has the weights in memory | reports `following`: it is alive                     | the engine never stopped serving   |
| join  | all follow, and are not yet  | brings its engine into `group`; reports `group`      | the engine goes on serving         |
|       | in one group                 |                                                      |                                    |
| send  | every member is in the group | pauses the engine; reports `receiving`               | it resumes with what it had        |
|       | every member is receiving    | the buckets arrive; it checks them; reports `staged` | it loads a whole version from the  |
|       |                              |                                                      | volume, then resumes               |
| –     | every member has staged: the | resumes                                              | it serves the new version          |
|       | version becomes `current`    |                                                      |                                    |

A worker whose engine cannot go on reports the version as `refused`; then the trainer ends the lease, and publishes the version
over the volume. A version number is used for one push only, whatever becomes of it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import redis

from services.contract.store import Keys

Order = Literal["ready", "join", "send"]


class WeightGroup(msgspec.Struct, frozen=True):
    """What an engine needs to know in order to join."""

    name: str
    address: str
    """Where the trainer's lead listens."""
    port: int
    backend: Literal["gloo", "nccl"]
    ranks: dict[str, int]
    """Engine id to the first of its ranks."""
    size: int
    """Ranks in all, the trainer's among them."""


class BucketLayout(msgspec.Struct, frozen=True):
    """Tensors that travel as one run of bytes, in this order without gaps."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class Push(msgspec.Struct, frozen=True):
    version: int
    order: Order
    group: WeightGroup
    buckets: list[BucketLayout]
    checksums: dict[str, str] = {}
    """Of the engine's own parameters, under its names; see `engine_checksums`. Empty: the trainer has none to give."""


class PushBoard:
    """The push under way, in the hash `policy`, and its trainer's lease."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self.client: Any = client  # redis-py types every answer as sync or async
        self.keys = keys

    def order(self, push: Push, lease_s: float) -> None:
        with self.client.pipeline() as pipe:
            pipe.hset(self.keys.policy, "push", msgspec.json.encode(push))
            pipe.set(self.keys.push_lease, push.version, px=int(lease_s * 1000))
            pipe.execute()

    def renew(self, lease_s: float) -> bool:
        """False: it has run out already, and the engines have given the push up."""
        return bool(self.client.pexpire(self.keys.push_lease, int(lease_s * 1000)))

    def end(self) -> None:
        self.client.delete(self.keys.push_lease)

    def alive(self) -> Push | None:
        """The push that a living trainer has ordered and not ended."""
        with self.client.pipeline() as pipe:
            body, holder = pipe.hget(self.keys.policy, "push").get(self.keys.push_lease).execute()
        push = msgspec.json.decode(body, type=Push) if body and holder else None
        return push if push and int(holder) == push.version else None

    def last_version(self) -> int:
        """The version of the last push that was ordered, whatever became of it; 0 if there was none."""
        body = self.client.hget(self.keys.policy, "push")
        return msgspec.json.decode(body, type=Push).version if body else 0
