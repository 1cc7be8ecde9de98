"""How far the fused loss is from the four matrix products that nobody can avoid, and what others need.

    python -m kernels.bench                     # bf16 on a GPU, float32 on a CPU
    python -m kernels.bench --quick             # a few seconds: does it run?

A case is a pair of models, a number of tokens N and a loss. All contestants of a case run in turn within each
round, so that noise and clocks hit them alike. What counts is their time over that of "products" in the same
round, in the median over rounds. Peers, which may take long to compile, come after everything else, each in
rounds of its own with "products" and "ours":

    products       z = X W^T, w = Xt Wt^T, dX = Z W, dW = Z^T X: the floor, 2 N V (3 Hs + Ht) flops
    ours           kernels.linear_divergence with the labels' log-probabilities, and both gradients;
                   in the largest case also with other memory for the two logit buffers
    ours, torch    the same with backend="torch", GPUs only (on a CPU that is "ours")
    naive torch    whole [N, V] logits, float32 log_softmax, autograd
    torch.compile  the natural competitor: a chunk's loss compiled, recomputed in backward (torch checkpoint)
    liger fused    liger_kernel.transformers' LigerFusedLinearJSD, its Triton kernel: GPUs only
    liger chunked  liger_kernel.chunked_loss' LigerFusedLinearJSDLoss, compiled on a GPU as is its default
    trl            the chunked divergence of trl.kernels, Triton on a GPU, torch on a CPU

Only "ours" returns both entropies, agreement and the labels' log-probabilities as well. Others scale by 1/N
or not, which costs nothing. But in every case the direction of dX is compared with ours before anything is
timed, and who computes something else gets no time. A peer that is not installed is "not run".

Extra memory is the peak during one call over what was there before, gradients and buffers included: of the
allocator on a GPU; on a CPU the resident set of a child process that does nothing else.
"""
import argparse
import datetime
import importlib.metadata
import json
import math
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from . import chunked, linear_divergence

SHAPES = {                                  # student's width Hs, teacher's width Ht, vocabulary V
    "tiny": (64, 128, 5003), "small": (256, 512, 50257),
    "8B-to-0.6B": (1024, 4096, 151936), "4B-to-0.6B": (1024, 2560, 151936),     # Qwen3
    "8B-to-1.7B": (2048, 4096, 151936), "14B-to-4B": (2560, 5120, 151936)}
DEFAULTS = {                                # device, quick -> shapes, tokens, rounds, MiB of logit buffers
    ("cpu", True): (["tiny"], [128], 3, [1, 2, 4]),
    ("cpu", False): (["small"], [512], 5, [32, 64, 128, 256]),
    ("cuda", True): (["8B-to-0.6B"], [2048], 3, [160, 640]),
    ("cuda", False): (list(SHAPES)[2:], [2048, 8192, 32768], 10, [320, 640, 1280, 2560, 5120])}
VARIANTS = [(512, 4, 3), (1024, 4, 1), (1024, 4, 2), (1024, 4, 4), (1024, 8, 3), (2048, 4, 3), (2048, 8, 3),
            (4096, 16, 3)]                  # BLOCK, WARPS, STAGES
SECONDS = {"cpu": 60, "cuda": 4}            # a case starts no further round after so long,
ROUNDS = 3                                  # but not before so many
LOGIT_STD = 2.5
FLOOR_BYTES = 4 << 30                       # of the two bf16 logit buffers of "products" on a GPU
COMPILE_CHUNK = 1024                        # tokens, as in Liger's chunked loss

# Weight of the teacher in the mixture, for Liger and TRL. At 1 both have KL(student || teacher), our rkl: in
# Liger's ops/jsd.py X is the student's lp and dX = p (X - Y) + p, in its chunked loss F.kl_div(lq, lp,
# log_target=True), in TRL "1.0 the reverse KL(student || teacher)".
BETA = {"rkl": 1.0, "jsd": 0.5}


def make_inputs(shape, N, device):
    """Return X [N, Hs], W [V, Hs], Xt [N, Ht], Wt [V, Ht], labels, without temporaries that raise a peak."""
    Hs, Ht, V = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    X, W, Xt, Wt = (torch.empty(rows, H, device=device, dtype=dtype).normal_(generator=generator)
                    for H in (Hs, Ht) for rows in (N, V))
    for head in (W, Wt):
        head.mul_(LOGIT_STD / math.sqrt(head.shape[1]))
    return (X.requires_grad_(), W.requires_grad_(), Xt, Wt,
            torch.randint(V, (N,), device=device, generator=generator))


# ---- contestants: (loss, *inputs) -> a call without arguments that returns (dX, dW) ------------------------

def products(loss, X, W, Xt, Wt, labels):
    """Do the four products. On a GPU the floor is generous: logits and dW in bf16, chunks of up to 4 GiB.

    On a CPU all N are done at once, and the outputs exist before the clock starts, since new pages cost time.
    On a GPU they come from the caching allocator, for nothing.
    """
    X, W, chunk = X.detach(), W.detach(), len(X)
    if X.is_cuda:
        chunk = chunked.rows_per_chunk(chunk, FLOOR_BYTES // (2 * len(W) * X.element_size()))
    outputs = lambda: (X.new_empty(2, chunk, len(W)), torch.empty_like(X), torch.empty_like(W))
    held = None if X.is_cuda else outputs()

    def call():
        (z, w), dX, dW = held or outputs()
        for start in range(0, len(X), chunk):
            here = slice(start, min(start + chunk, len(X)))
            used = slice(here.stop - here.start)
            torch.mm(X[here], W.T, out=z[used])
            torch.mm(Xt[here], Wt.T, out=w[used])
            torch.mm(z[used], W, out=dX[here])
            dW.addmm_(z[used].T, X[here], beta=float(start > 0))
        return dX, dW
    return call


def ours(loss, X, W, Xt, Wt, labels, **options):
    return lambda: torch.autograd.grad(
        linear_divergence(X, W, Xt, Wt, divergence=loss, labels_N=labels, **options)[0], (X, W))


def dense(loss, z, w):
    lp, lq = (torch.log_softmax(x.float(), -1) for x in (z, w))
    if loss == "rkl":
        return F.kl_div(lq, lp, reduction="sum", log_target=True)
    lm = torch.logaddexp(lp, lq) - math.log(2)
    return 0.5 * sum(F.kl_div(lm, x, reduction="sum", log_target=True) for x in (lp, lq))


def naive(loss, X, W, Xt, Wt, labels):
    return lambda: torch.autograd.grad(dense(loss, X @ W.T, Xt @ Wt.T), (X, W))


def compiled(loss, X, W, Xt, Wt, labels):
    fused = torch.compile(dense)
    part = lambda X, W, Xt: fused(loss, X @ W.T, Xt @ Wt.T)
    return lambda: torch.autograd.grad(
        sum(checkpoint(part, x, W, xt, use_reentrant=False)
            for x, xt in zip(X.split(COMPILE_CHUNK), Xt.split(COMPILE_CHUNK))), (X, W))


def liger_fused(loss, X, W, Xt, Wt, labels):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    module = LigerFusedLinearJSD(jsd_beta=BETA[loss])
    return lambda: torch.autograd.grad(module(X, W, Xt, Wt, None), (X, W))


def liger_chunked(loss, X, W, Xt, Wt, labels):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[loss],
                                     compiled=X.is_cuda)
    return lambda: torch.autograd.grad(module(X, W, Xt, Wt, labels), (X, W))


def trl(loss, X, W, Xt, Wt, labels):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    return lambda: torch.autograd.grad(
        ChunkedDivergenceFunction.apply(X, W, None, Xt, Wt, None, BETA[loss])[0].sum(), (X, W))


PEERS = {"torch.compile": compiled, "liger chunked": liger_chunked, "liger fused": liger_fused, "trl": trl}
CONTESTANTS = {"products": products, "ours": ours, "ours, torch": partial(ours, backend="torch"),
               "naive torch": naive, **PEERS}
SIZES = {f"ours, {MiB} MiB": partial(ours, chunk_bytes=MiB << 20)
         for *_, sizes in DEFAULTS.values() for MiB in sizes}


# ---- measuring ---------------------------------------------------------------------------------------------

def attempt(step, *args):
    """Return a result and None, or None and what the table says instead of a number."""
    try:
        return step(*args), None
    except ModuleNotFoundError:
        return None, "not run"
    except Exception as error:                  # a peer that breaks must not end the run of the others
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in first
        return None, "out of memory" if full else f"failed: {first[:80]}"


def timed(call, device):
    """Return seconds and peak bytes above those before (None on a CPU). Freeing comes after the clock."""
    if device == "cpu":
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start.record()
    result = call()                             # noqa: F841
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before


def measure(loss, inputs, names, repeat, device):
    """Return name -> {"seconds": [..], "extra_bytes": .., "cosine": ..} or {"text": why there is no time}."""
    results, calls, reference = {}, {}, None
    for name in names:                                              # warm up, and compare
        call, text = attempt((CONTESTANTS | SIZES)[name], loss, *inputs)
        gradients, text = (None, text) if text else attempt(call)
        results[name] = {"text": text} if text else {"seconds": [], "extra_bytes": 0}
        if not text and name != "products":
            dX = gradients[0].float().flatten()
            reference = dX if reference is None else reference      # the first one is ours
            results[name]["cosine"] = cosine = F.cosine_similarity(dX, reference, dim=0).item()
            if not cosine > 0.99:
                results[name]["text"] = text = f"disagrees (cos {cosine:.2f})"
        if not text:
            calls[name] = call
        gradients = dX = None
        if device == "cuda":
            torch.cuda.empty_cache()
    began = time.perf_counter()
    for done in range(repeat):
        if done >= ROUNDS and time.perf_counter() - began > SECONDS[device]:
            break
        for name in random.Random(done).sample(list(calls), len(calls)):    # a busy neighbour slows a GPU
            result, text = attempt(timed, calls[name], device)
            if text:
                results[name] = {"text": text}
                del calls[name]
            else:
                results[name]["seconds"].append(result[0])
                results[name]["extra_bytes"] = max(results[name]["extra_bytes"], result[1] or 0)
    return results


def status_bytes(field):
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def child(name, shape, N, loss):
    """Print the peak of the resident set (Linux) in one call minus the set before it, as JSON.

    VmHWM rather than ru_maxrss: to the latter Linux adds what the process that started this one held.
    """
    contestant = (CONTESTANTS | SIZES)[name]
    _, text = attempt(lambda: contestant(loss, *make_inputs("tiny", 16, "cpu"))())      # imports and threads
    if not text:
        call = contestant(loss, *make_inputs(shape, N, "cpu"))
        before = status_bytes("VmRSS")
        _, text = attempt(call)
    print(json.dumps({"text": text} if text else {"extra_bytes": status_bytes("VmHWM") - before}))


def memory_in_child(name, shape, N, loss):
    done = subprocess.run([sys.executable, "-m", "kernels.bench", "--child", name, "--shapes", shape,
                           "--tokens", str(N), "--losses", loss],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        return {"text": "out of memory" if done.returncode == -signal.SIGKILL else "failed in its child"}
    return json.loads(done.stdout.splitlines()[-1])


def run_case(shape, N, loss, names, args):
    """Return one record per contestant. On a CPU what does not survive its child is not timed.

    "products" and "ours" run in every case, for the comparison, and have a record if they are among `names`.
    """
    skipped = {"liger fused", *([] if args.compile else ["torch.compile"])} if args.device == "cpu" else ()
    rows = {name: {"text": "not run"} if name in skipped else {} for name in names}
    if args.device == "cpu" and not args.quick:
        rows = {name: row or memory_in_child(name, shape, N, loss) for name, row in rows.items()}
    able = [name for name in names if "text" not in rows[name]]
    inputs, text = attempt(make_inputs, shape, N, args.device)
    together = list(dict.fromkeys(["products", "ours", *able]))
    results = ({name: {"text": text} for name in able} if text or not able else
               measure(loss, inputs, together, args.repeat, args.device))
    Hs, Ht, V = SHAPES[shape]
    for name, row in rows.items():
        row.update({key: x for key, x in results.get(name, {}).items() if x or key != "extra_bytes"})
        row.update(shape=shape, tokens=N, loss=loss, contestant=name)
        if row.get("seconds"):
            row["median_seconds"] = statistics.median(row["seconds"])
            row["tflops"] = 2 * N * V * (3 * Hs + Ht) / row["median_seconds"] / 1e12
            floor = results["products"].get("seconds") or [math.nan]
            row["over_floor"] = statistics.median(mine / best for mine, best in zip(row["seconds"], floor))
    return list(rows.values())


def gpu_median(before, call, repeat):
    """Return the median seconds of a short call. `before` keeps the GPU busy while the host launches it."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    before(), call()                                # compiles
    torch.cuda.synchronize()
    for start, end in events:
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def time_row_kernel(shape, losses, repeat, keep):
    """Time the row kernel alone on 512 rows of logits in several variants, beside a plain copy."""
    from . import rows_triton
    V, dtype = SHAPES[shape][2], torch.bfloat16
    width = -(-V // chunked.ALIGN) * chunked.ALIGN
    C = chunked.TILE * 4
    fresh = torch.randn(2, C, width, device="cuda").mul_(LOGIT_STD)
    logits = torch.empty_like(fresh)
    z, w = logits[..., :V]
    labels, weight = torch.randint(V, (C,), device="cuda"), torch.ones(C, device="cuda")
    gibibyte, other = (torch.ones(1 << 28, device="cuda") for _ in range(2))
    overwrite = lambda: logits.copy_(fresh)         # the kernel overwrites its logits

    copy = 2 * gibibyte.nbytes / gpu_median(overwrite, lambda: other.copy_(gibibyte), repeat)
    record = {"tokens": C, "copy_gb_per_second": copy / 1e9, "rows": []}
    configured = rows_triton.BLOCK, rows_triton.WARPS, rows_triton.STAGES
    for loss in losses:
        spec = chunked.Spec(1.0, V, None, None, divergence=loss, knob=0.5 if loss == "jsd" else None)
        stats = {name: torch.zeros(C, device="cuda") for name in spec.stats(labels)}
        sweeps = 2 if loss in rows_triton.KL_FAMILY else 3          # each reads both logits
        moved = C * V * (sweeps * 2 * 4 + dtype.itemsize)           # and the last one writes dz
        for variant in dict.fromkeys([configured, *VARIANTS]):
            rows_triton.BLOCK, rows_triton.WARPS, rows_triton.STAGES = variant
            seconds, text = attempt(gpu_median, overwrite, lambda: rows_triton.fill(
                z, w, weight, labels, None, stats, spec, True, dtype), repeat)
            record["rows"].append([loss, *variant] + ([text, None, None] if text else [
                seconds * 1e3, moved / seconds / 1e9, moved / seconds / copy]))
            keep(record)
        rows_triton.BLOCK, rows_triton.WARPS, rows_triton.STAGES = configured


# ---- the record, as text and as picture --------------------------------------------------------------------

def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(header, rows):
    shown = lambda x: "" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(shown, row)) + " |" for row in rows)


def numbers(row):
    if "text" in row:
        return [row["text"], None, None, None]
    extra = f"{row['extra_bytes'] / 2 ** 20:.0f}" if "extra_bytes" in row else "not run"
    return [f"{row['median_seconds'] * 1e3:.1f}", f"{row['over_floor']:.2f}", row["tflops"], extra]


def place(row):
    """Return where a record stands in its table."""
    order = [*CONTESTANTS, *SIZES, "all"]
    return [*BETA].index(row["loss"]), row["tokens"], order.index(row["contestant"])


def text_of(record):
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    parts = [f"# {record['device']}, {record['dtype']}, {record['date']}",
             f"{versions}. Medians of at most {record['repeat']} rounds. What the rows are: kernels/bench.py"]
    for shape, sizes in record["shapes"].items():
        parts += ["## {} (Hs {}, Ht {}, V {})".format(shape, *sizes),
                  table(["loss", "N", "", "ms", "over floor", "TFLOP/s", "extra MiB"],
                        [[row["loss"], row["tokens"], row["contestant"], *numbers(row)]
                         for row in sorted(record["cases"], key=place) if row["shape"] == shape])]
    if kernel := record["row_kernel"]:
        parts += ["## The row kernel on {} tokens; a copy reads and writes {:.0f} GB/s".format(
                      kernel["tokens"], kernel["copy_gb_per_second"]),
                  table(["loss", "BLOCK", "WARPS", "STAGES", "ms", "GB/s", "of the copy's"], kernel["rows"])]
    return "\n\n".join(parts) + "\n"


def write(record, out):
    (out / "bench.json").write_text(json.dumps(record) + "\n")
    (out / "bench.md").write_text(text_of(record))


def draw(record, path):
    """Draw time over the floor in all cases, and memory of the first pair against N or the buffers."""
    try:
        import matplotlib
    except ImportError:
        return                                  # no picture without it; the tables are complete
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [row for row in record["cases"] if "text" not in row]
    names = [name for name in CONTESTANTS if any(row["contestant"] == name for row in rows)]
    several, shape = len(record["tokens"]) > 1, next(iter(record["shapes"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.4 * len(names) + 2.2), layout="constrained")
    for loss in dict.fromkeys(row["loss"] for row in rows):
        style, shift = {"rkl": ("o-", -0.12), "jsd": ("s:", 0.12)}[loss]
        points = [(row["over_floor"], names.index(row["contestant"]) + shift)
                  for row in rows if row["loss"] == loss and row["contestant"] in names]
        left.plot(*zip(*points), style[0], label=loss)
        for i, name in enumerate(names if several else ["ours,"]):
            points = [(row["tokens"] if several else int(row["contestant"].split()[1]),
                       row["extra_bytes"] / 2 ** 20)
                      for row in rows if (row["shape"], row["loss"]) == (shape, loss) and "extra_bytes" in row
                      and (row["contestant"] == name if several else row["contestant"] in SIZES)]
            if points:
                right.plot(*zip(*points), style, color=f"C{i}" if several else None, label=f"{name} {loss}")
    left.axvline(1, color="grey", linewidth=0.8)
    most = max((row["over_floor"] for row in rows), default=1)
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24) if tick <= most]
    left.set_xscale("log")
    left.set_xticks(ticks, map(str, ticks))
    left.minorticks_off()
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="time / products")
    left.invert_yaxis()
    left.legend()
    right.set(title=shape, ylabel="extra memory, MiB", xlabel="N" if several else "logit buffers, MiB")
    if right.lines:
        right.set_xscale("log", base=2)
        right.set_yscale("log" if several else "linear")
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.suptitle(f"{record['device']}, {record['dtype']}, {record['date']}", fontsize=9)
    figure.savefig(path, dpi=100)


def positive(text):
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, default="runs/bench", help="gets bench.md, bench.json, bench.png")
    parser.add_argument("--quick", action="store_true", help="one small pair; no memory on a CPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="Qwen3 teacher-to-student, or small")
    parser.add_argument("--tokens", nargs="+", type=positive, help="N; by default the largest for one pair")
    parser.add_argument("--losses", nargs="+", choices=BETA, default=list(BETA))
    parser.add_argument("--repeat", type=positive,
                        help=f"rounds at most; after {ROUNDS}, time is a limit too: {SECONDS} s a case")
    parser.add_argument("--seconds", type=positive, help="starts no further case after so long")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.shapes[0], args.tokens[0], args.losses[0])
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"bench: --device cuda, but torch {torch.__version__} sees no CUDA device")
    shapes, tokens, repeat, sizes = DEFAULTS[args.device, args.quick]
    everything = args.tokens or len(tokens) == 1            # the default on a GPU would take minutes longer
    args.shapes, args.repeat, args.tokens = (
        args.shapes or shapes, args.repeat or repeat, sorted(set(args.tokens or tokens)))
    cases = [(shape, N, loss) for shape in args.shapes for N in args.tokens for loss in args.losses
             if everything or N < args.tokens[-1] or shape == args.shapes[0]]
    peers = [(*case, [peer]) for case in sorted(cases, key=lambda case: -case[1]) for peer in
             reversed(PEERS)]                               # the longest to compile comes last

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"bench: --out {args.out} cannot be a folder: {error}")
    began = time.perf_counter()
    record = dict(date=datetime.date.today().isoformat(), device=machine(args.device), repeat=args.repeat,
                  versions={"python": platform.python_version(), **{package: version(package) for package in (
                      "torch", "triton", "liger-kernel", "trl", "transformers")}},
                  dtype="bfloat16" if args.device == "cuda" else "float32", tokens=args.tokens,
                  shapes={name: SHAPES[name] for name in args.shapes}, cases=[], row_kernel=None)
    def keep(kernel=None):                                  # a run that is stopped has what it has measured
        record.update(row_kernel=kernel or record["row_kernel"], wall_seconds=time.perf_counter() - began)
        write(record, args.out)

    if args.device == "cuda":
        time_row_kernel(args.shapes[0], args.losses, args.repeat, keep)
    ours_alone = [name for name in CONTESTANTS if name not in PEERS and not (
        args.device == "cpu" and name == "ours, torch")]
    largest = args.shapes[0], args.tokens[-1]
    cases = [(*case, ours_alone + [f"ours, {MiB} MiB" for MiB in sizes if case[:2] == largest])
             for case in cases] + peers
    for shape, N, loss, names in (progress := tqdm(cases, unit="case")):
        if args.seconds and time.perf_counter() - began > args.seconds:
            record["cases"] += [dict(shape=shape, tokens=N, loss=loss, contestant=name, text="not run")
                                for name in names]
            continue
        progress.set_description(f"{shape}, N {N}, {loss}" + f", {names[0]}" * (len(names) == 1))
        record["cases"] += run_case(shape, N, loss, names, args)
        keep()
    keep()
    draw(record, args.out / "bench.png")
    print(text_of(record))


if __name__ == "__main__":
    main()
