"""Questions in every format that people have them in, and what a broken row is told with."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pyarrow
import pyarrow.parquet
import pytest

from services.contract.config import Config, QuestionFile
from services.contract.messages import Question
from services.prepare.convert import convert_step, write_questions
from services.prepare.errors import PrepareError
from services.prepare.question_rows import Fault, Located, located, questions_of
from services.prepare.steps import run_step
from services.prepare.summary import report, summarize
from tests.prepare.conftest import small_config

PROMPT = [{"role": "user", "content": "Think, search, answer. Question: who wrote it?\n"}]
SEARCH_R1_ROW = {
    "id": "train_0",
    "question": "who wrote it?",
    "golden_answers": ["Ann", "Ann Lee"],
    "data_source": "nq",
    "prompt": PROMPT,
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Ann"]}},
    "extra_info": {"index": 0, "split": "train"},
    "metadata": {"context": ["long"] * 50},
}


def search_r1(path: Path, rows: list[dict[str, Any]], row_group_size: int = 100) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def read(path: Path, **options: Any) -> list[Question | Fault]:
    file = QuestionFile(path=path, **options)
    return list(questions_of(located(Config(), file, "data.train_questions")))


def only(found: list[Question | Fault]) -> Question:
    (question,) = found
    assert isinstance(question, Question), question
    return question


def fault(found: list[Question | Fault]) -> str:
    (fault,) = (row for row in found if isinstance(row, Fault))
    return fault.text


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_search_r1s_parquet_brings_its_prompt_and_its_targets(tmp_path: Path) -> None:
    question = only(read(search_r1(tmp_path / "train.parquet", [SEARCH_R1_ROW])))
    assert question == Question("train_0", "nq", "who wrote it?", ["Ann"], PROMPT)
    assert question.example_id == "nq:train_0"


def test_row_prompts_can_be_left_out(tmp_path: Path) -> None:
    assert only(read(search_r1(tmp_path / "train.parquet", [SEARCH_R1_ROW]), row_prompts=False)).prompt is None


def test_parquet_is_read_over_many_row_groups_in_order(tmp_path: Path) -> None:
    rows = [SEARCH_R1_ROW | {"id": f"train_{number}"} for number in range(2500)]
    found = read(search_r1(tmp_path / "train.parquet", rows, row_group_size=400))
    assert [question.id for question in found if isinstance(question, Question)] == [row["id"] for row in rows]


def test_of_parquet_only_the_columns_that_count_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = search_r1(tmp_path / "train.parquet", [SEARCH_R1_ROW])
    asked: list[list[str]] = []
    real = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, size, columns: asked.append(columns) or real(self, size, columns=columns),
    )
    read(path)
    assert asked == [["id", "question", "golden_answers", "data_source", "prompt", "reward_model"]]


def test_flashrags_rows_take_the_source_that_their_table_names(tmp_path: Path) -> None:
    row = {"id": "test_7", "question": "when?", "golden_answers": ["1918", "in 1918"], "metadata": {}}
    path = written(tmp_path / "test.jsonl", json.dumps(row) + "\n\n")
    assert only(read(path, source="nq")) == Question("test_7", "nq", "when?", ["1918", "in 1918"])
    assert only(read(path)).source == "test"


def test_a_csv_with_columns_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["nr", "ask", "gold"], [7, "Who, exactly?\nSay it.", "Ann; Ann Lee"]])
    columns = {"id": "nr", "question": "ask", "golden_answers": "gold"}
    found = only(read(path, columns=columns, answer_separator=";"))
    assert found == Question("7", "mine", "Who, exactly?\nSay it.", ["Ann", "Ann Lee"])


@pytest.mark.parametrize(("cell", "answers"), [('["a", "b"]', ["a", "b"]), ("[sic] yes", ["[sic] yes"]), ("a; b", ["a; b"])])
def test_a_csv_cell_is_one_answer_or_a_json_list(tmp_path: Path, cell: str, answers: list[str]) -> None:
    path = tmp_path / "mine.tsv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["question", "answer"], ["Why?", cell]])
    assert only(read(path)).golden_answers == answers


def test_squad_without_its_unanswerable_questions(tmp_path: Path) -> None:
    asked = [
        {"id": "a1", "question": "Who?", "answers": [{"text": "Ann"}, {"text": "Ann"}, {"text": "Lee"}]},
        {"id": "a2", "question": "What?", "answers": [], "is_impossible": True},
    ]
    content = {"version": "2", "data": [{"title": "T", "paragraphs": [{"context": "…", "qas": asked}]}]}
    assert only(read(written(tmp_path / "dev.json", json.dumps(content)))) == Question("a1", "dev", "Who?", ["Ann", "Lee"])


def test_compressed_lines_are_told_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"question": "Who?", "answers": "Ann"}\n'))
    assert only(read(path)) == Question("1", "dev", "Who?", ["Ann"])


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", "".join(f'{{"id": {n}, "question": "Q{n}?", "answer": "A"}}\n' for n in range(9)))
    assert [question.id for question in read(path, limit=2) if isinstance(question, Question)] == ["0", "1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Who?"', "q.jsonl:2: .*each line must be one JSON object"),
        ('{"question": " ", "answer": "A"}', "q.jsonl:2: `question` needs a text .*columns.question"),
        ('{"ask": "Who?", "answer": "A"}', r"q.jsonl:2: `question` needs a text \(the row holds ask, answer\)"),
        ('{"question": "Who?", "answers": []}', "q.jsonl:2: .*`golden_answers`.* needs at least one answer"),
        ('{"question": "Who?", "answers": ["a", " "]}', "none may be empty"),
        ('{"question": "Who?", "answers": ["a"], "prompt": 3}', "`prompt` must be a text or chat messages"),
        ('{"question": "Who?", "answers": ["a"], "prompt": [{"role": "user"}]}', "q.jsonl:2: .*has no role or no content"),
    ],
)
def test_a_broken_row_is_told_with_its_place_and_mend(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path / "q.jsonl", '{"question": "Fine?", "answer": "yes"}\n' + line + "\n")
    with pytest.raises(PrepareError, match=message):
        write_questions([located(Config(), QuestionFile(path=path), "data.train_questions")], tmp_path / "out", "train_questions")


def test_a_broken_csv_row_is_told_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "q.csv", "question,answer\nWho, exactly?,Ann\nWhy?,so\n")
    assert "q.csv:2: more cells than the first line has names" in fault(read(path))


def test_a_broken_parquet_row_is_told_with_its_number(tmp_path: Path) -> None:
    rows = [SEARCH_R1_ROW, SEARCH_R1_ROW | {"reward_model": {"style": "rule", "ground_truth": {"target": []}}}]
    assert "train.parquet, row 2: `reward_model.ground_truth.target`" in fault(read(search_r1(tmp_path / "train.parquet", rows)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.parquet", b"no parquet at all", "damaged, or not parquet"),
        ("q.json", b"{}\n{}", "if every line is a JSON object of its own, name it .jsonl"),
        ("q.json", b'{"rows": []}', "neither SQuAD"),
        ("q.xlsx", b"", r"questions come as \.jsonl, \.csv"),
        ("q.jsonl", b"\n", "holds no row"),
        ("q.csv", b"question,answer\n", "holds no row"),
        ("q.jsonl", b"\xff\xfe", "must be UTF-8 text"),
        ("q.jsonl", gzip.compress(b'{"question": "?"}')[:-9], "cannot be read"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrepareError, match=message):
        read(tmp_path / name)


# -- conversion and configuration --------------------------------------------------------------------------------------


def config_of(tmp_path: Path, *files: dict[str, Any]) -> Config:
    return small_config(tmp_path / "data", data={"source": "folder", "train_questions": list(files), "corpus_countries": 0})


def convert(config: Config) -> list[Question]:
    run_step(convert_step(config, "train_questions", config.data.train_path))
    return [msgspec.json.decode(line, type=Question) for line in config.data.train_path.read_bytes().splitlines()]


def test_files_of_different_formats_become_one(tmp_path: Path) -> None:
    parquet = search_r1(tmp_path / "train.parquet", [SEARCH_R1_ROW])
    lines = written(tmp_path / "own.jsonl", '{"id": "train_0", "question": "Why?", "answer": "so"}\n')
    found = convert(config_of(tmp_path, {"path": parquet}, {"path": lines}))
    assert [question.example_id for question in found] == ["nq:train_0", "own:train_0"]


def test_a_key_that_two_files_share_is_refused(tmp_path: Path) -> None:
    lines = written(tmp_path / "own.jsonl", '{"id": "1", "question": "Why?", "answer": "so"}\n')
    with pytest.raises(PrepareError, match=r"the key own:1 .*stands there twice, or in two files; give each file a `source`"):
        convert(config_of(tmp_path, {"path": lines}, {"path": lines}))
    assert not (tmp_path / "data" / "questions" / "train.jsonl").exists()


def test_conversion_is_made_again_only_after_a_change(tmp_path: Path) -> None:
    lines = written(tmp_path / "own.jsonl", '{"id": "1", "question": "Why?", "answer": "so"}\n')
    config = config_of(tmp_path, {"path": lines})
    convert(config)
    assert run_step(convert_step(config, "train_questions", config.data.train_path)) is False
    other = config_of(tmp_path, {"path": lines, "source": "mine"})
    assert [question.source for question in convert(other)] == ["mine"]


def test_a_split_of_a_name_is_its_file_and_its_source(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    found = located(config, QuestionFile(path=Path("hub:flashrag-nq"), split="test"), "data.eval_questions")
    assert (found.path, found.source) == (tmp_path / "hub" / "flashrag-nq" / "nq" / "test.jsonl", "nq")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"path": "hub:nq-hotpotqa"}, "has several files; set split to one of train, test"),
        ({"path": "hub:nq-hotpotqa", "split": "dev"}, "has no split 'dev'; set it to one of train, test"),
        ({"path": "mine.csv", "split": "dev"}, "`split` is for hub:NAME"),
    ],
)
def test_a_split_that_is_not_there(file: dict[str, Any], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        located(Config(), QuestionFile(**file), "data.train_questions")


# -- forage data check -------------------------------------------------------------------------------------------------


def summary_of(path: Path, **options: Any) -> Any:
    return summarize(path.stem, [Located(QuestionFile(path=path, **options), path, path.stem)])


def test_a_summary_counts_rows_repeats_and_faults(tmp_path: Path) -> None:
    rows = [
        '{"id": "1", "question": "Who wrote it?", "answers": ["Ann", "Ann Lee"]}',
        '{"id": "1", "question": "who WROTE it", "answers": ["A B C"]}',
        "{}",
    ]
    summary = summary_of(written(tmp_path / "q.jsonl", "\n".join(rows)))
    assert (summary.rows, summary.broken, summary.repeated_keys, summary.repeated_questions) == (2, 1, 1, 1)
    assert summary.sources["q"].answer_words == [1, 3]
    assert not summary.usable


def test_the_report_tells_what_train_and_test_share(tmp_path: Path) -> None:
    train = summary_of(
        written(tmp_path / "train.jsonl", '{"question": "Who?", "answer": "A"}\n{"question": "Why?", "answer": "B"}')
    )
    test = summary_of(written(tmp_path / "test.jsonl", '{"question": "why", "answer": "B"}'))
    assert "train and test have 1 questions in common (100.00% of test)" in report([train, test])


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.suite", "data", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_exits_with_1_when_a_row_cannot_be_used(tmp_path: Path) -> None:
    good = written(tmp_path / "good.jsonl", '{"question": "Who?", "answer": "A"}\n')
    bad = written(tmp_path / "bad.jsonl", '{"question": "Who?"}\n')
    assert run_check(str(good)).returncode == 0
    done = run_check(str(good), str(bad))
    assert done.returncode == 1
    assert "bad.jsonl:1: " in done.stdout
