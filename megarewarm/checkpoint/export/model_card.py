"""A model card: what a model was trained on, along which schedule, and with what losses, from its lineage."""

from __future__ import annotations

import re

from megarewarm.checkpoint.lineage import Lineage, Stage
from megarewarm.config.schema import ModelConfig
from megarewarm.model.size import count_parameters


def model_card(name: str, config: ModelConfig, lineage: Lineage) -> str:
    """Markdown with the hub's front matter. Says only what is recorded."""
    base = lineage.stages[0].run if lineage.stages else ""
    hub_name = re.fullmatch(r"([\w.-]+/[\w.-]+?)(@[\w./-]+)?", base)
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt_neox, megarewarm]"]
    if hub_name is not None:
        front.append(f"base_model: {hub_name[1]}")
    lines = [*front, "---", "", f"# {name}", ""]
    lines.append(
        f"A GPT-NeoX model of {count_parameters(config):,} parameters, written by megarewarm: {config.num_layers} layers, "
        f"width {config.hidden_size}, {config.num_heads} heads, "
        f"vocabulary {config.vocab_size:,}, {config.max_positions:,} positions."
    )
    lines += ["", "```python", "from transformers import AutoModelForCausalLM", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")', "```", "", "## How it was trained", ""]
    if not lineage.stages:
        lines.append("Nothing is recorded.")
    for number, stage in enumerate(lineage.stages, 1):
        lines += _stage(number, stage)
    return "\n".join(lines).rstrip() + "\n"


def _stage(number: int, stage: Stage) -> list[str]:
    if not stage.data and not stage.steps:
        return [f"{number}. `{stage.run}`: {stage.intent}; its training is not recorded here.", ""]
    start = f", from `{stage.started_from}`" if stage.started_from else ""
    lines = [f"{number}. **{stage.run}**: {stage.intent}{start}; {stage.steps:,} steps, {stage.tokens:,} tokens.", ""]
    if stage.schedule:
        shown = ", ".join(f"{key} {_short(value)}" for key, value in stage.schedule.items() if value is not None)
        lines += [f"   Learning rate: {shown}; last {_short(stage.last_lr)}.", ""]
    if stage.data:
        lines += ["   | data | tokens | fingerprint |", "   |---|---|---|"]
        lines += [f"   | {seen.name} | {seen.tokens:,} | `{seen.fingerprint[:16]}` |" for seen in stage.data]
        lines.append("")
    if stage.losses:
        lines += ["   | validation set | loss |", "   |---|---|"]
        lines += [f"   | {name} | {loss:.4f} |" for name, loss in stage.losses.items()]
        lines.append("")
    return lines


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
