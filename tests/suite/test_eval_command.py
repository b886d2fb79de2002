"""`forage eval` before anything runs: which model, which folder, which services, and what cannot be meant."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import msgspec
import pytest
from typer.testing import CliRunner

from services.contract.config import ConfigError, save_config
from services.contract.eval_job import EvalJob, evaluations_in, read_job
from services.suite.cli import app
from services.suite.cli_models import _modes, _several
from services.suite.evaluate import (
    claim_folder,
    claim_folders,
    default_folder,
    make_supervisor,
    model_digest,
    model_folder,
    refuse_unknown_sources,
)
from tests.conftest import free_port
from tests.suite.conftest import configure

JOB = EvalJob("my model", "abcdef123", ["/q.jsonl"], [], 100, 1, 0.0, "search")


def changed(**changes: object) -> EvalJob:
    return msgspec.structs.replace(JOB, **changes)


@pytest.mark.parametrize(
    "changes", [{"limit": 500}, {"sources": ["nq"]}, {"questions": ["/other.jsonl"]}, {"model": "by another path"}]
)
def test_another_choice_of_questions_goes_on_in_the_same_folder(tmp_path: Path, changes: dict[str, object]) -> None:
    claim_folder(tmp_path / "out", JOB)
    claim_folder(tmp_path / "out", changed(**changes))
    assert read_job(tmp_path / "out") == changed(**changes)


@pytest.mark.parametrize("changes", [{"mode": "rag"}, {"samples": 4, "temperature": 0.7}, {"model_digest": "other"}])
def test_answers_of_another_evaluation_are_never_mixed_in(tmp_path: Path, changes: dict[str, object]) -> None:
    claim_folder(tmp_path / "out", JOB)
    with pytest.raises(ConfigError, match=f"holds answers of another evaluation .*{next(iter(changes))}.*--out"):
        claim_folder(tmp_path / "out", changed(**changes))
    assert read_job(tmp_path / "out") == JOB


def test_the_folder_is_named_after_model_mode_and_weights(tmp_path: Path) -> None:
    assert default_folder([JOB], tmp_path / "runs") == tmp_path / "evals" / "my-model-search-abcdef"
    assert default_folder([JOB, changed(mode="rag")], tmp_path / "runs") == tmp_path / "evals" / "my-model-abcdef"


def test_several_modes_have_a_folder_each_and_one_is_the_folder_itself(tmp_path: Path) -> None:
    direct, search = changed(mode="direct"), JOB
    assert claim_folders(tmp_path / "one", [search]) == [tmp_path / "one"]
    assert claim_folders(tmp_path / "two", [direct, search]) == [tmp_path / "two" / "direct", tmp_path / "two" / "search"]
    assert read_job(tmp_path / "two" / "direct") == direct and evaluations_in(tmp_path / "two") == [
        tmp_path / "two" / "direct",
        tmp_path / "two" / "search",
    ]


def test_a_set_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": "1", "source": "nq"}\n{"id": "2", "source": "popqa"}\nbroken\n')
    config = configure(tmp_path, "redis://127.0.0.1:1/0")
    refuse_unknown_sources(config, changed(questions=[str(questions)], sources=["nq"]))
    with pytest.raises(ConfigError, match="no question is of the kind musique; these files have nq, popqa"):
        refuse_unknown_sources(config, changed(questions=[str(questions)], sources=["nq", "musique"]))
    refuse_unknown_sources(config, changed(questions=[str(tmp_path / "not-made-yet.jsonl")], sources=["musique"]))


def write_model(folder: Path, weights: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


def test_two_models_under_one_path_have_two_digests(tmp_path: Path) -> None:
    first = model_digest(write_model(tmp_path / "model", "one"))
    assert first == model_digest(tmp_path / "model") != model_digest(write_model(tmp_path / "model", "two"))


def test_a_run_is_scored_with_its_final_model_and_its_own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(tmp_path, "redis://127.0.0.1:1/0")
    write_model(config.run.folder / "final", "x")
    (config.run.folder / "metrics.jsonl").write_text("")
    monkeypatch.setenv("FORAGE_RUN__DIRECTORY", str(config.run.directory))
    given = tmp_path / "given.toml"
    given.write_text("")
    assert model_folder("test", str(given)) == (config.run.folder / "final", str(given))
    save_config(config, config.run.folder / "config.toml")
    assert model_folder("test", str(given)) == (config.run.folder / "final", str(config.run.folder / "config.toml"))


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def services_for(folder: Path, job: EvalJob, retriever_port: int) -> list[str]:
    folders = claim_folders(folder / "out", [job])
    (folder / "empty.toml").write_text("")
    address = {"FORAGE_RETRIEVER__PORT": str(retriever_port), "FORAGE_RETRIEVER__URL": f"http://127.0.0.1:{retriever_port}"}
    address |= {"FORAGE_DATA__DIRECTORY": str(folder / "data")}
    supervisor = make_supervisor(str(folder / "empty.toml"), folder, folders, folder / "out" / "suite", 2, address)
    assert supervisor.plan[-1].final and supervisor.environment["FORAGE_MODEL__PATH"] == str(folder)
    return [service.name for service in supervisor.plan]


def test_it_starts_the_retriever_only_where_one_is_needed_and_none_runs(tmp_path: Path) -> None:
    playing = ["reward", "rollout-1", "rollout-2", "evaluator"]
    searching = ["redis", "prepare", "index", "retriever", *playing]
    assert services_for(tmp_path, JOB, free_port()) == searching
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ready)
    Thread(target=server.serve_forever, daemon=True).start()
    assert services_for(tmp_path, JOB, server.server_port) == ["redis", *playing]
    server.shutdown()
    server.server_close()
    direct = tmp_path / "direct"
    direct.mkdir()
    assert services_for(direct, changed(mode="direct"), free_port()) == ["redis", *playing]
    own = tmp_path / "own"
    own.mkdir()
    assert services_for(own, changed(mode="direct", questions=[]), free_port()) == searching, "prepare makes the questions"


def test_modes_and_sets_may_be_listed_or_repeated() -> None:
    assert _several(["nq, popqa", "nq", "musique"]) == ["nq", "popqa", "musique"]
    assert _modes(["search,direct"]) == _modes(["search", "direct"]) == ["direct", "search"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the model by --model"),
        (["--model", "x", "--running"], "name the model by --model"),
        (["--model", "x", "--mode", "search,guess"], "--mode guess is unknown: use some of direct, rag, search"),
        (["--model", "x", "--mode", ","], "--mode names none"),
        (["--model", "x", "--published", "70b"], "no published row has that in its name; there are Search-R1 3B base, GRPO"),
        (["--model", "x", "--samples", "4", "--temperature", "0"], "set --temperature above 0"),
        (["--model", "nowhere"], "no run nowhere"),
        (["--running"], "cannot be reached"),
    ],
)
def test_what_cannot_be_meant_is_told(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty.toml").write_text("")
    environment = {"FORAGE_RUN__DIRECTORY": str(tmp_path), "FORAGE_REDIS__URL": f"redis://127.0.0.1:{free_port()}/0"}
    done = CliRunner().invoke(app, ["eval", *arguments, "-c", str(tmp_path / "empty.toml")], env=environment)
    assert done.exit_code == 2 and message in done.output
