"""The precision that a GPT-NeoX configuration asks for in three places, and the loss scale of its fp16."""

from __future__ import annotations

from typing import Any

from megarewarm.config import neox_blocks
from megarewarm.config.neox_values import NeoxValues

_PRECISIONS = {"fp16": "fp16", "float16": "fp16", "bfloat16": "bf16", "bf16": "bf16", "fp32": "fp32"}


def precision_of(values: NeoxValues) -> str:
    """What 'precision', 'fp16' and 'bf16' say together. GPT-NeoX's versions differ on contradictions; these are refused."""
    said = {key: value for key in ("precision", "fp16.type") if (value := values.get(key)) is not None}
    wanted = {key: values.choice(key, _PRECISIONS) for key in said}
    fp16 = values.file.values.get("fp16") or {}
    if fp16 and "enabled" not in fp16:
        if wanted.get("fp16.type") != "bf16":
            raise values.error("fp16", "'enabled' is missing in it, which GPT-NeoX asks for; add true or false")
    elif fp16 and not values.get("fp16.enabled"):
        if wanted.pop("fp16.type", "fp16") == "bf16" or wanted.get("precision") == "fp16":
            raise values.error("fp16.enabled", "false, yet the file asks for 16 bits (type or precision); make them agree")
    elif fp16:
        wanted.setdefault("fp16.type", "fp16")
    if values.get("bf16.enabled"):
        wanted["bf16.enabled"] = "bf16"
    elif values.file.values.get("bf16") and wanted.get("precision") == "bf16":
        raise values.error("bf16.enabled", "not true, yet 'precision' is bfloat16; make them agree")
    if len(set(wanted.values())) > 1:
        both = " and ".join(f"{key.replace('fp16.type', 'fp16')} asks for {value}" for key, value in wanted.items())
        raise values.error(next(reversed(wanted)).partition(".")[0], f"{both}; they contradict each other, choose one")
    precision = next(iter(wanted.values()), "fp32")
    if wanted.get("fp16.type") == "bf16":
        values.notes.append(
            "fp16.type bfloat16: bf16, as in GPT-NeoX up to 2.0, which trained Pythia 1B so; later ones don't read 'type' "
            "and would train in fp16"
        )
    return precision


def loss_scale_of(values: NeoxValues, precision: str) -> dict[str, Any]:
    """The loss scale of fp16. In DeepSpeed, hysteresis counts under ZeRO only, and a fixed scale makes the others idle."""
    fixed = values.get("fp16.loss_scale") or None
    used = {"fp16.loss_scale"}
    scale: dict[str, Any] = {"fixed": fixed}
    if fixed is None:
        used |= {"fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.min_loss_scale"}
        scale |= {
            "initial": 2.0 ** values.get("fp16.initial_scale_power"),
            "window": int(values.get("fp16.loss_scale_window")),
            "smallest": float(values.get("fp16.min_loss_scale")),
        }
        if values.get("zero_optimization.stage"):
            used |= {"fp16.hysteresis", "fp16.consecutive_hysteresis"}
            scale |= {"hysteresis": values.get("fp16.hysteresis"), "refill": values.get("fp16.consecutive_hysteresis")}
    others = {key for key in neox_blocks.HONOURED if key.startswith("fp16.") and key not in ("fp16.enabled", "fp16.type")}
    for key in others - used if precision == "fp16" else others:
        why = "in DeepSpeed it counts under ZeRO only" if fixed is None else "the loss scale is fixed"
        values.idle[key] = why if precision == "fp16" else f"{precision} has no loss scale"
    return scale if precision == "fp16" else {}
