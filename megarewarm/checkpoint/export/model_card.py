"""A model card: what a model was trained on, along which schedule, and with what losses, from its lineage."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import yaml

from megarewarm.checkpoint.export.tokenizer_files import ExportedTokenizer
from megarewarm.checkpoint.foreign.families import model_type_of_family
from megarewarm.checkpoint.lineage import Lineage, Stage, StatedTerms
from megarewarm.config.model import ModelConfig
from megarewarm.model.size import count_parameters

_ADD = "add `license` and `language` to the first lines of this file before you publish the model"


def model_card(name: str, config: ModelConfig, lineage: Lineage, tokenizer: ExportedTokenizer) -> str:
    """Markdown with the hub's metadata block. States only what is recorded."""
    card = _card(lineage)
    measured = any(stage.losses for stage in lineage.stages)
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": card.license,
        "language": card.languages,
        "base_model": card.base_model,
        "optimizer": next(reversed(lineage.optimizers), None),  # the hub has no such key; foreign/card.py reads it
        "tags": [model_type_of_family(config).name, "megarewarm", "continual-pretraining"],
        "metrics": ["perplexity"] if measured else None,
    }
    block = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False).rstrip()
    lines = ["---", block, "---", "", f"# {name}", ""]
    lines.append(
        f"{_called(config)} model of {count_parameters(config):,} parameters, written by megarewarm on "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}: {config.num_layers} layers, "
        f"width {config.hidden_size}, {config.num_heads} heads{_key_heads(config)}, "
        f"vocabulary {config.vocab_size:,}, {config.max_positions:,} positions."
    )
    lines += ["", f"- Base model: {f'`{card.base_model}`' if card.base_model else 'none on the hub is recorded'}"]
    lines.append(f"- Licence and languages of the base model: {_terms(card)}")
    lines.append(f"- Tokenizer: {_tokenizer(lineage, tokenizer)}")
    lines += ["", "```python", "from transformers import pipeline", ""]
    lines += ['generate = pipeline("text-generation", model="path/to/this/folder")', "```", "", "## How it was trained", ""]
    if not lineage.stages:
        lines.append("Nothing is recorded.")
    elif measured:
        lines += ["Losses are in nats per token; perplexity is exp(loss).", ""]
    for number, stage in enumerate(lineage.stages, 1):
        lines += _stage(number, stage)
    return "\n".join(lines).rstrip() + "\n"


def _called(config: ModelConfig) -> str:
    name = model_type_of_family(config).architecture.removesuffix("ForCausalLM")
    name = "GPT-NeoX" if name == "GPTNeoX" else name
    return f"An {name}" if name[0] in "AEIOU" else f"A {name}"


def _key_heads(config: ModelConfig) -> str:
    return "" if config.kv_heads == config.num_heads else f" ({config.kv_heads} of keys and values)"


def _card(lineage: Lineage) -> StatedTerms:
    for stage in lineage.stages[:1]:
        if stage.card is not None:
            return stage.card
        # lineages of earlier versions have the name only
        hub = re.fullmatch(r"([\w.-]+/[\w.-]+?)(@[\w./-]+)?", stage.run)
        if hub is not None and stage.intent == "foreign checkpoint (huggingface)":
            return StatedTerms(base_model=hub[1])
    return StatedTerms()


def _terms(card: StatedTerms) -> str:
    known = [*([card.license] if card.license else []), *card.languages]
    return ", ".join(known) if card.license and card.languages else f"{', '.join(known) or 'not recorded'}; {_ADD}"


def _tokenizer(lineage: Lineage, tokenizer: ExportedTokenizer) -> str:
    here = "`tokenizer.json` in this folder" if tokenizer.files else "not in this folder"
    end = tokenizer.ids.get("eos")
    made = lineage.stages[-1].tokenizers if lineage.stages else []
    parts = [here, *([] if end is None else [f"id {end} ends a text"]), *(f"fingerprint `{t.fingerprint[:16]}`" for t in made)]
    return ", ".join(parts)


def _stage(number: int, stage: Stage) -> list[str]:
    if stage.grown:
        return [f"{number}. **{stage.run}**: {stage.intent}, from `{stage.started_from}`.", ""]
    if not stage.data and not stage.steps:
        return [f"{number}. `{stage.run}`: {stage.intent}; its training is not recorded here.", ""]
    start = f", from `{stage.started_from}`" if stage.started_from else ""
    by = f", {stage.optimizer}" if stage.optimizer else ""
    lines = [f"{number}. **{stage.run}**: {stage.intent}{start}; {stage.steps:,} steps, {stage.tokens:,} tokens{by}.", ""]
    if stage.schedule:
        shown = ", ".join(f"{key} {_short(value)}" for key, value in stage.schedule.items() if value is not None)
        lines += [f"   Learning rate: {shown}; last {_short(stage.last_lr)}.", ""]
    if stage.reset:
        lines += _table(("kept or reset at its start", "choice"), *stage.reset.items())
    if stage.data:
        lines += _table(
            ("data", "tokens", "fingerprint"),
            *((seen.name, f"{seen.tokens:,}", f"`{seen.fingerprint[:16]}`") for seen in stage.data),
        )
    if stage.losses:
        losses = ((name, f"{loss:.4f}", _perplexity(loss)) for name, loss in stage.losses.items())
        lines += _table(("validation set", "loss", "perplexity"), *losses)
    return lines


def _table(*rows: tuple[str, ...]) -> list[str]:
    written = [f"   | {' | '.join(row)} |" for row in rows]
    return [written[0], f"   |{'---|' * len(rows[0])}", *written[1:], ""]


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 100 else "-"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
