#!/usr/bin/env bash
# The story in one command: a small world, two teachers, every method, a table and a picture. On a CPU or a GPU.
#   bash train_small.sh              one seed, about 8 minutes on 2 CPU cores
#   bash train_small.sh --quick      the same in short form, about 2 minutes
#   bash train_small.sh --seeds 5    the table of the README
# Interrupted and started again, it continues with what is missing. Results: runs/small, or --out DIR.
set -euo pipefail
root="$(cd "$(dirname "$0")" && pwd)"
source "$root/tests/env.sh"
exec "$PYTHON" "$root/opd.py" --recipe small "$@"
