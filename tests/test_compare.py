"""Evaluation by question: what eval.jsonl keeps, --eval_only, and the paired comparison of two runs."""
import itertools
import json
import math
import random
import re
import statistics
from fractions import Fraction

import numpy
import pytest
from conftest import WORD_ROWS, die_at
from test_config import EVERY_FLAG, another, said, words

import config
import opd
from config import Refused
from data.files import read_lines
from lab import compare, report

EVALS = dict(eval_temperature=1.0, eval_rollouts=3)


@pytest.fixture
def sums(tmp_path):
    """A grader that gives untrained models 0, 0.5 and 1: FILE.py:NAME."""
    path = tmp_path / "sums.py"
    path.write_text("def sums(completion, row):\n    return sum(map(ord, completion)) % 3 / 2\n")
    return f"{path}:sums"


def records(out, step=None):
    """The lines of eval.jsonl, or those of an evaluation after so many steps."""
    return [r for r in read_lines(out / "eval.jsonl") if step is None or r["step"] + 1 == step]


def without_step(lines):
    return [{name: x for name, x in line.items() if name != "step"} for line in lines]


def leave(folder, **sets):
    """Make a folder with an evaluation: sets of rewards per question, which are called 0, 1, .."""
    folder.mkdir()
    lines = [{"step": -1, "set": name, "row": i + 1, "question": str(i), "rewards": rewards,
              "lengths": [1] * len(rewards), "cut": [False] * len(rewards), "unread": [False] * len(rewards)}
             for name, some in sets.items() for i, rewards in enumerate(some)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# ---- eval.jsonl --------------------------------------------------------------------------------------------

def test_every_question_of_every_evaluation_is_kept(start, prompts, sums):
    """In the order of the prompts; the mean of metrics.jsonl is that of the rewards, digit by digit."""
    rows = [*WORD_ROWS, {"prompt": "add 1 2>", "answer": "3", "grader": "number"}]
    run = start(eval_prompts=[f"a={prompts('a', rows)}", f"b={prompts('b')}"], eval_every=1,
                grader=sums, **EVALS)
    opd.train(run)
    lines = read_lines(run.out / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval" in line] == [-1, 0, 1]
    for line in lines:
        for name, count in (("a", 6), ("b", 5)):
            some = [r for r in records(run.out, line["step"] + 1) if r["set"] == name]
            assert [r["row"] for r in some] == list(range(1, count + 1))
            rewards = [reward for r in some for reward in r["rewards"]]
            assert len(rewards) == 3 * count and sum(rewards) / len(rewards) == line["eval"][name]
    every = records(run.out)
    assert {reward for r in every for reward in r["rewards"]} == {0, 0.5, 1}
    assert len({r["question"] for r in every}) == 6                     # b's are five of a's six
    for r in every:
        assert len(r["lengths"]) == len(r["cut"]) == len(r["unread"]) == 3
        assert all(length == 6 for length, cut in zip(r["lengths"], r["cut"]) if cut)


def test_a_completion_is_cut_or_ends_and_is_read_or_not(start, prompts, monkeypatch):
    row = {"prompt": "add 1 2>", "answer": "3", "grader": "number"}
    run = start(eval_prompts=[f"a={prompts('a', [row])}"], eval_temperature=1.0, eval_rollouts=4, steps=1)
    stop = run.student.stops[0]
    texts = [run.student.encode_completion(text) for text in ("3", "4", "a")]
    assert all(ids[-1] == stop for ids in texts)
    texts.append(texts[0][:-1])                                         # "3", without an end
    monkeypatch.setattr(run, "complete", lambda model, prompts, *how: [
        (opd.torch.tensor(ids), opd.torch.zeros(len(ids))) for ids in texts])
    run.folder.take()
    assert run.evaluate() == {"a": 0.5}
    assert without_step(records(run.out)) == [{
        "set": "a", "row": 1, "question": records(run.out)[0]["question"], "rewards": [1, 0, 0, 1],
        "lengths": [2, 2, 2, 1], "cut": [False, False, False, True], "unread": [False, False, True, False]}]


def test_what_was_asked_is_known_by_its_content(start, prompts, tmp_path):
    """Another path or another order changes nothing, another answer or another grader does."""
    seven = {"prompt": "add 3 4>", "answer": "7"}
    of = {}
    for name, rows in (("a", [seven]), ("other", [*WORD_ROWS, seven]), ("answer", [seven | {"answer": "8"}]),
                       ("grader", [seven | {"grader": "number"}]),
                       ("prompt", [seven | {"prompt": "add 4 3>"}])):
        run = start(eval_prompts=[f"e={prompts(name, rows)}"], steps=1)
        opd.train(run)
        of[name] = records(run.out, 1)[-1]["question"]
    assert of["a"] == of["other"] and len(set(of.values())) == 4


def test_two_students_are_kept_apart(start, prompts, sums):
    run = start(method="opcod", eval_prompts=[f"e={prompts('e')}"], grader=sums, steps=2)
    opd.train(run)
    assert [r["set"] for r in records(run.out, 0)] == ["1/e"] * 5 + ["2/e"] * 5
    last = read_lines(run.out / "metrics.jsonl")[-1]
    for name in ("1/e", "2/e"):
        some = [r["rewards"][0] for r in records(run.out, last["step"] + 1) if r["set"] == name]
        assert sum(some) / 5 == last["eval"][name]


def test_a_resumed_run_has_every_evaluation_once(start, prompts, sums, monkeypatch):
    """The evaluation after step 2 is of a step that the checkpoint does not have yet."""
    flags = EVALS | dict(eval_prompts=[f"e={prompts('e')}"], eval_every=1, steps=4, save_every=1, grader=sums)
    whole = start(**flags)
    opd.train(whole)
    run = start(**flags)
    monkeypatch.setattr(opd, "update", die_at(opd.update, 2))
    with pytest.raises(KeyboardInterrupt):
        opd.train(run)
    monkeypatch.undo()
    late = records(run.out)[-1] | {"step": 3}
    with open(run.out / "eval.jsonl", "a") as file:                    # as a kill between two lines leaves it
        file.write(json.dumps(late) + "\n")
    opd.train(start(**flags, out=run.out, resume=True))
    assert records(run.out) == records(whole.out) and len(records(run.out)) == 25


# ---- --eval_only -------------------------------------------------------------------------------------------

@pytest.fixture
def evaluation(argv, prompts, sums):
    """evaluation(flag=value, ..) -> a command line that only evaluates."""
    def build(**flags):
        ours = dict(teachers=[], prompts=[], steps=[], batch=[], eval_only=True, grader=sums,
                    eval_prompts=[f"e={prompts('e')}"], **EVALS)
        return argv(**ours | flags)
    return build


def test_a_trained_model_scores_what_its_run_said(start, evaluation, prompts, sums, tmp_path, capsys):
    """Every completion alike: weights that do not learn compute as those that do."""
    run = start(eval_prompts=[f"e={prompts('e')}"], lr=1e-2, grader=sums, **EVALS)
    opd.train(run)
    out = tmp_path / "only"
    capsys.readouterr()
    opd.main(evaluation(student=run.out / "final", out=out))
    assert without_step(records(out)) == without_step(records(run.out, 2))
    assert records(out) != records(run.out, 0)
    mean = read_lines(run.out / "metrics.jsonl")[-1]["eval"]["e"]
    assert read_lines(out / "metrics.jsonl") == [{"step": -1, "eval": {"e": mean}}]
    assert f"eval e {mean:.3f}" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {".lock", "config.json", "eval.jsonl", "metrics.jsonl",
                                                     "report.md"}
    text = (out / "report.md").read_text()
    assert text.startswith(f"# {run.out.name}/final: evaluation\n") and "| 0 | e | 5 | " in text


def test_an_evaluation_is_done_when_its_report_is_there(evaluation, tmp_path, prompts, models):
    out = tmp_path / "only"
    opd.main(evaluation(out=out))
    files = lambda: {path.name: path.read_text() for path in out.iterdir()}
    before = files()
    assert "holds a run already" in said(evaluation(out=out))
    opd.main(evaluation(out=out, resume=True))
    assert files() == before
    other = prompts("other", WORD_ROWS[1:])
    for flags, message in ((dict(student=models / "b"), "another content of student"),
                           (dict(eval_prompts=[f"e={other}"]), "another content of e"),
                           (dict(eval_prompts=[f"f={other}"]), "another content of e, f would"),
                           (dict(eval_temperature=0.5), "another eval_temperature"),
                           (dict(seed=1), "another seed")):
        assert message in said(evaluation(out=out, resume=True, **flags))
    assert files() == before
    (out / "report.md").unlink()
    opd.main(evaluation(out=out, resume=True))
    assert {"eval.jsonl.old", "report.md"} <= files().keys()
    assert files()["eval.jsonl"] == before["eval.jsonl"] and len(records(out)) == 5


def test_an_evaluation_has_one_student(evaluation, models):
    assert said(evaluation(student=[models / "a", models / "b"])).startswith(
        "opd.py: --eval_only has one --student; evaluate each")


def test_trainings_and_evaluations_do_not_continue_each_other(start, argv, evaluation):
    run = start(steps=1)
    opd.train(run)
    assert "would be another experiment" in said(evaluation(out=run.out, resume=True))
    opd.main(evaluation(out=run.out.parent / "only"))
    assert "would be another experiment" in said(argv(out=run.out.parent / "only", resume=True))


@pytest.mark.parametrize("name", [name for name in EVERY_FLAG if name not in config.EVALUATION])
def test_what_is_of_training_has_no_effect_on_an_evaluation(name):
    line = ["--student", "a", "--eval_prompts", "e", "--device", "cpu", "--eval_only"]
    opd.configure(line)
    assert not config.EVALUATION & {"lr", "steps", "batch", "loss", "method", "temperature", "eval_every"}
    flag = EVERY_FLAG[name]
    value = another(flag) or "x"
    given = [] if flag.type is bool else value if isinstance(value, list) else [value]
    with pytest.raises(Refused, match=f"^--{name} has no effect with --eval_only$"):
        opd.configure([*line, f"--{name}", *given])


def test_an_evaluation_needs_no_memory_of_training(start, evaluation):
    run = opd.Run(opd.configure(evaluation(dtype="bfloat16")))
    assert run.learners == run.students and not hasattr(run.student, "optimizers")
    assert {p.dtype for p in run.student.net.parameters() if p.ndim > 1} == {opd.torch.bfloat16}
    assert not any(p.requires_grad for p in run.student.net.parameters())


# ---- the numbers of a report -------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_subsets_with_a_right_completion():
    """Chen et al., 2107.03374, equation 1: of all subsets of k completions. A reward of 0.5 is not right."""
    for n in range(1, 7):
        for rewards in itertools.product((1, 0.5, 0), repeat=n):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(rewards, k))
                share = sum(1 in subset for subset in subsets) / len(subsets)
                assert report.pass_at(k, rewards) == pytest.approx(share)


def test_the_interval_is_wilsons_for_right_and_wrong():
    z = 1.96
    for right, n in ((0, 3), (5, 10), (1, 7), (40, 40), (500, 1319)):
        low, high = report.interval([1] * right + [0] * (n - right))
        for end in (low, high):                                         # where |p - end| is z standard errors
            assert (right / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)
        assert low <= right / n <= high and high - low > 0
    assert report.interval([1] * 5 + [0] * 5) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert report.with_interval([0] * 10) == "0.0 [0.0, 27.8]"                          # not -0.0


def test_the_interval_covers_the_mean_of_questions_with_several_completions():
    """In 95 of 100 samples of 60 questions, of which each has a difficulty and four completions."""
    rng, covered, widths = random.Random(0), 0, []
    for _ in range(400):
        values = []
        for _ in range(60):
            p = rng.choice((0.1, 0.5, 0.9))
            values.append(sum(rng.random() < p for _ in range(4)) / 4)
        low, high = report.interval(values)
        covered += low <= 0.5 <= high
        widths.append(high - low)
    assert 0.92 <= covered / 400 <= 0.98
    assert statistics.mean(widths) < 0.24                               # of 60 single completions: 0.25


def test_the_report_has_means_pass_at_k_and_what_went_wrong(tmp_path):
    out = leave(tmp_path / "run", a=[[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], b=[[0.5], [1]])
    lines = read_lines(out / "eval.jsonl")
    lines[0] |= {"cut": [True, True, False, False], "unread": [False, True, True, True]}
    (out / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [
        *lines, *(line | {"step": step} for line in lines for step in (0, 6))]))
    table = report.answers_table(report.read_answers(out)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["after step", "set", "questions", "mean", "pass@1", "pass@2", "pass@4", "cut",
                       "unread"]
    assert [row[0] for row in rows[2:]] == ["0", "0", "7", "7"]           # the first and the last evaluation
    a, b = rows[2], rows[3]
    assert [cell.partition(" ")[0] for cell in a[2:7]] == ["3", "41.7", "41.7", "50.0", "66.7"]
    assert a[7:] == ["2 of 12", "3 of 12"] and b[7:] == ["0 of 2", "0 of 2"]
    assert [cell.partition(" ")[0] for cell in b[2:7]] == ["2", "75.0", "50.0", "", ""]
    binary = leave(tmp_path / "binary", a=[[1], [0]])
    assert "pass@1" not in report.answers_table(report.read_answers(binary))        # it is the mean
    (binary / "eval.jsonl").write_text('{"step": 1, "set": "a"}\n')
    with pytest.raises(Refused, match="eval.jsonl has a line that is no record of a question"):
        report.read_answers(binary)


# ---- the comparison ----------------------------------------------------------------------------------------

def test_mcnemars_test_is_the_sum_over_all_ways_to_divide_the_questions():
    for n in range(9):
        for only_a in range(n + 1):
            ways = [sum(way) for way in itertools.product((0, 1), repeat=n)]
            extreme = sum(abs(2 * way - n) >= abs(2 * only_a - n) for way in ways)
            assert compare.mcnemar(only_a, n - only_a) == pytest.approx(extreme / 2**n), (only_a, n)
    assert compare.mcnemar(0, 10) == 2 / 1024
    tail = sum(math.comb(3000, i) for i in range(1401))
    assert compare.mcnemar(1400, 1600) == pytest.approx(float(Fraction(2 * tail, 2**3000)))


def test_the_bootstraps_interval_is_that_of_the_mean():
    rng = numpy.random.default_rng(1)
    x = rng.choice([-1.0, 0.0, 0.0, 1.0, 1.0], size=400)
    low, high = compare.bootstrap(x)
    half = 1.96 * x.std() / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.01)
    x = rng.normal(size=50)
    assert compare.bootstrap(x) == compare.bootstrap(x)                 # from one seed
    assert compare.bootstrap([0.25] * 9) == (0.25, 0.25)


def test_a_comparison_is_paired():
    """A difference that every question shows is certain, however much the questions differ."""
    a, b = [[0.0, 0.5], [0.5, 0.5], [0.0, 0.0]], [[0.5, 1.0], [1.0, 1.0], [0.5, 0.5]]
    found = compare.compare(a, b)
    assert (found["a"], found["b"], found["difference"]) == (0.25, 0.75, 0.5)
    assert found["interval"] == (0.5, 0.5)
    assert "p" not in found                                             # two completions are no pair
    found = compare.compare([[1], [1], [0], [0.5], [0]], [[1], [0], [1], [1], [0.9]])
    assert found["only"] == (1, 2) and found["p"] == 1.0 and found["difference"] == pytest.approx(0.28)


def run_compare(capsys, *argv):
    compare.main(list(map(str, argv)))
    return capsys.readouterr().out


def test_two_runs_are_compared_and_drawn(tmp_path, capsys, monkeypatch):
    a = leave(tmp_path / "a", x=[[1], [0], [0], [0], [0], [0], [0]], only_a=[[1]], y=[[1, 0]])
    b = leave(tmp_path / "b", x=[[1], [1], [1], [1], [1], [1], [1]], y=[[1, 1]])
    figures = []
    monkeypatch.setattr(compare, "save_figure", lambda plt, figure, path: figures.append((figure, path)))
    text = run_compare(capsys, a, b, "--out", tmp_path / "c.png")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["x"][1:5] == ["7", "14.3", "100.0", "+85.7"] and rows["x"][-3:] == ["0", "6", "0.0312"]
    assert rows["y"][1:5] == ["1", "50.0", "100.0", "+50.0"] and "only_a" not in rows
    assert f"A: {a} after step 0" in text and str(tmp_path / "c.png") in text
    (figure, path), = figures
    axis, = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["x", "y"]
    assert axis.get_title() == f"B: {b}\nminus A: {a}" and "points" in axis.get_xlabel()
    drawn = [container[0].get_xdata()[0] for container in axis.containers]
    assert drawn == pytest.approx([600 / 7, 50])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run_compare(capsys, a, b)
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_a_run_is_compared_with_its_own_evaluation(start, evaluation, prompts, sums, tmp_path, capsys):
    """From another file with the same questions: nothing differs, and --step finds the start."""
    run = start(eval_prompts=[f"e={prompts('e')}"], lr=1e-2, steps=3, grader=sums, **EVALS)
    opd.train(run)
    opd.main(evaluation(student=run.out / "final", out=tmp_path / "only",
                        eval_prompts=[f"e={prompts('copy')}"]))
    _, ours = compare.answers(run.out)
    assert compare.answers(tmp_path / "only") == (0, ours) and compare.answers(run.out, 0)[1] != ours
    text = run_compare(capsys, run.out, tmp_path / "only", "--out", tmp_path / "c.png")
    assert f"A: {run.out} after step 3" in text and re.search(r" \+0\.0 +\[\+0\.0, \+0\.0\]", text)


@pytest.mark.parametrize("sets, argv, message", [
    (dict(x=[[1], [1], [0]]), [],
     "x: a and b were asked different questions, first in row 3, 2 and 3 in all"),
    (dict(z=[[1], [1]]), [], "no set is in both: a has x, b has z"),
    (dict(x=[[1], [1]]), ["--step", "5"], "a was not evaluated after step 5, only after: 0"),
    (dict(x=[[1], [1]]), ["--step", "-1"], "--step: -1 is not at least 0"),
    (dict(), [], "b has no evaluation in an eval.jsonl"), (dict(x=[[1]]), ["c"], "unrecognized arguments: c"),
    (dict(x=[[1], [1]]), ["--out", "none/c.png"], "No such file or directory: 'none/c.png'")], ids=str)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys, monkeypatch, sets, argv, message):
    monkeypatch.chdir(tmp_path)
    leave(tmp_path / "a", x=[[1], [0]])
    leave(tmp_path / "b", **sets)
    with pytest.raises(SystemExit) as stop:
        compare.main(["a", "b", *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))
