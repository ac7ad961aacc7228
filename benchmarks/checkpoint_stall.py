"""How long training waits for a checkpoint: a save in the background against a blocking save of the same data.

Weights, both moments and counters of a model, fp32, in turns within one run; the background save is left to end before the
next turn begins, so that each measures itself alone. On a GPU machine the tensors lie on the GPU.

    python benchmarks/checkpoint_stall.py [--hidden 768 --layers 12 --vocabulary 50304] [--turns 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from megarewarm.checkpoint.export.own import weights_only_state
from megarewarm.checkpoint.lineage import Lineage
from megarewarm.checkpoint.own.retention import Retention
from megarewarm.checkpoint.own.saver import Saver
from megarewarm.checkpoint.weights import expected_shapes
from megarewarm.config.model import ModelConfig


def make_tensors(config: ModelConfig, device: str) -> dict[str, torch.Tensor]:
    """Weights and moments under the names of a checkpoint, fp32."""
    kinds = ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
    return {kind + name: torch.randn(shape, device=device) for name, shape in expected_shapes(config).items() for kind in kinds}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--head-start", type=float, default=5.0, help="seconds before the first save, as training has them")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    arguments = parser.parse_args()
    config = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_heads=arguments.hidden // 64,
        vocab_size=arguments.vocabulary,
        max_positions=2048,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = make_tensors(config, device)
    state = weights_only_state("stall", config, Lineage())
    size = sum(tensor.nbytes for tensor in tensors.values())
    stalls: dict[bool, list[float]] = {False: [], True: []}
    written: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        savers = {how: Saver(Path(place) / str(how), Retention(1), asynchronous=how) for how in (False, True)}
        with savers[False], savers[True]:
            savers[True].reserve(tensors)
            time.sleep(arguments.head_start)
            for turn in range(arguments.turns + 1):
                for how, saver in savers.items():
                    began = time.perf_counter()
                    saver.save(state.model_copy(update={"step": turn}), tensors)
                    stall = time.perf_counter() - began
                    saver.wait()
                    (saved,) = saver.finished()
                    if turn == 0:
                        first = stall  # of the last kind, which makes its buffers
                        continue
                    stalls[how].append(stall)
                    written[how].append(saved.seconds)
    blocking, background = (statistics.median(stalls[how]) for how in (False, True))
    print(f"{size / 2**30:.2f} GiB on {device}, median of {arguments.turns} turns")
    print(f"blocking save:   training waits {blocking:.3f} s")
    stands = statistics.median(written[True])
    print(f"background save: training waits {background:.3f} s, the checkpoint stands after {stands:.3f} s")
    print(f"ratio of waits:  {background / blocking:.3f} (of the first save: {first / blocking:.3f})")


if __name__ == "__main__":
    main()
