"""The values of training rows: measured before an update, compared with the loss after it, summed by source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megarewarm.data.mixture.validation import Slice
from megarewarm.packed_rows import plain
from megarewarm.record.events import ValueEvent
from megarewarm.record.layout import VALUES_FILE
from megarewarm.record.values import RowPart, ValuedRow
from megarewarm.training.after_step.part import Context, Moment
from megarewarm.training.output.row_values import RowValues
from megarewarm.training.run import Update
from megarewarm.training.start.valuation import validation_rows, valued_rows, valued_steps
from megarewarm.training.valuing import StepValue, carried_rate, mean_loss, value_step


@dataclass(frozen=True)
class _Valued:
    """A step that was valued and may now be made. ``chosen``: rows of its batch; ``rate``: by which their values count."""

    step: int
    chosen: list[int]
    rate: float
    windows: dict[str, Slice]
    values: dict[str, StepValue]


class Value:
    """Writes the event 'value' for each set, and RUN/values.jsonl."""

    def __init__(self, context: Context) -> None:
        self._context = context
        run = context.run
        settings = run.plan.config.valuation
        self._steps = valued_steps(run.plan.config, run.plan.origin.step)
        self._valued: _Valued | None = None
        self._written: RowValues | None = None
        if settings is None:
            return
        self._sets = {windows.name: windows for windows in run.validation if windows.name in settings.against}
        run.before_update = self._before
        if run.ranks.is_main:
            self._written = RowValues(context.folder.path / VALUES_FILE, settings.keep_extremes)
            self._written.cut(run.step)

    def state(self) -> dict[str, Any]:
        return {} if self._written is None else {"valued_rows": self._written.rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        missing = state.get("valued_rows", 0) - self._written.rows if self._written is not None else 0
        if missing > 0:
            self._context.voice.warn(f"{VALUES_FILE} lacks {missing:,} rows of earlier steps; the sums begin with what is left")

    def _before(self, update: Update) -> None:
        run = self._context.run
        step, self._valued = run.step + 1, None
        if (number := self._steps.get(step)) is None:
            return
        config = run.plan.config
        assert config.valuation is not None
        chosen, count = valued_rows(config, step), validation_rows(config)
        windows = {name: windows.portion(number, count) for name, windows in self._sets.items()}
        found = value_step(run, update, list(windows.values()), chosen)
        values = {name: value for name, value in zip(windows, found, strict=True) if value is not None}
        rate = carried_rate(run, update.lr) if config.valuation.carry else update.lr
        self._valued = _Valued(step, chosen, rate, windows, values)

    def after(self, moment: Moment) -> None:
        run, valued = self._context.run, self._valued
        self._valued = None
        if moment.went_back:
            if self._written is not None:
                self._written.cut(run.state.left_out[-1][0] - 1)
        elif valued is not None and valued.step == run.step and valued.values:
            self._write(valued)

    def _write(self, valued: _Valued) -> None:
        run = self._context.run
        after = {name: mean_loss(run, valued.windows[name])[0] for name in valued.values}
        if self._written is None:
            return
        self._written.append(self._rows(valued, self._written))
        for name, value in valued.values.items():
            event = ValueEvent(
                step=run.step,
                tokens=run.plan.tokens(run.step),
                name=name,
                sources=dict(self._written.sums[name]),
                rows=dict(self._written.counts[name]),
                samples=value.samples,
                momentum=value.momentum,
                decay=value.decay,
                rest=value.loss - after[name] - value.predicted,
                predicted=value.predicted,
                measured=value.loss - after[name],
            )
            self._context.metrics.event("value", **event.values())

    def _rows(self, valued: _Valued, written: RowValues) -> list[ValuedRow]:
        run = self._context.run
        first = run.plan.samples(run.step - 1)
        found = []
        for i, row in enumerate(valued.chosen):
            place = run.data.places(first + row, 1)[0]
            parts = [RowPart(part.document, part.offset, part.tokens) for part in place.parts]
            values = {name: value.rows[i] * valued.rate for name, value in valued.values.items()}
            made = ValuedRow(run.step, place.position, place.source, place.path, place.sample, parts, values)
            if written.is_extreme(made):
                made = ValuedRow(**{**vars(made), "tokens": plain(run.data.rows(place.position, 1)[0]).tolist()})
            found.append(made)
        return found
