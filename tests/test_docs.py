"""The documents say what the code does: generated pages are fresh, links lead somewhere, examples are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megarewarm.config.document import json_schema, markdown
from megarewarm.config.experiment import is_experiment, load_experiment
from megarewarm.config.load import merge, read_configs, validate
from megarewarm.config.schema import RunConfig

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


def test_the_readme_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:configs|tools|docs|tests|benchmarks)/[\w./]+\.(?:yml|py|md|png))", text))
    assert named and [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_readmes_example_is_a_valid_run(tmp_path: Path) -> None:
    example, *_ = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.yml").write_text(example)
    run = validate(RunConfig, *read_configs([str(tmp_path / "mine.yml")]))
    assert run.replay is not None and run.replay.fraction == 0.05
    assert run.data.validation[0].tokens == 2_000_000
    assert run.total_steps * run.tokens_per_step >= 10_000_000_000


def test_the_readmes_further_examples_change_that_run(tmp_path: Path) -> None:
    """Each is merged onto the first, whose replay gives way to its own."""
    first, *others = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert others
    for i, other in enumerate(others):
        (tmp_path / "mine.yml").write_text(first)
        (tmp_path / f"{i}.yml").write_text(other)
        mapping, origins = read_configs([str(tmp_path / "mine.yml")])
        changes, _ = read_configs([str(tmp_path / f"{i}.yml")])
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
