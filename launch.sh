#!/usr/bin/env bash
''':'
# This file is read by bash (bash launch.sh ...) and by Python (deepspeed launch.sh ... starts "python launch.sh" on every
# rank). To Python everything up to the closing quotes is a string; bash never reaches them, for the last command is an exec.
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
if [ "$#" -eq 0 ]; then set -- --help; fi
case " $* " in *" --help "* | *" -h "* | *" --version "*) asks=yes ;; *) asks= ;; esac  # which installs nothing
if [ -n "$asks${RANK:-}${OMPI_COMM_WORLD_RANK:-}${PMI_RANK:-}${SLURM_STEP_NUM_TASKS:-}" ]; then
  python=$("$here/tools/environment.sh" --find) || python=python3
else
  python=$("$here/tools/environment.sh")
fi
exec "$python" -u "$here/launch.sh" "$@"
'''

import sys
from pathlib import Path

if __name__ == "__main__":
    tools = str(Path(__file__).resolve().parent / "tools")
    sys.path.insert(0, tools)
    import find_megarewarm  # noqa: F401

    sys.path.remove(tools)
    from megarewarm.arguments import parse_arguments
    from megarewarm.process import run

    parse_arguments(sys.argv[1:])  # --help needs no packages
    from megarewarm.main import main

    run(lambda: main(sys.argv[1:]))
# The quote that bash -n is still waiting for: '
