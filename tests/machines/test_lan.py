"""The machines of these tests are what they claim to be."""

from __future__ import annotations

import subprocess

import pytest

from tests.machines.lan import Lan

pytestmark = pytest.mark.timeout(900)

ASK = "import socket; print(socket.create_connection(('{0}', 6379), timeout=1).getpeername()[0])"


def connects(lan: Lan, one: str, other: str) -> bool:
    try:
        return lan[one]("python3", "-c", ASK.format(other)).strip() == lan[other].address
    except subprocess.CalledProcessError as error:
        assert "Error" in error.stderr
        return False


def test_each_has_a_name_and_a_tmp_of_its_own(lan: Lan) -> None:
    lan["worker"]("touch", "/tmp/mine")
    assert lan["worker"]("hostname").strip() == "worker"
    with pytest.raises(subprocess.CalledProcessError):
        lan["grader"]("ls", "/tmp/mine")


@pytest.mark.usefixtures("redis_on_head")
def test_a_cut_breaks_one_way_and_an_unplugged_machine_reaches_nobody(lan: Lan) -> None:
    assert connects(lan, "worker", "head")
    with lan.cut("worker", "head"):
        assert not connects(lan, "worker", "head")
        assert connects(lan, "grader", "head")
    with lan["head"].unplugged():
        assert not connects(lan, "worker", "head")
        assert not connects(lan, "grader", "head")
    lan.until(lambda: connects(lan, "worker", "head"), "plugged in again, it is found", 60)
