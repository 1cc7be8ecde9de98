"""Diagnosis: its numbers are those of the gradients that train, and to measure changes nothing."""
import json
import math

import pytest
import torch
from conftest import gradients, parameters

import opd
from data import diagnosis, tables
from data.files import read_lines
from data.recipes import Recipe
from methods import METHODS, selected, top_gap_mass


@pytest.fixture
def two(models, prompts):
    """Flags of a run with two branches and two teachers."""
    rows = [{"prompt": f"{verb} {x}>"} for verb in ("rev", "copy", "add", "sort") for x in ("ab", "cde")]
    files = [f"first={prompts('first', rows[:4])}", f"second={prompts('second', rows[4:])}"]
    return dict(teachers=[f"first={models / 'wide'}", f"second={models / 'b'}"], prompts=files, method="mopd",
                loss="rkl", batch=8)


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
    assert found["coherence"] == 1 and found["gcg"] == found["gcg_random"] == 0 and found["norm"] == 2
    assert found["alignment"] == found["alignment_kept"] == 1 and found["noise_scale"] == 0


def test_coherence_is_the_papers():
    g = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, -1.0]])
    assert diagnosis.coherence(g @ g.T) == pytest.approx(math.hypot(3, 3) / 8)
    kept = torch.tensor([True, True, False])
    found = diagnosis.branch_numbers(g @ g.T, kept, seed=0)
    assert found["gcg"] == pytest.approx((5 / 7) / (math.hypot(3, 3) / 8) - 1) and found["kept"] == 2
    assert found["norm"] == pytest.approx(math.hypot(3, 3) / 3)
    assert found["alignment"] == pytest.approx(2 * (0 + 0 - 4) / (2 * 26))


def test_signal_and_noise_are_told_apart():
    """|mean|^2 of 8 gradients holds an eighth of the noise; the signal must not, and B = tr(cov) / |G|^2."""
    g = torch.Generator().manual_seed(0)
    signals, scales = [], []
    for _ in range(300):
        rows = torch.randn(8, 50, generator=g, dtype=torch.float64) + 0.3
        found = diagnosis.branch_numbers(rows @ rows.T, torch.ones(8, dtype=torch.bool), 0)
        signals.append(found["signal"])
        scales.append(found["signal"] * found["noise_scale"])
    assert sum(signals) / 300 == pytest.approx(50 * 0.09, rel=0.05)
    assert sum(scales) / 300 == pytest.approx(50, rel=0.05)


def test_pairs_and_their_error():
    g = torch.Generator().manual_seed(1)
    dots, errors = [], []
    for _ in range(400):
        a, b = (torch.randn(n, 5, generator=g, dtype=torch.float64) + shift
                for n, shift in ((6, 1.0), (9, -0.5)))
        norms = [x.mean(0).norm().item() for x in (a, b)]
        found = diagnosis.pair_numbers(a @ b.T, norms)
        assert found["dot"] == pytest.approx((a.mean(0) @ b.mean(0)).item())
        assert found["cosine"] == pytest.approx(found["dot"] / norms[0] / norms[1])
        dots.append(found["dot"])
        errors.append(found["dot_error"])
    dots = torch.tensor(dots)
    assert dots.mean().item() == pytest.approx(-2.5, rel=0.1)
    assert sum(errors) / 400 == pytest.approx(dots.std().item(), rel=0.25)


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


def test_a_sparse_gradient_keeps_dot_products(monkeypatch):
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(3, 64, 64, generator=g)
    a, b = ([p + torch.randn(64, 64, generator=g) for p in shared] for _ in range(2))
    exact = [diagnosis.sparse(x, 2) for x in (a, b)]
    assert len(exact[0]) == 3 * 64 * 64 and torch.equal(exact[0], torch.cat([p.flatten() for p in a]))
    monkeypatch.setattr(diagnosis, "LARGEST", 8 * 3 * 64 * 64 // 4)
    few = [diagnosis.sparse(x, 2) for x in (a, b)]
    assert len(few[0]) == pytest.approx(3 * 64 * 64 / 5, rel=0.01)              # 4 would keep to columns: odd
    assert (few[0] @ few[1]).item() == pytest.approx((exact[0] @ exact[1]).item(), rel=0.1)


# ---- they are of the gradients that train ------------------------------------------------------------------

@pytest.mark.parametrize("loss", ["pg", "rkl"])
def test_gradients_of_single_rollouts_add_up_to_the_methods(start, two, loss):
    run = start(**two | dict(method="camopd", loss=loss, mass=["first=0.5", "second=0.7"],
                             scale=["first=3", "second=0.5"]))
    learn = [p for p in run.student.net.parameters()]
    rollouts = run.sample(run.student, run.draw())
    for job in selected(run, rollouts):
        measured = opd.measure(run, job, learn, len(rollouts))
        flat = lambda some: torch.cat([g.flatten().double() for g in some])
        rows, kept = measured.gradients_ND.double(), measured.kept_N
        assert 0 < kept.sum() < len(rows)
        close = dict(rtol=0, atol=1e-5 * rows.abs().max().item())
        torch.testing.assert_close(rows.mean(0), flat(measured.mean), **close)
        scale = run.cfg.scale[job.rollouts[0].prompt["branch"]]
        torch.testing.assert_close(scale * rows[kept].mean(0), flat(measured.step), **close)
        for weights, expected in ((opd.weigh([job])[0], flat(measured.step)),
                                  ([torch.ones_like(r.gap_T) / len(r.ids_T) / len(rows)
                                    for r in job.rollouts], rows.mean(0))):
            opd.backward(job, weights, run.cfg)
            torch.testing.assert_close(gradients(run.student), expected, **close)
            run.student.net.zero_grad()


def test_every_method_that_can_be_diagnosed_is(start, two, models):
    able = [name for name, method in METHODS.items() if method.jobs]
    assert able == [name for name, method in METHODS.items() if "diagnose_every" in method.flags]
    for name in able:
        teachers = [models / "wide"] if name == "opd" else two["teachers"]
        run = start(**two | dict(method=name, teachers=teachers, diagnose_every=1, diagnose_rollouts=5))
        found = opd.diagnose(run)
        assert list(found["branches"]) == ["first", "second"] and list(found["pairs"]) == ["first, second"]
        for b in found["branches"].values():
            assert b["rollouts"] == 5 and 1 <= b["kept"] <= 5 and 0 < b["coherence"] <= 1
        assert list(found["steps"]) == ["first", "second", "first+second"]
        assert all(found["steps"][name]["change"][name] < 0 for name in found["branches"])
    one = opd.diagnose(start(prompts=[two["prompts"][0].partition("=")[2]], diagnose_every=1))
    assert one["pairs"] == {} and list(one["steps"]) == ["main"]


def test_without_a_gap_there_is_nothing_to_see(start, two, models):
    """As CaMOPD starts: the student is its domain's teacher, whose branch has no gradient at all."""
    run = start(**two | dict(teachers=two["teachers"][:1] + [f"second={models / 'a'}"], loss="pg",
                             diagnose_every=1))
    found = opd.diagnose(run)
    second = found["branches"]["second"]
    assert second["norm"] == second["coherence"] == 0 and second["gcg"] is second["alignment"] is None
    assert second["deciles"] is None and found["pairs"]["first, second"]["cosine"] is None
    assert found["steps"]["second"] == {"step": 0, "change": {"first": 0, "second": 0}}
    json.dumps(found, allow_nan=False)


def test_the_last_layers_only(start, two):
    run = start(**two)
    last = diagnosis.watched(run.student, 1)
    assert {id(p) for p in last} == {id(p) for p in run.student.body.layers[-1].parameters()}
    assert len(diagnosis.watched(run.student, 0)) == len(list(run.student.net.parameters()))
    run.cfg.diagnose_every, run.cfg.diagnose_layers = 1, 1
    seen = []
    measure = opd.measure
    opd.measure, (few, whole) = lambda *args: seen.append(measure(*args)) or seen[-1], (None, None)
    try:
        few = opd.diagnose(run)
        run.cfg.diagnose_layers = 0
        whole = opd.diagnose(run)
    finally:
        opd.measure = measure
    assert seen[0].gradients_ND.shape[1] == sum(p.numel() for p in last)
    assert all(p.requires_grad and p.grad is None for p in run.student.net.parameters())
    every = list(run.student.net.parameters())
    at = [torch.zeros_like(p, dtype=torch.bool) | any(p is q for q in last) for p in every]
    picked = seen[2].gradients_ND[:, torch.cat([x.flatten() for x in at])]
    assert torch.allclose(picked, seen[0].gradients_ND, atol=1e-6 * picked.abs().max().item())
    assert few["branches"]["first"]["kept"] == whole["branches"]["first"]["kept"]


# ---- the step of the optimizer -----------------------------------------------------------------------------

OPTIMIZERS = ("adamw", "muon", "sgd")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("grad_clip", [0, 0.5])
def test_a_trial_step_is_the_step(start, two, optimizer, grad_clip):
    """From a fresh optimizer the first real step has no momentum: it must be the one that is foretold."""
    run = start(**two | dict(optimizer=optimizer, grad_clip=grad_clip, lr=1e-3, weight_decay=0))
    learn = list(run.student.net.parameters())
    rollouts = run.sample(run.student, run.draw("first"))
    job, = METHODS["mopd"].jobs(run, rollouts)
    measured = opd.measure(run, job, learn, len(rollouts))
    found = diagnosis.trial_steps(run.student, learn, {"it": measured.step}, {"loss": measured.mean}, 1e-3,
                                  grad_clip)["it"]
    before = parameters(run.student)
    opd.update(run, [job], opd.weigh([job]))
    delta = parameters(run.student) - before
    assert found["step"] == pytest.approx(delta.norm().item(), rel=1e-3)
    mean = torch.cat([g.flatten().double() for g in measured.mean])
    assert found["change"]["loss"] == pytest.approx((delta @ mean).item(), rel=1e-3)
    assert found["change"]["loss"] < 0


def test_a_scale_moves_sgd_and_is_nothing_to_adam_and_muon(start, two):
    for optimizer, ratio in (("sgd", 2), ("adamw", 1), ("muon", 1)):
        run = start(**two | dict(optimizer=optimizer, grad_clip=0, lr=1e-3))
        learn = list(run.student.net.parameters())
        direction = [torch.randn_like(p) for p in learn]
        steps = diagnosis.trial_steps(run.student, learn, {
            "once": direction, "twice": [2 * g for g in direction]}, {}, 1e-3, 0)
        assert steps["twice"]["step"] / steps["once"]["step"] == pytest.approx(ratio, rel=1e-3), optimizer


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


def test_diagnoses_are_due_and_survive_a_restart(start, two, argv):
    flags = two | dict(steps=4, save_every=2, diagnose_every=3)
    whole = start(**flags)
    opd.train(whole)
    of = lambda run: [(line["step"], line["diagnosis"]) for line in read_lines(run.out / "metrics.jsonl")
                      if "diagnosis" in line]
    assert [step for step, _ in of(whole)] == [-1, 2, 3]                    # at the end too
    cut = start(**flags)
    record = cut.record

    def stop_after_three(*args):
        record(*args)
        if cut.state["step"] == 3:
            raise KeyboardInterrupt

    cut.record = stop_after_three
    with pytest.raises(KeyboardInterrupt):
        opd.train(cut)
    again = opd.Run(opd.configure([*argv(**flags, out=cut.out), "--resume"]))
    opd.train(again)
    assert of(again) == of(whole)


def test_flags_without_effect_are_refused(argv):
    said = lambda **flags: pytest.raises(SystemExit, opd.configure, argv(**flags)).value.code
    assert "--diagnose_layers has no effect without --diagnose_every" in said(diagnose_layers=1)
    assert "--diagnose_rollouts has no effect without" in said(diagnose_rollouts=4)
    assert "--diagnose_every has no effect on --method seqkd; it is for: opd, mopd, camopd" in said(
        method="seqkd", diagnose_every=2)
    assert "--diagnose_rollouts: 1 is not at least 2" in said(diagnose_every=1, diagnose_rollouts=1)


def test_mass_of_one_is_diagnosed_as_if_it_were_the_papers(start, two):
    run = start(**two | dict(method="camopd", mass=["first=1", "second=0.5"]))
    for job, mass in zip(selected(run, run.sample(run.student, run.draw())), (0.8, 0.5)):
        measured = opd.measure(run, job, list(run.student.net.parameters()), 8)
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
    lines = [{"step": -1, "eval": {"x": 0.0}}, {"step": 0, "branch": "b", "loss": 1.0, "eval": {"x": score},
                                                "seconds": {"update": 3.0}, "sampled_tokens": 5}]
    for i, found in enumerate(diagnoses):
        lines[min(i, 1)]["diagnosis"] = found
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_differences_are_paired_by_seed(tmp_path, capsys):
    """Means of 0.5 and 0.6 with a spread of 0.2 say nothing; seed by seed they do."""
    for seed, (base, ours) in enumerate(((0.3, 0.38), (0.5, 0.6), (0.7, 0.82))):
        leave(tmp_path / f"seed{seed}" / "base", base)
        leave(tmp_path / f"seed{seed}" / "ours", ours)
    leave(tmp_path / "seed1" / "other", 0.4)
    tables.write_recipe("pairs", recipe(), tmp_path, 3, "full")
    text = (tmp_path / "report.md").read_text()
    assert "| ours - base | +10.0 ± 5.0 | +10.0 ± 5.0 |" in text         # 4.303 x 2 / sqrt(3)
    assert "| other - base | -10.0 | -10.0 |" in text              # one seed has no interval
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
    found = opd.diagnose(start(**two, diagnose_every=1))
    later = json.loads(json.dumps(found))
    later["pairs"]["first, second"] |= {"dot": -6.0, "dot_error": 2.0, "cosine": -0.25}
    later["branches"]["first"] |= {"rollouts": 8, "kept": 2, "gcg": None}
    leave(tmp_path / "seed0" / "base", 0.1, [found, later])
    leave(tmp_path / "seed0" / "ours", 0.1)
    tables.write_recipe("pairs", recipe(differences={}), tmp_path, 1, "full")
    text = (tmp_path / "report.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| base | -0.25"))
    assert line.split(" | ")[1:5] == ["-0.25", "-3", "25", "none"] and "| ours | -0" not in text
