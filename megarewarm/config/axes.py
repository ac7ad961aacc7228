"""The axes of a sweep: what each of their values is called and which keys of a run it sets."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megarewarm.config.data import Source
from megarewarm.config.schema import RunConfig
from megarewarm.config.unknown_keys import known_keys, meant
from megarewarm.config.yaml_text import Origins
from megarewarm.errors import UserError

_MOST_PERMUTED = 6  # of which there are 720 orders
BLEND = "blend"


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis: what it is called, and the keys that it sets. ``replaced``: the path of a list that it replaces."""

    axis: str
    label: str
    value: Any
    keys: dict[str, Any]
    where: str
    replaced: tuple[str, ...] = ()


def _axis(key: str, values: Any, where: str) -> list[AxisValue]:
    """The choices of one axis. Raises ``UserError`` where it names no key of a run."""
    if not isinstance(values, list | dict) or not values:
        raise UserError(f"{where}: axis '{key}' is {values!r}; expected a list of values, or labels with what each sets")
    if isinstance(values, dict) and all(isinstance(value, dict) for value in values.values()):
        return [AxisValue(key, _label(label), label, keys, where) for label, keys in values.items()]
    path = key.split(".")
    section = RunConfig
    for i in range(len(path)):
        known = known_keys(section, path[:i])
        if path[i] not in known:
            found = meant(section, path[: i + 1])
            hint = f", did you mean {' or '.join(map(repr, found))}?" if found else f"; known there: {', '.join(known)}."
            raise UserError(
                f"{where}: axis '{key}' names no key of a run{hint} An axis is a key such as schedule.max_lr with its values, "
                f"or any name with labels that each hold keys"
            )
    labelled = values.items() if isinstance(values, dict) else [(_label(value, where), value) for value in values]
    return [AxisValue(key, _label(label), value, _nested(path, value), where) for label, value in labelled]


def _label(value: Any, where: str = "") -> str:
    """A value as a part of a name: 0.0006 -> 6e-4, '1%' -> 1pct. Raises ``UserError`` for what has no short name."""
    if isinstance(value, dict | list):
        raise UserError(f"{where}: the value {value} has no short name: write the axis as labels with what each sets")
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = {None: "none", True: "true", False: "false"}.get(value) if not isinstance(value, str) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:g}" if isinstance(value, float) else str(value)
    text = (text or str(value)).replace("%", "pct")
    return re.sub(r"[^A-Za-z0-9_.-]+", "", text) or "empty"


def choices_of(
    sweep: Mapping[str, Any], run: Mapping[str, Any], place: tuple[str, ...], origins: Origins
) -> list[list[AxisValue]]:
    """The choices of each axis of a ``sweep`` whose runs have the keys ``run`` without them, its permutation last. ``place``:
    of the sweep in the file. Raises ``UserError``."""
    where = origins.get(place, "config")
    axes = sweep.get("axes", {} if "permute" in sweep else None)
    if not isinstance(axes, dict) or not (axes or "permute" in sweep):
        raise UserError(
            f"{where}: sweep '{sweep['name']}' has no 'axes': give at least one key with a list of values, or 'permute'"
        )
    choices = [_axis(key, values, origins.get((*place, "axes", key), where)) for key, values in axes.items()]
    if "permute" in sweep:
        choices.append(list(_permuted(sweep, run, origins.get((*place, "permute"), where))))
    elif "orders" in sweep:
        line = origins.get((*place, "orders"), where)
        raise UserError(f"{line}: 'orders' says in which orders 'permute' puts something: add 'permute', or remove it")
    return choices


def _permuted(sweep: Mapping[str, Any], run: Mapping[str, Any], where: str) -> Iterator[AxisValue]:
    """The sources of a blend one after another, each for its share of the run, in several orders, and the blend itself; or the
    stages of a chain in several orders."""
    key, orders = sweep["permute"], sweep.get("orders", "all")
    if key not in ("data.train", "stages"):
        raise UserError(f"{where}: permute: expected data.train (the sources of the blend) or stages, not {key!r}")
    data = run.get("data") if isinstance(run.get("data"), dict) else {}
    items = run.get("stages") if key == "stages" else (data or {}).get("train")
    if not isinstance(items, list) or len(items) < 2 or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{where}: permute: {key} has no list of two or more to be put into other orders")
    if key == "data.train" and (data or {}).get("switches"):
        raise UserError(f"{where}: permute: data.train is read source by source, and 'data.switches' too: remove them")
    names = [str(item.get("name") or Path(str(item.get("path", i))).name) for i, item in enumerate(items)]
    if key == "data.train":
        yield AxisValue(key, BLEND, BLEND, {}, where)
    for order in orders_of(len(items), orders, where):
        label, value = "_".join(_label(names[i]) for i in order), ", ".join(names[i] for i in order)
        keys = {"stages": [items[i] for i in order]} if key == "stages" else {"data": _one_after_another(items, order)}
        yield AxisValue(key, label, value, keys, where, replaced=tuple(key.split(".")))


def _one_after_another(sources: Sequence[Mapping[str, Any]], order: Sequence[int]) -> dict[str, Any]:
    """The keys of data that read the ``sources`` in ``order``, each for its share of the run."""
    shares = [Fraction(_weight(source)) for source in sources]
    parts = [[{"place": i, **sources[i]}] for i in order]
    ends = itertools.accumulate(shares[i] / sum(shares) for i in order)
    switches = [{"at": f"{float(100 * end)!r}%", "train": part} for end, part in zip(ends, parts[1:], strict=False)]
    return {"train": parts[0], "switches": switches}


def _weight(source: Mapping[str, Any]) -> float:
    try:
        return Source.model_validate({"path": ".", **{k: source[k] for k in ("weight", "tokens") if k in source}}).weight
    except ValidationError:
        return 1.0  # reported where the run is validated


def orders_of(count: int, which: Any, where: str = "") -> list[tuple[int, ...]]:
    """Orders of ``count`` things: 'all' of them, or the rows of a 'latin' square, in which each thing has every place once.

    The square is that of Williams (1949): with an even ``count``, each thing also comes right after every other once. Raises
    ``UserError``.
    """
    if which == "all":
        if count > _MOST_PERMUTED:
            orders = f"{math.factorial(count):,} orders"
            raise UserError(
                f"{where}: permute: there are {orders} of {count}: set 'orders' to latin, which takes {count} of them"
            )
        return list(itertools.permutations(range(count)))
    if which == "latin":
        first = [0, *(number for pair in zip(range(1, count), range(count - 1, 0, -1), strict=True) for number in pair)]
        return [tuple((number + row) % count for number in first[:count]) for row in range(count)]
    raise UserError(f"{where}: orders: expected all or latin, not {which!r}")


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    return value
