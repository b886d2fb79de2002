"""The trainer: feed, collect, learn, publish, record. Read `train` first; it is the algorithm.

| stage           | what is done                                         | on a restart in the middle                        |
|-----------------|------------------------------------------------------|---------------------------------------------------|
| evaluate_start  | score the starting policy                            | goes on; answers that had come are kept           |
| warm_start      | supervised steps on demonstrations, publish          | goes on from the last checkpoint, same order      |
| evaluate_warm   | score it                                             | as above                                          |
| grpo            | steps of GRPO, each publishing a policy version      | goes on from the last checkpoint                  |
| evaluate_final  | score the result, write the final model              | as above                                          |
| done            | print the table                                      | prints it again                                   |

A run that was finished with fewer steps than `trainer.steps` now asks for goes on at `grpo` (`Ledger.reopen`).

Every rank runs the same lines; what touches Redis or files happens on the lead (`on_lead`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from services.contract.telemetry import format_seconds
from services.trainer.demonstrations import batches, demonstration_row, read_demonstrations
from services.trainer.durable.ledger import STAGES, Stage
from services.trainer.feeding.collect import CompleteGroup
from services.trainer.feeding.staleness import staleness_metrics
from services.trainer.learning_rate import rates, warmed_up
from services.trainer.megatron.loss import SupervisedLoss
from services.trainer.monitoring.metrics import Figures, learner_metrics, rollout_metrics, step_line, warm_start_metrics
from services.trainer.ranks import StopRequested
from services.trainer.run import Run
from services.trainer.update import update

logger = logging.getLogger("trainer")


def train(run: Run) -> None:
    """All stages that the ledger does not list as done. Raises StopRequested after saving when asked to stop."""
    run.make_current()
    for stage in STAGES[STAGES.index(run.ledger.stage) :]:
        run.beat(f"ready: {stage}")
        STAGE_WORK[stage](run)
        if stage != "done":
            run.ledger.finish_stage(stage)
            run.checkpoint()


def evaluate_start(run: Run) -> None:
    run.evaluate("start")


def warm_start(run: Run) -> None:
    """Supervised steps on the model's segments of the demonstrations; one policy version at the end."""
    settings = run.config.trainer.warm_start
    if not settings.epochs:
        return
    rows = [demonstration_row(run.config, run.codec, d) for d in read_demonstrations(run.config.data.demonstrations_path)]
    todo = batches(rows, settings.batch_size, settings.epochs, run.config.run.seed)
    for batch in todo[run.ledger.warm_step :]:
        step, started = run.ledger.warm_step + 1, time.monotonic()
        stats = run.learner.train_step(batch, SupervisedLoss(), warmed_up(settings.learning_rate, step, settings.warmup_steps))
        run.ledger.warm_step, run.ledger.unpublished = step, True
        stats["seconds"] = time.monotonic() - started
        left = format_seconds((len(todo) - step) * stats["seconds"])
        run.record("warm_start", step, warm_start_metrics(stats))
        run.say(f"warm start {step}/{len(todo)}  loss {stats['loss']:.3f}  grad {stats['grad_norm']:.2f}  ETA {left}")
        if step % run.config.trainer.checkpoint_every == 0 and step < len(todo):
            run.checkpoint()
        run.check_stop()
    run.publish()


def evaluate_warm(run: Run) -> None:
    if run.config.trainer.warm_start.epochs:
        run.evaluate("warm")


def grpo(run: Run) -> None:
    """Group-relative policy optimisation (Shao et al. 2024) and its kin, PPO among them (`trainer.objective`): a policy version a
    batch that the policy learned from."""
    settings = run.config.trainer
    run.load_reference()
    run.begin_critic()
    while run.ledger.step < settings.steps:
        finish_step(run)
        begun = time.monotonic()
        groups = run.next_batch()
        collected = time.monotonic()
        row = rollout_metrics(groups) | staleness_metrics(groups, run.ledger, settings.max_staleness)
        row |= learn(run, groups)
        row |= {"time/rollout_s": collected - begun, "time/train_s": time.monotonic() - collected}
        try:
            if run.ledger.unpublished:  # not while the critic learns alone
                run.publish()
        except StopRequested:  # the step is saved on the way out, so it is told
            tell_step(run, groups, row, begun)
            raise
        tell_step(run, groups, row, begun)
        settle_step(run)


def finish_step(run: Run) -> None:
    """What the last step of the ledger asks for, also when a stop or a crash came between: a new reference, an evaluation."""
    step, every = run.ledger.step, run.config.trainer.eval_every
    if run.refresh_reference():
        run.checkpoint()
    label = f"step{step}"
    if step and every and step % every == 0 and not run.ledger.knows_evaluation(label):
        evaluate = run.evaluate if run.config.trainer.evaluation_waits else run.evaluate_beside
        evaluate(label)
    run.gather_evaluations()


def learn(run: Run, groups: list[CompleteGroup]) -> Figures:
    """The optimizer steps on a batch of groups; returns the learner's figures."""
    settings, step = run.config.trainer, run.ledger.step + 1
    at = rates(step, settings)
    stats = update(run.learner, groups, settings.objective, at, f"{run.config.run.seed}/{step}", run.critic)
    run.consume(groups, step, policy_moved=at.policy is not None)
    return learner_metrics(stats | at.figures)


def tell_step(run: Run, groups: list[CompleteGroup], row: Figures, begun: float) -> None:
    """Print the step, and write its figures and its transcripts. begun: when, by the monotonic clock."""
    step, seconds = run.ledger.step, time.monotonic() - begun
    row |= {"time/publish_s": seconds - row["time/rollout_s"] - row["time/train_s"], "time/step_s": seconds}
    row |= {"time/tokens_per_s": row["search/model_tokens_total"] / seconds} | run.flow_figures()
    run.say(step_line(step, run.config.trainer.steps, row))
    run.record_step(step, row)
    run.keep_transcripts(step, groups)


def settle_step(run: Run) -> None:
    """Make the step durable when a checkpoint is due or the reference changes with it; stop here if asked to."""
    step, settings = run.ledger.step, run.config.trainer
    if run.refresh_reference() or step % settings.checkpoint_every == 0 or step == settings.steps:
        run.checkpoint()
    run.check_stop()


def evaluate_final(run: Run) -> None:
    run.gather_evaluations(wait=True)
    if run.config.trainer.steps:
        run.evaluate("grpo")
    run.write_final_model()


def done(run: Run) -> None:
    run.print_results()


STAGE_WORK: dict[Stage, Callable[[Run], None]] = {
    "evaluate_start": evaluate_start,
    "warm_start": warm_start,
    "evaluate_warm": evaluate_warm,
    "grpo": grpo,
    "evaluate_final": evaluate_final,
    "done": done,
}
