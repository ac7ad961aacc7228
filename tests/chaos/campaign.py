"""Training runs under faults, one after another, until so many have happened; a table of how each kind went.

    bash tests/run --chaos [--faults 500] [--seed 1] [--ranks 2,4] [--document docs/reliability.md]

Everything is imported once and every start of a run forks from here. Runs lie on a small file system of their own, so that it
can be filled up (needs root; without it that one fault is left out).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils import tensorboard

from megarewarm.lab import experiment
from megarewarm.training import trainer
from tests.chaos.faults import KINDS, REPLICATED_ONLY, Fault, draw, supported
from tests.chaos.ledger import Outcome, Row, table
from tests.chaos.supervisor import Scenario, Supervisor, carry_out_undisturbed
from tests.support.tiny import mapping

PRELOADED = (experiment, tensorboard, trainer)
STEPS, PER_RUN = 80, 8
BEGIN, END = "<!-- chaos table -->\n", "<!-- end of chaos table -->\n"
# name -> (ranks, parallel settings, whether saves run in the background)
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "replicated": (2, {}, True),
    "tensor": (2, {"tensor": 2}, True),
    "zero2": (2, {"sharding": "zero2"}, False),
    "pipeline": (2, {"pipeline": 2}, True),
    "replicated_4": (4, {}, True),
    "tensor_zero2_4": (4, {"tensor": 2, "sharding": "zero2"}, True),
    "pipeline_tensor_4": (4, {"pipeline": 2, "tensor": 2}, False),
}
REPLICATED = {"replicated", "replicated_4"}


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """``place`` on a file system of 96 MiB; gives False where none can be mounted, then it is an ordinary folder."""
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96M", "tmpfs", place], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", place], check=True)


def prepare(name: str, place: Path, logs: Path, timeout: float) -> Scenario:
    """The scenario of a layout in ``place``: token files, configuration, and the run without faults.

    ``timeout``: minutes after which a rank gives up waiting for another.
    """
    ranks, parallel, asynchronous = LAYOUTS[name]
    settings = mapping(
        place,
        name="chaos",
        folder=str(place / "run"),
        model={"num_layers": 2, "num_heads": 4},
        training={"budget": STEPS, "micro_batch": 2},
        evaluation={"every": 10},
        checkpoint={"every": 4, "keep_last": 3, "asynchronous": asynchronous},
        logging={"tensorboard": True, "every": 1, "dynamics": 10},
        parallel={**parallel, "timeout_minutes": timeout},
        **({"reliability": {"check_replicas": 5}} if "bit_flip" in supported() else {}),
    )
    shutil.copy(place / "new.bin", place / "new.bin.copy")
    config = place / "run.yml"
    config.write_text(yaml.safe_dump(settings))
    scenario = Scenario(name, ranks, config, place, settings["training"]["global_batch"])
    carry_out_undisturbed(scenario, logs / f"{name}_undisturbed")
    return scenario


def possible(layout: str, kinds: Sequence[str], mounted: bool) -> list[str]:
    """Those of ``kinds`` that can happen in a layout and on this machine."""
    return [k for k in kinds if (mounted or k != "disk_full") and (layout in REPLICATED or k not in REPLICATED_ONLY)]


class Bag:
    """Draws kinds evenly: all of them in a random order, then all again."""

    def __init__(self, kinds: Sequence[str], dice: random.Random) -> None:
        self._kinds, self._dice, self._left = list(kinds), dice, list[str]()

    def draw(self, count: int, allowed: Sequence[str]) -> list[str]:
        """The next ``count`` of the allowed ones."""
        found: list[str] = []
        while len(found) < count:
            fitting = [kind for kind in self._left if kind in allowed]
            if not fitting:
                self._left += self._dice.sample(self._kinds, len(self._kinds))
                continue
            # first what few layouts can give
            kind = min(fitting, key=lambda kind: kind not in REPLICATED_ONLY)
            self._left.remove(kind)
            found.append(kind)
        return found

    def put_back(self, kinds: Sequence[str]) -> None:
        """What was drawn and did not come to happen is next."""
        self._left[:0] = kinds


@dataclass
class Account:
    """What has happened in so many ``runs`` and ``seconds``, kept in ``file``. ``unprovoked``: what failed without a fault."""

    file: Path | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    unprovoked: list[str] = field(default_factory=list)
    runs: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, file: Path | None) -> Account:
        """That of a campaign which was cut off, or an empty one."""
        if file is None or not file.exists():
            return cls(file)
        kept = json.loads(file.read_text())
        outcomes = [Outcome(**{**outcome, "fault": Fault(**outcome["fault"])}) for outcome in kept["outcomes"]]
        return cls(file, outcomes, kept["unprovoked"], kept["runs"], kept["seconds"])

    def write(self) -> None:
        """Put it down."""
        if self.file is not None:
            kept = {"outcomes": [asdict(o) for o in self.outcomes], "unprovoked": self.unprovoked}
            partial = self.file.with_name(f"{self.file.name}.partial")
            partial.write_text(json.dumps({**kept, "runs": self.runs, "seconds": self.seconds}, indent=1))
            partial.rename(self.file)


def main() -> int:
    """Carry out the campaign. 0 where every fault went as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--each", action="store_true", help="as many as there are kinds, one of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", default="2,4", help="which layouts take part, by their number of ranks")
    parser.add_argument("--layouts", default="", help="their names instead")
    parser.add_argument("--kinds", default="", help="only these kinds of faults")
    parser.add_argument("--timeout", type=float, default=0.15, help="parallel.timeout_minutes of the runs")
    parser.add_argument("--document", type=Path, help="put the table between this page's marks")
    parser.add_argument("--json", type=Path, help="write every outcome there; a campaign that was cut off goes on from it")
    parser.add_argument("--folder", type=Path, help="for logs, which stay; default: a new temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    counts = {int(word) for word in arguments.ranks.split(",")}
    layouts = arguments.layouts.split(",") if arguments.layouts else [n for n, (r, *_) in LAYOUTS.items() if r in counts]
    kinds = arguments.kinds.split(",") if arguments.kinds else supported()
    wanted = None if arguments.each else arguments.faults
    account = Account.read(arguments.json)
    _carry_out(account, layouts, kinds, wanted, arguments.timeout, folder, arguments.seed)
    outcomes, unprovoked = account.outcomes, account.unprovoked
    rows = [Row(kind.title, [o for o in outcomes if o.fault.kind == name]) for name, kind in KINDS.items()]
    failures = [f"{o.fault.kind}: {o.failure}" for o in outcomes if o.failure] + unprovoked
    seconds = round(account.seconds)
    head = (
        f"{len(outcomes)} faults, {len(failures)} not survived, seed {arguments.seed}, layouts {', '.join(layouts)}, "
        f"{seconds // 60} min {seconds % 60} s on {os.cpu_count()} cores, {date.today().isoformat()}\n"
    )
    print(f"\n{head}\n{table(rows)}")
    for failure in failures:
        print(f"FAILED {failure}")
    if arguments.document is not None:
        _put_into(arguments.document, f"{head}\n{table(rows)}\n")
    if not failures and arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(failures)


def _put_into(page: Path, text: str) -> None:
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page}: no line {BEGIN.strip()} with {END.strip()} after it")
    page.write_text(before + begin + text + end + after, encoding="utf-8")


def _carry_out(
    account: Account, layouts: Sequence[str], kinds: Sequence[str], wanted: int | None, timeout: float, folder: Path, seed: int
) -> None:
    """Runs in turn over the layouts until ``account`` has ``wanted`` faults, None: one of each kind."""
    fruitless = 0
    bag = Bag(kinds, random.Random(f"{seed}, {account.runs} runs done"))
    scenarios: dict[str, Scenario] = {}
    with small_disk(folder / "disk") as mounted:
        if not mounted and "disk_full" in kinds:
            print("no file system can be mounted here (not root): disk_full is left out", flush=True)
            kinds = [kind for kind in kinds if kind != "disk_full"]
        wanted = wanted or len(kinds)
        while len(account.outcomes) < wanted and fruitless < 5:
            began = time.monotonic()
            number, dice = account.runs, random.Random(f"{seed}, run {account.runs}")
            layout = layouts[number % len(layouts)]
            if layout not in scenarios:
                (folder / "disk" / layout).mkdir()
                scenarios[layout] = prepare(layout, folder / "disk" / layout, folder, timeout)
            scenario = scenarios[layout]
            shutil.rmtree(scenario.run, ignore_errors=True)
            drawn = bag.draw(min(PER_RUN, wanted - len(account.outcomes)), possible(layout, kinds, mounted))
            supervisor = Supervisor(scenario, draw(drawn, scenario.ranks, STEPS, dice), folder / f"run_{number}", dice)
            found = supervisor.carry_out()
            happened = [outcome.fault.kind for outcome in found]
            bag.put_back([kind for kind in drawn if kind not in happened])
            fruitless = 0 if found else fruitless + 1
            account.runs += 1
            account.seconds += time.monotonic() - began
            account.outcomes += found
            account.unprovoked += supervisor.unprovoked
            account.write()
            done, minutes = len(account.outcomes), account.seconds / 60
            left = minutes / max(1, done) * max(0, wanted - done)
            print(
                f"{done}/{wanted} faults, {minutes:.1f} min, {left:.1f} min left; run {account.runs} ({layout}): "
                f"{supervisor.starts} starts, {', '.join(happened)}",
                flush=True,
            )
            failed = [f"{o.fault.kind}: {o.failure}" for o in found if o.failure] + supervisor.unprovoked
            for failure in failed:
                print(f"  FAILED {failure}", flush=True)
            if not failed:
                shutil.rmtree(folder / f"run_{number}")


if __name__ == "__main__":
    sys.exit(main())
