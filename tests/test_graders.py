"""Graders: what counts as an answer, what a completion cannot do to a run, and graders of the user's own."""
import importlib.util
import json
import random
import sys
import threading
import time
from pathlib import Path

import pytest

from config import Refused
from data import convert, ifeval, mathematics
from data.graders import GRADERS, can_be_correct, complaint, grade, last_boxed, split_at_answer
from data.prompts import load_prompts
from opd import main

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not part of the project")
mathematical = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None,
                                  reason="optional: pip install 'math-verify[antlr4_13_2]'")

instructed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None,
                                reason="optional: pip install 'lm-eval[ifeval]'")

CASES = {
    "exact": [(" map ", "map", 1), ("map x", "map", 0), ("<think>pam?</think>\nmap", "map", 1),
              ("<think>map", "map", 0), ("pam</think>map", "map", 1)],
    "number": [
        # the last number of a text
        ("so she makes $1,234.50 a day", "1234.5", 1), ("first 3, then 18.", "18", 1), ("18 of 20", "18", 0),
        ("none", "3", 0), ("3.0", "3", 1), ("0.30", ".3", 1), ("10-5", "5", 1), ("it is -5", "-5", 1),
        ("it is −5", "-5", 1), ("it is -5", "5", 0), ("costs -$5", "-5", 1), ("costs $-5", "-5", 1),
        ("5 kg", "5", 1), ("5kg, wow!", "5", 1), ("**18**", "18", 1), ("it's 5!", "5", 1), ("$5$", "5", 1),
        ("so US$5", "5", 1), ("at 20%.", "20", 1), ("(18)", "18", 1), ("x=18", "18", 1), ("18/day", "18", 1),
        # the same number, written in other ways
        ("0.75", "3/4", 1), ("3/4", "0.75", 1), ("6/8", "3/4", 1), ("-3/4", "-0.75", 1),
        ("2 3/4 cups", "2.75", 1),
        ("2½ cups", "2.5", 1), ("1e3", "1000", 1), ("1.5E-3", "0.0015", 1), ("3 \\times 10^{4}", "30000", 1),
        ("3 × 10^4 m", "30000", 1), ("5 million", "5000000", 1), ("x = 7.", "a\n#### 7", 1),
        ("so $\\frac{3}{4}$.", "0.75", 1), ("1\\frac{1}{2}", "1.5", 1), ("-\\dfrac34", "-0.75", 1),
        ("1,00,000", "100000", 1), ("12\u202f000", "12000", 1), ("1/3", "0.333", 0),
        # a piece of an answer is no answer
        ("1/4", "3/4", 0), ("1/4", "4", 0), ("x^2", "2", 0), ("H2", "2", 0), ("x_2", "2", 0),
        ("x^{2}", "2", 0),
        ("5x", "5", 0), ("2\\pi", "2", 0), ("2π", "2", 0), ("5\\sqrt{2}", "2", 0), ("\\frac{x}{2}", "2", 0),
        ("\\frac{2}{x}", "2", 0), ("1.2.3", "3", 0), ("1.2.3", "2.3", 0), ("1,2", "12", 0), ("1,2,3", "3", 0),
        ("3:30", "30", 0), ("2 + 3", "3", 0), ("10^3", "3", 0), ("2*3", "3", 0), ("2^-3", "3", 0),
        ("1/2/2024", "2024", 0), ("1/2/24", "1/2", 0), ("5 million", "5", 0), ("2 + 3 = 5", "5", 1),
        ("18 = 3 * 6", "18", 1), ("an area of 5 m^2", "5", 1), ("10 cm2", "10", 1), ("4/0", "4", 0),
        # boxes
        ("it is \\boxed{42}, not 43", "42", 1), ("\\boxed{x^2}", "2", 0), ("\\boxed{9{,}500}", "9500", 1),
        ("\\boxed{5,\\!000}", "5000", 1), ("\\boxed{5\\,000}", "5000", 1), ("\\boxed{\\$18}", "18", 1),
        ("\\boxed{18\\text{ dollars}}", "18", 1), ("\\boxed{18 dollars}", "18", 1),
        ("\\boxed{18\\%}", "18", 1),
        ("\\boxed{5\\text{ cm}^2}", "5", 1), ("\\boxed{x = 5}", "5", 1), ("\\boxed{2x = 6}", "6", 0),
        ("\\boxed{1, 2}", "2", 0), ("\\boxed{5 \\text{ or } 6}", "6", 0), ("\\boxed{5!}", "5", 0),
        ("\\boxed{5 + x}", "5", 0), ("\\boxed{\\frac{3}{4}}", "3/4", 1),
        ("\\boxed{-\\frac{3}{4}}", "-3/4", 1),
        ("\\boxed{45^\\circ}", "45", 1), ("\\boxed{\\boxed{5}}", "5", 1), ("\\fbox 4, \\boxed {5}", "5", 1),
        ("\\boxed{3} or \\boxed{4}", "3", 0), ("\\boxed{12", "12", 0), ("\\boxed{3} and \\boxed{4", "3", 0),
        ("\\boxed{}", "5", 0), ("\\boxed{60 miles/hour}", "60", 1), ("\\boxed{\\text{five}} 5", "5", 0),
        # ####
        ("... \n#### -5", "-5", 1), ("#### 18\nI checked it 2 times.", "18", 1), ("#### 18 of 20", "18", 1),
        ("####18", "18", 1), ("#### $1,000", "1000", 1), ("#### **18**", "18", 1),
        ("#### The answer is 18.", "18", 1),
        ("#### 2 * 9 = 18", "18", 1), ("5 ####", "5", 0), ("#### Step 2\nso \\boxed{7}", "7", 1),
        ("\\boxed{5}\n#### 6", "6", 1), ("\\boxed{5}\n#### 6", "5", 0), ("#### 1/4", "4", 0),
        # thinking
        ("<think>\\boxed{4}</think>It is 5.", "5", 1), ("\\boxed{4}</think>It is 5.", "5", 1),
        ("<think>It is 5", "5", 0), ("<think>#### 4\n</think>\n\n5", "4", 0), ("4 <think>or 5", "4", 1)],
    "letter_tag": [
        ("<reasoning>A or B</reasoning><answer>\nB\n</answer>", "B", 1),
        ("<answer>A</answer> no, <answer>B</answer>", "A", 0), ("B", "B", 0), ("<answer></answer>", "B", 0),
        ("<answer>(B)</answer>", "B", 1), ("<answer>**B**.</answer>", "B", 1),
        ("<answer>$\\boxed{\\text{B}}$</answer>", "B", 1),
        ("<answer>A cat</answer>", "A", 0), ("<answer>A, B</answer>", "A", 0),
        ("<answer>B: 3.96</answer>", "B", 0),
        ("<answer>Both</answer>", "B", 0), ("<answer>b</answer>", "B", 0), ("<answer>Si</answer>", "Si", 1),
        ("<answer>S</answer>", "Si", 0), ("<answer>φ</answer>", "φ", 1), ("<answer>B", "B", 0),
        ("an <answer>is <answer>B</answer>", "B", 1),
        ("<think><answer>A</answer></think><answer>B</answer>", "B", 1),
        ("<think><answer>B</answer>", "B", 0)],
    "final_letter": [
        ("Final answer: B? No. Final Answer: **C**", "C", 1), ("Final answer: (d)", "D", 1),
        ("The answer is C", "C", 0), ("Final answer: Both", "B", 0), ("no letter", "A", 0),
        ("Final answer: \\boxed{B}", "B", 1), ("Final answer: $\\boxed{\\text{(B)}}$.", "B", 1),
        ("Final answer: A cat ..", "A", 0), ("Final answer: A", "A", 1), ("**Final answer:** B", "B", 1),
        ("Final answer:\nB\nIt fits.", "B", 1), ("Final answer: B. It fits.", "B", 1),
        ("Final answer: (B) It", "B", 1),
        ("Final answer: B) It fits", "B", 1), ("Final answer: B: 3.96", "B", 1),
        ("Final answer: Option B", "B", 1),
        ("Final answer: B - it fits", "B", 1), ("Final answer: A, C", "A", 0),
        ("Final answer: A or C", "A", 0),
        ("Final answer: A/C", "A", 0), ("Final answer: A's", "A", 0), ("Final answer: A-level", "A", 0),
        ("Final answer: B. Final answer: none", "B", 0), ("Final answer: option", "O", 0),
        ("<think>Final answer: A</think>Final answer: B", "B", 1), ("<think>Final answer: B", "B", 0)]}
HARD = [(grader, *case) for grader, cases in CASES.items() for case in cases]
BOXED = [
    ("thus \\boxed{\\frac{1}{2}}", "0.5", 1), ("thus \\boxed{\\frac{1}{3}}", "0.5", 0), ("0.5", "0.5", 0),
    ("\\boxed{x^2}", "2", 0), ("\\boxed{1/4}", "3/4", 0), ("\\boxed{0.75}", "\\frac{3}{4}", 1),
    ("\\boxed{9{,}500}", "9500", 1), ("\\boxed{5,\\!000}", "5000", 1), ("\\boxed{1e3}", "1000", 1),
    ("\\boxed{18 dollars}", "18", 1), ("\\boxed{12.5\\%}", "12.5", 1), ("\\boxed{1, 2}", "2", 0),
    ("\\boxed{2\n3}", "3", 0), ("\\boxed{7$ $2}", "2", 0), ("\\boxed{x = 2}", "2", 1),
    ("\\boxed{(1,2)}", "(1, 2)", 1),
    ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", 1), ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right.", 1),
    ("\\boxed{\\text{Evelyn}}", "Evelyn", 1), ("\\boxed{(B)}", "\\text{B}", 1), ("\\boxed{5", "5", 0),
    ("<think>\\boxed{5}</think>\\boxed{6}", "6", 1), ("<think>\\boxed{5}", "5", 0),
    ("\\boxed{4}</think>\\boxed{5}", "4", 0)]


@pytest.mark.parametrize("grader, completion, answer, score", HARD)
def test_a_grader_judges_the_answer(grader, completion, answer, score):
    assert grade(grader, completion, answer) == score


@mathematical
@pytest.mark.parametrize("completion, answer, score", BOXED)
def test_boxed_is_mathematical(completion, answer, score):
    assert grade("boxed", completion, answer) == score


def test_there_are_cases_enough_for_every_grader():
    assert len(HARD) >= 60 and {"boxed", "ifeval", *CASES} == set(GRADERS)


def test_a_box_ends_at_its_own_brace():
    for inside in ("5", "\\frac{1}{2}", "\\{1, 2\\}", "\\left\\{ 1 \\right.", "a \\} b", ""):
        assert last_boxed(f"\\boxed{{0}} so \\boxed{{{inside}}}, }}{{") == inside
    assert last_boxed("\\boxed{1} and \\boxed{2") is last_boxed("5") is None


def test_an_unknown_grader_is_answered_with_the_known_ones():
    with pytest.raises(Refused, match=f"{', '.join(GRADERS)}, or FILE.py:NAME"):
        grade("judge", "a", "a")


# ---- answers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grader, answers", [
    ("exact", ["a b", " a ", "7"]),
    ("number", ["1,234 apples", "$5", "-3/4", "50%", "a\n#### 7", "1e3", "x = 5"]),
    ("letter_tag", ["B", "φ", "Si"]), ("final_letter", ["d", " B "])])
def test_an_answer_of_the_graders_kind_can_be_met(grader, answers):
    assert all(can_be_correct(grader, answer) for answer in answers)


@pytest.mark.parametrize("grader, kind, answers", [
    ("number", "a number", ["none", "x^2", "18 of 20", "3 or 4", "3:30", "", "7 ####", "9" * 5000,
                            "1e9999", "1/0"]),
    ("letter_tag", "a letter", ["", "a</answer>b", "Both", "A cat"]),
    ("final_letter", "a letter", ["", "Both", "7", "É", "AB"])])
def test_an_answer_that_is_not_of_the_graders_kind_is_refused(grader, kind, answers):
    """Training on it would only ever say wrong."""
    for answer in answers:
        with pytest.raises(Refused, match=f"needs an answer with {kind}"):
            can_be_correct(grader, answer)


def test_an_answer_that_is_thinking_cannot_be_met():
    assert not can_be_correct("exact", "<think>map")


@real
def test_every_answer_of_gsm8k_is_right_in_every_form_and_its_neighbours_is_wrong():
    for part, count in (("train", 7473), ("test", 1319)):
        rows = convert.rows("openai/gsm8k", SHARED / "gsm8k" / f"{part}.jsonl")
        assert len(rows) == count
        for row, other in zip(rows, rows[1:] + rows[:1]):
            answer, steps = row["answer"], row["solution"].rpartition("\\boxed")[0]
            for text in (row["solution"], f"{steps}#### {answer}", f"{steps}It is ${answer}.", answer):
                assert grade("number", text, answer) == 1, (text, answer)
            same = float(answer.replace(",", "")) == float(other["answer"].replace(",", ""))
            assert grade("number", row["solution"], other["answer"]) == same


@real
@mathematical
def test_every_answer_of_math500_can_be_met():
    rows = convert.rows("HuggingFaceH4/MATH-500", SHARED / "math500" / "test.jsonl")
    assert len(rows) == 500
    assert not [row["answer"] for row in rows if not can_be_correct(row["grader"], row["answer"])]


@pytest.mark.parametrize("grader, graded, nothing", [
    ("number", "so 7", "so seven"), ("number", "\\boxed{7}", "\\boxed{x^2} 7"), ("number", "7", "<think>7"),
    ("boxed", "\\boxed{7}", "\\boxed{7"), ("boxed", "\\boxed{7}", "\\boxed{ }"),
    ("boxed", "\\boxed{x}", "<think>\\boxed{x}"),
    ("letter_tag", "<answer>\nno letter\n</answer>", "<answer>B"),
    ("letter_tag", "<answer>B</answer>", "<answer> </answer>"),
    ("letter_tag", "<answer>B</answer>", "<think><answer>B</answer>"),
    ("final_letter", "final answer: (b)", "the answer is B"),
    ("final_letter", "final answer: b", "final answer: A cat")])
def test_environment_feedback_is_about_the_form_alone(grader, graded, nothing):
    """A right or a wrong answer gets no words: they would tell which it is."""
    assert complaint(grader, graded) is None
    said = complaint(grader, nothing)
    assert said.count(". ") == 0 and said.endswith(".") and "no " in said
    assert complaint("exact", "") is None


@pytest.mark.parametrize("grader, text, answer, split", [
    ("number", "<think>\\boxed{3}</think>so 5.", "7", ("so", " 7")), ("number", "<think>5", "7", None),
    ("number", "2 3/4 cups", "7", ("", "7")), ("number", "a \\frac{1}{2} b", "7", ("a", " 7")),
    ("number", "in 1.2.3", "7", None), ("number", "#### 18\nor 19", "7", ("", "#### 7")),
    ("letter_tag", "<think>a</think>so <answer>A</answer>", "B", ("so", " <answer>B</answer>")),
    ("final_letter", "so\nFinal answer: \\boxed{A}", "B", ("so", "\nFinal answer: B")),
    ("exact", "<think>no</think>06 09", "06 07", ("06", " 07"))])
def test_a_completion_is_split_without_its_thinking(grader, text, answer, split):
    assert split_at_answer(grader, text, answer) == split
    assert split is None or grade(grader, "".join(split), answer) == 1


# ---- hostile completions -----------------------------------------------------------------------------------

def seconds(grader, text, answer, score=0):
    begin = time.monotonic()
    assert grade(grader, text, answer) == score
    return time.monotonic() - begin


N = 20_000
HOSTILE = [piece * N for piece in (
    "<think>", "</think>", "<answer>", "\\boxed{", "Final answer:", "#### ", "99999", "1/", "1,", "1,234",
    ",234", "1 ", "- ", "$", "1.", "\\frac{", "\\frac{1}{", "5 \\times", "²", "1^", "a=", "\\text{", "\\(",
    "\0", "{}", "\n")]
HOSTILE += [start + piece * N for start, piece in (
    ("Final answer:", " "), ("Final answer:", "\\boxed{"), ("1/", "9"), ("9e", "9"), ("5", " "), ("5", "x"),
    ("3", "\\,"), ("#### ", "("))]
HOSTILE += ["1e999999999", "1e-999999999", "{" * N + "}" * N, "\ud800", ""]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:12]!a}")
@pytest.mark.parametrize("grader", sorted(CASES))
def test_a_hostile_completion_costs_at_most_a_second(grader, text):
    answer = "7" if grader == "number" else "B"
    forms = ("{}", "{}</answer>", "\\boxed{{{}}}", "Final answer: {}", "#### {}")
    for completion in (form.format(text) for form in forms):
        assert seconds(grader, completion, answer) < 1


@mathematical
@pytest.mark.parametrize("text", [
    "9^{9^{9^{9}}}", "10^{10^{10}}", "1000000!", "\\binom{1000000000}{500000000}", "(x+1)^{100000}",
    "(" * 5000 + "3" + ")" * 5000, "1+" * N + "1", "\\sqrt{" * 2000 + "2" + "}" * 2000, "9" * 5 * N, " " * N,
    "\ud800", "\\int x^{x^x} dx"], ids=lambda text: f"{text[:12]!a}")
def test_a_hostile_box_costs_at_most_a_second_and_the_next_one_is_graded(text):
    """As long as the machine is not busy with other work: the clock that counts is the wall's."""
    assert grade("boxed", "\\boxed{1}", "1") == 1                          # the process is there
    assert seconds("boxed", f"\\boxed{{{text}}}", "2") < 1.5
    assert seconds("boxed", "\\boxed{\\frac12}", "0.5", 1) < 1


@mathematical
def test_boxes_are_graded_in_any_thread():
    found = {}
    def work(i):
        found[i] = [grade("boxed", f"\\boxed{{{n}^2}}", str(i * i)) for n in range(4)] + [
            grade("boxed", "\\boxed{9^{9^{9^9}}}", "2")] * (i == 0)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [float(n == i) for n in range(4)] + [0] * (i == 0) for i in range(4)}


@pytest.fixture
def process(tmp_path, monkeypatch):
    """process(text): math_verify is a module with this text, for a process that is started anew."""
    def make(text):
        package = tmp_path / "math_verify"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(mathematics, "PROCESS", [])
    yield make
    for running in mathematics.PROCESS:
        running.kill(), running.wait()


FAKE = """import os, time
def parse(text, parsing_timeout): return text.strip("$")
def verify(answer, found, timeout_seconds):
    if found == "slow": 10 ** 10 ** 9
    if found == "asleep": time.sleep(60)
    if found == "dead": os.abort()
    if found == "odd": raise ValueError
    return answer == found
"""


@pytest.mark.parametrize("fork", [True, False])
def test_a_comparison_that_is_slow_or_dies_is_wrong_and_the_next_is_right(process, tmp_path, fork):
    """With a stand-in for math-verify, also as on a system that cannot fork: the process starts again."""
    process(FAKE)
    if not fork:
        (tmp_path / "sitecustomize.py").write_text("import os\nif hasattr(os, 'fork'): del os.fork\n")
    for found in ("slow", "asleep", "dead", "odd", "x"):
        assert grade("boxed", "\\boxed{right}", "right") == 1
        before = mathematics.PROCESS[0].pid
        assert seconds("boxed", f"\\boxed{{{found}}}", "right") < 1.5
        assert grade("boxed", "\\boxed{right}", "right") == 1
        assert (mathematics.PROCESS[0].pid == before) == (fork or found in ("odd", "x"))


def test_a_late_verdict_is_not_taken_for_the_next_one(process, monkeypatch):
    process(FAKE)
    assert grade("boxed", "\\boxed{right}", "right") == 1
    running = mathematics.PROCESS[0]
    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt
    monkeypatch.setattr(running, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        grade("boxed", "\\boxed{right}", "right")
    assert grade("boxed", "\\boxed{wrong}", "right") == 0 and running.poll() is not None


def test_boxed_without_math_verify_is_refused(process):
    process("raise ImportError")
    with pytest.raises(Refused, match="pip install 'math-verify"):
        can_be_correct("boxed", "5")


# ---- IFEval ------------------------------------------------------------------------------------------------

COMMA, WORDS = ["punctuation:no_comma", {}], ["length_constraints:number_words",
                                              {"relation": "at least", "num_words": 3}]
SENTENCES = ["length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3}]
CAPITALS = ["change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2}]
FOLLOWED = [
    ([COMMA], "no comma", 1), ([COMMA], "a, b", 0), ([COMMA], "", 0), ([COMMA], " \n", 0),
    ([COMMA, WORDS], "one two three", 1), ([COMMA, WORDS], "one two", 0.5), ([COMMA, WORDS], "one, two", 0),
    ([COMMA, WORDS, SENTENCES], "One, two. Three. Four.", 1 / 3), ([SENTENCES], "One. Two.", 1),
    ([CAPITALS], "A BIG HOUSE", 1), ([CAPITALS], "a BIG house", 0),
    ([COMMA], "<think>a, b</think>no comma", 1), ([COMMA], "<think>no comma", 0),
    ([["detectable_format:json_format", {}]], '{"a": 1}', 1),
    ([["detectable_format:json_format", {}]], "[" * 100_000, 0),           # RecursionError is no answer
    ([["language:response_language", {"language": "de"}]], "Das ist ein gewöhnlicher deutscher Satz.", 1),
    ([["language:response_language", {"language": "de"}]], "This is an ordinary English sentence.", 0)]


@instructed
@pytest.mark.parametrize("instructions, text, score", FOLLOWED)
def test_ifeval_is_the_share_of_instructions_that_are_followed(instructions, text, score):
    answer = json.dumps(instructions)
    assert grade("ifeval", text, answer) == pytest.approx(score)
    assert can_be_correct("ifeval", answer) and complaint("ifeval", text) is None
    with pytest.raises(Refused, match="not known of the grader ifeval, only of: exact, number"):
        split_at_answer("ifeval", text, answer)


@instructed
@pytest.mark.parametrize("answer, message", [
    ("no comma", "needs an answer with a list of"), ("[]", "needs an answer with a list of"),
    ("7", "needs an answer"), ('["punctuation:no_comma"]', "needs an answer"),
    ('[["punctuation:no_coma", {}]]', "unknown instruction 'punctuation:no_coma'; did you mean"),
    ('[["length_constraints:number_words", {}]]', "number_words has no num_words, relation"),
    ('[["length_constraints:number_words", {"relation": "at most", "num_words": 3}]]', "cannot have"),
    ('[["punctuation:no_comma", {"x": 1}]]', "cannot have the arguments"),
    ('[["combination:repeat_prompt", {}]]', "cannot have the arguments")])
def test_what_lm_eval_would_draw_or_does_not_know_is_refused(answer, message):
    """lm-eval draws an argument that is missing at random, and grades by that."""
    with pytest.raises(Refused, match=message) as refused:
        can_be_correct("ifeval", answer)
    assert "\n" not in str(refused.value)


@instructed
def test_a_grade_of_ifeval_is_the_same_at_all_times_and_draws_nothing():
    """A letter that is none is drawn, as in lm-eval, and langdetect samples."""
    letter = {"let_relation": "at least", "letter": "#", "let_frequency": 1}
    answer = json.dumps([["keywords:letter_frequency", letter], ["language:response_language", {"language": "en"}]])
    texts = [*"abcdefghijklmnopqrstuvwxyz", "no on no on", "la de da"]
    found = []
    for seed in range(4):
        random.seed(seed)
        state = random.getstate()
        found.append([grade("ifeval", text, answer) for text in texts])
        assert random.getstate() == state
    assert all(scores == found[0] for scores in found)


@instructed
@real
def test_ifeval_says_what_lm_eval_says_of_every_prompt():
    """Strictly, by instruction and by prompt; but for the two prompts of which lm-eval draws a letter."""
    from lm_eval.tasks.ifeval.utils import process_results
    file = SHARED / "ifeval" / "input_data.jsonl"
    rows = convert.rows("google/IFEval", file)
    raw = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(raw) == len(rows) == 541
    assert all(can_be_correct(row["grader"], row["answer"]) for row in rows)
    texts = ["Yes. No, really. *a* *b* *c*\n\n***\n\n<<title>> P.S. x", '{"a": 1}', "* [address]\n" * 6,
             "THIS IS IN CAPITALS " * 20, raw[7]["prompt"]]
    drawn, levels = [], set()
    for row, prompt in zip(rows, raw):
        if any(not kwargs.get("letter", "a").isalpha() for kwargs in prompt["kwargs"]):
            drawn.append(prompt["key"])
            continue
        for text in texts:
            theirs, ours = process_results(prompt, [text]), grade("ifeval", text, row["answer"])
            followed = theirs["inst_level_strict_acc"]
            assert ours == sum(followed) / len(followed) and (ours == 1) == theirs["prompt_level_strict_acc"]
            levels.add(ours)
    assert len(drawn) == 2 and levels > {0, 0.5, 1}


@instructed
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:12]!a}")
def test_a_hostile_completion_costs_ifeval_at_most_a_second(text):
    for instruction in (["detectable_content:postscript", {"postscript_marker": "P.S."}], CAPITALS, SENTENCES,
                        ["change_case:english_lowercase", {}], ["detectable_format:title", {}]):
        answer = json.dumps([instruction])
        grade("ifeval", "warm", answer)
        begin = time.monotonic()
        grade("ifeval", text, answer)
        assert time.monotonic() - begin < 1.5, instruction


@pytest.fixture
def forgetful():
    """ifeval.classes, as in a process in which nobody has asked for it yet."""
    ifeval.classes.cache_clear()
    yield
    ifeval.classes.cache_clear()


@pytest.mark.parametrize("name", ["lm_eval", "nltk", "langdetect"])
def test_ifeval_without_a_package_is_refused(forgetful, monkeypatch, name):
    for module in [m for m in sys.modules if m.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refused, match="pip install 'lm-eval.ifeval.'"):
        can_be_correct("ifeval", json.dumps([COMMA]))


@instructed
def test_ifeval_without_nltks_data_is_refused_and_finds_the_package_with_it(forgetful, monkeypatch, tmp_path):
    import nltk
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(ifeval, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="needs nltk's punkt_tab.*pip install --no-deps llama-index-core"):
        can_be_correct("ifeval", json.dumps([COMMA]))
    (tmp_path / "core/_static/nltk_cache/tokenizers/punkt_tab").mkdir(parents=True)
    spec = importlib.util.spec_from_loader("llama_index", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(ifeval, "find_spec", lambda name: spec)
    assert can_be_correct("ifeval", json.dumps([COMMA]))


# ---- a grader of the user's own ----------------------------------------------------------------------------

@pytest.fixture
def own(tmp_path):
    """own(body) -> "FILE.py:mine", a function of completion and row."""
    def write(body):
        path = tmp_path / f"own{write.calls}.py"
        write.calls += 1
        path.write_text(f"def mine(completion, row):\n    {body}\n")
        return f"{path}:mine"
    write.calls = 0
    return write


def test_a_grader_of_ones_own_sees_the_completion_and_the_row(own):
    grader, row = own("return len(completion) / row['most']"), {"prompt": "a", "answer": 0, "most": 8}
    assert grade(grader, "abcd", 0, row) == 0.5 and grade(grader, "<think>abcd</think>ab", 0, row) == 0.25
    assert can_be_correct(grader, 0, row) and complaint(grader, "") is None
    assert grade(own("return completion == row['answer']"), "a", "a") == 1
    with pytest.raises(Refused, match="not known of the grader"):
        split_at_answer(grader, "a b", "b")


@pytest.mark.parametrize("body", [
    "return None", "return 2", "return -0.1", "return float('nan')", "return '1'", "return row['none']",
    "raise ValueError('a\\nb')", "return 1 / 0"])
def test_what_is_no_number_from_0_to_1_is_refused_in_one_line(own, body):
    with pytest.raises(Refused, match="grader .*own0.py:mine (returns|fails)") as refused:
        grade(own(body), "a", "a")
    assert "\n" not in str(refused.value)


def test_a_file_or_a_function_that_is_missing_or_broken_is_refused_in_one_line(own, tmp_path):
    file = own("return 1").rpartition(":")[0]
    (tmp_path / "broken.py").write_text("def mine(:")
    for grader, message in ((f"{tmp_path}/none.py:mine", "no file"), (f"{file}:yours", "no function 'yours'"),
                            (f"{file}:__name__", "no function"),
                            (f"{tmp_path}/broken.py:mine", "does not run")):
        with pytest.raises(Refused, match=message) as refused:
            grade(grader, "a", "a")
        assert "\n" not in str(refused.value)


def said(words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def test_grader_is_for_rows_that_name_none(start, prompts, own):
    """In the prompts of training and evaluation; a row may also name a function itself."""
    half, whole = own("return 0.5"), own("return 1")
    rows = [{"prompt": "rev abc>", "answer": "a"}, {"prompt": "rev abd>", "answer": "7", "grader": "number"},
            {"prompt": "rev abe>", "answer": "a", "grader": whole}, {"prompt": "rev abf>"}]
    run = start(method="grpo", prompts=[prompts("some", rows[:3])], eval_prompts=[prompts("more", rows[:3])],
                grader=half)
    for some in (run.prompts["main"], run.evals["eval"]):
        assert [row["grader"] for row in some] == [half, "number", whole]
        rewards = [r.reward for r in run.sample(run.student, some, n=1)]
        assert rewards[0] == 0.5 and rewards[2] == 1
    run = start(prompts=[prompts("plain", rows)])
    assert [row.get("grader") for row in run.prompts["main"]] == ["exact", "number", whole, None]


def test_grader_is_refused_before_the_first_step(argv, start, prompts, own, tmp_path):
    rows = [{"prompt": "rev abc>", "answer": "cba", "topic": "x"}]
    for grader, message in (("exat", "--grader: unknown grader 'exat'; did you mean exact?"),
                            (f"{tmp_path}/none.py:mine", "no file"),
                            (own("return 2"), "some.jsonl:1: grader"),
                            (own("return row['nothing']"), "KeyError"),
                            ("final_letter", "needs an answer with a letter")):
        assert message in said(argv(prompts=[prompts("some", rows)], grader=grader))
        named = [rows[0] | {"grader": grader}]
        assert message.removeprefix("--grader: ") in said(argv(prompts=[prompts("some", named)]))
    assert "no file" in said(argv(grader=f"{tmp_path}/none.py:mine", prompts=[    # even if no row needs it
        prompts("some", [rows[0] | {"grader": "exact"}])]))
    topic = own("return {'x': 1}[row['topic']]")
    start(prompts=[prompts("some", rows)], grader=topic)            # which sees the whole row
    assert "KeyError('y')" in said(argv(prompts=[prompts("some", [rows[0] | {"topic": "y"}])], grader=topic))
    assert not list(tmp_path.glob("out*"))
