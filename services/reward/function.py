"""A reward of one's own: `reward.function = "module:function"`, checked before the first trajectory, and every value it returns.

The function is given one `Episode` and returns the reward, or a dictionary of parts with the reward under "reward". What else is in
the dictionary is stored beside the built-in parts. It runs in a grading process under `reward.time_limit_s`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from billiard.common import terminate_handler_fired
from celery.exceptions import SoftTimeLimitExceeded

from services.contract.config import ConfigError
from services.reward.episode import Episode
from services.reward.grade import BUILT_IN, Function, Grade

MEND = "reward.function must name a function of one argument that returns a number, as in docs/rewards.md"


class FunctionFailed(Exception):
    """`reward.function` raised something or returned what is no reward. The message names the function."""


def load_function(name: str) -> Function:
    """`name` is "module:function", found from the working directory or the Python path. Raises ConfigError."""
    module_name, _, attribute = name.partition(":")
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"reward.function {name}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    function: Any = getattr(module, attribute, None)
    if problem := _problem(function, attribute, module_name):
        raise ConfigError(f"reward.function {name}: {problem}. {MEND}")
    return checked(name, function)


def _problem(function: Any, attribute: str, module: str) -> str | None:
    if function is None:
        return f"{module} has no {attribute}"
    if not callable(function):
        return f"{attribute} is {type(function).__name__}, which cannot be called"
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        return f"{attribute} is async or a generator"
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        return f"{attribute} cannot be called with one argument ({error})"
    except ValueError:
        return None  # some callables written in C do not tell; the first call will
    return None


def checked(name: str, function: Callable[[Episode], Any]) -> Function:
    """The function as `grade` calls it: whatever goes wrong in it is a FunctionFailed that says so."""

    def decide(episode: Episode) -> Grade:
        try:
            returned = function(episode)
        except SoftTimeLimitExceeded:
            raise
        except (Exception, SystemExit) as error:
            if terminate_handler_fired():  # the pool is ending this process, the function has done nothing
                raise
            raise FunctionFailed(f"reward.function {name} raised {type(error).__name__}: {error}") from error
        return _as_grade(name, returned)

    return decide


def _as_grade(name: str, returned: Any) -> Grade:
    parts = dict(returned) if isinstance(returned, dict) else {"reward": returned}
    if "reward" not in parts:
        raise FunctionFailed(f'reward.function {name} returned a dictionary without "reward": {returned!r:.200}')
    for part, value in parts.items():
        if not isinstance(part, str) or not isinstance(value, Real) or not math.isfinite(value):
            raise FunctionFailed(f"reward.function {name} returned {value!r:.200} as {part!r:.100}, which is not a finite number")
    if taken := sorted(parts.keys() & BUILT_IN):
        raise FunctionFailed(f"reward.function {name} returned {', '.join(taken)}, which are names of built-in parts: rename them")
    return Grade(float(parts.pop("reward")), {part: float(value) for part, value in parts.items()})
