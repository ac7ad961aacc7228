"""Compiles the Triton kernels for real GPUs on a machine that has none, and reads registers, spills and instructions.

    python tests/kernel_compile.py [--all] [--only WORD] [--write docs/kernels.md]

Run in a process of its own: Triton must not be interpreting.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from megarewarm_kernels.attention import head_norms, joined_gradients
from megarewarm_kernels.attention.flash_blocks import blocks_of, width_of
from megarewarm_kernels.attention.flash_kernels import attention_backward_keys, attention_backward_queries, attention_forward
from megarewarm_kernels.attention.rotary import _ELEMENTS as ROTARY_ELEMENTS
from megarewarm_kernels.attention.rotary import rotary as rotary_kernel
from megarewarm_kernels.layer import add_rows, rms_norm
from megarewarm_kernels.layer.bias_gelu import _COLUMNS, _ROWS, _TILES, bias_gelu_backward, bias_gelu_forward
from megarewarm_kernels.layer.residual_norms import (
    _MOST_COLUMNS_BACKWARD,
    residual_norms_backward,
    residual_norms_forward,
    warps,
)
from megarewarm_kernels.layer.swiglu import _BLOCK as SWIGLU_BLOCK
from megarewarm_kernels.layer.swiglu import _WARPS as SWIGLU_WARPS
from megarewarm_kernels.layer.swiglu import swiglu_backward, swiglu_forward
from megarewarm_kernels.loss.logit_passes import _BLOCK as LOGITS_BLOCK
from megarewarm_kernels.loss.logit_passes import _WARPS as LOGITS_WARPS
from megarewarm_kernels.loss.logit_passes import gradient_pass, statistics_pass
from megarewarm_kernels.operators import LAUNCH
from megarewarm_kernels.optimizer import norm_tensors
from megarewarm_kernels.optimizer.adamw import _BLOCK, _WALK, adamw_step, squares
from megarewarm_kernels.optimizer.adamw_tensors import _BLOCK as MANY_BLOCK
from megarewarm_kernels.optimizer.adamw_tensors import _WARPS as MANY_WARPS
from megarewarm_kernels.optimizer.adamw_tensors import adamw_many
from megarewarm_kernels.part_sums import _COLUMNS as SUMS_COLUMNS
from megarewarm_kernels.part_sums import _ROWS as SUMS_ROWS
from megarewarm_kernels.part_sums import _WARPS as SUMS_WARPS
from megarewarm_kernels.part_sums import part_sums
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FLOATS = ("scale", "lr", "keep", "beta1", "beta2", "other1", "other2", "eps", "rate", "root", "z_loss")
_INT64 = ("targets_ptr", "order_ptr", "table_ptr", "begins_ptr", "sizes_ptr")
_INT32 = ("sorted_ptr", "owners_ptr", "starts_ptr", "ends_ptr")
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_ATTENTION = {"bf16": (16, 32, 64, 80, 96, 128, 256), "fp32": (16, 32, 64, 80, 96, 128, 160, 256)}  # dtype -> heads
_GROUPED = {"bf16": (64, 128, 256), "fp32": (64,)}  # dtype -> heads that are compiled for groups of 4 too
_USUAL = (
    ("bias_gelu_backward exact bf16", 90),
    ("adamw many tensors", 90),
    ("rotary bf16 d 64 r 64 group 4", 90),
    ("norm_heads_backward bf16 d 64 group 4", 90),
    ("swiglu_backward bf16", 90),
    ("attention forward bf16 d 64 group 4 documents", 90),
    ("attention queries bf16 d 64 group 4 documents", 90),
    ("attention keys bf16 d 64 documents", 80),  # the last register
    ("logit_gradient scaled bf16", 90),
    ("residual_norms_backward bf16 512", 90),
    ("rms_norm_backward added bf16 512", 90),
)
"""Names and GPUs of those that are compiled without ``--all``."""
BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"


@dataclass(frozen=True)
class Configuration:
    """A kernel as it is launched. ``values``: constexprs; pointers are to ``dtype`` but for those to fp32 and int64."""

    name: str
    kernel: Any
    dtype: str
    values: dict[str, Any]
    warps: int
    in_fp32: tuple[str, ...] = ()
    stages: int = 3
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of it. ``wide``: 128-bit loads and stores; ``spills``: to local memory."""

    name: str
    architecture: int
    registers: int
    spills: int
    stack: int
    shared: int
    wide: int
    tensor_core: int


def configurations(every: bool = True) -> Iterator[Configuration]:
    """The configurations that are shipped; not ``every``: those of ``_USUAL``."""
    for each in _shipped():
        wanted = tuple(a for a in each.architectures if every or (each.name, a) in _USUAL)
        if wanted:
            yield replace(each, architectures=wanted)


def _shipped() -> Iterator[Configuration]:
    for form, tanh in (("exact", False), ("tanh", True)):
        for dtype in ("bf16", "fp32"):
            tile = {"TANH": tanh, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
            yield Configuration(f"bias_gelu {form} {dtype}", bias_gelu_forward, dtype, tile, 4)
            backward = {**tile, "TILES": _TILES}
            yield Configuration(f"bias_gelu_backward {form} {dtype}", bias_gelu_backward, dtype, backward, 4, ("partial_ptr",))
    for name, aligned, copy in (
        ("adamw many tensors", True, None),
        ("adamw many tensors, anywhere", False, None),
        ("adamw many tensors and copies", True, tl.bfloat16),
    ):
        yield Configuration(name, adamw_many, "fp32", {"COPY": copy, "BLOCK": MANY_BLOCK, "ALIGNED": aligned}, MANY_WARPS)
    for name, aligned in (("squared norm of many tensors", True), ("squared norm of many tensors, anywhere", False)):
        walk = {"BLOCK": norm_tensors._BLOCK, "WALK": norm_tensors._WALK, "ALIGNED": aligned}
        yield Configuration(name, norm_tensors.squares_many, "fp32", walk, norm_tensors._WARPS)
    for head_dim, half, group in ((64, 8, 1), (64, 32, 1), (128, 16, 1), (80, 10, 1), (64, 32, 4), (128, 64, 4)):
        width = 1 << (half - 1).bit_length()
        shape = {"D": head_dim, "GROUP": group, "HALF": half, "WIDTH": width, "VECTORS": ROTARY_ELEMENTS // width}
        name = f"rotary bf16 d {head_dim} r {2 * half}{_grouped(group)}"
        yield Configuration(name, rotary_kernel, "bf16", shape | {"BACK": False}, 4, ("cos_ptr", "sin_ptr"))
    for head_dim, half, group, sums in (
        (64, 8, 1, True),
        (128, 16, 1, True),
        (80, 10, 1, True),
        (64, 32, 4, True),
        (128, 64, 4, False),
    ):
        name = f"join_gradients bf16 d {head_dim} r {2 * half}{_grouped(group)}{' bias' * sums}"
        shape = joined_gradients.tile_of(head_dim, half, key_heads=16) | {"GROUP": group, "SUMS": sums}
        exact = ("cos_ptr", "sin_ptr", "partial_ptr")
        yield Configuration(name, joined_gradients.join_gradients, "bf16", shape, joined_gradients._WARPS, exact)
    for head_dim, group in ((64, 1), (128, 1), (64, 4), (128, 4), (256, 4)):
        for way, kernel, elements in (
            ("", head_norms.head_norms_forward, head_norms._ELEMENTS),
            ("_backward", head_norms.head_norms_backward, head_norms._ELEMENTS_BACKWARD),
        ):
            shape = {"D": head_dim, "GROUP": group, "WIDTH": head_dim, "VECTORS": elements // head_dim}
            name = f"norm_heads{way} bf16 d {head_dim}{_grouped(group)}"
            yield Configuration(name, kernel, "bf16", shape, head_norms._WARPS, ("rstd_ptr", "partial_ptr"))
    for dtype in ("bf16", "fp32"):
        for way, kernel in (("", swiglu_forward), ("_backward", swiglu_backward)):
            yield Configuration(f"swiglu{way} {dtype}", kernel, dtype, {"BLOCK": SWIGLU_BLOCK}, SWIGLU_WARPS)
    tile = {"ROWS": add_rows._ROWS, "COLUMNS": add_rows._COLUMNS}
    for dtype in ("fp32", "bf16"):
        yield Configuration(f"add_rows {dtype}", add_rows.add_rows, dtype, tile, add_rows._WARPS, ("total_ptr",))
    for dtype in ("bf16", "fp32"):
        tile = {"ROWS": SUMS_ROWS, "COLUMNS": SUMS_COLUMNS}
        yield Configuration(f"part_sums {dtype}", part_sums, dtype, tile, SUMS_WARPS, ("partial_ptr",))
    yield from attention_configurations()
    state = ("parameter_ptr", "first_ptr", "second_ptr", "scale_ptr", "partial_ptr")
    for dtype in ("bf16", "fp32"):
        copy = {"COPY": True, "BLOCK": _BLOCK}
        yield Configuration(f"adamw gradient and copy {dtype}", adamw_step, dtype, copy, 4, state)
        yield Configuration(f"squared_norm {dtype}", squares, dtype, {"BLOCK": _BLOCK, "WALK": _WALK}, 4, state)
    rows = ("found_ptr", "log_sum_ptr", "special_ptr", "upstream_ptr")
    for dtype in ("bf16", "fp16", "fp32"):
        block = {"BLOCK": LOGITS_BLOCK}
        yield Configuration(f"logit_statistics {dtype}", statistics_pass, dtype, block, LOGITS_WARPS, rows)
        for scaled in (False, True) if dtype != "fp16" else (False,):
            name = f"logit_gradient {'scaled ' * scaled}{dtype}"
            yield Configuration(name, gradient_pass, dtype, block | {"SCALED": scaled}, LOGITS_WARPS, rows)
    statistics = ("mean_ptr", "rstd_ptr")
    for columns in (512, 1024, 2048, 4096, 8192):
        for added in (True, False):
            name = f"residual_norms {'added' if added else 'first'} bf16 {columns}"
            values = {"ADDED": added, "SECOND": True, "COLUMNS": columns}
            yield Configuration(name, residual_norms_forward, "bf16", values, warps(columns), statistics)
        if columns <= _MOST_COLUMNS_BACKWARD:
            for shared, both in ((False, True), (True, True), (True, False)):
                name = f"residual_norm{'s' * both}_backward bf16 {columns}{' biases' * shared}"
                values = {"COLUMNS": columns, "RESIDUAL": both, "SECOND": both, "SHARED": shared}
                exact = (*statistics, "partial_ptr")
                yield Configuration(name, residual_norms_backward, "bf16", values, warps(columns), exact)

    statistics = ("rstd_ptr", "partial_ptr")
    for columns in (512, 1024, 2048, 4096, 8192, 16384):
        for added in (True, False):
            values = {"ADDED": added, "COLUMNS": columns}
            name = f"rms_norm {'added' if added else 'first'} bf16 {columns}"
            yield Configuration(name, rms_norm.rms_norm_forward, "bf16", values, rms_norm.warps(columns), statistics)
            part = min(columns, rms_norm._PART)
            number = rms_norm.warps(part, rms_norm._EACH_BACKWARD)
            values = {"RESIDUAL": added, "COLUMNS": part, "PARTS": columns // part}
            name = f"rms_norm_backward {'added' if added else 'first'} bf16 {columns}"
            yield Configuration(name, rms_norm.rms_norm_backward, "bf16", values, number, statistics)


def _grouped(group: int) -> str:
    return f" group {group}" if group > 1 else ""


def attention_configurations() -> Iterator[Configuration]:
    """Those of flash attention, which differ from GPU to GPU."""
    kernels = {"forward": attention_forward, "queries": attention_backward_queries, "keys": attention_backward_keys}
    wanted = [
        (dtype, dim, documents, group)
        for dtype in _ATTENTION
        for dim in _ATTENTION[dtype]
        for documents in (False, True)
        for group in ((1, 4) if dim in _GROUPED[dtype] else (1,))
    ]
    for dtype, head_dim, documents, group in wanted:
        for name, kernel in kernels.items():
            for architecture in ARCHITECTURES:
                blocks = blocks_of(name, head_dim, getattr(torch, _DTYPES[dtype]), architecture, documents, group)
                values: dict[str, Any] = {"DOCUMENTS": documents, "GROUP": group, "D": head_dim}
                values["WIDTH"] = width_of(head_dim)
                values |= {"QUERIES": blocks.queries, "KEYS": blocks.keys, "PRECISION": blocks.precision}
                yield Configuration(
                    f"attention {name} {dtype} d {head_dim}{_grouped(group)}{' documents' * documents}",
                    kernel,
                    dtype,
                    values,
                    blocks.warps,
                    ("lse_ptr", "delta_ptr"),
                    blocks.stages,
                    (architecture,),
                )


def compiled(configuration: Configuration, architecture: int) -> Compiled:
    """Compile for a GPU of compute capability ``architecture`` / 10, as for aligned pointers and sizes."""
    names = configuration.kernel.arg_names
    signature = {name: _type_of(name, configuration) for name in names}
    constants = {(names.index(name),): value for name, value in configuration.values.items()}
    aligned = [name for name in names if signature[name].startswith("*") or signature[name] == "i32"]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=configuration.kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": configuration.warps, "num_stages": configuration.stages, **LAUNCH},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        assembly = _output("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    return Compiled(
        name=configuration.name,
        architecture=architecture,
        registers=int(found[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", assembly)),
        stack=int(found[2]),
        shared=result.metadata.shared,
        wide=len(re.findall(r"\b(?:LDG|STG)[.\w]*\.128\b", assembly)),
        tensor_core=len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA)\b", assembly)),
    )


def table(rows: list[Compiled]) -> str:
    """As Markdown, one line for each kernel, architectures side by side."""
    heads = ["kernel", "registers", "spills", "shared, bytes", "128-bit accesses", "tensor cores"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    by_name: dict[str, list[Compiled]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    for name, group in by_name.items():
        values = [[getattr(row, key) for row in group] for key in ("registers", "spills", "shared", "wide", "tensor_core")]
        lines.append(f"| {name} | " + " | ".join(" / ".join(map(str, column)) for column in values) + " |")
    return "\n".join(lines)


def write(page: Path, rows: list[Compiled]) -> None:
    """Replace the lines of ``rows`` in the page's table. Kernels that are no longer shipped lose theirs."""
    text = page.read_text()
    before, old, after = text.split(BEGIN)[0], text.split(BEGIN)[1].split(END)[0], text.split(END)[1]
    new = table(rows).splitlines()
    lines = {line.split(" | ")[0]: line for line in (*old.strip().splitlines(), *new)}
    names = dict.fromkeys(f"| {each.name}" for each in configurations())
    held = [*new[:2], *(lines[name] for name in names if name in lines)]
    page.write_text("\n".join([before + BEGIN, *held, END + after]))


def _type_of(name: str, configuration: Configuration) -> str:
    if name in configuration.values:
        return "constexpr"
    if name in _INT64:
        return "*i64"
    if name in _INT32:
        return "*i32"
    if name.endswith("_ptr"):
        return "*fp32" if name in configuration.in_fp32 else f"*{configuration.dtype}"
    return "fp32" if name in _FLOATS else "i32"


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([os.fspath(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile everything; print JSON, or write the table into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--all", action="store_true", help="also what takes long; --write does")
    parser.add_argument("--only", metavar="WORD", default="", help="kernels with it in their names; others keep their lines")
    arguments = parser.parse_args()
    every = arguments.all or arguments.write is not None
    wanted = [each for each in configurations(every) if arguments.only in each.name]
    if not wanted:
        parser.error(f"no kernel has '{arguments.only}' in its name")
    rows = [compiled(each, architecture) for each in wanted for architecture in each.architectures]
    if arguments.write is None:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        write(arguments.write, rows)


if __name__ == "__main__":
    main()
