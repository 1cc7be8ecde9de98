"""A paired comparison of two runs on the questions that both have answered, from their eval.jsonl.

    python -m lab.compare RUN_A RUN_B [--step N] [--out compare.png]

A run is also the folder of `opd.py --eval_only`. Each is taken as it was last evaluated, or after --step
updates. The sets that both have are compared, and they must ask the same questions: the content counts, not
the file. The difference of the means, B - A, has a 95% interval by the bootstrap: questions are drawn with
replacement, each with both runs' rewards. Where each run has one completion per question, McNemar's exact
test says how probable it is that the questions on which only one of them is right (reward 1) are divided so
unevenly, or more so, by chance.
"""
import argparse
import math
from pathlib import Path

import numpy

from config import AMOUNT, Parser, Refused

from .report import pyplot, read_answers, save_figure

RESAMPLES = 10_000


def answers(out, step=None):
    """Return (updates done, {set: {(row, question): rewards}}) of an evaluation; step None: of the last."""
    found = read_answers(out)
    if not found:
        raise Refused(f"{out} has no evaluation in an eval.jsonl; runs with --eval_prompts have one")
    step = max(found) if step is None else step
    if step not in found:
        raise Refused(f"{out} was not evaluated after step {step}, only after: "
                      f"{', '.join(map(str, sorted(found)))}")
    return step, {name: {(r["row"], r["question"]): r["rewards"] for r in some}
                  for name, some in found[step].items()}


def pairs(a, b, names):
    """Return {set: (A's rewards, B's rewards), two lists per question} of two runs' answers.

    names: both runs' folders, for messages.
    """
    common = [name for name in a if name in b]
    if not common:
        raise Refused(f"no set is in both: {names[0]} has {', '.join(a)}, {names[1]} has {', '.join(b)}")
    for name in common:
        if other := a[name].keys() ^ b[name].keys():
            raise Refused(f"{name}: {names[0]} and {names[1]} were asked different questions, first in row "
                          f"{min(other)[0]}, {len(a[name])} and {len(b[name])} in all")
    return {name: ([a[name][key] for key in a[name]], [b[name][key] for key in a[name]]) for name in common}


def mcnemar(only_a, only_b):
    """Return the exact two-sided p-value of so many questions on which only A, and only B, is right."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap(differences, seed=0):
    """Return the ends of the 95% percentile interval of the mean of some differences, one per question."""
    rng, x = numpy.random.default_rng(seed), numpy.asarray(differences)
    means = [x[rng.integers(len(x), size=len(x))].mean() for _ in range(RESAMPLES)]
    return tuple(numpy.percentile(means, [2.5, 97.5]).tolist())


def compare(a_rewards, b_rewards):
    """Return what a set says: questions, both means, difference, its interval, only A and only B right, p."""
    a, b = ([sum(rewards) / len(rewards) for rewards in some] for some in (a_rewards, b_rewards))
    differences = [y - x for x, y in zip(a, b)]
    out = {"questions": len(a), "a": sum(a) / len(a), "b": sum(b) / len(b),
           "difference": sum(differences) / len(a), "interval": bootstrap(differences)}
    if all(len(rewards) == 1 for rewards in a_rewards + b_rewards):
        right = [(x == 1, y == 1) for x, y in zip(a, b)]
        out["only"] = right.count((True, False)), right.count((False, True))
        out["p"] = mcnemar(*out["only"])
    return out


def table(found):
    """Return the lines of a table with a row per set, in %. found: {set: of compare}."""
    rows = [["set", "questions", "A", "B", "B - A", "95% interval", "only A right", "only B right",
             "p (McNemar)"]]
    for name, c in found.items():
        low, high = c["interval"]
        test = [*map(str, c["only"]), f"{c['p']:.3g}"] if "p" in c else ["", "", "several completions"]
        rows.append([name, f"{c['questions']:,}", f"{100 * c['a']:.1f}", f"{100 * c['b']:.1f}",
                     f"{100 * c['difference']:+.1f}", f"[{100 * low:+.1f}, {100 * high:+.1f}]", *test])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def draw(plt, found, names, path):
    """Draw every set's difference with its interval; where that does not reach 0, the runs differ.

    names: both runs' folders.
    """
    figure, axis = plt.subplots(figsize=(6, 1.6 + 0.4 * len(found)))
    for place, c in enumerate(found.values()):
        x, low, high = (100 * value for value in (c["difference"], *c["interval"]))
        axis.errorbar(x, -place, xerr=[[x - low], [high - x]], fmt="o", color="C0", capsize=3)
    axis.set_yticks([-place for place in range(len(found))], list(found))
    axis.axvline(0, color="grey", linewidth=0.6)
    axis.set(ylim=(0.6 - len(found), 0.6) if len(found) > 1 else (-1, 1), xlabel="points, with 95% interval",
             title="B: {1}\nminus A: {0}".format(*names))
    save_figure(plt, figure, path)


def main(argv=None):
    """Compare two runs from the command line."""
    parser = Parser(prog="lab.compare", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, metavar="RUN")
    parser.add_argument("--step", type=AMOUNT, metavar="N", help="updates done; default: each run's last")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), metavar="FILE", help="the picture")
    try:
        args = parser.parse_args(argv)
        (step_a, a), (step_b, b) = (answers(run, args.step) for run in args.runs)
        found = {name: compare(*both) for name, both in pairs(a, b, args.runs).items()}
        print(f"A: {args.runs[0]} after step {step_a}\nB: {args.runs[1]} after step {step_b}\n")
        print("\n".join(table(found)))
        if plt := pyplot():
            draw(plt, found, args.runs, args.out)
            print(f"\n{args.out}")
    except (ValueError, OSError) as error:
        parser.exit(2, f"lab.compare: {error}\n")


if __name__ == "__main__":
    main()
