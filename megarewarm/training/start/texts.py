"""The tokenizer of a run: whether all its data and its start agree, what ends a document, what is exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarewarm.checkpoint.export.tokenizer_files import ExportedTokenizer, exported_tokenizer
from megarewarm.checkpoint.source import tokenizers_of
from megarewarm.checkpoint.tokenizer_source import TokenizerSource, loaded, named_tokenizer, still_there
from megarewarm.config.data import Source
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.file_bytes import find_bin
from megarewarm.data.files.manifest import Made, made_by, refuse_other_tokenizers
from megarewarm.data.files.token_file import SCAN_WHOLE
from megarewarm.data.files.tokenizer_identity import TokenizerIdentity
from megarewarm.errors import UserError
from megarewarm.spelling import counted
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.planned import PlannedCheckpoint


@dataclass(frozen=True)
class Texts:
    """``tokenizers``: by which the ids of the training data were made; ``eod``: the id that ends their documents; both as
    far as they are known. ``exported``: what goes beside exported weights, if they are asked for. ``notes``: for the user.
    ``source``: the tokenizer of new text, such as tasks', if there are any; its file is None where none is known.
    ``tokenizer``: what tells the run's tokenizer from others that give other ids; None if it is not known."""

    tokenizers: list[TokenizerIdentity]
    eod: int | None
    exported: ExportedTokenizer | None
    notes: list[str]
    source: TokenizerSource | None = None
    tokenizer: str | None = None


def settle_texts(plan: Plan) -> Texts:
    """Compare the tokenizers of everything that the run of ``plan`` reads, and determine what it exports.

    Reads manifests and tokenizers only. Raises ``UserError`` naming both if two of them give different ids or the ends of
    documents contradict each other, and if a named tokenizer can't be read or exported.
    """
    config, data = plan.config, plan.config.data
    trained, paths, unknown = _made(_training_sources(config))
    held_out, _, unknown_too = _made([source for item in data.validation for source in item.sources])
    found = [*_named(config), *trained, *held_out]
    refuse_other_tokenizers([*found, *_of_start(plan, found), *_of_teacher(plan, found)])
    notes = []
    if missing := list(dict.fromkeys([*unknown, *unknown_too])):
        notes.append(
            f"no manifest beside {counted(len(missing), 'token file')} ({missing[0]}): whether the tokenizer is that of the "
            f"rest can't be checked"
        )
    notes += _sampled([*_training_sources(config), *(source for item in data.validation for source in item.sources)])
    eod, more = _end(config, trained, paths)
    if eod is None and (data.reset_at_eod or data.mask_eod_loss):
        assert data.tokenizer is not None
        end = loaded(data.tokenizer).end
        eod, more = end.id, [*more, f"{data.tokenizer}: {end}"]
    exported, source = None, None
    if isinstance(plan.source, PlannedCheckpoint) and plan.source.written_by is None and data.tokenizer is None:
        notes.append(f"which tokenizer the data and the export should have is unknown until {plan.source.name} is here")
    elif config.export.huggingface or config.evaluation.tasks:
        source = _to_export(plan, eod, trained)
    if config.export.huggingface and source is not None:
        exported = exported_tokenizer(source, plan.model)
        if source.file is not None:
            notes.append(f"the export will have the tokenizer {source.file}, in which id {exported.ids['eos']} ends a text")
        notes += exported.notes
    # files without a manifest don't say by which tokenizer they were made
    known = next((made.tokenizer for made in [*trained, *held_out, *_named(config)]), None)
    told = None if known is None else known.function or known.fingerprint
    return Texts(_distinct(trained), eod, exported, [*notes, *more], source, told)


def _sampled(sources: Sequence[Source]) -> list[str]:
    prefixes = dict.fromkeys(source.path.removesuffix(".bin").removesuffix(".idx") for source in sources)
    large = [prefix for prefix in prefixes if sum(shard.stat().st_size for shard in find_bin(prefix)) > SCAN_WHOLE]
    if not large:
        return []
    return [
        f"more than {SCAN_WHOLE // 2**20} MiB in {counted(len(large), 'token file')} ({large[0]}): of their ids only samples "
        f"are checked now, and compared when a run is resumed; 'megarewarm inspect-data --verify' reads everything"
    ]


def config_tokenizers(config: RunConfig) -> list[Made]:
    """The tokenizers of the data of ``config``, as far as manifests record them."""
    sources = [*_training_sources(config), *(source for item in config.data.validation for source in item.sources)]
    return [*_named(config), *_made(sources)[0]]


def _training_sources(config: RunConfig) -> list[Source]:
    old = config.replay.sources or [] if config.replay is not None else []
    return [*config.data.train, *(source for switch in config.data.switches for source in switch.train), *old]


def _named(config: RunConfig) -> list[Made]:
    name = config.data.tokenizer
    if name is None:
        return []
    path = named_tokenizer(name, "data.tokenizer")
    return [Made(f"data.tokenizer is {path}", loaded(path).identity())]


def _made(sources: Sequence[Source]) -> tuple[list[Made], list[str], list[str]]:
    """(how the files of ``sources`` were made, their paths, the paths of those that are there and don't say)."""
    made, paths, unknown = [], [], []
    for prefix in dict.fromkeys(source.path.removesuffix(".bin").removesuffix(".idx") for source in sources):
        found = made_by(Path(f"{prefix}.bin"))
        if found is not None:
            made.append(found)
            paths.append(prefix)
        elif find_bin(prefix):
            unknown.append(prefix)
    return made, paths, unknown


def _distinct(made: Sequence[Made]) -> list[TokenizerIdentity]:
    found: list[TokenizerIdentity] = []
    for each in made:
        if each.tokenizer not in found:
            found.append(each.tokenizer)
    return found


def _of_start(plan: Plan, found: Sequence[Made]) -> list[Made]:
    """The tokenizers of the start checkpoint; of a resumed run those of its own data, because its start was compared before."""
    source = plan.source
    if source is None:
        return []
    if plan.resumed:
        last = source.lineage.stages[-1]
        return [Made(f"{source.name} was trained on ids of the tokenizer {t.file}", t) for t in last.tokenizers]
    if plan.policy.weights == "initialise":
        return []
    if isinstance(source, PlannedCheckpoint):
        earlier = source.written_by
        return [] if earlier is None else [*config_tokenizers(earlier.config), *_of_start(earlier, found)]
    return tokenizers_of(source, found)


def _of_teacher(plan: Plan, found: Sequence[Made]) -> list[Made]:
    """The tokenizers of the checkpoint that ``distill.from`` names."""
    if not isinstance(plan.teacher, PlannedCheckpoint):
        return [] if plan.teacher is None else tokenizers_of(plan.teacher, found)
    earlier = plan.teacher.written_by
    return [] if earlier is None else [*config_tokenizers(earlier.config), *_of_start(earlier, found)]


def _end(config: RunConfig, trained: Sequence[Made], paths: Sequence[str]) -> tuple[int | None, list[str]]:
    """(the id that ends the documents of the training data, notes)."""
    said = {made.end: path for made, path in zip(trained, paths, strict=True) if made.end is not None}
    wanted = config.data.eod
    if wanted is not None:
        for end, path in said.items():
            if end != wanted:
                raise UserError(
                    f"data.eod: {wanted}, but the documents of {path} end with id {end}, as its manifest says; set data.eod to "
                    f"{end}, or preprocess the text again"
                )
        return wanted, []
    if len(said) > 1:
        each = ", ".join(f"{end} in {path}" for end, path in said.items())
        return None, [f"the documents of the training data end with different ids ({each}): give data.eod"]
    return next(iter(said), None), []


def _to_export(plan: Plan, eod: int | None, trained: Sequence[Made]) -> TokenizerSource:
    """The tokenizer to export: the named one, else the start's, else one of the token files."""
    name, source = plan.config.data.tokenizer, plan.source
    found = TokenizerSource(None if name is None else named_tokenizer(name, "data.tokenizer"), eod)
    if plan.policy.weights == "load" and source is not None:
        found = found.over(source.tokenizer)
        if isinstance(source, PlannedCheckpoint) and (earlier := source.written_by) is not None:
            found = found.over(_to_export(earlier, None, _made(_training_sources(earlier.config))[0]))
    return found.over(TokenizerSource(still_there(_distinct(trained))))
