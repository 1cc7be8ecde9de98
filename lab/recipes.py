"""Recipes: a paper's or this project's table as data, a row of flags for every row of the table.

    python -m lab.recipes                          lists the recipes
    python -m lab.recipes small --seeds 5          runs one: OUT/results.json, report.md and pictures
    python -m lab.recipes many-faces --dry_run     says what it would run and what that would cost, no more

Every row of every seed is a run of opd.py of its own, in OUT/seed0/ROW and so on. What is finished is not run
again, and what was interrupted is resumed: the same command again continues.
"""
import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from config import Parser, Refused, nearest, number, one_line
from data.files import own, write_file
from losses import DIVERGENCES, SUPPORTS

from . import papers, tables
from .recipe import Recipe, hours

ROOT = Path(__file__).resolve().parent.parent
DONE = ("final", "report.md")           # what a row has that is done, the last of which a run writes last
CHILDREN = set()                        # processes of rows that are running


# What the recipes of the small worlds have in common.
SMALL = dict(seed="{seed}", dtype="float32", sample_batch=512, micro_tokens=16384)
TEACHERS = ["general={dir}/generalist/final", "domain={dir}/specialist/final"]


def world_prompts(general="general", domain="domain"):
    """Return --prompts of both branches, from these two files of a small world."""
    return [f"general={{dir}}/world/{general}.jsonl", f"domain={{dir}}/world/{domain}.jsonl"]


# ---- small: the story (data/small_world.py) ----------------------------------------------------------------

STUDENT = dict(student="{dir}/specialist/final", prompts=world_prompts(), steps=160, batch=64, lr=1e-4,
               warmup=10, lr_schedule="cosine", eval_every=40, save_every=80)
TAUGHT = STUDENT | dict(teachers=TEACHERS)
REFERENCES = dict(prompts=world_prompts("general_references", "domain_references"))

STORY = Recipe(
    about="The small world: a generalist forgets while it specialises. Every method has to recover the "
          "general skills and to keep the domain. sft, kd and gkd learn from references, which are few; "
          "there are four times as many prompts. covered: general skills with proxy prompts; uncovered: "
          "general skills without any. opd, mopd and camopd use the reverse KL over the full vocabulary, "
          "mopd-pg and camopd-pg the policy gradient of the sampled token. Accuracy in %, greedy.",
    prepare=["data.small_world", "{dir}/world", "--seed", "{seed}"],
    common=SMALL | dict(max_new_tokens=24, eval_prompts=[f"{name}={{dir}}/world/eval_{name}.jsonl"
                                                         for name in ("covered", "uncovered", "domain")]),
    rows={
        "generalist": dict(student="{dir}/world/init", prompts=["{dir}/world/generalist.jsonl"],
                           method="sft", optimizer="muon", lr=2e-3, lr_schedule="cosine", warmup=20,
                           steps=700, batch=128, save_every=350),
        "specialist": dict(student="{dir}/generalist/final", prompts=["{dir}/world/specialist.jsonl"],
                           method="sft", optimizer="muon", lr=1e-3, lr_schedule="cosine", warmup=20,
                           steps=250, batch=128, save_every=0),
        "sft": STUDENT | REFERENCES | dict(method="sft"),
        "kd": TAUGHT | REFERENCES | dict(method="kd"),
        "gkd": TAUGHT | REFERENCES | dict(method="gkd"),
        "seqkd": TAUGHT | dict(method="seqkd"),
        "opd": STUDENT | dict(method="opd", prompts=world_prompts()[:1], teachers=["{dir}/generalist/final"]),
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
    expected_seeds=5,
    expected={"full": {                                     # on 2 CPU cores, torch 2.13.0
        "generalist": [(95.2, 0.6), (96.7, 1.6), (46.2, 0.6)],
        "specialist": [(18.6, 3.8), (16.6, 6.5), (92.5, 2.3)],
        "sft": [(70.6, 2.8), (23.5, 7.5), (81.9, 3.8)],
        "kd": [(70.9, 2.8), (24.6, 8.4), (86.3, 2.6)],
        "gkd": [(70.2, 4.0), (24.2, 7.3), (86.2, 2.7)],
        "seqkd": [(81.7, 1.5), (26.2, 8.6), (87.6, 1.9)],
        "opd": [(83.1, 2.4), (26.9, 7.8), (70.0, 3.0)],
        "mopd": [(82.4, 2.3), (27.0, 7.7), (88.0, 1.8)],
        "camopd": [(80.5, 3.0), (24.4, 6.9), (87.7, 2.2)],
        "mopd-pg": [(72.3, 3.5), (22.4, 4.5), (87.6, 1.6)],
        "camopd-pg": [(72.5, 2.4), (23.2, 7.0), (86.2, 1.0)],
    }, "quick": {                                           # of one seed, so without a spread
        "generalist": [(46.7, None), (36.7, None), (20.0, None)],
        "specialist": [(14.6, None), (28.3, None), (40.8, None)],
        "sft": [(30.8, None), (29.6, None), (36.7, None)],
        "kd": [(35.8, None), (30.4, None), (41.2, None)],
        "gkd": [(29.6, None), (29.2, None), (40.8, None)],
        "seqkd": [(32.9, None), (28.7, None), (38.3, None)],
        "opd": [(34.2, None), (30.4, None), (37.9, None)],
        "mopd": [(30.8, None), (27.5, None), (40.8, None)],
        "camopd": [(27.9, None), (30.0, None), (40.4, None)],
        "mopd-pg": [(25.0, None), (28.7, None), (39.6, None)],
        "camopd-pg": [(19.6, None), (28.7, None), (37.9, None)],
    }},
    quick_prepare=["--generalist", "21000", "--specialist", "8000", "--evaluation", "240"],
)


# ---- small-objectives: every divergence, target and support ------------------------------------------------

SHORTER = STORY.quick | {"": dict(steps=8, eval_every=4, lr=5e-4)}
RKL = TAUGHT | dict(method="mopd", loss="rkl", eval_every=80)
OBJECTIVES = replace(
    STORY,
    about="Every divergence, target and support on the small world: mopd with both teachers, 160 updates of "
          "64 completions, at the papers' knobs. Behind the divergences: rkl and fkl towards Veto's and "
          "TAID's targets, fkl with entries clipped at 0.05, and rkl on the 3 largest of 81 entries. Entropy "
          "(nats), agreement of the likeliest token (%), repeated 3-grams (%) and the size of the gradient "
          "are means of the last 16 steps. Accuracy in %, greedy.",
    rows={
        "generalist": STORY.rows["generalist"],
        "specialist": STORY.rows["specialist"],
        **{loss: RKL | dict(loss=loss) for loss in (*DIVERGENCES, "pg")},
        "rkl-veto": RKL | dict(target="veto"),
        "fkl-veto": RKL | dict(loss="fkl", target="veto"),
        "rkl-taid": RKL | dict(target="taid"),
        "fkl-taid": RKL | dict(loss="fkl", target="taid"),
        "fkl-clipped": RKL | dict(loss="fkl", entry_clip=0.05),
        **{support: RKL | dict(support=support, top_k=3) for support in SUPPORTS
           if support.startswith(("student", "teacher")) or support.endswith("renorm")},
    },
    quick=SHORTER,
    ends={"entropy_s": ("entropy", 1), "top1_agree": ("agreement", 100), "repeated": ("repeated", 100),
          "grad_norm": ("gradient", 1)},
    expected={}, expected_seeds=0,
)


# ---- small-all: every method (data/small_all.py) -----------------------------------------------------------

ALL_PROMPTS = STUDENT | dict(save_every=40)
ALL_TAUGHT = ALL_PROMPTS | dict(teachers=TEACHERS)
EIGHT = dict(batch=8, rollouts=8)                               # 64 completions, as batch 64 with one each
REWARDED = ALL_PROMPTS | EIGHT | dict(lr=3e-5)
HALF = dict(batch=32)                                           # 32 pairs, or 32 prompts of two teachers
TOLD = dict(templates="{dir}/world/templates.json")
RATIONALES = dict(prompts=world_prompts("general_rationales", "domain_rationales"))

SMALL_ALL = replace(
    STORY,
    about="Every method on the small world: the same student, the specialist, makes 160 updates of 64 "
          "completions each (32 pairs in apt and sai_dpo, at most 8 in dpo). The learning rate is 1e-4, for "
          "what learns from rewards (grpo, dpo, sdpo, opcod) 3e-5 and for apt and sai_dpo 1e-5: at 1e-4 they "
          "lose the domain. sft, kd, okd, gkd, compact, apt and opsd learn from references, which are "
          "few; star, grpo, dpo, sai_dpo, sdpo and opcod know the answers of four times as many prompts; the "
          "others need neither. Both teachers have also learned to read a told answer and to correct a "
          "response. opd has the general teacher alone. opcod's peer is the generalist, which learns, too: "
          "its tokens and minutes are both students'. Accuracy in %, greedy.",
    prepare=["data.small_all", "{dir}/world", "--seed", "{seed}"],
    rows={
        "generalist": STORY.rows["generalist"],
        "specialist": STORY.rows["specialist"],
        "sft": ALL_PROMPTS | REFERENCES | dict(method="sft"),
        "seqkd": ALL_TAUGHT | dict(method="seqkd"),
        "kd": ALL_TAUGHT | REFERENCES | dict(method="kd"),
        "gkd": ALL_TAUGHT | REFERENCES | dict(method="gkd"),
        "okd": ALL_TAUGHT | REFERENCES | dict(method="okd"),
        "compact": ALL_TAUGHT | REFERENCES | HALF | dict(method="compact"),
        "compact-misled": ALL_TAUGHT | RATIONALES | HALF | dict(method="compact"),
        "opd": ALL_PROMPTS | dict(method="opd", prompts=world_prompts()[:1],
                                  teachers=["{dir}/generalist/final"]),
        "mopd": ALL_TAUGHT | dict(method="mopd", loss="rkl"),
        "camopd": ALL_TAUGHT | dict(method="camopd", loss="rkl"),
        "focus": ALL_TAUGHT | dict(method="focus", loss="rkl"),
        "grpo": REWARDED | dict(method="grpo"),
        "dpo": REWARDED | dict(method="dpo", renew_every=40),
        "apt": ALL_PROMPTS | REFERENCES | HALF | dict(method="apt", lr=1e-5),
        "sai_dpo": ALL_PROMPTS | HALF | dict(method="sai_dpo", lr=1e-5, probe=320),
        "star": ALL_PROMPTS | TOLD | dict(method="star"),
        "opsd": ALL_PROMPTS | REFERENCES | TOLD | dict(method="opsd", loss="jsd", entry_clip=0,
                                                       temperature=1),      # its defaults when measured
        "sdpo": REWARDED | TOLD | dict(method="sdpo"),
        "opcod": REWARDED | TOLD | dict(
            method="opcod", student=["{dir}/generalist/final", "{dir}/specialist/final"], rounds=4,
            no_anchor=True, val_prompts=world_prompts("val_general", "val_domain"), feedback_tokens=24,
            eval_every=80),
    },
    quick=SHORTER,
    expected_seeds=4,
    expected={"full": {                                     # 1 thread each, torch 2.13.0
        "generalist": [(86.0, 3.2), (84.9, 6.9), (45.2, 1.2)],
        "specialist": [(29.0, 2.4), (16.8, 5.8), (86.6, 4.5)],
        "sft": [(69.4, 2.3), (26.0, 3.8), (71.6, 2.8)],
        "seqkd": [(77.1, 1.8), (27.0, 4.2), (79.8, 3.4)],
        "kd": [(70.4, 2.7), (26.5, 4.8), (79.3, 2.9)],
        "gkd": [(70.1, 2.4), (26.1, 4.1), (79.5, 2.3)],
        "okd": [(70.2, 2.5), (25.9, 4.0), (71.9, 1.8)],
        "compact": [(69.3, 2.6), (26.5, 4.9), (72.6, 2.7)],
        "compact-misled": [(69.1, 2.6), (26.5, 4.7), (71.6, 2.4)],
        "opd": [(79.4, 2.5), (26.0, 3.9), (64.1, 3.3)],
        "mopd": [(78.1, 2.0), (27.9, 3.9), (81.8, 3.7)],
        "camopd": [(76.6, 2.4), (24.3, 3.4), (80.0, 2.9)],
        "focus": [(77.1, 1.2), (25.4, 3.5), (80.6, 4.3)],
        "grpo": [(49.9, 5.7), (21.5, 3.7), (85.2, 4.4)],
        "dpo": [(46.6, 6.7), (21.2, 4.3), (84.0, 4.6)],
        "apt": [(57.4, 4.0), (21.4, 4.3), (78.9, 2.1)],
        "sai_dpo": [(44.6, 8.3), (22.2, 5.1), (79.2, 3.5)],
        "star": [(64.6, 6.6), (24.1, 4.1), (81.6, 2.4)],
        "opsd": [(41.1, 8.3), (16.9, 6.0), (75.2, 2.3)],
        "sdpo": [(31.0, 7.6), (16.4, 10.1), (83.8, 4.0)],
        "opcod": [(30.7, 8.2), (17.1, 11.8), (83.8, 3.9)],
    }},
    spent=True,
    second=("opcod",),
)


# ---- small-opcod: OPCoD in miniature (data/small_peers.py) -------------------------------------------------

PEERS = ("letters", "chemistry")


def peer_files(prefix=""):
    """Return the files of both domains that begin with this prefix."""
    return [f"{domain}={{dir}}/world/{prefix}{domain}.jsonl" for domain in PEERS]


PEER_SFT = dict(method="sft", optimizer="muon", lr_schedule="cosine", batch=128, save_every=0)
PEER_GRPO = dict(method="grpo", prompts=peer_files(), steps=60, batch=16, rollouts=8, lr=3e-4, warmup=5,
                 save_every=60, eval_every=20)
PEER_SDPO = PEER_GRPO | dict(method="sdpo", templates="{dir}/world/templates.json")
PEER_OPCOD = PEER_SDPO | dict(
    method="opcod", student=["{dir}/specialist-1/final", "{dir}/specialist-2/final"], rounds=3,
    val_prompts=peer_files("val_"), gate_rollouts=4, feedback_tokens=16)

SMALL_OPCOD = Recipe(
    about="OPCoD in miniature: two students of 0.6 M parameters learn on the prompts of two domains. Student "
          "1 is a specialist in letters, student 2 in chemistry. There are no solutions, and every student "
          "makes 60 updates. tau is the largest cognizance gap with which a student may tutor, 0.2 unless "
          "stated. Accuracy in %, mean of 4 completions at temperature 0.6.",
    prepare=["data.small_peers", "{dir}/world", "--seed", "{seed}"],
    common=SMALL | dict(max_new_tokens=16, eval_prompts=peer_files("eval_"), eval_rollouts=4,
                        eval_temperature=0.6),
    rows={
        "base": PEER_SFT | dict(student="{dir}/world/init", prompts=["{dir}/world/base.jsonl"], lr=4e-3,
                                warmup=20, steps=350),
        **{f"specialist-{i}": PEER_SFT | dict(student="{dir}/base/final", lr=1e-3, warmup=10, steps=80,
                                              prompts=[f"{{dir}}/world/specialist{i}.jsonl"])
           for i in (1, 2)},
        **{f"grpo-{i}": PEER_GRPO | dict(student=f"{{dir}}/specialist-{i}/final") for i in (1, 2)},
        **{f"sdpo-{i}": PEER_SDPO | dict(student=f"{{dir}}/specialist-{i}/final") for i in (1, 2)},
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
    expected_seeds=6,
    expected={"full": {                                     # 1 thread each, torch 2.13.0
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
)


# ---- small-camopd: when does CaMOPD help? (data/small_recovery.py) -----------------------------------------

RECOVERY_SETS = {"letters": "letters (to recover)", "greek": "greek", "uncovered": "uncovered",
                 "domain": "domain (to keep)", "unmarked": "unmarked"}
RECOVERY = dict(student="{dir}/specialist/final", steps=120, batch=64, lr=1e-4, warmup=5, eval_every=40,
                save_every=0, prompts=world_prompts(), teachers=TEACHERS, diagnose_every=40)
MIXED = RECOVERY | dict(method="mopd", loss="rkl")                      # CaMOPD's table 3: w/o dec
FULL = RECOVERY | dict(method="camopd", loss="rkl", schedule="3:1", mass=[0.8], scale=["general=2"])
UNDIAGNOSED = FULL | dict(diagnose_every=0)

ABLATION = {                            # CaMOPD's table 3, and selection without alternation
    "mopd": MIXED,
    "mopd-3to1": MIXED | dict(mixture="3:1"),
    "no-selection": FULL | dict(mass=[1]),
    "no-alternation": FULL | dict(schedule="mixed", mixture="3:1"),
    "camopd": FULL}
SINGLE_PARTS = {                        # each part alone (pooled selection moves the shares), and more
    "alternation": FULL | dict(mass=[1], scale=[1]),
    "selection": FULL | dict(schedule="mixed", mixture="3:1", scale=[1]),
    "mopd-7to1": MIXED | dict(mixture="7:1"),
    "focus": MIXED | dict(method="focus", mixture="3:1", focus=0.5)}    # ours
GRID = {row: UNDIAGNOSED | flags for row, flags in papers.TABLE_7.items()}     # CaMOPD's figure 4

SCALED = ("mopd-3to1", "alternation", "no-selection", "camopd")         # the middle two differ in the scale
CONDITIONS = {                          # name -> (the flags that differ under it, the rows that are run)
    "pg": (dict(loss="pg", lr=3e-4), (*ABLATION, "focus")),
    "conflict": (dict(prompts=world_prompts(domain="conflict")), (*ABLATION, "focus")),
    "broad": (dict(prompts=world_prompts("broad")), ("mopd-3to1", "camopd", "focus")),
    "few": (dict(prompts=world_prompts(domain="few")), ("mopd-3to1", "camopd")),
    "batch16": (dict(batch=16, diagnose_rollouts=64), ("mopd-3to1", "camopd")),
    "muon": (dict(optimizer="muon", lr=2e-4), SCALED),
    "sgd": (dict(optimizer="sgd", lr=0.02, grad_clip=0), SCALED),
    **{f"sgd-{lr}": (dict(optimizer="sgd", lr=lr, grad_clip=0), ("mopd-3to1",)) for lr in (0.04, 0.08)}}
CONDITION_ROWS = {f"{row}-{name}": (ABLATION | SINGLE_PARTS)[row] | flags
                  for name, (flags, rows) in CONDITIONS.items() for row in rows}


def recovery_differences():
    """Return what is compared: every row with mopd-3to1 under the same condition, and SGD at other rates."""
    found = {}
    for row in ABLATION | SINGLE_PARTS | GRID:
        if row != "mopd-3to1":
            found[f"{row} - mopd-3to1"] = (row, "mopd-3to1")
    for name, (_, rows) in CONDITIONS.items():
        for row in rows:
            if row != "mopd-3to1":
                found[f"{row}-{name} - mopd-3to1-{name}"] = (f"{row}-{name}", f"mopd-3to1-{name}")
    for lr in (0.04, 0.08):
        found[f"camopd-sgd - mopd-3to1-sgd-{lr}"] = ("camopd-sgd", f"mopd-3to1-sgd-{lr}")
    return found


SMALL_CAMOPD = Recipe(
    about="When does CaMOPD help? Its ablation (table 3), its grid of schedule, scale and mass (figure 4), "
          "and the ablation with other losses, prompts, batches and optimizers, in a world of long noisy "
          "completions whose proxy prompts the specialist mostly solves. Every row has 120 steps of 64 "
          "rollouts, the reverse KL and AdamW unless its name says otherwise; another loss or optimizer has "
          "a learning rate of its own. Differences are paired by seed, with 95% intervals by Student's t, of "
          "which one in twenty misses by chance. Accuracy in %, greedy.",
    prepare=["data.small_recovery", "{dir}/world", "--seed", "{seed}"],
    common=SMALL | dict(max_new_tokens=24, eval_prompts=[f"{name}={{dir}}/world/eval_{name}.jsonl"
                                                         for name in RECOVERY_SETS]),
    rows={
        "generalist": dict(student="{dir}/world/init", prompts=["{dir}/world/generalist.jsonl"],
                           method="sft", optimizer="muon", lr=5e-3, lr_schedule="cosine", warmup=20,
                           steps=320, batch=128, save_every=0),
        "specialist": dict(student="{dir}/generalist/final", prompts=["{dir}/world/specialist.jsonl"],
                           method="sft", lr=1e-3, lr_schedule="cosine", warmup=10, steps=100, batch=128,
                           save_every=0),
        **ABLATION, **SINGLE_PARTS, **GRID, **CONDITION_ROWS},
    differences=recovery_differences(),
    columns=RECOVERY_SETS,
    axes={"domain accuracy, %": ("domain",), "letters accuracy, %": ("letters",)},
    references=("generalist", "specialist"),
    pictured=("generalist", "specialist", *ABLATION, *SINGLE_PARTS),
    quick={"": dict(steps=8, eval_every=0), "generalist": dict(steps=100), "specialist": dict(steps=20)},
    expected_seeds=5,
    expected={"full": {                                     # 1 thread each, torch 2.13.0
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
    }},
)


# ---- assistant: a pretrained model (data/assistant.py) -----------------------------------------------------

ASSISTANT = dict(student="{dir}/domain/final", steps=120, eval_every=40,
                 teachers=["general={dir}/world/model", "domain={dir}/domain/final"],
                 prompts=["general={dir}/world/general.jsonl", "domain={dir}/world/domain.jsonl"])
ONE_TEACHER = ASSISTANT | dict(teachers="{dir}/world/model", prompts="{dir}/world/general.jsonl")
BEHIND_SEQKD = ASSISTANT | dict(student="{dir}/seqkd-half/final", steps=60)
ASSISTANT_ROWS = {
    "seqkd": ASSISTANT | dict(method="seqkd"),
    "seqkd-half": ASSISTANT | dict(method="seqkd", steps=60),
    "seqkd-then-rkl": BEHIND_SEQKD | dict(method="mopd", loss="rkl"),
    "mopd-rkl": ASSISTANT | dict(method="mopd", loss="rkl"),
    "mopd-fkl": ASSISTANT | dict(method="mopd", loss="fkl"),
    "mopd-pg": ASSISTANT | dict(method="mopd"),
    "camopd-fkl": ASSISTANT | dict(method="camopd", loss="fkl"),
    "camopd-pg": ASSISTANT | dict(method="camopd"),
    "opd-fkl": ONE_TEACHER | dict(method="opd", loss="fkl"),
    "mopd-jeffreys": ASSISTANT | dict(method="mopd", loss="jeffreys"),
    "mopd-fkl-3to1": ASSISTANT | dict(method="mopd", loss="fkl", mixture="3:1"),
    "focus-fkl": ASSISTANT | dict(method="focus", loss="fkl"),
    "seqkd-then-pg": BEHIND_SEQKD | dict(method="mopd"),
    "seqkd-then-camopd": BEHIND_SEQKD | dict(method="camopd", loss="rkl"),
}
ASSISTANT_RECIPE = Recipe(
    about="CaMOPD's question on a pretrained chat model: SmolLM2-135M-Instruct is specialised in parsing "
          "requests to a voice assistant, after which it answers everything in JSON. Every row starts from "
          "it and tries to get the chat model back and to keep the parser. The divergence is a factor beside "
          "the method: where the student is certain of a wrong first token, only what weighs by the "
          "teacher's probability pulls it away. Rows with 'then' make their first half by seqkd. Parser: "
          "slot F1 on held-out requests, in %. Prose: share of held-out questions that are not answered in "
          "JSON, in %. Greedy, at most 64 tokens.",
    prepare=["data.assistant", "{dir}/world", "--seed", "{seed}"],
    common=dict(seed="{seed}", batch=16, lr=5e-5, warmup=3, max_new_tokens=64, save_every=0,
                micro_tokens=2048, eval_prompts=["parser={dir}/world/eval_domain.jsonl",
                                                 "prose={dir}/world/eval_general.jsonl"]),
    rows={"domain": dict(student="{dir}/world/model", prompts=["{dir}/world/domain.jsonl"], method="sft",
                         lr=2e-4, lr_schedule="cosine", warmup=5, steps=120),
          **ASSISTANT_ROWS},
    columns={"parser": "parser, slot F1", "prose": "answers in prose"},
    axes={"parser, slot F1, %": ("parser",), "answers in prose, %": ("prose",)},
    references=("domain",),
    quick={"": dict(steps=30, eval_every=15, save_every=15), "domain": dict(save_every=30),
           **{row: dict(steps=15, eval_every=15) for row, flags in ASSISTANT_ROWS.items()
              if flags["steps"] == 60}},
    expected={"quick": {                                    # one seed, 2 CPU cores; the other rows: not run
        "domain": [(90.7, None), (0.0, None)],
        "seqkd": [(84.8, None), (95.8, None)],
        "seqkd-half": [(84.0, None), (70.8, None)],
        "seqkd-then-rkl": [(86.4, None), (95.8, None)],
        "mopd-rkl": [(84.9, None), (0.0, None)],
        "mopd-fkl": [(81.5, None), (68.8, None)],
        "mopd-pg": [(74.5, None), (0.0, None)],
    }},
)


# ---- context: a habit instead of examples ------------------------------------------------------------------

HABIT = dict(student="{dir}/world/model", method="context", prompts=["{dir}/world/context.jsonl"], steps=60)
CONTEXT = Recipe(
    about="On-policy context distillation (OPCD) on SmolLM2-135M-Instruct. The teacher is the model itself, "
          "which sees seven requests to a voice assistant answered in JSON before each request; the student "
          "sees the request alone. JSON: share of held-out requests that the student answers in one line of "
          "JSON, in %. Prose: share of general questions that it goes on to answer in prose, in %: what was "
          "not asked for. Greedy, at most 48 tokens.",
    prepare=ASSISTANT_RECIPE.prepare,
    common=dict(seed="{seed}", batch=16, lr=5e-5, warmup=3, max_new_tokens=48, micro_tokens=2048,
                save_every=15, eval_every=15, eval_prompts=["json={dir}/world/eval_context.jsonl",
                                                            "prose={dir}/world/eval_general.jsonl"]),
    rows={"rkl": HABIT, "fkl": HABIT | dict(loss="fkl"), "jsd": HABIT | dict(loss="jsd")},
    columns={"json": "requests answered in JSON", "prose": "questions answered in prose"},
    axes={"questions answered in prose, %": ("prose",), "requests answered in JSON, %": ("json",)},
    references=(),
    quick={"": dict(steps=30)},
)


RECIPES = {
    "small": STORY,
    "small-all": SMALL_ALL,
    "small-objectives": OBJECTIVES,
    "small-opcod": SMALL_OPCOD,
    "small-camopd": SMALL_CAMOPD,
    "assistant": ASSISTANT_RECIPE,
    "context": CONTEXT,
    **papers.RECIPES,
}


# ---- running a recipe --------------------------------------------------------------------------------------

def run_recipe(name, out, seeds, quick, jobs=1):
    """Run what is missing of seeds 0 .. seeds - 1, `jobs` seeds at a time; then print and write the table."""
    recipe, form = RECIPES[name], "quick" if quick else "full"
    try:
        out = Path(out).resolve() if out else ROOT / "runs" / (f"{name}-quick" if quick else name)
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise Refused(f"--out {out} cannot be made a folder ({getattr(error, 'strerror', error)})") from None
    lock = own(out)                                     # until this function ends
    out = Path(os.path.relpath(out, ROOT))              # the rows run in ROOT, and their settings name it
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool, stop = ThreadPoolExecutor(jobs), threading.Event()
    running = [pool.submit(run_seed, recipe, out / f"seed{seed}", seed, form, threads, stop)
               for seed in range(seeds)]
    for seed in running:                                # at once, before its thread takes the next seed
        seed.add_done_callback(lambda seed: seed.cancelled() or seed.exception() and stop.set())
    try:
        for done in as_completed(running):
            done.result()
    finally:
        stop.set()                                      # a failed row, or Ctrl-C, ends the other seeds too
        pool.shutdown(cancel_futures=True)
        lock.close()
    tables.write_recipe(name, recipe, Path(os.path.relpath(ROOT / out)), seeds, form)


def run_seed(recipe, folder, seed, form, threads, stop):
    """Run the rows of one seed in order, until `stop` is set. A row that is finished is not run again."""
    if stop.is_set():
        return
    quick, prepared = form == "quick", ROOT / folder / "prepared"
    if not prepared.exists():
        prepared.parent.mkdir(parents=True, exist_ok=True)
        if recipe.prepare:
            command = ["-m", *(substitute(word, folder, seed) for word in recipe.prepare)]
            run_child(command + (recipe.quick_prepare if quick else []), "data", folder, threads)
        write_file(prepared, form)
    if prepared.read_text() != form:
        raise Refused(f"{ROOT / folder} holds the {prepared.read_text()} form of this recipe; choose another "
                      "--out")
    for number, row in enumerate(recipe.rows, 1):
        if not stop.is_set() and not all((ROOT / folder / row / name).exists() for name in DONE):
            run_child(["opd.py", *arguments(recipe, row, folder, seed, quick)], row, folder, threads,
                      f"({number}/{len(recipe.rows)})")
            if found := tables.read_finished(ROOT / folder / row):
                scores = [f"{name} {100 * score:.1f}" for name, score in found[1][-1][1].items()]
                print(f"{folder.name}: {row} in %: {', '.join(scores)}", flush=True)


def arguments(recipe, row, folder, seed, quick):
    """Return the command line of one row."""
    flags = recipe.common | recipe.rows[row]
    if quick:
        flags |= recipe.quick.get(row, recipe.quick[""])
    words = ["--out", str(folder / row), "--resume"]
    for flag, value in flags.items():
        words.append(f"--{flag}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [substitute(x, folder, seed) for x in values]
    return words


def substitute(value, folder, seed):
    """Return a flag's value as a word of the command line, with its {dir} and {seed} filled in."""
    return value.format(dir=folder, seed=seed) if isinstance(value, str) else str(value)


def pass_on(number, frame):
    """Handle Ctrl-C and SIGTERM: the rows get them too, and stop after their step with a checkpoint."""
    for child in list(CHILDREN):
        child.send_signal(number)
    raise KeyboardInterrupt


def run_child(command, row, folder, threads, position=""):
    """Run Python with these arguments in a process of its own.

    Its lines go to FOLDER/ROW.log, its progress bar and its errors to the terminal.
    """
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    log = ROOT / folder / f"{row}.log"
    print(f"{folder.name}: {row} {position}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with open(log, "a") as lines:
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=lines, stdin=subprocess.DEVNULL,
                                 env=environment, start_new_session=True)   # signals come by pass_on only
    CHILDREN.add(child)
    code = child.wait()
    CHILDREN.remove(child)
    if code:
        raise Refused(f"{folder.name}: {row} ended with exit code {code} (its output: "
                      f"{os.path.relpath(log)}); the same command again continues")


# ---- what a recipe would do and cost -----------------------------------------------------------------------

def describe(name, seeds, quick):
    """Print a recipe without running it: deviations, data, every row's command, cost and expected numbers."""
    recipe, form, folder = RECIPES[name], "quick" if quick else "full", Path("runs") / name / "seed0"
    paragraph = lambda text: print(textwrap.fill(text, 110, subsequent_indent="  ", replace_whitespace=False,
                                                 break_on_hyphens=False))
    command = lambda *words: print(f"  {shlex.join(words)}")
    paragraph(f"{name}: {recipe.about}")
    for deviation in recipe.deviations:
        paragraph(f"- {deviation}")
    if recipe.prepare:
        print("\ndata, once per seed")
        command("python", "-m", *(substitute(word, folder, 0) for word in recipe.prepare),
                *(recipe.quick_prepare if quick else []))
    headings = [*tables.table_columns(recipe).values(), *recipe.elsewhere]
    for row in recipe.rows:
        print(f"\n{row}: {cost(recipe, row)}")
        command("python", "opd.py", *arguments(recipe, row, folder, 0, quick))
    for row, cells in recipe.expected.get(form, {}).items():
        known = [f"{heading} {tables.mean_cell(*cell)}" for heading, cell in zip(headings, cells)
                 if cell[0] is not None]
        paragraph(f"\n{recipe.expected_label}, {row}: {'; '.join(known)}")
    for heading, needs in recipe.elsewhere.items():
        print(f"not measured here: {heading}, {needs}")
    paragraph(f"\n{seeds} seed(s): {total_cost(recipe, seeds)}. Predicted, not measured, for the full form "
              "on one 80 GB H100, prompts and completions at full length. Once a row's models can be reached "
              "its command with --dry_run --device cuda says more, and its memory by part.")


def cost(recipe, row):
    """Return the predicted hours and memory of a row, in words."""
    time, gib = hours(recipe, row), recipe.gib.get(row)
    if time is None:
        return "cost not predicted"
    return f"at most {math.ceil(10 * time) / 10:.1f} h{gib and f', {gib:.0f} GiB' or ''}"


def total_cost(recipe, seeds=1):
    """Return the predicted hours and the largest memory of all rows, in words."""
    times = [hours(recipe, row) for row in recipe.rows]
    if None in times:
        return "not predicted"
    return f"at most {math.ceil(seeds * sum(times))} h, {max(recipe.gib.values(), default=0):.0f} GiB"


# ---- the command line --------------------------------------------------------------------------------------

def parse(argv):
    """Return the command line's values. An unknown recipe is refused with the name that is nearest to it."""
    count = number(int, least=1, most=1000)
    parser = Parser(prog="python -m lab.recipes", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe; without one, all are listed")
    parser.add_argument("--out", metavar="DIR", help="folder to write to; default: runs/NAME, or "
                                                     "runs/NAME-quick with --quick")
    parser.add_argument("--seeds", type=count, default=1, metavar="N",
                        help="run seeds 0 .. N - 1; the table shows mean and spread (default: 1)")
    parser.add_argument("--quick", action="store_true", help="run a short form of every row")
    parser.add_argument("--dry_run", action="store_true",
                        help="print data, commands, predicted cost and expected numbers; run nothing")
    parser.add_argument("--jobs", type=count, default=1, metavar="N",
                        help="run this many seeds at the same time (default: 1)")
    args = parser.parse_args(argv)
    if args.out == "":
        raise Refused("--out '' names no folder")
    if args.name is not None and args.name not in RECIPES:
        raise Refused(f"unknown recipe {args.name}; {nearest(args.name, RECIPES)}")
    if args.name is None and args != parser.parse_args([]):
        raise Refused(f"these flags need a recipe's name; there are: {', '.join(RECIPES)}")
    return args


def list_recipes():
    """Return a line per recipe: rows, seeds of its expected numbers, predicted cost of a seed, what it is."""
    lines = [f"{'recipe':<17}{'rows':>4}  {'expected':<11}{'predicted cost':<25}about"]
    for name, recipe in RECIPES.items():
        paper = "a paper's" if "full" in recipe.expected else ""
        seeds = f"{recipe.expected_seeds} seeds" if recipe.expected_seeds else paper
        about = textwrap.shorten(recipe.about, 50, placeholder=" ..")
        lines.append(f"{name:<17}{len(recipe.rows):>4}  {seeds:<11}{total_cost(recipe):<25}{about}")
    return "\n".join(lines)


def main(argv=None):
    """Run a recipe, or list them all. What cannot work ends the program with one line."""
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        args = parse(argv)
        if args.name is None:
            print(list_recipes())
        elif args.dry_run:
            describe(args.name, args.seeds, args.quick)
        else:
            run_recipe(args.name, args.out, args.seeds, args.quick, args.jobs)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lab.recipes: {one_line(str(error))}") from None
    except KeyboardInterrupt:
        raise SystemExit("lab.recipes: interrupted; the same command again continues where it was") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
