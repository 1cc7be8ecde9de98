"""Diagnosis: its numbers are those of the gradients that train, and to measure changes nothing."""
import functools
import itertools
import json
import math
import re

import pytest
import torch
from conftest import gradients, parameters

import opd
from config import Refused
from data import graders, small_recovery
from data.files import read_lines
from data.small_peers import walk
from lab import diagnosis, tables
from lab.recipes import Recipe
from methods import METHODS, by_branch
from methods.camopd import top_gap_mass


@pytest.fixture
def two(models, prompts):
    """Flags of a run with two branches and two teachers."""
    rows = [{"prompt": f"{verb} {x}>"} for verb in ("rev", "copy", "add", "sort") for x in ("ab", "cde")]
    files = [f"first={prompts('first', rows[:4])}", f"second={prompts('second', rows[4:])}"]
    return dict(teachers=[f"first={models / 'wide'}", f"second={models / 'b'}"], prompts=files, method="mopd",
                loss="rkl", batch=8)


def diagnose(run):
    """The diagnosis of a run at its present parameters, as the loop makes it."""
    return diagnosis.diagnose(run, functools.partial(opd.gradients, run))


def measure(run, rollouts, total):
    """What is measured of one branch's rollouts, of `total` in all, over the whole network."""
    return diagnosis.measure(run, rollouts, list(run.student.net.parameters()), total,
                             functools.partial(opd.gradients, run))


@pytest.fixture
def seen(monkeypatch):
    """What every diagnosis has measured, in order: [(branch, Measured)]."""
    found, original = [], diagnosis.measure

    def spy(run, rollouts, *rest):
        found.append((rollouts[0].prompt["branch"], original(run, rollouts, *rest)))
        return found[-1][1]
    monkeypatch.setattr(diagnosis, "measure", spy)
    return found


def flat(gradient):
    """A gradient per parameter as one vector."""
    return torch.cat([g.flatten().double() for g in gradient])


# ---- numbers from dot products -----------------------------------------------------------------------------

def test_gradients_in_common_and_with_nothing_in_common():
    """That fewer gradients are more coherent is no sign of anything: k of n orthogonal ones by sqrt(n/k)."""
    kept = torch.arange(16) < 4
    same, none = torch.ones(16, 16), torch.eye(16)
    found = diagnosis.branch_numbers(none, kept, seed=0)
    assert found["coherence"] == pytest.approx(1 / 4) and found["coherence_kept"] == pytest.approx(1 / 2)
    assert found["gcg"] == pytest.approx(1) == found["gcg_random"]
    assert found["alignment"] == found["alignment_kept"] == found["signal"] == 0
    assert found["noise_scale"] is None
    found = diagnosis.branch_numbers(4 * same, kept, seed=0)
    assert found["coherence"] == 1 and found["gcg"] == found["gcg_random"] == 0 and found["signal"] == 4
    assert found["alignment"] == found["alignment_kept"] == 1 and found["noise_scale"] == 0


def test_coherence_is_the_papers():
    g = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, -1.0]])
    assert diagnosis.coherence(g @ g.T) == pytest.approx(math.hypot(3, 3) / 8)
    kept = torch.tensor([True, True, False])
    found = diagnosis.branch_numbers(g @ g.T, kept, seed=0)
    assert found["gcg"] == pytest.approx((5 / 7) / (math.hypot(3, 3) / 8) - 1) and found["kept"] == 2
    assert found["alignment"] == pytest.approx(2 * (0 + 0 - 4) / (2 * 26))


def test_chance_is_the_mean_over_all_choices():
    g = torch.randn(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gram = g @ g.T
    pairs = map(list, itertools.combinations(range(6), 2))
    every = [diagnosis.coherence(gram[some][:, some]) for some in pairs]
    found = diagnosis.branch_numbers(gram, torch.arange(6) < 2, seed=0)
    assert (1 + found["gcg_random"]) * found["coherence"] == pytest.approx(sum(every) / 15, rel=0.03)


def test_signal_and_noise_are_told_apart(monkeypatch):
    """|mean|^2 of 8 gradients holds an eighth of the noise; the signal must not, and B = tr(cov) / |G|^2."""
    monkeypatch.setattr(diagnosis, "DRAWS", 1)                   # for chance, which is not looked at here
    g = torch.Generator().manual_seed(0)
    signals, scales = [], []
    for _ in range(300):
        rows = torch.randn(8, 50, generator=g, dtype=torch.float64) + 0.3
        found = diagnosis.branch_numbers(rows @ rows.T, torch.ones(8, dtype=torch.bool), 0)
        signals.append(found["signal"])
        scales.append(found["signal"] * found["noise_scale"])
    assert sum(signals) / 300 == pytest.approx(50 * 0.09, rel=0.05)
    assert sum(scales) / 300 == pytest.approx(50, rel=0.05)


@pytest.mark.parametrize("width, shift", [(5, 1.0), (200, 0.0)])
def test_pairs_and_their_error(width, shift, monkeypatch):
    """Where two branches have nothing in common their rows' and columns' noise must not count twice."""
    monkeypatch.setattr(diagnosis, "DRAWS", 1)
    g = torch.Generator().manual_seed(1)
    dots, errors, cosines = [], [], []
    for _ in range(400):
        a, b = (torch.randn(n, width, generator=g, dtype=torch.float64) + x
                for n, x in ((12, shift), (18, -shift)))
        of = [diagnosis.branch_numbers(x @ x.T, torch.ones(len(x), dtype=torch.bool), 0)
              | {"norm": x.mean(0).norm().item()} for x in (a, b)]
        product = (a.mean(0) @ b.mean(0)).item()
        found = diagnosis.pair_numbers(product, *of, a @ b.T)
        assert found["cosine"] == pytest.approx(product / of[0]["norm"] / of[1]["norm"])
        dots.append(product)
        errors.append(found["dot_error"])
        cosines.append(found["cosine_signal"])
    assert sum(errors) / 400 == pytest.approx(torch.tensor(dots).std().item(), rel=0.1)
    if shift:
        assert sum(dots) / 400 == pytest.approx(-width * shift**2, rel=0.05)
        assert sorted(cosines)[200] == pytest.approx(-1, rel=0.05)      # noise draws the plain one to 0


def test_gap_numbers():
    gaps = [torch.tensor([-9.0, 0.0, 0.05]), torch.tensor([0.3]), torch.tensor([20.0, -0.3])]
    found = diagnosis.gap_numbers(gaps, torch.tensor([1.0, 0.0, 3.0]))
    bins = dict(zip(["<", *diagnosis.EDGES], found["histogram"], strict=True))
    assert bins["<"] == 1 and bins[-0.1] == 2 and bins[0.25] == 1 and bins[-0.5] == 1 and bins[8] == 1
    assert sum(found["histogram"]) == 6
    assert sum(found["deciles"]) == pytest.approx(1)
    assert found["deciles"][:3] == pytest.approx([0.3 * 0.75] * 3)              # three tenths of the largest
    assert found["deciles"][7:] == pytest.approx([0] * 3)
    assert diagnosis.gap_numbers(gaps, torch.zeros(3))["deciles"] is None
    ten = torch.arange(10.0)
    assert diagnosis.gap_numbers(gaps, ten)["deciles"] == pytest.approx([i / 45 for i in range(9, -1, -1)])


def test_some_entries_keep_dot_products(monkeypatch):
    """Also where a gradient has structure that a regular grid would meet: columns, and small parameters."""
    g = torch.Generator().manual_seed(0)
    shape = [(96, 96), (96,), (7,), (30, 96)]
    shared = [torch.randn(s, generator=g) for s in shape]
    a, b = ([p + torch.randn(p.shape, generator=g) for p in shared] for _ in range(2))
    a[0][:, ::3] *= 3
    b[0][:, ::3] *= 3
    exact = [diagnosis.entries(x, 2) for x in (a, b)]
    assert torch.equal(exact[0], torch.cat([p.flatten() for p in a]))
    monkeypatch.setattr(diagnosis, "LARGEST", 4 * 2 * 3000)
    few = [diagnosis.entries(x, 2) for x in (a, b)]
    assert len(few[0]) == 3000 < len(exact[0])
    for i, j in ((0, 1), (0, 0)):
        assert (few[i] @ few[j]).item() == pytest.approx((exact[i] @ exact[j]).item(), rel=0.1)


# ---- they are of the gradients that train ------------------------------------------------------------------

@pytest.mark.parametrize("loss", ["pg", "rkl"])
def test_gradients_of_single_rollouts_add_up_to_the_methods(start, two, loss):
    """Of the Jobs that the method itself yields: their weights, and every rollout with weight 1."""
    run = start(**two | dict(method="camopd", loss=loss, schedule="mixed", mass=["first=0.5", "second=0.7"],
                             scale=["first=3", "second=0.5"]))
    jobs = next(run.jobs())
    run.score(jobs, gaps=False)
    assert [job.branch for job in jobs] == ["first", "second"]
    for job in jobs:
        measured = measure(run, job.rollouts, run.cfg.batch)
        rows, kept, scale = measured.gradients_ND.double(), measured.kept_N, run.cfg.scale[job.branch]
        assert 0 < kept.sum() < len(rows) and measured.mass == run.cfg.mass[job.branch]
        close = dict(rtol=0, atol=1e-5 * rows.abs().max().item())
        own = opd.weigh([job])[0]
        ones = [torch.ones(len(r.ids_T)) / len(r.ids_T) / len(rows) for r in job.rollouts]
        for weights, expected in ((own, scale * rows[kept].mean(0)), (ones, rows.mean(0))):
            opd.backward(run, job, weights)
            torch.testing.assert_close(gradients(run.student), expected, **close)
            run.student.net.zero_grad()
        for half in (0, 1):
            some = top_gap_mass(measured.demand_N[half::2], measured.mass)
            torch.testing.assert_close(flat(measured.means[half]), rows[half::2].mean(0), **close)
            torch.testing.assert_close(flat(measured.steps[half]), scale * rows[half::2][some].mean(0),
                                       **close)


def test_a_reward_beside_the_teacher_is_not_diagnosed(start, two, prompts):
    """A prompt that is asked more than once in a diagnosis does not bring it in."""
    def graded(**flags):
        run = start(**two | dict(loss="pg", rollouts=2, reward_weight=0) | flags)
        rollouts = run.sample(run.student, [run.prompts["first"][0]] * 4, n=1)
        for i, r in enumerate(rollouts):
            r.reward = float(i % 2)
        return measure(run, rollouts, 4).gradients_ND
    rows = [{"prompt": f"rev {x}>", "answer": x} for x in ("ab", "cde")]
    files = lambda prompts: [f"{name}={prompts(name + 'answers', rows)}" for name in ("first", "second")]
    torch.manual_seed(0)
    alone = graded(prompts=files(prompts))
    torch.manual_seed(0)
    assert torch.equal(alone, graded(prompts=files(prompts), reward_weight=50)) and alone.any()


def test_every_method_that_can_be_diagnosed_is(start, two, models):
    able = [name for name, method in METHODS.items() if "diagnose_every" in method.defaults]
    assert able == ["opd", "mopd", "camopd", "focus"]
    assert {name for name, method in METHODS.items() if method.select} <= set(able)
    for name in able:
        teachers = [models / "wide"] if name == "opd" else two["teachers"]
        run = start(**two | dict(method=name, teachers=teachers, diagnose_every=1, diagnose_rollouts=5))
        found = diagnose(run)
        assert list(found["branches"]) == ["first", "second"] and list(found["pairs"]) == ["first, second"]
        for b in found["branches"].values():
            assert b["rollouts"] == 5 and 1 <= b["kept"] <= 5 and 0 < b["coherence"] <= 1
        assert list(found["steps"]) == ["first", "second", "first+second"]
        assert all(step["step"] > 0 and step["change"].keys() == {"first", "second"}
                   for step in found["steps"].values())
    one = diagnose(start(prompts=[two["prompts"][0].partition("=")[2]], diagnose_every=1))
    assert one["pairs"] == {} and list(one["steps"]) == ["main"]


@pytest.mark.parametrize("loss", ["pg", "rkl"])
def test_without_a_gap_there_is_nothing_to_see(start, two, models, loss):
    """As CaMOPD starts: the student is its domain's teacher, whose branch has no gradient at all."""
    run = start(**two | dict(teachers=two["teachers"][:1] + [f"second={models / 'a'}"], loss=loss,
                             diagnose_every=1))
    found = diagnose(run)
    second = found["branches"]["second"]
    assert second["norm"] == second["coherence"] == 0 and second["gcg"] is second["alignment"] is None
    assert (loss == "rkl" or second["deciles"] is None) and found["pairs"]["first, second"]["cosine"] is None
    assert found["steps"]["second"] == {"step": 0, "change": {"first": 0, "second": 0}}
    json.dumps(found, allow_nan=False)


def test_the_last_layers_only(start, two, seen):
    run = start(**two)
    last = diagnosis.watched(run.student, 1)
    assert {id(p) for p in last} == {id(p) for p in run.student.body.layers[-1].parameters()}
    assert len(diagnosis.watched(run.student, 0)) == len(list(run.student.net.parameters()))
    run.cfg.diagnose_layers = 1
    few = diagnose(run)
    run.cfg.diagnose_layers = 0
    whole = diagnose(run)
    last_ND, whole_ND = seen[0][1].gradients_ND, seen[2][1].gradients_ND
    assert last_ND.shape[1] == sum(p.numel() for p in last)
    assert all(p.requires_grad and p.grad is None for p in run.student.net.parameters())
    at = [torch.zeros_like(p, dtype=torch.bool) | any(p is q for q in last)
          for p in run.student.net.parameters()]
    picked = whole_ND[:, torch.cat([x.flatten() for x in at])]
    assert torch.allclose(picked, last_ND, atol=1e-6 * picked.abs().max().item())
    assert few["branches"]["first"]["kept"] == whole["branches"]["first"]["kept"]
    assert "steps" in whole and "steps" not in few        # their clipping needs the whole gradient's norm
    with pytest.raises(Refused, match="layers 3: the student, a Qwen3ForCausalLM, has 2 layers"):
        diagnosis.watched(run.student, 3)


def test_the_layers_are_the_language_models(start):
    """Not those of the images' tower, which come first and have no gradients."""
    from transformers import AutoModelForCausalLM, Gemma3Config
    common = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2)
    net = AutoModelForCausalLM.from_config(Gemma3Config(
        text_config=dict(common, num_hidden_layers=3, vocab_size=50, num_key_value_heads=2, head_dim=16),
        vision_config=dict(common, num_hidden_layers=2, image_size=28, patch_size=14)))
    student = start().student
    student.net, student.whole_config = net, net.config
    found = {id(p) for p in diagnosis.watched(student, 2)}
    names = {name.split("layers.")[0] + name.split("layers.")[1][0]
             for name, p in net.named_parameters() if id(p) in found}
    assert names == {"model.language_model.1", "model.language_model.2"}


# ---- the step of the optimizer -----------------------------------------------------------------------------

OPTIMIZERS = ("adamw", "muon", "sgd")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("grad_clip", [0, 0.5])
def test_a_trial_step_is_the_step(start, two, optimizer, grad_clip):
    """From a fresh optimizer the first real step has no momentum: it must be the one that is foretold."""
    run = start(**two | dict(optimizer=optimizer, grad_clip=grad_clip, lr=1e-3, weight_decay=0))
    learn = list(run.student.net.parameters())
    rollouts = run.sample(run.student, run.draw("first"))
    job, = run.route(rollouts)
    run.score([job])
    gradient = opd.gradients(run, job, learn)
    found = diagnosis.trial_steps(run.student, learn, {"it": gradient}, {"loss": gradient}, 1e-3,
                                  grad_clip)["it"]
    before = parameters(run.student)
    opd.update(run, [job], opd.weigh([job]))
    delta = parameters(run.student) - before
    assert found["step"] == pytest.approx(delta.norm().item(), rel=1e-3)
    mean = torch.cat([g.flatten().double() for g in gradient])
    assert found["change"]["loss"] == pytest.approx((delta @ mean).item(), rel=1e-3)
    assert found["change"]["loss"] < 0


def test_a_trial_step_goes_on_from_the_optimizers_state(start, two):
    """AdamW's second moment as it stands, no momentum, no decay, at the peak rate during a warm-up."""
    run = start(**two | dict(lr=1e-3, grad_clip=0, warmup=100, adam_beta2=0.9, weight_decay=0.5))
    for _ in range(3):
        jobs = run.route(run.sample(run.student, run.draw()))
        run.score(jobs)
        opd.update(run, jobs, opd.weigh(jobs))
    optimizer, = run.student.optimizers
    before, state = parameters(run.student), {p: dict(s) for p, s in optimizer.state.items()}
    learn = list(run.student.net.parameters())
    g = [torch.randn_like(p) * p.std() for p in learn]
    found = diagnosis.trial_steps(run.student, learn, {"it": g}, {"loss": g}, run.cfg.lr, 0)["it"]
    delta = [-1e-3 * x / (((0.9 * state[p]["exp_avg_sq"] + 0.1 * x * x) / (1 - 0.9**4)).sqrt() + 1e-8)
             for p, x in zip(learn, g)]
    assert found["step"] == pytest.approx(math.sqrt(diagnosis.dot(delta, delta)), rel=1e-3)
    assert found["change"]["loss"] == pytest.approx(diagnosis.dot(delta, g), rel=1e-3)
    assert torch.equal(parameters(run.student), before)


def test_a_scale_moves_sgd_and_a_fresh_adam_and_muon_not_at_all(start, two):
    for optimizer, ratio in (("sgd", 2), ("adamw", 1), ("muon", 1)):
        run = start(**two | dict(optimizer=optimizer, grad_clip=0, lr=1e-3))
        learn = list(run.student.net.parameters())
        direction = [torch.randn_like(p) for p in learn]
        steps = diagnosis.trial_steps(run.student, learn, {
            "once": direction, "twice": [2 * g for g in direction]}, {}, 1e-3, 0)
        assert steps["twice"]["step"] / steps["once"]["step"] == pytest.approx(ratio, rel=1e-3), optimizer


def test_steps_are_judged_on_the_other_half(start, two, seen):
    """A step that is judged by the rollouts it comes from improves even where there is only noise."""
    run = start(**two | dict(optimizer="sgd", lr=2.0, grad_clip=0.5, mixture="3:1", diagnose_every=1))
    found = diagnose(run)
    means = {branch: [flat(half) for half in m.means] for branch, m in seen}
    directions = {"first": means["first"], "second": means["second"], "first+second": [
        0.75 * a + 0.25 * b for a, b in zip(means["first"], means["second"])]}
    for name, halves in directions.items():
        deltas = [-2 * min(1, 0.5 / g.norm().item()) * g for g in halves]
        size = sum(d.norm().item() for d in deltas) / 2
        assert found["steps"][name]["step"] == pytest.approx(size, rel=1e-3)
        for branch in means:
            change = sum((deltas[i] @ means[branch][1 - i]).item() for i in (0, 1)) / 2
            assert found["steps"][name]["change"][branch] == pytest.approx(change, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_to_measure_changes_nothing(start, two, optimizer):
    """Neither parameters, optimizer, prompts, randomness, counters nor what is written of the steps."""
    ends = []
    for every in (0, 1):
        extra = dict(diagnose_every=every, diagnose_rollouts=3) if every else {}
        run = start(**two | dict(optimizer=optimizer, method="camopd", steps=4, save_every=2) | extra)
        opd.train(run)
        lines = [{k: v for k, v in line.items() if k not in ("seconds", "memory_gib", "diagnosis")}
                 for line in read_lines(run.out / "metrics.jsonl")]
        ends.append((parameters(run.student), lines, run.state["cursor"], [o.state_dict()["state"] for o in
                                                                           run.student.optimizers]))
        diagnosed = [line["step"] for line in read_lines(run.out / "metrics.jsonl") if "diagnosis" in line]
        assert diagnosed == ([-1, 0, 1, 2, 3] if every else [])
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1:3] == ends[1][1:3]
    torch.testing.assert_close(ends[0][3], ends[1][3], rtol=0, atol=0)
    report = (run.out / "report.md").read_text()
    assert "## Diagnosis" in report and (run.out / "diagnosis.png").stat().st_size > 10_000


def test_diagnoses_are_due_and_survive_a_restart(start, two, argv, monkeypatch):
    flags = two | dict(steps=4, save_every=2, diagnose_every=3, diagnose_rollouts=3)
    whole = start(**flags)
    opd.train(whole)
    of = lambda run: [(line["step"], line["diagnosis"]) for line in read_lines(run.out / "metrics.jsonl")
                      if "diagnosis" in line]
    assert [step for step, _ in of(whole)] == [-1, 2, 3]                    # at the end too
    cut = start(**flags)
    record = opd.record

    def stop_after_three(*args):
        record(*args)
        if cut.state["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(opd, "record", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        opd.train(cut)
    monkeypatch.undo()
    again = opd.Run(opd.configure([*argv(**flags, out=cut.out), "--resume"]))
    opd.train(again)
    assert of(again) == of(whole)


def test_flags_without_effect_are_refused(argv):
    said = lambda **flags: str(pytest.raises(Refused, opd.configure, argv(**flags)).value)
    assert "--diagnose_layers has no effect without --diagnose_every" in said(diagnose_layers=1)
    assert "--diagnose_rollouts has no effect without" in said(diagnose_rollouts=4)
    assert "--diagnose_every has no effect on --method seqkd; it is for: opd, mopd, camopd" in said(
        method="seqkd", diagnose_every=2)
    assert "--diagnose_rollouts: 1 is not at least 2" in said(diagnose_every=1, diagnose_rollouts=1)


def test_mass_of_one_is_diagnosed_as_if_it_were_the_papers(start, two):
    run = start(**two | dict(method="camopd", mass=["first=1", "second=0.5"]))
    branches = by_branch(run.sample(run.student, run.draw()))
    for rollouts, mass in zip(branches.values(), (0.8, 0.5), strict=True):
        measured = measure(run, rollouts, 8)
        assert torch.equal(measured.kept_N, top_gap_mass(measured.demand_N, mass))


# ---- tables ------------------------------------------------------------------------------------------------

def recipe(**changes):
    return Recipe(**dict(
        about="Two.", prepare=[], common={}, rows={"base": {}, "ours": {}, "other": {}}, columns={"x": "X"},
        axes={"X": ("x",), "Y": ("x",)}, references=(), quick={"": {}},
        differences={"ours - base": ("ours", "base"), "other - base": ("other", "base")}) | changes)


def leave(folder, score, diagnoses=()):
    """A run that has ended with this score."""
    (folder / "final").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"device_name": "cpu", "versions": {"torch": "2"}}))
    step = {"branch": "b", "loss": 1.0, "seconds": {"update": 3.0}, "tokens": 5,
            "sampled_tokens": 5}
    lines = [{"step": -1, "eval": {"x": 0.9}}, step | {"step": 0, "eval": {"x": score / 2}},
             step | {"step": 1, "eval": {"x": score}}]
    for line, found in zip(lines, diagnoses):
        line["diagnosis"] = found
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_differences_are_paired_by_seed(tmp_path, capsys):
    """Means of 0.5 and 0.6 with a spread of 0.2 say nothing; seed by seed they do."""
    for seed, (base, ours) in enumerate(((0.3, 0.38), (0.5, 0.6), (0.7, 0.82))):
        leave(tmp_path / f"seed{seed}" / "base", base)
        leave(tmp_path / f"seed{seed}" / "ours", ours)
    leave(tmp_path / "seed1" / "other", 0.4)
    tables.write_recipe("pairs", recipe(), tmp_path, 3, "full")
    text = (tmp_path / "report.md").read_text()
    assert "| ours - base | +10.0 ± 5.0 | +7.5 ± 3.7 |" in text         # 4.303 x 2 / sqrt(3)
    assert "| other - base | -10.0, 1 of 3 seeds | -7.5, 1 of 3 seeds |" in text     # no interval
    assert json.loads((tmp_path / "results.json").read_text())["differences"]["ours - base"]["X"] == (
        pytest.approx([8, 10, 12]))
    assert "+10.0 ± 5.0" in capsys.readouterr().out and (tmp_path / "differences.png").exists()
    tables.write_recipe("pairs", recipe(differences={}), tmp_path, 3, "full")
    assert "difference" not in (tmp_path / "report.md").read_text()


def test_intervals_are_students(tmp_path):
    assert tables.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3, pytest.approx(1.963, abs=1e-3))
    assert tables.interval([2.0]) == (2, None)
    assert len(tables.T95) == 30 and list(tables.T95) == sorted(tables.T95, reverse=True)


def test_a_recipe_shows_its_runs_diagnoses(tmp_path, start, two):
    found = diagnose(start(**two, diagnose_every=1))
    later, last = (json.loads(json.dumps(found)) for _ in range(2))
    for one, cosine, kept in ((later, -0.25, 2), (last, -0.75, 4)):
        one["pairs"]["first, second"] |= {"dot": -6.0, "dot_error": 2.0, "cosine": cosine,
                                          "cosine_signal": None}
        one["branches"]["first"] |= {"rollouts": 8, "kept": kept, "gcg": 0.5, "gcg_random": 2.0,
                                     "alignment": 0.03, "alignment_kept": None, "noise_scale": 7.0}
        one["steps"]["first"] = {"step": 0.004, "change": {"first": -0.02, "second": 0}}
        one["steps"]["first+second"]["change"]["first"] = 0.005
    leave(tmp_path / "seed0" / "base", 0.1, [found, later, last])
    leave(tmp_path / "seed0" / "ours", 0.1)
    tables.write_recipe("pairs", recipe(differences={}), tmp_path, 1, "full")
    lines = (tmp_path / "report.md").read_text().splitlines()
    heading, cells = (line.strip("| ").split(" | ") for line in lines
                      if line.startswith(("| diagnosis", "| base | -")))
    shown = dict(zip(heading, cells, strict=True))
    assert [shown[key] for key in ("diagnosis", "cosine", "dot product in its errors")] == [
        "base", "-0.5", "-3"]
    assert {key[7:]: value for key, value in shown.items() if key.startswith("first: ")} == {
        "hold the mass, %": "37.5", "GCG, %": "50", "GCG beyond chance, %": "-50", "alignment, %": "3",
        "alignment of these, %": "none", "step, 1e-3": "4", "change by own step, 1e-3 nats": "-20",
        "by the mixture's": "5"}
    assert not any(line.startswith("| ours | -") for line in lines)


# ---- the recovery world ------------------------------------------------------------------------------------

def test_the_recovery_world_is_what_it_says(tmp_path):
    small_recovery.build(tmp_path, 0, generalist=400, specialist=200, prompts=64, domain_prompts=16,
                         evaluation=20)
    files = {path.stem: read_lines(path) for path in tmp_path.glob("*.jsonl")}
    assert {name: len(rows) for name, rows in files.items() if not name.startswith("eval")} == {
        "generalist": 400, "specialist": 200, "general": 64, "broad": 64, "domain": 16, "few": 2,
        "conflict": 16}
    skills = {name: {row["skill"] for row in rows} for name, rows in files.items()}
    assert skills["general"] == {"letters", "greek"} and skills["broad"] == {"letters"}
    assert skills["conflict"] == {"domain", "unmarked"} and skills["domain"] == skills["few"] == {"domain"}
    assert 2 <= sum(row["skill"] == "letters" for row in files["general"]) <= 16         # one in eight
    sides = [{row["prompt"] for name in names for row in files[name]} for names in (
        ("generalist", "specialist"), ("general", "broad", "domain", "few", "conflict"),
        [name for name in files if name.startswith("eval_")])]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert all("solution" not in row for name in ("general", "domain", "conflict") for row in files[name])
    for row in files["generalist"] + files["specialist"]:
        marked = row["skill"] in ("domain", "unmarked")
        states = walk(small_recovery.FACTS[row["skill"]], *(lambda start, *ops: (start, ops))(
            *row["prompt"].removeprefix("# ").rstrip(">").split(" ")))
        assert row["prompt"].startswith("# ") is (row["skill"] == "domain") and len(states) == 8
        said, _, end = row["solution"].partition("<answer>")
        assert end == f"{row['answer']}</answer>" and row["answer"] == states[-1]
        assert said == "".join(mark + state for mark, state in zip(re.findall("[.,:;!?]", said), states))
        assert set(re.findall("[.,:;!?]", said)) <= set(":;!?" if marked else ".,:;")
        assert graders.grade("letter_tag", row["solution"], row["answer"]) == 1
    shown = re.findall(r"^    (#? ?\w [\w ]+>) +(\S+)$", small_recovery.__doc__, re.M)
    for family, (prompt, answer) in zip(("letters", "domain"), shown, strict=True):
        start, *ops = prompt.removeprefix("# ").rstrip(">").split(" ")
        states = walk(small_recovery.FACTS[family], start, ops)
        assert re.sub("[.,:;!?]", "", answer) == f"{''.join(states)}<answer>{states[-1]}</answer>"
