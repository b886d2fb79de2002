"""`python -m services.prepare assets --config C`, then, with the retriever running, `... demonstrations --config C`.

Exit codes: 0 all is there; 1 something could not be made; 2 the configuration cannot be used.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from services.contract.config import Config, ConfigError, QuestionFile, load_config, mix_problem
from services.contract.telemetry import configure_logging, format_seconds
from services.prepare.errors import PrepareError
from services.prepare.question_rows import Located, locate

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
logger = logging.getLogger("prepare")

ConfigPath = Annotated[Path | None, typer.Option("--config", "-c", envvar="FORAGE_CONFIG", help="TOML file of the run.")]


@cli.command()
def assets(config: ConfigPath = None) -> None:
    """Policy, encoder, corpus and questions; whatever is already there and whole is skipped."""
    from services.prepare.assets import prepare_assets

    _run(prepare_assets, load_config(config))


@cli.command()
def demonstrations(config: ConfigPath = None) -> None:
    """Examples for the warm start, made with the running retriever."""
    from services.prepare.assets import prepare_demonstrations

    _run(prepare_demonstrations, load_config(config))


@cli.command()
def recall(config: ConfigPath = None) -> None:
    """Print how often the running retriever finds the gold passage, by kind of question."""
    from services.prepare.assets import report_recall

    print(report_recall(load_config(config)))


@cli.command()
def check(
    files: Annotated[list[Path] | None, typer.Argument(help="Files of questions; without any, those of the configuration.")] = None,
    config: ConfigPath = None,
) -> None:
    """Print what files of questions hold: rows, sources, lengths, broken and repeated ones, overlaps. Exit code 1: not usable."""
    from services.prepare.summary import report, summarize

    summaries = [summarize(name, located) for name, located in _question_sets(files or [], config)]
    print(report(summaries))
    problem = None if files else mix_problem(load_config(config).data.mix, summaries[0].sources)
    if problem:
        print(f"\n{problem}")
    if problem or not all(summary.usable for summary in summaries):
        raise typer.Exit(1)


def _question_sets(files: list[Path], config: Path | None) -> list[tuple[str, list[Located]]]:
    if files:
        return [(str(path), [Located(QuestionFile(path=path), path, path.name.partition(".")[0])]) for path in files]
    settings = load_config(config)
    paths = {"train_questions": settings.data.train_path, "eval_questions": settings.data.eval_path}
    in_place = {key: [Located(QuestionFile(path=path), path, path.stem)] for key, path in paths.items()}
    return [(key, locate(settings, key) or in_place[key]) for key in paths]


@cli.command()
def corpus(
    files: Annotated[list[Path], typer.Argument(help="SQuAD's JSON files.")],
    to: Annotated[Path, typer.Option("--to", help="The corpus to write, such as corpus.jsonl.")],
) -> None:
    """Make a corpus of the paragraphs of SQuAD's files: each once, with its article's title."""
    from services.prepare.squad_corpus import write_squad_corpus

    made = write_squad_corpus(files, to)
    print(
        f"{to}: {made.passages:,} passages of {made.articles:,} articles; {made.repeated:,} paragraphs came again and were left out"
    )


@cli.command("catalogue")
def catalogue_() -> None:
    """What `hub:NAME` can name."""
    from services.prepare.catalogue import catalogue_table

    print(catalogue_table())


def _run(work: Callable[[Config], None], config: Config) -> None:
    started = time.monotonic()
    work(config)
    logger.info("all is there (%s)", format_seconds(time.monotonic() - started))


def main() -> None:
    configure_logging("prepare")
    try:
        cli()
    except (ConfigError, PrepareError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
