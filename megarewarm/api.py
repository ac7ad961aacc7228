"""The Python interface: what ``import megarewarm`` offers. Every function raises ``UserError`` for bad input.

It works in scripts, notebooks and threads, and under torchrun, srun or mpirun, where every rank makes the same calls.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import gc
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from megarewarm.checkpoint.source import OpenedCheckpoint, OwnCheckpoint, open_checkpoint
from megarewarm.checkpoint.weights import load_module
from megarewarm.config.data import DataConfig, ValidationSet
from megarewarm.config.load import apply_override, dump, read_configs, validate
from megarewarm.config.schema import RunConfig
from megarewarm.config.yaml_text import Origins
from megarewarm.console import make_console
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.manifest import made_by
from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.mixture.validation import ValidationWindows
from megarewarm.data.tasks.encode import batches, spans
from megarewarm.data.tasks.items import read_tasks
from megarewarm.data.tasks.score import TaskScores, score
from megarewarm.data.text.preprocess.job import Options, Written, preprocess
from megarewarm.data.text.tokenizers import Tokenizer, train_bpe
from megarewarm.errors import UserError
from megarewarm.generation.continuation import Continuer
from megarewarm.generation.sampling import Sampling, text_keys
from megarewarm.model.transformer import LOSS_MEMORY
from megarewarm.parallel.connect import choose_device, connect
from megarewarm.parallel.continuations import score_batch
from megarewarm.parallel.meeting_place import launch_of_process
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.run import RecordedRun, read_run
from megarewarm.rewarm.reset import ResetPolicy
from megarewarm.spelling import counted
from megarewarm.training.after_step.part import Outcome
from megarewarm.training.start.epochs import settle_epochs
from megarewarm.training.start.evaluations import evaluation_steps
from megarewarm.training.start.plan import make_plan
from megarewarm.training.start.tasks import encode_tasks, notes_of
from megarewarm.training.start.text_bytes import bits_per_byte, set_bytes
from megarewarm.training.trainer import Callback
from megarewarm.training.trainer import train as train_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = [
    "LoadedModel",
    "Outcome",
    "RecordedRun",
    "RunPlan",
    "UserError",
    "draw",
    "load_config",
    "load_model",
    "plan",
    "prepare",
    "read_run",
    "to_yaml",
    "train",
    "train_tokenizer",
]

_log = logging.getLogger("megarewarm")
_ranks: Ranks | None = None


def load_config(source: Path | str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Load and validate a run's configuration.

    Args:
        source: a YAML file (with its ``extends``), or a mapping of sections.
        overrides: values by dotted key, as on the command line: ``{"schedule.max_lr": 3e-4, "training.budget": "10M tokens"}``.
    """
    origins: Origins = {}
    if isinstance(source, Mapping):
        mapping = copy.deepcopy(dict(source))
    else:
        mapping, origins = read_configs([str(source)])
    for key, value in (overrides or {}).items():
        text = value if isinstance(value, str) else json.dumps(value)  # JSON is one-line YAML
        apply_override(mapping, origins, f"{key}={text}")
    return validate(RunConfig, mapping, origins)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path | str) -> Tokenizer:
    """Train a byte-level BPE tokenizer with ``vocab_size`` ids, special tokens included, and write it to ``path`` (.json)."""
    if isinstance(texts, str):
        raise UserError("texts: expected several texts, found one; write [text]")
    return train_bpe(texts, vocab_size, Path(path))


def prepare(
    texts: Path | str | Sequence[Path | str], tokenizer: Path | str, prefix: Path | str, *, workers: int = 1, **options: Any
) -> list[Written]:
    """Tokenise files or folders of text into PREFIX.bin, .idx and .json, as ``megarewarm prepare`` does.

    Args:
        texts: .txt, .jsonl (both also .gz, .zst), .parquet, or folders of them.
        tokenizer: a tokenizer.json, a sentencepiece .model, or a folder with one.
        prefix: the files' name, without suffix.
        workers: processes; more than 1 needs a script with ``if __name__ == "__main__"``.
        options: fields of ``megarewarm.data.text.preprocess.job.Options``, such as ``split=(0.9, 0.1)``, ``shuffle=1``.
    """
    known = [field.name for field in dataclasses.fields(Options)]
    if unknown := options.keys() - known:
        raise UserError(f"prepare: no option '{min(unknown)}'; known: {', '.join(known)}")
    return preprocess(_several(texts), tokenizer, prefix, Options(**options), worker_count=workers, threads_only=workers == 1)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run will do; ``config`` includes its model.

    ``learning_rates`` (steps,) float64: the rate of each step. ``evaluations``: the steps after which the validation sets are
    evaluated. ``reset``: what the run keeps of the start checkpoint. ``resumes_at``: the step that the run folder has reached,
    0 for a fresh run.
    """

    config: RunConfig
    steps: int
    tokens: int
    learning_rates: NDArray[np.float64]
    evaluations: list[int]
    reset: ResetPolicy
    resumes_at: int


def plan(config: RunConfig) -> RunPlan:
    """The plan of a run, without training or writing anything. Opens the start checkpoint, but no token files."""
    _check_config(config)
    made = make_plan(settle_epochs(config)[0])
    first, last = made.origin.step, made.config.total_steps
    return RunPlan(
        made.config,
        steps=last - first,
        tokens=(last - first) * made.config.tokens_per_step,
        learning_rates=np.array([made.lr(step) for step in range(first + 1, last + 1)]),
        evaluations=sorted(evaluation_steps(made.config, first, first + made.schedule.warmup_steps)),
        reset=made.policy,
        resumes_at=made.position.step if made.resumed else 0,
    )


def train(config: RunConfig, callbacks: Sequence[Callback] = (), *, quiet: bool = False) -> Outcome:
    """Train ``config`` to its end, or resume it from its folder, as ``megarewarm train`` does.

    Args:
        config: see ``load_config``.
        callbacks: the main rank calls each with every event of metrics.jsonl (``{"event": "train", "step": 1, "loss": ...}``;
            also eval, save, alarm, stop). If one returns ``True``, the run saves and stops after that step.
        quiet: print nothing.

    Returns:
        The run's folder, last step and validation losses; ``exit_code`` is 0 if the run is complete. Beside ``UserError`` it
        raises ``TrainingDiverged`` and ``ReplicasDiffer``, as which the command exits with codes of their own.
    """
    _check_config(config)
    ranks = _connected(config)
    outcome = train_on(config, ranks, make_console(quiet=quiet or not ranks.is_main), callbacks)
    gc.collect()  # the run's model is in cycles, which a script that trains again would wait for
    return outcome


def _connected(config: RunConfig) -> Ranks:
    """One process is connected for each run; several meet once, at the first."""
    global _ranks
    launch = launch_of_process()
    if _ranks is None or launch.world_size == 1:
        _ranks = connect(launch, config.training.device, config.parallel.timeout_minutes)
        if launch.world_size > 1:
            atexit.register(_ranks.close)
    return _ranks


class Measured(NamedTuple):
    """``loss``: mean cross entropy in nats per token over ``tokens``. ``bits_per_byte``: the same by the tokens' text, which
    compares models of different tokenizers; ``None`` where the file's manifest does not name its tokenizer.
    Where that is neither at its place nor the model's own, they follow from the file's mean, and a warning says so."""

    loss: float
    tokens: int
    bits_per_byte: float | None


class LoadedModel:
    """A checkpoint's model on one device. ``module`` is plain PyTorch: token ids (b, s) int64 to hidden states; ``config`` its
    shape; ``tokenizer`` is ``None`` if the checkpoint names none; ``document_rules`` are its run's, ``None`` without."""

    def __init__(self, source: OpenedCheckpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._source, self.config = source, source.model_config
        self.document_rules = source.document_rules if isinstance(source, OwnCheckpoint) else None
        self.module = load_module(source.weights, self.config, device, dtype)
        self.device = device

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back."""
        from megarewarm.checkpoint.tokenizer_source import loaded

        file = self._source.tokenizer.file
        return None if file is None else loaded(file)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor | Sequence[Sequence[int]]) -> torch.Tensor:
        """(b, s) token ids to (b, s, v) logits in the model's dtype."""
        try:
            ids = torch.as_tensor(tokens, dtype=torch.int64)
        except (TypeError, ValueError) as error:  # also of rows of several lengths
            raise UserError(f"tokens: expected (b, s) token ids: {error}") from error
        if ids.dim() != 2 or not ids.numel() or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UserError(f"tokens: expected (b, s) token ids from 0 to {self.config.vocab_size - 1}")
        if ids.shape[1] > self.config.max_positions:
            raise UserError(f"tokens: {ids.shape[1]} positions, the model has {self.config.max_positions}")
        return self.module.logits(ids.to(self.device))

    @torch.no_grad()
    def evaluate(
        self,
        data: Path | str,
        *,
        tokens: int | None = None,
        sequence_length: int | None = None,
        micro_batch: int = 4,
    ) -> Measured:
        """The loss on a token file.

        Uses the windows of a validation set over the same file, and the ``reset_at_eod`` and ``mask_eod_loss`` of the run that
        the model is from (``document_rules``), so the loss equals that of the run's evaluation.

        Args:
            data: the file's name without suffix.
            tokens: how many to evaluate at most; default: all.
            sequence_length: of the windows; default: all positions of the model.
            micro_batch: windows at a time.
        """
        _check_positive(tokens=tokens, micro_batch=micro_batch)
        length = self.config.max_positions if sequence_length is None else sequence_length
        if not 0 < length <= self.config.max_positions:
            raise UserError(f"sequence_length {length}: expected 1 to {self.config.max_positions}, the positions of the model")
        source = [{"path": str(data)}]
        held = open_tokens(str(data)).total_tokens
        wanted = held if tokens is None else tokens
        if held and min(wanted, held - 1) < length:
            few = counted(min(wanted, held), "token")
            raise UserError(f"{data}: {few}, fewer than one window of {length}: give more, or a lower sequence length")
        section = DataConfig.model_validate({"sequence_length": length, "train": source})
        asked = ValidationSet.model_validate({"name": "data", "sources": source, "tokens": max(wanted, 1)})
        windows = ValidationWindows(asked, TokenFiles(section, self.config.vocab_size)).slice(0)
        total, count, rules = 0.0, 0, self.document_rules
        for rows in windows.micro_batches(0, 1, micro_batch):
            batch = torch.from_numpy(rows).to(self.device)
            inputs, targets, starts = batch[:, :-1], batch[:, 1:], None
            if rules is not None:
                starts, targets = rules.starts(inputs), rules.targets(inputs, targets)
            loss, number = self.module.loss(inputs, targets, starts)
            total, count = total + float(loss), count + int(number)
        if not count:
            raise UserError(f"{data}: every token ends a document: mask_eod_loss of the model's run leaves no loss to measure")
        found = set_bytes(asked, self._tokenizer_of(str(data)), None, rules is not None and rules.mask_loss)
        if found is not None and found.tokenizer is None:
            _log.warning(
                f"{data}: bits per byte follow from the mean bytes per token of the whole file: the tokenizer that its "
                f"manifest names is not here"
            )
        text = None if found is None else found.measured(windows, count)
        return Measured(total / count, count, bits_per_byte(total / count, count, text))

    def _tokenizer_of(self, data: str) -> Path | None:
        """The model's tokenizer, if the token file was made with the same."""
        made = made_by(Path(f"{data.removesuffix('.bin').removesuffix('.idx')}.bin"))
        own = self.tokenizer if made else None
        return own.path if made and own and own.fingerprint() == made.tokenizer.fingerprint else None

    @torch.no_grad()
    def test(
        self, tasks: str | Sequence[str], *, truncate: bool = False, sequences: int = 4
    ) -> tuple[dict[str, TaskScores], list[str]]:
        """(the scores on each task by its name, notes on what was scored), the same as those of a run's evaluation.

        Args:
            tasks: task files, or olmo:NAME, as for evaluation.tasks.
            truncate: drop the beginning of contexts that are too long, as lm-eval does; else they are refused.
            sequences: at most as many times the model's positions are computed at once.
        """
        _check_positive(sequences=sequences)
        source = self._source.tokenizer
        if self.tokenizer is None:
            raise UserError(f"{self._source.name}: no tokenizer is known for the tasks' text; put a tokenizer.json next to it")
        read = read_tasks([tasks] if isinstance(tasks, str) else tasks)
        encoded = encode_tasks(read, source, self.config, truncate=truncate)
        rows = [row for task in encoded for row in task.rows]
        found, greedy = np.zeros(len(rows)), np.zeros(len(rows), np.bool_)
        for batch in batches(rows, sequences * self.config.max_positions):
            hidden = self.module(torch.from_numpy(batch.inputs).to(self.device))
            scored = score_batch(hidden, self.module.head, batch, self.config.vocab_size, LOSS_MEMORY)
            found[batch.numbers], greedy[batch.numbers] = scored
        scores = {
            each.task.name: score(each.task, found[span], greedy[span])
            for each, span in zip(encoded, spans(encoded), strict=True)
        }
        return scores, notes_of(encoded, source)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is not taken for its letters
        self, text: str, max_tokens: int = ..., *, temperature: float = ..., top_p: float = ..., seed: int = ...
    ) -> str: ...
    @overload
    def generate(
        self, text: Sequence[str], max_tokens: int = ..., *, temperature: float = ..., top_p: float = ..., seed: int = ...
    ) -> list[str]: ...
    def generate(
        self,
        text: str | Sequence[str],
        max_tokens: int = 100,
        *,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> str | list[str]:
        """Continue ``text``, or several texts at once, each up to the end of its document.

        Args:
            text: what to continue; of several, each gets a continuation, which does not depend on the others. Before it comes
                the token that begins texts where transformers puts it there (Llama, Mistral).
            max_tokens: of the continuation, at most.
            temperature: 0 takes the most likely token each time.
            top_p: share of the probability that the likeliest tokens which are left hold.
            seed: the same seed gives the same text.
        """
        _check_positive(max_tokens=max_tokens)
        if not 0 < top_p <= 1:
            raise UserError(f"top_p {top_p}: expected a share above 0, at most 1")
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature {temperature}: expected 0 (the most likely token each time) or a number above 0")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed {seed}: expected a whole number from 0 to 2^63 - 1")
        texts = [text] if isinstance(text, str) else list(text)
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise UserError("generate: the text is not UTF-8; set LC_ALL=C.UTF-8 or PYTHONUTF8=1") from error
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise UserError(
                f"{self._source.name}: no tokenizer is known; set data.tokenizer in its run, or put a tokenizer.json next to it"
            )
        prompts = [ids.tolist() for ids in tokenizer.encode_batch(texts)] if texts else []
        if not all(prompts) or not prompts:
            raise UserError("generate: give a text to continue")
        prompts = [[*tokenizer.added_before(), *ids] for ids in prompts]
        longest, positions = max(map(len, prompts)), self.config.max_positions
        if longest + max_tokens > positions:
            raise UserError(
                f"max_tokens {max_tokens}: the text has {longest} tokens, the model {positions} positions for both; shorten one"
            )
        stated = self._source.tokenizer.eod
        end = tokenizer.eod_id if stated is None else stated
        found = self._continuer(prompts, max_tokens, Sampling(temperature, top_p), text_keys(seed, range(len(texts))), end)
        new = [tokenizer.decode(ids[: len(ids) - int(ids[-1] == end)]) for ids in found]
        return new[0] if isinstance(text, str) else new

    @cached_property
    def _continuer(self) -> Continuer:
        """It never chooses rows of the vocabulary that are no token."""
        return Continuer(self.module, None if self.tokenizer is None else self.tokenizer.vocab_size)


def _several(paths: Path | str | Sequence[Path | str]) -> Sequence[Path | str]:
    return [paths] if isinstance(paths, (str, Path)) else paths


def _check_config(config: object) -> None:
    if not isinstance(config, RunConfig):
        raise UserError(f"config: expected what megarewarm.load_config returns, found {type(config).__name__}")


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name} {number}: expected a whole number above 0")


def load_model(checkpoint: Path | str, *, device: str = "auto", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model of a run's folder (its newest checkpoint), or of any checkpoint or hub name that ``start.from`` takes.

    ``device``: auto (a GPU if there is one), cpu or cuda.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device '{device}': expected auto, cpu or cuda")
    return LoadedModel(open_checkpoint(str(checkpoint)), choose_device(launch_of_process(), device), dtype)


def draw(runs: Path | str | Sequence[Path | str]) -> dict[str, Figure]:
    """The figures of the runs' report as matplotlib figures, by name: 'curves', 'tradeoff', ..."""
    from megarewarm.record.run import read_runs
    from megarewarm.report.numbers.runs import rows
    from megarewarm.report.pages.run_page import pictures

    found = read_runs(_several(runs))
    return {picture.name: picture.figure for picture in pictures(found, rows(found))}


def to_yaml(config: RunConfig) -> str:
    """``config`` as YAML that loads to the same configuration."""
    return dump(config)
