"""A corpus of SQuAD's paragraphs: what becomes a passage, what is left out, and what is refused without a trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.prepare.__main__ import cli
from services.prepare.errors import PrepareError
from services.prepare.squad_corpus import CorpusFigures, write_squad_corpus
from services.retriever.corpus import Corpus


def squad(path: Path, **articles: list[str]) -> Path:
    data = [{"title": title, "paragraphs": [{"context": text, "qas": []} for text in texts]} for title, texts in articles.items()]
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


def test_each_paragraph_is_a_passage_with_its_articles_title(tmp_path: Path) -> None:
    train = squad(tmp_path / "train.json", Notre_Dame=["The  Main Building.\n", "Second."], Beyoncé=["Born in 1981."])
    dev = squad(tmp_path / "dev.json", Oxygen=["Symbol O."])
    figures = write_squad_corpus([train, dev], tmp_path / "made" / "corpus.jsonl")
    corpus = Corpus.open(tmp_path / "made" / "corpus.jsonl")
    assert [corpus[row] for row in range(len(corpus))] == [
        {"id": "0", "contents": '"Notre Dame"\nThe Main Building.'},
        {"id": "1", "contents": '"Notre Dame"\nSecond.'},
        {"id": "2", "contents": '"Beyoncé"\nBorn in 1981.'},
        {"id": "3", "contents": '"Oxygen"\nSymbol O.'},
    ]
    assert figures == CorpusFigures(articles=3, passages=4, repeated=0)


def test_a_paragraph_that_comes_again_is_left_out(tmp_path: Path) -> None:
    a, b = squad(tmp_path / "a.json", One=["Same.", "Same. ", ""]), squad(tmp_path / "b.json", Two=["Same.", "Other."])
    assert write_squad_corpus([a, b], tmp_path / "c.jsonl") == CorpusFigures(articles=2, passages=2, repeated=2)
    assert [json.loads(line)["contents"] for line in (tmp_path / "c.jsonl").open()] == ['"One"\nSame.', '"Two"\nOther.']


def test_a_compressed_file_is_read_as_it_is(tmp_path: Path) -> None:
    plain = squad(tmp_path / "a.json", One=["Text."])
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert write_squad_corpus([packed], tmp_path / "c.jsonl").passages == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b'{"rows": []}', "not as SQuAD has it"),
        (b'{"data": [{"paragraphs": [{"text": "x"}]}]}', "not as SQuAD has it"),
        (b'{"data": []}', "no paragraph in it"),
        (b"\xff", "not as SQuAD has it"),
        (b"\x1f\x8b broken", "not as SQuAD has it"),
    ],
)
def test_what_is_no_squad_leaves_the_former_corpus_as_it_was(tmp_path: Path, content: bytes | None, message: str) -> None:
    target, broken = tmp_path / "corpus.jsonl", tmp_path / "broken.json"
    target.write_text("former")
    if content is not None:
        broken.write_bytes(content)
    with pytest.raises(PrepareError, match=message):
        write_squad_corpus(
            [squad(tmp_path / "good.json", **({"One": ["x"]} if content != b'{"data": []}' else {})), broken], target
        )
    assert target.read_text() == "former" and not list(tmp_path.glob(".*"))


def test_a_file_is_not_written_over_by_what_is_made_of_it(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="name another by --to"):
        write_squad_corpus([made := squad(tmp_path / "a.json", One=["x"])], made)


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["corpus", str(squad(tmp_path / "a.json", One=["x", "x"])), "--to", str(tmp_path / "c.jsonl")])
    assert done.exit_code == 0 and "1 passages of 1 articles; 1 paragraphs came again" in done.output
