"""Steps of real architectures with random weights: seconds, and memory by part beside its prediction.

    python tests/real_size.py OUT               Qwen3-4B teaches Qwen3-0.6B, and itself with LoRA; needs a GPU
    python tests/real_size.py OUT --device cpu  the same in small: does it run?
    python tests/real_size.py OUT --rows plain swap --steps 2 --batch 64 --max_new_tokens 128

Every row is a call of opd.py as a user would make it; one that fails does not stop the next. The times are
those of the last step. Writes OUT/real_size.md and real_size.json after every row.
"""
import argparse
import importlib.util
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import opd
from data import scratch
from lab import preflight

QWEN3 = {"0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
         "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
         "small": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2)}
ROWS = {  # name -> (student, teacher, flags); two models per size, so that only LoRA shares one
    "plain": ("student", "teacher", []),
    "checkpointing": ("student", "teacher", ["--gradient_checkpointing"]),
    "swap": ("student", "teacher", ["--teacher_device", "swap"]),
    "lora": ("teacher", "teacher", ["--lora_rank", "16", "--gradient_checkpointing"])}
ROOM = 40 << 30         # bytes that models and a run's last checkpoint may need; a disk in memory is faster


def write_models(folder, sizes, ids, rows, device):
    """Folders student and teacher: a tokenizer of `ids` ids, a letter each, and heads of `rows` rows."""
    for seed, (name, size) in enumerate(sizes.items()):
        shape = QWEN3[size] | dict(num_key_value_heads=8 if size != "small" else 1, head_dim=128)
        with torch.device(device):
            scratch.write_sized(folder / name, shape, ids, seed, rows, torch.bfloat16)
    if device == "cuda":
        torch.cuda.empty_cache()                # the runs are processes of their own


def measure(folder, name, student, teacher, flags):
    """One row: the prediction, then a run of its own process, and what its last step took."""
    out = folder / f"run {name}"
    argv = ["--student", str(folder / student), "--teachers", str(folder / teacher),
            "--prompts", str(folder / "prompts.jsonl"), *flags]
    parts = preflight.memory(opd.Run(opd.configure([*argv, "--dry_run"])))
    row = {"row": name, "predicted_gib": {phase: sum(sizes.get(phase, 0) for sizes in parts.values()) / 2**30
                                          for phase in preflight.PHASES}}
    done = subprocess.run([sys.executable, str(ROOT / "opd.py"), *argv, "--out", str(out),
                           "--save_every", "0"])
    metrics = out / "metrics.jsonl"
    if done.returncode or not metrics.exists():
        row["text"] = f"failed with exit {done.returncode}"
    else:
        last = json.loads(metrics.read_text().splitlines()[-1])
        row |= {"measured_gib": last.get("memory_gib_by_part", {}), "seconds": last["seconds"],
                "tokens": last["tokens"]}
    shutil.rmtree(out, ignore_errors=True)              # its checkpoint and final model are gigabytes
    return row


def table(rows, passes):
    """passes: forward passes of sampling in a step, of which each makes one token of a batch."""
    cells = ["", *(f"{phase} s" for phase in preflight.PHASES), "sampled tokens/s", "ms per sampled position",
             *(f"{phase} GiB: predicted / measured" for phase in preflight.PHASES)]
    lines = ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
    for row in rows:
        gib, seconds = row.get("measured_gib", {}), row.get("seconds")
        shown = [f"{row['predicted_gib'][p]:.1f} / {format(gib[p], '.1f') if p in gib else 'not run'}"
                 for p in preflight.PHASES]
        times = [row.get("text", "not run")] + [""] * 4 if seconds is None else [
            *(f"{seconds[phase]:.2f}" for phase in preflight.PHASES),
            f"{row['tokens'] / seconds['sample']:.0f}", f"{seconds['sample'] / passes * 1e3:.1f}"]
        name = f"`{' '.join(ROWS[row['row']][2])}`" if ROWS[row["row"]][2] else row["row"]
        lines.append("| " + " | ".join([name, *times, *shown]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    for flag, gpu, cpu in (("steps", 2, 2), ("batch", 64, 4), ("max_new_tokens", 128, 16)):
        parser.add_argument(f"--{flag}", type=int, help=f"default: {gpu}; in small {cpu}")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    number = lambda given, gpu, cpu: given or (gpu if on_gpu else cpu)
    batch, tokens = number(args.batch, 64, 4), number(args.max_new_tokens, 128, 16)
    common = ["--device", args.device, "--dtype", "bfloat16", "--steps", str(number(args.steps, 2, 2)),
              "--batch", str(batch), "--sample_batch", str(batch), "--max_new_tokens", str(tokens)]
    args.out.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    roomy = on_gpu and memory.is_dir() and shutil.disk_usage(memory).free > ROOM
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as scratch_folder:
        folder, rng, results = Path(scratch_folder), random.Random(0), []
        sizes = dict(student="0.6B", teacher="4B") if on_gpu else dict(student="small", teacher="small")
        used = {model for name in args.rows for model in ROWS[name][:2]}
        write_models(folder, {role: size for role, size in sizes.items() if role in used},
                     *((151_669, 151_936) if on_gpu else (300, 320)), args.device)
        (folder / "prompts.jsonl").write_text("".join(json.dumps(
            {"prompt": "".join(rng.choices("abcdefghij ", k=128))}) + "\n" for _ in range(64)))
        for name in args.rows:
            student, teacher, flags = ROWS[name]
            no_peft = "--lora_rank" in flags and not importlib.util.find_spec("peft")
            if no_peft or "swap" in flags and not on_gpu:
                print(f"{name}: not run")
                continue
            results.append(measure(folder, name, student, teacher, common + flags))
            device = torch.cuda.get_device_name() if on_gpu else f"CPU, {platform.machine()}"
            text = (f"Qwen3 {sizes['teacher']} teaches {sizes['student']}, random weights, {device}, "
                    f"torch {torch.__version__}, {' '.join(common)}\n\n{table(results, tokens)}\n")
            (args.out / "real_size.md").write_text(text)
            (args.out / "real_size.json").write_text(json.dumps(
                {"device": device, "torch": torch.__version__, "flags": common, "rows": results}, indent=1))
            print(text, flush=True)
    sys.exit(any("text" in row for row in results))
