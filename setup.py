"""Packaging. Versions that are known to work together are in constraints.txt; the ranges here stay open."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megarewarm",
    version="0.1.0",
    description="Continual pre-training of GPT-NeoX models: re-warm, re-decay, replay, and watch what is forgotten.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megarewarm", "megarewarm.*"]), *find_packages("kernels")],
    package_dir={"megarewarm": "megarewarm", "megarewarm_kernels": "kernels/megarewarm_kernels"},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "tokenizers>=0.19",
        "tiktoken>=0.9",
        "sentencepiece>=0.2",
        "orjson>=3.9",
        "zstandard>=0.22",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "scipy>=1.11",
        "mpi4py>=4.0",
    ],
    extras_require={
        # builds without CUDA ops: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed
        "deepspeed": ["deepspeed>=0.16"],
        "flash-attn": ["flash-attn>=2.7"],
        "data": ["pyarrow>=16", "ftfy>=6.1"],  # .parquet files and --ftfy of tools/preprocess_data.py
        "hub": ["huggingface_hub>=0.23"],
        "wandb": ["wandb>=0.17"],
        "test": [
            "ftfy>=6.1",
            "hypothesis>=6.100",
            "jsonschema>=4.21",
            "megatron-core>=0.16",
            "mpich; sys_platform == 'linux'",
            "mypy>=1.10",
            "pyarrow>=16",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "transformers>=4.57",
            "types-PyYAML",
        ],
    },
)
