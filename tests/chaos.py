"""Chaos: what is killed anywhere and resumed must end as if nothing had happened (bash tests/run.sh --long).

    long     of a few hundred steps the last ones take no more time and memory than earlier ones
    kills    SIGKILL before lines that write, or at any time, then --resume, until the run is done; final/,
             adapter/, metrics.jsonl and samples.jsonl must be those of a run that nobody disturbed
    fuzz     two steps with random settings end with finite numbers, or are refused in one line

    python tests/chaos.py [--minutes 2] [--seed 0]

Every run is a process of its own (test_endurance.py). The exit status is 1 if anything was wrong.
"""
import argparse
import json
import math
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import TEMPLATES, WORD_ROWS, small_world, tiny
from test_endurance import Fork, left_by, program
from tqdm import tqdm

from data.files import read_lines
from losses import DIVERGENCES, SUPPORTS
from methods import METHODS
from methods.token_weights import RULES

# ---- runs --------------------------------------------------------------------------------------------------

GRADER = """import zlib
def chance(completion, row):
    return zlib.crc32(completion.encode()) % 2
"""


def make_world(folder):
    """Write tiny models, prompts, templates, and a grader that calls half of all completions correct."""
    tok = small_world.tokenizer()
    for seed, (name, hidden) in enumerate({"a": 32, "b": 32, "wide": 48}.items()):
        tiny(folder / name, small_world.model(len(tok), seed, hidden=hidden, layers=1), tok)
    for name in ("words", "more", "val_words", "val_more"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in WORD_ROWS))
    (folder / "templates.json").write_text(json.dumps(TEMPLATES))
    (folder / "grader.py").write_text(GRADER)
    (folder / "system.txt").write_text("last copy")
    return folder


def flags_of(world, name):
    """Return the flags of a method in that world."""
    method, both = METHODS[name], {"words": world / "wide", "more": world / "b"}
    branches = list(both) if method.teachers == "each" or method.students == 2 else ["words"]
    flags = dict(method=name, student=[world / "a"], prompts=[f"{b}={world / b}.jsonl" for b in branches],
                 steps=4, save_every=1, batch=4, device="cpu", lr=1e-3, lr_schedule="linear")
    if name != "compact":                                       # it has to know where a completion answers
        flags["grader"] = f"{world / 'grader.py'}:chance"
    if method.teachers != "none":
        flags["teachers"] = [f"{b}={both[b]}" for b in (both if method.teachers == "any" else branches)]
    if method.samples:
        flags |= dict(max_new_tokens=6, eval_prompts=[f"e={world / 'words.jsonl'}"], eval_every=2)
    if "templates" in method.defaults:
        flags["templates"] = world / "templates.json"
    if method.teachers == "none" and "teacher_system" in method.defaults:
        flags["teacher_system"] = world / "system.txt"
    if method.students == 2:
        flags |= dict(student=[world / "a", world / "b"], feedback_tokens=6, break_prompts=2, gate_rollouts=2,
                      eval_temperature=1, val_prompts=[f"{b}={world / f'val_{b}'}.jsonl" for b in branches])
    return flags | (dict(rounds=2) if "rounds" in method.own else {})


def random_flags(rng, world):
    """Return the flags of two steps with random settings."""
    name = rng.choice([name for name in METHODS if name != "okd" or find_spec("peft")])
    defaults, losses = METHODS[name].defaults, METHODS[name].losses
    flags = flags_of(world, name) | dict(steps=2, loss=rng.choice(losses), batch=rng.choice([2, 3, 4, 7]))
    more = dict(micro_tokens=[1, 30, 100], optimizer=["sgd", "muon"], grad_clip=[0, 0.1], warmup=[1, 9],
                lr_schedule=["linear", "cosine"], loss_temperature=[0.5, 2], dtype=["bfloat16"],
                seed=range(99),
                gradient_checkpointing=[True], drop_cut=[True], temperature=[0.5], top_p=[0.6],
                sample_batch=[1, 3], max_new_tokens=[1, 3, 12], skip_bad_steps=[2], save_every=[0],
                rollouts=[1, 2, 5] if "rollouts" in defaults else [],
                lora_rank=[2] if find_spec("peft") else [],
                self_teacher=["ema", "frozen", "live"] if "self_teacher" in defaults else [],
                token_weight=list(RULES) if "token_weight" in defaults else [],
                kl_weight=[0.1] if "kl_weight" in defaults else [],
                teacher_system=[world / "system.txt"] if "teacher_system" in defaults else [])
    if flags["loss"] in DIVERGENCES:
        knob = DIVERGENCES[flags["loss"]].knob
        more |= dict(target=["veto", "taid"], support=SUPPORTS, entry_clip=[0, 0.01],
                     **({knob: [0, 0.3, 1, 2]} if knob else {}))
    flags |= {flag: rng.choice(values) for flag, values in more.items() if values and rng.random() < 0.3}
    return flags | (dict(top_k=rng.choice([1, 5, 999])) if flags.get("support", "full") != "full" else {})


def command(out, flags):
    """Return the words of a command line."""
    words = ["--out", str(out), "--resume"]
    for flag, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{flag}", *(str(x) for x in values if x is not True)]
    return words


def is_finite(value):
    """Return whether a record has finite numbers only, at any depth."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(is_finite, parts)) and not (isinstance(value, float) and not math.isfinite(value))


# ---- long, kills, fuzz -------------------------------------------------------------------------------------

class Chaos:
    """A world of tiny models, what was counted there, and how often something was wrong."""

    def __init__(self, world, seed):
        self.world, self.rng, self.figures, self.wrong = world, random.Random(seed), Counter(), 0

    def check(self, right, what, flags, said=""):
        """Count and show what is wrong."""
        if not right:
            self.wrong += 1
            tqdm.write(f"\nWRONG: {what}\npython opd.py {' '.join(command('OUT', flags))}\n{said[-2000:]}\n")
        return right

    def run(self, out, flags, seconds=None, **how):
        """Run a command, to its end or until it is killed; return (exit status, what it said)."""
        with Fork(self.world / "log", program, command(out, flags), **how) as run:
            if seconds is not None and run.end(seconds) is None:
                run.send(signal.SIGKILL)
            return run.end(), run.said

    def passing(self, seconds, items, title):
        """Yield items until the time is over."""
        began = time.monotonic()
        with tqdm(total=round(seconds), desc=title, unit="s") as bar:
            for item in items:
                bar.update(min(round(time.monotonic() - began), bar.total) - bar.n)
                if time.monotonic() - began > seconds:
                    return
                yield item

    def long(self, steps):
        """The last quarter of the steps takes no more time and memory than the second one."""
        flags, out = flags_of(self.world, "mopd") | dict(steps=steps, save_every=50), self.world / "long"
        status, said = self.run(out, flags, report=True)
        if self.check(status == 0, "the long run does not end well", flags, said):
            lines = [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]
            second, last = (statistics.median(sum(line["seconds"].values()) for line in part)
                            for part in (lines[steps // 4:steps // 2], lines[-steps // 4:]))
            slower = round(100 * (last / second - 1))
            more = round(1024 * (lines[-1]["memory_gib"] - lines[steps // 4]["memory_gib"]))
            self.figures.update({"steps of the long run": steps, "% more time per step at its end": slower,
                                 "MiB more memory at its end": more})
            self.check(slower < 50 and more < 30, f"{slower}% slower, {more} MiB more", flags)

    def undisturbed(self):
        """Run every method; return {name: (flags, what it leaves, seconds)} and its lines that write."""
        cases = {name: flags_of(self.world, name) for name in METHODS if name != "okd" or find_spec("peft")}
        cases |= {"adapter": cases["opd"] | dict(lora_rank=2)} if find_spec("peft") else {}
        found, places = {}, []
        for name, flags in tqdm(cases.items(), "undisturbed runs"):
            out, lines, began = self.world / f"undisturbed {name}", self.world / "lines", time.monotonic()
            status, said = self.run(out, flags, lines=str(lines))
            if self.check(status == 0, "it does not run", flags, said):
                found[name] = flags, left_by(out), time.monotonic() - began
                places += [(line, name, number) for number, line in enumerate(json.loads(lines.read_text()))]
        return found, places

    def kills(self, seconds):
        """Kill runs of every method and resume them; they must leave what an undisturbed run leaves."""
        (cases, places), seen, out = self.undisturbed(), Counter(), self.world / "killed"
        self.rng.shuffle(places)
        for i, (line, *_) in enumerate(places):     # every line once before any a second time, renames first
            seen[line] += 1
            places[i] = (seen[line], not line.startswith(("atomic_folder", "write_file")), *places[i])
        for _, _, line, name, number in self.passing(seconds, sorted(places), "kills"):
            shutil.rmtree(out, ignore_errors=True)
            (flags, expected, took), kills, status = cases[name], [], -signal.SIGKILL
            while status == -signal.SIGKILL:
                any_time = dict(seconds=self.rng.uniform(0, took))
                early = dict(kill_at=self.rng.randrange(99))
                how = [{}, {}, early, any_time] if kills else [dict(kill_at=number)] * 3 + [any_time]
                kills.append(self.rng.choice(how))
                status, said = self.run(out, flags, **kills[-1])
            ours = left_by(out) if status == 0 else {"its end": said}
            different = [x for x in ours.keys() | expected.keys() if ours.get(x) != expected.get(x)]
            self.check(not different, f"{kills} ({line}): {', '.join(different)} differ", flags, said)
            self.figures.update({"runs that were killed": 1, "times that they were killed": len(kills) - 1})
        self.figures["lines that write"] = len(seen)
        self.check(len(seen) > 50 and self.figures["times that they were killed"], "nothing was killed", {})

    def fuzz(self, seconds):
        """Run two steps of random settings: they end with finite numbers, or are refused in one line."""
        for number in self.passing(seconds, range(10**9), "fuzz"):
            flags, out = random_flags(self.rng, self.world), self.world / f"fuzz {number}"
            status, said = self.run(out, flags)
            refused = status == 1 and said.splitlines()[-1].startswith("opd.py: ") and "Traceback" not in said
            self.check(refused or status == 0, f"exit status {status}", flags, said)
            self.check(status or is_finite(left_by(out)), "a number is not finite", flags)
            self.figures.update({"random settings": 1, "of them refused": refused})


def main():
    """Run the three parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(make_world(Path(folder)), args.seed)
        chaos.long(round(150 * args.minutes))
        chaos.kills(30 * args.minutes)
        chaos.fuzz(12 * args.minutes)
    for what, count in [*chaos.figures.items(), ("wrong", chaos.wrong)]:
        print(f"{count:>8,}  {what}")
    raise SystemExit(chaos.wrong > 0)


if __name__ == "__main__":
    main()
