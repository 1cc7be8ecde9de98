"""Methods that learn from preferences: DPO, and two that make their pairs in rounds, APT and SAI-DPO."""
import copy
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from conftest import WORD_ROWS, die_at, gradients, metrics, parameters
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

import opd
from config import Refused
from data.files import read_lines
from methods import apt, dpo, sai_dpo
from models import average_values

ROOT = Path(__file__).parent.parent
PAIRS = [{"prompt": "rev abc>", "chosen": "cba", "rejected": "abc"},
         {"prompt": "last q>", "chosen": "q", "rejected": "xy"}]
GRADED = [{key: row[key] for key in ("prompt", "answer")} for row in WORD_ROWS]
TOPICS = [row | {"topic": topic} for row, topic in zip(WORD_ROWS, ("word", "word", "sum", "word", "sum"))]
ROUNDS = {"apt": dict(method="apt"),                                # the methods with rounds, and their flags
          "sai_dpo": dict(method="sai_dpo", cluster_field="solution", rollouts=2, drawn=1.0)}


def moved(run):
    """A run whose student is no longer its reference."""
    with torch.no_grad():
        for p in run.student.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return run


def gradient(run):
    """The gradient of the first step."""
    [job] = next(run.jobs())
    opd.backward(run, job, opd.weigh([job])[0])
    found = gradients(run.student)
    run.student.net.zero_grad()
    return found


def scripted(run, *calls):
    """A run whose samples are these, call by call: {prompt: [(text, reward), ..]}; one call more fails."""
    calls = iter(calls)

    def sample(model, rows, n=None):
        said = next(calls)
        return [run.fixed(row, run.student.encode_completion(text), text, float(reward))
                for row in rows for text, reward in said[row["prompt"]]]
    run.sample = sample
    return run


def logged(run):
    """What metrics.jsonl says of a run, but for what differs between machines and moments."""
    return [{name: x for name, x in line.items() if name not in ("seconds", "memory_gib")}
            for line in read_lines(run.out / "metrics.jsonl")]


@pytest.fixture
def unreported(monkeypatch):
    """Drawing the report of a run takes longer than the run."""
    monkeypatch.setattr(opd, "lab", lambda *which: None)


@pytest.fixture
def every_second_is_right(monkeypatch):
    """What the graders say: tiny models know nothing."""
    verdicts = itertools.cycle([0.0, 1.0])
    monkeypatch.setattr(opd, "grade", lambda *args: next(verdicts))


# ---- dpo: the loss -----------------------------------------------------------------------------------------

def double(run):
    teacher = run.self_teacher(run.student)
    for model in (run.student, teacher):
        model.net.double()
        model.dtype = torch.float64
    teacher.values = {p: value.double() for p, value in teacher.values.items()}
    return run


def by_hand(run, beta, smoothing=0.0, ipo=False):
    """The loss by autograd on the logits of transformers itself, and what metrics.jsonl should show of it."""
    def log_prob_T(net, prompt, text):
        ids, answer = run.student.encode(prompt), run.student.encode_completion(text)
        logp = torch.log_softmax(net(torch.tensor([ids + answer])).logits[0, :, :run.student.vocab], -1)
        return torch.stack([logp[len(ids) - 1 + t, i] for t, i in enumerate(answer)])

    reference, ratio = run.self_teacher(run.student), {"chosen": [], "rejected": []}
    for row in PAIRS:
        for side in ratio:
            with torch.no_grad(), reference.on_device():
                anchor_T = log_prob_T(reference.net, row["prompt"], row[side])
            ratio_T = log_prob_T(run.student.net, row["prompt"], row[side]) - anchor_T
            ratio[side].append(ratio_T.sum() / (len(ratio_T) if ipo else 1))
    chosen, rejected = (torch.stack(ratio[side]) for side in ("chosen", "rejected"))
    h = chosen - rejected
    loss = (h - 1 / (2 * beta)) ** 2 if ipo else (
        -(1 - smoothing) * logsigmoid(beta * h) - smoothing * logsigmoid(-beta * h))
    means = dict(dpo_loss=loss, margin=beta * h, preferred=(h > 0).double(), reward_chosen=beta * chosen,
                 reward_rejected=beta * rejected)
    return loss.mean(), {name: x.mean().item() for name, x in means.items()}


@pytest.mark.parametrize("kind, loss", [
    ("frozen", {}), ("snapshot", {}), ("snapshot", {"smoothing": 0.2}), ("snapshot", {"ipo": True})])
def test_the_gradient_of_dpo_is_that_of_its_loss(start, prompts, kind, loss):
    """Sums or means over tokens, the mean over pairs, beta in both places: against autograd in float64."""
    flags = {"dpo_smoothing" if name == "smoothing" else name: value for name, value in loss.items()}
    run = moved(double(start(method="dpo", prompts=[prompts("p", PAIRS)], self_teacher=kind, dpo_beta=0.3,
                             batch=2, **flags)))
    ours, noted = gradient(run), dict(run.notes)
    expected, means = by_hand(run, 0.3, **loss)
    expected.backward()
    exact = gradients(run.student)
    assert abs(means["margin"]) > 1e-3 and (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    lengths = dict(pairs=2, length_chosen=(4 + 2) / 2, length_rejected=(4 + 3) / 2)
    assert noted == lengths | {name: pytest.approx(x, rel=1e-5) for name, x in means.items()}


# Log-probabilities of the tokens of two pairs, by the student and by the reference ..
STUDENT = {"chosen": [[-0.5, -1.25, -2.0], [-3.0]], "rejected": [[-2.5, -0.75], [-0.5, -1.0, -0.25, -1.5]]}
REFERENCE = {"chosen": [[-1.0, -1.5, -2.25], [-1.0]], "rejected": [[-2.0, -0.25], [-1.25, -1.5, -1.0, -2.0]]}
# .. and what TRL 1.16.0 makes of them in float64, with beta 0.3: the loss, and its derivative by the
# log-probability of every token of chosen 1, chosen 2, rejected 1, rejected 2
FROM_TRL = {
    "sigmoid": (1.0089982609248804,
                [-0.05315155406613068, -0.11911944422985789, 0.05315155406613068, 0.11911944422985789]),
    "ipo": (9.55642361111111,
            [-0.27777777777777785, -4.291666666666667, 0.41666666666666674, 1.0729166666666667])}
TRL_REWARDS = dict(reward_chosen=-0.15, reward_rejected=0.225, preferred=0.5, margin=-0.375)


@pytest.mark.parametrize("kind", FROM_TRL)
def test_losses_and_slopes_of_known_log_probs_are_those_of_trl(start, kind):
    run = start(method="dpo")
    row = run.prompts["main"][0]
    sides = {side: [run.fixed(row, [5] * len(lp), "") for lp in STUDENT[side]] for side in STUDENT}
    tensors = lambda values: [torch.tensor(lp_T) for lp_T in values["chosen"] + values["rejected"]]

    def score(jobs):
        jobs[0].lp, jobs[0].lq = tensors(STUDENT), tensors(REFERENCE)
    run.score = score
    job = dpo.preference_job(run, None, sides["chosen"] + sides["rejected"],
                             list(zip(sides["chosen"], sides["rejected"])), 0.3, ipo=kind == "ipo")
    loss, slopes = FROM_TRL[kind]
    assert run.notes["dpo_loss"] == pytest.approx(loss, rel=1e-9)
    for weight_T, slope in zip(opd.weigh([job])[0], slopes, strict=True):   # the weight is that of -log p
        assert weight_T.tolist() == pytest.approx([-slope] * len(weight_T), rel=1e-9)
    if kind == "sigmoid":                               # for IPO TRL logs sums, while its loss is of means
        assert {name: run.notes[name] for name in TRL_REWARDS} == pytest.approx(TRL_REWARDS)


@pytest.fixture
def trl_trainer(tmp_path):
    """trl_trainer(run, loss_type) -> TRL's trainer of a run's student, with the run's start as reference."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="optional: pip install trl")
    from datasets import Dataset

    def make(run, kind):
        args = trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.3, loss_type=kind, report_to="none",
                             use_cpu=True, bf16=False, gradient_checkpointing=False)
        return trl.DPOTrainer(copy.deepcopy(run.student.net), args=args, processing_class=run.student.tok,
                              ref_model=AutoModelForCausalLM.from_pretrained(run.student.path),
                              train_dataset=Dataset.from_list(PAIRS))
    return make


@pytest.mark.parametrize("kind, flags", [("sigmoid", {}), ("ipo", {"ipo": True})])
def test_the_loss_and_the_gradient_of_dpo_are_those_of_trl(start, prompts, trl_trainer, kind, flags):
    """Its tokens, too: the same EOS is learned behind the same texts, and no token of a prompt."""
    run = moved(start(method="dpo", prompts=[prompts("p", PAIRS)], batch=2, dpo_beta=0.3, **flags))
    trainer = trl_trainer(run, kind)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    exact = gradients(SimpleNamespace(net=trainer.model))
    ours = gradient(run)
    assert run.notes["dpo_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    if kind == "sigmoid":
        names = dict(reward_chosen="chosen", reward_rejected="rejected", preferred="accuracies",
                     margin="margins")
        for ours, theirs in names.items():
            assert [run.notes[ours]] == pytest.approx(trainer._metrics["eval"][f"rewards/{theirs}"], rel=1e-4)


@pytest.mark.parametrize("kind", FROM_TRL)
def test_the_numbers_from_trl_are_still_those_of_trl(start, trl_trainer, kind):
    trainer = trl_trainer(start(method="dpo"), kind)
    rows = STUDENT["chosen"] + STUDENT["rejected"]
    mask = torch.tensor([[0] + [1] * len(row) + [0] * (4 - len(row)) for row in rows])

    def saying(values):
        """A model whose tokens have these log-probabilities."""
        lp = torch.tensor([row + [0.0] * (4 - len(row)) for row in values["chosen"] + values["rejected"]],
                          dtype=torch.float64, requires_grad=True)
        none = torch.zeros_like(lp)
        said = SimpleNamespace(log_probs=lp, entropy=none, mean_logits=none, is_top1=none > 0)
        return lp, lambda **how: said
    lp, student = saying(STUDENT)
    trainer.ref_model = saying(REFERENCE)[1]
    loss = trainer.compute_loss(student, dict(input_ids=mask, attention_mask=mask, completion_mask=mask))
    loss.backward()
    assert loss.item() == pytest.approx(FROM_TRL[kind][0], rel=1e-12)
    assert lp.grad[:, 0].tolist() == pytest.approx(FROM_TRL[kind][1], rel=1e-12)


# ---- dpo: the pairs ----------------------------------------------------------------------------------------

def test_dpo_learns_to_prefer_the_chosen_and_its_reference_stays_or_is_renewed(start, prompts, unreported):
    flags = dict(method="dpo", prompts=[prompts("p", PAIRS)], batch=2, steps=6, lr=3e-3)
    fixed, renewed = start(**flags), start(**flags, renew_every=2)
    anchor = [value.clone() for value in average_values(fixed.student)]
    for run in (fixed, renewed):
        opd.train(run)
    margins = [line["margin"] for line in metrics(fixed)]
    assert margins[0] == 0 and margins[-1] > max(margins[1], 0.1) and metrics(fixed)[-1]["preferred"] == 1
    assert all(torch.equal(a, b) for a, b in zip(anchor, average_values(fixed.student), strict=True))
    assert [line["margin"] == 0 for line in metrics(renewed)] == [True, False] * 3


def test_dpo_makes_pairs_of_graded_rollouts_and_counts_prompts_without_one(start, prompts):
    """The first correct and the first wrong rollout, of scores in between the best and the worst."""
    rows = [{"prompt": f"copy {letter}>", "answer": letter} for letter in "abcdefg"]
    run = start(method="dpo", rollouts=3, prompts=[prompts("g", rows + PAIRS)])
    scores = [(0, 1, 0), (1, 1, 0), (0.5, 0.25, 0.75), (1, 1, 1), (0, 0, 0), (0.5, 0.5, 0.5), (0, 0, 0)]
    scripted(run, {row["prompt"]: [(text, score) for text, score in zip("xyz", three)]
                   for row, three in zip(rows, scores)})
    rollouts, pairs = dpo.preferences(run, run.prompts["main"])
    assert [(chosen.text, rejected.text) for chosen, rejected in pairs] == [
        ("cba", "abc"), ("q", "xy"), ("y", "x"), ("x", "z"), ("z", "y")]
    assert all(a.prompt is b.prompt for a, b in pairs) and len(rollouts) == 2 * 2 + 3 * 7
    assert run.notes["skipped"] == {"all correct": 1, "all wrong": 2, "all of the same score": 1}


def test_dpo_reads_only_the_rollouts_that_are_paired(start, prompts, monkeypatch):
    """Seven of eight rollouts of a prompt teach nothing; reading them would cost the most of a step."""
    run = start(method="dpo", rollouts=4, batch=2, steps=1, prompts=[prompts("g", GRADED)])
    rewards = iter([0, 1, 0, 1, 1, 1, 1, 1])
    monkeypatch.setattr(opd, "grade", lambda *args: float(next(rewards)))
    [job] = next(run.jobs())
    assert [gap_T is not None for gap_T in job.gaps] == [True, True] + [False] * 6
    assert job.weights[0] == -job.weights[1] == -0.05 and not any(job.weights[2:])


def test_dpo_refuses_what_can_make_no_pair_and_settings_without_an_effect(start, prompts):
    same = PAIRS + [{"prompt": "last q>", "chosen": "q", "rejected": "q"}]
    with pytest.raises(Refused, match=r"same.jsonl:3: its chosen and rejected texts are the same") as refused:
        start(method="dpo", prompts=[prompts("same", same)])
    assert "\n" not in str(refused.value)
    with pytest.raises(Refused, match="needs --rollouts of at least 2"):
        start(method="dpo", rollouts=1, prompts=[prompts("g", GRADED)])
    with pytest.raises(Refused, match='no "chosen" or "answer", which --method dpo needs'):
        start(method="dpo", prompts=[prompts("p", [{"prompt": "last q>"}])])
    with pytest.raises(Refused, match="--renew_every needs --self_teacher snapshot"):
        start(method="dpo", renew_every=2, self_teacher="frozen")
    with pytest.raises(Refused, match="--dpo_smoothing has no effect with --ipo"):
        start(method="dpo", dpo_smoothing=0.1, ipo=True)


def test_dpo_step_without_a_pair_changes_nothing_but_is_logged(start, prompts, monkeypatch, unreported):
    run = start(method="dpo", rollouts=2, steps=1, optimizer="sgd", weight_decay=0.0,
                prompts=[prompts("g", GRADED)])
    monkeypatch.setattr(opd, "grade", lambda *args: 0.0)
    before = parameters(run.student)
    opd.train(run)
    [line] = metrics(run)
    assert torch.equal(parameters(run.student), before) and line["pairs"] == line["kept"] == 0
    assert line["skipped"] == {"all wrong": 4}
    assert json.loads((run.out / "config.json").read_text())["dpo_beta"] == 0.1


# ---- rounds ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ROUNDS)
def test_the_reference_and_the_pairs_are_of_the_student_at_the_start_of_the_round(
        start, every_second_is_right, unreported, method):
    """The margin is 0 while the student is its reference, and it writes in the first step of a round."""
    run = start(**ROUNDS[method], steps=6, rounds=2, batch=5, lr=3e-3)
    opd.train(run)
    lines = metrics(run)
    assert [line["margin"] == 0 for line in lines] == [True, False, False] * 2
    assert ["round" in line for line in lines] == [True, False, False] * 2
    written = [line["sampled_tokens"] for line in lines]
    assert written[0] == written[2] < written[3] == written[5]


@pytest.mark.parametrize("method", ROUNDS)
def test_every_round_is_evaluated_and_all_have_the_same_length(start, prompts, method):
    """That general ability does not fall is APT's claim: with --eval_prompts one sees it, round by round."""
    run = start(**ROUNDS[method], steps=6, rounds=3, eval_prompts=[f"words={prompts('eval', GRADED)}"])
    opd.train(run)
    assert [line["step"] for line in logged(run) if "words" in line.get("eval", ())] == [-1, 1, 3, 5]
    with pytest.raises(Refused, match="--steps 7 is not a multiple of --rounds 3"):
        start(**ROUNDS[method], steps=7, rounds=3)
    with pytest.raises(Refused, match=f"--method {method}: its reference .* --self_teacher snapshot"):
        start(**ROUNDS[method], steps=6, rounds=3, self_teacher="frozen")


@pytest.mark.parametrize("method, verdict", [("apt", 1.0), ("sai_dpo", 1.0), ("sai_dpo", 0.0)])
def test_a_round_with_nothing_to_learn_changes_no_parameter_and_the_run_goes_on(
        start, monkeypatch, every_second_is_right, unreported, method, verdict):
    """Round 1 has pairs, round 2 none: then neither momentum nor weight decay moves the student."""
    run, after = start(**ROUNDS[method], steps=4, rounds=2, lr=1e-3, weight_decay=0.1), []
    grade, record = opd.grade, opd.record
    monkeypatch.setattr(opd, "grade", lambda *args: grade(*args) if run.state["step"] < 2 else verdict)
    monkeypatch.setattr(opd, "record", lambda *args: (after.append(parameters(run.student)), record(*args)))
    opd.train(run)
    assert [torch.equal(a, b) for a, b in zip(after, after[1:])] == [False, True, True]
    assert [line["pairs"] > 0 for line in metrics(run)] == [True, True, False, False]
    assert run.state["step"] == 4 and (run.out / "final").exists()


# ---- apt ---------------------------------------------------------------------------------------------------

def test_apt_prefers_solutions_where_the_student_errs_and_near_there(start):
    """An own answer that is the solution makes no pair, whatever the grader said of it."""
    run = start(method="apt", similar=2, batch=9, steps=4)
    rows = run.prompts["main"]
    near = [row["prompt"] for row in apt.nearest(run, rows[:2], rows[2:], 2)]
    solution = {row["prompt"]: row["solution"] for row in rows}
    scripted(run, {prompt: [(text, right)] for prompt, text, right in zip(
        solution, ("cab", "hello", "33", "q", "xyz"), (0, 0, 1, 1, 1))},
        {prompt: [("z" if i else solution[prompt], not i)] for i, prompt in enumerate(near)})
    [job] = next(run.jobs())
    pairs = list(zip(job.rollouts[:len(near)], job.rollouts[len(near):], strict=True))
    found = {rejected.prompt["prompt"]: rejected.text for _, rejected in pairs}
    assert len(near) > 1 and found == {"rev abc>": "cab"} | dict.fromkeys(near[1:], "z")
    for chosen, rejected in pairs:
        assert chosen.prompt is rejected.prompt and chosen.text == chosen.prompt["solution"]
        assert chosen.ids_T.tolist() == run.student.encode_completion(chosen.text)
        assert rejected.ids_T.tolist() == run.student.encode_completion(rejected.text)
    assert job.weights == [0.05] * len(pairs) + [-0.05] * len(pairs)            # of -log p: beta / 2
    assert run.notes["round"] == {"answered": 5, "weakness cases": 2, "similar cases": len(near),
                                  "of these wrong": len(near) - 1, "pairs": len(pairs)}


def test_similar_cases_are_the_nearest_others_by_cosine_each_once(start, prompts):
    texts = ["rev abc>", "add 07 26>", "q",
             "rev abd>", "add 07 27>", "sort cab>", "last q>", "qq", "copy hello>"]
    rows = [{"prompt": text, "answer": text, "solution": text} for text in texts]
    run = start(method="apt", steps=4, prompts=[prompts("p", rows)])

    def place(text):
        """The mean over a prompt's tokens of the states that transformers returns, of unit length."""
        ids = torch.tensor([run.student.tok(text).input_ids])
        mean_H = run.student.net(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        return mean_H / mean_H.norm()
    places = torch.stack([place(text) for text in texts]).detach()
    assert torch.allclose(apt.embed(run, rows), places, atol=1e-5)
    cosine = places[:3] @ places[3:].T
    for count in (1, 2, 6, 9):
        expected = {texts[3 + i] for row in cosine.argsort(descending=True)[:, :count].tolist() for i in row}
        found = [row["prompt"] for row in apt.nearest(run, rows[:3], rows[3:], count)]
        assert set(found) == expected and len(found) == len(expected) >= count % 9
    assert apt.nearest(run, rows[:1] * 2, rows[3:], 1) == [rows[3 + cosine[0].argmax()]]
    for nothing in ((rows, [], 2), ([], rows, 2), (rows, rows, 0)):
        assert apt.nearest(run, *nothing) == []


# ---- sai_dpo -----------------------------------------------------------------------------------------------

def test_clusters_get_shares_by_weight_and_give_their_first():
    cluster = {key: key[0] for key in ("a1", "b1", "a2", "c1", "a3", "b2", "c2", "a4")}
    chosen = lambda count, **weight: sorted(sai_dpo.choose(list(cluster), cluster, weight, count))
    assert chosen(5, a=0.6, b=0.2, c=0.2) == ["a1", "a2", "a3", "b1", "c1"]
    assert chosen(5, a=0.2, b=0.4, c=0.4) == ["a1", "b1", "b2", "c1", "c2"]
    assert chosen(1, a=0.2, b=0.1, c=0.7) == ["c1"] and chosen(0, a=1, b=1, c=1) == []
    assert chosen(4, a=0.1, b=0.1, c=0.8) == ["a1", "b1", "c1", "c2"]           # c has run out
    assert chosen(8, a=0.1, b=0.1, c=0.8) == sorted(cluster)
    assert chosen(3, a=3, b=1, c=1, d=50) == ["a1", "a2", "b1"]                 # of d there is no problem


def test_problems_are_ordered_by_pass_rate_then_steps_then_length(start, prompts):
    """Those that are all right or all wrong never enter; they are counted, and they weigh their cluster."""
    half, other_half, quarter, most = (1, 1, 0, 0), (0, 1, 0, 1), (1, 0, 0, 0), (1, 1, 1, 0)
    said = {"copy e>": ("b", quarter), "copy c>": ("bb\n\nbb", half), "copy 7>": ("b", (1, 1, 1, 1)),
            "copy b>": ("bbbbbbbb", other_half), "copy f>": ("bb", most), "copy d>": ("b\nb\nb", half),
            "copy 8>": ("b", (0, 0, 0, 0)), "copy a>": ("b", half)}     # empty lines are no steps
    run = start(method="sai_dpo", steps=4, rollouts=4, cluster_field="answer", prompts=[prompts("p", [
        {"prompt": prompt, "answer": prompt[5]} for prompt in said])])
    names = {f"main {row['row']}": row["answer"] for row in run.prompts["main"]}

    def found(drawn, cluster):
        scripted(run, {prompt: [(text, reward) for reward in rewards]
                       for prompt, (text, rewards) in said.items()})
        problems = sai_dpo.find_problems(run, 0, drawn, cluster)
        for key, ((_, text, right), (_, other, wrong)), now, first in problems:
            assert (text, mean(said[f"copy {names[key]}>"][1])) == (other, now) and now == first
            assert right == 1 and wrong == 0
        return "".join(names[key] for key, *_ in problems)
    one = dict.fromkeys(names, "the only one")
    assert [found(share, one) for share in (1.0, 0.5, 0.0)] == ["abcdef", "abc", ""]
    assert run.notes["skipped"] == {"all correct": 1, "all wrong": 1}
    two = {key: "right" if name in "abc7" else "wrong" for key, name in names.items()}
    assert found(0.5, two) == "dae" and run.notes["wrong"] == {"right": 3 / 8, "wrong": 5 / 8}
    assert run.notes["round"]["with a pair"] == 6 and run.notes["round"]["pass rate"] == 0.5


def test_clusters_and_pass_rates_are_measured_anew_in_every_round(start, prompts, unreported):
    """And the first measurement of every problem is kept."""
    run = start(method="sai_dpo", rollouts=4, steps=6, rounds=3, drawn=1.0, cluster_field="topic",
                prompts=[prompts("p", TOPICS[:4])])
    names = [row["prompt"] for row in run.prompts["main"]]          # of the topics word, word, sum, word
    scripted(run, *({name: [("x", i < right) for i in range(4)] for name, right in zip(names, counts)}
                    for counts in ((1, 0, 4, 3), (2, 4, 1, 4), (3, 0, 0, 0))))
    opd.train(run)
    lines = metrics(run)
    assert [line["wrong"] for line in lines[::2]] == [
        {"sum": 0, "word": 2 / 3}, {"sum": 0.75, "word": 1 / 6}, {"sum": 1, "word": 0.75}]
    assert [line["pass_rate"] for line in lines] == [0.5, 0.5, 0.375, 0.375, 0.75, 0.75]
    assert [line["pass_rate_at_first"] for line in lines] == [0.5, 0.5, 0.625, 0.625, 0.25, 0.25]
    assert [line["pairs"] for line in lines] == [2, 2, 2, 2, 1, 1]


def test_sai_dpo_refuses_rows_without_their_cluster_and_a_single_rollout(argv, prompts):
    path = prompts("topics", TOPICS[:2] + WORD_ROWS[2:])
    with pytest.raises(SystemExit) as refused:
        opd.main(argv(method="sai_dpo", steps=4, cluster_field="topic", prompts=[path]))
    assert str(refused.value).startswith(
        f'opd.py: {path}:3: no "topic", which --cluster_field topic names as its cluster (2 other rows')
    with pytest.raises(SystemExit, match="--method sai_dpo .* --rollouts must be at least 2"):
        opd.main(argv(method="sai_dpo", steps=4, rollouts=1))


def test_without_a_field_clusters_are_those_of_k_means(start, prompts, monkeypatch):
    rows = [{"prompt": prompt, "answer": "x"} for prompt in
            ("rev abcde>", "add 07 26>", "rev abcdf>", "add 07 27>", "rev abcdg>", "add 07 28>")]
    run = start(method="sai_dpo", steps=4, clusters=2, prompts=[prompts("k", rows)])
    by_text = {row["prompt"]: row for row in run.prompts["main"]}
    find = lambda count: sai_dpo.find_clusters(run, by_text, count, "")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn.cluster", None)
        with pytest.raises(Refused, match="pip install scikit-learn. or --cluster_field"):
            find(2)
    pytest.importorskip("sklearn", reason="optional: pip install scikit-learn")
    clusters = find(2)
    assert all(clusters == find(2) for _ in range(5))               # also the clusters' names
    assert clusters.keys() == by_text.keys() and len(set(clusters.values())) == 2
    assert len({(prompt[:3], name) for prompt, name in clusters.items()}) == 2      # of a verb, of a cluster
    assert len(set(find(99).values())) == 6                         # no more than there are problems


# ---- interrupted, and started again ------------------------------------------------------------------------

@pytest.mark.parametrize("method, flags", [
    ("dpo", dict(renew_every=4, rollouts=3)), ("apt", dict(rounds=2)),
    ("sai_dpo", dict(rounds=2, rollouts=3, probe=4, cluster_field="topic"))])
def test_preferences_resume_inside_a_round(start, prompts, monkeypatch, unreported, method, flags):
    """Killed in round 2, it goes on from there, from its start or from round 1, to the same last bit."""
    monkeypatch.setattr(opd, "grade", lambda grader, text, answer, row: float(sum(map(ord, text)) % 2))
    rows = PAIRS + GRADED if method == "dpo" else TOPICS
    flags = flags | dict(method=method, steps=8, batch=2, lr=1e-3, prompts=[prompts("p", rows)],
                         eval_prompts=[f"words={prompts('eval', GRADED)}"])
    whole = start(**flags)
    opd.train(whole)
    assert sum(line["pairs"] for line in metrics(whole)) > 4
    for save_every, found in ((1, 5), (2, 4), (3, 3)):
        cut = start(**flags, save_every=save_every)
        with monkeypatch.context() as patch:
            patch.setattr(opd, "update", die_at(opd.update, 5))
            with pytest.raises(KeyboardInterrupt):
                opd.train(cut)
        again = start(**flags, save_every=save_every, out=cut.out, resume=True)
        assert again.state["step"] == found
        opd.train(again)
        assert torch.equal(parameters(again.student), parameters(whole.student))
        values = zip(average_values(again.student), average_values(whole.student), strict=True)
        assert all(torch.equal(a, b) for a, b in values)
        assert logged(again) == logged(whole) and again.memory == whole.memory


def test_apt_survives_a_real_kill_inside_a_round(start, argv, unreported):
    """SIGKILL from outside, wherever the process is then, perhaps in the middle of a checkpoint."""
    flags = dict(method="apt", steps=48, rounds=2, batch=2, lr=1e-3)
    whole = start(**flags)
    opd.train(whole)
    words = argv(**flags, save_every=1)
    out = Path(words[words.index("--out") + 1])
    program = [sys.executable, str(ROOT / "opd.py"), *words]
    log = out / "metrics.jsonl"
    child = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and (not log.exists() or log.read_text().count("\n") < 28):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and 26 <= read_lines(log)[-1]["step"] < 47   # round 2: 24 to 47
    done = subprocess.run([*program, "--resume"], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    ends = [load_file(folder / "final" / "model.safetensors") for folder in (out, whole.out)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert logged(SimpleNamespace(out=out)) == logged(whole)


def test_more_steps_for_a_run_with_rounds_would_be_another_experiment(start, prompts):
    """Its rounds would be longer: the pairs of an old round would pass for those of a new one."""
    flags = dict(method="apt", prompts=[prompts("g", WORD_ROWS)], batch=2)
    run = start(**flags, steps=2)
    opd.train(run)
    with pytest.raises(Refused, match="--resume with another steps"):
        start(**flags, steps=4, out=run.out, resume=True)


def test_one_cluster_for_all_problems_is_said(start, prompts, capsys):
    rows = [row | {"topic": "words"} for row in GRADED]
    next(start(method="sai_dpo", prompts=[prompts("g", rows)], cluster_field="topic").jobs())
    assert "all problems are in one cluster, so only their difficulty selects" in capsys.readouterr().out


def test_a_single_problem_with_a_pair_is_trained_on(start, prompts, monkeypatch):
    """Half of one, rounded to an even number, is none."""
    run = start(method="sai_dpo", prompts=[prompts("g", GRADED[:2])], rollouts=2, batch=2, rounds=1,
                cluster_field="prompt", steps=1)
    rewards = iter([0, 1, 1, 1])
    monkeypatch.setattr(opd, "grade", lambda *args: float(next(rewards)))
    next(run.jobs())
    assert run.notes["round"]["drawn"] == run.notes["pairs"] == 1
    with pytest.raises(Refused, match="--clusters has no effect with --cluster_field"):
        start(method="sai_dpo", prompts=[prompts("g", GRADED)], cluster_field="prompt", clusters=3)
