"""The schema as documentation: ``docs/config.md`` for people, a JSON Schema for editors. Both follow from schema.py."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megarewarm.config.budget import Budget
from megarewarm.config.experiment import ExperimentConfig
from megarewarm.config.paths import PathMark
from megarewarm.config.reliability import Duration
from megarewarm.config.schema import RunConfig
from megarewarm.config.section import OneOf
from megarewarm.record.layout import RUN_FORMAT

_INTRODUCTION = """\
# Configuration

Generated from `megarewarm/config/schema.py` by `python tools/document_config.py`; do not edit.

A run is a YAML file with the sections below. `extends: other.yml` (or a list) lays a file over others, paths relative to
itself; several files on the command line merge from left to right; `section.key=value` words override single keys
(`data.train.0.weight=2` reaches into a list). Mappings merge key by key, lists and values replace. An unknown key is an
error. A file with the key `experiment` holds several runs (last section).

A *length of training* is written as steps (`500` or `500 steps`), tokens (`2.5B tokens`, `2.5B`), epochs of the new data
(`2 epochs`; the start and `--dry-run` count them and show the steps) or a share of the run (`1%`). Counts of steps, tokens and
sequences may be written `10_000`, `10,000`, `5e6` or `5M`. Where only tokens make sense `10M` and `10M tokens` are the same; a
*share* may be `0.05` or `5%`. An interval is above 0; null is never. In a *path* `~` is the home folder and `$NAME` or
`${NAME}` the environment's; one that is not set is refused. Relative paths are relative to the working directory. Without
quotes, `yes`, `no`, `on` and `off` are text where text is expected and switches elsewhere; `0100` is a hundred, `23:30:00`,
`1:30` and `2026-11-28` are text.

Editors that know the YAML language server check and complete these files with
`# yaml-language-server: $schema=../docs/config.schema.json` in their first line.
"""


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        names = [name for mark in marks if isinstance(mark, OneOf) for name in mark.names]
        return "path" if any(isinstance(mark, PathMark) for mark in marks) else _choices(names) or _type_name(inner)
    if origin is Literal:
        return _choices(get_args(annotation))
    if origin in (Union, types.UnionType):
        names = [_type_name(arg) for arg in get_args(annotation) if arg is not type(None)]
        return " or ".join(names) + (", or null" if type(None) in get_args(annotation) else "")
    if origin is list:
        return f"list of {_type_name(get_args(annotation)[0])}"
    if origin is tuple:
        return f"{len(get_args(annotation))} numbers"
    if origin is dict:
        value = get_args(annotation)[1]
        return "mapping" if value is Any else f"mapping of names to {_type_name(value)}"
    if annotation is Duration:
        return "time"
    if annotation is Budget:
        return "length of training"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    plain = {int: "integer", float: "number", str: "text", bool: "true or false"}
    if annotation not in plain:
        raise ValueError(f"a key of type {annotation}, which has no name for people yet")
    return plain[annotation]


def _choices(values: Iterable[Any]) -> str:
    return " \\| ".join(f"`{value}`" for value in values)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, BaseModel) and not isinstance(value, Budget | Duration):
        return "its defaults"
    if isinstance(value, Budget):
        return f"`{value}`"
    text = json.dumps(list(value) if isinstance(value, tuple) else value)
    return f"`{text}`"


def _models_below(model: type[BaseModel], found: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """All sections reachable from ``model``, in order of first mention."""
    if model in found or model in (Budget, Duration):
        return found
    found.append(model)

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            _models_below(annotation, found)
        for arg in get_args(annotation):
            visit(arg)

    for field in model.model_fields.values():
        visit(field.annotation)
    return found


def _section(model: type[BaseModel]) -> str:
    lines = [
        f"## {model.__name__}",
        "",
        _text(model),
        "",
        "| key | value | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in model.model_fields.items():
        meaning = (field.description or _first_line(field.annotation)).replace("|", "\\|")
        kind = _type_name(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)
        lines.append(f"| `{field.alias or name}` | {kind} | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _text(model: type[BaseModel]) -> str:
    return inspect.getdoc(model) or ""


def _first_line(annotation: Any) -> str:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return _text(candidate).splitlines()[0]
    raise ValueError(f"a key of type {annotation} has no description")


def markdown() -> str:
    """The text of docs/config.md. Raises ``ValueError`` for a key without a description, or of a type that has no name here."""
    sections: list[type[BaseModel]] = []
    _models_below(RunConfig, sections)
    _models_below(ExperimentConfig, sections)
    return (_INTRODUCTION + "\n" + "\n".join(_section(model) for model in sections)).replace("``", "`")


def json_schema() -> str:
    """The JSON Schema of a config file: a run, a part of one, or an experiment, with ``extends``."""
    run = RunConfig.model_json_schema(by_alias=True)
    experiment = ExperimentConfig.model_json_schema(by_alias=True)
    definitions = {**run.pop("$defs"), **experiment.pop("$defs"), "Run": run}
    # a file or an arm may hold a part of a run, so no key is required in it; items of lists are complete
    for name, schema in definitions.items():
        if name not in ("Source", "ValidationSet", "WandbConfig"):
            schema.pop("required", None)
    extends = {
        "description": "Files (relative to this one) that this file is laid over.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    run["properties"]["extends"] = experiment["properties"]["extends"] = extends
    run["properties"]["format"] = {"description": "The version of a run folder's config.yaml.", "const": RUN_FORMAT}
    experiment["properties"]["base"] = {"$ref": "#/$defs/Run"}
    stages = {"description": "A chain: each starts from the one before.", "type": "array", "items": {"$ref": "#/$defs/Run"}}
    axes = {"description": "Keys with their values, or names with labels.", "type": "object", "minProperties": 1}
    names = {"description": "Other runs in the group's figure.", "type": "array", "items": {"type": "string"}}
    permute = {"description": "What is put into several orders.", "enum": ["data.train", "stages"]}
    orders = {"description": "Which orders.", "enum": ["all", "latin"], "default": "all"}
    definitions["Arm"] = run | {"properties": run["properties"] | {"stages": stages}}
    swept = {"stages": stages, "axes": axes, "with": names, "permute": permute, "orders": orders}
    definitions["Sweep"] = run | {"properties": run["properties"] | swept}
    experiment["properties"]["runs"]["items"] = {"$ref": "#/$defs/Arm"}
    experiment["properties"]["sweeps"]["items"] = {"$ref": "#/$defs/Sweep"}
    experiment["required"] = ["experiment"]
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "megarewarm configuration",
        "if": {"required": ["experiment"]},
        "then": experiment,
        "else": {"$ref": "#/$defs/Run"},
        "$defs": definitions,
    }
    return json.dumps(whole, indent=1) + "\n"
