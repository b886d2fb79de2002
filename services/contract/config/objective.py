"""What the trainer optimises: advantage, loss, KL, correction for the engine, shaping. `docs/objectives.md` has the formulas."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from services.contract.config.base import Fraction, NonNegative, Positive, Section

Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"]
Loss = Literal["clipped", "gspo", "cispo"]
Level = Literal["token", "sequence", "geometric"]
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""A function of one's own: `module:function`."""
WITHOUT_A_GROUP = ("reinforce_plus_plus", "gae")
"""Advantages whose baseline is not the group's: they learn from groups of equal rewards too, and from groups of one."""
CRITICS_KEYS = ("gae_gamma", "gae_lambda", "gae_whiten", "value_clip", "critic_learning_rate", "critic_warmup_steps")


class ObjectiveConfig(Section):
    advantage: Advantage | str = "grpo"
    """grpo, dr_grpo (no division by the group's standard deviation), rloo, reinforce_plus_plus, reinforce_plus_plus_baseline,
    gae (PPO with a critic), or `module:function` (see docs/objectives.md)."""
    gamma: Fraction = 1.0
    """Discount of reinforce_plus_plus, per response token."""
    gae_gamma: Fraction = 1.0
    """Discount of gae, per token of the model's own."""
    gae_lambda: Fraction = 1.0
    """How far gae looks ahead before it trusts the critic: 1 to the end of the rollout, 0 one token."""
    gae_whiten: bool = True
    """Shift and scale the advantages of gae to mean 0 and variance 1 over the batch's model tokens."""
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    """The critic's values move at most so far from those before the batch's first step; beyond that they have no gradient."""
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    critic_warmup_steps: NonNegative = 0
    """In so many first steps only the critic learns, and the policy stays as it is."""
    loss: Loss | str = "clipped"
    """clipped (PPO's surrogate), gspo (ratio of the whole sequence), cispo (clipped ratios as weights), or `module:function`."""
    clip_low: Fraction = 0.2
    """The ratio to the old policy is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Where the advantage is negative, the ratio counts as this much at most. None leaves that out."""
    aggregate: Literal["rollout_mean", "token_mean", "fixed_length"] = "rollout_mean"
    """Mean over each rollout's model tokens, then over rollouts; mean over all model tokens of the batch (DAPO); or sum over
    tokens divided by rollouts × `fixed_length` (Dr. GRPO)."""
    fixed_length: Positive | None = None
    """Only with `aggregate = "fixed_length"`; in tokens."""
    epochs: Positive = 1
    """Passes over each batch."""
    minibatches: Positive = 1
    """Optimizer steps a pass: the batch's groups are dealt into so many parts."""
    old_policy: Literal["trainer", "engine"] = "trainer"
    """Whose log-probs the ratio is taken to: the trainer's own before the batch's first step (decoupled PPO, corrected for the
    engine by `importance`), or those the engine sampled with."""

    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the reference policy. 0 keeps no reference in memory."""
    kl_estimator: Literal["k1", "k2", "k3", "low_var"] = "low_var"
    kl_unbiased: bool = False
    """Weigh the KL in the loss by the ratio to the old policy, so that its gradient is unbiased too."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL is taken off: in the loss, or from the rewards before the advantages."""
    reference_every: NonNegative = 0
    """The policy becomes its own reference after so many steps, again and again; 0 keeps the first one."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""

    importance: Literal["none", "tis", "icepop", "mis"] = "tis"
    """Correction for the mismatch between engine and trainer by their ratio: clamp it (tis), drop the policy loss outside the
    range (icepop), or drop the token outside the range from every term (mis)."""
    importance_level: Level = "token"
    """Of which ratio: each token's, their product over the sequence, or its geometric mean."""
    importance_low: Annotated[float, Field(ge=0)] = 0.0
    importance_high: Annotated[float, Field(gt=0)] = 2.0
    """Bounds of the ratio for `importance`."""
    importance_normalize: bool = False
    """Divide the weights by their mean over the batch."""
    reject_level: Literal["none", "token", "sequence", "geometric"] = "none"
    """Leave tokens or whole rollouts out whose ratio lies outside [reject_low, reject_high]."""
    reject_low: Annotated[float, Field(ge=0)] | None = None
    """None: no lower bound."""
    reject_high: Annotated[float, Field(gt=0)] | None = None
    veto: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Leave a rollout out if the ratio of any of its tokens is below this."""

    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by others (DAPO)."""
    dynamic_sampling_limit: Positive = 4
    """At most so many times `trainer.groups_per_step` groups are replaced a step; then equal rewards are taken."""
    overlong_tokens: NonNegative = 0
    """A rollout of so many model tokens gets the whole overlong penalty; 0 gives none."""
    overlong_buffer: NonNegative = 0
    """The penalty grows from 0 over so many tokens before that."""
    overlong_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Taken off the reward at `overlong_tokens`."""

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether the trainer's log-probs must be known before the batch's first step, which costs a forward pass."""
        several = self.epochs * self.minibatches > 1
        return self.old_policy == "trainer" and (several or self.kl_in_reward or self.importance_normalize)

    @field_validator("advantage", "loss")
    @classmethod
    def _known_or_a_function(cls, name: str, info: ValidationInfo) -> str:
        known = get_args(Advantage if info.field_name == "advantage" else Loss)
        if name not in known and not FUNCTION.fullmatch(name):
            raise ValueError(f'"{name}" is unknown: use one of {", ".join(known)}, or module:function for a function of your own')
        return name

    @model_validator(mode="after")
    def _options_agree(self) -> ObjectiveConfig:
        problems = [*_policy_problems(self), *_critic_problems(self), *_kl_problems(self)]
        problems += [*_correction_problems(self), *_shaping_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _policy_problems(o: ObjectiveConfig) -> list[str]:
    found = []
    if o.gamma != 1 and o.advantage in get_args(Advantage) and o.advantage != "reinforce_plus_plus":
        instead = "set gae_gamma instead" if o.has_critic else "set it to 1"
        found.append(f'gamma is read by advantage = "reinforce_plus_plus" only, not by "{o.advantage}": {instead}')
    if o.dual_clip is not None and o.loss == "cispo":
        found.append('dual_clip does nothing with loss = "cispo", which never lets a ratio past its bounds: take it out')
    if (o.fixed_length is None) == (o.aggregate == "fixed_length"):
        found.append('aggregate = "fixed_length" and the key fixed_length go together: set both or neither')
    if o.old_policy == "engine" and o.importance != "none":
        found.append(f'old_policy = "engine" leaves importance = "{o.importance}" nothing to correct: set importance = "none"')
    if o.old_policy == "engine" and (o.reject_level != "none" or o.veto is not None):
        found.append('reject_level and veto need old_policy = "trainer", whose ratio to the engine they look at: take them out')
    return found


def _critic_problems(o: ObjectiveConfig) -> list[str]:
    changed = [key for key in CRITICS_KEYS if getattr(o, key) != type(o).model_fields[key].default]
    if changed and not o.has_critic:
        return [f'{", ".join(changed)}: there is a critic with advantage = "gae" only: set that, or take them out']
    return []


def _kl_problems(o: ObjectiveConfig) -> list[str]:
    found = []
    if o.kl_coef == 0 and (o.kl_in == "reward" or o.kl_unbiased or o.reference_every):
        found.append("kl_in, kl_unbiased and reference_every need a KL: set kl_coef above 0 or take them out")
    if o.kl_in_loss and o.kl_estimator == "k1" and not o.kl_unbiased:
        found.append('kl_estimator = "k1" has no gradient on average in the loss: set kl_unbiased, or take another estimator')
    if o.kl_in_reward and o.kl_unbiased:
        found.append('kl_unbiased belongs to kl_in = "loss": take one of them out')
    if o.kl_in_reward and o.advantage in ("grpo", "dr_grpo"):
        found.append(f'advantage = "{o.advantage}" takes the KL in the loss: set kl_in = "loss", or take another advantage')
    return found


def _correction_problems(o: ObjectiveConfig) -> list[str]:
    found = []
    if o.importance_low > o.importance_high:
        found.append("importance_low is above importance_high: lower it")
    if o.importance == "none" and (o.importance_level != "token" or o.importance_normalize):
        found.append('importance_level and importance_normalize do nothing with importance = "none": set importance')
    bounds = [bound for bound in (o.reject_low, o.reject_high) if bound is not None]
    if bounds != sorted(bounds):
        found.append("reject_low is above reject_high: lower it")
    if (o.reject_level == "none") == bool(bounds):
        found.append("reject_level and its bounds go together: set it and reject_low or reject_high, or none of them")
    return found


def _shaping_problems(o: ObjectiveConfig) -> list[str]:
    found = []
    if o.dynamic_sampling and o.advantage in WITHOUT_A_GROUP:
        found.append(f'dynamic_sampling would drop groups that advantage = "{o.advantage}" learns from: take it out')
    if bool(o.overlong_tokens) != bool(o.overlong_buffer) or o.overlong_buffer > o.overlong_tokens:
        found.append("overlong_tokens and overlong_buffer go together, the buffer at most as large: set both or neither")
    return found
