"""From a row to a question: which column holds what, and what makes a row unusable.

| field          | column, unless `columns` names it                                                                         |
|----------------|-----------------------------------------------------------------------------------------------------------|
| id             | `id`; else the row's number in its file                                                                    |
| source         | `source`, `data_source`; else `source` of the file's table, the catalogue's, or the file's name            |
| question       | `question`                                                                                                |
| golden_answers | `reward_model.ground_truth.target` (Search-R1), `golden_answers`, `answers`, `answer`: a text or a list    |
| prompt         | `prompt`: chat messages or a text; left out with `row_prompts = false`                                     |

A question's key is `{source}:{id}`: ids need only be unique within their source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from services.contract.config import Config, QuestionFile, hub_name
from services.contract.messages import InvalidMessage, Question
from services.prepare.catalogue import find_entry
from services.prepare.errors import PrepareError
from services.prepare.question_files import BrokenRow, read_rows

KNOWN: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "source": ("source", "data_source"),
    "question": ("question",),
    "golden_answers": ("reward_model.ground_truth.target", "golden_answers", "answers", "answer"),
    "prompt": ("prompt",),
}


@dataclass(frozen=True)
class Located:
    """A file of questions on this machine, and how to read it."""

    file: QuestionFile
    path: Path
    source: str

    def columns(self, field: str) -> tuple[str, ...]:
        chosen = getattr(self.file.columns, field)
        return (chosen,) if chosen else KNOWN[field]

    @property
    def wanted(self) -> set[str]:
        """Columns of the file that are looked at."""
        return {column.partition(".")[0] for field in KNOWN for column in self.columns(field)}


@dataclass(frozen=True)
class Fault:
    """A row that is no question: where, why, and the mend."""

    text: str


def locate(config: Config, key: str) -> list[Located]:
    """The files of `data.<key>`. Raises PrepareError for an unknown name or split."""
    return [located(config, file, f"data.{key}") for file in config.data.question_files(key)]


def located(config: Config, file: QuestionFile, key: str) -> Located:
    name = hub_name(file.path)
    if name is None:
        if file.split:
            raise PrepareError(f"{key}: `split` is for hub:NAME; {file.path} is one file")
        path = file.path
        return Located(file, path, file.source or path.name.partition(".")[0])
    entry = find_entry(name, key)
    splits = ", ".join(entry.splits)
    if file.split is None and len(entry.splits) != 1:
        raise PrepareError(f"{key}: hub:{name} has several files; set split to one of {splits}, in a table [[{key}]]")
    chosen = entry.splits.get(file.split or splits)
    if chosen is None:
        raise PrepareError(f"{key}: hub:{name} has no split {file.split!r}; set it to one of {splits}")
    return Located(file, config.data.hub_path(name) / chosen, file.source or entry.source or name)


def questions_of(located: Located) -> Iterator[Question | Fault]:
    """Every row, as a question or as what is wrong with it. Raises PrepareError when the file as a whole cannot be read."""
    rows = read_rows(located.path, located.wanted)
    for number, (place, row) in enumerate(islice(rows, located.file.limit or None), 1):
        try:
            if isinstance(row, BrokenRow):
                raise row
            yield _question(located, row, number)
        except (BrokenRow, InvalidMessage) as error:
            yield Fault(f"{place}: {error}")


def _question(located: Located, row: dict[str, Any], number: int) -> Question:
    text = _value(located, row, "question")
    if not isinstance(text, str) or not text.strip():
        raise BrokenRow(_missing(located, row, "question", "a text"))
    return Question(
        id=str(_or(_value(located, row, "id"), number)),
        source=str(_or(_value(located, row, "source"), located.source)),
        question=text.strip(),
        golden_answers=_answers(located, row),
        prompt=_prompt(_value(located, row, "prompt")) if located.file.row_prompts else None,
    )


def _value(located: Located, row: dict[str, Any], field: str) -> Any:
    """The first of the field's columns that the row has; None when it has none."""
    for column in located.columns(field):
        value: Any = row
        for name in column.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _or(value: Any, otherwise: str | int) -> str | int:
    """An empty cell or a text of blanks is as good as none; 0 is an id like any other."""
    return otherwise if value is None or not str(value).strip() else value


def _answers(located: Located, row: dict[str, Any]) -> list[str]:
    value = _value(located, row, "golden_answers")
    if isinstance(value, str):
        value = _cell(value, located.file.answer_separator)
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(isinstance(answer, str | int | float) and str(answer).strip() for answer in answers):
        raise BrokenRow(_missing(located, row, "golden_answers", "at least one answer, and none may be empty"))
    return [str(answer).strip() for answer in answers]


def _cell(text: str, separator: str | None) -> list[Any]:
    """Answers in one text: separated, a JSON list, or one."""
    if separator:
        return [part for part in text.split(separator) if part.strip()]
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            pass  # an answer that begins with a bracket
    return [text]


def _prompt(value: Any) -> list[dict[str, str]] | str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return [{key: message[key] for key in ("role", "content") if isinstance(message.get(key), str)} for message in value]
    raise BrokenRow("`prompt` must be a text or chat messages [{role, content}]; mend it, or set row_prompts = false")


def _missing(located: Located, row: dict[str, Any], field: str, what: str) -> str:
    columns = " or ".join(f"`{column}`" for column in located.columns(field))
    held = ", ".join(row) or "nothing"
    return f"{columns} needs {what} (the row holds {held}); mend it, or name the column in columns.{field}"
