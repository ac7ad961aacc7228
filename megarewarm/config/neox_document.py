"""``docs/neox_config.md``: what becomes of each of GPT-NeoX's keys, from the tables that decide it."""

from __future__ import annotations

from typing import Any

from megarewarm.config import neox_blocks, neox_keys

_HEAD = """\
# GPT-NeoX configurations

`deepspeed launch.sh 410M.yml local_setup.yml` takes GPT-NeoX's files as they are: flat keys with dashes or underscores,
several files (a key may be in one of them only), DeepSpeed's blocks, `attention_config`. They are known by their keys. Each
key, also inside of blocks (`fp16.type`), is honoured, or listed at the start as not applicable with the reason, or refused
with the reason; an unknown key is an error. Words of the form `section.key=value` behind the files change the translated run
with [megarewarm's keys](config.md), and

```bash
megarewarm convert-config 410M.yml local_setup.yml --ranks 32 --output run.yml
```

writes it down. What follows GPT-NeoX's rules and defaults:

- **Losses.** A re-warming run that GPT-NeoX did itself (40 steps, fp32, one CPU) is followed within 2e-5 at every step and
  every evaluation (measured 1.1e-6): the order of samples, blends, splits, the schedule with its float warmup, weight decay
  groups, clipping.
- **`load`** may name anything that [start.from](config.md) can: a Hugging Face folder or hub name, a folder of GPT-NeoX
  (`global_stepN`, or the one with `latest`; with its optimizer files training goes on with moments and fp32 masters), of
  Megatron-LM, or of megarewarm. `finetune: true` takes the weights and resets everything else; without it training
  continues where the checkpoint ended, and a checkpoint of weights alone is refused. Where `load` and `save` are the same
  folder and nothing is there, the run begins from scratch. A missing `load` is an error: GPT-NeoX would begin from scratch.
- **Restarts.** The same command after a crash goes on from the run's newest checkpoint, `finetune: true` or not; GPT-NeoX
  would begin again.
- **`save`** is the run folder; checkpoints are in `save/checkpoints`, in megarewarm's form. `megarewarm convert
  --to neox` writes layer files.
- **Evaluation** takes the next `eval_iters` batches each time, as GPT-NeoX does, so its losses are of different text each
  time (`evaluation.windows: moving`). Fixed windows, which compare, are `evaluation.windows=fixed
  evaluation.at_start=true`.
- **Llama-like models** (`norm: rmsnorm`, `activation: swiglu`; up to 2024 `activation: silu` with `mlp_type: llama`) are the
  family `llama`, with `sliding_window_width` the family `mistral`. Two of GPT-NeoX's rules are easily overlooked: the gate is
  a third as wide as `intermediate_size`, rounded up to `mlp_multiple_of`, and the MLP has biases unless `use_bias_in_mlp` is
  false. The notes at the start name both. A width that GPT-NeoX itself can't build is refused with the one that it can.
- **Initial weights** have GPT-NeoX's distributions and not its random numbers: a run from scratch follows another curve.
- **Checkpoints** all stay unless `keep_last_n_checkpoints` is given; those of `extra_save_iters` stay anyway.

## Honoured

| key | here |
|---|---|
"""


def neox_markdown() -> str:
    """The page."""
    lines = [_HEAD.rstrip("\n")]
    lines += [f"| `{key}` | {known.meaning} |" for key, known in _both("HONOURED")]
    lines += ["", "## Accepted with these values only", "", "| key | values | otherwise refused, for |", "|---|---|---|"]
    for key, (values, reason) in _both("ONLY"):
        shown = ", ".join(f"`{_shown(value)}`" for value in dict.fromkeys(map(repr, values)))
        lines.append(f"| `{key}` | {shown or 'none'} | {reason} |")
    lines += ["", "## Overwritten by another key", ""]
    lines += ["GPT-NeoX overwrites these by what the other key says. Refused where they differ from it.", ""]
    lines += ["| key | the key that counts |", "|---|---|"]
    lines += [f"| `{key}` | `{other}` |" for key, (_, other) in neox_keys.OVERWRITTEN.items()]
    lines += ["", "## Not applicable", "", "| keys | reason |", "|---|---|"]
    idle = dict(_both("NOT_APPLICABLE"))
    for reason in dict.fromkeys(idle.values()):
        keys = ", ".join(f"`{key}`" for key, why in idle.items() if why == reason)
        lines.append(f"| {keys} | {reason} |")
    return "\n".join(lines) + "\n"


def _both(table: str) -> list[tuple[str, Any]]:
    """The entries of a table: top-level keys, then those inside of blocks."""
    return [entry for tables in (neox_keys, neox_blocks) for entry in getattr(tables, table).items()]


def _shown(value: str) -> str:
    return {"None": "null", "True": "true", "False": "false", "{}": "{enabled: false}"}.get(value, value.strip("'"))
