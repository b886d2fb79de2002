"""Which model of a run is meant, and its export: final, a version, a step; whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.contract.config import Config, ConfigError, load_config, save_config
from services.contract.weights import publish
from services.suite.cli import app
from services.suite.run_models import config_of, find_model, find_run
from tests.suite.conftest import configure


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """A run `test` of three steps: versions 2 and 3 are still published, checkpoints after steps 0 and 2, no final model."""
    config = configure(tmp_path, "redis://127.0.0.1:1/0", FORAGE_WEIGHTS__DIRECTORY=str(tmp_path / "weights"))
    config.run.folder.mkdir(parents=True)
    rows = [{"kind": "grpo", "step": step, "staleness/version": step} for step in (1, 2, 3)]
    (config.run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "torn")
    for version in (2, 3):
        publish(config.weights_folder, version, version - 1, lambda folder, v=version: write_model(folder, f"version {v}"))
    for serial, ledger in enumerate(({"step": 0}, {"step": 2, "warm_step": 4, "version": 2}), 1):
        publish(config.run.folder / "checkpoints", serial, 0, lambda folder, values=ledger: write_ledger(folder, values))
    save_config(config, config.run.folder / "config.toml")
    return config


def write_model(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(text)


def write_ledger(folder: Path, values: dict[str, int]) -> None:
    (folder / "ledger.json").write_text(json.dumps(values))


def chosen(config: Config, **wanted: int) -> str:
    model = find_model(config.run.folder, config, **wanted)
    return f"{model.kind} {model.path.name}"


def test_the_final_model_goes_before_the_newest_version(run: Config) -> None:
    assert chosen(run) == "folder v000003"
    write_model(run.run.folder / "final", "final")
    assert chosen(run) == "folder final"


def test_a_step_is_its_published_version_or_the_checkpoint_after_it(run: Config) -> None:
    assert chosen(run, step=3) == "folder v000003"
    publish(run.run.folder / "checkpoints", 3, 2, lambda folder: write_ledger(folder, {"step": 1, "warm_step": 4}))
    assert chosen(run, step=1) == "checkpoint v000003", "version 1 is gone from the volume"


def test_a_checkpoint_before_anything_was_learned_is_the_starting_model(run: Config) -> None:
    assert find_model(run.run.folder, run, step=0).path == run.model_path


@pytest.mark.parametrize("wanted", [{"version": 1}, {"step": 1}, {"step": 9}])
def test_what_is_not_kept_is_told_with_what_is(run: Config, wanted: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"no final model; versions 2, 3; checkpoints after steps 2, 0"):
        find_model(run.run.folder, run, **wanted)


def test_step_and_version_together_are_refused(run: Config) -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        find_model(run.run.folder, run, step=1, version=2)


def test_a_run_is_found_by_name_or_folder_and_others_are_named(run: Config) -> None:
    assert find_run("test", run.run.directory) == run.run.folder == find_run(str(run.run.folder), Path("elsewhere"))
    with pytest.raises(ConfigError, match=r"no run other: .*\(there: test\)"):
        find_run("other", run.run.directory)


def test_a_run_keeps_its_configuration_without_secrets(tmp_path: Path) -> None:
    environment = {"FORAGE_REDIS__PASSWORD": "hunter2", "FORAGE_RUN__NAME": "007", "FORAGE_TRAINER__STEPS": "3"}
    environment |= {
        "FORAGE_ROLLOUT__TURN_SEMANTICS": "slime",
        "FORAGE_ROLLOUT__MAX_TURNS": "3",
        "FORAGE_ROLLOUT__ENGINE__THREADS": "4",
    }
    config = load_config(None, environment)
    save_config(config, tmp_path / "config.toml")
    assert "hunter2" not in (tmp_path / "config.toml").read_text()
    assert load_config(tmp_path / "config.toml", {"FORAGE_REDIS__PASSWORD": "hunter2"}) == config


def test_a_run_without_a_configuration_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the run's configuration by --config"):
        config_of(tmp_path)


# -- forage export -----------------------------------------------------------------------------------------------------


def forage(config: Config, *arguments: str, code: int = 0) -> str:
    directory = {"FORAGE_RUN__DIRECTORY": str(config.run.directory)}
    done = CliRunner().invoke(app, list(arguments), env=directory)
    assert done.exit_code == code, done.output
    return done.output


def test_export_copies_a_version_without_its_manifest(run: Config, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model"
    assert "step 2, version 2" in forage(run, "export", "test", "--step", "2", "--to", str(target))
    assert (target / "model.safetensors").read_text() == "version 2"
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_export_never_writes_over_something(run: Config, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in forage(run, "export", "test", "--to", str(tmp_path / "out"), code=2)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_damaged_version_is_not_exported(run: Config, tmp_path: Path) -> None:
    (run.weights_folder / "v000003" / "model.safetensors").write_text("VERSION 3")
    assert "does not have the digest" in forage(run, "export", "test", "--to", str(tmp_path / "out"), code=2)
    assert not (tmp_path / "out").exists()


def test_runs_are_listed(run: Config) -> None:
    shown = forage(run, "runs", "list")
    assert "| test" in shown and "| 3 " in shown
