"""What the model card (README.md) of a start checkpoint states of its licence, languages, base model and optimizer."""

from __future__ import annotations

import re
from pathlib import Path

from megarewarm.checkpoint.lineage import StatedTerms
from megarewarm.data.text.hub_tokenizer import HUB_NAME

_MOST_BYTES = 65_536
_CACHED = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/")
_VALUE = {
    "license": r"[a-z0-9][a-z0-9.-]*",
    "language": r"[a-z]{2,3}(?:-[A-Za-z]+)?",
    "base_model": r"\w[\w.-]*/\w[\w.-]*",
    "optimizer": "adamw|muon",
}


def read_card(name: str, folder: Path) -> StatedTerms:
    """The facts for the checkpoint ``name`` (as in start.from) in ``folder``. One with a hub name is the base model itself.
    Values that don't have the hub's form are ignored, because the file is not trusted."""
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST_BYTES)
    except OSError:
        text = ""
    block = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    facts = {key: _values(block[1] if block else "", key) for key in _VALUE}
    hub = None if Path(name).exists() else HUB_NAME.fullmatch(name)
    cached = _CACHED.search(str(folder))
    base = hub[1] if hub else "/".join(cached.groups()) if cached else next(iter(facts["base_model"]), None)
    license_, optimizer = (next(iter(facts[key]), None) for key in ("license", "optimizer"))
    return StatedTerms(license=license_, languages=facts["language"], base_model=base, optimizer=optimizer)


def _values(block: str, key: str) -> list[str]:
    """The values of ``key`` in YAML's block or flow style; a full YAML reader would be one more thing to attack."""
    found = re.search(rf"^{key}:[ \t]*(.*(?:\n[ \t]*- .*)*)", block, re.MULTILINE)
    words = re.split(r"[\s,\[\]]+", found[1]) if found else []
    plain = [word.strip("'\"") for word in words if word not in ("", "-")]
    return [word for word in plain if re.fullmatch(_VALUE[key], word, re.ASCII)]
