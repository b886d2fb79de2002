"""Names of the catalogue and lists of question files in the configuration: where they lie, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from services.contract.config import Config, DataConfig, QuestionFile, load_config
from services.contract.config.data import mix_problem


def data(**values: object) -> DataConfig:
    return DataConfig.model_validate({"source": "folder", "directory": "/data", **values})


@pytest.mark.parametrize(
    ("value", "read", "converted"),
    [
        (None, "/data/questions/train.jsonl", []),
        ("/mine/q.jsonl", "/mine/q.jsonl", []),
        ("/mine/q.csv", "/data/questions/train.jsonl", ["/mine/q.csv"]),
        ("hub:flashrag-bamboogle", "/data/questions/train.jsonl", ["hub:flashrag-bamboogle"]),
        ([{"path": "/mine/q.jsonl"}, {"path": "/b.csv"}], "/data/questions/train.jsonl", ["/mine/q.jsonl", "/b.csv"]),
    ],
)
def test_what_the_trainer_reads_and_what_prepare_converts(value: object, read: str, converted: list[str]) -> None:
    config = data(train_questions=value)
    assert str(config.train_path) == read
    assert [str(file.path) for file in config.question_files("train_questions")] == converted


def test_names_lie_under_the_data_folder() -> None:
    config = Config.model_validate(
        {
            "data": {"source": "folder", "directory": "/data", "corpus": "hub:wiki-18", "index": "hub:wiki-18-e5"},
            "model": {"source": "folder", "path": "hub:Qwen/Qwen2.5-3B@main"},
            "retriever": {"encoder": "hub:e5-base-v2", "rerank": {"model": "hub:owner/reranker"}},
        }
    )
    assert config.data.corpus_path == Path("/data/hub/wiki-18")
    assert config.data.index_parts == [Path("/data/hub/wiki-18-e5")]
    assert config.model_path == Path("/data/hub/Qwen--Qwen2.5-3B@main")
    assert config.encoder_path == Path("/data/hub/e5-base-v2")
    assert config.reranker_path == Path("/data/hub/owner--reranker")


def test_a_folder_of_ones_own_takes_the_place_of_a_name() -> None:
    config = Config.model_validate({"model": {"source": "folder", "path": "/models/qwen"}, "retriever": {"encoder": "/models/e5"}})
    assert (config.model_path, config.encoder_path) == (Path("/models/qwen"), Path("/models/e5"))


def test_a_folder_of_parts_is_taken_in_their_order(tmp_path: Path) -> None:
    for name in ("part_ab", "part_aa", "README.md"):
        (tmp_path / name).touch()
    assert [path.name for path in data(index=tmp_path).index_parts] == ["part_aa", "part_ab"]


def test_the_environment_can_name_a_file() -> None:
    config = load_config(None, {"FORAGE_DATA__SOURCE": "folder", "FORAGE_DATA__TRAIN_QUESTIONS": "/mine/q.csv"})
    assert config.data.question_files("train_questions") == [QuestionFile(path=Path("/mine/q.csv"))]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"corpus": "hub:wiki-18"}}, 'hub:NAME are for data.source = "folder": set it'),
        ({"data": {"source": "folder", "eval_questions": []}}, "data.eval_questions is an empty list"),
        ({"data": {"mix": {"nq": 0}}}, "data.mix gives every source the weight 0"),
        ({"data": {"mix": {"nq": -1}}}, "greater than or equal to 0"),
        ({"model": {"path": "hub:qwen2.5-3b"}}, 'model.path = "hub:NAME" needs model.source = "folder"'),
        ({"data": {"source": "folder", "train_questions": [{"path": "a.csv", "colums": {}}]}}, "Extra inputs are not permitted"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(values)


def test_a_mixture_must_name_exactly_the_sources_there_are() -> None:
    assert mix_problem({}, ["nq"]) is None
    assert mix_problem({"nq": 1.0, "popqa": 0.0}, ["nq", "popqa"]) is None
    assert "gives no weight to popqa" in (mix_problem({"nq": 1.0}, ["nq", "popqa"]) or "")
    assert "names nqq, of which there is no question; there are nq" in (mix_problem({"nqq": 1.0}, ["nq"]) or "")
