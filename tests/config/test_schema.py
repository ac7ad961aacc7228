"""The configuration: what is read, merged, refused, and how it is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.budget import Budget
from megarewarm.config.document import json_schema, markdown
from megarewarm.config.experiment import load_experiment
from megarewarm.config.load import dump, merge, read_configs, validate
from megarewarm.config.model import ModelConfig
from megarewarm.config.schedule import ScheduleConfig
from megarewarm.config.schema import RunConfig
from megarewarm.config.yaml_text import parse_yaml, write_yaml
from megarewarm.errors import UserError
from megarewarm.schedules.schedule import CURVES

ROOT = Path(__file__).resolve().parents[2]

MINIMAL = """\
name: small
model: {num_layers: 2, hidden_size: 64, num_heads: 4, vocab_size: 512, max_positions: 64}
data:
  sequence_length: 64
  train: [{path: a}]
schedule: {curve: cosine, max_lr: 3e-3, min_lr: 3e-4}
training: {budget: 40, global_batch: 4, micro_batch: 4}
"""


def load(tmp_path: Path, text: str = MINIMAL, *words: str) -> RunConfig:
    path = tmp_path / "run.yml"
    path.write_text(text)
    return validate(RunConfig, *read_configs([str(path), *words]))


def refusal(tmp_path: Path, text: str = MINIMAL, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-08", 1e-8), ("1E-8", 1e-8), ("3e8", 3e8), ("-2.5e+3", -2500.0), ("1.e3", 1000.0), (".5e1", 5.0), ("12", 12)],
)
def test_numbers_are_numbers(text: str, number: float) -> None:
    value = parse_yaml(f"x: {text}", "f")[0]["x"]
    assert value == number and type(value) is type(number)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_python_writes_is_read_back(number: float) -> None:
    assert parse_yaml(f"x: {number!r}", "f")[0]["x"] == number


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text("abc1e-. :#{}", max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_reading_agrees_with_pyyaml_on_what_pyyaml_writes(value: object) -> None:
    text = yaml.safe_dump({"x": value})
    ours = parse_yaml(text, "f")[0]["x"]
    assert ours == yaml.safe_load(text)["x"] or isinstance(ours, float)


def test_key_given_twice_names_file_and_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, MINIMAL + "name: again\n") == f"{tmp_path}/run.yml:8: 'name' is given twice; remove one"


def test_unknown_key_names_line_and_nearest(tmp_path: Path) -> None:
    text = MINIMAL.replace("max_lr", "max_rl")
    message = refusal(tmp_path, text)
    assert f"{tmp_path}/run.yml:6: unknown key 'max_rl' in schedule, did you mean 'max_lr'?" in message.splitlines()


def test_unknown_key_inside_a_list_item(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL.replace("{path: a}", "{path: a, wieght: 2}"))
    assert "run.yml:5: unknown key 'wieght' in data.train.0, did you mean 'weight'?" in message


def test_override_wins_and_names_itself(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "schedule.max_lr=1e-2", "data.train.0.weight=3", "replay=null")
    assert config.schedule.max_lr == 1e-2 and config.data.train[0].weight == 3
    assert "command line (training.budgte=3): unknown key 'budgte'" in refusal(tmp_path, MINIMAL, "training.budgte=3")
    assert "is a list of 1; use its index" in refusal(tmp_path, MINIMAL, "data.train.7.weight=1")
    assert "is a single value" in refusal(tmp_path, MINIMAL, "name.first=x")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = MINIMAL.replace("num_layers: 2", "num_layers: 0").replace("micro_batch: 4", "micro_batch: none")
    assert len(refusal(tmp_path, text).splitlines()) == 2


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("num_heads: 4", "num_heads: 5", "hidden_size 64 is not divisible by num_heads 5"),
        ("sequence_length: 64", "sequence_length: 65", "data.sequence_length 65 is above model.max_positions 64"),
        ("min_lr: 3e-4", "min_lr: 3e-2", "min_lr 0.03 is above max_lr 0.003"),
        ("curve: cosine, max_lr: 3e-3, min_lr: 3e-4", "curve: constant, max_lr: 1, min_lr: 0", "has no use for 'min_lr'"),
        ("curve: cosine, max_lr: 3e-3, min_lr: 3e-4", "curve: cosine, max_lr: 1", "needs 'min_lr'"),
        ("budget: 40", "budget: 1%", "share of itself"),
        ("budget: 40", "budget: 10 tokens", "less than one step of 256 tokens"),
        ("budget: 40", "budget: forty", "'forty' is not a length of training"),
        ("name: small", "name: small\nstart: {intent: rewarm}", "needs 'from'"),
        ("name: small", "name: small\nstart: {from: a, intent: scratch}", "contradicts 'from'"),
        ("name: small", "name: a b", "name:"),
    ],
)
def test_contradictions(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert expected in refusal(tmp_path, MINIMAL.replace(old, new))


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        read_configs([str(tmp_path / "none.yml")])
    assert "run.yml:2: not valid YAML" in refusal(tmp_path, "a: [1,\n")
    for tab in ("a: 1\t# why\n", "a:\n\tb: 1\n"):
        assert "not valid YAML: YAML indents with spaces; replace the tab" in refusal(tmp_path, tab)
    assert "expected 'key: value' lines" in refusal(tmp_path, "- 1\n")
    assert "run.yml:2: not valid YAML: YAML indents with spaces; replace the tab" in refusal(tmp_path, "a:\n\t# why\n  b: 1\n")


def test_extends_and_merging(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.yml").write_text(MINIMAL)
    text = "extends: sub/base.yml\nname: other\nschedule: {max_lr: 1e-3}\ndata: {train: [{path: b}, {path: c}]}\n"
    config = load(tmp_path, text)
    assert (config.name, config.schedule.max_lr, config.schedule.min_lr) == ("other", 1e-3, 3e-4)
    assert [source.path for source in config.data.train] == ["b", "c"]
    (tmp_path / "loop.yml").write_text("extends: loop.yml\n")
    with pytest.raises(UserError, match="circle"):
        read_configs([str(tmp_path / "loop.yml")])


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.integers() | st.dictionaries(st.sampled_from("xyz"), st.integers())))
def test_merge_is_idempotent_and_has_an_empty_element(mapping: dict) -> None:
    assert merge(mapping, mapping) == mapping == merge(mapping, {}) == merge({}, mapping)


@pytest.mark.parametrize(
    "path",
    sorted(
        {*ROOT.glob("configs/**/*.yml")} - {path for part in ("pythia", "llama") for path in ROOT.glob(f"configs/{part}/*.yml")}
    ),
    ids=lambda path: path.name,
)
def test_shipped_configs_load_and_survive_a_round_trip(path: Path) -> None:
    mapping, origins = read_configs([str(path)])
    if "experiment" in mapping:
        forms = [False, True] if mapping.get("quick") else [False]
        runs = [arm.config for quick in forms for arm in load_experiment(mapping, origins, quick=quick).arms]
    else:
        runs = [validate(RunConfig, mapping, origins)]
    for run in runs:
        assert validate(RunConfig, *parse_yaml(dump(run), "dump")) == run


def test_410m_is_the_papers_run() -> None:
    """Numbers of arXiv 2308.04014, section 2: 1104 x 2048 tokens a step, 131,296 steps, 297B tokens."""
    config = validate(RunConfig, *read_configs([str(ROOT / "configs/410m_rewarm.yml")]))
    assert config.tokens_per_step == 2_260_992 and config.total_steps == 131_296
    assert config.total_steps * config.tokens_per_step == 296_859_205_632
    assert config.optimizer.betas == (0.9, 0.95) and config.optimizer.eps == 1e-8 and config.optimizer.weight_decay == 0.1
    assert config.schedule.max_lr == 3e-4 and config.schedule.min_lr == 3e-5 and config.steps(config.schedule.warmup) == 1312.96


def test_experiment_arms_differ_from_the_base_and_are_refused_by_line(tmp_path: Path) -> None:
    text = "experiment: e\nbase:\n" + "".join(f"  {line}\n" for line in MINIMAL.splitlines()[1:])
    text += "runs:\n  - {name: one}\n  - name: two\n    schedule: {max_lr: 1e-2}\n    start: {from: '${folder}/one'}\n"
    path = tmp_path / "e.yml"
    path.write_text(text)
    experiment = load_experiment(*read_configs([str(path), "folder=out"]))
    one, two = (arm.config for arm in experiment.arms)
    assert experiment.folder == "out" and one.run_folder == "out/one"
    assert two.start.from_ == "out/one" and (one.schedule.max_lr, two.schedule.max_lr) == (3e-3, 1e-2)
    path.write_text(text.replace("max_lr: 1e-2", "max_rl: 1e-2"))
    with pytest.raises(UserError, match=r"e.yml:12: unknown key 'max_rl' in schedule, did you mean 'max_lr'"):
        load_experiment(*read_configs([str(path)]))
    path.write_text(text.replace("name: two", "name: one"))
    with pytest.raises(UserError, match="two entries are named 'one'"):
        load_experiment(*read_configs([str(path)]))


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        (500, 500),
        ("500", 500),
        ("500 steps", 500),
        ("1%", 10),
        ("0.5 %", 5),
        ("2k tokens", 20),
        ("1.5e3 tokens", 15),
        ("1_000", 1000),
    ],
)
def test_budgets(written: object, steps: float) -> None:
    assert Budget.model_validate(written).in_steps(tokens_per_step=100, total_steps=1000) == pytest.approx(steps)


@settings(deadline=None)
@given(st.integers(0, 10**13), st.sampled_from(["steps", "tokens", "percent", "epochs"]))
def test_budgets_survive_being_written(amount: int, unit: str) -> None:
    budget = Budget.model_validate({"amount": amount if unit != "percent" else amount % 101, "unit": unit})
    written = yaml.safe_load(yaml.safe_dump(budget.model_dump(mode="json")))
    assert Budget.model_validate(written) == budget


@pytest.mark.parametrize("written", [-1, 0.5, True, "1 %%", "ten", "1 epoche", None, "1e400 steps"])
def test_budgets_refused(written: object) -> None:
    with pytest.raises(ValueError):
        Budget.model_validate(written)


def test_schedule_keys_are_those_of_the_schema() -> None:
    named = {key for curve in CURVES.values() for key in (*curve.needs, *curve.may)}
    assert named | {"curve", "max_lr", "warmup"} == set(ScheduleConfig.model_fields)


def test_documentation_is_up_to_date_and_names_every_key() -> None:
    assert (ROOT / "docs/config.md").read_text() == markdown(), "run: python tools/document_config.py"
    assert (ROOT / "docs/config.schema.json").read_text() == json_schema(), "run: python tools/document_config.py"
    assert all(f"| `{key}` |" in markdown() for key in ModelConfig.model_fields)
    assert not re.search(r"^ |typing|<class|pydantic", markdown(), re.MULTILINE)  # what only Python means, or indents


def test_json_schema_judges_as_the_loader_does() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(json.loads(json_schema()))
    for path in sorted(ROOT.glob("configs/**/*.yml")):
        assert not list(checker.iter_errors(parse_yaml(path.read_text(), str(path))[0])), path
    assert list(checker.iter_errors(parse_yaml(MINIMAL.replace("max_lr", "max_rl"), "f")[0]))
    assert list(checker.iter_errors(parse_yaml(MINIMAL.replace("budget: 40", "budget: forty"), "f")[0]))
    assert list(checker.iter_errors(parse_yaml("experiment: e\nruns: [{name: a, schedule: {curve: cosin}}]", "f")[0]))


def test_text_that_is_no_unicode_is_said() -> None:
    """As Python reads the command line in a locale that can't hold it."""
    with pytest.raises(UserError, match=r"'out_\\udce6' is no Unicode text: use a UTF-8 locale"):
        write_yaml({"name": "out_\udce6"})
