"""`index`: skipped when whole, resumed when killed, refused by the server when it does not belong."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.contract.config import Config, dump_config
from services.retriever.build import build_index, plan_batches
from services.retriever.encoder import HashingEncoder
from services.retriever.errors import CorpusError, IndexMismatch, RetrieverError
from services.retriever.files import sole_writer
from tests.retriever.conftest import load, make_config, passage, query, with_settings, write_corpus


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


def test_plan_covers_every_row_once_and_is_repeatable() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 333)
    plan = plan_batches(lengths)
    assert sorted(np.concatenate(plan).tolist()) == list(range(333))
    assert all(np.array_equal(a, b) for a, b in zip(plan, plan_batches(lengths), strict=True))
    spread = [int(lengths[rows].max() - lengths[rows].min()) for rows in plan]
    assert max(spread) < 300  # of 990, were they not sorted


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
    assert load(built).search([query(39)], [1])[0][0].row == 39


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
    assert load(with_settings(built, index_factory="HNSW16")).search([query(3)], [1])[0][0].row == 3


def test_lost_embeddings_are_encoded_again(built: Config) -> None:
    for name in ("manifest.json", "embeddings.npy"):
        (built.data.index_folder / name).unlink()
    build_index(built)
    assert load(built).search([query(69)], [1])[0][0].row == 69


def test_truncated_index_is_rebuilt(built: Config) -> None:
    index = built.data.index_folder / "index.faiss"
    whole = index.read_bytes()
    index.write_bytes(whole[:100])
    build_index(built)
    assert index.read_bytes() == whole


def test_unreadable_manifest_is_rebuilt(built: Config) -> None:
    (built.data.index_folder / "manifest.json").write_text("{")
    build_index(built)
    assert load(built).search([query(3)], [1])[0][0].row == 3


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


def test_kill_while_encoding_leaves_nothing_whole_and_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_index(make_config(tmp_path, rows=70))
    config = make_config(tmp_path, rows=20_000, index_checkpoint_s=0)
    kill_after_batches(config, 5)
    assert not (config.data.index_folder / "manifest.json").exists()
    assert not (config.data.index_folder / "index.faiss").exists()
    with pytest.raises(IndexMismatch, match="no whole index"):
        load(config)
    done = batches_done(config)
    with caplog.at_level(logging.INFO):
        build_index(with_settings(config, index_checkpoint_s=10))
    assert f"resuming the embeddings: {done} of 313 batches were done" in caplog.text
    stored = np.load(config.data.index_folder / "embeddings.npy")
    assert np.array_equal(stored, HashingEncoder().encode([passage(n)["contents"] for n in range(20_000)], "passage"))
    assert load(config).search([query(77) + " m12345"], [1])


def kill_after_batches(config: Config, batches: int) -> None:
    """Start the real command and SIGKILL it in the middle of encoding."""
    environment = {**os.environ, "FORAGE_DATA__DIRECTORY": str(config.data.directory)}
    for key, value in dump_config(config)["retriever"].items():
        environment[f"FORAGE_RETRIEVER__{key.upper()}"] = str(value)
    process = subprocess.Popen([sys.executable, "-m", "services.retriever", "index"], env=environment, stdout=subprocess.DEVNULL)
    while not (config.data.index_folder / "embeddings.npy.part").exists() or batches_done(config) < batches:
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def batches_done(config: Config) -> int:
    path = config.data.index_folder / "embeddings.json"
    return json.loads(path.read_text())["batches_done"] if path.exists() else 0
