"""Graders: does a completion answer the question? A function per convention returns a score in [0, 1].

    exact         the completion, stripped, is the answer
    number        the last number (after `####` or in \\boxed{} if there is one) equals the answer's; GSM8K
    boxed         the last \\boxed{} is mathematically the answer; MATH, AIME (needs math-verify)
    letter_tag    the text of the last <answer> tag is the answer's letter; SciKnowEval
    final_letter  the letter of the last "Final answer: X" is the answer's; MedQA
"""
import re
from decimal import Decimal

from config import Refused, nearest

NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")     # the minus of 10-5 is not a sign


def exact(completion, answer):
    """Return 1.0 if the completion is the answer."""
    return float(completion.strip() == answer.strip())


def number(completion, answer):
    """Return 1.0 if the last number of the completion equals the answer's."""
    found, gold = last_number(completion), last_number(answer)
    if gold is None:
        raise Refused(f"grader 'number' needs an answer with a number, not {answer!r}")
    return float(found == gold)


def boxed(completion, answer):
    """Return 1.0 if the last \\boxed{} of the completion is mathematically equal to the answer."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise Refused("grader 'boxed' needs math-verify: pip install 'math-verify[antlr4_13_2]'") from None
    found = last_boxed(completion)
    if found is None:
        return 0.0
    return float(verify(parse(f"${answer}$"), parse(f"${found}$")))         # answer first: the order matters


def letter_tag(completion, answer):
    """Return 1.0 if the last <answer> tag of the completion holds the answer."""
    return float(last_tag(completion) == answer.strip())


def final_letter(completion, answer):
    """Return 1.0 if the last "Final answer: X" of the completion has the answer's letter."""
    return float(last_letter(completion) == answer.strip().upper())


GRADERS = {f.__name__: f for f in (exact, number, boxed, letter_tag, final_letter)}
# grader -> the plainest correct completion, in which {} stands for the answer
FORMS = {"exact": "{}", "number": "{}", "boxed": "\\boxed{{{}}}", "letter_tag": "<answer>{}</answer>",
         "final_letter": "Final answer: {}"}


def grade(grader, completion, answer):
    """Return a grader's score, in [0, 1], of a completion (a text without its EOS)."""
    if grader not in GRADERS:
        raise Refused(f"unknown grader {grader!r}; {nearest(grader, GRADERS)}")
    return GRADERS[grader](completion, str(answer))


def can_be_correct(grader, answer):
    """Return whether any completion can be correct: whether the grader accepts the plainest one (FORMS).

    It is False for the grader final_letter and the answer "Both", say. Raise Refused, as `grade` does, for a
    name that is no grader's and for an answer that the grader cannot use at all.
    """
    return grade(grader, FORMS.get(grader, "{}").format(answer), answer) > 0


def complaint(grader, completion):
    """Return what the environment says of a completion in which the grader finds nothing to grade.

    None where the grader finds something, right or wrong, and for graders that take any text.
    """
    find, what = SOUGHT.get(grader, (str, ""))
    return None if find(completion) is not None else f"The answer cannot be graded: there is no {what} in it."


def last_number(text):
    """Return the number that a solution ends on, as a Decimal (1,000 = $1000 = 1000.00), or None."""
    text = text.rsplit("####", 1)[-1] if "####" in text else last_boxed(text) or text
    found = NUMBER.findall(text)
    return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None


def last_boxed(text):
    """Return the contents of the last \\boxed{..}, or None if there is none or its braces never close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + 6, len(text)):             # from the opening brace on
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 7:end]
    return None


def last_tag(text):
    """Return the text in the last <answer> tag, stripped; None if there is no tag, or nothing in it."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.S)
    return found[-1].strip() or None if found else None


def last_letter(text):
    """Return the X of the last "Final answer: X" as a capital, or None."""
    found = re.findall(r"final answer:\W*\b([A-Z])\b", text, re.I)
    return found[-1].upper() if found else None


# grader -> (the function that finds what it grades, how `complaint` calls that)
SOUGHT = {"number": (last_number, "number"), "boxed": (last_boxed, "\\boxed{..}"),
          "letter_tag": (last_tag, "<answer>..</answer>"), "final_letter": (last_letter, '"Final answer: X"')}


def split_at_answer(grader, text, answer):
    """Return (rationale, the right answer as this completion would give it), or None without any answer.

    The rationale is what stands before the answer that the grader finds, right or wrong; what comes after is
    left out. For the grader exact, which knows no rationale, the answer is the last word.
    """
    if complaint(grader, text) is not None:
        return None
    answer, start, form = str(answer), None, FORMS[grader]
    if grader == "exact":
        start = text.rstrip().rfind(" ") + 1
        answer = answer.rstrip().rpartition(" ")[2] if text[:start].strip() else answer     # or all of it
    elif grader == "number" and "####" in text:
        start, form = text.rfind("####"), "#### {}"
    elif grader == "boxed" or grader == "number" and last_boxed(text):
        start, form = text.rfind("\\boxed{"), FORMS["boxed"]
    else:
        start = [found.start() for found in ANSWERS[grader].finditer(text)][-1]
    rationale = text[:start].rstrip()
    closing = text[len(rationale):start] + form.format(answer)
    if grader == "number" and not number(rationale + closing, answer):      # 1.2.3 and 7 would make 1.27
        closing = f" #### {answer}"
    return rationale, closing


# grader -> where the answer begins that it looks for
ANSWERS = {"number": NUMBER, "letter_tag": re.compile("<answer>.*?</answer>", re.S),
           "final_letter": re.compile(r"final answer:(?=\W*\b[A-Z]\b)", re.I)}
