"""CaMOPD: counteraction-aware multi-teacher on-policy distillation (arXiv 2605.27115), algorithm 1.

The first branch is the one to recover (general), the others are preserved (domain). In the paper's letters:

    b   = S(t)                              the branch of step t: n_g general steps, then one domain step  (5)
    D_t = log q_b(y_t) - log p(y_t)         the gap on sampled tokens, at rollout time
    s_i = mean_t |D_t| if b is general, else mean_t [D_t]+                                            (6), (7)
    S_b = the shortest prefix of rollouts, by descending s, that holds the share rho_b of the sum of s     (8)
    L_b = -1/|S_b| sum_{i in S_b} 1/T_i sum_t w_t (r_b A_t) log p(y_t)                                     (9)

The advantage A_t is the gap D_t, and w_t the importance weight (losses.importance_weight). n_g : 1 is
--schedule, rho_b --mass and r_b --scale.
"""
import torch

from config import PerBranch, Ratio, Refused

from . import DIAGNOSED, TOKENS, any_divergence, method
from .token_weights import check_tokens


def check(cfg):
    """Refuse settings under which nothing is trained."""
    check_tokens(cfg)
    if not any(cfg.scale.values()):
        raise Refused("--scale 0 for every branch trains nothing")


def select(run, jobs, *, mass, scale, **_):             # called with all of the method's own flags
    """Weigh the rollouts with the largest gaps with their branch's scale, and the others with 0. Eq. 6-9."""
    for job in jobs:
        demand_B = torch.stack([demand(run, job.branch, gap_T) for gap_T in job.gaps])
        if run.cfg.drop_cut:
            demand_B = demand_B * ~torch.tensor(job.cut, device=demand_B.device)    # nobody asks for these
        finite = demand_B.isfinite().all()              # otherwise keep all: the update says what is wrong
        keep_B = top_gap_mass(demand_B, mass[job.branch]) if finite else torch.ones_like(demand_B).bool()
        job.weights = list(scale[job.branch] * keep_B.to(demand_B.dtype))


@method(losses=any_divergence("pg"), select=select, check=check,
        defaults=DIAGNOSED | TOKENS | dict(rollouts=1))
def camopd(run, *, schedule: Ratio("mixed") = "3:1", mass: PerBranch(most=1) = 0.8,
           scale: PerBranch() = (2.0, 1.0)):
    """Alternate the branches, and keep the rollouts with the largest gaps.

    Each part has its switch, and with all three off this is mopd.

    schedule    steps of the first branch : of the second : ..; "mixed" takes all branches in every step:
                rollouts are still selected within their branch, and the mean is over the kept rollouts of all
                branches (the paper does not define this case); CaMOPD eq. 5
    mass        share of the gap mass that the kept rollouts hold, for all branches or [BRANCH=]RHO; 1 keeps
                every rollout; CaMOPD eq. 8
    scale       factor on the branch's loss, [BRANCH=]R; default: 2 for the first branch, 1 for the others;
                CaMOPD eq. 9
    """
    for step in run.steps():
        branch = scheduled(schedule, run.branches, step)
        jobs = run.route(run.sample(run.student, run.draw(branch)))     # one Job per branch, with its teacher
        run.score(jobs)                                                 # fills lp, lq, and so the gaps
        select(run, jobs, mass=mass, scale=scale)
        yield jobs


def scheduled(schedule, branches, step):
    """Return the active branch: "3:1" is 3 steps of the first, 1 of the second; "mixed" is None. Eq. 5."""
    if schedule == "mixed":
        return None
    period = []
    for branch, count in zip(branches, schedule.split(":")):
        period += [branch] * int(count)
    return period[step % len(period)]


def demand(run, branch, gap_T):
    """Return the score by which a branch's rollouts are selected, from the gap on the tokens of one."""
    return absolute_gap(gap_T) if branch == run.branches[0] else positive_gap(gap_T)


def absolute_gap(gap_T):
    """s_g: any deviation from the general teacher is a recovery signal. Eq. 6."""
    return gap_T.abs().mean()


def positive_gap(gap_T):
    """s_d: only tokens that the domain teacher likes better than the student does. Eq. 7."""
    return gap_T.clamp(min=0).mean()


def top_gap_mass(score_B, mass):
    """Return a boolean [B]: the shortest prefix by descending score that holds `mass` of the total. Eq. 8.

    score_B: non-negative, one per rollout. mass >= 1 and an all-zero score keep everything.
    """
    assert torch.isfinite(score_B).all() and (score_B >= 0).all(), score_B
    total = score_B.double().sum()
    if mass >= 1 or total == 0:
        return torch.ones_like(score_B, dtype=torch.bool)
    order_B = score_B.argsort(descending=True, stable=True)
    held_B = score_B[order_B].double().cumsum(0) / total         # float32 would reach the total too early
    first_enough = int((held_B < mass - 1e-9).sum())   # 1e-9: of what is `mass` but for rounding
    keep_B = torch.zeros_like(score_B, dtype=torch.bool)
    keep_B[order_B[:first_enough + 1]] = True
    return keep_B
