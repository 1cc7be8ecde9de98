#!/usr/bin/env bash
# Everything that needs a GPU: bash tests/gpu.sh OUT [tests] [bench] [small] [real]; all parts without a name
#   tests   tests.txt                        the tests that use the device, under five minutes
#   small   small.md small.json small.png    the small world in short form, and its steps in small.txt; beside the tests
#   bench   bench.md bench.json bench.png    the fused loss against its floor and its peers, at most four minutes
#   real    real_size.md real_size.json      steps of Qwen3-0.6B and 4B, memory beside its prediction, at most eight
# Uses the python3 that is there, installs and downloads nothing. One part that fails does not stop the others.
set -uo pipefail
out="$(mkdir -p "${1:?usage: bash tests/gpu.sh OUT [tests] [bench] [small] [real]}" && cd "$1" && pwd)" || exit 1
shift
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python3 -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || { echo "torch sees no GPU" >&2; exit 1; }
wanted() { [ -z "$parts" ] || [[ " $parts " == *" $1 "* ]]; }
parts="$*"
failed=0

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
world="$scratch/small"
if wanted small; then
    timeout 290 python3 opd.py --recipe small --quick --out "$world" >"$out/small.txt" 2>&1 &
    small=$!
fi
if wanted tests; then
    parallel="$(python3 -c "import xdist; print('-n 6')" 2>/dev/null)"      # most of the time goes into compiling
    timeout 290 python3 -m pytest -q -p no:cacheprovider $parallel tests/test_kernels.py tests/test_models.py tests/test_peers.py 2>&1 |
        tee "$out/tests.txt" || failed=1
fi
if wanted small; then
    wait $small || failed=1                         # what follows has the machine for itself
    cat "$out/small.txt"
    for pair in report.md:small.md results.json:small.json curves.png:small.png; do
        cp "$world/${pair%%:*}" "$out/${pair##*:}" || failed=1
    done
fi
if wanted bench; then timeout 240 python3 -m kernels.bench --device cuda --seconds 180 --out "$out" || failed=1; fi
if wanted real; then timeout 480 python3 tests/real_size.py "$out" || failed=1; fi
exit $failed
