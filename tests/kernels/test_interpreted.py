"""The Triton kernels themselves, run by Triton's interpreter on the CPU, in a process of their own (see tests/run)."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import megarewarm_kernels
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megarewarm_kernels import AdamWTensors
from megarewarm_kernels.part_sums import sums_of

from tests.support.adamw_cases import (
    assert_guarded,
    assert_many_are_right,
    assert_norm_is_right,
    assert_norm_of_many_is_right,
    assert_right,
)
from tests.support.kernel_cases import CASES, arguments_of, assert_as_exact_as_torch, results
from tests.support.row_cases import IDS, assert_rows_are_added

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="Triton decides at import: TRITON_INTERPRET=1 pytest -m interpreter"
    ),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import triton_interpreter

    triton_interpreter.repair()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (17, 255), (16, 256), (150, 257)])
def test_kernels_are_as_exact_as_torch(name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(CASES[name], arguments_of(CASES[name], rows, columns, dtype))


@pytest.mark.parametrize("columns", [9000, 16384, 20000])
@pytest.mark.parametrize("name", ["residual_rms_norm", "rms_norm"])
def test_rows_that_programs_share(name: str, columns: int) -> None:
    assert_as_exact_as_torch(CASES[name], arguments_of(CASES[name], 3, columns, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "count", "columns"), [(1, 1, 1), (3, 2, 65), (33, 4, 130), (528, 3, 1000), (7, 2, 0)])
def test_sums_of_parts(rows: int, count: int, columns: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(rows)
    partial = torch.randn(rows, count, columns, generator=random)
    likes = [torch.empty(columns, dtype=(dtype, torch.float32)[i % 2]) for i in range(count)]
    found = sums_of(partial, likes)
    assert [x.dtype for x in found] == [x.dtype for x in likes]
    size = partial.double().square().sum(0).sqrt()
    for one, wanted, around in zip(found, partial.double().sum(0), size, strict=True):
        rounding = torch.finfo(one.dtype).eps * wanted.abs() + 8 * torch.finfo(torch.float32).eps * around
        assert ((one.double() - wanted).abs() <= rounding).all()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(list(CASES)),
    rows=st.integers(0, 40),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["whole", "transposed", "part", "expanded"]),
)
def test_any_shape_and_strides(name: str, rows: int, columns: int, dtype: torch.dtype, layout: str) -> None:
    case = CASES[name]
    arguments = [argument.detach() for argument in arguments_of(case, rows, columns, dtype)]
    strided = []
    for argument in arguments:
        if argument.dim() != 2 or layout == "whole":
            strided.append(argument)
        elif layout == "transposed":
            strided.append(argument.t().contiguous().t())
        elif layout == "part":
            strided.append(torch.nn.functional.pad(argument, (3, 5), value=float("nan"))[:, 3:-5])
        else:
            strided.append(argument[:1].expand(argument.shape))
    plain = [argument.contiguous() for argument in strided]
    for one, other in zip(results(case.ours, strided), results(case.ours, plain), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    if rows and dtype == torch.float32:
        assert_as_exact_as_torch(case, plain)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read_or_written_outside_of_the_tensors(name: str) -> None:
    """Guard bands of NaN around every argument, in one storage each; they stay, and none of them reaches a result."""
    case = CASES[name]
    arguments = [argument.detach() for argument in arguments_of(case, 19, 130, torch.float32)]
    bands, guarded = [], []
    for argument in arguments:
        band = torch.full((argument.numel() + 1024,), float("nan"))
        inside = band[512 : 512 + argument.numel()].view(argument.shape)
        inside.copy_(argument)
        bands.append(band)
        guarded.append(inside)
    before = [band.clone() for band in bands]
    found = results(case.ours, guarded)
    assert all(torch.isfinite(result).all() for result in found)
    for one, other in zip(before, bands, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32)), "arguments and their surroundings are unchanged"
    for one, other in zip(found, results(case.ours, arguments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_offsets_beyond_two_to_the_31(name: str) -> None:
    """Rows 2^30 elements apart, of which only a few pages are ever touched: the third begins at element 2^31."""
    case = CASES[name]
    plain = [argument.detach() for argument in arguments_of(case, 3, 64, torch.float16)]
    far = []
    for argument in plain:
        if argument.dim() == 2:
            columns = argument.shape[1]
            apart = torch.empty(2 * 2**30 + columns, dtype=torch.float16).as_strided((3, columns), (2**30, 1))
            apart.copy_(argument)
            far.append(apart)
        else:
            far.append(argument)
    with torch.no_grad():
        for one, other in zip(case.ours(*far), case.ours(*plain), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1, 1000, 1024, 1025, 3000])
@pytest.mark.parametrize("copy", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs(size: int, dtype: torch.dtype, copy: torch.dtype | None) -> None:
    assert_right(size, dtype, copy)


@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("sizes", [[1], [5, 1023, 1024, 1025, 0, 3], [3000, 2]])
def test_adamw_over_many_tensors_is_torchs(sizes: list[int], apart: bool, copy: torch.dtype | None) -> None:
    assert_many_are_right(sizes, apart=apart, copy=copy)


@pytest.mark.parametrize("size", [0, 1, 1024 * 16, 1024 * 16 + 1, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_squared_norm(size: int, dtype: torch.dtype) -> None:
    assert_norm_is_right(size, dtype)


def test_the_interpreter_still_needs_repair() -> None:
    """A canary: when Triton computes bf16 rightly by itself, tests/support/triton_interpreter.py can go."""
    import subprocess
    import sys

    program = (
        "import torch, triton, triton.language as tl\n"
        "@triton.jit\n"
        "def k(x, y):\n"
        "    i = tl.arange(0, 4)\n"
        "    tl.store(y + i, (tl.load(x + i)).to(tl.bfloat16))\n"
        "x = torch.tensor([1.00390625 * 1.001] * 4)\n"
        "y = torch.empty(4, dtype=torch.bfloat16)\n"
        "k[(1,)](x, y)\n"
        "print(torch.equal(y, x.to(torch.bfloat16)))\n"
    )
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"canary_{os.getpid()}.py")  # Triton reads a kernel's source
    try:
        with open(path, "w") as file:
            file.write(program)
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    finally:
        os.unlink(path)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("copy", [None, torch.bfloat16])
def test_adamw_writes_nothing_where_its_scale_is_not_a_number(copy: torch.dtype | None) -> None:
    assert_guarded(copy)


@pytest.mark.parametrize("sizes", [[0], [1], [16, 8192, 32], [5, 8191, 8192, 8193, 0, 3], [30_000, 2]])
def test_the_squared_norm_of_many_tensors(sizes: list[int]) -> None:
    assert_norm_of_many_is_right(sizes)


@pytest.mark.parametrize("ids", list(IDS))
@pytest.mark.parametrize(("width", "dtype"), [(5, torch.float32), (300, torch.bfloat16)])
def test_rows_are_added_in_a_fixed_order(ids: str, width: int, dtype: torch.dtype) -> None:
    assert_rows_are_added(IDS[ids], width, dtype)


def test_adamw_refuses_tensors_that_have_moved() -> None:
    parameter, first, second = (torch.zeros(5) for _ in range(3))
    together = AdamWTensors([parameter], [first], [second], decays=[0.1])
    together.step([torch.ones(5)], step=1, lr=0.1)
    before = parameter.clone()
    parameter.data = parameter.data.clone()  # as Module.to or a loaded state dict with assign=True does
    with pytest.raises(RuntimeError, match="lies elsewhere in memory"):
        together.step([torch.ones(5)], step=2, lr=0.1)
    torch.testing.assert_close(parameter, before, rtol=0, atol=0)


def test_every_launch_fuses_products_and_sums() -> None:
    """Triton 3.10 no longer does so by itself: other bits, and slower."""
    package = Path(megarewarm_kernels.__file__).parent
    launches = [
        call
        for path in package.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Subscript)
        and isinstance(call.func.value, ast.Name)
        and not isinstance(call.func.slice, ast.Constant)
    ]
    assert len(launches) >= 15
    for call in launches:
        assert any(word.arg is None and ast.unparse(word.value) == "LAUNCH" for word in call.keywords), ast.unparse(call)
