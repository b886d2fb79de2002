"""Which reference policy a run loads, and which are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.contract.config import ConfigError
from services.contract.weights import publish
from services.trainer.durable.reference import forget_references, kept_reference, reference_folder, refresh_is_due
from services.trainer.durable.room import copy_durably


def written(run: Path, *steps: int) -> None:
    for step in steps:
        reference_folder(run, step).mkdir()


def test_the_one_of_the_ledgers_step_is_loaded(tmp_path: Path) -> None:
    written(tmp_path, 0, 10, 20)
    found = [kept_reference(tmp_path, step, Path("start")).name for step in (0, 10, 20)]
    assert found == ["reference", "reference-000010", "reference-000020"]


@pytest.mark.parametrize(
    ("step", "reference_step", "every", "due"),
    [(1, 0, 0, False), (4, 0, 5, False), (5, 0, 5, True), (9, 5, 5, False), (10, 5, 5, True), (12, 5, 5, True)],
)
def test_it_is_refreshed_every_so_many_steps_also_when_one_was_missed(
    step: int, reference_step: int, every: int, due: bool
) -> None:
    assert refresh_is_due(step, reference_step, every) == due


def test_without_a_warm_start_it_is_the_starting_model(tmp_path: Path) -> None:
    assert kept_reference(tmp_path, 0, Path("start")) == Path("start")


def test_after_a_warm_start_that_kept_none_the_starting_model_does_not_stand_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never kept because trainer.objective.kl_coef was 0 when GRPO began"):
        kept_reference(tmp_path, 0, None)


def test_a_refreshed_one_that_is_gone_is_no_reason_to_take_another(tmp_path: Path) -> None:
    written(tmp_path, 0)
    with pytest.raises(ConfigError, match="reference-000010 is gone: put that policy there"):
        kept_reference(tmp_path, 10, Path("start"))


def test_an_altered_one_is_refused(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text("weights")

    version = publish(tmp_path / "weights", 1, 0, write)
    copy_durably(version, reference_folder(tmp_path, 0))
    assert kept_reference(tmp_path, 0, None) == tmp_path / "reference"
    (tmp_path / "reference" / "model.safetensors").write_text("weightz")
    with pytest.raises(ConfigError, match="the reference policy is damaged: .*put that policy there"):
        kept_reference(tmp_path, 0, None)


def test_those_that_a_checkpoint_names_are_kept_and_the_first_one_always(tmp_path: Path) -> None:
    written(tmp_path, 0, 5, 10, 15, 20)
    forget_references(tmp_path, {0, 5, 15})
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["reference", "reference-000005", "reference-000015"]
