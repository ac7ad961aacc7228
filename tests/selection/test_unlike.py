"""Overlap with other texts by the definition; tested documents go; nothing that a lineage has read stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.selection import overlap as module
from megarewarm.selection.desk import Desk
from megarewarm.selection.opening import identity, open_corpus
from megarewarm.selection.overlap import OtherText, overlap
from megarewarm.selection.step import Chosen, Corpus
from megarewarm.selection.unlike import Unlike
from megarewarm.selection.unlike_lineage import UnlikeLineage
from megarewarm.training.trainer import train
from tests.checkpoint.test_convert import tool
from tests.support.selection import END, gram_set, text, write_documents
from tests.support.tiny import config, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))


def everything(corpus: Corpus) -> np.ndarray:
    return np.ones(corpus.num_documents, bool)


def desk(place: Path, corpus: Corpus) -> Desk:
    return Desk(place / "work", identity(corpus))


@pytest.mark.parametrize("most", [2**26, 300])
def test_overlap_is_that_of_the_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Of documents of few different ids, so that many grams are shared; also in several passes."""
    monkeypatch.setattr(module, "MOST", most)
    monkeypatch.setattr(module, "GRAM", 3)
    random = np.random.default_rng(0)
    mine = [random.integers(1, 9, int(random.integers(0, 30))) for _ in range(40)]
    theirs = [random.integers(1, 9, int(random.integers(0, 30))) for _ in range(15)]
    corpus = open_corpus([write_documents(tmp_path / "x", mine)])
    tested = open_corpus([write_documents(tmp_path / "y", theirs)])

    def texts() -> list[OtherText]:
        return [OtherText(b.documents, b.ids, b.starts, b.sizes) for b in tested.blocks(np.arange(15), tokens=50)]

    found = overlap(corpus, np.arange(40), texts, int(tested.sizes.sum()), desk(tmp_path, corpus), "")
    other = [gram_set(ids, 3) for ids in theirs]
    every = set().union(*other)
    for i, ids in enumerate(mine):
        row = ids.tolist()
        grams = [tuple(row[k : k + 3]) for k in range(max(1, len(row) - 2))] if row else []
        assert found.own[i] == pytest.approx(sum(gram in every for gram in grams) / max(1, len(grams)))
        shares = [len(set(grams) & each) / len(each) if each else 0.0 for each in other]
        assert found.of_other[i] == pytest.approx(max(shares))
        assert found.other[i] == (int(np.argmax(shares)) if max(shares) else -1)


def test_a_tested_document_goes_also_within_a_long_one(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    tested = [text(random, 100) for _ in range(5)]
    copy, within = tested[0].copy(), np.concatenate([text(random, 3000), tested[1], text(random, 3000)])
    part = np.concatenate([text(random, 400), tested[2][:20]])  # 8 of 412 grams, 8 of 88 of the tested one
    short = write_documents(tmp_path / "x", [copy, within, part, text(random), [1, 2, 3], [], tested[3][:60]])
    corpus = open_corpus([short])
    step = Unlike([write_documents(tmp_path / "valid", [*tested, [1, 2, 3], []])], 0.2, corpus)
    found = step.choose(corpus, everything(corpus), desk(tmp_path, corpus))
    assert found.dropped.tolist() == [0, 1, 4, 6] and (found.because == -1).all()
    assert found.score[:3] == pytest.approx([1, 1, 1]) and found.score[3] == 1.0  # all of its grams are tested
    assert {beside.document for beside in found.beside} == {0, 1, 4, 6} and "1 documents that stay" in found.notes[0]
    (shown,) = [beside for beside in found.beside if beside.document == 1]
    assert shown.ids.tolist() == tested[1].tolist() and "document 1" in shown.place
    strict = Unlike([str(tmp_path / "valid")], 0.0, corpus).choose(corpus, everything(corpus), desk(tmp_path, corpus))
    assert strict.dropped.tolist() == [0, 1, 2, 4, 6]  # any gram at all


def of_lineage(place: Path, run: str, *prefixes: str, share: float = 0.2) -> tuple[Corpus, Chosen]:
    corpus = open_corpus(prefixes)
    step = UnlikeLineage(run, share, corpus)
    return corpus, step.choose(corpus, everything(corpus), desk(place, corpus))


def trained(place: Path, name: str, source: str, **changes) -> str:
    """A run of a few steps on ``source``; its folder."""
    data = {"train": [{"path": source, "max_epochs": 1}], **changes.pop("data", {})}
    run = config(place, name=name, folder=str(place / name), data=data, checkpoint={"every": 2}, **changes)
    return str(train(run, ALONE, quiet()).folder)


def ids_of(random: np.random.Generator, count: int) -> list[np.ndarray]:
    return [random.integers(1, 64, int(random.integers(5, 60))) for _ in range(count)]


@pytest.mark.parametrize("order", ["permuted", "neox", "megatron", "sequential"])
def test_what_a_lineage_has_read_goes_by_its_place(tmp_path: Path, order: str) -> None:
    documents = ids_of(np.random.default_rng(2), 120)
    prefix = write_documents(tmp_path / "source", documents)
    budget = {"budget": 3, "global_batch": 8, "micro_batch": 8}
    run = trained(tmp_path, "run", prefix, data={"order": order}, training=budget)
    corpus, found = of_lineage(tmp_path, run, prefix)
    marked = read_tokens(run, prefix)
    offsets = corpus.files[0].offsets
    expected = [i for i, ids in enumerate(documents) if marked[offsets[i] : offsets[i] + len(ids)].any()]
    assert found.dropped.tolist() == expected and 0 < len(expected) < 120
    assert "were read as 'source'" in found.notes[0]


def test_a_list_of_documents_is_read_and_known_again(tmp_path: Path) -> None:
    """select-data --as-manifest, a run through that list, and what the run has read."""
    documents = ids_of(np.random.default_rng(6), 100)
    prefix = write_documents(tmp_path / "source", [*documents, *documents[:50]])
    tool("select_data", prefix, "--output", tmp_path / "kept", "--exact", "--as-manifest")
    source = {"path": prefix, "documents": str(tmp_path / "kept.safetensors"), "max_epochs": 9}
    run = trained(
        tmp_path, "run", prefix, data={"train": [source]}, training={"budget": 200, "global_batch": 8, "micro_batch": 8}
    )
    _, found = of_lineage(tmp_path, run, prefix)
    assert len(found.dropped) > 90 and set(found.dropped.tolist()) <= set(range(100))


def read_tokens(run: str, prefix: str) -> np.ndarray:
    """Which flat tokens a run has read, sample by sample."""
    from megarewarm.checkpoint.source import open_checkpoint
    from megarewarm.data.order.seen_samples import reopen

    file = open_corpus([prefix]).files[0]
    marked = np.zeros(file.total_tokens, bool)
    for seen in open_checkpoint(run).lineage.stages[-1].data:
        assert seen.read is not None
        samples = reopen(seen.read.order, file)
        for first, last in seen.read.ranges:
            for index in range(first, last):
                starts, lengths = samples.pieces(np.array([index]))
                ids = np.concatenate([file.read(s, n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
                assert ids.tolist() == samples.sample(index).tolist()
                for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                    marked[start : start + length] = True
    return marked


def test_copies_of_what_was_read_go_from_other_files(tmp_path: Path) -> None:
    """Of a source of which all was read; in a file with other documents, and one that is read by its place as well."""
    random = np.random.default_rng(3)
    documents = [random.integers(1, 64, 80) for _ in range(30)]
    prefix = write_documents(tmp_path / "source", documents)
    steps = 30 * 81 // 16 // 8
    run = trained(tmp_path, "run", prefix, training={"budget": steps, "global_batch": 8, "micro_batch": 8})
    fresh = [random.integers(1, 64, 80) for _ in range(5)]
    other = write_documents(tmp_path / "other", [documents[4], fresh[0], documents[9], *fresh[1:]])
    # samples of 17 tokens hold few 13-grams of a document of 80: 5 of every 16
    _, found = of_lineage(tmp_path, run, other, prefix)
    assert set(range(7)) & set(found.dropped.tolist()) == {0, 2}
    assert len(found.dropped) >= 2 + 29  # all of the file itself but what the last samples left
    assert any("like what was read as 'source'" in note for note in found.notes)
    _, none = of_lineage(tmp_path, run, other, share=0.9)
    assert not len(none.dropped)


def test_a_lineage_that_can_not_be_compared(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    prefix = write_documents(tmp_path / "source", ids_of(random, 60))
    other = write_documents(tmp_path / "other", ids_of(random, 60))
    run = trained(tmp_path, "run", prefix, training={"budget": 2, "global_batch": 8, "micro_batch": 8})
    for suffix in ("bin", "idx", "json"):
        (tmp_path / f"source.{suffix}").rename(tmp_path / f"moved.{suffix}")
    with pytest.raises(UserError, match=r"'source' was read from .*source.* --lineage-path source=NEW_PATH"):
        of_lineage(tmp_path, run, other)
    corpus = open_corpus([other])
    with pytest.raises(UserError, match=r"is not the file that was read as 'source'"):
        UnlikeLineage(run, 0.2, corpus, {"source": other})
    with pytest.raises(UserError, match=r"--lineage-path: the lineage has no source 'surce', but source"):
        UnlikeLineage(run, 0.2, corpus, {"surce": other})
    UnlikeLineage(run, 0.2, corpus, {"source": str(tmp_path / "moved")})
    assert END == 0


def test_a_foreign_lineage_records_nothing(tmp_path: Path) -> None:
    folder = trained(
        tmp_path,
        "run",
        write_documents(tmp_path / "s", ids_of(np.random.default_rng(5), 60)),
        export={"huggingface": True},
        training={"budget": 2},
    )
    corpus = open_corpus([str(tmp_path / "s")])
    with pytest.raises(UserError, match="doesn't record what it was trained on; name files that it has read with --unlike"):
        UnlikeLineage(f"{folder}/huggingface", 0.2, corpus)
    go_on = trained(tmp_path, "next", str(tmp_path / "s"), start={"from": f"{folder}/huggingface"}, training={"budget": 2})
    found = UnlikeLineage(go_on, 0.2, corpus).choose(corpus, everything(corpus), desk(tmp_path, corpus))
    assert "is not recorded, and not dropped" in found.notes[0] and len(found.dropped)
