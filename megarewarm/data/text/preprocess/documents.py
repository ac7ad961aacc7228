"""The documents of text files as one iterable, for readers of text rather than tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megarewarm.data.text.preprocess.records import EMPTY, Record, Span, input_files, place_in_words, records, spans_of
from megarewarm.errors import UserError

_EXAMPLES = 5  # broken records that are described
_HOPELESS = 100  # broken records before the first good one at which reading stops


class BadInput(UserError):
    """The text itself is damaged: resuming would not help."""


class Skipped:
    """The records that were left out: how many, by reason, and the first of them in words.

    ``strict`` raises ``UserError`` at the first, be it broken or empty. Else ``UserError`` is raised
    where none of the first hundred records can be used, if ``hopeless_after`` allows.
    """

    def __init__(self, *, strict: bool = False, may_be_hopeless: bool = True) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []
        self._strict = strict
        self._may_be_hopeless = may_be_hopeless

    @property
    def broken(self) -> int:
        """Records that can't be used; empty ones are not counted here."""
        return self.counts.total() - self.counts[EMPTY]

    def add(self, span: Span, record: Record, documents: int) -> None:
        """Count a record without text; ``documents``: good ones so far."""
        self.counts[record.reason] += 1
        if record.reason == EMPTY:
            if self._strict:
                where = place_in_words(span, record)
                raise BadInput(f"{where}: the document is empty (--strict stops at the first record without text)")
            return
        if self._strict or self.broken <= _EXAMPLES:
            self.examples.append(f"{place_in_words(span, record)}: {record.detail}")
        if self._strict:
            raise BadInput(f"{self.examples[-1]} (--strict stops at the first such record)")
        if self._may_be_hopeless and not documents and self.broken == _HOPELESS:
            raise BadInput(f"none of the first {_HOPELESS} documents is valid. {self.examples[0]}")


class Documents:
    """The documents in text files, an iterable that can be read more than once (stdin only once).

    .jsonl (or .json): one JSON object per line, its text under ``text_key`` (a path of keys is divided by dots). .txt:
    documents are divided by lines that read ``<|endoftext|>``; without such a line the whole file is one document. Both
    may be compressed (.gz, .zst). .parquet: the column ``text_key``. ``inputs`` may be files, folders and patterns.
    Memory: one document and a few MB.

    Attributes, set by the latest reading: ``skipped`` (records left out), ``bytes_read`` (of ``total_bytes`` on the disk).
    Raises ``UserError`` for files that can't be read, and where no record is valid.
    """

    def __init__(self, inputs: Sequence[str | Path], text_key: str = "text") -> None:
        self.paths = input_files(inputs)
        self.text_key = text_key
        self._spans = [span for path in self.paths for span in spans_of(path)]
        self.total_bytes = sum(span.size for span in self._spans)
        self.bytes_read = 0
        self.skipped = Skipped()

    def __iter__(self) -> Iterator[str]:
        self.skipped = Skipped()
        before = good = 0

        def read(count: int) -> None:
            self.bytes_read = before + count

        for span in self._spans:
            for record in records(span, self.text_key, read):
                if record.text is None:
                    self.skipped.add(span, record, good)
                else:
                    good += 1
                    yield record.text
            before += span.size
        if self.skipped.broken and not good:
            raise UserError(f"no document is valid. {self.skipped.examples[0]}")


def first_bytes(documents: Iterable[str], limit: int, progress: Callable[[int], None] | None = None) -> Iterator[str]:
    """The documents up to the one that reaches ``limit`` bytes of UTF-8; ``progress`` gets the bytes so far."""
    done = 0
    for text in documents:
        yield text
        done += len(text.encode())
        if progress:
            progress(min(done, limit))
        if done >= limit:
            break
