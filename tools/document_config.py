#!/usr/bin/env python3
"""Write docs/config.md and docs/config.schema.json from the schema, docs/neox_config.md from the tables of GPT-NeoX's keys, and
docs/api.md from the docstrings of the Python interface."""

from __future__ import annotations

import find_megarewarm  # isort: skip

import inspect
import re

from megarewarm.arguments import Parser
from megarewarm.config.document import json_schema, markdown
from megarewarm.config.neox_document import neox_markdown
from megarewarm.process import run

DOCS = find_megarewarm.ROOT / "docs"

_HEAD = """\
# Python interface

`import megarewarm` offers what follows, in scripts, notebooks and threads; the folder `examples/` uses it. These names
are stable; other modules may change between versions. Bad input raises `megarewarm.UserError`, whose message names what
was expected and what to do. Generated from the docstrings by `python tools/document_config.py`; do not edit.
"""


def api_markdown() -> str:
    """The page of ``megarewarm.api.__all__``: functions, then classes with their own methods and properties."""
    from megarewarm import api

    parts = [_HEAD]
    names = [name for name in api.__all__ if name != "UserError"]
    for name in sorted(names, key=lambda name: (inspect.isclass(getattr(api, name)), name)):
        thing = getattr(api, name)
        if not inspect.isclass(thing):
            parts.append(_entry("##", f"megarewarm.{name}", thing))
            continue
        parts.append(f"## megarewarm.{name}\n\n{_text(thing)}\n")
        for member, value in vars(thing).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                is_method = inspect.isfunction(value)
                parts.append(_entry("###", member, value) if is_method else f"### {member}\n\n{_text(value)}\n")
    return "\n".join(parts)


def _entry(level: str, name: str, function: object) -> str:
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))  # type: ignore[arg-type]
    short = name.rpartition(".")[2]
    return f"{level} {name}\n\n```python\n{short}{signature}\n```\n\n{_text(function)}\n"


def _text(thing: object) -> str:
    """A docstring as Markdown: sections such as 'Args:' become lists."""
    lines = []
    for line in (inspect.getdoc(thing) or "").replace("``", "`").splitlines():
        inside = line.startswith("    ")
        new_item = inside and not line.startswith("     ") and ": " in line
        lines.append(
            f"- {line.strip()}" if new_item else f"  {line.strip()}" if inside else line.rstrip(":") + ":" * line.endswith(":")
        )
    text = "\n".join(lines)
    for section in ("Args:", "Returns:"):
        text = text.replace(f"{section}\n", f"**{section.rstrip(':')}**\n\n")
    return text


def main() -> None:
    Parser(description=__doc__).parse_args()
    pages = {
        "config.md": markdown(),
        "config.schema.json": json_schema(),
        "neox_config.md": neox_markdown(),
        "api.md": api_markdown(),
    }
    for name, text in pages.items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)


if __name__ == "__main__":
    run(main)
