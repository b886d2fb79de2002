"""The paragraphs of SQuAD's files as one corpus: what its questions are asked about, all of it, is what is searched in.

| of a file           | in the corpus                                                                                     |
|---------------------|---------------------------------------------------------------------------------------------------|
| an article's title  | the passage's first line, in quotes; `_`, which stands there for a space, is one again            |
| a paragraph         | one passage, its white space as single spaces                                                     |
| the same paragraph  | left out, wherever it comes again: in another article, in another file                            |
| order               | that of the files, articles and paragraphs; `id` is the row's number, from 0                      |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from services.prepare.errors import PrepareError
from services.prepare.question_files import open_text
from services.prepare.steps import move_into_place


class _Paragraph(msgspec.Struct):
    context: str


class _Article(msgspec.Struct):
    paragraphs: list[_Paragraph]
    title: str = ""


class _Squad(msgspec.Struct):
    data: list[_Article]


@dataclass(frozen=True)
class CorpusFigures:
    articles: int
    passages: int
    repeated: int
    """Paragraphs that were there before."""


def write_squad_corpus(files: Sequence[Path], target: Path) -> CorpusFigures:
    """All paragraphs of `files` as JSONL with `id` and `contents`, whole or not at all. Raises PrepareError."""
    if target.resolve() in {file.resolve() for file in files}:
        raise PrepareError(f"{target} is one of the files to read: name another by --to")
    seen: set[str] = set()
    articles = paragraphs = 0
    temporary = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            for article in (article for file in files for article in _articles(file)):
                articles += 1
                for text in _texts(article):
                    paragraphs += 1
                    if text not in seen:
                        out.write(_line(len(seen), article.title, text))
                        seen.add(text)
        if not seen:
            raise PrepareError(f"{', '.join(map(str, files))}: no paragraph in it; name SQuAD's files")
        move_into_place(temporary, target)
    except OSError as error:
        raise PrepareError(f"{target} cannot be written ({error}); free some space or name another place by --to") from error
    finally:
        temporary.unlink(missing_ok=True)
    return CorpusFigures(articles, len(seen), paragraphs - len(seen))


def _articles(file: Path) -> Iterator[_Article]:
    if not file.is_file():
        raise PrepareError(f"{file}: no such file; mend its path")
    try:
        with open_text(file) as text:
            content = text.read()
        yield from msgspec.json.decode(content, type=_Squad).data
    except (msgspec.DecodeError, UnicodeDecodeError, EOFError, OSError) as error:
        raise PrepareError(f'{file}: not as SQuAD has it, {{"data": [{{"title", "paragraphs"}}]}} ({error})') from None


def _texts(article: _Article) -> Iterator[str]:
    return filter(None, (" ".join(paragraph.context.split()) for paragraph in article.paragraphs))


def _line(number: int, title: str, text: str) -> bytes:
    title = " ".join(title.replace("_", " ").split())
    return msgspec.json.encode({"id": str(number), "contents": f'"{title}"\n{text}'}) + b"\n"
