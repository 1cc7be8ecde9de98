"""Steps of real architectures with random weights: seconds, and memory by part beside its prediction.

    python tests/real_size.py OUT               Qwen3-4B teaches Qwen3-0.6B, and itself with LoRA; needs a GPU
    python tests/real_size.py OUT --device cpu  the same in small: does it run?

Every row is a call of opd.py as a user would make it. Writes OUT/real_size.md and real_size.json.
"""
import argparse
import importlib.util
import json
import platform
import random
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
    "as it is": ("student", "teacher", []),
    "--gradient_checkpointing": ("student", "teacher", ["--gradient_checkpointing"]),
    "--teacher_device swap": ("student", "teacher", ["--teacher_device", "swap"]),
    "teacher + LoRA, by itself": ("teacher", "teacher", ["--lora_rank", "16", "--gradient_checkpointing"])}


def write_models(folder, sizes, ids, rows, device):
    """Folders student and teacher: a tokenizer of `ids` ids, a letter each, and heads of `rows` rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    known = [*scratch.SPECIAL, *map(chr, range(32, 127)), "\n"]
    words = known + [f"token{i}" for i in range(ids - len(known))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=" "))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>",
                                               pad_token="<|endoftext|>", chat_template=scratch.CHATML)
    for name, size in sizes.items():
        config = transformers.Qwen3Config(
            **QWEN3[size], vocab_size=rows, num_key_value_heads=8 if size != "small" else 1, head_dim=128,
            tie_word_embeddings=True, eos_token_id=tok.eos_token_id, max_position_embeddings=4096)
        with torch.device(device):
            net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        net.save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
        del net
    if device == "cuda":
        torch.cuda.empty_cache()                # the runs are processes of their own


def measure(folder, name, student, teacher, flags):
    """One row: the prediction, then a run of its own process, and what its last step took."""
    out = folder / f"run {name}"
    argv = ["--student", str(folder / student), "--teachers", str(folder / teacher),
            "--prompts", str(folder / "prompts.jsonl"), *flags]
    parts = preflight.memory(opd.Run(opd.configure([*argv, "--dry_run"])))
    predicted = {phase: sum(sizes.get(phase, 0) for sizes in parts.values()) / 2**30
                 for phase in preflight.PHASES}
    subprocess.run([sys.executable, str(ROOT / "opd.py"), *argv, "--out", str(out)], check=True)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {"row": name, "predicted_gib": predicted, "measured_gib": last.get("memory_gib_by_part", {}),
            "seconds": last["seconds"], "tokens": last["tokens"]}


def table(rows):
    cells = ["", *(f"{phase} s" for phase in preflight.PHASES), "sampled tokens/s",
             *(f"{phase} GiB: predicted / measured" for phase in preflight.PHASES)]
    lines = ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
    for row in rows:
        measured = {p: f"{gib:.1f}" for p, gib in row["measured_gib"].items()}
        gib = [f"{row['predicted_gib'][p]:.1f} / {measured.get(p, 'not run')}" for p in preflight.PHASES]
        cells = [row["row"], *(f"{row['seconds'][phase]:.1f}" for phase in preflight.PHASES),
                 f"{row['tokens'] / row['seconds']['sample']:.0f}", *gib]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    batch, tokens = ("32", "512") if on_gpu else ("4", "16")
    common = ["--device", args.device, "--dtype", "bfloat16", "--steps", "3", "--batch", batch,
              "--max_new_tokens", tokens]
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch_folder:
        folder, rng, results = Path(scratch_folder), random.Random(0), []
        sizes = dict(student="0.6B", teacher="4B") if on_gpu else dict(student="small", teacher="small")
        write_models(folder, sizes, *((151_669, 151_936) if on_gpu else (300, 320)), args.device)
        (folder / "prompts.jsonl").write_text("".join(json.dumps(
            {"prompt": "".join(rng.choices("abcdefghij ", k=128))}) + "\n" for _ in range(64)))
        for name, (student, teacher, flags) in ROWS.items():
            no_peft = "--lora_rank" in flags and not importlib.util.find_spec("peft")
            if no_peft or "swap" in flags and not on_gpu:
                print(f"{name}: not run")
                continue
            results.append(measure(folder, name, student, teacher, common + flags))
            device = torch.cuda.get_device_name() if on_gpu else f"CPU, {platform.machine()}"
            text = (f"Qwen3 {sizes['teacher']} teaches {sizes['student']}, random weights, {device}, "
                    f"torch {torch.__version__}, {' '.join(common)}\n\n{table(results)}\n")
            (args.out / "real_size.md").write_text(text)
            (args.out / "real_size.json").write_text(json.dumps(
                {"device": device, "torch": torch.__version__, "flags": common, "rows": results}, indent=1))
    print(text)
