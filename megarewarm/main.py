"""From the command line to a finished run: arguments, configuration, ranks, and the call of the trainer."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from rich.console import Console

from megarewarm.arguments import parse_arguments
from megarewarm.config.experiment import Experiment, is_experiment, load_experiment
from megarewarm.config.load import is_file_word, read_configs, validate
from megarewarm.config.neox_read import neox_files
from megarewarm.config.schema import RunConfig
from megarewarm.console import make_console
from megarewarm.errors import EXIT_DIVERGED, EXIT_OUT_OF_MEMORY, EXIT_RANK_LOST, EXIT_REPLICAS_DIFFER, UserError
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.meeting_place import WillNotCome, launch_of_process
from megarewarm.process import first_line, importing, is_out_of_memory, say


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the process's exit code. Every rank calls it; the main rank prints."""
    arguments = parse_arguments(argv)
    launch: Launch | None = None
    try:
        launch = launch_of_process(arguments.local_rank)
        console = make_console(quiet=launch.rank != 0, lasting=not arguments.dry_run)
        if arguments.allow_missing and not arguments.dry_run:
            raise UserError("--allow-missing works only with --dry-run: a run needs its files")
        if arguments.show_config and not arguments.dry_run:
            raise UserError("--show-config works only with --dry-run: a run writes its config.yaml")
        if files := neox_files(arguments.configs):
            with importing():
                from megarewarm.rewarm.neox_start import load_neox, show_account

            overrides = [word for word in arguments.configs if not is_file_word(word)]
            alone = arguments.dry_run and launch.world_size == 1  # without a launcher: as many ranks as the file needs
            run, account = load_neox(files, overrides, None if alone else launch.world_size)
            show_account(account, console)
            return _run(run, launch, console, arguments, account.ranks)
        mapping, origins = read_configs(arguments.configs)
        if is_experiment(mapping):
            experiment = load_experiment(mapping, origins, quick=arguments.quick)
            if arguments.dry_run:
                with importing():
                    from megarewarm.lab.dry_run import show_experiment

                return show_experiment(experiment, console, launch, arguments.only, **_shown(arguments))
            return _train(experiment, launch, console, arguments.only)
        if arguments.quick or arguments.only:
            raise UserError("--quick and --only belong to experiments; this is a single run (it has no key 'experiment')")
        return _run(validate(RunConfig, mapping, origins), launch, console, arguments)
    except UserError as error:
        # ranks that are not connected: one message per node, because the others would only repeat it
        if launch is None or launch.local_rank == 0 or isinstance(error, WillNotCome):
            prefix = "" if launch is None or launch.rank == 0 else f"rank {launch.rank}: "
            say(f"{prefix}{error}")
        if launch is None:
            with importing():
                from megarewarm.parallel.connect import tell_main_rank

            tell_main_rank(str(error), os.environ)
        return error.exit_code


def _run(run: RunConfig, launch: Launch, console: Console, arguments: argparse.Namespace, world_size: int | None = None) -> int:
    if arguments.dry_run:
        with importing():
            from megarewarm.lab.dry_run import show_run

        return show_run(run, console, launch, world_size=world_size, **_shown(arguments))
    return _train(run, launch, console)


def _shown(arguments: argparse.Namespace) -> dict[str, bool]:
    return {"allow_missing": arguments.allow_missing, "show_config": arguments.show_config}


def _train(what: RunConfig | Experiment, launch: Launch, console: Console, only: Sequence[str] = ()) -> int:
    # imported here so that --help and a mistyped key answer at once, without loading torch
    with importing():
        from megarewarm.parallel.connect import connect
        from megarewarm.parallel.ranks import is_rank_loss
        from megarewarm.parallel.replicas import ReplicasDiffer
        from megarewarm.training.step import TrainingDiverged
        from megarewarm.training.trainer import train

    first = what.arms[0].config if isinstance(what, Experiment) else what
    ranks = connect(launch, first.training.device, first.parallel.timeout_minutes)
    try:
        if isinstance(what, Experiment):
            from megarewarm.lab.experiment import run_experiment

            return run_experiment(what, ranks, console, only)
        return train(what, ranks, console).exit_code
    except UserError as error:
        ranks.say_once(str(error))
        return error.exit_code
    except (TrainingDiverged, ReplicasDiffer) as error:
        if ranks.is_main:
            say(str(error))
        return EXIT_DIVERGED if isinstance(error, TrainingDiverged) else EXIT_REPLICAS_DIFFER
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            say(
                _out_of_memory(
                    error, first, f"rank {ranks.rank}, {ranks.device}" if ranks.world_size > 1 else str(ranks.device)
                )
            )
            code = EXIT_OUT_OF_MEMORY
        elif ranks.world_size == 1 or not is_rank_loss(error):
            raise
        else:
            say(
                f"rank {ranks.rank} gave up waiting for {ranks.give_up()}: {first_line(error)}; the last checkpoint is whole, "
                f"the same command resumes from it"
            )
            code = EXIT_RANK_LOST
        if ranks.world_size > 1:
            # without the interpreter's shutdown, because other threads may wait for the lost rank forever
            os._exit(code)
        return code
    finally:
        ranks.close()


def _out_of_memory(error: BaseException, run: RunConfig, where: str) -> str:
    from megarewarm.training.start.memory import remedies

    return f"{run.name}: out of memory on {where}: {first_line(error)}; {remedies(run)} (--dry-run shows what is needed)"
