"""Groups become rows; what the objective asks for is put on them."""

from __future__ import annotations

import pytest
import torch

from services.contract.config import ObjectiveConfig
from services.trainer.rows import (
    critic_figures,
    policy_rows,
    whole_batch_mean_weight,
    with_advantages,
    with_logprobs,
    with_old_values,
)
from tests.factories import make_complete_group

GROUPS = [make_complete_group("t0", [1.0, 0.0]), make_complete_group("t1", [0.5, 0.5])]
ENGINE = [-0.5, -0.25, 0.0, 0.0, 0.0, -1.0, -0.125]
"""Log-probs of the factory's trajectories: two model tokens, three observed ones, two model tokens."""


VALUES = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.75])


class Answers:
    """Stands in for the forward passes of learner and critic, which are tested with the real ones in test_objective_learner and
    test_ppo."""

    def logprobs(self, rows: list) -> list[torch.Tensor]:
        return [torch.tensor(ENGINE) + 0.5 * torch.tensor(row.loss_mask) for row in rows]

    def reference_logprobs(self, rows: list) -> list[torch.Tensor]:
        return [torch.tensor(ENGINE) for _ in rows]

    def values(self, rows: list) -> list[torch.Tensor]:
        return [VALUES for _ in rows]


def test_a_row_has_the_tokens_that_were_sampled() -> None:
    rows = policy_rows(GROUPS)
    assert len(rows) == 4
    assert rows[0].token_ids == [1, 2, 3, 10, 11, 20, 21, 22, 12, 13]
    assert (rows[0].prompt_length, rows[0].loss_mask, rows[0].engine_logprobs) == (3, [1, 1, 0, 0, 0, 1, 1], ENGINE)


def test_a_smaller_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group t2 has 1 rollouts, others 2"):
        policy_rows([*GROUPS, make_complete_group("t2", [1.0])])


@pytest.mark.parametrize(
    ("options", "old", "reference"),
    [
        ({}, None, False),
        ({"kl_coef": 0.1}, None, True),
        ({"epochs": 2}, "trainer", False),
        ({"old_policy": "engine", "importance": "none"}, "engine", False),
    ],
)
def test_only_log_probs_that_are_needed_are_made(options: dict, old: str | None, reference: bool) -> None:
    row = with_logprobs(policy_rows(GROUPS), Answers(), ObjectiveConfig(**options))[0]  # type: ignore[arg-type]
    assert (row.reference_logprobs is not None) == reference
    wanted = {None: None, "engine": ENGINE, "trainer": [0.0, 0.25, 0.0, 0.0, 0.0, -0.5, 0.375]}[old]
    found = row.token_values.get("old_logprobs")
    assert (None if found is None else list(found)) == wanted


def test_advantages_of_rollouts_stay_single_numbers() -> None:
    rows = with_advantages(policy_rows(GROUPS), GROUPS, ObjectiveConfig(advantage="dr_grpo"))
    assert [row.advantage for row in rows] == [0.5, -0.5, 0.0, 0.0]
    assert not rows[0].token_values


def test_advantages_of_tokens_are_0_where_observed() -> None:
    rows = with_advantages(policy_rows(GROUPS), GROUPS, ObjectiveConfig(advantage="reinforce_plus_plus"))
    values = rows[0].token_values["advantages"]
    assert [value != 0 for value in values] == [bool(own) for own in rows[0].loss_mask]


def test_a_critic_gives_every_token_its_advantage_and_its_return() -> None:
    o = ObjectiveConfig(advantage="gae", gae_whiten=False)
    rows = with_advantages(with_old_values(policy_rows(GROUPS), Answers()), GROUPS, o)  # type: ignore[arg-type]
    values = rows[0].token_values
    assert list(values["returns"]) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert list(values["advantages"]) == [0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.25]


def test_figures_of_the_critic_are_those_of_the_model_tokens() -> None:
    o = ObjectiveConfig(advantage="gae")
    rows = with_advantages(with_old_values(policy_rows(GROUPS), Answers()), GROUPS, o)  # type: ignore[arg-type]
    figures = critic_figures(rows)
    assert (figures["value_mean"], figures["returns_mean"]) == (0.5625, 0.5)
    # Returns are 1, 0, .5, .5 by rollout, variance .125; the values' own variance, .01171875, only adds to it.
    assert figures["explained_variance"] == pytest.approx(1 - (0.125 + 0.01171875) / 0.125)


def test_returns_that_do_not_differ_have_no_variance_to_explain() -> None:
    o = ObjectiveConfig(advantage="gae")
    rows = with_advantages(with_old_values(policy_rows(GROUPS[1:]), Answers()), GROUPS[1:], o)  # type: ignore[arg-type]
    assert critic_figures(rows).keys() == {"value_mean", "returns_mean"}


def test_the_mean_weight_is_that_of_all_model_tokens() -> None:
    o = ObjectiveConfig(importance_normalize=True, importance_high=1.5)
    rows = with_logprobs(policy_rows(GROUPS), Answers(), o)  # type: ignore[arg-type]
    assert whole_batch_mean_weight(rows, o) == 1.5  # every ratio is exp(.5), over the bound
    assert whole_batch_mean_weight(policy_rows(GROUPS), ObjectiveConfig()) == 1.0
