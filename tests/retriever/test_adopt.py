"""`index check` and `index import`: what fits is adopted, what does not is refused by name and leaves everything as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from services.contract.config import Config, ConfigError
from services.retriever.adopt import import_index
from services.retriever.build import build_index
from services.retriever.check import check_index, sample_problems
from services.retriever.corpus import Corpus
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.flat_file import write_flat
from services.retriever.hashing import HashingEncoder
from services.retriever.index import FaissIndex, fill_index
from tests.retriever.conftest import first_row, load, make_config, passage, query, with_settings, write_corpus

ROWS = 120


def embeddings(rows: int = ROWS) -> np.ndarray:
    return HashingEncoder().encode([passage(number)["contents"] for number in range(rows)], "passage")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path / "data", rows=ROWS)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    write_flat(tmp_path / "e5_Flat.index", embeddings())
    return tmp_path / "e5_Flat.index"


def split(path: Path, size: int) -> list[Path]:
    content, parts = path.read_bytes(), []
    for number, start in enumerate(range(0, len(content), size)):
        parts.append(path.with_name(f"part_{number}"))
        parts[-1].write_bytes(content[start : start + size])
    return parts


# -- import ------------------------------------------------------------------------------------------------------------


def test_one_file_is_adopted_without_a_copy_and_served(config: Config, published: Path) -> None:
    manifest = import_index(config, [published])
    assert manifest.imported
    assert (config.data.index_folder / "index.faiss").samefile(published)
    assert first_row(load(config), query(77)) == 77
    assert check_index(config) == []


def test_import_and_build_give_the_same_index(config: Config, published: Path, tmp_path: Path) -> None:
    import_index(config, [published])
    other = make_config(tmp_path / "other", rows=ROWS)
    assert build_index(other).index_sha256 == json.loads((config.data.index_folder / "manifest.json").read_text())["index_sha256"]


@pytest.mark.parametrize("size", [4500, 100_000, 200_001])
def test_parts_are_joined_in_order(config: Config, published: Path, size: int) -> None:
    import_index(config, split(published, size))
    assert (config.data.index_folder / "index.faiss").read_bytes() == published.read_bytes()
    assert first_row(load(config), query(3)) == 3


def naming(config: Config, index: Path) -> Config:
    """`data.index` is that file or folder."""
    data = config.data.model_copy(update={"source": "folder", "index": index})
    return config.model_copy(update={"data": data})


@pytest.mark.parametrize("remove", [False, True])
def test_parts_go_only_when_that_is_asked_for(config: Config, published: Path, remove: bool) -> None:
    first, *others = split(published, 100_000)
    cached = first.rename(first.with_name("blob"))  # as a hub's cache has it
    first.symlink_to(cached)
    import_index(config, [first, *others], remove_parts=remove)
    assert {path.exists() for path in (first, cached, *others)} == {not remove}
    assert check_index(config) == []


def test_an_index_that_is_imported_over_itself_is_not_removed(config: Config, published: Path) -> None:
    import_index(config, [published])
    import_index(config, [config.data.index_folder / "index.faiss"], remove_parts=True)
    assert check_index(config) == []


def test_parts_of_an_import_that_is_refused_stay(config: Config, published: Path) -> None:
    parts = split(published, 100_000)
    with pytest.raises(IndexMismatch):
        import_index(config, parts[:-1], remove_parts=True)
    assert all(part.exists() for part in parts)


def test_build_adopts_the_index_that_the_configuration_names(config: Config, published: Path) -> None:
    manifest = build_index(naming(config, published))
    assert manifest.imported
    assert (config.data.index_folder / "index.faiss").samefile(published)
    assert not (config.data.index_folder / "embeddings.npy").exists()
    stamp = (config.data.index_folder / "manifest.json").stat().st_mtime_ns
    build_index(naming(config, published))
    assert (config.data.index_folder / "manifest.json").stat().st_mtime_ns == stamp


def test_build_adopts_the_parts_of_a_folder(config: Config, published: Path) -> None:
    split(published, 100_000)
    published.rename(published.with_name("whole"))
    build_index(naming(config, published.parent))
    assert (config.data.index_folder / "index.faiss").read_bytes() == published.with_name("whole").read_bytes()


def test_a_named_index_that_is_not_there_is_told(config: Config, tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="nowhere.index: no such file"):
        build_index(naming(config, tmp_path / "nowhere.index"))
    with pytest.raises(ConfigError, match=r"data.index: .* holds no part_\* files"):
        build_index(naming(config, config.data.directory))


def test_build_after_an_import_does_nothing(config: Config, published: Path) -> None:
    import_index(config, [published])
    assert build_index(config).imported
    assert not (config.data.index_folder / "embeddings.npy").exists()


@pytest.mark.parametrize("factory", ["HNSW16", "SQ8", "IVF4,Flat"])
def test_other_kinds_are_adopted(config: Config, tmp_path: Path, factory: str) -> None:
    config = with_settings(config, index_factory=factory, index_search="nprobe=4" if "IVF" in factory else "")
    fill_index(factory, embeddings()).save(tmp_path / "published")
    import_index(config, [tmp_path / "published"])
    assert first_row(load(config), query(50)) == 50


def wrong_metric(path: Path) -> None:
    index = faiss.IndexFlatL2(1024)
    index.add(embeddings())
    faiss.write_index(index, str(path))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "rows": (lambda path: write_flat(path, embeddings(110)), "rows: 110 in the index, 120 in the corpus; set data.corpus"),
    "dimension": (lambda path: write_flat(path, embeddings()[:, :512]), "dimension: 512 in the index, 1024 from the encoder"),
    "metric": (wrong_metric, "metric is not inner product"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "size: .* bytes, its header says .*cut short"),
    "header only": (lambda path: path.write_bytes(path.read_bytes()[:40]), "FAISS cannot read this index"),
    "row order": (lambda path: write_flat(path, embeddings()[::-1]), "vectors: .* sampled rows are stored otherwise"),
    "shifted by one": (lambda path: write_flat(path, np.roll(embeddings(), 1, axis=0)), "vectors: .* sampled rows are stored"),
    "another encoder": (
        lambda path: write_flat(path, np.roll(embeddings(), 1, axis=1)),
        "vectors: .* retriever.encoder, encoder_fam",
    ),
    "another kind": (lambda path: fill_index("HNSW16", embeddings()).save(path), "factory: the file is IndexHNSWFlat.*IndexFlat"),
    "no index": (lambda path: path.write_text("hello"), "FAISS cannot read this index"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_and_an_earlier_index_stays(config: Config, published: Path, what: str) -> None:
    build_index(config)
    before = {path.name: path.read_bytes() for path in config.data.index_folder.iterdir()}
    spoil, says = BROKEN[what]
    spoil(published)
    with pytest.raises(IndexMismatch, match=says):
        import_index(config, [published])
    assert {path.name: path.read_bytes() for path in config.data.index_folder.iterdir()} == before


def test_missing_part_is_told_by_the_size(config: Config, published: Path) -> None:
    parts = split(published, 200_000)
    with pytest.raises(IndexMismatch, match="a part is missing or cut short"):
        import_index(config, parts[:-1])


def test_parts_in_the_wrong_order_are_refused(config: Config, published: Path) -> None:
    first, *others = split(published, 100_000)
    with pytest.raises(IndexMismatch, match="vectors: "):
        import_index(config, [first, *reversed(others)])


def test_path_that_is_not_there_is_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="nothing.index: no such file"):
        import_index(config, [tmp_path / "nothing.index"])


# -- check -------------------------------------------------------------------------------------------------------------


def edit_manifest(config: Config, **changes: Any) -> None:
    path = config.data.index_folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_whole_index_has_no_problems(config: Config) -> None:
    build_index(config)
    assert check_index(config) == []


def test_no_index_is_a_problem(config: Config) -> None:
    assert check_index(config) == ["manifest.json is missing: no whole index is here"]


@pytest.mark.parametrize("field", ["encoder_digest", "corpus_sha256", "index_sha256", "pooling"])
def test_field_that_differs_is_named(config: Config, field: str) -> None:
    build_index(config)
    edit_manifest(config, **{field: "other"})
    assert [problem.split()[0] for problem in check_index(config)] == [field]


def test_digest_is_read_even_when_the_index_is_mapped(config: Config) -> None:
    build_index(config)
    edit_manifest(config, index_sha256="other")
    assert "index_sha256" in check_index(with_settings(config, index_mmap=True))[0]


def test_corpus_digest_is_read_even_when_its_time_stamp_is_the_same(config: Config) -> None:
    import os

    build_index(config)
    stamp = config.data.corpus_path.stat()
    config.data.corpus_path.write_text(config.data.corpus_path.read_text().replace("violin", "guitar"))
    os.utime(config.data.corpus_path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert "corpus_sha256" in check_index(config)[0]


def test_manifest_that_vouches_for_wrong_vectors_is_found_out(config: Config) -> None:
    """Digest and counts agree with a manifest that was made for the wrong file; only the sample tells."""
    from services.contract.files import file_digest

    build_index(config)
    index = config.data.index_folder / "index.faiss"
    write_flat(index, embeddings()[::-1])
    edit_manifest(config, index_sha256=file_digest(index))
    (problem,) = check_index(config)
    assert problem.startswith("vectors: ")


def test_approximate_index_in_another_row_order_is_found_out(config: Config) -> None:
    index = fill_index("SQ8", embeddings()[::-1])
    (problem,) = sample_problems(index, HashingEncoder(), Corpus.open(config.data.corpus_path))
    assert problem.startswith("rank: 32 of 32 sampled passages")


def test_duplicates_in_the_corpus_are_no_fault(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    write_corpus(config.data.corpus_path, [{"id": str(n), "contents": passage(n % 5)["contents"]} for n in range(60)])
    build_index(config)
    assert check_index(config) == []


def test_unnormalised_vectors_may_be_outscored(config: Config) -> None:
    """By inner product a longer vector beats a passage's own; that is no fault of the index."""

    class Long(HashingEncoder):
        def encode(self, texts: Any, role: Any) -> np.ndarray:
            scale = np.array([10.0 if "m1 " in text + " " else 1.0 for text in texts], np.float32)
            return super().encode(texts, role) * scale[:, None]

    texts = [passage(number)["contents"] for number in range(ROWS)]
    index: FaissIndex = fill_index("Flat", Long().encode(texts, "passage"))
    assert sample_problems(index, Long(), Corpus.open(config.data.corpus_path)) == []
