"""Evaluations in one table: order of the sets, averages, published rows, the three files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from services.contract.config import ConfigError
from services.contract.eval_job import JOB, RESULTS, EvalJob, EvalResult
from services.contract.scores import FIGURES, Scores, by_source, score
from services.suite import score_files
from services.suite.cli import app
from services.suite.cli_models import _conclude
from services.suite.compare import read_side
from services.suite.published import in_order, published_rows, read_published
from services.suite.score_table import ScoreTable, as_markdown, make_table, read_evaluations

SEVEN = read_published().sets


def evaluated(folder: Path, right: dict[str, tuple[int, int]], job: EvalJob | None = None) -> Path:
    """A finished evaluation with (right answers, questions) of each set."""
    rows = [
        (name, [dict.fromkeys(FIGURES, float(number < correct))])
        for name, (correct, questions) in right.items()
        for number in range(questions)
    ]
    job = job or EvalJob("my/model", "abcdef123", [], [], 0, 1, 0.0, "search")
    result = EvalResult(job, score([figures for _, figures in rows]), by_source(rows), {}, 0, [0])
    folder.mkdir(parents=True)
    (folder / JOB).write_bytes(msgspec.json.encode(job))
    (folder / RESULTS).write_bytes(msgspec.json.encode(result))
    return folder


def table_of(*folders: Path, published: str = "none") -> ScoreTable:
    return make_table(read_evaluations([str(folder) for folder in folders]), published_rows(published))


def test_sets_stand_in_the_order_of_the_papers_and_others_after_them(tmp_path: Path) -> None:
    made = evaluated(tmp_path / "a", dict.fromkeys(("zeta", "musique", "nq", "alpha", "popqa"), (1, 2)))
    assert table_of(made).columns == ["nq", "popqa", "musique", "alpha", "zeta", "average"]
    assert in_order(reversed(SEVEN)) == SEVEN


def test_the_average_counts_every_set_alike_and_has_an_interval(tmp_path: Path) -> None:
    average = table_of(evaluated(tmp_path / "a", {"nq": (80, 100), "bamboogle": (1, 10)})).rows[0].average
    assert average and average.figures["exact_match"] == pytest.approx((0.8 + 0.1) / 2) and average.questions == 110
    low, high = average.intervals["exact_match"]
    assert 0.3 < low < 0.45 < high < 0.7 and high - 0.45 > 0.45 - low, "of few questions a low share is surer downwards"


def test_a_row_without_one_of_the_sets_has_no_average(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", {"nq": (1, 2), "popqa": (1, 2)}), evaluated(tmp_path / "b", {"nq": (1, 2)})
    table = table_of(a, b)
    assert [row.average is None for row in table.rows] == [False, True]
    assert "| –" in as_markdown(table)


def test_one_set_needs_no_average(tmp_path: Path) -> None:
    table = table_of(evaluated(tmp_path / "a", {"squad": (1, 2)}), published="")
    assert table.columns == ["squad"] and table.published == [], "nobody published a row of that set"


def test_rows_are_called_by_model_and_mode_unless_they_are_named(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {"nq": (1, 2)})
    job = EvalJob("my/model", "fedcba987", [], [], 0, 8, 0.7, "rag")
    b = evaluated(tmp_path / "b", {"nq": (1, 2)}, job)
    assert [row.name for row in table_of(a, b).rows] == ["model, search", "model, rag, 8 × T 0.7"]
    twin = evaluated(tmp_path / "c", {"nq": (1, 2)}, msgspec.structs.replace(job, samples=1, temperature=0.0, mode="search"))
    assert [row.name for row in table_of(a, twin).rows] == ["model, search (abcdef)", "model, search (fedcba)"]
    named = make_table(read_evaluations([f"trained={a}", f"RAG, starting={b}"]))
    assert [row.name for row in named.rows] == ["trained", "RAG, starting"]


def test_the_modes_of_one_evaluation_stand_for_themselves(tmp_path: Path) -> None:
    for mode in ("search", "direct"):
        evaluated(tmp_path / "all" / mode, {"nq": (1, 2)}, EvalJob("m", "d", [], [], 0, 1, 0.0, mode))  # type: ignore[arg-type]
    assert [row.name for row in table_of(tmp_path / "all").rows] == ["m, direct", "m, search"]
    named = make_table(read_evaluations([f"start={tmp_path / 'all'}"]))
    assert [row.name for row in named.rows] == ["start, direct", "start, search"]
    with pytest.raises(ConfigError, match="holds several evaluations: name one of .*direct, .*search"):
        read_side(str(tmp_path / "all"), tmp_path)


def test_rows_that_were_asked_differently_many_questions_say_so(tmp_path: Path) -> None:
    table = table_of(evaluated(tmp_path / "a", {"nq": (1, 1000)}), evaluated(tmp_path / "b", {"nq": (1, 20)}))
    assert table.asked("nq") == "20–1,000"


def test_what_is_no_finished_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no evaluation"):
        read_evaluations([str(tmp_path)])
    made = evaluated(tmp_path / "a", {"nq": (1, 2)})
    grown = msgspec.structs.replace(EvalJob("my/model", "abcdef123", [], [], 0, 1, 0.0, "search"), limit=500)
    (made / JOB).write_bytes(msgspec.json.encode(grown))
    with pytest.raises(ConfigError, match="is not finished"):
        read_evaluations([str(made)])


# -- published rows ----------------------------------------------------------------------------------------------------


def test_published_figures_have_the_average_that_is_printed_beside_them() -> None:
    for row in read_published().rows:
        assert sum(row.exact_match) / len(SEVEN) == pytest.approx(row.average, abs=0.00051), row.name


def test_published_rows_stand_below_with_their_source_and_the_average_of_the_sets_shown(tmp_path: Path) -> None:
    whole = as_markdown(table_of(evaluated(tmp_path / "a", dict.fromkeys(SEVEN, (1, 2))), published="3b base grpo"))
    (line,) = [line for line in whole.splitlines() if "*Search-R1 3B base, GRPO*" in line]
    assert [cell.strip() for cell in line.split("|")][2:-1] == ["42.1", "58.3", "41.3", "29.7", "27.4", "6.6", "12.8", "31.2"]
    assert "arxiv.org/abs/2503.09516, read 2026-" in whole
    two = as_markdown(table_of(evaluated(tmp_path / "b", {"nq": (1, 2), "popqa": (1, 2)}), published="3b base grpo"))
    (line,) = [line for line in two.splitlines() if "*Search-R1 3B base, GRPO*" in line]
    assert [cell.strip() for cell in line.split("|")][2:-1] == ["42.1", "41.3", "41.7"]


def test_published_rows_are_chosen_by_words_of_their_name() -> None:
    assert {row.name for row in published_rows("7B ppo")} == {"Search-R1 7B base, PPO", "Search-R1 7B instruct, PPO"}
    assert published_rows("none") == [] and len(published_rows()) == len(read_published().rows)


# -- files and the command ---------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_the_three_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = evaluated(tmp_path / "a", dict.fromkeys(SEVEN, (3, 10)))
    done = CliRunner().invoke(app, ["runs", "table", f"mine={made}", "--out", str(tmp_path / "out"), "--published", "3b"])
    assert done.exit_code == 0, done.output
    assert "| mine " in done.output and "*RAG 3B*" in done.output
    assert (tmp_path / "out" / "table.md").read_text().strip() in done.output
    data = json.loads((tmp_path / "out" / "table.json").read_text())
    assert data["rows"][0]["average"]["figures"]["exact_match"] == 0.3 and data["sets"] == SEVEN
    assert msgspec.convert(data["rows"][0]["sets"]["nq"], Scores).questions == 10
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_of_several_modes_ends_with_their_table_once_all_are_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = EvalJob("m", "d", [], [], 0, 1, 0.0, "direct")
    direct = evaluated(tmp_path / "direct", {"nq": (1, 4)}, job)
    unfinished = tmp_path / "search"
    unfinished.mkdir()
    (unfinished / JOB).write_bytes(msgspec.json.encode(msgspec.structs.replace(job, mode="search")))
    _conclude([direct, unfinished], tmp_path, "none", shown=True)
    assert not (tmp_path / "table.md").exists()
    _conclude([direct], tmp_path, "none", shown=True)
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out


def test_without_matplotlib_the_picture_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_files, "matplotlib_is_there", lambda: False)
    made = evaluated(tmp_path / "a", {"nq": (3, 10)})
    done = CliRunner().invoke(app, ["runs", "table", str(made), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and sorted(path.name for path in (tmp_path / "out").iterdir()) == ["table.json", "table.md"]


def test_a_name_that_is_nothing_is_told_by_the_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["runs", "table", str(tmp_path / "nowhere")])
    assert done.exit_code == 2 and "is no evaluation" in done.output
