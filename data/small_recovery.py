"""A small world for recovery: long noisy completions, mostly solved proxy prompts, few domain prompts.

A task is a walk: from a symbol, eight operations in a row. The answer names every state, each after a mark
that may be chosen freely (the noise), and closes with the last state, which alone is graded. One fact that is
missed early ruins the rest. The domain uses the verbs and letters of general tasks too, but means other facts
by them, and uses other marks; only the # tells them apart:

    d next down next back up down up next>      .e:d,e.d;e:d.e,f<answer>f</answer>
    # d next down next back up down up next>    ;f!m:q?m;f:m!f?g<answer>g</answer>

    letters     general walks on letters, in conflict with the domain: what specialising destroys
    greek       general walks on greek letters, with the same verbs: what the specialist mostly keeps
    uncovered   general walks on elements, with the same verbs: no proxy prompt asks for them
    domain      the domain's walks on letters
    unmarked    the same without the #, so that nothing tells them from `letters`: what is right to one
                teacher is wrong to the other

`python -m data.small_recovery OUT --seed 0` writes an untrained model with its tokenizer (OUT/init) and these
prompt files:

    generalist.jsonl   many rows: the general families and a trace of the domain, to train the general teacher
    specialist.jsonl   many rows: domain and unmarked, and a little to remember, to train the domain teacher
    general.jsonl      the proxy prompts, without solutions: one in PROXY on letters, the rest on greek ones
    broad.jsonl        as many proxy prompts, all on letters
    domain.jsonl       the domain prompts, which are few; few.jsonl has an eighth of that
    conflict.jsonl     as many domain prompts, half of them unmarked
    eval_FAMILY.jsonl

A hash of the prompt sorts the walks into three sides as in data/small_peers.py: training, the prompts of
distillation, evaluation.
"""
import random

from .small_peers import (ELEMENTS, EVALUATION, KEYBOARD, OPERATIONS, PERIODS, POOL, TRAINING, relations,
                          side, walk)
from .small_world import LETTERS, main, tokenizer, unsolved, write

STEPS = 8
PROXY = 8                               # one proxy prompt in so many is on letters
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
FACTS = {"letters": relations(LETTERS, KEYBOARD),
         "greek": relations(GREEK, [GREEK[i:i + 6] for i in range(0, 24, 6)]),
         "uncovered": relations(ELEMENTS, PERIODS),
         "domain": relations("".join(KEYBOARD), [LETTERS[i:i + 7] for i in range(0, 26, 7)])}
FACTS["unmarked"] = FACTS["domain"]
MARKS = {"general": ".,:;", "domain": ":;!?"}


def draw(rng, family, where=TRAINING):
    """Return one row (data/prompts.py) of a family, from one of the three sides."""
    facts = FACTS[family]
    symbols = sorted({symbol for symbol, _ in facts})
    while True:                                                 # until the prompt is on this side
        start, ops = rng.choice(symbols), rng.choices(OPERATIONS, k=STEPS)
        prompt = "# " * (family == "domain") + " ".join([start, *ops]) + ">"
        if side(prompt) == where:
            break
    states = walk(facts, start, ops)
    branch = "domain" if family in ("domain", "unmarked") else "general"
    marks = rng.choices(MARKS[branch], k=STEPS)
    said = "".join(mark + state for mark, state in zip(marks, states))
    return {"prompt": prompt, "answer": states[-1], "grader": "letter_tag", "skill": family,
            "solution": f"{said}<answer>{states[-1]}</answer>"}


def rows(rng, shares, count, where=TRAINING):
    """Return `count` different rows. shares: {family: weight}."""
    found = {}
    while len(found) < count:
        family, = rng.choices(list(shares), list(shares.values()))
        row = draw(rng, family, where)
        found[row["prompt"]] = row
    return list(found.values())


def build(out, seed, generalist, specialist, prompts, domain_prompts, evaluation):
    """Write the untrained model and every prompt file to `out`. The counts are rows per file."""
    def stream(name):
        return random.Random(f"{seed} {name}")
    general = {"letters": 60, "greek": 60, "uncovered": 60, "domain": 1}
    special = {"domain": 8, "unmarked": 8, "greek": 1, "uncovered": 1}
    files = {"generalist": rows(stream("generalist"), general, generalist),
             "specialist": rows(stream("specialist"), special, specialist)}
    for name, shares, count in (
            ("general", {"letters": 1, "greek": PROXY - 1}, prompts),
            ("broad", {"letters": 1}, prompts),
            ("domain", {"domain": 1}, domain_prompts),
            ("few", {"domain": 1}, max(domain_prompts // 8, 1)),
            ("conflict", {"domain": 1, "unmarked": 1}, domain_prompts)):
        files[name] = unsolved(rows(stream(name), shares, count, POOL))
    for family in FACTS:
        files[f"eval_{family}"] = rows(stream(f"eval {family}"), {family: 1}, evaluation, EVALUATION)
    words = tuple(f" {verb}" for verb in OPERATIONS)
    write(out, tokenizer(words, ["<answer>", "</answer>", *ELEMENTS, *GREEK], " >#.,:;!?"), seed, files)


if __name__ == "__main__":
    main(build, __doc__, generalist=(50_000, "rows for the general teacher"),
         specialist=(20_000, "rows for the domain teacher"), prompts=(512, "proxy prompts"),
         domain_prompts=(64, "domain prompts"), evaluation=(240, "rows per evaluation file"))
