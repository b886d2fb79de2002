"""Two evaluations or runs side by side: paired questions, the tests, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from services.contract.eval_job import ANSWERS, JOB, EvalJob
from services.contract.scores import Answer
from services.suite.cli import app
from services.suite.compare import comparison, differences, read_side, sets_of

QUICKSTART = Path(__file__).parents[2] / "docs" / "quickstart-run"
JOBS = EvalJob("m", "d", [], [], 0, 1, 0.0, "search")


def evaluated(folder: Path, matches: dict[str, list[int]], job: EvalJob = JOBS) -> str:
    """An evaluation whose questions have these exact matches, one a sample."""
    folder.mkdir()
    answers = [
        Answer(f"q{name}/{sample}", "nq", f"Question {name}?", {"exact_match": m, "f1": m / 2, "format": 1.0}, 1, "x")
        for name, found in matches.items()
        for sample, m in enumerate(found)
    ]
    (folder / ANSWERS).write_bytes(b"".join(msgspec.json.encode(answer) + b"\n" for answer in answers))
    (folder / JOB).write_bytes(msgspec.json.encode(job))
    return str(folder)


def test_only_questions_that_both_answered_are_paired(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {"1": [1], "2": [0], "3": [1]})
    b = evaluated(tmp_path / "b", {"2": [1], "3": [1], "4": [1]})
    match = differences(read_side(a, tmp_path), read_side(b, tmp_path))[0]
    assert (match.figure, match.a, match.b) == ("exact_match", 0.5, 1.0)
    assert match.test == "McNemar, 1 won, 0 lost" and match.p == 1.0


def test_a_clear_difference_is_significant_by_the_exact_test(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {str(i): [0] for i in range(8)})
    b = evaluated(tmp_path / "b", {str(i): [int(i > 0)] for i in range(8)})
    found = {d.figure: d for d in differences(read_side(a, tmp_path), read_side(b, tmp_path))}
    assert found["exact_match"].p == pytest.approx(2 / 2**7)
    assert found["f1"].test == "paired bootstrap" and found["f1"].low > 0
    assert found["format"].p == 1.0 and found["format"].low == found["format"].high == 0.0


def test_several_samples_are_compared_by_their_means(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {"1": [0, 1], "2": [0, 0]})
    b = evaluated(tmp_path / "b", {"1": [1, 1], "2": [1, 0]})
    match = differences(read_side(a, tmp_path), read_side(b, tmp_path))[0]
    assert (match.a, match.b, match.test) == (0.25, 0.75, "paired bootstrap")


def test_an_answer_without_a_search_counts_in_a_mode_that_may_not_search(tmp_path: Path) -> None:
    direct = msgspec.structs.replace(JOBS, mode="direct")
    a, b = evaluated(tmp_path / "a", {"1": [1]}, direct), evaluated(tmp_path / "b", {"1": [1]})
    for name in (a, b):
        path = Path(name) / ANSWERS
        path.write_text(path.read_text().replace('"searches":1', '"searches":0'))
    answered = differences(read_side(a, tmp_path), read_side(b, tmp_path))[-1]
    assert (answered.figure, answered.a, answered.b) == ("answered", 1.0, 0.0)


def test_several_kinds_of_question_are_compared_each_by_itself_too(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {str(i): [0] for i in range(8)})
    b = evaluated(tmp_path / "b", {str(i): [int(i > 3)] for i in range(8)})
    for name in (a, b):  # the first four are of another kind
        path = Path(name) / ANSWERS
        lines = path.read_text().splitlines()
        path.write_text("\n".join([line.replace('"nq"', '"popqa"') for line in lines[:4]] + lines[4:]) + "\n")
    sides = read_side(a, tmp_path), read_side(b, tmp_path)
    assert sets_of(*sides) == ["nq", "popqa"]
    assert [differences(*sides, source)[0].b for source in ("nq", "popqa")] == [1.0, 0.0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in comparison(*sides).splitlines() if line.startswith("| ")]
    assert ["nq", "4", "0.000", "1.000", "+1.000 (+1.000 to +1.000)", "0.12", "McNemar, 4 won, 0 lost"] in rows
    assert ["popqa", "4", "0.000", "0.000", "+0.000 (+0.000 to +0.000)", "1", "McNemar, 0 won, 0 lost"] in rows


def test_nothing_in_common_is_said(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", {"1": [1]}), evaluated(tmp_path / "b", {"2": [1]})
    assert "nothing can be paired" in comparison(read_side(a, tmp_path), read_side(b, tmp_path))


def make_run(folder: Path, correct: int) -> str:
    """The quickstart's journal, and answers for the evaluation that it ends with."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text((QUICKSTART / "metrics.jsonl").read_text())
    rows = [{"id": f"e{i}/0", "source": "s", "question": f"{i}?", "parts": {"exact_match": float(i < correct)}} for i in range(10)]
    (folder / "evaluations" / "grpo-step000014.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_runs_are_compared_by_their_last_steps_and_their_last_evaluation(tmp_path: Path) -> None:
    by_folder = make_run(tmp_path / "a", 2)
    make_run(tmp_path / "b", 9)
    text = comparison(read_side(by_folder, tmp_path), read_side("b", tmp_path))
    assert "GRPO steps 14 and 14" in text and "| search/per_episode" in text
    assert "evaluation grpo at step 14" in text and "McNemar, 7 won, 0 lost" in text


@pytest.mark.parametrize("kind", ["runs", "evaluations"])
def test_the_command_prints_and_draws(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    make = make_run if kind == "runs" else lambda folder, n: evaluated(folder, {str(i): [int(i < n)] for i in range(10)})
    a, b, picture = make(tmp_path / "a", 2), make(tmp_path / "b", 9), tmp_path / "out.png"
    done = CliRunner().invoke(app, ["runs", "compare", a, b, "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    assert "+0.700" in done.output and picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_refused_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)  # as if it were not installed
    a, b = evaluated(tmp_path / "a", {"1": [1]}), evaluated(tmp_path / "b", {"1": [0]})
    done = CliRunner().invoke(app, ["runs", "compare", a, b, "--plot", str(tmp_path / "out.png")])
    assert done.exit_code == 2 and "pip install 'forage[plots]'" in done.output
