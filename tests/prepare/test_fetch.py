"""What a configuration names by `hub:`: fetched, all of it, into its places, or refused with the key and the mend."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from services.contract.config import Config
from services.prepare import catalogue
from services.prepare.catalogue import Entry
from services.prepare.errors import PrepareError
from services.prepare.fetch import fetch, planned
from tests.prepare.conftest import small_config
from tests.prepare.hub_server import HubServer
from tests.prepare.small_hub import CONTENT, ENTRY, INDEX, QUICK, fetched, noise


@pytest.fixture
def small_catalogue(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of the small hub under names of their own."""
    monkeypatch.setattr(catalogue, "CATALOGUE", {entry.name: entry for entry in (ENTRY, INDEX)})


def hub_config(directory: Path, **data: object) -> Config:
    values = {"source": "folder", "corpus": "hub:corpus", "corpus_countries": 0, **data}
    return small_config(directory, data=values)


@pytest.mark.usefixtures("small_catalogue")
def test_a_configuration_gets_all_that_it_names(tmp_path: Path) -> None:
    config = hub_config(tmp_path, index="hub:index")
    fetch(config, QUICK)
    assert config.data.corpus_path.read_bytes() == CONTENT
    assert [path.stat().st_size for path in config.data.index_parts] == [14_000]


@pytest.mark.usefixtures("small_catalogue")
def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000))
    with pytest.raises(PrepareError, match=r"0.0 GB are needed.*corpus 0.0 GB, index 0.0 GB.*set data.directory to a larger disk"):
        fetch(hub_config(tmp_path, index="hub:index"), QUICK)
    assert hub.requests("/cdn/") == []


@pytest.mark.usefixtures("small_catalogue")
def test_two_at_once_on_one_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    with (tmp_path / "hub" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PrepareError, match="another process downloads here"):
            fetch(hub_config(tmp_path), QUICK)


def test_a_model_is_a_folder_without_other_formats_of_its_weights(hub: HubServer, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": noise(2000), "tokenizer.json": b"{}", "pytorch_model.bin": noise(9)}
    hub.add("owner/tiny", {**files, "onnx/model.onnx": b"o", "README.md": b"r"})
    config = small_config(tmp_path, model={"source": "folder", "path": "hub:owner/tiny"})
    fetch(config, QUICK)
    assert config.model_path == tmp_path / "hub" / "owner--tiny"
    found = sorted(path.name for path in config.model_path.iterdir())
    assert found == ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]


def test_a_reranker_may_be_named_as_an_encoder_may(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/judge", {"config.json": b"{}", "model.safetensors": noise(2000), "tokenizer.json": b"{}"})
    config = small_config(tmp_path, retriever={"encoder_family": "hashing", "rerank": {"model": "hub:owner/judge"}})
    fetch(config, QUICK)
    assert config.reranker_path == tmp_path / "hub" / "owner--judge"
    assert (config.reranker_path / "model.safetensors").stat().st_size == 2000


def test_a_repository_that_is_no_model_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/empty", {"config.json": b"{}"})
    with pytest.raises(PrepareError, match="hub:owner/empty: .* has no weights, no a tokenizer"):
        fetch(small_config(tmp_path, model={"source": "folder", "path": "hub:owner/empty"}), QUICK)


def test_files_of_an_earlier_try_do_not_stay_in_a_folder(hub: HubServer, tmp_path: Path) -> None:
    entry = Entry("bm25", "bm25", "someone/bm25", ("bm25/*",))
    hub.add("datasets/someone/bm25", {"bm25/segments_1": noise(2000), "other": b"o"})
    (tmp_path / ".bm25.partial").mkdir()
    (tmp_path / ".bm25.partial" / "segments_0").write_bytes(b"old")
    assert sorted(path.name for path in fetched(entry, tmp_path).iterdir()) == ["manifest.json", "segments_1"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"corpus": "hub:wiki-81"}, "data.corpus: the catalogue has no 'wiki-81'; did you mean hub:wiki-18?"),
        ({"corpus": "hub:wiki-18-e5"}, "data.corpus: hub:wiki-18-e5 is of the kind index, corpus is needed here"),
    ],
)
def test_a_wrong_name_is_told_with_its_key(tmp_path: Path, data: dict, message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        planned(hub_config(tmp_path, **data), QUICK)


def test_another_revision_of_a_name_forgets_the_digests_of_the_pinned_one() -> None:
    entry = catalogue.find_entry("wiki-18-e5@main", "data.index")
    assert (entry.revision, entry.repo, entry.sha256) == ("main", "PeterJinGo/wiki-18-e5-index", {})
