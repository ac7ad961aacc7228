"""Growth of a checkpoint into a wider or deeper model, one parameter at a time: pure maps of weights, driven by their cards.

Width: each new channel, head and neuron is a copy of an old one, and what reads copies is divided by their number. Copies in
equal numbers leave the function as it is (HyperCloning, arXiv 2409.12903), also with noise that sums to zero over the copies
and without which copies get the same gradients and never part. bert2BERT's maps (arXiv 2110.07143) take any factor (fpi), or
the new rows from the next layer (aki). A tied head can't be divided without its embedding: the last norm is divided instead.
Depth: copies of layers, silent ones ('identity', LLaMA Pro, arXiv 2401.02415), or all of them again ('stack', 2405.15319).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import gcd, isfinite
from pathlib import Path

import torch
from torch import Tensor

from megarewarm.checkpoint.compare_logits import LogitsDifference, SampleTokens, compare
from megarewarm.checkpoint.convert import FORMS, Conversion, ConvertOptions, Watched
from megarewarm.checkpoint.lineage import Stage
from megarewarm.checkpoint.source import ForeignCheckpoint, OpenedCheckpoint
from megarewarm.checkpoint.weights import (
    Description,
    OnBytes,
    Weights,
    check,
    expected_shapes,
    make_model_config,
    refuse_another_head,
)
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.initialize import generator_of
from megarewarm.model.parameters import Card, cards

TOLERANCE = 1e-4
"""By which logits may move, as a share of their root mean square, in a growth that preserves the function: more than
rounding the new weights to fp32 does, far less than any wrong map."""
_BLOCK = 2**20
"""Values that are computed at a time, in float64."""


@dataclass(frozen=True)
class Growth:
    """What is asked for. ``width``: the factor; ``method``: of ``arguments.WIDENINGS``; ``noise``: signal-to-noise ratio in dB
    of each row of the widened matrices, None for none. ``layers``: how many, None for as many as there are; ``depth``: of
    ``arguments.DEEPENINGS``. ``seed``: of the noise and of the maps of fpi and aki."""

    width: Fraction = Fraction(1)
    method: str = "clone"
    noise: float | None = None
    layers: int | None = None
    depth: str = "identity"
    seed: int = 0

    def preserves(self, config: ModelConfig) -> bool:
        """Whether the grown model computes what the model ``config`` did."""
        deeper = self.layers not in (None, config.num_layers)
        wider = self.width != 1
        return not (deeper and self.depth != "identity") and not (
            wider and (self.method == "aki" or self.width.denominator != 1)
        )

    def description(self, config: ModelConfig) -> str:
        """For people."""
        noise = f" with noise at {self.noise:g} dB" if self.noise is not None else ""
        parts = [f"width x {self.width} ({self.method}){noise}"] if self.width != 1 else []
        if self.layers not in (None, config.num_layers):
            parts.append(f"{config.num_layers} to {self.layers} layers ({self.depth})")
        return ", ".join(parts)


@dataclass(frozen=True)
class LayerOrigin:
    """The old layer that a layer is made of. ``new``: another one is that layer still; ``silent``: it adds nothing yet."""

    layer: int
    new: bool = False
    silent: bool = False


def layer_origins(count: int, growth: Growth) -> tuple[LayerOrigin, ...]:
    """For each layer of the grown model its origin among ``count``. identity: silent copies, spread evenly, each after its
    original; stack: all in turn, again and again; interpolate: each as often as all others, side by side."""
    total = growth.layers or count
    if growth.depth == "stack":
        return tuple(LayerOrigin(i % count, new=i >= count) for i in range(total))
    if growth.depth == "interpolate":
        places = [i * count // total for i in range(total)]
        return tuple(LayerOrigin(place, new=i > 0 and places[i - 1] == place) for i, place in enumerate(places))
    copy, more = lambda i: LayerOrigin(i, new=True, silent=True), total - count
    return tuple(
        origin for i in range(count) for origin in [LayerOrigin(i), *[copy(i)] * ((i + 1) * more // count - i * more // count)]
    )


def grown_config(config: ModelConfig, growth: Growth) -> ModelConfig:
    """The shape after ``growth``. Windows and unrotated layers follow the layers that they were made of. Raises ``UserError``
    naming the option for a growth that is none, or that does not fit."""
    _refuse(config, growth)
    wider = ("hidden_size", "num_heads", "num_kv_heads", "ffn_size")
    sizes = {key: value for key in wider if (value := getattr(config, key)) is not None}
    for key, value in sizes.items():
        if (value * growth.width).denominator != 1:
            raise UserError(
                f"--width {float(growth.width):g}: {key} {value} would become {float(value * growth.width):g}; this model "
                f"takes factors in steps of 1/{gcd(*sizes.values())}"
            )
    origins = layer_origins(config.num_layers, growth)
    layers = {
        key: tuple(i for i, origin in enumerate(origins) if origin.layer in which)
        for key in ("window_layers", "unrotated_layers")
        if (which := getattr(config, key)) is not None
    }
    widths = {key: int(value * growth.width) for key, value in sizes.items()}
    changed = {"num_layers": len(origins), **widths, **layers}
    return make_model_config("the grown model", **(config.model_dump() | changed))


def _refuse(config: ModelConfig, growth: Growth) -> None:
    width, layers = growth.width, growth.layers
    if width < 1:
        raise UserError(f"--width {float(width):g}: a model only grows here; give a factor of 1 or more")
    if layers is not None and layers < config.num_layers:
        raise UserError(f"--layers {layers}: the model has {config.num_layers}, and only grows here; give more")
    if width == 1 and layers in (None, config.num_layers):
        raise UserError(f"nothing would grow: give --width above 1, or --layers above {config.num_layers}")
    if width.denominator != 1 and growth.method == "clone":
        raise UserError(
            f"--width {float(width):g}: clones are whole; give a whole factor, or --method fpi, which takes any and moves the "
            f"logits"
        )
    if growth.noise is None:
        return
    if width == 1:
        raise UserError("--noise: it parts copied channels, of which only --width makes any; leave it out")
    if growth.method == "aki":
        raise UserError("--noise: with --method aki copies differ already, and nothing would cancel it; leave it out")
    if not isfinite(growth.noise):
        raise UserError(f"--noise {growth.noise}: expected a ratio in dB, such as 10dB")


@dataclass(frozen=True)
class Copies:
    """Of one dimension: ``origin`` (new,) int64 the old place of each new one, of ``old``; ``count`` (new,) float64 how many
    places are copies of the same."""

    origin: Tensor
    old: int

    @cached_property
    def count(self) -> Tensor:
        return torch.bincount(self.origin, minlength=self.old)[self.origin].double()


def copies(old: int, new: int, unit: int, draw: torch.Generator | None) -> Copies:
    """``new`` units of ``unit`` places, the first ``old`` of them what they were. The others are all in turn (None), or drawn
    by ``draw``: each before any is drawn again, so that copies are as even as they can be."""
    units = torch.arange(old)
    while len(units) < new:
        units = torch.cat([units, torch.arange(old) if draw is None else torch.randperm(old, generator=draw)])
    return Copies((units[:new, None] * unit + torch.arange(unit)).flatten(), old * unit)


class GrownWeights:
    """``weights`` of the model ``config`` after ``growth``: fp32, or float64 where they are. Values are computed in float64,
    a block of rows at a time. ``config``: the new shape."""

    def __init__(self, weights: Weights, config: ModelConfig, growth: Growth) -> None:
        self.where = f"{weights.where}, grown"
        self.config = grown_config(config, growth)
        self.origins = layer_origins(config.num_layers, growth)
        self._weights, self._growth, self._old = weights, growth, config
        self._stored = weights.describe()
        self._cards = cards(self.config)
        self._copies = {} if growth.width == 1 else self._maps()

    def _maps(self) -> dict[str, Copies]:
        """By the sizes of the cards. Heads go by the head of keys with all of its queries."""
        old, new, d, group = self._old, self.config, self._old.head_width, self._old.queries_per_key
        turns = {  # size -> (what is copied, how many there were and are, places of each)
            "h": ("channels", old.hidden_size, new.hidden_size, 1),
            "f": ("neurons", old.mlp_size, new.mlp_size, 1),
            "2f": ("neurons", old.mlp_size, new.mlp_size, 2),
            "q": ("heads", old.kv_heads, new.kv_heads, group * d),
            "k": ("heads", old.kv_heads, new.kv_heads, d),
            "qkv": ("heads", old.kv_heads, new.kv_heads, (group + 2) * d),
        }
        drawn = self._growth.method != "clone"
        return {
            size: copies(before, after, unit, generator_of(self._growth.seed, what) if drawn else None)
            for size, (what, before, after, unit) in turns.items()
        }

    def describe(self) -> Mapping[str, Description]:
        double = any(item.dtype == torch.float64 for item in self._stored.values())
        dtype = torch.float64 if double else torch.float32
        return {name: Description(card.shape, dtype, f"{name}, grown") for name, card in self._cards.items()}

    def read(self, name: str) -> Tensor:
        card = self._cards[name]
        dtype = self.describe()[name].dtype
        if card.layer is not None and self.origins[card.layer].silent and self._silences(card):
            return torch.zeros(card.shape, dtype=dtype)
        own = self._weights.read(self._origin(card, 0))
        if not self._copies:
            return own.to(dtype)
        after = self._weights.read(self._origin(card, 1)) if self._takes_from_next(card) else own
        grown = torch.empty(card.shape, dtype=dtype)
        noise = generator_of(self._growth.seed, name) if self._growth.noise is not None else None
        step = max(1, _BLOCK // max(1, card.numel // card.shape[0]))
        for first in range(0, card.shape[0], step):
            block = slice(first, min(first + step, card.shape[0]))
            grown[block] = self._rows(card, own, after, block, noise)
        return grown

    def _origin(self, card: Card, ahead: int) -> str:
        """The name of the old parameter, of the layer ``ahead`` of the one that the card's is made of."""
        if card.layer is None:
            return card.name
        return f"layers.{self.origins[card.layer].layer + ahead}{card.name.removeprefix(card.group)}"

    def _silences(self, card: Card) -> bool:
        """Whether a layer adds nothing to the residual stream while this is zero: the last matrix and bias of each sublayer;
        where norms come after these, their weights, because a norm of zeros has no useful gradient."""
        if self.config.norm_place == "after":
            return card.role == "norm" and card.sizes == ("h",)
        return card.role == "outer" or card.is_added_after_sum

    def _takes_from_next(self, card: Card) -> bool:
        """Whether new rows come from the next layer: those of matrices and of their biases."""
        if self._growth.method != "aki" or card.layer is None or card.role == "norm":
            return False
        return self.origins[card.layer].layer + 1 < self._old.num_layers

    def _rows(self, card: Card, own: Tensor, after: Tensor, block: slice, noise: torch.Generator | None) -> Tensor:
        """Rows ``block`` of the grown parameter, float64."""
        rows = self._copies.get(card.sizes[0])
        origin = torch.arange(block.start, block.stop) if rows is None else rows.origin[block]
        if after is own or rows is None:
            values = own[origin].double()
        else:
            kept = max(0, min(rows.old, block.stop) - block.start)
            values = torch.cat([own[origin[:kept]].double(), after[origin[kept:]].double()])
        if len(card.shape) == 1:
            divided = self._old.tie_embeddings and card.layer is None
            return values / self._copies["h"].count[block] if divided else values
        columns = self._copies[card.sizes[1]]
        values = values[:, columns.origin]
        if card.role == "embedding":
            return values
        values /= columns.count
        return values if noise is None else values + self._noise(values, columns, noise)

    def _noise(self, values: Tensor, columns: Copies, draw: torch.Generator) -> Tensor:
        """(rows, columns) that sum to zero over the copies of each old column. Those without a copy get none."""
        assert self._growth.noise is not None
        drawn = torch.randn(values.shape, generator=draw, dtype=torch.float64)
        sums = torch.zeros(len(values), columns.old, dtype=torch.float64).index_add_(1, columns.origin, drawn)
        drawn -= sums[:, columns.origin] / columns.count
        drawn *= (columns.count / (columns.count - 1).clamp(min=1)).sqrt()  # what the mean took away
        level = values.square().mean(1, keepdim=True).sqrt() * 10 ** (-self._growth.noise / 20)
        return drawn * level * (columns.count > 1)


def bytes_to_read(source: OpenedCheckpoint, growth: Growth) -> int:
    """What ``grow`` reports: the source once, the grown model when it is measured and when it is written."""
    old = sum(item.nbytes for item in source.weights.describe().values())
    new = sum(item.nbytes for item in GrownWeights(source.weights, source.model_config, growth).describe().values())
    return old + 2 * new


def grow(
    source: OpenedCheckpoint,
    destination: Path,
    growth: Growth,
    options: ConvertOptions,
    tokens: SampleTokens,
    on_bytes: OnBytes = lambda _: None,
) -> tuple[LogitsDifference, list[str]]:
    """Write ``source`` after ``growth``; returns how far the logits on ``tokens`` moved, and notes. ``on_bytes``: called with
    the bytes of each tensor that was measured or written. Raises ``UserError`` before anything is written: for a growth that
    does not fit, where ``destination`` exists, and where logits moved that should not have."""
    if destination.exists():
        raise UserError(f"{destination}: exists; choose another folder or remove it")
    config = source.model_config
    check(source.weights, expected_shapes(config))
    refuse_another_head(source.weights, expected_shapes(config))
    grown = GrownWeights(source.weights, config, growth)
    watched = Watched(grown, on_bytes)
    difference = compare((Watched(source.weights, on_bytes), config), (watched, grown.config), tokens)
    if growth.preserves(config) and not difference.largest <= TOLERANCE * difference.scale:
        raise UserError(
            f"{source.name}: this growth should preserve the function, yet logits moved by {difference.largest:.3g} (their "
            f"root mean square is {difference.scale:.3g}), so nothing was written: are its weights finite, and is the noise "
            f"within what fp32 can cancel?"
        )
    result = ForeignCheckpoint(destination.name, "grown", grown.config, lambda: grown, [], source.tokenizer)
    result.lineage = source.lineage.extended(
        Stage(
            run=destination.name,
            intent=f"grown: {growth.description(config)}",
            started_from=source.name,
            grown=True,
            new_layers=[i for i, origin in enumerate(grown.origins) if origin.new],
        )
    )
    return difference, FORMS[options.form].write(Conversion(result, watched, grown.config, destination, options))
