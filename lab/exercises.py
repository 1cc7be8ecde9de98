"""Exercises: on-policy distillation in ten functions, in the order in which one learns it.

    python -m lab.exercises FILE.py         writes the exercises: texts and empty functions
    python -m lab.exercises FILE.py         once it is there, says what each function that you filled lacks

The solutions are this project's own code, and the texts say where it is. p is the student with logits z, q
the teacher with logits w, y the sampled token; N tokens, T tokens of one completion, V vocabulary entries.
"""
import argparse
import inspect
import math
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                # read when triton is imported

from config import Parser, Refused, first_line
from data.files import write_file
from losses import divergence

EXERCISES = {}                      # name -> (the empty function, the check of a filled one)
HEAD = '''"""Fill in the functions, then: python -m lab.exercises THIS_FILE"""
import torch
import triton
import triton.language as tl

from methods import Job
'''


def expect(has, what):
    """Refuse a function without a property."""
    if not has:
        raise Refused(what)


def exercise(check):
    """Register an empty function with its check: a function of the filled one that refuses what it lacks."""
    def register(function):
        EXERCISES[function.__name__] = function, check
        return function
    return register


def logits(*shape, seed=0):
    """Return random logits in float64."""
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(x, y, within=1e-8):
    """Return whether two tensors, or lists of numbers, have the same shape and nearly the same values."""
    x, y = (torch.as_tensor(value, dtype=torch.float64) for value in (x, y))
    return x.shape == y.shape and torch.allclose(x, y, atol=within, rtol=within)


def gradient(loss_of, z):
    """Return the gradient of a sum of losses with respect to z."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(loss_of(z).sum(), z)[0]


# ---- the loss ----------------------------------------------------------------------------------------------

def check_reverse_kl(f):
    z, w = logits(5, 7), logits(5, 7, seed=1)
    even, uneven = torch.zeros(1, 2).double(), torch.tensor([[0.0, math.log(3)]]).double()
    expect(same(f(z, z), torch.zeros(5)), "it is 0 for every token where both distributions are the same")
    expect(same(f(z + 3, w - 2), f(z, w)), "a constant on all logits of a token changes nothing")
    expect(same(f(even, uneven), [math.log(4 / 3) / 2]),
           "of p = (1/2, 1/2) and q = (1/4, 3/4) it is log(4/3) / 2: the student's probabilities weigh")
    expect(same(f(z, w), divergence(z, w, "rkl")), "it is a sum over the vocabulary, in nats")


@exercise(check_reverse_kl)
def reverse_kl(z_NV, w_NV):
    """Return KL(p || q) of every token, [N]: what on-policy distillation minimises.

    Ours: losses.py, `rkl` and `divergence`.
    """


def check_completion_log_probs(f):
    lp_TV = logits(8, 5).log_softmax(-1)
    found = f(lp_TV, torch.tensor([1, 0, 4, 3, 0, 0, 0, 0]), 2, 0)
    expect(len(found) > 2, "EOS counts, too: who is never trained on it never ends")
    expect(len(found) < 4, "nothing counts behind the completion's first EOS: the padding is EOS as well")
    expect(same(found, [lp_TV[1, 4], lp_TV[2, 3], lp_TV[3, 0]], 1e-5),
           "row t predicts token t + 1, so the prompt's last row predicts the completion's first token")
    expect(same(f(lp_TV, torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]), 2, 0), [lp_TV[1, 0]], 1e-5),
           "a completion may be nothing but EOS")
    expect(len(f(lp_TV, torch.tensor([1, 2, 3, 4, 1, 2, 3, 4]), 2, 0)) == 6, "a completion may be cut")


@exercise(check_completion_log_probs)
def completion_log_probs(lp_TV, ids_T, prompt_length, eos):
    """Return log p(y) of a completion's tokens from the model's log-probabilities at every position.

    ids_T is a prompt, a completion that ends with `eos` unless it was cut, and padding, which is `eos`, too.
    Ours: models.py, `hidden_states`; sampler.py.
    """


def check_jeffreys(f):
    lp, lq = logits(9).log_softmax(-1), logits(9, seed=1).log_softmax(-1)
    value, slope = f(lp, lq)
    expect(same(value, (lp.exp() - lq.exp()) * (lp - lq)), "the values sum to KL(q || p) + KL(p || q)")
    expect(same(slope, gradient(lambda lp: (lp.exp() - lq.exp()) * (lp - lq), lp)),
           "the slope is the value's derivative for lp, where p = exp(lp) moves, too")


@exercise(check_jeffreys)
def jeffreys(lp_V, lq_V):
    """Return (value, slope) of every entry of KL(q || p) + KL(p || q): what it adds, and d value / d log p.

    With the slope every divergence has one gradient: dz = slope - p sum(slope). Ours: losses.py.
    """


def check_drift(f):
    z = logits(9)
    p, keep = z.softmax(-1), z >= z.topk(3).values[-1]
    found = f(p, keep)
    expect(found.abs().max() > 1e-3, "it is not 0: sum p (lp - lq) over a part moves although p = q")
    expect(same(found.sum(), 0), "no gradient can move all logits alike")
    expect(found[keep].min() > 0 > found[~keep].max(), "a step against it takes mass from the kept entries")
    expect(same(found, gradient(lambda z: divergence(z[None], logits(1, 9), "rkl", support="student_raw",
                                                     top_k=3), z)), "it is the gradient of the kept mass")


@exercise(check_drift)
def drift_of_raw_top_k(p_V, keep_V):
    """Return the gradient of sum over kept entries of p (log p - log q) for the student's logits at p = q.

    The teacher is reached, and should leave the student alone. "The Many Faces of OPD", 2605.11182. Ours:
    losses.py, `mass_slope`.
    """


# ---- the policy gradient -----------------------------------------------------------------------------------

def check_sampled_loss(f):
    z, w = logits(6), logits(6, seed=1)
    p = z.softmax(-1)
    expected = lambda lp_of: gradient(lambda z: sum(p[y] * lp_of(z)[y] for y in range(6)), z)
    found = expected(lambda z: [f(z.log_softmax(-1)[y], w.log_softmax(-1)[y]) for y in range(6)])
    expect(found.abs().max() > 1e-6,
           "its expected gradient is not 0, as that of lp - lq is: A = lq - lp is a constant, y's advantage")
    truth = gradient(lambda z: divergence(z[None], w[None], "rkl"), z)
    expect(not same(found, -truth), "a step against its gradient makes y likelier where the teacher likes it")
    expect(same(found, truth), "its gradient, averaged over y ~ p, is that of KL(p || q)")


@exercise(check_sampled_loss)
def sampled_loss(lp, lq):
    """Return a loss of one sampled token, from log p(y) and log q(y), with the gradient of KL(p || q).

    That is, on average over y ~ p. CaMOPD, 2605.27115, eq. 2. Ours: losses.py, `policy_gradient_weight`.
    """


def check_importance(f):
    found = f(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.25, -2.0]), 0.5, 2.0)
    expect(same(found[0], 1), "it is 1 where the sampler is what is trained")
    expect(same(found[1], math.exp(0.25), 1e-6), "it is p as it is trained over p as it was sampled")
    expect(same(found[2], 0), "outside the bounds it is 0: the token is left out, not clipped")


@exercise(check_importance)
def importance(lp_T, sampler_lp_T, low, high):
    """Return the importance weight of tokens whose sampler is not quite the student that is trained.

    Ours: losses.py, `importance_weight`.
    """


# ---- the batch ---------------------------------------------------------------------------------------------

def check_selection(f):
    score = torch.tensor([1.0, 4.0, 0.0, 3.0, 2.0]).double()
    kept = lambda mass: f(score, mass).nonzero()[:, 0].tolist()
    expect(kept(0.4) == [1], "0.4 of 10 is what the largest holds")
    expect(kept(0.6) == [1, 3], "it takes the largest first, and one more where the mass is not reached")
    expect(f(score, 1.0).all(), "1 keeps every rollout")
    expect(f(torch.zeros(3).double(), 0.8).all(), "where nobody has a gap, nobody is left out")


@exercise(check_selection)
def selection(score_B, mass):
    """Return which rollouts are kept, boolean [B]: the fewest, largest first, that hold `mass` of all scores.

    CaMOPD, 2605.27115, eq. 8. Ours: methods/camopd.py, `top_gap_mass`.
    """


def check_token_weights(f):
    weights = f([2, 5, 3], [True, True, False])
    expect([len(w_T) for w_T in weights] == [2, 5, 3], "every token has a weight")
    expect(not torch.as_tensor(weights[2]).any(), "what was not selected has weight 0")
    expect(same(sum(weights[0]), sum(weights[1])), "a long rollout counts as much as a short one")
    expect(same(sum(map(sum, weights)), 1),
           "it is a mean over all that is selected: then it does not matter how micro-batches cut the batch")


@exercise(check_token_weights)
def token_weights(lengths, selected):
    """Return the weights of the tokens of every rollout, a list of lists or tensors [T].

    lengths: tokens of each rollout; selected: whether it counts. Ours: opd.py, `weigh`.
    """


def check_method(f):
    asked = []
    run = SimpleNamespace(
        student="student", teacher="teacher", objective="objective", steps=lambda: iter(range(3)),
        draw=lambda: f"prompts {len(asked)}",
        sample=lambda model, prompts: asked.append((model, prompts)) or [f"rollout {len(asked)}"])
    found = list(f(run))
    expect(len(found) == 3, "it yields once in every step")
    expect(asked == [("student", f"prompts {i}") for i in range(3)], "the student writes, on new prompts")
    expect(all(isinstance(jobs, list) and len(jobs) == 1 for jobs in found), "it yields a list with one Job")
    for number, (job,) in enumerate(found, 1):
        expect((job.learner, job.teacher, job.objective) == ("student", "teacher", "objective"),
               "the student learns from the teacher, with the run's objective")
        expect(job.rollouts == [f"rollout {number}"], "it learns from what it has just written")


@exercise(check_method)
def method(run):
    """Write on-policy distillation as a method: a generator that yields the Jobs of every step.

    It uses run.steps(), run.draw(), run.sample(model, prompts), run.student, run.teacher, run.objective and
    Job(learner, teacher, rollouts, objective). Ours: methods/on_policy.py.
    """


# ---- the kernel --------------------------------------------------------------------------------------------

def check_log_partition(f):
    z = torch.cat([logits(4, 1000), logits(1, 1000) + 500]).float()
    z = z.cuda() if torch.cuda.is_available() else z
    found = f(z).double().cpu()
    expect(found.isfinite().all(), "logits may be 500: the maximum is subtracted before exp")
    expect(same(found, z.double().cpu().logsumexp(-1), 1e-5),
           "it is log sum exp over all of a row, also where V is not a multiple of the block")


@exercise(check_log_partition)
def log_partition(z_NV):
    """Return log sum exp of every row, [N] in float32, by a Triton kernel that reads each logit once.

    One program works on a row in blocks, with a running maximum: where it moves, the sum so far is rescaled.
    Without a GPU Triton interprets the kernel. Ours: kernels/rows_triton.py, `shifted`.
    """


# ---- the command line --------------------------------------------------------------------------------------

def verdict(name, function):
    """Return what is said of a function: "right", "empty", or the property that it lacks."""
    empty, check = EXERCISES[name]
    if not callable(function) or function.__code__.co_code == empty.__code__.co_code:
        return "empty"
    try:
        check(function)
    except Refused as error:
        return f"not yet: {error}"
    except (Exception, SystemExit) as error:            # whatever a function of somebody's own raises
        return f"not yet: {type(error).__name__}: {first_line(error)}"
    return "right"


def main(argv=None):
    """Write the exercises, or check a file of them. The exit status is 0 when all of them are right."""
    parser = Parser(prog="python -m lab.exercises", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.py")
    try:
        path = parser.parse_args(argv).file
    except Refused as error:
        raise SystemExit(f"lab.exercises: {error}") from None
    try:
        if not path.exists():
            stubs = [inspect.getsource(function).partition("\n")[2] for function, _ in EXERCISES.values()]
            write_file(path, "\n\n".join([HEAD, *stubs]))
            return print(f"{path} has {len(stubs)} exercises; fill them in, then run the same command")
        found = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:            # the file does not run, or cannot be written
        raise SystemExit(f"lab.exercises: {path}: {type(error).__name__}: {first_line(error)}") from None
    verdicts = {name: verdict(name, found.get(name)) for name in EXERCISES}
    for number, (name, said) in enumerate(verdicts.items(), 1):
        print(f"{number:>2}  {name:<22}{said}")
    raise SystemExit(set(verdicts.values()) != {"right"})


if __name__ == "__main__":
    main()
