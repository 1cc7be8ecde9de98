"""Is the fused loss right on this card, at real size? Prints one line per check as it goes; under a minute.

    python tests/gpu_check.py [--device cpu]        cpu: the same in small, in Triton's interpreter or torch
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
parser = argparse.ArgumentParser()
parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
device = parser.parse_args().device
gpu = device == "cuda"
if not gpu:
    os.environ["TRITON_INTERPRET"] = "1"        # read when the kernels are imported
from kernels import chunked, linear_divergence, linear_logprob

began, failed = time.perf_counter(), 0


def say(name, ok, text=""):
    global failed
    failed += not ok
    print(f"{time.perf_counter() - began:6.1f} s  {'ok  ' if ok else 'FAIL'}  {name}  {text}", flush=True)


def attempt(name, f):
    try:
        f()
    except Exception as error:                  # what fails must not hide what follows
        say(name, False, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")


def off(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def inputs(N, V, rows, Hs, Ht, dtype, seed):
    g = torch.Generator(device).manual_seed(seed)
    X, W, Xt, Wt = (torch.randn(n, h, device=device, generator=g) for h in (Hs, Ht) for n in (N, rows))
    W, Wt = W * 2.5 / Hs**0.5, Wt * 2.5 / Ht**0.5
    y = torch.randint(V, (N,), device=device, generator=g)
    weight = torch.randn(N, device=device, generator=g)
    return *(x.to(dtype) for x in (X, W, Xt, Wt)), y, weight


def products():
    """The two calls of chunked.py that exist on CUDA only, on the layouts used there, against float32."""
    for V in sizes:
        X, W, *_ = inputs(C, V, rows, 1024 if gpu else 16, 8, torch.bfloat16, 1)
        width = -(-V // chunked.ALIGN) * chunked.ALIGN
        head = chunked.first_rows(W, width, torch.bfloat16)
        z = chunked.product(X, head, torch.full((C, width), torch.nan, device=device))
        error = off(z, X.float() @ head.float().T)
        say(f"z = X W^T, V {V}", error < 1e-4, f"{error:.1e}")
        dz = (z * 1e-3).to(torch.bfloat16)
        dz[:, V:] = 0
        stored = z.view(torch.bfloat16)[:, :width]
        stored.copy_(dz)
        dX = torch.empty_like(X)
        torch.mm(stored, head, out=dX)
        error = off(dX, dz.float() @ head.float())
        say("dX = dz W", error < 1e-2, f"{error:.1e}")
        dW = torch.ones(rows, X.shape[1], device=device)
        chunked.accumulate(dW[:width], stored, X)
        error = off(dW[:V] - 1, (1 + dz.float().T @ X.float())[:V] - 1)
        say("dW += dz^T X", error < 1e-3 and (dW[V:] == 1).all().item(), f"{error:.1e}")


def loss(backend, data, dtype, V, **options):
    X, W, Xt, Wt, y, weight = (x.to(dtype) if x.is_floating_point() else x for x in data)
    X, W = X.requires_grad_(), W.requires_grad_()
    value, stats = linear_divergence(X, W, Xt, Wt, weight.float(), labels_N=y, vocab=V, backend=backend,
                                     label_weight_N=0.1 * weight.float(), **options)
    return value, *torch.autograd.grad(value, (X, W)), stats


def kernel(name, support, options):
    V = sizes[-1]
    data = inputs(N, V, rows, *widths, torch.bfloat16, 2)
    few = [x[:64] if len(x) == N else x for x in data]          # the oracle holds [N, V] in float64
    ours, exact = (loss(backend, few, dtype, V, **options)
                   for backend, dtype in (("triton", torch.bfloat16), ("dense", torch.float64)))
    errors = {"dX": off(ours[1], exact[1]), "dW": off(ours[2], exact[2]),
              **{k: off(ours[3][k], exact[3][k]) for k in ours[3] if k != "top1_agree"}}
    say(f"{name} {support} against float64", max(errors["dX"], errors["dW"]) < 1e-2
        and max(v for k, v in errors.items() if k[0] != "d") < 2e-3,
        " ".join(f"{k} {v:.0e}" for k, v in errors.items()))
    runs = [loss("triton", data, torch.bfloat16, V, **options) for _ in range(3)]
    same = all(torch.equal(a[i], runs[0][i]) for a in runs[1:] for i in range(3))
    say(f"{name} {support} three times the same", same)


def memory():
    X, W, Xt, Wt, y, weight = inputs(N, sizes[-1], rows, *widths, torch.bfloat16, 3)
    X, W = X.requires_grad_(), W.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_divergence(X, W, Xt, Wt, weight)[0].backward()
    say("memory", True, f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB extra")
    with torch.no_grad():
        linear_logprob(X, W, y)


def milliseconds(call, repeat=8):
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(4_000_000)                # the host runs ahead: no launch gaps in the number
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeat


def speed():
    """The ceilings of this card, then TFLOP/s of each product, by chunk, and at an odd V as it would be."""
    x = torch.randn(1 << 30, device=device)
    y = torch.empty_like(x)
    say("copy", True, f"{2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e9:.2f} TB/s")
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    say("8192^3", True, f"{2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9:.0f} TFLOP/s")
    del x, y, a, b
    for V in sizes:
        X, W, Xt, Wt, *_ = inputs(4096, V, rows, 1024, 4096, torch.bfloat16, 4)
        dW = torch.zeros(rows, 1024, device=device)
        for c in (512, 1024, 2048, 4096) if V % 2 == 0 else (512,):
            z = torch.empty(c, -(-V // chunked.ALIGN) * chunked.ALIGN, device=device)
            dz, dX = z.view(torch.bfloat16)[:, :V], torch.empty_like(X[:c])
            chunked.product(X[:c], W[:V], z)
            dz.copy_(z[:, :V].clone())
            flops, ms = 2 * c * V * 1024 / 1e9, {}
            ms["dX"] = milliseconds(lambda: torch.mm(dz, W[:V], out=dX))
            ms["dW"] = milliseconds(lambda: chunked.accumulate(dW[:V], dz, X[:c]))
            ms["z"] = milliseconds(lambda: chunked.product(X[:c], W[:V], z))
            ms["w"] = milliseconds(lambda: chunked.product(Xt[:c], Wt[:V], z)) / 4
            ms["z bf16"] = milliseconds(lambda: torch.mm(X[:c], W[:V].T, out=dz))
            say(f"V {V} C {c}", True, "TFLOP/s: " + " ".join(f"{k} {flops / t:.0f}" for k, t in ms.items()))
    del X, W, Xt, Wt, dW, z, dz, dX
    torch.cuda.empty_cache()


def whole():
    """The loss with both gradients: an odd vocabulary, an odd number of tokens must not cost more."""
    from torch.profiler import ProfilerActivity, profile
    for N in (8192, 3072):
        X, W, Xt, Wt, y, _ = inputs(N, min(sizes), rows, 1024, 4096, torch.bfloat16, 5)
        heads, usual = {"bf16": W, "fp32": W.float()}, None
        for kind, V, n in (("bf16", sizes[0], N), ("bf16", sizes[1], N), ("bf16", sizes[1], N - 1),
                           ("bf16", None, N), ("fp32", sizes[1], N)):
            head = heads[kind] if V else W[:sizes[1]]           # None: a head of odd size, which is copied
            leaves = X[:n].detach().requires_grad_(), head.detach().requires_grad_()
            call = lambda: torch.autograd.grad(linear_divergence(
                *leaves, Xt[:n], Wt, labels_N=y[:n], vocab=V or sizes[1])[0], leaves)
            ms = statistics.median(milliseconds(call, 1) for _ in range(7))
            usual = usual or ms
            with profile(activities=[ProfilerActivity.CUDA]) as measured:
                call()
                torch.cuda.synchronize()
            busy = sum(event.self_device_time_total for event in measured.key_averages()) / 1e3
            say(f"rkl, 8B to 0.6B, N {n}, vocabulary {V or sizes[1]} of {len(head)} rows in {kind}",
                ms < 1.15 * usual, f"{ms:.2f} ms, kernels alone {busy:.2f} ms")


if gpu:
    N, C, sizes, rows, widths = 1100, 512, (151936, 151669), 151936, (1024, 2560)
else:
    N, C, sizes, rows, widths = 70, 8, (200, 197), 256, (16, 24)
attempt("products", products)
for name, support, options in (
        ("rkl", "full", {}), ("jsd", "full", {}), ("fkl", "full", {"temperature": 1.5}),
        ("skew_rkl", "full", {"target": (0.8, 0.2)}), ("jsd", "student_tail", {"top_k": 64}),
        ("rkl", "teacher_renorm", {"top_k": 64}), ("rkl", "full, softcap", {"softcap_s": 30.0}),
        ("fkl", "full, clipped", {"entry_clip": 1e-4}),
        ("rkl", "union_tail", {"top_k": 64, "entry_clip": 1e-2})):
    if support.startswith(("student", "teacher", "union")):
        options["support"] = support
    attempt(f"{name} {support}", lambda: kernel(name, support, {"divergence": name, **options}))
if gpu:
    attempt("memory", memory)
    attempt("speed", speed)
    attempt("whole", whole)
print(f"{failed} checks failed", flush=True)
sys.exit(failed > 0)
