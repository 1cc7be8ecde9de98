"""What a self-teacher and a tutor read, and what of a tutor's text reaches its tutee."""
import json
import random
import time
from pathlib import Path

import pytest

from methods.feedback import (GENERIC, MOST_WORDS, OUTCOMES, REQUIRED, REVEALING, Templates, accept, anchors,
                              concept, read_templates, reprompt, shortened, specific, tutor_prompt,
                              with_answer, without_answers, without_concept, without_thinking, words)

PHYSICS = Path(__file__).parent.parent.parent / "shared" / "data" / "sciknoweval" / "physics_train.jsonl"
QUESTION = "What is the net electric flux of a charged cube? Select the answer.\n\nA: 2.0\nB: 3.0"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"}, {"role": "user", "content": QUESTION}]
T = Templates()

REVEALED = [
    "The correct answer is B", "The correct option is **C**.", "the CORRECT choice is (d)",
    "The answer is b.",
    "THE CORRECT OPTION IS: A", "The right answer must therefore be A.", "The true answer would be (B).",
    "The best choice would be \"C\".", "The answer is “D”.", "Final answer: B", "Final Answer: (C)",
    "FINAL ANSWER: c",
    "**Final answer:** **B**", "**Final Answer: B**", "### Final Answer: B", "Final answer：B",
    "Final answer is D!", "- **Final answer**: `B`",
    "Correct answer — B", "Answer: D", "The answer is A.", "The answer is option A",
    "The answer is option A in this",
    "the correct answer, B", "the correct option (C)", "The correct one is C.", "The correct letter is A",
    "The correct answer choice is **(A)**.", "The answer, therefore, is B", "The correct answer here is C",
    "The correct answer to this question is B", "The answer is\u00a0B", "So, the answer is B.",
    "**The answer is B.**",
    "The correct answer\nis B.", "Final answer:\n\nB\n", "The correct\noption\nis\n**D**",
    "Option B is correct.", "B is the correct answer", "(C) is the right choice.",
    "Option **B** is the right answer.",
    "The answer is \\boxed{\\text{B}}.", "The final answer is $\\boxed{C}$",
    "The correct answer is:\n\\[\n\\boxed{D}\n\\]",
    "\\boxed{A}", "\\boxed{b}", "\\boxed{\\text{B}}", "$\\boxed{C}$", "$$\\boxed{\\mathrm{(D)}}$$",
    "\\boxed{ (A) }",
    "\\[\\boxed{\\textbf{B}}\\]", "\\boxed{B: 2.0}", "\\boxed{\\text{B. } 2.0}", "\\boxed{\\text{B}: 2.0}",
    "**A**", "**(B)**", "***C***", "__D__", "**B.**", "**(b)**",
    "<answer>B</answer>", "<answer>\nB\n</answer>", "<ANSWER>(C) 2.0</ANSWER>", "<answer>B",
    "<answer>\nthe flux,\nthat is B\n</answer>",
    "The correct option is B: 2.03", "the correct answer is A: 2.56.", "So the correct answer is\nD: 3.96",
    "The correct answer is **B: 2.03**.", "**Final Answer: B: 3.0**", "Answer: B) 2.0",
    "The answer is B. 2.03", "Option B is the best choice.", "Option B (2.03) is correct.",
    "Option B ($2.0 \\times 10^5$ N) is correct", "Your \\boxed{B} is 2.", "The peer's correct answer is B.",
    "The correct answer is (A) 2.0.", "The correct answer is A, 2.0 N.", "**B: 2.03**",
    "This answer is B: 2.03.",
    "The correct answer is **B**: $2.0 \\times 10^4 \\mathrm{~N} \\cdot \\mathrm{m}^2 / \\mathrm{C}$.",
    "Therefore, the answer is B: 2.03.", "Based on this analysis, the correct answer is B.",
    "We get \\boxed{A} at step 2", "The best choice would be option (d), 2.03.",
    "<answer>\nB: 2.0", "Option B should be correct.", "The best answer **C** D.",
    *(example for _, _, example in REVEALING)]

ORDINARY = [
    "The correct answer is a vector", "the correct answer is A vector", "The answer is a number",
    "the answer is a\nvector",
    "the answer is a, possibly large, number", "The correct answer is a by-product",
    "the answer is I think too low",
    "The correct choice is A priori unclear", "the answer is i.e. big", "the correct answer is, e.g., 5",
    "the right choice I made", "the correct answer a peer", "Answer: a vector", "Both answers: a and b",
    "the answer is C is wrong", "That the answer is C is clearly incorrect.", "The answer is not C",
    "The peer's answer is C", "the student’s final answer is C.", "Your answer is B, but",
    "their choice is (D)",
    "option A is too low", "Option A, option B and option C are too low", "whether option B is correct",
    "Between options B and C", "In option B the unit is wrong", "Your value of $B$ is correct",
    "step (b) is correct",
    "The answer is F = ma", "The answer is B-field like", "The answer is $B = 3$", "The answer is D's",
    "H is large",
    "\\boxed{42}", "$\\boxed{3.2 \\times 10^4}$", "\\boxed{B = 3}", "\\boxed{\\text{yes}}", "\\boxed{-1}",
    "\\boxed{AB}",
    "Final answer: 42", "Final answer: about 3", "The correct answer is 2.0 N", "**Bold** and **B**-field",
    "**F** = m**a**",
    "**Capacitor**", "A", "a B", "I", "É is the correct answer", "the answer is Änderung", "réponse: B",
    "",
    "The wrong option is B.", "The students' answer is C", "the answer they give is C",
    "The chosen option is D", "In option B the value is A lot", "Option B is not correct", 
    "Option A is wrong if the sign is correct", "Your claim that the correct answer is C is wrong.",
    "If option B is correct, the flux is 2.",
    "Answer C is incorrect.",
    "The correct answer is negative, e.g. -3.", "The correct answer requires F = ma.", "\\boxed{B \\times 2}",
    "The correct answer is approximately 2.03", "The correct one is a good guess",
    "The answer is B_1 as given", "Say whether b is the right choice.", "**A** = 3 and __B__-field",
    "an answer with three A's", "The answer follows from D = 3.", "For which choice is the flux larger?"]


@pytest.mark.parametrize("text", REVEALED)
@pytest.mark.parametrize("before, after", [
    ("", ""), ("The flux of step 2 lacks a sign. ", "\n\nCheck Gauß’s law!")])
def test_revealed_letters_go_and_the_rest_stays(text, before, after):
    left = without_answers(before + text + after)
    assert left.startswith(before.strip()) and left.endswith(after)
    remains = left[len(before.strip()):len(left) - len(after)]
    assert not words(remains), left
    if not before and not after:
        assert accept(text, QUESTION, anchored=False) == (None, "fb_none")


@pytest.mark.parametrize("what, pattern, example", REVEALING)
def test_each_row_is_needed_and_its_example_vanishes(what, pattern, example, monkeypatch):
    assert without_answers(example) == ""
    monkeypatch.setattr("methods.feedback.REVEALING", [row for row in REVEALING if row[0] != what])
    assert without_answers(example) == example


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_untouched(text):
    for inside in (text, f"Step 2: {text} is meant.\n\nCheck the sign.", f"⚛ {text} 电场"):
        assert without_answers(inside) == inside


@pytest.mark.parametrize("text, left", [
    ("It errs. The correct answer is B. Check step 2, so the answer is B.", "It errs. Check step 2."),
    ("It errs, but not in step 2, so the answer is B: 2.03. Check it.",
     "It errs, but not in step 2. Check it."),
    ("The peer chose C, but the correct answer is B.", "The peer chose C."),
    ("The answer is B, so step 2 holds. Next", " Next"),
    ("Step 1 holds. As the flux is outward, the answer is B. Check 2.", "Step 1 holds. Check 2."),
    ("Look (the answer is B) at step 2. Check it.", " Check it."),
    ("The answer is **Option (B)** (see step 2).", ""), ("The answer is B because it sinks", ""),
    ("1. It errs.\n2. The answer is B: 2.\n3. Check.", "1. It errs.\n3. Check."),
    ("I would choose **B**. It sinks.", "I would choose. It sinks."),
    ("In option **B** the unit is wrong.", "In option the unit is wrong.")])
def test_removal_leaves_readable_sentences(text, left):
    assert without_answers(text) == left


def test_what_removal_reveals_is_removed_too():
    assert without_answers("The answer **B** is C") == ""
    assert without_answers("The correct **B** answer is C. It sinks") == " It sinks"
    for text in REVEALED:
        assert without_answers(without_answers(text)) == without_answers(text)


def test_degenerate_text_takes_no_time():
    start = time.perf_counter()
    for text in ("the answer is " + "*" * 4000, "(" * 4000, "\\boxed{" * 800, "<concept>" * 800,
                 "final " * 1500, "\n" * 6000, "The answer is B. " * 350, "x, so " * 1000 + "the answer is B",
                 "correct answer word word " * 250, "option B " + "2" * 6000, "**B: " * 1200,
                 "<answer>" * 750, "correct answer" + ", " * 3000, "a \n " * 1500, "_" * 6000,
                 '."' + "*" * 6000):
        accept(text, QUESTION)
        assert time.perf_counter() - start < 1, text[:30]
        start = time.perf_counter()


@pytest.mark.parametrize("text, found", [
    ("<concept>electric flux</concept> Text", "electric flux"), ("<CONCEPT>\n Flux\n</Concept>Text", "Flux"),
    ("Text first <concept>flux</concept>", "flux"), ("<concept>one</concept><concept>two</concept>", "one"),
    ("<concept><concept>x</concept></concept>", "x"), ("<concept>cut <concept>whole</concept>", "whole"),
    ("< concept >flux</ concept >", "flux"), ("<concept></concept>", ""), ("<concept> \n</concept>", ""),
    ("<concept>a b c d e</concept>", "a b c d e"), ("**<concept>flux</concept>**", "flux"),
    ("<concept>flux", None), ("flux</concept>", None), ("</concept>flux<concept>", None),
    ("<concepts>x</concepts>", None),
    ("concept: flux", None), ("", None)])
def test_concept(text, found):
    assert concept(text) == found


@pytest.mark.parametrize("text, left", [
    ("<concept>x</concept> The", " The"), ("<concept><concept>x</concept></concept>The", "The"),
    ("<concept>x</concept>The <CONCEPT>y</CONCEPT>end", "The end"), ("**<concept>x</concept>** The", " The"),
    ("<concept>x</concept>**The**", "**The**"), ("<concept>The", "The"), ("no tag", "no tag")])
def test_without_concept(text, left):
    assert without_concept(text) == left


@pytest.mark.parametrize("text, expected", [
    ("Electric FLUX, flux!", {"electric", "flux"}), ("high-temperature", {"high", "temperature"}),
    ("H2O H₂O $H_2O$ $H_{2}O$", {"h2o"}), ("I₂", {"i2"}), ("Schrödinger", {"schrödinger"}),
    ("Schro\u0308dinger", {"schrödinger"}), ("STRASSE Straße", {"strasse"}), ("µm", {"μm"}),
    ("**flux**_x_", {"flux", "x"}),
    ("$\\mathrm{flux}$ \\times \\cdot", {"flux"}), ("\\alpha decay", {"alpha", "decay"}), ("α", {"α"}),
    ("...", set()),
    ("CO$_2$", {"co", "2"}), ("Young’s modulus", {"young", "s", "modulus"}), ("10^{4}", {"104"}),
    ("", set())])
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("named, expected", [
    ("electric flux", {"electric", "flux"}), ("**Flux**", {"flux"}), ("$\\text{flux}$", {"flux"}),
    ("\"Net flux.\"", {"net", "flux"}),
    ("magnetic flux", {"flux"}), ("the flux of the cube", {"flux", "cube"}), ("answer", set()),
    ("Answers", set()),
    ("the answer", set()), ("A", set()), ("B", set()), ("2.0", set()), ("fluxes", set()), ("flu", set()),
    ("gravity", set())])
def test_anchors(named, expected):
    assert anchors(named, QUESTION) == expected


def test_generic_words_never_anchor_even_when_the_question_has_them():
    for word in "problem question answer value calculation formula student peer specialist option".split():
        for text in (word, word.upper(), f"<{word}>", f"the {word} of a", word + "s"):
            assert not anchors(text, f"{text} {word}"), text
    assert all(w == w.casefold() and words(w) == {w} for w in GENERIC)


BODY = "Your first step holds. The sign in step 2 is wrong."


@pytest.mark.parametrize("text, expected", [
    (f"<concept>electric flux</concept> {BODY}", (BODY, "kept")),
    (f"<concept>flux</concept>: {BODY}", (BODY, "kept")),
    (f"{BODY}\n<concept>flux</concept>", (BODY, "kept")),
    (f"**<concept>flux</concept>**\n\n{BODY}", (BODY, "kept")),
    (f"<concept>flux through the cube of it</concept> {BODY}", (BODY, "kept")),
    (f"<concept><concept>flux</concept></concept> {BODY}", (BODY, "kept")),
    (f"<think>\nThe answer is B, <concept>x</concept>\n</think>\n\n<concept>flux</concept> {BODY}", (BODY,
    "kept")),
    (f"thoughts</think><concept>flux</concept> {BODY}", (BODY, "kept")),
    (f"<concept>flux</concept> {BODY} The correct answer is B.", (BODY, "kept")),
    (f"<concept>flux answer A</concept> {BODY}", (BODY, "kept")),
    (f"<concept>**flux** Final answer: A</concept> {BODY}", (BODY, "kept")),
    (f"<concept>answer A</concept> {BODY}", (None, "all_generic")),
    (f"<concept>**A**</concept> {BODY}", (None, "all_generic")),
    (f"<concept>42</concept> {BODY}", (None, "all_generic")),
    (f"<concept>The Answers</concept> {BODY}", (None, "all_generic")),
    (f"<concept> </concept> {BODY}", (None, "empty")), (f"<concept>...</concept> {BODY}", (None, "empty")),
    (f"<concept>gravity</concept> {BODY}", (None, "no_match")),
    (f"<concept>answer gravity</concept>{BODY}", (None, "no_match")),
    (BODY, (None, "no_concept_tag")), (f"<concept>flux {BODY}", (None, "no_concept_tag")),
    ("", (None, "fb_none")), (" \n", (None, "fb_none")), ("<think>flux", (None, "fb_none")),
    ("\\boxed{B}", (None, "fb_none")),
    ("<concept>flux</concept>", (None, "fb_none")), ("<concept>gravity</concept>", (None, "no_match")),
    ("<concept>flux</concept> The answer is B.", (None, "fb_none")),
    ("The answer is <concept>flux</concept> B.", (None, "fb_none")),
    ("<think>a</think>\n", (None, "fb_none"))])
def test_accept_with_an_anchor(text, expected):
    assert accept(text, QUESTION) == expected
    assert expected[1] in OUTCOMES


@pytest.mark.parametrize("text, expected", [
    (BODY, (BODY, "kept")), (f"{BODY} **B**", (BODY, "kept")),
    (f"<concept>gravity</concept>{BODY}", (BODY, "kept")),
    ("1. The answer is B: 2.03.", (None, "fb_none")), ("\n- The answer is A: 2.0.\n", (None, "fb_none")),
    ("Final answer: (C)", (None, "fb_none")), ("", (None, "fb_none")),
    ("<think>x</think>", (None, "fb_none"))])
def test_accept_without_an_anchor(text, expected):
    assert accept(text, QUESTION, anchored=False) == expected


def test_accept_shortens_after_it_has_removed_answers():
    long = "<concept>flux</concept>" + " The answer is B." * 100 + " Step two is wrong."
    assert accept(long, QUESTION, most_words=5) == ("Step two is wrong.", "kept")
    text, outcome = accept("<concept>flux</concept> " + "Step two is wrong. " * 100, QUESTION)
    assert outcome == "kept" and len(text.split()) == MOST_WORDS and text.endswith("wrong.")
    assert accept("<concept>flux</concept> Step two is wro", QUESTION, finished=False) == ("Step two is",
    "kept")
    assert accept("<concept>flux</concept> Ste", QUESTION, finished=False) == (None, "fb_none")


@pytest.mark.parametrize("text, most, finished, expected", [
    ("One two. Three four. Five", 5, True, "One two. Three four. Five"),
    ("One two. Three four. Five", 4, True, "One two. Three four."),
    ("One two. Three four. Five", 3, True, "One two."), ("One two three", 2, True, "One two"),
    ("One two. Thr", 9, False, "One two."),
    ("One two.", 9, False, "One two."), ("One tw", 9, False, "One"), ("On", 9, False, ""), ("", 9, False, ""),
    ("One two th", 2, False, "One two"),
    ("See it, e.g. the sign of it", 5, True, "See it, e.g. the sign"),
    ("It is 3.5 times more, so", 4, True, "It is 3.5 times"),
    ("Two faults.\n1. The sign", 4, True, "Two faults."),
    ("Is it (so)? **Yes.** And more", 4, True, "Is it (so)? **Yes.**"),
    ("错。 对 吗", 2, True, "错。"), ("One two! 'So.' “So.” x y", 4, True, "One two! 'So.' “So.”")])
def test_shortened_ends_with_a_sentence(text, most, finished, expected):
    assert shortened(text, most, finished) == expected


@pytest.mark.parametrize("text, left", [
    ("<think>\na\n</think>\n\nb", "b"), ("a <think>b</think> c<think>d</think>", "a c"), ("a</think> b", "b"),
    ("<think>a", ""),
    ("b <think>a", "b "), ("no thought", "no thought")])
def test_without_thinking(text, left):
    assert without_thinking(text) == left


def test_reprompt_of_text():
    assert reprompt("2 + 2?", T) is None
    assert reprompt("2 + 2?", T, solution="", environment=" \n", peer=None) is None
    assert reprompt("2 + 2?", T, solution="<think>4</think>\n") is None
    assert reprompt("2 + 2?", T, solution="<think>two\nand two</think>\n\n4", environment="not 5",
                    peer="{no} \\frac{1}{2}") == (
        "2 + 2?\n\nCorrect solution:\n\n4"
        "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\nnot 5"
        "\n\nA peer has read your earlier attempt at this question and comments:\n\n{no} \\frac{1}{2}"
        "\n\nCorrectly solve the original question.")


@pytest.mark.parametrize("added", [{"solution": "S"}, {"environment": "E"}, {"peer": "P"},
                                   {"solution": "S", "peer": "P"}])
def test_reprompt_of_a_chat_rewrites_its_last_question_only(added):
    before = json.dumps(CHAT)
    seen = reprompt(CHAT, T, **added)
    assert seen[:-1] == CHAT[:-1] and seen[-1] == {"role": "user", "content": reprompt(QUESTION, T, **added)}
    assert json.dumps(CHAT) == before, "the prompt was changed in place"
    begun = [*CHAT, {"role": "assistant", "content": "I"}]
    assert reprompt(begun, T, **added) == [*seen, begun[-1]] and reprompt(CHAT, T) is None


@pytest.mark.parametrize("text", ["{prompt} {x}", "\\frac{1}{2}", "}{", "{{", "%s {0}", "\\1 \\g<0> $x$"])
def test_content_survives_every_template(text):
    seen = reprompt(text, T, solution=text, environment=text, peer=text)
    assert seen.count(text) == 4
    assert tutor_prompt(text, text, T, "physics", "chemistry").count(text) == 2
    assert with_answer(text, T, text).count(text) == 2


@pytest.mark.parametrize("anchored", [True, False])
def test_tutor_prompt_is_of_the_prompts_kind_without_the_students_system_prompt(anchored):
    text = tutor_prompt(QUESTION, "my attempt", T, "physics", "chemistry", anchored)
    seen = tutor_prompt(CHAT, "my attempt", T, "physics", "chemistry", anchored)
    assert seen == [{"role": "user", "content": text}]
    assert QUESTION in text and "my attempt" in text and "{" not in text
    assert ("specialist in physics" in text and "<concept>" in text) == anchored
    assert all(word in T.anchored for word in ("value", "formula", "three to five", "80 words"))
    assert text.index(QUESTION) < text.index("my attempt")


@pytest.mark.parametrize("call", [lambda p: reprompt(p, T, peer="x"),
                                  lambda p: tutor_prompt(p, "r", T, "a", "b")])
def test_a_chat_without_a_user_is_refused(call):
    with pytest.raises(ValueError, match="message of the user"):
        call([{"role": "system", "content": "x"}])


def test_templates_from_a_file(tmp_path):
    path = tmp_path / "templates.json"
    given = {"peer": " Peer: {feedback} {{}}", "unanchored": "{tutor_domain}{question}{response}"}
    path.write_text("\ufeff" + json.dumps(given), encoding="utf-8")
    read = read_templates(path)
    assert read.reprompt == T.reprompt and reprompt("q", read, peer="p").startswith("q Peer: p {}\n")
    assert tutor_prompt("q", "r", read, "physics", "law", anchored=False) == "physicsqr"
    path.write_text('{"anchored": "{question}{response}"}')
    assert tutor_prompt("q", "r", read_templates(path), "physics", "law") == "qr", "domains are optional"
    path.write_text("{}")
    assert read_templates(str(path)) == T
    path.write_text(json.dumps(vars(T)))
    assert read_templates(path) == T, "the defaults meet the rules"
    assert set(vars(T)) == set(REQUIRED)


@pytest.mark.parametrize("content, message", [
    ("{", "not JSON"), ("", "not JSON"), ("[" * 100000, "not JSON"), ('["peer"]', "one JSON object"),
    ("null", "one JSON object"),
    ('{"pear": "x"}',
     "unknown template 'pear'; did you mean peer\\? there are: reprompt, solution, environment, peer, "
     "anchored, unanchored, told"),
    ('{"peer": 7}', "'peer' is text, not '7'"), ('{"peer": null}', "'peer' is text"),
    ('{"peer": "{feedback} {x}"}', r"'peer' has unknown \{x\}; its placeholders are \{feedback\}"),
    ('{"peer": "{feedback} {}"}', "'peer' has unknown"), ('{"peer": "{feedback} {0}"}', "'peer' has unknown"),
    ('{"peer": "{feedback!r}"}', "'peer' has unknown"), ('{"peer": "{feedback:>9}"}', "'peer' has unknown"),
    ('{"peer": "{feedback.__class__}"}', "'peer' has unknown"),
    ('{"reprompt": "{prompt}{solution}{feedback}{question}"}', "unknown"),
    ('{"peer": "{feedback} {tutor_domain}"}', "unknown"),
    ('{"peer": "{feedback} {"}', "'peer'.*literal brace"),
    ('{"peer": "}{feedback}"}', "'peer'.*literal brace"),
    ('{"peer": "{{feedback}}"}', r"'peer' lacks \{feedback\}"),
    *((json.dumps({name: T.__dict__[name].replace("{%s}" % field, "")}), rf"'{name}' lacks \{{{field}\}}")
      for name in REQUIRED for field in sorted(REQUIRED[name]))])
def test_unusable_template_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "templates.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_templates(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_binary_template_file_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name in ("none", "binary"):
        with pytest.raises(ValueError, match=name):
            read_templates(tmp_path / name)


@pytest.mark.skipif(not PHYSICS.is_file(), reason="real data are not part of the project")
def test_real_questions_are_anchored_by_their_words_and_reveal_nothing():
    questions = [json.loads(line)["prompt"] for line in PHYSICS.read_text().splitlines()]
    assert len(questions) == 720
    rng = random.Random(0)
    for question in questions:
        assert without_answers(question) == question
        technical = rng.choice(sorted(specific(question)))
        raw = f"<concept>{technical}</concept> {BODY} The correct option is {rng.choice('ABCD')}."
        assert accept(raw, question) == (BODY, "kept")
        assert accept(f"<concept>zyzzyva</concept> {BODY}", question) == (None, "no_match")
        generic = rng.choice(sorted(words(question) & GENERIC))
        assert accept(f"<concept>{generic}</concept> {BODY}", question) == (None, "all_generic")
