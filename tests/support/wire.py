"""Bytes that this rank sends, counted at torch's own operators for collectives, whoever calls them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor))


class Wire(TorchDispatchMode):
    """Counts what a rank sends with ring collectives: ``bytes`` in all; of each operator ``calls`` and bytes at ``most``."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0
        self.calls: dict[str, int] = {}
        self.most: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        n = next((dist.ProcessGroup.unbox(arg).size() for arg in args if isinstance(arg, torch.ScriptObject)), 1)
        sent = {
            "allreduce_": lambda: 2 * _bytes(args[0]) * (n - 1) / n,
            "_allgather_base_": lambda: _bytes(args[1]) * (n - 1),
            "_reduce_scatter_base_": lambda: _bytes(args[0]) * (n - 1),
            "send": lambda: _bytes(args[0]),
            "recv_": lambda: 0,
            "barrier": lambda: 0,
        }
        if name not in sent:
            raise NotImplementedError(f"a collective that is not counted yet: c10d.{name}")
        size = sent[name]()
        self.bytes += size
        self.most[name] = max(self.most.get(name, 0.0), size)
        self.calls[name] = self.calls.get(name, 0) + 1
