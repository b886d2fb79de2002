"""Settings of the trainer; what it optimises is in `objective.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from services.contract.config.base import NonNegative, Positive, Seconds, Section
from services.contract.config.objective import WITHOUT_A_GROUP, Advantage, ObjectiveConfig


class WarmStartConfig(Section):
    epochs: NonNegative = 1
    """Passes over the demonstrations; 0 leaves the warm start out."""
    batch_size: Positive = 8
    """Demonstrations per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    warmup_steps: NonNegative = 2


class TrainerConfig(Section):
    device: Literal["cpu", "cuda"] = "cpu"
    processes: Positive = 1
    """Ranks started by torchrun on this machine."""
    threads: Positive = 2
    """Of each rank, on a CPU."""
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    steps: NonNegative = 20
    """Of GRPO. Each learns from one batch of groups and publishes a policy version."""
    groups_per_step: Positive = 8
    """Questions in a batch."""
    samples_per_prompt: Positive = 6
    """1 only where the advantage needs no group: gae, reinforce_plus_plus, or a function of one's own."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    warmup_steps: NonNegative = 0
    """The learning rate rises to its value over so many steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or decay until `steps` steps are done."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Where the decay ends."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of Adam's second average. A larger one keeps gradients near 0 from being blown up to full steps."""
    clip_grad: Annotated[float, Field(gt=0)] = 1.0
    """Most that the gradient's norm may be; a longer gradient is scaled down."""
    max_tokens_per_microbatch: Positive = 2048
    """Rows are packed without padding into sequences of at most so many tokens; a longer row goes alone."""
    logits_chunk_mib: Positive = 256
    """Of a large vocabulary's logits (float32) at most so much is in memory at a time, on each rank."""
    recompute_activations: bool = False
    """Keep only each layer's input and compute the rest again for the gradient: a third more work, far less memory."""
    offload_reference: bool = False
    """With device = "cuda": keep the reference policy in the CPU's memory while it is not asked."""
    offload_optimizer: bool = False
    """With device = "cuda": keep Adam's averages in the CPU's memory except while a step is applied."""
    transformer_engine: bool = False
    """With device = "cuda": build layers of NVIDIA's Transformer Engine, which must be installed."""
    max_staleness: NonNegative = 0
    """Versions a trajectory may lag behind the one being trained; 0 is the synchronous recipe."""
    collect_timeout_s: Seconds = 3600
    """No finished group for so long stops the run with a report of where the groups are."""
    checkpoint_every: Positive = 5
    """Steps, of the warm start and of GRPO alike."""
    keep_checkpoints: Positive = 2
    """The last so many."""
    keep_every: NonNegative = 0
    """Besides, the checkpoint of every so-many-th step is kept for ever; 0: none."""
    eval_every: NonNegative = 0
    """GRPO steps between evaluations; 0 evaluates only before and after."""
    eval_questions: NonNegative = 200
    """Held-out questions per evaluation, taken evenly from every kind; 0 takes all."""
    eval_samples: Positive = 1
    """Episodes a held-out question. Several give pass@k, and need a temperature above 0."""
    eval_temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 plays held-out questions greedily."""
    eval_waits: bool | None = None
    """Whether training waits for the evaluations of `eval_every`, so that one version answers all of it. None: if `max_staleness`
    is 0. The evaluations before and after GRPO are always waited for."""
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where Prometheus reads /metrics of the trainer; 0 leaves it out."""
    distributed_timeout_s: Seconds = 1800
    """A rank that waits for another one so long ends the run."""
    warm_start: WarmStartConfig = WarmStartConfig()
    objective: ObjectiveConfig = ObjectiveConfig()

    @property
    def evaluation_waits(self) -> bool:
        return self.max_staleness == 0 if self.eval_waits is None else self.eval_waits

    @model_validator(mode="after")
    def _steps_fit(self) -> TrainerConfig:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _problems(trainer: TrainerConfig) -> Iterator[str]:
    o = trainer.objective
    if trainer.samples_per_prompt == 1 and o.advantage in get_args(Advantage) and o.advantage not in WITHOUT_A_GROUP:
        yield f'samples_per_prompt 1 leaves objective.advantage = "{o.advantage}" nothing to compare a rollout with: raise it'
    if 0 < trainer.steps <= o.critic_warmup_steps:
        yield f"objective.critic_warmup_steps {o.critic_warmup_steps} leaves no step of `steps` to train the policy: lower it"
    parts = o.minibatches
    if trainer.groups_per_step % parts:
        yield f"groups_per_step {trainer.groups_per_step} is no multiple of objective.minibatches {parts}: change one"
    if trainer.keep_every % trainer.checkpoint_every:
        yield f"keep_every {trainer.keep_every} is no multiple of checkpoint_every {trainer.checkpoint_every}: change one"
    if trainer.schedule == "constant" and trainer.min_learning_rate:
        yield 'min_learning_rate does nothing with schedule = "constant": set schedule, or take it out'
    if trainer.min_learning_rate > trainer.learning_rate:
        yield "min_learning_rate is above learning_rate: lower it"
    if trainer.eval_samples > 1 and trainer.eval_temperature == 0:
        yield "eval_samples above 1 would play the same greedy episode again: set eval_temperature above 0, or eval_samples to 1"
