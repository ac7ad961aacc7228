"""A tokenizer by its name on the Hugging Face hub: ``organisation/name@revision``, from the local cache or by download."""

from __future__ import annotations

import re
from pathlib import Path

from megarewarm.data.text.end_of_document import TOKENIZER_FILES
from megarewarm.errors import UserError

# neither part of the name, nor any of the revision, may begin with a dot: both become paths in the cache
HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*?)(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?", re.ASCII)
SIDE_FILES = [*TOKENIZER_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]


def local_tokenizer(name: str | Path) -> Path:
    """``name`` itself where that is there or is no hub name; else the folder that holds the hub's tokenizer.

    Raises ``UserError`` where a hub name leads nowhere.
    """
    match = HUB_NAME.fullmatch(str(name))
    if Path(name).exists() or match is None or Path(name).suffix in (".json", ".model"):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return Path(name)
    problem: Exception | None = None
    for local in (True, False):
        try:
            folder = Path(
                snapshot_download(
                    match["repository"], revision=match["revision"], allow_patterns=SIDE_FILES, local_files_only=local
                )
            )
        except Exception as error:  # the hub's own errors, and those of whatever carries its requests
            problem = error
            continue
        if any((folder / file).is_file() for file in TOKENIZER_FILES):
            return folder
        problem = None
    why = "holds no tokenizer" if problem is None else f"can't be had ({str(problem).strip().splitlines()[0]})"
    raise UserError(
        f"{Path(name).absolute()} does not exist, and {name} on the Hugging Face hub {why}: give a tokenizer's file, or run "
        f"'hf download {match['repository']}' where there is a network"
    ) from problem
