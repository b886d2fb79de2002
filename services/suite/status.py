"""`forage status`: one look at everything that can be reached, again and again.

| what is away                       | what is shown                                                             |
|------------------------------------|---------------------------------------------------------------------------|
| Redis                              | what is wrong with it, the run folder's side, and the next look tries again |
| the run, in a Redis that answers   | so, with the runs that it does know                                       |
| the run's folder (another machine) | Redis's side alone                                                        |
"""

from __future__ import annotations

import contextlib
import json
import time

import msgspec
from rich.live import Live

from services.contract.config import Config
from services.suite.attention import file_attention, redis_attention
from services.suite.observe import LOOK_ERRORS, NoRun, Observer, Snapshot
from services.suite.redis_address import problem_in_words, with_address
from services.suite.run_files import read_parts, read_progress
from services.suite.status_view import Status, render
from services.suite.text import make_console, say


class Watch:
    """Looks at a run, and finds Redis again when the suite was started anew on another port."""

    def __init__(self, config: Config) -> None:
        self.configured, self.config = config, with_address(config)
        self._observer = Observer(self.config)

    def look(self) -> Status:
        self._follow_address()
        seen, problem = self._look_at_redis()
        parts = read_parts(self.config)
        progress = read_progress(self.config, parts)
        attention = [*(redis_attention(self.config, seen) if seen else ()), *file_attention(progress, parts)]
        return Status(self.config.run.name, time.time(), self.config.redis.url, seen, problem, progress, parts, attention)

    def _follow_address(self) -> None:
        config = with_address(self.configured)
        if config.redis.url != self.config.redis.url:
            self.config, self._observer = config, Observer(config)

    def _look_at_redis(self) -> tuple[Snapshot | None, str | None]:
        try:
            return self._observer.look(), None
        except NoRun as error:
            return None, str(error)
        except LOOK_ERRORS as error:
            return None, problem_in_words(self.config, error)


def print_once(config: Config, as_json: bool) -> bool:
    """Print one look. Returns whether Redis answered and knows the run."""
    status = Watch(config).look()
    if as_json:
        print(json.dumps(msgspec.to_builtins(status), indent=1))  # ASCII only, so nothing in it can steer a terminal
    else:
        say(render(status))
    return status.redis is not None


def watch(config: Config, every_s: float) -> None:
    """Draw the table again and again until Ctrl-C; the last one stays on the screen."""
    eyes = Watch(config)
    status = eyes.look()
    with contextlib.suppress(KeyboardInterrupt), Live(console=make_console(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(render(status), refresh=True)
            time.sleep(every_s)
            status = eyes.look()
    say(render(status))
