"""The tensors of native checkpoints, by torch.distributed.checkpoint, stored by name: any layout loads what any other wrote.
A checkpoint is a folder that appears by a rename once it is complete: tensors, ``state.json``, checksums, all on the disk."""

from __future__ import annotations

import errno
import logging
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megarewarm.checkpoint.own.integrity import SUMS_FILE, write_sums
from megarewarm.checkpoint.own.misplaced_rows import Misplaced
from megarewarm.checkpoint.own.slices import SlicesToLoad, SlicesToSave, local
from megarewarm.checkpoint.own.state import STATE_FILE, TrainingState, write_state
from megarewarm.checkpoint.own.tensor_index import TensorIndexReader
from megarewarm.errors import UserError
from megarewarm.files import publish_folder, sha256
from megarewarm.parallel.agreement import gather, on_all_ranks, position
from megarewarm.parallel.collective import collective
from megarewarm.parallel.placement import TensorSlice
from megarewarm.parallel.ranks import is_rank_loss

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor | TensorSlice]
"""Tensors of a checkpoint by name: whole ones, which are equal on all ranks, or this rank's slices."""
PARTIAL = ".partial"
_LEFT = "-left"


@contextmanager
def _quietly_alone() -> Iterator[None]:
    """Without torch's warning that a single process has no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _TensorWriter(FileSystemWriter):
    """torch's writer, with the system's error message: torch's own omits it for a write that fails within a tensor."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # here, because an exception that is sent to other ranks loses its cause
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from error


@collective
def write(
    final: Path,
    state: TrainingState,
    tensors: Mapping[str, Tensor | TensorSlice],
    group: dist.ProcessGroup | None = None,
    *,
    planner: SavePlanner | None = None,
    file_per_tensor: bool = False,
) -> None:
    """Write the checkpoint ``final``. All ranks of ``group`` call it, with ``Tensors`` whose slices make up the wholes.

    An earlier one is replaced once the new one is complete. ``planner`` and ``file_per_tensor``: see ``stream``.
    Raises ``OSError`` on every rank if the disk refuses on any; the partial checkpoint is removed.
    """
    rank, ranks = position(group)
    partial = final.with_name(final.name + PARTIAL)

    def prepare() -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        partial.mkdir()

    def finish(digests: Mapping[str, str]) -> None:
        write_state(partial, state)
        rest = [file for file in partial.iterdir() if file.name not in digests]
        write_sums(partial, {**digests, **{file.name: sha256(file) for file in rest}})
        replaced = final.with_name(f"{final.name}-replaced{PARTIAL}")

        def make_room() -> None:
            if final.exists():
                remove(replaced)
                set_aside(final, replaced)

        publish_folder(partial, final, make_room)
        remove(replaced)

    try:
        on_all_ranks(prepare if rank == 0 else None, OSError, group)
        writer = _TensorWriter(partial, single_file_per_rank=not file_per_tensor, sync_files=False)
        try:
            with _quietly_alone():
                dcp.save(
                    {name: local(tensor) for name, tensor in tensors.items()},
                    storage_writer=writer,
                    planner=planner or SlicesToSave(tensors),
                    process_group=group,
                    no_dist=ranks == 1,
                )
        except dcp.CheckpointException as error:
            raise _cause(error) from error
        # each rank hashes its own files, because the others may not see them yet
        own = f"__{rank}_"
        share = on_all_ranks(lambda: {f.name: sha256(f) for f in partial.iterdir() if f.name.startswith(own)}, OSError, group)
        digests = {name: value for each in gather(share, group) for name, value in (each or {}).items()}
        on_all_ranks((lambda: finish(digests)) if rank == 0 else None, OSError, group)
    except (OSError, UserError):
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _cause(error: dcp.CheckpointException) -> BaseException:
    """The failure of a rank as ``OSError``: the disk, or a tensor that could not be read; any other error is a defect and is
    not converted."""
    for rank, (failure, _) in error.failures.items():
        if isinstance(failure, UserError):
            return failure
        if isinstance(failure, OSError):
            return OSError(f"{failure}, on rank {rank}")
    return error


def remove(folder: Path) -> None:
    """Remove a folder that no longer counts, if it is there.

    On NFS a file that a process still has open stays in it as ``.nfs...`` until that closes it, and other file systems call it
    busy: then the rest is removed, and the folder goes with the next checkpoint. Raises ``OSError`` for any other reason.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        log.warning("%s: not removed yet (%s): a file in it is still open, on this host or another", folder, error.strerror)
        if _LEFT not in folder.stem:
            # its name is needed for the next one
            number = next(n for n in range(10**6) if not folder.with_name(f"{folder.stem}{_LEFT}{n}{PARTIAL}").exists())
            folder.rename(folder.with_name(f"{folder.stem}{_LEFT}{number}{PARTIAL}"))


def set_aside(checkpoint: Path, doomed: Path) -> None:
    """Give a checkpoint that is to go the name ``doomed``, so that a kill leaves nothing that looks like one.

    A folder that came with the image of a container can't be renamed (EXDEV): what makes it a checkpoint goes first then, and
    it is removed where it is. Raises ``OSError``.
    """
    try:
        checkpoint.rename(doomed)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        for file in (SUMS_FILE, STATE_FILE):
            (checkpoint / file).unlink(missing_ok=True)
        remove(checkpoint)


@collective
def load(checkpoint: Path, tensors: Mapping[str, Tensor | TensorSlice], *, alone: bool = False) -> None:
    """Fill ``tensors`` in place from a checkpoint. Raises ``UserError`` naming a tensor that is missing or misshapen. All
    ranks call it, unless ``alone``."""
    several = not alone and position()[1] > 1
    stored = stored_tensors(checkpoint)
    for name, tensor in tensors.items():
        if name not in stored:
            raise UserError(f"{checkpoint}: tensor '{name}' is missing; the checkpoint is of another model or damaged")
        if tuple(tensor.shape) != stored[name][0]:
            raise UserError(
                f"{checkpoint}: tensor '{name}' has shape {stored[name][0]}, this run's model needs {tuple(tensor.shape)}; "
                f"make 'model' agree with the checkpoint, or leave 'model' out"
            )
    try:
        with _quietly_alone():
            dcp.load(
                {name: local(tensor) for name, tensor in tensors.items()},
                storage_reader=TensorIndexReader(checkpoint),
                planner=SlicesToLoad(tensors),
                no_dist=not several,
            )
    except (OSError, EOFError, RuntimeError, dcp.CheckpointException) as error:
        if is_rank_loss(error):
            raise  # another rank is gone, which is no fault of the checkpoint
        first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"{checkpoint}: can't be read ({first}); name another checkpoint") from error


def stored_tensors(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of every tensor in a checkpoint. Raises ``UserError``."""
    metadata = _read_index(checkpoint)[0]
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            found[name] = (tuple(entry.size), entry.properties.dtype)
    return found


def misplaced_rows(checkpoint: Path) -> Misplaced | None:
    """The vocabulary rows that an old revision misplaced, and which are read correctly."""
    try:
        return _read_index(checkpoint)[1]
    except UserError:
        return None  # the loader gets the note


def _read_index(checkpoint: Path) -> tuple[Metadata, Misplaced | None]:
    reader = TensorIndexReader(checkpoint)
    try:
        return reader.read_metadata(), reader.misplaced
    except (OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint}: the tensor index is missing or damaged ({error}); name another checkpoint") from error
