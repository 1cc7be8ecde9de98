"""OPCoD: on-policy co-distillation of two students (arXiv 2606.14368), algorithm 1.

Each student is its own teacher, with the other student's feedback on its rollouts:

    for round in 1 .. R:
      Delta_i = sum_d (s*_d - s_d^i) / s*_d        on validation prompts; s*_d the better score of both    (2)
      for tutee in 1, 2; the other is its tutor, and does not change meanwhile:
        K times:
          y_1 .. y_n ~ p(. | x)
          s   the earliest correct of them, or nothing
          f_j ~ tutor(. | x, y_j), anchored, sanitised, filtered   if Delta_tutor <= tau, else nothing
          L = 1/|y| sum_t D(p(. | x, y_<t) || sg p(. | x, s, f, y_<t))                                     (1)

The first student is called the specialist of the first branch of prompts, the second of the second. A tutor
is the model at the start of the phase (the paper's app. D; its alg. 1 takes the start of the round). As in
SDPO, a rollout is not its own s. What tutors and self-teachers read is in feedback.py.
"""
from collections import Counter

from config import AMOUNT, COUNT, NOT_NEGATIVE, OneOf, Refused
from data.graders import complaint

from . import EMA, any_divergence, check_rounds, method
from .feedback import accept, last_question, reprompt, tutor_prompt
from .oneself import demonstrations, self_taught


def check(cfg):
    """Refuse settings without two domains that are both validated, and rounds of different lengths."""
    branches = list(cfg.prompts)
    if len(branches) != 2:
        raise Refused(f"--method {cfg.method} needs two branches of prompts, the first student's domain and "
                      "the second's, as in --prompts physics=p.jsonl chemistry=c.jsonl, but --prompts has: "
                      + ", ".join(branches))
    if cfg.val_prompts.keys() != cfg.prompts.keys():
        raise Refused(f"--method {cfg.method} needs validation prompts for every branch "
                      f"({', '.join(branches)}), but --val_prompts has: "
                      f"{', '.join(cfg.val_prompts) or 'none'}")
    check_rounds(cfg)


def reads(run, model, row):
    """Return the longest prompt that a self-teacher or a tutor can get to read.

    Rollouts and feedback are not known yet: they are some token, as often as they may be long.
    """
    taught = reprompt(row["prompt"], run.templates, "x", complaint(row["grader"], ""), "x")
    asked = tutor_prompt(row["prompt"], "x", run.templates, *run.branches, not run.cfg.no_anchor)
    ids = max(model.encode(taught), model.encode(asked), key=len)
    return ids + ids[-1:] * (run.cfg.max_new_tokens + run.cfg.feedback_tokens)


@method(losses=any_divergence("jsd"), teachers="none", students=2, needs=("answer",), check=check,
        reads=reads, defaults=EMA | dict(rollouts=8, importance_cap=2.0, support="student_tail", top_k=100,
                                         val_prompts=[], gate_rollouts=16))
def opcod(run, *, rounds: COUNT = 2, tau: NOT_NEGATIVE = 0.2,
          gate: OneOf("cognizance", "always", "never", "selective") = "cognizance", break_prompts: AMOUNT = 8,
          no_anchor: bool = False, feedback_tokens: COUNT = 1024):
    """Let two students tutor each other in turn.

    rounds          rounds R; each has --steps / R updates of one student, then of the other
    tau             a student may tutor if it is behind the better of both by at most so much, relative and
                    summed over the domains; OPCoD eq. 2
    gate            when a tutor gives feedback: cognizance gap within --tau, always, never, or (selective)
                    beyond --tau on prompts of the domain in which it is stronger; OPCoD fig. 7
    break_prompts   validation prompts per domain on which every round measures how many correct rollouts
                    feedback breaks; 0 = none; OPCoD app. E
    no_anchor       tutors need not name a concept of the question first; only answers are removed
    feedback_tokens  longest feedback, in tokens
    """
    phase = run.cfg.steps // rounds                             # K
    for step in run.steps():
        turn, step_of_turn = divmod(step, phase)
        number, first = divmod(turn, 2)                         # of the round; student 1 learns, then 2
        tutee, tutor = run.students[first], run.students[1 - first]
        run.train_only(tutee)
        # in the checkpoint: a resumed round keeps its gate
        decided = run.once("gate", lambda: cognizance(run, tau, gate, break_prompts), of=number)
        if first == 0 and step_of_turn == 0:
            run.notes["gate"] = {"round": number, **decided}
        rollouts = run.sample(tutee, run.draw(student=tutee))
        solutions = demonstrations(rollouts)                                                    # s
        domains = decided["tutors"][1 - first]
        commented = [r for r in rollouts if r.prompt["branch"] in domains]
        texts = feedback(run, tutor, tutee, commented)
        text_of = {id(r): text for r, text in zip(commented, texts)}                            # f
        run.notes["tutee"] = first + 1
        yield self_taught(run, tutee, rollouts, solutions, peer=[text_of.get(id(r)) for r in rollouts])


# ---- the gate ----------------------------------------------------------------------------------------------

def cognizance(run, tau, gate, break_prompts):
    """Return both students' validation scores, their cognizance gaps, and in which domains each one tutors.

    With break_prompts also how many correct rollouts each one's feedback breaks, whatever the gate says.
    """
    count = run.cfg.gate_rollouts
    scores = [run.mean_rewards(student, run.gate_prompts, count, "gate") for student in run.students]
    for domain in run.branches:
        if run.state["step"] == 0 and not any(s[domain] for s in scores):
            raise Refused(f"neither student answers a prompt of --val_prompts {domain} correctly, so their "
                          "scores say nothing: look at its grader, the students, or --max_new_tokens "
                          f"{run.cfg.max_new_tokens}")
    gaps = cognizance_gaps(scores)
    found = {"scores": scores, "gaps": gaps, "cognizant": [gap <= tau for gap in gaps]}
    domains_of = lambda i: [domain for domain in run.branches if may_tutor(gate, found, i, domain)]
    found["tutors"] = [domains_of(0), domains_of(1)]
    if break_prompts:                                           # (tutor, tutee), then the other way round
        found["broken"] = [broken(run, *pair, break_prompts) for pair in (run.students, run.students[::-1])]
    return found


def cognizance_gaps(scores):
    """Return Delta_i = sum_d (s*_d - s_d^i) / s*_d, with s*_d the best score on domain d. Eq. 2."""
    best = {domain: max(s[domain] for s in scores) for domain in scores[0]}
    gaps = []
    for s in scores:
        behind = [(best[d] - s[d]) / best[d] for d in best if best[d]]          # nobody scores: no gap
        gaps.append(sum(behind))
    return gaps


def may_tutor(gate, found, i, domain):
    """Whether student i gives feedback on a domain's prompts: the four strategies of the paper's fig. 7."""
    stronger = found["scores"][i][domain] >= found["scores"][1 - i][domain]
    return {"cognizance": found["cognizant"][i], "always": True, "never": False,
            "selective": found["cognizant"][i] or stronger}[gate]


# ---- the feedback ------------------------------------------------------------------------------------------

def feedback(run, tutor, tutee, rollouts):
    """Return what the tutor says about each of the tutee's rollouts and may be passed on, else None. App. C.

    Beside the paper's outcomes there is "too_long", a rollout for which the tutor has no room.
    """
    most, anchored = run.cfg.feedback_tokens, not run.cfg.no_anchor
    domains = [run.branches[run.students.index(student)] for student in (tutor, tutee)]
    prompts = [tutor.encode(tutor_prompt(r.prompt["prompt"], r.text, run.templates, *domains, anchored))
               for r in rollouts]
    fits = [run.fits(ids, most) for ids in prompts]
    written = iter(write(run, tutor, [ids for ids, room in zip(prompts, fits) if room], most))
    out, outcomes = [], Counter()
    for r, room in zip(rollouts, fits):
        text, finished, kept, outcome = "", False, None, "too_long"
        if room:
            text, finished = next(written)
            question = last_question(r.prompt["prompt"])[1]
            kept, outcome = accept(text, question, anchored, finished=finished)
        r.notes["feedback"] = text, outcome
        outcomes[outcome] += 1
        out.append(kept)
    run.notes["feedback"] = outcomes
    return out


def write(run, tutor, prompts, most):
    """Return what a tutor writes: a (text, whether it came to its end) for each prompt."""
    if not prompts:
        return []
    with run.timed("feedback"):
        completions = run.complete(tutor, prompts, max_new_tokens=most)
    run.notes["feedback_tokens"] = sum(len(ids_T) for ids_T, _ in completions)
    return [(tutor.decode(ids_T), ids_T[-1].item() in tutor.stops) for ids_T, _ in completions]


def broken(run, tutor, tutee, count):
    """Count the tutee's correct validation rollouts that its self-teacher gets wrong with feedback. App. E.

    correct: those whose feedback is kept. broken_without: how many of them it gets wrong without it, from the
    same demonstrations, which are another rollout. The paper measures on training prompts at the start, and
    has no such control.
    """
    prompts = [prompt for rows in run.gate_prompts.values() for prompt in rows[:count]]
    with run.without_side_effects("gate"):
        rollouts = run.sample(tutee, prompts)
        correct = [(r, s) for r, s in zip(rollouts, demonstrations(rollouts)) if r.reward == 1]
        feedbacks = feedback(run, tutor, tutee, [r for r, _ in correct])
        kept = [(r.prompt, s, f) for (r, s), f in zip(correct, feedbacks) if f]
        wrong = {}
        for name, with_feedback in (("broken", True), ("broken_without", False)):
            prompts = []
            for prompt, s, f in kept:
                seen = reprompt(prompt["prompt"], run.templates, s, peer=f if with_feedback else None)
                prompts.append(prompt | {"prompt": seen or prompt["prompt"]})
            answers = run.sample(run.self_teacher(tutee), prompts, n=1)
            wrong[name] = sum(answer.reward < 1 for answer in answers)
    return {"correct": len(kept)} | wrong
