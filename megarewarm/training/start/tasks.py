"""The tasks of a run: their items as rows of token ids, with the tokenizer of the run's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarewarm.checkpoint.export.tokenizer_files import exported_tokenizer
from megarewarm.checkpoint.tokenizer_source import TokenizerSource, loaded
from megarewarm.config.model import ModelConfig
from megarewarm.data.tasks.encode import EncodedTask, Prefix, RowBatch, batches, encode_task
from megarewarm.data.tasks.items import Task, read_tasks
from megarewarm.data.text.tokenizers import HuggingFaceTokenizer
from megarewarm.errors import UserError
from megarewarm.parallel.mesh import Layout
from megarewarm.spelling import counted
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.texts import Texts


@dataclass(frozen=True)
class RunTasks:
    """``tasks``, and the rows of all of them in ``batches``, which all ranks have alike. ``notes``: for the user."""

    tasks: list[EncodedTask]
    batches: list[RowBatch]
    notes: list[str]

    @property
    def tokens(self) -> int:
        """Positions that one test computes, padding included."""
        return sum(batch.inputs.size for batch in self.batches)

    def __str__(self) -> str:
        return ", ".join(f"{each.task.name} {counted(len(each.task.items), 'item')}" for each in self.tasks)


def open_tasks(plan: Plan, texts: Texts, layout: Layout) -> RunTasks:
    """The tasks of a run of ``plan``. Raises ``UserError`` for a file that is no task, an item that the model can't read, and
    where no tokenizer is known."""
    config, settings = plan.config, plan.config.evaluation
    if not settings.tasks:
        return RunTasks([], [], [])
    tasks = read_tasks(settings.tasks)
    source = texts.source
    if source is None or source.file is None:
        raise UserError(
            "evaluation.tasks: no tokenizer is known for their text: none is beside the start checkpoint, and the token files "
            "name none; give data.tokenizer"
        )
    encoded = encode_tasks(tasks, source, plan.model, truncate=settings.tasks_truncate)
    size = (settings.micro_batch or config.training.micro_batch_size) * config.data.sequence_length
    multiple = layout.tensor if config.parallel.sequence else 1
    return RunTasks(encoded, batches([row for task in encoded for row in task.rows], size, multiple), notes_of(encoded, source))


def encode_tasks(tasks: Sequence[Task], source: TokenizerSource, model: ModelConfig, *, truncate: bool) -> list[EncodedTask]:
    """The rows of ``tasks`` for ``model`` with the tokenizer ``source``, whose file is known: the ids that transformers gives
    beside the exported weights. Raises ``UserError``."""
    assert source.file is not None
    tokenizer = loaded(source.file)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids = exported_tokenizer(source, model).ids
        begin, end = ids["bos"], ids["eos"]
    else:
        begin, end = source.stated.get("bos"), tokenizer.eod_id if source.eod is None else source.eod
    alone = end if begin is None else begin
    assert alone is not None
    prefix = Prefix(alone, tokenizer.added_before())
    positions, vocab_size = model.max_positions, model.vocab_size
    return [encode_task(task, tokenizer, prefix, positions, vocab_size, truncate=truncate) for task in tasks]


def notes_of(tasks: Sequence[EncodedTask], source: TokenizerSource) -> list[str]:
    """What a user must know of the rows."""
    notes = [
        f"{each.task.source}: the beginning of {counted(each.cut[0], 'context')} is dropped, the first in line {each.cut[1]}"
        for each in tasks
        if each.cut[0]
    ]
    assert source.file is not None
    tokenizer = loaded(source.file)
    if added := tokenizer.added_before():
        told = " ".join(str(tokenizer.token(number)) for number in added)
        notes.append(
            f"tasks: {told} is put before every context, as the tokenizer {source.file} does in transformers and lm-eval"
        )
    return notes
