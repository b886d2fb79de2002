"""What the docs say is there: files, keys of the configuration with their values, environment variables, addresses.

Each function takes a page and gives what is wrong with it, a line each; an empty list is a page that holds.
"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from services.contract.config import Config
from services.contract.config.base import Section
from tests.suite.doc_addresses import routes
from tests.suite.doc_commands import OWN, complaint
from tests.suite.doc_pages import Page

FOLDERS = ("services", "tests", "docs", "configs", "benchmarks", "docker", "scripts")
STARTS = ("./forage", "forage ", "docker ", "python -m", "curl ", "torchrun ", "celery ", "pip install '", "… ")
FILE_ENDINGS = {"py", "md", "toml", "json", "jsonl", "yml", "yaml"}
NO_SECTION = {"answer", "n"}
"""In brackets and back-ticks, and no section of the configuration: a tag in a passage, the shape of a tensor."""
PACKAGES = {"HF": "huggingface_hub", "WANDB": "wandb", "SGLANG": "sglang"}
"""Whose environment variables begin so."""
BY_LIBRARIES = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
"""Variables that compiled libraries read: PyTorch's gloo, and NCCL."""
VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]*(?:_+[A-Z0-9]+)+\b")
KEY = re.compile(r"(\[+(?P<section>[a-z_.0-9]+)\]+ ?)?(?P<name>[a-z_0-9]+(\.[a-z_0-9]+)*)?( = (?P<value>.+))?")


def broken_links(page: Page) -> list[str]:
    return [f"{link}: {what}" for link in page.links if (what := _link_problem(page, link))]


def _link_problem(page: Page, link: str) -> str | None:
    if link.startswith(("http://", "https://")):
        return None
    name, _, anchor = link.partition("#")
    target = page.path.parent / name if name else page.path
    if target != page.path and not target.exists():
        return "there is no such file"
    if anchor and anchor not in (page if target == page.path else Page.read(target)).anchors:
        return "there is no such heading"
    return None


def missing_files(page: Page) -> list[str]:
    """Files and folders of this project in back-ticks that are not there; `*` stands for anything."""
    paths = [span for span in page.spans if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]+", span) and span not in OWN]
    return [f"{path}: there is no such file" for path in paths if not any(Path().glob(path.rstrip("/")))]


def broken_commands(page: Page) -> list[str]:
    lines = [span for span in page.spans if span.startswith(STARTS) or re.match(r"FORAGE_\w+=\S+ ", span)]
    for block in page.blocks("bash"):
        lines += list(_lines(block))
    told = (complaint(re.sub(r"^… ", "docker compose run --rm ", line)) for line in lines)
    return [problem for problem in told if problem]


def _lines(block: str) -> Iterator[str]:
    """Commands of a block, and those that its comments name."""
    for line in block.replace("\\\n", " ").split("\n"):
        command, _, comment = re.sub(r"^#", " #", line).partition(" #")
        yield command
        yield from (found.strip() for found in re.findall(r"\./forage [^;,()]*", comment))


def unknown_keys(page: Page) -> list[str]:
    """Of keys in back-ticks, in blocks of TOML, and in tables of keys."""
    found = [problem for span in page.spans if (problem := _span_problem(span))]
    for block in page.blocks("toml"):
        found += _toml_problems(tomllib.loads(block), Config, "")
    for head, *rows in page.tables:
        if told := re.fullmatch(r"key of `\[([a-z_.]+)\]`", head[0]):
            found += [f"[{told[1]}] {row[0]}: no such key" for row in rows if not _fields(f"{told[1]}.{row[0].strip('`')}")]
    return found


def _span_problem(span: str) -> str | None:
    parts = KEY.fullmatch(span)
    path = _path(parts) if parts else None
    if parts is None or path is None:
        return None
    fields, value = _fields(path), parts["value"]
    if not fields:  # of `name = value` without a section, only what could stand in a file is a claim: not `fed = waiting + leased`
        return f"{span}: no such key" if parts["section"] or "." in path or _is_toml(value) else None
    return f"{span}: no such value" if _is_toml(value) and not _any_takes(fields, value) else None


def _path(parts: re.Match[str]) -> str | None:
    """The key that a span speaks of; None where it speaks of something else."""
    section, name = parts["section"], parts["name"]
    if section:
        return None if section in NO_SECTION else ".".join(filter(None, (section, name)))
    if not name or "." not in name:
        return name if parts["value"] else None  # one word alone may be anything
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    is_file = last in FILE_ENDINGS and not _fields(name)
    return name if first in _sections() and not is_file else None


def _is_toml(value: str | None) -> bool:
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return False
    return value is not None


def _any_takes(fields: list[FieldInfo], value: str) -> bool:
    return any(_takes(field, tomllib.loads(f"value = {value}")["value"]) for field in fields)


def _takes(field: FieldInfo, value: object) -> bool:
    try:
        create_model("OneKey", key=(field.annotation or Any, field)).model_validate({"key": value})
    except ValidationError:
        return False
    return True


def _toml_problems(values: dict[str, Any], model: type[Section], where: str) -> list[str]:
    """Keys and values one by one: a block shows part of a file, so its whole need not agree with itself."""
    found: list[str] = []
    for key, value in values.items():
        field = model.model_fields.get(key)
        inner = _section_in(field.annotation) if field else None
        if field is None:
            found.append(f"{where}{key}: no such key")
        elif inner and isinstance(value, dict):
            found += _toml_problems(value, inner, f"{where}{key}.")
        elif not _takes(field, value):
            found.append(f"{where}{key} = {value!r}: no such value")
    return found


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation is, or holds: `QuestionFile` of `list[QuestionFile] | Path`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _section_in(part))), None)


def _walk(model: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if inner := _section_in(field.annotation):
            yield from _walk(inner, f"{prefix}{name}.")


@cache
def _every_key() -> dict[str, FieldInfo]:
    return dict(_walk(Config, ""))


@cache
def _sections() -> set[str]:
    """Whole names, and the last parts of nested ones (`objective` for `trainer.objective`)."""
    whole = {path for path, field in _every_key().items() if _section_in(field.annotation)}
    return whole | {path.rpartition(".")[2] for path in whole}


def _fields(path: str) -> list[FieldInfo]:
    """The keys that this may name: in full, or without the outer sections (`objective.advantage`, `advantage`)."""
    return [field for known, field in _every_key().items() if known == path or known.endswith(f".{path}")]


def unknown_variables(text: str) -> list[str]:
    """Environment variables that nothing reads, and FORAGE_SECTION__KEY of no such key."""
    found = []
    for name in sorted(set(VARIABLE.findall(text))):
        if name.startswith("FORAGE_") and "__" in name:
            known = bool(_fields(name.removeprefix("FORAGE_").lower().replace("__", ".")))
        else:
            known = re.search(rf"\b{name}\b", _readers() + _package(name.partition("_")[0])) is not None
        if not known and name not in BY_LIBRARIES:
            found.append(f"{name}: nothing reads it")
    return found


@cache
def _readers() -> str:
    """All that reads environment variables here."""
    files = [
        *Path("services").rglob("*.py"),
        *Path("services").glob("*/Dockerfile"),
        *Path().glob("docker-compose*.yml"),
        Path("forage"),
    ]
    return "\n".join(path.read_text() for path in files)


@cache
def _package(prefix: str) -> str:
    spec = importlib.util.find_spec(PACKAGES[prefix]) if prefix in PACKAGES else None
    if spec is None or spec.origin is None:
        return ""
    settings = ["constants.py", "env.py", "srt/environ.py"]
    return "\n".join(path.read_text() for name in settings if (path := Path(spec.origin).parent / name).is_file())


def unknown_addresses(page: Page) -> list[str]:
    """`GET /ready` and the like."""
    named = [found.groups() for span in page.spans if (found := re.fullmatch(r"(GET|POST) (/\w+)", span))]
    return [f"{method} {path}: the retriever has none" for method, path in named if (method, path) not in routes()]


def unbalanced(page: Page) -> list[str]:
    """Paragraphs with a back-tick too many or too few; what stands between them could not be told."""
    return [paragraph.strip()[:80] for paragraph in page.paragraphs if paragraph.count("`") % 2]
