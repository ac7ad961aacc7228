"""Names of the Hugging Face hub: ``organisation/name@revision``, from the local cache or by download."""

from __future__ import annotations

from pathlib import Path

from megarewarm.checkpoint.foreign.huggingface import WEIGHT_FILES, weight_files
from megarewarm.checkpoint.foreign.json_file import first_line
from megarewarm.data.text.hub_tokenizer import HUB_NAME, SIDE_FILES
from megarewarm.errors import UserError


def resolve(name_or_folder: str) -> Path:
    """The folder of a checkpoint: the folder itself, or the local copy of the hub's ``organisation/name@revision``.

    The local Hugging Face cache comes first, so that a run starts without a network and from the same files;
    missing files are downloaded. Raises ``UserError`` if neither works.
    """
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    match = HUB_NAME.fullmatch(name_or_folder)
    if not match:
        raise UserError(f"{Path(name_or_folder).absolute()}: no such folder, and not a hub name (organisation/name@revision)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name_or_folder}: no such folder in {Path.cwd()}; for a model of that name on the Hugging Face hub, pip install "
            f"huggingface_hub"
        ) from None
    repository, revision = match["repository"], match["revision"]
    problem: Exception | None = None
    lacking = ""
    # Hub folders often hold the same weights twice: .bin files only where there is nothing else.
    for local, weights in ((True, "*"), (False, "*.safetensors"), (False, "*.bin")):
        try:
            folder = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=["*.json", "README.md", *SIDE_FILES, weights],
                    local_files_only=local,
                )
            )
        except Exception as error:  # the hub's own errors, and those of whatever carries its requests
            problem = error
            continue
        if not (lacking := _lacking(folder)):
            return folder
        problem = None
    if problem is None:
        raise UserError(
            f"{name_or_folder}: its local copy {folder} lacks {lacking}: run 'hf download {repository}' where there is a "
            f"network and copy it, or use another repository"
        )
    raise UserError(
        f"{name_or_folder}: neither a folder, nor in the Hugging Face cache, nor to be downloaded "
        f"({first_line(problem)}): give a folder, or run 'hf download {repository}' where there is a network and copy it"
    ) from problem


def _lacking(folder: Path) -> str:
    """What of configuration and weights, every shard of them, is not there; empty if all is."""
    if not (folder / "config.json").is_file():
        return "config.json"
    try:
        return next((file.name for file in weight_files(folder) if not file.is_file()), "")
    except UserError:
        return f"weights ({', '.join(WEIGHT_FILES)})"
