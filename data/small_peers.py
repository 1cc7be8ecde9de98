"""A small world for co-distillation: two specialists, and what one knows the other has only in part.

A task is a walk: from a symbol, five operations in a row. Both branches use the same four words, but on other
maps: for `next` and `back` letters follow the alphabet and elements (of the main groups) the atomic number,
for `down` and `up` the columns of a keyboard and the groups. The answer lists where the walk has been after
every operation, so that one fact missed ruins everything after it:

    d next down next back up>edede        C next down back next up>NPSiPN

A tutor reads a question and a response to it, names the operation that went wrong (the concept) and walks by
itself as far as the first step that differs, so that its last symbol is a correction and the rest is left to
the reader; a response without error is walked to its end. To write this one must know the facts. The student
reads such feedback, a right answer (solution), both or neither in front of its prompt:

    name C next down back next up>NPAlGaP|           <concept>back</concept>NPSi
    check C next down back next up>NPAlGaP|          NPSi                          (without anchoring)
    note NPSi;C next down back next up>              NPSiPN
    right NPSiPN;note NPSi;C next down back next up>  NPSiPN

What a model does not know is under control. A few facts of every branch are rare (RARE): the common base and
the specialist of the other branch have never met them in a task; some of them (HIDDEN) the branch's own
specialist has not either, so that it has something to find out and no tutor knows better. When they learn to
read, such facts are fiction, true in one row only, so that they learn to follow a note on what they do not
know without learning the fact; of what they know, one note in a few is wrong (WRONG). Some feedback lacks its
concept (UNTAGGED).

`python -m data.small_peers OUT --seed 0` writes an untrained model with its tokenizer (OUT/init), the formats
above as templates (OUT/templates.json) and the prompt files:

    base.jsonl                         many: both branches without their rare facts; solved, read, criticised
    specialist1.jsonl, specialist2.jsonl    fewer: mostly letters with their rare facts, mostly chemistry
    letters.jsonl, chemistry.jsonl     the pool of co-distillation: fixed, no solutions
    val_letters.jsonl, ..              for the cognizance gate
    eval_letters.jsonl, ..

Three sides by a hash of the prompt: training, in any of the three forms; pool and validation; evaluation.
"""
import argparse
import hashlib
import json
import random
import re
from pathlib import Path

from .small_world import LETTERS, tokenizer, unsolved, write

OPERATIONS = ("next", "back", "down", "up")
STEPS = 5
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
PERIODS = ("Li Be B C N O F Ne".split(), "Na Mg Al Si P S Cl Ar".split(), "K Ca Ga Ge As Se Br Kr".split(),
           "Rb Sr In Sn Sb Te I Xe".split())
ELEMENTS = [x for period in PERIODS for x in period]
SYMBOL = re.compile(r"[A-Z][a-z]?|.")
RARE, HIDDEN = {"letters": 6, "chemistry": 10}, {"letters": 2, "chemistry": 3}     # of 104, of 128 facts
UNTAGGED, WRONG = 0.1, 0.15
BASE = {"solve": 2, "read": 3, "write": 3}              # shares of the rows; of both branches
OWN, OTHER = {"solve": 8, "read": 3, "write": 6}, {"solve": 2, "read": 4, "write": 1}
TEMPLATES = {"reprompt": "{solution}{feedback}{prompt}", "solution": "right {solution};",
             "environment": "note {feedback};", "peer": "note {feedback};",
             "anchored": "name {question}{response}|", "unanchored": "check {question}{response}|"}
WORDS = (*OPERATIONS, *(f" {op}" for op in OPERATIONS), "right", "note", "name", "check")


def relations(order, rows):
    """{(symbol, operation): symbol}: along the order and along the columns, each closed to a ring."""
    columns = [[row[j] for row in rows if j < len(row)] for j in range(max(map(len, rows)))]
    rings = [("next", "back", order), *(("down", "up", column) for column in columns)]
    return {fact: y for forth, back, ring in rings for x, y in zip(ring, [*ring[1:], ring[0]])
            for fact, y in (((x, forth), y), ((y, back), x))}


FACTS = {"letters": relations(LETTERS, KEYBOARD), "chemistry": relations(ELEMENTS, PERIODS)}
SYMBOLS = {"letters": list(LETTERS), "chemistry": ELEMENTS}


def walk(facts, start, ops, slip=lambda i, fact, y: y):
    """The states of a walk. `slip` may replace what a fact says; the rest follows from that."""
    states = [start]
    for i, op in enumerate(ops):
        states.append(slip(i, (states[-1], op), facts[states[-1], op]))
    return states[1:]


def first_error(answer, response):
    """Index of the first step that the response does not have right; None: it has all."""
    response = SYMBOL.findall(response)
    return next((i for i, y in enumerate(SYMBOL.findall(answer)) if response[i:i + 1] != [y]), None)


def criticism(prompt, answer, response):
    """(concept, feedback) of a tutor who takes `answer` for right."""
    ops, i = prompt.rstrip(">").split(" ")[1:], first_error(answer, response)
    return (ops[-1], answer) if i is None else (ops[i], "".join(SYMBOL.findall(answer)[:i + 1]))


def reprompt(prompt, solution="", feedback=""):
    return TEMPLATES["reprompt"].format(
        prompt=prompt, solution=TEMPLATES["solution"].format(solution=solution) if solution else "",
        feedback=TEMPLATES["peer"].format(feedback=feedback) if feedback else "")


def side(prompt):
    """0 evaluation, 1 pool and validation, the rest training; the same in every run."""
    return min(hashlib.md5(prompt.encode()).digest()[0] % 8, 2)


def draw(rng, branch, form, where=2, unknown=frozenset()):
    """One row (data/prompts.py) for a model without the facts in `unknown`: solved, read or criticised."""
    symbols, facts = SYMBOLS[branch], FACTS[branch]
    if form == "read":
        facts = facts | {fact: rng.choice(symbols) for fact in sorted(unknown)}
    meets = form == "read" and rng.random() < 0.6                      # whether the walk meets such a fact
    while True:
        start, ops = rng.choice(symbols), rng.choices(OPERATIONS, k=STEPS)
        prompt, states = " ".join([start, *ops]) + ">", walk(facts, start, ops)
        met = not unknown.isdisjoint(zip([start, *states], ops))
        if side(prompt) == where and (met == meets or not unknown):
            break

    def slip(i, fact, y):
        wrong = i in slips or fact in unknown and rng.random() < 0.9
        return rng.choice([*symbols, *(facts[fact[0], op] for op in OPERATIONS)]) if wrong else y

    slips = set() if rng.random() < 0.3 else rng.sample(range(STEPS), rng.choice((1, 1, 1, 2)))
    answer, response = "".join(states), "".join(walk(facts, start, ops, slip))
    if form == "solve":
        return {"prompt": prompt, "answer": answer, "solution": answer, "grader": "exact"}
    concept, feedback = criticism(prompt, answer, response)
    if form == "read":
        if not meets and rng.random() < WRONG:                         # by a tutor who believes the response
            feedback = criticism(prompt, response, answer)[1]
        shown = rng.choice(("solution", "peer", "both"))
        return {"prompt": reprompt(prompt, answer * (shown != "peer"), feedback * (shown != "solution")),
                "solution": answer}
    template = rng.choice(("anchored", "anchored", "unanchored"))
    tag = f"<concept>{concept}</concept>" * (template == "anchored" and rng.random() > UNTAGGED)
    return {"prompt": TEMPLATES[template].format(question=prompt, response=response),
            "solution": tag + feedback}


def mixed(rng, shares, count):
    """`count` rows for training; shares: {(branch, form, unknown facts): weight}."""
    return [draw(rng, branch, form, unknown=unknown)
            for branch, form, unknown in rng.choices(list(shares), list(shares.values()), k=count)]


def distinct(rng, branch, count, where):
    rows = {}
    while len(rows) < count:
        row = draw(rng, branch, "solve", where)
        rows[row["prompt"]] = row
    return list(rows.values())


def build(out, seed, base, specialist, pool, validation, evaluation):
    """Write the untrained model, the templates and every prompt file. The counts are rows per file."""
    out, files = Path(out), {}
    stream = lambda name: random.Random(f"{seed} {name}")
    some = {branch: stream(f"rare {branch}").sample(sorted(FACTS[branch]), RARE[branch]) for branch in FACTS}
    rare = {branch: frozenset(facts) for branch, facts in some.items()}
    hidden = {branch: frozenset(facts[:HIDDEN[branch]]) for branch, facts in some.items()}
    files["base"] = mixed(stream("base"), {(branch, form, rare[branch]): n for branch in FACTS
                                           for form, n in BASE.items()}, base)
    for i, own in enumerate(FACTS, 1):
        shares = {(own, form, hidden[own]): n for form, n in OWN.items()}
        shares |= {(branch, form, rare[branch]): n for branch in FACTS if branch != own
                   for form, n in OTHER.items()}
        files[f"specialist{i}"] = mixed(stream(f"specialist {own}"), shares, specialist)
        rows = distinct(stream(f"pool {own}"), own, pool + validation, 1)
        files[own] = unsolved(rows[:pool])
        files[f"val_{own}"] = rows[pool:]
        files[f"eval_{own}"] = distinct(stream(f"eval {own}"), own, evaluation, 0)
    write(out, tokenizer(WORDS, ["<concept>", "</concept>", *ELEMENTS], " >;|"), seed, files)
    (out / "templates.json").write_text(json.dumps(TEMPLATES, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=int, default=45_000, help="rows for the common base")
    parser.add_argument("--specialist", type=int, default=11_000, help="rows for each specialist")
    parser.add_argument("--pool", type=int, default=256, help="prompts of co-distillation per branch")
    parser.add_argument("--validation", type=int, default=60, help="prompts of the gate per branch")
    parser.add_argument("--evaluation", type=int, default=240, help="rows per evaluation file")
    build(**vars(parser.parse_args()))
