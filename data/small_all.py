"""The small world (data/small_world.py) in a form in which every method can run.

Some methods ask a model to read or write more than a prompt: its own solution (opsd, sdpo), the answer (star)
or a peer's feedback (opcod). So in FORMS of every ten rows both teachers also learn to read a text that tells
the answer, and to correct another one's response:

    is map;rev pam>               map
    check rev pam>mpa|            map

`python -m data.small_all OUT --seed 0` writes the untrained model and the files of the small world, these two
forms as templates (OUT/templates.json), and

    val_general.jsonl, val_domain.jsonl             prompts for the gate of opcod
    general_rationales.jsonl, domain_rationales.jsonl
                   the references with a third teacher's rationale, which misleads: what it says before the
                   answer of a chain (`sum`, `do`) is taken from another prompt
"""
import json
import random
from pathlib import Path

from . import small_world
from .small_world import VERBS, main, rows, tokenizer, write

FORMS = {"solve": 8, "read": 1, "check": 1}                     # of ten rows for the teachers
TEMPLATES = {"reprompt": "{solution}{feedback}{prompt}", "solution": "is {solution};",
             "environment": "is {feedback};", "peer": "is {feedback};", "told": "is {answer};{prompt}",
             "anchored": "check {question}{response}|", "unanchored": "check {question}{response}|"}


def formed(rng, row, others):
    """Return a teacher's row in one of the forms. others: rows whose solutions are responses to correct."""
    form, = rng.choices(list(FORMS), list(FORMS.values()))
    prompt, solution = row["prompt"], row["solution"]
    if form == "read":
        prompt = TEMPLATES["solution"].format(solution=solution) + prompt
    if form == "check":
        response = solution if rng.random() < 0.3 else rng.choice(others)["solution"]
        prompt = TEMPLATES["unanchored"].format(question=prompt, response=response)
    return {"prompt": prompt, "solution": solution}


def misled(rng, row, others):
    """Return a row with a rationale that leads elsewhere: of another prompt of its skill, as long a chain."""
    wrong = [other for other in others if other["solution"] != row["solution"]]
    alike = [other for other in wrong if other["skill"] == row["skill"]]
    length = lambda other: len(other["solution"].split())
    as_long = [other for other in alike if length(other) == length(row)]
    return row | {"rationales": {"misleading": rng.choice(as_long or alike or wrong)["solution"]}}


def build(out, seed, generalist, specialist, prompts, references, evaluation, validation):
    """Write the untrained model, the templates and every prompt file. The counts are rows per file."""
    files = small_world.files(seed, generalist, specialist, prompts, references, evaluation)
    for teacher in ("generalist", "specialist"):
        rng = random.Random(f"{seed} {teacher} forms")
        files[teacher] = [formed(rng, row, files[teacher]) for row in files[teacher]]
    for branch, skills in (("general", small_world.COVERED), ("domain", small_world.DOMAIN)):
        rng = random.Random(f"{seed} {branch} more")
        trained = {row["prompt"] for row in files[branch]}
        more = rows(rng, branch, skills, 2 * validation)
        files[f"val_{branch}"] = [row for row in more if row["prompt"] not in trained][:validation]
        found = files[f"{branch}_references"]
        files[f"{branch}_rationales"] = [misled(rng, row, found) for row in found]
    write(out, tokenizer((*VERBS, "is", "check"), marks=" >+=;|"), seed, files)
    (Path(out) / "templates.json").write_text(json.dumps(TEMPLATES, indent=1))


if __name__ == "__main__":
    main(build, __doc__, **small_world.COUNTS, validation=(64, "prompts of the gate per branch"))
