"""The data sections of a run: token files, their order and blend, validation sets, replay."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from megarewarm.config.budget import Budget, Epochs, Row, Share, TokenAmount, Tokens
from megarewarm.config.paths import PathText
from megarewarm.config.section import LearningRate, Positive, Section, Seed


class Source(Section):
    """One token file (or, with ``part``, one split of it)."""

    path: PathText = Field(
        description="Prefix of a .bin/.idx pair, or a bare .bin file of token ids. A .bin that is in shards "
        "(NAME-00000-of-00020.bin, ...) is named as if it were whole: NAME or NAME.bin."
    )
    name: str | None = Field(None, description="Name in logs and lineage; null: the file's name.")
    weight: float = Field(1.0, gt=0, description="Share of the samples, relative to the other sources.")
    tokens: TokenAmount | None = Field(
        None,
        description="Instead of 'weight': the share as a number of tokens, such as '2B tokens', relative to the other "
        "sources', which then all give one.",
    )
    split: str | None = Field(
        None, description="'train,valid,test' shares by documents, such as '969,30,1'; null: the whole file."
    )
    part: Literal["train", "valid", "test"] = Field("train", description="Which part of 'split' to read.")
    documents: PathText | None = Field(
        None,
        description="A list of some of the file's documents, as select-data --as-manifest writes it: the source then is these, "
        "in the file's order, and nothing is copied; null: all of them.",
    )
    scores: PathText | None = Field(
        None,
        description="The scores of the file's documents, as score-data writes them, by which data.order sorts; null: what its "
        "'by' names.",
    )
    place: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="order permuted: the number that goes into the key of the permutation together with data.seed; null: the "
        "source's place in the list. With it, lists in another order read the same samples of the source.",
    )
    dtype: Literal["uint16", "uint32", "int32"] | None = Field(
        None,
        description="Of the ids in a bare .bin; null: its manifest's, or uint16 for vocabularies up to 65536, else uint32.",
    )
    layout: Literal["documents", "rows"] = Field(
        "documents",
        description="rows: the file holds finished samples, rows of sequence_length + 1 ids, which are read in their order "
        "whatever 'data.order' says, as Pythia's published data order (rows of 2049, 1024 at each step).",
    )
    first_row: Row = Field(0, description="layout rows: the row to begin with; Pythia's step N begins at row N x 1024.")
    max_epochs: Epochs | None = Field(
        1.0,
        description="How often the source may be read through. Asking for more is an error; null: without limit. Left out "
        "where training.budget is in epochs: as often as that says.",
    )

    @model_validator(mode="after")
    def _check_rows(self) -> Source:
        if self.first_row and self.layout != "rows":
            raise ValueError("'first_row' belongs to layout 'rows': set it, or remove 'first_row'")
        if self.layout == "rows" and (self.documents is not None or self.scores is not None):
            given = "documents" if self.documents is not None else "scores"
            raise ValueError(f"layout 'rows' knows no documents: remove '{given}', or the layout")
        return self

    @model_validator(mode="after")
    def _check_documents(self) -> Source:
        if self.documents is not None and self.split is not None:
            raise ValueError("'documents' and 'split' both say which documents are read: leave one out")
        return self

    @model_validator(mode="after")
    def _check_tokens(self) -> Source:
        if self.tokens is not None:
            if self.tokens.unit != "tokens" or not self.tokens.amount:
                raise ValueError(f"'tokens' is '{self.tokens}': expected a number of tokens above 0, such as '2B tokens'")
            if "weight" in self.model_fields_set and self.weight != self.tokens.amount:
                raise ValueError("'weight' and 'tokens' both say the source's share: leave one out")
            object.__setattr__(self, "weight", self.tokens.amount)
        return self

    def with_weight(self, weight: float) -> Source:
        """The same source with another share."""
        return self.model_copy(update={"weight": weight, "tokens": None})


def _alike(sources: list[Source]) -> list[Source]:
    if len({source.tokens is None for source in sources}) > 1:
        raise ValueError("some sources give 'tokens' and some 'weight': give the same to all of them")
    return sources


Sources = Annotated[list[Source], Field(min_length=1), AfterValidator(_alike)]
"""Sources of one blend."""


class ValidationSet(Section):
    """A named validation loss on the same tokens at every evaluation."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name in logs, figures and tables.")
    role: Literal["upstream", "downstream", "other"] = Field(
        "other", description="upstream: what the model must not forget; downstream: what it must learn."
    )
    sources: Sources = Field(description="Where its tokens come from, blended by weight.")
    tokens: Tokens = Field(
        description="How many tokens are evaluated, rounded down to whole sequences; where the sources hold less, a note at "
        "the start says how many."
    )
    when: Literal["always", "end"] = Field(
        "always", description="always: at every evaluation; end: only after the last step, as a test set."
    )

    @model_validator(mode="after")
    def _check_layout(self) -> ValidationSet:
        if any(source.scores is not None for source in self.sources):
            raise ValueError(f"validation set '{self.name}' is read in no order of scores: remove 'scores' from its sources")
        if any(source.layout == "rows" for source in self.sources):
            raise ValueError(f"validation set '{self.name}' reads windows of documents: layout 'rows' is for training sources")
        return self


class BlendSwitch(Section):
    """Another blend from some moment of the run on. A source that is in both blends goes on where it was."""

    at: Budget | None = Field(None, description="The moment: steps, tokens, or a share of the run ('60%').")
    lr_below: LearningRate | None = Field(
        None,
        description="Instead of 'at': the first step after the warmup whose learning rate is below this (arXiv 2407.07263 "
        "changes the blend at a fifth of the peak).",
    )
    train: Sources = Field(description="The training sources from here on.")
    replay_fraction: Share | None = Field(
        None, ge=0, lt=1, description="Share of the samples that are replayed from here on; null: replay.fraction."
    )

    @model_validator(mode="after")
    def _check(self) -> BlendSwitch:
        if (self.at is None) == (self.lr_below is None):
            raise ValueError(
                "a switch takes place 'at' a point of the run or when the rate is 'lr_below' one: give one of them"
            )
        if self.at is not None and self.at.unit == "epochs":
            raise ValueError(f"at: {self.at}: an epoch has no length where the blend changes; give steps, tokens or a share")
        return self


OrderName = Literal["permuted", "neox", "megatron", "sequential"]
Order = OrderName | Literal["scored"]


class ByScore(Section):
    """data.order: the documents of each source sorted by their scores, read one after another."""

    by: PathText | None = Field(
        None,
        description="The scores: a file, for one source, or a word such as loss, for PREFIX.loss.safetensors beside each token "
        "file, where score-data puts them. null: each source names its 'scores'.",
    )
    direction: Literal["ascending", "descending"] = Field(
        "ascending", description="ascending: the lowest score first. Documents without a score come last either way."
    )


def is_suffix(by: str) -> bool:
    """Whether 'by' is a word that ends the names of score files, rather than a file."""
    return "/" not in by and not by.endswith(".safetensors")


class DataConfig(Section):
    """Token files, their order and their blend."""

    sequence_length: Positive = Field(description="Tokens s per sample; one more is read as the last target.")
    order: OrderName | ByScore = Field(
        "permuted",
        description="permuted: a keyed permutation of contiguous windows, no index to build; neox, megatron: the exact "
        "sample orders of those trainers; sequential: the windows one after another, documents as written; {by: ..., "
        "direction: ...}: the same, documents by their score.",
    )
    pack: Literal["best_fit"] | None = Field(
        None,
        description="best_fit: training rows of whole documents (arXiv 2404.10830), which attention and positions keep apart; "
        "only a document longer than a row is cut, and what is left of a row is padding, without loss. Orders permuted (of the "
        "rows) and sequential. Validation sets stay windows. null: windows of the documents one after another.",
    )
    seed: Seed = Field(1234, description="Seed of the order; below 2**32 in the orders neox and megatron, as numpy takes it.")
    blend_of_one: bool = Field(
        False,
        description="Orders neox and megatron: ask a single source for half a percent more samples than needed, as these "
        "trainers do of every source of a blend (train_data_paths with one path). This can add an epoch, and so another order.",
    )
    train: Sources = Field(description="Training sources.")
    switches: list[BlendSwitch] = Field([], description="Changes of the blend during the run, in their order.")
    validation: list[ValidationSet] = Field([], description="Named validation sets.")
    tokenizer: PathText | None = Field(
        None,
        description="Tokenizer of the data: a tokenizer.json, GPT-2's vocab.json, a sentencepiece .model, or a folder with "
        "one. It is compared with those of the token files and of the start, says which token ends a document where neither "
        "'eod' nor the manifests do, and goes beside exported weights; null: for the export the start's, or the token files'.",
    )
    eod: int | None = Field(
        None, ge=0, description="Id of the token that ends a document; null: the manifests' or the tokenizer's."
    )
    reset_at_eod: bool = Field(
        False,
        description="Attention stays within documents, and positions restart in each (Megatron-LM's reset_attention_mask "
        "with reset_position_ids), in training and evaluation. false, as Pythia was trained: a sequence is one text.",
    )
    mask_eod_loss: bool = Field(
        False,
        description="No loss where the input is the end of a document, as what comes next can't be known from it (GPT-NeoX's "
        "eod_mask_loss); the mean is over the remaining tokens of the whole global batch.",
    )

    @field_validator("seed")
    @classmethod
    def _check_seed(cls, seed: int, info: ValidationInfo) -> int:
        order = info.data.get("order", "permuted")
        if order in ("neox", "megatron") and seed >= 2**32:
            raise ValueError(f"order '{order}' shuffles as numpy does, with seeds below 2**32 (4294967296)")
        return seed

    @property
    def order_name(self) -> Order:
        """The order in a word."""
        return "scored" if isinstance(self.order, ByScore) else self.order

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.reset_at_eod or self.mask_eod_loss) and self.eod is None and self.tokenizer is None:
            raise ValueError("reset_at_eod and mask_eod_loss need the token that ends a document: give 'eod' or 'tokenizer'")
        if self.pack is not None and self.order_name not in ("permuted", "sequential"):
            told = "an order by scores" if self.order_name == "scored" else f"order '{self.order_name}'"
            raise ValueError(f"pack: {told} is of windows, not of packed rows: use permuted or sequential, or remove 'pack'")
        sources = [*self.train, *(source for switch in self.switches for source in switch.train)]
        if self.pack is not None and any(source.layout == "rows" for source in sources):
            raise ValueError("pack: a source of layout 'rows' holds finished rows, whose documents are not known: remove one")
        names = [v.name for v in self.validation]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two validation sets are named '{name}': give each its own name")
        return self


class GenerateConfig(Section):
    """The documents that the start model writes before training, as its own replay (arXiv 2605.26097)."""

    tokens: Tokens = Field(description="How many tokens it writes, up to the end of the document that reaches them.")
    temperature: float = Field(
        1.0, gt=0, description="1: as likely as the model holds them; below 1 the rare ones are lost, which the paper warns of."
    )
    top_p: Share = Field(1.0, gt=0, le=1, description="Share of the probability that the likeliest tokens which are left hold.")
    prompt: Literal["eod"] | Annotated[list[int], Field(min_length=1)] = Field(
        "eod",
        description="What each document follows on: eod, the end of another; or the ids that it begins with, such as [1] for "
        "a model whose texts begin with a token of their own.",
    )
    max_document_tokens: Positive | None = Field(
        None, description="Longer documents are cut, and ended there; null: all positions of the model."
    )
    seed: Seed = Field(1234, description="Seed of the random numbers; each document has its own.")
    batch: Positive | None = Field(
        None, description="Documents side by side; null: up to 64, as many as keep keys and values below 4 GiB in fp32."
    )


class ReplayConfig(Section):
    """A share of every batch taken from old data, compute-equivalent (arXiv 2403.08763, section 4.2)."""

    fraction: Share = Field(
        ge=0, lt=1, description="Share of the samples that are replayed (0.05 or '5%'); new data get the rest. 0: no replay."
    )
    of: Literal["lineage", "start"] | None = Field(
        None,
        description="lineage: what the start checkpoint was trained on, as its lineage records it: only samples that it has "
        "seen, its stages in proportion to the tokens seen of each. start: what the start checkpoint itself writes, see "
        "'generate'.",
    )
    generate: GenerateConfig | None = Field(None, description="of start: what it writes before training.")
    sources: Sources | None = Field(
        None,
        description="The old data, blended by weight among themselves. Beside 'of: lineage': data of before the recorded "
        "stages, each with the 'tokens' that were seen of it. Beside 'of: start': each with 'tokens', as its share.",
    )
    max_epochs: Epochs | None = Field(
        1.0,
        description="of lineage or start: how often a sample may be replayed. Asking for more is an error; null: without "
        "limit.",
    )
    paths: dict[str, PathText] = Field(
        {}, description="of lineage: new places of files that have moved, by the name of the source in the lineage."
    )

    @model_validator(mode="after")
    def _check(self) -> ReplayConfig:
        if self.of is None and self.sources is None and self.fraction:
            raise ValueError("nothing says what is replayed: give 'sources', 'of: lineage' or 'of: start'")
        if self.of is None and (self.paths or self.max_epochs != 1.0):
            raise ValueError("'max_epochs' and 'paths' belong to 'of: lineage'; each of 'sources' has a path and max_epochs")
        if self.of == "start" and self.paths:
            raise ValueError("'paths' belongs to 'of: lineage': what the start writes is in the cache")
        if self.of is not None and any(source.tokens is None for source in self.sources or ()):
            raise ValueError(f"'sources' beside 'of: {self.of}' share by tokens: give each of them 'tokens'")
        if (self.of == "start") != (self.generate is not None):
            raise ValueError("'of: start' and 'generate' belong together: 'of: start, generate: {tokens: 20M tokens}'")
        return self
