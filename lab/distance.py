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
import time
from pathlib import Path

import torch

import models
from config import Refused, first_line, parse
from data.prompts import load_prompts
from kernels import linear_divergence
from methods import METHODS
from text import read_models


def distances(teacher, student, prompts, tokens, device):
    """Return {"KL(q||p)", "KL(p||q)"}, nats per token. prompts: a prompt file; tokens: the longest answer."""
    nowhere = f"{tempfile.gettempdir()}/opd-distance-{os.getpid()}"         # nothing is written
    words = ["--student", student, "--teachers", teacher, "--prompts", prompts, "--method", "opd", "--out",
             nowhere, *(["--device", device] if device else [])]
    cfg = parse(words, "", METHODS)
    cfg.today = time.strftime("%Y-%m-%d")
    (reader,), readers = read_models(cfg, teacher_learns=False)
    p, q = models.load(reader, cfg), models.load(readers[cfg.teachers["main"]], cfg)
    rows = [row["prompt"] for row in load_prompts(prompts, "main")]
    seen = {model: [model.encode(prompt) for prompt in rows] for model in (p, q)}
    torch.manual_seed(0)
    said = q.generate(seen[q], 0.0, 1.0, tokens, rows=32)
    own = p.generate(seen[p], 1.0, 1.0, tokens, rows=32)
    return {"KL(q||p)": divergence("fkl", p, q, seen, said), "KL(p||q)": divergence("rkl", p, q, seen, own)}


@torch.no_grad()
def divergence(loss, p, q, seen, completions):
    """Return the mean of a divergence over all tokens of some completions [(ids_T, ..)]."""
    total, count = 0.0, 0
    for i, (ids_T, _) in enumerate(completions):
        hidden_NH, hidden_t_NH = (model.hidden_states([seen[model][i]], [ids_T]) for model in (p, q))
        value, _ = linear_divergence(hidden_NH, p.head_VH, hidden_t_NH, q.head_VH, divergence=loss,
                                     vocab=p.vocab, softcap_s=p.softcap, softcap_t=q.softcap)
        total, count = total + value.item(), count + len(ids_T)
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
