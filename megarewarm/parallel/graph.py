"""Forward and backward pass of a micro-batch as one CUDA graph: the host queues one launch instead of hundreds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.model.fused import Operations
from megarewarm.model.size import peak_tflops, training_flops_per_token
from megarewarm.parallel.gradients import Gradients
from megarewarm.parallel.mesh import Layout

HOST_SECONDS = 1.3e-3
"""Of a layer's launches in a micro-batch, both directions: counted without a GPU, not measured (docs/kernels.md)."""
ENDS = 2
"""Layers' worth of launches of what lies around the layers: embedding, last norm, head and loss."""
_SHARES = {"fp32": 1 / 15, "bf16": 0.5, "fp16": 0.5}  # of a GPU's peak in bf16 that a step reaches at best
_WAITING = ("flash4", "flash3", "flash2")  # they count a batch's documents on the host
_log = logging.getLogger("megarewarm")


class MicroBatchGraph:
    """``compute`` of micro-batches of one shape, captured once and replayed.

    A replay reads and writes where the capture did: tokens, the loss's scale and the sum of the losses lie in tensors of this
    object, and gradients stay where they are (``Gradients.keep``). The first micro-batch is computed launch by launch on the
    capture's stream, so that what is made at the first call is made outside of the graph; the second one is captured. Where a
    parameter or gradient has moved since, or others train, whose kernels may be new, both are done again; what can't be
    captured goes on launch by launch. Both are logged once.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int], device: torch.device) -> None:
        """``compute``: adds the gradients of tokens (b, s + 1), int64, of the loss times a scale, () fp32, to ``.grad`` and
        returns the loss, (); it must not wait for the device nor read anything else that changes. ``shape``: (b, s + 1)."""
        self._compute = compute
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._scale = torch.zeros((), device=device)
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: list[tuple[int, int]] = []
        self._replay: Callable[[], object] | None = None
        self._is_warm = self._fails = self._has_said = False

    def begin(self, scale: float, gradients: Gradients, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Before micro-batches whose losses are multiplied by ``scale``; ``parameters``: all that ``compute`` reads or
        differentiates. Returns the sum of their losses, () fp64 on the device, now 0: add to it those of other micro-batches,
        and copy it before the next call."""
        gradients.keep()
        places = []
        for parameter in parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            places.append((parameter.data_ptr(), 0 if parameter.grad is None else parameter.grad.data_ptr()))
        if places != self._places:
            if self._replay is not None and not self._has_said:
                why = "other parameters train, or gradients have moved in memory"
                _log.warning(f"kernels.graph: {why}: the micro-batch is captured again")
                self._has_said = True
            self._replay, self._places, self._is_warm = None, places, False
        self._scale.fill_(scale)
        return self._total.zero_()

    def run(self, part: Tensor) -> bool:
        """Add gradients and loss of ``part``, on the device or in pinned memory, if it has the shape; nothing waits."""
        if part.shape != self._tokens.shape:
            return False
        self._tokens.copy_(part, non_blocking=True)
        if self._replay is None and self._is_warm and not self._fails:
            self._capture()
        if self._replay is not None:
            self._replay()
        elif self._stream is None or self._fails:
            self._add()
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._add()
            torch.cuda.current_stream().wait_stream(self._stream)
        self._is_warm = True
        return True

    def _capture(self) -> None:
        try:
            self._replay = captured(self._add, self._stream)
        except RuntimeError as error:
            self._fails = True
            why = str(error.__context__ or error).strip().partition("\n")[0]
            _log.warning(f"kernels.graph: not used: the micro-batch can't be captured ({why})")

    def _add(self) -> None:
        self._total += self._compute(self._tokens, self._scale)


def captured(run: Callable[[], object], stream: torch.cuda.Stream | None) -> Callable[[], object]:
    """A call that replays the kernels that ``run`` queues, which are not carried out yet. ``run`` has run on ``stream`` before.

    Raises RuntimeError where it can't be captured, as where it waits for the device; the process can go on then.
    """
    graph, pool, current = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    random = torch.cuda.default_generators[current.device_index]
    before = random.clone_state()
    try:
        # other threads, as NCCL's that looks after its events, may wait for the device meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run()
    except RuntimeError:
        # what PyTorch leaves as it was during a capture that fails: its stream, its random state, its memory
        torch.cuda.set_stream(current)
        torch.cuda.synchronize()
        random.graphsafe_set_state(before)
        with suppress(RuntimeError):  # the capture's end came as far as this
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
            torch._C._cuda_releasePool(current.device_index, pool)
        raise
    return graph.replay


def choose_graph(
    config: RunConfig,
    model: ModelConfig,
    layout: Layout,
    device: torch.device,
    precision: str,
    operations: Operations,
    documents: bool,
) -> tuple[bool, list[str]]:
    """Whether micro-batches are computed by a ``MicroBatchGraph``, and a line where that was chosen here, or was asked for and
    can't be had. ``documents``: they are kept apart."""
    wanted, training, length = config.kernels.graph, config.training, config.data.sequence_length
    why = _objection(config, layout, device, operations, documents)
    if wanted != "auto" or why is not None:
        notes = [f"kernels.graph: not used: {why}"] if wanted is True and why is not None else []
        return wanted is True and why is None, notes
    peak = peak_tflops(torch.cuda.get_device_name(device))
    if peak is None or training.global_batch // layout.data % training.micro_batch_size:
        return False, []
    host = (model.num_layers + ENDS) * HOST_SECONDS
    flops = training_flops_per_token(model, length) * training.micro_batch_size * length
    needed = flops / (peak * 1e12 * _SHARES[precision])
    if needed >= host:
        return False, []
    about = f"launches would take the host some {1e3 * host:.0f} ms a micro-batch, the GPU {1e3 * needed:.2g} ms (predicted)"
    return True, [f"kernels.graph: auto is true: {about}"]


def _objection(config: RunConfig, layout: Layout, device: torch.device, operations: Operations, documents: bool) -> str | None:
    """Why a graph can't be used, or None."""
    reasons = {
        "it needs a CUDA device": device.type != "cuda",
        "a pipeline's and tensor ranks exchange tensors within a micro-batch": layout.model > 1,
        "parallel.sharding gathers parameters within a micro-batch": config.parallel.sharding != "none" and layout.data > 1,
        "kernels.use: compile has its own way to launch": config.kernels.use == "compile",
        "training.recompute reads the random state within a micro-batch": config.training.recompute != "none",
        "distill adds a teacher's pass": config.distill is not None,
        "valuation takes the gradients out of their place": config.valuation is not None,
        f"attention by {operations.attention} counts documents on the host": documents and operations.attention in _WAITING,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
