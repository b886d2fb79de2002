"""`index`: skipped when whole, resumed when killed, refused by the server when it does not belong."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.contract.config import Config, show_config
from services.retriever.build import build_index
from services.retriever.errors import CorpusError, IndexMismatch, RetrieverError
from services.retriever.files import sole_writer
from services.retriever.hashing import HashingEncoder
from tests.retriever.conftest import first_row, load, make_config, passage, query, with_settings, write_corpus


@pytest.fixture
def built(tmp_path: Path) -> Config:
    config = make_config(tmp_path, rows=70)
    build_index(config)
    return config


def files(config: Config) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in config.data.index_folder.iterdir() if path.name != ".lock"}


def edit_manifest(config: Config, **changes: Any) -> None:
    path = config.data.index_folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_manifest_says_what_the_index_was_built_from(built: Config) -> None:
    manifest = json.loads((built.data.index_folder / "manifest.json").read_text())
    assert manifest["family"] == "hashing"
    assert manifest["rows"] == 70
    assert manifest["dimension"] == 1024
    assert manifest["metric"] == "inner_product"
    assert manifest["factory"] == "Flat"
    assert manifest["index_bytes"] == (built.data.index_folder / "index.faiss").stat().st_size
    assert {"encoder", "encoder_digest", "query_prefix", "pooling", "corpus_sha256", "index_sha256"} <= manifest.keys()


def test_embeddings_are_in_corpus_order(built: Config) -> None:
    stored = np.load(built.data.index_folder / "embeddings.npy")
    assert np.array_equal(stored, HashingEncoder().encode([passage(n)["contents"] for n in range(70)], "passage"))


def test_second_build_does_nothing_and_says_so_in_one_line(built: Config, caplog: pytest.LogCaptureFixture) -> None:
    before = files(built)
    with caplog.at_level(logging.INFO):
        build_index(built)
    assert files(built) == before
    assert [record.message for record in caplog.records if "nothing to do" in record.message] == [caplog.records[-1].message]
    assert len(caplog.records) == 1


def test_changed_corpus_is_rebuilt(built: Config) -> None:
    write_corpus(built.data.corpus_path, [passage(n) for n in range(40)])
    assert build_index(built).rows == 40
    assert first_row(load(built), query(39)) == 39


def test_touched_but_equal_corpus_is_not_rebuilt(built: Config) -> None:
    os.utime(built.data.corpus_path, ns=(1, 1))
    before = files(built)
    build_index(built)
    assert files(built) == before


def test_another_factory_uses_the_embeddings_again(built: Config, caplog: pytest.LogCaptureFixture) -> None:
    before = files(built)
    with caplog.at_level(logging.INFO):
        build_index(with_settings(built, index_factory="HNSW16"))
    assert "used again" in caplog.text
    assert files(built)["embeddings.npy"] == before["embeddings.npy"]
    assert first_row(load(with_settings(built, index_factory="HNSW16")), query(3)) == 3


def test_lost_embeddings_are_encoded_again(built: Config) -> None:
    for name in ("manifest.json", "embeddings.npy"):
        (built.data.index_folder / name).unlink()
    build_index(built)
    assert first_row(load(built), query(69)) == 69


def test_truncated_index_is_rebuilt(built: Config) -> None:
    index = built.data.index_folder / "index.faiss"
    whole = index.read_bytes()
    index.write_bytes(whole[:100])
    build_index(built)
    assert index.read_bytes() == whole


def test_unreadable_manifest_is_rebuilt(built: Config) -> None:
    (built.data.index_folder / "manifest.json").write_text("{")
    build_index(built)
    assert first_row(load(built), query(3)) == 3


def test_broken_line_stops_before_encoding(tmp_path: Path) -> None:
    config = make_config(tmp_path, rows=150)
    with config.data.corpus_path.open("a") as corpus:
        corpus.write("{broken\n")
    with pytest.raises(CorpusError, match="corpus.jsonl:151: "):
        build_index(config)
    assert not (config.data.index_folder / "embeddings.npy.part").exists()


def test_bad_factory_stops_before_encoding(tmp_path: Path) -> None:
    config = make_config(tmp_path, rows=5, index_factory="Nonsense")
    with pytest.raises(RetrieverError, match="retriever.index_factory 'Nonsense'"):
        build_index(config)
    assert not (config.data.index_folder / "embeddings.npy.part").exists()


def test_two_builders_do_not_share_a_folder(built: Config) -> None:
    with sole_writer(built.data.index_folder), pytest.raises(RetrieverError, match="another process is building"):
        build_index(built)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder_digest", "other"),
        ("family", "e5"),
        ("query_prefix", "query: "),
        ("passage_prefix", "passage: "),
        ("pooling", "cls"),
        ("normalized", False),
        ("max_tokens", 128),
        ("dimension", 768),
        ("rows", 69),
        ("factory", "HNSW32"),
        ("metric", "l2"),
        ("index_bytes", 5),
        ("index_sha256", "other"),
    ],
)
def test_loading_refuses_a_mismatch_and_names_field_and_mend(built: Config, field: str, value: object) -> None:
    edit_manifest(built, **{field: value})
    with pytest.raises(IndexMismatch, match=rf"{field}.*Rebuild it: REBUILD$"):
        load(built)


def test_loading_refuses_a_changed_corpus(built: Config) -> None:
    text = built.data.corpus_path.read_text()
    built.data.corpus_path.write_text(text.replace("violin", "guitar"))
    with pytest.raises(IndexMismatch, match="corpus_sha256 is .*the corpus has changed"):
        load(built)


def test_loading_refuses_a_flipped_bit(built: Config) -> None:
    index = built.data.index_folder / "index.faiss"
    content = bytearray(index.read_bytes())
    content[5000] ^= 1
    index.write_bytes(content)
    with pytest.raises(IndexMismatch, match="index_sha256"):
        load(built)


def test_loading_without_an_index_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(IndexMismatch, match=r"manifest.json is missing.*REBUILD"):
        load(make_config(tmp_path))


@pytest.mark.parametrize(
    ("limit", "factory", "says"),
    [
        (100_000, "Flat", "embeddings.npy.part: no room for 286,720 bytes of embeddings"),
        (290_000, "HNSW16", "index.faiss: cannot be written"),
    ],
)
def test_full_disk_is_told_and_leaves_nothing_that_looks_whole(tmp_path: Path, limit: int, factory: str, says: str) -> None:
    """A limit on the size of files stands for a full disk: the same calls fail."""
    config = make_config(tmp_path / "data", rows=70, index_factory=factory)
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "from services.retriever.__main__ import main; main()"
    )
    path = tmp_path / "run.toml"
    path.write_text(show_config(config))
    ended = subprocess.run([sys.executable, "-c", script, "index", "build", "--config", str(path)], capture_output=True, text=True)
    assert ended.returncode == 1
    assert says in ended.stderr
    assert "free some or move data.directory" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (config.data.index_folder / "manifest.json").exists()
    assert not (config.data.index_folder / "index.faiss").exists()
    assert not list(config.data.index_folder.glob("*.tmp"))
    assert build_index(config).rows == 70


def test_bad_search_parameters_stop_before_encoding(tmp_path: Path) -> None:
    config = make_config(tmp_path, rows=5, index_search="nprobe=4")
    with pytest.raises(RetrieverError, match=r"retriever.index_search 'nprobe=4'.*no 'nprobe'"):
        build_index(config)
    assert not (config.data.index_folder / "embeddings.npy.part").exists()


def test_mapped_index_is_served_without_reading_its_digest(built: Config) -> None:
    mapped = with_settings(built, index_mmap=True)
    edit_manifest(built, index_sha256="other")
    assert first_row(load(mapped), query(3)) == 3
    os.utime(built.data.index_folder / "index.faiss", ns=(1, 1))
    with pytest.raises(IndexMismatch, match="index_sha256"):
        load(mapped)
