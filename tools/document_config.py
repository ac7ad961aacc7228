"""Write docs/config.md and docs/config.schema.json from the schema, docs/neox_config.md from the tables of GPT-NeoX's keys."""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
from pathlib import Path

from megarewarm.config.document import json_schema, markdown
from megarewarm.config.neox_document import neox_markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"

if __name__ == "__main__":
    pages = {"config.md": markdown(), "config.schema.json": json_schema(), "neox_config.md": neox_markdown()}
    for name, text in pages.items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)
