"""From the sources of a configuration to rows at any position: files opened, ordered, blended, phase after phase."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megarewarm.config.data import ByScore, DataConfig, Source
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.listed_documents import ListedDocuments
from megarewarm.data.files.token_file import TokenView
from megarewarm.data.mixture.blend import AnyBlend, Blend, GreedyTable, normalised
from megarewarm.data.mixture.blended_rows import BlendedRows
from megarewarm.data.mixture.phases import AnySource, Phase, PhasedBlend, all_sources
from megarewarm.data.order.packed_samples import PackedSamples
from megarewarm.data.order.permutation import derive_key
from megarewarm.data.order.row_samples import RowSamples
from megarewarm.data.order.samples import MegatronSamples, NeoxSamples, PermutedSamples, Samples, SequentialSamples
from megarewarm.data.order.seen_samples import SeenSource
from megarewarm.errors import UserError

ORDER_VERSION = 1  # part of every fingerprint; to be raised when the same config would give another order


@dataclass(frozen=True)
class Mixture:
    """``rows`` of all positions, and what identifies their order. ``firsts``: the positions at which phases begin;
    ``shares``: of each phase, source by source (None for one that is not in it). ``notes``: for the user."""

    rows: BlendedRows
    data: DataConfig
    firsts: list[int]
    shares: list[list[int | str | None]]
    notes: list[str]

    def fingerprint(self, before: int) -> str:
        """32 hex digits of everything that determines the tokens at the positions [0, ``before``); later phases have no part
        in it. See ``TrainingBatches.fingerprint``."""
        begun = max(1, sum(first < before for first in self.firsts))
        known = 1 + max(i for shares in self.shares[:begun] for i, share in enumerate(shares) if share is not None)
        later = [[first, shares[:known]] for first, shares in zip(self.firsts[1:begun], self.shares[1:begun], strict=True)]
        sources = [
            {
                "file": part.tokens.file.fingerprint(),
                "documents": _documents(part.tokens),
                "order": part.order,
                "shuffled": getattr(part, "epoch_ranges", None),
                "share": share,
            }
            for part, share in zip(self.rows.samples[:known], self.shares[0][:known], strict=True)
        ]
        settings = {"version": ORDER_VERSION, "seed": self.data.seed, "sequence_length": self.data.sequence_length}
        content = settings | {"sources": sources} | ({"phases": later} if later else {})
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def build_mixture(files: TokenFiles, phases: Sequence[Phase], *, total_samples: int) -> Mixture:
    """The rows of ``total_samples`` samples in the order of ``files.data``. The weights of each phase are final.

    Raises ``UserError`` for files that can't be read or hold ids outside of the vocabulary, for sources too short for
    one sample, and where the run would read a source more often than its ``max_epochs``.
    """
    data = files.data
    phases = [phase for phase in phases if phase.first < total_samples] or list(phases[:1])
    sources, places = all_sources(phases)
    names = source_names(sources)
    lengths = [last - first for first, last in pairwise([*(phase.first for phase in phases), total_samples])]
    wanted = _wanted(data, phases, lengths, places, len(sources))
    notes: list[str] = []
    samples = [
        source.open(files) if isinstance(source, SeenSource) else _open_samples(files, source, i, wanted[i], notes)
        for i, source in enumerate(sources)
    ]
    blends: list[AnyBlend] = []
    shares: list[list[int | str | None]] = []
    for phase, length, mine in zip(phases, lengths, places, strict=True):
        weights = [source.weight for source in phase.sources]
        told: list[int] | list[str]
        if data.order not in ("neox", "megatron") or len(weights) == 1:
            blend = Blend(weights, length)
            blends.append(blend)
            told = blend.numerators.tolist()
        else:
            blends.append(GreedyTable(weights, length))
            told = [weight.hex() for weight in weights]
        by_place = dict(zip(mine.tolist(), told, strict=True))
        shares.append([by_place.get(i) for i in range(len(sources))])
    firsts = [phase.first for phase in phases]
    whole = blends[0] if len(blends) == 1 else PhasedBlend(firsts, blends, places, len(sources))
    rows = BlendedRows(names, samples, whole, files.vocab_size)
    for name, source, part, need in zip(names, sources, samples, rows.counts(total_samples).tolist(), strict=True):
        _check_epochs(name, source, part, need)
        if source.max_epochs is None and part.num_samples is not None and need > part.num_samples:
            raise UserError(
                f"source '{name}' gives {part.num_samples} samples and the blend asks it for {need}: order '{data.order}' "
                f"allows half a percent more than its weight's share, too little for so few samples; change its weight a little"
            )
    return Mixture(rows, data, firsts, shares, notes)


def source_names(sources: Sequence[AnySource]) -> list[str]:
    """The sources' names, else their files'. Raises ``UserError`` if two are the same."""
    names = [source.name or Path(source.path.removesuffix(".bin").removesuffix(".idx")).name for source in sources]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two sources are named '{twice[0]}': give each its own 'name'")
    return names


def _documents(view: TokenView) -> list[int | str]:
    listed = [view.documents.digest] if isinstance(view, ListedDocuments) and view.documents is not None else []
    return [*view.documents_of, *listed]


def _open_samples(files: TokenFiles, source: Source, place: int, wanted: int, notes: list[str]) -> Samples:
    """The samples of ``source``, which is at ``place`` among all of the run; ``notes`` gets what a user must know of them."""
    data = files.data
    s, seed = data.sequence_length, data.seed
    if source.scores is not None and not isinstance(data.order, ByScore):
        raise UserError(
            f"{source.scores} are scores, which nothing reads in data.order '{data.order}': write the order as "
            f"{{by: null, direction: ascending}} (or descending), or remove the source's 'scores'"
        )
    if isinstance(data.order, ByScore) and source.layout != "rows":
        view, said = files.scored(source)
        notes += said
        return SequentialSamples(view, s, source.max_epochs)
    view = files.view(source)
    if data.pack is not None:
        key = derive_key(seed, place if source.place is None else source.place) if data.order == "permuted" else None
        packed = PackedSamples(view, s, key, source.max_epochs)
        if data.order == "permuted" and source.place not in (None, place):
            packed.order += f" as source {source.place}"
        notes.append(f"data.pack: {source.name or view.file.path}: {packed.packing}")
        return packed
    if source.layout == "rows":
        return RowSamples(view, s, source.first_row, source.max_epochs)
    if data.order == "sequential":
        return SequentialSamples(view, s, source.max_epochs)
    if data.order == "permuted":
        # The place in the list goes into the key, so that a file that is listed twice is read in two orders.
        samples = PermutedSamples(view, s, derive_key(seed, place if source.place is None else source.place), source.max_epochs)
        if source.place not in (None, place):
            samples.order = f"permuted as source {source.place}"
        return samples
    kind = NeoxSamples if data.order == "neox" else MegatronSamples
    return kind(view, s, seed, wanted)


def _wanted(
    data: DataConfig,
    phases: Sequence[Phase],
    lengths: Sequence[int],
    places: Sequence[npt.NDArray[np.int64]],
    sources: int,
) -> list[int]:
    """Samples that GPT-NeoX or Megatron-LM would ask each source for, which decides its epochs. Both ask each source of a
    blend for half a percent more than its share."""
    if len(phases) == 1 and len(phases[0].sources) == 1 and not data.blend_of_one:
        return [lengths[0]]
    wanted = [0] * sources
    for phase, length, mine in zip(phases, lengths, places, strict=True):
        weights = [each.weight for each in phase.sources]
        # shares already? A second division could change their last bit, and by it the epochs
        shares = weights if math.isclose(math.fsum(weights), 1.0, rel_tol=1e-12) else normalised(weights, data.order_name)
        for share, place in zip(shares, mine.tolist(), strict=True):
            if data.order == "neox":
                wanted[place] += math.ceil(length * share * 1.005)
            else:
                wanted[place] += math.ceil(math.ceil(length * share) * 1.005)
    return wanted


def _check_epochs(name: str, source: AnySource, samples: Samples, need: int) -> None:
    if source.max_epochs is None:
        return
    have = math.floor(source.max_epochs * samples.samples_per_epoch)
    if need > have == 0 == samples.samples_per_epoch:
        raise UserError(f"source '{name}' is shorter than one sample: set its max_epochs to null, or remove it")
    if need > have:
        s = samples.sequence_length
        epochs = math.ceil(need / samples.samples_per_epoch * 100) / 100
        if isinstance(source, SeenSource):
            raise UserError(
                f"replay of lineage: {have} samples ({have * s} tokens) of '{name}' may be replayed in max_epochs "
                f"{source.max_epochs:g}, the run needs {need} ({need * s} tokens): set replay.max_epochs to {epochs:g} or "
                f"more, lower replay.fraction, or shorten training.budget"
            )
        raise UserError(
            f"source '{name}' gives {have} samples ({have * s} tokens) in max_epochs {source.max_epochs:g}, the run "
            f"needs {need} ({need * s} tokens): set its max_epochs to {epochs:g} or more, lower its weight, or shorten "
            f"training.budget"
        )
