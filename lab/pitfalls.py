"""What goes wrong in on-policy distillation, each in seconds on a CPU, with a picture and its numbers.

    python -m lab.pitfalls [NAME ..] [--out DIR]        # writes DIR/pitfalls.md

A function below is a section of that page: its docstring is the text, and it returns numbers and curves. A
student is a table of logits z, a teacher a table w, and the losses are the project's own. Steps are those of
plain gradient descent: AdamW divides by the gradient's size, which in a toy hides that it vanishes.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from config import Refused, first_line, nearest
from data.files import write_file
from data.monitor import repeated
from kernels import linear_logprob
from losses import DIVERGENCES, LOSSES, divergence, policy_gradient_weight, target_at

from .report import markdown_table, pyplot, save_figure


def gradient(z_NV, w_NV, name, **kind):
    """Return the gradient [N, V] of the tokens' divergences in the student's logits."""
    return torch.func.grad(lambda z: divergence(z, w_NV, name, **kind).sum())(z_NV)


def sampled_gradient(z_NV, y_N, weight_N):
    """Return the gradient [N, V] of -weight log p(y) in the student's logits."""
    z_NV = z_NV.detach().requires_grad_()
    linear_logprob(z_NV, torch.eye(z_NV.shape[-1]).to(z_NV), y_N, weight_N)[0].backward()
    return z_NV.grad


def advantage(lp_N, lq_N):
    """Return the weight of -log p(y) in the loss pg, for tokens sampled from p."""
    return policy_gradient_weight(lq_N - lp_N, lp_N, lp_N, LOSSES["pg"].importance)


def expected(z_NV, w_NV, weight=advantage):
    """Return the gradient [N, V] of -weight log p(y), the mean over y ~ p: a sum over all y, times p(y)."""
    V, lp, lq = z_NV.shape[-1], z_NV.log_softmax(-1).flatten(), w_NV.log_softmax(-1).flatten()
    y = torch.arange(V).repeat(len(z_NV))                               # all y of every token in a row
    return sampled_gradient(z_NV.repeat_interleave(V, 0), y, lp.exp() * weight(lp, lq)).view(-1, V, V).sum(1)


def descend(z, gradient_of, steps, lr):
    """Return z at the start and after every step. gradient_of(z, share of the steps that are done)."""
    path = [z]
    for step in range(steps):
        path.append(path[-1] - lr * gradient_of(path[-1], step / (steps - 1)))
    return path


def kl(z_NV, w_NV):
    """Return KL(p || q) in nats, the mean over tokens."""
    return divergence(z_NV, w_NV, "rkl").mean().item()


def logits(*probabilities):
    """Return [1, V] logits of some probabilities in float64."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


# ---- the pitfalls, in the order in which one meets them ----------------------------------------------------

def certainty():
    """Certainty cannot be unlearned by what weighs with p.

    The student gives a token p = 1 - eps, the teacher q = 0.01. Reverse KL's gradient, p (log p/q - KL), is 0
    at a point mass whatever q says. That of Jensen-Shannon, skew and total variation vanishes as well, and
    the policy gradient's, as no other token is ever drawn. Forward KL's is p - q. (A chat model specialised
    in JSON begins with `{"` at p = 0.99999: there reverse KL is 15.7 nats, and its gradient 7e-5.)

    Look for the exponents: with 1 the gradient shrinks as eps does, with 0 it stays, below 0 it explodes.
    """
    w, levels = logits(0.01, *[0.11] * 9), [10.0**-n for n in range(1, 8)]
    student = lambda eps: logits(1 - eps, *[eps / 9] * 9)
    losses = {name: lambda z, done=0, name=name: gradient(z, w, name) for name in DIVERGENCES}
    losses["pg"] = lambda z, done=0: expected(z, w)
    numbers, sizes, paths = {}, {}, {}
    for name, loss in losses.items():
        size = [loss(student(eps)).norm().item() for eps in levels]
        p = [z.softmax(-1)[0, 0].item() for z in descend(student(1e-4), loss, 400, 0.2)]
        sizes[name], paths[name] = (levels, size), (range(401), p)
        numbers[f"{name}: exponent, gradient at eps 1e-6, p after 400 steps from eps 1e-4"] = (
            math.log10(size[4] / size[6]) / 2, size[5], p[-1])
    return numbers, [("size of the gradient", "eps", sizes, dict(xscale="log", yscale="log")),
                     ("p of the wrong token", "step", paths, {})]


def raw_top_k():
    """A raw top-k reverse KL leaves a teacher that it has reached.

    The sum of p (log p - log q) over k entries pulls even where p = q: it lowers the kept mass, which over
    the whole vocabulary is 1. The cure is to stop the gradient of log p, to renormalise, or to keep a tail
    entry ("The Many Faces of OPD", 2605.11182: texts came to repeat themselves, accuracy fell to 0). These
    bigram models start at their teacher and learn from their own texts; they end in noise, not in repetition.
    (The small world's `opd` with the top 3, one seed: agreement with the teacher 62% at first, 55% at the end
    of raw and 97% of sg; texts that do not end 30% and 2%.)

    Look for the loss of `raw`, which falls below 0 while the student gets worse.
    """
    w_VV, titles = 2 * torch.randn(20, 20).double(), ("KL(p || q)", "loss", "entropy")
    numbers, curves = {}, {title: {} for title in titles}
    for form in ("raw", "sg", "renorm", "tail"):
        z_VV, found, kind = w_VV, [], dict(name="rkl", support=f"student_{form}", top_k=3)
        numbers[f"{form}: gradient at p = q"] = gradient(w_VV, w_VV, **kind).norm().item()
        for _ in range(200):
            texts = bigram_texts(z_VV, count=64, longest=60)
            visits_V = torch.bincount(torch.cat([ids_T[:-1] for ids_T in texts]), minlength=20).double()
            visits_V /= visits_V.sum()
            of_states = (divergence(z_VV, w_VV, "rkl"), divergence(z_VV, w_VV, **kind),
                         torch.special.entr(z_VV.softmax(-1)).sum(-1))
            found.append([(x_V @ visits_V).item() for x_V in of_states])
            z_VV = z_VV - 20 * visits_V[:, None] * gradient(z_VV, w_VV, **kind)
        for title, ys in zip(titles, zip(*found)):
            curves[title][form] = range(200), ys
        numbers[f"{form}: {', '.join(titles)} at the end"] = tuple(found[-1])
        numbers[f"{form}: tokens of a text, share of repeated 3-grams"] = (
            sum(map(len, texts)) / 64, repeated(texts))
    return numbers, [(f"{title}, nats", "step", curves[title], {}) for title in titles]


def bigram_texts(z_VV, count, longest):
    """Return texts [T] of a bigram model. Token 0 begins a text and ends it."""
    ids_BT = torch.zeros(count, 1, dtype=torch.long)
    for _ in range(longest):
        ids_BT = torch.cat([ids_BT, torch.multinomial(z_VV[ids_BT[:, -1]].softmax(-1), 1)], 1)
    lengths = (ids_BT[:, 1:] != 0).long().cumprod(1).sum(1) + 2
    return [ids_T[:length] for ids_T, length in zip(ids_BT, lengths)]


def student_prefixes():
    """A teacher is worse where the student has led it.

    Small networks write the running sums of four digits, as worked steps; the teacher has seen right
    beginnings only. Behind m steps of a student it goes on from the student's slips, and that is what it
    teaches. In "The Many Faces of OPD" a 14B model falls from 62% to 46% behind a 1.7B model; the cure is to
    fine-tune the student first.

    Look for what each step of the poor student costs the teacher.
    """
    T, digits = 4, lambda n: torch.randint(10, (n, 4))

    def train(steps):
        net = nn.Sequential(nn.Embedding(11, 16), nn.Flatten(), nn.Linear(16 * 2 * T, 128), nn.Tanh())
        head = nn.Parameter(0.1 * torch.randn(10, 128))
        optimizer = torch.optim.AdamW([*net.parameters(), head], lr=4e-3)
        for step in range(steps):
            given, t = digits(256), step % T
            sums = given.cumsum(1) % 10
            seen = torch.cat([given, sums], 1).masked_fill(torch.arange(2 * T) >= T + t, 10)
            optimizer.zero_grad()
            linear_logprob(net(seen), head, sums[:, t], torch.full((256,), 1 / 256))[0].backward()
            optimizer.step()
        return lambda seen: (net(seen) @ head.T).softmax(-1)
    (teacher, better, poor), given, curves = map(train, (1500, 400, 200)), digits(2000), {}
    for name, model in {"itself": teacher, "a better student": better, "a poor student": poor}.items():
        right = []
        for m in range(T):
            seen = torch.cat([given, torch.full_like(given, 10)], 1)
            for t in range(T):
                seen[:, T + t] = torch.multinomial((model if t < m else teacher)(seen), 1)[:, 0]
            right.append(100 * (seen[:, -1] == given.sum(1) % 10).double().mean().item())
        curves[f"behind {name}"] = range(T), right
    return ({f"teacher {who}, right answers in %: m = 0, m = 1, m = 2, m = 3": tuple(ys)
             for who, (_, ys) in curves.items()},
            [("the teacher's right answers, %", "m: steps written before", curves,
              dict(ylim=(0, 105), xticks=range(T)))])


def privileged():
    """Privileged information is averaged away.

    A teacher that is shown the solution says each time another answer; the student, which is not, learns one
    distribution for all. Under reverse KL it is the geometric mean of the teacher's, which keeps what is
    never ruled out, the evasive answer 3; under forward KL the arithmetic mean, a guess. ("The Many Faces of
    OPD".)

    Look for answer 3, to which the teacher always gives 9%.
    """
    q_IV = torch.full((3, 5), 0.005).double()
    q_IV[range(3), range(3)], q_IV[:, 3] = 0.895, 0.09
    w_IV, curves, numbers = q_IV.log(), {"teacher, told 0": (range(5), q_IV[0].tolist())}, {}
    for name, mean_V in {"rkl": w_IV.mean(0).softmax(-1), "fkl": q_IV.mean(0)}.items():
        pull = lambda z, _: gradient(z.expand(3, 5), w_IV, name).mean(0, keepdim=True)
        p_V = descend(torch.zeros(1, 5).double(), pull, 4000, 2.0)[-1].softmax(-1)[0]
        curves[f"student, {name}"] = range(5), p_V.tolist()
        mean = "geometric mean" if name == "rkl" else "arithmetic mean"
        numbers[f"{name}: answer 3, distance from the {mean}"] = p_V[3].item(), (p_V - mean_V).norm().item()
    return numbers, [("probability", "answer", curves, dict(ylim=(0, 1), xticks=range(5)))]


def veto():
    """Forward KL pulls hardest where the student knows least; Veto damps it, and must end.

    Forward KL's gradient is p - q, nearly 1 in size on the teacher's token if the student finds it absurd. In
    Veto's target, q p^beta renormalised (2601.07155), such a token has hardly a share. But a beta that stays
    has the fixed point q^(1 / (1 - beta)), too sharp: it must fall to 0. In the paper's code it ends at
    1 - 1/P of where it began, with P processes.

    Look for the left ends of the curves, and for the KL that stays where beta does.
    """
    levels, student = [10.0**-n for n in range(6, 0, -1)], lambda p: logits(p, *[(1 - p) / 4] * 4)
    size = lambda p, beta: gradient(student(p), student(0.9), "fkl", target=(1.0, beta)).norm().item()
    sizes = {f"beta {beta}": (levels, [size(p, beta) for p in levels]) for beta in (0.0, 0.3, 0.8)}
    z, w, paths = logits(*[1 / 8] * 8), logits(0.2, 0.18, 0.16, 0.14, 0.12, 0.1, 0.06, 0.04), {}
    for name, share in (("falls to 0", 1), ("of 4 processes, to 0.6", 1 / 4), ("stays at 0.8", 0)):
        pull = lambda z, done: gradient(z, w, "fkl", target=target_at("veto", 0.8, share * done))
        paths[f"beta {name}"] = range(2001), [kl(z, w) for z in descend(z, pull, 2000, 2.0)]
    end = descend(z, lambda z, _: gradient(z, w, "fkl", target=(1.0, 0.5)), 3000, 2.0)[-1]
    return ({f"{name}: gradient where p = 1e-6": ys[0] for name, (_, ys) in sizes.items()}
            | {f"{name}: KL(p || q) at the end": ys[-1] for name, (_, ys) in paths.items()}
            | {"beta stays at 0.5: KL to q, to q^2": (kl(end, w), kl(end, 2 * w))},
            [("forward KL's gradient", "p of the teacher's token", sizes, dict(xscale="log")),
             ("KL(p || q), nats", "step", paths, {})])


def modes():
    """Reverse KL seeks a mode, forward KL covers the mass.

    A student that cannot be its teacher has to choose: it has one hump, the teacher two. Reverse KL punishes
    what the teacher rules out, and keeps to one hump; forward KL punishes what the student leaves out, and
    covers both and the valley between. Jensen-Shannon does here as reverse KL.

    Look for the mass in the valley, which the teacher hardly ever says, and for that on the smaller hump.
    """
    v = torch.arange(80).double()
    hump = lambda m, log_s: -(((v - 10 * m) / log_s.exp()) ** 2)[None] / 2
    w = torch.logaddexp(*(math.log(share) + hump(*torch.tensor((m, 1.2)).double()) for share, m in
                          ((0.65, 2.5), (0.35, 5.5))))
    curves = {"teacher": (v.tolist(), w.softmax(-1)[0].tolist())}
    for name in ("rkl", "jsd", "fkl"):                                  # theta: mean / 10, log of the width
        pull = torch.func.grad(lambda theta: divergence(hump(*theta), w, name)[0])
        theta = descend(torch.tensor((3.0, 1.5)).double(), lambda theta, _: pull(theta), 3000, 0.02)[-1]
        curves[name] = v.tolist(), hump(*theta).softmax(-1)[0].tolist()
    return ({f"{name}: in the valley, on the smaller hump": (sum(p[35:46]), sum(p[46:]))
             for name, (_, p) in curves.items()}, [("probability", "token", curves, {})])


def one_token():
    """One sampled token says the same as the whole vocabulary, with much noise.

    The loss pg, with the advantage log q(y) - log p(y) of y ~ p, has reverse KL's gradient as its mean over
    all y. What is drawn is one y; on the same 64 tokens the mean over draws comes nearer as 1 / sqrt(draws).
    Other estimators are something else as losses: k1, log p(y) - log q(y), has the mean gradient 0, k3 that
    of forward KL; and an advantage that is the same for all y, a top-k KL for instance, teaches nothing.

    Look for how many draws are worth one look at the vocabulary.
    """
    z_NV, w_NV = (2 * torch.randn(2, 64, 50).double()).unbind()
    rkl, fkl = gradient(z_NV, w_NV, "rkl"), gradient(z_NV, w_NV, "fkl")
    off = lambda g, other: ((g - other).norm() / rkl.norm()).item()
    means = {"pg, distance from rkl": (advantage, rkl), "k1, size": (lambda lp, lq: 0 * lp - 1, 0),
             "k3, distance from fkl": (lambda lp, lq: (lq - lp).exp() - 1, fkl),
             "the same for all y, size": (lambda lp, lq: 0 * lp + 3, 0)}
    numbers = {f"mean over all y of {name}": off(expected(z_NV, w_NV, weight), other)
               for name, (weight, other) in means.items()}
    total, errors, lp_NV, lq_NV = 0.0, [], z_NV.log_softmax(-1), w_NV.log_softmax(-1)
    for draw in range(1, 1001):
        y_N1 = torch.multinomial(lp_NV.exp(), 1)
        weight_N = advantage(*(x.gather(1, y_N1)[:, 0] for x in (lp_NV, lq_NV)))
        total = total + sampled_gradient(z_NV, y_N1[:, 0], weight_N)
        errors.append(off(total / draw, rkl))
    draws = range(1, 1001)
    return (numbers | {f"pg, {n} draws, distance from rkl": errors[n - 1] for n in (1, 10, 100, 1000)},
            [("distance from rkl's gradient / its size", "draws for each token",
              {"pg": (draws, errors), "1 / sqrt(draws)": (draws, [errors[0] / n**0.5 for n in draws])},
              dict(xscale="log", yscale="log"))])


# ---- the page ----------------------------------------------------------------------------------------------

PITFALLS = {function.__name__: function for function in
            (certainty, raw_top_k, student_prefixes, privileged, veto, modes, one_token)}


ABOUT = ("p is the student's distribution of the next token and q the teacher's, z and w are their logits. "
         "Reverse KL, rkl, is KL(p || q), what on-policy distillation minimises; forward KL, fkl, is "
         "KL(q || p). The other losses are those of `losses.py`, all sizes are in nats. "
         "`python -m lab.pitfalls NAME` makes a page of one section, with the same digits.")


def section(name, out, plt):
    """Reproduce a pitfall and write its picture. Return its blocks of the page and what it has measured."""
    torch.manual_seed(0)
    numbers, panels = PITFALLS[name]()
    heading, *text = [" ".join(part.split()) for part in PITFALLS[name].__doc__.split("\n\n")]
    if plt:
        figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(4.2 * len(panels) + 1, 3.4))
        for axis, (title, of_x, curves, settings) in zip(axes[0], panels):
            for i, (label, curve) in enumerate(curves.items()):     # thinner and thinner: none hides another
                axis.plot(*curve, ("-", "--", ":")[i % 3], linewidth=2.5 - 1.5 * i / len(curves),
                          marker="o" if len(curve[0]) < 10 else "", markersize=4, label=label)
            axis.set(title=title, xlabel=of_x, **settings)
            if axis is axes[0, -1] or list(curves) != list(panels[-1][2]):
                axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
        save_figure(plt, figure, out / f"{name}.png")
    picture = [f"![{name}]({name}.png)"] * bool(plt)
    return [f"## {heading}", *text, *picture, *map(markdown_table, tables(name, numbers))], numbers


def digits(found):
    """Return a number, or each of several, with three digits, in a list."""
    return [f"{x:.3g}" for x in (found if isinstance(found, tuple) else [found])]


def tables(name, numbers):
    """Return tables of numbers {"ROW: COLUMN, COLUMN": found}; rows that have the same columns share one."""
    rows = {}
    for what, found in numbers.items():
        row, _, columns = what.rpartition(": ")
        cells = zip(columns.split(", ") if row else ["measured"], digits(found), strict=True)
        rows.setdefault(row or what, {}).update(cells)
    out = {}
    for row, cells in rows.items():
        out.setdefault(tuple(cells), [[f"`{name}`", *cells]]).append([row, *cells.values()])
    return list(out.values())


def main(argv=None):
    """Reproduce the pitfalls that are named, or all: write the page with its pictures, print the numbers."""
    parser = argparse.ArgumentParser(prog="python -m lab.pitfalls", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(PITFALLS)}")
    parser.add_argument("--out", default="runs/pitfalls", metavar="DIR", help="default: runs/pitfalls")
    args = parser.parse_args(argv)
    out, plt, page = Path(args.out), pyplot(), ["# Pitfalls of on-policy distillation", ABOUT]
    try:
        if unknown := [name for name in args.names if name not in PITFALLS]:
            raise Refused(f"{unknown[0]!r} is unknown; {nearest(unknown[0], PITFALLS)}")
        out.mkdir(parents=True, exist_ok=True)
        for name in tqdm(args.names or PITFALLS, desc="pitfalls"):
            blocks, numbers = section(name, out, plt)
            page += blocks
            tqdm.write("\n".join([name, *(f"  {what:<76} {', '.join(digits(found))}"
                                          for what, found in numbers.items())]), file=sys.stdout)
        write_file(out / "pitfalls.md", "\n\n".join(page) + "\n")
    except (Refused, OSError) as error:
        raise SystemExit(f"lab.pitfalls: {first_line(error)}") from None


if __name__ == "__main__":
    main()
