"""Real checkpoints: chat formats, vocabularies, adapters, recomputed layers, teachers that come and go."""
import contextlib
import json
import os
import shutil
import sys

import pytest
import torch
import transformers
from conftest import die_at, gradients, metrics, parameters, tiny
from test_loop import accumulate, double, rollouts
from transformers import AutoModelForCausalLM, AutoTokenizer

import models as loading
import opd
from config import Refused
from data import scratch, small_world
from lab import preflight
from losses import Objective
from methods import METHODS, Job
from methods.token_weights import RULES
from text import end_of_turn

QUESTIONS = [{"prompt": f"What is {a} and {b}?", "answer": str(a + b), "solution": f"It is {a + b}.",
              "grader": "number"} for a in range(2, 5) for b in range(3, 5)]
GEMMA = ("{% for m in messages %}<start>{{ m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
         "{% if add_generation_prompt %}<start>model\n{% endif %}")


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    """Folders of chat models as a hub has them: student and teacher with heads of 24 and 88 rows too many."""
    root = tmp_path_factory.mktemp("chat")
    tok = scratch.tokenizer([row["prompt"] + row["solution"] for row in QUESTIONS], 300)
    for name, seed, hidden, more in (("student", 0, 64, 24), ("teacher", 1, 128, 88)):
        tiny(root / name, scratch.model(tok, seed, hidden, 2, more, positions=256), tok, scale=4)
    return root


@pytest.fixture
def begin(start, chat, prompts):
    """begin(flag=value, ..) -> a Run of the chat models."""
    return lambda **flags: start(**dict(student=chat / "student", teachers=[chat / "teacher"],
                                        prompts=[prompts("questions", QUESTIONS)]) | flags)


def copy(folder, to, template=None, **special):
    """Another checkpoint with the same weights and another template or special tokens."""
    shutil.copytree(folder, to)
    tok = AutoTokenizer.from_pretrained(to)
    tok.chat_template = template
    for name, token in special.items():
        setattr(tok, name, token)
    tok.save_pretrained(to)
    if template is None and (to / "chat_template.jinja").exists():
        (to / "chat_template.jinja").unlink()
    return to


# ---- chat --------------------------------------------------------------------------------------------------

def kl_by_hand(run, job):
    """KL(p || q) by autograd on whole logits: each model sees its own prompt, both the same completion."""
    total, vocab = 0.0, run.student.vocab
    for r in job.rollouts:
        logps = []
        for model in (run.student, run.teacher):
            prompt = model.tok.apply_chat_template([{"role": "user", "content": r.prompt["prompt"]}],
                                                   add_generation_prompt=True, return_dict=True).input_ids \
                if model.tok.chat_template else model.tok(r.prompt["prompt"]).input_ids
            ids_BT = torch.cat([torch.tensor(prompt), r.ids_T])[None]
            logits = model.net(ids_BT).logits[0, len(prompt) - 1:-1, :vocab]
            logps.append(torch.log_softmax(logits, -1))
        lp, lq = logps[0], logps[1].detach()
        total = total + (lp.exp() * (lp - lq)).sum(-1).mean() / len(job.rollouts)
    return total


@pytest.mark.parametrize("teacher_template, student_template", [
    (scratch.CHATML, scratch.CHATML), (GEMMA, scratch.CHATML), (scratch.CHATML, None)],
    ids=["same", "other", "base student"])
def test_each_model_sees_its_own_prompt_and_both_score_the_same_tokens(
        begin, chat, tmp_path, teacher_template, student_template):
    """Templates, padded heads of 24 and 88 rows and the end of a turn, against whole logits in float64."""
    run = double(begin(student=copy(chat / "student", tmp_path / "s", student_template),
                       teachers=[copy(chat / "teacher", tmp_path / "t", teacher_template)]))
    heads = [len(model.net.get_output_embeddings().weight) for model in (run.student, run.teacher)]
    assert heads == [run.student.vocab + 24, run.student.vocab + 88]
    job = Job(run.student, run.teacher, rollouts(run, rows=QUESTIONS), Objective(divergence="rkl"))
    value = accumulate(run, [job])
    ours = gradients(run.student)
    run.student.net.zero_grad()
    expected = kl_by_hand(run, job)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert (ours - gradients(run.student)).abs().max() < 1e-6 * ours.abs().max()
    head_VH = run.student.net.get_output_embeddings().weight
    assert (head_VH.grad[run.student.vocab:] == 0).all()         # padding rows learn nothing


def test_the_end_of_a_turn_is_learned_and_ends_a_completion_even_where_it_is_not_eos(begin, chat, tmp_path):
    """Gemma ends turns with <end_of_turn> and texts with <eos>, and pad may be the same token as EOS."""
    tok = AutoTokenizer.from_pretrained(chat / "student")
    folder = copy(chat / "student", tmp_path / "s", scratch.CHATML, eos_token="<|endoftext|>",
                  pad_token="<|endoftext|>")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    run = begin(student=folder, method="sft", teachers=[])
    turn = tok.convert_tokens_to_ids("<|im_end|>")
    assert run.student.tok.eos_token_id == run.student.tok.pad_token_id == 0
    assert run.student.stops == [0, turn]
    assert end_of_turn(run.student.tok) == turn == run.references(run.draw())[0].ids_T[-1]
    closed = run.references(run.draw())[:1]
    last = torch.zeros(len(closed[0].ids_T)).index_fill(0, torch.tensor(len(closed[0].ids_T) - 1), 1.0)
    accumulate(run, [Job(run.student, None, closed, Objective(label="nll"), [last])])
    assert gradients(run.student).abs().max() > 1e-6
    base = AutoTokenizer.from_pretrained(chat / "student")
    base.chat_template = None
    run.student.tok = base
    assert end_of_turn(base) is None
    assert run.student.encode_completion("It is 5.")[-1] == base.eos_token_id


def test_a_base_student_learns_to_stop_where_its_chat_teacher_stops(begin, chat, tmp_path):
    """Else it would learn the end-of-turn token and write on after it, here and wherever final/ is loaded."""
    folder = copy(chat / "student", tmp_path / "base", None, eos_token="<|endoftext|>")
    net = AutoModelForCausalLM.from_pretrained(folder)
    net.generation_config.eos_token_id = net.config.eos_token_id = 0
    net.save_pretrained(folder)
    run = begin(student=folder, steps=1)
    turn = run.teacher.tok.convert_tokens_to_ids("<|im_end|>")
    assert run.student.stops == [0, turn]
    opd.train(run)
    assert json.loads((run.out / "final" / "generation_config.json").read_text())["eos_token_id"] == [0, turn]
    templated = copy(folder, tmp_path / "templated", scratch.CHATML, eos_token="<|endoftext|>")
    run = begin(student=templated, steps=1)                      # as Qwen3's base models are
    opd.train(run)
    assert json.loads((run.out / "final" / "generation_config.json").read_text())["eos_token_id"] == [0, turn]


def test_several_turns_system_prompts_and_thinking_render_as_the_template_says(begin, chat, prompts):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "What is 2 and 3?"}]
    run = begin(prompts=[prompts("talk", [{"prompt": talk}])], steps=1,
                chat_template_kwargs='{"enable_thinking": false}')
    row, = run.prompts["main"]
    sampled, = run.sample(run.student, [row])
    for ids in (sampled.prompt_ids, sampled.teacher_ids, run.rollout(row, torch.tensor([1])).prompt_ids):
        assert run.student.tok.decode(ids) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWhat is 2 and 3?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    opd.train(run)


@pytest.mark.parametrize("template, expected", [
    (scratch.CHATML.replace("m.content", "m.content | upper"), None),
    (scratch.CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"),
     "leaves out the text of a message of role 'user'")], ids=["upper case", "parts only"])
def test_templates_that_do_not_say_what_they_are_given(begin, chat, tmp_path, template, expected):
    """The special token after an answer that is not there would be the first of the conversation."""
    folder = copy(chat / "student", tmp_path / "s", template)
    assert end_of_turn(AutoTokenizer.from_pretrained(folder)) is None
    with pytest.raises(Refused, match=expected) if expected else contextlib.nullcontext():
        begin(student=folder)


@pytest.mark.parametrize("defaults, stops", [
    (dict(do_sample=False, temperature=0.6, eos_token_id=2), [2]),
    (dict(eos_token_id=[2, 5_000_000_000, -1]), [2]),
    (dict(eos_token_id=7, pad_token_id=-1), [2, 7])], ids=str)
def test_odd_generation_configs_cost_no_training(begin, chat, tmp_path, defaults, stops):
    """transformers refuses to save some of what it loads, and would do so after the training."""
    folder = shutil.copytree(chat / "student", tmp_path / "s")
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    run = begin(student=folder, method="sft", teachers=[], steps=1)
    assert run.student.stops == stops
    opd.train(run)
    saved = json.loads((run.out / "final" / "generation_config.json").read_text())
    assert saved["eos_token_id"] in (stops, stops[0])
    assert saved.get("temperature") == defaults.get("temperature")
    AutoModelForCausalLM.from_pretrained(run.out / "final")


def test_a_template_without_a_system_role_is_named_with_its_row(chat, argv, prompts, tmp_path):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + GEMMA
    folder = copy(chat / "student", tmp_path / "s", strict)
    rows = [{"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}]
    with pytest.raises(SystemExit, match="late.jsonl:1: no system role"):
        opd.main(argv(student=folder, teachers=[chat / "teacher"], prompts=[prompts("late", rows)]))


# ---- vocabulary --------------------------------------------------------------------------------------------

def test_a_teacher_may_know_more_tokens_and_the_student_may_not(begin, chat, tmp_path, capsys):
    """Qwen3 knows all tokens of Qwen2.5 and four more: q is renormalised over the shared ids."""
    folder = shutil.copytree(chat / "teacher", tmp_path / "more")
    tok = AutoTokenizer.from_pretrained(folder)
    tok.add_tokens(["<tool>"])
    tok.save_pretrained(folder)
    run = begin(teachers=[folder], loss="fkl")
    assert "1 tokens that the student lacks (<tool>)" in capsys.readouterr().out
    opd.train(run)
    run = begin(teachers=[folder], method="seqkd")               # the teacher writes, in the student's tokens
    with torch.no_grad():
        run.teacher.head_VH[run.student.vocab] = 100 * run.teacher.head_VH[run.student.vocab - 1]
    opd.train(run)
    with pytest.raises(Refused, match="'<tool>': .* / None"):
        begin(student=folder, teachers=[chat / "teacher"])


def test_a_tokenizer_may_have_an_id_without_a_row_unless_a_prompt_uses_it(begin, chat, prompts, tmp_path):
    """Gemma 3's text models lack the row of its tokenizer's image token."""
    folders = [shutil.copytree(chat / name, tmp_path / name) for name in ("student", "teacher")]
    for folder in folders:
        tok = AutoTokenizer.from_pretrained(folder)
        net = AutoModelForCausalLM.from_pretrained(folder)
        net.resize_token_embeddings(len(tok))
        net.save_pretrained(folder)
        tok.add_tokens(["<image>"])
        tok.save_pretrained(folder)
    run = begin(student=folders[0], teachers=[folders[1]])
    assert run.student.vocab == len(tok) - 1
    opd.train(run)
    with pytest.raises(Refused, match="late.jsonl:1: the token '<image>'.*has no row"):
        begin(student=folders[0], teachers=[folders[1]], prompts=[prompts("late", [{"prompt": "<image> a"}])])


# ---- refused by name ---------------------------------------------------------------------------------------

def bidirectional(folder, tok):
    net = transformers.BertGenerationDecoder(transformers.BertGenerationConfig(
        vocab_size=len(tok), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0, bos_token_id=0, eos_token_id=1))
    net.save_pretrained(folder)


def encoder_decoder(folder, tok):
    transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=len(tok), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(folder)


def quantised(folder, tok):
    small_world.model(len(tok), 0, 32, 1).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))


def broken(folder, tok):
    net = small_world.model(len(tok), 0, 32, 1)
    with torch.no_grad():
        net.model.norm.weight[0] = torch.nan
    net.save_pretrained(folder)


@pytest.mark.parametrize("make, expected", [
    (bidirectional, "in BertGenerationDecoder a token sees the ones after it"),
    (encoder_decoder, "is a t5, not a decoder-only language model"),
    (quantised, "is quantised and cannot learn"),
    (broken, "has values that are not numbers")])
def test_models_that_cannot_be_students_are_refused_by_name(argv, models, tmp_path, make, expected):
    tok = AutoTokenizer.from_pretrained(models / "a")
    make(tmp_path / "m", tok)
    tok.save_pretrained(tmp_path / "m")
    with pytest.raises(SystemExit, match=expected):
        opd.main(argv(student=tmp_path / "m"))


@pytest.mark.parametrize("where", ["load", "step"])
def test_too_little_memory_is_one_line_with_the_ways_out(argv, monkeypatch, where):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    if where == "load":
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    else:
        monkeypatch.setattr(opd, "update", full)
    with pytest.raises(SystemExit) as stop:
        opd.main(argv())
    message = str(stop.value)
    assert "fit on cpu" in message and "--teacher_device swap" in message and "\n" not in message


def test_a_quantised_teacher_teaches(begin, chat, tmp_path):
    pytest.importorskip("torchao", reason="optional: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    folder = tmp_path / "int8"
    net = AutoModelForCausalLM.from_pretrained(chat / "teacher", device_map={"": "cpu"}, dtype=torch.float32,
                                               quantization_config=transformers.TorchAoConfig(
                                                   Int8WeightOnlyConfig()))
    net.save_pretrained(folder)
    AutoTokenizer.from_pretrained(chat / "teacher").save_pretrained(folder)
    whole, small = (begin(teachers=[teacher], steps=1) for teacher in (chat / "teacher", folder))
    for run in (whole, small):
        opd.train(run)
    values = [metrics(run)[0]["value"] for run in (whole, small)]
    assert values[0] != values[1] and values[0] == pytest.approx(values[1], rel=0.05)


# ---- adapters ----------------------------------------------------------------------------------------------

@pytest.fixture
def lora(begin):
    pytest.importorskip("peft", reason="optional: pip install peft")
    return lambda **flags: begin(**dict(lora_rank=4, lr=1e-2, steps=4) | flags)


def test_a_new_adapter_changes_nothing_and_only_the_adapter_learns(lora, chat):
    run = lora(teachers=[chat / "student"], loss="rkl", steps=1)
    before = {name: p.clone() for name, p in run.student.net.named_parameters()}
    assert {name for name, p in before.items() if p.requires_grad} == {n for n in before if "lora_" in n}
    assert not any("lm_head" in n or "embed" in n for n in before if "lora_" in n)
    opd.train(run)
    assert abs(metrics(run)[0]["value"]) < 1e-6                 # the teacher is the student without adapter
    other = lora(dtype="bfloat16")
    before = {name: p.clone() for name, p in other.student.net.named_parameters()}
    for step in range(2):
        jobs = [Job(other.student, other.teacher, rollouts(other, step), other.objective)]
        other.score(jobs)
        opd.update(other, jobs, opd.weigh(jobs))
    assert {p.dtype for name, p in before.items() if "lora_" in name or "norm" in name} == {torch.float32}
    assert {before[name].dtype for name in before if name.endswith("base_layer.weight")} == {torch.bfloat16}
    changed = {name for name, p in other.student.net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_the_adapter_loads_in_peft_and_is_what_final_has_merged(lora, chat):
    import peft
    run = lora()
    opd.train(run)
    base = AutoModelForCausalLM.from_pretrained(chat / "student")
    ids = torch.arange(5, 25)[None]
    before = base(ids).logits
    adapted = peft.PeftModel.from_pretrained(base, run.out / "adapter")(ids).logits
    final = AutoModelForCausalLM.from_pretrained(run.out / "final")(ids).logits
    torch.testing.assert_close(adapted, final, rtol=1e-4, atol=1e-4)
    assert (final - before).abs().max() > 1e-2
    assert not (run.out / "checkpoint" / "model.safetensors").exists()
    with pytest.raises(Refused, match="is an adapter; give a merged model"):
        lora(student=run.out / "adapter")


def test_a_run_with_an_adapter_resumes_bit_for_bit(lora, monkeypatch):
    def trained(run):
        opd.train(run)
        return parameters(run.student)

    whole = trained(lora(optimizer="muon"))
    cut = lora(optimizer="muon", save_every=2)
    monkeypatch.setattr(opd, "update", die_at(opd.update, 3))
    with pytest.raises(KeyboardInterrupt):
        opd.train(cut)
    monkeypatch.undo()
    assert torch.equal(trained(lora(optimizer="muon", save_every=2, out=cut.out, resume=True)), whole)


def test_a_teacher_without_the_adapter_is_the_model_that_the_student_was(lora, chat):
    """The same weights serve both: the gap must be that of two separate models, also after some steps."""
    run = lora(teachers=[chat / "student"], loss="pg", method="mopd")
    assert run.teacher.net is run.student.net
    opd.train(lora(out=run.out.with_name("warm")))
    with torch.no_grad():
        for name, p in run.student.net.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
    job = Job(run.student, run.teacher, rollouts(run), run.objective)
    run.score([job])
    alone = lora(teachers=[chat / "student"], lora_rank=0)
    seen = [r.prompt_ids for r in job.rollouts], [r.ids_T for r in job.rollouts], run.cfg.micro_tokens
    lps, lqs = run.student.log_probs(*seen), alone.teacher.log_probs(*seen)
    for gap_T, lp_T, lq_T in zip(job.gaps, lps, lqs, strict=True):
        torch.testing.assert_close(gap_T, lq_T - lp_T, rtol=1e-4, atol=1e-5)
        assert gap_T.abs().max() > 1e-3


def test_without_peft_a_line_says_what_to_install(argv, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="--lora_rank needs peft: pip install peft"):
        opd.main(argv(lora_rank=4))


# ---- memory ------------------------------------------------------------------------------------------------

def saved_bytes(run, job):
    """Bytes alive after a forward pass, for its backward."""
    with preflight.Live(loading.tensors(run.student.net)) as live:
        hidden_NH = run.student.hidden_states([r.prompt_ids for r in job.rollouts],
                                              [r.ids_T for r in job.rollouts])
        alive = live.now
        hidden_NH.sum().backward()
    return alive


def test_recomputed_layers_give_the_same_gradient_and_keep_less(begin, chat, tmp_path):
    folder, ours = shutil.copytree(chat / "student", tmp_path / "s"), []
    config = json.loads((folder / "config.json").read_text())    # training mode would drop half of attention
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    for flag in (False, True):
        run = double(begin(student=folder, **(dict(gradient_checkpointing=True) if flag else {})))
        job = Job(run.student, run.teacher, rollouts(run, count=8), Objective(divergence="rkl"))
        accumulate(run, [job])
        ours.append((gradients(run.student), saved_bytes(run, job)))
    (exact, kept), (recomputed, less) = ours
    torch.testing.assert_close(exact, recomputed)
    assert less < kept / 3


def test_sampling_and_scoring_do_not_pay_for_recomputed_layers(begin, monkeypatch):
    called = []
    monkeypatch.setattr(loading, "checkpoint", lambda forward, *args, **kwargs: (called.append(1), forward(
        *args, **{k: v for k, v in kwargs.items() if k not in ("use_reentrant", "preserve_rng_state")}))[1])
    run = begin(gradient_checkpointing=True, method="mopd", loss="pg")
    job = Job(run.student, run.teacher, run.sample(run.student, run.draw()), run.objective)
    run.score([job])
    assert job.gaps[0] is not None and not called
    opd.update(run, [job], opd.weigh([job]))
    assert called


@pytest.mark.parametrize("method", ["opd", "camopd", "seqkd", "kd"])
def test_an_offloaded_teacher_is_there_only_while_it_samples_and_scores(begin, monkeypatch, method):
    """Otherwise its weights and the student's activations would be on the card at the same time."""
    here, on_device = set(), loading.Model.on_device

    @contextlib.contextmanager
    def tracked(model):
        with on_device(model):
            here.add(model.path)
            yield
            here.discard(model.path)
    monkeypatch.setattr(loading.Model, "on_device", tracked)
    ends = []
    for swap in (False, True):
        run = begin(method=method, lr=1e-3, **(dict(schedule="1") if method == "camopd" else {}))
        calls = []
        for model in (run.teacher, run.student):
            run.teacher.offloaded = swap
            model.body.register_forward_pre_hook(lambda *_, model=model: calls.append(
                (model.path, run.teacher.path in here)))
        opd.train(run)
        assert all(there for path, there in calls if path == run.teacher.path)
        assert not any(there for path, there in calls if path == run.student.path)
        assert {path for path, _ in calls} == {run.teacher.path, run.student.path}
        ends.append(parameters(run.student))
    assert torch.equal(*ends)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["swap", "cpu"])
@pytest.mark.parametrize("method", ["opd", "mopd", "seqkd"])
def test_a_teacher_elsewhere_teaches_the_same_on_a_gpu(begin, where, method):
    values = []
    for flags in (dict(), dict(teacher_device=where)):
        run = begin(device="cuda", dtype="float32", method=method, **flags)
        where_it_waits = next(run.teacher.net.parameters()).device.type
        assert where_it_waits == ("cpu" if flags else "cuda")
        opd.train(run)
        assert next(run.teacher.net.parameters()).device.type == where_it_waits
        values.append([line["loss"] for line in metrics(run)])
    assert values[0] == pytest.approx(values[1], rel=1e-3)


# ---- the preflight -----------------------------------------------------------------------------------------

MEMORY = [dict(), dict(gradient_checkpointing=True), dict(dtype="bfloat16"), dict(lora_rank=4),
          dict(loss="nll", method="sft"), dict(optimizer="muon"), dict(micro_tokens=10_000),
          dict(loss="pg", method="mopd"), dict(method="opsd", self_teacher="ema"), dict(method="dpo"),
          dict(method="okd"), dict(method="okd", teacher_rank=0), "evaluation"]


LONG = "one two three four five six seven eight nine ten " * 8


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Folders s and t of models whose weights and activations take more than what is not counted."""
    root, tok = tmp_path_factory.mktemp("larger"), scratch.tokenizer([LONG], 300)
    for name, seed, hidden in (("s", 0, 192), ("t", 1, 256)):
        scratch.model(tok, seed, hidden, 3).save_pretrained(root / name)
        tok.save_pretrained(root / name)
    return root


def full_length(folder):
    """Tokens of LONG and its end."""
    return len(AutoTokenizer.from_pretrained(folder)(LONG).input_ids) + 1


@pytest.mark.parametrize("flags", MEMORY, ids=str)
def test_predicted_memory_is_what_a_run_takes_part_by_part(start, larger, prompts, monkeypatch, flags):
    """Peaks of all live tensors in a real run on a CPU, in every phase, within a tenth of the prediction."""
    if "lora_rank" in flags or flags == dict(method="okd"):
        pytest.importorskip("peft", reason="optional: pip install peft")
    if flags == "evaluation":
        flags = dict(eval_prompts=[prompts("eval", [{"prompt": LONG[:150], "answer": "four"}] * 48)])
    rows = [{"prompt": LONG[:150], "solution": LONG, "chosen": LONG,
             "rejected": LONG.replace("one two", "two one")}] * 16
    flags = dict(student=larger / "s", teachers=[larger / "t"], prompts=[prompts("long", rows)], steps=2,
                 batch=16, micro_tokens=700) | flags
    method = METHODS[flags.get("method", "opd")]
    if method.samples or "eval_prompts" in flags:
        flags["max_new_tokens"] = full_length(larger / "s")
    if method.teachers == "none":
        flags["teachers"] = []
    parts = preflight.memory(start(**flags, dry_run=True))
    predicted = {phase: sum(sizes.get(phase, 0) for sizes in parts.values()) for phase in preflight.PHASES}

    run, measured = start(**flags), {}
    run.student.stops = [run.student.vocab - 1]                  # completions of full length
    models = [run.student, *preflight.distinct(run)]
    averages = loading.average_values(run.student)
    known = [x for model in models for x in loading.tensors(model.net)] + averages
    held = sum(map(preflight.weight_bytes, models)) + sum(x.nbytes for x in averages)
    monkeypatch.setattr("kernels.chunked._held", type("Empty", (), {})())
    with preflight.Live(known) as live:
        @contextlib.contextmanager
        def timed(name):
            live.peak = live.now
            yield
            run.clock[name] = 1.0
            measured[name] = max(live.peak + held, measured.get(name, 0))
        run.timed = timed
        opd.train(run)
    fixed = flags.get("method") in ("sft", "dpo", "okd")                # nothing is sampled
    assert measured.keys() == set(preflight.PHASES) - ({"sample"} if fixed else set())
    for phase, peak in measured.items():
        assert predicted[phase] == pytest.approx(peak, rel=0.1), (phase, predicted, measured, parts)


@pytest.mark.parametrize("given", [dict(kl_weight=0.1), *[dict(token_weight=name) for name in RULES]],
                         ids=str)
def test_terms_that_need_both_models_logits_have_both_buffers(start, given):
    memory = lambda **more: preflight.memory(start(method="mopd", dry_run=True, **more))
    logits = lambda **more: memory(**more)["logits of the fused loss"]
    both = given.get("token_weight") not in ("selectkd", "prefix")      # that sort, and that look at nothing
    assert logits(**given)["score"] == logits()["score"] * (1 + both)


@pytest.mark.parametrize("given, roles", [
    (dict(method="opd", kl_weight=0.1), ["student", "teacher", "itself"]),
    (dict(method="opd"), ["student", "teacher"]), (dict(method="context"), ["student", "itself"]),
    (dict(method="context", self_teacher="live"), ["student"])],
    ids=str)
def test_a_dry_run_names_the_student_as_it_started(start, capsys, given, roles):
    preflight.about_models(start(dry_run=True, **given))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == roles and {line.index("/") for line in lines} == {9}


def test_a_dry_run_says_how_much_a_self_teacher_reads(start, capsys):
    """A reference model reads the prompt alone, a self-teacher a solution beside it."""
    for method, shown in (("dpo", "{prompt}"), ("opsd", "{solution}={prompt}")):
        run = start(method=method, dry_run=True)
        longest = max(len(run.student.encode(shown.format(**row))) for row in run.prompts["main"])
        preflight.about_tokens(run)
        assert f"reads up to {longest} tokens" in capsys.readouterr().out


def test_dry_run_of_an_eight_billion_model_needs_its_config_and_tokenizer_only(chat, argv, tmp_path, capsys,
                                                                               prompts):
    """Renderings, where the loss begins, stop tokens, ids, steps and memory; nothing is loaded or written."""
    big = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=151936, eos_token_id=2)
    for name in ("student", "teacher"):
        transformers.Qwen3Config(**big, max_position_embeddings=4096).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(chat / "student").save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    opd.main(argv(student=tmp_path / "student", teachers=[tmp_path / "teacher"], dry_run=True, out=out,
                  prompts=[prompts("q", QUESTIONS)], dtype="bfloat16", max_new_tokens=512))
    said = capsys.readouterr().out
    assert not out.exists()
    assert "8.191 B parameters, of which 8.191 B learn" in said
    assert "'<|im_start|>user\\nWhat is 2 and 3?<|im_end|>\\n<|im_start|>assistant\\n'" in said
    assert "no    " in said and "yes   2        '<|im_end|>'" in said and "151,936 rows in the head" in said
    gib = {line[2:50].strip(): line[50:].split() for line in said.splitlines() if line.startswith("  ")}
    weights = 8_190_735_360 / 2**30
    assert float(gib["student's weights"][0]) == pytest.approx(4 * weights, rel=1e-3)
    assert float(gib["optimizer"][0]) == pytest.approx(8 * weights, rel=1e-3)
    assert gib["gradients"] == ["-", "-", gib["student's weights"][0]]
    teacher = next(line for name, line in gib.items() if name.startswith("weights of"))
    assert float(teacher[0]) == pytest.approx(2 * weights, rel=1e-3)


def test_the_preflight_counts_every_teacher_and_a_window_once(begin, chat, prompts, tmp_path):
    same = "a folder with a name so long that it fills the column"
    paths = [shutil.copytree(chat / "teacher", tmp_path / same / name) for name in ("one", "two")]
    run = begin(teachers=[f"{name}={path}" for name, path in zip("ab", paths)], dry_run=True,
                prompts=[f"{name}={prompts(name, QUESTIONS)}" for name in "ab"])
    assert sum(name.startswith("weights of") for name in preflight.memory(run)) == 2
    tok = AutoTokenizer.from_pretrained(chat / "student")
    sizes = []
    for window in (32, None):
        transformers.MistralConfig(
            vocab_size=len(tok), hidden_size=64, intermediate_size=64, num_hidden_layers=2, eos_token_id=2,
            num_attention_heads=2, num_key_value_heads=2, sliding_window=window,
        ).save_pretrained(tmp_path / str(window))
        tok.save_pretrained(tmp_path / str(window))
        run = begin(student=tmp_path / str(window), dry_run=True)
        sizes.append([preflight.sampling_bytes(run.student, 4, 16, length) for length in (1000, 9000)])
    (short, long), (grown, more) = sizes
    assert 0 < short == long < grown < more and preflight.UNKNOWN not in sizes[0]


def test_a_dry_run_of_a_resumed_adapter_predicts_all_and_leaves_all(lora):
    run = lora(steps=2)
    opd.train(run)
    left = {path: path.stat().st_mtime_ns for path in run.out.rglob("*")}
    parts = preflight.memory(lora(steps=3, out=run.out, resume=True, dry_run=True))
    assert {path: path.stat().st_mtime_ns for path in run.out.rglob("*")} == left
    for sizes in parts.values():
        assert preflight.UNKNOWN not in sizes.values()


def test_how_long_a_student_may_write(begin, chat, tmp_path):
    """2,048 tokens where the template lets it think, else 512; a resumed run keeps what it had."""
    tok = AutoTokenizer.from_pretrained(chat / "student")
    for name in ("s", "t"):
        scratch.model(tok, 0, 64, 1, positions=4096).save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    flags = dict(student=tmp_path / "s", teachers=[tmp_path / "t"], steps=1)
    limit = lambda **more: begin(**flags, max_new_tokens=[], dry_run=True, **more).cfg.max_new_tokens
    assert limit() == 2048 and limit(chat_template_kwargs='{"enable_thinking": false}') == 512
    run = begin(**flags, max_new_tokens=6)
    opd.train(run)
    assert limit(out=run.out, resume=True) == 6


def test_dry_run_finds_what_a_run_would_refuse(argv, chat, prompts):
    with pytest.raises(SystemExit, match="256 positions"):
        opd.main(argv(student=chat / "student", teachers=[chat / "teacher"], dry_run=True, max_new_tokens=250,
                      prompts=[prompts("q", QUESTIONS)]))
    with pytest.raises(SystemExit, match="different tokenizers"):
        opd.main(argv(student=chat / "student", dry_run=True, prompts=[prompts("q", QUESTIONS)]))


# ---- public sets -------------------------------------------------------------------------------------------

def test_public_sets_come_from_the_hub_with_their_splits(argv, chat, tmp_path, monkeypatch):
    """A folder laid out as on the hub: `--prompts openai/gsm8k` is all that a user has to say."""
    pytest.importorskip("datasets", reason="optional: pip install datasets")
    folder = tmp_path / "openai" / "gsm8k"
    folder.mkdir(parents=True)
    for split, count in (("train", 6), ("test", 4)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(
            {"question": f"{split} {i} and 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}) + "\n"
            for i in range(count)))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n"
                                      "    path: train.jsonl\n  - split: test\n    path: test.jsonl\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run = opd.Run(opd.configure(argv(student=chat / "student", teachers=[chat / "teacher"],
                                     prompts=["openai/gsm8k"], eval_prompts=["test=openai/gsm8k:test[:3]"])))
    assert len(run.prompts["main"]) == 6 and len(run.evals["test"]) == 3
    assert run.prompts["main"][0]["prompt"].startswith("train 0 and 1?") and os.path.exists(folder)
    assert run.student.encode(run.prompts["main"][0]["prompt"])
    with pytest.raises(SystemExit, match="cannot load openai/gsm8k.*dev"):
        opd.main(argv(prompts=["openai/gsm8k:dev"]))
