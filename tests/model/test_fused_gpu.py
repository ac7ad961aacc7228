"""The fused model on a device against the plain one and float64: NeoX and Llama-like, whole rows and documents."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.config.execution import KernelsConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model.documents import DocumentRules
from megarewarm.model.fused import fuse
from megarewarm.model.operations import choose_operations
from megarewarm.model.transformer import Transformer
from tests.model.test_fused import losses_and_gradients
from tests.model.test_llama import pair as llama_pair
from tests.model.test_neox import VARIANTS
from tests.model.test_neox import pair as neox_pair
from tests.support.on_device import NEEDS_GPU

pytestmark = NEEDS_GPU

HEADS_OF_64: dict[str, dict[str, Any]] = {
    "pythia": {},
    "llama": {
        "family": "llama",
        "num_kv_heads": 2,
        "ffn_size": 344,
    },
}
LLAMAS = ("llama", "mistral", "qwen2, windows", "qwen3", "olmo2", "smollm3")


def model_of(name: str, folder: Path) -> Transformer:
    """On the CPU in fp32, no weight zero or one."""
    if name.startswith("heads of 64, "):
        shape = {"num_layers": 3, "hidden_size": 256, "num_heads": 4, "vocab_size": 1000, "max_positions": 300}
        torch.manual_seed(2)
        model = Transformer(ModelConfig(**shape | HEADS_OF_64[name.removeprefix("heads of 64, ")]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.08)
        return model
    return neox_pair(VARIANTS[name])[0] if name in VARIANTS else llama_pair(name, folder)[0]


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*VARIANTS, *LLAMAS, *(f"heads of 64, {name}" for name in HEADS_OF_64)])
def test_the_fused_model_is_no_worse_than_the_plain_one(name: str, precision: str, documents: bool, tmp_path: Path) -> None:
    model = model_of(name, tmp_path)
    random = torch.Generator().manual_seed(7)
    length = min(model.config.max_positions, 300) if name.startswith("heads") else 29
    tokens = torch.randint(5, model.config.vocab_size, (3, length + 1), generator=random)
    tokens[:, length // 3] = 0
    starts = DocumentRules(0, True, False).starts(tokens[:, :-1])
    assert starts is not None
    exact_more, more = ({"starts": starts.to(device)} if documents else {} for device in ("cpu", "cuda"))
    true, wanted = losses_and_gradients(deepcopy(model).double(), tokens, **exact_more)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    errors: dict[str, tuple[float, float]] = {}
    for use in ("reference", "triton"):
        side, device = deepcopy(model).to("cuda"), torch.device("cuda")
        operations, notes = choose_operations(
            KernelsConfig(use=use), model.config, device, dtype, length=length, documents=documents
        )
        if use == "triton":
            assert all("no two norms" in note for note in notes), notes
            fuse(side, operations)
        with torch.autocast("cuda", dtype, enabled=precision == "bf16"):
            loss, found = losses_and_gradients(side, tokens.to("cuda"), **more)
        squares = [float((found[key].cpu().double() - wanted[key]).square().sum()) for key in wanted]
        size = sum(float(gradient.square().sum()) for gradient in wanted.values())
        errors[use] = (sum(squares) / size) ** 0.5, abs(float(loss.detach()) - float(true.detach()))
    rounding = torch.finfo(dtype).eps
    assert errors["triton"][0] <= 2 * errors["reference"][0] + rounding, errors
    assert errors["triton"][1] <= 2 * errors["reference"][1] + rounding * abs(float(true.detach())), errors
