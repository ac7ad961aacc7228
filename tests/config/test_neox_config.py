"""GPT-NeoX's configurations: every key has a fate, translations obey its rules, and its recorded runs are followed."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer, GPT2TokenizerFast  # type: ignore[attr-defined]

from megarewarm.config import neox_blocks
from megarewarm.config.neox_document import neox_markdown
from megarewarm.config.neox_keys import HONOURED, NOT_APPLICABLE, ONLY, OVERWRITTEN, is_known
from megarewarm.config.neox_read import NeoxFile, neox_files, read_neox
from megarewarm.config.neox_translate import translate
from megarewarm.config.schedule import build_schedule
from megarewarm.config.schema import RunConfig
from megarewarm.data.text.tokenizers import train_bpe
from megarewarm.errors import UserError
from megarewarm.main import main
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.neox_start import load_neox, show_account
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.checkpoint.test_convert import tool
from tests.checkpoint.test_neox import written
from tests.support import neox_writer
from tests.support.distributed import run_ranks
from tests.support.tiny import events, printed, quiet, write_tokens

ROOT = Path(__file__).resolve().parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))

# The arguments that GPT-NeoX documents, by hand from its list.
DOCUMENTED = re.findall(
    r"\w+",
    """
pipe_parallel_size model_parallel_size pipe_partition_method sequence_parallel precision num_layers hidden_size
intermediate_size mlp_multiple_of expansion_factor num_attention_heads num_kv_heads seq_length sliding_window_width
max_position_embeddings norm layernorm_fusion rmsnorm_fusion use_qk_layernorm layernorm_epsilon rms_norm_epsilon
scalenorm_epsilon pos_emb rpe_num_buckets rpe_max_distance opt_pos_emb_offset no_weight_tying attention_config sparsity_config
num_unique_layers param_sharing_style make_vocab_size_divisible_by activation use_flashattn_swiglu
scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_gelu_fusion bias_dropout_fusion rope_fusion
fp16_lm_cross_entropy init_method_std apply_query_key_layer_scaling use_cpu_initialization attention_softmax_in_fp32
rotary_pct rotary_emb_base rotary_save_freqs_buffer init_method output_layer_init_method gmlp_attn_dim gpt_j_residual
gpt_j_tied use_bias_in_norms use_bias_in_attn_linear use_bias_in_mlp soft_prompt_tuning mamba_selective_scan_fusion
te_columnparallel output_layer_parallelism optimizer_type use_bnb_optimizer zero_stage zero_reduce_scatter
zero_contiguous_gradients zero_reduce_bucket_size zero_allgather_bucket_size lr lr_decay_style lr_decay_iters
lr_decay_fraction min_lr warmup override_lr_scheduler use_checkpoint_lr_scheduler use_wandb wandb_group wandb_run_name
wandb_team wandb_project wandb_host wandb_init_all_ranks log_dir tensorboard_dir use_comet comet_workspace
peak_theoretical_tflops log_interval log_grad_pct_zeros log_param_norm log_grad_norm log_optimizer_states
log_gradient_noise_scale gradient_noise_scale_n_batches gradient_noise_scale_cpu_offload memory_profiling
memory_profiling_path profile profile_step_start profile_step_stop tokenizer_type padded_vocab_size data_path use_shared_fs
train_data_paths valid_data_paths test_data_paths train_label_data_paths train_reward_data_paths pos_train_data_paths
neg_train_data_paths train_data_weights valid_data_weights test_data_weights weight_by_num_documents weighted_sampler_alpha
data_impl pack_impl dataset_impl train_impl dpo_beta kto_beta reinforce_leave_one_out z_loss allow_chopped mmap_warmup save
s3_path s3_chunk_size load checkpoint_validation_with_forward_pass checkpoint_scale checkpoint_factor extra_save_iters
no_save_optim no_save_rng no_load_optim no_load_rng finetune batch_size train_iters train_epochs eval_iters
keep_last_n_checkpoints eval_interval split vocab_file merge_file num_workers exit_interval attention_dropout hidden_dropout
weight_decay checkpoint_activations checkpoint_num_layers contiguous_checkpointing checkpoint_in_cpu synchronize_each_layer
partition_activations clip_grad hysteresis loss_scale_window min_scale char_level_ppl use_mup mup_width_scale text_gen_type
temperature top_p top_k maximum_tokens prompt_end sample_input_file sample_output_file num_samples recompute
eval_results_prefix eval_tasks train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler
fp32_allreduce prescale_gradients gradient_predivide_factor fp16 bf16 amp gradient_clipping zero_optimization
curriculum_learning steps_per_print wall_clock_breakdown flops_profiler autotuning activation_checkpointing sparse_attention
elasticity comms_logger checkpoint data_types deepspeed_extra_args hostfile include exclude num_nodes num_gpus master_port
master_addr launcher force_multi no_ssh_check comment account deepspeed_mpi deepspeed_slurm user_script seed eod_mask_loss
distributed_backend
""",
)

PYTHIA_410M = """\
{
  # parallelism settings
  "pipe-parallel-size": 1,
  "model-parallel-size": 1,
  "num-layers": 24,
  "hidden-size": 1024,
  "num-attention-heads": 16,
  "seq-length": 2048,
  "max-position-embeddings": 2048,
  "pos-emb": "rotary",
  "rotary-pct": 0.25,
  "no-weight-tying": true,
  "gpt-j-residual": true,
  "output-layer-parallelism": "column",
  "attention-config": [[["flash"], 24]],
  "scaled-upper-triang-masked-softmax-fusion": true,
  "bias-gelu-fusion": true,
  "init_method": "small_init",
  "output_layer_init_method": "wang_init",
  "optimizer": {"type": "Adam", "params": {"lr": 0.0003, "betas": [0.9, 0.95], "eps": 1.0e-8}},
  "min_lr": 0.00003,
  "zero_optimization": {
    "stage": 1, "allgather_partitions": true, "allgather_bucket_size": 500000000, "overlap_comm": true,
    "reduce_scatter": true, "reduce_bucket_size": 500000000, "contiguous_gradients": true, "cpu_offload": false
  },
  "train_micro_batch_size_per_gpu": 32,
  "data-impl": "mmap",
  "num_workers": 1,
  "checkpoint-activations": true,
  "checkpoint-num-layers": 1,
  "partition-activations": true,
  "synchronize-each-layer": true,
  "gradient_clipping": 1.0,
  "weight-decay": 0.1,
  "hidden-dropout": 0,
  "attention-dropout": 0,
  "fp16": {
    "fp16": true, "enabled": true, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 12, "hysteresis": 2,
    "min_loss_scale": 1
  },
  "train-iters": 143000,
  "lr-decay-iters": 143000,
  "distributed-backend": "nccl",
  "lr-decay-style": "cosine",
  "warmup": 0.01,
  "checkpoint-factor": 1000,
  "extra-save-iters": [0,1,2,4,8,16,32,64,128,256,512],
  "eval-interval": 143000,
  "eval-iters": 10,
  "log-interval": 10,
  "steps_per_print": 10,
  "wall_clock_breakdown": true,
  "tokenizer_type": "HFTokenizer"
}
"""
LOCAL = """\
{
  "data_path": "data/pile",
  "vocab-file": "20B_tokenizer.json",
  "padded_vocab_size": 50304,
  "save": "checkpoints/410m",
  "use_wandb": false,
}
"""

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "train_iters": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "padded_vocab_size": 64,
    "data_path": "data",
}


def as_file(values: dict[str, Any]) -> NeoxFile:
    return NeoxFile(values, {key: f"f.yml:{i}" for i, key in enumerate(values)}, {}, "f.yml")


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_every_documented_key_has_one_fate_and_a_line_in_the_docs() -> None:
    assert [key for key in DOCUMENTED if not is_known(key)] == []
    inside = (neox_blocks.HONOURED, neox_blocks.NOT_APPLICABLE, neox_blocks.ONLY)
    tables: list[set[str]] = [set(table) for table in (HONOURED, NOT_APPLICABLE, ONLY, OVERWRITTEN, *inside)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    page = (ROOT / "docs" / "neox_config.md").read_text()
    assert page == neox_markdown(), "run: python tools/document_config.py"
    assert all(f"`{key}`" in page for table in tables for key in table)


def test_pythia_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("410M.yml").write_text(PYTHIA_410M)
    Path("local.yml").write_text(LOCAL)
    files = neox_files(["410M.yml", "local.yml"])
    run, account = load_neox(files, ["logging.tensorboard=true"], 32)
    assert (run.training.global_batch, run.training.micro_batch, run.training.precision) == (1024, 32, "fp16")
    assert run.model is not None and run.model.activation == "gelu_tanh" and run.model.vocab_size == 50304
    assert run.schedule.max_lr == 3e-4 and run.steps(run.schedule.warmup) == 1430.0
    assert run.checkpoint.extra_steps == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert run.parallel.sharding == "zero2" and run.training.recompute == "full" and run.logging.tensorboard
    assert run.run_folder == "checkpoints/410m"
    said = Console(file=io.StringIO(), width=120)
    show_account(account, said)
    text = printed(said)
    keys = set(read_neox(files).values)
    fated = {key.partition(".")[0] for key in (*account.honoured, *account.not_applicable)}
    assert fated | (keys & set(ONLY)) == keys
    assert all(key in text for key in account.not_applicable)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"a.yml": {"num_layer": 2, "train_iters": 5}},
            r"a\.yml:\d+: num_layer: not a key.*, did you mean 'num_layers'",
        ),
        ({"a.yml": SMALL, "b.yml": {"seq-length": 8}}, r"b\.yml:1: 'seq_length' is given in a\.yml:\d+ as well"),
        ({"a.yml": SMALL | {"train-iters": 9}}, r"a\.yml:\d+: 'train_iters' is given in a\.yml"),
        ({"a.yml": SMALL | {"hidden_size": "32"}}, r"hidden_size: '32' is of type str, expected int"),
        ({"a.yml": SMALL | {"num_layers": True}}, r"num_layers: True is of type bool, expected int"),
        ({"a.yml": SMALL | {"hidden_dropout": 0.1}}, r"hidden_dropout: 0\.1 can't be honoured: there is no dropout"),
        ({"a.yml": SMALL | {"norm": "scalenorm"}}, r"norm: 'scalenorm' can't be honoured: only LayerNorm"),
        ({"a.yml": {k: v for k, v in SMALL.items() if k != "pos_emb"}}, r"'pos_emb' is missing: .*default is 'learned'"),
        ({"a.yml": SMALL | {"moe_num_experts": 8}}, r"moe_num_experts: 8 can't be honoured"),
        ({"a.yml": SMALL | {"train_impl": "dpo"}}, r"train_impl: 'dpo' can't be honoured: only next-token"),
        ({"a.yml": SMALL | {"no_load_optim": True}}, r"no_load_optim: True can't be honoured: GPT-NeoX trains nothing"),
        ({"a.yml": SMALL | {"curriculum_learning": {"enabled": True}}}, r"curriculum_learning"),
        ({"a.yml": SMALL | {"model": {"num_layers": 2}}}, r"'model' is a key of megarewarm and 'data_path' one of GPT-NeoX"),
        ({"a.yml": SMALL, "b.yml": {"name": "x", "training": {}}}, r"b\.yml: a config of megarewarm beside a\.yml"),
        ({"a.yml": SMALL | {"attention_config": [[["flash"], 3]]}}, r"describes 3 layers, num_layers is 2"),
        ({"a.yml": SMALL | {"attention_config": [[["local", "global"], "all"]]}}, r"'local' can't be honoured"),
        ({"a.yml": SMALL | {"attention_config": ["flash"]}}, r"'flash' is not of the form"),
        ({"a.yml": SMALL | {"optimizer": {"type": "Lion", "params": {"lr": 1e-3}}}}, r"type 'Lion' can't be honoured"),
        ({"a.yml": SMALL | {"optimizer": {"params": {"lr": 1e-3, "weight_decay": 0.0}}}}, r"weight_decay belongs outside"),
        ({"a.yml": SMALL | {"train_batch_size": 7}}, r"train_batch_size: 7 is not micro-batch 2 x 3"),
        ({"a.yml": SMALL | {"train_data_paths": ["a"]}}, r"data_path: given beside train_data_paths"),
        ({"a.yml": SMALL | {"model_parallel_size": 2}}, r"don't divide the 1 ranks; start a multiple of 2"),
        (
            {"a.yml": SMALL | {"bf16": {"enabled": True}, "fp16": {"enabled": True}}},
            r"bf16: .*contradict each other",
        ),
        ({"a.yml": SMALL | {"load": "nowhere", "finetune": True}}, r"a\.yml:\d+: load: /.*/nowhere: no such folder"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    tmp_path: Path, files: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, content in files.items():
        Path(name).write_text(yaml.safe_dump(content))
    assert main([*files]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and re.search(says, err), err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(files)


def test_two_files_of_one_name_are_refused_as_there(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.yml").write_text(yaml.safe_dump(SMALL if place == "a" else {"seed": 1}))
    with pytest.raises(UserError, match=r"two files are called x\.yml"):
        read_neox([tmp_path / "a/x.yml", tmp_path / "b/x.yml"])


# ---- rules ---------------------------------------------------------------------------------------------------------


def annealing_lr(n: int, style: str, peak: float, floor: float, warm: float, end: float) -> float:
    """GPT-NeoX's AnnealingLR after ``n`` steps, restated."""
    if warm > 0 and n <= warm:
        return peak * max(1, n) / warm
    x, e = n - warm, end - warm
    if style == "linear":
        rate = peak * (e - x) / e
    elif style == "cosine":
        rate = floor + (peak - floor) / 2 * (math.cos(math.pi * x / e) + 1)
    elif style == "exponential":
        rate = peak * math.exp(-0.693 * x / e)
    else:
        rate = peak
    return max(rate, floor)


@settings(max_examples=200, deadline=None)
@given(
    style=st.sampled_from(["linear", "cosine", "exponential", "constant"]),
    iterations=st.integers(2, 400),
    decay=st.none() | st.integers(2, 500) | st.floats(0.3, 1.0),
    warmup=st.sampled_from([None, 0, 0.0, 0.001, 0.01, 0.1, 0.37, 0.9]),
    peak=st.sampled_from([3e-4, 1e-2]),
    floor=st.sampled_from([None, 0.0, 3e-5]),
)
def test_the_rate_of_every_step_is_gpt_neoxs(style, iterations, decay, warmup, peak, floor) -> None:
    values = SMALL | {"train_iters": iterations, "lr_decay_style": style, "optimizer": {"params": {"lr": peak}}}
    values |= {} if decay is None else {"lr_decay_fraction": decay} if isinstance(decay, float) else {"lr_decay_iters": decay}
    values |= {} if warmup is None else {"warmup": warmup}
    values |= {} if floor is None else {"min_lr": floor}
    end = iterations if decay is None else math.floor(iterations * decay) if isinstance(decay, float) else decay
    assume(end >= 1)
    warm = (0.01 if warmup is None else warmup) * end
    translation = translate(as_file(values), 1)
    run = RunConfig.model_validate(translation.mapping | {"start": {}, "model": translation.mapping["model"]})
    schedule = build_schedule(
        run.schedule, lambda budget: budget.in_steps(run.tokens_per_step, run.total_steps), run.total_steps
    )
    for step in range(1, iterations + 1):
        wanted = annealing_lr(step - 1, style, peak, floor or 0.0, warm, end)
        assert schedule.lr(step - 1) == pytest.approx(wanted, rel=1e-12, abs=1e-18), step


@given(
    ranks=st.sampled_from([1, 2, 8]),
    micro=st.none() | st.integers(1, 6),
    steps=st.none() | st.integers(1, 4),
    total=st.none() | st.integers(1, 96),
)
def test_two_of_the_three_batch_sizes_give_the_third(ranks, micro, steps, total) -> None:
    given_ = {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    values = {k: v for k, v in (SMALL | given_).items() if v is not None}
    if total is None and micro is None:
        with pytest.raises(UserError, match="train_micro_batch_size_per_gpu"):
            translate(as_file(values), ranks)
        return
    derived_micro = micro if micro is not None else total // ranks // (steps or 1)
    derived_steps = (
        steps if steps is not None else (1 if total is None else total // derived_micro // ranks if derived_micro else 0)
    )
    whole = total if total is not None else derived_micro * derived_steps * ranks
    if derived_micro * derived_steps * ranks != whole or whole == 0:
        with pytest.raises(UserError, match="is not micro-batch"):
            translate(as_file(values), ranks)
    else:
        training = translate(as_file(values), ranks).mapping["training"]
        assert (training["global_batch"], training["micro_batch"]) == (whole, derived_micro)


@pytest.mark.parametrize(("tensor", "rows"), [(1, 50304), (2, 50432), (4, 50688), (8, 51200)])
def test_the_vocabulary_is_padded_as_there(tmp_path: Path, tensor: int, rows: int) -> None:
    """Sizes from GPT-NeoX's documentation for the 50277 tokens of its tokenizer."""
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({str(i): i for i in range(50277)}))
    values = {k: v for k, v in SMALL.items() if k != "padded_vocab_size"}
    values |= {"vocab_file": str(vocabulary), "tokenizer_type": "GPT2BPETokenizer", "model_parallel_size": tensor}
    assert translate(as_file(values), tensor).mapping["model"]["vocab_size"] == rows


HERE = ("tokenizer.json", "gpt2-vocab.json", "gpt2-merges.txt", "other.txt", "sp.model", "v.json")
TOKENIZERS: dict[str, tuple[str, str | None, str | None, str | None]] = {
    # tokenizer_type, vocab_file, merge_file, what is said where data.tokenizer is not vocab_file
    "tokenizer.json": ("HFTokenizer", "tokenizer.json", None, None),
    "gone": ("HFTokenizer", "gone.json", None, "there is no such file"),
    "GPT-2's two files": ("GPT2BPETokenizer", "gpt2-vocab.json", "gpt2-merges.txt", None),
    "other merges": ("GPT2BPETokenizer", "gpt2-vocab.json", "other.txt", "looked for in .*gpt2-merges.txt; copy .*other.txt"),
    "merges gone": ("GPT2BPETokenizer", "gpt2-vocab.json", "gone.txt", "its merge_file .*gone.txt is not there"),
    "no merges": ("GPT2BPETokenizer", "gpt2-vocab.json", None, "not given as merge_file"),
    "another name": ("GPT2BPETokenizer", "v.json", "gpt2-merges.txt", "ends in vocab.json"),
    "sentencepiece": ("SPMTokenizer", "sp.model", None, None),
    "sentencepiece by another name": ("SPMTokenizer", "other.txt", None, "the ending .model"),
    "GPT-2 with padding": ("HFGPT2Tokenizer", "gpt2-vocab.json", None, "the ids of a HFGPT2Tokenizer"),
    "tiktoken": ("TiktokenTokenizer", "other.txt", None, "the ids of a TiktokenTokenizer"),
    "characters": ("CharLevelTokenizer", None, None, None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_that_a_file_names_is_taken_or_why_not_is_said(tmp_path: Path, name: str) -> None:
    kind, vocabulary, merges, why = TOKENIZERS[name]
    for file in HERE:
        (tmp_path / file).write_text("")
    values = SMALL | {"tokenizer_type": kind}
    for key, given_file in (("vocab_file", vocabulary), ("merge_file", merges)):
        values |= {} if given_file is None else {key: str(tmp_path / given_file)}
    made = translate(as_file(values), 1)
    assert made.mapping["data"]["tokenizer"] == (str(tmp_path / vocabulary) if vocabulary and why is None else None)
    notes = [note for note in made.notes if note.startswith("vocab_file")]
    assert len(notes) == (why is not None) and all(re.search(str(why), note) for note in notes)
    known = why is None and kind in ("HFTokenizer", "GPT2BPETokenizer")
    with nullcontext() if known else pytest.raises(UserError, match=r"f.yml.*the end of a document is known only of"):
        assert translate(as_file(values | {"eod_mask_loss": True}), 1).mapping["data"]["mask_eod_loss"]


def test_gpt2s_two_files_are_what_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' own reader of the two files."""
    monkeypatch.chdir(tmp_path)
    texts = ["the warm rates of old runs", " are warmed again, and again; 12 of 30 times.\n", "Ein \u00e4lterer Lauf"]
    model = json.loads(train_bpe(texts, 290, tmp_path / "whole.json").path.read_text())["model"]
    Path("gpt2-vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    Path("gpt2-merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    write_tokens(tmp_path / "data", 1, vocabulary=290)
    files = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "gpt2-vocab.json", "merge_file": "gpt2-merges.txt"}
    Path("n.yml").write_text(yaml.safe_dump(SMALL | files | {"padded_vocab_size": 320, "train_iters": 1, "save": "run"}))
    assert main(["n.yml", "export.huggingface=true"]) == 0
    ours, theirs = AutoTokenizer.from_pretrained("run/huggingface"), GPT2TokenizerFast("gpt2-vocab.json", "gpt2-merges.txt")
    for text in [*texts, "old again 30", "<|endoftext|>"]:
        assert ours(text).input_ids == theirs(text).input_ids
    assert (
        ours.eos_token_id == theirs.eos_token_id == json.loads(Path("run/huggingface/config.json").read_text())["eos_token_id"]
    )


def test_weighted_paths_become_blends() -> None:
    values = {k: v for k, v in SMALL.items() if k != "data_path"} | {
        "train_data_paths": ["old/text", "new/text"],
        "train_data_weights": [0.05, 0.95],
        "valid_data_paths": ["old/valid"],
        "test_data_paths": ["t"],
        "eval_iters": 3,
    }
    data = translate(as_file(values), 1).mapping["data"]
    assert [(s["path"], s["weight"], s["name"]) for s in data["train"]] == [
        ("old/text", 0.05, "text_0"),
        ("new/text", 0.95, "text_1"),
    ]
    assert [(v["name"], v["when"], v["tokens"]) for v in data["validation"]] == [("valid", "always", 96), ("test", "end", 96)]
    assert data["blend_of_one"] and data["validation"][0]["sources"] == [
        {"path": "old/valid", "weight": 1.0, "max_epochs": None}
    ]
    with pytest.raises(UserError, match="1 weights for 2 paths"):
        translate(as_file(values | {"train_data_weights": [1.0]}), 1)


def test_checkpoints_are_kept_as_there() -> None:
    def checkpoint(**keys: Any) -> dict[str, Any]:
        return dict(translate(as_file(SMALL | keys), 1).mapping["checkpoint"])

    assert checkpoint(checkpoint_factor=4) == {"every": 4, "keep_last": 1, "keep_every": 4, "extra_steps": []}
    assert checkpoint(checkpoint_factor=4, keep_last_n_checkpoints=3)["keep_last"] == 3
    assert checkpoint(checkpoint_factor=2, checkpoint_scale="log") == {
        "every": None,
        "keep_last": 1,
        "keep_every": None,
        "extra_steps": [1, 2, 4],
    }


# ---- recorded runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def place(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as GPT-NeoX ran in: token files, tokenizer, configurations, and what r1 ended with as 'ck1'."""
    for file in [*golden.glob("*_text_document.*"), golden / "tiny_tokenizer.json", *golden.glob("configs/*.yml")]:
        shutil.copy(file, tmp_path)
    shutil.copytree(golden / "hf_r1", tmp_path / "ck1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recorded(golden: Path) -> tuple[list[float], list[float]]:
    run = json.loads((golden / "neox_golden.json").read_text())["r2_rewarm_B"]
    return [loss for _, _, loss in run["iters"]], [float(loss) for _, loss in run["evals"]]


def assert_followed(golden: Path, folder: Path) -> None:
    losses, evaluations = recorded(golden)
    assert [line["loss"] for line in events(folder, "train")] == pytest.approx(losses, abs=2e-5)
    assert [line["loss"] for line in events(folder, "eval")] == pytest.approx(evaluations, abs=2e-5)


def test_a_recorded_run_is_followed_with_its_evaluations(golden: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Measured: 1.1e-6 in the losses, 5e-7 in the evaluations."""
    assert main(["r2_rewarm_B.yml"]) == 0
    assert_followed(golden, place / "ck2")
    out = capfd.readouterr().out
    assert "finetune: weights only" in out and "47 keys are honoured" in out and "num_workers" in out
    assert main(["r2_rewarm_B.yml"]) == 0  # again: it is complete, not begun anew
    assert "already complete" in capfd.readouterr().out


def _changed(place: Path, name: str, **changes: Any) -> str:
    values = json.loads((place / "r2_rewarm_B.yml").read_text()) | {"save": name} | changes
    (place / f"{name}.yml").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return f"{name}.yml"


def _two_ranks(ranks: Ranks, place: str, config: str) -> None:
    import os

    os.chdir(place)
    run, _ = load_neox([Path(config)], [], ranks.world_size)
    train(run, ranks, quiet())


@pytest.mark.slow
def test_accumulation_and_ranks_compute_the_same_run(golden: Path, place: Path) -> None:
    """4 = 2 x 2 accumulated = 1 x 2 x 2 ranks with ZeRO-1: GPT-NeoX reads the same rows in each."""
    assert main([_changed(place, "accumulated", train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)]) == 0
    assert_followed(golden, place / "accumulated")
    config = _changed(
        place, "zero", train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, zero_optimization={"stage": 1}
    )
    run_ranks(_two_ranks, 2, str(place), config)
    assert_followed(golden, place / "zero")


def test_recorded_runs_from_scratch_run(place: Path) -> None:
    for config, steps, folder in (("r1_pretrain_A.yml", 40, "ck1_new"), ("r7_pipe1.yml", 10, "ck7")):
        text = (place / config).read_text().replace('"ck1"', '"ck1_new"')
        (place / config).write_text(text)
        assert main([config]) == 0
        lines = events(place / folder, "train")
        assert len(lines) == steps and lines[0]["loss"] == pytest.approx(math.log(512), rel=0.08)
        assert lines[-1]["loss"] < lines[0]["loss"]


def test_one_weighted_path_and_a_replay_blend_run(place: Path) -> None:
    paths = {"train_data_paths": ["B_text_document"], "valid_data_paths": ["A_text_document"]}
    assert main([_changed(place, "one", data_path=None, **paths)]) == 0
    assert {line["name"] for line in events(place / "one", "eval")} == {"valid"}
    replay = {"train_data_paths": ["A_text_document", "B_text_document"], "train_data_weights": [0.25, 0.75]}
    assert main([_changed(place, "replay", data_path=None, test_data_paths=["B_text_document"], **replay)]) == 0
    seen = json.loads((place / "replay/checkpoints/step_40/state.json").read_text())["lineage"]["stages"][-1]["data"]
    assert [entry["samples"] for entry in seen] == [40, 120]


def test_converted_files_are_the_same_run(golden: Path, place: Path) -> None:
    tool("convert_config", "r2_rewarm_B.yml", "--output", "ours.yml")
    assert main(["ours.yml"]) == 0
    assert_followed(golden, place / "ck2")
    tool("convert_checkpoint", "ck2", "exported", "--to", "hf")  # with the tokenizer that the file names
    assert (place / "exported/tokenizer.json").read_bytes() == (place / "tiny_tokenizer.json").read_bytes()
    assert "exists" in tool("convert_config", "r2_rewarm_B.yml", "--output", "ours.yml", expect=2)
    assert "no key of GPT-NeoX" in tool("convert_config", "ours.yml", expect=2)


# ---- load and save -------------------------------------------------------------------------------------------------


def _small(place: Path, **changes: Any) -> str:
    for name in ("data", "other"):
        if not (place / f"{name}.idx").exists():
            write_tokens(place / name, 3, vocabulary=neox_writer.VOCABULARY)
    values = SMALL | {"data_path": str(place / "data"), "seq_length": 8, "max_position_embeddings": 8, "no_weight_tying": True}
    values |= {"gpt_j_residual": True, "bias_gelu_fusion": True, "padded_vocab_size": neox_writer.VOCABULARY, "eval_iters": 0}
    values |= {"optimizer": {"params": {"lr": 3e-4}}, "min_lr": 3e-5, "lr_decay_style": "cosine", "train_iters": 143}
    (place / "run.yml").write_text(json.dumps(values | changes))
    return str(place / "run.yml")


def test_a_neox_checkpoint_is_continued_where_it_stands(tmp_path: Path) -> None:
    written(tmp_path / "neox", neox_writer.Shape(data=2))
    file = _small(tmp_path, load=str(tmp_path / "neox"), save=str(tmp_path / "run"))
    run, account = load_neox([Path(file)], [], 1)
    plan = make_plan(run)
    assert (plan.position.step, plan.position.optimizer_step, plan.position.schedule, plan.position.samples) == (7, 6, 6, 28)
    assert plan.policy.intent == "resume" and plan.policy.moments == "keep"
    assert any("random state" in note for note in account.notes)
    # GPT-NeoX asserts that the schedules agree; another one needs its word for it
    other = _small(tmp_path, load=str(tmp_path / "neox"), min_lr=1e-5)
    with pytest.raises(UserError, match=r"min_lr was 3e-05 there and is 1e-05 here"):
        make_plan(load_neox([Path(other)], [], 1)[0])
    other = _small(tmp_path, load=str(tmp_path / "neox"), min_lr=1e-5, override_lr_scheduler=True)
    plan = make_plan(load_neox([Path(other)], [], 1)[0])
    assert (plan.position.step, plan.position.schedule, plan.policy.moments) == (7, 6, "keep")
    assert plan.schedule.min_lr == 1e-5


def test_weights_alone_are_not_continued(golden: Path, tmp_path: Path) -> None:
    file = _small(tmp_path, load=str(golden / "hf_r1"))
    with pytest.raises(UserError, match=r"load: .*hf_r1 \(huggingface\) holds weights only.*set 'finetune: true'"):
        load_neox([Path(file)], [], 1)


def test_load_and_save_the_same_begin_from_scratch_and_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    same = {"load": str(tmp_path / "run"), "save": str(tmp_path / "run"), "train_iters": 6, "checkpoint_factor": 3}
    file = _small(tmp_path, **same)
    assert main([file]) == 0
    assert "the run starts from scratch there" in capfd.readouterr().out
    shutil.rmtree(tmp_path / "run/checkpoints/step_6")
    assert main([file]) == 0
    assert "resumes at step 3" in " ".join(capfd.readouterr().out.split())


def test_the_dry_run_shows_the_account(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([_small(tmp_path, num_workers=2), "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert "1 keys are not applicable" in out and "num_workers" in out and "cosine" in out
