"""Checksums taken side by side are those that SGLang takes one after the other. In a real engine: `test_push.py`."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from services.rollout.cpu_checksums import at_once


def test_each_name_has_the_checksum_of_its_own_tensor_in_the_given_order() -> None:
    tensors = {f"layer{n}": n for n in range(50)}
    found = at_once(lambda number: f"{number * number:x}", tensors.items())
    assert list(found.items()) == [(name, f"{n * n:x}") for name, n in tensors.items()]


def test_two_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.rollout.cpu_checksums.os.sched_getaffinity", lambda _: {0, 1})
    both = threading.Barrier(2, timeout=60)

    def meet(name: str) -> str:
        both.wait()
        return name

    assert at_once(meet, [("a", "a"), ("b", "b")]) == {"a": "a", "b": "b"}


def test_a_tensor_that_cannot_be_hashed_is_an_error() -> None:
    def refuse(_: Any) -> str:
        raise TypeError("no such dtype")

    with pytest.raises(TypeError, match="no such dtype"):
        at_once(refuse, [("a", SimpleNamespace())])


def test_nothing_has_no_checksums() -> None:
    assert at_once(str, []) == {}
