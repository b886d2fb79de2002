"""ONNX Runtime as the encoder: the vectors of every family are compared in test_encoder.py; here is how its graph is kept."""

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from services.contract.config import Config, RetrieverConfig
from services.retriever import onnx_export
from services.retriever.encoder import describe_encoder, load_encoder
from services.retriever.errors import RetrieverError
from services.retriever.families import EncoderDescription
from services.retriever.onnx_session import ExportFailed
from tests.retriever import tiny_models

TEXTS = ["Chad", "What is the capital of Chad?", "The harbour keeps a violin of the capital"]


def describe(folder: Path, runtime: str = "onnx", **settings: Any) -> EncoderDescription:
    """A tiny BERT under `folder`, and where its graph is to be kept."""
    model = folder / "encoder"
    if not model.exists():
        tiny_models.bert(model)
    retriever = {"encoder": model, "encoder_family": "minilm", "encoder_max_tokens": 64, "encoder_runtime": runtime, **settings}
    return describe_encoder(Config.model_validate({"data": {"directory": folder}, "retriever": retriever}), "query")


def kept(description: EncoderDescription) -> list[Path]:
    return sorted(description.exports.glob("*.onnx"))


def test_graph_is_exported_once(tmp_path: Path) -> None:
    description = describe(tmp_path)
    first = load_encoder(description, 1).encode(TEXTS, "query")
    (graph,) = kept(description)
    stamp = graph.stat().st_mtime_ns
    assert np.array_equal(load_encoder(description, 1).encode(TEXTS, "query"), first)
    assert [path.stat().st_mtime_ns for path in kept(description)] == [stamp]


def test_another_model_gets_another_graph(tmp_path: Path) -> None:
    load_encoder(describe(tmp_path), 1)
    settings = tmp_path / "encoder" / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    load_encoder(describe(tmp_path), 1)
    assert len(kept(describe(tmp_path))) == 2


def test_threads_and_batches_change_nothing_but_speed(tmp_path: Path) -> None:
    description, texts = describe(tmp_path), [f"{text} {'the ' * number}" for number in range(7) for text in TEXTS]
    together = load_encoder(description, 3).encode(texts, "passage")
    alone = np.concatenate([load_encoder(description, 1).encode([text], "passage") for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_long_texts_are_cut_as_torch_cuts_them(tmp_path: Path) -> None:
    long = ["the harbour keeps a violin " * 100]
    onnx, torch = (load_encoder(describe(tmp_path, runtime), 1).encode(long, "query") for runtime in ("onnx", "torch"))
    np.testing.assert_allclose(onnx, torch, atol=1e-5)


def test_int8_is_close_and_not_the_same(tmp_path: Path) -> None:
    exact, int8 = (load_encoder(describe(tmp_path, runtime), 1).encode(TEXTS, "query") for runtime in ("onnx", "onnx-int8"))
    assert 0 < np.abs(int8 - exact).max() < 0.1


def test_place_that_is_no_folder_costs_an_export_at_every_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    description = describe(tmp_path)
    description.exports.parent.mkdir()
    description.exports.write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert load_encoder(description, 1).runtime == "onnx"
    assert "cannot be kept there" in caplog.text


def test_several_processes_may_start_at_once(tmp_path: Path) -> None:
    description, answers = describe(tmp_path), []
    threads = [
        threading.Thread(target=lambda: answers.append(load_encoder(description, 1).encode(TEXTS, "query"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 3
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    assert len(kept(description)) == 1


def test_spoilt_graph_is_named_with_the_mend(tmp_path: Path) -> None:
    description = describe(tmp_path)
    load_encoder(description, 1)
    (graph,) = kept(description)
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(RetrieverError, match=rf"{graph.name}: not a graph .*delete it, it is made again"):
        load_encoder(description, 1)


@pytest.fixture
def no_graph_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is as far from torch as one that was exported wrongly."""
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)


@pytest.mark.usefixtures("no_graph_is_right")
def test_graph_that_answers_otherwise_is_not_kept(tmp_path: Path) -> None:
    description = describe(tmp_path)
    with pytest.raises(ExportFailed, match=r'away from torch.*set retriever.encoder_runtime = "torch"'):
        load_encoder(description, 1)
    assert not list(description.exports.glob("*.onnx*"))


@pytest.mark.usefixtures("no_graph_is_right")
def test_auto_takes_torch_where_no_graph_will_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_encoder(describe(tmp_path, "auto"), 1).runtime == "torch"
    assert "torch computes the vectors" in caplog.text


@pytest.mark.parametrize(("dtype", "runtime"), [("float32", "onnx"), ("bfloat16", "torch")])
def test_auto_takes_onnx_where_it_gives_the_same_vectors(tmp_path: Path, dtype: str, runtime: str) -> None:
    assert load_encoder(describe(tmp_path, "auto", encoder_dtype=dtype), 1).runtime == runtime


def test_auto_takes_torch_where_onnx_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load_encoder(describe(tmp_path, "auto"), 1).runtime == "torch"
    with pytest.raises(RetrieverError, match="pip install onnx onnxruntime"):
        load_encoder(describe(tmp_path, "onnx"), 1)


def test_folder_that_torch_cannot_load_is_refused_by_auto_too(tmp_path: Path) -> None:
    description = describe(tmp_path, "auto")
    (tmp_path / "encoder" / "model.safetensors").write_bytes(b"")
    with pytest.raises(RetrieverError, match="encoder cannot be loaded"):
        load_encoder(replace(description, digest="other"), 1)


@pytest.mark.parametrize("settings", [{"encoder_device": "cuda"}, {"encoder_dtype": "float16"}])
def test_onnx_with_what_it_cannot_do_is_refused_by_the_config(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r'encoder_runtime "onnx-int8" is for a CPU and float32'):
        RetrieverConfig.model_validate({"encoder_runtime": "onnx-int8", **settings})
