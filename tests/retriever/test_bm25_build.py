"""`index` for BM25: skipped when whole, made again when not; what a killed build leaves; and the process around Java."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from services.contract.config import Config, show_config
from services.contract.config.retriever import Bm25Config
from services.retriever.bm25_build import bm25_folder, buffer_mb, build_bm25, lucene_folder
from services.retriever.errors import CorpusError, IndexMismatch, RetrieverError
from services.retriever.files import sole_writer
from tests.retriever.bm25_support import HEAP, configure, load, rows_of
from tests.retriever.conftest import passage, query, until, write_corpus


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """100 passages and their BM25 index. Do not change its folder."""
    config = configure(tmp_path_factory.mktemp("bm25"))
    build_bm25(config)
    return config


@pytest.fixture
def copy(built: Config, tmp_path: Path) -> Config:
    """`built` in a folder of its own."""
    shutil.copytree(built.data.directory, tmp_path, dirs_exist_ok=True)
    return built.model_copy(update={"data": built.data.model_copy(update={"directory": tmp_path})})


def files(config: Config) -> dict[str, int]:
    paths = (path for path in bm25_folder(config).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(config.data.directory)): path.stat().st_mtime_ns for path in paths}


def test_second_build_does_nothing_and_says_so(copy: Config, caplog: pytest.LogCaptureFixture) -> None:
    before = files(copy)
    with caplog.at_level(logging.INFO):
        build_bm25(copy)
    assert files(copy) == before
    assert "nothing to do" in caplog.messages[-1]


def test_an_index_holds_nothing_but_lucenes_files_and_the_manifest(built: Config) -> None:
    assert {path.name for path in bm25_folder(built).iterdir()} == {".lock", "manifest.json", "lucene"}
    assert not any("lock" in path.name for path in lucene_folder(bm25_folder(built)).iterdir())


def test_touched_but_equal_corpus_is_not_rebuilt(copy: Config) -> None:
    os.utime(copy.data.corpus_path, ns=(1, 1))
    before = files(copy)
    build_bm25(copy)
    assert files(copy) == before
    assert rows_of(load(copy), query(5), 1) == [5]


def test_changed_corpus_is_refused_and_then_rebuilt(copy: Config) -> None:
    write_corpus(copy.data.corpus_path, [passage(row) for row in range(99, 39, -1)])
    with pytest.raises(IndexMismatch, match=r"rows is 100 in the index, 60 now.*REBUILD"):
        load(copy)
    build_bm25(copy)
    assert rows_of(load(copy), query(99), 1) == [99]


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def of_another_lucene(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"lucene": "', '"lucene": "8'))


def flip_a_byte(folder: Path) -> None:
    path = next((folder / "lucene").glob("*.doc"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_a_file(folder: Path) -> None:
    path = next((folder / "lucene").glob("*.tim"))
    path.write_bytes(path.read_bytes()[:-1])


def remove_a_file(folder: Path) -> None:
    next((folder / "lucene").glob("*.nvd")).unlink()


def remove_the_index(folder: Path) -> None:
    shutil.rmtree(folder / "lucene")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_manifest, "manifest.json is missing"),
        (break_manifest, "not a manifest"),
        (of_another_lucene, "lucene is '89.9.1' in the index"),
        (flip_a_byte, "damaged"),
        (cut_a_file, "cannot open|damaged"),
        (remove_a_file, "cannot open"),
        (remove_the_index, "no Lucene index here"),
    ],
)
def test_what_is_not_whole_is_refused_with_the_mend_and_built_again(
    copy: Config, damage: Callable[[Path], None], reason: str
) -> None:
    damage(bm25_folder(copy))
    with pytest.raises(IndexMismatch, match=rf"(?s){reason}.*REBUILD"):
        load(copy)
    build_bm25(copy)
    assert rows_of(load(copy), query(5), 1) == [5]


def test_broken_line_stops_the_build_and_leaves_nothing_that_looks_whole(copy: Config) -> None:
    with copy.data.corpus_path.open("a") as corpus:
        corpus.write('{"id": "x"}\n')
    with pytest.raises(CorpusError, match=r"corpus\.jsonl:101: "):
        build_bm25(copy)
    write_corpus(copy.data.corpus_path, [passage(row) for row in range(100)])
    with pytest.raises(IndexMismatch, match="no whole BM25 index"):
        load(copy)


def test_blank_passages_keep_their_row(tmp_path: Path) -> None:
    config = configure(tmp_path)
    write_corpus(config.data.corpus_path, [{**passage(row), **({"contents": " \n"} if row in (0, 3) else {})} for row in range(6)])
    build_bm25(config)
    index = load(config)
    assert rows_of(index, query(5), 1) == [5]
    assert rows_of(index, "place keeps mark", 100) == [1, 2, 4, 5]


def test_only_one_process_builds(copy: Config) -> None:
    with sole_writer(bm25_folder(copy)), pytest.raises(RetrieverError, match="another process"):
        build_bm25(copy)


def test_killed_build_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    config = configure(tmp_path / "data", rows=0, bm25={"heap": HEAP})
    corpus = [{**passage(row), "contents": passage(row)["contents"] + f" n{row}" * 50} for row in range(20_000)]
    write_corpus(config.data.corpus_path, corpus)
    settings = tmp_path / "run.toml"
    settings.write_text(show_config(config))
    command = [sys.executable, "-m", "services.retriever", "index", "build", "--config", str(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    part = bm25_folder(config) / "lucene.part"
    until_or_end(process, lambda: (part / "write.lock").exists())
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert part.exists()
    with pytest.raises(IndexMismatch, match="no whole BM25 index"):
        load(config)
    write_corpus(config.data.corpus_path, corpus[:50])
    build_bm25(config)
    assert not part.exists()
    assert rows_of(load(config), query(49), 1) == [49]


def until_or_end(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    while not true():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_a_heap_that_is_too_small_ends_the_build_and_does_not_hang_it(tmp_path: Path) -> None:
    config = configure(tmp_path / "data", rows=20_000, bm25={"heap": "8m"})
    settings = tmp_path / "run.toml"
    settings.write_text(show_config(config))
    command = [sys.executable, "-m", "services.retriever", "index", "build", "--config", str(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 3
    assert "OutOfMemoryError" in ended.stdout
    assert not (bm25_folder(config) / "manifest.json").exists()


@pytest.mark.parametrize(("heap", "mebibytes"), [("2g", 512), ("1g", 256), ("512M", 128), ("2m", 1), ("64G", 512)])
def test_indexing_buffer_fits_into_the_heap(heap: str, mebibytes: int) -> None:
    assert buffer_mb(heap) == mebibytes


@pytest.mark.parametrize("heap", ["2", "2t", "g", "0g", "1.5g", "-2g", "2g -Xrs"])
def test_heap_is_a_size(heap: str) -> None:
    with pytest.raises(ValidationError, match="heap"):
        Bm25Config(heap=heap)


# -- the process -------------------------------------------------------------------------------------------------------

ASK = """
import sys
from pathlib import Path
from services.contract.config import load_config
from services.retriever.bm25 import load_bm25
config = load_config(Path(sys.argv[1]))
try:
    (config.data.directory / "bm25" / "lucene" / "probe").write_text("")
    sys.exit("the folder can be written")
except OSError:
    print(load_bm25(config, "REBUILD", lambda text: None).answer([("harbour violin m0", 1)])[0][0].document.decode())
"""
CAP_DAC_OVERRIDE = 1
PR_CAPBSET_DROP = 24


def heed_permissions() -> None:
    """Also root must: without this capability the bits of a folder bind it."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_a_read_only_folder_is_served(copy: Config, tmp_path: Path) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(show_config(copy))
    folders = [path for path in [copy.data.directory, *copy.data.directory.rglob("*")] if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        command = [sys.executable, "-c", ASK, str(settings)]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=240, preexec_fn=heed_permissions)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout) == passage(0)


def test_only_a_process_that_serves_bm25_starts_java() -> None:
    code = (
        "import sys, services.retriever.bm25, services.retriever.__main__; print({'jnius', 'pyserini', 'torch'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_command_line_builds_serves_and_ends_at_sigterm(tmp_path: Path) -> None:
    """Java would answer SIGTERM itself, with 143 and nothing shut down, were it not told to keep out."""
    settings = tmp_path / "run.toml"
    settings.write_text(show_config(configure(tmp_path / "data")))
    command = [sys.executable, "-m", "services.retriever"]
    built = subprocess.run([*command, "index", "build", "--config", str(settings)], capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stderr
    assert "100/100 passages" in built.stdout
    assert not (tmp_path / "data" / "index").exists()  # dense was not asked for
    process = subprocess.Popen(
        [*command, "serve", "--config", str(settings)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout
        url = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert url
        until(lambda: httpx.get(f"{url[0]}/ready").status_code == 200, 120)
        assert httpx.post(f"{url[0]}/retrieve", json={"queries": [query(4)], "topk": 1}).json() == {"result": [[passage(4)]]}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
