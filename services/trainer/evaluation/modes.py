"""How a model is asked in an evaluation: with search, with passages given up front, or from memory.

| mode   | the prompt                                                      | searches it may make |
|--------|-----------------------------------------------------------------|----------------------|
| search | the run's own: `data.instruction`, or the question's own prompt | as `[rollout]` says  |
| rag    | ours, with the passages of one search for the question itself   | none                 |
| direct | ours, the question alone                                        | none                 |

Ours begins with two worked examples, the same ones always.

A model that may not search plays an episode of one turn, in which only an answer counts; the rollout knows nothing of modes.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import msgspec

from services.contract.config import Config
from services.contract.eval_job import EvalJob, Mode
from services.contract.messages import PromptGroup, Question
from services.contract.transcript import passages_text
from services.trainer.feeding.questions import make_group

ASKED: dict[Mode, str] = {
    "direct": "Answer with a few words between <answer> and </answer>.\n\nQuestion: {question}",
    "rag": "Answer from the passages, with a few words between <answer> and </answer>.\n\n{passages}\n\nQuestion: {question}",
}
EXAMPLES = (
    ("Which planet is the largest?", '"Jupiter"\nJupiter is the largest planet of the solar system.', "Jupiter"),
    ("Who wrote Hamlet?", '"Hamlet"\nHamlet is a tragedy that William Shakespeare wrote around 1600.', "William Shakespeare"),
)
"""(question, passage, answer) that stand before the question: a model that was not trained here writes the tags after them."""
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
    return msgspec.structs.replace(group, sampling=sampling, prompt=baseline_prompt(config, job.mode, question.question))


def baseline_prompt(config: Config, mode: Mode, question: str, contents: Sequence[str] = ()) -> list[dict[str, str]] | str:
    """Of mode direct or rag: the examples, then the question, with its passages (`contents`, best first) in mode rag.

    Chat turns, or one text where `data.chat_template` is false.
    """
    layout = config.rollout.layout
    turns = [
        (_asked(mode, text, passages_text([passage], layout)), f"<answer>{answer}</answer>") for text, passage, answer in EXAMPLES
    ]
    last = _asked(mode, question, passages_text(contents, layout).strip() or "(nothing was found)")
    if not config.data.chat_template:
        return "".join(f"{asked}\n{answer}\n\n" for asked, answer in turns) + f"{last}\n"
    roles = [message for turn in turns for message in zip(("user", "assistant"), turn, strict=True)]
    return [{"role": role, "content": text} for role, text in [*roles, ("user", last)]]


def _asked(mode: Mode, question: str, passages: str) -> str:
    """In one go: a passage may itself hold "{question}"."""
    values = {"question": question, "passages": passages.strip()}
    return re.sub(r"\{(question|passages)\}", lambda found: values[found[1]], ASKED[mode])


def with_passages(config: Config, groups: list[PromptGroup]) -> list[PromptGroup]:
    """The groups with the passages for their questions in the prompt. Raises RetrieverAway."""
    found: list[PromptGroup] = []
    for start in range(0, len(groups), QUERIES):
        part = groups[start : start + QUERIES]
        passages = retrieve(config, [group.question for group in part])
        prompts = [baseline_prompt(config, "rag", group.question, contents) for group, contents in zip(part, passages, strict=True)]
        found += [msgspec.structs.replace(group, prompt=prompt) for group, prompt in zip(part, prompts, strict=True)]
    return found


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
