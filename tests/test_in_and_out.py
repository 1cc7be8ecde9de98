"""What came in goes out: checkpoints of transformers 4 and 5, read as their files say, and saved for both.

OPD_TRANSFORMERS4=PYTHON names the python of an environment with torch, transformers 4.57 and (for adapters)
peft. Without it the tests that read final/ there are skipped.
"""
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers
from conftest import tiny
from test_loop import accumulate, double, family, rollouts
from test_models import QUESTIONS
from transformers import AutoModelForCausalLM, AutoTokenizer

import models as loading
import opd
import text
from config import Refused
from data import scratch
from losses import Objective
from methods import Job

TEXTS = [row["prompt"] + row["solution"] for row in QUESTIONS]
TEXT = "What is 2024 and 3?  It's (fine),\n\nnaïve <|im_end|>"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=256)


def byte_level():
    """The core of a tokenizer with ByteLevel's own way to cut words, numbers and white space."""
    return scratch.tokenizer([*TEXTS, "2024 2024\n\n  (fine (fine"], 320).backend_tokenizer


def metaspace():
    """The core of a tokenizer as Llama 2 has it: spaces are letters, and bytes are the last resort."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"),
                                                       tokenizers.normalizers.Replace(" ", "▁")])
    core.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)])
    special = [*scratch.SPECIAL, "<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    core.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False))
    saved = json.loads(core.to_str())
    saved["added_tokens"] = saved["added_tokens"][:7]            # bytes are ordinary tokens
    core = tokenizers.Tokenizer.from_str(json.dumps(saved))
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return core


CORES = {"PreTrainedTokenizerFast": byte_level, "Qwen2Tokenizer": byte_level, "LlamaTokenizerFast": metaspace}


def write(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n\n", encoding="utf-8")


def checkpoint(folder, words=4, tokenizer_class="PreTrainedTokenizerFast", seed=0, scaling=None, tied=True,
               eos="<|im_end|>", pad="<|endoftext|>", **more):
    """A Llama of theta 1,000,000 in the words of transformers 4, or with words=5 its config in those of 5."""
    core = CORES[tokenizer_class]()
    rope = {"rope_theta": 1e6, "rope_type": "default"} | (scaling or {})
    torch.manual_seed(seed)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=core.get_vocab_size() + 8, eos_token_id=core.token_to_id(eos), bos_token_id=None,
        pad_token_id=core.token_to_id(pad), tie_word_embeddings=tied, rope_parameters=rope, **SIZE, **more))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:                              # the row of pad, too, which would be 0
                parameter.normal_(std=0.15)
    net.save_pretrained(folder)
    if words == 4:
        config = json.loads((folder / "config.json").read_text())
        theta = config.pop("rope_parameters")["rope_theta"]
        write(folder / "config.json", config | {"rope_theta": theta, "rope_scaling": scaling,
                                                "torch_dtype": config.pop("dtype"),
                                                "transformers_version": "4.57.6"})
    core.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {
        "added_tokens_decoder": {str(core.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True} for token in scratch.SPECIAL[:3]},
        "clean_up_tokenization_spaces": False, "eos_token": eos, "model_max_length": 256, "pad_token": pad,
        "tokenizer_class": tokenizer_class, **({"bos_token": "<s>"} if core.token_to_id("<s>") else {})})
    write(folder / "special_tokens_map.json", {"eos_token": eos, "pad_token": pad})
    (folder / "chat_template.jinja").write_text(scratch.CHATML + "{# ours #}\n")
    write(folder / "generation_config.json", {
        "do_sample": True, "eos_token_id": core.token_to_id(eos), "top_k": 20,
        "transformers_version": "4.57.6"})
    return folder


@pytest.fixture
def run_on(start, prompts):
    """run_on(folder, flag=value, ..) -> a finished run of one step that changes next to nothing."""
    def run(*folders, **flags):
        run = start(**dict(student=list(folders), teachers=[], method="sft", steps=1, lr=1e-9,
                           prompts=[prompts("questions", QUESTIONS)]) | flags)
        opd.train(run)
        return run
    return run


def own(folder):
    """The files of a checkpoint beside weights and config."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.name not in ("config.json", "model.safetensors")}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ---- out ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [dict(), dict(lora_rank=4), dict(dtype="bfloat16")], ids=str)
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_what_came_in_goes_out(run_on, tmp_path, tokenizer_class, flags):
    """Tokenizer, chat template and generation defaults byte for byte, and every value of the config."""
    if "lora_rank" in flags:
        pytest.importorskip("peft", reason="optional: pip install peft")
    folder = checkpoint(tmp_path / "s", tokenizer_class=tokenizer_class, scaling=YARN)
    final = run_on(folder, **flags).out / "final"
    assert own(final) == own(folder)
    before, after = config_of(folder), config_of(final)
    assert after["torch_dtype"] == after["dtype"] == flags.get("dtype", "float32")
    assert {name: after.get(name) for name in before} == before | {"torch_dtype": after["dtype"]}
    assert after["rope_parameters"] == {"rope_theta": 1e6} | YARN


def test_a_config_in_the_words_of_5_gets_those_of_4_beside_them(run_on, tmp_path):
    plain, scaled = (run_on(checkpoint(tmp_path / name, words=5, scaling=scaling)).out / "final"
                     for name, scaling in (("plain", None), ("scaled", YARN)))
    assert config_of(plain)["rope_theta"] == config_of(plain)["rope_parameters"]["rope_theta"] == 1e6
    assert "rope_scaling" not in config_of(plain)
    assert config_of(scaled)["rope_scaling"] == YARN and config_of(scaled)["rope_theta"] == 1e6


def test_each_of_two_students_keeps_its_own_files(start, models, tmp_path):
    folders = [shutil.copytree(models / name, tmp_path / name) for name in "ab"]
    for folder in folders:
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{#" + folder.name + "#}")
    run = start(student=folders, method="opcod")
    loading.save_final(run.students, run.out / "final")
    for i, folder in enumerate(folders, 1):
        came, went = own(folder), own(run.out / "final" / str(i))
        assert came == went and folder.name in went["chat_template.jinja"].decode()


def test_the_files_of_a_hub_id_come_from_its_snapshot(argv, tmp_path, prompts):
    """In a process of its own, since the place of the cache is read when the hub's library is imported."""
    cache = tmp_path / "hub" / "models--some--model"
    folder = checkpoint(cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    words = argv(student="some/model", method="sft", steps=1, prompts=[prompts("questions", QUESTIONS)],
                 out=tmp_path / "out")
    done = subprocess.run([sys.executable, "opd.py", *words], capture_output=True, text=True,
                          cwd=opd.__file__.rpartition("/")[0], env=os.environ | {"HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert own(tmp_path / "out" / "final") == own(folder)


def test_new_stop_tokens_are_all_that_changes_in_the_generation_defaults(run_on, tmp_path):
    folder = checkpoint(tmp_path / "s", eos="<|endoftext|>")     # its template ends turns with <|im_end|>
    final = run_on(folder).out / "final"
    before, after = (json.loads((path / "generation_config.json").read_text()) for path in (folder, final))
    assert before["eos_token_id"] == 0 and after == before | {"eos_token_id": [0, 2]}
    listed = checkpoint(tmp_path / "listed")
    write(listed / "generation_config.json", {"eos_token_id": [2, 0], "top_k": 20})
    assert own(run_on(listed).out / "final") == own(listed)      # in whatever order
    (folder / "generation_config.json").unlink()
    assert json.loads((run_on(folder).out / "final" / "generation_config.json").read_text())[
        "eos_token_id"] == [0, 2]


READ = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, adapter, text = sys.argv[1:]
tok, net = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
if adapter:
    import peft
    net = peft.PeftModel.from_pretrained(net, adapter)
ids = tok(text).input_ids
with torch.no_grad():
    logits = net(torch.arange(220)[None] * 7 % 251).logits[0, [0, 100, 219], :50]
print(json.dumps([ids, tok.chat_template, net.generation_config.to_diff_dict(), logits.tolist()]))
"""


def read_with(python, folder, adapter=""):
    """(token ids, chat template, generation defaults, logits at long positions), read by another python."""
    done = subprocess.run([python, "-c", READ, str(folder), str(adapter), TEXT], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    ids, template, defaults, logits = json.loads(done.stdout.splitlines()[-1])
    return ids, template, defaults.get("top_k"), torch.tensor(logits)


@pytest.fixture(scope="module")
def transformers4():
    """The python of an environment with transformers 4."""
    python = os.environ.get("OPD_TRANSFORMERS4")
    if not python:
        pytest.skip("OPD_TRANSFORMERS4 does not name the python of an environment with transformers 4.57")
    done = subprocess.run([python, "-c", "import transformers; print(transformers.__version__)"],
                          capture_output=True, text=True)
    assert done.stdout.startswith("4."), f"{python} has no transformers 4: {done.stdout}{done.stderr}"
    return python


@pytest.mark.parametrize("words", [4, 5])
@pytest.mark.parametrize("tokenizer_class, scaling", [
    ("PreTrainedTokenizerFast", None), ("LlamaTokenizerFast", YARN)], ids=["theta", "yarn"])
def test_final_loads_anywhere(run_on, tmp_path, transformers4, tokenizer_class, scaling, words):
    """The same token ids, templates and logits in transformers 4 and 5, up to the last position."""
    folder = checkpoint(tmp_path / "s", words, tokenizer_class, scaling=scaling)
    final = run_on(folder).out / "final"
    there, here = read_with(transformers4, final), read_with(sys.executable, final)
    assert there[:3] == here[:3] and there[2] == 20
    torch.testing.assert_close(there[3], here[3], rtol=1e-4, atol=1e-4)
    if words == 4:                                               # 4 cannot read the student in those of 5
        as_it_came = read_with(transformers4, folder)
        assert there[:3] == as_it_came[:3]
        torch.testing.assert_close(there[3], as_it_came[3], rtol=1e-4, atol=1e-4)


def test_an_adapter_loads_anywhere(run_on, tmp_path, transformers4):
    pytest.importorskip("peft", reason="optional: pip install peft")
    if subprocess.run([transformers4, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip("the environment with transformers 4 has no peft")
    folder = checkpoint(tmp_path / "s")
    run = run_on(folder, lora_rank=4, lr=1e-2)
    adapted = read_with(transformers4, folder, run.out / "adapter")
    merged, before = read_with(transformers4, run.out / "final"), read_with(transformers4, folder)
    torch.testing.assert_close(adapted[3], merged[3], rtol=1e-3, atol=1e-3)
    assert (merged[3] - before[3]).abs().max() > 1e-2


# ---- in ----------------------------------------------------------------------------------------------------

def test_ids_are_those_of_the_tokenizers_own_file(run_on, tmp_path, capsys):
    """Qwen2Tokenizer puts its own way of cutting numbers and white space in the place of the file's."""
    folder = checkpoint(tmp_path / "s", tokenizer_class="Qwen2Tokenizer")
    ids = byte_level().encode(TEXT, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids != ids
    run = run_on(folder)
    assert run.student.tok(TEXT).input_ids == ids
    assert "is read as its tokenizer.json says, not as Qwen2Tokenizer does" in capsys.readouterr().out
    assert run.student.tok.eos_token == "<|im_end|>"
    assert run.student.tok.chat_template.endswith("{# ours #}\n")
    assert AutoTokenizer.from_pretrained(run.out / "final")(TEXT).input_ids == ids
    came, went = own(folder), own(run.out / "final")
    assert {name for name in came if came[name] != went[name]} == {"tokenizer_config.json"}


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_a_tokenizer_that_reads_its_file_is_left_alone(start, tmp_path, capsys, tokenizer_class):
    start(student=checkpoint(tmp_path / "s", tokenizer_class=tokenizer_class), teachers=[], method="sft")
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_ordinary_token_does_not_end_a_text_without_a_note(start, tmp_path, capsys, file):
    """LlamaConfig's eos_token_id is 2 where a config.json has none, whatever token that is."""
    folder = checkpoint(tmp_path / "s")
    (folder / "generation_config.json").unlink()
    ordinary = byte_level().token_to_id("W")
    for name in {"config.json", file}:
        before = config_of(folder) if name == "config.json" else {}
        write(folder / name, before | {"eos_token_id": ordinary if name == file else 2})
    run = start(student=folder, teachers=[], method="sft")
    assert run.student.stops == [2, ordinary]
    assert f"note: {folder} stops at 'W', which its config.json or" in capsys.readouterr().out


def test_a_checkpoints_own_code_is_never_run_whatever_stdin_says(argv, start, tmp_path, monkeypatch, capsys):
    """transformers would ask "Do you wish to run the custom code? [y/N]", and `yes |` answers."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n" \
           "from transformers import PreTrainedTokenizerFast as T\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))

    def with_code(name, **config):
        folder = checkpoint(tmp_path / name)
        (folder / "own.py").write_text(code)
        write(folder / "config.json", config_of(folder) | config | {"auto_map": {
            "AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})
        return folder
    run = start(student=with_code("known"), teachers=[], method="sft", steps=1)
    opd.train(run)                                               # transformers has a class of its own
    assert "auto_map" not in config_of(run.out / "final")
    for name, kind, flags in (("config", "ours", {}), ("net", "t5", {}), ("shape", "t5", dict(dry_run=True))):
        with pytest.raises(SystemExit, match="custom code|not a decoder-only") as stop:
            opd.main(argv(student=with_code(name, model_type=kind), teachers=[], method="sft", **flags))
        assert "\n" not in str(stop.value)
    folder = with_code("tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", settings | {
        "tokenizer_class": "Ours", "auto_map": {"AutoTokenizer": [None, "own.T"]}})
    with pytest.raises(Refused, match="cannot load .*custom code"):
        text.read(str(folder), {}, "2026-01-01")
    with pytest.raises(ValueError, match="custom code"):
        scratch.main([str(tmp_path / "new"), "--tokenizer", str(folder)])
    assert not ran.exists() and "[y/N]" not in capsys.readouterr().out


@pytest.mark.parametrize("layers, expected", [
    (1, "weights are not in its config's model, model.layers.1"), (3, "weights are missing, model.layers.2")])
def test_weights_and_config_must_be_of_the_same_model(start, tmp_path, layers, expected):
    folder = checkpoint(tmp_path / "s")
    write(folder / "config.json", config_of(folder) | {"num_hidden_layers": layers})
    with pytest.raises(Refused, match=expected):
        start(student=folder, teachers=[], method="sft")


# ---- nothing that a module brings changes what is learned --------------------------------------------------

def test_the_embedding_of_every_token_learns_also_where_pad_is_eos(start, prompts, tmp_path):
    """With pad == eos (SmolLM2) torch's padding_idx would make the input embedding of EOS learn nothing."""
    turn = "<|im_end|>"
    rows = [{"prompt": f"Hi{turn}", "solution": "It is"}]          # EOS is read here, too
    found = []
    for pad in (turn, "<|endoftext|>"):
        run = double(start(student=checkpoint(tmp_path / pad, tied=False, pad=pad), teachers=[], method="sft",
                           prompts=[prompts("turns", rows)]))
        assert (run.student.tok.pad_token_id == run.student.tok.eos_token_id) == (pad == turn)
        accumulate(run, [Job(run.student, None, run.references(run.draw()), Objective(label="nll"))])
        found.append(run.student.net.get_input_embeddings().weight.grad)
    assert found[0][2].abs().max() > 1e-3
    torch.testing.assert_close(*found)


RANDOM = {  # every option by which a family of decoders would drop or shake something while it trains
    "Llama": dict(attention_dropout=0.5), "GPT2": dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "OPT": dict(dropout=0.5, attention_dropout=0.5, layerdrop=0.9, word_embed_proj_dim=32),
    "Mixtral": dict(router_jitter_noise=0.5, attention_dropout=0.5, num_local_experts=4),
    "Phi": dict(resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)}


@pytest.mark.parametrize("flags", [dict(), dict(lora_rank=4)], ids=str)
@pytest.mark.parametrize("name", RANDOM)
def test_nothing_random_happens_in_a_forward_pass_and_no_row_is_special(start, models, tmp_path, name, flags):
    if flags:
        pytest.importorskip("peft", reason="optional: pip install peft")
    folder = family(name, 0, tmp_path / "s", AutoTokenizer.from_pretrained(models / "a"), **RANDOM[name])
    run = start(student=folder, teachers=[folder], steps=1, save_every=1, **flags)
    opd.train(run)
    again = start(student=folder, teachers=[folder], steps=2, save_every=1, out=run.out, resume=True, **flags)
    job = rollouts(again)
    for model in (again.student, again.teacher):
        seen = [r.prompt_ids for r in job], [r.ids_T for r in job]
        assert torch.equal(model.hidden_states(*seen), model.hidden_states(*seen))
        assert not any(module.training for module in model.net.modules())
        for module in model.net.modules():
            if isinstance(module, torch.nn.Embedding):
                options = module.padding_idx, module.max_norm, module.scale_grad_by_freq, module.sparse
                assert options == (None, None, False, False)
