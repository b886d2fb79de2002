"""FAISS by inner product: places without a passage are dropped, never mapped to one; every kind saved, mapped and tuned."""

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from services.contract.config import Config, ConfigError, load_config
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.flat_file import chunks, map_flat, write_flat
from services.retriever.index import FaissIndex, fill_index, new_index, set_search
from services.retriever.shards import load_sharded


def vectors(rows: int, dimension: int = 16) -> np.ndarray:
    made = np.random.default_rng(1).normal(size=(rows, dimension)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def cpu_piece(dimension: int, device: int) -> faiss.Index:
    """The stand-in for a GPU's piece: float16 on the CPU."""
    return faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def test_flat_gives_exact_inner_products_best_first() -> None:
    data = vectors(200)
    hits = fill_index("Flat", data).search(data[:5], 10)
    exact = data[:5] @ data.T
    for row, found in enumerate(hits):
        assert [hit.row for hit in found] == np.argsort(-exact[row])[:10].tolist()
        assert [hit.score for hit in found] == pytest.approx(np.sort(exact[row])[::-1][:10].tolist(), abs=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_topk_beyond_the_corpus_gives_fewer_hits_and_never_minus_one(factory: str) -> None:
    data = vectors(4)
    hits = fill_index(factory, data).search(data[:1], 50)[0]
    assert sorted(hit.row for hit in hits) == [0, 1, 2, 3]
    assert all(-1.001 <= hit.score <= 1.001 for hit in hits)


def test_index_that_needs_training_is_trained() -> None:
    data = vectors(400)
    assert fill_index("IVF4,Flat", data).search(data[7:8], 1)[0][0].row == 7


def test_unknown_factory_names_the_key() -> None:
    with pytest.raises(RetrieverError, match="retriever.index_factory 'Flatt'"):
        new_index("Flatt", 16)


def test_too_few_passages_to_train_say_so() -> None:
    with pytest.raises(RetrieverError, match="cannot be trained on 10 passages"):
        fill_index("IVF64,Flat", vectors(10))


def test_truncated_file_is_refused(tmp_path) -> None:
    path = tmp_path / "index.faiss"
    fill_index("Flat", vectors(100)).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IndexMismatch, match="cannot read"):
        FaissIndex.load(path)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("left", [20, 1000, 6444])
def test_truncated_flat_file_is_refused_mapped_or_not(tmp_path: Path, mmap: bool, left: int) -> None:
    path = tmp_path / "index.faiss"
    fill_index("Flat", vectors(100)).save(path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(IndexMismatch, match="index.faiss: FAISS cannot read this index"):
        FaissIndex.load(path, mmap=mmap)


# -- every kind --------------------------------------------------------------------------------------------------------

# `np`: without the annealing for polysemous codes, which takes FAISS half a minute and searches do not use.
KINDS = {
    # factory: (search parameters, least recall@10 against exact search)
    "Flat": ("", 1.0),
    "SQfp16": ("", 0.99),
    "SQ8": ("", 0.95),
    "PQ16np": ("", 0.5),
    "RaBitQ": ("", 0.3),
    "HNSW32": ("efSearch=128", 0.99),
    "HNSW32,SQ8": ("efSearch=128", 0.95),
    "IVF32,Flat": ("nprobe=16", 0.95),
    "IVF32,SQ8": ("nprobe=16", 0.9),
    "IVF32,PQ16np": ("nprobe=16", 0.5),
    "IVF32,RaBitQ": ("nprobe=16", 0.45),
    "SQ8,RFlat": ("k_factor_rf=4", 0.99),
    "PQ16np,RFlat": ("k_factor_rf=16", 0.95),
    "PQ16np,Refine(SQ8)": ("k_factor_rf=16", 0.9),
    "RaBitQ,RFlat": ("k_factor_rf=16", 0.95),
    "IVF32,PQ16np,RFlat": ("nprobe=16,k_factor_rf=16", 0.95),
    "IVF32,RaBitQ,Refine(SQ8)": ("nprobe=16,k_factor_rf=16", 0.9),
    "OPQ16,IVF32,PQ16np": ("nprobe=16", 0.5),
}


def clustered(rows: int, dimension: int = 64) -> np.ndarray:
    """float32 [rows, dimension], normalised, in 40 clusters, as passages come in subjects."""
    chance = np.random.default_rng(7)
    centres = chance.normal(size=(40, dimension))
    made = (centres[chance.integers(0, 40, rows)] + 0.7 * chance.normal(size=(rows, dimension))).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return clustered(4100)


@pytest.mark.parametrize("factory", KINDS)
def test_every_kind_finds_saves_and_loads(data: np.ndarray, tmp_path: Path, factory: str) -> None:
    search, least = KINDS[factory]
    passages, queries, path = data[:4000], data[4000:], tmp_path / "index.faiss"
    fill_index(factory, passages).save(path)
    index = FaissIndex.load(path, search=search)
    found = index.search(queries, 10)
    exact = np.argsort(-(queries @ passages.T), axis=1)[:, :10]
    recall = np.mean([len({hit.row for hit in hits} & set(best.tolist())) for hits, best in zip(found, exact, strict=True)]) / 10
    assert recall >= least
    assert FaissIndex.load(path, search=search).search(queries, 10) == found
    assert FaissIndex.load(path, search=search, mmap=True).search(queries, 10) == found
    assert index.kind == FaissIndex.load(path, mmap=True).kind == FaissIndex(new_index(factory, 64)).kind


RSS = """
import sys
def anonymous(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024
from pathlib import Path
from services.retriever.index import FaissIndex
before = anonymous()
index = FaissIndex.load(Path(sys.argv[1]), mmap=sys.argv[2] == "mapped")
print(anonymous() - before)
"""


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "HNSW16", "IVF32,Flat", "PQ16np,RFlat"])
def test_mapped_index_stays_in_its_file(tmp_path: Path, factory: str) -> None:
    """Anonymous memory in MiB, by the kernel's count: what was read is there, what is mapped is not."""
    path = tmp_path / "index.faiss"
    fill_index(factory, clustered(12_000, 512)).save(path)
    size = path.stat().st_size >> 20
    took = {
        how: int(subprocess.run([sys.executable, "-c", RSS, str(path), how], capture_output=True, text=True, check=True).stdout)
        for how in ("read", "mapped")
    }
    assert took["read"] > 0.8 * size
    assert took["mapped"] < 0.2 * size


# -- search parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "search", "says"),
    [
        ("Flat", "nprobe=4", "IndexFlat has no 'nprobe'"),
        ("HNSW16", "nprobe=4", "IndexHNSWFlat.* has no 'nprobe'; HNSW has efSearch"),
        ("IVF4,Flat", "efSearch=4", "has no 'efSearch'"),
        ("IVF4,Flat", "nprobe=4,k_factor_rf=2", "has no 'k_factor_rf'"),
        ("IVF4,Flat", "nprobe=0", "'nprobe=0' is not a name and a whole number"),
        ("IVF4,Flat", "nprobe=-3", "'nprobe=-3' is not"),
        ("IVF4,Flat", "nprobe=3x", "'nprobe=3x' is not"),
        ("IVF4,Flat", "nprobe=1.5", "'nprobe=1.5' is not"),
        ("IVF4,Flat", "nprobe", "'nprobe' is not"),
    ],
)
def test_bad_search_parameters_name_key_and_part(tmp_path: Path, factory: str, search: str, says: str) -> None:
    path = tmp_path / "index.faiss"
    fill_index(factory, vectors(200)).save(path)
    with pytest.raises(RetrieverError, match=rf"retriever.index_search '{search}': .*({says})"):
        FaissIndex.load(path, search=search)


def test_search_parameters_reach_the_index() -> None:
    index = new_index("IVF16_HNSW8,PQ4,RFlat", 16)
    set_search(index, " nprobe=7 , k_factor_rf=9,quantizer_efSearch=33")
    refine = faiss.downcast_index(index)
    inner = faiss.downcast_index(refine.base_index)
    assert (inner.nprobe, refine.k_factor, faiss.downcast_index(inner.quantizer).hnsw.efSearch) == (7, 9, 33)


# -- flat files and shards ---------------------------------------------------------------------------------------------


def test_flat_file_is_what_faiss_writes(tmp_path: Path) -> None:
    data = vectors(300)
    fill_index("Flat", data).save(tmp_path / "theirs")
    write_flat(tmp_path / "ours", data)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert np.array_equal(map_flat(tmp_path / "ours"), data)


@pytest.mark.parametrize("left", [10, 45, 1000])
def test_truncated_flat_file_is_not_mapped(tmp_path: Path, left: int) -> None:
    write_flat(tmp_path / "index.faiss", vectors(300))
    (tmp_path / "index.faiss").write_bytes((tmp_path / "index.faiss").read_bytes()[:left])
    with pytest.raises(IndexMismatch, match="index.faiss: (not a flat|.* expected .truncated)"):
        map_flat(tmp_path / "index.faiss")


def test_chunks_are_in_order_and_never_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.retriever.flat_file.CHUNK_ROWS", 64)
    data = vectors(300)
    parts = list(chunks(data, 10, 290))
    assert max(map(len, parts)) == 64
    assert np.array_equal(np.concatenate(parts), data[10:290])


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("piece_rows", [70, 10_000])
def test_shards_answer_as_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, piece_rows: int) -> None:
    """float16 pieces on the CPU stand for GPUs; chunks smaller than a piece, pieces smaller than a device's part."""
    monkeypatch.setattr("services.retriever.flat_file.CHUNK_ROWS", 32)
    data = vectors(500)
    write_flat(tmp_path / "index.faiss", data)
    sharded = FaissIndex(load_sharded(map_flat(tmp_path / "index.faiss"), range(devices), cpu_piece, piece_rows))
    assert sharded.rows == 500
    exact = fill_index("Flat", data).search(data[:100], 5)
    for mine, theirs in zip(sharded.search(data[:100], 5), exact, strict=True):
        assert mine[0].row == theirs[0].row
        assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in theirs], abs=1e-3)


def test_no_piece_is_larger_than_asked() -> None:
    made: list[faiss.Index] = []

    def make(dimension: int, device: int) -> faiss.Index:
        made.append(cpu_piece(dimension, device))
        return made[-1]

    load_sharded(vectors(500), range(2), make, 100)
    assert [piece.ntotal for piece in made] == [100, 100, 50, 100, 100, 50]


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this FAISS has GPU support")
def test_gpus_without_support_are_refused_with_the_mend(tmp_path: Path) -> None:
    write_flat(tmp_path / "index.faiss", vectors(30))
    with pytest.raises(
        RetrieverError, match=r'retriever.index_device is "cuda", but this FAISS .* without GPUs: install faiss-gpu'
    ):
        FaissIndex.load(tmp_path / "index.faiss", device="cuda")


@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a GPU and a FAISS for it")
def test_gpus_answer_as_one_index(tmp_path: Path) -> None:
    data = vectors(500)
    write_flat(tmp_path / "index.faiss", data)
    found = FaissIndex.load(tmp_path / "index.faiss", device="cuda").search(data[:100], 5)
    assert [hits[0].row for hits in found] == list(range(100))


def test_gpus_are_for_flat_indexes_only() -> None:
    assert Config.model_validate({"retriever": {"index_device": "cuda"}}).retriever.index_device == "cuda"
    with pytest.raises(ConfigError, match="index_device .* is for retriever.index_factory"):
        load_config(None, {"FORAGE_RETRIEVER__INDEX_DEVICE": "cuda", "FORAGE_RETRIEVER__INDEX_FACTORY": "HNSW32"})
