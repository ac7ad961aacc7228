"""Write docs/config.md and docs/config.schema.json from the schema."""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
from pathlib import Path

from megarewarm.config.document import json_schema, markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"

if __name__ == "__main__":
    for name, text in (("config.md", markdown()), ("config.schema.json", json_schema())):
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)
