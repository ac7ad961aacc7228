"""Whether a layout can carry a run, for the run itself, a dry run, and the ranking of layouts."""

from __future__ import annotations

from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.model.size import stage_costs
from megarewarm.parallel import pipeline, tensor
from megarewarm.parallel.mesh import Layout


def check_fit(config: RunConfig, model: ModelConfig, layout: Layout, teacher: ModelConfig | None = None) -> list[str]:
    """Remarks on layouts that work but could be better. Raises ``UserError`` naming the number to change otherwise.
    ``teacher``: the shape of that of ``distill``, which is laid out as the model is."""
    parallel, training = config.parallel, config.training
    if training.global_batch % layout.data:
        raise UserError(
            f"training.global_batch: {training.global_batch} sequences can't be shared evenly by {layout.data} data-parallel "
            f"ranks; choose a multiple of {layout.data}"
        )
    _check_shares(config, model, layout)
    if teacher is not None:
        try:
            _check_shares(config, teacher, layout)
        except UserError as error:
            raise UserError(f"distill: the teacher is laid out as the model is: {error}") from error
    if layout.pipeline == 1:
        return []
    share = training.global_batch // layout.data
    filled = -(-share // training.micro_batch_size)
    count = pipeline.micro_batches(parallel, share, training.micro_batch_size)
    if count == filled:
        return []
    return [
        f"parallel.schedule: '{parallel.schedule}' on {layout.pipeline} pipeline ranks runs {count} micro-batches, the batch "
        f"fills {filled}; the others are empty and cost their time. A smaller training.micro_batch or a larger "
        f"training.global_batch would use it"
    ]


def _check_shares(config: RunConfig, model: ModelConfig, layout: Layout) -> None:
    """Raise ``UserError`` if tensor ranks or pipeline stages can't share a model."""
    parallel, length = config.parallel, config.data.sequence_length
    if layout.tensor > 1:
        tensor.check(model, length, layout.tensor, parallel.sequence)
    if layout.pipeline > 1:
        stages = layout.pipeline * pipeline.stages_per_rank(parallel.schedule, parallel.stages_per_rank)
        pipeline.balance(model.num_layers, stages, *stage_costs(model, length))
