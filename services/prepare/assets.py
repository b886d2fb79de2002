"""Which steps a configuration needs, in order. Each is skipped when its output is there and whole (see `steps`).

| data.source | corpus, questions           | demonstrations                                        |
|-------------|-----------------------------|-------------------------------------------------------|
| factbook    | made here                   | made here with the running retriever                  |
| folder      | the user's, every row checked | the user's, checked; not needed without a warm start |

What is named by `hub:NAME` is downloaded before all else; questions that are not in the trainer's own form are converted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from services.contract.config import Config
from services.contract.files import file_digest
from services.prepare import models, rows
from services.prepare.convert import convert_step
from services.prepare.demonstrations import write_demonstrations
from services.prepare.errors import PrepareError
from services.prepare.factbook import PACKAGE as FACTBOOK
from services.prepare.factbook import load_places
from services.prepare.fetch import fetch
from services.prepare.passages import build_passages, write_corpus
from services.prepare.questions import FactQuestion, build_questions, split_places
from services.prepare.recall import measure_recall, table
from services.prepare.retrieval import Retriever
from services.prepare.steps import Step, code_digest, manifest_path, package_version, run_step, why_remake

logger = logging.getLogger("prepare")

YOURS = 'data.source = "folder"'
TRANSCRIPT = "../contract/transcript"
"""The layout of an observation is part of every demonstration."""


def prepare_assets(config: Config) -> None:
    """Model, encoder, corpus and questions. Raises PrepareError."""
    fetch(config)
    for step in asset_steps(config):
        run_step(step)


def prepare_demonstrations(config: Config) -> None:
    """The warm start's examples; needs the assets and a running retriever. Raises PrepareError."""
    if config.trainer.warm_start.epochs == 0:
        logger.info("demonstrations: none needed, trainer.warm_start.epochs is 0")
    elif config.data.source == "folder":
        run_step(_check_step(config, "demonstrations", config.data.demonstrations_path, rows.check_demonstrations))
    else:
        run_step(demonstration_step(config))


def report_recall(config: Config) -> str:
    """The table of recall for every question of the Factbook, both sides of the split."""
    _require_factbook(config, "recall")
    places = load_places(config.data.corpus_countries)
    with _retriever(config) as retrieve:
        return table(measure_recall(build_questions(places, places), retrieve), config.rollout.topk)


def asset_steps(config: Config) -> Iterator[Step]:
    yield from _policy_step(config)
    yield from _encoder_step(config)
    if config.data.source == "folder":
        yield from _corpus_check(config)
        yield _question_file_step(config, "train_questions", config.data.train_path)
        yield _question_file_step(config, "eval_questions", config.data.eval_path)
    else:
        yield corpus_step(config)
        yield question_step(config, held_out=False)
        yield question_step(config, held_out=True)


def _policy_step(config: Config) -> Iterator[Step]:
    path, source = config.model_path, config.model.source
    if source == "folder":
        models.check_model_folder(path, "model.path")
        logger.info("policy: %s, as it is", path)
        return
    _refuse_foreign(config.model.path, "model.path", 'model.source = "folder"')
    inputs: dict[str, Any] = {"source": source, "code": code_digest("models"), **_versions(models.SMOLLM2_PACKAGE)}
    inputs |= _versions("transformers")
    if source == "smollm2-135m":
        yield Step("policy", path, inputs, models.write_smollm2)
        return
    seed, context = config.run.seed, config.model.max_context
    inputs |= {"seed": seed, "max_context": context}
    yield Step("policy", path, inputs, lambda folder: models.write_tiny(folder, seed, context))


def _encoder_step(config: Config) -> Iterator[Step]:
    if config.retriever.encoder_family == "hashing":
        logger.info('encoder: none needed, retriever.encoder_family is "hashing"')
    elif config.retriever.encoder is not None:
        models.check_model_folder(config.encoder_path, "retriever.encoder")
        logger.info("encoder: %s, as it is", config.encoder_path)
    else:
        inputs = {"code": code_digest("models"), **_versions(models.ENCODER_PACKAGE)}
        yield Step("encoder", config.encoder_path, inputs, models.write_encoder)


def corpus_step(config: Config) -> Step:
    path, limit = config.data.corpus_path, config.data.corpus_countries
    _refuse_foreign(config.data.corpus, "data.corpus", YOURS)
    inputs = {"countries": limit, "code": code_digest("factbook", "passages"), **_versions(FACTBOOK)}
    return Step("corpus", path, inputs, lambda out: write_corpus(build_passages(load_places(limit)), out))


def question_step(config: Config, held_out: bool) -> Step:
    name, path = ("eval_questions", config.data.eval_path) if held_out else ("train_questions", config.data.train_path)
    _refuse_foreign(getattr(config.data, name), f"data.{name}", YOURS)
    limit = config.data.corpus_countries
    code = code_digest("factbook", "passages", "facts", "kinds", "questions")
    inputs = {"countries": limit, "held_out": held_out, "code": code, **_versions(FACTBOOK)}
    return Step(name, path, inputs, lambda out: _write_questions(factbook_questions(limit, held_out), out))


def factbook_questions(countries: int, held_out: bool) -> list[FactQuestion]:
    """The questions of one side of the split, with the way to their answers."""
    places = load_places(countries)
    return build_questions(places, split_places(places)[held_out])


def _write_questions(questions: Sequence[FactQuestion], path: Path) -> None:
    if not questions:
        raise PrepareError("the chosen countries give no questions: raise data.corpus_countries")
    path.write_bytes(b"".join(msgspec.json.encode(each.question) + b"\n" for each in questions))


def demonstration_step(config: Config) -> Step:
    data = config.data
    path, count, think, seed = data.demonstrations_path, data.demonstration_count, config.reward.require_think, config.run.seed
    _refuse_foreign(data.demonstrations, "data.demonstrations", YOURS)
    for needed in (corpus_step(config), question_step(config, held_out=False)):
        if reason := why_remake(needed):
            raise PrepareError(f"{needed.output}: {reason}; run `python -m services.prepare assets` first")
    inputs = {
        "count": count,
        "think": think,
        "seed": seed,
        "topk": config.rollout.topk,
        "layout": list(config.rollout.layout),
        "encoder_family": config.retriever.encoder_family,
        "index_factory": config.retriever.index_factory,
        "corpus": file_digest(data.corpus_path),
        "questions": file_digest(data.train_path),
        "code": code_digest("demonstrations", "questions", "kinds", TRANSCRIPT),
    }

    def make(out: Path) -> None:
        with _retriever(config) as retrieve:
            questions = factbook_questions(data.corpus_countries, held_out=False)
            write_demonstrations(out, questions, retrieve, count, think, seed, config.rollout.layout)

    return Step("demonstrations", path, inputs, make)


def _check_step(config: Config, key: str, path: Path, check: Callable[[Path, str], int]) -> Step:
    """Rows are read once and then only when the file has changed; the note of it lies in data.directory, not beside the file."""
    if not path.is_file():
        mend = ", or set trainer.warm_start.epochs to 0" if key == "demonstrations" else ""
        raise PrepareError(f'data.{key}: no file at {path}; with data.source = "folder" you bring it yourself{mend}')
    status = path.stat()
    inputs = {"path": str(path.resolve()), "bytes": status.st_size, "changed": status.st_mtime_ns, "code": code_digest("rows")}

    def make(out: Path) -> None:
        count = check(path, f"data.{key}")
        logger.info("%s: %s rows checked", key, f"{count:,}")
        out.write_text(json.dumps({"file": str(path), "rows": count}) + "\n")

    return Step(f"check of {key}", config.data.directory / "checks" / f"{key}.json", inputs, make)


def _corpus_check(config: Config) -> Iterator[Step]:
    path = config.data.corpus_path
    if path.is_file() and rows.is_packed(path):
        logger.info("corpus: %s is compressed; the retriever unpacks it and checks its rows", path)
    else:
        yield _check_step(config, "corpus", path, rows.check_corpus)


def _question_file_step(config: Config, key: str, path: Path) -> Step:
    if not config.data.question_files(key):
        return _check_step(config, key, path, rows.check_questions)
    _refuse_foreign(path, f"data.{key}", f"data.{key} to that file")
    return convert_step(config, key, path)


def _refuse_foreign(chosen: Path | None, key: str, mend: str) -> None:
    """What already lies at a place of the user's own choosing is theirs: it is not written over."""
    if chosen and chosen.exists() and not manifest_path(chosen).exists():
        raise PrepareError(f"{chosen}: not made by prepare, so not written over; set {mend}, change {key}, or move it away")


def _require_factbook(config: Config, what: str) -> None:
    if config.data.source != "factbook":
        raise PrepareError(f'{what} needs data.source = "factbook": for other data the gold passages are not known')


def _retriever(config: Config) -> Retriever:
    return Retriever(config.retriever.url, config.rollout.topk, config.rollout.retrieval_timeout_s)


def _versions(*packages: str) -> dict[str, str]:
    return {package: package_version(package) for package in packages}
