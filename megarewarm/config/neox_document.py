"""``docs/neox_config.md``: what becomes of each of GPT-NeoX's keys, from the tables that decide it."""

from __future__ import annotations

from megarewarm.config.neox_keys import FAMILIES, HONOURED, NOT_APPLICABLE, ONLY

_HEAD = """\
# GPT-NeoX configurations

`deepspeed launch.sh 410M.yml local_setup.yml` takes GPT-NeoX's files as they are: flat keys with dashes or underscores,
several files (a key may be in one of them only), DeepSpeed's blocks, `attention_config`. They are known by their keys. Each
key is honoured, or listed at the start as not applicable with the reason, or refused with the reason; an unknown key is an
error. Words of the form `section.key=value` behind the files change the translated run in [our terms](config.md), and

```bash
python tools/convert_config.py 410M.yml local_setup.yml --ranks 32 --output run.yml
```

writes it down. What follows GPT-NeoX's rules and defaults:

- **Losses.** A re-warming run that GPT-NeoX did itself (40 steps, fp32, one CPU) is followed within 2e-5 at every step and
  every evaluation (measured 1.1e-6): the order of samples, blends, splits, the schedule with its float warmup, weight decay
  groups, clipping.
- **`load`** may name anything that [start.from](config.md) can: a Hugging Face folder or hub name, a folder of GPT-NeoX
  (`global_stepN`, or the one with `latest`; with its optimizer files training goes on with moments and fp32 masters), of
  Megatron-LM, or of megarewarm. `finetune: true` takes the weights and begins everything else anew; without it training
  goes on where the checkpoint stands, and a checkpoint of weights alone is refused. Where `load` and `save` are the same
  folder and nothing is there, the run begins from scratch. A missing `load` is an error: GPT-NeoX would begin from scratch.
- **Restarts.** The same command after a crash goes on from the run's newest checkpoint, `finetune: true` or not; GPT-NeoX
  would begin again.
- **`save`** is the run folder; checkpoints are in `save/checkpoints`, in megarewarm's form. `tools/convert_checkpoint.py
  --to neox` writes layer files.
- **Evaluation** takes the next `eval_iters` batches each time, as GPT-NeoX does, so its losses are of different text each
  time (`evaluation.windows: moving`). Fixed windows, which compare, are `evaluation.windows=fixed
  evaluation.at_start=true`.
- **Initial weights** have GPT-NeoX's distributions and not its random numbers: a run from scratch follows another curve.
- **Checkpoints** all stay unless `keep_last_n_checkpoints` is given; those of `extra_save_iters` stay anyway.

## Honoured

| key | here |
|---|---|
"""


def neox_markdown() -> str:
    """The page."""
    lines = [_HEAD.rstrip("\n")]
    lines += [f"| `{key}` | {meaning} |" for key, (_, meaning) in HONOURED.items()]
    lines += ["", "## Accepted with these values only", "", "| key | values | otherwise refused, for |", "|---|---|---|"]
    for key, (values, reason) in ONLY.items():
        shown = ", ".join(f"`{_shown(value)}`" for value in dict.fromkeys(map(repr, values)))
        lines.append(f"| `{key}` | {shown} | {reason} |")
    lines += ["", "Refused by the beginning of their names, unless empty or false:", "", "| keys | reason |", "|---|---|"]
    lines += [f"| `{prefix}*` | {reason} |" for prefix, reason in FAMILIES.items()]
    lines += ["", "## Not applicable", "", "| keys | reason |", "|---|---|"]
    for reason in dict.fromkeys(NOT_APPLICABLE.values()):
        keys = ", ".join(f"`{key}`" for key, why in NOT_APPLICABLE.items() if why == reason)
        lines.append(f"| {keys} | {reason} |")
    return "\n".join(lines) + "\n"


def _shown(value: str) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(value, value.strip("'"))
