#!/usr/bin/env bash
# Everything that needs a GPU, what matters most first, in at most eight minutes:
#
#   bash tests/gpu.sh OUT [check] [tests] [bench] [decode] [real] [small]       all but small without a name
#   DEVICE=cpu bash tests/gpu.sh OUT [parts]                                    a small form: does it run?
#
#   check   whether the fused loss is right at real size; the card's limits, each matrix product's speed
#   tests   the tests that use the device
#   bench   bench.md bench.json bench.png: the row kernel, the fused loss against its floor and its peers
#   decode  milliseconds per sampled token: transformers' generate, and our own sampler
#   real    real_size.md real_size.json: steps of Qwen3-0.6B and 4B, memory beside its prediction
#   small   the small world in short form, four more minutes
#
# All text goes to log.txt as it comes, and one line per part to summary.txt; OUT gets at most 7 files. Every
# part has its own time limit, and one that fails or hangs does not stop the next. The script uses the python3
# that is there (or PYTHON=...), and installs and downloads nothing.
set -uo pipefail
out="$(mkdir -p "${1:?usage: bash tests/gpu.sh OUT [check] [tests] [bench] [decode] [real] [small]}" && cd "$1" && pwd)" || exit 1
shift
cd "$(dirname "$0")/.."
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false TRITON_CACHE_DIR="$scratch/triton"
device="${DEVICE:-cuda}" python="${PYTHON:-python3}" parts=" ${*:-check tests bench decode real} " failed=0
if [ "$device" = cuda ]; then
    "$python" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || { echo "torch sees no GPU" >&2; exit 1; }
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu \
        --format=csv | tee "$out/summary.txt"
else
    echo "$device" | tee "$out/summary.txt"
fi
on() { if [ "$device" = cuda ]; then echo "$1"; else echo "$2"; fi; }
part() {                                        # part NAME SECONDS COMMAND
    [[ "$parts" == *" $1 "* ]] || return 0
    local name=$1 limit=$2 began=$SECONDS rc
    shift 2
    echo "== $name" >>"$out/log.txt"
    timeout -k 5 "$limit" "$@" >>"$out/log.txt" 2>&1
    rc=$?
    echo "$name: exit $rc, $((SECONDS - began)) s of $limit" | tee -a "$out/summary.txt"
    [ $rc = 0 ] || failed=1
}

parallel="$("$python" -c "import xdist; print('-n 12')" 2>/dev/null)"        # most of the time goes into compiling
part check 60 "$python" tests/gpu_check.py --device "$device"
part tests 90 "$python" -m pytest -v --tb=short -p no:cacheprovider $(on "$parallel" "") \
    tests/test_kernels.py tests/test_models.py tests/test_peers.py tests/test_sampler.py \
    -k "$(on "(test_kernels and not benchmark and not compile_for) or cuda or gpu or swap" "ragged and rkl")"
part bench 115 "$python" -m kernels.bench --device "$device" --out "$out" \
    $(on "--shapes 8B-to-0.6B 8B-to-1.7B --tokens 2048 8192 --seconds 90" "--quick")
part decode 60 "$python" tests/gpu_decode.py --device "$device"
part real 100 "$python" tests/real_size.py "$out" --device "$device" $(on "--rows plain" "")
part small 240 "$python" -m lab.recipes small --quick --out "$scratch/small"
grep -aE " FAIL|^FAILED|passed|failed|tokens/s|TFLOP/s|TB/s" "$out/log.txt" | tail -n 80
for table in bench.md real_size.md; do [ ! -f "$out/$table" ] || cat "$out/$table"; done
cat "$out/summary.txt"
exit $failed
