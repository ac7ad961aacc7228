"""Orders of documents: as written, and by their scores, against a token file that was written in that order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig
from megarewarm.data.files.document_table import DocumentTable, write_table
from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.order.samples import SequentialSamples
from megarewarm.spelling import counted
from tests.data.test_listed_documents import S, build, keep, other, refusal, texts, write


def score(path: str, values: list[float], name: str = "loss") -> str:
    return str(write_table(f"{path}.{name}", DocumentTable("scores", np.array(values)), open_tokens(path), overwrite=True))


def sorted_by(values: list[float], direction: str) -> list[int]:
    """Document numbers in the order, by the words of the documentation."""
    known = [i for i, value in enumerate(values) if value == value]
    known.sort(key=lambda i: (values[i] if direction == "ascending" else -values[i], i))
    return known + [i for i, value in enumerate(values) if value != value]


def test_sequential_is_the_file_itself(tmp_path):
    path = write(tmp_path / "text", texts([30, 0, 12, 55, 8, 1]))
    batches = build([{"path": path, "max_epochs": 3}], 39, order="sequential")
    rows, flat = batches.rows(0, 39), open_tokens(path).read(0, 106)
    windows = [flat[i : i + S + 1] for i in range(0, 104, S)]
    assert np.array_equal(rows, np.stack(windows * 3))
    assert np.array_equal(build([{"path": path}], 5, order="sequential", seed=77).rows(0, 5), rows[:5])


SCORED = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([0.0, -0.0, 1.5, -2.0, 7.25, float("nan"), float("inf")])),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(documents=SCORED, direction=st.sampled_from(["ascending", "descending"]), flags=st.none() | st.integers(0, 2**60))
def test_an_order_by_score_is_a_file_written_in_that_order(tmp_path_factory, documents, direction, flags):
    """Every document once, whole, by its score; also of a list."""
    folder = tmp_path_factory.mktemp("scored")
    sizes, values = [size for size, _ in documents], [value for _, value in documents]
    all_texts = texts(sizes)
    path = write(folder / "text", all_texts)
    ranked = sorted_by(values, direction)
    source: dict[str, Any] = {"path": path, "scores": score(path, values)}
    if flags is not None:
        kept = [i for i in range(len(sizes)) if flags >> i & 1]
        ranked = [i for i in ranked if i in kept]
        source["documents"] = keep(path, kept)
    total = (sum(sizes[i] for i in ranked) - 1) // S
    order = {"by": None, "direction": direction}
    if total < 1:
        assert "one sample takes 9" in refusal([source], order=order)
        return
    written = write(folder / "written", [all_texts[i] for i in ranked])
    scored = build([source | {"max_epochs": 2}], 2 * total, order=order)
    plain = build([{"path": written, "max_epochs": 2}], 2 * total, order="sequential")
    assert np.array_equal(scored.rows(0, 2 * total), plain.rows(0, 2 * total))
    without = sum(values[i] != values[i] for i in ranked)
    assert scored.notes == ([f"{path}.bin: no score for {counted(without, 'document')}, read last"] if without else [])


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    found = [write(folder / name, texts([60] * 40, 3000 * i)) for i, name in enumerate("abc")]
    for path in found:
        score(path, random.random(40).tolist())
    return found


BLENDS: list[Any] = ["sequential", {"by": "loss"}, {"by": "loss", "direction": "descending"}]


@pytest.mark.parametrize("order", BLENDS)
@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 11), world=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
def test_the_same_on_any_ranks_and_from_any_sample(paths, order, step, world):
    sources = [{"path": path, "weight": w} for path, w in zip(paths, (5, 3, 2), strict=True)]
    batches = build(sources, 300, order=order)
    whole = batches.rows(0, 300)
    shares = [batches.share(24 * step, 24, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(shares), whole[24 * step : 24 * step + 24])
    assert np.array_equal(build(sources, 300, order=order).rows(13 * step, 29), whole[13 * step :][:29])


def test_fingerprints_know_order_scores_and_direction(paths):
    def fingerprint(order: Any, **source: Any) -> str:
        return build([{"path": paths[0], **source}], 50, order=order).fingerprint()

    made = [fingerprint(order) for order in ["permuted", *BLENDS]]
    made.append(fingerprint({"by": None}, scores=score(paths[0], list(range(40)), "other")))
    assert len(set(made)) == 5
    again = score(paths[0], list(range(40)), "copy")
    assert fingerprint({"by": again}) == made[-1] == fingerprint({"by": again, "direction": "ascending"})


def test_rows_are_read_in_their_order(paths, tmp_path):
    np.arange(30 * 9, dtype=np.uint16).tofile(tmp_path / "rows.bin")
    rows = {"path": str(tmp_path / "rows.bin"), "layout": "rows", "dtype": "uint16"}
    for order in BLENDS:
        read = build([rows, {"path": paths[0]}], 20, order=order).rows(0, 20)
        assert np.array_equal(read[::2], np.arange(10 * 9).reshape(10, 9))


def test_a_place_reads_the_same_samples_in_another_list(paths):
    """What an experiment's 'permute' needs: each source's samples don't depend on where it is listed."""
    first, second = {"path": paths[0], "place": 0}, {"path": paths[1], "place": 1}
    one, other = build([first, second], 40), build([second, first], 40)
    assert np.array_equal(one.rows(0, 40)[::2], other.rows(0, 40)[1::2])
    plain = build([{"path": paths[0]}, {"path": paths[1]}], 40)
    assert plain.fingerprint() == one.fingerprint() and np.array_equal(plain.rows(0, 40), one.rows(0, 40))
    assert build([{"path": paths[0]}], 40).fingerprint() != build([{"path": paths[0], "place": 1}], 40).fingerprint()


def test_bad_scores_are_refused_in_a_line(paths, tmp_path):
    path = paths[0]
    by: Any = {"by": None}
    assert "give the source 'scores', or data.order a 'by'" in refusal([{"path": path}], order=by)
    missing = refusal([{"path": path}], order={"by": "nothing"})
    assert f"{path}.nothing.safetensors does not exist: expected scores of documents of" in missing
    values = DocumentTable("scores", np.zeros(40))
    foreign = write_table(tmp_path / "foreign", values, other(path, tmp_path / "other"))
    assert "whose documents are not those of" in refusal([{"path": path, "scores": str(foreign)}], order=by)
    assert "is a list of documents, expected scores" in refusal([{"path": path, "scores": keep(path, [1])}], order=by)
    given = {"path": path, "scores": f"{path}.loss"}
    assert "are scores, which nothing reads in data.order 'permuted'" in refusal([given])
    with pytest.raises(ValueError, match="is read in no order of scores"):
        held = [{"name": "v", "tokens": 9, "sources": [given]}]
        DataConfig.model_validate({"sequence_length": S, "train": [{"path": path}], "validation": held})


def test_the_last_windows_of_many_documents_are_found_at_once(tmp_path):
    """Any sample is found without reading those before it."""
    random = np.random.default_rng(1)
    sizes = random.integers(0, 9, 30_000)
    path = write(tmp_path / "many", [np.full(size, i % 60_000, np.uint16) for i, size in enumerate(sizes)])
    values = random.random(30_000)
    source = {"path": path, "scores": score(path, values.tolist())}
    total = (int(sizes.sum()) - 1) // S
    flat = np.concatenate([np.full(sizes[i], i) for i in np.argsort(values, kind="stable")])
    batches = build([source], total, order={"by": None})
    for index in (0, total // 2, total - 1):
        assert np.array_equal(batches.rows(index, 1)[0], flat[index * S : index * S + S + 1])


def test_samples_of_a_split(paths):
    """The order sorts the part that is read."""
    batches = build([{"path": paths[0], "split": "8,1,1"}], 30, order={"by": "loss", "direction": "descending"})
    samples = batches._rows.samples[0]
    assert isinstance(samples, SequentialSamples) and samples.tokens.documents_of == (0, 32)
    assert int(batches.rows(0, 30).max()) < 32 * 60
