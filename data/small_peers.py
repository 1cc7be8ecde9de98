"""A small world for co-distillation: two specialists, each of whom knows only in part what the other knows.

A task is a walk: from a symbol, five operations in a row. Both branches use the same four words, but on other
maps. For `next` and `back`, letters follow the alphabet and elements (of the main groups) the atomic number;
for `down` and `up`, letters follow the columns of a keyboard and elements their groups. The answer lists
where the walk is after every operation, so that one missed fact ruins everything after it:

    d next down next back up>edede        C next down back next up>NPSiPN

A tutor reads a question and a response to it. It names the operation that went wrong (the concept), and walks
by itself as far as the first step that differs. So the last symbol is a correction, and the rest is left to
the reader. A response without an error is walked to its end. To write this, a tutor must know the facts. The
student reads such feedback, a right answer (solution), both or neither in front of its prompt:

    name C next down back next up>NPAlGaP|           <concept>back</concept>NPSi
    check C next down back next up>NPAlGaP|          NPSi                          (without anchoring)
    note NPSi;C next down back next up>              NPSiPN
    right NPSiPN;note NPSi;C next down back next up>  NPSiPN

What a model does not know is under control. A few facts of every branch are rare (RARE): the common base and
the specialist of the other branch have never met them in a task. Some of these (HIDDEN) the branch's own
specialist has not met either, so that it has something to find out and no tutor knows better. Where models
learn to read notes, such facts are invented and true in one row only: they learn to follow a note on what
they do not know, without learning the fact. Of what they know, one note in a few is wrong (WRONG). Some
feedback lacks its concept (UNTAGGED).

`python -m data.small_peers OUT --seed 0` writes an untrained model with its tokenizer (OUT/init), the formats
above as templates (OUT/templates.json) and these prompt files:

    base.jsonl                         many rows: both branches without their rare facts, in all three forms
    specialist1.jsonl, specialist2.jsonl    fewer: mostly letters with their rare facts, mostly chemistry
    letters.jsonl, chemistry.jsonl     the prompts of co-distillation, without solutions
    val_letters.jsonl, ..              the prompts of the cognizance gate
    eval_letters.jsonl, ..

A hash of the prompt sorts the walks into three sides: training in any of the three forms (solve, read,
write); co-distillation and its gate; evaluation.
"""
import hashlib
import json
import random
import re
from pathlib import Path

from .small_world import LETTERS, main, tokenizer, unsolved, write

OPERATIONS = ("next", "back", "down", "up")
STEPS = 5
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
PERIODS = ("Li Be B C N O F Ne".split(), "Na Mg Al Si P S Cl Ar".split(), "K Ca Ga Ge As Se Br Kr".split(),
           "Rb Sr In Sn Sb Te I Xe".split())
ELEMENTS = [x for period in PERIODS for x in period]
SYMBOL = re.compile(r"[A-Z][a-z]?|.")
RARE = {"letters": 6, "chemistry": 10}                          # of 104 and of 128 facts
HIDDEN = {"letters": 2, "chemistry": 3}
UNTAGGED, WRONG = 0.1, 0.15                                     # shares of feedback, and of notes
BASE = {"solve": 2, "read": 3, "write": 3}                      # shares of the base's rows, in both branches
OWN = {"solve": 8, "read": 3, "write": 6}                       # of a specialist's rows in its own branch
OTHER = {"solve": 2, "read": 4, "write": 1}                     # and in the other branch
TEMPLATES = {"reprompt": "{solution}{feedback}{prompt}", "solution": "right {solution};",
             "environment": "note {feedback};", "peer": "note {feedback};",
             "anchored": "name {question}{response}|", "unanchored": "check {question}{response}|"}
WORDS = (*OPERATIONS, *(f" {op}" for op in OPERATIONS), "right", "note", "name", "check")
EVALUATION, POOL, TRAINING = 0, 1, 2                            # the three sides


def relations(order, rows):
    """Return {(symbol, operation): symbol} along the order and along the columns, each closed to a ring."""
    rings = [("next", "back", order)]
    for j in range(max(map(len, rows))):
        rings.append(("down", "up", [row[j] for row in rows if j < len(row)]))
    facts = {}
    for forth, back, ring in rings:
        for x, y in zip(ring, [*ring[1:], ring[0]]):
            facts[x, forth] = y
            facts[y, back] = x
    return facts


FACTS = {"letters": relations(LETTERS, KEYBOARD), "chemistry": relations(ELEMENTS, PERIODS)}
SYMBOLS = {"letters": list(LETTERS), "chemistry": ELEMENTS}


def walk(facts, start, ops, slip=lambda i, fact, y: y):
    """Return the states of a walk. `slip` may replace what a fact says; the rest follows from that."""
    states = [start]
    for i, op in enumerate(ops):
        states.append(slip(i, (states[-1], op), facts[states[-1], op]))
    return states[1:]


def first_error(answer, response):
    """Return the index of the first step that the response does not have right, or None if it has all."""
    response = SYMBOL.findall(response)
    for i, y in enumerate(SYMBOL.findall(answer)):
        if response[i:i + 1] != [y]:
            return i
    return None


def criticism(prompt, answer, response):
    """Return (concept, feedback) of a tutor who believes that `answer` is right."""
    ops, i = prompt.rstrip(">").split(" ")[1:], first_error(answer, response)
    if i is None:
        return ops[-1], answer
    return ops[i], "".join(SYMBOL.findall(answer)[:i + 1])


def reprompt(prompt, solution="", feedback=""):
    """Return a prompt behind the solution and the feedback that the student reads, where there are any."""
    return TEMPLATES["reprompt"].format(
        prompt=prompt, solution=TEMPLATES["solution"].format(solution=solution) if solution else "",
        feedback=TEMPLATES["peer"].format(feedback=feedback) if feedback else "")


def side(prompt):
    """Return the side that a prompt is on; it is the same in every run."""
    # Of eight parts one is for evaluation, one is the pool, and six are for training.
    return min(hashlib.md5(prompt.encode()).digest()[0] % 8, TRAINING)


def draw(rng, branch, form, where=TRAINING, unknown=frozenset()):
    """Return one row (data/prompts.py) for a model that does not know the facts in `unknown`.

    form: "solve" the walk, "read" feedback and solve it, or "write" feedback on a response.
    """
    facts = FACTS[branch]
    if form == "read":
        invented = {fact: rng.choice(SYMBOLS[branch]) for fact in sorted(unknown)}
        facts = facts | invented
    meets_unknown = form == "read" and rng.random() < 0.6
    start, ops, states = draw_walk(rng, branch, facts, where, unknown, meets_unknown)
    prompt, answer = " ".join([start, *ops]) + ">", "".join(states)
    response = "".join(walk(facts, start, ops, draw_slips(rng, branch, facts, unknown)))
    if form == "solve":
        return {"prompt": prompt, "answer": answer, "solution": answer, "grader": "exact"}
    concept, feedback = criticism(prompt, answer, response)
    if form == "read":
        if not meets_unknown and rng.random() < WRONG:          # from a tutor who believes the response
            feedback = criticism(prompt, response, answer)[1]
        shown = rng.choice(("solution", "peer", "both"))
        return {"prompt": reprompt(prompt, answer * (shown != "peer"), feedback * (shown != "solution")),
                "solution": answer}
    template = rng.choice(("anchored", "anchored", "unanchored"))
    if template == "anchored" and rng.random() > UNTAGGED:
        feedback = f"<concept>{concept}</concept>{feedback}"
    return {"prompt": TEMPLATES[template].format(question=prompt, response=response), "solution": feedback}


def draw_walk(rng, branch, facts, where, unknown, meets_unknown):
    """Return (start, operations, states) of a walk on the side `where`.

    If there are unknown facts, the walk meets one exactly if `meets_unknown`.
    """
    while True:                                                 # until a walk fits
        start, ops = rng.choice(SYMBOLS[branch]), rng.choices(OPERATIONS, k=STEPS)
        states = walk(facts, start, ops)
        met = not unknown.isdisjoint(zip([start, *states], ops))
        if side(" ".join([start, *ops]) + ">") == where and (met == meets_unknown or not unknown):
            return start, ops, states


def draw_slips(rng, branch, facts, unknown):
    """Return the slips of a response, for `walk`: one or two places, and most of what is unknown."""
    places = set() if rng.random() < 0.3 else rng.sample(range(STEPS), rng.choice((1, 1, 1, 2)))

    def slip(i, fact, y):
        if i in places or fact in unknown and rng.random() < 0.9:
            neighbours = [facts[fact[0], op] for op in OPERATIONS]
            return rng.choice([*SYMBOLS[branch], *neighbours])
        return y
    return slip


def mixed(rng, shares, count):
    """Return `count` rows for training. shares: {(branch, form, unknown facts): weight}."""
    kinds = rng.choices(list(shares), list(shares.values()), k=count)
    return [draw(rng, branch, form, unknown=unknown) for branch, form, unknown in kinds]


def distinct(rng, branch, count, where):
    """Return `count` different rows to solve."""
    rows = {}
    while len(rows) < count:
        row = draw(rng, branch, "solve", where)
        rows[row["prompt"]] = row
    return list(rows.values())


def build(out, seed, base, specialist, pool, validation, evaluation):
    """Write the untrained model, the templates and every prompt file. The counts are rows per file."""
    def stream(name):
        return random.Random(f"{seed} {name}")
    rare, hidden = {}, {}
    for branch, facts in FACTS.items():
        some = stream(f"rare {branch}").sample(sorted(facts), RARE[branch])
        rare[branch], hidden[branch] = frozenset(some), frozenset(some[:HIDDEN[branch]])
    shares = {(branch, form, rare[branch]): n for branch in FACTS for form, n in BASE.items()}
    files = {"base": mixed(stream("base"), shares, base)}
    for i, own in enumerate(FACTS, 1):
        other, = FACTS.keys() - {own}
        shares = {(own, form, hidden[own]): n for form, n in OWN.items()}
        shares |= {(other, form, rare[other]): n for form, n in OTHER.items()}
        files[f"specialist{i}"] = mixed(stream(f"specialist {own}"), shares, specialist)
        rows = distinct(stream(f"pool {own}"), own, pool + validation, POOL)
        files[own] = unsolved(rows[:pool])
        files[f"val_{own}"] = rows[pool:]
        files[f"eval_{own}"] = distinct(stream(f"eval {own}"), own, evaluation, EVALUATION)
    write(out, tokenizer(WORDS, ["<concept>", "</concept>", *ELEMENTS], " >;|"), seed, files)
    (Path(out) / "templates.json").write_text(json.dumps(TEMPLATES, indent=1))


if __name__ == "__main__":
    main(build, __doc__, base=(45_000, "rows for the common base"),
         specialist=(11_000, "rows for each specialist"),
         pool=(256, "prompts of co-distillation per branch"),
         validation=(60, "prompts of the gate per branch"), evaluation=(240, "rows per evaluation file"))
