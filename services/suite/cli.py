"""The `forage` command."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from services.contract.config import Config, load_config, show_config
from services.contract.telemetry import configure_logging
from services.suite import cli_models, cli_runs
from services.suite.options import DEFAULT_CONFIG, SHARED_ENVIRONMENT, ConfigOption, mistakes_told

app = typer.Typer(help="Trains language models to search.", no_args_is_help=True, add_completion=False)
config_app = typer.Typer(help="Look at a run's configuration.", no_args_is_help=True)
data_app = typer.Typer(help="Look at questions before training on them; make a corpus of SQuAD.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(cli_runs.app, name="runs")
app.command("export")(cli_models.export)
app.command("eval")(cli_models.evaluate)


@app.command()
def up(
    config: ConfigOption = DEFAULT_CONFIG,
    rollout: Annotated[int, typer.Option(min=1, help="How many rollout workers.")] = 1,
) -> None:
    """Start the whole suite as local processes, train to the end, stop everything. Ctrl-C stops it sooner and loses nothing."""
    from services.suite.plan import make_plan
    from services.suite.ports import free_port, hold_folder, refuse_taken_port
    from services.suite.redis_address import address_file
    from services.suite.supervisor import SuiteFailed, Supervisor

    logger = configure_logging("suite")
    resolved = _load(config)
    folder = resolved.run.folder / "suite"
    with mistakes_told():
        lock = hold_folder(folder)
        refuse_taken_port(resolved)
    port = free_port()
    redis_url = f"redis://127.0.0.1:{port}/0"
    environment = os.environ | SHARED_ENVIRONMENT | {"FORAGE_REDIS__URL": redis_url}
    plan = make_plan(resolved, config, folder, port, rollout)
    address = resolved.retriever.url
    supervisor = Supervisor(plan, environment, lambda: logger.info("all services are ready; search at %s/retrieve", address))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: supervisor.request_stop())
    logger.info("run %s: results go to %s", resolved.run.name, resolved.run.folder)
    address_file(resolved).write_text(redis_url)
    try:
        supervisor.run()
    except SuiteFailed as error:
        logger.error("%s; everything was stopped", error)
        raise typer.Exit(1) from None
    finally:
        address_file(resolved).unlink(missing_ok=True)
        lock.close()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def index(context: typer.Context) -> None:
    """`index build`, `index check`, `index import PATH…`: the retriever's index, by the retriever's own command."""
    os.environ.setdefault("FORAGE_CONFIG", DEFAULT_CONFIG)
    _become("services.retriever", "index", *context.args)


def _become(module: str, *arguments: str) -> None:
    """A service's own command in place of this process: no service imports another."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


@app.command()
def prepare(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Download or make what the run starts from: models, corpus, questions. What is here and whole is skipped."""
    _become("services.prepare", "assets", "--config", config)


@data_app.command("check", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def data_check(context: typer.Context) -> None:
    """`data check FILE…` or `data check --config C`: rows, sources, lengths, broken and repeated ones, overlaps."""
    os.environ.setdefault("FORAGE_CONFIG", DEFAULT_CONFIG)
    _become("services.prepare", "check", *context.args)


@data_app.command("corpus", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def data_corpus(context: typer.Context) -> None:
    """`data corpus FILE… --to corpus.jsonl`: the paragraphs of SQuAD's files as a corpus."""
    _become("services.prepare", "corpus", *context.args)


@data_app.command("catalogue")
def data_catalogue() -> None:
    """What `hub:NAME` can name in a configuration."""
    _become("services.prepare", "catalogue")


@app.command()
def status(
    config: ConfigOption = DEFAULT_CONFIG,
    once: Annotated[bool, typer.Option("--once", help="Print one table and leave. So without a terminal, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one look as JSON and leave.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Groups, engines, queues, speed, the trainer's last step, what was given up, what needs a look; Ctrl-C leaves.

    The exit code of one look is 0 when Redis answers and knows the run, else 1.
    """
    from services.suite.status import print_once, watch

    resolved = _load(config)
    if once or as_json or not sys.stdout.isatty():
        raise typer.Exit(0 if print_once(resolved, as_json) else 1)
    watch(resolved, every)


@app.command()
def trajectory(
    identifier: Annotated[str | None, typer.Argument(metavar="ID", help="Or its beginning. Without: the latest ones.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    tokens: Annotated[bool, typer.Option("--tokens", help="Every token with its log-prob and policy version.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many of the latest.")] = 20,
) -> None:
    """One episode: what the policy wrote, what it was shown, what it earned. Without an ID: the latest episodes."""
    from services.suite.catalogue import NotFound
    from services.suite.text import one_line
    from services.suite.trajectory import list_latest, show

    resolved = _load(config)
    try:
        if identifier is None:
            list_latest(resolved, count, as_json)
        else:
            show(resolved, identifier, tokens, as_json)
    except NotFound as error:
        print(one_line(str(error)), file=sys.stderr)
        raise typer.Exit(1) from None


@config_app.command("show")
def show(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Print the resolved run: the file, the environment's overrides, the defaults. Secrets are left out."""
    print(show_config(_load(config)), end="")


def _load(path: str) -> Config:
    with mistakes_told():
        return load_config(path)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
