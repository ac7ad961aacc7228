"""AdamW over all parameters of a model in one launch: the step of ``adamw_``, over tensors that lie anywhere in memory.

One program takes one block of one tensor, which it finds in a table: where each tensor, its moments and its gradient begin, and
which tensor a block belongs to. The table is made once; only the gradients' addresses are sent again, and only where they have
changed. Bytes moved for each parameter, fp32: p, m and v read and written, 24, and the gradient, 4, which is scaled on the way:
scaling it in a pass of its own moves 8 more. A copy in a lower dtype takes 2; made in a pass of its own, 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, no_triton
from megarewarm_kernels.optimizer.adamw import adamw_

_BLOCK = 1024
_WARPS = 4


class AdamWTensors:
    """Parameters and their moments, to be updated together.

    Args:
        parameters, firsts, seconds: contiguous fp32 tensors on one device, as many of each and of the same shapes. They are
            updated in place and must stay where they are.
        decays: the weight decay of each parameter.
        betas, eps: as for torch.optim.AdamW.
        copies: where each parameter is written in a lower dtype too, bf16 or fp16, the same for all; None: nowhere.

    Where Triton can't run, or for fp64, the tensors are updated one after another by ``adamw_``. Raises ValueError for tensors
    of other shapes, dtypes or with gaps.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        firsts: Sequence[Tensor],
        seconds: Sequence[Tensor],
        *,
        decays: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        copies: Sequence[Tensor | None] = (),
    ) -> None:
        copies = list(copies) or [None] * len(parameters)
        if not len(parameters) == len(firsts) == len(seconds) == len(decays) == len(copies):
            raise ValueError("give as many moments, decays and copies as parameters")
        kinds = {copy.dtype for copy in copies if copy is not None}
        if len(kinds) > 1 or not kinds <= {torch.bfloat16, torch.float16}:
            raise ValueError(f"need copies in bf16 or in fp16, got {', '.join(sorted(map(str, kinds)))}")
        for parameter, copy in zip(parameters, copies, strict=True):
            if copy is not None:
                _check(copy, parameter, next(iter(kinds)))
        for together in zip(parameters, firsts, seconds, strict=True):
            for part in together:
                _check(part, together[0])
        self._parameters, self._firsts, self._seconds = list(parameters), list(firsts), list(seconds)
        self._copies, self._kind = copies, next(iter(kinds), None)
        self._decays, self._betas, self._eps = list(decays), betas, eps
        self._gradients: list[int] = []
        if not parameters or parameters[0].dtype != torch.float32 or no_triton(parameters[0].device):
            self._table: Tensor | None = None
            return
        device = parameters[0].device
        sizes = [part.numel() for part in parameters]
        self._owners, self._begins, self._sizes = blocks_of(sizes, _BLOCK, device)
        self._decay = torch.tensor(decays, dtype=torch.float32, device=device)
        # a row for parameters, moments, copies and gradients each
        self._places = self._find()
        rows = [*self._places, self._places[0]]
        # slices of a flat tensor may begin anywhere; then accesses are of 4 bytes, else of 16
        self._aligned = all(place % 16 == 0 for row in rows for place in row) and all(size % 16 == 0 for size in sizes)
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)

    def step(self, gradients: Sequence[Tensor], *, step: int, lr: float, scale: float | Tensor = 1.0) -> None:
        """One step of AdamW with the ``gradients``, contiguous fp32 tensors like the parameters, times ``scale``.

        ``scale``: a number, or () fp32 on the device, where it is read: nothing waits for it. Where that is NaN, nothing is
        written. ``step``: of this update, counted from 1. Raises ValueError for gradients of other shapes, dtypes or with gaps,
        RuntimeError where a parameter or moment has moved in memory.
        """
        if len(gradients) != len(self._parameters) or step < 1:
            raise ValueError(f"need a gradient for each of {len(self._parameters)} parameters, and a step from 1 on")
        for gradient, parameter in zip(gradients, self._parameters, strict=True):
            _check(gradient, parameter)
        if self._table is None:
            self._one_by_one(gradients, step, lr, scale)
            return
        if self._find() != self._places:
            raise RuntimeError(
                "a parameter or moment lies elsewhere in memory than when AdamWTensors was made, and it writes to the first: "
                "build a new AdamWTensors after you move or replace tensors, or copy into them"
            )
        places = [gradient.data_ptr() for gradient in gradients]
        if places != self._gradients:
            send(places, self._table[4])
            self._gradients = places
        beta1, beta2 = self._betas
        # 1 - beta in double precision: in fp32 its last digits would be lost
        numbers = lr, beta1, beta2, 1 - beta1, 1 - beta2, self._eps, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
        if self._owners.numel():
            adamw_many[(self._owners.numel(),)](
                self._table,
                self._owners,
                self._begins,
                self._sizes,
                self._decay,
                scale_on(scale, self._table.device),
                len(self._parameters),
                *numbers,
                COPY=None if self._kind is None else _KINDS[self._kind],
                BLOCK=_BLOCK,
                ALIGNED=self._aligned and all(place % 16 == 0 for place in places),
                num_warps=_WARPS,
                **LAUNCH,
            )

    def _find(self) -> list[list[int]]:
        """The addresses of all parameters, of both moments and of the copies, 0 for those that there are not."""
        rows = self._parameters, self._firsts, self._seconds, self._copies
        return [[0 if part is None else part.data_ptr() for part in row] for row in rows]

    def _one_by_one(self, gradients: Sequence[Tensor], step: int, lr: float, scale: float | Tensor) -> None:
        if isinstance(scale, Tensor) and bool(scale.isnan()):
            return
        rows = zip(self._parameters, gradients, self._firsts, self._seconds, self._decays, self._copies, strict=True)
        for parameter, gradient, first, second, decay, copy in rows:
            adamw_(
                parameter,
                gradient,
                first,
                second,
                step=step,
                lr=lr,
                betas=self._betas,
                eps=self._eps,
                weight_decay=decay,
                scale=scale_on(scale, parameter.device),
                copy=copy,
            )


def blocks_of(sizes: Sequence[int], block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of tensors with ``sizes`` values, cut in blocks: the tensor of each block (int32), the first block of each, its size."""
    each = torch.tensor(sizes, dtype=torch.int64)
    blocks = (each + block - 1) // block
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    return owners.to(device), (blocks.cumsum(0) - blocks).to(device), each.to(device)


def send(places: Sequence[int], to: Tensor) -> None:
    """Copy addresses ``to`` a device, for which nothing waits."""
    to.copy_(torch.tensor(places, dtype=torch.int64, pin_memory=to.is_cuda), non_blocking=True)


def scale_on(scale: float | Tensor, device: torch.device) -> Tensor:
    """() fp32 on ``device``. Raises ValueError for another tensor."""
    if not isinstance(scale, Tensor):
        return torch.full((), scale, dtype=torch.float32, device=device)
    if scale.shape != () or scale.dtype != torch.float32 or scale.device != device:
        raise ValueError(f"'scale' is {tuple(scale.shape)} in {scale.dtype} on {scale.device}, need () in fp32 on {device}")
    return scale


def _check(part: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless ``part`` may be used beside ``like``, in ``dtype``, None: in its own."""
    dtype = dtype or like.dtype
    if part.shape != like.shape or part.dtype != dtype or not part.is_contiguous() or part.device != like.device:
        raise ValueError(
            f"need {tuple(like.shape)} in {dtype} without gaps on {like.device}, got {tuple(part.shape)} in {part.dtype} "
            f"on {part.device}"
        )


if HAS_TRITON:
    import triton
    import triton.language as tl

    _KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

    @triton.jit
    def addresses(address, place, ALIGNED: tl.constexpr, KIND: tl.constexpr = tl.float32):  # type: ignore[no-untyped-def]
        """Pointers to the values at ``place`` of the tensor of KIND at ``address``, an entry of the table."""
        found = address.to(tl.pointer_type(KIND)) + place
        return tl.multiple_of(found, 16) if ALIGNED else found

    @triton.jit
    def adamw_many(  # type: ignore[no-untyped-def]
        table_ptr,
        owners_ptr,
        begins_ptr,
        sizes_ptr,
        decays_ptr,
        scale_ptr,
        tensors,
        lr,
        beta1,
        beta2,
        other1,
        other2,
        eps,
        rate,
        root,
        COPY: tl.constexpr,
        BLOCK: tl.constexpr,
        ALIGNED: tl.constexpr,
    ):
        block = tl.program_id(0).to(tl.int64)
        owner = tl.load(owners_ptr + block).to(tl.int64)
        place = (block - tl.load(begins_ptr + owner)) * BLOCK + tl.arange(0, BLOCK)
        scale = tl.load(scale_ptr)
        size = tl.load(sizes_ptr + owner) * (scale == scale)  # not a number: no value is read, none is written
        if ALIGNED:
            size = tl.multiple_of(size, 16)
        inside = place < size
        parameter_ptr = addresses(tl.load(table_ptr + owner), place, ALIGNED)
        first_ptr = addresses(tl.load(table_ptr + tensors + owner), place, ALIGNED)
        second_ptr = addresses(tl.load(table_ptr + 2 * tensors + owner), place, ALIGNED)
        gradient_ptr = addresses(tl.load(table_ptr + 4 * tensors + owner), place, ALIGNED)
        gradient = tl.load(gradient_ptr, mask=inside, other=0.0) * scale
        first = tl.load(first_ptr, mask=inside, other=0.0) * beta1 + gradient * other1
        second = tl.load(second_ptr, mask=inside, other=0.0) * beta2 + gradient * gradient * other2
        parameter = tl.load(parameter_ptr, mask=inside, other=0.0) * (1.0 - lr * tl.load(decays_ptr + owner))
        parameter -= rate * (first / (tl.sqrt(second) * root + eps))
        tl.store(first_ptr, first, mask=inside)
        tl.store(second_ptr, second, mask=inside)
        tl.store(parameter_ptr, parameter, mask=inside)
        if COPY is not None:
            copy = tl.load(table_ptr + 3 * tensors + owner)
            if copy != 0:
                tl.store(addresses(copy, place, ALIGNED, COPY), parameter.to(COPY), mask=inside)
