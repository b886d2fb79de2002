"""How a model is asked in an evaluation: with search, with passages given up front, or from memory.

| mode   | the prompt                                                      | searches it may make |
|--------|-----------------------------------------------------------------|----------------------|
| search | the run's own: `data.instruction`, or the question's own prompt | as `[rollout]` says  |
| rag    | ours, with the passages of one search for the question itself   | none                 |
| direct | ours, the question alone                                        | none                 |

A model that may not search plays an episode of one turn, in which only an answer counts; the rollout knows nothing of modes.
"""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from typing import Any

import msgspec

from services.contract.config import Config
from services.contract.eval_job import EvalJob, Mode
from services.contract.messages import PromptGroup, Question
from services.contract.transcript import build_prompt, passages_text
from services.trainer.questions import make_group

DIRECT = (
    "Answer the question at the end from what you know. You may reason first, between <think> and </think>. Then write "
    "only the answer, as short as possible, between <answer> and </answer>.\n\nQuestion: {question}"
)
RAG = (
    "Answer the question at the end with the help of these passages. You may reason first, between <think> and </think>. "
    "Then write only the answer, as short as possible, between <answer> and </answer>.\n\n{passages}\n\nQuestion: {question}"
)
QUERIES = 32
"""In one request to the retriever."""
ATTEMPTS, PAUSE_S, TIMEOUT_S = 5, 2.0, 120.0


class RetrieverAway(Exception):
    """The retriever did not answer. The message has its address and the mend."""


def question_group_id(question: Question, mode: Mode) -> str:
    """The same question has the same group in every evaluation of a mode, whatever is asked beside it.

    Of two modes it has two: in one suite's Redis the answers of one, left there by a stop, must not pass for the other's.
    """
    told = f"{question.example_id}\0{question.question}" + ("" if mode == "search" else f"\0{mode}")
    return "q-" + hashlib.sha256(told.encode()).hexdigest()[:20]


def make_eval_group(config: Config, question: Question, job: EvalJob, version: int) -> PromptGroup:
    """A group that is ready to be fed, but for the passages of mode rag (`with_passages`)."""
    group = make_group(config, question_group_id(question, job.mode), question, version, evaluate=True)
    sampling = msgspec.structs.replace(group.sampling, temperature=job.temperature)
    group = msgspec.structs.replace(group, samples=job.samples, sampling=sampling)
    if job.mode == "search":
        return group
    sampling = msgspec.structs.replace(sampling, max_searches=0)
    prompt = build_prompt(question.question, DIRECT, None, config.data.chat_template)
    return msgspec.structs.replace(group, sampling=sampling, prompt=prompt)


def with_passages(config: Config, groups: list[PromptGroup]) -> list[PromptGroup]:
    """The groups with the passages for their questions in the prompt. Raises RetrieverAway."""
    found: list[PromptGroup] = []
    for start in range(0, len(groups), QUERIES):
        part = groups[start : start + QUERIES]
        passages = retrieve(config, [group.question for group in part])
        found += [_with(config, group, contents) for group, contents in zip(part, passages, strict=True)]
    return found


def _with(config: Config, group: PromptGroup, contents: list[str]) -> PromptGroup:
    shown = passages_text(contents, config.rollout.layout).strip() or "(nothing was found)"
    prompt = build_prompt(group.question, RAG.replace("{passages}", shown), None, config.data.chat_template)
    return msgspec.structs.replace(group, prompt=prompt)


def retrieve(config: Config, queries: list[str]) -> list[list[str]]:
    """For each query the contents of its passages, best first. Raises RetrieverAway after some attempts."""
    url = config.retriever.url.rstrip("/") + "/retrieve"
    body = json.dumps({"queries": queries, "topk": config.rollout.topk, "return_scores": False}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return [[_contents(passage) for passage in found] for found in _result(reply.read(), len(queries))]
        except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if attempt == ATTEMPTS or (isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429):
                raise RetrieverAway(f"{url} did not answer ({error}): is the retriever running, is retriever.url right?") from error
            time.sleep(PAUSE_S)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _result(body: bytes, queries: int) -> list[list[Any]]:
    result = json.loads(body)["result"]
    if len(result) != queries:
        raise ValueError(f"{len(result)} results for {queries} queries")
    return result


def _contents(passage: dict[str, Any]) -> str:
    """Servers that know no `return_scores` answer in the scored shape."""
    return passage.get("document", passage)["contents"]
