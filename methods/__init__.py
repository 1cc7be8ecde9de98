"""The methods: who learns, from whom, on what, with which weights. One paper, one short generator.

A method is a generator over training steps. It yields a list of Jobs; the loop (opd.py) scores their
rollouts, asks for their weights, takes one optimizer step on all of them together, and sends the statistics
of that step back:

    def opd(run):
        for step in run.steps():
            rollouts = run.sample(run.student, run.draw())
            yield [Job(run.student, run.teacher, rollouts, run.objective)]

What a method may use: run.student, run.teacher (the only one) or run.teachers[branch], run.objective,
run.branches, run.shares, run.prompts[branch], run.cfg, run.state (JSON, survives a restart), run.steps,
run.draw, run.sample, run.references;
of a student that teaches itself run.self_teacher(student), run.templates, run.fits; of two students
run.students, run.turn, run.write, run.validate, run.validation, run.aside; and run.notes for what it wants to
see in this step's line of metrics.jsonl.

Letters as in the papers: p the student, q the teacher, y the sampled token; gap = log q(y) - log p(y).
"""
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from methods.feedback import accept, last_question, reprompt, told, tutor_prompt
from config import fail
from data.graders import complaint
from losses import DIVERGENCES, Objective


@dataclass
class Rollout:
    """One completion with its prompt. T tokens, the closing EOS included when there is one."""
    prompt: dict                            # a row of the prompt file: prompt, branch, answer, solution, ..
    ids_T: torch.Tensor                     # completion token ids
    logp_T: torch.Tensor | None = None      # log-probabilities as sampled; None = fixed data, off-policy
    teacher_prompt: list | str | None = None    # what the teacher sees instead; None = the same
    text: str = ""                          # the completion without its stop token
    reward: float | None = None             # the grader's verdict, where the prompt has an answer
    feedback: tuple | None = None           # what a tutor wrote about it, and what became of that
    lp_T: torch.Tensor | None = None        # log p(y) under the training forward, filled when the loop scores
    gap_T: torch.Tensor | None = None       # log q(y) - log p(y), likewise


@dataclass
class Job:
    """One student, one teacher, some rollouts, an objective. Jobs that are yielded together share a step."""
    student: Any
    teacher: Any                            # None when the objective needs no teacher
    rollouts: list
    objective: Objective
    weights: Callable | list | None = None  # a number per rollout, known before scoring; or a function of
    #                                         the scored Job -> a tensor per rollout, [T] or []; None = ones
    hidden_t: list | None = None            # the teacher's states of each rollout, [T, H], from scoring


def by_branch(rollouts):
    """{branch: its rollouts}, in the order of first appearance."""
    return grouped(rollouts, lambda prompt: prompt["branch"])


def by_prompt(rollouts):
    """{prompt_key: its rollouts}, likewise."""
    return grouped(rollouts, prompt_key)


def prompt_key(prompt):
    return f"{prompt['branch']} {prompt['row']}"


def grouped(rollouts, key):
    groups = {}
    for rollout in rollouts:
        groups.setdefault(key(rollout.prompt), []).append(rollout)
    return groups


def routed(run, rollouts):
    """One Job per branch, each with its branch's teacher."""
    return [Job(run.student, run.teachers[branch], group, run.objective)
            for branch, group in by_branch(rollouts).items()]


# ---- learning from fixed data ------------------------------------------------------------------------------

def sft(run):
    """Maximum likelihood on the prompt files' `solution`s."""
    for step in run.steps():
        yield [Job(run.student, None, run.references(run.draw()), run.objective)]


def seqkd(run):
    """Sequence-level distillation: maximum likelihood on the teachers' greedy completions.

    Kim & Rush, 1606.07947. Greedy decoding stands for the mode that the paper finds by beam search.
    """
    def write(prompts):
        return [rollout for branch in run.branches for rollout in run.sample(
            run.teachers[branch], [p for p in prompts if p["branch"] == branch], n=1, temperature=0)]

    for step in run.steps():
        yield [Job(run.student, None, written_once(run, run.draw(), write), run.objective)]


def written_once(run, prompts, write):
    """A rollout for each prompt as fixed data. write(prompts) makes them, once per run with its restarts."""
    known = run.state.setdefault("written", {})                  # prompt_key -> [token ids, text, reward]
    new = {prompt_key(p): p for p in prompts if prompt_key(p) not in known}
    for r in write(list(new.values())):
        known[prompt_key(r.prompt)] = [r.ids_T.tolist(), r.text, r.reward]
    found = [(p, *known[prompt_key(p)]) for p in prompts]
    return [Rollout(p, torch.tensor(ids, device=run.student.device), text=text, reward=reward)
            for p, ids, text, reward in found]


def kd(run):
    """Word-level KD: the teachers' distributions on the files' `solution`s. Hinton et al., 1503.02531."""
    for step in run.steps():
        yield routed(run, run.references(run.draw()))


def gkd(run):
    """Generalised KD: a step is on-policy with probability lambda, else on fixed data. 2306.13649, alg. 1."""
    for step in run.steps():
        on_policy = random.Random(f"gkd {run.cfg.seed} {step}").random() < run.cfg.gkd_lambda
        prompts = run.draw()
        yield routed(run, run.sample(run.student, prompts) if on_policy else run.references(prompts))


# ---- learning from the student's own rollouts --------------------------------------------------------------

def opd(run):
    """On-policy distillation: the student writes, the teacher's distribution corrects each token it wrote."""
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield [Job(run.student, run.teacher, rollouts, run.objective)]


def mopd(run):
    """Multi-teacher OPD: a step mixes all branches, each routed to its teacher. CaMOPD 2605.27115, eq. 1-3.

    The branches' shares of the batch are --mixture. Every rollout of the batch weighs the same, so with equal
    shares the gradient is that of eq. 3 divided by the number of branches.
    """
    for step in run.steps():
        yield routed(run, run.sample(run.student, run.draw()))


def camopd(run):
    """Counteraction-aware MOPD: alternate the branches, keep the largest gaps. CaMOPD 2605.27115, alg. 1.

        b   = S(t)                               S = G..G D: n_g general steps, then one domain step   (eq. 5)
        D_t = log q_b(y_t) - log p(y_t)          the gap on sampled tokens, at rollout time
        s_i = mean_t |D_t| if general else mean_t [D_t]+                                            (eq. 6, 7)
        S_b = the shortest prefix by descending s that holds rho_b of the sum of s                     (eq. 8)
        L_b = -1/|S_b| sum_{i in S_b} 1/T_i sum_t w_t (r_b A_t) log p(y_t)                             (eq. 9)

    The first branch is the one to recover (general), the others are preserved (domain). Each part has its
    switch: --schedule mixed takes all branches in every step as mopd does (S is then pooled: every kept
    rollout of either branch weighs the same; the paper does not define this case), --mass 1 keeps every
    rollout, --scale 1 scales none.
    """
    for step in run.steps():
        prompts = run.draw(scheduled(run.cfg.schedule, run.branches, step))
        yield selected(run, run.sample(run.student, prompts))


def selected(run, rollouts):
    """One Job per branch, its weights as in CaMOPD eq. 6-9."""
    jobs = routed(run, rollouts)
    for job in jobs:
        branch = job.rollouts[0].prompt["branch"]
        job.weights = gap_mass(demand(run, branch), run.cfg.mass[branch], run.cfg.scale[branch])
    return jobs


def scheduled(schedule, branches, step):
    """Active branch: "3:1" is 3 steps of the first, 1 of the second; "mixed" is None, all. CaMOPD eq. 5."""
    if schedule == "mixed":
        return None
    counts = [int(n) for n in schedule.split(":")]
    period = [branch for branch, n in zip(branches, counts) for _ in range(n)]
    return period[step % len(period)]


def demand(run, branch):
    """The score by which a branch's rollouts are selected, a function of the gap. CaMOPD eq. 6, 7."""
    return absolute_gap if branch == run.branches[0] else positive_gap


def absolute_gap(gap_T):
    """s_g: any deviation from the general teacher is a recovery signal. CaMOPD eq. 6."""
    return gap_T.abs().mean()


def positive_gap(gap_T):
    """s_d: only tokens that the domain teacher likes better than the student does. CaMOPD eq. 7."""
    return gap_T.clamp(min=0).mean()


def gap_mass(score, mass, scale):
    """Weights of a Job: `scale` on rollouts that hold `mass` of the total score, else 0. CaMOPD eq. 8-9."""
    def weights(job):
        score_B = torch.stack([score(rollout.gap_T) for rollout in job.rollouts])
        return list(scale * top_gap_mass(score_B, mass).to(score_B.dtype))
    return weights


def everything(job):
    """Weights of a Job that keep every rollout; being a function of the Job, they ask for its gap."""
    return [1.0] * len(job.rollouts)


def top_gap_mass(score_B, mass):
    """Boolean [B]: the shortest prefix by descending score that holds `mass` of the total. CaMOPD eq. 8.

    score_B: non-negative, one per rollout. mass >= 1 and an all-zero score keep everything.
    """
    assert torch.isfinite(score_B).all() and (score_B >= 0).all(), score_B
    total = score_B.double().sum()
    if mass >= 1 or total == 0:
        return torch.ones_like(score_B, dtype=torch.bool)
    order_B = score_B.argsort(descending=True, stable=True)
    held_B = score_B[order_B].double().cumsum(0) / total         # float32 would reach the total too early
    keep_B = torch.zeros_like(score_B, dtype=torch.bool)
    keep_B[order_B[: int((held_B < mass - 1e-9).sum()) + 1]] = True
    return keep_B


def focus(run):
    """MOPD that asks again where there was most to learn: a share --focus of every branch's prompts. Ours.

    Selection (CaMOPD eq. 8) drops rollouts that teach little after the student has written them; this writes
    fewer of them. The other prompts of a batch are the next ones, as in mopd. Demand is the score of eq. 6, 7
    when a prompt was last asked.
    """
    known = run.state.setdefault("demand", {branch: {} for branch in run.branches})     # row -> its demand
    for step in run.steps():
        prompts = []
        for branch, count in run.shares.items():
            again = min(round(run.cfg.focus * count), count - 1)            # a new one at least
            new = run.draw(branch, count=count - again)
            new += in_demand(run.prompts[branch], known[branch], again, new)
            prompts += new + run.draw(branch, count=count - len(new))       # as long as too few are known
        jobs = routed(run, run.sample(run.student, prompts))
        for job in jobs:
            branch = job.rollouts[0].prompt["branch"]
            job.weights = noting(known[branch], demand(run, branch))
        yield jobs


def noting(known, score):
    """Weights that keep every rollout of a Job, and note its prompts' demand, the mean of their rollouts."""
    def weights(job):
        for some in by_prompt(job.rollouts).values():
            known[str(some[0].prompt["row"])] = sum(score(r.gap_T).item() for r in some) / len(some)
        return everything(job)
    return weights


def in_demand(prompts, known, count, without):
    """The `count` prompts with the largest known demand, or as many as are known, `without` some."""
    rows = {prompt["row"] for prompt in without}
    others = [p for p in prompts if str(p["row"]) in known and p["row"] not in rows]
    return sorted(others, key=lambda p: -known[str(p["row"])])[:count]


# ---- learning from rewards ---------------------------------------------------------------------------------

def grpo(run):
    """Group-relative policy optimisation, one update per batch: -(1/n) sum_i A_i 1/T_i sum_t w_t log p(y_t).

    A_i = r_i - the mean reward of the rollouts of its prompt. DeepSeekMath, 2402.03300, as the baseline of
    OPCoD (2606.14368, app. D.3): no division by the standard deviation, no KL, w_t = min(p / p_sampler, 2).
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield jobs_by_branch(run, run.student, None, rollouts, advantages(rollouts))


def advantages(rollouts):
    """A_i of every rollout, times the share that is not 0: GRPO divides by all, the loop by those."""
    groups = by_prompt(rollouts)
    mean = {key: sum(r.reward for r in group) / len(group) for key, group in groups.items()}
    out = [r.reward - mean[prompt_key(r.prompt)] for r in rollouts]
    return [a * sum(map(bool, out)) / len(out) for a in out]


def jobs_by_branch(run, student, teacher, rollouts, weights):
    """One Job per branch, so that each has its own statistics; they share the step and its normalisation."""
    weight = {id(rollout): w for rollout, w in zip(rollouts, weights, strict=True)}
    return [Job(student, teacher, group, run.objective, [weight[id(r)] for r in group])
            for group in by_branch(rollouts).values()]


# ---- learning from oneself ---------------------------------------------------------------------------------

def star(run):
    """Maximum likelihood on the student's own rationales: it is told the answer and writes how to get there.

    After STaR's rationalisation, 2203.14465: the self-teacher, here the student as it started, writes once
    per prompt. What does not end in the answer it was told is left out, and the student is not told.
    """
    def write(prompts):
        hinted = [p | {"prompt": told(p["prompt"], run.templates, p["answer"])} for p in prompts]
        return run.sample(run.self_teacher(run.student), hinted, n=1)

    for step in run.steps():
        rollouts = written_once(run, run.draw(), write)
        yield jobs_by_branch(run, run.student, None, rollouts, [float(r.reward == 1) for r in rollouts])


def opsd(run):
    """On-policy self-distillation: the self-teacher, the student as it started, sees the reference solution.

    Zhao et al., 2601.18734; the divergence over the full vocabulary, without their clip of single entries.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        yield self_taught(run, run.student, rollouts, [r.prompt["solution"] for r in rollouts])


def sdpo(run):
    """Self-distillation policy optimisation: the teacher is the student that sees how it can be done.

    Hübotter et al., 2601.20802. It sees another rollout of the student's own that is correct, or else what
    the environment had to say, here that an answer cannot be graded. Rollouts with neither have no loss.
    """
    for step in run.steps():
        rollouts = run.sample(run.student, run.draw())
        solutions = demonstrations(rollouts)
        environment = [None if s or run.cfg.no_environment else complaint(r.prompt["grader"], r.text)
                       for r, s in zip(rollouts, solutions)]
        yield self_taught(run, run.student, rollouts, solutions, environment)


def self_taught(run, student, rollouts, solutions, environment=None, peer=None):
    """Jobs with the student's self-teacher, which sees what is given here beside each rollout's prompt.

    Text that leaves no room for the rollout (what is decoded may have more tokens when it is read) counts as
    nothing given.
    """
    nothing = [None] * len(rollouts)
    for r, *given in zip(rollouts, solutions, environment or nothing, peer or nothing, strict=True):
        seen = reprompt(r.prompt["prompt"], run.templates, *given)
        r.teacher_prompt = seen if seen and run.fits(seen, len(r.ids_T)) else None
    informed = [float(r.teacher_prompt is not None) for r in rollouts]
    return jobs_by_branch(run, student, run.self_teacher(student), rollouts, informed)


def demonstrations(rollouts):
    """For every rollout the earliest correct one of its prompt, but not itself; None where there is none."""
    correct = {key: [r for r in group if r.reward == 1] for key, group in by_prompt(rollouts).items()}
    return [next((other.text for other in correct[prompt_key(r.prompt)] if other is not r), None)
            for r in rollouts]


# ---- learning from each other ------------------------------------------------------------------------------

def opcod(run):
    """On-policy co-distillation: two students, each its own teacher with the other's feedback. 2606.14368.

        for round in 1 .. R:
          Delta_i = sum_d (s*_d - s_d^i) / s*_d        on validation prompts; s*_d the better of both  (eq. 2)
          for tutee in 1, 2; the other is its tutor, and does not change meanwhile:
            K times:
              y_1 .. y_n ~ p(. | x)
              s   the earliest correct of them, or nothing
              f_j ~ tutor(. | x, y_j), anchored, sanitised, filtered   if Delta_tutor <= tau, else nothing
              L = 1/|y| sum_t D(p(. | x, y_<t) || sg p(. | x, s, f, y_<t))                             (eq. 1)

    The first student is called the specialist of the first branch, the second of the second. A tutor is
    the model at the start of the phase (the paper's app. D; its alg. 1 takes the start of the round).
    A rollout is not its own s, as in SDPO.
    """
    phase = run.cfg.steps // run.cfg.rounds                      # K
    for step in run.steps():
        which, within = divmod(step, phase)
        tutee, tutor = run.students[which % 2], run.students[1 - which % 2]
        run.turn(tutee)
        if which % 2 == 0 and within == 0:
            run.state["gate"] = {"round": which // 2} | cognizance(run)
            run.notes["gate"] = run.state["gate"]
        rollouts = run.sample(tutee, run.draw(student=tutee))
        solutions = demonstrations(rollouts)
        domains = run.state["gate"]["tutors"][1 - which % 2]
        heard = [r for r in rollouts if r.prompt["branch"] in domains]
        kept = dict(zip(map(id, heard), feedback(run, tutor, tutee, heard)))
        run.notes["tutee"] = run.students.index(tutee) + 1
        yield self_taught(run, tutee, rollouts, solutions, peer=[kept.get(id(r)) for r in rollouts])


def cognizance(run):
    """Both students' validation scores, their cognizance gaps, and in which domains each one tutors.

    With --break_prompts also how many correct rollouts each one's feedback breaks, whatever the gate says.
    """
    scores = [run.validate(student) for student in run.students]
    for domain in run.branches:
        if run.state["step"] == 0 and not any(s[domain] for s in scores):
            fail(f"neither student answers a prompt of --val_prompts {domain} correctly, so their scores say "
                 f"nothing: look at its grader, the students, or --max_new_tokens {run.cfg.max_new_tokens}")
    gaps = cognizance_gaps(scores)
    gate = {"scores": scores, "gaps": gaps, "cognizant": [gap <= run.cfg.tau for gap in gaps]}
    gate["tutors"] = [[domain for domain in run.branches if speaks(run.cfg.gate, gate, i, domain)]
                      for i in (0, 1)]
    return gate | ({"broken": [broken(run, *pair) for pair in (run.students, run.students[::-1])]}
                   if run.cfg.break_prompts else {})


def cognizance_gaps(scores):
    """Delta_i = sum_d (s*_d - s_d^i) / s*_d, s*_d the best score on domain d. OPCoD 2606.14368, eq. 2."""
    best = {domain: max(s[domain] for s in scores) for domain in scores[0]}
    return [sum((best[domain] - s[domain]) / best[domain] for domain in best if best[domain]) for s in scores]


def speaks(strategy, gate, i, domain):
    """Whether student i gives feedback on a domain's prompts: the four strategies of OPCoD's fig. 7."""
    stronger = gate["scores"][i][domain] >= gate["scores"][1 - i][domain]
    return {"cognizance": gate["cognizant"][i], "always": True, "never": False,
            "selective": gate["cognizant"][i] or stronger}[strategy]


def feedback(run, tutor, tutee, rollouts):
    """What the tutor says about each of the tutee's rollouts and may be passed on, else None. App. C.

    Beside the paper's outcomes there is "too_long", a rollout for which the tutor has no room.
    """
    domains = [run.branches[run.students.index(student)] for student in (tutor, tutee)]
    anchored = not run.cfg.no_anchor
    prompts = [tutor_prompt(r.prompt["prompt"], r.text, run.templates, *domains, anchored) for r in rollouts]
    fits = [run.fits(prompt, run.cfg.feedback_tokens) for prompt in prompts]
    texts = iter(run.write(tutor, [prompt for prompt, there_is_room in zip(prompts, fits) if there_is_room]))
    out, outcomes = [], Counter()
    for r, there_is_room in zip(rollouts, fits):
        text, finished = next(texts) if there_is_room else ("", False)
        kept, outcome = (accept(text, last_question(r.prompt["prompt"])[1], anchored, finished=finished)
                         if there_is_room else (None, "too_long"))
        r.feedback = text, outcome
        outcomes[outcome] += 1
        out.append(kept)
    run.notes["feedback"] = outcomes
    return out


def broken(run, tutor, tutee):
    """How many of the tutee's correct validation rollouts its self-teacher gets wrong with feedback. App. E.

    correct: those whose feedback is kept. broken_without: how many of them it gets wrong without it, from the
    same demonstrations, which are another rollout. The paper measures on training prompts at the start, and
    has no such control.
    """
    with run.aside("gate"):
        rollouts = run.sample(tutee, run.validation(run.cfg.break_prompts))
        correct = [(r, s) for r, s in zip(rollouts, demonstrations(rollouts)) if r.reward == 1]
        heard = feedback(run, tutor, tutee, [r for r, _ in correct])
        kept, wrong = [(r.prompt, s, f) for (r, s), f in zip(correct, heard) if f], {}
        for name, told_too in (("broken", True), ("broken_without", False)):
            seen = [reprompt(p["prompt"], run.templates, s, peer=f if told_too else None) or p["prompt"]
                    for p, s, f in kept]
            prompts = [p | {"prompt": text} for (p, *_), text in zip(kept, seen)]
            answers = run.sample(run.self_teacher(tutee), prompts, n=1)
            wrong[name] = sum(answer.reward < 1 for answer in answers)
    return {"correct": len(kept)} | wrong


@dataclass(frozen=True)
class Method:
    steps: Callable                         # the generator
    losses: tuple                           # names in losses.LOSSES that make sense with it, its own first
    solutions: bool = False                 # learns from the prompt files' `solution`s
    samples: bool = True                    # generates completions of the training prompts
    graded: bool = False                    # needs the prompts' answers
    teachers: bool = True                   # --teachers, one for every branch
    students: int = 1
    jobs: Callable | None = None            # run, rollouts of all branches -> its Jobs, for --diagnose_every
    support: dict = field(default_factory=dict)     # its own support and top_k
    flags: dict = field(default_factory=dict)       # flags that not every method reads -> this one's default


def any_divergence(first, *others):
    """Names of all divergences, the method's own one first."""
    return tuple(dict.fromkeys([first, *DIVERGENCES, *others]))


ONE = dict(rollouts=1)
DIAGNOSED = ONE | dict(diagnose_every=0, diagnose_rollouts=None, diagnose_layers=0)
GRPO = dict(rollouts=8, importance_cap=2.0)                      # OPCoD 2606.14368, tables 4 and 6
SDPO = GRPO | dict(self_teacher="ema", ema_rate=0.05, templates=None)
TOP_100 = dict(support="student_tail", top_k=100)

METHODS = {
    "sft": Method(sft, ("nll",), solutions=True, samples=False, teachers=False),
    "seqkd": Method(seqkd, ("nll",)),
    "kd": Method(kd, any_divergence("fkl"), solutions=True, samples=False),
    "gkd": Method(gkd, any_divergence("jsd"), solutions=True, flags=ONE | dict(gkd_lambda=0.5)),
    "opd": Method(opd, any_divergence("rkl", "pg"), jobs=routed, flags=DIAGNOSED),
    "mopd": Method(mopd, any_divergence("pg"), jobs=routed, flags=DIAGNOSED),
    "camopd": Method(camopd, any_divergence("pg"), jobs=selected,
                     flags=DIAGNOSED | dict(schedule=None, mass=None, scale=None)),
    "focus": Method(focus, any_divergence("pg"), jobs=routed, flags=DIAGNOSED | dict(focus=0.5)),
    "grpo": Method(grpo, ("nll",), graded=True, teachers=False, flags=GRPO),
    "star": Method(star, ("nll",), graded=True, teachers=False,
                   flags=dict(self_teacher="frozen", ema_rate=0.05, templates=None)),
    "opsd": Method(opsd, any_divergence("jsd"), solutions=True, teachers=False,
                   flags=ONE | dict(self_teacher="frozen", ema_rate=0.05, templates=None)),
    "sdpo": Method(sdpo, any_divergence("jsd"), graded=True, teachers=False, support=TOP_100,
                   flags=SDPO | dict(no_environment=False)),
    "opcod": Method(opcod, any_divergence("jsd"), graded=True, teachers=False, students=2, support=TOP_100,
                    flags=SDPO | dict(rounds=2, tau=0.2, gate="cognizance", gate_rollouts=16, break_prompts=8,
                                      no_anchor=False, feedback_tokens=1024, val_prompts=None)),
}
