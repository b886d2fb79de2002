"""What a run learns from and searches in: corpus, index, questions, their mixture, and the words of the prompt.

A path may be `hub:NAME` wherever it says so: `prepare` then downloads what the catalogue has under that name (or, of models, the
repository `hub:owner/name`), and all services find it at `<data.directory>/hub/NAME`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.contract.config.base import ConfigError, NonNegative, Section

HUB = "hub:"


def hub_name(path: Path | None) -> str | None:
    """NAME of `hub:NAME`; None for a path of one's own."""
    text = str(path or "")
    return text.removeprefix(HUB) if text.startswith(HUB) else None


def mix_problem(mix: Mapping[str, float], sources: Collection[str]) -> str | None:
    """What keeps a mixture from being drawn from questions of these sources, with the mend."""
    if not mix:
        return None
    if unknown := sorted(set(mix) - set(sources)):
        return f"data.mix names {', '.join(unknown)}, of which there is no question; there are {', '.join(sorted(sources))}"
    if forgotten := sorted(set(sources) - set(mix)):
        return f"data.mix gives no weight to {', '.join(forgotten)}: add it, 0 leaves a source out"
    return None


class Columns(Section):
    """Which column holds what; a dot goes into a nested one (`reward_model.ground_truth.target`). None: see docs/data.md."""

    id: str | None = None
    source: str | None = None
    question: str | None = None
    golden_answers: str | None = None
    prompt: str | None = None


class QuestionFile(Section):
    """Questions to take from one file. docs/data.md has the formats."""

    path: Path
    """A .jsonl, .csv, .tsv, .parquet or SQuAD .json file, or `hub:NAME`."""
    split: str | None = None
    """Of `hub:NAME`: which of its files, such as "train"."""
    source: str | None = None
    """The kind of question, for rows that name none. None: the file's name, or the catalogue's."""
    columns: Columns = Columns()
    answer_separator: str | None = None
    """In a CSV, between several golden answers in one cell. None: a cell is one answer, or a JSON list of them."""
    row_prompts: bool = True
    """Whether a row's own prompt, as Search-R1's have it, is used instead of `data.instruction`."""
    limit: NonNegative = 0
    """Only the first so many rows; 0 takes all."""


class DataConfig(Section):
    directory: Path = Path("var/data")
    """What `prepare` makes: models, corpus, questions, demonstrations, index."""
    source: Literal["factbook", "folder"] = "factbook"
    """`folder`: corpus and questions are yours or the catalogue's (see `corpus`, `train_questions`, `eval_questions`)."""
    corpus: Path | None = None
    """JSONL with `id` and `contents` ("title", newline, text), or `hub:NAME`. None: `<directory>/corpus.jsonl`."""
    index: Path | None = None
    """A published FAISS index of that corpus (a file, a folder of `part_*`, or `hub:NAME`) that is adopted instead of building one;
    `retriever.index_factory` says what kind it is."""
    train_questions: Path | list[QuestionFile] | None = None
    """A .jsonl with `id`, `source`, `question`, `golden_answers`, read where it lies; or any other file, `hub:NAME`, or tables
    `[[data.train_questions]]`, which `prepare` turns into `<directory>/questions/train.jsonl`. None: that file."""
    eval_questions: Path | list[QuestionFile] | None = None
    mix: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """Share of each source among the training questions, as weights: `{nq = 2, hotpotqa = 1}`. 0 leaves a source out. Empty: every
    question as often as any other."""
    demonstrations: Path | None = None
    corpus_countries: NonNegative = 0
    """Use only the first so many countries of the Factbook; 0 takes all."""
    demonstration_count: NonNegative = 96
    """How many demonstrations `prepare` writes for the warm start."""
    instruction: str = (
        "Answer the question at the end. Write your reasoning between <think> and </think>. Whenever a fact is missing, "
        "write a query between <search> and </search>; passages that were found come back between <information> and "
        "</information>, and you may search again. Once you know, write only the answer, as short as possible, between "
        "<answer> and </answer>.\n\nQuestion: {question}"
    )
    """The user's message; `{question}` is replaced by the question."""
    system: str | None = None
    """A system message before it. None leaves that to the model's chat template."""
    chat_template: bool = True
    """False: the prompt is the instruction as plain text."""

    @model_validator(mode="after")
    def _instruction_has_a_question(self) -> DataConfig:
        if "{question}" not in self.instruction:
            raise ValueError("data.instruction has no {question} in it: add it where the question belongs")
        return self

    @model_validator(mode="after")
    def _makes_sense(self) -> DataConfig:
        if self.mix and not any(self.mix.values()):
            raise ValueError("data.mix gives every source the weight 0: give one at least more")
        for key in ("train_questions", "eval_questions"):
            if getattr(self, key) == []:
                raise ValueError(f"data.{key} is an empty list: name a file in it, or leave it out")
        named = [self.corpus, self.index, *(f.path for f in self.question_files("train_questions", "eval_questions"))]
        if self.source == "factbook" and (self.index or any(hub_name(path) for path in named)):
            raise ValueError('data.index and hub:NAME are for data.source = "folder": set it')
        return self

    def local(self, path: Path | None) -> Path | None:
        """Where a path or `hub:NAME` lies on this machine."""
        name = hub_name(path)
        return self.hub_path(name) if name else path

    def hub_path(self, name: str) -> Path:
        """Where `hub:NAME` lies, a file or a folder."""
        return self.directory / "hub" / name.replace("/", "--")

    def question_files(self, *keys: str) -> list[QuestionFile]:
        """What `prepare` has to convert for these keys; nothing for a .jsonl that is used where it lies."""
        files: list[QuestionFile] = []
        for key in keys:
            value = getattr(self, key)
            if isinstance(value, list):
                files += value
            elif value is not None and (hub_name(value) or value.suffix != ".jsonl"):
                files.append(QuestionFile(path=value))
        return files

    def _questions(self, key: str, made: str) -> Path:
        value = getattr(self, key)
        if value is None or self.question_files(key):
            return self.directory / "questions" / made
        return value

    @property
    def policy_path(self) -> Path:
        return self.directory / "models" / "policy"

    @property
    def encoder_path(self) -> Path:
        return self.directory / "models" / "encoder"

    @property
    def corpus_path(self) -> Path:
        return self.local(self.corpus) or self.directory / "corpus.jsonl"

    @property
    def train_path(self) -> Path:
        return self._questions("train_questions", "train.jsonl")

    @property
    def eval_path(self) -> Path:
        return self._questions("eval_questions", "eval.jsonl")

    @property
    def demonstrations_path(self) -> Path:
        return self.demonstrations or self.directory / "demonstrations.jsonl"

    @property
    def index_parts(self) -> list[Path]:
        """The files of `index`, in their order; empty where none is named. Raises ConfigError when the folder holds no part."""
        path = self.local(self.index)
        if path is None or not path.is_dir():
            return [path] if path else []
        parts = sorted(path.glob("part_*"))
        if not parts:
            raise ConfigError(f"data.index: {path} holds no part_* files; name the index file itself")
        return parts

    @property
    def index_folder(self) -> Path:
        return self.directory / "index"
