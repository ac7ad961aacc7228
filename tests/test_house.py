"""The floors of the house: imports go down only, and no file is a house of its own."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Floor:
    """A floor of the house, and within a room one of its own ("3b"); the room itself stands on top of these."""

    number: int
    inner: str

    def is_below(self, other: Floor, *, same_room: bool) -> bool:
        return self.inner < other.inner if same_room else self.number < other.number


def _table() -> tuple[dict[str, Floor], tuple[str, ...]]:
    """(the floor of each room, the modules that every room may import), from the table in docs/architecture.md."""
    floors: dict[str, Floor] = {}
    text = (ROOT / "docs/architecture.md").read_text()
    for number, inner, names in re.findall(r"^\| (\d+)([a-z]?) \| ([^|]+) \|", text, re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", names):
            name = path.removeprefix("kernels/").removesuffix("/").removesuffix(".py").replace("/", ".")
            floors[name] = Floor(int(number), inner or "~")
    single = {name for name, floor in floors.items() if floor.number == 0 and (ROOT / f"{name.replace('.', '/')}.py").is_file()}
    return floors, tuple(sorted(single))


FLOORS, FOR_ALL = _table()
SOURCES = sorted(
    path
    for folder in ("megarewarm", "kernels", "tools")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


def room(module: str, depth: int = 3) -> str | None:
    """The room a module belongs to, the innermost one of ``depth`` names at most; None for what is not ours."""
    parts = module.split(".")
    for length in range(depth, 0, -1):
        if ".".join(parts[:length]) in FLOORS:
            return ".".join(parts[:length])
    return None


def module_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT)
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            base = node.module or ""
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_floors(path: Path) -> None:
    here = room(module_of(path))
    if module_of(path) == "megarewarm":
        return
    assert here is not None, f"{path} stands in no room: add it to the house or to FLOORS"
    for line, name in imports(path):
        there = room(name)
        if there is None or there == here or name == "megarewarm.__version__":
            continue
        same_room = room(name, 2) == room(module_of(path), 2)
        allowed = FLOORS[there].is_below(FLOORS[here], same_room=same_room) or there in FOR_ALL
        assert allowed, f"{path}:{line}: {here} imports {name}, which is not on a floor below it"


def test_the_table_names_rooms_that_there_are() -> None:
    there = {room(module_of(path)) for path in SOURCES} | {"launch.sh"}
    assert set(FLOORS) == there - {None}


def test_the_table_names_files_that_there_are() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for names, about in re.findall(r"^\| \d+[a-z]? \| ([^|]+) \| (.*) \|$", text, re.MULTILINE):
        rooms = [ROOT / name for name in re.findall(r"`([^`]+)`", names)]
        for name in re.findall(r"`([\w/]+\.py)`", about):
            assert any((room if room.is_dir() else room.parent).joinpath(name).is_file() for room in rooms), f"{names}: {name}"


def test_kernels_stand_alone_and_report_knows_no_training() -> None:
    for path in SOURCES:
        rooms = {room(name, 2) for _, name in imports(path)} - {None}
        if room(module_of(path)) == "megarewarm_kernels":
            assert rooms <= {"megarewarm_kernels"}, path
        if room(module_of(path), 2) == "megarewarm.report":
            unknown = {
                f"megarewarm.{name}" for name in ("training", "lab", "checkpoint", "parallel", "model", "data", "rewarm")
            }
            assert not rooms & unknown, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_file_is_one_idea(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450, f"{path}: over 450 lines is usually two ideas"
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path}: say in one to three sentences what the file does"


PRODUCT = [path for path in SOURCES if not path.is_relative_to(ROOT / "tools")]


def test_a_class_name_means_one_thing() -> None:
    names = Counter(
        node.name for path in PRODUCT for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


MAX_LINES = 59_940
"""Of megarewarm/ and kernels/: whoever adds a thing first looks for what can go."""


def test_the_whole_stays_small(record_property: Callable[[str, object], None]) -> None:
    lines = sum(len(path.read_text().splitlines()) for path in PRODUCT)
    record_property("lines of megarewarm/ and kernels/", lines)
    assert lines <= MAX_LINES, f"{lines:,} lines, the budget is {MAX_LINES:,}: shorten something before you add to it"


def test_no_marks_of_unfinished_work() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    for path in SOURCES:
        found = [line for line in path.read_text().splitlines() if marks.search(line)]
        assert not found, f"{path}: {found}"


def test_what_a_parameter_is_stands_on_its_card() -> None:
    """Nothing is guessed from a parameter's name; other programs' names have their own tables."""
    guess = re.compile(
        r"""(layer_?norm|\bbias|embed_(in|out)|dense|query_key_value)\w*(\.weight|\.bias)?"[),]* *in name|"""
        r"""name\.(endswith|startswith)\(\(?"(\.?bias|layers|embed|final|\.?weight)"""
    )
    for path in SOURCES:
        if path.name == "parameters.py":
            continue
        found = [line.strip() for line in path.read_text().splitlines() if guess.search(line)]
        assert not found, f"{path}: {found}; ask model/parameters.py"


def test_what_all_ranks_must_call_is_marked() -> None:
    """``@collective`` and the words "All ranks call it" stand at the same functions; those of protocols are only described."""
    says = re.compile(r"\ball ranks( of ``group``)? call it\b", re.IGNORECASE)
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        protocols = [each for each in classes if any("Protocol" in ast.unparse(base) for base in each.bases)]
        described = {node for protocol in protocols for node in ast.walk(protocol)}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node not in described:
                said = says.search(" ".join((ast.get_docstring(node) or "").split())) is not None
                marked = any(ast.unparse(each) == "collective" for each in node.decorator_list)
                assert said == marked, f"{path}:{node.lineno}: {node.name} is marked @collective: {marked}, says so: {said}"
