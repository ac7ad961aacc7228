#!/usr/bin/env python3
"""Write docs/config.md and docs/config.schema.json from the schema, docs/neox_config.md from the tables of GPT-NeoX's keys."""

from __future__ import annotations

import find_megarewarm  # isort: skip

from megarewarm.arguments import Parser
from megarewarm.config.document import json_schema, markdown
from megarewarm.config.neox_document import neox_markdown
from megarewarm.process import run

DOCS = find_megarewarm.ROOT / "docs"


def main() -> None:
    Parser(description=__doc__).parse_args()
    pages = {"config.md": markdown(), "config.schema.json": json_schema(), "neox_config.md": neox_markdown()}
    for name, text in pages.items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)


if __name__ == "__main__":
    run(main)
