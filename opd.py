"""On-policy distillation (OPD) of language models on one GPU.

    python opd.py --student PATH --teachers PATH --prompts FILE --out DIR

The loop, for every list of Jobs that a method (methods.py) yields:

    sample   the student completes the prompts                                          Run.sample, generate
    score    log p(y) and log q(y) of every sampled token, without gradient             score
    select   the method's weight per token; what weighs zero is dropped                 weigh
    update   divergence or policy gradient (losses.py, kernels/), one optimizer step    update

Left out on purpose: more than one process, inference servers, cross-tokenizer distillation. Dropout is off
everywhere, so that the distribution that is sampled is the one that is trained.
"""
import contextlib
import functools
import hashlib
import json
import math
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import config as flags
import models
from lab import diagnosis, preflight, recipes, report
from data.prompts import encode_completion, encode_prompt, load_prompts, may_think, prompt_text
from methods.feedback import Templates, read_templates
from data.files import atomic_folder, find_checkpoint, read_lines, write_config, write_file
from config import fail
from data.graders import grade
from kernels import linear_divergence, linear_logprob
from losses import (DIVERGENCES, LOSSES, SUPPORTS, check_support, lookup, policy_gradient_weight, target_at,
                    truncated_importance)
from methods import METHODS, Rollout, by_branch, by_prompt, demand, everything, top_gap_mass
from transformers import (GenerationConfig, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper,
                          TopPLogitsWarper)


# ---- sample ------------------------------------------------------------------------------------------------

class SampledLogProbs(LogitsProcessor):
    """The last processor sees what generate samples from: keep log p(y) of every token once it is known."""

    def __init__(self):
        self.previous, self.logps = None, []

    def __call__(self, ids_BT, scores_BV):
        if self.previous is not None:
            self.take(ids_BT)
        self.previous = torch.log_softmax(scores_BV.float(), -1)
        return scores_BV

    def take(self, ids_BT):
        self.logps.append(self.previous.gather(1, ids_BT[:, -1:]))


class OnlyKnownTokens(LogitsProcessor):
    """Rows that pad the head beyond the tokenizer's ids are never sampled."""

    def __init__(self, vocab):
        self.vocab = vocab

    def __call__(self, ids_BT, scores_BV):
        scores_BV[:, self.vocab:] = -torch.inf
        return scores_BV


@torch.no_grad()
def generate(model, prompts, cfg, temperature, top_p=None, max_new_tokens=None):
    """Complete prompts (lists of token ids). Returns [(ids_T, logp_T)], each cut after its first stop token.

    temperature 0 is greedy, with logp_T None. Otherwise logp_T is under the distribution that was sampled
    from, that is with temperature and top_p applied.
    """
    top_p, max_new_tokens = top_p or cfg.top_p, max_new_tokens or cfg.max_new_tokens
    out = []
    for start in tqdm(range(0, len(prompts), cfg.sample_batch), "sample", leave=False,
                      disable=len(prompts) <= cfg.sample_batch):
        some = prompts[start:start + cfg.sample_batch]
        P = max(map(len, some))
        ids_BP = torch.tensor([[model.stops[0]] * (P - len(p)) + p for p in some], device=model.device)
        mask_BP = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in some], device=model.device)
        recorder = SampledLogProbs()
        processors = LogitsProcessorList([OnlyKnownTokens(model.vocab)])
        if temperature > 0:
            processors += [TemperatureLogitsWarper(temperature)] * (temperature != 1)
            processors += [TopPLogitsWarper(top_p)] * (top_p < 1) + [recorder]
        with model.running():
            ids_BT = model.net.generate(
                ids_BP, attention_mask=mask_BP, logits_processor=processors,
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens, eos_token_id=model.stops, pad_token_id=model.stops[0],
                    **(dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) if temperature > 0 else {})))
        if temperature > 0:
            recorder.take(ids_BT)
            logp_BT = torch.cat(recorder.logps, 1)
        stop_BT = torch.isin(ids_BT[:, P:], torch.tensor(model.stops, device=model.device))
        for i, stop_T in enumerate(stop_BT):
            T = int(stop_T.int().argmax()) + 1 if stop_T.any() else len(stop_T)
            out.append((ids_BT[i, P:P + T], logp_BT[i, :T] if temperature > 0 else None))
    return out


def completion_text(model, ids_T):
    """The completion as text, without the stop token. Special tokens within it (thinking tags) stay."""
    ids = ids_T.tolist()
    return model.tok.decode(ids[:-1] if ids[-1] in model.stops else ids)


# ---- score, select -----------------------------------------------------------------------------------------

def micro_batches(lengths, micro_tokens):
    """Groups of indices, longest first, of up to micro_tokens with padding; a longer one is its own group."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= micro_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def rollout_prompt(model, rollout, cfg, teacher=False):
    """Token ids of the prompt as this model sees it."""
    prompt = rollout.teacher_prompt if teacher and rollout.teacher_prompt else rollout.prompt["prompt"]
    return encode_prompt(model.tok, prompt, cfg.chat_template_kwargs)


def completion_hidden(model, prompts, completions):
    """Hidden states that predict the completions: [N, H], N the completion tokens of all rollouts in a row.

    The state before a token predicts it: the last prompt token predicts the first completion token, and the
    last completion token (EOS) is predicted but never read. Right padding: causal attention never sees it.
    """
    rows = [prompt + completion.tolist()[:-1] for prompt, completion in zip(prompts, completions)]
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    predicts_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        ids_BT[i, :len(row)] = torch.tensor(row)
        predicts_BT[i, len(prompt) - 1:len(row)] = True
    return model.hidden(ids_BT)[predicts_BT.to(model.device)].to(model.dtype)


def batches(model, rollouts, cfg, teacher=False):
    """Yield (indices, prompts) of the micro-batches of some rollouts as this model sees them."""
    prompts = [rollout_prompt(model, rollout, cfg, teacher) for rollout in rollouts]
    lengths = [len(prompt) + len(rollout.ids_T) for prompt, rollout in zip(prompts, rollouts)]
    for group in micro_batches(lengths, cfg.micro_tokens):
        yield group, [prompts[i] for i in group]


@torch.no_grad()
def passes(model, rollouts, cfg, teacher=False):
    """Yield (indices, hidden_NH): micro-batches of rollouts and the states that predict their tokens."""
    for group, prompts in batches(model, rollouts, cfg, teacher):
        yield group, completion_hidden(model, prompts, [rollouts[i].ids_T for i in group])


def token_log_probs(hidden_NH, head_VH, rollouts, **options):
    """Log-probability of every token of some rollouts, from the states that predict them: a [T] for each."""
    _, stats = linear_logprob(hidden_NH, head_VH, torch.cat([r.ids_T for r in rollouts]), **options)
    return stats["logprob_s"].split([len(r.ids_T) for r in rollouts])


@torch.no_grad()
def log_probs(student, rollouts, cfg, temperature=1.0):
    """log p(y) of every completion token under the training forward: a [T] for each rollout."""
    out = [None] * len(rollouts)
    for group, hidden_NH in passes(student, rollouts, cfg):
        some = token_log_probs(hidden_NH, student.head_VH, [rollouts[i] for i in group],
                               temperature=temperature, vocab=student.vocab, softcap=student.softcap)
        for i, lp_T in zip(group, some):
            out[i] = lp_T
    return out


@torch.no_grad()
def score(job, cfg):
    """What the teacher has to say about a Job's rollouts, all of it, so that the update needs no teacher.

    Fills job.hidden_t, the teacher's states in main memory, for a divergence, and lp_T = log p(y) and
    gap_T = log q(y) - log p(y) of every rollout where weights or objective will ask for them. A rollout whose
    weight is known to be 0 is not read.
    """
    student, teacher, objective, rollouts = job.student, job.teacher, job.objective, job.rollouts
    if teacher is None:
        return
    asked = callable(job.weights) or objective.label == "pg"
    assert objective.label != "pg" or all(r.logp_T is not None for r in rollouts), "pg needs sampled rollouts"
    job.hidden_t = [None] * len(rollouts)
    known = job.weights if isinstance(job.weights, list) else [1] * len(rollouts)
    read = [i for i, weight in enumerate(known) if weight]
    with teacher.present():
        head_t_VH = teacher.head_VH.to(student.device) if asked else None
        for group, hidden_NH in passes(teacher, [rollouts[i] for i in read], cfg, teacher=True):
            group = [read[i] for i in group]
            some = [rollouts[i] for i in group]
            if asked:
                for r, lq_T in zip(some, token_log_probs(
                        hidden_NH.to(student.device), head_t_VH, some, temperature=objective.temperature,
                        vocab=student.vocab, softcap=teacher.softcap)):
                    r.gap_T = lq_T
            if objective.divergence:
                for i, hidden_TH in zip(group, hidden_NH.cpu().split([len(r.ids_T) for r in some])):
                    job.hidden_t[i] = hidden_TH
    if asked:
        some = [rollouts[i] for i in read]
        for r, lp_T in zip(some, log_probs(student, some, cfg, objective.temperature)):
            r.lp_T, r.gap_T = lp_T, r.gap_T - lp_T


def weigh(jobs):
    """The weight of every token: per Job, a list of one tensor [T] per rollout.

    The method's weight (selection, scale), divided by the rollout's length and by the number of rollouts its
    student keeps in this step: the mean over kept rollouts of their token means, whatever the micro-batches.
    """
    weights, kept = [], {}
    for job in jobs:
        given = job.weights(job) if callable(job.weights) else job.weights or [1.0] * len(job.rollouts)
        weights.append([torch.as_tensor(w, dtype=torch.float64, device=r.ids_T.device).expand(len(r.ids_T))
                        for w, r in zip(given, job.rollouts, strict=True)])
        kept[job.student] = kept.get(job.student, 0) + sum(bool(w_T.any()) for w_T in weights[-1])
    return [[w_T / (len(w_T) * max(kept[job.student], 1)) for w_T in ws] for job, ws in zip(jobs, weights)]


# ---- update ------------------------------------------------------------------------------------------------

def backward(job, weights, cfg):
    """Add a Job's gradient to its student. Returns (loss, stats: name -> tensor over the weighted tokens)."""
    student, teacher, objective = job.student, job.teacher, job.objective
    kept = [i for i, w_T in enumerate(weights) if w_T.any()]
    head_t_VH = teacher.head_VH.detach().to(student.device) if objective.divergence else None
    total, collected = 0.0, {}
    for group, prompts in batches(student, [job.rollouts[i] for i in kept], cfg):
        group = [kept[i] for i in group]
        some = [job.rollouts[i] for i in group]
        ids, lengths = [r.ids_T for r in some], [len(r.ids_T) for r in some]
        weight_N, labels_N = torch.cat([weights[i] for i in group]), torch.cat(ids)
        hidden_NH, head_VH = completion_hidden(student, prompts, ids), student.head_VH
        common = dict(temperature=objective.temperature, vocab=student.vocab)
        if objective.cap and all(r.logp_T is not None for r in some):
            with torch.no_grad():
                lps = token_log_probs(hidden_NH, head_VH, some, softcap=student.softcap, **common)
            weight_N = weight_N * torch.cat([truncated_importance(lp_T, r.logp_T, objective.cap)
                                             for lp_T, r in zip(lps, some)])
        if objective.label:
            if objective.label == "pg":
                weight_N = weight_N * torch.cat([
                    policy_gradient_weight(r.gap_T, r.lp_T, r.logp_T, objective.importance) for r in some])
            loss, stats = linear_logprob(hidden_NH, head_VH, labels_N, weight_N, softcap=student.softcap,
                                         **common)
        else:
            hidden_t_NH = torch.cat([job.hidden_t[i] for i in group]).to(student.device)
            loss, stats = linear_divergence(
                hidden_NH, head_VH, hidden_t_NH, head_t_VH, weight_N, divergence=objective.divergence,
                knob=objective.knob, target=objective.target, support=objective.support,
                top_k=objective.top_k, labels_N=labels_N, softcap_s=student.softcap,
                softcap_t=teacher.softcap, **common)
            if not callable(job.weights) and cfg.target == "teacher" and objective.target == (1.0, 0.0):
                # Not scored, but all tokens have passed and logprob_t is the teacher's: the gap for free.
                for r, lp_T, lq_T in zip(some, *(stats[k].split(lengths)
                                                 for k in ("logprob_s", "logprob_t"))):
                    r.lp_T, r.gap_T = lp_T, lq_T - lp_T
        loss.backward()
        total += loss.item()
        for name, x_N in stats.items():
            collected.setdefault(name, []).append(x_N[weight_N != 0])
    return total, {name: torch.cat(parts) for name, parts in collected.items()}


def build_optimizers(model, cfg):
    """AdamW or SGD on everything, or Muon on hidden matrices and AdamW on the rest. Only matrices decay."""
    ends = {id(model.net.get_output_embeddings().weight), id(model.net.get_input_embeddings().weight)}
    params = [p for p in model.net.parameters() if p.requires_grad]
    hidden = [p for p in params if p.ndim == 2 and id(p) not in ends and cfg.optimizer == "muon"]
    rest = [p for p in params if not any(p is h for h in hidden)]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    if cfg.optimizer == "sgd":
        return (torch.optim.SGD(groups, lr=cfg.lr),)
    fused = model.device.type == "cuda" or None                 # without temporaries as large as the model
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.adam_beta2), fused=fused)
    if cfg.optimizer == "adamw":
        return (adamw,)
    return torch.optim.Muon(hidden, lr=cfg.lr, weight_decay=cfg.weight_decay,
                            adjust_lr_fn="match_rms_adamw"), adamw


def learning_rate(cfg, step):
    """Linear warm-up, then constant, or down to 0 linearly or as a cosine."""
    done = step / cfg.steps
    shape = {"constant": 1.0, "linear": 1 - done,
             "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.lr_schedule]
    return cfg.lr * shape * min(1.0, (step + 1) / max(cfg.warmup, 1))


def update(run, jobs, weights):
    """Gradients of all Jobs, then one step of every distinct student. Returns the statistics of the step."""
    cfg, step, updates = run.cfg, run.state["step"], run.state["updates"]
    losses, stats = zip(*(backward(job, w, cfg) for job, w in zip(jobs, weights)))
    norm = 0.0
    for student in dict.fromkeys(job.student for job in jobs):
        which = run.students.index(student)
        lr = learning_rate(cfg, updates[which])
        norm += torch.nn.utils.clip_grad_norm_(student.net.parameters(), cfg.grad_clip or math.inf).item()
        if not math.isfinite(norm + sum(losses)):
            fail(f"step {step + 1}: the loss is {sum(losses)} and the gradient's norm {norm}; lower --lr or "
                 f"look at the data. What {run.out} holds is intact")
        for optimizer in student.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        updates[which] += 1
        if student.average:
            models.follow(student.average, cfg.ema_rate)
    rollouts = [r for job in jobs for r in job.rollouts]
    whole = describe(rollouts, [w_T for ws in weights for w_T in ws], stats, jobs)
    parts = {job.rollouts[0].prompt["branch"]: describe(job.rollouts, ws, [s], jobs)
             for job, ws, s in zip(jobs, weights, stats)}
    return {"step": step, "branch": "+".join(by_branch(rollouts)), "loss": sum(losses), "grad_norm": norm,
            "lr": lr, **whole, **({"branches": parts} if len(jobs) > 1 else {})}


def describe(rollouts, weights, stats, jobs):
    """What rollouts of a step were like, for metrics.jsonl: means over rollouts and over tokens, in nats."""
    mean = lambda parts: torch.cat(parts).mean().item() if parts else None
    rewards = [r.reward for r in rollouts if r.reward is not None]
    gaps = [r.gap_T for r in rollouts if r.gap_T is not None]
    lengths = [len(r.ids_T) for r in rollouts]
    cut = [r.ids_T[-1].item() not in jobs[0].student.stops for r in rollouts]
    out = {"rollouts": len(rollouts), "kept": sum(bool(w_T.any()) for w_T in weights), "tokens": sum(lengths),
           "length": sum(lengths) / len(rollouts), "cut": sum(cut) / len(rollouts),
           "reward": sum(rewards) / len(rewards) if rewards else None, "solved": solved(rollouts),
           "gap": mean(gaps), "abs_gap": mean([gap_T.abs() for gap_T in gaps])}
    for name in ("value", "entropy_s", "entropy_t", "top1_agree", "logprob_s"):
        out[name] = mean([s[name] for s in stats if len(s.get(name, ()))])
    return {name: x for name, x in out.items() if x is not None}


def solved(rollouts):
    """The share of prompts with a correct rollout; None where prompts have one rollout or no answer."""
    if any(r.reward is None for r in rollouts):
        return None
    groups = [group for group in by_prompt(rollouts).values() if len(group) > 1]
    return sum(any(r.reward == 1 for r in group) for group in groups) / len(groups) if groups else None


# ---- diagnose ----------------------------------------------------------------------------------------------

def diagnose(run):
    """What the branches' gradients are like at the student's present parameters: lab/diagnosis.py.

    New rollouts of every branch are sampled, scored and weighted as the method does it, and not learned from.
    """
    cfg, student, parameters = run.cfg, run.student, diagnosis.watched(run.student, run.cfg.diagnose_layers)
    count = cfg.diagnose_rollouts or max(2, min(cfg.batch, 64))
    with run.aside("diagnose"), diagnosis.only(student, parameters):
        rollouts = run.sample(student, [p for b in run.branches for p in run.draw(b, count=count)], n=1)
        measured = {job.rollouts[0].prompt["branch"]: measure(run, job, parameters, len(rollouts))
                    for job in run.method.jobs(run, rollouts)}
        shares = {branch: n / sum(run.shares.values()) for branch, n in run.shares.items()}
        return diagnosis.numbers(student, parameters, measured, shares, cfg)


def measure(run, job, parameters, total):
    """The gradients of one branch's Job: of each rollout alone; of both halves, plain and the method's."""
    cfg, branch = run.cfg, job.rollouts[0].prompt["branch"]
    job.weights = job.weights or everything
    score(job, cfg)
    demand_N = torch.stack([demand(run, branch)(r.gap_T) for r in job.rollouts])
    mass = cfg.mass[branch] if cfg.mass[branch] < 1 else 0.8        # where all are kept: what 0.8 would keep
    halves = [replace(job, rollouts=job.rollouts[i::2], hidden_t=job.hidden_t[i::2]) for i in (0, 1)]
    means, rows = [[torch.zeros_like(p) for p in parameters] for _ in halves], []
    for i, r in enumerate(job.rollouts):
        alone = [torch.full_like(other.gap_T, float(other is r) / len(r.ids_T)) for other in job.rollouts]
        gradient = gradients(parameters, job, alone, cfg)
        for total_of_half, g in zip(means[i % 2], gradient):
            total_of_half += g / len(halves[i % 2].rollouts)
        rows.append(diagnosis.entries(gradient, total))
    steps = [gradients(parameters, half, weigh([half])[0], cfg) for half in halves]
    return diagnosis.Measured(torch.stack(rows), means, steps, mass, top_gap_mass(demand_N, mass), demand_N,
                              [r.gap_T for r in job.rollouts])


def gradients(parameters, job, weights, cfg):
    """The gradient of a Job for every one of some parameters. Leaves none behind."""
    backward(job, weights, cfg)
    out = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    job.student.net.zero_grad(set_to_none=True)
    return out


# ---- the run -----------------------------------------------------------------------------------------------

class Run:
    """What a method may use (see methods.py), and the folder that remembers it."""

    def __init__(self, cfg):
        self.cfg, self.out, self.method = cfg, Path(cfg.out), METHODS[cfg.method]
        self.prompts = {branch: load_prompts(path, branch) for branch, path in cfg.prompts.items()}
        self.evals = {name: load_prompts(path, name) for name, path in cfg.eval_prompts.items()}
        self.vals = {branch: load_prompts(path, branch) for branch, path in (cfg.val_prompts or {}).items()}
        self.templates = read_templates(cfg.templates) if cfg.templates else Templates()
        read = self.prompts | {f"val {branch}": rows for branch, rows in self.vals.items()}
        read |= {"templates": vars(self.templates)} if cfg.templates else {}
        cfg.prompts_sha256 = {name: hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]
                              for name, text in read.items()}
        checkpoint = find_checkpoint(cfg)
        folders = self.places(checkpoint) if checkpoint else [None] * len(cfg.student)
        self.students = [self.load_student(path, folder) for path, folder in zip(cfg.student, folders)]
        self.student = self.students[0]
        thinks = may_think(self.student.tok, cfg.chat_template_kwargs)
        cfg.max_new_tokens = cfg.max_new_tokens or (2048 if thinks else 512)
        distinct = {path: self.before(self.student, path) for path in dict.fromkeys(cfg.teachers.values())}
        for other in (*self.students[1:], *distinct.values()):
            models.share_tokens(self.student, other)
        for student in self.students:
            student.vocab = self.student.vocab
        for teacher in distinct.values():
            models.share_stops(self.student, teacher)
        self.teachers = {branch: distinct[path] for branch, path in cfg.teachers.items()}
        self.teacher = next(iter(distinct.values())) if len(distinct) == 1 else None
        self.self_teachers = [self.teach_oneself(student) for student in self.students]
        self.state = {"step": 0, "updates": [0] * len(self.students), "sampled_tokens": 0,
                      "cursor": [dict.fromkeys(self.branches, 0) for _ in self.students]}
        self.clock, self.peaks = {}, {}                         # seconds and GPU bytes by part of a step
        self.unchecked = list(self.students)                    # of which no rollout was checked yet
        self.notes = {}                                         # what a method adds to a step's metrics
        self.longest_prompt, self.longest_completion, self.longest_read = preflight.check_prompts(self)
        if checkpoint and not cfg.dry_run:
            self.restore(checkpoint)

    # -- the models

    def load_student(self, path, weights):
        student = models.load(path, self.cfg, learns=True, weights=weights)
        student.optimizers = build_optimizers(student, self.cfg)
        if len(self.cfg.student) > 1 and self.cfg.teacher_device == "swap" and not self.cfg.dry_run:
            models.rest(student)
        return student

    def before(self, student, path):
        """A frozen teacher; one that the student was before its adapter takes no memory."""
        return (models.without_adapter(student) if self.cfg.lora_rank and path == student.path
                else models.load(path, self.cfg))

    def teach_oneself(self, student):
        """A student's self-teacher as --self_teacher says; None where the method has none."""
        kind = self.cfg.self_teacher
        if kind == "ema":
            student.average = models.average(student, self.cfg)
            return student.average
        if kind == "frozen":
            start = self.before(student, student.path)
            models.share_stops(student, start)
            return start
        return student if kind == "live" else None

    def self_teacher(self, student):
        return self.self_teachers[self.students.index(student)]

    def turn(self, tutee):
        """Before a phase: with --teacher_device swap only the student that learns is on the GPU."""
        for student in self.students:
            if self.cfg.teacher_device == "swap" and student.swapped != (student is not tutee):
                (models.wake if student is tutee else models.rest)(student)

    def places(self, folder):
        """Where in a folder each student lies: in it, or where there are two, in its 1 and 2."""
        two = len(self.cfg.student) > 1
        return [folder / str(i) if two else folder for i in range(1, len(self.cfg.student) + 1)]

    # -- what a method asks for

    @property
    def branches(self):
        return list(self.prompts)

    @property
    def shares(self):
        """{branch: prompts} of a batch of all branches."""
        return split(self.cfg.batch, self.cfg.mixture, self.branches)

    @property
    def objective(self):
        """The objective of the current step: the target moves with the training."""
        cfg = self.cfg
        done = min(self.state["step"] / (self.total - 1), 1.0) if self.total > 1 else 1.0
        start = cfg.taid_start if cfg.target == "taid" else cfg.veto_beta
        return replace(LOSSES[cfg.loss], temperature=cfg.loss_temperature, knob=knob(cfg), top_k=cfg.top_k,
                       support=cfg.support, target=target_at(cfg.target, start, done),
                       importance=tuple(cfg.importance), cap=cfg.importance_cap or None)

    @property
    def total(self):
        """Steps of the loop: --steps for each student, as two students learn in turn."""
        return self.cfg.steps * len(self.students)

    def steps(self):
        """The steps still to do. The loop counts them: a method may yield several lists of Jobs per round."""
        while self.state["step"] < self.total:
            yield self.state["step"]

    def draw(self, branch=None, student=None, count=None):
        """The next --batch prompts of a branch, or of all in --mixture's shares; reshuffled every epoch.

        Of two students each goes through all prompts, in the same order.
        """
        out, cursors = [], self.state["cursor"][self.students.index(student or self.student)]
        counts = {branch: self.cfg.batch if count is None else count} if branch else self.shares
        for branch, count in counts.items():
            prompts, cursor = self.prompts[branch], cursors[branch]
            for epoch, i in (divmod(position, len(prompts)) for position in range(cursor, cursor + count)):
                out.append(prompts[shuffled(len(prompts), f"{self.cfg.seed} {branch} {epoch}")[i]])
            cursors[branch] += count
        return out

    def sample(self, model, prompts, n=None, temperature=None, top_p=None):
        """n rollouts of every prompt (default --rollouts), graded where the prompt has an answer."""
        if not prompts:
            return []
        n, temperature = n or self.cfg.rollouts, self.cfg.temperature if temperature is None else temperature
        prompts = [prompt for prompt in prompts for _ in range(n)]
        with self.timed("sample"):
            completions = self.complete(model, [prompt["prompt"] for prompt in prompts], temperature, top_p)
            rollouts = [Rollout(prompt, ids_T.to(self.student.device), logp_T,
                                text=completion_text(model, ids_T))
                        for prompt, (ids_T, logp_T) in zip(prompts, completions, strict=True)]
            for r in rollouts:
                if "answer" in r.prompt:
                    r.reward = grade(r.prompt["grader"], r.text, r.prompt["answer"])
        if any(model is student for student in self.students):
            self.state["sampled_tokens"] += sum(len(r.ids_T) for r in rollouts)
        return rollouts

    def write(self, model, prompts):
        """What a tutor writes: a (text, whether it came to its end) for each prompt."""
        if not prompts:
            return []
        with self.timed("feedback"):
            completions = self.complete(model, prompts, self.cfg.temperature,
                                        max_new_tokens=self.cfg.feedback_tokens)
        self.notes["feedback_tokens"] = sum(len(ids_T) for ids_T, _ in completions)
        return [(completion_text(model, ids_T), ids_T[-1].item() in model.stops) for ids_T, _ in completions]

    def fits(self, prompt, more):
        """Whether a prompt and `more` tokens have room in the students' positions."""
        limit = min(models.positions(student) for student in self.students)
        return len(encode_prompt(self.student.tok, prompt, self.cfg.chat_template_kwargs)) + more <= limit

    def complete(self, model, prompts, temperature, top_p=None, max_new_tokens=None):
        with model.present():
            ids = [encode_prompt(model.tok, prompt, self.cfg.chat_template_kwargs) for prompt in prompts]
            return generate(model, ids, self.cfg, temperature, top_p, max_new_tokens)

    def references(self, prompts):
        """The prompts' own `solution`s as rollouts: fixed data, closed by EOS."""
        tok, device = self.student.tok, self.student.device
        return [Rollout(prompt, torch.tensor(encode_completion(tok, prompt["solution"]), device=device),
                        text=prompt["solution"]) for prompt in prompts]

    def evaluate(self):
        """Mean reward per --eval_prompts set, of two students as "1/SET" and "2/SET"."""
        scores = [self.rewards(student, self.evals, self.cfg.eval_rollouts) for student in self.students]
        if len(scores) == 1:
            return scores[0]
        return {f"{i}/{name}": x for i, named in enumerate(scores, 1) for name, x in named.items()}

    def validate(self, student):
        """{branch: mean reward} on --val_prompts, which the gate of opcod compares."""
        return self.rewards(student, self.vals, self.cfg.gate_rollouts, "gate")

    def validation(self, count):
        """The first `count` validation prompts of every branch."""
        return [prompt for prompts in self.vals.values() for prompt in prompts[:count]]

    def rewards(self, model, sets, n, name=None):
        cfg = self.cfg
        n = n if cfg.eval_temperature > 0 else 1                # greedy completions are all the same
        with self.aside(name):
            rollouts = {name: self.sample(model, prompts, n, cfg.eval_temperature, cfg.eval_top_p)
                        for name, prompts in sets.items()}
        return {name: sum(r.reward for r in rs) / len(rs) for name, rs in rollouts.items()}

    @contextlib.contextmanager
    def aside(self, name=None):
        """Measurements beside the training: clock, counters, cursors, notes and randomness are kept.

        Every one has the same randomness. With a name its seconds count as that part of the step.
        """
        clock, notes, spent = dict(self.clock), dict(self.notes), self.state["sampled_tokens"]
        cursors = [dict(cursor) for cursor in self.state["cursor"]]
        on_gpu = [self.student.device] if self.student.device.type == "cuda" else []
        started = time.perf_counter()
        with torch.random.fork_rng(on_gpu):
            torch.manual_seed(self.cfg.seed)
            yield
        self.clock, self.notes, self.state["sampled_tokens"] = clock, notes, spent
        self.state["cursor"] = cursors
        if name:
            self.clock[name] = self.clock.get(name, 0.0) + time.perf_counter() - started

    @contextlib.contextmanager
    def timed(self, name):
        """Count the seconds of a part of the step, and on a GPU its peak memory."""
        started, device = time.perf_counter(), self.student.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
        self.clock[name] = self.clock.get(name, 0.0) + time.perf_counter() - started

    # -- the folder

    def begin(self):
        """Write config.json, and the line of metrics.jsonl that says where the student started."""
        write_config(self.cfg)
        if self.state["step"] == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):     # a run that died before its first checkpoint
                if (self.out / name).exists():
                    (self.out / name).replace(self.out / f"{name}.old")
            started = {"diagnosis": diagnose(self)} if self.cfg.diagnose_every else {}
            self.log("metrics", {"step": -1, "eval": self.evaluate()} | started)
        if self.state["step"] >= self.total:
            tqdm.write(f"{self.out} has done its {self.state['step']} steps; more --steps go on from there")

    def record(self, jobs, weights, stats):
        """After a step: count it, evaluate when due, one line on screen and disk, a checkpoint when due."""
        cfg, state = self.cfg, self.state
        for job, ws in zip(jobs, weights):
            for r, w_T in list(zip(job.rollouts, ws))[:cfg.log_samples]:
                self.log("samples", {
                    "step": state["step"], "branch": r.prompt["branch"],
                    "prompt": prompt_text(r.prompt["prompt"]), "completion": r.text,
                    **({"teacher_sees": prompt_text(r.teacher_prompt)} if r.teacher_prompt else {}),
                    **({"feedback": r.feedback} if r.feedback else {}),
                    "reward": r.reward, "selected": bool(w_T.any()),
                    "gap": None if r.gap_T is None else r.gap_T.mean().item()})
        if state["step"] == 0 and stats["cut"] > 0.5:
            tqdm.write(f"note: {stats['cut']:.0%} of the first completions did not end within "
                       f"--max_new_tokens {cfg.max_new_tokens}; what lies beyond is never trained")
        if state["step"] == 0 and stats["kept"] == 0:
            none_correct = ", and none is correct: does the grader fit?" * (stats.get("reward") == 0)
            tqdm.write(f"note: no rollout of the first step has anything to learn from{none_correct}")
        state["step"] += 1
        due = lambda every: state["step"] == self.total or (every and state["step"] % every == 0)
        if due(cfg.eval_every):
            stats["eval"] = self.evaluate()
        if cfg.diagnose_every and due(cfg.diagnose_every):
            stats["diagnosis"] = diagnose(self)
        parts = {name: peak / 2**30 for name, peak in self.peaks.items()}
        stats |= {"seconds": self.clock, "memory_gib": max(parts.values(), default=0) or process_memory(),
                  **({"memory_gib_by_part": parts} if parts else {}),
                  "sampled_tokens": state["sampled_tokens"]}
        stats |= self.notes
        self.clock, self.peaks, self.notes = {}, {}, {}
        self.log("metrics", stats)
        tqdm.write(report.step_line(self, stats), file=sys.stdout)
        if due(cfg.save_every):
            self.save()

    def log(self, name, record):
        with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def save(self):
        """checkpoint/: everything a restart needs. A kill while it is written leaves the one before."""
        with atomic_folder(self.out / "checkpoint") as folder:
            for student, place in zip(self.students, self.places(folder)):
                models.save_model(student, place)
            torch.save({"optimizers": [[o.state_dict() for o in s.optimizers] for s in self.students],
                        "averages": [models.averaged(s) for s in self.students], "state": self.state},
                       folder / "trainer.pt")

    def restore(self, checkpoint):
        with models.reading(checkpoint):
            saved = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        self.state = saved["state"]
        for student, states, values in zip(self.students, saved["optimizers"], saved["averages"]):
            for optimizer, state in zip(student.optimizers, states, strict=True):
                fused = [group.get("fused") for group in optimizer.param_groups]
                optimizer.load_state_dict(state)
                for group, here in zip(optimizer.param_groups, fused):
                    group["fused"] = here                       # the state may come from another device
            for value, then in zip(models.averaged(student), values, strict=True):
                value.copy_(then)
        for path in (self.out / "metrics.jsonl", self.out / "samples.jsonl"):
            if path.exists():                                   # forget what the lost steps wrote
                kept = [line for line in read_lines(path) if line["step"] < self.state["step"]]
                write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def save_final(self):
        """final/: a plain folder that from_pretrained loads, in the run's dtype. Ends the training.

        An adapter is merged into it, and lies beside it in adapter/ as peft loads it. Two students lie in
        final/1 and final/2.
        """
        if self.student.adapter:
            with atomic_folder(self.out / "adapter") as folder:
                for student, place in zip(self.students, self.places(folder)):
                    models.save_model(student, place)
        with atomic_folder(self.out / "final") as folder:
            for student, place in zip(self.students, self.places(folder)):
                if student.adapter:
                    models.merge(student)
                student.net.to(student.dtype)
                models.save_model(student, place)
                student.tok.save_pretrained(place)


def train(run):
    """The loop. It never asks which method it runs."""
    method, stats = run.method.steps(run), None
    run.begin()
    with tqdm(total=run.total, initial=run.state["step"], desc=run.cfg.out, unit="step") as progress:
        while jobs := advance(run, method, stats):      # sample: the method asks for rollouts, yields Jobs
            check_start(run, jobs[0])
            with run.timed("score"):
                for job in jobs:
                    score(job, run.cfg)                 # lp(y) and lq(y) without gradient: the gap
            with run.timed("update"):
                weights = weigh(jobs)                   # select, scale, normalise
                stats = update(run, jobs, weights)      # backward of all Jobs, one step of every student
            run.record(jobs, weights, stats)
            progress.update()
    run.save_final()
    report.write_run(run.out)


def advance(run, method, stats):
    """A method's next Jobs, or None at its end. Every step has its own seed: a resumed one repeats itself."""
    torch.manual_seed(run.cfg.seed * 1_000_003 + run.state["step"])
    try:
        return method.send(stats)
    except StopIteration:
        return None


def process_memory():
    """GiB of the process at its peak, which on a CPU is all there is to know."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


@torch.no_grad()
def check_start(run, job):
    """Before a student's first update: KL(student, student) = 0, and its sampler's log-probs are training's.

    The KL is between two rollouts in one padded forward and the same two alone, so it also sees padding leak.
    """
    student, cfg, exact = job.student, run.cfg, job.student.dtype == torch.float32
    if student not in run.unchecked:
        return
    run.unchecked.remove(student)
    some = sorted(job.rollouts[:8], key=lambda r: len(r.ids_T))
    pair = [(rollout_prompt(student, r, cfg), r.ids_T) for r in some[:2]]
    together_NH = completion_hidden(student, *map(list, zip(*pair)))
    alone_NH = torch.cat([completion_hidden(student, [prompt], [ids_T]) for prompt, ids_T in pair])
    kl, _ = linear_divergence(together_NH, student.head_VH, alone_NH, student.head_VH, vocab=student.vocab,
                              softcap_s=student.softcap, softcap_t=student.softcap)
    kl = kl.item() / len(alone_NH)
    if not abs(kl) < (1e-4 if exact else 1e-2):
        fail(f"KL(student, student) = {kl:.2e} nats per token instead of 0: forward pass or loss is broken")
    if some[0].logp_T is None:
        return
    if cfg.temperature != 1 or cfg.top_p < 1:
        tqdm.write(f"note: sampling at temperature {cfg.temperature}, top_p {cfg.top_p} is not sampling from "
                   "p itself; only the weights of --loss pg and --importance_cap correct for it")
        return
    lp = log_probs(student, some, cfg)
    off = (torch.cat(lp) - torch.cat([r.logp_T for r in some])).abs().mean().item()
    tqdm.write(f"check, nats per token: KL(student, student) {kl:.1e}, sampler against training {off:.1e}")
    if off > (1e-3 if exact else 0.2):
        fail(f"{student.path}: in {type(student.net).__name__} the sampler's log-probs differ from the "
             f"training forward's by {off:.3f} nats per token: the rollouts are not on-policy")


# ---- setting up --------------------------------------------------------------------------------------------

def split(batch, mixture, branches):
    """{branch: prompts of the batch}, in the shares of the mixture "3:1"; None = equal shares."""
    shares = [int(n) for n in mixture.split(":")] if mixture else [1] * len(branches)
    ends = [round(batch * sum(shares[:i + 1]) / sum(shares)) for i in range(len(shares))]
    return dict(zip(branches, [end - start for start, end in zip([0, *ends], ends)]))


@functools.lru_cache(maxsize=8)
def shuffled(count, seed):
    """A permutation of range(count) that depends on the seed string alone."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def knob(cfg):
    """The knob of --loss, None where it has none. Every knob has a flag of its own name."""
    name = DIVERGENCES[cfg.loss].knob if cfg.loss in DIVERGENCES else None
    return getattr(cfg, name) if name else None


def configure(argv=None):
    """The settings of a run: parsed, completed and checked, with one clear line for whatever cannot work."""
    known = flags.parser(__doc__, METHODS, LOSSES, DIVERGENCES, SUPPORTS, recipes.RECIPES)
    cfg = known.parse_args(argv)
    changed = {flag for flag, value in vars(cfg).items() if value != known.get_default(flag)}
    if cfg.recipe:
        for flag in changed - {"recipe", "out", "resume", "seeds", "quick", "jobs"}:
            fail(f"--recipe sets every flag of its rows; --{flag} has no effect there")
        return cfg
    for flag in changed & {"seeds", "quick", "jobs"}:
        fail(f"--{flag} has no effect without --recipe")
    for flag in ("student", "prompts"):
        if not getattr(cfg, flag):
            fail(f"--{flag} is missing; python opd.py --help explains all flags")
    cfg.student = [str(Path(path).expanduser()) if path.startswith("~") else path for path in cfg.student]
    cfg.prompts = flags.pairs(cfg.prompts, "--prompts", "main")
    cfg.eval_prompts = flags.pairs(cfg.eval_prompts, "--eval_prompts", "eval")
    cfg.teachers = flags.pairs(cfg.teachers, "--teachers", "")
    branches = list(cfg.prompts)
    cfg.method = cfg.method or ("sft" if not cfg.teachers else "opd" if len(cfg.teachers) == 1 else "mopd")
    method = METHODS[cfg.method]
    some_read = {flag for other in METHODS.values() for flag in other.flags}
    for flag in sorted(changed & some_read - method.flags.keys()):
        fail(f"--{flag} has no effect on --method {cfg.method}; it is for: "
             f"{', '.join(name for name, other in METHODS.items() if flag in other.flags)}")
    for flag, default in method.flags.items():
        setattr(cfg, flag, getattr(cfg, flag) if flag in changed else default)
    cfg.support = cfg.support or method.support.get("support", "full")
    cfg.top_k = cfg.top_k or (method.support.get("top_k") if cfg.support != "full" else None)
    cfg.rollouts, cfg.eval_top_p = cfg.rollouts or 1, cfg.eval_top_p or cfg.top_p
    usable = method.losses
    cfg.loss = cfg.loss or usable[0]
    if cfg.loss not in usable:
        fail(f"--method {cfg.method} cannot use --loss {cfg.loss}; it can use: {', '.join(usable)}")
    if "" in cfg.teachers:
        cfg.teachers = dict.fromkeys(branches, cfg.teachers[""])
    if not method.teachers and cfg.teachers:
        fail(f"--teachers has no effect on --method {cfg.method}")
    if method.teachers and cfg.teachers.keys() != cfg.prompts.keys():
        fail(f"--method {cfg.method} needs a teacher for every branch of prompts ({', '.join(branches)}), "
             f"but --teachers has: {', '.join(cfg.teachers) or 'none'}")
    if cfg.method == "opd" and len(set(cfg.teachers.values())) > 1:
        fail("--method opd has one teacher; with several use --method mopd or camopd")
    if cfg.mixture:
        flags.shares("--mixture", cfg.mixture, branches)
    if cfg.method == "camopd":
        cfg.schedule = cfg.schedule or ":".join(["3", *"1" * (len(branches) - 1)])
        if cfg.schedule != "mixed":
            flags.shares("--schedule", cfg.schedule, branches)
    alternates = cfg.method == "camopd" and cfg.schedule != "mixed"
    if not alternates and not all(split(cfg.batch, cfg.mixture, branches).values()):
        fail(f"--batch {cfg.batch} leaves a branch without prompts in the mixture {cfg.mixture or 'of all'}")
    cfg.mass = flags.per_branch(cfg.mass or [], branches, "--mass", lambda branch: 0.8, most=1)
    cfg.scale = flags.per_branch(cfg.scale or [], branches, "--scale",
                                 lambda branch: 2.0 if branch == branches[0] else 1.0)
    if not any(cfg.scale.values()):
        fail("--scale 0 for every branch trains nothing")
    if cfg.importance[0] >= cfg.importance[1]:
        fail(f"--importance {cfg.importance[0]} {cfg.importance[1]}: LOW must be below HIGH")
    check_objective(cfg, changed)
    flags.check_students(cfg, method, branches)
    flags.check_effects(cfg, changed)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", cfg.device):
        fail(f"--device {cfg.device}: choose cpu, cuda or cuda:N")
    if not cfg.dry_run and cfg.device != "cpu" and int(cfg.device[5:] or 0) >= torch.cuda.device_count():
        fail(f"--device {cfg.device}: torch sees {torch.cuda.device_count()} CUDA devices")
    if cfg.device == "cpu" and cfg.teacher_device not in (None, "cpu"):
        fail(f"--teacher_device {cfg.teacher_device} needs a --device cuda")
    cfg.teacher_device = cfg.teacher_device or cfg.device.split(":")[0]
    if cfg.teacher_device == "cpu" != cfg.device and cfg.self_teacher in ("ema", "live"):
        fail("--teacher_device cpu: a self-teacher shares the student's network; choose cuda or swap, or "
             "--self_teacher frozen")
    if "lora_alpha" in changed and not cfg.lora_rank:
        fail("--lora_alpha has no effect without --lora_rank")
    cfg.lr = cfg.lr or (1e-4 if cfg.lora_rank else 1e-5)
    cfg.out = cfg.out or f"runs/{cfg.method}-{cfg.loss}-seed{cfg.seed}"
    cfg.dtype = cfg.dtype or ("bfloat16" if cfg.device.startswith("cuda") else "float32")
    for flag in ("recipe", "seeds", "quick", "jobs"):
        delattr(cfg, flag)
    return cfg


def check_objective(cfg, changed):
    """Knob, target and support fit the loss; none of `changed` (flags that are not default) has no effect."""
    ours = {"loss", DIVERGENCES[cfg.loss].knob} if cfg.loss in DIVERGENCES else {"loss"}
    for flag in changed & {row.knob for row in DIVERGENCES.values()} - ours:
        fail(f"--{flag} has no effect on --loss {cfg.loss}")
    for flag, target in (("veto_beta", "veto"), ("taid_start", "taid")):
        if flag in changed and cfg.target != target:
            fail(f"--{flag} has no effect without --target {target}")
    if "top_k" in changed and cfg.support == "full":
        fail("--top_k has no effect without a --support other than full")
    if cfg.loss in DIVERGENCES:
        lookup(cfg.loss, knob(cfg))
        check_support(cfg.loss, cfg.support, cfg.top_k)
    elif changed & {"target", "support", "top_k"}:
        fail(f"--loss {cfg.loss} uses the sampled token only: --target, --support and --top_k have no effect")


LESS_MEMORY = ("What takes less memory: lower --micro_tokens or --sample_batch, "
               "--gradient_checkpointing, --teacher_device swap, --lora_rank 16; --dry_run shows it by part")


def main(argv=None):
    try:
        cfg = configure(argv)
        if getattr(cfg, "recipe", None):
            return recipes.run(cfg.recipe, cfg.out, cfg.seeds, cfg.quick, cfg.jobs)
        run = Run(cfg)
        if cfg.dry_run:
            return preflight.show(run)
    except (ValueError, OSError) as error:          # bad data and files, already in words
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; the same command again continues where it was")
    except torch.OutOfMemoryError:
        fail(f"the models do not fit on {cfg.device}. {LESS_MEMORY}")
    try:
        train(run)
    except KeyboardInterrupt:
        fail(f"interrupted after step {run.state['step']}; the same command with --resume continues from "
             f"the last checkpoint in {run.out}")
    except torch.OutOfMemoryError:
        fail(f"step {run.state['step'] + 1} does not fit on {cfg.device}. {LESS_MEMORY}")
    except OSError as error:                        # a full disk, say
        fail(error)


if __name__ == "__main__":
    main()
