"""Own text: tokenise it, train with a callback, evaluate. Usage: python examples/own_data.py FOLDER_OF_TEXT OUTPUT"""

from __future__ import annotations

import sys
from pathlib import Path

import megarewarm

texts, output = sorted(Path(sys.argv[1]).glob("*.txt")), Path(sys.argv[2])
output.mkdir(parents=True, exist_ok=True)

# a small tokenizer of these texts; for a checkpoint of your own, take the checkpoint's
tokenizer = output / "tokenizer.json"
megarewarm.train_tokenizer((text.read_text(encoding="utf-8") for text in texts), 512, tokenizer)
megarewarm.prepare(texts, tokenizer, output / "tokens", shuffle=1)

source = {"path": str(output / "tokens"), "split": "80,20,0"}
config = megarewarm.load_config(
    {
        "name": "own_data",
        "folder": str(output / "run"),
        "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "max_positions": 64},
        "data": {
            "sequence_length": 64,
            "train": [{**source, "max_epochs": None}],
            "validation": [{"name": "own", "role": "downstream", "tokens": 640, "sources": [{**source, "part": "valid"}]}],
            "tokenizer": str(tokenizer),
        },
        "schedule": {"curve": "cosine", "max_lr": 3e-3, "min_lr": "10%", "warmup": "5%"},
        "training": {"budget": 40, "global_batch": 4, "micro_batch": 4},
    },
    {"evaluation.every": 10},
)
print(f"{megarewarm.plan(config).tokens:,} tokens in {megarewarm.plan(config).steps} steps")


def on_event(event: dict) -> bool | None:
    """Called with every line of metrics.jsonl; True ends the run."""
    if event["event"] == "eval":
        print(f"step {event['step']}: loss {event['loss']:.3f}")
    return None


outcome = megarewarm.train(config, [on_event], quiet=True)
model = megarewarm.load_model(outcome.folder)
loss, tokens, bits = model.evaluate(output / "tokens", sequence_length=64)
print(f"on all of the text: {loss:.3f} nats per token, {bits:.3f} bits per byte, over {tokens:,} tokens")
