"""A whole run by the command against transformers' Trainer and litgpt's pretrain: tokens/s, processor seconds, peak memory.

All sides go on from the same weights with the same rows in the same order, in fp32 on the CPU: AdamW at a constant rate,
clipping, the same validation rows at the same steps, a checkpoint with moments after each evaluation, the loss of every step
and TensorBoard's files. Each is a process of its own; they take turns, ``--rounds`` times over. The parent reads /proc 20 times
a second: resident memory and processor time of the process and its children, and how many steps the side has logged.

Rates are those between the log lines of step ``--every`` and of the last step, so that start-up and compilation are left out
and as many evaluations and checkpoints as periods are in; the whole command is given beside. Losses of a step must agree.

    python benchmarks/end_to_end.py --folder DIR [--litgpt-python PATH] [--transformers-python PATH]
    python benchmarks/end_to_end.py --folder DIR --smoke             (a small model: shows that it works, not how fast)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("megarewarm", "transformers", "litgpt", "litgpt, not compiled")
SHAPES: dict[str, dict[str, int]] = {
    "pythia-14m": {"num_layers": 6, "hidden_size": 128, "num_heads": 4, "vocab_size": 50304},
    "pythia-70m": {"num_layers": 6, "hidden_size": 512, "num_heads": 8, "vocab_size": 50304},
    "smoke": {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "vocab_size": 1024},
}
RATE, BETAS, EPS = 1e-4, (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Work:
    """What every side does; ``every``: steps between evaluations, each followed by a checkpoint; ``rows``: of validation."""

    model: str
    sequence: int
    batch: int
    steps: int
    every: int
    rows: int
    folder: str

    @property
    def shape(self) -> dict[str, int]:
        return SHAPES[self.model]

    def tokens(self, name: str) -> npt.NDArray[np.int64]:
        """The rows (n, sequence + 1) of a token file as the order ``sequential`` reads them."""
        stream = np.memmap(Path(self.folder) / f"{name}.bin", np.uint16, "r")
        starts = np.arange((len(stream) - 1) // self.sequence)[:, None] * self.sequence
        return stream[starts + np.arange(self.sequence + 1)].astype(np.int64)


# ---- what they read ----------------------------------------------------------------------------------------------------------


def write_inputs(work: Work) -> None:
    """The token files ``train`` and ``validation`` and the first weights, as transformers writes them, in the folder."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from megarewarm.data.files.token_file import TokenFileWriter

    words: list[str] = []
    needed = (work.steps * work.batch + work.rows) * work.sequence + 2
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        words += re.findall(r"\w+|[^\w\s]|\s+", path.read_text(encoding="utf-8"))
    words = (words * (needed // len(words) + 1))[:needed]
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(work.shape["vocab_size"] - 1), 1)}
    ids = np.array([number.get(word, 0) for word in words], np.uint16)
    first = work.rows * work.sequence + 1
    for name, part in (("validation", ids[:first]), ("train", ids[first:])):
        with TokenFileWriter(Path(work.folder) / name, np.uint16, overwrite=True) as writer:
            writer.add_document(part)
    torch.manual_seed(1)
    shape = work.shape
    config = GPTNeoXConfig(
        num_hidden_layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        num_attention_heads=shape["num_heads"],
        intermediate_size=4 * shape["hidden_size"],
        vocab_size=shape["vocab_size"],
        max_position_embeddings=work.sequence,
        hidden_act="gelu_pytorch_tanh",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    GPTNeoXForCausalLM(config).save_pretrained(Path(work.folder) / "start")


# ---- the sides ---------------------------------------------------------------------------------------------------------------


def configuration(work: Work, place: Path) -> dict[str, Any]:
    """The run's file."""
    files = Path(work.folder)
    return {
        "name": "end_to_end",
        "folder": str(place / "run"),
        "model": {**work.shape, "max_positions": work.sequence},
        "start": {"from": str(files / "start")},
        "data": {
            "sequence_length": work.sequence,
            "order": "sequential",
            "train": [{"path": str(files / "train")}],
            "validation": [
                {
                    "name": "held_out",
                    "role": "downstream",
                    "tokens": work.rows * work.sequence,
                    "sources": [{"path": str(files / "validation")}],
                }
            ],
        },
        "optimizer": {"betas": list(BETAS), "eps": EPS, "weight_decay": 0.0, "clip_norm": 1.0},
        "schedule": {"curve": "constant", "max_lr": RATE, "warmup": 0},
        "training": {"budget": work.steps, "global_batch": work.batch, "micro_batch": work.batch, "device": "cpu"},
        "evaluation": {"every": work.every, "at_start": False},
        "checkpoint": {"every": work.every},
        "logging": {"every": 1, "dynamics": work.every},
    }


def by_transformers(work: Work, place: Path) -> None:
    """A script as Trainer's users write it; rows are shifted here, so that as many tokens are predicted as by the others."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, npt.NDArray[np.int64]]]):
        def __init__(self, name: str) -> None:
            self.rows = work.tokens(name)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> dict[str, npt.NDArray[np.int64]]:
            row = self.rows[i]
            return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            logs = more["logs"]
            if "loss" in logs or "eval_loss" in logs:
                print("logged " + json.dumps({"step": state.global_step, **logs}), flush=True)

    settings = TrainingArguments(
        output_dir=str(place / "run"),
        use_cpu=True,
        max_steps=work.steps,
        per_device_train_batch_size=work.batch,
        per_device_eval_batch_size=work.batch,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        max_grad_norm=1.0,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=work.every,
        save_steps=work.every,
        save_total_limit=2,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=["tensorboard"],
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(
            Path(work.folder) / "start", attn_implementation="sdpa", dtype=torch.float32
        ),
        args=settings,
        train_dataset=Rows("train"),
        eval_dataset=Rows("validation"),
        callbacks=[Log()],
    )
    trainer.train()


def by_litgpt(work: Work, place: Path) -> None:
    """``litgpt pretrain`` with a data module of these rows and the first weights in its own format."""
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from litgpt.pretrain import setup
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox
    from litgpt.utils import save_config
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader

    class Rows(DataModule):
        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
            self.batch = batch_size

        def loader(self, name: str) -> DataLoader[Any]:
            return DataLoader(torch.from_numpy(work.tokens(name)), batch_size=self.batch)  # type: ignore[arg-type]

        def train_dataloader(self) -> DataLoader[Any]:
            return self.loader("train")

        def val_dataloader(self) -> DataLoader[Any]:
            return self.loader("validation")

    shape = work.shape
    config = Config(
        name="pythia-14m",  # of its table, asked for by the command line that it writes beside each checkpoint
        block_size=work.sequence,
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_layers"],
        n_head=shape["num_heads"],
        n_embd=shape["hidden_size"],
        gelu_approximate="tanh",
    )
    weights: dict[str, Any] = {}
    copy_weights_gpt_neox(config, weights, load_file(Path(work.folder) / "start" / "model.safetensors"))
    start = place / "start"
    start.mkdir()
    torch.save(weights, start / "lit_model.pth")
    save_config(config, start)
    sys.argv = ["litgpt", "pretrain", config.name]
    setup(
        config.name,
        config,
        out_dir=place / "run",
        precision="32-true",
        initial_checkpoint_dir=start,
        data=Rows(),
        train=TrainArgs(
            save_interval=work.every,
            log_interval=1,
            global_batch_size=work.batch,
            micro_batch_size=work.batch,
            lr_warmup_steps=None,
            max_tokens=work.steps * work.batch * work.sequence,
            max_norm=1.0,
            min_lr=RATE,
        ),
        eval=EvalArgs(interval=work.every, max_iters=work.rows // work.batch, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": 0.0},
        },
        devices=1,
        seed=1,
    )


def command(side: str, work: Work, place: Path, pythons: dict[str, str]) -> list[str]:
    """How the side is started."""
    if side == "megarewarm":
        (place / "run.yml").write_text(json.dumps(configuration(work, place)))  # JSON is YAML
        return [sys.executable, str(ROOT / "launch.sh"), str(place / "run.yml")]
    serve = json.dumps({"side": side, "place": str(place), "work": dataclasses.asdict(work)})
    return [pythons[side], str(Path(__file__).resolve()), "--serve", serve]


def logged(side: str, place: Path) -> tuple[list[float], list[float]]:
    """(the loss of every step so far, those of the evaluations)."""
    if side == "megarewarm":
        path = place / "run" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        train = [line["loss"] for line in lines if line["event"] == "train"]
        return train, [line["loss"] for line in lines if line["event"] == "eval"]
    text = (place / "log.txt").read_text(errors="replace")
    if side == "transformers":
        lines = [json.loads(line) for line in re.findall(r"^logged (\{.*\})$", text, re.MULTILINE)]
        found = [[float(line[key]) for line in lines if key in line] for key in ("loss", "eval_loss")]
    else:
        found = [[float(x) for x in re.findall(words, text)] for words in (r"loss train: ([\d.]+)", r"val loss ([\d.]+)")]
    return found[0], found[1]


# ---- measuring ---------------------------------------------------------------------------------------------------------------


def family(process: int) -> list[int]:
    """The process and all below it, of those that still run."""
    found = [process]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                found += [int(child) for child in Path(f"/proc/{parent}/task/{task}/children").read_text().split()]
        except OSError:  # it has ended
            continue
    return found


def resources(process: int) -> tuple[float, float]:
    """(processor seconds so far, resident MiB) of a process and all below it; those that were waited for count too."""
    seconds = memory = 0.0
    for one in family(process):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        memory += int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return seconds, max(memory, highest(process))


def highest(process: int) -> float:
    """The most that a process alone has had in memory since it was started, MiB; rusage has what it was forked from, too."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def measure(side: str, work: Work, place: Path, pythons: dict[str, str], threads: int, limit: float) -> dict[str, Any]:
    """One run of one side."""
    place.mkdir(parents=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if side == "litgpt, not compiled":
        environment["TORCHDYNAMO_DISABLE"] = "1"
    marks: dict[int, tuple[float, float]] = {}  # steps that are logged -> (seconds, processor seconds) since the start
    peak, began = 0.0, time.perf_counter()
    with (place / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command(side, work, place, pythons), stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
        )
        stop = threading.Timer(limit, process.kill)
        stop.start()
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            used, memory = resources(process.pid)
            peak = max(peak, memory)
            marks.setdefault(len(logged(side, place)[0]), (time.perf_counter() - began, used))
            time.sleep(0.05)
        stop.cancel()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    whole = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    losses, evaluated = logged(side, place)
    if process.returncode or len(losses) != work.steps or len(evaluated) != work.steps // work.every:
        last = (place / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        sys.exit(f"{side}: code {process.returncode}, {len(losses)} of {work.steps} steps logged: {last}; see {place}/log.txt")
    first, last_mark = (min((step, mark) for step, mark in marks.items() if step >= at) for at in (work.every, work.steps))
    tokens = (last_mark[0] - first[0]) * work.batch * work.sequence
    between = [last_mark[1][kind] - first[1][kind] for kind in (0, 1)]
    return {
        "tokens/s": tokens / between[0] if tokens else math.nan,  # steps faster than the eye
        "tokens/CPU s": tokens / between[1] if between[1] else math.nan,
        "whole, s": whole[0],
        "whole, CPU s": whole[1],
        "peak, MiB": peak,
        "losses": losses,
        "evaluations": evaluated,
    }


def missing(side: str, pythons: dict[str, str]) -> str:
    """Why a side can't run; empty if it can."""
    if side == "megarewarm":
        return ""
    modules = (
        "accelerate, transformers, tensorboard" if side == "transformers" else "litgpt, lightning, jsonargparse, tensorboard"
    )
    if not pythons[side]:
        return "--litgpt-python names no Python that has it"
    done = subprocess.run([pythons[side], "-c", f"import {modules}"], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=False, help="new: for token files, weights and the sides' runs")
    parser.add_argument("--model", choices=SHAPES, default="pythia-14m", help="whose shape; default: %(default)s")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step; default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations and checkpoints; default: %(default)s")
    parser.add_argument(
        "--rows", type=int, default=16, help="validation sequences, in batches of --batch; default: %(default)s"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:3]))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each side; default: %(default)s")
    parser.add_argument("--limit", type=float, default=900.0, metavar="S", help="seconds for a side; default: %(default)s")
    parser.add_argument("--transformers-python", default=sys.executable, metavar="PATH", help="default: this one")
    parser.add_argument("--litgpt-python", default="", metavar="PATH", help="a Python that has litgpt; default: left out")
    parser.add_argument("--json", type=Path, help="written after each side")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asked = json.loads(arguments.serve)
        serve = by_transformers if asked["side"] == "transformers" else by_litgpt
        serve(Work(**asked["work"]), Path(asked["place"]))
        return
    if arguments.folder is None:
        parser.error("--folder: need a new folder")
    if arguments.smoke:
        arguments.model, arguments.sequence, arguments.steps, arguments.every, arguments.rows = "smoke", 32, 6, 2, 4
    if arguments.steps % arguments.every or arguments.steps < 2 * arguments.every or arguments.rows % arguments.batch:
        parser.error("need --steps a multiple of --every, at least twice, and --rows a multiple of --batch")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True)
    work = Work(
        **{name: getattr(arguments, name) for name in ("model", "sequence", "batch", "steps", "every", "rows")},
        folder=str(folder),
    )
    pythons = {"transformers": arguments.transformers_python, **dict.fromkeys(SIDES[2:], arguments.litgpt_python)}
    write_inputs(work)
    sides = []
    for side in arguments.sides:
        if why := missing(side, pythons):
            print(f"{side}: left out: {why}", flush=True)
        else:
            sides.append(side)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(arguments.rounds):
        for side in sides:
            place = folder / f"{side.replace(', ', '_').replace(' ', '_')}_{turn + 1}"
            results[side].append(measure(side, work, place, pythons, arguments.threads, arguments.limit))
            found = results[side][-1]
            print(f"{side}: " + ", ".join(f"{found[key]:,.1f} {key}" for key in KEYS), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(show(work, results, arguments.threads))


KEYS = ("tokens/s", "tokens/CPU s", "whole, s", "whole, CPU s", "peak, MiB")
APART = 0.004
"""Nats by which losses of a step may differ: litgpt prints three decimals."""


def show(work: Work, results: dict[str, list[dict[str, Any]]], threads: int) -> int:
    """A Markdown table; 1 where the sides did not do the same."""
    print(
        f"\n{work.model}, {work.batch} x {work.sequence} tokens, fp32, {work.steps} steps, an evaluation of {work.rows} rows ",
        end="",
    )
    print(f"and a checkpoint every {work.every}, {threads} threads, {time.strftime('%Y-%m-%d')}\n")
    print("| | " + " | ".join(KEYS) + " | tokens/CPU s, ours : theirs | memory, ours : theirs | last losses |")
    print("|" + "---|" * (len(KEYS) + 4))
    medians = {side: {key: statistics.median(each[key] for each in found) for key in KEYS} for side, found in results.items()}
    ours = medians.get("megarewarm")
    code = 0
    for side, found in results.items():
        row = [f"{medians[side][key]:,.0f}" for key in KEYS]
        ratios = [f"{ours[key] / medians[side][key]:.2f}" if ours else "" for key in ("tokens/CPU s", "peak, MiB")]
        print(f"| {side} | {' | '.join(row + ratios)} | {found[0]['losses'][-1]:.4f}, {found[0]['evaluations'][-1]:.4f} |")
    first = next(iter(results.values()))[0]
    for side, found in results.items():
        for kind in ("losses", "evaluations"):
            apart = max(abs(a - b) for a, b in zip(first[kind], found[0][kind], strict=True))
            if apart > APART:
                print(f"{side}: {kind} differ by up to {apart:.4f} nats: not the same work")
                code = 1
    return code


if __name__ == "__main__":
    main()
