"""The token files of a run: each is opened and its ids are checked once, for all readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megarewarm.config.data import ByScore, DataConfig, Source, is_suffix
from megarewarm.data.files.document_table import read_table, used
from megarewarm.data.files.listed_documents import by_score, listed
from megarewarm.data.files.split import Rule, split_documents
from megarewarm.data.files.token_file import TokenFile, TokenView, open_tokens
from megarewarm.errors import UserError
from megarewarm.spelling import counted


class TokenFiles:
    """The files that a run with this ``data`` section reads, for a model with ``vocab_size`` ids. Training sources, replays
    and validation sets share one object per file, and so its index, checksums and descriptor."""

    def __init__(self, data: DataConfig, vocab_size: int) -> None:
        self.data = data
        self.vocab_size = vocab_size
        self._by_name: dict[tuple[str, str | None], TokenFile] = {}
        # a file has several names: its prefix, its .bin, either with and without its dtype
        self._files: dict[tuple[Path, np.dtype], TokenFile] = {}
        self._checked: set[TokenFile] = set()
        self._views: dict[tuple[TokenFile, str | None, str, str | None], TokenView] = {}

    def open(self, path: str, dtype: str | None = None) -> TokenFile:
        """The file at ``path``, spelled as ``open_tokens`` takes it and raising as it does; its ids are not checked yet."""
        if (path, dtype) not in self._by_name:
            file = open_tokens(path, dtype=dtype, vocab_size=self.vocab_size)
            self._by_name[path, dtype] = self._files.setdefault((file.path, file.dtype), file)
        return self._by_name[path, dtype]

    def check(self, file: TokenFile) -> None:
        """Raise ``UserError`` if the ids of an opened file lie outside of the vocabulary (``check_vocabulary``)."""
        if file not in self._checked:
            file.check_vocabulary(self.vocab_size)
            self._checked.add(file)

    def view(self, source: Source) -> TokenView:
        """The tokens of a source, or of its part of a split, checked. Raises ``UserError``. Splits follow Megatron-LM's
        rounding in the ``megatron`` order, else GPT-NeoX's, whose data they are to fit."""
        file = self.open(source.path, source.dtype)
        self.check(file)
        key = (file, source.split, source.part, source.documents)
        if key not in self._views:
            self._views[key] = part_of(file, source, self.data)
        return self._views[key]

    def scored(self, source: Source) -> tuple[TokenView, list[str]]:
        """(the tokens of a source in the order that ``data.order`` makes of its scores, notes). Raises ``UserError``."""
        order = self.data.order
        assert isinstance(order, ByScore)
        view = self.view(source)
        place = source.scores or order.by
        if place is None:
            raise UserError(
                f"data.order sorts by scores, and nothing says which those of {view.file.path} are: give the source 'scores', "
                f"or data.order a 'by'"
            )
        if source.scores is None and is_suffix(place):
            place = f"{str(view.file.path).removesuffix('.bin')}.{place}"
        table = read_table(place, "scores", view.file)
        found, without = by_score(view, table, used(place, table), descending=order.direction == "descending")
        return found, [f"{view.file.path}: no score for {counted(without, 'document')}, read last"] if without else []


def part_of(file: TokenFile, source: Source, data: DataConfig) -> TokenView:
    """The tokens of ``source`` in its ``file``, unchecked; as ``TokenFiles.view``."""
    if source.documents is not None:
        table = read_table(source.documents, "list", file)
        return listed(file, table, used(source.documents, table))
    if source.split is None:
        return file.view()
    if file.index_path is None:
        raise UserError(f"{file.path} has no .idx, so no documents to split: remove 'split', or split the file itself")
    rule: Rule = "megatron" if data.order == "megatron" else "neox"
    return file.view(*split_documents(source.split, file.num_documents, rule)[source.part])
