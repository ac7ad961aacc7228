"""Gradients of the parameters on this rank: reduced over the ranks that share them, their norm, scaling.

Frozen parameters have none. Of those of which some rows train (``RowsOf``), the rest of what the backward pass leaves is
discarded before anything is summed. Three storages with one interface. ``OwnGradients``: one rank has the whole model.
``FlatGradients``: every data-parallel rank holds all of them in one tensor. ``ShardedGradients``: fully_shard has left each
rank its shard.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist
from megarewarm_kernels import no_triton
from megarewarm_kernels.optimizer.norm_tensors import NormTensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megarewarm.model.parameters import EMBEDDING
from megarewarm.parallel.buckets import Buckets, Place
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.placement import Placement

ROW = 256
"""Values that are added up in fp32; the sums of such rows are added up in fp64."""


@dataclass(frozen=True)
class RowsOf:
    """Rows from ``first`` to ``stop`` of ``whole``, a parameter on this rank, which train while the others are frozen.
    ``rows``: them, sharing its memory; the optimizer reads their ``.grad``."""

    whole: nn.Parameter
    rows: nn.Parameter
    first: int
    stop: int

    @classmethod
    def make(cls, whole: nn.Parameter, first: int, stop: int) -> RowsOf:
        """With ``rows`` of their own."""
        return cls(whole, nn.Parameter(whole.detach()[first:stop]), first, stop)

    def of(self, tensor: Tensor) -> Tensor:
        """The same rows of a tensor that is laid out as ``whole``."""
        return tensor[self.first : self.stop]


class Gradients(ABC):
    """The trainer's interface to gradients."""

    @abstractmethod
    def zero(self) -> None:
        """Discard them."""

    def keep(self) -> None:  # noqa: B027  # storages that keep every .grad do so already
        """From now on leave every gradient where it is in memory: ``zero`` writes zeros, ``collect`` moves none."""

    def collect(self) -> None:  # noqa: B027  # storages that keep every .grad have nothing to put aside
        """After each of several micro-batches: put aside what autograd would else add tensor by tensor."""

    def expect_reduce(self) -> None:  # noqa: B027  # others don't begin early
        """Before passes that ``reduce`` follows, on all ranks: it may begin during the last of them."""

    def begin_last(self) -> None:  # noqa: B027  # others don't begin early
        """Before the passes of this rank's last micro-batch."""

    @abstractmethod
    def reduce(self) -> None:
        """Replace every parameter's gradient by its sum over the ranks that have a part of it."""

    @abstractmethod
    def squares(self) -> Tensor:
        """The square of the 2-norm over all parameters of the whole model, each counted once; () fp64 on the device, the same
        number on all ranks. It is not finite if any number on any rank isn't, also in a part that another rank counts."""

    def norm(self) -> float:
        """The 2-norm; waits for the device."""
        return math.sqrt(float(self.squares()))

    @abstractmethod
    def scale_(self, factor: float) -> None:
        """Multiply them by ``factor``."""

    @abstractmethod
    def take(self) -> dict[str, Tensor]:
        """The reduced gradients by parameter, put aside, so that others may be computed. They have none afterwards."""

    @abstractmethod
    def put_back(self, taken: Mapping[str, Tensor]) -> None:
        """Replace the gradients by those that ``take`` gave, bit for bit."""


class OwnGradients(Gradients):
    """Gradients that are on this rank only, each a tensor as the backward pass made it. Compared with a flat tensor this
    saves clearing it and adding the first micro-batch to the zeros, four passes over memory."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], rows: Sequence[RowsOf] = (), *, launches: bool = False) -> None:
        """``launches``: an operation costs more than its work on a small tensor, as on a GPU, where the gradients of biases and
        norms of further micro-batches are added in one launch."""
        self._parameters, self._rows = parameters, rows
        self._vectors = [p for p in parameters.values() if p.dim() == 1] if launches else []
        self._aside: list[Tensor] = []
        self._norm = NormTensors()
        self._keeps = False

    def keep(self) -> None:
        self._keeps = True

    def collect(self) -> None:
        if self._keeps:
            return
        found = [p.grad for p in self._vectors if p.grad is not None]
        if self._aside:
            torch._foreach_add_(self._aside, found)
        else:
            self._aside = found
        for parameter in self._vectors:
            parameter.grad = None

    def zero(self) -> None:
        self._aside = []
        if self._keeps and (held := self._all()):
            torch._foreach_zero_(held)
        else:
            self._forget()

    def _forget(self) -> None:
        for parameter in (*self._parameters.values(), *(part.whole for part in self._rows)):
            parameter.grad = None

    def reduce(self) -> None:
        if self._aside:
            if any(parameter.grad is not None for parameter in self._vectors):
                self.collect()
            for parameter, total in zip(self._vectors, self._aside, strict=True):
                parameter.grad = total
            self._aside = []
        for part in self._rows:
            assert part.whole.grad is not None
            part.rows.grad = part.of(part.whole.grad)
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None, name

    def squares(self) -> Tensor:
        every = self._all()
        return squared_norm(every) if no_triton(every[0].device) else self._norm.squares(every)

    def scale_(self, factor: float) -> None:
        torch._foreach_mul_(self._all(), factor)

    def take(self) -> dict[str, Tensor]:
        taken = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        self._forget()
        return taken

    def put_back(self, taken: Mapping[str, Tensor]) -> None:
        for name, gradient in taken.items():
            self._parameters[name].grad = gradient

    def _all(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]


class FlatGradients(Gradients):
    """One flat fp32 tensor whose slices are the parameters' ``.grad``: few collectives, which may begin during the last
    backward pass (``Buckets``), and one scaling.

    Parameters must be fp32, on one device, and keep their ``.grad`` (never set it to None). ``copies``: parameters that
    another pipeline rank counts. ``reduce_copies``: adds up the gradients of tied embeddings.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        placements: Mapping[str, Placement],
        mesh: Mesh,
        copies: frozenset[str] = frozenset(),
        reduce_copies: Callable[[], None] | None = None,
        rows: Sequence[RowsOf] = (),
    ) -> None:
        self._mesh, self._parameters, self._rows = mesh, parameters, rows
        self._reduce_copies = reduce_copies
        order = sorted(parameters, key=lambda name: _kind(placements[name], name in copies))
        self.flat = torch.zeros(sum(p.numel() for p in parameters.values()), device=mesh.device)
        sizes = [0] * 4
        places: list[Place] = []
        late = {id(part.rows) for part in rows}
        for name in order:
            parameter, kind = parameters[name], _kind(placements[name], name in copies)
            place = range(sum(sizes), sum(sizes) + parameter.numel())
            parameter.grad = self.flat[place.start : place.stop].view_as(parameter)
            sizes[kind] += len(place)
            # an embedding's is final last, and may go past autograd; the small ones of tensor ranks, those of all layers, lie
            # together behind the divided ones
            if name != EMBEDDING and id(parameter) not in late and (kind == 0 or mesh.tensor is None):
                places.append((parameter, place))
        self._parts = self.flat.split(sizes)  # in the order of _kind: divided, whole, partial, copies
        # the schedule of a pipeline knows its last passes, this does not
        early = places if mesh.layout.pipeline == 1 else ()
        self._buckets = None if mesh.data is None else Buckets(self.flat, mesh.data, early)
        self._reduce_follows = False

    def zero(self) -> None:
        if self._buckets is not None:
            self._buckets.settle()  # of passes that were interrupted
        self._reduce_follows = False
        self.flat.zero_()
        for part in self._rows:
            part.whole.grad = None

    def expect_reduce(self) -> None:
        self._reduce_follows = True

    def begin_last(self) -> None:
        if self._buckets is not None and self._reduce_follows:
            self._buckets.watch()

    def reduce(self) -> None:
        self._reduce_follows = False
        for part in self._rows:
            if part.whole.grad is not None and part.rows.grad is not None:
                part.rows.grad.copy_(part.of(part.whole.grad))
            part.whole.grad = None
        if self._buckets is not None:
            self._buckets.start()
        if self._mesh.tensor is not None and len(self._parts[2]):
            dist.all_reduce(self._parts[2], group=self._mesh.tensor)
        if self._buckets is not None:
            self._buckets.finish()
        # last: the copies lie at different places of ``flat``, where a sum of three ranks may be rounded otherwise; one of two
        # ranks is the same on both
        if self._reduce_copies is not None:
            self._reduce_copies()

    def squares(self) -> Tensor:
        if self._mesh.layout.model == 1:
            return squared_norm([self.flat])
        # of parameters counted elsewhere only whether they are finite: the optimizer uses this copy too
        counted = 1.0 if self._mesh.tensor_rank == 0 else 0.0
        parts = zip(self._parts, (1.0, counted, counted, 0.0), strict=True)
        squares = torch.stack([factor * squared_norm([part]) for part, factor in parts]).sum()
        dist.all_reduce(squares)
        return squares / self._mesh.layout.data

    def scale_(self, factor: float) -> None:
        self.flat.mul_(factor)

    def take(self) -> dict[str, Tensor]:
        taken = {name: p.grad.clone() for name, p in self._parameters.items() if p.grad is not None}
        self.zero()
        return taken

    def put_back(self, taken: Mapping[str, Tensor]) -> None:
        for name, gradient in taken.items():
            held = self._parameters[name].grad
            assert held is not None
            held.copy_(gradient)


class ShardedGradients(Gradients):
    """Gradients that fully_shard has reduced already. ``local``: what trains of this rank's shards as plain parameters,
    which share the sharded parameters' memory and whose ``.grad`` the optimizer reads."""

    def __init__(
        self,
        sharded: Mapping[str, nn.Parameter],
        local: Mapping[str, nn.Parameter],
        placements: Mapping[str, Placement],
        mesh: Mesh,
        copies: frozenset[str] = frozenset(),
        reduce_copies: Callable[[], None] | None = None,
        rows: Mapping[str, RowsOf] = MappingProxyType({}),
    ) -> None:
        self._sharded, self._local, self._placements, self._rows = sharded, local, placements, rows
        self._mesh, self._copies, self._reduce_copies = mesh, copies, reduce_copies

    def zero(self) -> None:
        for parameter in (*self._sharded.values(), *self._local.values()):
            parameter.grad = None

    def reduce(self) -> None:
        for name, parameter in self._local.items():
            grad = self._sharded[name].grad
            assert isinstance(grad, DTensor), name
            part = self._rows.get(name)
            parameter.grad = grad.to_local() if part is None else part.of(grad.to_local())
        partial = [self._grad(name) for name in self._local if self._placements[name].partial]
        if self._mesh.tensor is not None and partial:
            flat = torch.cat([grad.flatten() for grad in partial])
            dist.all_reduce(flat, group=self._mesh.tensor)
            for grad, total in zip(partial, flat.split([grad.numel() for grad in partial]), strict=True):
                grad.copy_(total.view_as(grad))
        if self._reduce_copies is not None:
            self._reduce_copies()

    def squares(self) -> Tensor:
        squares = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        for name in self._local:
            kind = _kind(self._placements[name], name in self._copies)
            counted = kind == 0 or (kind < 3 and self._mesh.tensor_rank == 0)
            # not finite is not finite, also where it does not count
            squares += (1.0 if counted else 0.0) * squared_norm([self._grad(name)])
        dist.all_reduce(squares)
        return squares / self._mesh.layout.replicate

    def scale_(self, factor: float) -> None:
        if self._local:
            torch._foreach_mul_([self._grad(name) for name in self._local], factor)

    def take(self) -> dict[str, Tensor]:
        taken = {name: self._grad(name) for name in self._local}
        self.zero()
        return taken

    def put_back(self, taken: Mapping[str, Tensor]) -> None:
        for name, gradient in taken.items():
            self._local[name].grad = gradient

    def _grad(self, name: str) -> Tensor:
        grad = self._local[name].grad
        assert grad is not None, name
        return grad


def _kind(placement: Placement, copy: bool) -> int:
    """0: divided over the tensor ranks, 1: whole on each, 2: whole with partial gradients, 3: counted elsewhere."""
    if copy:
        return 3
    return 0 if placement.dim is not None else 2 if placement.partial else 1


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all values of fp32 ``tensors`` on one device, () fp64, right to some 1e-7 at any size.

    A CPU's norm of a whole tensor is added up in a few fp32 numbers, which loses 1e-3 at 2e7 values; rows of ``ROW`` cost a
    quarter more. A GPU's operation for many tensors adds up short pieces as it is.
    """
    given = [tensor.detach() for tensor in tensors]
    total = given[0].new_zeros((), dtype=torch.float64)
    held = [tensor for tensor in given if tensor.numel()]
    if held and held[0].is_cuda:
        return torch.stack(list(torch._foreach_norm(held))).double().square_().sum()
    for tensor in held:
        flat = tensor.reshape(-1)
        whole = flat.numel() - flat.numel() % ROW
        total += torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1).double().square_().sum()
        total += flat[whole:].double().square().sum()
    return total
