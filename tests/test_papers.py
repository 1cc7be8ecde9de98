"""The papers' recipes: numbers, data, predicted cost, and a dress rehearsal of each."""
import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest
import transformers
from conftest import tiny

import opd
from config import Refused, parse
from data import camopd, convert, mix, scratch
from data.files import read_lines
from lab import papers, preflight, recipe, recipes, tables
from methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path("/work/shared/data")              # sets in their authors' formats, where they are there
OURS = {name: one for name, one in papers.RECIPES.items() if not name.startswith("opcod")}
SET = re.compile(r"[\w.-]+/[\w./-]+(:\w+(\[:\d+\])?)?$")     # openai/gsm8k:train[:1000], at the end of a word


def substituted(one, models, sources, few):
    """Return a recipe with other models and sets, and these flags in the rows that have them."""
    def word(text):
        text = re.sub(r"=\d+:", "=4:", text)                # data.mix's counts
        branch, _, path = text.rpartition("=")
        start = f"{branch}=" if branch else ""
        if path in models:
            return start + str(models[path])
        if "{dir}" in text or not (found := SET.search(text)):
            return text
        return text[:found.start()] + str(sources[found[0].partition(":")[0]])

    def flags(given):
        out = {}
        for name, value in given.items():
            if name != "micro_tokens":
                several = value if isinstance(value, list) else [value]
                words = [word(x) if isinstance(x, str) else x for x in several]
                out[name] = few.get(name, words if several is value else words[0])
        return out
    return dataclasses.replace(one, prepare=[word(text) for text in one.prepare], common=flags(one.common),
                               rows={row: flags(given) for row, given in one.rows.items()})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """({public model: folder of an untrained one}, {public set: file of a few rows of a shared set})."""
    if not SHARED.exists():
        pytest.skip("needs the shared sets")
    root = tmp_path_factory.mktemp("world")
    gsm8k = [row for row in convert.rows("openai/gsm8k", str(SHARED / "gsm8k" / "test.jsonl"))
             if len(row["prompt"]) < 300][:6]
    questions = [row | {"grader": "final_letter"}
                 for row in read_lines(SHARED / "medqa" / "test.jsonl") if len(row["prompt"]) < 500][:6]
    asked = [{"prompt": row["instruction"], "answer": "x", "grader": "exact"}
             for row in read_lines(SHARED / "instructions" / "instructions.jsonl")[:6]]
    files = {}
    for name, rows in (("gsm8k", gsm8k), ("questions", questions), ("asked", asked)):
        files[name] = root / f"{name}.jsonl"
        files[name].write_text("".join(map(convert.line, rows)))
    medical = ("GBaker/MedQA-USMLE-4-options", "TsinghuaC3I/MedXpertQA", "openlifescienceai/medmcqa",
               "UCSC-VLAA/MedReason", "FreedomIntelligence/Medical-R1-Distill-Data",
               "UCSC-VLAA/m23k-tokenized")
    sources = dict.fromkeys([*convert.SETS, "Neph0s/CoSER"], files["gsm8k"])
    sources |= dict.fromkeys(medical, files["questions"])
    sources |= dict.fromkeys(["google/IFEval", "nvidia/Nemotron-Post-Training-Dataset-v1"], files["asked"])
    tok = scratch.tokenizer([row["prompt"] for row in [*gsm8k, *questions, *asked]], 400)
    models = {}
    for seed, name in enumerate(recipe.SHAPES):
        models[name] = tiny(root / name.replace("/", "-"), scratch.model(tok, seed, 32, 2), tok, scale=2)
    return models, sources


FEW = dict(steps=2, batch=4, max_new_tokens=6, warmup=1, save_every=0, eval_every=1, eval_rollouts=2,
           lora_rank=2, top_k=4, sample_batch=8)


@pytest.mark.parametrize("name", OURS)
def test_a_dress_rehearsal_runs_from_the_data_to_the_table(name, world, tmp_path, monkeypatch, capsys):
    one = substituted(OURS[name], *world, FEW)

    def in_this_process(command, *_):
        if command[0] == "-m":
            importlib.import_module(command[1]).main(command[2:])
        else:
            opd.main(command[1:])
    monkeypatch.setattr(recipes, "run_child", in_this_process)
    folder = tmp_path / "out" / "seed0"
    recipes.run_seed(one, folder, 0, "full", 1, recipes.threading.Event())
    tables.write_recipe(name, one, tmp_path / "out", 1, "full")

    config = {row: json.loads((folder / row / "config.json").read_text()) for row in one.rows}
    for row, flags in OURS[name].rows.items():              # what the paper says reached the run
        for flag in ("method", "loss", "lr", "schedule", "support", "target", "veto_beta", "weight_decay"):
            assert flag not in flags or config[row][flag] == flags[flag], (row, flag)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert results.keys() == one.rows.keys()
    assert all(0 <= results[row][column][0] <= 100 for row in one.rows for column in one.columns)
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("|")]
    header, body = lines[0], {cells[0]: cells[1:] for cells in lines[2:]}
    assert header[-len(one.elsewhere) or len(header):] == list(one.elsewhere)
    assert body.keys() == {*one.rows, *one.expected["full"]}
    for row, cells in body.items():
        wanted = one.expected["full"].get(row, [])
        for cell, needs in zip(cells[-len(one.elsewhere):], one.elsewhere.values()):
            assert re.fullmatch(re.escape(needs) + r"( \(paper [\d.]+\))?", cell)   # no number of ours
        for cell, (score, _) in zip(cells, wanted[:len(one.columns)]):
            assert (f"({one.expected_label} {score:.1f})" in cell) if score is not None else "(" not in cell
            assert cell.startswith("not here") == (row not in one.rows)
    assert all(deviation in report for deviation in one.deviations)


@pytest.mark.parametrize("name", OURS)
def test_a_dry_run_shows_everything_and_runs_nothing(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(recipes.subprocess, "Popen", None)
    monkeypatch.chdir(tmp_path)
    recipes.main([name, "--dry_run", "--seeds", "2"])
    shown, one = capsys.readouterr().out, OURS[name]
    flat = " ".join(shown.split())
    assert not list(tmp_path.iterdir()) and not (ROOT / "runs" / name).exists()
    for row in one.rows:
        command, = [line for line in shown.splitlines() if f"/seed0/{row} --resume" in line]
        assert vars(parse(recipes.shlex.split(command)[2:], "", METHODS))["seed"] == 0
        said = re.search(rf"^{re.escape(row)}: at most ([\d.]+) h, {one.gib[row]:.0f} GiB$", shown, re.M)
        assert 0 <= float(said[1]) - recipe.hours(one, row) < 0.1       # a bound is not rounded down
    assert all(text in flat for text in (one.about, *one.deviations, *one.elsewhere.values()))
    said = int(re.search(r"2 seed\(s\): at most (\d+) h", shown)[1])
    assert 0 <= said - 2 * sum(recipe.hours(one, row) for row in one.rows) < 1


def test_the_recipes_are_complete_and_fit_the_card():
    for name, one in papers.RECIPES.items():
        assert one.gib.keys() == one.rows.keys() and max(one.gib.values()) < 76, name
        columns = len(tables.table_columns(one)) + len(one.elsewhere)
        assert all(len(cells) <= columns for cells in one.expected["full"].values())
        sources = [SET.search(word) for word in [*one.prepare, *one.common["eval_prompts"],
                                                 *sum((row["prompts"] for row in one.rows.values()), [])]]
        named = {found[0].partition(":")[0] for found in sources if found and "{dir}" not in found.string}
        assert named <= {*convert.SETS, "GBaker/MedQA-USMLE-4-options", "google/IFEval"}, name


def test_camopds_numbers_have_the_papers_averages():
    """Its table 2 prints the mean of both medical scores: a slip of the pen here would show."""
    averages = {"general teacher": 48.13, "medical teacher": 54.54, "mopd": 54.79, "Relaxed OPD": 55.03,
                "SelecTKD": 54.65, "camopd": 54.71}
    for row, cells in papers.CAMOPD_MEDICAL.expected["full"].items():
        assert (cells[0][0] + cells[1][0]) / 2 == pytest.approx(averages[row], abs=0.0151)
    roleplay = papers.CAMOPD_ROLEPLAY
    assert {*roleplay.rows} == {*roleplay.expected["full"]} - {"general teacher", "Relaxed OPD", "SelecTKD"}
    assert all(len(cells) == len(roleplay.columns) + len(roleplay.elsewhere)
               for cells in roleplay.expected["full"].values())


def test_the_list_of_recipes_on_the_page_has_their_rows_and_costs():
    page = (ROOT / "lab" / "README.md").read_text()
    for name, one in OURS.items():
        line, = re.findall(rf"^\| `{name}` .*", page, re.M)
        hours = recipes.total_cost(one).split(",")[0]
        assert line.endswith(f"| {len(one.rows)} | not run; predicted: {hours} |")
    pairs = {name: one for name, one in papers.RECIPES.items() if name not in OURS}
    costs = ", ".join(recipes.total_cost(one).split()[2] for one in pairs.values())
    assert {len(one.rows) for one in pairs.values()} == {7}
    assert re.search("^\\| " + ", ".join(f"`{name}`" for name in pairs)
                     + rf" .*\| 7 each \| not run; predicted: at most {costs} h \|$", page, re.M)


# ---- cost --------------------------------------------------------------------------------------------------

def test_the_model_of_time_gives_what_was_measured():
    """A position of 64 and 128 sequences of 640 tokens took 5.6 and 6.7 ms on a H200, which is faster."""
    small = recipe.Shape(596e6, 28, 2048, 114688)
    for rows, seconds in ((64, 5.6e-3), (128, 6.7e-3)):
        assert 1 <= recipe.written_in(small, rows, 1, 640, rows) / seconds < 1.3
    one = papers.MANY_FACES
    double = dataclasses.replace(one, evaluated=0, rows={"full": one.rows["full"] | dict(steps=2000)})
    single = dataclasses.replace(one, evaluated=0)
    assert recipe.hours(double, "full") == pytest.approx(2 * recipe.hours(single, "full"))
    assert recipe.hours(one, "full") > recipe.hours(single, "full")             # evaluation takes time too
    veto = papers.VETO_GSM8K
    assert recipe.hours(veto, "sft") < recipe.hours(veto, "opd") / 5                # no rollouts


def test_the_memory_is_what_a_rows_own_dry_run_predicts(tmp_path):
    one, ids = papers.OPSD, 151669
    words = [*scratch.SPECIAL, *map(chr, range(32, 127)), "\n"]
    words += [f"token{i}" for i in range(ids - len(words))]
    core = scratch_core(words)
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>",
                                               pad_token="<|endoftext|>", chat_template=scratch.CHATML)
    tok.save_pretrained(tmp_path / "model")
    transformers.Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, head_dim=128,
        num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=True, eos_token_id=tok.eos_token_id,
        bos_token_id=None, max_position_embeddings=40960, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(tmp_path / "model")
    row = {"prompt": "x" * (one.lengths[0] - 11), "solution": "y" * 1000, "answer": "1", "grader": "number"}
    (tmp_path / "rows.jsonl").write_text(130 * convert.line(row))
    sources = dict.fromkeys(convert.SETS, tmp_path / "rows.jsonl")
    small = substituted(one, {"Qwen/Qwen3-1.7B": tmp_path / "model"}, sources, {"micro_tokens": None})
    small.common["micro_tokens"] = one.common["micro_tokens"]
    argv = [*recipes.arguments(small, "fkl", tmp_path, 0, False), "--dry_run", "--device", "cuda"]
    argv.remove("--resume")
    parts = preflight.memory(opd.Run(opd.configure(argv)))
    peak = max(sum(sizes.get(phase, 0) for sizes in parts.values()) for phase in preflight.PHASES)
    assert peak / 2**30 == pytest.approx(one.gib["fkl"], rel=0.03)


def scratch_core(words):
    """Return a tokenizer of single characters that has all these words."""
    import tokenizers
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, " "))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return core


# ---- data --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, ending", [
    ({"question": "Q?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 1},
     f"Q?\nA. a\nB. b\nC. c\nD. d\n{camopd.CHOOSE}"),
    ({"question": "Q?", "options": '["a", "b"]', "answer": "a"}, f"Q?\nA. a\nB. b\n{camopd.CHOOSE}"),
    ({"question": "Q?", "options": '{"B": "b"}'}, f"Q?\nB. b\n{camopd.CHOOSE}"),
    ({"question": "Q?", "options": "Answer Choices:\nA. a"}, f"Q?\nAnswer Choices:\nA. a\n{camopd.CHOOSE}"),
    ({"question": "Q?", "options": "None"}, f"Q?\n{camopd.ANSWER}"),
    ({"question": "Q?", "response (content)": "secret"}, f"Q?\n{camopd.ANSWER}"),
    ({"prompt": "Q?\nA. a", "answer_letter": "A"}, f"Q?\nA. a\n{camopd.CHOOSE}")], ids=str)
def test_a_medical_prompt_is_the_papers_and_holds_no_answer(row, ending):
    assert camopd.medical(row) == {"prompt": [{"role": "system", "content": camopd.SYSTEM},
                                              {"role": "user", "content": ending}]}


def test_general_prompts_end_before_the_first_answer():
    say = lambda *roles: [{"role": role, "content": role[0]} for role in roles]
    row = {"messages": say("system", "user", "assistant", "user"), "category": "chat"}
    assert camopd.general(row) == {"prompt": say("system", "user")}
    assert camopd.general({"messages": say("system", "assistant")}) is None


def test_the_longest_conversations_are_prompts_that_nothing_learns_from(monkeypatch):
    monkeypatch.setattr(camopd, "LONGEST", 2)
    monkeypatch.setattr(camopd, "CHARACTERS", 8)
    rows = [camopd.conversation({"conversations": [
        {"from": "system", "value": "ss"}, *({"from": who, "value": f"{i}{who[0]}"} for _ in range(turns)
                                             for who in ("human", "gpt"))]})
            for i, turns in enumerate((1, 3, 2, 5))]
    found = camopd.split(rows)
    assert [row["solution"] for row in found["train"]] == ["2g", "0g"] and found["train"][0] in rows
    for row in found["prompts"]:
        assert set(row) == {"prompt"} and row["prompt"][-1]["role"] == "user"
        assert camopd.characters(row["prompt"]) == 8            # 2 + three messages of 2
    assert camopd.conversation({"conversations": [{"from": "gpt", "value": "x"}]}) is None
    with pytest.raises(Refused, match="2 conversations are too few for 2"):
        camopd.split(rows[:2])


def test_an_expert_question_has_its_letters_once():
    row = {"question": "Q?\nAnswer Choices: (A) a (B) b", "options": {"A": "a", "B": "b"}, "label": "B"}
    found = camopd.expert(row)
    assert found["prompt"].startswith("Q?\nA. a\nB. b\n")
    assert (found["answer"], found["grader"]) == ("B", "final_letter")
    with pytest.raises(Refused, match="no choice's letter"):
        camopd.expert(row | {"label": "C"})


def test_a_mixture_has_its_counts_and_depends_on_its_seed(tmp_path, prompts, capsys):
    many = prompts("many", [{"prompt": f"p{i}", "answer": "1"} for i in range(50)])
    long = prompts("long", [{"prompt": "x" * 200}, {"prompt": "y"}])

    def mixed(seed, *parts):
        mix.main([str(tmp_path / f"{seed}"), *parts, "--seed", str(seed), "--characters", "100"])
        return (tmp_path / f"{seed}" / "main.jsonl").read_text()
    parts = (f"main=5:{many}", f"main=1:{long}", f"other=2:{many}")
    one = mixed(1, *parts)
    rows = [json.loads(line) for line in one.splitlines()]
    assert len({row["prompt"] for row in rows}) == 6 and rows[-1] == {"prompt": "y"} and "row" not in rows[0]
    assert one == mixed(1, *parts) != mixed(2, *parts)
    capsys.readouterr()
    mixed(1, f"main=1:{long}")
    assert re.search("main.jsonl is there and stays as it is", capsys.readouterr().out)
    for words, message in ((f"main=2:{long}", "1 prompts of at most 100 characters.* 2 were asked for"),
                           (f"main=0:{long}", "is not NAME=COUNT:SOURCE"),
                           (f"main:{long}", "is not NAME=COUNT:SOURCE"), ("main=1:/none", "no prompt file")):
        with pytest.raises(SystemExit):
            mixed(3, words)
        assert re.search(f"data.mix: .*{message}", capsys.readouterr().err)
