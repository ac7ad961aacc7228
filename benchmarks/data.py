"""Data, against its peers, in one run: tokenising, preprocessing, order of samples, loading.

Each part is a script of its own beside this one and can be run alone; its first lines say what is compared.

    python benchmarks/data.py --tokenizer 20B_tokenizer.json --folder DIR [--documents 150_000_000] [--gigabytes 2.5]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = ("numpy", "tokenizers", "tiktoken", "megatron-core", "torch")


def versions() -> str:
    """Python, processors and the packages that are compared."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return f"Python {platform.python_version()}, {os.cpu_count()} processors, {', '.join(found)}"


def main() -> None:
    """Run the parts and print what they print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--folder", required=True, help="for corpora, which are removed: 3 GB, and twice the gigabytes")
    parser.add_argument("--documents", default="150_000_000", help="of the corpus whose order is made")
    parser.add_argument("--gigabytes", default="2.5", help="of text to preprocess")
    arguments = parser.parse_args()
    parts = {
        "data_tokenising": ["--tokenizer", arguments.tokenizer],
        "data_preprocessing": [
            *("--tokenizer", arguments.tokenizer, "--folder", arguments.folder, "--gigabytes", arguments.gigabytes),
            *("--", "--shuffle", "--split", "0.98,0.01,0.01"),
        ],
        "data_order": ["--folder", arguments.folder, "--documents", arguments.documents],
        "data_loading": ["--folder", arguments.folder],
    }
    print(versions(), flush=True)
    for name, words in parts.items():
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, HERE / f"{name}.py", *words], check=True)


if __name__ == "__main__":
    main()
