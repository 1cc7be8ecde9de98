"""Graders, prompts, the small world: what a completion is worth and what a model gets to see."""
import json
import random
from pathlib import Path

import pytest

from data import convert, small_world
from data.chat import encode_completion, encode_prompt, load_prompts
from data.graders import GRADERS, grade

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.parametrize("grader, completion, answer, reward", [
    ("exact", " map ", "map", 1), ("exact", "map x", "map", 0),
    ("number", "so she makes $1,234.50 a day", "1234.5", 1), ("number", "first 3, then 18.", "18", 1),
    ("number", "18 of 20", "18", 0), ("number", "it is \\boxed{42}, not 43", "42", 1),
    ("number", "none", "3", 0), ("number", "... \n#### -5", "-5", 1), ("number", "10-5", "5", 1),
    ("number", "x = 7.", "a\n#### 7", 1), ("number", "3.0", "3", 1), ("number", "0.30", ".3", 1),
    ("letter_tag", "<reasoning>A or B</reasoning><answer>\nB\n</answer>", "B", 1),
    ("letter_tag", "<answer>A</answer> no, <answer>B</answer>", "A", 0), ("letter_tag", "B", "B", 0),
    ("final_letter", "Final answer: B? No. Final Answer: **C**", "C", 1),
    ("final_letter", "Final answer: (d)", "D", 1), ("final_letter", "The answer is C", "C", 0),
    ("final_letter", "Final answer: Both", "B", 0)])
def test_graders(grader, completion, answer, reward):
    assert grade(grader, completion, answer) == reward


def test_boxed_grader_is_mathematical():
    pytest.importorskip("math_verify", reason="optional: pip install 'math-verify[antlr4_13_2]'")
    assert grade("boxed", "thus \\boxed{\\frac{1}{2}}", "0.5") == 1
    assert grade("boxed", "thus \\boxed{\\frac{1}{3}}", "0.5") == grade("boxed", "0.5", "0.5") == 0


def test_unknown_grader_lists_the_known_ones():
    with pytest.raises(ValueError, match=", ".join(GRADERS)):
        grade("judge", "a", "a")


@pytest.mark.parametrize("line, message", [
    ("{", r"rows.jsonl:2: not JSON"), ("[1]", "non-empty"), ('{"prompt": ""}', "non-empty"),
    ('{"prompt": [{"role": "user"}]}', "messages"),
    ('{"prompt": [{"role": "user", "content": 7}]}', "messages"),
    ('{"prompt": "a", "answer": "b", "grader": "judge"}', "there are")])
def test_bad_prompt_rows_are_named_by_line(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / "rows.jsonl"), "main")


def test_missing_and_empty_prompt_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("none.jsonl", "no prompt file"), ("empty.jsonl", "has no prompts")):
        with pytest.raises(ValueError, match=message):
            load_prompts(str(tmp_path / name), "main")


def test_plain_and_chat_rendering():
    tok = small_world.tokenizer()
    assert tok.decode(encode_prompt(tok, "rev abc>")) == "rev abc>"
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tok, [{"role": "user", "content": "hi"}])
    tok.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }} {% endfor %}" + \
        "{% if add_generation_prompt %}a{% if thinking is defined and not thinking %}0{% endif %}>{% endif %}"
    assert tok.decode(encode_prompt(tok, "hi")) == "user=hi a>"
    chat = [{"role": "system", "content": "no"}, {"role": "user", "content": "hi"}]
    assert tok.decode(encode_prompt(tok, chat, {"thinking": False})) == "system=no user=hi a0>"


def test_references_are_closed_by_eos():
    tok = small_world.tokenizer()
    assert encode_completion(tok, "cba")[-1] == tok.eos_token_id and tok.pad_token_id != tok.eos_token_id


def test_small_world_answers_are_right_and_evaluation_prompts_are_never_trained_on(tmp_path):
    small_world.build(tmp_path, seed=0, generalist=3000, specialist=2000, prompts=200, references=50,
                      evaluation=80)
    files = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
             for path in tmp_path.glob("*.jsonl")}
    closed = {f"what {x}>" for x in small_world.CAPITALS} | {f"next {x}>" for x in small_world.SYMBOLS}
    closed |= {f"what {name}>" for name, _ in small_world.ELEMENTS.values()}
    train = {row["prompt"] for name, rows in files.items() if "eval" not in name for row in rows} - closed
    evaluation = {row["prompt"] for name, rows in files.items() if "eval" in name for row in rows} - closed
    assert len(evaluation) > 100 and not train & evaluation
    assert {row["skill"] for row in files["general"]} == set(small_world.COVERED)
    assert {row["skill"] for row in files["eval_uncovered"]} == set(small_world.UNCOVERED)
    answers = {row["prompt"]: row["answer"] for rows in files.values() for row in rows}
    assert all(answers[p] == p.split()[1][:-1][::-1] for p in answers if p.startswith("rev "))
    adds = [p for p in answers if p.startswith("add ") and p[4].isdigit()]
    assert adds and all(int(answers[p]) == sum(map(int, p[4:-1].split())) for p in adds)


def test_small_world_chains_are_what_the_docstring_shows():
    rng = random.Random(0)
    for _ in range(50):
        arguments, answer = small_world.general(rng, "sum")
        terms = [int(x) for x in arguments.split()]
        assert [int(x) for x in answer.split()] == [sum(terms[:i + 1]) for i in range(len(terms))]
    assert small_world.after("Ar") == "H" and small_world.after("z") == "a" and small_world.after("C") == "N"


def test_small_world_tokenizer_round_trips_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer
    tok = small_world.tokenizer()
    tok.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for row in small_world.rows(random.Random(0), "domain", small_world.DOMAIN, 40):
        text = row["prompt"] + row["answer"]
        assert (loaded.decode(loaded(text).input_ids) == text
                and loaded.unk_token_id not in loaded(text).input_ids)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not part of the project")
def test_real_gsm8k_converts_and_its_own_solutions_are_right():
    rows = convert.rows("openai/gsm8k", SHARED / "gsm8k" / "test.jsonl")
    assert len(rows) == 1319
    assert all(grade("number", row["solution"], row["answer"]) == 1 for row in rows)
    assert sum(grade("number", row["solution"], other["answer"]) for row, other in zip(rows, rows[1:])) < 100
