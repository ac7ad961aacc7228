#!/bin/sh
# Print a Python that can run megarewarm, making .venv beside launch.sh if there is none.
#   environment.sh               the active environment, .venv or python3, else a new .venv
#   environment.sh --find        the same, but never installs; fails where there is none
#   environment.sh test          always .venv, with what the tests need (deepspeed too)
#   environment.sh hashed        the same, by pip's --require-hashes from tests/requirements.txt (CPython 3.11, Linux x86-64)
set -eu
root=$(cd -- "$(dirname -- "$0")/.." && pwd)
wanted=${1:-}
venv="$root/.venv"
stamp=$(cat "$root/pyproject.toml" "$root/constraints.txt" "$root"/tests/requirements*.txt "$0" | cksum | tr ' ' '-')

can_run() { "$1" "$root/tools/find_megarewarm.py" 2>/dev/null; }

if [ "$wanted" != test ] && [ "$wanted" != hashed ]; then
  for python in "${VIRTUAL_ENV:-/nowhere}/bin/python" "${CONDA_PREFIX:-/nowhere}/bin/python" python3 python; do
    if command -v "$python" >/dev/null 2>&1 && can_run "$python"; then command -v "$python"; exit 0; fi
  done
fi
if [ -f "$venv/installed-$wanted-$stamp" ] || { [ "$wanted" != test ] && [ "$wanted" != hashed ] && [ -f "$venv/installed-test-$stamp" ]; }; then
  echo "$venv/bin/python"
  exit 0
fi
if [ "$wanted" = --find ]; then
  if [ -x "$venv/bin/python" ] && can_run "$venv/bin/python"; then echo "$venv/bin/python"; exit 0; fi
  exit 1
fi

# a name on the PATH may be a shim that starts nothing, so each candidate is asked
base=
for python in python3 python3.13 python3.12 python3.11; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then base=$python; break; fi
done
if [ -z "$base" ]; then
  echo "launch.sh: no Python 3.11 or newer found (python3 is $(python3 --version 2>/dev/null || echo missing)); install it" >&2
  exit 2
fi
echo "launch.sh: installing megarewarm into $venv (once, a few minutes; torch is the large part)" >&2
"$base" -m venv "$venv" >&2 || {
  echo "launch.sh: $base can't make a virtual environment; install its venv module (Debian: python3-venv)" >&2; exit 2; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" >&2; }
if [ "$wanted" = hashed ]; then
  pip install --require-hashes --no-deps --requirement "$root/tests/requirements.txt"
  DS_BUILD_OPS=0 pip install --require-hashes --no-deps --no-build-isolation --requirement "$root/tests/requirements_source.txt"
  pip install --no-deps --no-build-isolation --editable "$root"  # a folder has no hash
  touch "$venv/installed-hashed-$stamp" "$venv/installed-test-$stamp"
  echo "$venv/bin/python"
  exit 0
fi
pip install --constraint "$root/constraints.txt" torch numpy setuptools wheel
if [ "$wanted" = test ]; then
  pip install --no-build-isolation --constraint "$root/constraints.txt" --editable "$root[test]"
  DS_BUILD_OPS=0 pip install --no-build-isolation --constraint "$root/constraints.txt" deepspeed
else
  pip install --no-build-isolation --constraint "$root/constraints.txt" --editable "$root[data,report,mpi,select]"
fi
# last, so that an interrupted installation is taken up again
touch "$venv/installed-$wanted-$stamp"
echo "$venv/bin/python"
