r"""What a self-teacher and a tutor get to read, and what of a tutor's text a tutee may read.

SDPO's self-teacher (arXiv 2601.20802) is the student with a solution of its own or feedback of the
environment in its prompt. OPCoD (arXiv 2606.14368) adds a peer's feedback: prompts as in its Appendix C.1,
in our own words; C.2 removes revealed answers, keeps feedback whose concept is in the question, and strips
the concept's tag.

What C.2 leaves open [ours]: an answer is an option's letter, never a value: \boxed{42}, "option A is too low"
and "the peer's answer is C" stay. A sentence that tells the letter goes, its value and all, or from its last
", so" on. "Choose B", "B is right" and an option's text in a sentence of its own are not recognised.
"""
import dataclasses
import json
import re
import string
import unicodedata

from config import Refused, nearest, parse_json
from data.graders import without_thinking
from data.prompts import is_chat, read_text

OUTCOMES = ("kept", "fb_none", "no_concept_tag", "empty", "all_generic", "no_match")     # Table 3
MOST_WORDS = 120                                                       # [ours] the prompt asks for 80
PAPER = "problem question answer value calculation formula student peer specialist"
OURS = """option choice letter solution step reason result response attempt mistake error number concept term
    statement explanation feedback approach method example task"""
STOP = """a an the this that these those it its of in on at to for from by with as into about between per and
    or but not no if then than so is are was were be been has have do does did can could will would should may
    must what which who when where why how all any each both only also there their your you we formulae
    correct incorrect right wrong true false reasoning please given following find determine calculate"""
GENERIC = frozenset(STOP.split()) | {noun + s for noun in (PAPER + " " + OURS).split() for s in ("", "s")}


@dataclasses.dataclass(frozen=True)
class Templates:
    reprompt: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
    solution: str = "\n\nCorrect solution:\n\n{solution}"
    environment: str = "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}"
    peer: str = "\n\nA peer has read your earlier attempt at this question and comments:\n\n{feedback}"
    anchored: str = """\
You are a specialist in {tutor_domain}. Your peer, a specialist in {tutee_domain}, has tried the question \
below and may have erred wherever it takes {tutor_domain} to reason well.

First, before anything else, name the one concept on which the question turns: one to three words, copied \
letter by letter from the question, between <concept> and </concept>. It has to be a technical term. Words \
that would fit any question (problem, question, answer, option, value, calculation, formula, step, student, \
peer, specialist) will be rejected.

Then write to your peer: three to five sentences, about 80 words at most, on the {tutor_domain} in this \
attempt. Say which of its steps hold, which are wrong and what it lacks, and quote the steps you mean. Leave \
the solving to your peer, and do not say which option's letter is right.

The question:
{question}

The attempt of the specialist in {tutee_domain}:
{response}

Now <concept>...</concept>, then your three to five sentences:"""
    unanchored: str = """\
You know the field of the question below. Somebody has tried it. Read the question, then the attempt, and \
tell its author in a few helpful sentences which parts are right, which are wrong or lacking, and how to \
reason better. Do not give the right answer away.

The question:
{question}

The attempt:
{response}

Your feedback:"""
    told: str = """\
{prompt}

The correct answer is: {answer}

Explain step by step how to arrive at it, as if nobody had told you, and end as asked for above."""


DOMAINS = {"tutor_domain", "tutee_domain"}
REQUIRED = {name: set(re.findall(r"{(\w+)}", text)) - DOMAINS for name, text in vars(Templates()).items()}


def read_templates(path):
    """Return Templates from a JSON file that may name some of them; the others keep their default.

    Whatever is unusable is refused in one line. A literal brace is written twice, as for str.format.
    """
    text = read_text("--templates", path)
    try:
        given = parse_json(text)
        json.dumps(given, ensure_ascii=False).encode()          # half of a surrogate pair is no text
    except ValueError as error:
        raise Refused(f"{path}: not JSON ({error})") from None
    if not isinstance(given, dict):
        raise Refused(f"{path}: templates are one JSON object, not {str(given)[:60]!r}")
    for name, text in given.items():
        if name not in REQUIRED:
            raise Refused(f"{path}: unknown template {name!r}; {nearest(name, REQUIRED)}")
        if not isinstance(text, str):
            raise Refused(f"{path}: template {name!r} is text, not {str(text)[:60]!r}")
        try:
            found = {field + ("!" + conversion if conversion else "") + (":" + spec if spec else "")
                     for _, field, spec, conversion in string.Formatter().parse(text) if field is not None}
        except ValueError as error:
            raise Refused(f"{path}: template {name!r}: {error}; a literal brace is {{{{ or }}}}") from None
        optional = DOMAINS if "response" in REQUIRED[name] else set()
        for what, fields in (("has unknown", found - REQUIRED[name] - optional),
                             ("lacks", REQUIRED[name] - found)):
            if fields:
                raise Refused(f"{path}: template {name!r} {what} {{{'}, {'.join(sorted(fields))}}}; "
                                 f"its placeholders are {{{'}, {'.join(sorted(REQUIRED[name] | optional))}}}")
    return Templates(**given)


def last_question(prompt):
    """Return the index of a chat's last user message, and its content; for text None, and the text."""
    if not is_chat(prompt):
        return None, prompt
    for index in reversed(range(len(prompt))):
        if prompt[index]["role"] == "user":
            return index, prompt[index]["content"]
    raise Refused(f"a prompt without a message of the user: {str(prompt)[:100]}")


def reprompt(prompt, templates, solution=None, environment=None, peer=None):
    """Return what the self-teacher sees: the prompt, text or chat, with its last question rewritten.

    None when there is nothing to add: blank text is nothing, and a solution that is all thinking is blank.
    """
    solution = without_thinking(solution or "")
    solution = templates.solution.format(solution=solution) if solution.strip() else ""
    feedback = "".join(template.format(feedback=text) for template, text in (
        (templates.environment, environment), (templates.peer, peer)) if text and text.strip())
    if not solution and not feedback:
        return None
    return with_question(prompt, templates.reprompt, solution=solution, feedback=feedback)


def with_answer(prompt, templates, answer):
    """Return the prompt with its answer, for a model that is to explain it (STaR, 2203.14465)."""
    return with_question(prompt, templates.told, answer=answer)


def with_question(prompt, template, **given):
    """Return the same prompt, text or chat, with its last question in a template."""
    index, question = last_question(prompt)
    text = template.format(prompt=question, **given)
    return text if index is None else [*prompt[:index], prompt[index] | {"content": text},
                                       *prompt[index + 1:]]


def tutor_prompt(prompt, response, templates, tutor_domain, tutee_domain, anchored=True):
    """Return a tutor's prompt: text for text, one user message for a chat (without its system prompt)."""
    index, question = last_question(prompt)
    text = (templates.anchored if anchored else templates.unanchored).format(
        question=question, response=response, tutor_domain=tutor_domain, tutee_domain=tutee_domain)
    return text if index is None else [{"role": "user", "content": text}]


def accept(text, question, anchored=True, most_words=MOST_WORDS, finished=True):
    """Return what a tutee may read of a tutor's text: (feedback, "kept"), or (None, one of OUTCOMES).

    question: text. finished=False: generation was cut off, the last sentence may be half of one.
    """
    text = without_thinking(text)
    named = concept(text)                                       # the sanitiser never sees the inside of a tag
    text = without_answers(without_concept(text)).strip().lstrip(".,:; \n")     # and none hides a letter
    checks = {"fb_none": named is None and not words(text)}
    if anchored:
        checks |= {"no_concept_tag": named is None, "empty": not words(named or ""),
                   "all_generic": not specific(named or ""), "no_match": not anchors(named or "", question)}
    for outcome, failed in checks.items():
        if failed:
            return None, outcome
    text = shortened(text, most_words, finished)
    return (text, "kept") if words(text) else (None, "fb_none")


TAG = re.compile(r"([*_`]{0,3})<\s*concept\s*>((?:(?!<\s*/?\s*concept\s*>).)*)<\s*/\s*concept\s*>\1",
                 re.I | re.S)


def concept(text):
    """Return what is in the first <concept>..</concept>, the innermost if nested; None: none, or not closed.

    Wherever it stands, however long it is: the paper asks for one to three words first, and checks neither.
    """
    found = TAG.search(text)
    return found and found[2].strip()


def without_concept(text):
    """Return a text without every concept and its tag, and without stray tags."""
    return re.sub(r"<\s*/?\s*concept\s*>", "", TAG.sub("", text), flags=re.I)


def words(text):
    r"""Return the set of words, lower case; hyphens and markup part them; H₂O = H_2O = H2O, no \mathrm."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\(?:[a-z]+(?=\s*[{\[])|(?:left|right|times|cdot|circ)(?![a-z]))", " ", text)
    return set(re.findall(r"[^\W_]+", re.sub(r"\}?[_^](?:\{(\d+)\}|(?=\d))", r"\1", text)))


def specific(text):
    """Return the words that may anchor: not generic, no number, no lone letter (options are "A:" to "D:")."""
    return {w for w in words(text) - GENERIC if not w.isnumeric() and not re.fullmatch("[a-z]", w)}


def anchors(concept, question):
    """Return the specific words of a concept that occur in the question."""
    return specific(concept) & words(question)


LETTER = (r"(?-i:\([A-Ha-d]\)|\b[A-Ha-d](?=\W*\Z|[.;:!?)](?!\w)|(?<!a),| [-–—(]|(?<=[B-H]) [a-z]"
          r"| (?:because|since|as|and|but|in|is|at)\b))")           # not in "A vector", F = ma, B-field, D's
RIGHT = r"\b(?:correct|right|true|best|actual|proper) (?:answer|option|choice|letter|one)\b"
WORDS = r"(?:,? (?!(?:is|was|be|not|peer|student|you|they)\b)[\w'’-]+){0,5}?"        # the answer TO THIS is
IS = (r"(?: ?[:：]| [-–—]|,? (?:is|was|be)\b)"
      r"(?:[ :,]|\b(?:the|option|choice|therefore|thus|most|likely|probably|clearly|correct|answer)\b){0,9}")
NOT_THEIRS = "".join(rf"(?<!\b{word} )" for word in (
    "your their his her peer student 's ’s ' ’ own final wrong incorrect chosen selected").split())
OPTION_IS = (r"\(?(?-i:\b[A-H])\)?(?::? \(?[-\d][^()]{0,40}\)?)?"                       # option B (2.0) is
             r" (?:is|was|(?:must|should|would) be) (?:\w+ly )?(?:the )?")
REVEALING = (                                                    # what it is, pattern for plain text, example
    ("the answer is B", rf"{NOT_THEIRS}\b(?:final )?(?:(?:answer|{RIGHT}){WORDS}|option|choice){IS}{LETTER}"
     r"(?! is\b)", "So the correct answer is\nD: 3.96"),
    ("the right answer, B", rf"{RIGHT},? (?:option )?{LETTER}", "The correct option (C) is taken in step 3."),
    ("option B is right", rf"(?<!if )(?<!whether )\b(?:option|choice|answer) {OPTION_IS}(?:correct|right)\b",
     "Option B (2.03) is correct."),
    ("B is the right answer", rf"{OPTION_IS}{RIGHT}", "Option B is the best choice."),
    ("a tag", "</?answer>", "<answer>\nthe flux,\nthat is B\n</answer>"))
BOLD = re.compile(r" ?(?<![*\w])(\*{2,3}|__)(?:\(?[A-H]\)?|\([a-d]\))(?:\.|: [^*\n]{1,60})?\1"
                  r"(?![*\w]|-\w|\s*[=+/^×·])")
SENTENCE = re.compile(r""".+? (?: \Z                                # the text ends,
    | (?<!^\d) [.!?] [)\]"”*_$]* (?=[ \t]+[^\d\s}] | \s*\Z)         # a stop, not of 2.03, 1. or B. 2.03
    | (?<=[^\s:：]) (?<!\bis) (?<!<answer>) (?=[ \t]*\n\s*[^a-z\\<\s]) )""",     # a line, if not cut
                      re.M | re.S | re.X)


def without_answers(text):
    """Return a text without sentences that tell which option is right, and without bold letters (C.2)."""
    before = None
    while text != before:
        before, text = text, BOLD.sub("", "".join(map(harmless, SENTENCE.findall(text))))
    return text


def harmless(sentence):
    """Return a sentence; if it tells an answer, what stands before its last ", so" or ", but"; or nothing."""
    if reveals(sentence):
        sentence = re.sub(r"(?is)(.+),\s(?:so|and|but|while)\b.*?([.!?]?)\s*\Z", r"\1\2", sentence)
    return "" if reveals(sentence) else sentence


def reveals(sentence):
    r"""Whether it tells an answer, as a box does; markup aside: **B** and \text{B} are B, \n is a space."""
    text = re.sub(r"\\boxed\b", "the correct answer, ", sentence)
    text = re.sub(r'\\(?:text|math)\w*|\\[\[\]]|[*_`"“”$#{}]', "", text)
    return any(re.search(pattern, " ".join(text.split()), re.I) for _, pattern, _ in REVEALING)


SHORT = re.compile(r"\W*(?:e\.g|i\.e|cf|vs|eqs?|figs?|refs?|approx|resp|dr|\d\d?)\.", re.I)   # no end


def shortened(text, most_words, finished=True):
    """Return at most that many words, cut after a whole sentence, or after a word if there is none.

    An unfinished text is cut too: its last sentence may be half of one, its last word half a word.
    """
    pieces = list(re.finditer(r"\S+", text))
    if finished and len(pieces) <= most_words:
        return text
    ends = [m.end() for m in pieces[:most_words]
            if re.search(r"[.!?…。！？][)\]\"”’*_$]*\Z", m[0]) and not SHORT.fullmatch(m[0])]
    whole = [m.end() for m in pieces[:min(most_words, len(pieces) - (not finished))]]
    return text[:(ends or whole or [0])[-1]]
