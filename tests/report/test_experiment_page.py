"""The page of an experiment: what stands on it, the files beside it, and how it behaves in a browser."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PolyCollection
from matplotlib.image import imread

from megarewarm.report.figures import curves as draw
from megarewarm.report.figures import style
from megarewarm.report.figures.panels import chains_of, draw_dynamics, draw_interpolation, lines_of_arms, panels_of
from megarewarm.report.figures.pareto import comparable, draw_pareto, front
from megarewarm.report.figures.sweeps import axis_lines, draw_axis, number_of
from megarewarm.report.figures.training import medians
from megarewarm.report.numbers.arms import arm_rows, comparisons
from megarewarm.report.numbers.experiment import ExperimentRecord, read_experiment
from megarewarm.report.pages.experiment_page import report_experiment
from megarewarm.report.pages.findings import summarise_experiment
from megarewarm.report.pages.html import content_hash
from megarewarm.report.pages.tables import SCRIPT, comparisons_html
from tests.report.test_page import assert_legible, boxes, browse, check, needs_chromium, run_tool
from tests.support.experiment_runs import STEPS, entry, write_grid, write_record, write_run


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grid(tmp_path_factory.mktemp("experiment") / "grid")


@pytest.fixture(scope="module")
def experiment(grid: Path) -> ExperimentRecord:
    return read_experiment(grid)


@pytest.fixture(scope="module")
def page(grid: Path) -> Path:
    return report_experiment(grid, grid / "report")


def said(folder: Path) -> str:
    experiment = read_experiment(folder)
    rows = arm_rows(experiment)
    return "\n".join(summarise_experiment(experiment, rows, comparisons(experiment, rows)))


def two_arms(folder: Path, ends: dict[int, float], base: float = 2.5) -> Path:
    """An arm 'other' that ends upstream at ``ends[seed]``, and 'main' that ends at ``base`` plus a hundredth of the seed."""
    entries = []
    for seed, end in ends.items():
        for arm, up in (("main", base + 0.01 * seed), ("other", end)):
            plan = entry(arm, seed, after=["start"])
            entries.append(plan)
            write_run(folder, plan, [2.0, 2.8, up], [3.0, 2.5, 2.0])
    return write_record(folder, entries)


@pytest.mark.parametrize("place", ["single", "sweep", "chain"])
@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_ends_of_other_lengths_are_not_compared(tmp_path: Path, place: str, seeds: tuple[int, ...], factor: float) -> None:
    """Wherever arms meet their reference: 'other' ends far lower, after ``factor`` times as many tokens."""
    entries = []
    for seed in seeds:
        for arm, end, length in (("main", 2.5, 1.0), ("same", 2.2, 1.0), ("other", 1.5, factor)):
            keys: dict[str, Any] = {"after": ["start"], "steps": round(STEPS * length)}
            if place == "sweep":
                keys |= {"group": "g", "axes": {"training.micro_batch": length}}
            if place == "chain":  # the last of two stages: what counts is the whole
                first = entry(f"{arm}-1", seed, chain=arm, stage=0, steps=STEPS // 2)
                entries.append(first)
                write_run(tmp_path, first, [9.0, 2.0], [9.0, 3.0])
                keys |= {"chain": arm, "stage": 1, "after": [f"{arm}-1"], "steps": round(STEPS * (1.5 * length - 0.5))}
            plan = entry(arm, seed, **keys)
            entries.append(plan)
            write_run(tmp_path, plan, [2.0, 2.8, end + 0.01 * seed], [3.0, 2.5, 2.0])
    text = said(write_record(tmp_path, entries))
    claims = "\n".join(line for line in text.splitlines() if "against main" in line)
    assert "same" in claims, text
    assert ("other" in claims) == (factor == 1), text
    assert ("not compared with main" in text and "because of another length: other (" in text) == (factor != 1)
    experiment = read_experiment(tmp_path)
    told = comparisons(experiment, arm_rows(experiment))
    page = comparisons_html(told)
    row = re.search(r"<tr><td class=\"text\">[^<]*</td><th scope=\"row\">other</th>.*?</tr>", page)
    assert row is not None and (" against " in row[0]) == (factor != 1)
    assert ("<b>" in row[0]) == (factor == 1 and len(seeds) > 1)
    assert {one.flat()["same_length"] for one in told if one.arm == "other"} == {factor == 1}


def test_points_of_an_axis_are_joined_within_one_length(tmp_path: Path) -> None:
    def lines(axis: str) -> dict[str, list[float]]:
        entries = []
        for number, (value, length) in enumerate(((1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0))):
            plan = entry(f"arm_{number}", 1, after=["start"], steps=round(STEPS * length), group="g", axes={axis: value})
            entries.append(plan)
            sets = ("prose", "news") if axis == "data.sets" and number > 1 else ("prose", "code")
            write_run(tmp_path / axis, plan, [2.0, 2.5], [3.0, 2.5], sets=sets)
        rows = arm_rows(read_experiment(write_record(tmp_path / axis, entries)))
        found = axis_lines(rows, "g")
        assert found is not None
        return {line.label: line.values for line in found[1]}

    assert lines("data.shards") == {"410k tokens": [1, 2, 3], "819k tokens": [4]}
    on_news, on_code = "on prose and news", "on prose and code"
    both = {f"410k tokens, {on_code}": [1, 2], f"410k tokens, {on_news}": [3], f"819k tokens, {on_news}": [4]}
    assert lines("data.sets") == both
    assert lines("training.budget") == {"": [1, 2, 3, 4]}  # there the length is what is varied


def test_a_shorter_arm_is_not_blamed_for_not_reaching_the_one_from_scratch(tmp_path: Path) -> None:
    entries = []
    for arm, length, down in (("start", 1.0, 3.0), ("scratch", 1.0, 2.4), ("long", 1.0, 2.5), ("short", 0.5, 2.6)):
        plan = entry(arm, 1, after=["start"] if arm in ("long", "short") else [], steps=round(STEPS * length))
        entries.append(plan)
        write_run(tmp_path, plan, [2.0, 2.5], [3.0, down])
    assert "0 of 1 arm reached the final downstream loss of scratch" in said(write_record(tmp_path, entries))


def test_a_difference_is_claimed_only_where_it_exceeds_the_seeds_spread(tmp_path: Path) -> None:
    text = said(two_arms(tmp_path / "clear", {1: 2.61, 2: 2.62, 3: 2.63}))
    assert "upstream loss higher in other (+0.100 ± 0.000)" in text
    text = said(two_arms(tmp_path / "noisy", {1: 2.81, 2: 2.42, 3: 2.63}))
    assert "higher" not in text and "no difference beyond seed noise in other" in text
    text = said(two_arms(tmp_path / "single", {1: 3.61}))
    assert "the seed noise is unknown" in text and "±" not in text
    assert "against main, one seed: upstream +1.100 in other" in text


def test_what_has_not_begun_is_listed_and_not_spoken_of(tmp_path: Path) -> None:
    folder = write_grid(tmp_path / "grid", seeds=(1,), started=0.45)
    text = said(folder)
    assert "29 arms: 12 of 29 runs complete, 1 under way and 16 not begun." in text
    page = " ".join(check(report_experiment(folder, tmp_path / "out")).text)
    assert "Not begun:" in page and "Under way, or stopped before their end:" in page and ": 60% of 410k tokens" in page
    told = {row["run"]: row["state"] for row in json.loads((tmp_path / "out" / "runs.json").read_text())}
    assert list(told.values()).count("not begun") == 16 and told["upstream.s1"] == "complete"
    nothing = write_record(tmp_path / "nothing", [entry("a", 1), entry("b", 1)])
    assert "0 of 2 runs complete, 2 not begun" in said(nothing)
    assert "from scratch" not in " ".join(check(report_experiment(nothing, tmp_path / "out")).text)
    assert not list((tmp_path / "out").glob("*.png"))  # those of the earlier report are gone


def test_page_is_whole_and_allows_only_its_own_script(page: Path) -> None:
    text = page.read_text()
    checker = check(page)
    sources = [value for tag, name, value in checker.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(sources) >= 14 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text).replace("http-equiv", "")
    (policy,) = [value for tag, name, value in checker.attributes if tag == "meta" and value.startswith("default-src")]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert f"script-src {content_hash(script)}" in policy and script == SCRIPT
    assert not any(name == "style" or name.startswith("on") for _, name, _ in checker.attributes)


def test_numbers_on_the_page_and_in_the_files(page: Path, experiment: ExperimentRecord) -> None:
    text = " ".join(check(page).text)
    told = {row["arm"]: row for row in json.loads((page.parent / "arms.json").read_text())}
    with open(page.parent / "arms.csv", newline="") as file:
        in_csv = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(told) == list(in_csv) == [arm.name for arm in experiment.arms]
    for arm in experiment.arms:
        ends = [trial.run.curve("upstream").losses[-1] for trial in arm.trials if trial.run]
        assert told[arm.name]["upstream_after_mean"] == pytest.approx(sum(ends) / 3)
        assert float(in_csv[arm.name]["upstream_after_highest"]) == pytest.approx(max(ends))
        assert f"{sum(ends) / 3:.3f}" in text
    assert "Settings that differ" in text and "training.seed" not in text
    assert len(json.loads((page.parent / "runs.json").read_text())) == 87
    pictures = {path.stem for path in page.parent.glob("*.png")}
    assert pictures == {path.stem for path in page.parent.glob("*.svg")} and len(pictures) >= 14
    assert {"losses_max_lr", "pareto_1", "axis_replay", "chains", "interpolation_single", "dynamics_single"} <= pictures


def test_nothing_written_overlaps_or_is_cut_off(experiment: ExperimentRecord) -> None:
    rows = arm_rows(experiment)
    figures = []
    for panel in panels_of(experiment):
        figures.append(draw.curves_figure(lines_of_arms(panel.arms)))
        figures += [figure for figure in (draw_dynamics(panel.arms), draw_interpolation(panel.arms)) if figure]
    figures += [draw_axis(*found) for group in experiment.groups if (found := axis_lines(rows, group))]
    figures += [draw_pareto(group, "rewarm") for group in comparable(rows)]
    chains = chains_of(experiment)
    assert chains is not None and [name for _, name in chains.stages] == ["first", "second", "third"]
    figures.append(draw.curves_figure(chains.lines, chains.stages, "tokens of all stages"))
    with style.style():
        for figure in figures:
            assert_legible(figure)


def test_along_an_axis_the_seeds_are_a_band_and_no_replay_has_its_place(experiment: ExperimentRecord) -> None:
    rows = arm_rows(experiment)
    found = axis_lines(rows, "replay")
    assert found is not None and found[1][0].values == [0, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5]
    figure = draw_axis(*found)
    for axes, measure in zip(figure.axes, ("upstream_after", "downstream_after", "average_after"), strict=True):
        band: Any = next(part for part in axes.collections if isinstance(part, PolyCollection)).get_paths()[0].vertices
        places: Any = axes.lines[0].get_xdata()
        for x, row in zip(places, found[1][0].rows, strict=True):
            spread = row.spread(measure)
            assert {y for at, y in band.tolist() if at == x} >= {spread.low, spread.high} and spread.low != spread.high
    written = [box for text, box in boxes(figure) if re.fullmatch(r"0(\.\d+)?", text) and box[1] < 60]
    assert len(written) == 21
    gaps = [b[0] - a[2] for a, b in itertools.pairwise(sorted(written, key=lambda box: box[0])) if b[0] > a[0]]
    assert min(gaps) > 2.5 * figure.dpi / 72


def test_labels_keep_clear_of_the_bars(tmp_path: Path) -> None:
    entries = []
    for seed in (1, 2, 3):
        for arm, up, down in (("main", 2.6, 2.1), ("near", 2.58, 2.11), ("far", 2.2, 2.2)):
            plan = entry(arm, seed, after=["start"])
            entries.append(plan)
            write_run(tmp_path, plan, [2.0, up + 0.03 * (seed - 2)], [3.0, down + 0.01 * (seed - 2)])
    (group,) = comparable(arm_rows(read_experiment(write_record(tmp_path, entries))))
    figure = draw_pareto(group, "main")
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert low > 0.6 and high < 1.1  # 0 would leave most of the picture empty
    names = {row.name: row for row in group}
    for text, (x0, y0, x1, y1) in boxes(figure):
        if text in names:
            for row in group:
                x: Any = row.spread("forgetting")
                y: Any = row.spread("adaptation")
                across, along = (axes.transData.transform([(s, y.mean), (x.mean, t)]) for s, t in
                                 ((x.low, y.low), (x.high, y.high)))  # fmt: skip
                inside = y0 < across[0][1] < y1 and across[0][0] < x1 and along[0][0] > x0
                upright = x0 < across[1][0] < x1 and across[1][1] < y1 and along[1][1] > y0
                assert not inside and not upright, f"{text} lies over a bar of {row.name}"


def test_captions_speak_of_what_is_there(page: Path) -> None:
    chains = page.read_text().partition("<h2>Chains of stages</h2>")[2].partition("<h2>")[0]
    assert "where the next stage begins" in chains and "left column" not in chains
    assert "The left column enlarges" in page.read_text()


def test_gradient_norms_are_medians_of_ten_steps_or_more(experiment: ExperimentRecord) -> None:
    run = experiment.arms[1].runs[0]
    xs, _ = medians(run, "grad_norm")
    assert len(xs) == run.steps // 10


def test_panels_share_the_baseline_and_stay_small(experiment: ExperimentRecord) -> None:
    found = panels_of(experiment)
    assert [panel.key for panel in found] == ["single", "max_lr", "warmup", "replay", "early"]
    assert all(panel.arms[0].name == "rewarm" for panel in found[:4]) and all(len(panel.arms) <= 9 for panel in found)
    lines = lines_of_arms(found[3].arms)
    assert len({(line.colour, line.dashes) for line in lines}) == len({line.marker for line in lines}) == len(lines)


def test_numbers_of_axis_values() -> None:
    assert number_of("replay.fraction", None) == 0 and number_of("schedule.max_lr", None) is None
    assert number_of("x", "2%") == 2 and number_of("x", 1e-3) == 1e-3 and number_of("x", "late") is None
    assert number_of("x", True) is None


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=12))
def test_front_by_its_definition(points: list[tuple[float, float]]) -> None:
    """Exactly the points that none beats, each once where several are equal; quadratic, by definition."""
    kept = front(points)
    beaten = [any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points) for p in points]
    assert {points[i] for i in kept} == {p for p, out in zip(points, beaten, strict=True) if not out}
    assert len({points[i] for i in kept}) == len(kept) and [points[i][0] for i in kept] == sorted(points[i][0] for i in kept)


def order(dom: str) -> list[str]:
    body = re.search(r'class="numbers sortable".*?<tbody>(.*?)</tbody>', dom, re.DOTALL)
    assert body is not None
    return re.findall(r'<th scope="row" data-value="([^"]*)"', body[1])


@needs_chromium
def test_sorting_in_a_browser(page: Path, experiment: ExperimentRecord, tmp_path: Path) -> None:
    rows = arm_rows(experiment)
    assert order(page.read_text()) == [row.name for row in rows]  # the plain table, without the script
    dom = browse(f"{page.as_uri()}#sort=-forgetting", "--dump-dom")
    able = [row for row in rows if row.mean("forgetting") is not None]
    expected = [row.name for row in sorted(able, key=lambda row: row.mean("forgetting") or 0.0, reverse=True)]
    assert order(dom)[: len(able)] == expected and 'aria-sort="descending"' in dom
    assert set(order(dom)[len(able) :]) == {row.name for row in rows} - set(expected)  # without a number: last
    # Two clicks: the page with one more script, whose hash is allowed in its policy.
    click = 'const b = document.querySelector("th[data-key=downstream_after] button"); b.click(); b.focus(); b.click();'
    text = page.read_text().replace("script-src ", f"script-src {content_hash(click)} ")
    clicked = tmp_path / "clicked.html"
    clicked.write_text(text.replace("</body>", f"<script>{click}</script></body>"))
    ends = {row.name: row.mean("downstream_after") or 0.0 for row in rows}
    assert order(browse(clicked.as_uri(), "--dump-dom")) == sorted(ends, key=lambda name: -ends[name])
    # Any other script is refused.
    foreign = tmp_path / "foreign.html"
    foreign.write_text(page.read_text().replace("</body>", '<script>document.title = "changed"</script></body>'))
    assert "<title>changed" not in browse(foreign.as_uri(), "--dump-dom")


def requested(log: Path) -> set[str]:
    """Addresses that the page's requests went to, of a browser's network log."""
    return set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]+)"', log.read_text()))


@needs_chromium
def test_page_opens_and_asks_the_network_for_nothing(page: Path, tmp_path: Path) -> None:
    picture, log = tmp_path / "shot.png", tmp_path / "net.json"
    browse(page.as_uri(), f"--screenshot={picture}", "--window-size=1280,2400", f"--log-net-log={log}")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (2400, 1280) and 0.01 < float((pixels < 0.9).any(axis=2).mean()) < 0.4
    quiet = requested(log)
    probe = tmp_path / "probe.html"
    probe.write_text('<img src="http://probe.invalid/x.png">')
    browse(probe.as_uri(), "--dump-dom", f"--log-net-log={log}")
    assert any("probe.invalid" in url for url in requested(log))  # the log would have told
    own = re.compile(r"https?://([^/]*\.)?(google|gstatic|googleapis|gvt1)\.com[/:]")  # the browser's own errands
    assert not [url for url in quiet if not own.match(url)]


@pytest.mark.slow
def test_tool(tmp_path: Path) -> None:
    grid = two_arms(tmp_path / "grid", {1: 2.6, 2: 2.7})
    done = run_tool(grid, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    file = tmp_path / "e.yml"
    file.write_text(f"experiment: grid\nfolder: {grid}\nruns: [{{name: a}}]\n")
    assert run_tool(file, "--output", tmp_path / "yaml").returncode == 0 and (tmp_path / "yaml" / "pareto_1.svg").exists()
    cases = (
        ((grid, grid), "give it alone"),
        ((file, "--quick"), "nothing there yet"),
        ((grid, "--quick"), "--quick works only"),
    )
    for wrong, says in cases:
        bad = run_tool(*wrong)
        assert bad.returncode == 2 and says in bad.stderr and "Traceback" not in bad.stderr
