"""Sums of a flat gradient over data-parallel ranks that start while the backward pass still computes the rest of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

OVERLAPPING: tuple[str, ...] = ("cuda",)
"""Types of devices whose collectives don't take the processors that compute the backward pass: docs/benchmarks.md."""
LEAST = 32 * 2**20
"""Bytes of a bucket of several parameters, near the 25 MiB of torch's DistributedDataParallel."""

Place = tuple[nn.Parameter, range]
"""A parameter, and where its gradient is in the flat one."""


class Buckets:
    """The all-reduce of ``flat``, (n,), over ``group`` as several of its slices: the buckets, then the rest.

    The slices follow from the places alone, and their collectives have one order, on every rank and in every step: a bucket
    waits for the one before it, and a rank that had no backward pass starts them all in ``start``. Within a pass a bucket
    starts once all of its gradients are final. Autograd shows that by the hook behind a leaf's accumulation. It calls that once
    a pass, when all that could contribute is done: also products that add to ``.grad`` themselves and return no gradient
    (``megarewarm_kernels.products``).
    """

    def __init__(self, flat: Tensor, group: dist.ProcessGroup, places: Iterable[Place] = ()) -> None:
        """``places``: those of gradients which are final when autograd has accumulated them, ascending. Where nothing is to
        overlap all is the rest, one collective."""
        early = list(places) if flat.device.type in OVERLAPPING else []
        self._group, self._cut = group, cut(early, LEAST // flat.element_size())
        edges = [0, *(edge for _, span in reversed(self._cut) for edge in (span.start, span.stop)), flat.numel()]
        self._slices = [flat[span.start : span.stop] for _, span in self._cut]
        self._rest = [flat[first:stop] for first, stop in zip(edges[::2], edges[1::2], strict=True) if first < stop]
        self._missing: list[int] = []
        self._started = 0
        self._works: list[dist.Work] = []
        self._hooks: list[RemovableHandle] = []

    def watch(self) -> None:
        """Before the last backward pass that adds to the gradients: start buckets as it finishes them."""
        assert not (self._hooks or self._works), "gradients are summed already: reduce or zero them first; please report this"
        self._missing = [len(parameters) for parameters, _ in self._cut]
        for number, (parameters, _) in enumerate(self._cut):
            self._hooks += [p.register_post_accumulate_grad_hook(partial(self._add_final, number)) for p in parameters]

    def start(self) -> None:
        """Start those buckets that have not been: no pass adds to their gradients any more."""
        self._unwatch()
        while self._started < len(self._slices):
            self._start_next()

    def finish(self) -> None:
        """After ``start``: sum the rest as well, and wait for all. Raises the error of a collective that failed."""
        self._works += [self._sum(part) for part in self._rest]
        self.settle()

    def settle(self) -> None:
        """Wait for what has been started, and start nothing more before the next ``watch`` or ``start``."""
        self._unwatch()
        works, self._works, self._started = self._works, [], 0
        for work in works:
            work.wait()

    def _unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _add_final(self, number: int, parameter: Tensor) -> None:
        self._missing[number] -= 1
        while self._started < len(self._slices) and self._missing[self._started] == 0:
            self._start_next()

    def _start_next(self) -> None:
        self._works.append(self._sum(self._slices[self._started]))
        self._started += 1

    def _sum(self, part: Tensor) -> dist.Work:
        work = dist.all_reduce(part, group=self._group, async_op=True)
        assert work is not None
        return work


def cut(places: Sequence[Place], least: int) -> list[tuple[list[nn.Parameter], range]]:
    """Runs of ``places``, which ascend, without gaps, each as short as ``least`` values allow: the last one first, in the order
    of a backward pass. A run that is too short before a gap, or the beginning, is left out."""
    found: list[tuple[list[nn.Parameter], range]] = []
    held: list[nn.Parameter] = []
    run = range(0)
    for parameter, place in reversed(places):
        if not held or place.stop != run.start:
            held, run = [], range(place.stop, place.stop)
        held.append(parameter)
        run = range(place.start, run.stop)
        if len(run) >= least:
            found.append((held, run))
            held = []
    return found
