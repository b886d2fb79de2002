"""`python -m services.trainer.evaluation.standalone --config FILE --job FOLDER`: scores of one model, without a run.

`--job` may be given again: the folders' jobs are played one after another with the same engines, as the modes of one model are.

It plays the trainer's part on the streams: feeds questions, collects graded answers, scores them. `forage eval` starts it with the
services that it needs; with `--running` it uses those that already run, whose policy it scores as it is.

FOLDER holds `job.json`; every answer is kept there as it comes (`answers.jsonl`), so a second start asks only for what is missing.
Exit codes: 0 done, 2 the configuration or its files cannot be used, 1 anything else.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from services.contract.config import Config, ConfigError, load_config
from services.contract.eval_job import ANSWERS, RESULTS, TABLE, EvalJob, EvalResult, read_job, unknown_sources
from services.contract.groups import TRAINER, TRAINER_GROUP, GroupStore
from services.contract.messages import PromptGroup, Question
from services.contract.policy import PolicyBoard, PolicyVersion
from services.contract.scores import by_source, score
from services.contract.store import RedisAway, connect
from services.contract.telemetry import Heartbeat, Progress, configure_logging
from services.trainer.evaluation.answer_book import AnswerBook
from services.trainer.evaluation.evaluate import gather
from services.trainer.evaluation.modes import RetrieverAway, make_eval_group, with_passages
from services.trainer.feeding.collect import Collector, CollectTimeout
from services.trainer.feeding.questions import read_questions, stratified
from services.trainer.monitoring.report import scores_table
from services.trainer.ranks import StopRequested

WINDOW = 512
"""Groups fed at a time: a set of fifty thousand questions must not fill Redis."""
READING_S = 10.0
"""A trainer that has read the stream so recently is at work."""


def main() -> None:
    logger = configure_logging("eval")
    parser = argparse.ArgumentParser(prog="python -m services.trainer.evaluation.standalone", description="Scores one model.")
    parser.add_argument("--config", required=True, help="a TOML file")
    parser.add_argument("--job", required=True, type=Path, action="append", help="a folder with job.json; may be given again")
    parser.add_argument("--running", action="store_true", help="use the policy that a running suite serves")
    arguments = parser.parse_args()
    try:
        for table in run(load_config(arguments.config), arguments.job, arguments.running):
            print(f"\n{table}", flush=True)
    except ConfigError as error:
        logger.error("%s", error)
        sys.exit(2)
    except StopRequested:
        logger.info("stopped on request; the answers so far are kept, the same command goes on")
    except (CollectTimeout, RedisAway, RetrieverAway) as error:
        logger.error("%s", error)
        sys.exit(1)


def run(config: Config, folders: Sequence[Path], running: bool) -> Iterator[str]:
    """Of each folder's job ask what is missing, write the scores; yields their tables.

    Raises ConfigError, before anything is asked where it can be told by then, StopRequested, CollectTimeout, RetrieverAway.
    """
    jobs = [(folder, _job(folder)) for folder in folders]
    asked = [(folder, job, choose(config, job)) for folder, job in jobs]
    client = connect(config.redis)
    store, board = GroupStore(client, config.run.name), PolicyBoard(client, config.run.name)
    version = _running_version(config, store, board) if running else _announce(config, board)
    collector = Collector(store, config.trainer.collect_timeout_s, _stop_check())
    for folder, job, questions in asked:
        groups = [make_eval_group(config, question, job, version) for question in questions]
        book = AnswerBook(folder / ANSWERS, {group.group_id: group for group in groups}, keep_others=True)
        with Progress(f"evaluating ({job.mode})", len(groups), "questions", done=len(book.answers)) as bar:
            gather(store, collector, book, bar, window=WINDOW, ready=_ready(config, job))
        yield write_results(folder, job, book)


def _job(folder: Path) -> EvalJob:
    if (job := read_job(folder)) is None:
        raise ConfigError(f"{folder} has no job.json that can be read: `forage eval` writes it")
    return job


def choose(config: Config, job: EvalJob) -> list[Question]:
    """The questions that the job asks for. Raises ConfigError when there are none, or two under one name."""
    files = [Path(name) for name in job.questions] or [config.data.eval_path]
    every = [question for path in files for question in read_questions(path)]
    if problem := unknown_sources(job.sources, {question.source for question in every}):
        raise ConfigError(problem)
    wanted = [question for question in every if not job.sources or question.source in job.sources]
    named: dict[str, Question] = {}
    for question in wanted:
        if question.example_id in named:
            raise ConfigError(f"two questions are called {question.example_id}: give each file's rows a source of their own")
        named[question.example_id] = question
    return stratified(wanted, job.limit, config.run.seed)


def write_results(folder: Path, job: EvalJob, book: AnswerBook) -> str:
    """`results.json` and `results.md`; returns the latter."""
    rows = book.figures(may_search=job.mode == "search")
    kinds = by_source(rows)
    whole = score([figures for _, figures in rows])
    means = {name: round(sum(k.figures[name] for k in kinds.values()) / len(kinds), 4) for name in whole.figures} if kinds else {}
    versions = sorted({v for answers in book.answers.values() for answer in answers for v in answer.versions})
    result = EvalResult(job, whole, kinds, means, len(book.lost), versions)
    (folder / RESULTS).write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    table = scores_table(result)
    (folder / TABLE).write_text(table + "\n")
    return table


def _ready(config: Config, job: EvalJob):  # noqa: ANN202 - see evaluate.Ready
    def ready(groups: list[PromptGroup]) -> list[PromptGroup]:
        return with_passages(config, groups) if job.mode == "rag" else groups

    return ready


def _announce(config: Config, board: PolicyBoard) -> int:
    """The model under evaluation is version 0 of a run of its own."""
    board.commit(PolicyVersion(0, str(config.model_path)))
    return 0


def _running_version(config: Config, store: GroupStore, board: PolicyBoard) -> int:
    """Of the policy that is served. Raises ConfigError when there is none, or a trainer would take the answers away."""
    if (current := board.current()) is None:
        raise ConfigError(f"run {config.run.name} serves no policy yet: start the suite, or leave --running out")
    for consumer in store.client.xinfo_consumers(store.keys.graded, TRAINER_GROUP):
        if consumer["name"] == TRAINER.encode() and consumer["idle"] < READING_S * 1000:
            raise ConfigError(
                f"somebody else reads the answers of run {config.run.name}, its trainer or another evaluation: "
                "wait until that is done, or leave --running out"
            )
    return current.version


def _stop_check():  # noqa: ANN202 - () -> None
    """Raises StopRequested after SIGTERM or Ctrl-C, and shows a sign of life."""
    stop, heartbeat = threading.Event(), Heartbeat.from_environment()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def check() -> None:
        heartbeat.beat("ready: evaluating")
        if stop.is_set():
            raise StopRequested

    return check


if __name__ == "__main__":
    main()
