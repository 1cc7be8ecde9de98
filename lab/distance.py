"""How far is a model from its teacher? The two KL divergences on held-out prompts, in nats per token.

    python -m lab.distance --teacher G --students RUN/final .. --prompts held_out.jsonl

KL(q || p), on the teacher's own greedy answers, is what forward KL minimises: does the student expect what
the teacher says? KL(p || q), on the student's own samples, is what reverse KL minimises: would the teacher
say what the student says? Means over all tokens of all answers, so long answers count more.
"""
import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

import opd
from config import Refused, first_line
from kernels import linear_divergence
from losses import LOSSES
from methods import Job
from opd import micro_batches


def distances(teacher, student, prompts, tokens, device):
    """Return {"KL(q||p)", "KL(p||q)"}, nats per token. prompts: a prompt file; tokens: the longest answer."""
    nowhere = f"{tempfile.gettempdir()}/opd-distance-{os.getpid()}"         # nothing is written
    words = ["--student", student, "--teachers", teacher, "--prompts", prompts, "--method", "opd", "--batch",
             "1", "--max_new_tokens", str(tokens), "--drop_long", "--out", nowhere]
    run = opd.Run(opd.configure(words + (["--device", device] if device else [])))
    rows = run.prompts["main"]
    torch.manual_seed(run.cfg.seed)
    said = run.sample(run.teacher, rows, n=1, temperature=0.0)
    own = run.sample(run.student, rows, n=1)
    return {"KL(q||p)": divergence(run, said, "fkl"), "KL(p||q)": divergence(run, own, "rkl")}


@torch.no_grad()
def divergence(run, rollouts, loss):
    """Return the mean of a divergence of student and teacher over all tokens of some rollouts."""
    job = Job(run.student, run.teacher, [run.rollout(r.prompt, r.ids_T) for r in rollouts], LOSSES[loss])
    run.score([job], gaps=False)
    head_t_VH, total, count = run.teacher.head_VH.to(run.student.device), 0.0, 0
    lengths = {i: len(r.prompt_ids) + len(r.ids_T) for i, r in enumerate(job.rollouts)}
    for group in micro_batches(lengths, run.cfg.micro_tokens):
        some = [job.rollouts[i] for i in group]
        hidden_NH = run.student.hidden_states([r.prompt_ids for r in some], [r.ids_T for r in some])
        hidden_t_NH = torch.cat([job.hidden_t[i] for i in group]).to(hidden_NH.device)
        value, _ = linear_divergence(hidden_NH, run.student.head_VH, hidden_t_NH, head_t_VH, divergence=loss,
                                     vocab=run.student.vocab, softcap_s=run.student.softcap,
                                     softcap_t=run.teacher.softcap)
        total, count = total + value.item(), count + len(hidden_NH)
    return total / count


def main(argv=None):
    """Print a table, a line per student."""
    parser = argparse.ArgumentParser(prog="python -m lab.distance", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="PATH")
    parser.add_argument("--students", required=True, nargs="+", metavar="PATH")
    parser.add_argument("--prompts", required=True, metavar="FILE")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N")
    parser.add_argument("--device", metavar="NAME")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON, too")
    args = parser.parse_args(argv)
    found = {}
    try:
        for student in args.students:
            found[student] = distances(args.teacher, student, args.prompts, args.max_new_tokens, args.device)
            numbers = "  ".join(f"{name} {x:.3f}" for name, x in found[student].items())
            print(f"{student:<40} {numbers}", flush=True)
    except (Refused, OSError, ValueError) as error:
        raise SystemExit(f"lab.distance: {first_line(error)}") from None
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
