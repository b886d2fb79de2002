"""Who is to blame when a sample fails, and what follows.

| class          | what follows                                                                                     |
|----------------|--------------------------------------------------------------------------------------------------|
| infrastructure | `InfrastructureError`: never trained on; the group is played again, `max_attempts` times in all, |
|                | then it is dead with its reason                                                                  |
| data           | any other exception: the group is dead at once, a second try would end alike                     |
| model          | an ordinary trajectory, stored and graded as it is                                               |
| Redis away     | `RedisAway`, after `redis.retry_s`: the worker ends, its leases run out                          |

Which failure is of which class, inside an episode:

| part      | what happens                                                         | class          |
|-----------|----------------------------------------------------------------------|----------------|
| engine    | cannot be reached                                                    | infrastructure |
| engine    | hangs up in the middle of an answer                                  | infrastructure |
| engine    | answers 500                                                          | infrastructure |
| engine    | takes longer than rollout.request_timeout_s                          | infrastructure |
| engine    | breaks the turn off                                                  | infrastructure |
| engine    | is slow, and the episode is late                                     | infrastructure |
| engine    | answers what is no JSON                                              | infrastructure |
| engine    | gives no log-probs                                                   | infrastructure |
| engine    | gives a log-prob that is no number                                   | infrastructure |
| engine    | gives fewer log-probs than tokens                                    | infrastructure |
| engine    | gives log-probs of other tokens                                      | infrastructure |
| engine    | samples more tokens than it may                                      | infrastructure |
| engine    | samples no token                                                     | infrastructure |
| engine    | reports no version                                                   | infrastructure |
| engine    | reports versions that leave tokens out                               | infrastructure |
| engine    | goes back to an older version within a turn                          | infrastructure |
| engine    | goes back to an older version between turns                          | infrastructure |
| engine    | serves an older version than the group was issued for                | infrastructure |
| engine    | refuses the request (400)                                            | data           |
| retriever | cannot be reached                                                    | infrastructure |
| retriever | takes longer than rollout.retrieval_timeout_s                        | infrastructure |
| retriever | keeps answering 500                                                  | infrastructure |
| retriever | keeps answering 429                                                  | infrastructure |
| retriever | answers 404                                                          | infrastructure |
| retriever | answers what cannot be read                                          | infrastructure |
| retriever | refuses the query (422)                                              | model          |
| retriever | finds nothing                                                        | model          |
| prompt    | is as long as the context                                            | data           |
| prompt    | is refused by the chat template                                      | data           |
| prompt    | leaves an observation no room for a passage                          | data           |
| model     | writes no action                                                     | model          |
| model     | writes a blank query                                                 | model          |
| model     | writes without end                                                   | model          |
| model     | is late at a fast engine                                             | model          |
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
