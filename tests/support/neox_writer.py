"""GPT-NeoX checkpoint folders after the documented layout: a second writer, which shares no code with ours.

Weights come as a plain dictionary under GPT-NeoX's own numbered names, ``2.input_layernorm.weight`` and so on.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

Era = Literal["none", "fp16_flat", "bf16_unsharded", "modern", "modern_rigid", "bf16", "pythia", "pythia_rigid"]
LAYERS, HIDDEN, HEADS, VOCABULARY = 2, 32, 4, 32


@dataclass(frozen=True)
class Shape:
    """How a folder is written."""

    tensor: int = 1
    data: int = 1
    pipe: int = 1  # 0: everything in mp_rank files; 2: two stages
    legacy_mlp: bool = False
    era: Era = "modern"
    per_communication: int = 10**9  # elements; Pythia's DeeperSpeed cut the flat tensor into intervals of at most so many
    dtype: torch.dtype = torch.float16
    parallel_residual: bool = True
    tied: bool = False
    decays: bool = True  # without weight decay there is one group
    round_robin: bool = False  # parameters are dealt to the ranks before they are laid out
    alignment: int = 1  # elements to a multiple of which each parameter is padded


def whole_model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every parameter of a small model, in GPT-NeoX's order of registration."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    model = {"0.word_embeddings.weight": draw(VOCABULARY, HIDDEN)}
    for i in range(2, LAYERS + 2):
        model |= {
            f"{i}.input_layernorm.weight": draw(HIDDEN),
            f"{i}.input_layernorm.bias": draw(HIDDEN),
            f"{i}.post_attention_layernorm.weight": draw(HIDDEN),
            f"{i}.post_attention_layernorm.bias": draw(HIDDEN),
            f"{i}.attention.query_key_value.weight": draw(3 * HIDDEN, HIDDEN),
            f"{i}.attention.query_key_value.bias": draw(3 * HIDDEN),
            f"{i}.attention.dense.weight": draw(HIDDEN, HIDDEN),
            f"{i}.attention.dense.bias": draw(HIDDEN),
            f"{i}.mlp.linear1.weight": draw(4 * HIDDEN, HIDDEN),
            f"{i}.mlp.linear1.bias": draw(4 * HIDDEN),
            f"{i}.mlp.linear2.weight": draw(HIDDEN, 4 * HIDDEN),
            f"{i}.mlp.linear2.bias": draw(HIDDEN),
        }
    model[f"{LAYERS + 3}.norm.weight"], model[f"{LAYERS + 3}.norm.bias"] = draw(HIDDEN), draw(HIDDEN)
    model[f"{LAYERS + 4}.final_linear.weight"] = draw(VOCABULARY, HIDDEN)
    return model


def our_name(name: str) -> str:
    """What ``name`` is called in Hugging Face's GPT-NeoX, without its prefix."""
    number, rest = name.split(".", 1)
    rest = rest.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h")
    if number == "0":
        return "embed_in.weight"
    if int(number) == LAYERS + 4:
        return "embed_out.weight"
    return rest.replace("norm.", "final_layer_norm.") if int(number) == LAYERS + 3 else f"layers.{int(number) - 2}.{rest}"


def part(name: str, whole: Tensor, rank: int, ranks: int, *, divide: bool) -> Tensor:
    """Tensor rank ``rank``'s part. ``divide``: biases that all ranks add are divided by them."""
    cut_rows = ("word_embeddings", "final_linear", "query_key_value", "linear1")
    if any(key in name for key in cut_rows):
        return whole.chunk(ranks, 0)[rank].clone()
    if name.endswith(("attention.dense.weight", "linear2.weight")):
        return whole.chunk(ranks, 1)[rank].clone()
    if divide and name.endswith(("attention.dense.bias", "linear2.bias")):
        return whole / ranks
    return whole.clone()


def _set_scale(self: Any) -> None:
    self.cur_scale = 4096.0


@contextmanager
def foreign_classes() -> Iterator[tuple[type, type]]:
    """A loss scaler of a deepspeed module and one of a megatron module, which exist only while a file is pickled."""
    modules, classes = [], []
    for path in ("deepspeed.written_by_a_test", "megatron.written_by_a_test"):
        for name in (path.split(".")[0], path):
            if name not in sys.modules:
                sys.modules[name] = types.ModuleType(name)
                modules.append(name)
        classes.append(type("DynamicLossScaler", (), {"__module__": path, "__init__": _set_scale}))
        sys.modules[path].DynamicLossScaler = classes[-1]  # type: ignore[attr-defined]
    try:
        yield classes[0], classes[1]
    finally:
        for name in modules:
            del sys.modules[name]


def decays(name: str) -> bool:
    """GPT-NeoX's first parameter group; norms and biases are the second."""
    return not (name.endswith(".bias") or "layernorm" in name or ".norm." in name)


def write(
    save: Path, shape: Shape, weights: dict[str, Tensor], masters: dict[str, Tensor], moments: tuple[dict[str, Tensor], ...]
) -> Path:
    """Write ``save/global_step7`` and ``save/latest``. ``masters``: fp32; ``moments``: exp_avg and exp_avg_sq, fp32."""
    folder = save / "global_step7"
    (folder / "configs").mkdir(parents=True)
    (save / "latest").write_text("global_step7")
    settings = {
        "num-layers": LAYERS,
        "hidden-size": HIDDEN,
        "num-attention-heads": HEADS,
        "seq-length": 8,
        "max-position-embeddings": 8,
        "pos-emb": "rotary",
        "rotary-pct": 0.25,
        "no-weight-tying": not shape.tied,
        "gpt-j-residual": shape.parallel_residual,
        "bias-gelu-fusion": True,
        "train_batch_size": 4,
    }
    (folder / "configs" / "model.yml").write_text(yaml.safe_dump(settings))
    stages = max(shape.pipe, 1)
    names = list(weights)
    border = LAYERS // 2 + 2  # the first module of the second stage

    def stage_of(name: str) -> int:
        return int(stages == 2 and int(name.split(".")[0]) >= border)

    for rank in range(shape.tensor):
        parts = {
            name: part(name, whole.to(shape.dtype), rank, shape.tensor, divide=shape.parallel_residual)
            for name, whole in weights.items()
        }
        if shape.pipe:
            for number in sorted({int(name.split(".")[0]) for name in names}):
                inside = {name.split(".", 1)[1]: t for name, t in parts.items() if name.startswith(f"{number}.")}
                if 2 <= number < LAYERS + 2:
                    inside["attention.rotary_emb.inv_freq"] = torch.ones(1)
                torch.save(_mlp(inside, shape), folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
            if shape.tied:
                again = {"word_embeddings.weight": parts["0.word_embeddings.weight"]}
                torch.save(again, folder / f"layer_{LAYERS + 4:02d}-model_{rank:02d}-model_states.pt")
        for stage in range(stages):
            mine = [name for name in names if stage_of(name) == stage]
            model_rank = stage * shape.tensor + rank
            _write_rank(folder, shape, model_rank, rank, mine, parts, masters, moments)
    return folder


def _mlp(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    if not shape.legacy_mlp:
        return tensors
    return {n.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h"): t for n, t in tensors.items()}


def _write_rank(folder, shape, model_rank, rank, names, parts, masters, moments) -> None:
    stage = int(shape.pipe == 2 and model_rank >= shape.tensor)
    if shape.tied and stage:
        names = ["0.word_embeddings.weight", *names]  # DeepSpeed registers tied modules first
    groups = [[n for n in names if decays(n)], [n for n in names if not decays(n)]] if shape.decays else [list(names)]
    if shape.round_robin:
        groups = [[n for first in range(shape.data) for n in group[first :: shape.data]] for group in groups]
    paddings = [[-parts[n].numel() % shape.alignment for n in group] for group in groups]
    prefix = "" if shape.pipe else "sequential."
    shapes = [_mlp({prefix + n: parts[n].shape for n in group}, shape) for group in groups]
    flat_masters, flat_first, flat_second = (
        [
            torch.cat(
                [
                    torch.nn.functional.pad(part(n, source[n], rank, shape.tensor, divide=divide).flatten(), (0, padding))
                    for n, padding in zip(group, padded, strict=True)
                ]
            )
            for group, padded in zip(groups, paddings, strict=True)
        ]
        for source, divide in ((masters, shape.parallel_residual), (moments[0], False), (moments[1], False))
    )
    with foreign_classes() as (scaler, old_scaler):
        client: dict[str, Any] = {
            "module": None if shape.pipe else _mlp({f"sequential.{n}": parts[n] for n in names}, shape),
            "optimizer": None,
            "lr_scheduler": {
                "start_lr": 3e-4,
                "warmup_iter": 1.43,
                "num_iters": 6,
                "decay_style": "cosine",
                "end_iter": 143,
                "min_lr": 3e-5,
            },
            "iteration": 7,
            "global_steps": 7,
            "global_samples": 28,
            "skipped_steps": 1,
            "dp_world_size": shape.data,
            "mp_world_size": shape.tensor,
            "args": {"num_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 8},
            "random_rng_state": (3, (1, 2, 3), None),
        }
        if shape.era == "none":
            client["optimizer"] = _torch_form(flat_first, flat_second, groups, parts, cut=True)
        elif shape.era == "fp16_flat":
            inner = _torch_form(flat_first, flat_second, [[None] for _ in groups], None, cut=False)
            client["optimizer"] = {"optimizer_state_dict": inner, "fp32_groups_flat": flat_masters, "clip_grad": 1.0}
            client["optimizer"] |= {"dynamic_loss_scale": True, "cur_scale": 4096.0, "cur_iter": 7}
        elif shape.era == "bf16_unsharded":
            masters_, first, second = flat_masters, flat_first, flat_second
            client["optimizer"] = _bf16_unsharded(shape, 0, masters_, first, second, groups, parts)
        elif not shape.era.startswith("pythia"):
            client["param_shapes"] = shapes
        torch.save(client, folder / f"mp_rank_{model_rank:02d}_model_states.pt")
        for data_rank in range(shape.data) if shape.era not in ("none", "fp16_flat") else ():
            if shape.era.startswith("pythia"):
                content = _pythia(shape, data_rank, flat_masters, flat_first, flat_second, shapes, old_scaler())
            elif shape.era == "bf16_unsharded":
                state = _bf16_unsharded(shape, data_rank, flat_masters, flat_first, flat_second, groups, parts)
                content = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}
            else:
                content = _modern(shape, data_rank, flat_masters, flat_first, flat_second, scaler())
                content["optimizer_state_dict"]["param_alignment_paddings"] = paddings
            name = f"zero_pp_rank_{data_rank}_mp_rank_{model_rank:02d}_optim_states.pt"
            torch.save(content, folder / ("bf16_" * shape.era.startswith("bf16") + name))


def _torch_form(first, second, groups, parts, *, cut) -> dict[str, Any]:
    state, param_groups, number = {}, [], 0
    for group, names in enumerate(groups):
        held, position = [], 0
        for name in names if cut else [None]:
            size = parts[name].numel() if cut else first[group].numel()
            pieces = [flat[group][position : position + size] for flat in (first, second)]
            if cut:
                pieces = [piece.view(parts[name].shape) for piece in pieces]
            # DeepSpeed's FusedAdam counts on the last parameter of a group alone
            step = 6 if name == names[-1] else 0
            state[number] = {"step": step, "exp_avg": pieces[0].clone(), "exp_avg_sq": pieces[1].clone()}
            held.append(number)
            number, position = number + 1, position + size
        param_groups.append({"params": held, "lr": 1e-4, "step": 0})
    return {"state": state, "param_groups": param_groups}


def _bf16_unsharded(shape, data_rank, masters, first, second, groups, parts) -> dict[str, Any]:
    """DeepSpeed's BF16_Optimizer, which names the parameters of each partition where ZeRO is off."""
    mine = [[_share(flat, data_rank, shape.data) for flat in source] for source in (masters, first, second)]
    maps = []
    for flat, group in zip(masters, groups, strict=True):
        size, begin, held = math.ceil(flat.numel() / shape.data), 0, {}
        for name in group:
            end = begin + parts[name].numel()
            if begin < (data_rank + 1) * size and end > data_rank * size:
                held[name] = {"numel": end - begin, "start": begin - data_rank * size}
            begin = end
        maps.append(held)
    return {
        "base_optimizer_state": _torch_form(mine[1], mine[2], [[None] for _ in groups], None, cut=False),
        "single_partition_of_fp32_groups": mine[0],
        "partition_count": [shape.data] * len(groups),
        "param_slice_mappings": maps,
        "ds_version": "0.19.8",
    }


def _share(flat: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's partition, its padding removed."""
    size = math.ceil(flat.numel() / ranks)
    return flat[rank * size : (rank + 1) * size].clone()


def _modern(shape, rank, masters, first, second, scaler) -> dict[str, Any]:
    mine = [[_share(flat, rank, shape.data) for flat in source] for source in (masters, first, second)]
    if shape.era == "modern_rigid":
        base: Any = _torch_form(mine[1], mine[2], [[None] for _ in mine[1]], None, cut=False)
    else:
        base = [{"exp_avg": a, "exp_avg_sq": b, "step": 6} for a, b in zip(mine[1], mine[2], strict=True)]
    return {
        "optimizer_state_dict": {
            "loss_scaler": scaler,
            "dynamic_loss_scale": shape.dtype == torch.float16,
            "overflow": False,
            "clip_grad": 1.0,
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": mine[0],
            "zero_stage": 1,
            "base_optimizer_state_step": 0,  # of the group, which FusedAdam never raises
            "partition_count": [shape.data] * len(mine[0]),
            "ds_version": "0.16.5",
        },
        "ds_config": {},
        "ds_version": "0.16.5",
    }


def _pythia(shape, rank, masters, first, second, shapes, scaler) -> dict[str, Any]:
    """Sub-partition j of an interval belongs to rank j mod dp; it has ceil(n / dp) elements, or what an interval allows."""

    def cut(flat: Tensor) -> list[Tensor]:
        size = math.ceil(flat.numel() / shape.data)
        if size > shape.per_communication // shape.data:
            size = max(1, shape.per_communication // shape.data)
        intervals = math.ceil(flat.numel() / (size * shape.data))
        return [flat[(c * shape.data + rank) * size : (c * shape.data + rank + 1) * size].clone() for c in range(intervals)]

    mine = [[cut(flat) for flat in source] for source in (masters, first, second)]
    if shape.era == "pythia_rigid":
        state, groups, number = {}, [], 0
        for a_group, b_group in zip(mine[1], mine[2], strict=True):
            held = []
            for a, b in zip(a_group, b_group, strict=True):
                state[number] = {"step": 6, "exp_avg": a, "exp_avg_sq": b}
                held.append(number)
                number += 1
            groups.append({"params": held})
        base: Any = {"state": state, "param_groups": groups}
    else:
        base = [
            [{"exp_avg": a, "exp_avg_sq": b, "step": 6} for a, b in zip(a_group, b_group, strict=True)]
            for a_group, b_group in zip(mine[1], mine[2], strict=True)
        ]
    return {
        "optimizer_state_dict": {
            "loss_scaler": scaler,
            "dynamic_loss_scale": True,
            "overflow": False,
            "base_optimizer_state": base,
            "zero_stage": 1,
            "partition_count": shape.data,
            "num_comm_intervals_per_group": [len(group) for group in mine[0]],
            "local_sub_partitions_of_fp32_groups": mine[0],
        },
        "param_shapes": {name: size for group in shapes for name, size in group.items()},
    }
