"""The documents say what the code does: generated pages are fresh, links lead somewhere, examples are valid."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megarewarm.config.document import json_schema, markdown
from megarewarm.config.experiment import is_experiment, load_experiment
from megarewarm.config.load import merge, read_configs, validate
from megarewarm.config.schema import RunConfig
from megarewarm.main import main
from tests.support.tiny import write_tokens

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_configuration_page_and_schema_are_as_generated() -> None:
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == markdown(), "run python tools/document_config.py"
    assert (ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8") == json_schema()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*.yml")), ids=lambda path: path.name)
def test_committed_configs_are_valid(config: Path) -> None:
    mapping, origins = read_configs([str(config)])
    if is_experiment(mapping):
        assert load_experiment(mapping, origins).arms
    else:
        assert validate(RunConfig, mapping, origins).total_steps > 0


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/index.md"], ids=lambda page: page.name)
def test_overviews_name_only_files_that_exist(page: Path) -> None:
    named = set(re.findall(r"\b((?:configs|tools|docs|tests|benchmarks)/[\w./]+\.(?:yml|py|md|png))", page.read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    how_tos = text.partition("## How to\n")[2].partition("\n## ")[0].split("\n### ")[1:]
    assert len(how_tos) == 11
    for how_to in how_tos:
        assert all(block.count("\n") <= 5 for block in re.findall(r"```\w+\n(.*?)```", how_to, re.DOTALL)), how_to


def _anchors(page: Path) -> set[str]:
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _strings(source: str) -> Iterator[str]:
    """The strings in a module, of f-strings with an ellipsis for each value."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_troubleshooting_quotes_messages_that_there_are() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    there = [text for path in (ROOT / "megarewarm").rglob("*.py") for text in _strings(path.read_text(encoding="utf-8"))]
    quoted = [quote for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for quote in re.findall("`([^`]+)`", cell)]
    assert len(quoted) > 40
    patterns = {quote: re.compile(r"[^\n]*?".join(map(re.escape, quote.split("…")))) for quote in quoted}
    assert [quote for quote, pattern in patterns.items() if not any(map(pattern.search, there))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_pages_lead_to_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert anchor in _anchors(page.parent / target if target else page), f"{target}#{anchor}"


def _examples(name: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/run.md"])
def test_the_first_example_of_a_page_is_a_valid_run(page: str, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.yml").write_text(_examples(page)[0])
    mapping, origins = read_configs([str(tmp_path / "mine.yml")])
    run = validate(RunConfig, mapping, origins)
    assert run.total_steps * run.tokens_per_step >= 10_000_000_000
    if page == "docs/run.md":
        assert run.replay is not None and run.replay.fraction == 0.05
        assert run.data.validation[0].tokens == 2_000_000


FRAGMENTS = [text for page in ("data", "reliability") for text in _examples(f"docs/{page}.md")]


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=range(len(FRAGMENTS)))
def test_fragments_of_pages_change_that_run(fragment: str, tmp_path: Path) -> None:
    """Each is merged onto the example of docs/run.md, whose replay gives way to its own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.yml").write_text(_examples("docs/run.md")[0])
    (tmp_path / "fragment.yml").write_text(fragment)
    mapping, origins = read_configs([str(tmp_path / "mine.yml")])
    changes, _ = read_configs([str(tmp_path / "fragment.yml")])
    if "replay" in changes:
        del mapping["replay"]
    assert validate(RunConfig, merge(mapping, changes), origins) != validate(RunConfig, mapping, origins)


def test_the_laboratorys_examples_are_valid_experiments(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "laboratory.md").read_text(encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    examples = [text for text in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL) if text.startswith("experiment:")]
    names = []
    for example in examples:
        (tmp_path / "e.yml").write_text(example)
        for quick in [False, True] if "quick:" in example else [False]:
            arms = load_experiment(*read_configs([str(tmp_path / "e.yml")]), quick=quick).arms
        names += [arm.arm for arm in arms]
    assert {"peak_1.5e-4_1pct", "reset_second", "trunk-first", "trunk-second", "release"} <= set(names)
    named = set(re.findall(r"\b((?:configs|tools|docs|tests|benchmarks)/[\w./]+\.(?:yml|py|md|png))", page))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_the_laboratorys_chain_of_data_sets_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trunk, stages and release, word for word but small: what is planned is what the later starts accept."""
    experiment = small_chain(tmp_path)
    assert main([str(experiment)]) == 0
    for name in ("trunk-first", "trunk-second", "release"):
        assert list((tmp_path / "e" / name / "checkpoints").glob("step_*"))


def small_chain(place: Path, *changes: tuple[str, str]) -> Path:
    """docs/laboratory.md's example of stages and a release, with a small model, few steps, and files in ``place``. ``changes``:
    of words in its text."""
    page = (ROOT / "docs" / "laboratory.md").read_text(encoding="utf-8")
    (example,) = (text for text in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL) if "three_data_sets" in text)
    for name in ("first", "second"):
        write_tokens(place / name, len(name))
        example = example.replace(f"data/{name}", str(place / name))
    small = """  model: {num_layers: 1, hidden_size: 16, num_heads: 2, vocab_size: 64, max_positions: 16}
  data: {sequence_length: 16}
  logging: {tensorboard: false, dynamics: null}
"""
    example = example.replace("  extends: configs/410m_rewarm.yml\n", small)
    example = example.replace("budget: 10B tokens", "budget: 20 steps, global_batch: 2, micro_batch: 2")
    example = example.replace("budget: 2B tokens", "budget: 5 steps").replace("base:", f"folder: {place / 'e'}\nbase:", 1)
    for old, new in changes:
        assert old in example
        example = example.replace(old, new)
    (place / "e.yml").write_text(example)
    return place / "e.yml"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("replay: {fraction: 0.05, of: lineage}\n    training", "training"), "run 'release': .*was trained on other data"),
        (
            ("intent: continue}\n        replay: {fraction: 0.05", "intent: continue}\n        replay: {fraction: 0.95"),
            "run 'release': .*was trained on other data",
        ),
        (("budget: 20 steps", "budget: 20000 steps"), "run 'trunk-first': source 'first' gives"),
        (("max_lr: 1.65e-4, min_lr: null", "max_lr: 3e-4, min_lr: null"), "continues at the checkpoint's learning rate"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first_trains(
    tmp_path: Path, change: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = small_chain(tmp_path, change)
    assert main([str(experiment)]) == 2
    assert re.search(says, " ".join(capsys.readouterr().err.split()))
    assert not list((tmp_path / "e").glob("*/metrics.jsonl"))
