"""Peak memory and speed of converting a large checkpoint, against copying the same bytes with ``cp``.

Random fp16 weights of the shape of Pythia 6.9B (13.7 GB; the disk holds three such folders) go from Hugging Face to
GPT-NeoX and back, each in a fresh process; those of a Llama-like preset from Hugging Face to Hugging Face, whose projections
are fused when they are read and split when they are written. Linux only.

    python benchmarks/convert_checkpoint.py [--hidden 4096 --layers 32 --vocabulary 50432] [--tp 4] [--folder DIR]
    python benchmarks/convert_checkpoint.py --preset configs/llama/llama3_1b.yml [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from megarewarm.checkpoint.convert import ConvertOptions, convert
from megarewarm.checkpoint.source import ForeignCheckpoint
from megarewarm.checkpoint.weights import Description, expected_shapes
from megarewarm.config.model import ModelConfig

TOOL = Path(__file__).resolve().parent.parent / "tools" / "convert_checkpoint.py"
_MEASURED = """
import re, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:  # it ends by exit
    print("PEAK", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


class RandomWeights:
    """Weights that are drawn when they are read."""

    where = "random weights"

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = expected_shapes(config)

    def describe(self) -> dict[str, Description]:
        return {name: Description(shape, torch.float16, name) for name, shape in self._shapes.items()}

    def read(self, name: str) -> torch.Tensor:
        return torch.randn(self._shapes[name]).half()


def timed(command: list[str]) -> tuple[float, str]:
    """(seconds, output), the written bytes being on the disk at the end."""
    began = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - began, output


def shape(arguments: argparse.Namespace) -> ModelConfig:
    """The one that is asked for."""
    if arguments.preset is not None:
        return ModelConfig(**yaml.safe_load(arguments.preset.read_text())["model"])
    return ModelConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_heads=arguments.hidden // 128,
        vocab_size=arguments.vocabulary,
        max_positions=2048,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=50432)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--preset", type=Path, help="a configuration with the shape of a Llama-like model")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    arguments = parser.parse_args()
    config = shape(arguments)
    ways = [("hf", "neox", ["--tp", str(arguments.tp)]), ("neox", "back", [])]
    if arguments.preset is not None:
        ways = [("hf", "back", [])]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        place = Path(name)
        source = ForeignCheckpoint("random", "random", config, lambda: RandomWeights(config), [])
        convert(source, place / "hf", ConvertOptions("hf"))
        size = sum(file.stat().st_size for file in (place / "hf").iterdir())
        largest = max(item.nbytes for item in RandomWeights(config).describe().values())
        print(
            f"{size / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB: at most {largest / 2**20 + 1024:.0f} MiB promised"
        )
        seconds, _ = timed(["cp", "-r", str(place / "hf"), str(place / "copy")])
        print(f"cp: {size / 1e9 / seconds:.2f} GB/s")
        subprocess.run(["rm", "-r", str(place / "copy")], check=True)
        for origin, destination, more in ways:
            form = "hf" if destination == "back" else destination
            command = [str(TOOL), str(place / origin), str(place / destination), "--to", form, *more]
            converting, output = timed([sys.executable, "-c", _MEASURED, *command])
            peak = int(re.search(r"PEAK (\d+)", output)[1]) / 1024  # type: ignore[index]
            speed = size / 1e9 / converting
            print(f"{origin} to {form}: {speed:.2f} GB/s ({converting / seconds:.2f} times the copy), peak {peak:.0f} MiB")
        same = all(
            file.name == "config.json" or file.read_bytes() == (place / "back" / file.name).read_bytes()
            for file in (place / "hf").glob("*.safetensors")
        )
        print(json.dumps({"weights are the same bit for bit": same}))


if __name__ == "__main__":
    main()
