"""Replay of a lineage: only what was read, in proportion to the tokens seen, going on where the last replay ended."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.checkpoint.lineage import DataSeen, Lineage, Stage
from megarewarm.checkpoint.own.state import read_state
from megarewarm.config.data import DataConfig, ReplayConfig, Source
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.document_table import DocumentTable, used, write_table
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.listed_documents import by_score, listed
from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.mixture.batches import build_training_batches
from megarewarm.data.mixture.phases import Phase
from megarewarm.data.order.row_samples import RowSamples
from megarewarm.data.order.sample_order import SampleOrder, SamplesRead
from megarewarm.data.order.samples import MegatronSamples, NeoxSamples, PermutedSamples, Samples, SequentialSamples
from megarewarm.data.order.seen_samples import SeenPart, SeenSamples, union
from megarewarm.errors import UserError
from megarewarm.main import main
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.replay import history_to_replay, replayed, seen_sources
from megarewarm.training import trainer
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.support.tiny import config, quiet, write_tokens

ALONE = Ranks(0, 1, torch.device("cpu"))
RANGES: st.SearchStrategy[Any] = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple), min_size=1, max_size=5
)


@given(RANGES)
def test_union_is_that_of_sets(ranges):
    merged = union(ranges)
    numbers = [i for first, last in merged for i in range(first, last)]
    assert numbers == sorted(set().union(*(range(first, last) for first, last in ranges)))
    assert all(one[1] < other[0] for one, other in pairwise(merged))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    return write_tokens(tmp_path_factory.mktemp("lineage") / "file", 5)


@settings(max_examples=40, deadline=None)
@given(ranges=RANGES.filter(lambda ranges: bool(union(ranges))), first=st.integers(0, 500), count=st.integers(1, 200))
def test_seen_samples_are_those_of_the_ranges_counted_around(file, ranges, first, count):
    original = PermutedSamples(open_tokens(file).view(), 16, 9, None)
    seen = union(ranges)
    numbers = [i for begin, last in seen for i in range(begin, last)]
    samples = SeenSamples([original], [seen], (0, numbers[first % len(numbers)]), None)
    expected = [numbers[(first + i) % len(numbers)] for i in range(count)]
    out = np.empty((count, 17), np.int64)
    samples.fill(np.arange(count), out)
    assert np.array_equal(out, np.stack([original.sample(i) for i in expected]))
    told = samples.read_between(0, count)
    assert told.again and [i for begin, last in told.ranges for i in range(begin, last)] == expected


def of_sixteen() -> TokenFiles:
    """Files of a run that reads samples of 16 tokens."""
    return TokenFiles(DataConfig.model_validate({"sequence_length": 16, "train": [{"path": "not read"}]}), 64)


@pytest.mark.parametrize("kind", [NeoxSamples, MegatronSamples])
@pytest.mark.parametrize("wanted", [50, 400, 520])
def test_a_shuffled_order_is_found_again(file, kind, wanted):
    samples = kind(open_tokens(file).view(3, 30), 16, 1234, wanted)
    order = SampleOrder.model_validate_json(samples.sample_order().model_dump_json())
    history = Lineage(stages=[stage("one", seen("text", file, order, 0, 40))])
    (source,) = seen_sources(ReplayConfig(fraction=0.1, of="lineage"), history)
    again = source.open(of_sixteen())
    if samples.num_epochs == 1:
        assert all(np.array_equal(again.sample(i), samples.sample(i)) for i in range(40))
    else:  # of text that two of them hold only the first is replayed
        told = again.read_between(0, 1).ranges[0][0]
        assert np.array_equal(again.sample(0), samples.sample(told)) and again.samples_per_epoch <= 40


def seen(name: str, path: str, order: SampleOrder, first: int, last: int, again: bool = False) -> DataSeen:
    count = last - first
    read = SamplesRead(order=order, ranges=((first, last),), again=again)
    fingerprint = open_tokens(path).fingerprint() if Path(path + ".idx").exists() else path
    tokens = count * order.sequence_length
    return DataSeen(name=name, path=path, fingerprint=fingerprint, samples=count, tokens=tokens, read=read)


def stage(name: str, *data: DataSeen) -> Stage:
    return Stage(run=name, intent="rewarm", data=list(data))


def an_order(key: int) -> SampleOrder:
    return SampleOrder(kind="permuted", sequence_length=16, dtype="uint16", first_document=0, last_document=9, key=key)


def test_the_papers_proportions_of_a_third_stage():
    """300B of the Pile, 100B of new data with 5 % replay: 5 % of the third stage are 3.8125 % and 1.1875 % (305 : 95)."""
    pile, new = an_order(1), an_order(2)
    history = Lineage(
        stages=[
            stage("pile", seen("pile", "PILE", pile, 0, 300)),
            stage("new", seen("new", "NEW", new, 0, 95), seen("replay of pile", "PILE", pile, 0, 5, again=True)),
        ]
    )
    old, recent = seen_sources(ReplayConfig(fraction=0.05, of="lineage"), history)
    assert (old.name, recent.name) == ("replay of pile", "replay of new")
    total = old.weight + recent.weight
    assert 0.05 * old.weight / total == pytest.approx(0.038125) and 0.05 * recent.weight / total == pytest.approx(0.011875)
    assert old.ended == (0, 5) and recent.ended is None, "the second replay of the Pile goes on where the first ended"
    assert old.parts == (SeenPart(pile, ((0, 300),)),) and recent.parts == (SeenPart(new, ((0, 95),)),)


def test_all_that_was_read_of_a_file_is_one_pool():
    """Also where stages read it in two orders, or under two names."""
    one, two = an_order(1), an_order(2)
    again = stage("c", seen("a", "A", one, 20, 50), seen("replay of a", "A", one, 40, 50, again=True))
    history = Lineage(stages=[stage("a", seen("a", "A", one, 0, 50)), stage("b", seen("z", "A", two, 0, 9)), again])
    (pool,) = seen_sources(ReplayConfig(fraction=0.05, of="lineage", paths={"z": "elsewhere"}), history)
    assert (pool.name, pool.ended, pool.weight, pool.path) == ("replay of a", (0, 50), 99 * 16, "elsewhere")
    assert pool.parts == (SeenPart(one, ((0, 50),)), SeenPart(two, ((0, 9),)))


@st.composite
def readings(draw):
    """What some stages read of one file: views, orders, epochs and ranges of all kinds."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        documents = draw(st.sampled_from([(0, 40), (0, 40), (5, 40), (0, 21)]))
        key = draw(st.integers(1, 3))
        kinds = [
            "permuted",
            "permuted",
            "neox",
            "megatron",
            "sequential",
            "listed permuted",
            "listed neox",
            "scored sequential",
        ]
        kind = draw(st.sampled_from(kinds))
        first = draw(st.integers(0, 350))
        found.append((kind, documents, key, first, first + draw(st.integers(1, 300))))
    return found


def opened(path: str, kind: str, documents: tuple[int, int], key: int, last: int) -> Samples:
    opened_file = open_tokens(path)
    view = opened_file.view(*documents)
    how, _, kind = kind.rpartition(" ")
    if how == "listed":
        place, kept = f"{path}.listed{key}", np.arange(key, 40, 2)
        list_of_some = DocumentTable("list", kept)
        write_table(place, list_of_some, opened_file, overwrite=True)
        view = listed(opened_file, list_of_some, used(place, list_of_some))
    if how == "scored":
        place, scores = f"{path}.scored{key}", DocumentTable("scores", np.random.default_rng(key).random(40))
        write_table(place, scores, opened_file, overwrite=True)
        view, _ = by_score(view, scores, used(place, scores), descending=key == 2)
    if kind == "sequential":
        return SequentialSamples(view, 16, None)
    if kind == "permuted":
        return PermutedSamples(view, 16, key, None)
    return (NeoxSamples if kind == "neox" else MegatronSamples)(view, 16, key, last)


def inputs_of(samples: Samples, index: int) -> list[int]:
    """The places in the file of the tokens that a sample gives to the model."""
    starts, lengths = samples.pieces(np.array([index]))
    places = [start + i for start, length in zip(starts.tolist(), lengths.tolist(), strict=True) for i in range(length)]
    return places[:16]


@settings(max_examples=40, deadline=None)
@given(readings())
def test_the_samples_of_a_lineage_are_a_set(file, stages):
    """No token is replayed twice, nothing that was not read, nothing that could be is missing; in the order of the reading."""
    data: list[Any] = []
    expected: list[Any] = []
    taken: set[Any] = set()
    for kind, documents, key, first, last in stages:
        samples = opened(file, kind, documents, key, last)
        data.append(stage("x", seen("text", file, samples.sample_order(), first, last)))
    for order in dict.fromkeys(item.data[0].read.order for item in data):
        ranges = union([item.data[0].read.ranges[0] for item in data if item.data[0].read.order == order])
        samples = next(
            opened(file, each[0], each[1], each[2], each[4])
            for each, item in zip(stages, data, strict=True)
            if item.data[0].read.order == order
        )
        for index in (i for begin, end in ranges for i in range(begin, end)):
            places = inputs_of(samples, index)
            if not taken & set(places):
                expected.append(samples.sample(index))
                taken |= set(places)
    (source,) = seen_sources(ReplayConfig(fraction=0.1, of="lineage"), Lineage(stages=data))
    again = source.open(of_sixteen())
    assert again.samples_per_epoch == len(expected) == again.num_samples
    out = np.empty((len(expected), 17), np.int64)
    again.fill(np.arange(len(expected)), out)
    assert np.array_equal(out, np.stack(expected))
    # a later replay goes on where this one ended, and around
    count = max(1, len(expected) // 3)
    read = again.read_between(0, count)
    replay = DataSeen(
        name="replay", path=file, fingerprint=source.file.fingerprint, samples=count, tokens=16 * count, read=read
    )
    (later,) = seen_sources(ReplayConfig(fraction=0.1, of="lineage"), Lineage(stages=[*data, stage("y", replay)]))
    following = later.open(of_sixteen())
    assert np.array_equal(following.sample(0), expected[count % len(expected)])
    assert np.array_equal(following.sample(len(expected) - 1), expected[count - 1])


def test_an_order_of_one_epoch_needs_no_list(file):
    """What earlier versions replayed of it is what is replayed now, under the same fingerprint: runs in progress go on."""
    original = PermutedSamples(open_tokens(file).view(), 16, 9, None)
    samples = SeenSamples([original], [((0, 40),)], (0, 7))
    assert samples.order == f"replay of {original.sample_order().model_dump_json()} [(0, 40)] from 7"
    epochs = SeenSamples([original], [((0, 3 * original.samples_per_epoch),)])
    assert epochs.samples_per_epoch == original.samples_per_epoch


def test_rows_are_a_set_too(tmp_path):
    rows = np.arange(30 * 17, dtype=np.uint16)
    rows.tofile(tmp_path / "rows.bin")
    view = open_tokens(str(tmp_path / "rows.bin"), dtype="uint16").view()
    samples = SeenSamples([RowSamples(view, 16, 0, None), RowSamples(view, 16, 20, None)], [((0, 25),), ((0, 20),)])
    assert [int(samples.sample(i)[0]) // 17 for i in range(samples.samples_per_epoch)] == list(range(30))


def test_what_left_out_steps_read_is_told_or_refused():
    order = an_order(1)
    old = Stage(run="old", intent="rewarm", steps=10, data=[seen("a", "A", order, 0, 50)], left_out=[(3, 3), (5, 8)])
    with pytest.raises(UserError, match=r"stage 'old' left out steps \(3, 5 to 8\), and its checkpoint, written by an earlier"):
        seen_sources(ReplayConfig(fraction=0.05, of="lineage"), Lineage(stages=[old]))
    new = old.model_copy(update={"data": [old.data[0].model_copy(update={"left_out": 10})]})
    (pool,) = seen_sources(ReplayConfig(fraction=0.05, of="lineage"), Lineage(stages=[new]))
    assert pool.weight == 40 * 16


def test_a_run_that_goes_on_in_its_data_has_its_trunks_lineage():
    first, second, third = (Stage(run=name, intent="rewarm", goes_on=False) for name in "abc")
    further = Stage(run="d", intent="resume", goes_on=True)
    unsaid = Stage(run="e", intent="branch")

    def names(*stages, goes_on):
        return "".join(stage.run for stage in history_to_replay(stages, goes_on=goes_on).stages)

    assert names(first, second, third, goes_on=False) == "abc"
    assert names(first, second, third, goes_on=True) == "ab"
    assert names(first, second, further, goes_on=True) == "a"
    assert names(first, second, further, unsaid, goes_on=True) == "a"
    assert names(first, further, third, goes_on=False) == "adc"


def test_what_was_never_recorded_is_refused_or_named():
    foreign = Stage(run="EleutherAI/pythia-410m", intent="foreign checkpoint (huggingface)")
    recorded = stage("new", seen("new", "NEW", an_order(1), 0, 95))
    replay = ReplayConfig(fraction=0.05, of="lineage")
    with pytest.raises(UserError, match=r"stage 'EleutherAI/pythia-410m' .* doesn't record which samples"):
        seen_sources(replay, Lineage(stages=[foreign, recorded]))
    old_version = stage("old", DataSeen(name="x", path="X", fingerprint="f", samples=3, tokens=48))
    with pytest.raises(UserError, match="stage 'old'"):
        seen_sources(replay, Lineage(stages=[old_version]))
    with pytest.raises(UserError, match="has read nothing yet"):
        seen_sources(replay, Lineage())
    both = ReplayConfig(fraction=0.05, of="lineage", sources=[Source(path="pile", tokens="300B tokens")])
    pile, new = replayed(both, Lineage(stages=[foreign, recorded]))
    assert (pile.weight, new.weight) == (300e9, 95 * 16)
    with pytest.raises(UserError, match=r"replay.paths: the lineage has no source 'nwe', but new"):
        seen_sources(ReplayConfig(fraction=0.05, of="lineage", paths={"nwe": "x"}), Lineage(stages=[recorded]))


@pytest.mark.parametrize(
    "keys", [{}, {"sources": [{"path": "a"}], "max_epochs": 3}, {"of": "lineage", "sources": [{"path": "a", "weight": 2}]}]
)
def test_replay_says_what_it_replays(keys):
    with pytest.raises(ValueError, match=r"give|belong"):
        ReplayConfig.model_validate({"fraction": 0.1, **keys})


# ---- runs ------------------------------------------------------------------------------------------------------------------


def held_out(place: Path) -> list[dict]:
    for name, seed in (("prose", 1), ("held", 7)):
        if not (place / f"{name}.idx").exists():
            write_tokens(place / name, seed)
    return [{"name": "old", "role": "upstream", "tokens": 256, "sources": [{"path": str(place / "held")}]}]


def upstream(place: Path) -> RunConfig:
    data = {"train": [{"path": str(place / "prose"), "max_epochs": 9}], "validation": held_out(place)}
    return config(place, name="up", folder=str(place / "up"), data=data)


def downstream(place: Path, name: str = "down", start: str = "up", **changes) -> RunConfig:
    replay = {"fraction": 0.25, "of": "lineage"} | changes.pop("replay", {})
    data = changes.pop("data", {})
    if "validation" not in data:
        data = data | {"validation": held_out(place)}
    start_from = {"from": str(place / start)}
    return config(place, name=name, folder=str(place / name), start=start_from, replay=replay, data=data, **changes)


def rows_of(run: RunConfig) -> dict[str, np.ndarray]:
    """The rows that the run reads of each source, in order."""
    built = build(make_plan(run), ALONE)
    built.batches.close()
    source, _ = built.data._mixture.rows._blend.locate(np.arange(160))
    rows = built.data.rows(0, 160)
    return {name: rows[source == i] for i, name in enumerate(built.data.names)}


def test_what_is_replayed_was_seen_and_in_that_order(tmp_path):
    train(upstream(tmp_path), ALONE, quiet())
    data = DataConfig(sequence_length=16, train=[{"path": str(tmp_path / "prose"), "max_epochs": 9}])
    was_read = build_training_batches(TokenFiles(data, 64), [Phase(0, data.train)], total_samples=160).rows(0, 160)
    rows = rows_of(downstream(tmp_path))
    assert np.array_equal(rows["replay of prose"], was_read[:40]) and len(rows["new"]) == 120
    outcome = train(downstream(tmp_path), ALONE, quiet())
    third = rows_of(downstream(tmp_path, "third", "down", data=third_file(tmp_path)))
    # 200 samples of prose (40 of them twice) and 120 of the new data were seen: 25 and 15 of the 40 to be replayed
    assert np.array_equal(third["replay of prose"], was_read[40:65]), "on from where the second stage's replay ended"
    assert np.array_equal(third["replay of new"], rows["new"][:15]) and len(third["third"]) == 120
    last = read_state(outcome.folder / "checkpoints/step_20").lineage.stages[-1]
    told = {item.name: item.read.ranges for item in last.data if item.read}
    assert told == {"new": ((0, 120),), "replay of prose": ((0, 40),)}


def third_file(place: Path) -> dict:
    if not (place / "third.idx").exists():
        write_tokens(place / "third", 9)
    return {"train": [{"path": str(place / "third"), "max_epochs": 9}]}


def test_a_replaying_run_stopped_anywhere_is_the_undisturbed_one(tmp_path, monkeypatch):
    train(upstream(tmp_path), ALONE, quiet())
    whole = train(downstream(tmp_path, "whole"), ALONE, quiet())
    original = trainer.training_step

    def step_or_die(run, lr):
        if run.step == 12:
            raise KeyboardInterrupt
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_or_die)
    with pytest.raises(KeyboardInterrupt):
        train(downstream(tmp_path), ALONE, quiet())
    monkeypatch.setattr(trainer, "training_step", original)
    shutil.rmtree(tmp_path / "up")  # what is replayed stands in the run's own lineage
    assert train(downstream(tmp_path), ALONE, quiet()).losses == whole.losses


def chosen(place: Path) -> dict[str, Any]:
    """The data of a run that reads half of the documents of 'prose', the lowest score first."""
    held = held_out(place)
    file = open_tokens(place / "prose")
    write_table(place / "half", DocumentTable("list", np.arange(0, 40, 2)), file, overwrite=True)
    write_table(place / "prose.loss", DocumentTable("scores", np.random.default_rng(2).random(40)), file, overwrite=True)
    source = {"path": str(place / "prose"), "documents": str(place / "half"), "max_epochs": 9}
    return {"train": [source], "order": {"by": "loss"}, "validation": held}


def test_documents_in_the_order_of_a_score_are_replayed_wherever_they_have_gone(tmp_path):
    up = config(tmp_path, name="up", folder=str(tmp_path / "up"), data=chosen(tmp_path))
    was_read = rows_of(up)["prose"]
    train(up, ALONE, quiet())
    rows = rows_of(downstream(tmp_path))
    assert np.array_equal(rows["replay of prose"], was_read[:40])
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    for file in [*tmp_path.glob("prose*"), tmp_path / "half.safetensors"]:
        shutil.move(file, elsewhere)
    moved = downstream(tmp_path, replay={"paths": {"prose": str(elsewhere / "prose")}})
    assert np.array_equal(rows_of(moved)["replay of prose"], was_read[:40])
    file = open_tokens(elsewhere / "prose")
    write_table(elsewhere / "half", DocumentTable("list", np.arange(1, 40, 2)), file, overwrite=True)
    with pytest.raises(UserError, match=r"half\.safetensors has changed since it was read"):
        rows_of(moved)


def test_an_order_by_score_resumes_at_any_step_and_knows_other_scores(tmp_path, monkeypatch):
    whole = train(config(tmp_path, name="whole", folder=str(tmp_path / "whole"), data=chosen(tmp_path)), ALONE, quiet())
    run = config(tmp_path, name="run", folder=str(tmp_path / "run"), data=chosen(tmp_path))
    original = trainer.training_step
    deaths = [7, 16]

    def step_or_die(run, lr):
        if deaths and run.step == deaths[0]:
            raise KeyboardInterrupt
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_or_die)
    while deaths:
        with pytest.raises(KeyboardInterrupt):
            train(run, ALONE, quiet())
        deaths.pop(0)
        if deaths:  # other scores are another order
            scores = tmp_path / "prose.loss.safetensors"
            kept = scores.read_bytes()
            write_table(scores, DocumentTable("scores", np.arange(40.0)), open_tokens(tmp_path / "prose"), overwrite=True)
            with pytest.raises(UserError, match="does not apply here, the data files, their blend or their order changed"):
                train(run, ALONE, quiet())
            scores.write_bytes(kept)
    assert train(run, ALONE, quiet()).losses == whole.losses


def test_documents_that_are_replayed_are_not_validated_on(tmp_path):
    train(config(tmp_path, name="up", folder=str(tmp_path / "up"), data=chosen(tmp_path)), ALONE, quiet())
    file = open_tokens(tmp_path / "prose")

    def held(numbers: list[int]) -> list[dict[str, Any]]:
        write_table(tmp_path / "held_list", DocumentTable("list", np.array(numbers)), file, overwrite=True)
        source = {"path": str(tmp_path / "prose"), "documents": str(tmp_path / "held_list")}
        return [{"name": "old", "role": "upstream", "tokens": 64, "sources": [source]}]

    assert len(rows_of(downstream(tmp_path, data={"validation": held([1, 3, 5])}))) == 2
    with pytest.raises(UserError, match="both read documents 4 to 8 of"):
        rows_of(downstream(tmp_path, data={"validation": held([1, 4, 8])}))


def test_replays_that_can_t_be(tmp_path, capsys):
    train(upstream(tmp_path), ALONE, quiet())

    def refused(message: str, **changes) -> None:
        with pytest.raises(UserError, match=message):
            train(downstream(tmp_path, "bad", **changes), ALONE, quiet())
        assert not (tmp_path / "bad").exists()

    refused(r"read in sequences of 16 tokens, this run's data.sequence_length is 8", data={"sequence_length": 8})
    refused(
        r"160 samples \(2560 tokens\) of 'replay of prose' may be .* max_epochs 1, the run needs 180 .*max_epochs to 1.13",
        replay={"fraction": 0.9},
        training={"budget": 25},
    )
    refused(
        r"validation set 'seen' \(upstream\) and 'replay of prose', which is replayed, both read documents 0 to 39",
        data={
            "validation": [{"name": "seen", "role": "upstream", "tokens": 64, "sources": [{"path": str(tmp_path / "prose")}]}]
        },
    )
    (tmp_path / "away").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"prose{suffix}").rename(tmp_path / f"away/text{suffix}")
    validation = [{"name": "held", "tokens": 64, "sources": [{"path": str(tmp_path / "held")}]}]
    refused(
        r"'prose': .*prose.bin does not exist.*say where in replay.paths: \{prose: NEW_PATH\}", data={"validation": validation}
    )
    write_tokens(tmp_path / "prose", 2)
    refused(r"prose.bin is not the file that was read as 'prose'", data={"validation": validation})
    moved = {"paths": {"prose": str(tmp_path / "away/text")}}
    assert train(downstream(tmp_path, "moved", replay=moved), ALONE, quiet()).step == 20
    with pytest.raises(UserError, match=r"replay of: lineage needs 'start.from'"):
        config(tmp_path, replay={"fraction": 0.1, "of": "lineage"})


def test_the_dry_run_shows_the_blend(tmp_path, capsys, monkeypatch):
    from megarewarm.config.load import dump

    train(upstream(tmp_path), ALONE, quiet())
    switches = [{"at": 10, "train": third_file(tmp_path)["train"], "replay_fraction": 0.5}]
    (tmp_path / "run.yml").write_text(dump(downstream(tmp_path, data={"switches": switches})))
    monkeypatch.setenv("COLUMNS", "120")
    assert main([str(tmp_path / "run.yml"), "--dry-run"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    first = lines.index("from step source share tokens")
    assert lines[first + 1 : first + 5] == [
        "1 new 75 % 960",
        "replay of prose (2,560 tokens seen) 25 % 320",
        "11 third 50 % 640",
        "replay of prose (2,560 tokens seen) 50 % 640",
    ]
