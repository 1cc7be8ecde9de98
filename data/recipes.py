"""Recipes: the table of a paper or of this project as data, one row of flags per row of the table.

`python opd.py --recipe small --out runs/small --seeds 5` runs every row of every seed as its own call of
opd.py on saved folders, skips what is finished, resumes what was interrupted, and writes OUT/results.json,
report.md and curves.png.
"""
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from . import report
from .files import write_file

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Recipe:
    """In every string, {seed} is the number of the seed and {dir} the seed's folder, OUT/seed0."""
    about: str
    prepare: list                   # arguments of python -m that write the data of a seed
    common: dict                    # flags of every row
    rows: dict                      # name -> flags; a row may start from an earlier row's {dir}/NAME/final
    columns: dict                   # evaluation set -> heading
    axes: dict                      # of the picture, x then y: title -> evaluation sets, averaged
    references: tuple               # rows that are teachers, not results
    quick: dict                     # row -> flags that --quick replaces; "" = of every other row
    quick_prepare: list = field(default_factory=list)
    expected: dict = field(default_factory=dict)    # "full" or "quick" -> row -> (mean, spread) per column, %


SMALL_BRANCHES = ["general={dir}/world/general.jsonl", "domain={dir}/world/domain.jsonl"]
SMALL_TEACHERS = ["general={dir}/generalist/final", "domain={dir}/specialist/final"]
SMALL_ARM = dict(student="{dir}/specialist/final", prompts=SMALL_BRANCHES, steps=160, batch=64, lr=1e-4,
                 warmup=10, lr_schedule="cosine", eval_every=40, save_every=80)
SMALL_REFERENCES = [path.replace(".jsonl", "_references.jsonl") for path in SMALL_BRANCHES]
TAUGHT = SMALL_ARM | dict(teachers=SMALL_TEACHERS)

RECIPES = {
    "small": Recipe(
        about="The small world: a generalist forgets while it specialises; recover the general skills, keep "
              "the domain. References are few (sft, kd, gkd learn from them), prompts four times as many. "
              "covered = general skills with proxy prompts, uncovered = general skills without any; opd, "
              "mopd, camopd use the full-vocabulary reverse KL, -pg the sampled-token policy gradient. "
              "Accuracy in %, greedy.",
        prepare=["data.small_world", "{dir}/world", "--seed", "{seed}"],
        common=dict(seed="{seed}", dtype="float32", max_new_tokens=24, sample_batch=512, micro_tokens=16384,
                    eval_prompts=[f"{name}={{dir}}/world/eval_{name}.jsonl"
                                  for name in ("covered", "uncovered", "domain")]),
        rows={
            "generalist": dict(student="{dir}/world/init", prompts=["{dir}/world/generalist.jsonl"],
                               method="sft", optimizer="muon", lr=2e-3, lr_schedule="cosine", warmup=20,
                               steps=700, batch=128, save_every=350),
            "specialist": dict(student="{dir}/generalist/final", prompts=["{dir}/world/specialist.jsonl"],
                               method="sft", optimizer="muon", lr=1e-3, lr_schedule="cosine", warmup=20,
                               steps=250, batch=128, save_every=0),
            "sft": SMALL_ARM | dict(method="sft", prompts=SMALL_REFERENCES),
            "kd": TAUGHT | dict(method="kd", prompts=SMALL_REFERENCES),
            "gkd": TAUGHT | dict(method="gkd", prompts=SMALL_REFERENCES),
            "seqkd": TAUGHT | dict(method="seqkd"),
            "opd": SMALL_ARM | dict(method="opd", prompts=SMALL_BRANCHES[:1],
                                    teachers=["{dir}/generalist/final"]),
            "mopd": TAUGHT | dict(method="mopd", loss="rkl"),
            "camopd": TAUGHT | dict(method="camopd", loss="rkl"),
            "mopd-pg": TAUGHT | dict(method="mopd", loss="pg"),
            "camopd-pg": TAUGHT | dict(method="camopd", loss="pg"),
        },
        columns={"covered": "general, covered", "uncovered": "general, uncovered", "domain": "domain"},
        axes={"domain accuracy, %": ("domain",), "general accuracy (covered skills), %": ("covered",)},
        references=("generalist", "specialist"),
        quick={"": dict(steps=16, eval_every=8, lr=5e-4), "generalist": dict(steps=160),
               "specialist": dict(steps=60)},
        expected={"full": {                                 # 5 seeds, 2 CPU cores, torch 2.13.0
            "generalist": [(95.2, 0.6), (96.7, 1.6), (46.2, 0.6)],
            "specialist": [(18.6, 3.8), (16.6, 6.5), (92.5, 2.3)],
            "sft": [(70.6, 2.8), (23.5, 7.5), (81.9, 3.8)],
            "kd": [(70.9, 2.8), (24.6, 8.4), (86.3, 2.6)],
            "gkd": [(70.3, 3.9), (23.8, 7.4), (86.1, 2.3)],
            "seqkd": [(81.7, 1.5), (26.2, 8.6), (87.6, 1.9)],
            "opd": [(82.9, 2.3), (27.2, 8.2), (69.8, 3.3)],
            "mopd": [(82.0, 2.7), (26.7, 7.0), (88.7, 2.0)],
            "camopd": [(80.8, 2.2), (25.5, 7.9), (87.2, 1.7)],
            "mopd-pg": [(71.0, 5.9), (22.3, 5.3), (88.5, 1.5)],
            "camopd-pg": [(69.8, 3.1), (21.7, 6.7), (85.4, 3.1)],
        }, "quick": {                                       # 1 seed, so no spread
            "generalist": [(46.7, None), (36.7, None), (20.0, None)],
            "specialist": [(14.6, None), (28.3, None), (40.8, None)],
            "sft": [(30.8, None), (29.6, None), (36.7, None)],
            "kd": [(35.8, None), (30.4, None), (41.2, None)],
            "gkd": [(32.9, None), (28.3, None), (42.1, None)],
            "seqkd": [(32.9, None), (28.7, None), (38.3, None)],
            "opd": [(33.3, None), (30.4, None), (38.8, None)],
            "mopd": [(30.0, None), (28.7, None), (39.2, None)],
            "camopd": [(25.4, None), (30.0, None), (40.0, None)],
            "mopd-pg": [(22.1, None), (28.3, None), (40.4, None)],
            "camopd-pg": [(17.9, None), (28.3, None), (33.8, None)]}},
        quick_prepare=["--generalist", "21000", "--specialist", "8000", "--evaluation", "240"],
    ),
}


def run(name, out, seeds, quick, jobs=1):
    """Run what a recipe lacks for seeds 0 .. seeds - 1, `jobs` seeds at a time; print and write its table."""
    recipe, form = RECIPES[name], "quick" if quick else "full"
    out = Path(out).resolve() if out else ROOT / "runs" / (f"{name}-quick" if quick else name)
    out, threads = Path(os.path.relpath(out, ROOT)), max(1, (os.cpu_count() or 1) // jobs)
    pool, stop = ThreadPoolExecutor(jobs), threading.Event()
    running = [pool.submit(run_seed, recipe, out / f"seed{seed}", seed, form, threads, stop)
               for seed in range(seeds)]
    try:
        for done in as_completed(running):
            done.result()
    finally:
        stop.set()                              # a row that failed, or Ctrl-C, ends the other seeds' rows too
        pool.shutdown(cancel_futures=True)
    report.write_recipe(name, recipe, Path(os.path.relpath(ROOT / out)), seeds, form)


def run_seed(recipe, folder, seed, form, threads, stop):
    """The rows of one seed, in order, until `stop` is set. A row that is finished costs nothing."""
    quick, prepared = form == "quick", ROOT / folder / "prepared"
    if not prepared.exists():
        extra = recipe.quick_prepare if quick else []
        call(["-m", *(fill(x, folder, seed) for x in recipe.prepare), *extra], "data", folder, threads)
        write_file(prepared, form)
    if prepared.read_text() != form:
        raise SystemExit(f"opd.py: {ROOT / folder} holds the {prepared.read_text()} form of this recipe; "
                         "choose another --out")
    for number, row in enumerate(recipe.rows, 1):
        if not stop.is_set() and not (ROOT / folder / row / "final").exists():
            call(["opd.py", *arguments(recipe, row, folder, seed, quick)], row, folder, threads,
                 f"({number}/{len(recipe.rows)})")


def arguments(recipe, row, folder, seed, quick):
    """The command line of one row."""
    flags = recipe.common | recipe.rows[row]
    if quick:
        flags |= recipe.quick.get(row, recipe.quick[""])
    argv = ["--out", str(folder / row), "--resume"]
    for flag, value in flags.items():
        argv += [f"--{flag}", *(fill(x, folder, seed)
                                for x in (value if isinstance(value, list) else [value]))]
    return argv


def fill(value, folder, seed):
    return value.format(dir=folder, seed=seed) if isinstance(value, str) else str(value)


def call(argv, row, folder, threads, position=""):
    """One child process: its lines go to FOLDER/ROW.log, its progress bar and errors to the terminal."""
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    log = ROOT / folder / f"{row}.log"
    print(f"{folder.name}: {row} {position}", flush=True)
    with open(log, "a") as lines:
        code = subprocess.run([sys.executable, *argv], cwd=ROOT, stdout=lines, stdin=subprocess.DEVNULL,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads),
                                   "PYTHONUNBUFFERED": "1"}).returncode
    if code:
        raise SystemExit(f"opd.py: {folder.name}: {row} ended with exit code {code} (its output: "
                         f"{os.path.relpath(log)}); the same command again continues")
