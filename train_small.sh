#!/usr/bin/env bash
# A whole experiment in one command: a small world, two teachers, every method of the recipe `small`, a table
# and a picture. It needs no GPU.
#   bash train_small.sh                          one seed, about 8 minutes on 2 CPU cores
#   bash train_small.sh --quick                  a short form of the same, about 2 minutes
#   bash train_small.sh --seeds 5                the table in lab/README.md
#   bash train_small.sh small-opcod --seeds 3    another recipe; `python -m lab.recipes` lists them all
# After an interruption the same command continues with what is missing. The results are in runs/small
# (runs/small-quick with --quick), or in --out DIR. The flags are those of `python -m lab.recipes --help`.
set -euo pipefail
root="$(cd "$(dirname "$0")" && pwd)"
source "$root/tests/env.sh"
case "${1:-}" in "" | -*) set -- small "$@" ;; esac
# This is `python -m lab.recipes "$@"` from any folder: a relative --out is relative to where the user stands,
# and no file of that folder is taken for one of the project.
run='import sys; sys.path[0] = sys.argv.pop(1); from lab.recipes import main; main()'
exec "$PYTHON" -c "$run" "$root" "$@"
