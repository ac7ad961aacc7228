"""Tokenizers behind one small interface: loading and training of Hugging Face tokenizer.json and sentencepiece .model.

The libraries ``tokenizers`` and ``sentencepiece`` are imported where they are first needed: training on ready token
files needs neither.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from megarewarm.config.paths import merges_beside
from megarewarm.data.files.tokenizer_identity import TokenizerIdentity, fingerprint, function_and_added
from megarewarm.data.text.byte_lengths import ByteLengths, is_byte_level, lengths_of, pieces_of, spaced
from megarewarm.data.text.end_of_document import END_OF_DOCUMENT, TOKENIZER_FILES, End, beside, choose_end
from megarewarm.data.text.fast_bpe import FastBPE, NotCovered, TooLong, first_difference, texts_around
from megarewarm.data.text.hub_tokenizer import local_tokenizer
from megarewarm.errors import UserError, nearest
from megarewarm.files import write_whole

PADDING = "<|padding|>"


class Tokenizer(ABC):
    """Text to token ids and back. ``vocab_size`` is the largest id + 1."""

    vocab_size: int

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []  # notes for the user

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[npt.NDArray[np.uint32]]:
        """Ids of each text, (t,) each, on ``threads`` cores (None: all; where 'tokenizers' encodes, RAYON_NUM_THREADS says).
        Nothing is added at either end. A special token that is written out in a text becomes its id, as in GPT-NeoX, but
        sentencepiece takes its control symbols apart."""

    @abstractmethod
    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids (t,). Special tokens are written out, but sentencepiece's control symbols vanish."""

    @abstractmethod
    def added_before(self) -> tuple[int, ...]:
        """The ids that transformers 5 puts before a prompt: tokenizer.json says so itself; of a sentencepiece model the one
        that begins texts, if the tokenizer_config.json beside it asks for it by ``add_bos_token``."""

    @property
    @abstractmethod
    def end(self) -> End:
        """The token that ends a document. Raises ``UserError`` if the tokenizer names none, or more than one could be it."""

    @property
    def eod_id(self) -> int:
        """Its id. Raises as ``end``."""
        return self.end.id

    @abstractmethod
    def token(self, number: int) -> str | None:
        """The token of an id, as the vocabulary writes it; None if it has none."""

    def shown(self, number: int) -> str | None:
        """The token of an id in quotes, for people: of a byte-level tokenizer its text, if that is whole characters; None if it
        has none."""
        return None if (token := self.token(number)) is None else repr(token)

    @abstractmethod
    def byte_lengths(self) -> ByteLengths | None:
        """The bytes of text that its ids stand for; None where the bytes of an id depend on more than the id."""

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides which ids a text gets."""

    @abstractmethod
    def identity(self) -> TokenizerIdentity:
        """The same in the parts by which two tokenizers are compared."""


def load_tokenizer(path: str | Path, *, eod_token: str | None = None, merges: str | Path | None = None) -> Tokenizer:
    """The tokenizer in a tokenizer.json, a sentencepiece .model, GPT-2's vocab.json and merges.txt, a folder with
    one, or the name of a model on the Hugging Face hub.

    ``merges`` is the file of merges of a vocab.json; without it the merges.txt (gpt2-merges.txt beside gpt2-vocab.json).
    ``eod_token`` is the token that ends documents; without it the one that the tokenizer calls so: tokenizer_config.json beside
    it, its special tokens, for sentencepiece the model's own end symbol. Raises ``UserError`` for anything that isn't a
    tokenizer.
    """
    path = local_tokenizer(path)
    if path.is_dir():
        found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds no tokenizer.json, tokenizer.model or vocab.json: name the tokenizer's file")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path.absolute()} does not exist: give a tokenizer.json or a sentencepiece .model file")
    if merges is not None or merges_beside(path) is not None:
        return HuggingFaceTokenizer(path, _from_merges(path, merges), eod_token)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, path.read_bytes(), eod_token)
    if path.suffix == ".model":
        return _SentencePiece(path, eod_token)
    raise UserError(f"{path} is of no known kind: expected a tokenizer.json or a sentencepiece .model file")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, or what GPT-2's two files stand for."""

    def __init__(self, path: Path, content: bytes, eod_token: str | None) -> None:
        super().__init__(path)
        self._content = content
        library = _library("tokenizers")
        try:
            self._tokenizer = library.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception for a file it can't read
            raise UserError(f"{path} is not a tokenizer.json that 'tokenizers' can read: {error}") from error
        # Both may be stored in the file and would cut or stretch every document.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if (normalizer := self._tokenizer.normalizer) is not None:
            for token in self._tokenizer.get_added_tokens_decoder().values():
                if token.normalized and token.content and not normalizer.normalize_str(token.content):
                    raise UserError(
                        f"{path}: its normalizer leaves nothing of the added token {token.content!r}, for which 'tokenizers' "
                        f'may look without end; set "normalized" to false for it'
                    )
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self._eod_token = eod_token
        if eod_token is not None and eod_token not in self._vocabulary:
            raise UserError(f"{path} has no token '{eod_token}'{nearest(eod_token, self._vocabulary)}")

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[npt.NDArray[np.uint32]]:
        if self.fast is None:
            return self._encode_slowly(texts)
        if threads == 1:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:  # the work is done outside of Python's lock
            return list(pool.map(self._encode, texts))

    def _encode(self, text: str) -> npt.NDArray[np.uint32]:
        assert self.fast is not None
        try:
            return self.fast.encode(text)
        except TooLong:
            return self._encode_slowly([text])[0]

    def _encode_slowly(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the library's own, which no class of Python's names
                raise
            raise UserError(f"{self.path}: 'tokenizers' itself fails on a text with this tokenizer ({error})") from error
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    @cached_property
    def fast(self) -> FastBPE | None:
        """The fast path, compared on every 16th word of the vocabulary and around each added token; None if it is not to be
        had, which is noted."""
        content = json.loads(self._content)
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        try:
            fast = FastBPE(content)
            if wrong := [token for token, number in added.items() if self._tokenizer.token_to_id(token) != number]:
                raise NotCovered(f"added token {wrong[0]!r}, to which 'tokenizers' gives another id than the file")
        except NotCovered as reason:
            self.notes.append(f"{self.path}: encoded by 'tokenizers' itself, the fast path does not cover it: {reason}")
            return None
        words = sorted(self._vocabulary)[::16]
        if (
            text := first_difference(fast, lambda text: self._encode_slowly([text])[0], words, texts_around(added))
        ) is not None:
            self.notes.append(f"{self.path}: encoded by 'tokenizers' itself, the fast path gives other ids for {text!r}")
            return None
        return fast

    def decode(self, ids: npt.ArrayLike) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    @property
    def content(self) -> bytes:
        """The tokenizer.json."""
        return self._content

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, added ones too."""
        return self._vocabulary

    def added_around(self) -> list[str]:
        """The tokens that are put around a text where special tokens are asked for, as transformers does."""
        tokens: list[str] = self._tokenizer.encode("").tokens
        return tokens

    def added_before(self) -> tuple[int, ...]:
        encoding = self._tokenizer.encode("a")
        own = encoding.special_tokens_mask.index(0)
        return tuple(encoding.ids[:own])

    @property
    def end(self) -> End:
        if self._eod_token is not None:
            return End(self._vocabulary[self._eod_token], self._eod_token, "as asked")
        said = beside(self.path)
        special = {str(t["content"]) for t in json.loads(self._content).get("added_tokens") or [] if t.get("special")}
        return choose_end(self.path, self._vocabulary, special | said.special, said.named("eos_token"), str(said.file))

    def token(self, number: int) -> str | None:
        token: str | None = self._tokenizer.id_to_token(number)
        return token

    def shown(self, number: int) -> str | None:
        vocabulary_writes = super().shown(number)
        if vocabulary_writes is None or not self._byte_level:
            return vocabulary_writes
        return vocabulary_writes if "\N{REPLACEMENT CHARACTER}" in (text := self.decode([number])) else repr(text)

    @cached_property
    def _byte_level(self) -> bool:
        return is_byte_level(json.loads(self._content))

    def byte_lengths(self) -> ByteLengths | None:
        return lengths_of(pieces_of(json.loads(self._content), self._vocabulary, self.vocab_size), self._encode_slowly)

    def fingerprint(self) -> str:
        return fingerprint(json.loads(self._content))

    def identity(self) -> TokenizerIdentity:
        function, added = function_and_added(json.loads(self._content))
        return TokenizerIdentity(fingerprint=self.fingerprint(), file=str(self.path), function=function, added=added)


class _SentencePiece(Tokenizer):
    def __init__(self, path: Path, eod_token: str | None) -> None:
        super().__init__(path)
        library = _library("sentencepiece")
        self._bytes = path.read_bytes()
        try:
            self._model = library.SentencePieceProcessor(model_proto=self._bytes)
        except RuntimeError as error:
            raise UserError(f"{path} is not a sentencepiece model: {error}") from error
        self.vocab_size = self._model.get_piece_size()
        self._eod_token = eod_token
        if eod_token is not None and self._model.id_to_piece(self._model.piece_to_id(eod_token)) != eod_token:
            raise UserError(f"{path} has no piece '{eod_token}'")

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[npt.NDArray[np.uint32]]:
        lists = self._model.encode(list(texts), out_type=int, num_threads=threads or -1)
        return [np.array(ids, np.uint32) for ids in lists]

    def decode(self, ids: npt.ArrayLike) -> str:
        return self._model.decode(np.asarray(ids).tolist())

    def added_before(self) -> tuple[int, ...]:
        said = beside(self.path)
        if not said.settings.get("add_bos_token"):
            return ()
        stated = said.named("bos_token")
        begin = self._model.bos_id() if stated is None else self._model.piece_to_id(stated)
        if begin < 0 or stated not in (None, self.token(begin)):
            raise UserError(f"{said.file} asks for add_bos_token, and {self.path} has no token that begins texts")
        return (begin,)

    @property
    def end(self) -> End:
        model = self._model
        if self._eod_token is not None:
            return End(model.piece_to_id(self._eod_token), self._eod_token, "as asked")
        own = model.eos_id()
        said = beside(self.path)
        stated = said.named("eos_token")
        if own >= 0 and stated in (None, model.id_to_piece(own)):
            return End(own, model.id_to_piece(own), f"the end symbol of {self.path.name}")
        vocabulary = {model.id_to_piece(i): i for i in range(self.vocab_size)}
        special = {piece for piece, i in vocabulary.items() if model.is_control(i)}
        return choose_end(self.path, vocabulary, special, stated, str(said.file))

    def token(self, number: int) -> str | None:
        return str(self._model.id_to_piece(number)) if 0 <= number < self.vocab_size else None

    def byte_lengths(self) -> ByteLengths | None:
        model, pieces = self._model, list[bytes | None]()
        for i in range(self.vocab_size):
            if model.is_control(i):
                pieces.append(b"")
            elif model.is_unknown(i):
                pieces.append(None)
            else:
                piece = model.id_to_piece(i)
                pieces.append(bytes([int(piece[3:5], 16)]) if model.is_byte(i) else spaced(piece))
        return lengths_of(pieces, self.encode_batch)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._bytes).hexdigest()

    def identity(self) -> TokenizerIdentity:
        return TokenizerIdentity(fingerprint=self.fingerprint(), file=str(self.path), function=self.fingerprint(), added={})


def _from_merges(vocabulary: Path, merges: str | Path | None) -> bytes:
    """The tokenizer.json that GPT-2's two files stand for: byte-level BPE, ``<|endoftext|>`` a special token."""
    library = _library("tokenizers")
    other = merges_beside(vocabulary) if merges is None else Path(merges)
    if other is None or not other.is_file():
        where = other.absolute() if other is not None else vocabulary.absolute().parent / "merges.txt"
        raise UserError(f"{where} does not exist: give the file of merges that belongs to {vocabulary}")
    try:
        tokenizer = library.Tokenizer(library.models.BPE.from_file(str(vocabulary), str(other)))
    except Exception as error:  # the library raises plain Exception for a file it can't read
        raise UserError(f"{vocabulary} and {other} are not GPT-2's vocabulary and merges: {error}") from error
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_DOCUMENT) is not None:
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
    content: str = tokenizer.to_str()
    return content.encode()


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019) and write it as a tokenizer.json.

    Like the tokenizer of GPT-NeoX-20B, with ``<|endoftext|>`` = 0 and ``<|padding|>`` = 1, but without its NFC
    normalisation, so that decoding gives back every text exactly. Equal texts give an equal file. ``vocab_size`` counts
    special tokens and the 256 bytes. Raises ``UserError`` if the texts don't hold that many tokens.
    """
    library = _library("tokenizers")
    if vocab_size < 258:
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and 2 special tokens need 258")
    byte_level = library.pre_tokenizers.ByteLevel
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.post_processor = library.processors.ByteLevel(trim_offsets=True)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _check_size(tokenizer.get_vocab_size(), vocab_size)
    write_whole(path, tokenizer.to_str(pretty=True).encode())
    return load_tokenizer(path)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train a sentencepiece BPE model (Kudo and Richardson 2018) that decodes every text exactly, and write it. But U+2581,
    which sentencepiece writes for a space, comes back as a space.

    Unknown characters fall back to bytes and no normalisation is done. ``<|endoftext|>`` = 0, ``<|padding|>`` = 1,
    ``<unk>`` = 2. Raises ``UserError`` for a ``vocab_size`` that the texts don't allow.
    """
    library = _library("sentencepiece")
    model = _Buffer()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,  # longer lines would be left out
            eos_id=0,
            eos_piece=END_OF_DOCUMENT,
            pad_id=1,
            pad_piece=PADDING,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"sentencepiece can't train a vocabulary of {vocab_size} on this text: {error}") from error
    _check_size(library.SentencePieceProcessor(model_proto=model.content).get_piece_size(), vocab_size)
    write_whole(path, model.content)
    return load_tokenizer(path)


class _Buffer:
    """What sentencepiece expects of a ``model_writer``."""

    content = b""

    def write(self, data: bytes) -> None:
        self.content += data


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Line by line: sentencepiece slows down on long texts. It refuses null characters, which then are byte tokens."""
    for text in texts:
        yield from text.replace("\0", "\n").split("\n")


def _check_size(reached: int, wanted: int) -> None:
    if reached != wanted:
        raise UserError(f"the text gives {reached} tokens, not {wanted}: use more text or a smaller vocab_size")


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"the package '{name}' is needed for this tokenizer: pip install {name} ({error})") from error
