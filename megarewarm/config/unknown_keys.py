"""What somebody may have meant by a key that the schema doesn't have."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from megarewarm.config.foreign_names import ours
from megarewarm.errors import nearest


def _inner(annotation: Any) -> Any:
    """The section that an annotation may hold, whatever surrounds it; else what is left of the annotation."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            inside = [_inner(choice) for choice in get_args(annotation) if choice is not type(None)]
            return next((choice for choice in inside if _is_section(choice)), inside[0])
        else:
            return annotation


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def known_keys(model: Any, path: Sequence[str | int]) -> list[str]:
    """Names of the keys that the schema knows at ``path`` (the parent of an unknown key)."""
    current = _inner(model)
    for part in path:
        if get_origin(current) is list:
            current = _inner(get_args(current)[0])
            continue
        if not _is_section(current):
            return []
        field = next((field for name, field in current.model_fields.items() if (field.alias or name) == str(part)), None)
        if field is None:
            return []
        current = _inner(field.annotation)
    if get_origin(current) is list:
        current = _inner(get_args(current)[0])
    return [field.alias or name for name, field in current.model_fields.items()] if _is_section(current) else []


def meant(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Dotted keys of ``model`` that an unknown key at ``path`` may stand for, the likeliest ones; none where nothing is near.

    What another trainer calls so comes first, then the same name in another section, a similar one in the same section, and a
    similar one in another.
    """
    *section, name = path
    here = [".".join((*section, key)) for key in known_keys(model, section)]
    tops = known_keys(model, [])
    anywhere = [*tops, *(f"{top}.{key}" for top in tops for key in known_keys(model, [top]))]
    foreign = ours(name)
    if foreign is not None and foreign in anywhere:
        return [foreign]
    if same := [key for key in anywhere if f".{key}".endswith(f".{name}")]:
        return same
    return _near(name, here) or _near(name, anywhere)


def foreign_meaning(model: type[BaseModel], name: str) -> str:
    """What the key means that another trainer calls ``name``, in the schema's first words; empty for names of no other."""
    section: Any = model
    *above, last = (ours(name) or "").split(".")
    for part in above:
        section = _inner(section.model_fields[part].annotation) if part in section.model_fields else None
        if not _is_section(section):
            return ""
    field = next((field for key, field in section.model_fields.items() if (field.alias or key) == last), None)
    text = re.split(r"[.:;](?:\s|$)", (field.description or "") if field is not None else "")[0]
    return text[:1].lower() + text[1:]


def _near(name: str, dotted: Sequence[str]) -> list[str]:
    by_name = {key.rpartition(".")[2]: key for key in reversed(dotted)}
    hint = nearest(name, by_name)
    return [by_name[hint.split("'")[1]]] if hint else []
