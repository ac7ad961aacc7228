"""The page of a selection that has not been made yet: what each step would drop, with pairs of documents side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megarewarm.checkpoint.tokenizer_source import named_tokenizer
from megarewarm.data.files.manifest import made_by
from megarewarm.data.text.tokenizers import Tokenizer, load_tokenizer
from megarewarm.errors import UserError
from megarewarm.files import write_whole
from megarewarm.report.pages.html import STYLE, breakable, page_html, picture_html, svg_of
from megarewarm.selection.cluster_map import picture_of
from megarewarm.selection.marked import marked
from megarewarm.selection.pipeline import Selection, Taken
from megarewarm.selection.step import Corpus, Numbers
from megarewarm.spelling import DASH, listed

_PAIRS = 12
_EQUAL = 4  # pairs of equal documents
_TOKENS = 600  # of a document that are shown

_STYLE = (
    STYLE
    + """
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin: 18px 0; }
.pair h4 { grid-column: 1 / -1; font-size: 14px; font-weight: 600; margin: 0; }
.text { background: var(--wash); border-left: 3px solid var(--line); padding: 8px 12px; min-width: 0;
  max-height: 340px; overflow: auto; }
.text.kept, .text.there { border-left-color: var(--mark); }
.text p { margin: 0 0 6px; }
.text pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
mark { background: #ffd33d88; color: inherit; border-radius: 2px; }
th.why, td.why { text-align: left; }
td.why { white-space: normal; min-width: 260px; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } td.why { min-width: 200px; } }
"""
)


def write_page(selection: Selection, place: Path, tokenizer: str | None = None) -> None:
    """Write the page to ``place``, replacing an earlier one. ``tokenizer``: for the text; by default the one that the inputs'
    manifests name, if it is still there. Raises ``UserError`` for one that can't be read or that others made the ids with."""
    text = _Texts(selection.corpus, tokenizer)
    parts = [f"<h1>{escape(place.name.removesuffix('.selection.html'))}: what would go</h1>", *_head(selection, text)]
    for taken in selection.taken:
        parts += _section(taken, selection, text)
    write_whole(place, page_html(f"Selection of {place.stem}", _STYLE, parts).encode())


class _Texts:
    """The text of documents of a corpus, or their ids where no tokenizer is known; ``note`` says which."""

    def __init__(self, corpus: Corpus, tokenizer: str | None) -> None:
        self.corpus = corpus
        self._tokenizer: Tokenizer | None = None
        if tokenizer is not None:
            self._tokenizer = load_tokenizer(named_tokenizer(tokenizer, "--tokenizer"))
            _check(self._tokenizer, corpus)
        else:
            self._tokenizer = _tokenizer_of(corpus)
        self.note = (
            f"Text by the tokenizer {self._tokenizer.path}."
            if self._tokenizer
            else "Documents are shown as ids, because their tokenizer is not known or not there any more: add --tokenizer."
        )

    def place(self, document: int) -> str:
        index = int(self.corpus.file_of(np.array([document]))[0])
        return f"{self.corpus.files[index].path.with_suffix('').name}, document {document - int(self.corpus.firsts[index]):,}"

    def of(self, ids: npt.NDArray[Any]) -> str:
        shown = ids[:_TOKENS]
        if self._tokenizer is None:
            return " ".join(map(str, shown.tolist()))
        return self._tokenizer.decode(shown[(shown >= 0) & (shown < self._tokenizer.vocab_size)])


def _tokenizer_of(corpus: Corpus) -> Tokenizer | None:
    for file in corpus.files:
        known = made_by(file.path)
        if known is not None and known.tokenizer.file is not None and Path(known.tokenizer.file).exists():
            try:
                found = load_tokenizer(known.tokenizer.file)
            except UserError:
                continue
            if found.identity().agrees_with(known.tokenizer):
                return found
    return None


def _check(tokenizer: Tokenizer, corpus: Corpus) -> None:
    for file in corpus.files:
        known = made_by(file.path)
        if known is not None and not known.tokenizer.agrees_with(tokenizer.identity()):
            raise UserError(f"--tokenizer {tokenizer.path}: {known.says}, which gives other ids")


def _head(selection: Selection, text: _Texts) -> Iterator[str]:
    corpus, kept = selection.corpus, selection.kept
    before, after = int(corpus.sizes.sum()), int(corpus.sizes[kept].sum())
    yield (
        f'<p class="quiet">{escape(listed(str(file.path) for file in corpus.files))}. Nothing has been written but this page. '
        f"{escape(text.note)}</p>"
    )
    yield (
        f'<ul class="summary"><li><b>{after:,} of {before:,} tokens</b> would stay ({after / max(1, before):.1%}), '
        f"{int(kept.sum()):,} of {len(kept):,} documents.</li>"
        + "".join(f"<li>{escape(taken.line)}</li>" for taken in selection.taken)
        + "</ul>"
    )
    yield "<h2>Steps</h2>" + _table(
        ("step", "documents dropped", "tokens dropped", "documents left", "tokens left", "what it does"),
        [
            (taken.step.name, f"{taken.documents:,}", f"{taken.tokens:,}", f"{taken.left[0]:,}", f"{taken.left[1]:,}")
            for taken in selection.taken
        ],
        [taken.step.words for taken in selection.taken],
    )
    if len(corpus.files) > 1:
        yield "<h2>Inputs</h2>" + _table(
            ("input", "documents", "tokens", "documents left", "tokens left", "share of its tokens"),
            [_input_row(selection, index) for index in range(len(corpus.files))],
        )


def _input_row(selection: Selection, index: int) -> tuple[str, ...]:
    corpus, file = selection.corpus, selection.corpus.files[index]
    mine = corpus.members(selection.kept, index)
    tokens = int(corpus.sizes[mine].sum())
    numbers = f"{file.num_documents:,}", f"{file.total_tokens:,}", f"{len(mine):,}", f"{tokens:,}"
    return str(file.path), *numbers, f"{tokens / max(1, file.total_tokens):.1%}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], why: Sequence[str] | None = None) -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in heads[: len(heads) - bool(why)])
    head += f'<th class="why">{escape(heads[-1])}</th>' if why else ""
    body = ""
    for number, (first, *cells) in enumerate(rows):
        last = f'<td class="why">{escape(why[number])}</td>' if why else ""
        body += f"<tr><th>{breakable(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}{last}</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(taken: Taken, selection: Selection, text: _Texts) -> Iterator[str]:
    chosen, corpus = taken.chosen, selection.corpus
    yield f"<h2>{escape(taken.step.name)}</h2><p>{escape(taken.line.partition(': ')[2].capitalize())}.</p>"
    if chosen.notes:
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in chosen.notes)}</ul>"
    for number, drawn in enumerate(chosen.maps):
        picture = picture_of(drawn, number)
        yield picture_html(picture, svg_of(picture.figure))
    dropped = set(chosen.dropped.tolist())
    most = _PAIRS if len(np.unique(chosen.score)) > 1 else _EQUAL
    for row in spread(chosen.because, chosen.score, most):
        one, other = int(chosen.dropped[row]), int(chosen.because[row])
        ids = corpus.content(one), corpus.content(other)
        places = text.place(one), text.place(other)
        fate = "dropped too" if other in dropped else "kept"  # SemDeDup compares with what goes itself, too
        yield _pair(f"similarity {_score(chosen.score[row])}", ("dropped", fate), places, ids, text.of)
    for beside in chosen.beside[:_PAIRS]:
        row = int(np.searchsorted(chosen.dropped, beside.document))
        ids = corpus.content(beside.document), beside.ids
        places = text.place(beside.document), beside.place
        yield _pair(f"overlap {_score(chosen.score[row])}", ("dropped", "there"), places, ids, text.of)
    for examples in chosen.examples:
        yield f"<h3>{escape(examples.title)}</h3>"
        for document, score in zip(examples.documents.tolist(), examples.scores.tolist(), strict=True):
            head = f"{text.place(document)}: {_score(score)}, {int(corpus.sizes[document]):,} tokens"
            shown = escape(text.of(corpus.content(document)))
            yield f'<div class="text"><p class="quiet">{escape(head)}</p><pre>{shown}</pre></div>'


def spread(because: Numbers, score: npt.NDArray[np.float64], most: int) -> list[int]:
    """Up to ``most`` rows of duplicates, evenly from the lowest score to the highest: the lowest show what the limit drops."""
    rows = np.flatnonzero(because >= 0)
    rows = rows[np.argsort(score[rows], kind="stable")]
    return rows[np.unique(np.linspace(0, len(rows) - 1, most).astype(int))].tolist() if len(rows) else []


def _pair(
    score: str,
    kinds: tuple[str, str],
    places: tuple[str, str],
    ids: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    text: Callable[[npt.NDArray[Any]], str],
) -> str:
    sides = marked(text(ids[0]), text(ids[1]))
    cells = ""
    for kind, place, mine, side in zip(kinds, places, ids, sides, strict=True):
        more = f", the first {_TOKENS}" if mine.size > _TOKENS else ""
        head = f"{kind}: {place}, {mine.size:,} tokens{more}"
        cells += f'<div class="text {kind}"><p class="quiet">{escape(head)}</p><pre>{side}</pre></div>'
    return f'<div class="pair"><h4>{escape(score)}</h4>{cells}</div>'


def _score(score: float) -> str:
    return DASH if np.isnan(score) else f"{score:.3f}"
