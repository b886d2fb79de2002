"""`python -m services.retriever index build --config C` builds the index, `index check` and `index import` judge one and adopt
one; `serve` answers from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.contract.config import ConfigError, load_config
from services.contract.telemetry import configure_logging
from services.retriever.errors import IndexMismatch, RetrieverError

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
indexes = typer.Typer(no_args_is_help=True, help="Build the index, check it, or adopt a published one.")
cli.add_typer(indexes, name="index")

ConfigPath = Annotated[Path | None, typer.Option("--config", "-c", envvar="FORAGE_CONFIG", help="TOML file of the run.")]


@indexes.command()
def build(config: ConfigPath = None) -> None:
    """Build what retriever.backends needs: embeddings with their index, the BM25 index. What is there and whole is left alone."""
    settings = load_config(config)
    backends = set(settings.retriever.backends)
    if backends & {"dense", "hybrid"}:
        from services.retriever.build import build_index

        build_index(settings)
    if backends & {"bm25", "hybrid"} and settings.retriever.bm25.index is None:
        from services.retriever.bm25_build import build_bm25

        build_bm25(settings)


@indexes.command()
def check(config: ConfigPath = None) -> None:
    """Whether what retriever.backends needs is whole, of this corpus and encoder, and finds what was put in. Exit code 1 if not."""
    settings, rebuild = load_config(config), rebuild_command(config)
    backends = set(settings.retriever.backends)
    if backends & {"dense", "hybrid"}:
        from services.retriever.check import check_index

        folder = settings.data.index_folder
        if problems := check_index(settings):
            raise IndexMismatch(f"{folder}: {'; '.join(problems)}. Rebuild it: {rebuild}")
        print(f"{folder}: whole, of this corpus and this encoder; sampled passages find themselves")
    if backends & {"bm25", "hybrid"}:
        from services.retriever.bm25 import load_bm25  # all that can be checked is checked whenever it is loaded

        bm25 = load_bm25(settings, rebuild, lambda text: None)
        print(f"BM25: undamaged, of this corpus; sampled documents are its passages ({bm25.info['passages']:,})")


@indexes.command("import")
def import_(
    parts: Annotated[list[Path], typer.Argument(help="A FAISS index file, or its parts in their order.")],
    config: ConfigPath = None,
    remove_parts: Annotated[
        bool, typer.Option("--remove-parts", help="Delete them once the index stands; else they stay.")
    ] = False,
) -> None:
    """Adopt a published FAISS index, such as Search-R1's e5_Flat.index, after checking that it is of this corpus and encoder."""
    from services.retriever.adopt import import_index

    import_index(load_config(config), parts, remove_parts)


@cli.command()
def serve(
    config: ConfigPath = None,
    host: Annotated[str | None, typer.Option(help="Instead of retriever.host.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of retriever.port.")] = None,
) -> None:
    """Answer /retrieve. /health answers at once, /ready when the index is loaded."""
    from services.retriever.loading import loaders
    from services.retriever.serve import serve as run_server

    settings = load_config(config)
    changes = {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    run_server(settings.retriever.model_copy(update=changes), loaders(settings, rebuild_command(config)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is closed; an ordinary exit would have triton's bindings print a page of what they leaked


def rebuild_command(config: Path | None) -> str:
    return "python -m services.retriever index build" + (f" --config {config}" if config else "")


def main() -> None:
    configure_logging("retriever")
    try:
        cli()
    except (ConfigError, RetrieverError) as error:
        sys.exit(f"retriever: {error}")


if __name__ == "__main__":
    main()
