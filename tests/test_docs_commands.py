"""The commands and YAML of README.md and docs/*.md do what they say: in a folder of small files under the names that the
documents use, with their numbers made small where that matters."""

from __future__ import annotations

import glob
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megarewarm.cli import run_command
from megarewarm.data.files.document_table import DocumentTable, write_table
from megarewarm.data.files.token_file import open_tokens
from megarewarm.main import main
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.checkpoint.test_convert import run_in_process
from tests.checkpoint.test_extend_vocabulary import old_tokenizer, saved
from tests.config.test_neox_config import LOCAL, PYTHIA_410M
from tests.support.tiny import config, mapping, quiet, write_tokens

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]

# what no test can run, and why
NOT_HERE = {
    r"(DS_BUILD_OPS=0 )?pip install": "installs packages",
    r"hf download": "needs the network",
    r"lm_eval ": "another program",
    r"ls ": "another program",
    r"sbatch ": "needs Slurm: tests/lab/test_local.py and test_launch_real.py start real jobs where it is installed",
    r"bash tests/run": "runs these tests",
    r"megarewarm (continue|generate) ": "need a checkpoint with a tokenizer: tests/cli/test_continue.py, tests/api/test_api.py",
    r"python benchmarks/": "measures, for minutes and some on a GPU",
    r"megarewarm choose-start .*--probe": "makes runs: tests/lab/test_choose_start.py",
    r"bash launch.sh configs/recipes/": "tests/lab/test_recipes.py",
    r"tensorboard ": "a server of another program",
    r"python tests/fuzz_readers.py": "needs atheris",
    r"(bash launch.sh configs/quickstart.yml|megarewarm sweep configs/experiments/)": "minutes to an hour: dry runs here",
}
SHARED = {"model": {"num_layers": 4, "hidden_size": 64, "num_heads": 8, "vocab_size": 64, "max_positions": 16}}
SMALL = ["data.sequence_length=16", "training={budget: 8, global_batch: 4, micro_batch: 4}", "evaluation.every=4"]
SMALL += ["start.from=hf", "checkpoint.every=2", "checkpoint.keep_every=4", "logging.tensorboard=false"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def is_not_here(line: str) -> bool:
    return any(re.match(pattern, line) for pattern in NOT_HERE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader works: configs/, data/, new/, a start checkpoint 'hf', and RUN.yml, all small."""
    place = tmp_path_factory.mktemp("docs")
    (place / "configs" / "pythia").mkdir(parents=True)
    (place / "configs" / "pythia" / "410m.yml").write_text(yaml.safe_dump(SHARED))
    (place / "data").mkdir()
    names = ["new_train", "new_valid", "pile_train", "pile_validation", "web", "code", "questions", "a", "b"]
    for seed, name in enumerate(names):
        write_tokens(place / "data" / name, seed, documents=40)
    new = open_tokens(place / "data/new_train")
    write_table(place / "data/new_selected", DocumentTable("list", np.arange(0, 40, 2)), new)
    write_table(place / "data/new_train.loss", DocumentTable("scores", np.arange(40.0)), new)
    (place / "new").mkdir()
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["re", "warm", "the", "rate", "of", "a", "model"], 60)) for _ in range(80)]
    (place / "new" / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (place / "new" / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    start = config(place, **SHARED, folder=str(place / "start"), training={"budget": 2}, export={"huggingface": True})
    folder = train(start, Ranks(0, 1, torch.device("cpu")), quiet()).folder
    shutil.move(folder / "huggingface", place / "hf")
    run = mapping(
        place, **SHARED, name="run", start={"from": "hf"}, training={"budget": 8, "global_batch": 64, "micro_batch": 1}
    )
    run["data"]["train"] = [{"path": "data/new_train", "max_epochs": 9}]
    run["replay"] = {"fraction": 0.01, "sources": [{"path": "data/pile_train", "max_epochs": 9}]}
    del run["folder"]
    for name in ("RUN.yml", "base.yml"):
        (place / name).write_text(yaml.safe_dump(run))
    example, *_ = blocks(ROOT / "docs/run.md", "yaml")
    (place / "mine.yml").write_text(example)
    return place


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(made)
    yield made
    shutil.rmtree(made / "runs", ignore_errors=True)


def launch(line: str, *more: str) -> None:
    """The arguments of a launch.sh in this process, whatever would have started its ranks."""
    words = shlex.split(line, comments=True)
    words = words[next(i for i, word in enumerate(words) if word.endswith("launch.sh") or word == "train") + 1 :]
    assert main([*words, *more]) == 0, line


def use(line: str, *changes: tuple[str, str]) -> str:
    """A command of megarewarm, with ``changes`` of its words; what it prints."""
    for old, new in changes:
        line = line.replace(old, new)
    words = shlex.split(line, comments=True)
    command, *words = words[words.index("megarewarm") + 1 :]
    expanded = [name for word in words for name in ((sorted(glob.glob(word)) or [word]) if "*" in word else [word])]
    return run_in_process(lambda: run_command(command, expanded))


def only(pattern: str) -> str:
    (line,) = {line for page in PAGES for line in commands(page) if re.search(pattern, line)}
    return line


TRIED = [
    r"(launch\.sh|megarewarm train) RUN\.yml",
    r"launch\.sh configs/410m_rewarm\.yml",
    r"launch\.sh 410M\.yml|convert-config 410M\.yml",
    r"megarewarm (prepare|tokenizer|merge-data|inspect-data|replay-step|convert|inspect|merge|watch|report|advise) ",
    r"megarewarm (grow|values) ",
    r"megarewarm (score|select)-data ",
    r"megarewarm choose-start ",
    r"megarewarm extend-(tokenizer|vocabulary) ",
    r"megarewarm make-task ",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_tried_here_or_can_not_be(page: Path) -> None:
    for line in commands(page):
        assert is_not_here(line) or any(re.search(pattern, line) for pattern in TRIED), f"{line}: try it in this file"


@pytest.mark.parametrize(
    "line", [line for page in PAGES for line in commands(page) if re.search(TRIED[0], line) and not is_not_here(line)]
)
def test_starts_of_a_run(place: Path, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "start.from=runs/OLD" in line:
        assert main(["RUN.yml", "name=OLD", "training.budget=2", "training.micro_batch=auto"]) == 0
    if "from: runs/teacher" in line:
        assert main(["RUN.yml", "name=teacher", *SMALL]) == 0
    if "logging.wandb" in line:
        (place / "wandb.py").touch()  # a dry run asks only whether it is installed
        monkeypatch.syspath_prepend(place)
    launch(line, "--dry-run")
    assert "run" in capsys.readouterr().out


def test_the_papers_own_run_and_the_quickstart_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    launch(only(r"410m_rewarm\.yml --dry-run"), "--allow-missing")
    assert "131,296" in capsys.readouterr().out
    launch("bash launch.sh configs/quickstart.yml --dry-run")


def test_several_files_and_a_plan(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    lines = re.findall(r"`((?:bash launch\.sh base|megarewarm plan )[^`\n]*)`", text)
    assert len(lines) == 2
    for line in lines:
        if "launch.sh" in line:
            launch(line, *SMALL, "--dry-run")
        else:
            assert "tensor" in use(line)


def test_data_out_of_text(place: Path) -> None:
    before = set((place / "data").iterdir())
    data, *_ = [block for block in blocks(ROOT / "docs/data.md", "bash") if "megarewarm prepare" in block]
    shown = ""
    for line in data.splitlines():
        shown += use(line, ("data/new_train", "data/mine"), ("32768", "280"))
    (place / "pythia_tokenizer").mkdir()
    shutil.copy(place / "tokenizer.json", place / "pythia_tokenizer")
    splits = {line for page in PAGES for line in commands(page) if "megarewarm prepare" in line and "--split" in line}
    for line in splits:
        shown += use(line, ("data/new", "data/more"), ("--split", "--overwrite --split"))
        assert (place / "data/more_valid.bin").is_file()
    assert "80 documents" in shown and "its counts and checksums are those of the files" in shown
    for path in set((place / "data").iterdir()) - before:
        path.unlink()


def test_scores_of_documents(place: Path) -> None:
    hub = ("runs/second", "hf"), ("runs/upstream", "hf"), ("EleutherAI/pythia-70m", "hf")
    for path in (place / "data").glob("new_train.loss*"):  # another test's
        path.unlink()
    for line in commands(ROOT / "docs/worth.md"):
        if "score-data" in line:
            assert "percentile" in use(line, *hub)
    for name in ("loss", "loss_difference"):
        assert (place / f"data/new_train.{name}.safetensors").is_file()


def test_selections(place: Path) -> None:
    scratch = ["replay=null", "start={from: null, intent: scratch}", "training={budget: 2, global_batch: 8, micro_batch: 8}"]
    assert main(["RUN.yml", "name=second", *scratch]) == 0
    listed = place / "data/new_selected.safetensors"  # the other form of this output, which a selection refuses to leave
    listed.rename(place / listed.name)
    before, made = set((place / "data").iterdir()), set()
    for line in commands(ROOT / "docs/worth.md"):
        if "select-data" in line:
            assert "tokens are left" in use(line, ("EleutherAI/pythia-70m", "hf"))
            made |= {path.name for path in set((place / "data").iterdir()) - before}
    assert made >= {"new_selected.bin", "new_selected.selection.html", "new_selected.selection.json", "selected"}
    for path in set((place / "data").iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (place / listed.name).rename(listed)


def test_fragments_of_yaml_are_refused_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is merged onto the first example, whose replay gives way to its own; with all checks of a start."""
    others = [text for page in ("data", "reliability") for text in blocks(ROOT / f"docs/{page}.md", "yaml")]
    first = yaml.safe_load((place / "mine.yml").read_text())
    scratch = ["replay=null", "start={from: null, intent: scratch}", "training={budget: 2, global_batch: 8, micro_batch: 8}"]
    assert main(["RUN.yml", "name=second", *scratch]) == 0  # whose lineage says all that was read
    for i, text in enumerate(others):
        other = yaml.safe_load(text)
        (place / "first.yml").write_text(yaml.safe_dump({k: v for k, v in first.items() if k != "replay" or k not in other}))
        (place / "other.yml").write_text(text)
        small = [word for word in SMALL if not ("start" in other and word.startswith("start."))]
        small += ["reliability.roll_back_steps=2"] if "reliability" in other else []
        assert main(["first.yml", "other.yml", *small, f"name=other_{i}", "--dry-run"]) == 0, text


def test_orders_of_documents_and_of_sources(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/worth.md, section "Order"."""
    section = (ROOT / "docs/worth.md").read_text().partition("## Order\n")[2].partition("\n## ")[0]
    order, experiment = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    (place / "order.yml").write_text(order)
    assert main(["RUN.yml", "order.yml", *SMALL, "replay=null", "--dry-run"]) == 0
    small = yaml.safe_load((place / "RUN.yml").read_text())
    (place / "configs/410m_rewarm.yml").write_text(yaml.safe_dump({k: v for k, v in small.items() if k != "name"}))
    (place / "first.yml").write_text(experiment)
    assert main(["first.yml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "order_blend" in shown and "order_web_code_questions" in shown
    (place / "configs/410m_rewarm.yml").unlink()


def test_growing(place: Path) -> None:
    """The documents' model has 24 layers, the one here 4; everything else is as written."""
    layers = (("--layers 30", "--layers 5"), ("--layers 48", "--layers 8"))
    lines = {line for page in PAGES for line in commands(page) if line.startswith("megarewarm grow ")}
    for line in sorted(lines):
        said = " ".join(use(line, ("EleutherAI/pythia-410m", "hf"), *layers).split())
        moves = "stack" in line or "fpi" in line
        assert ("does not preserve the function" if moves else "the function is preserved") in said, line
        (written,) = [
            path for name in ("runs/wide", "runs/deep", "runs/stacked", "hf_wider") if (path := place / name).exists()
        ]
        shutil.rmtree(written)
    assert len(lines) == 4


def test_a_new_vocabulary(place: Path) -> None:
    """docs/language.md, section "Vocabulary", with a model of 280 rows that has a tokenizer beside it."""
    saved("llama", place / "with_tokenizer")
    old_tokenizer(place / "with_tokenizer")
    (place / "data/held_out.txt").write_text("to be or not to be\n" * 9)
    section, *_ = blocks(ROOT / "docs/language.md", "bash")
    said = [
        " ".join(use(line, ("EleutherAI/pythia-410m", "with_tokenizer"), ("--add 8000", "--add 5")).split())
        for line in section.splitlines()
    ]
    assert "5 of them new" in said[0] and all("280 old ids" in each for each in said[1:]) and "distilled" in said[2]
    for folder in ("tok", "with_tokenizer", "hf_extended"):
        shutil.rmtree(place / folder)


def test_a_task_file(place: Path) -> None:
    said = use(only("megarewarm make-task "), ("data/held_out.jsonl", "new/a.jsonl.zst"), ("500", "40 --context-bytes 100"))
    assert said.startswith("tasks/prose.jsonl: 40 items of 4 choices, 25.0 % by guessing; 80 of 80")
    assert len((place / "tasks/prose.jsonl").read_text().splitlines()) == 40


@pytest.mark.slow
def test_a_run_of_ones_own_and_what_is_done_with_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mine.yml", *SMALL]) == 0
    assert (place / "runs/my_rewarm/huggingface/config.json").is_file()
    assert "step 3" in use(only("^megarewarm replay-step runs/my_rewarm"), ("31415", "3"))
    shutil.copytree(place / "runs/my_rewarm", place / "runs/mine")
    hub = ("EleutherAI/pythia-410m", "hf")
    (exports,) = [block for block in blocks(ROOT / "docs/checkpoints.md", "bash") if "megarewarm convert " in block]
    before = set(place.iterdir())
    for line in exports.splitlines():
        if not is_not_here(line):
            assert use(line, hub, ("step_1000", "step_2"), ("--window 10%", "--window 60%"))
    written = set(place.iterdir()) - before
    assert len(written) == 7 and {path.name.partition("_")[0].partition("-")[0] for path in written} == {"hf", "neox", "merged"}
    for folder in written:
        shutil.rmtree(folder)
    line = next(line for line in commands(ROOT / "docs/laboratory.md") if "choose-start" in line)
    assert "lowest loss on new_valid" in use(line, ("runs/upstream", "runs/my_rewarm"))
    shutil.copytree(place / "runs/mine", place / "runs/teacher", dirs_exist_ok=True)
    less = r"launch\.sh RUN\.yml '?(replay|distill|optimizer|interpolate)"
    for i, line in enumerate(line for line in commands(ROOT / "docs/laboratory.md") if re.search(less, line)):
        launch(line, f"folder=runs/{i}", "training={budget: 4, global_batch: 8, micro_batch: 8}")
    assert (place / "runs/5/metrics.jsonl").is_file()


def test_a_run_with_values(place: Path) -> None:
    (start,) = {line for line in commands(ROOT / "README.md") if "valuation=" in line}
    launch(start, *SMALL, "valuation.every=1", "valuation.share=1")
    lines = [line for page in PAGES for line in commands(page) if line.startswith("megarewarm values")]
    for line in lines:
        said = use(line, ("runs/RUN", "runs/run"), ("values RUN", "values runs/run"), ("pile", "old"))
        assert "positive values lowered" in said and "new_train" in said
    assert len(lines) == 3 and (place / "runs/run/values.png").is_file()
    assert list((place / "data/kept").iterdir())
    shutil.rmtree(place / "data/kept")


@pytest.mark.slow
def test_an_experiment_and_its_questions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/laboratory.md's first example, then what both pages ask about it."""
    (text,) = [text for text in blocks(ROOT / "docs/laboratory.md", "yaml") if "my_question" in text]
    small = yaml.safe_load((place / "RUN.yml").read_text())
    del small["name"], small["start"], small["replay"]  # which configs/410m_rewarm.yml has not either
    small["training"] |= {"global_batch": 4, "micro_batch": 4}
    (place / "configs" / "410m_rewarm.yml").write_text(yaml.safe_dump(small))
    (place / "question.yml").write_text(text.replace("EleutherAI/pythia-410m@step143000", "hf").replace("[1, 2, 3]", "[1, 2]"))
    assert main(["question.yml"]) == 0
    lines = [*commands(ROOT / "docs/laboratory.md"), *commands(ROOT / "docs/advisor.md"), *commands(ROOT / "README.md")]
    asked = [line for line in lines if re.search(r"megarewarm (watch|report|advise) ", line)]
    assert len(asked) >= 9
    for line in asked:
        assert use(
            line,
            ("rewarm_2308_04014_mini", "my_question"),
            ("runs/my_rewarm", "runs/my_question"),
            ("runs/quickstart/rewarm_*/", "runs/my_question/seed_1/*/"),
        ), line
    (place / "configs" / "410m_rewarm.yml").unlink()


def test_files_of_gpt_neox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "410M.yml").write_text(PYTHIA_410M)
    (tmp_path / "local_setup.yml").write_text(LOCAL)
    launch(only(r"launch\.sh 410M\.yml"), "--dry-run", "--allow-missing")
    for line in {line.partition(" #")[0].strip() for page in PAGES for line in commands(page) if "convert-config" in line}:
        use(line)
        assert main(["run.yml", "--dry-run", "--allow-missing"]) == 0
