r"""Graders: does a completion answer the question? One per convention; its score is in [0, 1].

    exact         the completion, stripped, is the answer
    number        the number after the last #### or in the last \boxed{}, whichever is later, or else the last
                  number, equals the answer's: 3/4 = 0.75 = \frac{3}{4}, 1,000 = $1000 = 1e3; GSM8K
    boxed         the last \boxed{} is mathematically the answer; MATH, AIME (needs math-verify)
    letter_tag    the last <answer> tag holds the answer, a letter or a symbol of two; SciKnowEval
    final_letter  the last "Final answer: X" has the answer's letter; MedQA
    ifeval        the share of the answer's instructions that the completion follows, strictly; IFEval
                  (needs lm-eval; data/ifeval.py)
    FILE.py:NAME  your own: the function NAME(completion, row) returns a number in [0, 1] for a prompt row

They read a completion without its thinking, and judge its answer, not a piece of it: 1/4 is no 4, x^2 is
no 2, and "Final answer: A cat" is no A. A completion costs at most a second (your own function: what it
takes).
"""
import importlib.util
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from numbers import Real
from pathlib import Path

from config import Refused, home, nearest

from . import ifeval
from .mathematics import same


def without_thinking(text):
    """Return a text without <think>..</think>, whose begin the prompt may hold, and whose end may be cut."""
    text = re.sub(r"<think>.*?(?:</think>\s*|\Z)", "", text, flags=re.S)
    return re.sub(r"\A.*</think>\s*", "", text, flags=re.S)


def last(pattern, text):
    """Return the last match of a compiled pattern in a text, or None."""
    found = list(pattern.finditer(text))
    return found[-1] if found else None


# ---- numbers -----------------------------------------------------------------------------------------------

# What is written in several ways, and the plain way of it, in this order.
PLAIN = [(re.compile(pattern), new) for pattern, new in (
    (r"[−–]", "-"), (r"½", " 1/2"), (r"¼", " 1/4"), (r"¾", " 3/4"),
    (r"\{,\}", ","), (r"\\!", ""), (r"(?<=\d)(?:\\,|[\u00a0\u2009\u202f])(?=\d{3})", ","),      # 9{,}500
    (r"\^\{?\\(?:circ|degree)\}?", ""),
    (r"(?<=\d)[ ]?\\[cdt]?frac", r" \\frac"),                                                   # 1\frac{1}{2}
    (r"\\[cdt]?frac\s?\{\s?(-?[\d.,]+)\s?\}\s?\{\s?([\d.,]+)\s?\}", r"\1/\2"),
    (r"\\[cdt]?frac\s?(\d)\s?(\d)", r"\1/\2"),
    (r"(?<=\d)\s?(?:\\times|\\cdot|[×*x·])\s?10\s?(?:\^|\*\*)\s?\{?([-+]?\d+)\}?", r"e\1"))]    # 3 x 10^8
DECIMAL = r"(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(rf"""
    (?<![\w.^/\\]) (?<![\^_]\{{) (?<![\^_]-) (?<![\^_]\{{-)             # no piece of H2O, 1.2.3, x^2, x_{{2}}
    (?<!frac\{{) (?<!sqrt\{{) (?<!\}}\{{)                               # nor of \frac{{2}}{{x}}
    (?<!\d[,:+*×÷]) (?<!\d[ ][+*×÷/][ ])                                # nor of 1,2 and 2 + 3
    (?P<minus> (?<![)}}])- )? (?:\\?[$€£])?                             # the minus of 10-5 is not a sign
    (?: (?:(?P<whole>\d+)[ ])? (?P<top>{DECIMAL})[ ]?/[ ]?(?P<bottom>{DECIMAL})         # 2 3/4
      | (?P<decimal>{DECIMAL}) (?:[eE](?P<power>[-+]?\d+))? )
    (?:[ ](?P<scale>thousand|million|billion|trillion)\b)?
    (?! \d | [.,:]\d | [eE][-+]?\d | \^ | [ ]?[+*×÷/][ ]?[\d(] | [ ]?[√π]              # nor of 2 + 3 and 2π
      | [ ]?\\(?:sqrt|pi|[cdt]?frac|times|cdot|div|pm)\b | [ ]?[inxyz](?![^\W\d_]) )    # nor of 5x
    """, re.X)
SCALES = {None: 1, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# What may stand beside a number that is an answer (commands, an exponent of a unit, bold), and what may not.
BESIDE = re.compile(r"\\(?:text|math|mbox)\w*(?=\{)|(?:(?<=[^\W\d_])|(?<=\}))\^\{?[23]\}?|\*\*")
AGAINST = re.compile(r"\d|[+*^_=<>|!√π]|[-/](?![^\W\d_])|\\[a-zA-Z]|\b(?:or|and|to|not)\b")


def plain(text):
    """Return a text with its numbers in the plain way of writing."""
    for pattern, new in PLAIN:
        text = pattern.sub(new, text)
    return text


def value(match):
    """Return the number of a match of NUMBER, as a Fraction; None without one, or for one too long to use."""
    if not match or len(match[0]) > 1000 or abs(int(match["power"] or 0)) > 300:
        return None
    read = lambda name: Fraction((match[name] or "0").replace(",", ""))
    if match["top"] and not read("bottom"):
        return None
    found = read("whole") + read("top") / read("bottom") if match["top"] else read("decimal")
    found *= Fraction(10) ** int(match["power"] or 0) * SCALES[match["scale"]]
    return -found if match["minus"] else found


def only_number(text):
    """Return the number that a text is, but for a name before it and a unit (x = 5 cm), or None."""
    text = re.sub(r"\A\s*(?:[^\W\d]\w*\s*=)?\s*\+?", "", plain(text))
    match = last(NUMBER, text)
    beside = BESIDE.sub("", f"{text[:match.start()]} {text[match.end():]}") if match else ""
    return None if AGAINST.search(beside) else value(match)


def last_boxed(text):
    """Return the contents of the last \\boxed{..}, or None if there is none or its braces never close."""
    start, depth = last(BOX, text), 0
    if not start:
        return None
    for brace in BRACE.finditer(text, start.end() - 1):     # from the opening one on
        depth += {"{": 1, "}": -1}.get(brace[0], 0)         # an escaped one does not count
        if depth == 0:
            return text[start.end():brace.start()]
    return None


BOX, BRACE = re.compile(r"\\f?boxed\s?\{"), re.compile(r"\\.|[{}]", re.S)


# ---- letters -----------------------------------------------------------------------------------------------

MARKUP = r"(?:\\[a-zA-Z]+\s?\{|\\[(\[]|[^\w\\]|_)*"                 # **, ( or \boxed{\text{
LABEL = re.compile(MARKUP + r"([^\W\d_]{1,2})[\W_]*")
TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.S)
FINAL = re.compile(r"final answer:", re.I)
LETTER = re.compile(MARKUP + r"""(?:(?:option|choice)[ ]\W*)?([A-Z])
    (?! [^\W_] | ['’-]\w | [ ]+\w | \( | \s?[,/&+]\s?\(?[A-Z]\b )     # no word ("A cat"), nor several letters
    """, re.I | re.X)


def label(text):
    """Return the letter, or the symbol of two, that a text is, but for markup around it; None: it is none."""
    found = LABEL.fullmatch(text)
    return found and found[1]


# ---- where a text answers: (the place, or None if no mark is there; the answer), or None -------------------

def find_text(text):
    """Find the whole text."""
    return 0, text.strip()


def find_number(text):
    """Find a number after ####, in a box, or at the end, in the way of the grader `number`."""
    mark, box = text.rfind("####"), last(BOX, text)
    if box and box.start() > mark:
        start, found = box.start(), only_number(last_boxed(text) or "")
    elif mark >= 0:
        rest = plain(text[mark + 4:]).lstrip(" \n\t*:=(")
        start, found = mark, value(NUMBER.match(rest) or last(NUMBER, rest))
    else:
        start, found = None, value(last(NUMBER, plain(text)))
    return None if found is None else (start, found)


def last_word(text, number):
    """Return where the last word begins from which on a text ends in the same number as the whole text."""
    for word in reversed(list(re.finditer(r"\S+", text))):
        if value(last(NUMBER, plain(text[word.start():]))) == number:
            return word.start()


def find_box(text):
    r"""Find what is in the last \boxed{}."""
    found = last_boxed(text)
    return (last(BOX, text).start(), found) if found and found.strip() else None


def find_tag(text):
    """Find what is in the last <answer> tag."""
    found = last(TAG, text)
    return (found.start(), found[1].strip()) if found and found[1].strip() else None


def find_final_letter(text):
    """Find the letter after the last "Final answer:", as a capital."""
    start = last(FINAL, text)
    found = start and LETTER.match(text, start.end())
    return (start.start(), found[1].upper()) if found else None


# ---- the graders -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Grader:
    """A convention of how a completion answers."""
    form: str                           # the plainest correct completion, {} standing for the answer, or ""
    find: Callable                      # text -> (place, answer), or None
    what: str                           # it looks for, in words
    read: Callable = str.strip          # the row's answer, a text -> what `equal` compares; None: it cannot
    kind: str = ""                      # what the row's answer has to be, in words
    equal: Callable = operator.eq       # (found answer, read answer) -> whether they are the same, or a score


def number_answer(answer):
    """Return the number that a row's answer is; of GSM8K's own answers, what stands after ####."""
    return only_number(answer.rpartition("####")[2])


def letter_answer(answer):
    """Return the one letter that a row's answer is, as a capital, or None."""
    return answer.strip().upper() if re.fullmatch(r"\s*[A-Za-z]\s*", answer) else None


def same_mathematics(found, answer):
    """Return whether two texts are the same mathematics, by math-verify, or the same number, by `number`."""
    verdict = same(*(re.sub(r"\s+|(?<!\\)\$", " ", text) for text in (answer, found)))
    if verdict is None:
        raise Refused("grader 'boxed' needs math-verify: pip install 'math-verify[antlr4_13_2]'")
    value = only_number(found)
    return verdict or value is not None and value == only_number(answer)


GRADERS = {
    "exact": Grader("{}", find_text, "text"),
    "number": Grader("{}", find_number, "number", number_answer, "a number"),
    "boxed": Grader("\\boxed{{{}}}", find_box, "\\boxed{..}", equal=same_mathematics),
    "letter_tag": Grader("<answer>{}</answer>", find_tag, "<answer>..</answer>", label, "a letter",
                         lambda found, answer: label(found) == answer),
    "final_letter": Grader("Final answer: {}", find_final_letter, '"Final answer: X"', letter_answer,
                           "a letter"),
    "ifeval": Grader("", lambda text: (0, text), "text", ifeval.checkers,
                     "a list of [instruction, arguments]", ifeval.share_followed)}


def grade(grader, completion, answer, row=None):
    """Return a grader's score, in [0, 1], of a completion (a text without its EOS).

    row: the prompt row, for a grader of the user's own; without it the grader gets a row of the answer only.
    """
    text = without_thinking(completion)
    if is_own(grader):
        return own_score(grader, text, row or {"answer": answer})
    if grader not in GRADERS:
        raise Refused(f"unknown grader {grader!r}; {nearest(grader, GRADERS)}, or FILE.py:NAME")
    known = GRADERS[grader]
    found, right = known.find(text), known.read(str(answer))
    if right is None:
        raise Refused(f"grader {grader!r} needs an answer with {known.kind} and nothing else, not {answer!r}")
    return float(found is not None and known.equal(found[1], right))


def can_be_correct(grader, answer, row=None):
    """Return whether any completion can be correct: whether the grader accepts the plainest one.

    Of ifeval and a user's own grader that is not known: it only has to return a score. Raise Refused, as
    `grade` does, for a name that is no grader's and for an answer that is not of the grader's kind.
    """
    form = "{}" if grader not in GRADERS else GRADERS[grader].form
    return grade(grader, form.format(answer), answer, row) > 0 or is_own(grader) or not form


def complaint(grader, completion):
    """Return what the environment says of a completion in which the grader finds nothing to grade.

    None where the grader finds something, right or wrong, and for graders that take any text.
    """
    if is_own(grader) or GRADERS[grader].find(without_thinking(completion)):
        return None
    return f"The answer cannot be graded: there is no {GRADERS[grader].what} in it."


def split_at_answer(grader, text, answer):
    """Return (rationale, the right answer as this completion would give it), or None without any answer.

    The rationale is what stands before the answer that the grader finds, right or wrong, without thinking;
    what comes after is left out. For the grader exact the answer of a chain is its last word, and whatever
    has another number of words than the right answer has no rationale.
    """
    if is_own(grader) or not GRADERS[grader].form:
        raise Refused(f"where a completion answers is not known of the grader {grader}, only of: "
                      f"{', '.join(name for name in GRADERS if GRADERS[name].form)}")
    text, answer = without_thinking(text), str(answer)
    found = GRADERS[grader].find(text)
    if not found:
        return None
    start, form = found[0], GRADERS[grader].form
    if grader == "exact":
        if len(text.split()) != len(answer.split()):
            return "", answer
        start, answer = text.rstrip().rfind(" ") + 1, answer.rstrip().rpartition(" ")[2]
    elif start is None:
        start = last_word(text, found[1])
    elif grader == "number":
        form = "#### {}" if text.startswith("####", start) else GRADERS["boxed"].form
    rationale = text[:start].rstrip()
    closing = text[len(rationale):start] + form.format(answer)
    if grader == "number" and not grade(grader, rationale + closing, answer):   # "2 +" and 7 would be 2 + 7
        closing = f" #### {answer}"
    return rationale, closing


# ---- a grader of the user's own ----------------------------------------------------------------------------

def is_own(grader):
    """Return whether a grader's name is that of a function in a file, FILE.py:NAME."""
    return isinstance(grader, str) and ".py:" in grader


@lru_cache
def own(grader):
    """Return the function FILE.py:NAME; refuse a file that does not run and a name that is no function."""
    path, _, name = grader.rpartition(":")
    try:
        there = Path(home(path)).is_file()
    except (OSError, ValueError):                               # a name that is too long, or with a NUL
        there = False
    if not there:
        raise Refused(f"grader {grader}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, home(path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Refused(f"grader {grader}: {path} does not run: {error!r}") from None
    if not callable(getattr(module, name, None)):
        raise Refused(f"grader {grader}: {path} has no function {name!r}")
    return getattr(module, name)


def own_score(grader, completion, row):
    """Return what the function FILE.py:NAME says; refuse what is no number in [0, 1]."""
    try:
        score = own(grader)(completion, row)
    except Refused:
        raise
    except (Exception, SystemExit) as error:
        raise Refused(f"grader {grader} fails on the completion {completion[:60]!r}: {error!r}") from None
    if not isinstance(score, Real) or not 0 <= score <= 1:
        raise Refused(f"grader {grader} returns {score!r}, which is no number in [0, 1]")
    return float(score)
