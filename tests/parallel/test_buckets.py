"""Gradients that are summed while the backward pass goes on are those that are summed after it, whatever happens between."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megarewarm.parallel import buckets
from megarewarm.parallel.buckets import Buckets, cut
from megarewarm.parallel.gradients import FlatGradients
from megarewarm.parallel.ranks import Ranks, is_rank_loss
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start import inputs
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.parallel import test_bad_steps, test_values
from tests.parallel.test_layouts import DOCUMENTS, FUSED, MODEL
from tests.support.distributed import run_ranks
from tests.support.family_shapes import shape
from tests.support.loss_cases import in_place
from tests.support.tiny import config, events, quiet
from tests.support.wire import Wire
from tests.training import test_freezing, test_stopped_amid
from tests.training.test_bad_steps import same, weights

LEAST = 2048
"""Bytes of a bucket here, so that models of these tests have several."""
STEPS = 6


@contextmanager
def overlapping() -> Iterator[list[int]]:
    """Models that are made meanwhile sum during the backward pass, on a CPU too; of each reduction, the sums that had begun."""
    early: list[int] = []
    start = Buckets.start

    def counted(self: Buckets) -> None:
        early.append(len(self._works))
        start(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(buckets, "OVERLAPPING", ("cpu",))
        patched.setattr(buckets, "LEAST", LEAST)
        patched.setattr(Buckets, "start", counted)
        yield early


# ---- the cut ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=20), st.integers(1, 60))
def test_the_cut_covers_what_lies_together(sizes: list[tuple[int, int]], least: int) -> None:
    places, stop = [], 0
    for gap, size in sizes:
        places.append((nn.Parameter(torch.empty(0)), range(stop + gap, stop + gap + size)))
        stop += gap + size
    found = cut(places, least)
    where = {id(parameter): place for parameter, place in places}
    starts = [run.start for _, run in found]
    assert starts == sorted(starts, reverse=True), "the last one first"
    for parameters, run in found:
        held = sorted((where[id(each)] for each in parameters), key=lambda place: (place.start, place.stop))
        assert held[0].start == run.start and held[-1].stop == run.stop
        assert all(one.stop == other.start for one, other in pairwise(held)), "without gaps"
        assert len(run) >= least > len(run) - len(held[0]), "as short as it may be"
    taken = {id(each) for parameters, _ in found for each in parameters}
    left = [place for parameter, place in places if id(parameter) not in taken]
    for one, other in pairwise(left):
        assert one.stop != other.start or len(one) + len(other) < least


def _out_of_turn(ranks: Ranks) -> tuple[list[int], list[list[int]]]:
    """Three parameters, a bucket each, whose gradients are final in another order on each rank; the middle one's on one only:
    sums after each, and where all of them were."""
    started: list[int] = []
    original = Buckets._sum

    def watched(self: Buckets, part: Tensor) -> dist.Work:
        started.append(int(part.storage_offset()))
        return original(self, part)

    flat = torch.zeros(9)
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    for number, parameter in enumerate(parameters):
        parameter.grad = flat[3 * number : 3 * number + 3]
    group = dist.group.WORLD
    assert group is not None
    with overlapping(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(buckets, "LEAST", 4)
        patched.setattr(Buckets, "_sum", watched)
        made = Buckets(flat, group, [(p, range(3 * i, 3 * i + 3)) for i, p in enumerate(parameters)])
        counts = []
        for _ in range(2):  # the second step is as the first
            flat.zero_()
            made.watch()
            for number in ([0, 2, 1], [2, 0])[ranks.rank]:
                (parameters[number] * 10.0**number).sum().backward()
                counts.append(len(started))
            made.start()
            made.finish()
    return counts, [started, flat.tolist()]


def test_buckets_wait_for_their_turn() -> None:
    (one, found), (other, also) = run_ranks(_out_of_turn, 2)
    assert (one, other) == ([0, 1, 3, 3, 4, 6], [1, 1, 4, 4])
    assert found == also == [[6, 3, 0] * 2, [2.0] * 3 + [10.0] * 3 + [200.0] * 3]


# ---- a step -------------------------------------------------------------------------------------------------------------

TIED = {"tie_embeddings": True}
BF16 = {"precision": "bf16"}
OURS = ("fused", "head", "per_row", "training")
"""What of a case is not as in a configuration; ``head``: its gradient goes straight to its place, as on a GPU."""
Case = tuple[dict[str, Any], dict[str, Any]]
CASES: dict[int, dict[str, Case]] = {
    2: {
        "data": ({}, {}),
        "one micro-batch": ({}, {"training": {"micro_batch": 4}}),
        "tied": ({}, {"model": MODEL | TIED, "data": DOCUMENTS}),
        "direct products": ({}, {"training": {**BF16, "recompute": "selective"}, "fused": True}),
        "direct products, plain layers": ({}, {"training": {**BF16, "recompute": "full"}}),
        "direct head": ({}, {"training": BF16, "fused": True, "head": True}),
        "fp16": ({}, {"model": shape("qwen3", 3), "training": {"precision": "fp16"}, "fused": True}),
        "qwen2": ({}, {"model": shape("qwen2", 3), "training": {**BF16, "recompute": "full"}, "fused": True}),
        "olmo2, row by row": ({}, {"model": shape("olmo2", 3), "per_row": True}),
        "frozen": ({}, {"optimizer": {"train": {"only": ["layers 1-2", "head"]}}}),
        "norms only": ({}, {"optimizer": {"train": {"only": "norms"}}}),
    },
    4: {
        "data": ({}, {"training": {"micro_batch": 1}}),
        "tensor": ({"tensor": 2}, {"training": {**BF16, "recompute": "selective"}, "fused": True}),
        "sequence, tied": ({"tensor": 2, "sequence": True}, {"model": MODEL | TIED, "data": DOCUMENTS}),
        "llama tensor": ({"tensor": 2}, {"model": shape("llama", 3), "training": BF16}),
    },
}


def _build(ranks: Ranks, place: str, parallel: dict[str, Any], changes: dict[str, Any]) -> Run:
    given = {"model": MODEL, **{key: value for key, value in changes.items() if key not in OURS}}
    if changes.get("optimizer"):
        given["start"] = {"from": f"{place}/start", "intent": "rewarm"}
    training = {"micro_batch": 2, "budget": STEPS, **changes.get("training", {})}
    with pytest.MonkeyPatch.context() as patched:
        if changes.get("fused"):
            patched.setattr(inputs, "choose_operations", lambda *_, **__: (FUSED, []))
        made = config(Path(place), folder=f"{place}/run", parallel=parallel, training=training, **given)
        run = build(make_plan(made), ranks)
    run.batches.close()
    return run


def _flat(run: Run) -> FlatGradients:
    assert isinstance(run.model.gradients, FlatGradients)
    return run.model.gradients


def _pass(run: Run, *, per_row: bool = False) -> float:
    """Losses of the run's first batch, whose gradients are left as they are before ``reduce``."""
    run.model.gradients.zero()
    run.model.gradients.expect_reduce()
    rows = run.data.share(0, 8, run.mesh.data_rank, run.mesh.layout.data)
    return run.model.forward_backward(rows, per_row=per_row).sum


class Recorder:
    """What happens in the order in which it happens: ("final", its place) for a parameter that autograd has done with,
    ("sum", its place) for a collective of the flat gradient that starts, of which ``sent`` has the numbers at that moment."""

    def __init__(self, run: Run, patched: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, range]] = []
        self.sent: list[tuple[range, Tensor]] = []
        original = Buckets._sum

        def watched(self_: Buckets, part: Tensor) -> dist.Work:
            where = range(part.storage_offset(), part.storage_offset() + part.numel())
            self.events.append(("sum", where))
            self.sent.append((where, part.clone()))
            return original(self_, part)

        patched.setattr(Buckets, "_sum", watched)
        self.places = {name: self._place(parameter) for name, parameter in run.model.trained.items()}
        for name, parameter in run.model.trained.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.events.append(("final", self.places[name])))

    @staticmethod
    def _place(parameter: nn.Parameter) -> range:
        assert parameter.grad is not None
        return range(parameter.grad.storage_offset(), parameter.grad.storage_offset() + parameter.numel())


def _compare_steps(ranks: Ranks, place: str, names: list[str]) -> dict[str, list[float]]:
    """Of each case the gradients where one rank holds all; those of two ranks are compared with sums after the pass by bits."""
    found = {}
    for name in names:
        parallel, changes = CASES[ranks.world_size][name]
        with in_place() if changes.get("head") else nullcontext([True]) as direct:
            found[name] = _compare_step(ranks, place, name, parallel, changes)
        assert direct and all(direct), name
    return found


def _compare_step(ranks: Ranks, place: str, name: str, parallel: dict[str, Any], changes: dict[str, Any]) -> list[float]:
    per_row = changes.get("per_row", False)
    plain = _build(ranks, place, parallel, changes)
    loss = _pass(plain, per_row=per_row)
    before = _flat(plain).flat.clone()
    plain.model.gradients.reduce()
    with overlapping(), pytest.MonkeyPatch.context() as patched:
        run = _build(ranks, place, parallel, changes)
        recorder = Recorder(run, patched)
        for _ in range(2):  # the second time over what the first left
            recorder.events.clear(), recorder.sent.clear()
            assert _pass(run, per_row=per_row) == loss, name
            during = len(recorder.sent)
            run.model.gradients.reduce()
            _check_order(recorder, during, before, run, name)
    one, other = _flat(plain).flat, _flat(run).flat
    apart = float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one))
    assert apart == 0.0 if run.mesh.layout.data == 2 else apart < 1e-6, name
    assert run.model.gradients.norm() == pytest.approx(plain.model.gradients.norm(), rel=1e-6), name
    return other.tolist() if run.mesh.layout.model == 1 else []


def _check_order(recorder: Recorder, during: int, before: Tensor, run: Run, name: str) -> None:
    """Each sum starts when its gradients are final, by autograd's word and by their numbers, and several do within the pass."""
    flat, events = _flat(run), recorder.events
    sums = [place for kind, place in events if kind == "sum"]
    ends = sorted((place.start, place.stop) for place in sums)
    assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])] and ends[-1][1] == len(flat.flat), name
    parts = len(run.data.share(0, 8, run.mesh.data_rank, run.mesh.layout.data)) // run.model.micro_batch
    starts = [i for i, (kind, _) in enumerate(events) if kind == "sum"]
    if name != "norms only":  # which are in no more than one bucket
        last = max(i for i, (kind, _) in enumerate(events) if kind == "final")
        assert during >= 2 and starts[1] < last, f"{name}: {during} sums during the pass"
    for i in starts[:during]:
        _, sent = events[i]
        within = [place for place in recorder.places.values() if sent.start <= place.start and place.stop <= sent.stop]
        final = [place for kind, place in events[:i] if kind == "final"]
        assert all(final.count(place) == parts for place in within if len(place)), name
    for place, numbers in recorder.sent:
        if not (run.mesh.layout.tensor > 1 and place.stop == len(before)):  # partial ones have been summed over tensor ranks
            assert torch.equal(numbers, before[place.start : place.stop]), f"{name}: {place} was sent before it was final"


def _start_checkpoint(place: Path) -> None:
    train(
        config(place, folder=str(place / "start"), model=MODEL, training={"budget": 1}, evaluation={"every": None}),
        Ranks(0, 1, torch.device("cpu")),
        quiet(),
    )


@pytest.mark.parametrize("world_size", CASES)
def test_steps_are_those_summed_after_the_pass(tmp_path: Path, world_size: int) -> None:
    _start_checkpoint(tmp_path)
    names = list(CASES[world_size])
    one, *others = run_ranks(_compare_steps, world_size, str(tmp_path), names, timeout=600)
    assert all(other == one for other in others), "every rank has the same bits"
    again = run_ranks(_compare_steps, world_size, str(tmp_path), names[:1], timeout=600)
    assert again[0][names[0]] == one[names[0]], "and every run"


# ---- what comes between -------------------------------------------------------------------------------------------------


def _uneven(ranks: Ranks, place: str, parallel: dict[str, Any]) -> list[tuple[int, bool]]:
    """Of passes in which one rank's share is several micro-batches and others have none: sums that began in the pass, and
    whether the gradients are those summed after it."""
    plain = _build(ranks, place, parallel, {})
    found = []
    with overlapping() as early:
        run = _build(ranks, place, parallel, {})
        for busy in range(run.mesh.layout.data):
            rows = run.data.rows(0, 5 if run.mesh.data_rank == busy else 0)
            for each in (plain, run):
                each.model.gradients.zero()
                each.model.gradients.expect_reduce()
                each.model.add_mean_gradients(rows, 5)
                each.model.gradients.reduce()
            found.append((early[-1], torch.equal(_flat(plain).flat, _flat(run).flat)))
    return found


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["data", "tensor"])
def test_ranks_without_a_pass_keep_the_order(tmp_path: Path, parallel: dict[str, Any]) -> None:
    config(tmp_path)
    tensor = parallel.get("tensor", 1)
    for rank, found in enumerate(run_ranks(_uneven, 2 * tensor, str(tmp_path), parallel)):
        assert [same_bits for _, same_bits in found] == [True, True]
        assert [early > 1 for early, _ in found] == [rank // tensor == 0, rank // tensor == 1]


class _Fault(Exception):
    pass


def _interrupted(ranks: Ranks, place: str) -> tuple[list[bool], list[int], list[int]]:
    """After passes of which nothing was asked, that a stop ended between micro-batches, and that an error ended on all ranks:
    collectives until then, and whether the next step is as if they had not been."""
    plain = _build(ranks, place, {}, {})
    _pass(plain)
    plain.model.gradients.reduce()
    alike, sent = [], []

    def stop(done: int, portions: int) -> None:
        raise _Fault

    def fail(parameter: Tensor) -> None:
        raise _Fault

    with overlapping() as early:
        run = _build(ranks, place, {}, {})
        rows = run.data.share(0, 8, run.mesh.data_rank, 2)
        layer = run.model.trained["layers.0.attention.dense.weight"]

        def unasked() -> None:
            run.model.gradients.zero()
            run.model.forward_backward(rows)

        def stopped() -> None:
            run.model.gradients.zero()
            run.model.gradients.expect_reduce()
            with pytest.raises(_Fault):
                run.model.forward_backward(rows, between=stop)

        def failed() -> None:
            run.model.gradients.zero()
            run.model.gradients.expect_reduce()
            hook = layer.register_post_accumulate_grad_hook(fail)
            with pytest.raises(_Fault):
                run.model.forward_backward(rows[:2])
            hook.remove()

        for interrupt in (unasked, stopped, failed):
            with Wire() as wire:
                interrupt()
            sent.append(wire.calls.get("allreduce_", 0))
            _pass(run)
            run.model.gradients.reduce()
            alike.append(torch.equal(_flat(plain).flat, _flat(run).flat))
            assert not any(parameter._post_accumulate_grad_hooks for parameter in run.model.trained.values())
    return alike, sent, early


def test_what_interrupts_a_pass_leaves_no_trace(tmp_path: Path) -> None:
    config(tmp_path)
    for alike, sent, early in run_ranks(_interrupted, 2, str(tmp_path)):
        assert alike == [True] * 3 and all(early) and len(early) == 3
        assert sent[:2] == [0, 0] and sent[2] > 1, "sums begin in a last pass that reduce follows, and nowhere else"


def _lost(ranks: Ranks, place: str) -> tuple[bool, float]:
    """Whether a rank whose peer ends amid the pass names that as the loss of a rank; its seconds until then."""
    with overlapping():
        run = _build(ranks, place, {}, {})
        if ranks.rank == 1:

            def fail(parameter: Tensor) -> None:
                raise _Fault

            run.model.trained["layers.0.attention.dense.weight"].register_post_accumulate_grad_hook(fail)
            with pytest.raises(_Fault):
                _pass(run)
            return True, 0.0
        _pass(run)
        began = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            run.model.gradients.reduce()
        return is_rank_loss(caught.value), time.monotonic() - began


def test_a_rank_that_fails_amid_the_pass_is_missed(tmp_path: Path) -> None:
    """Nobody waits for what it has begun: neither itself, which ends, nor the others, at once and not after the timeout."""
    config(tmp_path)
    assert all(lost and seconds < 60 for lost, seconds in run_ranks(_lost, 2, str(tmp_path)))


# ---- runs ---------------------------------------------------------------------------------------------------------------


def _both(ranks: Ranks, function: Callable[..., Any], place: str, *args: Any) -> list[int]:
    """Sums that began during passes of ``function`` in the folder early; it is called in the folder plain as well."""
    function(ranks, f"{place}/plain", *args)
    with overlapping() as early:
        function(ranks, f"{place}/early", *args)
    return early


def _assert_same_runs(place: Path, name: str, step: int) -> None:
    runs = [place / side / name for side in ("plain", "early")]
    for event in ("train", "eval", "value", "alarm"):
        # alarms of slow ranks are the machine's
        one, other = ([_measured(line) for line in events(run, event) if "loss" in line or event == "value"] for run in runs)
        assert one == other and (one or event in ("value", "alarm")), event
    assert same(weights(runs[0], step), weights(runs[1], step))


def _measured(line: dict[str, Any]) -> dict[str, Any]:
    return {key: line.get(key) for key in ("step", "loss", "grad_norm", "distilled", "samples", "measured", "kind")}


def _faulty(ranks: Ranks, place: str) -> None:
    test_bad_steps._train(ranks, place, {}, 7, 15)


def _faulty_guarded(ranks: Ranks, place: str) -> None:
    test_bad_steps._guarded(ranks, place, {}, 7, 15)


def _valued(ranks: Ranks, place: str) -> None:
    train(test_values.settings(Path(place), "tiny", {}, {}), ranks, quiet())


def _thawing(ranks: Ranks, place: str) -> None:
    only = ["new_rows", "layers 2"]
    train(test_freezing._frozen(Path(place), "tiny", only, test_freezing.THAW), ranks, quiet())


def _distilling(ranks: Ranks, place: str) -> None:
    taught = {"start": {"from": f"{place}/up", "intent": "continue"}, "distill": {"from": f"{place}/up", "weight": 0.7}}
    train(test_freezing._config(Path(place), "tiny", **taught), ranks, quiet())


RUNS = {
    "recomputed steps": (_faulty, 20, False),
    "recomputed steps, guarded": (_faulty_guarded, 20, False),
    "values": (_valued, 10, False),
    "frozen rows, then all": (_thawing, test_freezing.STEPS, True),
    "a teacher": (_distilling, test_freezing.STEPS, True),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_those_summed_after_the_pass(tmp_path: Path, name: str) -> None:
    function, steps, starts = RUNS[name]
    for side in ("plain", "early"):
        (tmp_path / side).mkdir()
        config(tmp_path / side)
        if starts:
            test_freezing._start(tmp_path / side)
    for early in run_ranks(_both, 2, function, str(tmp_path)):
        assert sum(count > 0 for count in early) >= steps
    _assert_same_runs(tmp_path, "tiny", steps)


def _stopped(ranks: Ranks, place: str) -> list[int]:
    with overlapping() as early:
        codes = test_stopped_amid._stopped_on_one_rank(ranks, place, {}, 0.45)
    assert all(early)
    return codes


def test_a_run_stopped_amid_a_step_is_the_undisturbed_one(tmp_path: Path) -> None:
    test_stopped_amid.settings(tmp_path, "none")  # token files
    assert run_ranks(_stopped, 2, str(tmp_path)) == [[0, 128 + signal.SIGTERM, 0]] * 2
    assert test_stopped_amid.stand(tmp_path / "broken") == test_stopped_amid.stand(tmp_path / "whole")
