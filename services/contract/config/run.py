"""The run itself: its name, model, shared volume and Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from services.contract.config.base import Positive, Seconds, Section


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "quickstart"
    """Names the run: its folder, and its keys in Redis. Two runs with different names share nothing."""
    directory: Path = Path("var/runs")
    """Checkpoints, metrics and the final model are written under `<directory>/<name>`."""
    seed: int = 0
    """Of the order of questions and demonstrations, of which held-out questions are asked, and of a tiny model."""
    wandb: bool = False
    """Report to Weights & Biases too; needs the extra `wandb`. Its own variables count: WANDB_API_KEY, WANDB_MODE, WANDB_ENTITY."""
    wandb_project: str = "forage"

    @property
    def folder(self) -> Path:
        return self.directory / self.name


class ModelConfig(Section):
    source: Literal["smollm2-135m", "tiny", "folder"] = "smollm2-135m"
    """Where `prepare` takes the starting policy from: a package, a tiny random model, or `path`."""
    path: Path | None = None
    """A Hugging Face folder, or `hub:NAME` of one that `prepare` downloads (`./forage data catalogue`). None:
    `<data.directory>/models/policy`, which `prepare` writes."""
    max_context: Positive = 2048
    """Prompt and response together never exceed this many tokens."""


class WeightsConfig(Section):
    directory: Path = Path("var/weights")
    """The shared volume: policy versions are published under `<directory>/<run>/v000123`."""
    transport: Literal["volume", "collective"] = "volume"
    """How a version gets into the engines: they load it from the volume, or the trainer pushes it into all of them at once over
    NCCL (gloo between CPUs) and writes it to the volume afterwards."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Versions kept besides those an engine still reads."""
    staging_grace_s: Seconds = 60
    """How long the trainer waits for every live engine to verify a version before it goes current anyway."""
    volume_every: Positive = 1
    """Every so many pushed versions one is written to the volume too. Others are written only for a checkpoint, or when an engine
    that was not there for the push needs one."""
    bucket_bytes: Annotated[int, Field(ge=1 << 16)] = 24 << 20
    """Bytes that travel in one piece of a push; an engine needs so much memory besides its weights, or that of the largest tensor.
    More means fewer requests, which pays between GPUs; a CPU fetches memory from 32 MiB on anew from the system for every piece."""
    push_timeout_s: Seconds = 60
    """How long each part of a push (joining the group, pausing the engines, a bucket) may take; then the volume is used instead."""
    push_lease_s: Seconds = 5
    """A trainer that was silent for so long in the middle of a push is taken for dead: its engines go back to the volume."""
    push_address: str | None = None
    """Under which the engines reach the trainer's lead. None: the address that its own host name stands for."""


class RedisConfig(Section):
    url: str = "redis://127.0.0.1:6379/0"
    password: SecretStr | None = None
    """Only from the environment: FORAGE_REDIS__PASSWORD."""
    retry_s: Seconds = 300
    """How long a service waits for a Redis that is away before it gives up."""

    @model_validator(mode="after")
    def _no_password_in_the_url(self) -> RedisConfig:
        if urlsplit(self.url).password is not None:
            raise ValueError("redis.url carries a password and may be printed: take it out and set FORAGE_REDIS__PASSWORD")
        return self
