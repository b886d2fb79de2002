"""The `forage` command."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from services.contract.config import Config, ConfigError, dump_config, load_config
from services.contract.telemetry import configure_logging

DEFAULT_CONFIG = "configs/quickstart.toml"
SHARED_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # trainer and engine take turns on the same cores: waiting threads must sleep, not spin
}

app = typer.Typer(help="Trains language models to search.", no_args_is_help=True, add_completion=False)
config_app = typer.Typer(help="Look at a run's configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigOption = Annotated[str, typer.Option("--config", "-c", envvar="FORAGE_CONFIG", help="A TOML file.")]


@app.command()
def up(
    config: ConfigOption = DEFAULT_CONFIG,
    rollout: Annotated[int, typer.Option(min=1, help="How many rollout workers.")] = 1,
) -> None:
    """Start the whole suite as local processes, train to the end, stop everything. Ctrl-C stops it sooner and loses nothing."""
    from services.suite.plan import make_plan
    from services.suite.supervisor import SuiteFailed, Supervisor

    logger = configure_logging("suite")
    resolved = _load(config)
    folder = resolved.run.folder / "suite"
    lock = _lock(folder)
    _refuse_taken_port(resolved)
    port = _free_port()
    environment = os.environ | SHARED_ENVIRONMENT | {"FORAGE_REDIS__URL": f"redis://127.0.0.1:{port}/0"}
    plan = make_plan(resolved, config, folder, port, rollout)
    address = resolved.retriever.url
    supervisor = Supervisor(plan, environment, lambda: logger.info("all services are ready; search at %s/retrieve", address))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: supervisor.request_stop())
    logger.info("run %s: results go to %s", resolved.run.name, resolved.run.folder)
    try:
        supervisor.run()
    except SuiteFailed as error:
        logger.error("%s; everything was stopped", error)
        raise typer.Exit(1) from None
    finally:
        lock.close()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def index(context: typer.Context) -> None:
    """`index build`, `index check`, `index import PATH…`: the retriever's index, by the retriever's own command."""
    os.environ.setdefault("FORAGE_CONFIG", DEFAULT_CONFIG)
    os.execv(sys.executable, [sys.executable, "-m", "services.retriever", "index", *context.args])


@config_app.command("show")
def show(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Print the resolved run: the file, the environment's overrides, the defaults. Secrets are masked."""
    print(msgspec.toml.encode(dump_config(_load(config))).decode(), end="")


def _load(path: str) -> Config:
    try:
        return load_config(path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None


def _lock(folder: Path):  # noqa: ANN202 - a file object, held until the suite ends
    """Two suites must not share one run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"a suite is already running on {folder.parent}: stop it, or give this run another name (run.name)", file=sys.stderr)
        raise typer.Exit(2) from None
    return file


def _refuse_taken_port(config: Config) -> None:
    host, port = config.retriever.host, config.retriever.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            where = "set FORAGE_RETRIEVER__PORT and FORAGE_RETRIEVER__URL to another"
            print(f"the retriever's port {port} cannot be used ({error.strerror}): {where}", file=sys.stderr)
            raise typer.Exit(2) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    app()


if __name__ == "__main__":
    main()
