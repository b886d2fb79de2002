"""What Prometheus reads on /metrics of the trainer: the latest value of every figure, and counters of what this process did.

`reward/mean` is the gauge `forage_trainer_reward_mean`. Figures of an evaluation carry the kind of question as the label `source`
("all" for the whole): `eval/capital/f1` is `forage_trainer_eval_f1{source="capital"}`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.contract.config import ConfigError
from services.trainer.monitoring.journal import Row, numbers

PREFIX = "forage_trainer_"
_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]")


class Exporter(Collector):
    """Answers on a port, in a thread, until the process ends. Raises ConfigError when the port is taken."""

    def __init__(self, host: str, port: int, values: dict[str, float]) -> None:
        self._values = dict(values)
        registry = CollectorRegistry()
        registry.register(self)
        self._steps = Counter(PREFIX + "steps", "GRPO steps of this process.", registry=registry)
        self._groups = Counter(PREFIX + "groups", "Groups trained on by this process.", registry=registry)
        self._tokens = Counter(PREFIX + "tokens", "Tokens of the policy in these groups.", registry=registry)
        self._warnings = Counter(
            PREFIX + "warnings", "Early signs of collapse that showed themselves.", ["sign"], registry=registry
        )
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            mend = "set trainer.metrics_port to a free port, or 0 for none"
            raise ConfigError(f"cannot listen on {host}:{port} ({error}): {mend}") from None

    def record(self, row: Row) -> None:
        self._values = (
            self._values | numbers(row) | {"step": row["step"]}
        )  # replaced, not changed: a reader may be going through it
        if row["kind"] == "grpo":
            self._steps.inc()
            self._groups.inc(row["reward/groups"])
            self._tokens.inc(row["search/model_tokens_total"])
        elif row["kind"] == "warning":
            self._warnings.labels(row["sign"]).inc()

    def end(self) -> None:
        """The last figures stay to be read for as long as the process lives."""

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        families: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for name, value in self._values.items():
            family, source = _place(name)
            families[family].append((source, value))
        for family, values in families.items():
            evaluated = family.startswith("eval_")
            gauge = GaugeMetricFamily(PREFIX + family, "See docs/metrics.md.", labels=["source"] if evaluated else [])
            for source, value in values:
                gauge.add_metric([source] if evaluated else [], value)
            yield gauge


def _place(name: str) -> tuple[str, str]:
    """(name of the gauge, source) of a figure."""
    group, _, rest = name.partition("/")
    source, _, figure = rest.rpartition("/")
    return _NOT_IN_A_NAME.sub("_", f"{group}_{figure}" if figure else group), source or "all"
