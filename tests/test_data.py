"""Prompts, converters, the small worlds: what a model gets to see."""
import json
import random
import re
from pathlib import Path

import pytest
import torch

from data import convert, sciknoweval, small_all, small_world
from data.files import read_lines
from data.graders import can_be_correct
from data.prompts import is_chat, load_prompts, prompt_text
from methods.feedback import read_templates, reprompt, tutor_prompt, with_answer
from text import Reader

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


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


def reader(tok, **template_kwargs):
    """A Reader of which only the tokenizer is there."""
    return Reader(path="model", whole_config=None, tok=tok, stops=[tok.eos_token_id], vocab=len(tok),
                  template_kwargs=template_kwargs)


def test_plain_and_chat_rendering():
    tok = small_world.tokenizer()
    seen = lambda prompt, **kwargs: tok.decode(reader(tok, **kwargs).encode(prompt))
    assert seen("rev abc>") == "rev abc>"
    with pytest.raises(ValueError, match="no chat template"):
        seen([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="without tokens"):
        seen("")
    tok.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }} {% endfor %}" + \
        "{% if add_generation_prompt %}a{% if thinking is defined and not thinking %}0{% endif %}>{% endif %}"
    assert seen("hi") == "user=hi a>"
    chat = [{"role": "system", "content": "no"}, {"role": "user", "content": "hi"}]
    assert seen(chat, thinking=False) == "system=no user=hi a0>"
    assert is_chat(chat) and not is_chat("hi") and prompt_text(chat) == prompt_text("hi") == "hi"


def test_references_are_closed_by_eos():
    tok = small_world.tokenizer()
    model = reader(tok)
    *ids, last = model.encode_completion("cba")
    assert last == tok.eos_token_id != tok.pad_token_id
    assert model.decode(torch.tensor([*ids, last])) == model.decode(torch.tensor(ids)) == "cba"


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


@pytest.fixture(scope="session")
def every_method(tmp_path_factory):
    """The folder of a small data/small_all.py, and {name: rows} of its files."""
    out = tmp_path_factory.mktemp("small_all")
    small_all.build(out, 0, generalist=2000, specialist=1000, prompts=64, references=48, evaluation=24,
                    validation=16)
    return out, {path.stem: read_lines(path) for path in out.glob("*.jsonl")}


def test_small_all_teachers_learn_to_read_what_its_templates_say(every_method):
    """A told answer, and another one's response to correct: in the forms in which the methods ask."""
    out, files = every_method
    templates = read_templates(out / "templates.json")
    assert reprompt("rev pam>", templates, solution="map") == "is map;rev pam>"
    assert reprompt("rev pam>", templates, environment="x", peer="map") == "is x;is map;rev pam>"
    assert with_answer("rev pam>", templates, "map") == "is map;rev pam>"
    for anchored in (True, False):
        assert tutor_prompt("rev pam>", "mpa", templates, "x", "y", anchored) == "check rev pam>mpa|"
    for teacher in ("generalist", "specialist"):
        told = [row for row in files[teacher] if row["prompt"].startswith("is ")]
        checked = [row for row in files[teacher] if row["prompt"].startswith("check ")]
        assert all(abs(len(some) / len(files[teacher]) - 0.1) < 0.03 for some in (told, checked))
        assert all(row["prompt"].startswith(f"is {row['solution']};") for row in told)
        right = sum(row["prompt"].endswith(f">{row['solution']}|") for row in checked) / len(checked)
        assert 0.2 < right < 0.45
    found = [(row, re.fullmatch(r"(is \S+;|check |)rev (\w+)>(\w+\||)", row["prompt"]))
             for row in files["generalist"]]
    found = [(row["solution"], match) for row, match in found if match]
    assert len({match[1][:3] for _, match in found}) == 3                   # all forms
    assert all(solution == match[2][::-1] for solution, match in found)     # with the right answer


def test_small_all_has_no_unknown_token_and_evaluates_on_prompts_of_its_own(every_method):
    """Evaluation prompts are in no file for training, in no form; closed sets of facts are the exception."""
    out, files = every_method
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(out / "init")
    assert tok.decode(tok("is check").input_ids[::2]) == "ischeck" and len(tok("is check").input_ids) == 3
    for row in (row for rows in files.values() for row in rows):
        text = row["prompt"] + row["solution"] if "solution" in row else row["prompt"]
        text += "".join(row.get("rationales", {}).values())
        ids = tok(text).input_ids
        assert tok.unk_token_id not in ids and tok.decode(ids) == text
    closed = {f"what {x}>" for x in small_world.CAPITALS} | {f"next {x}>" for x in small_world.SYMBOLS}
    closed |= {f"what {name}>" for name, _ in small_world.ELEMENTS.values()}
    seen = {re.sub("^is [^;]*;|^check |(?<=>).*", "", row["prompt"])
            for name, rows in files.items() if not name.startswith("eval") for row in rows}
    evaluated = {row["prompt"] for name, rows in files.items() if name.startswith("eval") for row in rows}
    assert len(evaluated - closed) > 30 and not evaluated & seen - closed and len(seen) > 1000


def test_small_all_misleading_rationales_are_another_prompts_solution(every_method):
    _, files = every_method
    for branch, count in (("general", 48), ("domain", 24)):
        references, rows = files[f"{branch}_references"], files[f"{branch}_rationales"]
        assert len(rows) == count and len(files[f"val_{branch}"]) == 16
        for row, reference in zip(rows, references, strict=True):
            misleading = row["rationales"]["misleading"]
            assert row == reference | {"rationales": {"misleading": misleading}}
            assert misleading != row["solution"]
            assert misleading in [other["solution"] for other in references if other["skill"] == row["skill"]]


# ---- SciKnowEval -------------------------------------------------------------------------------------------

PHYSICS = "hicai-zju/SciKnowEval/physics"
REAL = SHARED / "sciknoweval"


def hub_row(i, **changes):
    return {"question": f"question {i}?", "choices": {"text": ["x", f"{i}", "z", "w"], "label": list("ABCD")},
            "answerKey": "AB"[i % 2], "type": "mcq-4-choices", "domain": "Physics",
            "details": {"level": "L3"}} | changes


def hub_file(tmp_path, rows):
    path = tmp_path / "hub.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(rows):
    return [sciknoweval.question(row) for row in rows]


def test_sciknoweval_keeps_its_domain_level_and_types(tmp_path):
    """The hub has one file for all of them."""
    strange = [hub_row(900, domain="Chemistry"), hub_row(901, details={"level": "L2"}),
               hub_row(902, type="open-ended-qa", choices={"text": [], "label": []})]
    two = hub_row(903, type="mcq-2-choices", choices={"text": ["yes", "no"], "label": ["A", "B"]})
    found = convert.parts(PHYSICS, hub_file(tmp_path, [*map(hub_row, range(60)), *strange, two]))
    prompts = [text for part in found.values() for text in texts(part)]
    assert len(prompts) == len(set(prompts)) == 61
    assert not [text for text in prompts if re.match("question 90[0-2]", text)]
    assert "question 903?\n\nA: yes\nB: no\nPlease reason step by step." in prompts
    assert all(row["grader"] == "letter_tag" and can_be_correct(row["grader"], row["answer"])
               and [m["role"] for m in row["prompt"]] == ["system", "user"]
               for part in found.values() for row in part)


def test_sciknoweval_parts_are_disjoint_and_do_not_change(tmp_path, capsys):
    rows = [*map(hub_row, range(100)), hub_row(99)]                     # one row twice
    found = convert.parts(PHYSICS, hub_file(tmp_path, rows))
    parts = {part: set(texts(some)) for part, some in found.items()}
    assert not parts["train"] & parts["test"] and not parts["val"] & (parts["train"] | parts["test"])
    assert len(found["test"]) == 11 and len(parts["val"]) == sciknoweval.VALIDATION
    assert "not those of SDPO" in capsys.readouterr().err               # a changed set is seen
    assert convert.parts(PHYSICS, hub_file(tmp_path, rows)) == found
    by_hand = [hub_file(tmp_path, rows), tmp_path / "test.jsonl"]
    by_hand[1].write_text(json.dumps(rows[3]))
    one, other = (convert.parts(PHYSICS, hub_file(tmp_path, order), by_hand[1])
                  for order in (rows, rows[::-1]))
    assert texts(one["test"]) == [text for text in texts(one["test"]) if "question 3?" in text]
    assert set(texts(one["val"])) == set(texts(other["val"]))           # whatever the order of the file
    assert rows[3]["question"] not in str(one["train"]) + str(one["val"])


@pytest.mark.parametrize("changes, message", [
    ({"answerKey": "E"}, "hub.jsonl:41: .*answer 'E' is no choice's label"),
    ({"answerKey": ""}, "no choice's"),
    ({"question": " "}, "empty question or choice"),
    ({"choices": {"text": ["x", ""], "label": ["A", "B"]}}, "empty question or choice"),
    ({"choices": {"text": ["x"], "label": ["A", "B"]}}, "empty question or choice"),
    ({"choices": None}, "hub.jsonl:41: not a row of hicai-zju/SciKnowEval/physics")], ids=str)
def test_bad_sciknoweval_rows_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        convert.parts(PHYSICS, hub_file(tmp_path, [*map(hub_row, range(40)), hub_row(0, **changes)]))


def test_sciknoweval_files_that_cannot_be_are_refused_in_one_line(tmp_path, capsys):
    few, chemistry = hub_file(tmp_path, map(hub_row, range(9))), PHYSICS.replace("physics", "chemistry")
    many = tmp_path / "many.json"
    many.write_text(json.dumps([hub_row(i) for i in range(60)]))        # a JSON list, as SDPO's physics.json
    for argv, message in (([PHYSICS, "--file", few], "too few for 30 validation"),
                          ([PHYSICS, "--file", many, many, many], "not 3 files"),
                          ([PHYSICS + ":vali", "--file", many], "parts train, val, test, not 'vali'"),
                          ([chemistry, "--file", many], "has no rows of " + chemistry),
                          ([PHYSICS, chemistry, "--file", many], "say which: physics, chemistry"),
                          ([PHYSICS, "--file", f"biology={many}"], "the sets are physics"),
                          (["openai/gsm8k", "--out", tmp_path / "o"], "has no parts"),
                          ([PHYSICS, "--file", tmp_path / "none"], "No such file"),
                          ([PHYSICS], "cannot load")):
        with pytest.raises(SystemExit):
            convert.main(list(map(str, argv)))
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, (message, error)
    convert.main([PHYSICS, "--file", f"physics={many}", "--out", str(tmp_path / "o")])
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()}
    assert written.keys() == {f"physics_{part}.jsonl" for part in ("train", "val", "test")}
    convert.main([PHYSICS, "--out", str(tmp_path / "o")])               # no network: what is there stays
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()}
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(hub_row(i, domain="Chemistry")) + "\n" for i in range(200, 260)))
    convert.main([PHYSICS, chemistry, "--file", f"chemistry={other}", f"physics={many}",
                  "--out", str(tmp_path / "two")])
    for domain, first in (("physics", range(60)), ("chemistry", range(200, 260))):
        rows = [row for part in ("train", "val", "test")
                for row in load_prompts(str(tmp_path / "two" / f"{domain}_{part}.jsonl"), domain)]
        assert {int(text.split()[1].rstrip("?")) for text in texts(rows)} == set(first)
    rows = load_prompts(str(tmp_path / "o" / "physics_val.jsonl"), "physics")
    assert len(rows) == 30 and rows[0]["branch"] == "physics"


def test_ifeval_of_the_hub_and_of_its_file_are_the_same_rows(tmp_path):
    """On the hub every instruction has all arguments, and None where it has none."""
    row = {"key": 1, "prompt": "Say it.", "instruction_id_list": ["a:b", "c:d"],
           "kwargs": [{}, {"n": 3, "x": ["y"]}]}
    hub = row | {"kwargs": [{"n": None, "x": None}, {"n": 3, "x": ["y"]}]}
    found = [convert.rows("google/IFEval", hub_file(tmp_path, [one])) for one in (row, hub)]
    assert found[0] == found[1] == [{"prompt": "Say it.", "grader": "ifeval",
                                     "answer": '[["a:b", {}], ["c:d", {"n": 3, "x": ["y"]}]]'}]


MEDQA, CHOICES = "GBaker/MedQA-USMLE-4-options", {"A": "rest", "B": "ice", "C": "heat", "D": "none"}


def test_medqa_of_the_hub_and_with_its_choices_in_the_prompt_are_the_same_rows(tmp_path):
    hub = {"question": "What helps?", "answer": "ice", "options": CHOICES, "answer_idx": "B"}
    plain = {"prompt": "What helps?\nAnswer Choices: (A) rest (B) ice (C) heat (D) none", "answer": "B"}
    found = [convert.rows(MEDQA, hub_file(tmp_path, [one])) for one in (hub, plain)]
    assert found[0] == found[1]
    row = found[0][0]
    assert row["prompt"].startswith(plain["prompt"] + "\n\n") and '"Final answer: X"' in row["prompt"]
    assert (row["answer"], row["grader"]) == ("B", "final_letter")
    assert can_be_correct(row["grader"], row["answer"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not part of the project")
def test_every_question_of_medqa_has_its_answer_among_four_choices():
    rows = convert.rows(MEDQA, SHARED / "medqa" / "test.jsonl")
    assert len(rows) == 1273 and {row["answer"] for row in rows} == set("ABCD")
    assert all(f"({letter}) " in row["prompt"] for row in rows for letter in "ABCD")
    assert all(can_be_correct(row["grader"], row["answer"]) for row in rows)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not part of the project")
def test_real_physics_splits_as_sdpo_did(capsys):
    """The hub's rows in the hub's order give SDPO's own train and test problems, letter by letter."""
    files = [REAL / f"physics_{part}.jsonl" for part in ("train", "test")]
    hub, sdpo = convert.parts(PHYSICS, REAL / "physics_l3_hub_schema.jsonl"), convert.parts(PHYSICS, *files)
    assert hub == sdpo and capsys.readouterr().err == ""
    assert {part: len(rows) for part, rows in hub.items()} == {"train": 690, "val": 30, "test": 80}
    raw = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    ours = {(*(m["content"] for m in row["prompt"]), row["answer"]) for rows in hub.values() for row in rows}
    assert ours == {(row["system"], row["prompt"], row["answer"]) for row in raw} and len(ours) == 800
    assert convert.rows(PHYSICS + ":val", REAL / "physics_l3_hub_schema.jsonl") == hub["val"]
    assert all(can_be_correct(row["grader"], row["answer"]) for rows in hub.values() for row in rows)
