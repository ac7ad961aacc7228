#!/usr/bin/env python3
"""Generated tokens per CPU second against transformers' generate: the same weights, prompts and lengths, one thread, sampling.

Predictions and results: docs/benchmarks.md. ``--texts``: with one, the bytes of the weights are the limit of both.

    python benchmarks/generation.py [--rounds 3] [--texts 32] [--new 256]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.checkpoint.weights import load_module
from megarewarm.generation.continuation import Continuer
from megarewarm.generation.sampling import Sampling, text_keys

KINDS: dict[str, Sampling] = {"sampling": Sampling(), "top-p 0.95": Sampling(1.0, 0.95), "greedy": Sampling(0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--new", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{given.texts} texts, prompts of {given.prompt} ids, {given.new} new ones each, one thread")
    print("| model | | transformers, tokens/CPU s | here | ratio |\n|---|---|---|---|---|")
    for name, model in models().items():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            source = open_checkpoint(folder)
            ours = Continuer(load_module(source.weights, source.model_config, torch.device("cpu"), torch.float32))
        prompts = torch.randint(0, source.model_config.vocab_size, (given.texts, given.prompt))
        for kind, sampling in KINDS.items():
            theirs = best(partial(by_transformers, model, prompts, given.new, sampling), given.rounds)
            keys = text_keys(0, range(given.texts))
            mine = best(partial(ours, prompts.tolist(), given.new, sampling, keys, None), given.rounds)
            speeds = [given.texts * given.new / seconds for seconds in (theirs, mine)]
            print(f"| {name} | {kind} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {theirs / mine:.2f} |", flush=True)


def models() -> dict[str, PreTrainedModel]:
    """The shapes of pythia-14m and of a Llama of 9M parameters without its embedding, whose weights make some ids likely."""
    torch.manual_seed(0)
    neox = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=2048,
    )
    llama = LlamaConfig(
        vocab_size=32000,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=704,
        max_position_embeddings=2048,
    )
    made: dict[str, PreTrainedModel] = {"pythia-14m": GPTNeoXForCausalLM(neox), "Llama": LlamaForCausalLM(llama)}
    for model in made.values():
        head: Any = model.get_output_embeddings()
        with torch.no_grad():
            head.weight.mul_(15)  # a few hundred ids then hold 95 % of the probability, as in text
    return {name: model.eval() for name, model in made.items()}


@torch.inference_mode()
def by_transformers(model: Any, prompts: torch.Tensor, new: int, sampling: Sampling) -> None:
    """transformers' generate without an end, of the same kind."""
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": sampling.top_p}
    kind = drawn if sampling.temperature else {"do_sample": False}
    mask = torch.ones_like(prompts)
    model.generate(
        prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=None, eos_token_id=None, pad_token_id=0, **kind
    )


def best(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of the fastest of ``rounds``: the machine's other work slows down the rest."""
    spent = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return min(spent)


if __name__ == "__main__":
    main()
