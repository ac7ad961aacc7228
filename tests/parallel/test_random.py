"""Layouts drawn at random, of sizes that divide nothing: each is the run of one process, or is refused before it trains.

The dry run says the same line. What is compared is said in ``test_parallel_saved``, and the export, read by transformers.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from megarewarm.errors import UserError
from megarewarm.lab.dry_run import show_run
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.ranks import Ranks
from tests.parallel.test_saved import Case, assert_saved_alike, go_on_everywhere, run_settings, train_alone
from tests.support.distributed import run_ranks
from tests.support.tiny import quiet

# hidden, heads, ffn, rotary fraction
SHAPES = [(20, 2, 26, 0.4), (24, 6, 30, 0.5), (24, 6, 6, 1.0), (40, 8, 56, 0.4), (12, 3, 9, 0.5), (24, 4, 20, 0.0)]


def draw(seed: str, world: int) -> Case:
    """A layout of ``world`` ranks, most of them possible."""
    r = random.Random(seed)
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    tensor = r.choice(divisors)
    pipeline = r.choice([n for n in divisors if (world // tensor) % n == 0])
    data, stages = world // (tensor * pipeline), pipeline
    parallel: dict[str, Any] = {"tensor": tensor, "sequence": tensor > 1 and r.random() < 0.5, "pipeline": pipeline}
    if pipeline > 1:
        parallel["schedule"] = r.choice(["1f1b", "interleaved", "zero_bubble"])
        stages *= 1 if parallel["schedule"] == "1f1b" else 2
        if parallel["schedule"] == "interleaved" and r.random() < 0.3:
            parallel["stages_per_rank"], stages = 3, 3 * pipeline
    if data > 1:
        parallel["sharding"] = r.choice(["none", "zero2", "zero2" if pipeline > 1 else "zero3"])
        if parallel["sharding"] != "none":
            parallel["shard_ranks"] = r.choice([None, 1, data])
    hidden, heads, ffn, rotary = r.choice([s for s in SHAPES if s[1] % tensor == s[2] % tensor == 0 or r.random() < 0.1])
    model = {
        "num_layers": stages + r.choice([-1, 0, 0, 1, 2, 3]) or 1,
        "hidden_size": hidden,
        "num_heads": heads,
        "ffn_size": ffn,
        "rotary_fraction": rotary,
        "vocab_size": r.choice([509, 67, 69, 65]),
        "tie_embeddings": r.random() < 0.5,
        "residual": r.choice(["parallel", "parallel", "sequential"]),
    }
    share = r.choice([2, 3, 5, 7])
    training = {
        "global_batch": share * data + (r.random() < 0.1),
        "micro_batch": r.choice([1, 2, 3, share, share + 2]),
        "recompute": r.choice(["none", "selective", "full"]),
    }
    return world, parallel, model, training


def _refusal(action: Any, *args: Any, **options: Any) -> str | None:
    try:
        action(*args, **options)
    except UserError as error:
        return str(error)
    return None


def _told(ranks: Ranks, place: str, cases: dict[str, Case]) -> list[str | None]:
    return [_refusal(go_on_everywhere, ranks, place, {name: case}, True) for name, case in cases.items()]


def _logits(folder: Path, vocabulary: int) -> torch.Tensor:
    ids = torch.randint(vocabulary, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation="eager")(ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4, 6, 8])
def test_a_layout_is_the_run_of_one_process_or_is_refused(tmp_path: Path, world: int) -> None:
    cases = {f"{world}_{seed}": draw(f"{world}_{seed}", world) for seed in range(8)}
    nobody = Launch(0, 1, 0, 1, "127.0.0.1", 29500, "none")
    refused = {}
    for name, case in cases.items():
        train_alone(tmp_path / name, case, export=True)
        settings = run_settings(tmp_path / name, f"{name}_dry", case, export=True)
        refused[name] = _refusal(show_run, settings, quiet(), nobody, world_size=world)
    assert list(refused.values()).count(None) > len(cases) // 2
    told = run_ranks(_told, world, str(tmp_path), cases, timeout=900)
    assert told == [list(refused.values())] * world
    for name, case in cases.items():
        if refused[name] is None:
            assert_saved_alike(tmp_path / name, name)
            alone, mine = (_logits(tmp_path / name / run / "huggingface", case[2]["vocab_size"]) for run in ("alone", name))
            torch.testing.assert_close(mine, alone, rtol=0.02, atol=0.02, msg=f"{name}: {case}")
