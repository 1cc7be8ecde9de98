"""On-policy distillation (OPD) of language models on one GPU.

    python opd.py --student PATH --teachers PATH --prompts FILE --out DIR

The student writes, and the teacher's distribution corrects every token that it wrote. With y the student's
completion of a prompt, z and w both models' logits at its N tokens, the loss is

    lp, lq = z.log_softmax(-1), w.log_softmax(-1)       # log-probabilities [N, V] of student and teacher
    value_N = (lp.exp() * (lp - lq)).sum(-1)            # reverse KL(p || q) at every token
    loss = (weight_N * value_N).sum()                   # weight: 1 / length / number of rollouts
    loss.backward()                                     # y is data: no gradient passes through the sampling

In kernels/ it is the same loss without the [N, V] tensors. The loop, for every list of Jobs that a method
(methods/) yields:

    sample   the student completes the prompts                                                  Run.sample
    score    the teacher reads the completions: log p(y), log q(y), and so their gap            score
    select   the method weighs every rollout; weight 0 drops it                                 methods/
    weigh    one weight per token, normalised over the whole batch                              weigh
    update   the gradient of a divergence or of a policy (losses.py), one optimizer step        update

A Rollout is one completion with its prompt. A Job says who learns, from whom, on which rollouts, with which
objective and weights (methods/__init__.py). Suffixes name the axes of a tensor: T tokens of one completion,
N tokens of several in a row, B sequences, H hidden width, V vocabulary.

Left out on purpose: more than one process, inference servers, cross-tokenizer distillation. Dropout is off
everywhere, so that the distribution that is sampled is the one that is trained.
"""
import contextlib
import functools
import hashlib
import importlib
import json
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":                          # the imports take seconds, in which Ctrl-C is a line, too
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:      # as of a script's command in the background
            signal.signal(number, lambda *_: sys.exit("opd.py: interrupted before the first step"))

import torch
from tqdm import tqdm

import config
import models
from config import Refused
from data.check import check_prompts
from data.folder import (Folder, answer_records, logged_samples, process_memory, rollout_stats, step_line,
                         warn_of_first_step)
from data.graders import grade
from data.monitor import watch
from data.prompts import load_prompts, read_system
from kernels import linear_divergence, linear_logprob
from losses import LOSSES, policy_gradient_weight, target_at, truncated_importance
from methods import METHODS, Job, Rollout, by_branch, shuffled
from methods.anchor import anchors
from methods.feedback import Templates, read_templates
from methods.rewards import advantages
from methods.token_weights import weigh_tokens
from models import micro_batches
from sampler import default_rows
from text import read_models


# ---- the loop ----------------------------------------------------------------------------------------------

def train(run):
    """The loop. It never asks which method it runs."""
    begin(run)                                      # check the start, write config.json, evaluate
    for jobs in run.jobs():                         # sample, score, select: the method's own lines
        run.score(jobs, gaps=False)                 # what the loss needs and the method has not asked for
        weights = weigh(jobs)                       # one number per token, normalised over the whole batch
        stats = update(run, jobs, weights)          # backward of all Jobs, then one step of every learner
        record(run, jobs, weights, stats)           # count, log, evaluate, save
    finish(run)


@torch.no_grad()
def score(job, gaps, micro_tokens):
    """Let a Job's teacher read its rollouts, once. After that the update needs no more than its output head.

    Fills job.hidden_t, the teacher's hidden states in main memory, if the objective is a divergence. With
    `gaps`, and for the loss pg, also job.lp and job.lq, log p(y) and log q(y) of every token. What is known
    is not asked again, and a rollout whose weight is known to be 0 is not read. Returns the tokens read.
    """
    learner, teacher, objective, rollouts = job.learner, job.teacher, job.objective, job.rollouts
    nothing = [None] * len(rollouts)                        # None stays where a rollout is not read
    hidden, lp, lq = (list(known or nothing) for known in (job.hidden_t, job.lp, job.lq))
    need_states = objective.divergence is not None
    need_gaps = gaps or objective.label == "pg" or job.lp is not None
    read = [i for i in range(len(rollouts))
            if (job.weights is None or torch.as_tensor(job.weights[i]).any())
            and (need_states and hidden[i] is None or need_gaps and lq[i] is None)]
    if teacher is None or not read:
        return 0
    lengths = {i: len(rollouts[i].teacher_ids) + len(rollouts[i].ids_T) for i in read}
    with teacher.on_device():
        # the product with the vocabulary is made where the student is, also with --teacher_device cpu
        head_t_VH = teacher.head_VH.to(learner.device) if need_gaps else None
        for group in micro_batches(lengths, micro_tokens):
            completions = [rollouts[i].ids_T for i in group]
            hidden_NH = teacher.hidden_states([rollouts[i].teacher_ids for i in group], completions)
            if need_states:
                put(hidden, group, hidden_NH.cpu().split([len(ids_T) for ids_T in completions]))
            if need_gaps:
                put(lq, group, teacher.token_log_probs(hidden_NH.to(learner.device), completions,
                                                       objective.temperature, head_t_VH, learner.vocab))
    if need_states:
        job.hidden_t = hidden
    if need_gaps:
        new = [i for i in read if lp[i] is None]
        prompts, completions = [rollouts[i].prompt_ids for i in new], [rollouts[i].ids_T for i in new]
        put(lp, new, learner.log_probs(prompts, completions, micro_tokens, objective.temperature))
        job.lp, job.lq = lp, lq
    return sum(lengths.values())


def weigh(jobs):
    """Return the weight of every token: for each Job a list with one tensor [T] per rollout.

    It is the method's weight (selection, scale, advantage), divided by the rollout's length where the Job's
    loss is a mean over tokens, and by the learner's number of rollouts in this step. So micro-batches never
    matter.
    """
    weights = []
    for job in jobs:
        given = [1.0] * len(job.rollouts) if job.weights is None else job.weights
        weights.append([torch.as_tensor(w, dtype=torch.float64, device=r.ids_T.device).expand(len(r.ids_T))
                        for w, r in zip(given, job.rollouts, strict=True)])
    counts = rollout_counts(jobs, weights)
    for job, job_weights in zip(jobs, weights):
        for i, w_T in enumerate(job_weights):
            length = len(w_T) if job.tokens == "mean" else 1
            job_weights[i] = w_T / (length * counts[job.learner])
    return weights


def backward(run, job, weights):
    """Add a Job's gradient to its learner. Returns (loss, stats: name -> tensor over the weighted tokens)."""
    learner, teacher, objective = job.learner, job.teacher, job.objective
    kept = [i for i, w_T in enumerate(weights) if w_T.any()]
    lengths = {i: len(job.rollouts[i].prompt_ids) + len(job.rollouts[i].ids_T) for i in kept}
    head_t_VH = teacher.head_VH.detach().to(learner.device) if objective.divergence else None
    kind = dict(divergence=objective.divergence, knob=objective.knob, target=objective.target,
                support=objective.support, top_k=objective.top_k, entry_clip=objective.entry_clip)
    note = job.lp is None and gap_is_free(run, objective, [weights[i] for i in kept])
    total, collected, noted = 0.0, {}, []
    for group in micro_batches(lengths, run.cfg.micro_tokens):
        completions = [job.rollouts[i].ids_T for i in group]
        labels_N = torch.cat(completions)
        hidden_NH = learner.hidden_states([job.rollouts[i].prompt_ids for i in group], completions)
        weight_N = torch.cat([weights[i] for i in group]) * correction(job, group, hidden_NH)
        common = dict(temperature=objective.temperature, vocab=learner.vocab)
        if objective.label:
            loss, stats = linear_logprob(hidden_NH, learner.head_VH, labels_N, weight_N,
                                         softcap=learner.softcap, **common)
            if objective.label == "pg":
                stats["gap"] = torch.cat([job.lq[i] - job.lp[i] for i in group])
        else:
            hidden_t_NH = torch.cat([job.hidden_t[i] for i in group]).to(learner.device)
            loss, stats = linear_divergence(
                hidden_NH, learner.head_VH, hidden_t_NH, head_t_VH, weight_N, labels_N=labels_N,
                label_weight_N=objective.ce * weight_N if objective.ce else None,
                softcap_s=learner.softcap, softcap_t=teacher.softcap, **kind, **common)
            if note:
                noted.append((group, stats))
        loss.backward()
        total += loss.item()
        for name, x_N in stats.items():
            collected.setdefault(name, []).append(x_N[weight_N != 0])
    for group, stats in noted:                              # at the end: nothing is known of half a Job
        note_gap(job, group, stats)
    return total, {name: torch.cat(parts) for name, parts in collected.items()}


def update(run, jobs, weights):
    """Add up the gradients of all Jobs, make one step of every learner, and return the step's statistics."""
    learners = list(dict.fromkeys(job.learner for job in jobs))         # once, however many Jobs it has
    lr, most = learning_rate(run.cfg, learners[-1].updates), run.cfg.grad_clip or math.inf
    with run.timed("update"):
        losses, stats = zip(*halving(
            run, jobs, lambda: [backward(run, *both) for both in zip(jobs, weights)]))
        norm = sum(torch.nn.utils.clip_grad_norm_(learner.net.parameters(), most).item()    # inf: measured,
                   for learner in learners)                                                 # not clipped
        if finite := math.isfinite(norm + sum(losses)):
            for learner in learners:
                make_step(run, learner)
        else:
            drop(run, jobs, learners)
    values = {"loss": sum(losses), "grad_norm": norm} if finite else {"loss": None, "grad_norm": None}
    return {"step": run.state["step"], **values, "lr": lr, **step_stats(run, jobs, weights, stats)}


def make_step(run, learner):
    """Make the optimizers' step with the gradient that a learner has, and let its average follow."""
    lr = learning_rate(run.cfg, learner.updates) * learner.lr_factor
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    learner.updates += 1
    run.state["dropped"] = 0
    if learner.average and run.cfg.self_teacher == "ema":               # a snapshot waits for run.refresh
        models.follow(learner.average, run.cfg.ema_rate)


# ---- what score, weigh, backward and update need -----------------------------------------------------------

def put(values, places, new):
    """Put new values in their places of a list."""
    for i, value in zip(places, new, strict=True):
        values[i] = value


def halving(run, jobs, work):
    """Return work(). Where memory is short, do it again with half of --micro_tokens: the same result."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            longest = max(len(ids) + len(r.ids_T) for job in jobs for r in job.rollouts
                          for ids in (r.prompt_ids, r.teacher_ids))
            if run.cfg.micro_tokens <= longest:                 # the longest sequence is alone already
                raise
        for learner in run.learners:
            learner.net.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        run.cfg.micro_tokens //= 2
        tqdm.write(f"note: out of memory; goes on with --micro_tokens {run.cfg.micro_tokens}")


def drop(run, jobs, learners):
    """Leave out a step with what is not a number, and say where; without --skip_bad_steps refuse it."""
    for learner in learners:
        learner.net.zero_grad(set_to_none=True)
    broken = [job for job in jobs for x in [*(job.hidden_t or []), *(job.lq or [])]
              if x is not None and not x.isfinite().all()]
    if wrong := next((learner for learner in run.learners if not models.is_finite(learner.net)), None):
        why = f"the weights of {wrong.path} are no numbers any more; lower --lr or --weight_decay"
    elif broken:
        why = (f"{broken[0].teacher.path} computes what is not a number for one of the prompts of "
               f"{broken[0].branch}")
    else:
        why = "loss or gradient are not a number, though all weights are; lower --lr, or look at the data"
    why = f"step {run.state['step'] + 1}: {why}"
    run.state["dropped"] += 1
    if run.state["dropped"] >= run.cfg.skip_bad_steps:
        raise Refused(why)
    tqdm.write(f"note: {why}; the step is dropped")


def rollout_counts(jobs, weights):
    """Return {learner: what its loss is divided by}: its rollouts that have a weight, or what its Jobs count.

    A completion is known by its tensor of ids: several Jobs may hold it, and it counts once.
    """
    kept, counted = {}, {}                  # learner -> completions; learner -> {completions: Job.count}
    for job, job_weights in zip(jobs, weights):
        kept.setdefault(job.learner, set())
        counted.setdefault(job.learner, {})
        if job.count is None:
            kept[job.learner] |= {id(r.ids_T) for r, w_T in zip(job.rollouts, job_weights) if w_T.any()}
        else:
            counted[job.learner][frozenset(id(r.ids_T) for r in job.rollouts)] = job.count
    out = {}
    for learner in kept:
        covered = set().union(*counted[learner])            # in grpo and dpo the Job says what it counts
        out[learner] = max(len(kept[learner] - covered) + sum(counted[learner].values()), 1)
    return out


@torch.no_grad()
def correction(job, group, hidden_NH):
    """Return the factor of the tokens' weights that depends on the sampler: 1, or a tensor [N].

    For pg it is the advantage with its importance weight. Elsewhere, with a cap, it is the importance weight
    of the sampled rollouts; fixed data was not sampled.
    """
    objective, rollouts = job.objective, [job.rollouts[i] for i in group]
    if objective.label == "pg":
        assert all(r.logp_T is not None for r in rollouts), "pg needs rollouts that were sampled"
        # compared with all rollouts of the prompt, whatever the micro-batch and the weights are
        rewards = advantages(job.rollouts) if objective.reward else [0.0] * len(job.rollouts)
        return torch.cat([policy_gradient_weight(job.lq[i] - job.lp[i], job.lp[i], job.rollouts[i].logp_T,
                                                 objective.importance, objective.advantage_clip,
                                                 objective.reward * rewards[i]) for i in group])
    if not objective.cap or all(r.logp_T is None for r in rollouts):
        return 1
    lps = job.learner.token_log_probs(hidden_NH, [r.ids_T for r in rollouts], objective.temperature)
    return torch.cat([torch.ones_like(lp_T) if r.logp_T is None else
                      truncated_importance(lp_T, r.logp_T, objective.cap) for lp_T, r in zip(lps, rollouts)])


def gap_is_free(run, objective, weights):
    """Whether the loss computes log p(y) and log q(y) of all tokens anyway: a divergence from the teacher.

    With taid and veto only the last step would qualify; it does not, so that all steps show the same numbers.
    Tokens without a weight are skipped.
    """
    plain = objective.divergence and objective.target == (1.0, 0.0) and run.cfg.target == "teacher"
    return bool(plain) and all(w_T.all() for w_T in weights)


def note_gap(job, group, stats):
    """Keep log p(y) and log q(y) of some rollouts, from the statistics of the loss."""
    if job.lp is None:
        job.lp, job.lq = [None] * len(job.rollouts), [None] * len(job.rollouts)
    lengths = [len(job.rollouts[i].ids_T) for i in group]
    put(job.lp, group, stats["logprob_s"].split(lengths))
    put(job.lq, group, stats["logprob_t"].split(lengths))


def step_stats(run, jobs, weights, stats):
    """Return the statistics of a step, and if it has several Jobs those of each."""
    found = by_branch([r for job in jobs for r in job.rollouts])
    branches = [name for name in run.branches if name in found]
    by_job = {}
    for job, job_weights, job_stats in zip(jobs, weights, stats):
        name = job.branch + (f", {job.learner.name}" if job.learner not in run.students else "")
        name += f", {job.beside}" if job.beside else ""
        name = name if name not in by_job else f"{name}, Job {len(by_job) + 1}"
        by_job[name] = rollout_stats([job], [job_weights], [job_stats])
    own = [i for i, job in enumerate(jobs)                                      # not a teacher that learns
           if job.learner in run.students and not job.beside]
    of_students = ([x[i] for i in own] for x in (jobs, weights, stats))
    return {"branch": "+".join(branches), **rollout_stats(*of_students),
            **({"branches": by_job} if len(jobs) > 1 else {})}


def learning_rate(cfg, step):
    """Return the learning rate: a linear warm-up, then constant, or down to 0 linearly or as a cosine."""
    done = step / cfg.steps
    shape = {"constant": 1.0, "linear": 1 - done,
             "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.lr_schedule]
    return cfg.lr * shape * min(1.0, (step + 1) / max(cfg.warmup, 1))


def gradients(run, job, parameters, weights=None):
    """Return a Job's gradient for some parameters, and clear it again. lab/diagnosis.py uses it."""
    backward(run, job, weigh([job])[0] if weights is None else weights)
    out = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    job.learner.net.zero_grad(set_to_none=True)
    return out


# ---- before the loop, after every step, and at the end -----------------------------------------------------

def begin(run):
    """Check the start, write config.json, and say in metrics.jsonl where the student started."""
    if run.cfg.eval_only and (run.out / "report.md").exists():
        return tqdm.write(f"{run.out} has a report.md: it is evaluated")
    check_samplers(run)
    run.folder.take()
    if config.read_config(run.out) != run.previous:
        raise Refused(f"another process has begun a run in {run.out} meanwhile; choose another --out")
    run.folder.write_config(config.record(run.cfg))
    if run.state["step"] == 0:
        run.folder.put_logs_aside()
        run.folder.log("metrics", {"step": -1, **measure(run, 0)})
    if run.state["step"] >= run.total > 0:
        tqdm.write(f"{run.out} has done its {run.state['step']} steps; more --steps go on from there")


def check_samplers(run):
    """See that what is sampled is what is trained, on eight short completions that nobody learns from."""
    cfg, sets = run.cfg, run.prompts or run.evals
    rows = math.ceil(8 / len(sets))
    for student in run.students:
        prompts = []
        for branch_rows in sets.values():
            prompts += [student.encode(row["prompt"]) for row in branch_rows[:rows]]
        with run.without_side_effects(), student.on_device():
            models.check_sampler(student, prompts, min(cfg.max_new_tokens, 32), cfg.sample_batch,
                                 cfg.micro_tokens)
    if run.method.samples and (cfg.temperature != 1 or cfg.top_p < 1):
        tqdm.write(f"note: sampling at temperature {cfg.temperature}, top_p {cfg.top_p} is not sampling from "
                   "p itself; only the weights of --loss pg and --importance_cap correct for it")


def check_first_rollouts(run, jobs):
    """See that the whole rollouts of the first step came from the student, where log p(y) is known anyway."""
    cfg = run.cfg
    if (cfg.temperature, cfg.top_p, cfg.loss_temperature) != (1, 1, 1):
        return
    for job in jobs:
        known = [(lp_T, r.logp_T) for lp_T, r in zip(job.lp or [], job.rollouts)
                 if lp_T is not None and r.logp_T is not None]
        if known and job.learner in run.students:
            models.check_log_probs(job.learner, *zip(*known))


def measure(run, step):
    """Return the evaluation and the diagnosis that are due after so many steps."""
    # before the first step, after the last one, and every so many
    due = lambda every: step in (0, run.total) or (every and step % every == 0)
    out = {}
    if getattr(run.cfg, "diagnose_every", 0) and due(run.cfg.diagnose_every):
        diagnosis = lab("diagnosis", "--diagnose_every")
        out["diagnosis"] = diagnosis.diagnose(run, functools.partial(gradients, run))
    if due(run.cfg.eval_every):
        out["eval"] = run.evaluate()
    return out


def record(run, jobs, weights, stats):
    """After a step: count it, evaluate when due, one line on screen and disk, a checkpoint when due."""
    cfg, state = run.cfg, run.state
    for job, job_weights in zip(jobs, weights):
        for sample in logged_samples(job, job_weights, 0 if job.beside else cfg.log_samples):
            run.folder.log("samples", {"step": state["step"], **sample})
    if state["step"] == 0:
        check_first_rollouts(run, jobs)
        warn_of_first_step(cfg, stats)
    state["step"] += 1
    stats |= measure(run, state["step"])
    parts = {name: peak / 2**30 for name, peak in run.peaks.items()}
    stats |= {"seconds": run.clock, "memory_gib": max(parts.values(), default=0) or process_memory(),
              **({"memory_gib_by_part": parts} if parts else {}),
              **{name: state[name] for name in ("sampled_tokens", "teacher_tokens")}, **run.notes}
    if warnings := watch(run.memory, stats):
        stats["warnings"] = warnings
    run.folder.log("metrics", stats)
    tqdm.write(step_line(stats, cfg.loss, run.total, run.notes), file=sys.stdout)
    run.clock, run.peaks, run.notes = {}, {}, {}
    due = cfg.save_every and state["step"] % cfg.save_every == 0
    if due or state["step"] == run.total or run.stopping:
        check_sound(run, jobs)
        run.folder.save(run.learners, state)


def check_sound(run, jobs):
    """Refuse to save learners from which no step could go on.

    The gradient of log p(y) of a few of the last rollouts, which needs no teacher, must still be finite.
    """
    for job in jobs:
        probe = Job(job.learner, None, job.rollouts[:4], LOSSES["nll"])
        parameters = [p for p in job.learner.net.parameters() if p.requires_grad]
        if not (models.is_finite(job.learner.net)
                and all(g.isfinite().all() for g in gradients(run, probe, parameters))):
            raise Refused(f"after step {run.state['step']} {job.learner.path} computes what is not a number, "
                          "and so is not saved; lower --lr or --weight_decay")


def finish(run):
    """Write final/, if anything was trained, and, where lab/ is there, the report."""
    if run.total:
        run.folder.finish(run.students)
    if report := lab("report"):
        report.write_run(run.out)


# ---- the run -----------------------------------------------------------------------------------------------

class Run:
    """What a method may use (methods/__init__.py lists it), and the state that a checkpoint keeps."""

    def __init__(self, cfg):
        self.cfg, self.out, self.method = cfg, Path(cfg.out), METHODS[cfg.method]
        self.folder = Folder(self.out, cfg)
        self.stopping = self.looping = False                    # see stopping_gently
        self.read_prompts()
        self.previous = config.check_resume(cfg)                # settings of the run to resume, or None
        if self.previous and not cfg.dry_run:
            self.folder.take()                                  # before the checkpoint is looked for
        checkpoint = self.folder.find_checkpoint() if self.previous else None
        goes_on = checkpoint or self.previous and (cfg.eval_only or self.previous.get("eval_only"))
        if goes_on:
            for name in ("max_new_tokens", "sample_batch", "today"):    # what their defaults were then
                setattr(cfg, name, getattr(cfg, name) or self.previous.get(name))
        cfg.today = cfg.today or time.strftime("%Y-%m-%d")
        self.read_models()                                      # whatever is wrong is found before the
        if goes_on:                                             # weights are read
            config.check_same_experiment(cfg, self.previous)
        if not cfg.max_new_tokens:
            cfg.max_new_tokens = 2048 if self.student.may_think() else 512
        self.longest = check_prompts(self)
        if checkpoint and not cfg.dry_run:
            self.folder.open_checkpoint()
        self.load_models(checkpoint)
        cursor = dict.fromkeys(self.branches, 0)                # of each student, in each branch
        self.state = {"step": 0, "sampled_tokens": 0, "teacher_tokens": 0, "dropped": 0, "memory": {},
                      "cursor": [dict(cursor) for _ in self.students]}
        self.clock, self.peaks = {}, {}                         # seconds and GPU bytes by part of a step
        self.notes = {}                                         # what a method adds to a step's metrics
        cfg.sample_batch = cfg.sample_batch or default_rows(
            self.student, max(self.longest.prompt, self.longest.read) + cfg.max_new_tokens, cfg.device)
        if checkpoint and not cfg.dry_run:
            self.state = self.folder.restore(self.learners)

    # -- prompts and models

    def read_prompts(self):
        """Read the prompt files and the templates, and note in the settings what they hold."""
        cfg = self.cfg
        read = lambda paths: {name: load_prompts(path, name) for name, path in paths.items()}
        self.prompts, self.evals = read(cfg.prompts), read(cfg.eval_prompts)
        self.gate_prompts = read(getattr(cfg, "val_prompts", {}))
        templates = getattr(cfg, "templates", None)
        self.templates = read_templates(templates) if templates else Templates()
        texts = dict(self.prompts or self.evals)
        texts |= {f"val {branch}": rows for branch, rows in self.gate_prompts.items()}
        texts |= {"templates": vars(self.templates)} if templates else {}
        system = getattr(cfg, "teacher_system", None)
        self.system = read_system(system) if system is not None else ""
        texts |= {"teacher_system": self.system} if self.system else {}
        cfg.prompts_sha256 = {name: hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]
                              for name, text in texts.items()}

    def read_models(self):
        """Read what is known of the models without their weights (text.py)."""
        self.students, by_path = read_models(self.cfg, self.method.teacher_learns)
        self.self_teachers = [replace(student, template_kwargs=self.cfg.teacher_chat_template_kwargs)
                              for student in self.students]
        self.name_models(by_path)
        names = ["student"] if len(self.students) == 1 else ["student 1", "student 2"]
        self.cfg.models_sha256 = {name: student.digest for name, student in zip(names, self.students)}
        self.cfg.models_sha256 |= {f"teacher of {name}": t.digest for name, t in self.teachers.items()}

    def load_models(self, checkpoint):
        """Make Models (models.py) of the Readers: students, teachers and self-teachers with their weights."""
        cfg, learns = self.cfg, self.method.teacher_learns
        if cfg.device != "cpu" and not cfg.dry_run:
            torch.cuda.set_device(cfg.device)                   # streams and graphs are of the current device
        readers = {path: self.teachers[branch] for branch, path in cfg.teachers.items()}
        self.students = models.load_students(self.students, cfg, checkpoint, learns)
        by_path = models.load_teachers(readers, self.students[0], cfg, checkpoint, learns)
        kind = getattr(cfg, "self_teacher", "frozen" if getattr(cfg, "kl_weight", 0) else None)
        self.self_teachers = [models.make_self_teacher(reader, student, kind, cfg)
                              for reader, student in zip(self.self_teachers, self.students)]
        self.learners = self.students + [t for t in by_path.values() if isinstance(t, models.Learner)]
        self.name_models(by_path)

    def name_models(self, by_path):
        """Give the models their names for a method. by_path: {path: teacher}."""
        self.student = self.students[0]
        self.teachers = {branch: by_path[path] for branch, path in self.cfg.teachers.items()}
        self.teacher = next(iter(by_path.values())) if len(by_path) == 1 else None     # the only one

    # -- what a method asks for

    @property
    def branches(self):
        """Names of the branches of prompts."""
        return list(self.prompts)

    @property
    def shares(self):
        """{branch: prompts} of a batch of all branches."""
        return config.split(self.cfg.batch, self.cfg.mixture, self.branches)

    @property
    def total(self):
        """Steps of the loop: --steps for each student, as two students learn in turn."""
        return self.cfg.steps * len(self.students)

    @property
    def objective(self):
        """The objective of the current step: the target moves with the training."""
        cfg = self.cfg
        done = 1.0                                              # 0 in the first step, 1 in the last
        if self.total > 1:
            done = min(self.state["step"] / (self.total - 1), 1.0)
        start = cfg.taid_start if cfg.target == "taid" else cfg.veto_beta
        return replace(LOSSES[cfg.loss], temperature=cfg.loss_temperature, knob=config.knob(cfg),
                       top_k=cfg.top_k, support=cfg.support, entry_clip=cfg.entry_clip or None,
                       target=target_at(cfg.target, start, done), importance=tuple(cfg.importance),
                       advantage_clip=cfg.advantage_clip, reward=getattr(cfg, "reward_weight", 0.0),
                       cap=getattr(cfg, "importance_cap", None) or None,
                       ce=getattr(cfg, "ce_weight", 0.0))

    @property
    def memory(self):
        """A method's own values, plain Python data, which the checkpoint keeps."""
        return self.state["memory"]

    def once(self, key, make, of=None):
        """Return what make() has computed: once per run, or once `of` a round, whose number it is."""
        if self.memory.get(key, [None])[0] != [of]:
            self.memory[key] = [[of], make()]                   # that of the last round goes
        return self.memory[key][1]

    def jobs(self):
        """Yield the method's lists of Jobs. Every step has its own seed: a resumed one repeats itself."""
        own = {name: getattr(self.cfg, name) for name in self.method.own}
        method = self.method.generator(self, **own)
        with tqdm(total=self.total, initial=self.state["step"], desc=self.cfg.out, unit="step",
                  disable=not self.total) as progress:
            while self.state["step"] < self.total:
                if self.stopping:
                    raise KeyboardInterrupt
                self.looping = True
                torch.manual_seed(self.cfg.seed * 1_000_003 + self.state["step"])
                jobs = next(method, None)                       # the method goes on up to its next yield
                if jobs is None:
                    return
                assert isinstance(jobs, list), f"{self.cfg.method} yields lists of Jobs, not {type(jobs)}"
                jobs = [job for job in jobs if job.rollouts]
                assert jobs, f"{self.cfg.method} has yielded no rollouts"
                anchored = anchors(self, jobs) if getattr(self.cfg, "kl_weight", 0) else []
                if self.cfg.drop_cut:
                    for job in jobs + anchored:
                        job.leave_out_cut()
                jobs += weigh_tokens(self, jobs) if getattr(self.cfg, "token_weight", None) else []
                yield jobs + anchored
                progress.update()

    def steps(self):
        """Yield the number of every step still to do. A step is done when the method has yielded its Jobs."""
        while self.state["step"] < self.total:
            yield self.state["step"]

    def draw(self, branch=None, student=None, count=None):
        """Return the next --batch prompts of a branch, or of all branches in the shares of --mixture.

        They are shuffled anew in every epoch. Of two students each goes through all, in the same order.
        """
        counts = self.shares
        if branch:
            counts = {branch: self.cfg.batch if count is None else count}
        cursors = self.state["cursor"][self.students.index(student or self.student)]
        drawn = []
        for name, many in counts.items():
            prompts = self.prompts[name]
            for position in range(cursors[name], cursors[name] + many):         # counted through all epochs
                epoch, i = divmod(position, len(prompts))
                order = shuffled(len(prompts), f"{self.cfg.seed} {name} {epoch}")
                drawn.append(prompts[order[i]])
            cursors[name] += many
        return drawn

    def sample(self, model, prompts, n=None, temperature=None, top_p=None):
        """Return n rollouts of every prompt (default: --rollouts), graded where the prompt has an answer."""
        if not prompts:
            return []
        n = n or getattr(self.cfg, "rollouts", 1)
        with self.timed("sample"):
            inputs = []
            for prompt in prompts:
                # a student is trained on what it saw; another model may see the prompt differently
                learns = model in self.students
                ids = model.encode(prompt["prompt"] if learns else
                                   prompt.get("teacher_prompt", prompt["prompt"]))
                views = self.views(prompt, ids if learns else None)
                inputs += [(prompt, ids, views)] * n
            completions = self.complete(model, [ids for _, ids, _ in inputs], temperature, top_p)
            rollouts = []
            for (prompt, _, views), (ids_T, logp_T) in zip(inputs, completions, strict=True):
                r = self.rollout(prompt, ids_T.to(self.student.device), views, logp_T=logp_T,
                                 text=model.decode(ids_T))
                if "answer" in prompt:
                    r.reward = grade(prompt["grader"], r.text, prompt["answer"], prompt)
                rollouts.append(r)
        written = "sampled_tokens" if model in self.students else "teacher_tokens"
        self.state[written] += sum(len(r.ids_T) for r in rollouts)
        return rollouts

    def complete(self, model, prompts, temperature=None, top_p=None, max_new_tokens=None):
        """Return what a model writes after some prompts (token ids): [(ids_T, logp_T)]."""
        cfg = self.cfg
        with model.on_device():
            return model.generate(prompts, cfg.temperature if temperature is None else temperature,
                                  top_p or cfg.top_p, max_new_tokens or cfg.max_new_tokens, cfg.sample_batch)

    def views(self, prompt, prompt_ids=None):
        """Return a prompt's token ids as the student sees it, and as the branch's teacher sees it.

        A teacher_prompt is for the branch's teacher, or where there is none for the self-teacher.
        """
        prompt_ids = prompt_ids or self.student.encode(prompt["prompt"])
        teacher, seen = self.teachers.get(prompt["branch"]), prompt.get("teacher_prompt", prompt["prompt"])
        if "teacher_prompt" in prompt:
            teacher = teacher or self.self_teachers[0]
        return prompt_ids, teacher.encode(seen) if teacher else prompt_ids

    def rollout(self, prompt, ids_T, views=None, **more):
        """Return a Rollout with the prompt as student and teacher see it."""
        return Rollout(prompt, ids_T, *(views or self.views(prompt)), **more)

    def fixed(self, prompt, ids, text, reward=None):
        """Return a Rollout of fixed data."""
        return self.rollout(prompt, torch.tensor(ids, device=self.student.device), text=text, reward=reward)

    def references(self, prompts, field="solution"):
        """Return texts of the prompt rows as Rollouts: fixed data, closed by EOS."""
        return [self.fixed(prompt, self.student.encode_completion(prompt[field]), prompt[field])
                for prompt in prompts]

    def route(self, rollouts):
        """Return one Job per branch, each with its branch's teacher."""
        return [Job(self.student, self.teachers[branch], group, self.objective)
                for branch, group in by_branch(rollouts).items()]

    def score(self, jobs, gaps=True):
        """Let the teachers read the Jobs' rollouts: see `score`."""
        with self.timed("score"):
            for job in jobs:
                read = halving(self, [job], lambda job=job: score(job, gaps, self.cfg.micro_tokens))
                self.state["teacher_tokens"] += read if job.learner in self.students else 0

    def self_teacher(self, student):
        """Return the model by which a student teaches itself."""
        return self.self_teachers[self.students.index(student)]

    def refresh(self, teacher):
        """Copy the student as it is into its self-teacher, a snapshot."""
        models.follow(teacher, 1.0)

    def train_only(self, learner):
        """With --teacher_device swap keep only this student on the GPU: the others move to main memory."""
        for student in self.students:
            if self.cfg.teacher_device == "swap" and student.offloaded != (student is not learner):
                (models.onload if student is learner else models.offload)(student)

    def fits(self, ids, more):
        """Whether a prompt and `more` tokens have room in the students' positions."""
        return len(ids) + more <= min(student.positions for student in self.students)

    def mean_rewards(self, model, sets, n, part=None, log=False):
        """Return {set: mean reward} of a model on sets of prompts. Seconds count as `part` of the step.

        log: append a line per prompt to eval.jsonl.
        """
        cfg = self.cfg
        n = n if cfg.eval_temperature > 0 else 1                # greedy completions are all the same
        out, step = {}, self.state["step"] - 1                  # as of the line in metrics.jsonl
        with self.without_side_effects(part):
            for name, prompts in sets.items():
                rollouts = self.sample(model, prompts, n, cfg.eval_temperature, cfg.eval_top_p)
                out[name] = sum(r.reward for r in rollouts) / len(rollouts)
                if log:
                    self.folder.log("eval", *answer_records(step, name, rollouts, n, model.stops))
        return out

    def evaluate(self):
        """Return the mean reward per --eval_prompts set, of two students as "1/SET" and "2/SET"."""
        out = {}
        for i, student in enumerate(self.students, 1):
            prefix = f"{i}/" if len(self.students) > 1 else ""
            sets = {prefix + name: prompts for name, prompts in self.evals.items()}
            out |= self.mean_rewards(student, sets, self.cfg.eval_rollouts, log=True)
        if self.cfg.eval_only:
            tqdm.write("eval " + " ".join(f"{name} {x:.3f}" for name, x in out.items()), file=sys.stdout)
        return out

    @contextlib.contextmanager
    def without_side_effects(self, part=None):
        """Context manager for measurements: clock, counters, cursors, notes and randomness stay as they are.

        Every measurement starts from the same seed. If `part` is given, its seconds count as that part of the
        step.
        """
        clock, notes = dict(self.clock), dict(self.notes)
        cursors = [dict(cursor) for cursor in self.state["cursor"]]
        counted = self.state | {"cursor": cursors, "memory": self.memory}
        on_gpu = [self.student.device] if self.student.device.type == "cuda" else []
        started = time.perf_counter()
        with torch.random.fork_rng(on_gpu):
            torch.manual_seed(self.cfg.seed)
            yield
        self.clock, self.notes = clock, notes
        self.state.update(counted)
        if part:
            self.clock[part] = self.clock.get(part, 0.0) + time.perf_counter() - started

    @contextlib.contextmanager
    def timed(self, part):
        """Context manager: count the seconds of a part of the step, and on a GPU its peak memory."""
        started, device = time.perf_counter(), self.student.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.peaks[part] = max(self.peaks.get(part, 0), torch.cuda.max_memory_allocated(device))
        self.clock[part] = self.clock.get(part, 0.0) + time.perf_counter() - started


def lab(name, flag=None):
    """Return a module of lab/. Where that folder was deleted: None, or a refusal if a flag needs it."""
    try:
        return importlib.import_module(f"lab.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lab"):
            raise
        if flag:
            raise Refused(f"{flag} needs lab/{name}.py, which is not here") from None


LESS_MEMORY = ("What takes less memory: lower --micro_tokens or --sample_batch, "
               "--gradient_checkpointing, --teacher_device swap, --lora_rank 16; --dry_run shows it by part")


def configure(argv=None):
    """Return the settings of a run from the command line."""
    return config.parse(argv, __doc__.partition("\n\nIn kernels/")[0], METHODS)


def set_up(argv):
    """Return (settings, Run, the preflight of --dry_run or None); whatever is wrong with them is refused."""
    cfg = configure(argv)
    preflight = lab("preflight", "--dry_run") if cfg.dry_run else None
    if getattr(cfg, "diagnose_every", 0):
        lab("diagnosis", "--diagnose_every")
    try:
        return cfg, Run(cfg), preflight
    except torch.OutOfMemoryError:
        raise Refused(f"the models do not fit on {cfg.device}. {LESS_MEMORY}") from None
    except ValueError as error:                             # of a library, about files and settings
        raise Refused(config.first_line(error)) from None


@contextlib.contextmanager
def stopping_gently(run):
    """Context manager: the first Ctrl-C or SIGTERM waits for the end of the step and a checkpoint.

    A second one stops at once, and so does the first one where no step is going on.
    """
    def stop(number, frame):
        if run.stopping or not run.looping:
            raise KeyboardInterrupt
        run.stopping = True
        tqdm.write("stopping after this step, with a checkpoint; once more stops at once")
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv=None):
    """Run the command line. Whatever a user can mend ends in one line and exit status 1."""
    run, begun = None, False
    try:
        cfg, run, preflight = set_up(argv)
        if preflight:
            return preflight.show(run)
        with stopping_gently(run):
            begun = True
            return train(run)
    except (Refused, OSError) as error:                     # OSError: a full disk, say
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted " + (f"after step {run.state['step']}" if begun else "before the first step")
    except torch.OutOfMemoryError:
        message = f"step {run.state['step'] + 1} does not fit on {cfg.device}. {LESS_MEMORY}"
    if begun and run.folder.lock:
        message += f"; {run.folder.holds}"
    raise SystemExit(f"opd.py: {config.one_line(message)}")


if __name__ == "__main__":
    main()
