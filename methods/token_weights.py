"""Which tokens of a rollout count: weights from what both models think there, for --token_weight.

p is the student and q the teacher at token t of a rollout with T tokens, of which its loss is the mean:

    --token_weight  the weight of token t                                         --token_knob      source
    entropy     T/|S| in S, the share rho of the tokens with the largest H(p)     rho = 0.5         2604.14084
    tip         likewise by h + d - h d, with h of H(p) and d of KL(p || q)       rho = 0.5         eq. 7-9
    selectkd    1 if the student's likeliest token is one of the teacher's k,     k = 5             2510.24021
                else 0.01
    prefix      T/m in the first m tokens, else 0                                 m = 100           2602.15260
    eopd        1; beside it KL(q || p) on the teacher's 16 largest entries       tau = 0.8 nats    2603.07079
                where H(q) > tau

In tip h and d are scaled to 0 .. 1 over the Job, h without its largest 2%. selectkd is the greedy variant;
its 5 and 0.01 we have at second hand, as eopd's 16. prefix's 100 is ours, and whole rollouts are sampled all
the same. Weights of the method's own, as camopd's, are factors of these.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from config import GENERAL, Refused
from kernels import linear_divergence
from losses import LOSSES
from models import micro_batches

from . import Job

REJECTED, EOPD_ENTRIES, ROWS = 0.01, 16, 128


@dataclass(frozen=True)
class Rule:
    weigh: Callable                     # ([statistics of a rollout], knob) -> [weight_T]
    knob: float                         # the default
    most: float = math.inf              # the largest knob that makes sense
    sees: str = ""                      # the statistics that it needs: "both" models' distributions, "rank"


def check_tokens(cfg):
    """Refuse a knob that --token_weight cannot use."""
    if cfg.token_weight and cfg.token_knob and cfg.token_knob > RULES[cfg.token_weight].most:
        raise Refused(f"--token_knob {cfg.token_knob}: with --token_weight {cfg.token_weight} it is a share, "
                      "at most 1")


def weigh_tokens(run, jobs):
    """Multiply the weights of some Jobs' rollouts with those of their tokens; return Jobs to add to them."""
    rule, more = RULES[run.cfg.token_weight], []
    knob = rule.knob if run.cfg.token_knob is None else run.cfg.token_knob
    for job in jobs:
        given = [1.0] * len(job.rollouts) if job.weights is None else job.weights
        places, found, hidden_t = statistics(run, job, given, rule.sees)
        job.weights = list(given)
        for i, w_T in zip(places, rule.weigh(found, knob)):
            job.weights[i] = given[i] * w_T
        if run.cfg.token_weight == "eopd":
            weights = [0.0] * len(given)
            for i, stats in zip(places, found):
                weights[i] = given[i] * (stats["entropy_t"] > knob).double()
            more.append(Job(job.learner, job.teacher, job.rollouts, replace(
                LOSSES["fkl"], temperature=run.cfg.loss_temperature, support="teacher_raw",
                top_k=EOPD_ENTRIES), weights, beside="eopd", hidden_t=hidden_t))
    return more


@torch.no_grad()
def statistics(run, job, given, sees):
    """Return (places, statistics, hidden_t) of the rollouts of a Job that have a weight.

    statistics: of each a dict of [T]: length, and with `sees` "both" value, KL(p || q), with entropy_s and
    entropy_t in nats, or "rank", how many tokens the teacher finds likelier than the student's likeliest one.
    """
    places = [i for i, w in enumerate(given) if torch.as_tensor(w).any()]
    ids = [job.rollouts[i].ids_T for i in places]
    found = [{"length": torch.full(ids_T.shape, len(ids_T), device=ids_T.device)} for ids_T in ids]
    if not sees:
        return places, found, None
    probe = replace(job, objective=replace(LOSSES["rkl"], temperature=run.cfg.loss_temperature))
    run.score([probe], gaps=job.objective.label == "pg")        # the teacher reads, once for all
    job.lp, job.lq = probe.lp, probe.lq
    if job.objective.divergence:
        job.hidden_t = probe.hidden_t
    learner, head_t_VH = job.learner, job.teacher.head_VH.detach().to(job.learner.device)
    lengths = {n: len(job.rollouts[i].prompt_ids) + len(ids[n]) for n, i in enumerate(places)}
    with run.timed("score"):
        for group in micro_batches(lengths, run.cfg.micro_tokens):
            some = [ids[n] for n in group]
            hidden_NH = learner.hidden_states([job.rollouts[places[n]].prompt_ids for n in group], some)
            hidden_t_NH = torch.cat([probe.hidden_t[places[n]] for n in group]).to(learner.device)
            if sees == "rank":
                stats = {"rank": ranks(hidden_NH, learner.head_VH, hidden_t_NH, head_t_VH, learner.vocab)}
            else:
                _, stats = linear_divergence(
                    hidden_NH, learner.head_VH, hidden_t_NH, head_t_VH, divergence="rkl",
                    temperature=run.cfg.loss_temperature, vocab=learner.vocab, softcap_s=learner.softcap,
                    softcap_t=job.teacher.softcap)
            for name, x_N in stats.items():
                for n, x_T in zip(group, x_N.split([len(ids_T) for ids_T in some])):
                    found[n][name] = x_T
    return places, found, probe.hidden_t


def ranks(hidden_s_NH, head_s_VH, hidden_t_NH, head_t_VH, vocab):
    """Return [N]: how many tokens the teacher finds likelier than the student's likeliest one.

    A few rows at a time, as [N, V] would be too much. A softcap changes no order.
    """
    out = []
    for s_CH, t_CH in zip(hidden_s_NH.split(ROWS), hidden_t_NH.split(ROWS)):
        likeliest_C1 = (s_CH @ head_s_VH[:vocab].to(s_CH.dtype).T).argmax(-1, keepdim=True)
        w_CV = t_CH @ head_t_VH[:vocab].to(t_CH.dtype).T
        out.append((w_CV > w_CV.gather(1, likeliest_C1)).sum(-1))
    return torch.cat(out)


# ---- the rules ---------------------------------------------------------------------------------------------

def largest(score_T, share):
    """Return T/|S| at the largest scores of a rollout, a share of its tokens but at least one; else 0."""
    count = max(int(share * len(score_T)), 1)
    w_T = torch.zeros(len(score_T), dtype=torch.float64, device=score_T.device)
    return w_T.index_fill(0, score_T.topk(count).indices, len(score_T) / count)


def entropy(found, share):
    """The student is unsure there. TIP, 2604.14084, eq. 8 with d = 0."""
    return [largest(stats["entropy_s"], share) for stats in found]


def tip(found, share):
    """The student is unsure there, or sure of what the teacher would not say. TIP, 2604.14084, eq. 7-9."""
    if not found:
        return []
    h_N, d_N = (torch.cat([stats[name] for stats in found]) for name in ("entropy_s", "value"))
    h_N = h_N.clamp(max=h_N.kthvalue(math.ceil(0.98 * len(h_N))).values)
    h_N, d_N = ((x_N - x_N.min()) / (x_N.max() - x_N.min()).clamp(min=1e-12) for x_N in (h_N, d_N))
    score_N = h_N + d_N - h_N * d_N
    return [largest(s_T, share) for s_T in score_N.split([len(stats["value"]) for stats in found])]


def selectkd(found, k):
    """What the student proposes, the teacher would accept. SelecTKD, 2510.24021, greedy top-k."""
    return [torch.where(stats["rank"] < k, 1.0, REJECTED) for stats in found]


def prefix(found, most):
    """Where a rollout begins. Prefix OPD, 2602.15260."""
    firsts = [torch.arange(len(stats["length"]), device=stats["length"].device) < most for stats in found]
    return [first_T * (len(first_T) / first_T.sum()) for first_T in firsts]


def eopd(found, tau):
    """Every token, as it is. Where the teacher is unsure, weigh_tokens adds its term. EOPD, 2603.07079."""
    return [torch.ones_like(stats["entropy_t"]) for stats in found]


RULES = {"entropy": Rule(entropy, 0.5, 1, "both"), "tip": Rule(tip, 0.5, 1, "both"),
         "selectkd": Rule(selectkd, 5, sees="rank"), "prefix": Rule(prefix, 100),
         "eopd": Rule(eopd, 0.8, sees="both")}
assert RULES.keys() == set(GENERAL["token_weight"].type.names)
