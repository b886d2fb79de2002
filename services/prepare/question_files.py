"""Rows out of files of questions, whatever their format, each with its place for an error. Nothing is read whole but JSON.

| suffix                         | rows                                                                               |
|--------------------------------|------------------------------------------------------------------------------------|
| .jsonl (or .jsonl.gz)          | one JSON object a line: FlashRAG's, and our own                                    |
| .csv, .tsv                     | below a line of column names                                                       |
| .parquet                       | read batch by batch, and of the columns only those that are needed: Search-R1's    |
| .json                          | SQuAD (`{"data": […]}`, unanswerable questions left out) or a list of JSON objects |
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from services.prepare.errors import PrepareError

BATCH_ROWS = 1000
GZIP = b"\x1f\x8b"


class BrokenRow(Exception):
    """A row that cannot be read at all; the file's other rows may be."""


def read_rows(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    """Every row of `path`. `wanted`: the columns that will be looked at; others may be left out.

    Raises PrepareError when the file is missing, empty, or not what its suffix says.
    """
    if not path.is_file():
        raise PrepareError(f"{path}: no such file; mend its path")
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise PrepareError(f"{path}: questions come as {', '.join(READERS)}; convert it to one of these")
    rows = reader(path, wanted)
    try:
        first = next(rows, None)
        if first is None:
            raise PrepareError(f"{path} holds no row; write at least one question into it")
        yield first
        yield from rows
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise PrepareError(
            f"{path}: cannot be read ({error}); it must be UTF-8 text and whole: save or download it again"
        ) from None


def _suffix(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return Path(name).suffix.lower()


def open_text(path: Path) -> io.TextIOBase:
    """UTF-8, gzip or not; a byte-order mark, as spreadsheets write it, does not count."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    return io.TextIOWrapper(gzip.open(path) if packed else path.open("rb"), encoding="utf-8-sig", newline="")


def _jsonl(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", decode(line)
            except msgspec.DecodeError as error:
                yield f"{path}:{number}", BrokenRow(f"{error}; each line must be one JSON object")


def _separated(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    csv.field_size_limit(1 << 30)
    with open_text(path) as file:
        reader = csv.DictReader(file, delimiter="\t" if _suffix(path) == ".tsv" else ",", strict=True, restkey="")
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if "" in row:
                    yield place, BrokenRow("more cells than the first line has names; put text with a comma into quotes")
                else:
                    yield place, {name: value for name, value in row.items() if value not in (None, "")}
        except csv.Error as error:
            yield f"{path}:{reader.line_num}", BrokenRow(f"{error}; put text with a comma or a line break into quotes")


def _parquet(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    import pyarrow as arrow  # tenths of a second, and only here
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in wanted]
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {name: value for name, value in row.items() if value is not None}
    except arrow.ArrowException as error:
        raise PrepareError(f"{path}: {str(error).splitlines()[0]}: damaged, or not parquet; download it again") from None


def _json(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    with open_text(path) as file:
        try:
            content = msgspec.json.decode(file.read())
        except msgspec.DecodeError as error:
            raise PrepareError(f"{path}: {error}; if every line is a JSON object of its own, name it .jsonl") from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        yield from _squad(path, content["data"])
    elif isinstance(content, list):
        for number, row in enumerate(content, 1):
            yield f"{path}, item {number}", row if isinstance(row, dict) else BrokenRow("not a JSON object")
    else:
        raise PrepareError(f'{path}: neither SQuAD ({{"data": […]}}) nor a list of objects; convert it to .jsonl')


def _squad(path: Path, articles: list[Any]) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    for article in articles:
        try:
            title, paragraphs = article.get("title", "?"), article["paragraphs"]
            asked = [question for paragraph in paragraphs for question in paragraph["qas"] if not question.get("is_impossible")]
            for question in asked:
                answers = list(dict.fromkeys(answer["text"] for answer in question["answers"]))
                row = {"id": question["id"], "question": question["question"], "golden_answers": answers}
                yield f"{path}, article {title!r}, question {question['id']}", row
        except (KeyError, TypeError, AttributeError) as error:
            yield f"{path}, article {article!r:.60}", BrokenRow(f"not as SQuAD has it ({error!r})")


READERS: dict[str, Callable[[Path, Collection[str]], Iterator[tuple[str, dict[str, Any] | BrokenRow]]]] = {
    ".jsonl": _jsonl,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
    ".json": _json,
}
