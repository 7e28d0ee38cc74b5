#!/usr/bin/env bash
# Processes that compile different closures of one cached function at once leave an index in which a key may name the file of another: every later process then computes with the other's constant, in silence. Hurts who trains or tests in several processes after an installation.
# Guessed before running: at worst a variant is compiled twice; a key never finds another key's machine code.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet --python 3.11 env
uv pip install --quiet --python env/bin/python numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6
cat > adding.py <<'PY'
import numba


def adding(constant):
    @numba.njit(cache=True)
    def add(x):
        return x + constant

    return add
PY
cat > compile.py <<'PY'
import multiprocessing

from adding import adding

VARIANTS = 8


def compile_one(constant, together):
    add = adding(constant)
    together.wait()
    add(0)


context = multiprocessing.get_context("fork")
together = context.Barrier(VARIANTS)
processes = [context.Process(target=compile_one, args=(c, together)) for c in range(1, VARIANTS + 1)]
for process in processes:
    process.start()
for process in processes:
    process.join()
PY
cat > use.py <<'PY'
from adding import adding

print(*(f"0 + {c} = {found}" for c in range(1, 9) if (found := adding(c)(0)) != c), sep=", ")
PY
version=$(env/bin/python -c 'import numba; print(numba.__version__)')
for round in $(seq 40); do
  export NUMBA_CACHE_DIR="$folder/cache$round"
  env/bin/python compile.py
  wrong=$(env/bin/python use.py)
  if [ -n "$wrong" ]; then
    echo "numba $version: 8 processes compile at once, a later one computes $wrong (installation $round of at most 40)"
    exit 0
  fi
done
echo "numba $version: 40 times 8 processes, nothing mixed up: the behaviour has changed"
exit 1
