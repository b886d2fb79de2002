"""Demonstrations made over real HTTP; the retriever is a stand-in that matches words."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from services.contract.config import Config
from services.contract.messages import Demonstration, Question
from services.contract.transcript import parse_action
from services.prepare.assets import demonstration_step, factbook_questions, prepare_demonstrations, report_recall
from services.prepare.demonstrations import take_turns
from services.prepare.errors import PrepareError
from services.prepare.retrieval import Retriever
from tests.prepare.conftest import COUNTRIES, StandInRetriever, small_config


@pytest.fixture
def directory(prepared: Path, tmp_path: Path) -> Path:
    """The assets, without the model, in a folder of the test's own."""
    shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("models"))
    return tmp_path / "data"


def config_for(directory: Path, retriever: StandInRetriever, **sections: dict) -> Config:
    return small_config(directory, retriever={"url": retriever.url}, **sections)


def read(path: Path) -> list[Demonstration]:
    return [msgspec.json.decode(line, type=Demonstration) for line in path.read_bytes().splitlines()]


def make(directory: Path, retriever: StandInRetriever, **sections: dict) -> list[Demonstration]:
    config = config_for(directory, retriever, **sections)
    prepare_demonstrations(config)
    return read(config.data.demonstrations_path)


def training_questions(directory: Path) -> dict[str, Question]:
    rows = (directory / "questions" / "train.jsonl").read_bytes().splitlines()
    questions = [msgspec.json.decode(row, type=Question) for row in rows]
    return {q.example_id: q for q in questions}


def test_as_many_as_asked_for_from_training_questions(directory: Path, retriever: StandInRetriever) -> None:
    made = make(directory, retriever)
    known = training_questions(directory)
    assert len(made) == 20
    assert len({d.example_id for d in made}) == 20
    assert all(known[d.example_id].question == d.question for d in made)


def test_kinds_take_turns(directory: Path, retriever: StandInRetriever) -> None:
    counts = Counter(d.example_id.partition(":")[0] for d in make(directory, retriever))
    assert len(counts) >= 15
    assert max(counts.values()) <= 2


def test_a_demonstration_searches_once_a_hop_and_answers(directory: Path, retriever: StandInRetriever) -> None:
    known = training_questions(directory)
    for made in make(directory, retriever):
        hops = 2 if made.example_id.startswith("two_hop_") else 1
        assert [s.kind for s in made.segments] == ["model", "observation"] * hops + ["model"]
        actions = [parse_action(s.text) for s in made.segments if s.kind == "model"]
        assert [a and a.kind for a in actions] == ["search"] * hops + ["answer"]
        assert actions[-1] and actions[-1].content == known[made.example_id].golden_answers[0]


def test_the_answer_stands_in_the_last_observation(directory: Path, retriever: StandInRetriever) -> None:
    for made in make(directory, retriever):
        action = parse_action(made.segments[-1].text)
        assert action
        assert action.content in made.segments[-2].text
        assert made.segments[-2].text.startswith("\n\n<information>Doc 1(Title: ")
        assert made.segments[-2].text.endswith("</information>\n\n")


def test_think_blocks_come_when_the_format_asks_for_them(directory: Path, retriever: StandInRetriever) -> None:
    made = make(directory, retriever, reward={"require_think": True})
    turns = [s.text for d in made for s in d.segments if s.kind == "model"]
    assert all(turn.startswith("<think>") and turn.count("</think>\n<") == 1 for turn in turns)


def test_the_same_retriever_gives_the_same_bytes(directory: Path, retriever: StandInRetriever) -> None:
    make(directory, retriever)
    path = directory / "demonstrations.jsonl"
    first = path.read_bytes()
    path.unlink()
    make(directory, retriever)
    assert path.read_bytes() == first


def test_a_second_run_asks_nothing(directory: Path, retriever: StandInRetriever) -> None:
    make(directory, retriever)
    asked = retriever.requests
    make(directory, retriever)
    assert retriever.requests == asked


@pytest.mark.parametrize("change", [{"rollout": {"topk": 3}}, {"reward": {"require_think": True}}, {"run": {"seed": 7}}])
def test_changed_settings_remake_them(directory: Path, retriever: StandInRetriever, change: dict) -> None:
    make(directory, retriever)
    asked = retriever.requests
    make(directory, retriever, **change)
    assert retriever.requests > asked


def test_a_busy_retriever_is_asked_again(directory: Path, retriever: StandInRetriever) -> None:
    retriever.failures = 2
    assert len(make(directory, retriever)) == 20


def test_a_retriever_that_stays_away_is_given_up_with_a_mend(retriever: StandInRetriever) -> None:
    retriever.stop()
    with (
        Retriever(retriever.url, 2, patience_s=0.5) as retrieve,
        pytest.raises(PrepareError, match="start it, or mend retriever.url"),
    ):
        retrieve(["capital"])


def test_a_refused_request_is_told_at_once(directory: Path, retriever: StandInRetriever) -> None:
    retriever.failures, retriever.status = 99, 422
    with pytest.raises(PrepareError, match="HTTP 422.*told to fail"):
        make(directory, retriever)
    assert retriever.requests == 1
    assert not list(directory.glob("*demonstrations*"))


def test_a_retriever_of_another_corpus_leaves_no_file(directory: Path) -> None:
    empty = StandInRetriever(None)
    empty.start()
    try:
        with pytest.raises(PrepareError, match="does the retriever serve this run's corpus"):
            make(directory, empty)
    finally:
        empty.stop()
    assert not list(directory.glob("*demonstrations*"))


def test_fewer_questions_than_wanted_give_what_there_is(directory: Path, retriever: StandInRetriever) -> None:
    made = make(directory, retriever, data={"demonstration_count": 5000})
    assert 100 < len(made) <= len(training_questions(directory))


def test_without_assets_the_mend_is_to_make_them(tmp_path: Path, retriever: StandInRetriever) -> None:
    with pytest.raises(PrepareError, match="run `python -m services.prepare assets` first"):
        demonstration_step(config_for(tmp_path, retriever))


def test_turns_are_taken_by_kind() -> None:
    questions = factbook_questions(COUNTRIES, held_out=False)
    kinds = [q.question.source for q in take_turns(questions, seed=0)]
    distinct = len(set(kinds))
    assert len(set(kinds[:distinct])) == distinct
    assert len(kinds) == len(questions)


def test_recall_is_reported_by_kind_and_hop(directory: Path, retriever: StandInRetriever) -> None:
    report = report_recall(config_for(directory, retriever))
    capital = next(line.split() for line in report.splitlines() if line.startswith("capital "))
    assert float(capital[-1]) > 0.9
    assert any(line.split()[:2] == ["two_hop_capital_by_highest_point", "2"] for line in report.splitlines())


def test_demonstrations_show_passages_in_the_layout_of_the_rollout(directory: Path, retriever: StandInRetriever) -> None:
    before = make(directory, retriever)
    made = make(directory, retriever, rollout={"passage_template": "({number}) {title}: {text}\n"})
    observed = [segment.text for each in made for segment in each.segments if segment.kind == "observation"]
    assert all(text.startswith("\n\n<information>(1) ") for text in observed) and len(made) == len(before)
