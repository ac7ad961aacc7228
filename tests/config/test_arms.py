"""Axes, seeds, chains and starts of an experiment: what its runs are, and what is refused before one starts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.axes import orders_of
from megarewarm.config.experiment import Experiment, load_experiment
from megarewarm.config.experiment_record import check_record, record_of, write_record
from megarewarm.config.load import read_configs
from megarewarm.config.yaml_text import parse_yaml
from megarewarm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BASE = """\
experiment: e
base:
  model: {num_layers: 1, hidden_size: 16, num_heads: 2, vocab_size: 16}
  data: {sequence_length: 8, train: [{path: a}]}
  schedule: {curve: cosine, max_lr: 1e-3, min_lr: 10%}
  training: {budget: 40 steps, global_batch: 2, micro_batch: 2}
"""
UPSTREAM = "runs:\n  - {name: upstream}\n"


def load(text: str, **keywords: Any) -> Experiment:
    return load_experiment(*parse_yaml(text, "e.yml"), **keywords)


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text)
    return str(caught.value)


def test_a_grid_has_every_combination_with_readable_names_and_tied_rates() -> None:
    text = BASE + UPSTREAM + "sweeps:\n  - name: grid\n    start: {from: '${runs}/upstream'}\n"
    text += "    axes: {schedule.max_lr: [1e-3, 6e-4], schedule.warmup: [0, 2.5%]}\n"
    arms = load(text).arms
    names = ["upstream", "grid_1e-3_0", "grid_1e-3_2.5pct", "grid_6e-4_0", "grid_6e-4_2.5pct"]
    assert [arm.arm for arm in arms] == names
    last = arms[-1].config
    assert (last.schedule.max_lr, last.schedule.min_lr, str(last.schedule.warmup)) == (6e-4, pytest.approx(6e-5), "2.5%")
    assert arms[-1].axes == {"schedule.max_lr": 6e-4, "schedule.warmup": "2.5%"} and arms[-1].group == "grid"
    assert arms[-1].after == ("upstream",) and last.start.from_ == "runs/e/upstream"


def test_a_base_takes_the_folder_of_a_file_that_it_extends_back(tmp_path: Path) -> None:
    """As of the run.yml that megarewarm continue writes."""
    (tmp_path / "run.yml").write_text(
        BASE.partition("base:\n")[2].replace("  ", "", 1).replace("\n  ", "\n") + "folder: runs/own\n"
    )
    experiment = tmp_path / "e.yml"
    text = "experiment: e\nbase:\n  extends: run.yml\n  folder: FOLDER\n" + UPSTREAM
    for folder in ("null", "other"):
        experiment.write_text(text.replace("FOLDER", folder))
        if folder == "other":
            with pytest.raises(UserError, match="'folder: null' in base where a file that it extends has one"):
                load_experiment(*read_configs([str(experiment)]))
        else:
            (arm,) = load_experiment(*read_configs([str(experiment)])).arms
            assert arm.config.run_folder == "runs/e/upstream"


def test_an_axis_of_labels_sets_several_keys() -> None:
    text = BASE + "sweeps:\n  - {name: peak, axes: {height: {low: {schedule: {max_lr: 1e-4}}, "
    text += "high: {schedule: {max_lr: 1e-2, min_lr: 0}}}}}\n"
    low, high = load(text).arms
    assert (low.arm, high.arm) == ("peak_low", "peak_high")
    assert (low.config.schedule.min_lr, high.config.schedule.min_lr) == (pytest.approx(1e-5), 0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), st.integers(1, 3), st.integers(1, 3))
def test_names_and_folders_are_unique_and_starts_come_first(seeds: list[int], rates: int, layers: int) -> None:
    axes = {
        "schedule.max_lr": [1e-3 * (i + 1) for i in range(rates)],
        "optimizer.weight_decay": [0.1 * i for i in range(layers)],
    }
    text = BASE + f"seeds: {seeds}\nsweeps:\n  - {{name: g, start: {{from: '${{runs}}/upstream'}}, axes: {json.dumps(axes)}}}\n"
    arms = load(text + UPSTREAM).arms
    assert len(arms) == len(seeds) * (1 + rates * layers)
    assert len({arm.name for arm in arms}) == len({arm.config.run_folder for arm in arms}) == len(arms)
    seen: set[str] = set()
    for arm in arms:
        assert seen.issuperset(arm.after)
        seen.add(arm.name)
        assert arm.config.training.seed == arm.config.data.seed == arm.seed
        assert arm.config.start.from_ in (None, f"runs/e/seed_{arm.seed}/upstream")
    content = [arm.config.model_dump(exclude={"name", "folder"}) for arm in arms]
    assert all(one != other for one, other in itertools.combinations(content, 2))


def test_a_chain_starts_each_stage_from_the_one_before() -> None:
    text = BASE + "seeds: [1, 2]\nruns:\n  - name: c\n    start: {from: hub/model, moments: reset}\n    stages:\n"
    text += "      - {name: one}\n      - {name: two, start: {intent: continue}, schedule: {curve: constant, min_lr: null}}\n"
    arms = load(text).arms
    assert [arm.name for arm in arms] == ["c-one.s1", "c-two.s1", "c-one.s2", "c-two.s2"]
    one, two = arms[2:]
    assert (one.chain, one.stage, two.chain, two.stage) == ("c", 0, "c", 1)
    assert (one.config.start.from_, one.config.start.moments) == ("hub/model", "reset")
    assert (two.config.start.from_, two.config.start.intent, two.config.start.moments) == (
        "runs/e/seed_2/c-one",
        "continue",
        None,
    )
    assert two.after == ("c-one.s2",)


def test_a_moment_of_a_run_is_a_step_that_it_keeps() -> None:
    arms = load(BASE + "runs:\n  - {name: early, start: {from: '${runs}/up@30%'}}\n  - {name: up}\n").arms
    up, early = arms
    assert (up.arm, early.arm) == ("up", "early")  # in the order in which they can be run
    assert early.config.start.from_ == "runs/e/up/checkpoints/step_12" and up.config.checkpoint.extra_steps == [12]
    steps = load(BASE + "runs:\n  - {name: up}\n  - {name: early, start: {from: '${runs}/up@160 tokens'}}\n").arms[1]
    assert steps.config.start.from_ == "runs/e/up/checkpoints/step_10"


def test_a_run_waits_for_the_one_that_teaches_it_and_does_not_start_from_it() -> None:
    text = BASE + (
        "runs:\n  - {name: student, start: {from: '${runs}/up'}, distill: {from: '${runs}/teacher@30%', kind: hidden}}\n"
        "  - {name: again, start: {from: '${runs}/teacher'}, distill: {from: '${runs}/teacher'}}\n"
        "  - {name: scratch, distill: {from: '${runs}/up'}}\n  - {name: up}\n  - {name: teacher, start: {from: '${runs}/up'}}\n"
    )
    arms = {arm.arm: arm for arm in load(text).arms}
    assert list(arms) == ["up", "scratch", "teacher", "student", "again"]
    student, distill = arms["student"], arms["student"].config.distill
    assert (student.after, student.taught_by) == (("up", "teacher"), ("teacher",))
    assert distill is not None and distill.from_ == "runs/e/teacher/checkpoints/step_12"
    assert arms["teacher"].config.checkpoint.extra_steps == [12]
    assert (arms["again"].after, arms["again"].taught_by) == (("teacher",), ())
    assert (arms["scratch"].after, arms["scratch"].taught_by) == (("up",), ("up",))
    recorded = {entry["name"]: entry for entry in record_of(load(text))["runs"]}
    assert (recorded["student"]["after"], recorded["student"]["taught_by"]) == (["up", "teacher"], ["teacher"])


def test_quick_needs_to_be_described() -> None:
    with pytest.raises(UserError, match="has no key 'quick'"):
        load(BASE + UPSTREAM, quick=True)


def test_quick_is_shorter_elsewhere_and_laid_over_the_file() -> None:
    text = BASE + UPSTREAM + "seeds: [1, 2]\nquick: {length: 0.1, seeds: [7], base: {schedule: {max_lr: 2e-3}}}\n"
    (arm,) = load(text, quick=True).arms
    assert (arm.config.total_steps, arm.seed, arm.config.schedule.max_lr) == (4, 7, 2e-3)
    assert arm.config.run_folder == "runs/e_quick/seed_7/upstream"
    assert [a.config.total_steps for a in load(text).arms] == [40, 40]


@pytest.mark.parametrize(
    "text, told",
    [
        (
            "sweeps: [{name: a, axes: {schedule.max_rl: [1]}}]",
            "axis 'schedule.max_rl' names no key of a run, did you mean 'schedule.max_lr'",
        ),
        ("sweeps: [{name: a, axes: {peak: [1, 2]}}]", "axis 'peak' names no key of a run"),
        ("sweeps: [{name: a, axes: {schedule.max_lr: 1e-3}}]", "expected a list of values"),
        ("sweeps: [{name: a, axes: {data.train: [[{path: b}]]}}]", "has no short name"),
        ("sweeps: [{name: a}]", "sweep 'a' has no 'axes'"),
        ("sweeps: [{name: a, axes: {schedule.max_lr: [-1]}}]", "schedule.max_lr"),
        ("sweeps: [{name: a, axes: {schedule.max_lr: [2e-3, 0.002]}}]", "two runs are named 'a_2e-3'"),
        ("runs: [{name: a_1}]\nsweeps: [{name: a, axes: {training.seed: [1]}}]", "two runs are named 'a_1'"),
        ("runs: [{name: a}, {name: b}]", "the runs 'a' and 'b' are the same in every key"),
        ("runs: [{name: a}, {name: b, start: {from: '${runs}/c'}}]", "'b' starts from runs/e/c, which no run"),
        ("runs: [{name: a, start: {from: '${runs}/b'}}, {name: b, start: {from: '${runs}/a'}}]", "in a circle"),
        ("runs: [{name: a}, {name: b, distill: {from: '${runs}/c'}}]", "'b' is taught by runs/e/c, which no run"),
        ("runs: [{name: a, distill: {from: '${runs}/b'}}, {name: b, start: {from: '${runs}/a'}}]", "in a circle"),
        ("runs: [{name: a}, {name: b, start: {from: '${runs}/a@200%'}}]", "is step 80 of 'a', which has steps 1 to 40"),
        ("runs: [{name: a}, {name: b, start: {from: '${runs}/a@soon'}}]", "'@soon' is no moment of a run"),
        ("runs: [{name: a, folder: x}]", "has no 'folder' of its own"),
        ("runs: [{name: a, extends: x.yml}]", "'a' has 'extends', which is for whole files and for 'base'"),
        ("sweeps: [{name: a, extends: x.yml, axes: {training.seed: [1]}}]", "'a_1' has 'extends'"),
        ("runs: [{name: a, stages: [{name: b, extends: x.yml}]}]", "'a-b' has 'extends'"),
        ("runs: [{name: a, stages: []}]", "'stages' of 'a' is a list of runs"),
        ("runs: [{name: a, stages: [{data: {}}]}]", "stage 0 of 'a' has no 'name'"),
        ("seeds: [1, 1]\nruns: [{name: a}]", "seeds: one is given twice"),
        ("seeds: []\nruns: [{name: a}]", "seeds"),
        ("seeds: [1]", "needs 'runs' or 'sweeps'"),
        ("sweeps: [{name: a, axes: {training.seed: [1]}, with: [b]}]", "'with' names 'b', which is no run"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(text: str, told: str) -> None:
    message = refusal(BASE + text + "\n")
    assert told in message
    assert "e.yml:" in message or told == "in a circle"
    assert "\n" not in message


SOURCES = BASE.replace("[{path: a}]", "[{path: a, weight: 2}, {name: code, path: b}, {path: d/c}]")


def test_sources_one_after_another_in_every_order_beside_their_blend() -> None:
    arms = load(SOURCES + "sweeps:\n  - {name: order, permute: data.train, axes: {schedule.max_lr: [1e-3, 2e-3]}}\n").arms
    assert len(arms) == 2 * 7 and arms[0].arm == "order_1e-3_blend" and arms[3].arm == "order_1e-3_code_a_c"
    assert [len(arm.config.data.train) for arm in arms[:7]] == [3, 1, 1, 1, 1, 1, 1] and not arms[0].config.data.switches
    assert arms[3].axes == {"schedule.max_lr": 1e-3, "data.train": "code, a, c"}
    orders = set()
    for arm in arms[1:7]:
        data = arm.config.data
        read = [data.train[0], *(switch.train[0] for switch in data.switches)]
        orders.add(tuple(source.path for source in read))
        # each for its share, under the same number wherever it comes: so all orders read the same samples of it
        ends = [round(arm.config.steps(switch.at)) for switch in data.switches if switch.at] + [40]
        lengths = dict(zip([source.path for source in read], np.diff([0, *ends]).tolist(), strict=True))
        assert lengths == {"a": 20, "b": 10, "d/c": 10}
        assert {source.path: source.place for source in read} == {"a": 0, "b": 1, "d/c": 2}
    assert len(orders) == 6


def test_stages_in_every_order_and_a_latin_square() -> None:
    text = BASE + "sweeps:\n  - name: order\n    permute: stages\n    orders: latin\n    stages:\n"
    text += "".join(f"      - {{name: {name}, data: {{train: [{{path: {name}}}]}}}}\n" for name in "abcd")
    arms = load(text).arms
    chains = [
        [arm.config.data.train[0].path for arm in arms if arm.chain == name] for name in dict.fromkeys(a.chain for a in arms)
    ]
    assert chains == [list("abdc"), list("bcad"), list("cdba"), list("dacb")]
    assert arms[5].arm == "order_b_c_a_d-c" and arms[5].config.start.from_ == "runs/e/order_b_c_a_d-b"


@given(st.integers(2, 12))
def test_a_latin_square_is_balanced(count: int) -> None:
    rows = orders_of(count, "latin")
    assert all(sorted(line) == list(range(count)) for line in [*rows, *zip(*rows, strict=True)])
    after = [pair for row in rows for pair in itertools.pairwise(row)]
    assert count % 2 or len(set(after)) == len(after) == count * (count - 1)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ("permute: data.tran", "permute: expected data.train (the sources of the blend) or stages, not 'data.tran'"),
        ("permute: stages", "permute: stages has no list of two or more"),
        ("permute: data.train, orders: some", "orders: expected all or latin, not 'some'"),
        ("orders: all, axes: {schedule.max_lr: [1, 2]}", "'orders' says in which orders 'permute' puts something"),
        ("permute: data.train, data: {switches: [{at: 50%, train: [{path: a}]}]}", "and 'data.switches' too: remove them"),
        ("permute: data.train, data: {train: [{path: a}]}", "permute: data.train has no list of two or more"),
        ("permute: data.train, data: {train: [{path: a}, {path: a}]}", "two runs are named 'g_a_a'"),
        (
            f"permute: data.train, data: {{train: [{', '.join(f'{{path: p{i}}}' for i in range(7))}]}}",
            "there are 5,040 orders of 7",
        ),
    ],
)
def test_orders_that_can_not_be(keys: str, told: str) -> None:
    text = refusal(SOURCES + f"sweeps:\n  - {{name: g, {keys}}}\n")
    assert told in text and "e.yml:8" in text and "\n" not in text


def test_the_record_names_every_run_and_refuses_another_experiment(tmp_path: Path) -> None:
    text = BASE + f"folder: {tmp_path}/x\n" + UPSTREAM + "sweeps: [{name: s, axes: {training.seed: [1]}, with: [upstream]}]\n"
    experiment = load(text)
    write_record(experiment)
    record = json.loads((tmp_path / "x" / "experiment.json").read_text())
    assert record == json.loads(json.dumps(record_of(experiment))) and record["format"] == 1
    upstream, other = record["runs"]
    assert upstream["groups"] == {"s": {"training.seed": 1234}} and other["groups"] == {"s": {"training.seed": 1}}
    assert (other["folder"], other["steps"], other["tokens_per_step"]) == ("s_1", 40, 16)
    with pytest.raises(UserError, match="holds the experiment 'e', this one is 'f'"):
        check_record(load(text.replace("experiment: e", "experiment: f")))
    (tmp_path / "x" / "experiment.json").write_text("{")
    with pytest.raises(UserError, match="damaged; remove it"):
        check_record(experiment)


def test_a_base_may_be_the_file_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text("name: r\n" + "\n".join(line[2:] for line in BASE.splitlines()[2:]) + "\n")
    (tmp_path / "e.yml").write_text("experiment: e\nbase: {extends: run.yml, schedule: {max_lr: 1}}\nruns: [{name: a}]\n")
    (arm,) = load_experiment(*read_configs([str(tmp_path / "e.yml")])).arms
    assert (arm.name, arm.config.schedule.max_lr, arm.config.total_steps) == ("a", 1, 40)
    (tmp_path / "e.yml").write_text("experiment: e\nbase: {extends: no.yml}\nruns: [{name: a}]\n")
    with pytest.raises(UserError, match=r"e.yml:2: 'extends' names .*no.yml, which does not exist"):
        read_configs([str(tmp_path / "e.yml")])


def test_the_papers_grids() -> None:
    """The axes of arXiv 2308.04014 (section 4) and 2403.08763 (tables 2 to 4)."""
    first = load_experiment(*read_configs([str(ROOT / "configs/experiments/rewarm_2308_04014.yml")])).arms
    by_group = {group: [arm.config.schedule for arm in first if group in arm.groups] for group in ("warmup", "max_lr")}
    assert sorted(str(s.warmup) for s in by_group["warmup"]) == ["0 steps", "0.5%", "1%", "2%"]
    assert sorted(s.max_lr for s in by_group["max_lr"]) == [1.5e-4, 3e-4, 6e-4]
    assert all(s.min_lr == pytest.approx(s.max_lr / 10) for group in by_group.values() for s in group)
    starts = {arm.config.start.from_ for arm in first}
    assert {f"EleutherAI/pythia-410m@step{n}" for n in (10000, 27000, 143000)} | {None} == starts
    second = load_experiment(*read_configs([str(ROOT / "configs/experiments/replay_2403_08763.yml")])).arms
    for group in ("weak", "strong"):
        replay = [arm.config.replay.fraction if arm.config.replay else 0 for arm in second if group in arm.groups]
        assert sorted(replay) == [0, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5]


def test_a_run_extended_where_an_experiment_is_says_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text("training: {budget: 3}\n")
    experiment = tmp_path / "e.yml"
    experiment.write_text("extends: run.yml\nexperiment: e\nruns: [{name: r}]\n")
    with pytest.raises(UserError, match=r"run\.yml:1: unknown key 'training'.*'extends' with a run's file, belong in 'base'"):
        load_experiment(*read_configs([str(experiment)]))
