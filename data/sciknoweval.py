"""SciKnowEval L3 (2406.09098) as SDPO and OPCoD train on it: multiple choice of four sciences, letter_tag.

    test    SDPO's own test problems: the first tenth of numpy's permutation, seed 42, of the set's order
    val     VALIDATION problems of the rest, by hash, for OPCoD's gate: the paper's "60 problems balanced per
            domain" (table 5) are taken as 30 of each domain of a pair
    train   what remains, less a prompt that is in test too (the set has one such, in material)

A row is the hub's ({question, choices, answerKey, type, domain, details}; of the whole set, only this
domain's L3 questions with 4 or 2 choices are kept) or one of SDPO's files ({system, prompt, answer}).
"""
import hashlib
import math
import sys

import numpy

from config import Refused

VALIDATION = 30
# A fingerprint of every domain's sorted test prompts in SDPO's files. The permutation finds the same problems
# only while the hub's set is in the same order; another fingerprint says that it is not.
TESTS = {"physics": "890be3c5ed65", "chemistry": "b041d1b1cc79", "material": "35ebf900a537",
         "biology": "b50fdc03bd02"}
TYPES = ("mcq-4-choices", "mcq-2-choices")
# This is word for word the system message of SDPO's files, where questions with two choices have it too. The
# published numbers are of these prompts.
SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing \
else. Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""


def converter(domain):
    """Return the function row -> prompt row, or None for rows of another domain, level or type."""
    def convert(row):
        if "question" not in row:                           # a row of SDPO's files
            return prompt_row(row["system"], row["prompt"], row["answer"])
        if (row["domain"].lower(), row["details"]["level"]) != (domain, "L3") or row["type"] not in TYPES:
            return None
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        if len(texts) != len(labels) or not all(text.strip() for text in [row["question"], *texts]):
            raise Refused("an empty question or choice")
        choices = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts))
        return prompt_row(SYSTEM, f"{row['question']}\n\n{choices}\nPlease reason step by step.",
                          row["answerKey"])
    return convert


def prompt_row(system, prompt, answer):
    """Return a prompt row (data/prompts.py); refuse an answer that is not the label of a choice."""
    if not answer or f"\n{answer}: " not in prompt:
        raise Refused(f"the answer {answer!r} is no choice's label")
    return {"prompt": [{"role": "system", "content": system}, {"role": "user", "content": prompt}],
            "answer": answer, "grader": "letter_tag"}


def splitter(domain):
    """Return the function (all rows) or (SDPO's train rows, its test rows) -> {part: rows}."""
    def parts(rows, test=None):
        if test is None:
            order = numpy.random.default_rng(42).permutation(len(rows))     # as in datasets' train_test_split
            held = math.ceil(len(rows) / 10)
            test, rows = ([rows[i] for i in some] for some in (order[:held], order[held:]))
        tested = set(map(question, test))
        rows = [row for row in rows if question(row) not in tested]
        problems = sorted(set(map(question, rows)), key=digest)
        if len(problems) <= VALIDATION:
            raise Refused(f"{len(problems)} {domain} problems to train on are too few for "
                             f"{VALIDATION} validation problems")
        if fingerprint(test) != TESTS[domain]:
            print(f"data.convert: the {len(test)} {domain} test problems are not those of SDPO's files: its "
                  "numbers and OPCoD's are of other problems", file=sys.stderr)
        chosen = set(problems[:VALIDATION])
        return {"train": [row for row in rows if question(row) not in chosen],
                "val": [row for row in rows if question(row) in chosen], "test": test}
    return parts


def question(row):
    """Return the question of a prompt row, which is its user message."""
    return row["prompt"][1]["content"]


def digest(text):
    """Return a text's SHA-256 as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(rows):
    """Return the first digits of the SHA-256 of all questions, whatever their order."""
    return digest("\n".join(sorted(map(question, rows))))[:12]
