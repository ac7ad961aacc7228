"""Every fused operation on a device: the interpreter's own tests there, and sizes and repetitions that it is too slow for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megarewarm_kernels import AdamWTensors, adamw_, squared_norm

from tests.kernels.test_attention_interpreted import (  # noqa: F401  # collected here
    test_any_documents,
    test_backward_is_the_same_at_every_run,
    test_groups_and_windows_are_as_exact_as_torch,
    test_rotary_is_the_definition,
)
from tests.kernels.test_attention_interpreted import (
    test_nothing_is_read_or_written_outside_of_the_tensors as test_nothing_outside_is_read_or_written_by_attention,  # noqa: F401
)
from tests.kernels.test_interpreted import (  # noqa: F401
    test_adamw_is_torchs,
    test_adamw_over_many_tensors_is_torchs,
    test_adamw_refuses_tensors_that_have_moved,
    test_any_shape_and_strides,
    test_nothing_is_read_or_written_outside_of_the_tensors,
    test_offsets_beyond_two_to_the_31,
    test_rows_that_programs_share,
    test_sums_of_parts,
    test_the_squared_norm,
)
from tests.kernels.test_linear_distillation import (  # noqa: F401
    test_a_student_that_is_its_teacher_has_no_divergence_and_the_plain_gradient,
    test_every_chunking_gives_the_definition,
    test_rounding_is_no_worse_than_the_definitions,
)
from tests.kernels.test_loss_interpreted import (  # noqa: F401
    test_a_sure_answer_keeps_its_small_gradient,
    test_any_shape,
    test_guard_bands_around_the_arguments,
    test_the_passes_touch_nothing_but_their_rows,
    test_what_is_frozen_gets_no_gradient,
)
from tests.support.adamw_cases import SETTINGS
from tests.support.kernel_cases import CASES, PLAIN, arguments_of, assert_as_exact_as_torch, results
from tests.support.on_device import NEEDS_GPU, everything_on

pytestmark = NEEDS_GPU

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY = CASES | PLAIN


@pytest.fixture(autouse=True, scope="module")
def on_the_device() -> Iterator[None]:
    with everything_on("cuda"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (150, 257), (4099, 1000), (2051, 4096)])
def test_layers_are_as_exact_as_torch_and_the_same_twice(name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    arguments = arguments_of(EVERY[name], rows, columns, dtype)
    assert_as_exact_as_torch(EVERY[name], arguments)
    once, twice = (results(EVERY[name].ours, arguments) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("rows", "columns"), [(37, 260), (1027, 1536)])
def test_weights_in_fp32_beside_activations_in_half_precision(name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    """As the trainer calls them: against float64, errors are at most twice those of the definition."""
    case = EVERY[name]
    arguments = [x.detach() if x.dim() == 1 else x.detach().to(dtype) for x in arguments_of(case, rows, columns, torch.float32)]
    true = results(case.torch, [argument.double() for argument in arguments])
    ours, plain = (results(function, arguments) for function in (case.ours, case.definition))
    for number, (wanted, mine, other) in enumerate(zip(true, ours, plain, strict=True)):
        assert mine.dtype == other.dtype
        error, allowed = ((found.double() - wanted).norm() / wanted.norm() for found in (mine, other))
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 4, f"result {number}: {error:.3g}, the definition {allowed:.3g}"


def test_the_optimizer_and_the_norm_are_the_same_twice() -> None:
    sizes = [50_000_001, 1, 1_023, 4_097]
    random = torch.Generator().manual_seed(0)
    starts, gradients = ([torch.randn(size, generator=random) for size in sizes] for _ in range(2))

    def run() -> list[torch.Tensor]:
        parameters = [start.clone() for start in starts]
        moments = [[torch.zeros_like(start) for start in starts] for _ in range(2)]
        together = AdamWTensors(parameters, *moments, decays=[0.1] * len(sizes))
        for step in (1, 2, 3):
            together.step(gradients, step=step, lr=1e-3, scale=0.5)
        single = starts[0].clone()
        state = [torch.zeros_like(single) for _ in range(2)]
        adamw_(single, gradients[0], *state, step=1, scale=torch.tensor(0.5), **SETTINGS)
        return [*parameters, single, *(squared_norm(gradient) for gradient in gradients)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
