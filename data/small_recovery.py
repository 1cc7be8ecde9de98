"""A small world for recovery: long noisy completions, a proxy that is mostly solved, a small domain pool.

A task is a walk: from a symbol, eight operations in a row. The answer names every state, each after a mark
that may be chosen freely (the noise), and closes with the last state, which alone is graded; one fact missed
early ruins the rest. The domain uses the verbs and letters of general tasks too, but means other facts by
them, and uses other marks; only the # tells them apart:

    d next down next back up down up next>      .e:d,e.d;e:d.e,f<answer>f</answer>
    # d next down next back up down up next>    ;f!m:q?m;f:m!f?g<answer>g</answer>

    letters     general walks on letters, in conflict with the domain: what specialising destroys
    greek       general walks on greek letters, with the same verbs: what the specialist mostly keeps
    uncovered   general walks on elements, with the same verbs: no proxy prompt asks for them
    domain      the domain's walks on letters
    unmarked    these without the #, which nothing tells from `letters`: what one teacher wants there is wrong
                to the other

`python -m data.small_recovery OUT --seed 0` writes an untrained model with its tokenizer (OUT/init) and the
prompt files:

    generalist.jsonl   many: the general families and a trace of the domain, for training the general teacher
    specialist.jsonl   many: domain and unmarked, and a little to remember, for training the domain teacher
    general.jsonl      the proxy prompts: fixed, no solutions; one in PROXY on letters, the rest on greek ones
    broad.jsonl        as many proxy prompts, all on letters
    domain.jsonl       the domain prompts: few. few.jsonl: an eighth of that
    conflict.jsonl     as many domain prompts, half of them unmarked
    eval_FAMILY.jsonl

Three sides by a hash of the prompt, as in data/small_peers.py: training, pools, evaluation.
"""
import argparse
import random
from pathlib import Path

from .small_peers import ELEMENTS, KEYBOARD, OPERATIONS, PERIODS, relations, side, walk
from .small_world import LETTERS, tokenizer, unsolved, write

STEPS = 8
PROXY = 8
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
FACTS = {"letters": relations(LETTERS, KEYBOARD),
         "greek": relations(GREEK, [GREEK[i:i + 6] for i in range(0, 24, 6)]),
         "uncovered": relations(ELEMENTS, PERIODS),
         "domain": relations("".join(KEYBOARD), [LETTERS[i:i + 7] for i in range(0, 26, 7)])}
FACTS["unmarked"] = FACTS["domain"]
MARKS = {"general": ".,:;", "domain": ":;!?"}


def draw(rng, family, where=2):
    """One row (data/prompts.py) of a family, from the training, the pools' or the evaluation's side."""
    facts = FACTS[family]
    symbols = sorted({symbol for symbol, _ in facts})
    while True:
        start, ops = rng.choice(symbols), rng.choices(OPERATIONS, k=STEPS)
        prompt = "# " * (family == "domain") + " ".join([start, *ops]) + ">"
        if side(prompt) == where:
            break
    states = walk(facts, start, ops)
    marks = rng.choices(MARKS["domain" if family in ("domain", "unmarked") else "general"], k=STEPS)
    said = "".join(mark + state for mark, state in zip(marks, states))
    return {"prompt": prompt, "answer": states[-1], "grader": "letter_tag", "skill": family,
            "solution": f"{said}<answer>{states[-1]}</answer>"}


def rows(rng, shares, count, where=2):
    """`count` different rows; shares: {family: weight}."""
    found = {}
    while len(found) < count:
        row = draw(rng, *rng.choices(list(shares), list(shares.values())), where)
        found[row["prompt"]] = row
    return list(found.values())


def build(out, seed, generalist, specialist, prompts, domain_prompts, evaluation):
    """Write the untrained model and every prompt file to `out`. The counts are rows per file."""
    out, stream = Path(out), lambda name: random.Random(f"{seed} {name}")
    everything = {"letters": 60, "greek": 60, "uncovered": 60, "domain": 1}
    specialised = {"domain": 8, "unmarked": 8, "greek": 1, "uncovered": 1}
    files = {"generalist": rows(stream("generalist"), everything, generalist),
             "specialist": rows(stream("specialist"), specialised, specialist)}
    few = max(domain_prompts // 8, 1)
    for name, shares, count in (
            ("general", {"letters": 1, "greek": PROXY - 1}, prompts), ("broad", {"letters": 1}, prompts),
            ("domain", {"domain": 1}, domain_prompts), ("few", {"domain": 1}, few),
            ("conflict", {"domain": 1, "unmarked": 1}, domain_prompts)):
        files[name] = unsolved(rows(stream(name), shares, count, 1))
    files |= {f"eval_{family}": rows(stream(f"eval {family}"), {family: 1}, evaluation, 0)
              for family in FACTS}
    words = tuple(f" {verb}" for verb in OPERATIONS)
    write(out, tokenizer(words, ["<answer>", "</answer>", *ELEMENTS, *GREEK], " >#.,:;!?"), seed, files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generalist", type=int, default=50_000, help="rows for the general teacher")
    parser.add_argument("--specialist", type=int, default=20_000, help="rows for the domain teacher")
    parser.add_argument("--prompts", type=int, default=512, help="proxy prompts")
    parser.add_argument("--domain_prompts", type=int, default=64, help="domain prompts")
    parser.add_argument("--evaluation", type=int, default=240, help="rows per evaluation file")
    build(**vars(parser.parse_args()))
