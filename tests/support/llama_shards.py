"""Files of GPT-NeoX and Megatron-LM of Llama-like models, made from transformers' state dictionaries: how each program lays
queries, keys, values, gate and up out, by index arithmetic that shares no code with ours."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Heads:
    """Of a model: queries, keys, and channels of each."""

    queries: int
    keys: int
    channels: int


def _share(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    size = tensor.shape[0] // ranks
    return tensor[rank * size : (rank + 1) * size]


def neox_attention(q: Tensor, k: Tensor, v: Tensor, heads: Heads, rank: int, ranks: int, *, old: bool = False) -> Tensor:
    """A tensor rank's query_key_value: head by head without groups; else all queries, all keys, all values; with ``old`` the
    keys and values cut into as many slices as there are query heads."""
    q, k, v = (_share(each, rank, ranks) for each in (q, k, v))
    if heads.queries != heads.keys and not old:
        return torch.cat([q, k, v])
    count = heads.queries // ranks
    rows = []
    for head in range(count):
        for each in (q, k, v):
            size = len(each) // count
            rows.append(each[head * size : (head + 1) * size])
    return torch.cat(rows)


def megatron_attention(q: Tensor, k: Tensor, v: Tensor, heads: Heads, rank: int, ranks: int) -> Tensor:
    """A tensor rank's linear_qkv: of each group its queries, its key, its value."""
    d, group, rows = heads.channels, heads.queries // heads.keys, []
    for key in range(rank * heads.keys // ranks, (rank + 1) * heads.keys // ranks):
        rows += [q[key * group * d : (key + 1) * group * d], k[key * d : (key + 1) * d], v[key * d : (key + 1) * d]]
    return torch.cat(rows)


@dataclass(frozen=True)
class Neox:
    """How a folder of GPT-NeoX is written. ``names``: of the MLP; w: w1, w2, w3 of versions up to 2024."""

    tensor: int = 1
    pipe: int = 1
    names: Literal["linear", "w"] = "linear"
    settings: dict[str, Any] = field(default_factory=dict)


def neox_parts(state: State, heads: Heads, layers: int, rank: int, shape: Neox) -> State:
    """A tensor rank's parameters under GPT-NeoX's numbered names, in its order of registration."""
    ranks, found = shape.tensor, {"0.word_embeddings.weight": _share(state["model.embed_tokens.weight"], rank, shape.tensor)}
    for i in range(layers):
        theirs, ours = f"model.layers.{i}.", f"{i + 2}."
        found[f"{ours}input_layernorm.scale"] = state[f"{theirs}input_layernorm.weight"]
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" in state:
                q, k, v = (state[f"{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv")
                fused = neox_attention(q, k, v, heads, rank, ranks, old=shape.names == "w")
                found[f"{ours}attention.query_key_value.{kind}"] = fused
        found[f"{ours}attention.dense.weight"] = _share(state[f"{theirs}self_attn.o_proj.weight"].T, rank, ranks).T
        if f"{theirs}self_attn.o_proj.bias" in state:
            found[f"{ours}attention.dense.bias"] = state[f"{theirs}self_attn.o_proj.bias"]
        found[f"{ours}post_attention_layernorm.scale"] = state[f"{theirs}post_attention_layernorm.weight"]
        down = _share(state[f"{theirs}mlp.down_proj.weight"].T, rank, ranks).T
        for kind in ("weight", "bias"):
            if f"{theirs}mlp.gate_proj.{kind}" not in state:
                continue
            gate, up = (_share(state[f"{theirs}mlp.{x}_proj.{kind}"], rank, ranks) for x in ("gate", "up"))
            if shape.names == "w":
                found |= {f"{ours}mlp.w1.{kind}": gate, f"{ours}mlp.w3.{kind}": up}
            else:
                found[f"{ours}mlp.linear1.{kind}"] = torch.cat([up, gate])
        found[f"{ours}mlp.{'w2' if shape.names == 'w' else 'linear2'}.weight"] = down
        if f"{theirs}mlp.down_proj.bias" in state:
            found[f"{ours}mlp.linear2.bias"] = state[f"{theirs}mlp.down_proj.bias"]
    found[f"{layers + 3}.norm.scale"] = state["model.norm.weight"]
    if "lm_head.weight" in state:
        found[f"{layers + 4}.final_linear.weight"] = _share(state["lm_head.weight"], rank, ranks)
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def write_neox(
    save: Path,
    shape: Neox,
    state: State,
    heads: Heads,
    layers: int,
    moments: tuple[State, ...] | None = None,
    data: int = 1,
    stages: int = 0,
) -> Path:
    """``save/global_step7`` of weights, and with ``moments`` (exp_avg, exp_avg_sq, masters) ZeRO's files of ``data`` ranks;
    with ``stages`` the optimizer of that many pipeline stages without ZeRO, in the files of the ranks."""
    folder = save / "global_step7"
    (folder / "configs").mkdir(parents=True)
    (save / "latest").write_text("global_step7")
    if shape.settings:
        (folder / "configs" / "model.yml").write_text(yaml.safe_dump(shape.settings))
    for rank in range(shape.tensor):
        parts = neox_parts(state, heads, layers, rank, shape)
        for number in sorted({int(name.split(".")[0]) for name in parts}) if shape.pipe else ():
            inside = {name.split(".", 1)[1]: tensor for name, tensor in parts.items() if name.startswith(f"{number}.")}
            torch.save(inside, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
        module = None if shape.pipe else {f"sequential.{name}": tensor for name, tensor in parts.items()}
        client: dict[str, Any] = {"module": module, "optimizer": None, "iteration": 7, "global_steps": 7, "global_samples": 28}
        prefix = "" if shape.pipe else "sequential."
        decays = [name for name in parts if not name.endswith((".bias", ".scale"))]
        groups = [decays, [name for name in parts if name not in decays]]
        for stage in range(stages if moments is not None else 0):
            assert moments is not None
            border = layers // 2 + 2
            mine = [[n for n in group if stages == 1 or (int(n.split(".")[0]) >= border) == stage] for group in groups]
            own = client | {"optimizer": _without_zero(mine, [neox_parts(m, heads, layers, rank, shape) for m in moments[:2]])}
            torch.save(own, folder / f"mp_rank_{stage * shape.tensor + rank:02d}_model_states.pt")
        if stages:
            continue
        if moments is not None:
            client["param_shapes"] = [{prefix + name: parts[name].shape for name in group} for group in groups]
        torch.save(client, folder / f"mp_rank_{rank:02d}_model_states.pt")
        if moments is None:
            continue
        each = [neox_parts(one, heads, layers, rank, shape) for one in moments]
        flat = [[torch.cat([one[name].flatten() for name in group]) for group in groups] for one in each]
        for data_rank in range(data):
            split = [[part.tensor_split(data)[data_rank].clone() for part in one] for one in flat]
            optimizer = {
                "base_optimizer_state": [
                    {"exp_avg": a, "exp_avg_sq": b, "step": 6} for a, b in zip(split[0], split[1], strict=True)
                ],
                "single_partition_of_fp32_groups": split[2],
                "partition_count": [data] * len(groups),
                "zero_stage": 1,
            }
            name = f"zero_pp_rank_{data_rank}_mp_rank_{rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": optimizer}, folder / name)
    return folder


def _without_zero(groups: list[list[str]], moments: list[State]) -> dict[str, Any]:
    names = [name for group in groups for name in group]
    state = {i: {"step": 6, "exp_avg": moments[0][name], "exp_avg_sq": moments[1][name]} for i, name in enumerate(names)}
    return {"state": state, "param_groups": [{"params": [names.index(name) for name in group]} for group in groups]}


def write_megatron(
    place: Path, state: State, heads: Heads, layers: int, args: dict[str, Any], *, tensor: int = 1, pipeline: int = 1
) -> Path:
    """``place/iter_0000005`` with the names of Megatron core, and the file that names it."""
    folder = place / "iter_0000005"
    for stage in range(pipeline):
        for rank in range(tensor):
            found: State = {}
            if stage == 0:
                found["embedding.word_embeddings.weight"] = _share(state["model.embed_tokens.weight"], rank, tensor)
            for here, i in enumerate(range(stage * layers // pipeline, (stage + 1) * layers // pipeline)):
                theirs, ours = f"model.layers.{i}.", f"decoder.layers.{here}."
                for kind in ("weight", "bias"):
                    if f"{theirs}self_attn.q_proj.{kind}" in state:
                        q, k, v = (state[f"{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv")
                        found[f"{ours}self_attention.linear_qkv.{kind}"] = megatron_attention(q, k, v, heads, rank, tensor)
                    if f"{theirs}mlp.gate_proj.{kind}" in state:
                        halves = [_share(state[f"{theirs}mlp.{x}_proj.{kind}"], rank, tensor) for x in ("gate", "up")]
                        found[f"{ours}mlp.linear_fc1.{kind}"] = torch.cat(halves)
                for their, our in (("self_attn.o_proj", "self_attention.linear_proj"), ("mlp.down_proj", "mlp.linear_fc2")):
                    found[f"{ours}{our}.weight"] = _share(state[f"{theirs}{their}.weight"].T, rank, tensor).T
                    if f"{theirs}{their}.bias" in state:
                        found[f"{ours}{our}.bias"] = state[f"{theirs}{their}.bias"]
                found[f"{ours}self_attention.linear_qkv.layer_norm_weight"] = state[f"{theirs}input_layernorm.weight"]
                found[f"{ours}mlp.linear_fc1.layer_norm_weight"] = state[f"{theirs}post_attention_layernorm.weight"]
                for x in "qk":
                    if f"{theirs}self_attn.{x}_norm.weight" in state:
                        found[f"{ours}self_attention.{x}_layernorm.weight"] = state[f"{theirs}self_attn.{x}_norm.weight"]
            if stage == pipeline - 1:
                found["decoder.final_layernorm.weight"] = state["model.norm.weight"]
                if "lm_head.weight" in state:
                    found["output_layer.weight"] = _share(state["lm_head.weight"], rank, tensor)
            content = {
                "args": argparse.Namespace(**args),
                "checkpoint_version": 3.0,
                "iteration": 5,
                "model": {name: each.contiguous().clone() for name, each in found.items()},
            }
            target = folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            target.mkdir(parents=True)
            torch.save(content, target / "model_optim_rng.pt")
    (place / "latest_checkpointed_iteration.txt").write_text("5")
    return folder
