"""The exercises: the project's own code passes every check, and typical mistakes are told what they lack."""
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import opd
import pytest
import torch
from methods import Job
from methods.camopd import top_gap_mass
from methods.on_policy import opd as on_policy

from kernels import linear_logprob
from lab import exercises
from losses import DIVERGENCES, divergence, importance_weight, policy_gradient_weight

ROOT = Path(__file__).resolve().parent.parent


def completion_log_probs(lp_TV, ids_T, prompt_length, eos, cut=True):
    """The project's rows, without a model: its states are the log-probabilities, its head is the identity."""
    completion = ids_T[prompt_length:]
    ends = (completion == eos).nonzero()
    completion = completion[:ends[0] + 1] if len(ends) and cut else completion
    model = SimpleNamespace(device="cpu", dtype=torch.float64,
                            last_hidden=lambda ids_BT: lp_TV[None, :ids_BT.shape[1]])
    hidden_NH = opd.models.Model.hidden_states(model, [ids_T[:prompt_length].tolist()], [completion])
    return linear_logprob(hidden_NH, torch.eye(lp_TV.shape[1]).double(), completion)[1]["logprob_s"].double()


def token_weights(lengths, selected):
    rollouts = [SimpleNamespace(ids_T=torch.zeros(length)) for length in lengths]
    return opd.weigh([Job("student", None, rollouts, None, weights=[float(x) for x in selected])])[0]


def log_partition(z_NV):
    y = torch.zeros(len(z_NV), dtype=torch.long, device=z_NV.device)
    eye = torch.eye(z_NV.shape[1], device=z_NV.device)
    return z_NV[:, 0] - linear_logprob(z_NV, eye, y, backend="triton")[1]["logprob_s"]


def drift(p_V, keep_V):
    lp = p_V.log().requires_grad_()
    value = divergence(lp[None], lp.detach()[None], "rkl", support="student_raw", top_k=int(keep_V.sum()))
    return torch.autograd.grad(value.sum(), lp)[0]


def rescaled(policy):
    """policy_gradient_weight of a token whose sampler is the student, as a loss."""
    return lambda lp, lq: -policy((lq - lp).detach(), lp.detach(), lp.detach(), (0.5, 2.0)) * lp


OURS = dict(
    reverse_kl=lambda z, w: divergence(z, w, "rkl"), completion_log_probs=completion_log_probs,
    jeffreys=lambda lp, lq: DIVERGENCES["jeffreys"].formula(lp, lq, lp.exp(), lq.exp(), None),
    drift_of_raw_top_k=drift, sampled_loss=rescaled(policy_gradient_weight), importance=importance_weight,
    selection=top_gap_mass, token_weights=token_weights, method=on_policy, log_partition=log_partition)


def wrong_method(run):
    for _ in run.steps():
        yield [Job(run.student, run.teacher, run.sample(run.teacher, run.draw()), run.objective)]


MISTAKES = [
    ("reverse_kl", lambda z, w: divergence(z, w, "fkl"), "the student's probabilities weigh"),
    ("reverse_kl", lambda z, w: divergence(z, w, "rkl").mean(), "it is 0 for every token"),
    ("reverse_kl", lambda z, w: (z.exp() * (z - w)).sum(-1), "a constant on all logits"),
    ("completion_log_probs", lambda lp, ids, n, eos: lp[torch.arange(n - 1, len(ids) - 1), ids[n:]],
     "nothing counts behind the completion's first EOS"),
    ("completion_log_probs", lambda *of: completion_log_probs(*of)[:-1], "EOS counts"),
    ("completion_log_probs", lambda lp, ids, n, eos: completion_log_probs(lp.roll(-1, 0), ids, n, eos),
     "row t predicts token t + 1"),
    ("jeffreys", lambda lp, lq: (OURS["jeffreys"](lp, lq)[0], lp.exp() - lq.exp()), "p = exp(lp) moves"),
    ("drift_of_raw_top_k", lambda p, keep: torch.zeros_like(p), "it is not 0"),
    ("drift_of_raw_top_k", lambda p, keep: p * keep, "no gradient can move all logits alike"),
    ("sampled_loss", lambda lp, lq: lp - lq, "its expected gradient is not 0"),
    ("sampled_loss", lambda lp, lq: (lq - lp).detach() * lp, "makes y likelier"),
    ("sampled_loss", lambda lp, lq: (lp - lq).detach().exp() * lp, "is that of KL(p || q)"),
    ("importance", lambda lp, sampled, low, high: (lp - sampled).exp().clamp(low, high), "not clipped"),
    ("selection", lambda score, mass: score < mass * score.max(), "0.4 of 10"),
    ("token_weights", lambda lengths, selected: [[s / 7] * n for n, s in zip(lengths, selected)],
     "a long rollout counts as much"),
    ("token_weights", lambda lengths, selected: [[s / n] * n for n, s in zip(lengths, selected)], "a mean"),
    ("method", wrong_method, "the student writes"),
    ("log_partition", lambda z: z.exp().sum(-1).log(), "the maximum is subtracted"),
    ("log_partition", lambda z: z[:, :960].logsumexp(-1), "not a multiple of the block"),
    ("log_partition", lambda z: 1 / 0, "ZeroDivisionError")]


def test_there_is_one_solution_for_every_exercise():
    assert list(OURS) == list(exercises.EXERCISES)


@pytest.mark.parametrize("name", OURS)
def test_our_own_code_passes(name):
    assert exercises.verdict(name, OURS[name]) == "right"
    assert exercises.verdict(name, exercises.EXERCISES[name][0]) == "empty"


@pytest.mark.parametrize("name, function, lacks", MISTAKES, ids=[f"{x[0]}: {x[2]}" for x in MISTAKES])
def test_a_mistake_is_told_what_it_lacks(name, function, lacks):
    said = exercises.verdict(name, function)
    assert said.startswith("not yet: ") and lacks in said


def test_the_command_line_writes_and_checks_a_file(tmp_path):
    path = tmp_path / "mine.py"
    words = [sys.executable, "-m", "lab.exercises", str(path)]
    run = lambda: subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
    assert "10 exercises" in run().stdout
    assert run().stdout.count("empty") == 10
    path.write_text(path.read_text().replace('Ours: losses.py, `importance_weight`.\n    """', '''"""
    w_T = (lp_T - sampler_lp_T).exp()
    return w_T * (w_T > low) * (w_T < high)''') + SOLVED)
    said = run()
    assert said.returncode == 1 and [line.split()[1] for line in said.stdout.splitlines()
                                     if line.endswith("right")] == ["importance", "log_partition"]
    for wrong in ([], ["--nope"]):
        with pytest.raises(SystemExit, match="^lab.exercises: "):
            exercises.main(wrong)
    path.write_text("raise SystemExit(0)")                              # is no verdict
    with pytest.raises(SystemExit, match="^lab.exercises: .*SystemExit: 0"):
        exercises.main([str(path)])
    path.write_text("import nothing_of_that_name")
    assert "lab.exercises: " in run().stderr and "Traceback" not in run().stderr


SOLVED = """

@triton.jit
def kernel(z_ptr, out_ptr, V, BLOCK: tl.constexpr):
    z_ptr += tl.program_id(0) * V
    m, total = tl.full([], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + columns, mask=columns < V, other=-1e30)
        new = tl.maximum(m, tl.max(z, 0))
        total, m = total * tl.exp(m - new) + tl.exp(z - new), new
    tl.store(out_ptr + tl.program_id(0), m + tl.log(tl.sum(total, 0)))


def log_partition(z_NV):
    out = torch.empty(len(z_NV), device=z_NV.device)
    kernel[(len(z_NV),)](z_NV, out, z_NV.shape[1], BLOCK=256)
    return out
"""
