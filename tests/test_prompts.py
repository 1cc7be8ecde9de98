"""What is refused before weights are read: rows, options, flags, folders, each in one line that says why."""
import csv
import functools
import json
import os
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import gradients, tiny
from test_config import said, words
from test_loop import accumulate, double

import models
import opd
from config import Refused
from data import scratch
from data.check import RULES
from data.prompts import load_prompts
from data.scratch import CHATML
from methods import METHODS, Job, camopd
from methods.dpo import preference_job

STRICT = CHATML.replace("in messages", "in messages if m.role in ['system', 'user', 'assistant']")
FIRST = CHATML.replace("in messages", "in messages[:2]")
RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DEFAULT = ("{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
           + CHATML)
UPPER, JOINED, LAST = (CHATML.replace("m.content", content) for content in (
    "m.content | upper", "m.content.split() | join(' ')", "m.content.split('</think>')[-1] | trim"))
PLAIN = ("{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}Assistant:{% endif %}")
OPENS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' if brief else '<think>\n' }}{% endif %}")
QUICK, BRIEF = '{"enable_thinking": false}', '{"brief": true}'
FACTS = [{"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Be brief."}]
GOOD = {"prompt": "What is 2 and 3?", "answer": "5", "solution": "It is 2 and 3.</think>5"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def short(value):
    """A part of a test's name."""
    return str(value)[:40]


class Reached(BaseException):
    """The weights would be read now."""


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """bare(template, ..) -> a folder of a chat model without its weights; template None: of a base model.

    positions: how many it has. ends: what its tokenizer puts around a text. more: a token that has no row.
    seed: of weights, if there are to be some.
    """
    root = tmp_path_factory.mktemp("bare")

    @functools.cache
    def make(template=CHATML, positions=4096, ends="$A", more=None, seed=None):
        folder = root / str(len(list(root.iterdir())))
        tok = scratch.tokenizer([GOOD["prompt"] + GOOD["solution"], "User: Hi\nAssistant: Hello."], 320)
        net = scratch.model(tok, seed or 0, 64, 1, positions=positions)
        tok.chat_template = template
        tok.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=ends, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)])
        if more:
            tok.add_tokens([more])
        if seed is not None:
            return tiny(folder, net, tok, scale=4)
        for part in (net.config, net.generation_config, tok):
            part.save_pretrained(folder)
        return folder
    found = lambda spec: make(**spec) if isinstance(spec, dict) else make(spec)
    return lambda spec: spec if isinstance(spec, Path) else found(spec)


@pytest.fixture
def checked(argv, bare, prompts, monkeypatch):
    """checked(rows, flag=value, ..) -> the line that refuses them, or "" if the weights would be read next.

    student, teacher: templates, what else `bare` takes, or paths. checked.path: the file of the rows;
    checked.run: the Run whose weights would be read.
    """
    def reached(*args, **kwargs):
        raise Reached

    def load_models(run, *args, load=opd.Run.load_models):
        check.run = run
        load(run, *args)
    for name in ("read_net", "fake_net"):
        monkeypatch.setattr(models, name, reached)
    monkeypatch.setattr(opd.Run, "load_models", load_models)

    def check(rows=(GOOD,), student=CHATML, teacher=CHATML, **flags):
        check.path = str(prompts("rows", rows))
        taught = METHODS[flags.get("method", "opd")].teachers != "none"
        line = argv(**dict(student=bare(student), teachers=[bare(teacher)] if taught else [],
                           prompts=[check.path]) | flags)
        try:
            opd.main(line)
        except Reached:
            message = "opd.py: "
        except SystemExit as stop:
            message = str(stop)
        assert message.startswith("opd.py: ") and "\n" not in message
        out = Path(line[line.index("--out") + 1])
        assert "out" in flags or not out.exists()               # nothing was written
        return message.removeprefix("opd.py: ")
    return check


# ---- the rules of data/check.py ----------------------------------------------------------------------------

SFT, IMAGE, LONG, TURN = dict(method="sft"), dict(more="<image>"), "Hi " * 99, "<|im_start|>user"
REFUSED = [         # the rule that is broken (None: whichever), the row, flags, what the line says
    ("fields", {}, SFT, 'no "solution", which --method sft learns from'),
    ("fields", dict(solution=5), SFT, '"solution", which --method sft learns from, is text, not'),
    ("fields", {}, dict(method="grpo"), 'no "answer", which --method grpo needs for its rewards'),
    ("fields", dict(teacher_prompt="Hi", solution="5"), SFT, 'a "teacher_prompt", but --method sft has no'),
    ("user", dict(teacher_prompt=" "), {}, "the user says nothing"),
    ("template", dict(teacher_prompt=[FACTS[1], user("Hi")]), dict(teacher=STRICT), "leaves out the text"),
    ("length", dict(teacher_prompt=LONG), dict(teacher=dict(positions=64)), "64 positions"),
    ("user", [user("Hi"), assistant("Hello.")], {}, "message is of role 'assistant', not of the user"),
    ("user", FACTS[:1], {}, "the last message is of role 'system', not of the user"),
    ("user", " \n", {}, "the user says nothing"),
    ("user", " ", dict(student=None, teacher=None), "the user says nothing"),
    ("user", [FACTS[0], user("\t")], {}, "the user says nothing"),
    ("wrapped", f"{TURN}\nHi<|im_end|>\n<|im_start|>assistant\n", {}, f"the text has '{TURN}' and so is in"),
    ("wrapped", [FACTS[0], user(f"It is so: {TURN}\nHi")], {}, f"the text has '{TURN}'"),
    ("wrapped", f"{TURN}\nHi", dict(student=DEFAULT, teacher=DEFAULT), f"the text has '{TURN}'"),
    ("wrapped", " User: Hi\nAssistant:", dict(student=PLAIN), "the text has 'User:'"),
    ("wrapped", "User: Hi\nAssistant:", dict(teacher=PLAIN), "the text has 'User:'"),
    ("template", [FACTS[1], user("Hi")], dict(student=STRICT), "leaves out the text of a message of role"),
    ("template", [FACTS[1], user("Hi")], dict(teacher=STRICT), "leaves out the text of a message of role"),
    ("template", [user("Hi"), {"role": "tool", "content": "17"}], dict(student=STRICT), "of role 'tool'"),
    ("template", [user("Add 1"), assistant("2"), user("add  1")], dict(student=FIRST), "leaves out the text"),
    ("template", [FACTS[0], user("Hi")], dict(teacher=RAISES), "no system role"),
    ("template", [user("Hi")], dict(student=None), "has no chat template, but the prompt is a list"),
    ("completion", dict(solution="5<|im_end|>\n"), SFT, """"solution" has '<|im_end|>', which"""),
    ("completion", dict(solution="5<|endoftext|>"), SFT, """"solution" has '<|endoftext|>'"""),
    ("completion", dict(chosen="5", rejected="<|im_end|>6"), dict(method="dpo"), '"rejected" has'),
    ("completion", dict(solution=" \n"), SFT, '"solution" is blank, so the student would learn'),
    ("completion", dict(solution="5"), SFT | dict(student=OPENS), 'opens <think>, so "solution"'),
    ("completion", dict(solution=" <think>2</think>5"), SFT | dict(student=OPENS), "opens <think>"),
    ("answer", dict(answer="<think>5"), {}, "the grader exact calls no completion correct"),
    (None, dict(answer="five", grader="number"), {}, "needs an answer with a number"),
    (None, dict(answer="five"), dict(grader="number"), "needs an answer with a number"),
    (None, dict(chosen="5", rejected="5"), dict(method="dpo"), "texts are the same"),
    (None, dict(solution="<think>2"), dict(method="opsd"), "its self-teacher would see nothing"),
    ("tokens", "<image>", dict(student=IMAGE, teacher=IMAGE), "the token '<image>', id "),
    ("length", LONG, dict(student=dict(positions=64)), "64 positions; lower --max_new_tokens"),
    ("length", LONG, dict(teacher=dict(positions=64)), "64 positions; lower --max_new_tokens"),
    ("length", dict(solution=LONG), SFT | dict(student=dict(positions=64)), "64 positions"),
    ("length", dict(solution=LONG), dict(method="opsd", student=dict(positions=80)),
     "as the self-teacher reads them")]


def as_row(row):
    """A row of the table, which may be only a prompt, or have none."""
    return {"prompt": "Hi"} | (row if isinstance(row, dict) else {"prompt": row})


@pytest.mark.parametrize("rule, row, flags, expected", REFUSED, ids=short)
def test_a_row_that_breaks_a_rule_is_refused_before_weights_are_read(checked, capsys, rule, row, flags,
                                                                     expected):
    """In one line with file and number, without a trace on the disk, and by --dry_run under its rule."""
    good = GOOD | dict(chosen="5", rejected="6")
    line = checked([good, as_row(row)], **flags)
    assert line.startswith(f"{checked.path}:2: ") and expected in line
    capsys.readouterr()
    assert checked([good, as_row(row)], dry_run=True, **flags) == line
    if rule:
        assert f"     1 rows {RULES[rule]}, such as\n       {line}\n" in capsys.readouterr().out
    assert checked([good], **flags) == ""


def test_the_table_has_every_rule():
    assert {rule for rule, *_ in REFUSED} - {None} == set(RULES)


def test_each_row_is_checked_for_those_who_read_it_and_for_no_others(checked, bare, prompts):
    """A branch's teacher reads its own branch; in compact every teacher reads everything."""
    paths = [f"{name}={prompts(name, [GOOD, as_row([FACTS[1], user('Hi')])])}" for name in "ab"]
    teachers = lambda *templates: [f"{name}={bare(template)}" for name, template in zip("ab", templates)]
    mopd = dict(method="mopd", prompts=paths)
    assert checked(teachers=teachers(CHATML, CHATML), **mopd) == ""
    assert "a.jsonl:2: the chat template" in checked(teachers=teachers(STRICT, CHATML), **mopd)
    line = checked(teachers=teachers(CHATML, STRICT), **mopd)
    assert "b.jsonl:2: the chat template" in line and "other rows" not in line
    rows = [GOOD | {"rationales": {"c": "2 and 3"}, "prompt": [FACTS[1], user("Hi")]}]
    for templates in ((CHATML, STRICT), (STRICT, CHATML)):
        assert "leaves out" in checked(rows, teachers=teachers(*templates), method="compact")
    assert checked(rows, teachers=teachers(CHATML, CHATML), method="compact") == ""


def test_evaluation_prompts_are_checked_before_weights_are_read_too(checked, prompts):
    """For the student, which answers them; they need an answer, and no text to learn from."""
    long = dict(student=dict(positions=64), max_new_tokens=40, **SFT)
    for row, flags, expected in (({}, {}, 'no "answer", so it cannot be evaluated'),
                                 (dict(answer="5") | as_row(FACTS[:1]), SFT, "not of the user"),
                                 (dict(prompt="Hi " * 10, answer="5"), long, "64 positions")):
        path = prompts("e", [GOOD, as_row(row)])
        line = checked(eval_prompts=[f"e={path}"], **flags)
        assert line.startswith(f"{path}:2: ") and expected in line
    e = prompts("e", [as_row(dict(answer="5"))])
    assert checked(eval_prompts=[f"e={e}"], **SFT) == ""
    developer = prompts("e", [as_row([FACTS[1], user("Hi")]) | dict(answer="5")])
    assert checked(eval_prompts=[f"e={developer}"], teacher=STRICT) == ""


@pytest.mark.parametrize("row, flags", [
    ([*FACTS, user("Hi")], {}), ([user("Hi"), {"role": "tool", "content": "17"}], {}),
    ("The User: Hi\nAssistant:", dict(student=PLAIN, teacher=PLAIN)), ("User: Hi", {}),
    ("User: Hi", dict(student=None, teacher=None)), ("What is <|im_start|> for?", {}),
    ("It is\n 2  and 3.", dict(student=UPPER, teacher=JOINED)), (" It is 2 \n", dict(student=LAST)),
    ([user("a"), assistant("<think>b</think>\n\nc"), user("d")], dict(student=LAST)),
    ([user("a"), assistant("<think>b</think>\n\nc"), user("d")], {}),
    ([user("Hi"), assistant("Hi"), user("Hi")], dict(student=STRICT)),
    (dict(solution="5"), dict(method="opd", student=OPENS)),       # it is not learned from
    (dict(solution="5<|im_end|>"), SFT), (dict(solution="5"), SFT),
    (dict(solution="2 and 3</think>5"), SFT | dict(student=OPENS)),
    (dict(solution="5"), SFT | dict(student=OPENS, chat_template_kwargs=BRIEF)),
    ("Hi", dict(student=PLAIN, chat_template_kwargs=QUICK))], ids=short)    # its teacher's template reads it
def test_what_is_meant_as_it_is_read_passes(checked, row, flags):
    assert checked([as_row(row)], **flags) == ""


def test_the_end_of_a_turn_is_learned_once(checked):
    """Whether a solution has it or not."""
    for text in ("It is 5.", "It is 5.<|im_end|>"):
        assert checked([as_row(dict(solution=text))], **SFT) == ""
        *ids, last = checked.run.student.encode_completion(text)
        assert checked.run.student.tok.decode(ids) == "It is 5." and last == 2


@pytest.mark.parametrize("template, flags, tokens", [
    (OPENS, {}, 2048), (OPENS, dict(chat_template_kwargs=BRIEF), 512), (CHATML, {}, 2048), (PLAIN, {}, 512),
    (CHATML, dict(chat_template_kwargs=QUICK), 512), (OPENS, dict(max_new_tokens=7), 7), (None, {}, 512)])
def test_a_student_that_thinks_may_write_more(checked, template, flags, tokens):
    flags = dict(teacher=None if template is None else CHATML, max_new_tokens=[]) | flags
    assert checked(student=template, **flags) == ""
    assert checked.run.cfg.max_new_tokens == tokens


def test_special_tokens_in_a_text_are_counted(checked, capsys):
    """They are read as what they are to the model, which nobody may have meant."""
    rows = [GOOD, {"prompt": "a<|im_end|>"}, {"prompt": [user("<think>"), assistant("b"), user("c")]},
            {"prompt": [user("<think>"), assistant("<|endoftext|>"), user("c")]}]
    assert checked(rows, student=STRICT) == ""                  # <think> is special for this tokenizer
    assert (f"note: 3 of 4 rows of {checked.path} have a special token in their text, which is read as one; "
            f"{checked.path}:2 is the first\n") in capsys.readouterr().out
    assert checked() == "" and "special token" not in capsys.readouterr().out


def test_a_dry_run_says_of_every_rule_how_many_rows_break_it(checked, capsys):
    """And shows the first of them; the line that refuses names the first row, and counts the others."""
    broken = {"length": [LONG, LONG + "!"], "tokens": ["<image>"], "answer": [dict(answer="<think>5")] * 3,
              "completion": [dict(solution="<|im_end|>5")], "template": [[FACTS[1], user("Hi")]] * 2,
              "wrapped": [TURN], "user": [" ", FACTS[:1], [user("Hi"), assistant("5")]], "fields": [{}, {}]}
    assert broken.keys() == RULES.keys()
    rows, first = [GOOD], {}
    for rule, some in broken.items():
        first[rule] = len(rows) + 1
        rows += [as_row(row) if rule == "fields" else {"solution": "5"} | as_row(row) for row in some]
    flags = dict(student=dict(template=STRICT, positions=64, more="<image>"), **SFT)
    line = checked([*rows, GOOD], dry_run=True, **flags)
    assert line.startswith(f"{checked.path}:2: ") and "64 positions" in line
    assert line.endswith(f" ({len(rows) - 2} other rows cannot be used; --dry_run shows one of every kind)")
    printed = [text for text in capsys.readouterr().out.splitlines() if not text.startswith("note: ")]
    for rule, said_of_it, example in zip(RULES, printed[::2], printed[1::2], strict=True):
        assert said_of_it == f"{len(broken[rule]):>6} rows {RULES[rule]}, such as"
        assert example.startswith(f"       {checked.path}:{first[rule]}: ")
    assert checked([*rows, GOOD], **flags) == line
    assert "such as" not in capsys.readouterr().out             # a run only refuses


# ---- options of the chat template --------------------------------------------------------------------------

@pytest.mark.parametrize("flags, expected", [
    (dict(chat_template_kwargs='{"enable_thinkin": 1}'), "'enable_thinkin'; did you mean enable_thinking?"),
    (dict(teacher_chat_template_kwargs='{"enabled": 1}'), "--teacher_chat_template_kwargs: no chat template"),
    (dict(student=PLAIN, teacher=PLAIN, chat_template_kwargs=QUICK), "--chat_template_kwargs: no chat"),
    (dict(student=None, teacher=None, chat_template_kwargs=QUICK), "reads 'enable_thinking'"),
    (dict(method="opsd", teacher_chat_template_kwargs='{"brif": 1}', student=OPENS), "did you mean brief?"),
    *[(flags | dict(teacher_chat_template_kwargs="{}"), "no effect without a teacher that reads prompts of its own")
      for flags in (SFT, dict(method="grpo"), dict(method="opsd", self_teacher="live"))]], ids=short)
def test_an_option_that_no_template_reads_is_refused(checked, flags, expected):
    """It is misspelt, or nobody is there to read it, and the run would go on without it."""
    assert expected in checked(**flags)


@pytest.mark.parametrize("student, teacher, thinks", [
    ({}, {}, (True, True)), (dict(chat_template_kwargs=QUICK), {}, (False, False)),
    ({}, dict(teacher_chat_template_kwargs=QUICK), (True, False)),
    (dict(chat_template_kwargs=QUICK), dict(teacher_chat_template_kwargs="{}"), (False, True))], ids=short)
@pytest.mark.parametrize("flags", [
    dict(), dict(lora_rank=2), *[dict(method="opsd", self_teacher=kind) for kind in ("frozen", "ema")],
    dict(self_teacher="frozen", method="opsd", lora_rank=2)], ids=short)
def test_a_teachers_options_are_its_own(start, bare, prompts, flags, student, teacher, thinks):
    """They reach the prompt that the teacher reads, and not the student's, which is their default."""
    if "lora_rank" in flags:
        pytest.importorskip("peft", reason="optional: pip install peft")
    folder = bare(dict(seed=0))
    run = start(student=folder, prompts=[prompts("rows", [GOOD])], batch=2,
                teachers=[] if "method" in flags else [folder], **flags, **student, **teacher)
    thinks = (thinks[0], thinks[1] or "method" in flags and not teacher)        # opsd's own default
    switched_off = run.student.tok("<think>\n\n</think>\n\n").input_ids
    job, = next(run.jobs())
    for r in job.rollouts:
        for ids, thinking in zip((r.prompt_ids, r.teacher_ids), thinks):
            assert (ids[-len(switched_off):] != switched_off) == thinking
            assert run.student.tok.decode(ids).count("What is 2 and 3?") == 1
    assert job.teacher is not run.student


def test_a_teacher_writes_after_the_prompt_in_its_own_options(start, bare, prompts, monkeypatch):
    run = start(student=bare(dict(seed=0)), teachers=[bare(dict(seed=1))], method="seqkd", batch=1,
                prompts=[prompts("rows", [GOOD])], teacher_chat_template_kwargs=QUICK)
    asked, complete = [], run.complete

    def recorded(model, prompts, *more):
        asked.extend(prompts)
        return complete(model, prompts, *more)
    monkeypatch.setattr(run, "complete", recorded)
    job, = next(run.jobs())
    assert run.student.tok.decode(asked[0]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert run.student.tok.decode(job.rollouts[0].prompt_ids).endswith("assistant\n")


@pytest.mark.parametrize("prompt, student, seen", [
    ("What is 2?", CHATML, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is 2?<|im_end|>"),
    ([FACTS[1], user("2?")], CHATML, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>developer\nBe brief."),
    ([FACTS[0] | {"content": "Be brief."}, user("2?")], CHATML,
     "<|im_start|>system\nBe kind.\n\nBe brief.<|im_end|>\n<|im_start|>user\n2?<|im_end|>"),
    ("What is 2?", None, "Be kind.\n\nWhat is 2?")], ids=short)
@pytest.mark.parametrize("method", ["opd", "context"])
def test_the_text_of_teacher_system_is_in_what_the_teacher_sees_alone(checked, tmp_path, method, prompt, student,
                                                                      seen):
    """As a system message, together with one that is there; of a base model before the text."""
    (tmp_path / "kind.txt").write_text("\nBe kind.\n")
    assert checked([dict(prompt=prompt)], student=student, teacher=student, method=method,
                   teacher_system=tmp_path / "kind.txt") == ""
    run = checked.run
    ours, theirs = map(run.student.tok.decode, run.views(run.prompts["main"][0]))
    assert theirs.startswith(seen) and "Be kind." not in ours
    assert theirs.endswith(ours.removeprefix("<|im_start|>system\nBe brief.<|im_end|>\n"))


def test_a_teachers_own_prompt_is_checked_for_the_self_teacher_too(checked, prompts):
    rows = [dict(prompt="Hi", teacher_prompt=[FACTS[1], user("Hi")])]
    flags = dict(method="context", teacher_system=[])
    assert checked(rows, **flags) == ""
    assert checked(rows, student=STRICT, **flags).startswith(f"{checked.path}:1: the chat template")
    e = prompts("e", [dict(answer="5") | rows[0]])              # of evaluation no teacher sees it
    assert checked([GOOD], student=STRICT, eval_prompts=[f"e={e}"], **SFT) == ""
    assert "teacher_prompt" not in checked.run.evals["e"][0]
    long = [dict(prompt="Hi", teacher_prompt=LONG)]
    assert "as the self-teacher reads them" in checked(long, student=dict(positions=64), **flags)


# ---- long prompts, cut completions -------------------------------------------------------------------------

def long_rows(checked):
    """Rows of 2, 1, 4, 3 words, and --max_new_tokens with which exactly the first two have room in 64."""
    rows = [{"prompt": "What " * n, "answer": "5"} for n in (2, 1, 4, 3)]
    assert checked(rows) == ""
    lengths = sorted(len(checked.run.student.encode(row["prompt"])) for row in rows)
    return rows, 64 - lengths[1]


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_drop_long_leaves_out_exactly_the_rows_without_room(checked, capsys, whose):
    rows, most = long_rows(checked)
    flags = {whose: dict(positions=64), "max_new_tokens": most}
    line = checked(rows, **flags)
    assert line.startswith(f"{checked.path}:3: prompt and completion can have ") and "(--drop_long)" in line
    assert line.endswith("(1 other rows cannot be used; --dry_run shows one of every kind)")
    capsys.readouterr()
    assert checked(rows, drop_long=True, **flags) == ""
    assert [row["row"] for row in checked.run.prompts["main"]] == [1, 2]
    assert f"note: 2 of 4 rows of {checked.path} are too long and left out\n" in capsys.readouterr().out
    assert checked(rows[:2], drop_long=True, **flags) == "" and "left out" not in capsys.readouterr().out
    assert checked(rows[2:], drop_long=True, **flags) == f"{checked.path}: --drop_long leaves no row of it"
    bad = rows + [{"prompt": FACTS}]
    assert checked(bad, drop_long=True, **flags).startswith(f"{checked.path}:5: the last message is of role")


def test_drop_long_is_for_evaluation_and_fixed_texts_too(checked, prompts):
    rows, most = long_rows(checked)
    flags = dict(student=dict(positions=64), drop_long=True)
    assert checked(rows[:2], eval_prompts=[f"e={prompts('e', rows)}"], max_new_tokens=most, **flags) == ""
    assert [row["row"] for row in checked.run.prompts["main"] + checked.run.evals["e"]] == [1, 2, 1, 2]
    assert checked([GOOD, GOOD | {"solution": "What " * 99}, GOOD], **flags, **SFT) == ""
    assert [row["row"] for row in checked.run.prompts["main"]] == [1, 3]
    assert checked.run.longest.completion == len(checked.run.student.encode_completion(GOOD["solution"]))


SAME = [{"prompt": p, "answer": "cba", "solution": "cba"} for p in ("rev abc>", "copy cba>", "last q>")]


@pytest.fixture
def writing(start, prompts, monkeypatch):
    """writing(texts, flag=value, ..) -> a Run whose models write these texts in turn; with .. one is cut."""
    def make(texts, **flags):
        def generate(model, asked, *_):
            completions = []
            for i in range(len(asked)):
                text = texts[i % len(texts)]
                *ids, end = model.encode_completion(text.removesuffix(".."))
                ids_T = torch.tensor(ids if text.endswith("..") else [*ids, end])
                completions.append((ids_T, torch.full((len(ids_T),), -1.0)))
            return completions
        monkeypatch.setattr(models.Model, "generate", generate)
        return double(start(prompts=[prompts("same", SAME)], batch=3, **flags))
    return make


def is_cut(run, rollouts):
    return [r.ids_T[-1].item() not in run.student.stops for r in rollouts]


TEXTS = ["cba", "hello..", "cba..", "xyz", "q", "add.."]


@pytest.mark.parametrize("flags", [
    dict(rollouts=2), dict(method="mopd", loss="rkl"), dict(method="gkd", gkd_lambda=1, rollouts=2),
    dict(method="grpo", rollouts=4), dict(method="opsd", rollouts=2), dict(method="seqkd")], ids=short)
def test_drop_cut_takes_the_weight_of_cut_rollouts_and_of_no_others(writing, flags):
    """In grpo the advantages of the others stay what they were, since rewards of cut ones still count."""
    found = []
    for drop in ([], True):
        run = writing(TEXTS, drop_cut=drop, **flags)
        job, = next(run.jobs())
        found.append([float(w) for w in job.weights or [1.0] * len(job.rollouts)])
    cut = is_cut(run, job.rollouts)
    assert 0 < sum(cut) < len(cut) and any(w for w, c in zip(found[0], cut) if c)
    assert found[1] == [0 if c else w for w, c in zip(found[0], cut)]


def test_with_drop_cut_the_gradient_is_that_of_the_others_alone(writing):
    run = writing(TEXTS, rollouts=2, drop_cut=True)
    job, = next(run.jobs())
    loss, ours = accumulate(run, [job]), gradients(run.student)
    others = [r for r, cut in zip(job.rollouts, is_cut(run, job.rollouts)) if not cut]
    assert len(others) == 3 and job.weights == [1, 0, 0, 1, 1, 0]
    alone = accumulate(run, [Job(run.student, run.teacher, others, run.objective)])
    assert loss == pytest.approx(alone, rel=1e-9)
    assert (ours - gradients(run.student)).abs().max() < 1e-9 * ours.abs().max()


@pytest.mark.parametrize("mass", [0.5, 1])
def test_camopd_does_not_select_what_was_cut(writing, mass):
    """Cut rollouts take no part of the mass, either: the others are selected as if they were alone."""
    flags = dict(method="camopd", loss="rkl", rollouts=2, mass=mass)
    before, = next(writing(TEXTS, **flags).jobs())
    run = writing(TEXTS, drop_cut=True, **flags)
    job, = next(run.jobs())
    loss, ours, cut = accumulate(run, [job]), gradients(run.student), is_cut(run, job.rollouts)
    assert any(w and c for w, c in zip(before.weights, cut))            # otherwise nothing would be seen
    assert not any(w and c for w, c in zip(job.weights, cut))
    alone = Job(run.student, run.teacher, [r for r, c in zip(job.rollouts, cut) if not c], run.objective)
    run.score([alone])
    camopd.select(run, [alone], mass={"main": mass}, scale={"main": 2.0})
    assert [float(w) for w, c in zip(job.weights, cut) if not c] == [float(w) for w in alone.weights]
    assert loss == pytest.approx(accumulate(run, [alone]), rel=1e-6)
    assert (ours - gradients(run.student)).abs().max() < 1e-6 * ours.abs().max()


def test_in_preferences_a_pair_with_a_cut_side_is_left_out(writing):
    """Of three pairs one has a cut right answer, and one a cut wrong one."""
    run = writing(["cba", "x", "cba..", "xy", "cba", "y.."], method="dpo", rollouts=2, drop_cut=True)
    job, = next(run.jobs())
    assert [bool(w) for w in job.weights] == [True, True, False, False, False, False]
    assert job.count == run.notes["pairs"] == 1
    loss, ours = accumulate(run, [job]), gradients(run.student)
    pair, run.cfg.drop_cut = job.rollouts[:2], False
    alone = preference_job(run, run.self_teacher(run.student), pair, [tuple(pair)], 0.1)
    assert loss == pytest.approx(accumulate(run, [alone]), rel=1e-9) and ours.abs().max() > 0
    assert (ours - gradients(run.student)).abs().max() < 1e-9 * ours.abs().max()


# ---- base models -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ends, first", [("$A <|im_end|>", []), ("<|im_start|> $A <|im_end|>", [1]),
                                         ("<|im_start|> $A", [1]), ("$A", [])])
def test_a_base_model_reads_a_prompt_without_the_end_that_its_tokenizer_adds(checked, ends, first):
    """Behind EOS it would begin another text. What a prompt itself ends with stays."""
    closed = dict(template=None, ends=ends)
    for text in ("What is 2?", "What is 2?<|im_end|>", "What<|im_end|><|im_end|>"):
        assert checked([{"prompt": text}], student=closed, teacher=closed) == ""
        student, row = checked.run.student, checked.run.prompts["main"][0]
        plain = student.tok(text, add_special_tokens=False).input_ids
        assert checked.run.views(row) == (first + plain, first + plain)
        assert student.tok.decode(plain) == text
        assert student.encode_completion(text + " 5") == [
            *student.tok(text + " 5", add_special_tokens=False).input_ids, 2]


# ---- data/prompts.py ---------------------------------------------------------------------------------------

TABLE = [{"prompt": 'He said "a, b",\nand\r\n\nleft; é\u2028', "answer": "007", "topic": "x,y"},
         {"prompt": " b ", "answer": "1e3", "solution": "[1]"}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "answer", "topic", "solution"])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="optional: pip install pyarrow")
    from pyarrow import parquet
    names = dict.fromkeys(name for row in rows for name in row)
    parquet.write_table(pyarrow.Table.from_pylist([names | row for row in rows]), path)


FORMS = {
    "lines.jsonl": lambda path, rows: path.write_text(lines(rows), encoding="utf-8"),
    "any.name": lambda path, rows: path.write_text(lines(rows), encoding="utf-8"),
    "windows.jsonl": lambda path, rows: path.write_bytes(
        b"\xef\xbb\xbf" + lines(rows).replace("\n", "\r\n").encode()),
    "list.json": lambda path, rows: path.write_text(f"\n {json.dumps(rows, indent=1)}\n"),
    "table.csv": write_csv, "table.parquet": write_parquet}


@pytest.mark.parametrize("name", FORMS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    """Leading zeros, quotes and line ends stay, what is empty is no field, and rows are counted from 1."""
    FORMS[name](tmp_path / name, TABLE)
    rows = load_prompts(str(tmp_path / name), "words")
    expected = [row | {"branch": "words", "row": i} for i, row in enumerate(TABLE, 1)]
    if name == "table.csv":                             # it is read as text, where \r\n is one line end
        expected[0]["prompt"] = expected[0]["prompt"].replace("\r\n", "\n")
    assert rows == expected


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    (tmp_path / "gaps.jsonl").write_text('\n{"prompt": "a\u2028b"}\n \n\n{"prompt": "c"}\n', encoding="utf-8")
    assert [row["row"] for row in load_prompts(str(tmp_path / "gaps.jsonl"), "main")] == [2, 5]


TALK = [FACTS[0], user("Hi"), assistant("Hello."), user("What is 2 and 3?")]
SHARED = [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
          for m in TALK]


@pytest.mark.parametrize("theirs, ours", [
    (dict(messages=TALK), dict(prompt=TALK)),
    (dict(messages=[*TALK, assistant("5")]), dict(prompt=TALK, solution="5")),
    (dict(conversations=SHARED), dict(prompt=TALK)),
    (dict(conversations=[*SHARED, {"from": "gpt", "value": "5"}]), dict(prompt=TALK, solution="5")),
    (dict(conversations=TALK), dict(prompt=TALK)), (dict(messages=SHARED), dict(prompt=TALK)),
    (dict(instruction="Add.", input="2 and 3", output="5"), dict(prompt="Add.\n\n2 and 3", solution="5")),
    (dict(instruction="Add.", input="", output="5"), dict(prompt="Add.", solution="5")),
    (dict(instruction="Add."), dict(prompt="Add.")),
    (dict(question="What?", answer=5), dict(prompt="What?", answer=5)),
    (dict(prompt="a", question="b", output="c"), dict(prompt="a", question="b", output="c")),
    (dict(messages=[*TALK, assistant("5")], answer="5", topic="t"),
     dict(prompt=TALK, solution="5", answer="5", topic="t"))], ids=short)
@pytest.mark.parametrize("name", ["lines.jsonl", "list.json", "table.parquet"])
def test_other_columns_give_the_rows_of_our_own_form(tmp_path, name, theirs, ours):
    more = dict(id=7, source="web", level=2)
    FORMS[name](tmp_path / name, [theirs | more])
    assert load_prompts(str(tmp_path / name), "main") == [ours | more | {"branch": "main", "row": 1}]


@pytest.mark.parametrize("name, text, where, expected", [
    ("a.jsonl", '{"prompt": "a"}\n{"text": "b", "topic": "c"}', ":2", "text, topic"),
    ("a.jsonl", '{"prompt": "a"}\n\n"b"', ":3", 'a non-empty "prompt"'), ("a.jsonl", "{}", ":1", "a row is"),
    ("a.json", '[{"prompt": "a"}, {"promt": "b"}]', ":2", ": promt"),
    ("a.json", '[{"prompt": "a"},\n{"prompt": "b"]', "", "not JSON (Expecting"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}', ":2", "a key stands twice in ['prompt']"),
    ("a.jsonl", '{"prompt": "a", "x": {"b": 1, "b": 1}}', ":1", "a key stands twice in ['b']"),
    ("a.jsonl", '{"prompt": "a", "answer": NaN}', ":1", "NaN is no number of JSON"),
    ("a.jsonl", '{"prompt": "a", "answer": Infinity}', ":1", "Infinity is no number of JSON"),
    ("a.jsonl", '{"prompt": "a", "x": [-Infinity]}', ":1", "-Infinity is no number of JSON"),
    ("a.jsonl", '{"prompt": "a", "answer": 1e999}', ":1", '"answer" is text or a number, not inf'),
    ("a.jsonl", '{"prompt": "a", "answer": -1e999}', ":1", '"answer" is text or a number, not -inf'),
    ("a.jsonl", '{"prompt": "a", "answer": true}', ":1", '"answer" is text or a number, not True'),
    ("a.jsonl", '{"prompt": "a", "answer": ["b"]}', ":1", "\"answer\" is text or a number, not ['b']"),
    ("a.jsonl", '{"prompt": "a \\ud83d"}', ":1", "half of a surrogate pair"),
    ("a.jsonl", '{"prompt": "a", "x": ["\\ude00"]}', ":1", "half of a surrogate pair"),
    ("a.jsonl", '{"prompt": "a", "anwser": "b"}', ":1", 'field "anwser" is unknown; did you mean "answer"?'),
    ("a.jsonl", '{"prompt": "a", "answer": "b", "Grader": "exact"}', ":1", 'did you mean "grader"?'),
    ("a.jsonl", '{"prompt": "a", "grader": "exat"}', ":1", "unknown grader 'exat'; did you mean exact?"),
    ("a.jsonl", '{"prompt": [{"role": "user", "content": ["b"]}]}', ":1", '"prompt" is text or a list of'),
    ("a.jsonl", '{"messages": [{"role": "assistant", "content": "b"}]}', ":1", 'a non-empty "prompt"'),
    ("a.jsonl.gz", b"\x1f\x8b\x08\x00\x00", "", "is not UTF-8 text"),
    ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "", "is not UTF-8 text"),
    ("a.csv", "prompt,answer\na,1\nb,2,3\n", ":2", "more cells than the first line has names"),
    ("a.csv", "text;answer\na;1\n", ":1", "text;answer"),
    ("a.csv", "prompt,answer\n", "", "has no prompts"),
    ("a.csv", "prompt,answer\n,1\n", ":1", 'a non-empty "prompt"'),
    ("a.parquet", b"PAR1", "", "cannot read "), ("folder", None, "", "it is a folder, not a file"),
    ("a.txt", b"", "", "has no prompts")], ids=short)
def test_files_that_cannot_be_used_are_refused_by_line(checked, tmp_path, name, text, where, expected):
    path = tmp_path / name
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="optional: pip install pyarrow")
    path.mkdir() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Refused) as refused:
        load_prompts(str(path), "main")
    message = str(refused.value)
    assert f"{path}{where}" in message and expected in message and "\n" not in message
    assert not where or message.startswith(f"{path}{where}: ")
    assert checked(prompts=[path]) == message.strip()


def test_fields_of_ones_own_pass(tmp_path):
    row = dict.fromkeys("prompt topic level id source skill subject system text type url choices category "
                        "difficulty rejected_score chosen_model prompt_id prompts".split(), "x")
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    assert load_prompts(str(tmp_path / "own.jsonl"), "main") == [row | {"branch": "main", "row": 1}]


# ---- flags and folders -------------------------------------------------------------------------------------

PG, SAMPLES = dict(loss="pg"), "has no effect without a --method that samples"


@pytest.mark.parametrize("line, expected", [
    ([*words(), "--lr", "1", "--lr=2"], "--lr is given twice; several values stand behind one --lr"),
    ([*words(), "--prompts", "general=q"], "--prompts is given twice"),
    ([*words("camopd"), "--mass", "1", "--mass", "1"], "--mass is given twice"),
    (words(**PG, importance=[2, 3]), "--importance 2.0 3.0: LOW must be below HIGH, and 1, "),
    (words(**PG, importance=[0.1, 0.5]), "--importance 0.1 0.5: LOW must be below HIGH, and 1, "),
    (words(**PG, importance=[1, 1]), "--importance 1.0 1.0: LOW must be below HIGH"),
    (words(batch=10**9), "--batch: 1000000000 is not at least 1 and at most 1048576"),
    (words(rollouts=2**20 + 1), "--rollouts: 1048577 is not at least 1 and at most 1048576"),
    (words(batch=2000, rollouts=1000), "--batch 2000 with its --rollouts is 2,000,000 completions per"),
    (words("grpo", batch=2**18), "--batch 262144 with its --rollouts is 2,097,152 completions"),
    (words(lora_rank=10**7), "--lora_rank: 10000000 is not at least 0 and at most 16384"),
    (words(out=""), "--out '' names no folder"),
    *[(words(method, **{flag: value}), f"--{flag} {SAMPLES}") for method in ("sft", "kd", "okd")
      for flag, value in (("temperature", 0.5), ("top_p", 0.5), ("drop_cut", True), ("max_new_tokens", 5))],
    *[(words(**{flag: value}), f"--{flag} has no effect without ") for flag, value in (
        ("eval_every", 5), ("eval_rollouts", 2), ("eval_temperature", 1), ("eval_top_p", 0.5))],
    (words(eval_prompts="e", eval_rollouts=2), "no effect without evaluation prompts and an --eval_temp")],
    ids=short)
def test_flags_that_could_only_be_slips_are_refused(line, expected):
    assert expected in said(line)


@pytest.mark.parametrize("flags", [
    dict(**PG, importance=[0.5, 1]), dict(**PG, importance=[1, 2]), dict(batch=2000, rollouts=500),
    dict(batch=2**20), dict(method="sft", temperature=1), dict(eval_prompts="e", eval_every=5)], ids=short)
def test_flags_at_their_bounds_pass(flags):
    opd.configure(words(**flags))


@pytest.mark.parametrize("name", ["my.branch", "my branch", "a/b", "a:b"])
def test_a_branch_has_a_name_of_one_word(tmp_path, monkeypatch, name):
    """The whole would be taken for the path of a file that is not there."""
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    assert "a name begins with a letter, and has letters" in said(words(prompts=[f"{name}={file}"]))
    assert opd.configure(words(prompts=[f"my-branch_2={file}"])).prompts == {"my-branch_2": str(file)}
    file.rename(tmp_path / "a=b.jsonl")
    monkeypatch.chdir(tmp_path)
    assert opd.configure(words(prompts=["a=b.jsonl"])).prompts == {"main": "a=b.jsonl"}


def unwritable(root):
    (root / "locked").mkdir(mode=0o555)
    if os.access(root / "locked", os.W_OK):
        pytest.skip("this user can write everywhere")
    return root / "locked"


@pytest.mark.parametrize("out, expected", [
    (lambda root: "x" * 300, "can be no folder"), (lambda root: root / ("x" * 300) / "y", "can be no folder"),
    (lambda root: root / "link", "link is a link to what is not there"),
    (lambda root: root / "file", "file is a file; it must be a folder"),
    (lambda root: root / "file" / "sub" / "sub", "file is a file; it must be a folder"),
    (lambda root: root, "holds other files and no run; choose another --out"),
    (lambda root: unwritable(root), "locked cannot be written"),
    (lambda root: unwritable(root) / "a" / "b", "locked cannot be written")],
    ids=["long", "long parent", "dangling", "file", "in a file", "other files", "locked", "in locked"])
@pytest.mark.parametrize("dry", [[], True], ids=["run", "dry run"])
def test_an_out_that_cannot_be_is_refused_before_weights_are_read(checked, tmp_path, out, expected, dry):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = {path.name for path in tmp_path.iterdir()}
    path = out(tmp_path)
    line = checked(out=path, dry_run=dry)
    assert line.startswith("--out ") and expected in line
    assert {path.name for path in tmp_path.iterdir()} - before <= {"rows.jsonl", "words.jsonl", "locked"}


@pytest.mark.parametrize("path, expected", [
    ("model.gguf", "is a file; a model is given as its folder, .* python -m data.pretrained"),
    ("model.safetensors", "is a file; a model is given as its folder, with config.json, tokenizer and safe"),
    ("stduent", "no such folder, and not a hub id (did you mean ROOT/student?)"),
    ("student/final", "no such folder, and not a hub id"),
    ("adapter", "is an adapter; give a merged model"),
    ("run", "no tokenizer in this folder; did you mean its final/?"),
    ("empty", "no tokenizer in this folder")])
def test_a_path_that_is_no_model_is_named_with_what_was_meant(checked, tmp_path, path, expected):
    root = tmp_path / "models"
    for name in ("student", "other", *({path} & {"adapter", "run", "empty"})):
        (root / name).mkdir(parents=True)
    if path == "adapter":
        (root / path / "adapter_config.json").write_text("{}")
    if path == "run":
        (root / path / "final").mkdir()
    if "." in path:
        (root / path).write_text("x")
    for who in ("student", "teacher"):
        line = checked(**{who: root / path})
        assert f"{root}/{path}" in line and ("OUT" in line) == path.endswith(".gguf")
        for part in expected.replace("ROOT", str(root)).split(" .* "):
            assert part in line


def test_a_name_that_is_neither_a_folder_nor_reachable_is_said_to_be_neither(checked):
    for name in ("nowhere", "no/where"):
        line = checked(student=Path(name))
        assert line.startswith(f"cannot load {name}: no folder of that name, and as a hub id: ")
