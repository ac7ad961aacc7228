"""An experiment file: data to prepare, one base run, and runs that differ from it by a few keys, named or as a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator, model_validator

from megarewarm.config.arms import Arm, arms_of
from megarewarm.config.budget import Share, share
from megarewarm.config.load import merge, validate
from megarewarm.config.paths import PathTemplate, PathText
from megarewarm.config.section import FolderName, Positive, Section, Seed
from megarewarm.config.yaml_text import Origins
from megarewarm.errors import UserError


class TokenizerConfig(Section):
    """A tokenizer trained on one of the corpora."""

    vocab_size: Positive = Field(description="Size of the vocabulary, special tokens included.")
    train_on: str = Field(description="Name of the corpus whose training text it learns from.")
    sample_mb: float = Field(8.0, gt=0, description="How much of that text is used, in megabytes.")


class CorpusConfig(Section):
    """A corpus of text, tokenised into NAME_train and NAME_validation."""

    from_: str | list[PathTemplate] = Field(
        alias="from",
        description="installed_prose or installed_code (documentation and code of installed Python packages), or a list of "
        ".txt / .jsonl files.",
    )
    limit_mb: float | None = Field(None, gt=0, description="At most this much text, in megabytes; null: all of it.")


class TaskFileConfig(Section):
    """A task file FOLDER/NAME.jsonl for ``evaluation.tasks``: which of several continuations of a context is the real one, of
    held-out documents (``megarewarm make-task``)."""

    from_: str = Field(alias="from", description="Name of the corpus whose held-out text it is made of.")
    items: Positive = Field(description="How many items, each of a document of its own.")
    choices: int = Field(4, ge=2, description="Continuations of each item.")
    context_bytes: Positive = Field(description="Text before the continuation, in bytes.")
    continuation_bytes: int = Field(ge=4, description="Text of each continuation, in bytes.")
    seed: Seed = Field(1234, description="Chooses the documents, where they are cut, and the order of the choices.")


class PrepareConfig(Section):
    """Token files made before the first run. Files that exist with the same parameters are kept."""

    folder: PathTemplate | None = Field(None, description="Where the token files and the tokenizer go; null: ${folder}/data.")
    tokenizer: TokenizerConfig
    corpora: dict[str, CorpusConfig] = Field(min_length=1, description="The corpora by name.")
    validation_fraction: Share = Field(0.02, gt=0, lt=0.5, description="Share of the documents held out.")
    tasks: dict[str, TaskFileConfig] = Field({}, description="Task files by name.")


class ExperimentConfig(Section):
    """Several runs in one file. ``${folder}`` in any text stands for the experiment's folder, ``${runs}`` for the one that its
    runs of the same seed are in."""

    experiment: FolderName = Field(description="Name of the experiment.")
    title: str | None = Field(None, description="Heading of its report; null: the name.")
    folder: PathText | None = Field(None, description="Folder of the experiment; null: runs/NAME.")
    prepare: PrepareConfig | None = Field(None, description="Data to prepare first; null: nothing.")
    seeds: list[Seed] | None = Field(
        None,
        min_length=1,
        description="Every run once for each: training.seed and data.seed. Null: once, with the seeds of the file.",
    )
    base: dict[str, Any] = Field({}, description="Keys of a run (see below) that all runs share.")
    runs: list[dict[str, Any]] = Field(
        [],
        description="The runs in order: each a 'name' and the keys in which it differs from 'base'. 'stages', a list of such "
        "runs, makes it a chain: each starts from the one before.",
    )
    sweeps: list[dict[str, Any]] = Field(
        [],
        description="Groups of runs: each a 'name', 'axes' and further keys of a run. There is a run for every combination of "
        "the axes' values. An axis is a key of a run with a list of values (schedule.max_lr: [1e-3, 2e-3]), or any name with "
        "labels that each set several keys. 'with' names other runs that belong into the group's figure. 'permute: data.train' "
        "is an axis of its own: the sources of the blend one after another, each for its share of the run, in every order "
        "('orders: latin': in as many orders as sources, each source once at every place), beside the blend itself; 'permute: "
        "stages' puts the stages of a chain into these orders.",
    )
    quick: dict[str, Any] = Field(
        {},
        description="What --quick lays over this file, to try it in minutes; its key 'length' multiplies the budget of every "
        "run. The folder is then another one, NAME_quick.",
    )

    @field_validator("runs", "sweeps")
    @classmethod
    def _named(cls, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = [run.get("name") for run in runs]
        for i, name in enumerate(names):
            if not isinstance(name, str) or not name:
                raise ValueError(f"entry {i} has no 'name'")
            if names.count(name) > 1:
                raise ValueError(f"two entries are named '{name}'")
        return runs

    @field_validator("quick")
    @classmethod
    def _length(cls, quick: dict[str, Any]) -> dict[str, Any]:
        length = share(quick.get("length", 1.0))
        if not isinstance(length, int | float) or isinstance(length, bool) or length <= 0:
            raise ValueError(f"length: expected a share of the runs' budgets, such as 0.01 or '1%', not {length!r}")
        return quick | {"length": length} if "length" in quick else quick

    @model_validator(mode="after")
    def _check(self) -> ExperimentConfig:
        if not self.runs and not self.sweeps:
            raise ValueError("an experiment needs 'runs' or 'sweeps'")
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        return self

    @property
    def experiment_folder(self) -> str:
        return self.folder or f"runs/{self.experiment}"

    @property
    def data_folder(self) -> str:
        """Where the prepared data go."""
        folder = (self.prepare and self.prepare.folder) or "${folder}/data"
        return folder.replace("${folder}", self.experiment_folder)


@dataclass(frozen=True)
class Experiment:
    """An experiment and its runs, in an order in which each comes after those it starts from."""

    config: ExperimentConfig
    arms: list[Arm]

    @property
    def folder(self) -> str:
        return self.config.experiment_folder


def is_experiment(mapping: dict[str, Any]) -> bool:
    """Whether a merged configuration is an experiment file rather than a single run."""
    return "experiment" in mapping


def load_experiment(mapping: dict[str, Any], origins: Origins, *, quick: bool = False) -> Experiment:
    """The experiment and its runs, every one validated before the first starts. ``quick``: with its key 'quick' laid over it.

    Raises ``UserError``.
    """
    length = 1.0
    if quick:
        over = dict(validate(ExperimentConfig, mapping, origins).quick)
        if not over:
            raise UserError("--quick: the experiment has no key 'quick', which says what its small form is; add it")
        length = over.pop("length", 1.0)
        for path in [path for path in origins if path[0:1] == ("quick",)]:
            origins = origins | {path[1:]: origins[path]}
        mapping = merge(mapping, over)
        for key in ("experiment", "folder"):
            if mapping.get(key):
                mapping = mapping | {key: f"{mapping[key]}_quick"}
    config = validate(ExperimentConfig, mapping, origins)
    return Experiment(config, arms_of(config.model_dump(), config.experiment_folder, origins, length))
