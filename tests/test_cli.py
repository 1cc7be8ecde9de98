"""The program as its users meet it: folders in, folders out, and one clear line for whatever cannot work."""
import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data import SHARED

import losses
import methods
import opd
from data import convert
from lab import recipes

ROOT = Path(__file__).parent.parent


def test_run_folder_is_complete_and_final_loads_anywhere(start, prompts):
    from transformers import AutoModelForCausalLM, AutoTokenizer
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
    from transformers import AutoTokenizer

    from data import scratch
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
    ids = opd.encode_prompt(saved, rows[0]["prompt"], {"enable_thinking": False})
    assert saved.decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


# ---- bad input: one line that says what is wrong and what would be right -----------------------------------

def said(words):
    """What the program says before it stops."""
    with pytest.raises(SystemExit) as stop:
        opd.main(words)
    message = str(stop.value)
    assert message.startswith("opd.py: ") and "\n" not in message
    return message


@pytest.mark.parametrize("flags, expected", [
    (dict(loss="kld"), "choose from"), (dict(method="ppo"), "choose from"),
    (dict(loss="nll"), "can use: rkl"), (dict(method="kd", loss="pg"), "can use: fkl"),
    (dict(prompts=["none.jsonl"]), "no prompt file none.jsonl"),
    (dict(prompts=["=x"]), "no prompt file"), (dict(teachers=["m="]), "names nothing"),
    (dict(teachers=["x=nowhere"]), "needs a teacher for every branch"),
    (dict(batch=0), "--batch: 0 is not at least 1"), (dict(mixture="x"), "--mixture x"),
    (dict(method="camopd", mass="1.5"), "at most 1"), (dict(method="camopd", mass="x"), "not a number"),
    (dict(method="camopd", mass="foo=1"), "branches are: main"),
    (dict(method="camopd", scale="nan"), "nan is not"), (dict(method="camopd", scale="0"), "trains nothing"),
    (dict(method="camopd", schedule="3:1"), "each of the 1 branches"), (dict(warmup=-5), "at least 0"),
    (dict(temperature="nan"), "nan is not a finite number"), (dict(lr="inf"), "inf is not"),
    (dict(eval_temperature=-1), "-1 is not at least 0"), (dict(student="./a/b"), "no such folder"),
    (dict(student="nowhere"), "cannot load nowhere"),
    (dict(jsd_beta=1.0, loss="jsd"), "use fkl and rkl"), (dict(importance=["a", "b"]), "invalid float"),
    (dict(importance=[2, 0.5]), "LOW must be below HIGH"), (dict(device="tpu"), "choose cpu, cuda"),
    (dict(device="cuda:99"), "torch sees"), (dict(chat_template_kwargs="{"), "invalid json_object"),
    (dict(chat_template_kwargs="[]"), "is not a JSON object"),
    (dict(teacher_device="swap"), "--teacher_device swap needs a --device cuda"),
    (dict(lora_alpha=8), "no effect without --lora_rank"), (dict(lora_rank=-1), "at least 0"),
    (dict(prompts=["openai/gsm8k:nowhere"]), "cannot load openai/gsm8k"),
    (dict(max_new_tokens=500), "128 positions")], ids=str)
def test_bad_input_is_refused_in_one_line(argv, tmp_path, flags, expected):
    assert expected in said(argv(**flags))
    assert not (tmp_path / "out1").exists()


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
    assert 'plain.jsonl:1 has no "solution"' in said(argv(method="sft", prompts=[plain]))
    assert 'plain.jsonl:1 has no "answer"' in said(argv(eval_prompts=[plain]))


def test_different_tokenizers_are_refused_with_the_first_differences(argv, models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
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
    from transformers import Qwen3ForCausalLM
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
    (dict(loss="rkl", jsd_beta=0.3), "--jsd_beta has no effect on --loss rkl"),
    (dict(loss="rkl", veto_beta=0.3), "no effect without --target veto"),
    (dict(loss="rkl", support="student_sg"), "needs a top_k"),
    (dict(loss="rkl", top_k=5), "without a --support"),
    (dict(loss="akl", support="student_sg", top_k=5), "akl needs the full vocabulary"),
    (dict(loss="pg", target="veto", method="mopd"), "sampled token only"),
    (dict(loss="alpha_beta", alpha_beta=[1, 0]), "A + B above 0"),
    (dict(loss="power", power_lambda=0), "not 0 (fkl)"),
    (dict(loss="todi", todi_beta="inf"), "todi_beta")], ids=str)
def test_objectives_that_cannot_be_are_refused(argv, flags, expected):
    assert expected in said(argv(**flags))


def test_nothing_on_disk_is_ever_overwritten(start, argv, prompts, tmp_path):
    run = start()
    opd.train(run)
    before = {path: path.stat().st_mtime_ns for path in run.out.rglob("*") if path.is_file()}
    assert "add --resume" in said(argv(out=run.out))
    assert "another lr" in said(argv(out=run.out, resume=True, lr=1))
    changed = argv(out=run.out, resume=True)
    prompts(rows=[{"prompt": "rev b>"}])
    assert "another prompts_sha256" in said(changed)
    assert before == {path: path.stat().st_mtime_ns for path in run.out.rglob("*") if path.is_file()}
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
    assert "cannot load" in said(argv(out=run.out, resume=True, steps=3, save_every=1))


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


def test_rows_of_another_branch_and_flags_without_effect_are_refused(argv, prompts, tmp_path):
    other = prompts("other", [{"prompt": "rev abc>", "branch": "domain"}])
    refused = said(argv(prompts=[f"general={other}"], teachers=["general=x"]))
    assert "this row is of branch 'domain'" in refused
    recipe = ["--recipe", "small", "--out", str(tmp_path / "r")]
    assert "--lr has no effect" in said([*recipe, "--lr", "3"])
    assert "--seeds: 0 is not at least 1" in said([*recipe, "--seeds", "0"])


def test_bfloat16_final_is_half_the_size_and_keeps_the_tie(start):
    from transformers import AutoModelForCausalLM
    run = start(dtype="bfloat16", steps=1)
    opd.train(run)
    net = AutoModelForCausalLM.from_pretrained(run.out / "final", dtype="auto")
    assert net.dtype == torch.bfloat16 and net.lm_head.weight is net.model.embed_tokens.weight
    size = sum(path.stat().st_size for path in (run.out / "final").glob("*.safetensors"))
    assert size < 2 * sum(p.numel() for p in net.parameters()) + 10_000


# ---- recipes and the neighbourhood -------------------------------------------------------------------------

def test_every_row_of_every_recipe_parses_and_its_names_exist():
    for recipe in recipes.RECIPES.values():
        assert set(recipe.references) | set(recipe.quick) - {""} <= recipe.rows.keys()
        assert {name for sets in recipe.axes.values() for name in sets} <= recipe.columns.keys()
        for quick in (False, True):
            for row in recipe.rows:
                cfg = opd.configure(recipes.arguments(recipe, row, Path("runs/x/seed3"), 3, quick))
                filled = json.dumps(vars(cfg))
                assert cfg.seed == 3 and "{dir}" not in filled and "{seed}" not in filled


def test_recipe_runs_once_and_reports(tmp_path, monkeypatch):
    few = recipes.RECIPES["small"]
    rows = {name: few.rows[name] for name in ("generalist", "specialist", "sft", "camopd")}
    tiny = dataclasses.replace(
        few, rows=rows, quick={"": dict(steps=2, eval_every=1)},
        quick_prepare=["--generalist", "300", "--specialist", "300", "--evaluation", "8"],
        expected={"quick": {"sft": [(1, 2)] * 3}})
    monkeypatch.setitem(recipes.RECIPES, "small", tiny)
    out = tmp_path / "small"
    opd.main(["--recipe", "small", "--quick", "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert (results["rows"].keys() == rows.keys()
            and all(len(r["domain"]) == 1 for r in results["rows"].values()))
    assert ((out / "curves.png").stat().st_size > 10_000
            and "expected 1.0 ± 2.0" in (out / "report.md").read_text())
    again = (out / "seed0" / "camopd" / "final" / "config.json").stat().st_mtime_ns
    opd.main(["--recipe", "small", "--quick", "--out", str(out)])
    assert again == (out / "seed0" / "camopd" / "final" / "config.json").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="quick form"):
        opd.main(["--recipe", "small", "--out", str(out)])


def test_a_failing_row_ends_the_recipe(tmp_path, monkeypatch):
    calls = []

    def call(argv, row, folder, *rest):
        calls.append((folder.name, row))
        (recipes.ROOT / folder).mkdir(parents=True, exist_ok=True)
        if row == "generalist":
            raise SystemExit("broken")
    monkeypatch.setattr(recipes, "call", call)
    with pytest.raises(SystemExit, match="broken"):
        opd.main(["--recipe", "small", "--seeds", "3", "--out", str(tmp_path / "r")])
    assert calls[:2] == [("seed0", "data"), ("seed0", "generalist")] and len(calls) <= 4
    assert "--quick has no effect without" in said(["--student", "x", "--prompts", "y", "--quick"])


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


def test_readme_quotes_the_loop_and_its_examples_run(start, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    for function in (methods.opd, opd.train):
        assert inspect.getsource(function) in readme, f"README does not quote {function.__name__}"
    added = ["\n".join(line[1:] for line in block.splitlines() if line[0] == "+")
             for block in re.findall(r"```diff\n(.*?)```", readme, re.S)]
    method, table_row = added[0].rsplit("\n", 1)
    monkeypatch.setattr(methods, "unsure", None, raising=False)
    monkeypatch.setattr(losses, "jeffreys", None, raising=False)
    exec(method, vars(methods))
    monkeypatch.setitem(methods.METHODS, "unsure", eval(f"{{{table_row}}}", vars(methods))["unsure"])
    run = start(method="unsure", steps=1, batch=8)
    opd.train(run)
    step = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()][-1]
    assert step["kept"] == 2 and step["rollouts"] == 8
    monkeypatch.setattr(losses, "DIVERGENCES", dict(losses.DIVERGENCES))
    exec(added[1], vars(losses))
    z, w = torch.randn(2, 3, 9, dtype=torch.float64)
    both = losses.divergence(z, w, "fkl") + losses.divergence(z, w, "rkl")
    torch.testing.assert_close(losses.divergence(z, w, "jeffreys"), both)


def test_the_readmes_divergence_is_all_it_takes(tmp_path):
    """Its two pieces, put among the other rows of a copy of the project, pass every test that names a row."""
    readme = (ROOT / "README.md").read_text()
    diff = re.search(r"```diff\n losses.py\n(.*?) kernels/rows_triton.py\n(.*?)```", readme, re.S)
    copy = tmp_path / "opd"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    for path, piece, before in (("losses.py", diff[1], "def log_mixture"),
                                ("kernels/rows_triton.py", diff[2], "@triton.jit\ndef log_mixture")):
        text = (copy / path).read_text()
        assert text.count(before) == 1
        piece = re.sub(r"^\+", "", piece, flags=re.M)
        (copy / path).write_text(text.replace(before, f"{piece}\n\n{before}"))
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "hellinger", "tests/test_losses.py",
                           "tests/test_kernels.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and int(re.search(r"(\d+) passed", done.stdout)[1]) > 20, done.stdout[-2000:]
    helps = subprocess.run([sys.executable, "opd.py", "--help"], cwd=copy, capture_output=True, text=True)
    assert "hellinger" in helps.stdout
