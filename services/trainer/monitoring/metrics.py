"""The figures of a step, each under the name of its group: `reward/mean`, `mismatch/k3`. docs/metrics.md explains every one.

| group      | is about                                                              | comes from                        |
|------------|-----------------------------------------------------------------------|-----------------------------------|
| reward     | what the batch earned                                                 | `rollout_metrics`                 |
| search     | how the episodes went: searches, lengths, thoughts                    | `rollout_metrics`                 |
| staleness  | how old the batch was, which groups went astray                       | staleness.py, `flow_metrics`      |
| objective  | loss, gradient, KL, clipping                                          | the learner, `learner_metrics`    |
| mismatch   | trainer against engine on the same tokens                             | the learner, `learner_metrics`    |
| time       | where the seconds went                                                | `main.grpo`, the learner          |
| warnings   | early signs of collapse                                               | collapse.py                       |
| eval       | held-out questions                                                    | `evaluation_metrics`              |
| warm_start | the supervised steps                                                  | `warm_start_metrics`              |
"""

from __future__ import annotations

import re
from statistics import fmean
from typing import Any

from services.contract.messages import Trajectory
from services.contract.scores import Evaluation
from services.trainer.feeding.collect import CompleteGroup
from services.trainer.objective.advantages import zero_variance

Figures = dict[str, Any]
"""Numbers, but for `staleness/histogram`, a list of counts."""

PARTS = ("exact_match", "sub_match", "f1", "format", "retrieval")
EVALUATED = ("exact_match", "sub_match", "f1", "format", "searches", "answered")
MISMATCH = re.compile(r"mismatch_(\w+)|(importance_\w+|rejected_fraction)")
_ACTION_BLOCK = re.compile(r"<(search|answer)>.*?</\1>", re.DOTALL)
_THINK_TAG = re.compile(r"</?think>")


def rollout_metrics(groups: list[CompleteGroup]) -> Figures:
    """Of the trajectories of one batch, before training; means over trajectories unless the name says otherwise."""
    trajectories = [t for group in groups for t in group.trajectories]
    return _rewards(groups, trajectories) | _searching(trajectories)


def _rewards(groups: list[CompleteGroup], trajectories: list[Trajectory]) -> Figures:
    return {
        "reward/mean": fmean(t.reward or 0.0 for t in trajectories),
        **{f"reward/{name}": fmean(t.reward_parts.get(name, 0.0) for t in trajectories) for name in PARTS},
        "reward/zero_variance": fmean(zero_variance(group.rewards) for group in groups),
        "reward/groups": float(len(groups)),
    }


def _searching(trajectories: list[Trajectory]) -> Figures:
    own = [sum(t.loss_mask) for t in trajectories]
    return {
        "search/per_episode": fmean(t.searches for t in trajectories),
        "search/none": fmean(t.searches == 0 for t in trajectories),
        "search/answered": fmean(t.answer is not None for t in trajectories),
        "search/truncated": fmean(t.status == "truncated" for t in trajectories),
        "search/response_tokens": fmean(len(t.response_ids) for t in trajectories),
        "search/model_tokens": fmean(own),
        "search/model_tokens_total": float(sum(own)),
        "search/thought_tokens": fmean(n * thought_share(t) for n, t in zip(own, trajectories, strict=True)),
        "time/episode_generate_s": fmean(t.timings.get("generate_s", 0.0) for t in trajectories),
        "time/episode_retrieve_s": fmean(t.timings.get("retrieve_s", 0.0) for t in trajectories),
    }


def thought_share(trajectory: Trajectory) -> float:
    """Share of what the model wrote, by characters, that is neither a search nor an answer block nor a think tag: its thoughts,
    inside <think> or not. 0 if it wrote nothing."""
    written = [span.text for span in trajectory.spans if span.kind == "model"]
    thoughts = (_THINK_TAG.sub("", _ACTION_BLOCK.sub("", text)).strip() for text in written)
    whole = sum(map(len, written))
    return sum(map(len, thoughts)) / whole if whole else 0.0


def learner_metrics(figures: dict[str, float]) -> Figures:
    """The learner's figures by group; one that is not about the engine or the clock belongs to the objective."""
    return {_learner_name(name): value for name, value in figures.items()}


def _learner_name(name: str) -> str:
    if name in ("seconds", "critic_s"):
        return {"seconds": "time/optimizer_s", "critic_s": "time/critic_s"}[name]
    if match := MISMATCH.fullmatch(name):
        return f"mismatch/{match[1] or match[2]}"
    return f"objective/{name}"


def flow_metrics(figures: dict[str, float], version: int) -> Figures:
    """Of `Batches.figures`: groups that went astray, and of the version just published."""
    return {f"staleness/{name}": float(value) for name, value in figures.items()} | {"staleness/version": float(version)}


def warm_start_metrics(figures: dict[str, float]) -> Figures:
    return {f"warm_start/{name}": value for name, value in figures.items()}


def evaluation_metrics(evaluation: Evaluation) -> Figures:
    """`eval/exact_match` of the whole, with its interval, and `eval/<source>/exact_match` of every kind of question."""
    whole = {name: getattr(evaluation, name) for name in EVALUATED} | evaluation.pass_at
    bounds = {
        name: evaluation.intervals[name] for name in ("exact_match", "f1", *evaluation.pass_at) if name in evaluation.intervals
    }
    whole |= {f"{name}_{end}": value for name, pair in bounds.items() for end, value in zip(("low", "high"), pair, strict=True)}
    facts = ("questions", "samples", "lost", "seconds", "version", "lowest_version", "highest_version")
    whole |= {name: getattr(evaluation, name) for name in facts}
    kinds = {f"{source}/{name}": value for source, row in evaluation.by_source.items() for name, value in row.items()}
    return {f"eval/{name}": value for name, value in (whole | kinds).items()}


def step_line(step: int, steps: int, row: Figures) -> str:
    """One GRPO step for a person: what came in, what was learned, where the seconds went."""
    return (
        f"step {step}/{steps}  reward {row['reward/mean']:.3f}  EM {row['reward/exact_match']:.3f}  "
        f"format {row['reward/format']:.2f}  searches {row['search/per_episode']:.2f}  tokens {row['search/response_tokens']:.0f}  "
        f"engine KL {row['mismatch/k3']:.1e} (|Δ| {row['mismatch/abs']:.1e})  stale {row['staleness/mean']:.1f}  "
        f"no-variance {row['reward/zero_variance']:.0%}  grad {row['objective/grad_norm']:.2f}  {_critic(row)}| "
        f"rollout {row['time/rollout_s']:.0f} s, train {row['time/train_s']:.0f} s, publish {row['time/publish_s']:.1f} s  "
        f"{row['time/tokens_per_s']:.0f} tok/s"
    )


def _critic(row: Figures) -> str:
    if "objective/value_loss" not in row:
        return ""
    explained = f" explains {row['objective/explained_variance']:.0%}" if "objective/explained_variance" in row else ""
    return f"critic {row['objective/value_loss']:.4f}{explained}  "
