"""`python -m services.retriever index --config C` builds the index; `serve` answers from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.contract.config import Config, ConfigError, load_config
from services.contract.telemetry import configure_logging
from services.retriever.errors import RetrieverError

if TYPE_CHECKING:
    from services.retriever.backend import DenseBackend, Say

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigPath = Annotated[Path | None, typer.Option("--config", envvar="FORAGE_CONFIG", help="TOML file of the run.")]


@cli.command()
def index(config: ConfigPath = None) -> None:
    """Embed the corpus and build the index; nothing to do when it is there and whole."""
    from services.retriever.build import build_index

    build_index(load_config(config))


@cli.command()
def serve(
    config: ConfigPath = None,
    host: Annotated[str | None, typer.Option(help="Instead of retriever.host.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of retriever.port.")] = None,
) -> None:
    """Answer /retrieve. /health answers at once, /ready when the index is loaded."""
    from services.retriever.serve import serve as run_server

    settings = load_config(config)
    changes = {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    run_server(settings.retriever.model_copy(update=changes), lambda say: _load(settings, config, say))


def _load(settings: Config, path: Path | None, say: Say) -> DenseBackend:
    from services.retriever.backend import load_dense  # torch and faiss: seconds, so in the background

    return load_dense(settings, rebuild_command(path), say)


def rebuild_command(config: Path | None) -> str:
    return "python -m services.retriever index" + (f" --config {config}" if config else "")


def main() -> None:
    configure_logging("retriever")
    try:
        cli()
    except (ConfigError, RetrieverError) as error:
        sys.exit(f"retriever: {error}")


if __name__ == "__main__":
    main()
