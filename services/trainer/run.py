"""One run's parts, put together: the learner on every rank; Redis, the volume and the journal on the lead.

`Run` offers the steps that `main` is written in. Each method may be called on every rank.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.contract.codec import Codec
from services.contract.config import Config, save_config
from services.contract.files import replace_file
from services.contract.groups import GroupStore
from services.contract.policy import PolicyBoard
from services.contract.scores import Evaluation
from services.contract.store import connect
from services.contract.telemetry import Heartbeat
from services.contract.weights import version_folder
from services.trainer.durable.checkpoints import Checkpoints
from services.trainer.durable.ledger import Ledger, PendingEvaluation
from services.trainer.durable.reference import forget_references, kept_reference, reference_folder, refresh_is_due
from services.trainer.durable.room import Patiently, copy_durably, pause, when_there_is_room
from services.trainer.evaluation.evaluate import Evaluator
from services.trainer.feeding.batch import Batches
from services.trainer.feeding.collect import Collector, CompleteGroup
from services.trainer.feeding.questions import TrainingOrder, read_questions, stratified
from services.trainer.megatron.critic import Critic
from services.trainer.megatron.learner import Learner
from services.trainer.monitoring.journal import Journal, Kind
from services.trainer.monitoring.loggers import open_listeners
from services.trainer.monitoring.metrics import evaluation_metrics, flow_metrics
from services.trainer.monitoring.report import evaluation_line, results_table
from services.trainer.monitoring.transcripts import write_transcripts
from services.trainer.objective.functions import check_functions
from services.trainer.publishing.publish import Publisher
from services.trainer.ranks import StopFlag, is_lead, on_lead, on_lead_with_export

logger = logging.getLogger("trainer")


class Lead:
    """What only the lead has: the streams, the policy board, the journal."""

    def __init__(self, config: Config, ledger: Ledger, check_stop: Callable[[], None], patiently: Patiently) -> None:
        client = connect(config.redis)
        self.store = GroupStore(client, config.run.name)
        self.journal = Journal(config.run.folder, ledger.journal_bytes, patiently)
        save_config(config, config.run.folder / "config.toml")  # for commands that look at the run later
        open_listeners(config, self.journal)
        self.publisher = Publisher(config, PolicyBoard(client, config.run.name), check_stop)
        collector = Collector(self.store, config.trainer.collect_timeout_s, self.publisher.wait)
        order = TrainingOrder(read_questions(config.data.train_path), config.run.seed, config.data.mix)
        self.batches = Batches(config, self.store, collector, order, ledger)
        self.batches.take_over()
        held_out = stratified(read_questions(config.data.eval_path), config.trainer.eval_questions, config.run.seed)
        self.evaluator = Evaluator(config, self.store, collector, held_out, config.run.folder / "evaluations", patiently)
        self.evaluator.resume(ledger.pending_evaluations)


class Run:
    def __init__(self, config: Config) -> None:
        check_functions(config.trainer.objective)
        self.config = config
        self.folder = config.run.folder
        self.stop = StopFlag()
        self.stop.install()
        self.codec = Codec.load(config.model_path)
        self.learner = Learner(config, config.model_path)
        self.critic: Critic | None = None
        kept = (config.trainer.keep_checkpoints, config.trainer.keep_every)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", *kept)
        self.ledger = self._restore()
        self.lead = Lead(config, self.ledger, self._alive_or_stop, self._patiently) if is_lead() else None
        self._heartbeat = Heartbeat.from_environment() if is_lead() else Heartbeat(None)
        self._state = "starting"
        self._unreleased: list[CompleteGroup] = []
        self._saved = _progress(self.ledger)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _restore(self) -> Ledger:
        """The newest whole checkpoint, or a fresh start."""
        found = on_lead(self.checkpoints.latest)
        if found is None:
            return Ledger(journal_bytes=0)
        path, ledger = found
        if ledger.step:
            self.begin_critic()  # also where GRPO is over: the next checkpoint must hold it
        if ledger.has_learned:
            self.learner.load(path, self.critic)
        if ledger.reopen(self.config.trainer.steps):
            self.say(f"the run had ended at step {ledger.step}; trainer.steps is {self.config.trainer.steps} now, so it goes on")
        self.say(f"resumed from {path.name}: stage {ledger.stage}, warm start {ledger.warm_step}, step {ledger.step}")
        return ledger

    def checkpoint(self) -> None:
        """Make everything learned so far durable; only then acknowledge the groups that it contains.

        Raises NoSpace when the disk stays full; nothing is acknowledged then.
        """
        when_there_is_room(self._publish_checkpoint, lambda told: on_lead(lambda: self._wait_for_room(told)))
        on_lead(self._release_what_is_durable)
        self._unreleased.clear()
        self._saved = _progress(self.ledger)

    def save_before_leaving(self) -> None:
        """Steps since the last checkpoint are kept. Weights and ledger agree wherever a stop is noticed."""
        if self._saved != _progress(self.ledger):
            self.checkpoint()

    def _publish_checkpoint(self) -> None:
        scratch = self.checkpoints.folder / ".state"
        on_lead(lambda: _empty_folder(scratch))
        if self.ledger.has_learned:
            self.learner.save(scratch, self.critic)
        self.ledger.journal_bytes = on_lead(lambda: self._lead.journal.length())
        on_lead(lambda: self._lead.publisher.put_on_volume())
        on_lead(lambda: self.checkpoints.save(self.ledger, scratch))

    def _release_what_is_durable(self) -> None:
        self._lead.batches.release(self._unreleased)
        forget_references(self.folder, {ledger.reference_step for ledger in self.checkpoints.ledgers().values()})

    def _patiently(self, write: Callable[[], object]) -> None:
        """Write something small, waiting for a full disk. On the lead."""
        when_there_is_room(write, self._wait_for_room)

    def _wait_for_room(self, told: str) -> None:
        """On the lead."""
        logger.warning(told)
        if not self.checkpoints.make_room():
            pause(self._alive_or_stop)

    def consume(self, groups: list[CompleteGroup], step: int, policy_moved: bool) -> None:
        """Step `step` has learned from these groups, the policy with it or the critic alone. They stay unacknowledged until the
        next checkpoint."""
        self.ledger.step, self.ledger.unpublished = step, self.ledger.unpublished or policy_moved
        if self.lead:
            self.lead.batches.consume(groups)
            self._unreleased += groups

    # -- the policy ----------------------------------------------------------------------------------------------------

    def make_current(self) -> None:
        """Engines must serve the weights of the ledger. After a crash these get a number above all that were published."""
        nobody_plays = self.ledger.stage == "warm_start"  # until it ends, and then it publishes
        if self.ledger.version == 0 and (nobody_plays or not self.ledger.unpublished) and self._nothing_is_published():
            on_lead(lambda: self._lead.publisher.announce_start())
        elif not nobody_plays and (self.ledger.unpublished or not self._is_served()):
            self.publish()

    def _nothing_is_published(self) -> bool:
        return on_lead(lambda: self._lead.publisher.next_version()) == 1

    def _is_served(self) -> bool:
        return on_lead(lambda: self._lead.publisher.serves(self.ledger.version))

    def publish(self) -> None:
        """Give the present weights the next version number and wait until the engines may use it."""
        parent = self.ledger.version
        version = on_lead(lambda: self._lead.publisher.next_version())
        on_lead_with_export(lambda begin: self._lead.publisher.publish(version, parent, begin), self.learner.export)
        self.ledger.publish(version, policies_kept=self.config.trainer.max_staleness + 1)

    def begin_critic(self) -> None:
        """PPO's critic begins as the policy does that GRPO starts from. Without one there is nothing to do."""
        if self.config.trainer.objective.has_critic and self.critic is None:
            self.critic = Critic(self.config, self.learner.policy)

    def load_reference(self) -> None:
        """The policy that GRPO starts from is the one it is held close to. After a warm start it is copied here: later versions
        replace it on the volume."""
        if not self.config.trainer.objective.kl_coef:
            return
        if self.ledger.warm_step and not self.ledger.step:
            self._copy_version(reference_folder(self.folder, 0))
        self.learner.reference = None  # its memory is free before the next one is loaded
        started_from = None if self.ledger.warm_step else self.config.model_path
        self.learner.set_reference(on_lead(lambda: kept_reference(self.folder, self.ledger.reference_step, started_from)))

    def refresh_reference(self) -> bool:
        """Make the present policy the reference if `reference_every` says so. Then a checkpoint must follow (see reference.py)."""
        step = self.ledger.step
        if not refresh_is_due(step, self.ledger.reference_step, self.config.trainer.objective.reference_every):
            return False
        self._copy_version(reference_folder(self.folder, step))
        self.ledger.reference_step = step
        self.load_reference()
        return True

    def write_final_model(self) -> None:
        """The last version as `<run folder>/final`, a Hugging Face folder."""
        self._copy_version(self.folder / "final")

    def _copy_version(self, target: Path) -> None:
        version = self.ledger.version
        source = version_folder(self.config.weights_folder, version) if version else self.config.model_path
        on_lead(lambda: self._lead.publisher.put_on_volume())
        on_lead(lambda: self._patiently(lambda: copy_durably(source, target)))

    # -- groups and scores ---------------------------------------------------------------------------------------------

    def next_batch(self) -> list[CompleteGroup]:
        return on_lead(lambda: self._lead.batches.next_batch())

    def evaluate(self, label: str) -> None:
        """Score the present policy, training waiting for it, and keep the scores in the ledger."""
        self._keep(on_lead(lambda: self._lead.evaluator.evaluate(label, self.ledger.version, self.ledger.step)))

    def evaluate_beside(self, label: str) -> None:
        """Begin to score the present policy and go on training; `gather_evaluations` brings the scores."""
        pending = PendingEvaluation(label, self.ledger.version, self.ledger.step)
        on_lead(lambda: self._lead.evaluator.begin(pending))
        self.ledger.pending_evaluations.append(pending)

    def gather_evaluations(self, wait: bool = False) -> None:
        """Keep the scores of evaluations that have become complete, or of all after waiting for them."""
        if not self.ledger.pending_evaluations:
            return
        for pending, evaluation in on_lead(lambda: self._lead.evaluator.finish() if wait else self._lead.evaluator.gather()):
            self.ledger.pending_evaluations.remove(pending)
            self._keep(evaluation)

    def _keep(self, evaluation: Evaluation) -> None:
        label = evaluation.label
        self.ledger.evaluations = [e for e in self.ledger.evaluations if e.label != label] + [evaluation]
        self.say(evaluation_line(evaluation))
        self.record("evaluation", evaluation.step, {"label": label, **evaluation_metrics(evaluation)})

    def flow_figures(self) -> dict[str, Any]:
        return on_lead(lambda: flow_metrics(self._lead.batches.figures(), self.ledger.version))

    # -- telling -------------------------------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        if is_lead():
            logger.info(line)

    def record(self, kind: Kind, step: int, values: dict[str, Any]) -> None:
        on_lead(lambda: self._lead.journal.record(kind, step, values))

    def record_step(self, step: int, row: dict[str, Any]) -> None:
        on_lead(lambda: self._lead.journal.record_step(step, row))

    def keep_transcripts(self, step: int, groups: list[CompleteGroup]) -> None:
        path = self.folder / "transcripts" / f"step{step:06d}.jsonl"
        on_lead(lambda: self._patiently(lambda: write_transcripts(path, groups)))

    def print_results(self) -> None:
        if not is_lead():
            return
        table = results_table(self.ledger.evaluations)
        self._patiently(lambda: replace_file(self.folder / "results.md", f"{table}\n".encode()))
        print(f"\n{table}\n\nfinal model: {self.folder / 'final'}", flush=True)
        self._lead.journal.end()

    def beat(self, state: str | None = None) -> None:
        """Sign of life for the health check."""
        self._state = state or self._state
        self._heartbeat.beat(self._state)

    # -- stopping ------------------------------------------------------------------------------------------------------

    def check_stop(self) -> None:
        """Raise StopRequested on every rank when the lead was asked to stop."""
        on_lead(self._alive_or_stop)

    def _alive_or_stop(self) -> None:
        self.beat()
        self.stop.check()

    @property
    def _lead(self) -> Lead:
        assert self.lead is not None, "only the lead may do this"
        return self.lead


def _progress(ledger: Ledger) -> tuple[str, int, int]:
    return ledger.stage, ledger.warm_step, ledger.step


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
