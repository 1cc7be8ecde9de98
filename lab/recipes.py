"""Recipes: the table of a paper or of this project as data, one row of flags per row of the table.

`python opd.py --recipe small --out runs/small --seeds 5` runs every row of every seed as its own call of
opd.py on saved folders, skips what is finished, resumes what was interrupted, and writes OUT/results.json,
report.md and pictures.
"""
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from . import tables
from data.files import write_file

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
    beside: str = "expected"        # what `expected` is called where it is printed
    pictured: tuple = ()            # rows of the picture; (): all
    differences: dict = field(default_factory=dict)     # title -> (row, the row it is compared with by seed)
    # where two students are compared: title -> the run of both, or that of student 1 and that of student 2.
    # Then a row of the report is a title, every column is there for each student, and the first row is where
    # they start. Otherwise a row of the report is a row
    table: dict = field(default_factory=dict)


SMALL_BRANCHES = ["general={dir}/world/general.jsonl", "domain={dir}/world/domain.jsonl"]
SMALL_TEACHERS = ["general={dir}/generalist/final", "domain={dir}/specialist/final"]
SMALL_ARM = dict(student="{dir}/specialist/final", prompts=SMALL_BRANCHES, steps=160, batch=64, lr=1e-4,
                 warmup=10, lr_schedule="cosine", eval_every=40, save_every=80)
SMALL_REFERENCES = [path.replace(".jsonl", "_references.jsonl") for path in SMALL_BRANCHES]
TAUGHT = SMALL_ARM | dict(teachers=SMALL_TEACHERS)

# OPCoD, 2606.14368, table 1: two domains, in % student 1's two scores and then student 2's. Student 1 is
# stronger in the first domain, student 2 in the second.
PAPER = {
    ("physics", "chemistry"): {"initial": (51.6, 37.3, 48.6, 56.3), "GRPO": (52.6, 55.4, 54.3, 62.8),
                               "SDPO": (51.1, 56.7, 56.4, 69.9), "OPCoD": (54.1, 58.9, 58.8, 70.2)},
    ("chemistry", "material"): {"initial": (56.3, 56.1, 37.6, 65.1), "GRPO": (62.0, 65.6, 57.3, 65.2),
                                "SDPO": (70.9, 65.8, 55.4, 60.0), "OPCoD": (71.3, 69.8, 57.5, 66.4)},
    ("material", "physics"): {"initial": (65.1, 48.1, 56.0, 51.6), "GRPO": (67.8, 53.8, 66.0, 53.9),
                              "SDPO": (62.2, 52.3, 58.8, 51.9), "OPCoD": (70.5, 55.3, 66.1, 54.3)}}
PROBLEMS = {"physics": 690, "chemistry": 1860, "material": 810}         # to train on: data/sciknoweval.py


def opcod(first, second, rounds):
    """OPCoD's comparison on a pair of SciKnowEval's domains, with the hyperparameters of its appendix D."""
    domains = (first, second)
    files = {part: [f"{domain}={{dir}}/data/{domain}_{part}.jsonl" for domain in domains]
             for part in ("train", "val", "test")}
    specialists = ["{dir}/specialist-1/final", "{dir}/specialist-2/final"]
    solo = dict(prompts=files["train"], mixture=":".join(str(PROBLEMS[domain]) for domain in domains),
                steps=100, batch=32, rollouts=8, lora_rank=64, lr=1e-4, warmup=5, weight_decay=0.01,
                grad_clip=1, adam_beta2=0.999, importance_cap=2, save_every=25)
    grpo = solo | dict(method="grpo", max_new_tokens=8192)
    sdpo = solo | dict(loss="jsd", jsd_beta=0.5, support="student_tail", top_k=100, self_teacher="ema",
                       ema_rate=0.05)
    rows = {}
    for i, domain in enumerate(domains, 1):
        steps = round(3 * PROBLEMS[domain] / 16)                        # three epochs
        rows[f"specialist-{i}"] = dict(
            student="Qwen/Qwen3-8B", method="star", prompts=[files["train"][i - 1]], steps=steps, batch=16,
            lora_rank=8, lr=2e-4, lr_schedule="cosine", warmup=round(steps / 10))
    for name, flags in (("grpo", grpo), ("sdpo", sdpo | dict(method="sdpo", no_environment=True))):
        rows |= {f"{name}-{i}": dict(student=student) | flags for i, student in enumerate(specialists, 1)}
    rows["opcod"] = sdpo | dict(student=specialists, method="opcod", val_prompts=files["val"], rounds=rounds,
                                tau=0.2, gate_rollouts=16, feedback_tokens=1024)
    return Recipe(
        about=f"OPCoD, 2606.14368, on SciKnowEval L3: two Qwen3-8B specialists, student 1 in {first} and "
              f"student 2 in {second}, trained on both domains, each alone (GRPO, SDPO) or as each other's "
              "tutors (OPCoD). Test problems and hyperparameters are the paper's, with these deviations. For "
              "one card, its full fine-tuning at 1e-5 is a LoRA of rank 64 at 1e-4, ten times the rate as "
              "LoRA needs it, and the teacher averages adapters. The specialists learn from their own "
              "explanations of the gold answers: the paper's, by gpt-5-mini, are unpublished, so compare the "
              "differences from the initial row. Losses are means over rollouts of their token means, as in "
              "the paper's equations; its code averages over all tokens. Batches hold the domains in fixed "
              "shares, those of the union; tutors write at temperature 1. Accuracy in %, mean of 16 "
              "completions per problem.",
        prepare=["data.convert", *(f"hicai-zju/SciKnowEval/{domain}" for domain in domains),
                 "--out", "{dir}/data"],
        common=dict(seed="{seed}", eval_prompts=files["test"], eval_rollouts=16, eval_temperature=0.6,
                    eval_top_p=0.95, max_new_tokens=4096, chat_template_kwargs='{{"enable_thinking": false}}',
                    gradient_checkpointing=True, micro_tokens=16384, sample_batch=32),
        rows=rows,
        table={"initial": ("specialist-1", "specialist-2"), "GRPO": ("grpo-1", "grpo-2"),
               "SDPO": ("sdpo-1", "sdpo-2"), "OPCoD": ("opcod",)},
        columns={domain: domain for domain in domains},
        axes={f"{domain} accuracy, %": (domain,) for domain in domains},
        references=(),
        quick={"": dict(steps=10, batch=8, rollouts=4, eval_rollouts=1, max_new_tokens=1024),
               "specialist-1": dict(steps=20, eval_rollouts=1, max_new_tokens=1024, warmup=2),
               "specialist-2": dict(steps=20, eval_rollouts=1, max_new_tokens=1024, warmup=2),
               "opcod": dict(steps=10, batch=8, rollouts=4, eval_rollouts=1, max_new_tokens=1024,
                             gate_rollouts=2)},
        expected={"full": {row: [(score, None) for score in scores]
                           for row, scores in PAPER[first, second].items()}},
        beside="paper")


PEERS = ("letters", "chemistry")                                        # OPCoD in miniature
PEER_FILES = {part: [f"{domain}={{dir}}/world/{part}{domain}.jsonl" for domain in PEERS]
              for part in ("", "val_", "eval_")}
PEER_SFT = dict(method="sft", optimizer="muon", lr_schedule="cosine", batch=128, save_every=0)
PEER_ARM = dict(prompts=PEER_FILES[""], steps=60, batch=16, rollouts=8, lr=3e-4, warmup=5, save_every=60,
                eval_every=20)
PEER_SDPO = PEER_ARM | dict(method="sdpo", templates="{dir}/world/templates.json")
PEER_OPCOD = PEER_SDPO | dict(
    method="opcod", student=["{dir}/specialist-1/final", "{dir}/specialist-2/final"], rounds=3,
    val_prompts=PEER_FILES["val_"], gate_rollouts=4, feedback_tokens=16)

RECOVERY_SETS = {"letters": "letters (to recover)", "greek": "greek", "uncovered": "uncovered",
                 "domain": "domain (to keep)", "unmarked": "unmarked"}
RECOVERY = dict(
    student="{dir}/specialist/final", steps=120, batch=64, lr=1e-4, warmup=5, eval_every=40, save_every=0,
    prompts=["general={dir}/world/general.jsonl", "domain={dir}/world/domain.jsonl"],
    teachers=["general={dir}/generalist/final", "domain={dir}/specialist/final"],
    diagnose_every=40)


def pools(general="general", domain="domain"):
    return dict(prompts=[f"general={{dir}}/world/{general}.jsonl", f"domain={{dir}}/world/{domain}.jsonl"])


MIXED = RECOVERY | dict(method="mopd", loss="rkl")                      # CaMOPD's table 3: w/o dec
FULL = RECOVERY | dict(method="camopd", loss="rkl", schedule="3:1", mass=[0.8], scale=["general=2"])
ABLATION = {                                        # CaMOPD's table 3, and selection without alternation
    "mopd": MIXED, "mopd-3to1": MIXED | dict(mixture="3:1"),
    "no-selection": FULL | dict(mass=[1]), "no-alternation": FULL | dict(schedule="mixed", mixture="3:1"),
    "camopd": FULL}
ALONE = {       # each part by itself (what is selected is pooled, and moves the shares), and more of general
    "alternation": FULL | dict(mass=[1], scale=[1]),
    "selection": FULL | dict(schedule="mixed", mixture="3:1", scale=[1]),
    "mopd-7to1": MIXED | dict(mixture="7:1"),
    "focus": MIXED | dict(method="focus", mixture="3:1", focus=0.5)}                        # ours
PLAIN = FULL | dict(diagnose_every=0)
GRID = {                                            # CaMOPD's figure 4: schedule, scale and mass of general
    "schedule-1-1": PLAIN | dict(schedule="1:1"), "schedule-5-1": PLAIN | dict(schedule="5:1"),
    **{f"scale-{r}-mass-{rho}": PLAIN | dict(scale=[f"general={r}"], mass=[f"general={rho}"])
       for r, rho in ((1, 0.6), (1, 0.8), (2, 0.6), (3, 0.6), (3, 0.8))}}
SCALED = ("mopd-3to1", "alternation", "no-selection", "camopd")         # the middle two differ in the scale
FACTORS = {                                         # what a training differs in -> (flags, rows)
    "pg": (dict(loss="pg", lr=3e-4), (*ABLATION, "focus")),
    "conflict": (pools(domain="conflict"), (*ABLATION, "focus")),
    "broad": (pools("broad"), ("mopd-3to1", "camopd", "focus")),
    "few": (pools(domain="few"), ("mopd-3to1", "camopd")),
    "batch16": (dict(batch=16, diagnose_rollouts=64), ("mopd-3to1", "camopd")),
    "muon": (dict(optimizer="muon", lr=2e-4), SCALED),
    "sgd": (dict(optimizer="sgd", lr=0.02, grad_clip=0), SCALED),
    **{f"sgd-{lr}": (dict(optimizer="sgd", lr=lr, grad_clip=0), ("mopd-3to1",)) for lr in (0.04, 0.08)}}

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
    "small-opcod": Recipe(
        about="OPCoD in miniature: two students of 0.6 M parameters, student 1 a specialist in letters and "
              "student 2 in chemistry, learn on prompts of both without solutions, 60 updates each. tau is "
              "the largest cognizance gap of a tutor, 0.2 unless stated. Accuracy in %, mean of 4 "
              "completions at temperature 0.6.",
        prepare=["data.small_peers", "{dir}/world", "--seed", "{seed}"],
        common=dict(seed="{seed}", dtype="float32", max_new_tokens=16, sample_batch=512, micro_tokens=16384,
                    eval_prompts=PEER_FILES["eval_"], eval_rollouts=4, eval_temperature=0.6),
        rows={
            "base": PEER_SFT | dict(student="{dir}/world/init", prompts=["{dir}/world/base.jsonl"], lr=4e-3,
                                    warmup=20, steps=350),
            **{f"specialist-{i}": PEER_SFT | dict(
                student="{dir}/base/final", prompts=[f"{{dir}}/world/specialist{i}.jsonl"], lr=1e-3,
                warmup=10, steps=80) for i in (1, 2)},
            **{f"{name}-{i}": arm | dict(student=f"{{dir}}/specialist-{i}/final")
               for name, arm in (("grpo", PEER_ARM | dict(method="grpo")), ("sdpo", PEER_SDPO))
               for i in (1, 2)},
            "opcod": PEER_OPCOD,
            "tau-0.1": PEER_OPCOD | dict(tau=0.1),
            "tau-0.3": PEER_OPCOD | dict(tau=0.3),
            "always": PEER_OPCOD | dict(gate="always"),
            "selective": PEER_OPCOD | dict(gate="selective"),
            "six-rounds": PEER_OPCOD | dict(rounds=6),
            "no-anchor": PEER_OPCOD | dict(no_anchor=True),
        },
        table={"initial": ("specialist-1", "specialist-2"), "GRPO": ("grpo-1", "grpo-2"),
               "SDPO": ("sdpo-1", "sdpo-2"), "OPCoD": ("opcod",), "OPCoD, tau 0.1": ("tau-0.1",),
               "OPCoD, tau 0.3": ("tau-0.3",), "OPCoD without gate": ("always",),
               "OPCoD, selective gate": ("selective",), "OPCoD, 6 rounds": ("six-rounds",),
               "OPCoD without anchoring": ("no-anchor",)},
        columns={domain: domain for domain in PEERS},
        axes={f"{domain} accuracy, %": (domain,) for domain in PEERS},
        references=(),
        quick={"": dict(steps=6, eval_every=0), "base": {}, "specialist-1": {}, "specialist-2": {}},
        expected={"full": {                                 # 6 seeds, 1 thread each, torch 2.13.0
            "initial": [(92.0, 1.3), (71.6, 3.3), (74.3, 4.0), (93.1, 2.3)],
            "GRPO": [(94.7, 2.0), (93.1, 5.6), (84.7, 5.4), (99.1, 1.5)],
            "SDPO": [(94.4, 1.3), (95.5, 5.8), (86.1, 1.7), (99.1, 1.2)],
            "OPCoD": [(95.2, 2.7), (99.1, 0.8), (91.8, 1.9), (99.8, 0.3)],
            "OPCoD, tau 0.1": [(94.8, 1.4), (97.2, 3.9), (89.8, 4.2), (99.3, 0.9)],
            "OPCoD, tau 0.3": [(95.1, 2.6), (98.4, 1.6), (94.2, 3.6), (98.3, 3.6)],
            "OPCoD without gate": [(95.1, 2.6), (98.4, 1.6), (94.2, 3.6), (98.3, 3.6)],
            "OPCoD, selective gate": [(95.4, 2.1), (98.8, 1.3), (93.6, 2.3), (99.5, 0.9)],
            "OPCoD, 6 rounds": [(95.2, 1.9), (98.3, 1.2), (90.0, 5.1), (98.1, 1.7)],
            "OPCoD without anchoring": [(95.3, 2.6), (97.8, 1.8), (91.8, 3.2), (98.8, 1.8)],
        }},
    ),
    "small-camopd": Recipe(
        about="When does CaMOPD help? Its ablation (table 3), its grid of schedule, scale and mass (figure "
              "4), and the ablation with other losses, prompts, batches and optimizers, in a world of long "
              "noisy completions whose proxy prompts the specialist mostly solves. Every row has 120 steps "
              "of 64 rollouts, the reverse KL and AdamW unless its name says otherwise (then with a learning "
              "rate of its own). Differences are paired by seed, with 95% intervals by Student's t, of which "
              "one in twenty misses by chance. Accuracy in %, greedy.",
        prepare=["data.small_recovery", "{dir}/world", "--seed", "{seed}"],
        common=dict(seed="{seed}", dtype="float32", max_new_tokens=24, sample_batch=512, micro_tokens=16384,
                    eval_prompts=[f"{name}={{dir}}/world/eval_{name}.jsonl" for name in RECOVERY_SETS]),
        rows={
            "generalist": dict(student="{dir}/world/init", prompts=["{dir}/world/generalist.jsonl"],
                               method="sft", optimizer="muon", lr=5e-3, lr_schedule="cosine", warmup=20,
                               steps=320, batch=128, save_every=0),
            "specialist": dict(student="{dir}/generalist/final", prompts=["{dir}/world/specialist.jsonl"],
                               method="sft", lr=1e-3, lr_schedule="cosine", warmup=10, steps=100, batch=128,
                               save_every=0),
            **ABLATION, **ALONE, **GRID,
            **{f"{row}-{factor}": (ABLATION | ALONE)[row] | flags for factor, (flags, rows) in FACTORS.items()
               for row in rows}},
        differences={
            **{f"{row} - mopd-3to1": (row, "mopd-3to1") for row in ABLATION | ALONE | GRID
               if row != "mopd-3to1"},
            **{f"{row}-{factor} - mopd-3to1-{factor}": (f"{row}-{factor}", f"mopd-3to1-{factor}")
               for factor, (_, rows) in FACTORS.items() for row in rows if row != "mopd-3to1"},
            **{f"camopd-sgd - mopd-3to1-sgd-{lr}": ("camopd-sgd", f"mopd-3to1-sgd-{lr}")
               for lr in (0.04, 0.08)}},
        columns=RECOVERY_SETS,
        axes={"domain accuracy, %": ("domain",), "letters accuracy, %": ("letters",)},
        references=("generalist", "specialist"),
        pictured=("generalist", "specialist", *ABLATION, *ALONE),
        quick={"": dict(steps=8, eval_every=0), "generalist": dict(steps=100),
               "specialist": dict(steps=20)},
        expected={"full": {                                 # 5 seeds, 1 thread each, torch 2.13.0
            "generalist": [(100.0, 0.0), (100.0, 0.0), (100.0, 0.0), (3.9, 2.3), (7.9, 1.1)],
            "specialist": [(7.2, 1.5), (99.9, 0.2), (99.9, 0.2), (99.8, 0.4), (99.9, 0.2)],
            "mopd": [(22.8, 15.7), (100.0, 0.0), (97.9, 2.7), (98.7, 1.2), (6.6, 4.5)],
            "mopd-3to1": [(48.7, 34.5), (99.9, 0.2), (97.5, 3.6), (95.2, 4.6), (5.8, 1.2)],
            "no-selection": [(51.9, 33.0), (100.0, 0.0), (98.3, 2.6), (69.8, 28.7), (6.4, 1.7)],
            "no-alternation": [(54.7, 35.9), (99.9, 0.2), (97.0, 4.7), (83.2, 23.4), (6.6, 1.8)],
            "camopd": [(46.5, 30.2), (100.0, 0.0), (96.6, 4.3), (71.2, 28.8), (5.8, 1.1)],
            "alternation": [(42.8, 32.9), (100.0, 0.0), (97.3, 3.9), (83.6, 20.1), (7.9, 3.2)],
            "selection": [(45.1, 31.3), (100.0, 0.0), (96.5, 4.6), (97.0, 2.8), (5.4, 1.9)],
            "mopd-7to1": [(57.0, 38.4), (100.0, 0.0), (97.0, 6.0), (92.1, 14.0), (6.2, 2.4)],
            "focus": [(80.2, 21.8), (100.0, 0.0), (98.2, 2.7), (96.5, 6.0), (7.3, 1.2)],
        }}),
    "opcod-phys-chem": opcod("physics", "chemistry", rounds=2),
    "opcod-chem-mat": opcod("chemistry", "material", rounds=2),
    "opcod-mat-phys": opcod("material", "physics", rounds=5),
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
    tables.write_recipe(name, recipe, Path(os.path.relpath(ROOT / out)), seeds, form)


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
        values = [] if value is True else value if isinstance(value, list) else [value]
        argv += [f"--{flag}", *(fill(x, folder, seed) for x in values)]
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
