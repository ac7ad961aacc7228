"""Scores beside a token file: megarewarm score-data against its parts, interrupted and by bad input; percentiles of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarewarm.cli import score_data
from megarewarm.data.files.document_table import DocumentTable, read_table, write_table
from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.text.tokenizers import train_bpe
from megarewarm.errors import UserError
from megarewarm.file_lock import FileLock
from megarewarm.process import EXIT_INTERRUPTED
from megarewarm.selection import score_file, scoring_model
from megarewarm.selection.desk import Desk
from megarewarm.selection.opening import open_corpus
from megarewarm.selection.percentile import ByPercentile, End, LossOf, ScoresInFile, beyond
from megarewarm.selection.scoring_model import ScoringModel
from megarewarm.selection.step import Chosen, Corpus
from tests.selection.test_scoring_model import VOCABULARY, neox, write


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two models and a token file 'data' of 20 documents, one of them of one token."""
    neox(tmp_path / "one", 0)
    neox(tmp_path / "two", 1)
    random = np.random.default_rng(5)
    write(tmp_path / "data", [random.integers(0, VOCABULARY, size) for size in (1, *random.integers(2, 90, 19))])
    return tmp_path


def run(place: Path, *words: str) -> int:
    return score_data.main([str(place / "data"), "--device", "cpu", *words])


def losses(place: Path, name: str) -> np.ndarray:
    file = open_tokens(place / "data")
    return ScoringModel(str(place / name), device="cpu").losses(file, file.document_starts(0, 20), file.sizes)


def test_it_writes_the_losses_and_their_picture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--with", str(place / "one")) == 0
    table = read_table(place / "data.loss", "scores", open_tokens(place / "data"))
    np.testing.assert_allclose(table.values, losses(place, "one"), rtol=2e-6)
    assert table.about["name"] == "loss" and table.about["checkpoint"] == str(place / "one")
    assert (place / "data.loss.png").stat().st_size > 10_000 and not (place / "data.loss.safetensors.work").exists()
    shown = capsys.readouterr().out
    assert "1 document of fewer than 2 tokens without a score" in shown
    assert f"{np.nanpercentile(table.values, 50):.3f}" in shown and f"{np.nanmean(table.values):.4f}" in shown
    weights = np.maximum(open_tokens(place / "data").sizes - 1, 0)
    assert f"over tokens {np.nansum(table.values * weights) / weights.sum():.4f} nats" in shown


def test_a_difference_is_of_both_losses(place: Path) -> None:
    words = "--with", str(place / "one"), "--minus", str(place / "two")
    assert run(place, *words, "--output", str(place / "other")) == 0 and run(place, *words) == 0
    file = open_tokens(place / "data")
    for name in ("other", "data.loss_difference"):
        table = read_table(place / name, "scores", file)
        np.testing.assert_allclose(table.values, losses(place, "one") - losses(place, "two"), atol=2e-5)
        assert table.about["name"] == "loss difference" and table.about["minus_checkpoint"] == str(place / "two")


def test_nothing_is_overwritten_unless_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place, "--with", str(place / "one"))
    before = (place / "data.loss.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ScoringModel, "losses", None)  # nothing is computed before it is refused
        with pytest.raises(UserError, match=r"data\.loss\.safetensors exists: .*--overwrite"):
            run(place, "--with", str(place / "two"))
    assert (place / "data.loss.safetensors").read_bytes() == before
    run(place, "--with", str(place / "two"), "--overwrite")
    assert (place / "data.loss.safetensors").read_bytes() != before


def test_a_second_start_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With two checkpoints, stopped in each: every document is computed once for each of them, and the result is the same."""
    words = "--with", str(place / "one"), "--minus", str(place / "two")
    monkeypatch.setattr(scoring_model, "blocks", lambda sizes, first: ((i, i + 1) for i in range(first, len(sizes))))
    assert run(place, *words, "--output", str(place / "straight")) == 0
    made: list[int] = []
    whole, stops = ScoringModel.losses, [7, 31]

    def counted(self: ScoringModel, *rest: Any) -> Any:
        if stops and len(made) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        made.append(0)
        return whole(self, *rest)

    monkeypatch.setattr(ScoringModel, "losses", counted)
    for code in (EXIT_INTERRUPTED, EXIT_INTERRUPTED, 0):
        assert run(place, *words) == code
    assert len(made) == 40 and "the same command continues from" in capsys.readouterr().err
    file = open_tokens(place / "data")
    straight, stopped = (read_table(place / name, "scores", file).values for name in ("straight", "data.loss_difference"))
    assert straight.tobytes() == stopped.tobytes()


def test_other_weights_at_the_same_place_start_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_file, "write_table", lambda *rest, **more: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(place, "--with", str(place / "one")) == EXIT_INTERRUPTED
    monkeypatch.undo()
    neox(place / "one", 4)
    assert run(place, "--with", str(place / "one")) == 0
    np.testing.assert_allclose(
        read_table(place / "data.loss", "scores", open_tokens(place / "data")).values, losses(place, "one"), rtol=2e-6
    )


def test_two_processes_do_not_share_the_work(place: Path) -> None:
    work = place / "data.loss.safetensors.work"
    work.mkdir()
    with FileLock(work / "lock"), pytest.raises(UserError, match="another process"):
        run(place, "--with", str(place / "one"))
    assert run(place, "--with", str(place / "one")) == 0 and not work.exists()


def test_bad_input_is_one_line_and_writes_nothing(place: Path) -> None:
    write(place / "large", [np.array([1, VOCABULARY])])
    before = sorted(place.iterdir())
    model = str(place / "one")
    for words, message in (
        ([str(place / "none"), "--with", model], r"none\.bin does not exist"),
        ([str(place / "large"), "--with", model], f"outside of the model's vocabulary of {VOCABULARY} ids"),
        ([str(place / "data"), "--with", str(place / "none")], "none"),
        ([str(place / "data"), "--with", model, "--minus", str(place / "none")], "none"),
        ([str(place / "data"), "--with", model, "--sequence-length", "9999"], "expected 1 to"),
    ):
        with pytest.raises(UserError, match=message):
            score_data.main([*words, "--device", "cpu"])
    assert sorted(place.iterdir()) == before


def test_another_tokenizer_is_refused(place: Path) -> None:
    """As far as the manifest of the file and the checkpoint's folder name theirs."""
    first, second = (train_bpe([text * 30], 262, place / f"{text[0]}.json") for text in ("a few words ", "other texts "))
    (place / "one" / "tokenizer.json").write_bytes(first.path.read_bytes())
    said = {"tokenizer": second.identity().model_dump(mode="json")}
    (place / "data.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="gives other ids"):
        run(place, "--with", str(place / "one"))
    (place / "data.json").write_text(json.dumps({"tokenizer": first.identity().model_dump(mode="json")}))
    assert run(place, "--with", str(place / "one")) == 0


def test_examples_of_both_ends(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_bpe(["some text of a few words " * 20], 258, place / "tokenizer.json")
    (place / "one" / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    run(place, "--with", str(place / "one"))
    shown = capsys.readouterr().out
    scores = losses(place, "one")
    lowest, highest = shown.split("lowest:")[1].split("highest:")
    assert f"document {np.nanargmin(scores)}," in lowest.splitlines()[1]
    assert f"document {np.nanargmax(scores)}," in highest.splitlines()[1]


# percentiles

ENDS: tuple[End, ...] = ("drop-easiest", "drop-hardest", "keep-middle")


@given(
    scores=st.lists(st.floats(-5, 5) | st.just(float("nan")) | st.sampled_from([1.0, 2.0]), min_size=1, max_size=40),
    share=st.floats(0.01, 0.99),
    end=st.sampled_from(ENDS),
)
def test_the_percentile_is_numpys(scores: list[float], share: float, end: End) -> None:
    there = [score for score in scores if not np.isnan(score)]
    gone, _ = beyond(np.array(scores), end, share)
    part = (1 - share) / 2 if end == "keep-middle" else share
    lowest, highest = np.percentile(there or [0], [100 * part, 100 * (1 - part)])
    for score, goes in zip(scores, gone.tolist(), strict=True):
        low = end != "drop-hardest" and score <= lowest
        high = end != "drop-easiest" and score >= highest
        assert goes == (low or high)


def test_the_percentile_by_hand() -> None:
    scores = np.array([4.0, 1.0, np.nan, 3.0, 2.0, 5.0])
    assert beyond(scores, "drop-easiest", 0.25)[0].tolist() == [False, True, False, False, True, False]  # 2.0 itself goes
    assert beyond(scores, "drop-hardest", 0.3)[0].tolist() == [True, False, False, False, False, True]  # 3.8
    assert beyond(scores, "keep-middle", 0.5)[0].tolist() == [True, True, False, False, True, True]
    for end, share in (("drop-easiest", 0.0), ("drop-hardest", 0.0), ("keep-middle", 1.0)):
        assert not beyond(scores, end, share)[0].any()  # type: ignore[arg-type]


def chosen(read: Corpus, step: ByPercentile, work: Path) -> Chosen:
    return step.choose(read, np.ones(read.num_documents, bool), Desk(work, {}))


def scored(place: Path, values: np.ndarray) -> Corpus:
    write_table(place / "scores", DocumentTable("scores", values, {"name": "x"}), open_tokens(place / "data"), overwrite=True)
    return open_corpus([str(place / "data")])


def test_scores_of_a_file_decide(place: Path) -> None:
    values = np.arange(20.0)
    values[[3, 8]] = np.nan
    read = scored(place, values)
    found = chosen(read, ByPercentile(ScoresInFile(str(place / "scores"), read), "drop-easiest", 0.25), place / "work")
    assert found.dropped.tolist() == [0, 1, 2, 4, 5] and found.score.tolist() == [0, 1, 2, 4, 5]
    assert found.because.tolist() == [-1] * 5
    notes = ["data: 5 of 18 documents go, at 5.2500 or below", "data: 2 documents without a score stay"]
    assert list(found.notes) == notes
    low, high = found.examples
    assert low.documents.tolist() == [0, 1, 2] and high.documents.tolist() == [19, 18, 17]


def test_scores_of_other_documents_are_refused(place: Path) -> None:
    scored(place, np.arange(20.0))
    write(place / "less", [np.arange(5)] * 20)
    with pytest.raises(UserError, match="whose documents are not those of"):
        ScoresInFile(str(place / "scores"), open_corpus([str(place / "less")]))
    with pytest.raises(UserError, match="is of one token file; select from several one after another"):
        ScoresInFile(str(place / "scores"), open_corpus([str(place / "data"), str(place / "less")]))


def test_a_share_that_keeps_no_scored_document(place: Path) -> None:
    read = scored(place, np.ones(20))
    with pytest.raises(UserError, match=r"--drop-easiest 0\.1: none of the 20 documents of data with a score would stay"):
        chosen(read, ByPercentile(ScoresInFile(str(place / "scores"), read), "drop-easiest", 0.1), place / "work")


def test_documents_without_any_score_stay(place: Path) -> None:
    read = scored(place, np.full(20, np.nan))
    found = chosen(read, ByPercentile(ScoresInFile(str(place / "scores"), read), "keep-middle", 0.1), place / "work")
    assert not found.dropped.size and "20 documents without a score stay" in found.notes[1]


def test_a_models_losses_decide_as_their_file_does(place: Path) -> None:
    run(place, "--with", str(place / "one"), "--minus", str(place / "two"), "--output", str(place / "scores"))
    read = open_corpus([str(place / "data")])
    models = [ScoringModel(str(place / name), device="cpu") for name in ("one", "two")]
    for end in ENDS:
        by_model = chosen(read, ByPercentile(LossOf(*models), end, 0.33), place / "work")
        by_file = chosen(read, ByPercentile(ScoresInFile(str(place / "scores"), read), end, 0.33), place / "work")
        assert by_model.dropped.tolist() == by_file.dropped.tolist() != []
        np.testing.assert_allclose(by_model.score, by_file.score, atol=2e-5)


def test_each_source_has_its_own_percentile(place: Path) -> None:
    random = np.random.default_rng(8)
    write(place / "other", [random.integers(0, VOCABULARY, 30) for _ in range(10)])
    both = open_corpus([str(place / "data"), str(place / "other")])
    loss = LossOf(ScoringModel(str(place / "one"), device="cpu"))
    found = chosen(both, ByPercentile(loss, "drop-hardest", 0.2), place / "work")
    apart = [
        chosen(open_corpus([str(place / name)]), ByPercentile(loss, "drop-hardest", 0.2), place / f"work{name}").dropped + first
        for name, first in (("data", 0), ("other", 20))
    ]
    assert sorted(found.dropped) == sorted(np.concatenate(apart))
