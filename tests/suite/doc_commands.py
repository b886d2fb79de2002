"""Whether a command line in the docs can be meant: programs, subcommands, options, services, modules. Nothing is started.

`complaint` takes a command's words and says what is wrong with it, or None. Each program has its own function below.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
import yaml

from tests.suite.doc_addresses import curl_problem

COMPOSE_FILE = "docker-compose.yml"
COMPOSE: dict[str, set[str]] = {
    "": {"-f=", "-p=", "--profile="},
    "build": set(),
    "cp": set(),
    "down": {"-v"},
    "exec": set(),
    "logs": {"-f"},
    "ps": set(),
    "run": {"--rm", "-v=", "--entrypoint="},
    "up": {"-d", "--build", "--wait", "--scale="},
}
"""Of `docker compose` itself ("") and of its commands the options that the docs use; one that ends in = takes a value."""
TYPER = ("services.retriever", "services.prepare", "services.suite")
PASSED_ON = {
    ("index",): ("services.retriever", "index"),
    ("data", "check"): ("services.prepare", "check"),
    ("data", "corpus"): ("services.prepare", "corpus"),
}
"""`forage` commands that hand their words to a service's own command."""
OWN = {"configs/mine.toml"}
"""Configurations that the reader writes."""
# typer brings its own copy of click, which it does not export but for this error; its parent is what any wrong word raises.
WrongWord: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]


class Wrong(Exception):
    """What is wrong with a command."""


def complaint(line: str) -> str | None:
    try:
        for words in commands_in(line):
            check(words)
    except (Wrong, ValueError) as error:
        return f"{line.strip()}: {error}"
    return None


def commands_in(line: str) -> Iterator[list[str]]:
    """`A=1 b | c; d` are `A=1 b`, `c` and `d`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in lexer:
        if set(word) <= set(";&|"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def check(words: list[str]) -> None:
    words = words[1:] if words[:1] == ["export"] else words
    while words and (setting := re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", words[0])):
        if setting[1] == "FORAGE_CONFIG":
            check_config_file(setting[2])
        words = words[1:]
    if not words:
        return
    if words[0] not in PROGRAMS:
        raise Wrong(f"{words[0]} is no program that the docs may use; is it misspelt, or to be added to {Path(__file__).name}?")
    PROGRAMS[words[0]](words[1:])


def check_config_file(path: str) -> None:
    if path.startswith("configs/") and path not in OWN and not Path(path).is_file():
        raise Wrong(f"there is no {path}")


def forage(words: list[str]) -> None:
    if words[:1] == ["test"]:
        return None  # in the launcher alone; the rest goes to pytest
    for names, (module, command) in PASSED_ON.items():
        if tuple(words[: len(names)]) == names:
            return in_tree(module, [command, *words[len(names) :]])
    return in_tree("services.suite", words)


@cache
def command_tree(module: str) -> Any:
    """The commands of a service, as typer reads them."""
    inside = importlib.import_module(f"{module}.cli" if module == "services.suite" else f"{module}.__main__")
    return typer.main.get_command(inside.app if module == "services.suite" else inside.cli)


def in_tree(module: str, words: list[str]) -> None:
    """Parse as typer would, without calling the command."""
    command, context = command_tree(module), None
    while hasattr(command, "commands"):
        name = words[0] if words else ""
        context = command.context_class(command, info_name=command.name, parent=context)
        if name not in command.commands:
            raise Wrong(f"{name or 'nothing'} is none of {', '.join(command.commands)}")
        command, words = command.commands[name], words[1:]
    if not words:
        return  # the name alone: what it needs besides is said elsewhere
    for option, path in pairwise(words):
        if option in ("-c", "--config"):
            check_config_file(path)
    try:
        command.make_context(command.name, list(words), parent=context)
    except WrongWord as error:
        raise Wrong(error.format_message()) from None  # type: ignore[attr-defined]
    except typer.Exit:
        pass  # --help


def docker(words: list[str]) -> None:
    if words[:1] != ["compose"]:
        raise Wrong("only `docker compose` is known here")
    options, words = take_options(words[1:], COMPOSE[""])
    files = [value for name, value in options if name == "-f"] or [COMPOSE_FILE]
    if missing := [name for name in files if not Path(name).is_file()]:
        raise Wrong(f"there is no {missing[0]}")
    services = compose_services(tuple(files))
    profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
    if unknown := {value for name, value in options if name == "--profile"} - profiles:
        raise Wrong(f"no service has the profile {unknown.pop()}")
    command = words[0] if words else ""
    if command not in COMPOSE or not command:
        raise Wrong(f"{command or 'nothing'} is no command of docker compose that the docs may use")
    options, rest = take_options(words[1:], COMPOSE[command])
    scaled = [value.partition("=")[0] for name, value in options if name == "--scale"]
    in_container(command, options, [*scaled, *rest], services, len(scaled))


def in_container(
    command: str, options: list[tuple[str, str]], words: list[str], services: dict[str, dict[str, Any]], scaled: int
) -> None:
    """The services that are named, and what `run` and `exec` run in one."""
    if command == "cp":
        words = [word.partition(":")[0] for word in words if ":" in word]
    alone = command in ("run", "exec")
    for name in words[: scaled + 1] if alone else words:
        if name not in services:
            raise Wrong(f"there is no service {name}")
    if alone and not words:
        raise Wrong(f"docker compose {command} which service?")
    if command == "exec":
        check(words[1:])
    if command == "run" and not dict(options).get("--entrypoint"):
        check([*entrypoint(words[0], services[words[0]]), *words[1:]])


@cache
def compose_services(files: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    read = [yaml.safe_load(Path(name).read_text())["services"] for name in files]
    return {name: service for services in reversed(read) for name, service in services.items()}


def entrypoint(name: str, service: dict[str, Any]) -> list[str]:
    """As compose has it, or the image, which is built from a Dockerfile of a service."""
    if "entrypoint" in service:
        return service["entrypoint"]
    image = service["image"].removeprefix("forage-")
    line = re.search(r"^ENTRYPOINT (.*)$", Path(f"services/{image}/Dockerfile").read_text(), re.MULTILINE)
    if line is None:
        raise Wrong(f"the image of {name} has no entrypoint")
    return json.loads(line[1])


def take_options(words: list[str], known: set[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Options at the front with their values, and the rest."""
    options: list[tuple[str, str]] = []
    while words and words[0].startswith("-"):
        name, *words = words
        if f"{name}=" in known and words:
            options.append((name, words[0]))
            words = words[1:]
        elif name in known:
            options.append((name, ""))
        else:
            raise Wrong(f"{name} is no option there, or lacks its value")
    return options, words


def python(words: list[str]) -> None:
    if words[:1] != ["-m"] or len(words) < 2:
        raise Wrong("only `python -m MODULE` is known here")
    module, rest = words[1], words[2:]
    if module == "celery":
        return celery(rest)
    if module in TYPER:
        return in_tree(module, rest)
    base = Path(module.replace(".", "/"))
    source = next((path for path in (base.with_suffix(".py"), base / "__main__.py") if path.is_file()), None)
    if source is None:
        raise Wrong(f"there is no module {module} to run")
    return argparse_words([source] if source.name != "__main__.py" else sorted(base.glob("*.py")), rest)


def argparse_words(sources: list[Path], words: list[str]) -> None:
    """Against the `add_argument` calls in these files, read and not run."""
    flags: set[str] = set()
    choices: set[str] = set()
    for call in (node for source in sources for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            first = ast.literal_eval(call.args[0])
            if first.startswith("-"):
                flags.add(first)
            else:
                choices |= _strings(sources)
    for word, after in pairwise([*words, ""]):
        if word.startswith("-") and word not in flags:
            raise Wrong(f"{word} is none of {', '.join(sorted(flags))}")
        if word == "--config":
            check_config_file(after)
    if words and not words[0].startswith("-") and words[0] not in choices:
        raise Wrong(f"{words[0]} is nothing that it takes")


def _strings(sources: list[Path]) -> set[str]:
    """Every text in these files: a positional word has to be one of its choices, which stand there."""
    nodes = (node for source in sources for node in ast.walk(ast.parse(source.read_text())))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def celery(words: list[str]) -> None:
    from celery.app.control import Inspect
    from celery.bin.celery import celery as commands

    options, rest = take_options(words, {"-A="})
    if not options or importlib.util.find_spec(options[0][1]) is None:
        raise Wrong("-A names no module")
    if not rest or rest[0] not in commands.commands:
        raise Wrong(f"{' '.join(rest) or 'nothing'} is no command of celery")
    if rest[0] == "inspect" and not hasattr(Inspect, rest[1]):
        raise Wrong(f"celery inspect knows no {rest[1]}")


def torchrun(words: list[str]) -> None:
    if "-m" not in words:
        raise Wrong("torchrun of which module? (-m)")
    python(words[words.index("-m") :])


def curl(words: list[str]) -> None:
    if problem := curl_problem(words):
        raise Wrong(problem)


def pip(words: list[str]) -> None:
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = re.findall(r"^forage\[(\w+)\]$", words[-1]) if words else []
    if not wanted or wanted[0] not in extras:
        raise Wrong(f"forage has no extra of that name, only {', '.join(extras)}")


KUBECTL = {"apply", "delete", "get", "logs", "scale"}
MANIFESTS = "deploy/kubernetes/base"


def kubectl(words: list[str]) -> None:
    """Commands that the docs use; the folders and objects that they name are there."""
    words = words[2:] if words[:2] == ["-n", "forage"] else words
    if not words or words[0] not in KUBECTL:
        raise Wrong(f"the docs use none of kubectl's commands but {', '.join(sorted(KUBECTL))}")
    for word in words[1:]:
        if word.startswith("deploy/") and not (Path(word) / "kustomization.yaml").is_file():
            raise Wrong(f"there is no kustomization in {word}")
    for kind, name in [word.split("/") for word in words[1:] if word.startswith(("job/", "deployment/"))]:
        if not re.search(rf"^kind: {kind}\nmetadata:\n  name: {name}$", _manifests(), re.MULTILINE | re.IGNORECASE):
            raise Wrong(f"there is no {kind} {name} in {MANIFESTS}")


def _manifests() -> str:
    return "".join(path.read_text() for path in Path(MANIFESTS).glob("*.yaml"))


def caddy(words: list[str]) -> None:
    config = words[words.index("--config") + 1]
    if words[0] != "run" or not Path(config).is_file():
        raise Wrong(f"there is no {config} to run")


def cp(words: list[str]) -> None:
    if not Path(words[0]).exists():
        raise Wrong(f"there is no {words[0]}")


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "./forage": forage,
    "forage": forage,
    "docker": docker,
    "kubectl": kubectl,
    "python": python,
    "celery": celery,
    "torchrun": torchrun,
    "caddy": caddy,
    "cp": cp,
    "curl": curl,
    "pip": pip,
}
