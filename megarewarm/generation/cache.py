"""A model that reads on where it stopped: keys and values of earlier positions are kept, in every kind of layer.

The layers are the model's own, with another attention in them, so nothing of a family is written down here.
"""

from __future__ import annotations

import torch
from megarewarm_kernels import rotate_
from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.generation.packed import with_child
from megarewarm.model import llama, neox
from megarewarm.model.positions import Positions, positions_of
from megarewarm.model.transformer import Transformer, add_deferred

_FIRST_ROOM = 64  # positions; doubled whenever they are full


class Reader:
    """Reads the same number of ids of each row at a time, on one device, without gradients.

    ``rows``: texts side by side; ``longest``: positions that any of them will have; ``starts`` (rows,) int64: at which position
    each text begins, None for 0. What lies before is padding, which no text sees.
    """

    def __init__(self, model: Transformer, rows: int, longest: int, starts: Tensor | None = None) -> None:
        self._model = model
        self._span = _Span(rows, longest, starts)
        self._tables = positions_of(longest, model.config, model.head)
        self._attentions = [CachedAttention(layer.attention, self._span) for layer in model.layers]  # type: ignore[arg-type]
        self._layers = [
            with_child(layer, "attention", attention) for attention, layer in zip(self._attentions, model.layers, strict=True)
        ]

    def read(self, ids: Tensor) -> Tensor:
        """The next (rows, s) int64 ids of each text, to the (rows, h) state of the last of them after the final norm."""
        span = self._span
        span.advance(ids.shape[1])
        places: slice | Tensor = slice(span.first, span.end)
        if span.starts is not None:
            places = (torch.arange(span.first, span.end, device=ids.device) - span.starts[:, None]).clamp_(min=0).flatten()
        cos, sin = (table[places] for table in self._tables[:2])
        positions = Positions(cos, sin, None)
        x = self._model.embed_in(ids)
        for layer in self._layers:
            x = layer(x, positions)
        last: Tensor = self._model.final_layer_norm(add_deferred(x)[:, -1])
        return last

    def keep(self, rows: Tensor) -> None:
        """Go on with ``rows`` (n,) int64 alone, in their order."""
        self._span.keep(rows)
        for attention in self._attentions:
            attention.keep(rows)


class _Span:
    """The positions that are read now, [first, end), of all layers."""

    def __init__(self, rows: int, longest: int, starts: Tensor | None) -> None:
        self.rows, self.longest = rows, longest
        self.starts = starts if starts is not None and bool(starts.any()) else None
        self.first = self.end = 0
        self._visible: dict[int | None, tuple[int, Tensor | None]] = {}

    def advance(self, count: int) -> None:
        if self.end + count > self.longest:
            raise ValueError(f"{self.end + count} positions, room was asked for {self.longest}")
        self.first, self.end = self.end, self.end + count
        self._visible.clear()

    def keep(self, rows: Tensor) -> None:
        self.rows = len(rows)
        if self.starts is not None:
            self.starts = self.starts[rows]

    def visible(self, window: int | None, device: torch.device) -> tuple[int, Tensor | None]:
        """(the first position that any of those read now sees, (1 or rows, 1, s, end - it): which of them each one sees; None
        for all)."""
        if window not in self._visible:
            self._visible[window] = self._see(window, device)
        return self._visible[window]

    def _see(self, window: int | None, device: torch.device) -> tuple[int, Tensor | None]:
        first = 0 if window is None else max(0, self.first + 1 - window)
        if self.end - self.first == 1 and self.starts is None:
            return first, None
        keys = torch.arange(first, self.end, device=device)
        queries = torch.arange(self.first, self.end, device=device)[:, None]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        if self.starts is None:
            return first, mask[None, None]
        # padding sees itself: the softmax of nothing would be no number
        return first, (mask & (keys >= self.starts[:, None, None]) | (keys == queries))[:, None]


class CachedAttention(nn.Module):
    """The attention of a layer over everything that was read: (b, s, h) to (b, s, h)."""

    def __init__(self, attention: neox.Attention | llama.GroupedAttention, span: _Span) -> None:
        super().__init__()
        self.plain, self._span = attention, span
        self._kept: Tensor | None = None  # (2, b, k, positions, d): keys and values

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        plain, span = self.plain, self._span
        qkv = plain.normed(plain.query_key_value(x.flatten(0, 1)).view(*x.shape[:2], -1)).flatten(0, 1)
        rotate_(qkv, *(table[:, : plain.planes] for table in positions[:2]), head_dim=plain.head_dim, group=plain.group)
        queries, keys, values = qkv.view(*x.shape[:2], -1, plain.group + 2, plain.head_dim).split([plain.group, 1, 1], 3)
        kept = self._room(keys)
        kept[0, :, :, span.first : span.end] = keys.squeeze(3).transpose(1, 2)
        kept[1, :, :, span.first : span.end] = values.squeeze(3).transpose(1, 2)
        first, mask = span.visible(plain.window, x.device)
        seen_keys, seen_values = kept[:, :, :, first : span.end]
        if x.shape[1] == 1:  # the queries of a key head take the place of several positions
            context = F.scaled_dot_product_attention(queries[:, 0], seen_keys, seen_values, mask)
            return plain.dense(context.flatten(1)[:, None])
        grouped = queries.flatten(2, 3).transpose(1, 2)
        context = F.scaled_dot_product_attention(grouped, seen_keys, seen_values, mask, enable_gqa=plain.group > 1)
        return plain.dense(context.transpose(1, 2).flatten(2))

    def _room(self, keys: Tensor) -> Tensor:
        """``_kept`` with room for the positions that are read now; ``keys``: (b, s, k, 1, d)."""
        span = self._span
        if self._kept is None or self._kept.shape[3] < span.end:
            room = min(span.longest, max(_FIRST_ROOM, 2 * span.end))
            larger = keys.new_empty(2, span.rows, keys.shape[2], room, keys.shape[4])
            if self._kept is not None:
                larger[:, :, :, : span.first] = self._kept[:, :, :, : span.first]
            self._kept = larger
        return self._kept

    def keep(self, rows: Tensor) -> None:
        if self._kept is not None:
            self._kept = self._kept[:, rows]
