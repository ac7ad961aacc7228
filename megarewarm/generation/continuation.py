"""Several texts continued at once, each id after the last: what people ask for, and the documents of a model's own replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from megarewarm.errors import UserError
from megarewarm.generation.cache import Reader
from megarewarm.generation.packed import PackedLinear, can_pack, with_packed_layers
from megarewarm.generation.sampling import Keys, Sampling, uniforms
from megarewarm.model.transformer import Transformer

Ids = npt.NDArray[np.int64]

_FEW = 4  # texts: for fewer, laying out the layers' weights takes memory and saves no time
_ENDED = 8  # texts are taken out of the batch once an eighth of it has ended


class Continuer:
    """A model on one device that continues texts. ``limit``: ids from there on are never chosen, None for none."""

    def __init__(self, model: Transformer, limit: int | None = None) -> None:
        self._model = model
        head = model.head.detach()[: min(limit or model.config.vocab_size, model.config.vocab_size)]
        self._packs = can_pack(head)
        self._head = PackedLinear(head) if self._packs else partial(F.linear, weight=head)

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        most: int,
        sampling: Sampling,
        keys: Keys,
        end: int | None,
        written: Callable[[int], object] = lambda count: None,
    ) -> list[Ids]:
        """The ids that follow each of ``prompts``, which hold at least one each: up to ``most``, or to ``end``, which is then
        the last.

        ``keys``: of each text, for its random numbers; ``written``: called at each position with the number of new ids. Raises
        ``UserError`` where the model computes what is no number.
        """
        device = self._model.head.device
        if self._packs and len(prompts) >= _FEW:
            self._model, self._packs = with_packed_layers(self._model), False
        longest = max(map(len, prompts))
        padded = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in zip(padded, prompts, strict=True):
            row[longest - len(prompt) :] = prompt
        starts = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        reader = Reader(self._model, len(prompts), longest + most, starts)
        found = np.zeros((len(prompts), most), np.int64)
        lengths = np.full(len(prompts), most)
        texts, alive = np.arange(len(prompts)), np.ones(len(prompts), bool)  # of the rows that are read
        ids = torch.from_numpy(padded).to(device)
        for position in range(most):
            state = reader.read(ids)
            if not bool(state.isfinite().all()):
                raise UserError(f"the model's states are not finite after {position} new ids: nothing can be generated from it")
            logits = self._head(state)
            new = sampling(logits, uniforms(keys[texts], position))
            ids = new[:, None]
            chosen = new.cpu().numpy()
            found[texts[alive], position] = chosen[alive]
            written(int(alive.sum()))
            if end is not None and (ended := alive & (chosen == end)).any():
                lengths[texts[ended]] = position + 1
                alive &= ~ended
                if not alive.any():
                    break
                if _ENDED * (~alive).sum() >= len(alive):
                    rows = torch.from_numpy(np.flatnonzero(alive)).to(device)
                    reader.keep(rows)
                    ids, texts, alive = ids[rows], texts[alive], alive[alive]
        return [row[:length] for row, length in zip(found, lengths, strict=True)]
