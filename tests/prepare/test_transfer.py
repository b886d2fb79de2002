"""Downloads from a hub that answers, breaks off, stalls and lies; all over real HTTP (see hub_server)."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import huggingface_hub.constants
import pytest

from services.prepare.catalogue import Entry
from services.prepare.errors import PrepareError
from services.prepare.hub import Patience, remote_files
from services.prepare.transfer import Placed, Transfer, place_joined
from tests.prepare.hub_server import Fault, HubServer
from tests.prepare.small_hub import CONTENT, ENTRY, INDEX, QUICK, REPO, fetched, noise


def transfer(folder: Path, range_bytes: int = 1 << 20) -> Transfer:
    placed = [Placed(file, folder / file.name) for file in remote_files(ENTRY, QUICK)]
    return Transfer(placed, folder / "journal.json", QUICK, range_bytes)


def test_a_file_comes_whole_by_way_of_the_redirect(hub: HubServer, tmp_path: Path) -> None:
    path = fetched(ENTRY, tmp_path)
    assert path.read_bytes() == CONTENT
    assert hub.requests("/cdn/")[0].authorization is None
    assert sorted(each.name for each in tmp_path.iterdir()) == ["corpus", "corpus.manifest.json"]


def test_what_is_here_and_whole_needs_no_network(hub: HubServer, tmp_path: Path) -> None:
    fetched(ENTRY, tmp_path)
    before = len(hub.seen)
    fetched(ENTRY, tmp_path)
    assert len(hub.seen) == before


def test_parts_are_joined_in_their_order_without_a_second_copy(hub: HubServer, tmp_path: Path) -> None:
    path = fetched(INDEX, tmp_path)
    assert path.read_bytes() == noise(9000, 1) + noise(5000, 2)
    manifest = json.loads((tmp_path / "index.manifest.json").read_text())
    assert manifest["files"]["index"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["index", "index.manifest.json"]


def test_many_ranges_of_a_file_make_the_file(hub: HubServer, tmp_path: Path) -> None:
    transfer(tmp_path, range_bytes=7_000).run("corpus")
    assert (tmp_path / "corpus.jsonl.gz").read_bytes() == CONTENT
    assert hub.bytes_asked("corpus.jsonl.gz") == len(CONTENT)


@pytest.mark.parametrize("byte", [0, 1, 65_535, 150_000, len(CONTENT) - 1])
def test_a_line_that_breaks_at_any_byte_goes_on_there(hub: HubServer, tmp_path: Path, byte: int) -> None:
    hub.faults.append(Fault("/cdn/", cut_after=byte))
    assert fetched(ENTRY, tmp_path).read_bytes() == CONTENT
    first, second = hub.requests("/cdn/")
    assert first.range == f"bytes=0-{len(CONTENT) - 1}"
    assert second.range == f"bytes={byte}-{len(CONTENT) - 1}"


def test_a_line_that_breaks_again_and_again_still_arrives_while_each_brings_something(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.append(Fault("/cdn/", times=10, cut_after=20_000))
    assert fetched(ENTRY, tmp_path).read_bytes() == CONTENT
    assert len(hub.requests("/cdn/")) == 11


def test_a_line_that_stalls_is_made_anew_at_its_byte(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.append(Fault("/cdn/", stall_after=1000, stall_s=2.0))
    assert fetched(ENTRY, tmp_path).read_bytes() == CONTENT
    assert hub.requests("/cdn/")[1].range == f"bytes=1000-{len(CONTENT) - 1}"


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(("path", "method"), [("/api/", "GET"), ("/resolve/", "HEAD"), ("/cdn/", "GET")])
def test_a_busy_hub_is_asked_again(hub: HubServer, tmp_path: Path, path: str, method: str, status: int) -> None:
    hub.faults.append(Fault(path, times=2, method=method, status=status, headers={"Retry-After": "0"}))
    assert fetched(ENTRY, tmp_path).read_bytes() == CONTENT


def test_retry_after_is_kept() -> None:
    assert Patience(first_pause_s=1).pause_s(1, asked=30.0) == 30.0
    assert Patience(first_pause_s=1).pause_s(3, asked=None) == 4.0


def test_a_hub_that_stays_busy_is_an_error_and_what_came_stays(hub: HubServer, tmp_path: Path) -> None:
    hub.faults += [Fault("/cdn/", cut_after=100_000), Fault("/cdn/", times=3, status=503)]
    with pytest.raises(PrepareError, match=r"corpus.jsonl.gz at byte 100,000 .*HTTP 503; start again: it goes on from there"):
        fetched(ENTRY, tmp_path)
    assert not (tmp_path / "corpus").exists()
    assert fetched(ENTRY, tmp_path).read_bytes() == CONTENT
    assert hub.requests("/cdn/")[-1].range == f"bytes=100000-{len(CONTENT) - 1}"


def test_a_killed_process_goes_on_where_the_journal_says(hub: HubServer, tmp_path: Path) -> None:
    hub.faults += [Fault("/cdn/", cut_after=5_000), Fault("/cdn/", times=3, status=503)]
    with pytest.raises(PrepareError):
        transfer(tmp_path, range_bytes=len(CONTENT)).run("corpus")
    later = transfer(tmp_path, range_bytes=len(CONTENT))
    assert later.missing == len(CONTENT) - 5_000
    later.run("corpus")
    assert (tmp_path / "corpus.jsonl.gz").read_bytes() == CONTENT


def test_a_process_killed_after_the_last_byte_downloads_nothing_again(hub: HubServer, tmp_path: Path) -> None:
    transfer(tmp_path).run("corpus")
    asked = len(hub.requests("/cdn/"))
    later = transfer(tmp_path)
    assert later.missing == 0
    later.run("corpus")
    assert len(hub.requests("/cdn/")) == asked


def test_without_digests_another_commit_starts_over(hub: HubServer, tmp_path: Path) -> None:
    hub.tells_digests = False
    hub.faults += [Fault("/cdn/", cut_after=5_000), Fault("/cdn/", times=3, status=503)]
    with pytest.raises(PrepareError):
        fetched(ENTRY, tmp_path)
    other = noise(len(CONTENT), 5)
    hub.add(REPO, {"corpus.jsonl.gz": other}, commit="d" * 40)
    assert fetched(ENTRY, tmp_path).read_bytes() == other


def test_another_file_under_the_name_starts_over(hub: HubServer, tmp_path: Path) -> None:
    hub.faults += [Fault("/cdn/", cut_after=5_000), Fault("/cdn/", times=3, status=503)]
    with pytest.raises(PrepareError):
        fetched(ENTRY, tmp_path)
    other = noise(200_000, 5)
    hub.add(REPO, {"corpus.jsonl.gz": other}, commit="d" * 40)
    assert fetched(ENTRY, tmp_path).read_bytes() == other


def test_a_partial_file_that_somebody_cut_starts_over(hub: HubServer, tmp_path: Path) -> None:
    hub.faults += [Fault("/cdn/", cut_after=5_000), Fault("/cdn/", times=3, status=503)]
    with pytest.raises(PrepareError):
        fetched(ENTRY, tmp_path)
    (tmp_path / ".corpus.partial").write_bytes(b"")
    assert fetched(ENTRY, tmp_path).read_bytes() == CONTENT


def test_a_journal_that_cannot_be_read_starts_over(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / ".corpus.partial.journal.json").write_text("{")
    assert fetched(ENTRY, tmp_path).read_bytes() == CONTENT


def test_changed_bytes_are_refused_by_their_digest_and_only_that_file_starts_over(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.append(Fault("/cdn/datasets/someone/corpus/resolve/" + "c" * 40 + "/part_ab", change=lambda body: body[:-1] + b"?"))
    with pytest.raises(PrepareError, match=r"part_ab: what came has another digest than the hub says .*only this file"):
        fetched(INDEX, tmp_path)
    assert not (tmp_path / "index").exists()
    fetched(INDEX, tmp_path)
    assert len(hub.requests("/cdn/datasets/someone/corpus/resolve/" + "c" * 40 + "/part_aa")) == 1


def test_a_file_server_with_another_size_than_the_hub_says_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.linked_size["corpus.jsonl.gz"] = len(CONTENT) + 10
    with pytest.raises(PrepareError, match=r"the hub says 300,010 bytes, its file server 300,000"):
        fetched(ENTRY, tmp_path)


def test_a_small_file_is_checked_by_its_git_digest(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.append(Fault("/README.md", change=lambda body: body.upper()))
    with pytest.raises(PrepareError, match="README.md: what came has another digest"):
        fetched(Entry("corpus", "corpus", "someone/corpus", ("README.md",)), tmp_path)


def test_a_digest_that_the_catalogue_knows_is_compared_before_the_first_byte(hub: HubServer, tmp_path: Path) -> None:
    entry = Entry("corpus", "corpus", "someone/corpus", ("corpus.jsonl.gz",), sha256={"corpus.jsonl.gz": "0" * 64})
    with pytest.raises(PrepareError, match=r"the catalogue knows 000000000000…"):
        fetched(entry, tmp_path)
    assert hub.requests("/cdn/") == []


def test_where_the_hub_tells_no_digest_the_catalogues_counts(hub: HubServer, tmp_path: Path) -> None:
    hub.tells_digests = False
    entry = Entry("corpus", "corpus", "someone/corpus", ("corpus.jsonl.gz",), sha256={"corpus.jsonl.gz": "0" * 64})
    with pytest.raises(PrepareError, match="what came has another digest"):
        fetched(entry, tmp_path)


def test_a_server_without_ranges_sends_a_whole_file(hub: HubServer, tmp_path: Path) -> None:
    hub.ranges = False
    hub.faults.append(Fault("/cdn/", cut_after=1000))
    assert fetched(ENTRY, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            Entry("x", "corpus", "someone/nothing", ("a",)),
            r"hub:x \(someone/nothing @ main on .*HTTP 404.*mend the name, or set HF_TOKEN",
        ),
        (
            Entry("x@v9", "corpus", "someone/corpus", ("a",), revision="v9"),
            "there is no such revision; hub:x@main takes the newest",
        ),
        (Entry("x", "corpus", "someone/corpus", ("absent.gz",)), "someone/corpus @ main holds no absent.gz .*README.md"),
    ],
)
def test_what_is_not_there_is_named(hub: HubServer, tmp_path: Path, entry: Entry, message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        fetched(entry, tmp_path)


def test_a_gated_repository_asks_for_a_token(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories[REPO].token = "hf_secret"
    with pytest.raises(PrepareError, match="grants access one by one; ask for it on the repository's page and set HF_TOKEN"):
        fetched(ENTRY, tmp_path)


def test_the_token_goes_to_the_hub_and_not_to_the_file_server(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[REPO].token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetched(ENTRY, tmp_path).read_bytes() == CONTENT
    assert {seen.authorization for seen in hub.seen if "/cdn/" not in seen.path} == {"Bearer hf_secret"}
    assert {seen.authorization for seen in hub.seen if "/cdn/" in seen.path} == {None}


def test_offline_mode_asks_for_a_folder(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PrepareError, match="HF_HUB_OFFLINE is set.*give a folder's path instead of the name"):
        fetched(ENTRY, tmp_path)
    assert hub.seen == []


def test_no_hub_at_all_is_told_with_its_address(hub: HubServer, tmp_path: Path) -> None:
    hub.__exit__()
    with pytest.raises(PrepareError, match=r"on http://127.0.0.1:\d+\): ConnectError .*try again later"):
        fetched(ENTRY, tmp_path)


def test_places_of_joined_parts_follow_each_other(hub: HubServer) -> None:
    placed = place_joined(remote_files(INDEX, QUICK), Path("index"))
    assert [(each.remote.name, each.offset) for each in placed] == [("part_aa", 0), ("part_ab", 9000)]


def test_the_bar_tells_progress(hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fetched(ENTRY, tmp_path)
    assert any("downloading corpus" in line and "300,000/300,000 bytes" in line for line in caplog.messages)
