"""What a checkpoint makes of documents, each read by itself: its mean loss, and the mean of its last hidden states.

A document longer than the model's sequence is cut in windows, which don't see each other; every token counts once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from megarewarm.checkpoint.source import OpenedCheckpoint, open_checkpoint, tokenizers_of
from megarewarm.checkpoint.tokenizer_source import loaded, still_there
from megarewarm.checkpoint.weights import load_module
from megarewarm.data.files.manifest import made_by, refuse_other_tokenizers
from megarewarm.data.files.token_file import TokenFile
from megarewarm.data.text.tokenizers import Tokenizer
from megarewarm.errors import UserError
from megarewarm.model.transformer import LOSS_MEMORY, Transformer
from megarewarm.parallel.connect import choose_device
from megarewarm.parallel.meeting_place import launch_of_process
from megarewarm.selection.step import Numbers
from megarewarm.selection.windows import Windows, cut, read_padded

Precision = Literal["fp32", "bf16"]

BLOCK = 2**18
"""Tokens whose windows are sorted by length together, at least; a block is also what a stop may lose."""


class ScoringModel:
    """The model of ``checkpoint``, anything that start.from takes, which is loaded when it is first needed.

    ``sequence_length``: of the windows, None for all positions of the model; ``micro_batch``: as many such windows' tokens at a
    time; ``precision``: fp32, or bf16 by autocast. Raises ``UserError``.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        device: str = "auto",
        sequence_length: int | None = None,
        micro_batch: int = 4,
        precision: Precision = "fp32",
    ) -> None:
        self.source: OpenedCheckpoint = open_checkpoint(checkpoint)
        self.name, self.config = checkpoint, self.source.model_config
        self.device, self.precision = choose_device(launch_of_process(), device), precision
        most = self.config.max_positions
        self.sequence_length = most if sequence_length is None else sequence_length
        if not 0 < self.sequence_length <= most:
            raise UserError(f"--sequence-length {sequence_length}: expected 1 to {most}, the positions of {checkpoint}")
        self._batch_tokens = micro_batch * self.sequence_length

    @cached_property
    def module(self) -> Transformer:
        """The model in fp32 on the device."""
        return load_module(self.source.weights, self.config, self.device, torch.float32)

    def tokenizer_of(self, file: TokenFile) -> Tokenizer | None:
        """The tokenizer of the ids of ``file``: that of its manifest if it is still there, else the checkpoint's."""
        made = made_by(file.path)
        found = (still_there([made.tokenizer]) if made is not None else None) or self.source.tokenizer.file
        return None if found is None else loaded(found)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What its numbers depend on, for keys and manifests. ``weights`` is a digest of the model: sums of all bits, which
        don't depend on an order of additions."""
        digest = hashlib.blake2b(self.config.model_dump_json().encode(), digest_size=8)
        for parameter in self.module.parameters():
            digest.update(str(int(parameter.view(torch.int32).sum(dtype=torch.int64))).encode())
        return {
            "checkpoint": self.name,
            "weights": digest.hexdigest(),
            "sequence_length": str(self.sequence_length),
            "precision": self.precision,
        }

    def check_reads(self, file: TokenFile) -> None:
        """Raise ``UserError`` where ``file`` was made with another tokenizer than the model's, as far as both are known, or
        samples of it have ids that the model doesn't know."""
        made = [found] if (found := made_by(file.path)) is not None else []
        refuse_other_tokenizers([*made, *(tokenizers_of(self.source, made) if made else [])])
        try:
            file.check_vocabulary(self.config.vocab_size)
        except UserError as error:
            raise UserError(f"{self.name} can't read {error}") from error

    def losses(
        self, file: TokenFile, starts: Numbers, sizes: Numbers, progress: Callable[[int], None] = lambda _: None
    ) -> npt.NDArray[np.float64]:
        """(n,) mean nats per target of documents of ``file`` at the flat positions ``starts``, of ``sizes`` tokens; NaN for
        fewer than 2. The first token is no target. ``progress``: called with the tokens of each batch."""
        sums, targets = np.zeros(len(sizes)), np.maximum(sizes - 1, 0)
        for windows, ids, own in self._batches(file, cut(starts, targets, self.sequence_length), more=1):
            tokens = self._on_device(file, ids)
            with torch.inference_mode(), self._autocast():
                each = self._token_losses(self.module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                found = each.view(own.shape).masked_fill(~torch.from_numpy(own).to(self.device), 0).sum(1, dtype=torch.float64)
            np.add.at(sums, windows.documents, found.cpu().numpy())
            progress(int(windows.lengths.sum()))
        return np.divide(sums, targets, out=np.full(len(sizes), np.nan), where=targets > 0)

    def embeddings(
        self, file: TokenFile, starts: Numbers, sizes: Numbers, progress: Callable[[int], None] = lambda _: None
    ) -> npt.NDArray[np.float32]:
        """(n, h) the mean of the states after the final norm over all tokens of each document, zero for one without tokens.
        Arguments as of ``losses``."""
        sums = np.zeros((len(sizes), self.config.hidden_size))
        for windows, ids, own in self._batches(file, cut(starts, sizes, self.sequence_length), more=0):
            tokens, padding = self._on_device(file, ids), ~torch.from_numpy(own).to(self.device)
            with torch.inference_mode(), self._autocast():
                found = self.module(tokens).masked_fill(padding[..., None], 0).sum(1, dtype=torch.float64)
            np.add.at(sums, windows.documents, found.cpu().numpy())
            progress(int(windows.lengths.sum()))
        return (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)

    def _batches(
        self, file: TokenFile, windows: Windows, more: int
    ) -> Iterator[tuple[Windows, npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        for batch in windows.batches(self._batch_tokens):
            yield batch, *read_padded(file, batch, more)

    def _on_device(self, file: TokenFile, ids: npt.NDArray[np.int64]) -> Tensor:
        if ids.size and (int(ids.max()) >= self.config.vocab_size or int(ids.min()) < 0):
            raise UserError(
                f"{self.name} can't read {file.path}: it has id {int(ids.max() if ids.min() >= 0 else ids.min())}, outside of "
                f"the model's vocabulary of {self.config.vocab_size} ids"
            )
        return torch.from_numpy(ids).to(self.device)

    def _token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(t,) fp32 of states (t, h), in chunks whose logits fit ``LOSS_MEMORY``."""
        head = self.module.head[: self.config.vocab_size]
        chunk = max(1, LOSS_MEMORY // (4 * len(head)))
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([F.cross_entropy(F.linear(x, head).float(), target, reduction="none") for x, target in parts])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def blocks(sizes: Numbers, first: int = 0, tokens: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Ranges of documents from ``first`` on, of about ``tokens`` tokens, at least one document each. They are the same from
    wherever a second start begins that is the end of one."""
    while first < len(sizes):
        ends = np.cumsum(sizes[first : first + 2**16])
        last = first + max(1, int(np.searchsorted(ends, tokens, side="right")))
        yield first, last
        first = last


def block_by_block(
    sizes: Numbers,
    width: int,
    show: Callable[[int, int], object],
    compute: Callable[[slice, Callable[[int], None]], npt.NDArray[Any]],
) -> Callable[[int], Iterator[npt.NDArray[Any]]]:
    """A maker of rows for ``Desk.rows``, which calls ``compute`` for each block of documents from a given one on.

    ``compute`` calls back with the tokens of each batch. ``show`` is called with (bytes that are done, bytes in all); a token
    has ``width`` of them.
    """
    total = int(sizes.sum()) * width

    def make(first: int) -> Iterator[npt.NDArray[Any]]:
        done = int(sizes[:first].sum()) * width
        for begin, end in blocks(sizes, first):
            shown = done

            def progress(tokens: int) -> None:
                nonlocal shown
                shown += tokens * width
                show(shown, total)

            show(done, total)
            yield compute(slice(begin, end), progress)
            done += int(sizes[begin:end].sum()) * width

    return make
