"""`forage trajectory`: the latest episodes, or one of them in full.

A Redis that is away is told about, and the transcripts are looked through all the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import redis

from services.contract.codec import Codec
from services.contract.config import Config
from services.contract.messages import Trajectory
from services.suite.catalogue import NotFound, RedisShelf, Transcripts, resolve
from services.suite.episodes import Episode, from_trajectory, tokens_of
from services.suite.redis_address import problem_in_words, with_address
from services.suite.text import one_line, say
from services.suite.trajectory_view import render_episode, render_list

T = TypeVar("T")


def list_latest(config: Config, count: int, as_json: bool) -> None:
    """Those in Redis first, then the transcripts'; an id in both is shown once."""
    config = with_address(config)
    shelf = RedisShelf(config)
    found = {episode.id: episode for episode in _from_redis(config, lambda: shelf.latest(count), [])}
    for episode in Transcripts(config).latest(count):
        if len(found) >= count:
            break
        found.setdefault(episode.id, episode)
    if as_json:
        _print_json(list(found.values()))
    elif found:
        say(render_list(list(found.values())))
    else:
        print(f"run {config.run.name} has no trajectory yet, neither in Redis nor in {config.run.folder}", file=sys.stderr)


def show(config: Config, wanted: str, with_tokens: bool, as_json: bool) -> None:
    """One episode. Raises NotFound."""
    episode = find(with_address(config), wanted, with_tokens)
    if as_json:
        _print_json(episode)
    else:
        say(render_episode(episode))


def find(config: Config, wanted: str, with_tokens: bool) -> Episode:
    """By its id or the beginning of it. Raises NotFound."""
    shelf, transcripts = RedisShelf(config), Transcripts(config)
    stored = _from_redis(config, lambda: shelf.ids(wanted), [])
    name = wanted
    if wanted not in stored:
        written = transcripts.ids(wanted)
        everywhere = [*stored, *written] or [*_from_redis(config, shelf.ids, []), *transcripts.ids()]
        name = resolve(wanted, everywhere)
    if trajectory := _from_redis(config, lambda: shelf.load(name), None):
        return _whole(config, trajectory, shelf.place, with_tokens)
    if episode := transcripts.load(name):
        if with_tokens:
            raise NotFound(f"{name} was released: transcripts keep no tokens; the text is shown without --tokens")
        return episode
    raise NotFound(f"{name} was released at this instant and is in no transcript yet: ask again after the trainer's step")


def _whole(config: Config, trajectory: Trajectory, place: str, with_tokens: bool) -> Episode:
    episode = from_trajectory(trajectory, place)
    if not with_tokens:
        return episode
    return msgspec.structs.replace(episode, tokens=tokens_of(trajectory, _texts(config, trajectory)))


def _texts(config: Config, trajectory: Trajectory) -> list[str] | None:
    """Each token's text; None where there is no tokenizer (a small image, another machine)."""
    try:
        codec = Codec.load(config.model_path)
    except (ImportError, OSError, ValueError) as error:
        print(f"tokens are shown without their text: no tokenizer at {config.model_path} ({type(error).__name__})", file=sys.stderr)
        return None
    return [codec.decode([token]) for token in trajectory.response_ids]


def _from_redis(config: Config, read: Callable[[], T], otherwise: T) -> T:
    try:
        return read()
    except (redis.RedisError, OSError) as error:
        message = one_line(problem_in_words(config, error))
        print(f"{message}. Looking through the trainer's transcripts alone", file=sys.stderr)
        return otherwise


def _print_json(value: Any) -> None:
    print(json.dumps(msgspec.to_builtins(value), indent=1))  # ASCII only, so nothing in it can steer a terminal
