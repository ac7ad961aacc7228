"""The page, its pictures and the tool that writes them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from megarewarm.record.run import read_runs
from megarewarm.report.figures import curves as draw
from megarewarm.report.figures import style, tradeoff
from megarewarm.report.figures.labels import spread
from megarewarm.report.figures.lines import lines_of, short_labels
from megarewarm.report.numbers.runs import rows
from megarewarm.report.pages.html import content_hash
from megarewarm.report.pages.run_page import report
from megarewarm.spelling import tokens_text
from tests.support.report_runs import TOKENS_PER_STEP, config, eval_line, lines, task_line, train_line, write, write_arms

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
_OFFLINE = ("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_arms(tmp_path_factory.mktemp("runs"), steps=300)


@pytest.fixture(scope="module")
def page(arms: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(arms, tmp_path_factory.mktemp("report"))


class Checker(HTMLParser):
    """Collects attributes and complains about tags that don't close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "wbr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: Path) -> Checker:
    checker = Checker()
    checker.feed(page.read_text())
    assert checker.open == []
    return checker


def test_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    checker = check(page)
    sources = [value for _, name, value in checker.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(sources) == 5 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not any(tag in ("script", "link", "iframe") for tag, _, _ in checker.attributes)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.read_text()).replace("http-equiv", "")
    assert "url(" not in page.read_text() and "@import" not in page.read_text()
    for source in sources:
        svg = base64.b64decode(source.partition("base64,")[2]).decode()
        references = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert svg.rstrip().endswith("</svg>") and all(reference.startswith("#") for reference in references)


def test_every_picture_has_an_alternative_text_with_the_numbers(page: Path, arms: list[Path]) -> None:
    texts = [value for tag, name, value in check(page).attributes if tag == "img" and name == "alt"]
    assert len(texts) == 5
    last = read_runs([next(folder for folder in arms if folder.name == "rewarm")])[0].curve("upstream").losses[-1]
    assert f"{last:.2f}" in texts[0] and "rewarm_double" in texts[0] and "forgetting +" in texts[1]


def test_table_of_the_page_holds_every_run(page: Path, arms: list[Path]) -> None:
    text = " ".join(check(page).text)
    for row in rows(read_runs(arms)):
        assert row.upstream.after is not None and f"{row.upstream.after:.3f}" in text
        if row.forgetting is not None:
            assert f"{abs(row.forgetting):.3f}" in text
    assert "Settings that differ" in text and "schedule.warmup" in text and "training.micro_batch" not in text


def test_files_beside_the_page(page: Path) -> None:
    names = {path.name for path in page.parent.iterdir()}
    pictures = {f"{name}.png" for name in ("curves", "tradeoff", "training", "pretraining", "pretraining_steps")}
    assert names == {"report.html", "table.csv", "table.json"} | pictures
    for path in page.parent.glob("*.png"):
        pixels = imread(path)[..., :3]
        assert pixels.shape[1] > 1200 and 0.01 < float((pixels < 0.95).mean()) < 0.5


def test_same_data_give_the_same_page_and_old_pictures_go(arms: list[Path], tmp_path: Path) -> None:
    first = report(arms[2:4], tmp_path).read_bytes()
    assert (tmp_path / "tradeoff.png").exists()
    assert report(arms[2:4], tmp_path).read_bytes() == first
    report(arms[2:3], tmp_path)
    assert not (tmp_path / "tradeoff.png").exists() and (tmp_path / "curves.png").exists()


def test_names_are_escaped(tmp_path: Path) -> None:
    events = [event | ({"name": "<b>&x"} if event["event"] == "start" else {}) for event in lines("rewarm", 20)]
    folder = write(tmp_path / "run", events, {"name": "<b>&x", "note": "<script>"})
    other = write(tmp_path / "other", lines("rewarm_half", 20), config("rewarm_half", 20))
    text = report([folder, other], tmp_path / "out").read_text()
    assert "<script" not in text and "<b>&x" not in text and "&lt;b&gt;&amp;x" in text


@pytest.mark.parametrize("missing", ["upstream", "downstream", "both", "start"])
def test_run_that_lacks_a_role_or_its_first_evaluation(tmp_path: Path, missing: str) -> None:
    def gone(event: dict[str, object]) -> bool:
        if event["event"] != "eval":
            return False
        return event["step"] == 0 if missing == "start" else missing in ("both", event["role"])

    folders = [
        write(tmp_path / name, [event for event in lines(name, 40) if not gone(event)], config(name, 40))
        for name in ("rewarm", "rewarm_half")
    ]
    folders.append(write(tmp_path / "no_warmup", lines("no_warmup", 40), config("no_warmup", 40)))
    check(report(folders, tmp_path / "all"))
    text = " ".join(check(report(folders[:2], tmp_path / "two")).text)
    if missing in ("upstream", "downstream"):
        assert f"{missing.capitalize()} loss" not in text
    assert not (tmp_path / "two" / "tradeoff.png").exists()


def test_shortest_of_runs(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [train_line(1, 1e-3, 3.0)])
    only_start = write(tmp_path / "start", [eval_line(0, "a", "upstream", 2.0)])
    for folders in ([one], [only_start], [one, only_start]):
        check(report(folders, tmp_path / "out"))


def browse(url: str, *options: str) -> str:
    """What a browser prints of the page at ``url``."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *_OFFLINE, *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def boxes(figure: Figure) -> list[tuple[str, np.ndarray]]:
    """Extents in pixels of everything that is written in the figure."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.draw(renderer)
    texts = []
    for axes in figure.axes:
        assert isinstance(axes, Axes)
        ticks = [*axes.xaxis.get_major_ticks(), *axes.yaxis.get_major_ticks()]
        inside = (axes.viewLim.x0, axes.viewLim.x1), (axes.viewLim.y0, axes.viewLim.y1)
        for tick in ticks:
            low, high = inside[0] if tick in axes.xaxis.get_major_ticks() else inside[1]
            if low <= tick.get_loc() <= high and tick.label1.get_visible():
                texts.append(tick.label1)
        titles = (axes.title, axes._left_title, axes._right_title)  # type: ignore[attr-defined]
        texts += [axes.xaxis.label, axes.yaxis.label, *titles, *axes.texts]
        texts += legend.get_texts() if (legend := axes.get_legend()) else []
    for legend in figure.legends:
        texts += legend.get_texts()
    visible = [text for text in texts if text.get_visible() and text.get_text()]
    return [(text.get_text(), np.array(Text.get_window_extent(text, renderer).extents)) for text in visible]


def assert_legible(figure: Figure) -> None:
    """Nothing written runs out of the picture or over anything else that is written."""
    width, height = figure.canvas.get_width_height()
    written = boxes(figure)
    for text, (x0, y0, x1, y1) in written:
        assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height, f"'{text}' runs out of the picture"
    for index, (text, a) in enumerate(written):
        for other, b in written[index + 1 :]:
            shared = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            assert shared.min() <= 1.5, f"'{text}' and '{other}' overlap by {shared}"


def renamed(folder: Path, name: str, arm: str, steps: int, offset: float) -> Path:
    events = []
    for event in lines(arm, steps):
        if event["event"] == "start":
            event["name"] = name
        if event["event"] == "eval":
            event["loss"] += offset * event["step"] / steps
            events.append(event | {"name": event["name"] + "_2", "loss": event["loss"] + 0.3})
        events.append(event)
    return write(folder / name, events, config(arm, steps) | {"name": name})


def diverged(folder: Path) -> Path:
    """A run of 60 steps whose losses are not finite after 44."""
    lost = [event | {"loss": None} if event.get("loss") and event["step"] > 44 else event for event in lines("rewarm", 60)]
    return write(folder, [lost[0] | {"name": "diverged"}, *lost[1:]], config("rewarm", 60) | {"name": "diverged"})


def test_where_and_that_a_run_diverged_is_said_in_the_pictures(tmp_path: Path) -> None:
    runs = read_runs([diverged(tmp_path / "lost"), renamed(tmp_path, "sound", "rewarm", 60, 0.0)])
    caption = tradeoff.caption_tradeoff(rows(runs))
    assert caption.endswith("Without a point because a loss is not finite: diverged.")
    figure = draw.draw_curves(lines_of(runs, rows(runs)))
    assert figure is not None
    first = 48 * TOKENS_PER_STEP  # the evaluation after step 44
    said = {text.get_text() for axes in figure.axes for text in axes.texts if text.get_text().startswith("diverged")}
    assert said == {f"diverged  diverged at {tokens_text(first)}"}


def test_nothing_written_overlaps_or_is_cut_off(arms: list[Path], tmp_path: Path) -> None:
    many = ["constant_min", "rewarm_half", "rewarm", "rewarm_double", "no_warmup", "prose_again"] * 2
    crowd = [renamed(tmp_path, f"pythia410m_slimpajama_{arm}_{i}", arm, 60, 0.02 * i) for i, arm in enumerate(many)]
    lengths = (("rewarm", 60), ("rewarm_half", 60), ("rewarm_double", 30), ("no_warmup", 90))
    mixed = [renamed(tmp_path, f"german_from_the_last_checkpoint_{arm}_{n}", arm, n, 0.0) for arm, n in lengths]
    mixed.append(diverged(tmp_path / "diverged"))
    for folders in (arms, arms[3:4], arms[:1], crowd, mixed):
        runs = read_runs(folders)
        with style.style():
            lines = lines_of(runs, rows(runs))
            drawn = [draw.draw_curves(lines), draw.draw_pretraining(lines), draw.draw_sets(lines)]
            drawn.append(tradeoff.draw_tradeoff(lines))
            for figure in drawn:
                if figure is not None:
                    assert_legible(figure)


def test_spread_keeps_order_gap_and_bounds() -> None:
    places = spread([0.1, 0.11, 0.12, 0.9, 2.0], gap=0.05)
    assert np.diff(places).min() >= 0.05 - 1e-12 and places[0] >= 0 and places[-1] <= 1
    assert spread([0.2, 0.5], gap=0.1) == pytest.approx([0.2, 0.5])
    assert spread([0.5, 0.5], gap=0.1) == pytest.approx([0.45, 0.55])
    assert spread([], gap=0.1) == [] and spread([0.9] * 3, gap=0.5) == pytest.approx([0, 0.5, 1])


def test_short_labels() -> None:
    assert short_labels(["rewarm", "scratch"]) == ["rewarm", "scratch"]
    assert short_labels(["pythia410m_slim_rewarm_half", "pythia410m_slim_scratch"]) == ["…rewarm_half", "…scratch"]
    assert short_labels(["a" * 20 + "b" * 20])[0] == "a" * 14 + "…" + "b" * 15


def test_text_colours_have_contrast() -> None:
    """WCAG's ratio, computed here from its definition."""
    for colour in style.COLOURS:
        channels = [int(style.for_text(colour)[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 4.45


def test_the_policy_allows_this_style_and_no_script(page: Path) -> None:
    text = page.read_text()
    (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', text)
    (css,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    assert policy.startswith(f"default-src 'none'; img-src data:; style-src {content_hash(css)};") and "script" not in policy
    assert "unsafe" not in policy and not any(name == "style" for _, name, _ in check(page).attributes)


def test_zero_is_in_the_trade_off_only_where_it_leaves_room(tmp_path: Path) -> None:
    figures = []

    def limits(offset: float) -> tuple[float, float, float, float]:
        folders = []
        for name in ("rewarm", "rewarm_half"):
            events = [event | {"loss": event["loss"] + offset * (event["step"] > 0)} if event["event"] == "eval" else event
                      for event in lines(name, 40)]  # fmt: skip
            folders.append(write(tmp_path / f"{name}_{offset}", events, config(name, 40)))
        runs = read_runs(folders)
        figure = tradeoff.draw_tradeoff(lines_of(runs, rows(runs)))
        assert figure is not None
        figures.append(figure)
        return (*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim())

    left, right, low, high = limits(0.0)
    assert left < 0 < right and low < 0 < high
    left, right, low, high = limits(3.0)
    assert left > 2.8 and right < 3.6 and low < high < -2
    ticks = [text for text, box in boxes(figures[-1]) if re.fullmatch(r"[+−][\d.]+", text)]
    assert len(ticks) > 5 and len(set(ticks)) == len(ticks)


def test_perplexities_are_rounded(arms: list[Path]) -> None:
    told = {loss: draw._perplexity_tick(loss) for loss in (9.0, 8.25, 6.4, 4.4, 2.0)}
    assert told == {9.0: "8100", 8.25: "3830", 6.4: "602", 4.4: "81.5", 2.0: "7.4"}


def test_tests_on_other_items_are_not_compared(tmp_path: Path) -> None:
    """The task file changed between two processes of the run: its first test was on other items."""
    tests = [task_line(0, "words", "0000"), task_line(10, "words", "10", "b"), task_line(20, "words", "11", "b")]
    page = report([write(tmp_path / "run", [*lines("rewarm", 20), *tests])], tmp_path / "report").read_text()
    assert "<td>50.0 &rarr; <b>100.0</b></td>" in page and "on words: 50.0 % to 100.0 %" in page


def test_panels_of_pretraining_keep_apart(tmp_path: Path) -> None:
    high = [
        event | {"loss": event["loss"] + 5} if event["event"] == "eval" else event for event in lines("prose_pretrain", 100)
    ]
    runs = read_runs([write(tmp_path / "high", high, config("prose_pretrain", 100))])
    figure = draw.draw_pretraining(lines_of(runs, rows(runs)))
    assert figure is not None
    written = boxes(figure)
    for panel in figure.axes[:-1]:
        right = panel.get_window_extent().x1
        assert all(box[0] > right or box[2] < right + 12 for _, box in written)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_pictures_and_tables_scroll_within_the_page(page: Path, tmp_path: Path, dark: bool) -> None:
    script = """
      const wide = [...document.querySelectorAll(".wide")], size = e => parseFloat(getComputedStyle(e).fontSize);
      document.title = JSON.stringify({
        page: document.documentElement.scrollWidth, screen: document.documentElement.clientWidth,
        body: getComputedStyle(document.body).backgroundColor,
        ink: getComputedStyle(document.querySelector("td")).color,
        least: Math.min(...[...document.querySelectorAll("p, li, figcaption, td")].map(size)),
        images: Math.min(...[...document.images].map(e => e.clientWidth)),
        cut: wide.filter(e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX !== "auto").length,
      });"""
    probe = tmp_path / "probe.html"
    text = page.read_text().replace("default-src 'none';", f"default-src 'none'; script-src {content_hash(script)};")
    probe.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    mode = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    (told,) = re.findall("<title>(.*?)</title>", browse(probe.as_uri(), "--dump-dom", "--window-size=400,900", mode))
    found = json.loads(told)
    assert found["page"] <= found["screen"] <= 500 and found["least"] >= 16 and found["images"] >= 700 and found["cut"] == 0
    light = [int(re.findall(r"\d+", found[key])[0]) > 127 for key in ("body", "ink")]
    assert light == [not dark, dark]


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_tool(arms: list[Path], tmp_path: Path) -> None:
    done = run_tool(arms[2], arms[3], "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    assert "rewarm_half" in done.stdout and (tmp_path / "out" / "curves.png").exists()
    bad = run_tool(tmp_path)
    assert bad.returncode == 2 and "no metrics.jsonl" in bad.stderr and "Traceback" not in bad.stderr
