"""Readers of files from elsewhere, each as a function of a folder and any bytes: they are read, or refused in one clear line.

The property tests and the fuzzer share them. ``seeds`` gives right files to begin from, ``WORDS`` what is worth putting in.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megarewarm.checkpoint.foreign.families import model_type_of
from megarewarm.checkpoint.foreign.huggingface import HuggingFaceWeights, read_model_config
from megarewarm.checkpoint.foreign.neox_folder import find as find_neox
from megarewarm.checkpoint.foreign.pickles import read_pickle
from megarewarm.checkpoint.own.integrity import find_damage
from megarewarm.checkpoint.own.state import read_state
from megarewarm.checkpoint.own.store import stored_tensors
from megarewarm.checkpoint.own.tensor_index import read_index
from megarewarm.config.experiment import is_experiment, load_experiment
from megarewarm.config.load import dump, read_configs, validate
from megarewarm.config.neox_read import neox_files
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.laws.arms import read_trained
from megarewarm.model.parameters import cards
from megarewarm.record.follow import Follower
from megarewarm.record.run import read_run
from megarewarm.record.values import Values
from megarewarm.report.live.watch import planned_runs
from megarewarm.report.numbers.experiment import read_experiment
from megarewarm.report.numbers.values import predictions, source_values
from megarewarm.rewarm.neox_start import load_neox
from tests.support.tiny import write_tokens

ROOT = Path(__file__).resolve().parents[2]
OLD_RUN = ROOT / "tests" / "fixtures" / "format_1" / "run" / "checkpoints" / "step_4"
Reader = Callable[[Path, bytes], object]


def refused(error: UserError) -> str:
    """The words of a refusal: lines of text, one for each problem, and no sign that a terminal would obey."""
    text = str(error)
    assert text and all(line and line.isprintable() for line in text.split("\n")), repr(text)
    return text


def one_line(read: Callable[[], object]) -> object:
    """What ``read`` gives, or None where it refuses in one line."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in refused(error), repr(str(error))
        return None


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def index(folder: Path, data: bytes) -> None:
    """The index of tensors, ``.metadata``: every tensor in it is whole, and lies in files of its folder."""
    try:
        found = read_index(io.BytesIO(data))
    except pickle.UnpicklingError as error:
        assert "\n" not in str(error)
        return
    assert all("/" not in place.relative_path for place in found.storage_data.values())


def checkpoint(folder: Path, data: bytes) -> None:
    """A checkpoint one of whose small files is ``data``: the first byte says which."""
    if not data:
        return
    name, read = _FILES[data[0] % len(_FILES)]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data[1:])
    try:
        one_line(lambda: read(folder))
    finally:
        path.unlink()


def _damage(folder: Path) -> None:
    damage = find_damage(folder, alone=True)
    assert damage is None or ("\n" not in damage and damage.startswith(str(folder)))


_FILES: list[tuple[str, Callable[[Path], object]]] = [
    ("state.json", read_state),
    ("SHA256SUMS", _damage),
    (".metadata", stored_tensors),
    ("config.json", read_model_config),
    ("model.safetensors.index.json", lambda folder: HuggingFaceWeights(folder).describe()),
    ("latest", find_neox),
]


def safetensors(folder: Path, data: bytes) -> None:
    """Weights of a Hugging Face folder. The library's own checks are not ours to test: no crash, and one line."""
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(json.dumps(_MODEL if b"gpt_neox" in data else _LLAMA))

    def read() -> None:
        weights = HuggingFaceWeights(folder)
        for name, described in weights.describe().items():
            assert tuple(weights.read(name).shape) == described.shape

    try:
        one_line(read)
    finally:
        (folder / "config.json").unlink()


def pickles(folder: Path, data: bytes) -> None:
    """A PyTorch file: the bytes as they are, or (an odd first byte) as the pickle in an archive."""
    if not data:
        return
    path = folder / "x.pt"
    if data[0] % 2:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data[1:])
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/data/0", bytes(64))
    else:
        path.write_bytes(data[1:])
    one_line(lambda: read_pickle(path))


# ---- configurations -------------------------------------------------------------------------------------------------


def config(folder: Path, data: bytes) -> None:
    """A configuration of ours, a run's or an experiment's, as launch.sh reads it; what is accepted is read again."""
    path = folder / "x.yml"
    path.write_bytes(data)
    try:
        mapping, origins = read_configs([str(path)])
        if is_experiment(mapping):
            for arm in load_experiment(mapping, origins).arms:
                assert validate(RunConfig, *_again(folder, arm.config)) == arm.config
            return
        run = validate(RunConfig, mapping, origins)
    except UserError as error:
        refused(error)
        return
    assert validate(RunConfig, *_again(folder, run)) == run


def _again(folder: Path, run: RunConfig) -> tuple[dict[str, object], dict[tuple[str, ...], str]]:
    (folder / "again.yml").write_text(dump(run), encoding="utf-8")
    return read_configs([str(folder / "again.yml")])


def neox(folder: Path, data: bytes) -> None:
    """A configuration of GPT-NeoX, translated."""
    path = folder / "x.yml"
    path.write_bytes(data)
    if not (folder / "d.idx").exists():
        write_tokens(folder / "d", 1, documents=3)
    try:
        if files := neox_files([str(path)]):
            load_neox(files, [], 1)
    except UserError as error:
        refused(error)


# ---- runs of others -------------------------------------------------------------------------------------------------


def runs(folder: Path, data: bytes) -> None:
    """experiment.json, metrics.jsonl or config.yaml as report, watch and advisor read them: the first byte says which."""
    if not data:
        return
    name = ("experiment.json", "r/metrics.jsonl", "r/config.yaml", "r/values.jsonl")[data[0] % 4]
    run = folder / "r"
    run.mkdir(exist_ok=True)
    (folder / "experiment.json").write_text(_RECORD)
    (run / "metrics.jsonl").write_text(_METRICS)
    (run / "config.yaml").write_text("name: r\n")
    (run / "values.jsonl").write_text(_VALUES)
    (folder / name).write_bytes(data[1:])

    def follow() -> object:
        follower = Follower(run / "metrics.jsonl")
        follower.poll()
        assert follower.damage is None or "\n" not in follower.damage
        return follower.losses("upstream"), follower.seconds_per_step(), follower.tokens_per_step(), follower.total_steps

    one_line(lambda: predictions(read_run(run)))
    one_line(lambda: source_values(values := Values(run), values.sets))
    one_line(follow)
    for reader in (read_experiment, read_trained, planned_runs):
        one_line(lambda reader=reader: reader(folder))  # type: ignore[misc]


# ---- what to begin from ---------------------------------------------------------------------------------------------

READERS: dict[str, Reader] = {
    "index": index,
    "checkpoint": checkpoint,
    "safetensors": safetensors,
    "pickles": pickles,
    "config": config,
    "neox": neox,
    "runs": runs,
}

_RECORD = json.dumps({
    "format": 1, "experiment": "e", "title": None,
    "runs": [{"name": "r", "arm": "r", "seed": None, "group": "g", "groups": {"g": {"x": 1}}, "axes": {"x": 1}, "chain": None,
              "stage": None, "folder": "r", "after": [], "steps": 2, "tokens_per_step": 8}],
})  # fmt: skip
_METRICS = """\
{"event":"start","format":1,"time":1.0,"name":"r","folder":"r","from":"up","step":0,"total_steps":2,"tokens_per_step":8}
{"event":"eval","time":1.1,"step":0,"tokens":0,"name":"old","role":"upstream","loss":3.7,"over":128}
{"event":"train","time":1.2,"step":1,"tokens":8,"loss":3.5,"lr":0.001,"grad_norm":1.2,"tokens_per_second":904.0}
{"event":"train","time":1.3,"step":2,"tokens":16,"loss":3.4,"lr":0.001,"grad_norm":1.2,"tokens_per_second":904.0}
{"event":"resume","time":1.4,"step":1}
{"event":"value","time":1.4,"step":2,"tokens":16,"name":"old","sources":{"a":0.1},"rows":{"a":1},"predicted":0.1,"measured":0.2}
{"event":"eval","time":1.5,"step":2,"tokens":16,"name":"old","role":"upstream","loss":3.6,"over":128}
{"event":"stop","time":1.6,"step":2,"reason":"complete"}
"""
_VALUES = """\
{"step":1,"position":0,"source":"a","path":"a.bin","sample":3,"parts":[[0,2,4],[1,0,5]],"values":{"old":0.5},"tokens":[1,2]}
{"step":2,"position":9,"source":"b","path":"b.bin","sample":0,"parts":[[7,0,9]],"values":{"old":null}}
"""

_MODEL = {
    "model_type": "gpt_neox", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 16, "rotary_pct": 0.5, "hidden_act": "gelu",
}  # fmt: skip
_LLAMA = {
    "model_type": "smollm3", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12, "vocab_size": 16, "max_position_embeddings": 32, "no_rope_layers": [1], "rope_theta": 1e4,
    "layer_types": ["sliding_attention"], "use_sliding_window": True, "sliding_window": 4, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32},
}  # fmt: skip
_LLAMA3 = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "vocab_size": 16, "head_dim": 4, "attention_bias": False, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5,
    "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8},
}  # fmt: skip
_QWEN2 = {
    "model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12, "vocab_size": 16, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
}  # fmt: skip
_RUN = """\
name: a
model: {num_layers: 1, hidden_size: 8, num_heads: 2, vocab_size: 32, max_positions: 16, rotary_fraction: 0.5}
data:
  sequence_length: 16
  train: &t [{path: x, weight: 0.5}, {path: y, weight: 2}]
  validation: [{name: v, role: upstream, tokens: 1e3, sources: *t}]
schedule: {curve: cosine, max_lr: 3e-4, min_lr: 3e-5, warmup: 1%}
training: {budget: 40 steps, global_batch: 4, micro_batch: 4}
"""
_EXPERIMENT = """\
experiment: e
seeds: [1, 2]
base:
  model: {num_layers: 1, hidden_size: 8, num_heads: 2, vocab_size: 32, max_positions: 16, rotary_fraction: 0.5}
  data: {sequence_length: 16, train: [{path: "${folder}/data"}]}
  schedule: {curve: cosine, max_lr: 3e-4, min_lr: 0}
  training: {budget: 40, global_batch: 4, micro_batch: 4}
runs: [{name: up}, {name: chain, start: {from: "${runs}/up@50%"}, stages: [{name: a}, {name: b, training: {budget: 8}}]}]
sweeps: [{name: s, axes: {schedule.max_lr: [1e-3, 2e-3], wide: {more: {model: {hidden_size: 16}}}}, with: [up]}]
quick: {length: 0.5}
"""
_NEOX = """\
{"pipe_parallel_size": 0, "num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16,
 "max_position_embeddings": 16, "pos_emb": "rotary", "rotary_pct": 0.5, "no_weight_tying": true, "gpt_j_residual": true,
 "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8}}, "min_lr": 0.00006,
 "train_micro_batch_size_per_gpu": 4, "train-iters": 10, "lr-decay-iters": 10, "lr_decay_style": "cosine", "warmup": 0.01,
 "data_path": "d", "tokenizer_type": "CharLevelTokenizer",
 "split": "969,30,1", "make_vocab_size_divisible_by": 8, "save": "out", "fp16": {"enabled": false}}
"""
_NEOX_LLAMA = (
    _NEOX.replace('"rotary_pct": 0.5', '"rotary_pct": 1')
    .replace('"gpt_j_residual": true', '"norm": "rmsnorm"')
    .replace(
        '"num_layers"',
        '"activation": "swiglu", "num_kv_heads": 1, "mlp_multiple_of": 8, "rms_norm_epsilon": 1.0e-6, "num_layers"',
    )
)


def _packed(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _inner_pickle(value: object) -> bytes:
    with zipfile.ZipFile(io.BytesIO(_packed(value))) as archive:
        return archive.read("archive/data.pkl")


def _legacy(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _small_index() -> bytes:
    """An index of one tensor in two parts, by torch's own classes."""
    halves = [ChunkStorageMetadata(torch.Size([first, 0]), torch.Size([1, 3])) for first in (0, 1)]
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([2, 3]), halves)
    places = {MetadataIndex("a", half.offsets, i): _StorageInfo(f"__{i}_0.distcp", 0, 1600) for i, half in enumerate(halves)}
    return pickle.dumps(Metadata({"a": tensor}, {"a": ("a",)}, places, StorageMeta("x", "y"), "1"))


def _weights(raw: dict[str, object]) -> dict[str, torch.Tensor]:
    """All tensors of a config.json under their stored names, the first in bf16."""
    kind = model_type_of(Path("config.json"), raw)
    found: dict[str, torch.Tensor] = {}
    for name, card in cards(kind.read(Path("config.json"), raw)[0]).items():
        theirs = kind.stored(name)
        rows = (card.shape[0],) if card.interleaved is None or len(theirs) == 1 else card.interleaved.rows(card.shape[0])
        found |= {each: torch.ones(count, *card.shape[1:]) for each, count in zip(theirs, rows, strict=True)}
    first = next(iter(found))
    return found | {first: found[first].bfloat16()}


def seeds() -> dict[str, list[bytes]]:
    """Right files for each reader."""
    metadata = (OLD_RUN / ".metadata").read_bytes()
    state = (OLD_RUN / "state.json").read_bytes()
    values = {"a": torch.zeros(2, 3), "b": {"c": [1, 2.5, None, "x"]}}
    shards = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}).encode()
    return {
        "index": [_small_index(), metadata],
        "checkpoint": [
            *(bytes([0]) + text for text in (state, b"{}")),
            bytes([1]) + b"0" * 64 + b"  state.json\n",
            bytes([2]) + _small_index(),
            bytes([3]) + json.dumps(_MODEL).encode(),
            *(bytes([3]) + json.dumps(model).encode() for model in (_LLAMA, _LLAMA3, _QWEN2)),
            bytes([4]) + shards,
            bytes([5]) + b"global_step4\n",
        ],
        "safetensors": [
            *(save(_weights(model)) for model in (_MODEL, _LLAMA)),
            struct.pack("<Q", 2),
        ],
        "pickles": [b"\1" + _inner_pickle(values), b"\0" + _packed(values), b"\0" + _legacy(values)],
        "config": [_RUN.encode(), _EXPERIMENT.encode(), b"a: &a [*a]\n"],
        "runs": [b"\0" + _RECORD.encode(), b"\1" + _METRICS.encode(), b"\2name: r\nstart: {from: up}\n"],
        "neox": [_NEOX.encode(), _NEOX.replace("{", "").replace("}", "").encode(), _NEOX_LLAMA.encode()],
    }


WORDS = [
    *(b"..", b"../x", b"/etc/passwd", b"\0", b"\xff\xfe", b"\n", b"*t", b"&t ", b"<<: *t", b"!!set {}", b"!!binary x"),
    *(b"null", b"true", b"-1", b"0", b"1e400", b".inf", b".nan", b"9" * 30, b"1" * 5000, b"2001-99-99", b"0x", b"1:99:99"),
    *(
        b"[" * 300,
        b"{a: " * 200,
        b'"\\ud800"',
        b'"\\0"',
        b"'",
        b"''",
        b"${x}",
        b"${folder}",
        b"1%",
        b"1e-08",
        b"@50%",
        b"? [a]",
    ),
    *(
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**40),
        b"\x80\x02",
        b"cos\nsystem\n",
        b"R.",
        b"b.",
        b"\x93",
        b"(lp0\n",
        b".",
    ),
]
