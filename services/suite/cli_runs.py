"""`forage runs list`, `forage runs compare` and `forage runs table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from services.contract.config import load_config
from services.contract.telemetry import format_seconds
from services.suite.options import DEFAULT_CONFIG, PUBLISHED_HELP, ConfigOption, mistakes_told

app = typer.Typer(help="Runs that were made, and how two differ.", no_args_is_help=True)


@app.command("list")
def list_runs(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """The runs under `run.directory`: how far each is, its last reward, its last evaluation."""
    from services.suite.compare import markdown
    from services.suite.run_files import read_progress
    from services.suite.run_models import runs_in

    with mistakes_told():
        resolved = load_config(config)
    rows = [["run", "stage", "step", "reward", "last evaluation", "EM %", "written"]]
    for folder in runs_in(resolved.run.directory):
        own = resolved.model_copy(update={"run": resolved.run.model_copy(update={"name": folder.name})})
        progress = read_progress(own, [])
        step, last = progress.step or {}, (progress.evaluations or [{}])[-1]
        reward, match = step.get("reward/mean"), last.get("eval/exact_match")
        cells = [folder.name, progress.stage or "–", str(step.get("step", "–"))]
        cells += [f"{reward:.3f}" if isinstance(reward, float) else "–", str(last.get("label", "–"))]
        cells += [f"{100 * match:.1f}" if isinstance(match, float) else "–"]
        rows.append([*cells, f"{format_seconds(progress.written_s)} ago" if progress.written_s is not None else "–"])
    print(markdown(rows) if len(rows) > 1 else f"no run under {resolved.run.directory}")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run's name or folder, or the folder of an evaluation.")],
    b: Annotated[str, typer.Argument(metavar="B", help="As A.")],
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it into this PNG file; needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The paired differences as JSON.")] = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Two runs or evaluations side by side, and paired on the questions that both answered."""
    from services.suite.compare import comparison, differences, read_side
    from services.suite.compare_plot import plot as draw
    from services.suite.text import visible

    with mistakes_told():
        directory = load_config(config).run.directory
        sides = read_side(a, directory), read_side(b, directory)
        if as_json:
            print(json.dumps(msgspec.to_builtins(differences(*sides)), indent=1))
        else:
            print(visible(comparison(*sides)))
        if plot:
            draw(*sides, plot)


@app.command()
def table(
    evaluations: Annotated[list[str], typer.Argument(metavar="[NAME=]FOLDER", help="Folders of `forage eval`, a row each.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write table.md, table.json and table.png into this folder.")] = None,
    published: Annotated[str, typer.Option("--published", help=PUBLISHED_HELP)] = "",
) -> None:
    """Evaluations in one table, as papers print them: a row for each, a column for each set, published rows below."""
    from services.suite.published import published_rows
    from services.suite.score_files import write_table
    from services.suite.score_table import as_markdown, make_table, read_evaluations

    with mistakes_told():
        made = make_table(read_evaluations(evaluations), published_rows(published))
    print(as_markdown(made))
    if out:
        print("\n" + "\n".join(f"wrote {path}" for path in write_table(made, out)))
