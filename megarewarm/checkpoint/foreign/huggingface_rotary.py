"""Scaled rotary positions in the config.json of Hugging Face's models, as transformers 4.x and 5.x wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megarewarm.checkpoint.foreign.recorded_keys import Keys, names, refuse_other_functions, require_agreement
from megarewarm.config.model import RotaryScaling
from megarewarm.errors import UserError

WHOLE_HEADS: dict[str, tuple[tuple[Any, ...], str]] = {
    "partial_rotary_factor": ((None, 1, 1.0), "all channels of a head are rotated in this family"),
}

# ours -> theirs, by kind
_SCALING = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
}


def refuse_other_scalings(path: Path, found: Mapping[str, RotaryScaling | None]) -> None:
    """Raise ``UserError`` if blocks of one config.json, by their keys, say different scalings."""
    if len(set(found.values())) > 1:
        raise UserError(f"{path}: rope_parameters and rope_scaling differ: make them agree, or remove one of them")


def read_scaling(where: str, block: Mapping[str, Any], outside: int | None, positions: int) -> RotaryScaling | None:
    """The scaling that a block of config.json says, None for none. ``outside``: original_max_position_embeddings beside the
    block; without any it is ``positions``. Raises ``UserError`` naming the key, also for a kind that is not there here."""
    kind = block.get("rope_type") or block.get("type") or "default"
    if not isinstance(kind, str) or (kind != "default" and kind not in _SCALING):
        raise UserError(f"{where}: rope_type is {kind!r}, expected default, {', '.join(_SCALING)}")
    ours = _SCALING.get(kind, {})
    known = frozenset({"rope_type", "type", "rope_theta", *ours.values()})
    unused = names("original_max_position_embeddings" if "original_positions" not in ours else "")
    refuse_other_functions(where, block, Keys(known, WHOLE_HEADS, unused, f"it is no key of rope_type {kind!r}"))
    if kind == "default":
        return None
    values = {our: block[their] for our, their in ours.items() if block.get(their) is not None}
    if missing := [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key in ours and key not in values]:
        raise UserError(f"{where}: missing {missing[0]!r}")
    if "original_positions" in ours:
        inside = {"this block": values.get("original_positions"), "the key outside of it": outside}
        said = require_agreement(where, "original_max_position_embeddings", inside)
        values["original_positions"] = positions if said is None else said
    try:
        return RotaryScaling(kind=kind, **values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = next((ours[str(part)] for part in problem["loc"] if part in ours), "")
        raise UserError(f"{where}: {key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}") from error


def scaling_words(scaling: RotaryScaling | None) -> dict[str, Any]:
    """The block of config.json that says ``scaling``, without the base; empty for none."""
    if scaling is None:
        return {}
    said = {their: getattr(scaling, our) for our, their in _SCALING[scaling.kind].items()}
    return {"rope_type": scaling.kind, **{key: value for key, value in said.items() if value is not None}}
