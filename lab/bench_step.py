"""One step of on-policy distillation from end to end, beside TRL's and beside what the machine can do.

    python -m lab.bench_step                        # the small world's models: two minutes on a CPU
    python -m lab.bench_step --case 135M            # SmolLM2-135M's shape, with random weights
    python -m lab.bench_step --case 4B-to-0.6B      # Qwen3's shapes; needs a GPU

Contestants run in turn in every round, each in a process of its own, on the same models, prompts and limits:

    ours      python opd.py --method opd --loss rkl
    generate  the same, sampled by transformers' generate
    trl       TRL's DistillationTrainer with beta 1, the reverse KL; "not run" where trl is not installed

Weights are random, so that almost every completion has full length and all contestants write as many tokens;
--student PATH takes a checkpoint instead. The first two steps, which warm up, are left out. What counts are
ratios within a round, in the median over rounds. The parts of our step are compared with a floor: sampling
with reading all weights once per position, scoring and updating with their floating-point operations, 2 and
6 per parameter and token.
"""
import argparse
import functools
import json
import platform
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config import Parser, Refused, number
from data import scratch
from data.folder import process_memory

from .report import markdown_table, pyplot, save_figure
from .tables import screen_table

ROOT = Path(__file__).resolve().parent.parent
QWEN3 = dict(head_dim=128, num_key_value_heads=8)
CASES = {   # name -> (student's shape, teacher's shape, ids, prompts, their tokens, new tokens)
    "small": (dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=32), None, 300, 64, 12, 12),
    "135M": (dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                  num_key_value_heads=3, head_dim=64), None, 49_152, 8, 64, 64),
    "4B-to-0.6B": (QWEN3 | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                                num_attention_heads=16),
                   QWEN3 | dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                                num_attention_heads=32), 151_936, 128, 128, 512)}
CONTESTANTS = ("ours", "generate", "trl")
WARM = 2                                    # steps that are left out
PARTS = ("sample", "score", "update")
TYPES = {"cpu": ("float32", 4), "cuda": ("bfloat16", 2)}    # of the computation, and its bytes


# ---- the contestants, in processes of their own ------------------------------------------------------------

def child(name, folder, case, steps, device):
    """Run a contestant in this process, and print a line: its seconds by step and part, its memory in GiB."""
    contestant = trl_steps if name == "trl" else functools.partial(our_steps, by_generate=name == "generate")
    seconds = contestant(folder, case, steps, device)
    memory = (torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else process_memory())
    print("\n" + json.dumps({"seconds": seconds, "memory": memory}))


def our_steps(folder, case, steps, device, by_generate):
    """Return [{part: seconds}] of our steps, of opd.py as a user runs it."""
    import models  # noqa: F401     # before sampler
    import sampler
    if by_generate:
        sampler.obstacle = lambda *args, **kwargs: "this is a benchmark of it"
    batch, _, new = CASES[case][3:]
    out = folder / "ours"
    sys.argv = ["opd.py", "--student", str(folder / "student"), "--teachers", str(folder / "teacher"),
                "--prompts", str(folder / "prompts.jsonl"), "--method", "opd", "--loss", "rkl", "--batch",
                str(batch), "--max_new_tokens", str(new), "--steps", str(steps), "--lr", "1e-6",
                "--save_every", "0", "--micro_tokens", "16384", "--device", device, "--dtype",
                TYPES[device][0], "--out", str(out)]
    runpy.run_path(str(ROOT / "opd.py"), run_name="__main__")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    return [line["seconds"] for line in lines if "seconds" in line]


def trl_steps(folder, case, steps, device):
    """Return [{"step": seconds}] of TRL's steps."""
    import models  # noqa: F401     # before transformers, which it keeps from importing our kernels/
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    batch, _, new = CASES[case][3:]
    times = []

    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        """Note when every step begins and ends."""

        def on_step_begin(self, *args, **kwargs):
            times.append(now())

        def on_step_end(self, *args, **kwargs):
            times.append(now() - times.pop())

    args = DistillationConfig(
        str(folder / "trl"), per_device_train_batch_size=batch, max_steps=steps, max_completion_length=new,
        beta=1.0, temperature=1.0, learning_rate=1e-6, report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=device == "cpu", bf16=device == "cuda", gradient_checkpointing=False)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    DistillationTrainer(str(folder / "student"), str(folder / "teacher"), args, data,
                        callbacks=[Clock()]).train()
    return [{"step": seconds} for seconds in times]


# ---- rounds ------------------------------------------------------------------------------------------------

def run(case, rounds, steps, device, student=None):
    """Return {contestant: [what `child` prints, per round]}; an empty list where one does not run."""
    shape, teacher_shape, ids, batch, prompt, _ = CASES[case]
    found = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for seed, (name, size) in enumerate((("student", shape), ("teacher", teacher_shape or shape))):
            if student:
                (folder / name).symlink_to(Path(student).resolve())
            else:
                with torch.device(device):
                    scratch.write_sized(folder / name, size, ids, seed, dtype=torch.bfloat16)
        rng = random.Random(0)
        texts = ["".join(rng.choices("abcdefghij ", k=prompt)) for _ in range(4 * batch)]
        (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
        for name in tqdm(CONTESTANTS * rounds, unit="run"):
            command = [sys.executable, "-m", "lab.bench_step", "--child", name, str(folder), "--case", case,
                       "--steps", str(steps), "--device", device]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                tqdm.write(f"{name}: not run ({done.stderr.strip().splitlines()[-1][:150]})")
            else:
                found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


def medians(result):
    """Return {part: median seconds over the steps that count}, with their sum as "step"."""
    steps = result["seconds"][WARM:]
    parts = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in steps[0]}
    whole = statistics.median(sum(step.values()) for step in steps)
    return parts | {"step": whole}


# ---- the floor ---------------------------------------------------------------------------------------------

def machine(device):
    """Return (bytes per second of copying, floating-point operations per second of a matrix product)."""
    dtype, size = getattr(torch, TYPES[device][0]), TYPES[device][1]
    count = 2**28 if device == "cuda" else 2**26
    x, out = (torch.ones(count, dtype=dtype, device=device) for _ in "xy")
    side = 8192 if device == "cuda" else 2048
    a = torch.ones(side, side, dtype=dtype, device=device)
    return (2 * size * count / best(lambda: out.copy_(x), device), 2 * side**3 / best(lambda: a @ a, device))


def best(call, device, times=5):
    """Return the seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def floors(case, device):
    """Return {part: seconds that it takes at least on this machine}, for completions of full length."""
    shape, teacher_shape, ids, batch, prompt, new = CASES[case]
    bandwidth, flops = machine(device)
    own, teacher = parameters(shape, ids), parameters(teacher_shape or shape, ids)
    tokens = batch * (prompt + new)
    return {"sample": new * own * TYPES[device][1] / bandwidth, "score": 2 * teacher * tokens / flops,
            "update": 6 * own * tokens / flops}


def parameters(shape, ids):
    """Return how many parameters take part in the products for a token."""
    H, D = shape["hidden_size"], shape["head_dim"]
    attention = 2 * H * D * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    return shape["num_hidden_layers"] * (attention + 3 * H * shape["intermediate_size"]) + H * ids


# ---- the report --------------------------------------------------------------------------------------------

def tables(found, floor):
    """Return the two tables: whole steps with their ratios, and the parts of ours with their floors."""
    ours = [medians(result) for result in found["ours"]]
    whole = [["", "step, s", "ours is faster by", "sample, s", "sampling is faster by", "memory, GiB"]]
    for name in CONTESTANTS:
        results = [medians(result) for result in found[name]]
        if not results:
            whole.append([name, *["not run"] * 5])
            continue
        median = lambda key: statistics.median(one.get(key, 0) for one in results)
        ratio = lambda key: statistics.median(one.get(key, 0) / own[key] for one, own in zip(results, ours))
        sampled = [f"{median('sample'):.3f}", f"{ratio('sample'):.2f}"] if name != "trl" else ["", ""]
        memory = statistics.median(result["memory"] for result in found[name])
        whole.append([name, f"{median('step'):.3f}", f"{ratio('step'):.2f}", *sampled, f"{memory:.2f}"])
    parts = [["our step", "s", "floor, s", "floor / time, %"]]
    for part in PARTS:
        seconds = statistics.median(one[part] for one in ours)
        parts.append([part, f"{seconds:.3f}", f"{floor[part]:.3f}", f"{100 * floor[part] / seconds:.0f}"])
    return whole, parts


def draw(plt, found, floor, path):
    """Draw whole steps as bars, ours by part with the floors as lines."""
    figure, axis = plt.subplots(figsize=(6.5, 2.6))
    for y, name in enumerate(name for name in CONTESTANTS if found[name]):
        middle = [medians(result) for result in found[name]]
        left = 0.0
        for i, part in enumerate(PARTS if name != "trl" else ("step",)):
            seconds = statistics.median(one[part] for one in middle)
            axis.barh(y, seconds, left=left, color=f"C{i}" if name != "trl" else "grey",
                      label=part if y == 0 else None)
            if name == "ours":
                axis.plot([left, left + min(floor[part], seconds)], [y - 0.3] * 2, "k", linewidth=2)
            left += seconds
    axis.set_yticks(range(y + 1), [name for name in CONTESTANTS if found[name]])
    axis.set(xlabel="seconds per step; black: the floor", ylim=(y + 0.6, -0.6))
    axis.legend(fontsize=7)
    save_figure(plt, figure, path)


def main(argv=None):
    """Run the benchmark from the command line."""
    count = number(int, least=1)
    parser = Parser(prog="python -m lab.bench_step", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--case", choices=CASES, default="small")
    parser.add_argument("--student", metavar="PATH", help="a checkpoint that takes the place of both models")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--steps", type=number(int, least=WARM + 1), default=8, help="per run, the first two "
                        "of which are left out (default: 8)")
    parser.add_argument("--device", choices=TYPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_step"), help="default: runs/bench_step")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv)
        if args.child:
            return child(args.child[0], Path(args.child[1]), args.case, args.steps, args.device)
        found = run(args.case, args.rounds, args.steps, args.device, args.student)
        floor = floors(args.case, args.device)
        if not found["ours"]:
            raise Refused("our own step did not run")
    except (Refused, OSError) as error:
        raise SystemExit(f"lab.bench_step: {error}") from None
    shown = tables(found, floor)
    device = torch.cuda.get_device_name() if args.device == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads of {platform.machine()}")
    batch, prompt, new = CASES[args.case][3:]
    about = (f"{args.case}{' with ' + args.student if args.student else ''}: {batch} prompts of {prompt} "
             f"tokens, {new} new ones, {args.rounds} rounds. {device}, {TYPES[args.device][0]}, torch "
             f"{torch.__version__}.")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.case}.json").write_text(json.dumps(
        {"about": about, "runs": found, "floor": floor}, indent=1))
    (args.out / f"{args.case}.md").write_text("\n\n".join([about, *map(markdown_table, shown)]) + "\n")
    print("\n\n".join([about, *map(screen_table, shown)]))
    if plt := pyplot():
        draw(plt, found, floor, args.out / f"{args.case}.png")


if __name__ == "__main__":
    main()
