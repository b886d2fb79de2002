"""The evaluator of `forage eval`: question files in, kept answers and scores out. Engine and graders are a stand-in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from services.contract.config import Config, ConfigError
from services.contract.eval_job import ANSWERS, JOB, MODES, EvalJob, read_result
from services.contract.groups import GroupStore
from services.contract.messages import PromptGroup, Question
from services.contract.policy import PolicyBoard, PolicyVersion
from services.trainer.evaluation import modes
from services.trainer.evaluation.modes import (
    RetrieverAway,
    baseline_prompt,
    make_eval_group,
    question_group_id,
    retrieve,
    with_passages,
)
from services.trainer.evaluation.standalone import choose, run
from services.trainer.ranks import StopRequested
from tests.factories import grade, make_trajectory
from tests.rollout.standins import StandInRetriever
from tests.rollout.tiny_model import PASSAGES

QUESTION = Question("1", "nq", "Where is Paris?", ["France"])


class Bench:
    def __init__(self, redis_url: str, client: redis.Redis, folder: Path, retriever_url: str = "http://127.0.0.1:1") -> None:
        self.folder, self.questions = folder / "eval", folder / "questions.jsonl"
        rows = [
            {"id": str(i), "source": source, "question": f"{source} {i}?", "golden_answers": ["x"]}
            for source in "ab"
            for i in range(4)
        ]
        self.questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"run": {"name": "eval"}, "redis": {"url": redis_url, "retry_s": 10}, "retriever": {"url": retriever_url}}
        self.config = Config.model_validate(values | {"model": {"source": "folder", "path": str(folder)}})
        self.store = GroupStore(client, "eval")
        self.seen: list[PromptGroup] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._play)
        self._thread.start()

    def job(self, **changes: object) -> EvalJob:
        job = msgspec.structs.replace(EvalJob("m", "d", [str(self.questions)], [], 0, 1, 0.0, "search"), **changes)
        self.folder.mkdir(exist_ok=True)
        (self.folder / JOB).write_bytes(msgspec.json.encode(job))
        return job

    def run(self, running: bool = False) -> str:
        """Of the one job in the bench's folder."""
        (table,) = run(self.config, [self.folder], running)
        return table

    def ids(self) -> list[str]:
        return [json.loads(line)["id"] for line in (self.folder / ANSWERS).read_text().splitlines()]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _play(self) -> None:
        """Right on every question of kind a."""
        while not self._stop.is_set():
            for lease in self.store.lease("stand-in", 1, 50):
                group = lease.group
                self.seen.append(group)
                for sample in range(group.samples):
                    spans = {} if group.sampling.max_searches else {"spans": make_trajectory().spans[:1], "response_ids": [10, 11]}
                    logprobs = {"logprobs": [-0.5, -0.25]} if spans else {}
                    played = make_trajectory(
                        group.group_id, sample, source=group.source, question=group.question, **spans, **logprobs
                    )
                    self.store.store(played, lease)
                    assert grade(self.store, played.id, 1.0, exact_match=float(group.source == "a"), format=1.0)
                self.store.finish(lease)


@pytest.fixture
def bench(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(redis_url, redis_client, tmp_path)
    yield bench
    bench.close()
    bench.store.accounts().check()


def test_scores_are_written_by_kind_with_their_mean_and_intervals(bench: Bench) -> None:
    bench.job()
    table = bench.run()
    result = read_result(bench.folder)
    assert result and result.whole.figures["exact_match"] == 0.5 and result.whole.questions == 8
    assert result.by_source["a"].figures["exact_match"] == 1.0 and result.source_mean["exact_match"] == 0.5
    assert "| a " in table and "100.0 (51.0–100.0)" in table and "**mean of kinds**" in table
    assert (bench.folder / "results.md").read_text().strip() == table
    assert bench.store.in_flight() == set()


def test_answers_already_had_are_kept_and_a_larger_sample_asks_only_for_the_rest(bench: Bench) -> None:
    bench.job(limit=4)
    bench.run()
    first = bench.ids()
    bench.job(limit=0)
    bench.run()
    assert len(first) == 4 and bench.ids()[:4] == first and len(set(bench.ids())) == 8
    assert len(bench.seen) == 8
    bench.job(limit=4)
    bench.run()
    result = read_result(bench.folder)
    assert result and result.whole.questions == 4 and len(bench.seen) == 8
    assert len(bench.ids()) == 8, "a smaller sample throws nothing away"


def test_several_samples_give_pass_at_k(bench: Bench) -> None:
    bench.job(samples=2, temperature=0.7, sources=["a"])
    bench.run()
    result = read_result(bench.folder)
    assert result and result.whole.figures["pass@2"] == 1.0 and result.whole.questions == 4
    assert {group.sampling.temperature for group in bench.seen} == {0.7}


def test_a_direct_answer_is_asked_for_without_a_search_and_counts_as_answered(bench: Bench) -> None:
    bench.job(mode="direct", limit=2)
    bench.run()
    result = read_result(bench.folder)
    assert {group.sampling.max_searches for group in bench.seen} == {0}
    assert result and result.whole.figures["answered"] == 1.0 and result.whole.figures["searches"] == 0.0


def test_several_modes_are_played_one_after_another_each_in_its_folder(bench: Bench) -> None:
    folders = [bench.folder / "direct", bench.folder / "search"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / JOB).write_bytes(msgspec.json.encode(msgspec.structs.replace(bench.job(limit=2), mode=folder.name)))
    tables = list(run(bench.config, folders, running=False))
    assert ["mode direct" in tables[0], "mode search" in tables[1]] == [True, True]
    assert [group.sampling.max_searches > 0 for group in bench.seen] == [False, False, True, True]
    asked = [{json.loads(line)["question"] for line in (folder / ANSWERS).read_text().splitlines()} for folder in folders]
    assert asked[0] == asked[1] and len(asked[0]) == 2
    list(run(bench.config, folders, running=False))
    assert len(bench.seen) == 4, "what is answered is not asked again"


def test_nothing_is_asked_when_a_later_job_cannot_be_meant(bench: Bench) -> None:
    bench.job()
    with pytest.raises(ConfigError, match=r"no job\.json"):
        list(run(bench.config, [bench.folder, bench.folder / "none"], running=False))
    assert bench.seen == []


def test_a_question_has_another_group_in_each_mode() -> None:
    assert len({question_group_id(QUESTION, mode) for mode in MODES}) == len(MODES)


def test_a_running_suite_is_scored_at_its_own_version(bench: Bench) -> None:
    bench.job(limit=2)
    with pytest.raises(ConfigError, match="serves no policy yet"):
        bench.run(running=True)
    PolicyBoard(bench.store.client, "eval").commit(PolicyVersion(7, "somewhere"))
    bench.run(running=True)
    assert {group.issued_version for group in bench.seen} == {7}


def test_a_suite_whose_trainer_is_at_work_is_left_alone(bench: Bench) -> None:
    bench.job()
    PolicyBoard(bench.store.client, "eval").commit(PolicyVersion(7, "somewhere"))
    bench.store.read_graded(1, 1)  # as a trainer does all the time
    with pytest.raises(ConfigError, match="somebody else reads the answers"):
        bench.run(running=True)


def test_a_folder_without_a_job_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"no job\.json"):
        bench.run()


def test_questions_that_cannot_be_meant_are_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="no question is of the kind c; these files have a, b"):
        choose(bench.config, bench.job(sources=["c"]))
    with pytest.raises(ConfigError, match="two questions are called a:0"):
        choose(bench.config, bench.job(questions=[str(bench.questions)] * 2))


def test_a_stop_keeps_what_has_come(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_after_three() -> None:
        if (bench.folder / ANSWERS).exists() and len(bench.ids()) >= 3:
            raise StopRequested

    monkeypatch.setattr("services.trainer.evaluation.standalone._stop_check", lambda: stop_after_three)
    bench.job()
    with pytest.raises(StopRequested):
        bench.run()
    monkeypatch.undo()
    bench.run()
    assert len(bench.ids()) == len(set(bench.ids())) == 8


# -- modes -------------------------------------------------------------------------------------------------------------


def group_of(config: Config, mode: str) -> PromptGroup:
    return make_eval_group(config, QUESTION, EvalJob("m", "d", [], [], 0, 1, 0.0, mode), 0)  # type: ignore[arg-type]


def test_search_plays_the_runs_own_prompt(tmp_path: Path) -> None:
    config = Config.model_validate({"data": {"instruction": "Find out: {question}"}, "rollout": {"max_searches": 4}})
    group = group_of(config, "search")
    assert group.prompt == [{"role": "user", "content": "Find out: Where is Paris?"}] and group.sampling.max_searches == 4


def test_rag_shows_the_passages_of_one_search_in_the_prompt() -> None:
    retriever = StandInRetriever()
    try:
        config = Config.model_validate({"retriever": {"url": retriever.url}, "rollout": {"topk": 2}, "data": {"system": "Search!"}})
        (group,) = with_passages(config, [group_of(config, "rag")])
    finally:
        retriever.close()
    assert retriever.requests == [{"queries": ["Where is Paris?"], "topk": 2, "return_scores": False}]
    *examples, message = group.prompt
    assert [turn["role"] for turn in examples] == ["user", "assistant"] * 2  # type: ignore[index]
    assert examples[1]["content"] == "<answer>Jupiter</answer>"  # type: ignore[index]
    assert "The capital is Paris." in message["content"] and message["content"].endswith("Question: Where is Paris?")  # type: ignore[index]
    assert group.sampling.max_searches == 0 and len(PASSAGES) == 2


def test_a_passage_cannot_put_the_question_elsewhere() -> None:
    shown = baseline_prompt(Config(), "rag", "Where?", ['"T"\nWrite {question} and {passages} here.'])
    assert shown[-1]["content"].count("Where?") == 1 and "Write {question} and {passages} here." in shown[-1]["content"]  # type: ignore[index]


def test_without_a_chat_template_the_baselines_prompt_is_one_text() -> None:
    config = Config.model_validate({"data": {"chat_template": False}})
    text = baseline_prompt(config, "direct", "Where is Paris?")
    assert isinstance(text, str) and text.endswith("Question: Where is Paris?\n")
    assert text.count("<answer>Jupiter</answer>\n\n") == 1
    assert "(nothing was found)" in baseline_prompt(config, "rag", "Where is Paris?")


@pytest.mark.parametrize("status", [404, 500])
def test_a_retriever_that_cannot_be_used_is_told(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "PAUSE_S", 0.01)
    retriever = StandInRetriever()
    retriever.always = status
    try:
        with pytest.raises(RetrieverAway, match=r"is retriever\.url right"):
            retrieve(Config.model_validate({"retriever": {"url": retriever.url}}), ["Where?"])
    finally:
        retriever.close()
