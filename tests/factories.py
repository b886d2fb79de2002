"""Small valid messages for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from services.contract.messages import PromptGroup, Reward, Sampling, Span, Trajectory, VersionSpan

if TYPE_CHECKING:
    from services.contract.groups import GroupStore
    from services.trainer.feeding.collect import CompleteGroup


def make_sampling(**changes: object) -> Sampling:
    base = Sampling(
        temperature=1.0,
        top_p=1.0,
        max_turn_tokens=32,
        max_response_tokens=256,
        max_observation_tokens=100,
        max_searches=2,
        topk=2,
    )
    return msgspec.structs.replace(base, **changes)


def make_group(group_id: str = "t0", samples: int = 2, **changes: object) -> PromptGroup:
    base = PromptGroup(
        group_id=group_id,
        purpose="train",
        example_id="capital:1",
        source="capital",
        question="What is the capital of France?",
        golden_answers=["Paris"],
        prompt=[{"role": "user", "content": "What is the capital of France?"}],
        samples=samples,
        sampling=make_sampling(),
        issued_version=0,
        deadline_s=600.0,
    )
    return msgspec.structs.replace(base, **changes)


def grade(store: GroupStore, trajectory_id: str, reward: float = 1.0, **parts: float) -> bool:
    """What the grader does once it knows the reward."""
    body = store.client.get(store.keys.trajectory(trajectory_id))
    return store.grade(trajectory_id, body or b"", Reward(reward, parts))


def make_trajectory(
    group_id: str = "t0", sample: int = 0, answer: str | None = "Paris", versions: tuple[int, ...] = (0,), **changes: object
) -> Trajectory:
    """A search, an observation of three tokens, an answer; the model's four tokens carry `versions` in turn."""
    model = [versions[min(i, len(versions) - 1)] for i in range(4)]
    fields: dict = {
        "id": f"{group_id}/{sample}",
        "group_id": group_id,
        "prompt_ids": [1, 2, 3],
        "response_ids": [10, 11, 20, 21, 22, 12, 13],
        "logprobs": [-0.5, -0.25, 0.0, 0.0, 0.0, -1.0, -0.125],
        "spans": [
            Span("model", 0, 2, "<search>capital of France</search>", [VersionSpan(model[0], 0, 1), VersionSpan(model[1], 1, 2)]),
            Span("observation", 2, 5, "\n\n<information>Doc 1(Title: x) y</information>\n\n", query="capital of France"),
            Span("model", 5, 7, f"<answer>{answer}</answer>", [VersionSpan(model[2], 5, 6), VersionSpan(model[3], 6, 7)]),
        ],
        "status": "completed",
        "stop_reason": "answered",
        "temperature": 1.0,
        "question": "What is the capital of France?",
        "source": "capital",
        "golden_answers": ["Paris"],
        "answer": answer,
    }
    return Trajectory(**(fields | changes))


def make_complete_group(group_id: str, rewards: list[float], version: int = 0) -> CompleteGroup:
    """A graded group as the trainer collects it."""
    from services.trainer.feeding.collect import CompleteGroup

    played = [make_trajectory(group_id, sample, versions=(version,)) for sample in range(len(rewards))]
    graded = [msgspec.structs.replace(t, reward=r, reward_parts={"exact_match": r}) for t, r in zip(played, rewards, strict=True)]
    return CompleteGroup(group_id, graded, [b"0-1"] * len(rewards))
