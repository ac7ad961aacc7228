"""From the command line to a finished run: arguments, configuration, ranks, and the hand-over to the trainer."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from megarewarm import __version__
from megarewarm.config.experiment import Experiment, is_experiment, load_experiment
from megarewarm.config.load import is_file_word, read_configs, validate
from megarewarm.config.neox_read import neox_files
from megarewarm.config.schema import RunConfig
from megarewarm.errors import EXIT_DIVERGED, EXIT_RANK_LOST, EXIT_REPLICAS_DIFFER, UserError
from megarewarm.parallel.launchers import Launch, read_launcher

_EPILOG = """\
Configs are merged from left to right; words of the form section.key=value override single keys.
Start it with any of:
  bash launch.sh configs/quickstart.yml
  python launch.sh configs/410m_rewarm.yml training.micro_batch=4
  deepspeed launch.sh configs/410m_rewarm.yml
  torchrun --nproc-per-node 8 launch.sh configs/410m_rewarm.yml
  deepspeed launch.sh 410M.yml local_setup.yml                      (files of GPT-NeoX, unchanged)
The same command after an interruption continues where the run stood.
Exit codes: 0 done, 2 bad input, 3 diverged, 4 another rank was lost, 5 replicas differ, 75 the time limit is up, 128 + signal
when stopped by one (after both a checkpoint was saved)."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. ``--local_rank`` is what the DeepSpeed launcher adds; it is read by the launcher's reader."""
    parser = argparse.ArgumentParser(
        prog="launch.sh",
        description="megarewarm: continual pre-training of GPT-NeoX models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG | section.key=value", help="YAML files, then overrides")
    parser.add_argument("--quick", action="store_true", help="an experiment in the small form that it has under 'quick'")
    parser.add_argument(
        "--only", action="append", default=[], metavar="RUN", help="of an experiment, only this run; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the resolved run and its LR curve; train nothing")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"megarewarm {__version__}")
    return parser.parse_intermixed_args(list(argv))


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the process's exit code. Every rank calls it; the main rank speaks."""
    arguments = parse_arguments(argv)
    launch: Launch | None = None
    try:
        launch = read_launcher(os.environ, arguments.local_rank)
        console = Console(quiet=launch.rank != 0, soft_wrap=not sys.stdout.isatty())
        if files := neox_files(arguments.configs):
            from megarewarm.rewarm.neox_start import load_neox, show_account

            overrides = [word for word in arguments.configs if not is_file_word(word)]
            alone = arguments.dry_run and launch.world_size == 1  # not under a launcher: as many ranks as the file needs
            run, account = load_neox(files, overrides, None if alone else launch.world_size)
            show_account(account, console)
            return _run(run, launch, console, dry=arguments.dry_run, world_size=account.ranks)
        mapping, origins = read_configs(arguments.configs)
        if is_experiment(mapping):
            experiment = load_experiment(mapping, origins, quick=arguments.quick)
            if arguments.dry_run:
                from megarewarm.training.dry_run import show_experiment

                return show_experiment(experiment, console, arguments.only)
            return _train(experiment, launch, console, arguments.only)
        if arguments.quick or arguments.only:
            raise UserError("--quick and --only belong to experiments; this is a single run (it has no key 'experiment')")
        return _run(validate(RunConfig, mapping, origins), launch, console, dry=arguments.dry_run)
    except UserError as error:
        # ranks that are not connected: one voice per node, the others would only repeat it
        if launch is None or launch.local_rank == 0:
            prefix = "" if launch is None or launch.rank == 0 else f"rank {launch.rank}: "
            print(f"{prefix}{error}", file=sys.stderr, flush=True)
        return error.exit_code


def _run(run: RunConfig, launch: Launch, console: Console, *, dry: bool, world_size: int | None = None) -> int:
    if dry:
        from megarewarm.training.dry_run import show_run

        return show_run(run, console, world_size=world_size or launch.world_size)
    return _train(run, launch, console)


def _train(what: RunConfig | Experiment, launch: Launch, console: Console, only: Sequence[str] = ()) -> int:
    # imported here so that --help and a mistyped key answer at once, without loading torch
    from megarewarm.parallel.connect import connect
    from megarewarm.parallel.ranks import is_loss
    from megarewarm.parallel.replicas import ReplicasDiffer
    from megarewarm.training.step import TrainingDiverged
    from megarewarm.training.trainer import train

    first = what.arms[0].config if isinstance(what, Experiment) else what
    ranks = connect(launch, first.training.device, first.parallel.timeout_minutes)
    try:
        if isinstance(what, Experiment):
            from megarewarm.training.experiment import run_experiment

            return run_experiment(what, ranks, console, only)
        return train(what, ranks, console).exit_code
    except UserError as error:
        ranks.say_once(str(error))
        return error.exit_code
    except (TrainingDiverged, ReplicasDiffer) as error:
        if ranks.is_main:
            print(str(error), file=sys.stderr, flush=True)
        return EXIT_DIVERGED if isinstance(error, TrainingDiverged) else EXIT_REPLICAS_DIFFER
    except RuntimeError as error:
        if ranks.world_size == 1 or not is_loss(error):
            raise
        print(
            f"rank {ranks.rank} waits no longer for {ranks.give_up()}: {str(error).strip().splitlines()[0]}; the last "
            f"checkpoint is whole, the same command continues from it",
            file=sys.stderr,
            flush=True,
        )
        # not by way of the interpreter: other threads may wait for the lost rank for good
        os._exit(EXIT_RANK_LOST)
    finally:
        ranks.close()
