"""The common interface of checkpoint formats: a model's whole parameters under megarewarm's names, one at a time."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, HEAD, cards
from megarewarm.model.transformer import Transformer

OnBytes = Callable[[int], None]
"""Called with the bytes of what has been read."""

MOST_LAYERS = 10_000
"""That a file may claim: each is a list of parameters in memory before the first tensor is found."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Description:
    """A tensor before it is read. ``place`` names the file (and the tensor in it) for error messages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    place: str

    @property
    def numel(self) -> int:
        """Its number of values."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.numel * self.dtype.itemsize


class Weights(Protocol):
    """Parameters of a model in some format. Names and shapes are those of ``model.transformer.Transformer``."""

    where: str

    def describe(self) -> Mapping[str, Description]:
        """All parameters there are, from headers alone."""

    def read(self, name: str) -> Tensor:
        """One of them, on the CPU, in the dtype it is stored in."""


def unreadable(path: Path, kind: str, reason: str) -> UserError:
    """The error for a file that is no ``kind``: damaged, or what git leaves in a clone without its large files."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        pointer = False
    if pointer:
        return UserError(
            f"{path}: a pointer of Git LFS, not the file itself: run 'git lfs pull' in the clone it is from, and copy it"
        )
    if os.strerror(errno.ENODEV) in reason:
        return UserError(f"{path}: its file system can't map files into memory ({reason}); copy it to another one")
    return UserError(f"{path}: not a readable {kind} ({reason}); copy it again")


def make_model_config(where: str, called: Mapping[str, str] = MappingProxyType({}), /, **values: Any) -> ModelConfig:
    """The shape that ``values`` of the file or folder ``where`` say. ``called``: what the file calls keys of
    ``ModelConfig``. Raises ``UserError`` for one that can't be."""
    if isinstance(count := values.get("num_layers"), int):
        refuse_too_many_layers(where, called.get("num_layers", "num_layers"), count)
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = f"{key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}"
        raise UserError(f"{where}: {re.sub(r'[a-z_]+', lambda word: called.get(word[0], word[0]), message)}") from error


def refuse_too_many_layers(where: str, key: str, count: int) -> None:
    """Raise ``UserError`` where ``key`` of the file ``where`` claims more layers than any model has."""
    if count > MOST_LAYERS:
        raise UserError(f"{where}: {key} is {count}, expected {MOST_LAYERS:,} at most")


def misfit(where: str, problems: Sequence[str]) -> UserError:
    """The error for weights of which some are missing, or have another shape or dtype than the model's."""
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return UserError(f"{where}: weights do not fit the model: {'; '.join(problems[:5])}{more}")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model, in the model's order."""
    return {name: card.shape for name, card in cards(config).items()}


def check(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one ``UserError`` with what is missing, unexpected or of another shape or dtype than ``shapes`` says. A head
    beside ``shapes`` without one (tied embeddings) is let through: ``fill`` compares it with the embedding."""
    found = weights.describe()
    problems = []
    for name, item in found.items():
        if name == HEAD and HEAD not in shapes:
            continue
        if name not in shapes:
            problems.append(f"unexpected tensor {item.place}")
        elif item.dtype not in FLOATS:
            known = ", ".join(_dtype_name(dtype) for dtype in FLOATS)
            problems.append(f"{item.place} has dtype {_dtype_name(item.dtype)}, expected {known}")
        elif item.shape != shapes[name]:
            problems.append(f"{item.place} has shape {item.shape}, expected {shapes[name]}")
    problems += [f"missing tensor {name}" for name in sorted(set(shapes) - set(found))]
    if problems:
        raise misfit(weights.where, problems)


def fill(weights: Weights, shapes: Mapping[str, tuple[int, ...]], take: Callable[[str, Tensor], None]) -> None:
    """Call ``take(name, tensor)`` for every parameter of ``shapes``, one tensor at a time, after all were checked. Raises
    ``UserError`` as ``check``, and for tied embeddings whose stored head is not the embedding."""
    check(weights, shapes)
    refuse_another_head(weights, shapes)
    for name in shapes:
        take(name, weights.read(name))


def load_module(weights: Weights, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The whole model on one device, to evaluate. Raises ``UserError`` as ``fill``."""
    with torch.device("meta"):
        module = Transformer(config)
    module = module.to(dtype).to_empty(device=device).eval()
    parameters = dict(module.named_parameters())

    def take(name: str, tensor: Tensor) -> None:
        parameters[name].copy_(tensor)

    with torch.no_grad():
        fill(weights, expected_shapes(config), take)
    return module


def refuse_another_head(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``UserError`` where ``weights`` have a head that ``shapes`` ties to the embedding, and that differs from it."""
    if HEAD in shapes or HEAD not in weights.describe():
        return
    head, embedding = weights.read(HEAD), weights.read(EMBEDDING)
    some = zip(head.split(4096), embedding.split(4096), strict=False)
    if head.shape != embedding.shape or not all(torch.equal(one.float(), other.float()) for one, other in some):
        raise UserError(f"{weights.where}: tie_word_embeddings is true, yet the head is not the embedding: set it to false")


def in_order(names: Iterable[str], config: ModelConfig) -> list[str]:
    """``names`` in the order of the model's parameters; unknown ones last."""
    order = {name: i for i, name in enumerate(cards(config))}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
