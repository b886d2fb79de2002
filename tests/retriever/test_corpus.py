"""JSONL by memory map: rows, bytes, offsets kept beside it, compressed ones unpacked, and errors that name file and line."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from services.retriever import offsets, unpack
from services.retriever.corpus import Corpus
from services.retriever.errors import CorpusError, RetrieverError
from services.retriever.offsets import offsets_path
from services.retriever.unpack import unpacked_path

GOOD = '{"id": "1", "contents": "\\"T\\"\\ntext"}'


def corpus_of(folder: Path, text: str | bytes) -> Path:
    path = folder / "corpus.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_rows_keep_every_column_and_their_order(tmp_path: Path) -> None:
    rows = [{"id": str(n), "contents": f"passage {n} é", "url": [n, None]} for n in range(50)]
    corpus = Corpus.open(corpus_of(tmp_path, "\n".join(json.dumps(row) for row in rows)))
    assert len(corpus) == 50
    assert [corpus[n] for n in range(50)] == rows


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_last_line_counts_once_however_it_ends(tmp_path: Path, ending: str) -> None:
    corpus = Corpus.open(corpus_of(tmp_path, f"{GOOD}\n{GOOD}{ending}"))
    assert len(corpus) == 2
    assert corpus[1]["id"] == "1"


def test_line_is_served_byte_for_byte(tmp_path: Path) -> None:
    line = b'{"id": 7,  "contents": "x", "score": 1.50}'
    assert Corpus.open(corpus_of(tmp_path, line + b"\n")).line(0) == line


@pytest.mark.parametrize("row", [-1, 2, 10**9])
def test_row_outside_the_corpus_is_an_index_error(tmp_path: Path, row: int) -> None:
    corpus = Corpus.open(corpus_of(tmp_path, f"{GOOD}\n{GOOD}\n"))
    with pytest.raises(IndexError):
        corpus.line(row)


@pytest.mark.parametrize(
    ("third", "says"),
    [
        ("{broken", "JSON is malformed"),
        ('{"id": "1"}', "contents"),
        ('{"contents": "x"}', "id"),
        ('{"id": "1", "contents": 5}', "contents"),
        ('["1", "x"]', "object"),
        ("", "empty line"),
        ("   ", "each line must be one JSON object"),
    ],
)
def test_broken_line_is_named_with_file_and_line(tmp_path: Path, third: str, says: str) -> None:
    path = corpus_of(tmp_path, f"{GOOD}\n{GOOD}\n{third}\n{GOOD}\n")
    with pytest.raises(CorpusError, match="corpus.jsonl:3: ") as raised:
        Corpus.open(path)
    assert says in str(raised.value)


def test_invalid_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="corpus.jsonl:2: "):
        Corpus.open(corpus_of(tmp_path, GOOD.encode() + b'\n{"id": "1", "contents": "\xff"}\n'))


def test_missing_and_empty_corpus_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="set data.corpus"):
        Corpus.open(tmp_path / "none.jsonl")
    with pytest.raises(CorpusError, match="empty"):
        Corpus.open(corpus_of(tmp_path, ""))


def test_check_rows_reads_beyond_the_first_rows(tmp_path: Path) -> None:
    corpus = Corpus.open(corpus_of(tmp_path, f"{GOOD}\n" * 200 + "{broken\n"))
    with pytest.raises(CorpusError, match="corpus.jsonl:201: "):
        corpus.check_rows()


# -- offsets -----------------------------------------------------------------------------------------------------------


def test_offsets_are_kept_and_mapped(tmp_path: Path) -> None:
    path = corpus_of(tmp_path, f"{GOOD}\n" * 5)
    Corpus.open(path)
    stored = np.load(offsets_path(path))
    assert stored.dtype == np.uint64
    assert stored.tolist() == [*range(0, 6 * (len(GOOD) + 1), len(GOOD) + 1), path.stat().st_mtime_ns]
    before = offsets_path(path).stat()
    assert isinstance(Corpus.open(path)._offsets, np.memmap)
    assert offsets_path(path).stat() == before


def test_offsets_of_a_changed_corpus_are_made_anew(tmp_path: Path) -> None:
    path = corpus_of(tmp_path, f"{GOOD}\n{GOOD}\n")
    Corpus.open(path)
    corpus_of(tmp_path, f"{GOOD}\n{GOOD.replace('text', 't')}\n{GOOD}\n")
    assert [Corpus.open(path)[row]["contents"] for row in range(3)] == ['"T"\ntext', '"T"\nt', '"T"\ntext']


def test_same_size_with_another_time_stamp_is_scanned_again(tmp_path: Path) -> None:
    path = corpus_of(tmp_path, '{"id":1,"contents":"aaaa"}\n{"id":2,"contents":"b"}\n')
    Corpus.open(path)
    path.write_text('{"id":1,"contents":"a"}\n{"id":2,"contents":"bbbb"}\n')
    os.utime(path, ns=(5, 5))
    assert [Corpus.open(path)[row]["contents"] for row in (0, 1)] == ["a", "bbbb"]


@pytest.mark.parametrize("cut", [0, 50, 140])
def test_truncated_offsets_are_made_anew(tmp_path: Path, cut: int) -> None:
    path = corpus_of(tmp_path, f"{GOOD}\n" * 9)
    Corpus.open(path)
    offsets_path(path).write_bytes(offsets_path(path).read_bytes()[:cut])
    assert len(Corpus.open(path)) == 9


def test_folder_that_takes_no_file_still_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus_of(tmp_path, f"{GOOD}\n" * 9)
    monkeypatch.setattr(offsets, "offsets_path", lambda corpus: tmp_path / "no such folder" / "offsets.npy")
    assert Corpus.open(path)[8]["id"] == "1"


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_lines_are_found_whatever_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(offsets, "SCAN_BYTES", chunk)
    lines = [json.dumps({"id": n, "contents": "x" * n}) for n in range(40)]
    corpus = Corpus.open(corpus_of(tmp_path, "\n".join(lines)))
    assert [corpus.line(row).decode() for row in range(40)] == lines


@pytest.mark.parametrize("chunk", [1, 2, 64, 1 << 20])
@pytest.mark.parametrize("place", [0, 1, 150])
def test_empty_line_is_named_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, place: int) -> None:
    monkeypatch.setattr(offsets, "SCAN_BYTES", chunk)
    lines = [GOOD] * 160
    lines.insert(place, "")
    with pytest.raises(CorpusError, match=f"corpus.jsonl:{place + 1}: empty line"):
        Corpus.open(corpus_of(tmp_path, "\n".join(lines)))


# -- compressed --------------------------------------------------------------------------------------------------------

TEXT = "".join(json.dumps({"id": n, "contents": f"passage {n}"}) + "\n" for n in range(500)).encode()


def tar(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(TEXT)
            archive.addfile(member, io.BytesIO(TEXT))
    return buffer.getvalue()


PACKED: dict[str, Callable[[], bytes]] = {
    "gzip": lambda: gzip.compress(TEXT),
    "two gzip members": lambda: gzip.compress(TEXT[:5000]) + gzip.compress(TEXT[5000:]),
    "gzip of tar": lambda: gzip.compress(tar(["data/._wiki.jsonl", "data/wiki.jsonl"])),
    "tar": lambda: tar(["wiki.jsonl"]),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", ["wiki-18.jsonl.gz", "wiki-18.tar.gz", "wiki-18.tgz"])
def test_compressed_corpus_is_told_by_content_and_unpacked_once(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACKED[kind]())
    corpus = Corpus.open(path)
    assert corpus.path == tmp_path / "wiki-18.jsonl"
    assert corpus.path.read_bytes() == TEXT
    before = corpus.path.stat()
    assert len(Corpus.open(path)) == 500
    assert corpus.path.stat() == before


def test_gzip_called_jsonl_is_unpacked_beside_it(tmp_path: Path) -> None:
    packed = gzip.compress(TEXT)
    path = corpus_of(tmp_path, packed)
    assert Corpus.open(path).path == tmp_path / "corpus.unpacked.jsonl" == unpacked_path(path)
    assert path.read_bytes() == packed


def test_changed_archive_is_unpacked_again(tmp_path: Path) -> None:
    path = tmp_path / "wiki.gz"
    path.write_bytes(gzip.compress(TEXT))
    Corpus.open(path)
    path.write_bytes(gzip.compress(TEXT * 2))
    assert len(Corpus.open(path)) == 1000


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_archive_cut_short_is_refused_and_leaves_nothing(tmp_path: Path, kind: str, share: float) -> None:
    path, whole = tmp_path / "wiki.gz", PACKED[kind]()
    path.write_bytes(whole[: int(len(TEXT if kind == "tar" else whole) * share)])
    with pytest.raises(CorpusError, match=r"wiki.gz: broken or cut short .*download it again"):
        Corpus.open(path)
    assert not list(tmp_path.glob("wiki.jsonl*"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04rest", "this is zip; unpack it"),
        (b"\x28\xb5\x2f\xfdrest", "this is zstd; unpack it"),
        (gzip.compress(tar(["a.jsonl", "b.jsonl"])), "holds a.jsonl and b.jsonl"),
        (gzip.compress(tar([])), "holds no file"),
    ],
)
def test_what_cannot_be_unpacked_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "wiki.gz"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=says):
        Corpus.open(path)
    assert not list(tmp_path.glob("wiki.jsonl*"))


def test_strange_file_in_its_place_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "wiki.jsonl").write_text("mine")
    (tmp_path / "wiki.jsonl.gz").write_bytes(gzip.compress(TEXT))
    with pytest.raises(CorpusError, match="set data.corpus to wiki.jsonl if it is the corpus"):
        Corpus.open(tmp_path / "wiki.jsonl.gz")
    assert (tmp_path / "wiki.jsonl").read_text() == "mine"


def test_too_little_room_is_told_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wiki.gz").write_bytes(gzip.compress(TEXT))
    monkeypatch.setattr(unpack, "_estimated_size", lambda packed: 1 << 60)
    with pytest.raises(RetrieverError, match=r"unpacking wiki.gz needs .* bytes, .* are free"):
        Corpus.open(tmp_path / "wiki.gz")


def test_estimate_of_the_unpacked_size_is_close(tmp_path: Path) -> None:
    path = tmp_path / "wiki.gz"
    path.write_bytes(gzip.compress(TEXT))
    with path.open("rb") as packed:
        assert unpack._estimated_size(packed) == len(TEXT)
