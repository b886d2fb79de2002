"""kombu's Redis transport for the grading workers, with one difference: bytes that are no message are told about and dropped.

Without it they end the whole worker, since what takes messages off the queue expects them to be of its own making.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from kombu.transport import redis, virtual

logger = logging.getLogger("reward")


class NoMessage(Exception):
    """What came off the queue lacks what every message has."""


class Message(virtual.Message):
    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **options)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NoMessage(f"{type(error).__name__}: {error}") from error


class Channel(redis.Channel):
    Message = Message

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except (NoMessage, json.JSONDecodeError, UnicodeDecodeError) as error:
            logger.error("dropped from the queue, for it is no message: %s", error)
            return None


class Transport(redis.Transport):
    Channel = Channel
