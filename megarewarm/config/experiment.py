"""An experiment file: data to prepare, one base run, and runs that differ from it by a few keys."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError, field_validator

from megarewarm.config.load import merge, validate
from megarewarm.config.schema import RunConfig
from megarewarm.config.section import Positive, Section
from megarewarm.config.yaml_text import Origins
from megarewarm.errors import UserError


class TokenizerConfig(Section):
    """A tokenizer trained on one of the corpora."""

    vocab_size: Positive = Field(description="Size of the vocabulary, special tokens included.")
    train_on: str = Field(description="Name of the corpus whose training text it learns from.")
    sample_mb: float = Field(8.0, gt=0, description="How much of that text is used, in megabytes.")


class CorpusConfig(Section):
    """A corpus of text, tokenised into NAME_train and NAME_validation."""

    from_: str | list[str] = Field(
        alias="from",
        description="installed_prose or installed_code (documentation and code of installed Python packages), or a list of "
        ".txt / .jsonl files.",
    )
    limit_mb: float | None = Field(None, gt=0, description="At most this much text, in megabytes; null: all of it.")


class PrepareConfig(Section):
    """Token files made before the first run. What already stands with the same parameters is kept."""

    folder: str | None = Field(None, description="Where the token files and the tokenizer go; null: ${folder}/data.")
    tokenizer: TokenizerConfig
    corpora: dict[str, CorpusConfig] = Field(min_length=1, description="The corpora by name.")
    validation_fraction: float = Field(0.02, gt=0, lt=0.5, description="Share of the documents held out.")


class ExperimentConfig(Section):
    """Several runs in one file. ``${folder}`` in any text stands for the experiment's folder."""

    experiment: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the experiment.")
    folder: str | None = Field(None, description="Folder of the experiment; null: runs/NAME.")
    prepare: PrepareConfig | None = Field(None, description="Data to prepare first; null: nothing.")
    base: dict[str, Any] = Field(description="Keys of a run (see below) that all runs share.")
    runs: list[dict[str, Any]] = Field(
        min_length=1, description="The runs in order: each a 'name' and the keys in which it differs from 'base'."
    )

    @field_validator("runs")
    @classmethod
    def _named(cls, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = [run.get("name") for run in runs]
        for i, name in enumerate(names):
            if not isinstance(name, str) or not name:
                raise ValueError(f"run {i} has no 'name'")
            if names.count(name) > 1:
                raise ValueError(f"two runs are named '{name}'")
        return runs

    @property
    def experiment_folder(self) -> str:
        return self.folder or f"runs/{self.experiment}"

    @property
    def data_folder(self) -> str:
        """Where the prepared data go."""
        return (self.prepare and self.prepare.folder) or f"{self.experiment_folder}/data"


def is_experiment(mapping: dict[str, Any]) -> bool:
    """Whether a merged configuration is an experiment file rather than a single run."""
    return "experiment" in mapping


def _fill(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace("${folder}", folder)
    if isinstance(value, list):
        return [_fill(item, folder) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, folder) for key, item in value.items()}
    return value


def _below(origins: Origins, prefix: tuple[str, ...]) -> Origins:
    return {path[len(prefix) :]: where for path, where in origins.items() if path[: len(prefix)] == prefix}


def load_experiment(mapping: dict[str, Any], origins: Origins) -> tuple[ExperimentConfig, list[RunConfig]]:
    """The experiment and its runs, every one validated before the first starts. Raises ``UserError``."""
    experiment = validate(ExperimentConfig, mapping, origins)
    filled = _fill(mapping, experiment.experiment_folder)
    try:
        experiment = ExperimentConfig.model_validate(filled)
    except ValidationError as error:  # pragma: no cover - the unfilled mapping was valid and filling changes only text
        raise UserError(str(error)) from None
    runs = []
    for i, arm in enumerate(experiment.runs):
        run = merge(experiment.base, arm)
        if "folder" in run:
            place = origins.get(("runs", str(i), "folder")) or origins.get(("base", "folder"), "config")
            raise UserError(f"{place}: a run of an experiment has no 'folder' of its own; set the experiment's")
        run["folder"] = f"{experiment.experiment_folder}/{arm['name']}"
        run_origins = _below(origins, ("base",)) | _below(origins, ("runs", str(i)))
        runs.append(validate(RunConfig, run, run_origins))
    return experiment, runs
