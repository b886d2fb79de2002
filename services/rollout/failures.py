"""Who is to blame when a sample fails, and what follows.

| class          | examples                                         | what happens                                                |
|----------------|--------------------------------------------------|-------------------------------------------------------------|
| infrastructure | retriever away or answering 500, engine gone,    | never trained on; the group is played again, `max_attempts` |
|                | a turn broken off, an answer that cannot be read | times in all, then it is dead with its reason               |
| data           | prompt as long as the context, a role that the   | the group is dead at once: a second try would end alike     |
|                | chat template refuses                            |                                                             |
| model          | no answer, too long, a blank or over-long query  | an ordinary trajectory, graded as it is                     |
| Redis away     | for longer than `redis.retry_s`                  | the worker ends; its leases run out                         |

Everything that is neither `InfrastructureError` nor `RedisAway` counts as data.
"""

from __future__ import annotations


class InfrastructureError(Exception):
    """A part of the suite failed under a sample. The sample must not become a trajectory."""


class EngineError(InfrastructureError):
    """The SGLang server is gone, refused, or answered something that cannot be used."""


class EngineStartError(EngineError):
    """The server ended or stayed silent while starting; the message has the end of its log."""


class RetrieverError(InfrastructureError):
    """The retriever could not be reached or kept failing."""
