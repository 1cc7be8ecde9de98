"""The program as its users meet it: folders in, folders out, and one clear line for whatever cannot work."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_data import SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

import config
import losses
import methods
import opd
from data import convert, scratch
from methods import METHODS
from text import Reader

ROOT = Path(__file__).parent.parent


def test_run_folder_is_complete_and_final_loads_anywhere(start, prompts):
    run = start(eval_prompts=[f"words={prompts('e')}"], steps=3, eval_every=1)
    opd.train(run)
    assert {path.name for path in run.out.iterdir()} >= {
        "config.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "final", "report.md", "curves.png"}
    config = json.loads((run.out / "config.json").read_text())
    assert (config["seed"] == 0 and config["method"] == "opd"
            and config["versions"]["torch"] == torch.__version__)
    assert run.cfg.device != "cpu" or torch.backends.cpu.get_cpu_capability() in config["device_name"]
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert ([line["step"] for line in lines] == [-1, 0, 1, 2]
            and all("words" in line["eval"] for line in lines))
    assert all(line["kept"] == line["rollouts"] == 4 and line["seconds"]["sample"] > 0 for line in lines[1:])
    sample = json.loads((run.out / "samples.jsonl").read_text().splitlines()[0])
    assert sample["selected"] and isinstance(sample["gap"], float) and sample["reward"] in (0, 1)
    net = AutoModelForCausalLM.from_pretrained(run.out / "final")
    assert AutoTokenizer.from_pretrained(run.out / "final")("rev abc>").input_ids
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(net(ids).logits, run.student.net(ids).logits)


def test_logged_loss_is_the_whole_batch_in_any_micro_batches(start):
    """Logging only the last micro-batch, or a mean of means, would make these differ."""
    logged = []
    for micro_tokens in (1, 100_000):
        run = start(micro_tokens=micro_tokens, steps=1, batch=16)
        opd.train(run)
        logged.append([json.loads(x) for x in (run.out / "metrics.jsonl").read_text().splitlines()][-1])
    for key in ("loss", "value", "gap", "grad_norm", "entropy_s", "top1_agree"):
        assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-4), key


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not part of the project")
def test_camopd_on_real_gsm8k_with_a_chat_model(tmp_path):
    """The README's command on real prompts: byte-level BPE, chat template, real grader, two teachers."""
    rows = convert.rows("openai/gsm8k", SHARED / "gsm8k" / "test.jsonl")[:64]
    tok = scratch.tokenizer([row["prompt"] + row["solution"] for row in rows], 600)
    for seed, name in enumerate(("student", "general", "domain")):
        scratch.model(tok, seed, hidden=32, layers=2, pad_vocab=8 * seed).save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    for name, some in (("g", rows[:32]), ("d", rows[32:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    out = tmp_path / "out"
    opd.main(["--student", f"{tmp_path}/student", "--teachers", f"general={tmp_path}/general",
              f"domain={tmp_path}/domain", "--prompts", f"general={tmp_path}/g.jsonl",
              f"domain={tmp_path}/d.jsonl", "--method", "camopd", "--out", str(out), "--steps", "4",
              "--batch", "4", "--max_new_tokens", "24", "--device", "cpu", "--lr", "1e-3",
              "--eval_prompts", f"gsm8k={tmp_path}/g.jsonl",
              "--chat_template_kwargs", '{"enable_thinking": false}'])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["branch"] for line in lines[1:]] == ["general"] * 3 + ["domain"]
    assert all(0 <= line["eval"]["gsm8k"] <= 1 for line in lines if "eval" in line) and "eval" in lines[-1]
    assert all("abs_gap" in line and line["loss"] == line["loss"] for line in lines[1:])
    saved = AutoTokenizer.from_pretrained(out / "final")
    seen = Reader(path="", whole_config=None, tok=saved, stops=[], vocab=0,
                  template_kwargs={"enable_thinking": False}).rendered(rows[0]["prompt"])
    assert seen.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


# ---- bad input: one line that says what is wrong and what would be right -----------------------------------

def said(words):
    """What the program says before it stops."""
    with pytest.raises(SystemExit) as stop:
        opd.main(words)
    message = str(stop.value)
    assert message.startswith("opd.py: ") and "\n" not in message
    return message


@pytest.mark.parametrize("flags, expected", [
    (dict(loss="kld"), "there are: nll, pg"), (dict(method="ppo"), "there are: sft, "),
    (dict(loss="nll"), "can use: rkl"), (dict(method="kd", loss="pg"), "can use: fkl"),
    (dict(prompts=["none.jsonl"]), "no prompt file none.jsonl"),
    (dict(prompts=["=x"]), "a name begins with a letter"), (dict(teachers=["m="]), "names nothing"),
    (dict(teachers=["x=nowhere"]), "needs a teacher for every branch"),
    (dict(batch=0), "--batch: 0 is not at least 1"), (dict(mixture="x"), "--mixture x"),
    (dict(method="camopd", mass="1.5"), "at most 1"), (dict(method="camopd", mass="x"), "not a number"),
    (dict(method="camopd", mass="foo=1"), "branches are: main"),
    (dict(method="camopd", scale="nan"), "nan is not"), (dict(method="camopd", scale="0"), "trains nothing"),
    (dict(method="camopd", schedule="3:1"), "each of the 1 branches"), (dict(warmup=-5), "at least 0"),
    (dict(temperature="nan"), "nan is not a finite number"), (dict(lr="inf"), "inf is not"),
    (dict(eval_temperature=-1), "-1 is not at least 0"), (dict(student="./a/b"), "no such folder"),
    (dict(student="nowhere"), "cannot load nowhere"),
    (dict(jsd_beta=1.0, loss="jsd"), "use fkl or rkl"), (dict(importance=["a", "b"]), "invalid float"),
    (dict(importance=[2, 0.5]), "LOW must be below HIGH"), (dict(device="tpu"), "choose cpu, cuda"),
    (dict(device="cuda:99"), "torch sees"), (dict(chat_template_kwargs="{"), "{ is not JSON"),
    (dict(chat_template_kwargs="[]"), "is not a JSON object"),
    (dict(teacher_device="swap"), "--teacher_device swap needs a --device cuda"),
    (dict(lora_alpha=8), "no effect without --lora_rank"), (dict(lora_rank=-1), "at least 0"),
    (dict(prompts=["openai/gsm8k:nowhere"]), "cannot load openai/gsm8k"),
    (dict(adam_beta2=1), "at most 0.999999"), (dict(method=""), "--method '' is unknown"),
    (dict(device=""), "choose cpu, cuda"), (dict(student="~nobody-here/x"), "no such user's home"),
    (dict(method="camopd", schedule="9" * 5000), "not a positive whole number"),
    (dict(method="sdpo", self_teacher="snapshot"), "for methods that renew it: dpo"),
    (dict(max_new_tokens=500), "128 positions")], ids=str)
def test_bad_input_is_refused_in_one_line(argv, tmp_path, flags, expected):
    assert expected in said(argv(**flags))
    assert not (tmp_path / "out1").exists()


def test_a_number_too_long_to_read_is_a_bad_row(argv, tmp_path):
    """json.loads raises another error for it than for what is not JSON."""
    (tmp_path / "long.jsonl").write_text('{"prompt": "a", "answer": ' + "1" * 5000 + "}")
    assert "long.jsonl:1: not JSON" in said(argv(prompts=[tmp_path / "long.jsonl"]))


def test_what_a_library_says_before_the_first_step_is_one_line(argv, monkeypatch):
    """A ValueError of torch, transformers or peft about settings or files is no traceback."""
    def broken(*args, **kwargs):
        raise ValueError("out of range\nsee the manual")
    monkeypatch.setattr("models.build_optimizers", broken)
    assert said(argv()) == "opd.py: out of range"


@pytest.mark.parametrize("row, expected", [
    ({"prompt": [{"role": "user", "content": "hi"}]}, "no chat template"),
    ({"prompt": "a", "answer": "none", "grader": "number"}, "needs an answer with a number"),
    ({"prompt": "a", "answer": None}, "text or a number"),
    ({"prompt": "a", "answer": "b", "grader": ["x"]}, "there are"),
    ({"prompt": "a" * 130}, "128 positions")], ids=str)
def test_a_bad_row_is_found_before_the_first_step(argv, prompts, tmp_path, row, expected):
    message = said(argv(prompts=[prompts("late", [{"prompt": "rev abc>"}] * 9 + [row])]))
    assert "late.jsonl:10" in message and expected in message
    assert not (tmp_path / "out1").exists()


def test_methods_name_the_fields_they_miss(argv, prompts):
    plain = prompts("plain", [{"prompt": "rev abc>"}])
    assert 'plain.jsonl:1: no "solution"' in said(argv(method="sft", prompts=[plain]))
    assert 'plain.jsonl:1: no "answer"' in said(argv(eval_prompts=[plain]))


def test_the_texts_that_are_learned_from_are_checked_and_no_others(argv, start, models, prompts, tmp_path):
    """Evaluation never reads a solution; of two texts the shorter one can have the token that is too much."""
    five = prompts("five", [{"prompt": "rev abc>", "answer": "cba", "solution": 5}])
    start(method="sft", eval_prompts=[f"words={five}"])
    assert 'five.jsonl:1: "solution", which --method sft learns from, is text, not' in said(
        argv(method="sft", prompts=[five]))
    shutil.copytree(models / "a", tmp_path / "image")
    tok = AutoTokenizer.from_pretrained(tmp_path / "image")
    tok.add_tokens(["<image>"])
    tok.save_pretrained(tmp_path / "image")
    texts = dict(prompt="rev abc>", chosen="<image>", rejected="abcdef")
    for row in (texts, texts | {"chosen": texts["rejected"], "rejected": texts["chosen"]}):
        assert "pair.jsonl:1: the token '<image>'" in said(
            argv(method="dpo", student=tmp_path / "image", prompts=[prompts("pair", [row])]))


def test_different_tokenizers_are_refused_with_the_first_differences(argv, models, tmp_path):
    tok = AutoTokenizer.from_pretrained(models / "b")
    tok.add_tokens(["<new>"])
    net = AutoModelForCausalLM.from_pretrained(models / "b")
    net.resize_token_embeddings(len(tok))
    tok.save_pretrained(tmp_path / "other")
    net.save_pretrained(tmp_path / "other")
    assert "'<new>': 81 / None" in said(argv(student=tmp_path / "other"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transform", [lambda z: 1.02 * z, lambda z: z + 0.1,
                                       lambda z: 50 * torch.tanh(z / 50)], ids=["scale", "shift", "softcap"])
def test_a_logit_transform_that_is_unknown_is_refused(argv, models, monkeypatch, transform, dtype):
    """The gradient would be that of another model."""
    forward = Qwen3ForCausalLM.forward

    def transformed(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = transform(out.logits)
        return out
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", transformed)
    assert "Qwen3ForCausalLM transforms its logits" in said(argv(teachers=[models / "a"], dtype=dtype))
    monkeypatch.setattr(Qwen3ForCausalLM, "get_output_embeddings", lambda self: None)
    assert "not a plain matrix" in said(argv())


@pytest.mark.parametrize("flags, expected", [
    (dict(loss="rkl", jsd_beta=0.3), "--jsd_beta has no effect without --loss jsd"),
    (dict(loss="rkl", veto_beta=0.3), "no effect without --target veto"),
    (dict(loss="pg", importance=[2, 0.5]), "LOW must be below HIGH"),
    (dict(loss="rkl", support="student_sg"), "needs a top_k"),
    (dict(loss="rkl", top_k=5), "without a --support"),
    (dict(loss="akl", support="student_sg", top_k=5), "akl needs the full vocabulary"),
    (dict(loss="pg", target="veto", method="mopd"), "--target has no effect without a divergence"),
    (dict(loss="alpha_beta", alpha_beta=[1, 0]), "A + B above 0"),
    (dict(loss="power", power_lambda=0), "not 0 (fkl)"),
    (dict(loss="todi", todi_beta="inf"), "todi_beta")], ids=str)
def test_objectives_that_cannot_be_are_refused(argv, flags, expected):
    assert expected in said(argv(**flags))


def test_nothing_on_disk_is_ever_overwritten(start, argv, models, prompts, tmp_path):
    """Another experiment is named before models are loaded: the checkpoint would not fit another student."""
    run = start()
    opd.train(run)
    times = lambda: {path: path.stat().st_mtime_ns for path in run.out.rglob("*")
                     if path.is_file() and path.name != ".lock"}            # which says who asked last
    before = times()
    assert "add --resume" in said(argv(out=run.out))
    assert "another lr" in said(argv(out=run.out, resume=True, lr=1))
    assert "another content of student" in said(argv(out=run.out, resume=True, student=models / "wide"))
    changed = argv(out=run.out, resume=True)
    prompts(rows=[{"prompt": "rev b>"}])
    assert "another content of main" in said(changed)
    assert before == times()
    prompts()
    shutil.rmtree(run.out / "checkpoint")
    assert "is finished" in said(argv(out=run.out, resume=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "final").mkdir()
    assert "holds other files" in said(argv(out=tmp_path / "mine"))
    (tmp_path / "file").write_text("x")
    assert "is a file" in said(argv(out=tmp_path / "file"))
    model = run.out / "final"                                    # it has a config.json too, and is no run
    assert "holds other files and no run" in said(argv(out=model, resume=True))


def test_a_dry_run_refuses_what_the_run_would_and_touches_nothing(start, argv, capsys):
    run = start(steps=2, save_every=1)
    opd.train(run)
    (run.out / "checkpoint").rename(run.out / "checkpoint.old")  # as a kill between two renames leaves it
    files = lambda: {path: path.stat().st_mtime_ns for path in run.out.rglob("*")}
    before = files()
    assert "add --resume" in said(argv(out=run.out, dry_run=True))
    opd.main(argv(out=run.out, dry_run=True, resume=True, steps=3, save_every=1))
    assert "memory on cpu" in capsys.readouterr().out and files() == before
    assert "another lr" in said(argv(out=run.out, dry_run=True, resume=True, lr=1))
    (run.out / "checkpoint.old" / "trainer.pt").write_bytes(b"broken")
    assert "trainer.pt is not as it was written" in said(argv(out=run.out, resume=True, steps=3, save_every=1))


def test_models_with_missing_weights_are_refused(argv, models, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(models / "wide", tmp_path / "holes")
    weights = load_file(tmp_path / "holes" / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    assert "missing, model.layers.0.mlp.up_proj.weight" in said(argv(teachers=[tmp_path / "holes"]))
    (tmp_path / "holes" / "model.safetensors").write_bytes(b"broken")
    assert "cannot load" in said(argv(teachers=[tmp_path / "holes"]))


def test_resume_may_evaluate_on_other_prompts(start, prompts):
    run = start(eval_prompts=[f"a={prompts('e')}"])
    opd.train(run)
    opd.train(start(eval_prompts=[f"b={prompts('e')}"], steps=3, out=run.out, resume=True))
    report = (run.out / "report.md").read_text()
    assert "| a | b |" in report and "not run" in report


def test_rows_of_another_branch_are_refused(argv, prompts):
    other = prompts("other", [{"prompt": "rev abc>", "branch": "domain"}])
    refused = said(argv(prompts=[f"general={other}"], teachers=["general=x"]))
    assert "this row is of branch 'domain'" in refused


def test_bfloat16_final_is_half_the_size_and_keeps_the_tie(start):
    run = start(dtype="bfloat16", steps=1)
    opd.train(run)
    net = AutoModelForCausalLM.from_pretrained(run.out / "final", dtype="auto")
    assert net.dtype == torch.bfloat16 and net.lm_head.weight is net.model.embed_tokens.weight
    size = sum(path.stat().st_size for path in (run.out / "final").glob("*.safetensors"))
    assert size < 2 * sum(p.numel() for p in net.parameters()) + 10_000


# ---- every flag: help, effect, resume ----------------------------------------------------------------------

OWN = config.own_flags(METHODS)
EVERY_FLAG = config.GENERAL | OWN
CONDITIONAL = [name for name, flag in EVERY_FLAG.items() if flag.only]


def words(method="opd", **flags):
    """A command line for a method; nothing in it has to exist."""
    has, two = METHODS[method], METHODS[method].students == 2
    per_branch = lambda path: [f"physics={path}", f"law={path}"] if two else [path]
    ours = dict(method=method, student=["a", "b"] if two else ["a"], prompts=per_branch("p"), device="cpu",
                out="o", teachers=[] if has.teachers == "none" else ["t"])
    if "val_prompts" in has.defaults:
        ours["val_prompts"] = per_branch("v")
    out = []
    for name, value in (ours | flags).items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        out += [f"--{name}", *map(str, values)] if value != [] else []
    return out


def users(name):
    """The methods that have a flag. A general flag is everybody's, unless it exists for some of them only."""
    some = name in OWN or name in config.GENERAL and config.GENERAL[name].of_methods
    return [method for method, has in METHODS.items() if name in has.defaults or not some]


def another(flag):
    """A value for a flag that it can have and that is not its default, as it is typed."""
    if flag.type is bool:
        return True
    if flag.words == 2:
        return ["0.25", "1.75"]
    if isinstance(flag.type, config.Ratio):
        return "2"                                              # of the one branch there is
    for text in (*getattr(flag.type, "names", ()), "0.25", "2", "3", "1", '{"x": 1}'):
        try:
            if flag.type(text) != flag.default:
                return text
        except (ArgumentTypeError, ValueError, TypeError):
            continue


SETTINGS = [{}, *[dict(loss=loss) for loss in losses.LOSSES], *[
    {name: choice} for name, flag in config.GENERAL.items() if name not in ("loss", "teacher_device")
    for choice in getattr(flag.type, "names", ())], dict(support="student_sg", top_k=5), dict(lora_rank=4),
    dict(loss="pg", rollouts=2),
    dict(eval_prompts="e"),
    dict(eval_prompts="e", eval_temperature=1), dict(diagnose_every=1)]           # under one of them every flag has an effect


def settings_of(name):
    """Yield the settings of runs that have a flag and do not set it: as they are given, and complete."""
    for method in users(name):
        for given in SETTINGS:
            try:
                cfg = opd.configure(words(method, **given))
            except config.Refused:
                continue
            if name not in given:
                yield dict(method=method) | given, cfg


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_flag_without_effect_is_refused(name):
    """Somebody would set it, see no difference, and report that it makes none."""
    flag, value, seen = EVERY_FLAG[name], another(EVERY_FLAG[name]), set()
    assert value is not None, f"the test knows no other value of --{name}"
    for given, cfg in settings_of(name):
        if seen == {True, False}:
            break
        samples = METHODS[cfg.method].samples
        has_effect = bool(flag.only[0](SimpleNamespace(**vars(cfg), samples=samples)))
        if has_effect in seen:
            continue
        try:
            changed = opd.configure(words(**given, **{name: value}))
        except config.Refused as refused:
            if not has_effect:
                assert re.search(rf"--{name}\b.*\bno effect\b", str(refused))
                seen.add(False)
        else:
            assert has_effect, f"--{name} was not refused under {given}"
            assert getattr(changed, name) != getattr(cfg, name)
            seen.add(True)
    assert seen == {True, False}, f"the test knows only settings under which --{name} has an effect: {seen}"


def test_flags_of_the_tables_are_conditional_where_they_have_to_be():
    """The rules that were written by hand before the table had them."""
    assert set(CONDITIONAL) >= {
        *(d.knob for d in losses.DIVERGENCES.values() if d.knob), "target", "support", "top_k", "veto_beta",
        "taid_start", "importance", "ema_rate", "eval_rollouts", "gate_rollouts", "lora_alpha",
        "diagnose_rollouts", "diagnose_layers"}


@pytest.mark.parametrize("name", [name for name in EVERY_FLAG if len(users(name)) < len(METHODS)])
def test_a_flag_of_other_methods_is_refused_and_says_whose_it_is(name):
    """Each method but its own: they would run without it."""
    value, whose = another(EVERY_FLAG[name]) or "x", ", ".join(users(name))
    for method in METHODS.keys() - set(users(name)):
        expected = f"--{name} has no effect on --method {method}; it is for: {whose}$"
        with pytest.raises(config.Refused, match=expected):
            opd.configure(words(method, **{name: value}))
        assert not hasattr(opd.configure(words(method)), name)


FREE = {"student", "teachers", "prompts", "val_prompts", "templates", "teacher_system",     # their content is compared
        "sample_batch", "skip_bad_steps", "resume", "out", "dry_run", "eval_every", "eval_prompts",
        "save_every", "log_samples", "micro_tokens", "gradient_checkpointing", "device", "teacher_device",
        "diagnose_every", "diagnose_rollouts", "diagnose_layers"}   # what does not make another experiment


@pytest.mark.parametrize("name", [*EVERY_FLAG, "prompts_sha256", "models_sha256"])
def test_resume_may_change_what_is_marked_and_nothing_else(name):
    """A run would go on as another experiment, and its config.json would describe neither."""
    marked = name in config.GENERAL and config.GENERAL[name].resume
    assert bool(marked) == (name in FREE | {"steps"})
    cfg = opd.configure(words(users(name)[0]))
    cfg.prompts_sha256 = cfg.models_sha256 = {"main": "0"}
    before = json.loads(json.dumps(vars(cfg)))
    config.check_same_experiment(cfg, before)
    content = name.endswith("_sha256")
    changed = SimpleNamespace(**vars(cfg) | {name: {"main": "1"} if content else "another"})
    if marked:
        return config.check_same_experiment(changed, before)
    expected = "content of main" if content else f"{name} .*was "
    with pytest.raises(config.Refused, match=f"--resume with another {expected}"):
        config.check_same_experiment(changed, before)


@pytest.mark.parametrize("given, may", [
    (dict(), True), (dict(warmup=5), True), (dict(lr_schedule="linear"), False),
    (dict(lr_schedule="cosine"), False), (dict(target="veto"), False), (dict(target="taid"), False),
    (dict(method="opcod"), False)], ids=str)
def test_resume_may_change_steps_only_where_nothing_depends_on_the_end(given, may):
    """A schedule that ends elsewhere, or rounds of another length, would have been another run all along."""
    before = json.loads(json.dumps(vars(opd.configure(words(**given)))))
    changed = opd.configure(words(**given, steps=200))
    if may:
        return config.check_same_experiment(changed, before)
    with pytest.raises(config.Refused, match="another steps"):
        config.check_same_experiment(changed, before)


def helps(capsys, *argv):
    """What --help prints, and the flags that it explains: name -> explanation."""
    with pytest.raises(SystemExit) as stop:
        opd.main(list(argv))
    assert not stop.value.code
    text = capsys.readouterr().out
    found = re.findall(r"^  --(\w+)(.*(?:\n {3,}.*)*)", text, re.M)
    return text, {name: " ".join(rest.split()) for name, rest in found}


def test_help_shows_what_people_start_with(capsys):
    """Seventy flags tell a newcomer nothing."""
    text, flags = helps(capsys, "--help")
    assert flags.keys() == {name for name, flag in config.GENERAL.items() if flag.basic}
    assert flags.keys() >= {"student", "teachers", "prompts", "method", "loss", "steps", "lr", "out"}
    assert 12 <= len(flags) <= 18
    assert "--help all" in text and all(name in flags["method"] for name in METHODS)
    assert all(name in flags["loss"] for name in losses.LOSSES)


def test_help_all_shows_every_flag_with_its_default_and_whose_it_is(capsys):
    text, flags = helps(capsys, "--help", "all")
    everything = {name for method in METHODS.values() for name in (*method.own, *method.defaults)}
    assert flags.keys() == {name for group in config.FLAGS.values() for name in group} | everything
    for name, flag in EVERY_FLAG.items():
        assert " ".join(flag.about.split()) in flags[name], name
        if type(flag.default) in (int, float) and not flag.of_methods:
            assert f"(default: {config.in_words(flag.default)}" in flags[name], name
        if len(users(name)) < len(METHODS):
            assert all(re.search(rf"\b{method}\b", flags[name]) for method in users(name)), name
    assert "(default: full; student_tail for sdpo, opcod)" in flags["support"] and "None" not in text


@pytest.mark.parametrize("line, hint", [
    (["--bacth", "4"], "unknown flag --bacth; did you mean --batch?"),
    (["--gkd_lamda=1"], "did you mean --gkd_lambda?"),
    (["--val_promts", "x"], "did you mean --val_prompts?"), (["--zzz"], "--help all lists every flag"),
    (["--steps", "4", "5"], "unknown word 5"), (["--step", "4"], "did you mean --steps?"),
    (["--student", "a", "--prompts", "p", "--method", "campod"], "did you mean camopd? there are: sft, "),
    (["--student", "a", "--prompts", "p", "--method", "zzz"], "'zzz' is unknown; there are: sft, "),
    (words(loss="jds"), "did you mean jsd? there are: nll, pg, "),
    (words(support="student_tial"), "did you mean student_tail? there are: full, "),
    (words(optimizer="adam"), "did you mean adamw? there are: adamw, muon, sgd"),
    (words("opcod", gate="allways"), "did you mean always? there are: "),
    (words(dtype="bf16"), "'bf16' is unknown; ")], ids=str)
def test_an_unknown_name_is_answered_with_the_nearest(line, hint):
    assert hint in said(line)


def test_an_unknown_grader_or_set_is_answered_with_the_nearest(argv, prompts):
    row = {"prompt": "rev abc>", "answer": "cba", "grader": "exat"}
    assert "exat.jsonl:1: unknown grader 'exat'; did you mean exact? there are: exact, number" in said(
        argv(prompts=[prompts("exat", [row])]))
    with pytest.raises(config.Refused, match="did you mean openai/gsm8k?"):
        convert.rows("openai/gsmk8")


@pytest.mark.parametrize("given, branches, ratio", [
    (None, "ab", "3:1"), (None, "a", "3"), (None, "abcd", "3:1:1:1"), ("mixed", "abc", "mixed"),
    ("2:5", "ab", "2:5"), ("3:1", "ab", "3:1"), ("3:1", "abc", None), ("3:1", "a", None), ("3", "ab", None),
    ("3:0", "ab", None), ("a:b", "ab", None), ("3:1:", "ab", None)])
def test_a_ratio_has_a_number_for_each_branch(given, branches, ratio):
    """What is typed is taken as it is or refused. Only the default fits any number of branches."""
    complete = lambda: config.Ratio("mixed").complete(given, "3:1", list(branches), "--schedule")
    if ratio:
        assert complete() == ratio
    else:
        with pytest.raises(config.Refused, match=f"each of the {len(branches)} branches .*, as in 3(:1)*$"):
            complete()


@pytest.mark.parametrize("given, default, numbers", [
    (None, (2.0, 1.0), [2, 1, 1]), (None, 0.8, [0.8, 0.8, 0.8]), (["0.5"], (2.0, 1.0), [0.5, 0.5, 0.5]),
    (["b=0.5"], (2.0, 1.0), [2, 0.5, 1]), (["a=0", "c=1"], 0.8, [0, 0.8, 1]),
    (["a=1.5"], 0.8, "1.5 is not at least 0"), (["a=x"], 0.8, "--mass x is not a number"),
    (["d=1"], 0.8, "--mass names d, but the branches are: a, b, c"),
    (["a=1", "a=1"], 0.8, "two --mass are called a"), (["1", "1"], 0.8, "several --mass need names")],
    ids=str)
def test_a_number_per_branch(given, default, numbers):
    complete = lambda: config.PerBranch(most=1).complete(given, default, list("abc"), "--mass")
    if isinstance(numbers, list):
        assert complete() == dict(zip("abc", numbers))
    else:
        with pytest.raises(config.Refused, match=numbers):
            complete()


# ---- the neighbourhood -------------------------------------------------------------------------------------

def test_an_installed_distribution_called_kernels_is_not_taken_for_ours(tmp_path):
    """transformers probes for it by metadata; where installed, `from kernels import ..` would find ours."""
    info = tmp_path / "kernels-0.15.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.15.0\n")
    probe = ("from transformers.utils import import_utils as u; import importlib.metadata as m;"
             "print(m.version('kernels'), u.KERNELS_MIN_VERSION, u.KERNELS_MAX_VERSION);")
    build = ("from transformers import Qwen3Config, Qwen3ForCausalLM; "
             "Qwen3ForCausalLM(Qwen3Config(vocab_size=9,hidden_size=8, intermediate_size=8, "
             "num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    run = lambda code: subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path,
                                      capture_output=True, text=True)
    version, low, high = run(probe).stdout.split()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {low}\n")
    assert run("import kernels;" + build).returncode != 0    # without the guard it breaks: the test can fail
    ours = run("import opd;" + build)
    assert ours.returncode == 0, ours.stderr[-500:]


# ---- the README, and those of the folders ------------------------------------------------------------------

READMES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md"))]}


def blocks(kind):
    """The fenced blocks of the READMEs in a language."""
    pattern = re.compile(rf"^```{kind}\n(.*?)^```", re.M | re.S)
    return [block for text in READMES.values() for block in pattern.findall(text)]


def sources():
    """The text of opd.py and of every file of methods/, by path."""
    return {path: path.read_text() for path in [ROOT / "opd.py", *sorted((ROOT / "methods").glob("*.py"))]}


def defined(text):
    """The names of the functions and classes that a text defines."""
    return set(re.findall(r"^(?:def|class) (\w+)", text, re.M))


def test_the_readme_quotes_word_for_word():
    """A quotation that is left behind by the code teaches what is not there."""
    texts = list(sources().values())
    ours, quoted = set().union(*map(defined, texts)), set()
    for block in blocks("python"):
        if names := defined(block) & ours:
            block = re.sub(r"^# *[\w/]+\.py.*\n", "", block)
            pieces = [piece.strip("\n") for piece in re.split(r"^ *\.\.\.?\.?(?: .*)?\n", block, flags=re.M)]
            for piece in filter(None, pieces):
                assert any(piece in text for text in texts), f"neither in opd.py nor in methods/:\n{piece}"
            quoted |= names
    assert {"opd", "train"} <= quoted


def test_every_python_block_of_the_readme_runs():
    """The names that they take for granted are tensors of a batch, and what opd.py and methods/ know."""
    g = torch.Generator().manual_seed(0)
    tensor = lambda *shape: torch.randn(shape, generator=g)
    learns = lambda *shape: tensor(*shape).requires_grad_()
    known = dict(z=learns(3, 9), w=tensor(3, 9), weight_N=torch.ones(3), weight=torch.ones(3),
                 hidden_s=learns(3, 4), head_s=learns(9, 4), hidden_t=tensor(3, 5), head_t=tensor(9, 5),
                 y=torch.tensor([1, 5, 8]))
    assert blocks("python")
    before = dict(METHODS)
    for block in blocks("python"):
        exec(block, vars(opd) | vars(methods) | known)
    METHODS.clear()                                             # a block may have registered a method
    METHODS.update(before)


def test_the_readmes_links_lead_somewhere():
    for path, text in READMES.items():
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path}: {link}"


def test_the_readmes_commands_parse():
    """A flag that was renamed, or that has no effect there, would end a reader's first try."""
    lines = [line for kind in ("bash", "sh") for block in blocks(kind)
             for line in re.sub(r"\\\n", " ", block).splitlines()]
    found = [line.partition("opd.py ")[2] for line in lines if re.match(r"\s*(\$ )?python3? opd\.py ", line)]
    assert found
    for line in found:
        if "--help" not in line:
            opd.configure([*shlex.split(line, comments=True), "--dry_run"])


def changes(diff):
    """Which lines a diff block changes: {path: [(lines that are there, lines that are there afterwards)]}.

    A line with nothing but a path, or a diff's +++ line, begins a file; @@ and .. begin another place in it.
    """
    out, path = {}, None
    for line in diff.splitlines():
        header = re.fullmatch(r"(?:\+\+\+ (?:b/)?|#? ?)([\w/]+\.py)\b.*", line)
        if header:
            path = header[1]
            out[path] = [([], [])]
        elif line.startswith("@@") or re.fullmatch(r" *\.\.+", line):
            out[path].append(([], []))
        elif not line.startswith(("---", "diff ", "index ", "new file", "\\ ")):
            old, new = out[path][-1]
            mark, rest = line[:1] or " ", line[1:]
            old.extend([rest] * (mark in " -"))
            new.extend([rest] * (mark in " +"))
    return {path: [("\n".join(old).strip("\n"), "\n".join(new).strip("\n")) for old, new in places]
            for path, places in out.items()}


def changed_text(text, old, new):
    """A file's text with one change. What is only added goes before the last definition of its kind."""
    if old:
        assert text.count(old) == 1, f"there {text.count(old)} times:\n{old}"
        return text.replace(old, new)
    kind = re.match(r"@\w+", new)
    before = [m.start() for m in re.finditer(rf"^{kind[0]}\b", text, re.M)] if kind else []
    place = before[-1] if before else len(text)
    return f"{text[:place]}{new}\n\n\n{text[place:]}"


@pytest.fixture(scope="module")
def modified(tmp_path_factory):
    """A copy of the project with all diffs of the README, what they add: {path: text}, and its --help."""
    copy, added = tmp_path_factory.mktemp("readme") / "opd", {}
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    for block in blocks("python"):
        if found := re.match(r"# (methods/\w+\.py)\n(?=.*^@method)", block, re.M | re.S):
            (copy / found[1]).write_text(block)
            added[found[1]] = block
    for diff in blocks("diff"):
        for path, places in changes(diff).items():
            (copy / path).touch()
            for old, new in places:
                (copy / path).write_text(changed_text((copy / path).read_text(), old, new))
                added[path] = added.get(path, "") + new + "\n"
    helps = subprocess.run([sys.executable, "opd.py", "--help"], cwd=copy, capture_output=True, text=True)
    return copy, added, helps.stdout


def registered(text):
    """The names of the functions that a text defines with a decorator: methods, or divergences."""
    return re.findall(r"^@\w+.*\n(?: +.*\n)*def (\w+)", text, re.M)


def test_the_readmes_method_is_all_it_takes(modified, argv):
    """Its lines, put where it says, are a method of the command line that trains."""
    copy, added, helps = modified
    name, = [name for path in added if path.startswith("methods/") for name in registered(added[path])]
    line = argv(method=name, steps=1, batch=8)
    done = subprocess.run([sys.executable, "opd.py", *line], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    out = Path(line[line.index("--out") + 1])
    step = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()][-1]
    assert step["rollouts"] == 8 and step["grad_norm"] > 0
    if name == "unsure":
        assert step["kept"] == 2                                # a quarter
    assert name in helps


def test_the_readmes_divergence_is_all_it_takes(modified):
    """Its two pieces, put among the others in a copy of the project, pass every test of a divergence."""
    copy, added, helps = modified
    name, = registered(added["losses.py"])
    assert [name] == registered(added["kernels/rows_triton.py"])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", name, "tests/test_losses.py",
                           "tests/test_kernels.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and int(re.search(r"(\d+) passed", done.stdout)[1]) > 20, done.stdout[-2000:]
    assert name in helps
