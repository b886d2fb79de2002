"""The whole one-shot: what it makes, what it skips, and data that the user brings."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from services.contract.messages import Question
from services.prepare.assets import asset_steps, corpus_step, prepare_assets, prepare_demonstrations
from services.prepare.errors import PrepareError
from services.prepare.steps import run_step
from tests.prepare.conftest import COUNTRIES, small_config

PASSAGE = '{"id": "1", "contents": "\\"T\\"\\ntext"}\n'
QUESTION = '{"id": "1", "source": "s", "question": "Why?", "golden_answers": ["so"]}\n'


def stamps(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def read_questions(path: Path) -> list[Question]:
    return [msgspec.json.decode(line, type=Question) for line in path.read_bytes().splitlines()]


def user_data(folder: Path, **changes: dict) -> dict:
    """A user's own corpus and questions in `folder`."""
    folder.mkdir()
    for name, text in {"corpus": PASSAGE, "train": QUESTION, "eval": QUESTION}.items():
        (folder / f"{name}.jsonl").write_text(text)
    return {
        "source": "folder",
        "corpus": folder / "corpus.jsonl",
        "train_questions": folder / "train.jsonl",
        "eval_questions": folder / "eval.jsonl",
        **changes,
    }


def check_user_data(directory: Path, data: dict) -> None:
    """The steps that look at the user's files; the model is left out."""
    for step in asset_steps(small_config(directory, data=data)):
        if step.name.startswith("check"):
            run_step(step)


def test_a_second_run_makes_nothing(prepared: Path) -> None:
    before = stamps(prepared)
    prepare_assets(small_config(prepared))
    assert stamps(prepared) == before


def test_the_corpus_has_the_countries_asked_for(prepared: Path) -> None:
    rows = [json.loads(line) for line in (prepared / "corpus.jsonl").read_text().splitlines()]
    assert len({row["id"].split("/")[0] for row in rows}) == COUNTRIES
    assert all(row["contents"].startswith('"') and '"\n' in row["contents"] for row in rows)


def test_train_and_eval_share_no_question(prepared: Path) -> None:
    train = read_questions(prepared / "questions" / "train.jsonl")
    held_out = read_questions(prepared / "questions" / "eval.jsonl")
    assert train
    assert held_out
    assert {q.question for q in train}.isdisjoint(q.question for q in held_out)


def test_a_truncated_corpus_is_remade_to_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    for name in ("corpus.jsonl", "corpus.jsonl.manifest.json"):
        shutil.copy(prepared / name, tmp_path / name)
    whole = (tmp_path / "corpus.jsonl").read_bytes()
    (tmp_path / "corpus.jsonl").write_bytes(whole[:-100])
    assert run_step(corpus_step(small_config(tmp_path))) is True
    assert (tmp_path / "corpus.jsonl").read_bytes() == whole


def test_another_number_of_countries_remakes_the_corpus(tmp_path: Path) -> None:
    assert run_step(corpus_step(small_config(tmp_path, data={"corpus_countries": 3}))) is True
    assert run_step(corpus_step(small_config(tmp_path, data={"corpus_countries": 4}))) is True
    assert run_step(corpus_step(small_config(tmp_path, data={"corpus_countries": 4}))) is False


def test_what_the_user_put_there_is_not_written_over(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(PASSAGE)
    with pytest.raises(PrepareError, match='not written over; set data.source = "folder"'):
        corpus_step(small_config(tmp_path, data={"corpus": mine}))
    assert mine.read_text() == PASSAGE


def test_user_rows_are_checked_once(tmp_path: Path) -> None:
    data = user_data(tmp_path / "mine")
    check_user_data(tmp_path, data)
    before = stamps(tmp_path)
    check_user_data(tmp_path, data)
    assert stamps(tmp_path) == before
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["corpus.jsonl", "eval.jsonl", "train.jsonl"]


def test_a_compressed_corpus_is_left_to_the_retriever(tmp_path: Path) -> None:
    data = user_data(tmp_path / "mine")
    data["corpus"].write_bytes(gzip.compress(PASSAGE.encode()))
    steps = asset_steps(small_config(tmp_path, data=data))
    assert [step.name for step in steps if step.name.startswith("check")] == ["check of train_questions", "check of eval_questions"]


def test_questions_of_another_format_are_converted_beside_ones_that_are_not(tmp_path: Path) -> None:
    data = user_data(tmp_path / "mine")
    (tmp_path / "mine" / "train.csv").write_text("question,answer\nWhy?,so\n")
    config = small_config(tmp_path, data=data | {"train_questions": tmp_path / "mine" / "train.csv"})
    for step in asset_steps(config):
        if step.name != "policy":
            run_step(step)
    assert [question.example_id for question in read_questions(config.data.train_path)] == ["train:1"]
    assert config.data.eval_path == data["eval_questions"]


def test_user_rows_are_checked_again_after_a_change(tmp_path: Path) -> None:
    data = user_data(tmp_path / "mine")
    check_user_data(tmp_path, data)
    data["eval_questions"].write_text(QUESTION + "{}\n")
    with pytest.raises(PrepareError, match=r"eval.jsonl:2: "):
        check_user_data(tmp_path, data)


def test_a_missing_user_file_is_named_with_its_key(tmp_path: Path) -> None:
    data = user_data(tmp_path / "mine")
    data["train_questions"].unlink()
    with pytest.raises(PrepareError, match="data.train_questions: no file at"):
        check_user_data(tmp_path, data)


def test_user_data_needs_demonstrations_for_a_warm_start(tmp_path: Path) -> None:
    config = small_config(tmp_path, data=user_data(tmp_path / "mine"))
    with pytest.raises(PrepareError, match=r"data.demonstrations: .*warm_start.epochs to 0"):
        prepare_demonstrations(config)


def test_without_a_warm_start_no_demonstrations_are_needed(tmp_path: Path) -> None:
    data, trainer = user_data(tmp_path / "mine"), {"warm_start": {"epochs": 0}}
    prepare_demonstrations(small_config(tmp_path, data=data, trainer=trainer))
    assert not (tmp_path / "demonstrations.jsonl").exists()


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "services.prepare", *arguments], capture_output=True, text=True, timeout=120)


def test_a_bad_configuration_exits_with_2_and_one_message(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[data]\ncountry_count = 3\n")
    result = run_cli("assets", "--config", str(path))
    assert result.returncode == 2
    assert "data.country_count: unknown key" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_model_folder_exits_with_1_and_one_message(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\nsource = "folder"\npath = "{tmp_path}/nowhere"\n[data]\ndirectory = "{tmp_path}"\n')
    result = run_cli("assets", "--config", str(path))
    assert result.returncode == 1
    assert result.stderr.startswith("prepare: model.path: no folder at")
    assert len(result.stderr.splitlines()) == 1
