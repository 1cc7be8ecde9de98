"""The protocol between methods and the loop, and the methods that no other file tests."""
import ast
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORD_ROWS, die_at, gradients, metrics, parameters
from test_loop import accumulate, double

import opd
from config import Refused
from data.folder import rollout_stats
from losses import LOSSES, Objective
from methods import METHODS, Job, any_divergence, method
from methods.token_weights import RULES, weigh_tokens

ROOT = Path(__file__).parent.parent


# ---- rooms -------------------------------------------------------------------------------------------------

FLOORS = ["losses", "kernels", "config", "text", "sampler", "models", "data", "methods", "lab", "opd"]
FILES = [path for room in FLOORS for path in (ROOT / f"{room}.py", *(ROOT / room).glob("*.py"))
         if path.exists()]


def test_imports_only_point_down():
    """A room that reaches up cannot be read, or used, without what is above it."""
    found = 0
    for path in FILES:
        room = path.stem if path.parent == ROOT else path.parent.name
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else [])
            for name in {name.split(".")[0] for name in names} & set(FLOORS) - {room}:
                found += 1
                assert FLOORS.index(name) < FLOORS.index(room), f"{path.relative_to(ROOT)} imports {name}"
    assert found > 20
    for path in ROOT.glob("kernels/*.py"):
        assert not {"config", "models", "data"} & {
            word for line in path.read_text().splitlines() if line.startswith(("from ", "import "))
            for word in line.split()}, f"{path} does not import alone"


def test_the_losses_and_the_kernels_serve_another_trainer(tmp_path):
    """Put into a folder of their own they import and run: README promises it to users of other trainers."""
    shutil.copy(ROOT / "losses.py", tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = ("import sys, torch; from losses import divergence; from kernels import linear_divergence;"
            "x, w = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4);"
            "loss, stats = linear_divergence(x, w, x.detach() + 1, w); loss.backward();"
            "assert x.grad.any() and 'transformers' not in sys.modules and 'config' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_nobody_asks_which_method_runs():
    for path in FILES:
        assert "cfg.method " + "==" not in path.read_text(), path


def test_training_works_without_the_lab(tmp_path, argv):
    """lab/ looks at runs or arranges them: a copy of the project without it trains."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "lab", "runs", "tests", "__pycache__"))
    words = argv(steps=1)
    program = lambda *more: subprocess.run([sys.executable, "opd.py", *words, *more], cwd=copy, text=True,
                                           capture_output=True)
    dry = program("--dry_run")
    assert dry.returncode == 1 and "--dry_run needs lab/preflight.py" in dry.stderr, dry.stderr
    done = program()
    out = Path(words[words.index("--out") + 1])
    assert done.returncode == 0 and (out / "final" / "config.json").exists(), done.stderr
    assert not (out / "report.md").exists()


# ---- flags of a method -------------------------------------------------------------------------------------

@pytest.fixture
def registered():
    """Methods that a test registers are gone after it."""
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)


def test_a_methods_keyword_arguments_are_its_flags(registered, start):
    """Name, default, type and help come from the generator; other methods refuse the flag."""
    seen = []

    @method(losses=any_divergence("rkl"), teachers="one", defaults=dict(rollouts=1))
    def patient(run, *, patience: int = 3):
        """Wait.

        patience    how long to wait,
                    in steps
        """
        for step in run.steps():
            seen.append(patience)
            yield [Job(run.student, run.teacher, run.sample(run.student, run.draw()), run.objective)]

    assert METHODS["patient"].own["patience"].about == "how long to wait, in steps"
    opd.train(start(method="patient", patience=5, steps=1))
    opd.train(start(method="patient", steps=1))
    assert seen == [5, 3]
    with pytest.raises(Refused, match="--patience has no effect on --method opd; it is for: patient"):
        start(method="opd", patience=5)


def test_a_method_that_cannot_mean_what_it_says_is_refused_when_it_is_registered(registered):
    """Each of these would have trained something else, or failed in its first step."""
    def generator(run, *, share: float = 0.5):
        """share  a share"""
    with pytest.raises(AssertionError, match="losses are names in LOSSES"):
        method(losses="rkl")(generator)
    with pytest.raises(AssertionError, match="defaults are of general flags"):
        method(losses=("rkl",), defaults=dict(rolouts=1))(generator)

    def takes_over(run, *, lr: float = 0.5):
        """lr  not a rate"""
    with pytest.raises(AssertionError, match="lr is a general flag"):
        method(losses=("rkl",))(takes_over)

    def positional(run, share=0.5):
        """share  a share"""
    with pytest.raises(AssertionError, match="behind a"):
        method(losses=("rkl",))(positional)
    method(losses=("rkl",))(generator)

    def another(run, *, share: int = 2):
        """share  a number"""
    with pytest.raises(AssertionError, match="share is a flag of generator, of another type"):
        method(losses=("rkl",))(another)


# ---- weights -----------------------------------------------------------------------------------------------

def job_of(run, lengths, **options):
    row = {"prompt": "last q>", "branch": "main"}
    rollouts = [run.fixed(row | {"row": i}, [5] * n, "") for i, n in enumerate(lengths)]
    return Job(run.student, run.teacher, rollouts, Objective(divergence="rkl"), **options)


def test_a_job_says_what_its_loss_is_divided_by(start):
    """GRPO divides by all rollouts and DPO by pairs and not by tokens, and no method undoes a division."""
    run = start()
    kept = opd.weigh([job_of(run, [2, 4], weights=[1.0, 0.0])])[0]
    assert kept[0].tolist() == [0.5, 0.5] and not kept[1].any()
    everybody = opd.weigh([job_of(run, [2, 4], weights=[1.0, 0.0], count=2)])[0]
    assert everybody[0].tolist() == [0.25, 0.25]
    sums = opd.weigh([job_of(run, [2, 4], weights=[1.0, -1.0], tokens="sum", count=1)])[0]
    assert sums[0].tolist() == [1.0, 1.0] and sums[1].tolist() == [-1.0] * 4


def test_jobs_on_the_same_completions_count_them_once(start):
    """Two objectives on one batch are added up; they do not halve each other."""
    run = start()
    first = job_of(run, [2, 4])
    second = Job(run.student, None, first.rollouts, Objective(label="nll"))
    alone, together = opd.weigh([first])[0], opd.weigh([first, second])
    for w_T, a_T, b_T in zip(alone, *together):
        assert torch.equal(w_T, a_T) and torch.equal(w_T, b_T)
    second.count = 2                                            # GRPO beside a teacher: both divide by two
    for w_T, mixed_T in zip(alone, opd.weigh([first, second])[0]):
        assert torch.equal(w_T, mixed_T)
    for job in (first, second):
        job.count = 7
    assert opd.weigh([first, second])[0][0].sum() == pytest.approx(1 / 7)
    stats = rollout_stats([first, second], together, [{}, {}])
    assert stats["rollouts"] == 2 and stats["tokens"] == 6


def test_a_weight_that_is_raised_after_scoring_is_read_then(start):
    """A rollout of weight 0 is not read; a method that changes its mind must not meet a hole."""
    run = start()
    job = job_of(run, [2, 4], weights=[1.0, 0.0])
    run.score([job])
    assert job.gaps[1] is None and job.hidden_t[1] is None
    known = job.lp[0]
    job.weights = [1.0, 1.0]
    run.score([job], gaps=False)
    assert len(job.gaps[1]) == 4 and job.hidden_t[1] is not None and job.lp[0] is known
    loss, stats = opd.backward(run, job, opd.weigh([job])[0])
    assert len(stats["value"]) == 6


def test_whole_rollouts_are_compared_with_the_training_in_the_first_step(start, monkeypatch):
    """The check before the first step looks at 32 tokens; a sampler may go wrong behind them."""
    run = start(max_new_tokens=12, steps=1)
    generate = type(run.student).generate

    def late(model, prompts, temperature, top_p, max_new_tokens, batch):
        out = generate(model, prompts, temperature, top_p, max_new_tokens, batch)
        off = 0.5 if "checked" in run.memory else 0.0
        return [(ids_T, logp_T - off) for ids_T, logp_T in out]
    monkeypatch.setattr(type(run.student), "generate", late)
    check = opd.check_samplers
    monkeypatch.setattr(opd, "check_samplers", lambda run: (check(run), run.memory.update(checked=True)))
    with pytest.raises(Refused, match="the rollouts are not on-policy"):
        opd.train(run)
    assert not (run.out / "checkpoint").exists()


def test_what_is_computed_once_survives_a_restart(registered, start, monkeypatch):
    """A killed run goes on with what it had written, and does not compute it a second time."""
    made = []

    @method(losses=("nll",), teachers="none", needs=("solution",), samples=False)
    def rounds(run):
        for step in run.steps():
            run.notes["made"] = run.once(f"round {step // 2}", lambda: made.append(step) or len(made))
            yield [Job(run.student, None, run.references(run.draw()), run.objective)]

    flags = dict(method="rounds", steps=4, save_every=1, teachers=[])
    run = start(**flags)
    monkeypatch.setattr(opd, "update", die_at(opd.update, 3))
    with pytest.raises(KeyboardInterrupt):
        opd.train(run)
    monkeypatch.undo()
    opd.train(start(**flags, out=run.out, resume=True))
    assert made == [0, 2] and [line["made"] for line in metrics(run)] == [1, 1, 2, 2]


# ---- a teacher that learns ---------------------------------------------------------------------------------

def test_a_teacher_can_learn_beside_its_student(registered, start, monkeypatch):
    """Two learners of one step, each with its own optimizer and divisor; both are in the checkpoint."""
    @method(losses=any_divergence("fkl"), teachers="one", needs=("solution",), samples=False,
            teacher_learns=True)
    def pair(run):
        """The student learns from the teacher, and the teacher from the solutions and from the student."""
        for step in run.steps():
            rollouts = run.references(run.draw())
            yield [Job(run.student, run.teacher, rollouts, run.objective),
                   Job(run.teacher, None, rollouts, LOSSES["nll"]),
                   Job(run.teacher, run.student, rollouts, run.objective, weights=[0.5] * len(rollouts))]

    flags = dict(method="pair", steps=4, lr=1e-3)
    whole = start(**flags)
    before = parameters(whole.teacher), parameters(whole.student)
    opd.train(whole)
    ends = parameters(whole.teacher), parameters(whole.student)
    assert all(not torch.equal(a, b) for a, b in zip(before, ends))
    assert [learner.name for learner in whole.learners] == ["student", "teacher"]
    assert [learner.updates for learner in whole.learners] == [4, 4]
    assert all(line["rollouts"] == 4 for line in metrics(whole))

    cut = start(**flags, save_every=2)
    monkeypatch.setattr(opd, "update", die_at(opd.update, 3))
    with pytest.raises(KeyboardInterrupt):
        opd.train(cut)
    monkeypatch.undo()
    again = start(**flags, save_every=2, out=cut.out, resume=True)
    opd.train(again)
    assert torch.equal(parameters(again.teacher), ends[0]) and torch.equal(parameters(again.student), ends[1])


# ---- a teacher that sees more ------------------------------------------------------------------------------

def told_rows():
    """Rows whose teacher_prompt begins with the row's own answer, as far as the tiny tokenizer knows it."""
    return [row | {"teacher_prompt": f"{row['answer']}={row['prompt']}"} for row in WORD_ROWS]


def dense(model, prompt, ids_T):
    """Log-probabilities [T, V] at every token of a completion, from the logits of transformers itself."""
    prompt_ids = model.tok(prompt).input_ids
    logits_TV = model.net(torch.tensor([[*prompt_ids, *ids_T.tolist()]])).logits[0, :, :model.vocab]
    return torch.log_softmax(logits_TV, -1)[len(prompt_ids) - 1:-1]


@pytest.mark.parametrize("method, given", [
    ("opd", {}), ("mopd", {}), ("camopd", dict(mass=1, scale=1, schedule="1")), ("kd", {}),
    ("context", {}), ("context", dict(self_teacher="ema")), ("context", dict(self_teacher="live"))], ids=str)
def test_student_and_teacher_are_compared_where_each_sees_its_own_prompt(start, prompts, method, given):
    """OPCD eq. 1: KL(p(. | x, y) || q(. | c, x, y)), against autograd on whole logits in float64."""
    run = double(start(method=method, loss="rkl", prompts=[prompts("told", told_rows())], batch=5,
                       teacher_system=[], **given))
    teacher = run.teacher or run.self_teacher(run.student)
    teacher.net.double()
    teacher.dtype, teacher.values = torch.float64, {p: v.double() for p, v in teacher.values.items()}
    jobs = next(run.jobs())
    loss, ours = accumulate(run, jobs), gradients(run.student)
    run.student.net.zero_grad()
    rollouts, expected = [r for job in jobs for r in job.rollouts], 0
    for r in rollouts:
        lp = dense(run.student, r.prompt["prompt"], r.ids_T)
        lq = dense(teacher, r.prompt["teacher_prompt"], r.ids_T).detach()
        expected += (lp.exp() * (lp - lq)).sum(-1).mean() / len(rollouts)
    expected.backward()
    assert expected > 0.1 and loss == pytest.approx(expected.item(), rel=1e-6)
    assert (ours - gradients(run.student)).abs().max() < 1e-6 * ours.abs().max()


def test_a_teacher_writes_after_its_own_prompt_and_the_student_learns_after_the_short_one(start, prompts):
    """seqkd is then context distillation as it was before it was on-policy."""
    run = start(method="seqkd", prompts=[prompts("told", told_rows())], batch=5)
    teacher = run.teacher
    job, = next(run.jobs())
    for r in job.rollouts:
        (ids_T, _), = run.complete(teacher, [teacher.encode(r.prompt["teacher_prompt"])], temperature=0)
        assert torch.equal(ids_T, r.ids_T) and r.prompt_ids == run.student.encode(r.prompt["prompt"])


def test_a_row_without_a_teachers_prompt_is_seen_by_both(start, prompts):
    rows = [*WORD_ROWS[:2], *told_rows()[2:]]
    run = start(prompts=[prompts("told", rows)], batch=5)
    job, = next(run.jobs())
    for r in job.rollouts:
        assert r.teacher_ids == run.teacher.encode(r.prompt.get("teacher_prompt", r.prompt["prompt"]))
    assert sum(r.teacher_ids == r.prompt_ids for r in job.rollouts) == 2


def test_one_text_for_all_is_a_teachers_prompt_of_every_row(start, prompts, tmp_path):
    """To the last bit; and another text under the same path is another experiment."""
    text = tmp_path / "told.txt"
    text.write_text("\ufeffcopy q>\n")                          # as some editors begin a file
    flags = dict(method="context", lr=1e-3, save_every=1)
    rows = [row | {"teacher_prompt": "copy q>\n\n" + row["prompt"]} for row in WORD_ROWS]
    one, other = start(**flags, teacher_system=text), start(**flags, teacher_system=[],
                                                            prompts=[prompts("told", rows)])
    before = parameters(one.student)
    for run in (one, other):
        opd.train(run)
    assert torch.equal(parameters(one.student), parameters(other.student))
    assert not torch.equal(parameters(one.student), before)
    (tmp_path / "copy.txt").write_text("copy q>")
    start(**flags, teacher_system=tmp_path / "copy.txt", out=one.out, resume=True, steps=3)
    text.write_text("copy z>")
    with pytest.raises(Refused, match="another content of teacher_system"):
        start(**flags, teacher_system=text, out=one.out, resume=True)


def test_a_dry_run_shows_what_the_teacher_sees(argv, tmp_path, capsys):
    """Also where the teacher is the student."""
    text = tmp_path / "told.txt"
    text.write_text("last copy")
    for method in ("context", "opd"):
        opd.main(argv(method=method, dry_run=True, teacher_system=text))
        shown = capsys.readouterr().out
        seen = shown.partition("as the student sees it, ")[2].partition("and where the loss is")[0]
        assert "as the teacher sees it, 11 tokens:\n  'last copy" in seen and seen.count("rev abc>") == 2


# ---- rewards and third models beside the teacher -----------------------------------------------------------

def scattered(run, jobs):
    """Give the rollouts of some Jobs rewards, and sampled log-probabilities that are not the training's."""
    g = torch.Generator().manual_seed(0)
    for i, r in enumerate(r for job in jobs for r in job.rollouts):
        r.reward = [1.0, 0.0, 0.25, 1.0][i % 4]
        lp_TV = dense(run.student, r.prompt["prompt"], r.ids_T).detach()
        r.logp_T = lp_TV.gather(1, r.ids_T[:, None])[:, 0] + 0.4 * torch.randn(len(r.ids_T), generator=g)


def pg_by_hand(run, rollouts, advantage):
    """CaMOPD eq. 2 by autograd: the mean over rollouts and tokens of -w A log p(y). advantage(r, lp, lq)"""
    loss, n = 0, len(rollouts)
    for r in rollouts:
        at = lambda model: dense(model, r.prompt["prompt"], r.ids_T).gather(1, r.ids_T[:, None])[:, 0]
        lp = at(run.student)
        w = (lp - r.logp_T).exp().detach()
        w = torch.where((w >= 0.5) & (w <= 2), w, 0.0)
        loss = loss - (w * advantage(r, lp.detach(), at).detach() * lp).mean() / n
    return loss


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
@pytest.mark.parametrize("given", [dict(reward_weight=0.7), dict(advantage_clip=0.5),
                                   dict(reward_weight=0.7, advantage_clip=0.5)], ids=str)
@pytest.mark.parametrize("method", ["opd", "mopd"])
def test_the_advantage_is_the_clipped_gap_and_the_weighted_reward(start, method, given, micro_tokens):
    """A = clip(gap) + alpha (r - the mean of the prompt's rollouts), a dropped one's r in the mean too."""
    run = double(start(method=method, loss="pg", rollouts=4, batch=2, micro_tokens=micro_tokens, **given))
    jobs = next(run.jobs())
    job, = jobs
    scattered(run, jobs)
    job.weights = [1.0] * 8
    job.weights[2] = 0.0
    value, ours = accumulate(run, jobs), gradients(run.student)
    run.student.net.zero_grad()
    clip, kept = given.get("advantage_clip", 1e9), job.rollouts[:2] + job.rollouts[3:]

    def advantage(r, lp, at):
        gap = at(run.teacher) - lp
        assert (gap.abs() > 0.5).any() or len(gap) < 4
        return gap.clamp(-clip, clip) + given.get("reward_weight", 0) * (r.reward - 2.25 / 4)
    loss = pg_by_hand(run, kept, advantage)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert (ours - gradients(run.student)).abs().max() < 1e-6 * ours.abs().max()


def left_behind(run):
    """The student as it started, in float64, after the student has moved away from it."""
    reference = run.self_teacher(run.student)
    reference.net.double()
    reference.dtype = torch.float64
    with torch.no_grad():
        for parameter in run.student.net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return reference


@pytest.mark.parametrize("scale", [0.5, 1.25])
def test_exopd_has_the_advantage_of_the_paper(start, scale):
    """A = lambda log q/r - log p/r, r the student as it started, all at the temperature of the loss."""
    run = double(start(method="exopd", exopd_lambda=scale, batch=4))
    reference = left_behind(run)
    jobs = next(run.jobs())
    scattered(run, jobs)
    value, ours = accumulate(run, jobs), gradients(run.student)
    run.student.net.zero_grad()
    loss = pg_by_hand(run, jobs[0].rollouts, lambda r, lp, at: (
        scale * (at(run.teacher) - at(reference)) - (lp - at(reference))))
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    assert (ours - gradients(run.student)).abs().max() < 1e-5 * ours.abs().max()


def test_exopd_that_does_not_extrapolate_is_mopd(start):
    """To the last bit."""
    runs = [start(method="mopd", lr=1e-3), start(method="exopd", lr=1e-3, exopd_lambda=1),
            start(method="exopd", lr=1e-3)]
    for run in runs:
        opd.train(run)
    mopd, same, beyond = (parameters(run.student) for run in runs)
    assert torch.equal(mopd, same) and not torch.equal(mopd, beyond)


@pytest.mark.parametrize("method, given", [
    ("opd", dict(loss="rkl")), ("mopd", {}), ("grpo", dict(rollouts=4, batch=2)),
    ("opd", dict(loss="fkl", drop_cut=True, loss_temperature=1.5, batch=16, max_new_tokens=30))], ids=str)
def test_the_kl_anchor_is_added_to_the_loss_and_halves_nothing(start, method, given):
    """The gradient is the method's own plus beta times that of KL(p || start), over the same rollouts."""
    run = double(start(method=method, kl_weight=0.3, **given))
    reference, temperature = left_behind(run), run.cfg.loss_temperature
    jobs = next(run.jobs())
    own, anchor = jobs
    if method == "grpo":
        own.weights = [0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]     # those of weight 0 are anchored, too
    own_value, ours = accumulate(run, [own]), gradients(run.student)
    value, both = accumulate(run, jobs), gradients(run.student)
    run.student.net.zero_grad()
    kept = [r for r, cut in zip(own.rollouts, own.cut) if not (cut and run.cfg.drop_cut)]
    assert 0 < len(kept) and bool(run.cfg.drop_cut) == (len(kept) < len(own.rollouts))
    loss = 0
    for r in kept:
        lp, lr = (torch.log_softmax(dense(model, r.prompt["prompt"], r.ids_T) / temperature, -1)
                  for model in (run.student, reference))
        loss = loss + 0.3 * (lp.exp() * (lp - lr.detach())).sum(-1).mean() / len(kept)
    loss.backward()
    assert loss > 1e-3 and value - own_value == pytest.approx(loss.item(), rel=1e-5)
    assert (both - ours - gradients(run.student)).abs().max() < 1e-5 * gradients(run.student).abs().max()


def test_the_anchor_has_its_own_line_of_statistics_and_weighs_as_much_as_said(start, prompts, models):
    """What a step says is of the method; a heavy anchor holds the student; contexts are not for it."""
    flags = dict(method="opd", lr=1e-3, steps=4, prompts=[prompts("told", told_rows())])
    free, light, heavy = (start(**flags, **more) for more in ({}, dict(kl_weight=0), dict(kl_weight=100)))
    before = parameters(free.student)
    for run in (free, light, heavy):
        opd.train(run)
    assert torch.equal(parameters(free.student), parameters(light.student)) and light.self_teachers == [None]
    first = metrics(heavy)[0]
    assert {name: first[name] for name in ("value", "entropy_s", "gap", "tokens")} == {
        name: metrics(free)[0][name] for name in ("value", "entropy_s", "gap", "tokens")}
    anchors = [line["branches"]["main, anchor"]["value"] for line in metrics(heavy)]
    assert abs(anchors[0]) < 1e-5 < max(anchors)                # it starts where it started
    rollouts = [json.loads(line) for line in (heavy.out / "samples.jsonl").read_text().splitlines()]
    assert len(rollouts) == 4 * 2                               # --log_samples a step, each once
    start_of = heavy.self_teacher(heavy.student)
    far = lambda run: sum((lp_T - lr_T).abs().sum() for lp_T, lr_T in zip(*[
        model.log_probs([run.student.encode(row["prompt"]) for row in WORD_ROWS],
                        [torch.arange(5, 11)] * len(WORD_ROWS), 1000) for model in (run.student, start_of)]))
    assert far(heavy) < 0.7 * far(free)


# ---- token weights -----------------------------------------------------------------------------------------

def entropy(lp_TV):
    return -(lp_TV.exp() * lp_TV).sum(-1)


def kl(lp_TV, lq_TV):
    return (lp_TV.exp() * (lp_TV - lq_TV)).sum(-1)


def both(run, r, temperature=1.0):
    """log p and log q [T, V] at every token of a rollout, from the logits of transformers itself."""
    return [torch.log_softmax(dense(model, r.prompt["prompt"], r.ids_T) / temperature, -1)
            for model in (run.student, run.teacher)]


def by_definition(name, pairs, knob):
    """The weights of the rollouts' tokens as the table in methods/token_weights.py says, token by token."""
    h = [entropy(lp) for lp, _ in pairs]
    if name == "eopd":
        return [torch.ones(len(lp)) for lp, _ in pairs]
    if name == "prefix":
        return [torch.tensor([len(lp) / min(knob, len(lp)) * (t < knob) for t in range(len(lp))])
                for lp, _ in pairs]
    if name == "selectkd":
        accepted = [[lp[t].argmax() in lq[t].topk(int(knob)).indices for t in range(len(lp))]
                    for lp, lq in pairs]
        return [torch.tensor([1.0 if yes else 0.01 for yes in some]) for some in accepted]
    if name == "tip":
        every = torch.cat(h).sort().values
        top = every[math.ceil(0.98 * len(every)) - 1]
        low, d = every[0], [kl(lp, lq) for lp, lq in pairs]
        least, most = min(x.min() for x in d), max(x.max() for x in d)
        unit = [(h_T.clamp(max=top) - low) / (top - low) for h_T in h]
        other = [(d_T - least) / (most - least) for d_T in d]
        h = [1 - (1 - a) * (1 - b) for a, b in zip(unit, other)]
    out = []
    for score in h:
        count = max(int(knob * len(score)), 1)
        bar = score.sort(descending=True).values[count - 1]
        out.append((score >= bar) * (len(score) / count))
    return out


def lively(run, count=6):
    """Rollouts of different lengths, as if sampled."""
    g = torch.Generator().manual_seed(3)
    rows = run.prompts["main"]
    return [run.rollout(rows[i % len(rows)], torch.randint(3, run.student.vocab, (2 + 2 * i,), generator=g),
                        logp_T=torch.full((2 + 2 * i,), -4.0)) for i in range(count)]


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
@pytest.mark.parametrize("loss", ["rkl", "pg"])
@pytest.mark.parametrize("name, knob", [("entropy", None), ("tip", None), ("tip", 0.2), ("selectkd", 20),
                                        ("prefix", 3), ("eopd", None)])
def test_the_gradient_has_the_weights_of_the_table(start, name, knob, loss, micro_tokens):
    """Of the loss by autograd on whole logits, at another temperature, and eopd's second term."""
    run = double(start(loss=loss, token_weight=name, token_knob=knob or [], loss_temperature=1.5,
                       micro_tokens=micro_tokens, importance=[0, 1e9] if loss == "pg" else []))
    job = Job(run.student, run.teacher, lively(run), run.objective)
    pairs = [[x.detach() for x in both(run, r, 1.5)] for r in job.rollouts]
    if name == "eopd":                                          # half of the 42 tokens are above it
        in_order_N = torch.cat([entropy(lq) for _, lq in pairs]).sort().values
        run.cfg.token_knob = knob = in_order_N[20:22].mean().item()
    jobs = [job, *weigh_tokens(run, [job])]
    value, ours = accumulate(run, jobs), gradients(run.student)
    run.student.net.zero_grad()
    weights, loss_of_all, opened = by_definition(name, pairs, knob or RULES[name].knob), 0, 0
    unlike = 0
    for r, w_T in zip(job.rollouts, weights):
        lp, lq = both(run, r, 1.5)
        lq = lq.detach()
        if loss == "pg":
            at = lambda x: x.gather(1, r.ids_T[:, None])[:, 0]
            value_T = -((at(lp) - r.logp_T).exp() * (at(lq) - at(lp))).detach() * at(lp)
        else:
            value_T = kl(lp, lq)
        loss_of_all = loss_of_all + (w_T * value_T).mean() / len(job.rollouts)
        if name == "eopd":
            sixteen = lq >= lq.topk(16).values[:, -1:]
            more_T = (lq.exp() * (lq - lp) * sixteen).sum(-1)
            gate_T = (entropy(lq) > knob).double()
            opened += gate_T.sum().item()
            other = (entropy(lp) > knob).double()
            unlike += (gate_T != other).sum().item()
            loss_of_all = loss_of_all + (gate_T * more_T).mean() / len(job.rollouts)
    loss_of_all.backward()
    exact = gradients(run.student)
    if name == "eopd":
        assert opened == 21 and unlike > 2
    elif name == "selectkd":
        assert {0.01, 1.0} == {round(w, 2) for w_T in weights for w in w_T.tolist()}
    else:
        assert any((w_T == 0).any() for w_T in weights)
    assert value == pytest.approx(loss_of_all.item(), rel=1e-5)
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


def test_tip_finds_the_sure_and_wrong_tokens_that_entropy_does_not_see():
    """A token at which the student is certain and the teacher disagrees: TIP's blind spot of entropy."""
    h, d = torch.tensor([2.0, 1.9, 0.0, 0.0]), torch.tensor([0.1, 0.1, 9.0, 0.0])
    found = [dict(entropy_s=h, value=d)]
    assert RULES["entropy"].weigh(found, 0.5)[0].tolist() == [2, 2, 0, 0]
    assert RULES["tip"].weigh(found, 0.5)[0].tolist() == [2, 0, 2, 0]
    short = [dict(entropy_s=h[:1], value=d[:1]), *found]
    assert [w_T.sum().item() for w_T in RULES["tip"].weigh(short, 0.3)] == [1, 4]   # rollouts keep theirs


def test_token_weights_and_the_methods_own_are_factors(start):
    """camopd's dropped rollouts are not even read, and its scale stays."""
    run = start(method="camopd", token_weight="prefix", token_knob=2, scale=3, mass=0.5, schedule="1",
                rollouts=2, max_new_tokens=8)
    plain = start(method="camopd", scale=3, mass=0.5, schedule="1", rollouts=2, max_new_tokens=8)
    (ours,), (theirs,) = next(run.jobs()), next(plain.jobs())
    kept = 0
    for w_T, w, r in zip(ours.weights, theirs.weights, ours.rollouts):
        kept += bool(w)
        expected = [float(w) * len(r.ids_T) / min(2, len(r.ids_T)) * (t < 2) for t in range(len(r.ids_T))]
        assert torch.as_tensor(w_T).expand(len(r.ids_T)).tolist() == pytest.approx(expected)
    assert 0 < kept < len(ours.rollouts)


def test_exopds_reference_counts_as_a_teacher_that_reads(start):
    plain, beyond = (start(method=method, steps=1) for method in ("mopd", "exopd"))
    for run in (plain, beyond):
        opd.train(run)
    assert beyond.state["teacher_tokens"] == 2 * plain.state["teacher_tokens"] > 0


@pytest.mark.parametrize("name", ["tip", "selectkd", "eopd"])
def test_log_p_is_computed_once_where_a_method_selects_and_tokens_are_weighed(start, monkeypatch, name):
    run, asked = start(method="camopd", schedule="1", mass=1, steps=1, token_weight=name), []
    log_probs = type(run.student).log_probs

    def noted(model, prompts, completions, *rest):
        asked.extend(completions if model is run.student else [])
        return log_probs(model, prompts, completions, *rest)
    monkeypatch.setattr(type(run.student), "log_probs", noted)
    next(run.jobs())
    assert len(asked) == 4


@pytest.mark.parametrize("name", list(RULES))
def test_a_teacher_reads_a_rollout_once_for_its_gaps_and_its_tokens_weights(start, name):
    plain, weighted = (start(method="mopd", steps=1, **more) for more in ({}, dict(token_weight=name)))
    for run in (plain, weighted):
        opd.train(run)
    assert plain.state["teacher_tokens"] == weighted.state["teacher_tokens"] > 0


def test_what_is_not_learned_from_has_no_part_in_the_scale_of_tip(start):
    """With --drop_cut a rollout that was cut is not read, and others weigh what they weigh without it."""
    run = double(start(loss="rkl", token_weight="tip", token_knob=0.3, drop_cut=True))
    run.sample = lambda *_: lively(run)
    eos = run.student.stops[0]
    ends = [r for r in lively(run) if len(r.ids_T) > 2]
    for r in ends:
        r.ids_T[-1] = eos
    cut = max(lively(run), key=lambda r: len(r.ids_T))
    run.sample = lambda *_: [cut, *ends]
    job, = next(run.jobs())
    expected = by_definition("tip", [[x.detach() for x in both(run, r)] for r in ends], 0.3)
    assert not torch.as_tensor(job.weights[0]).any() and job.hidden_t[0] is None
    for w_T, other_T in zip(job.weights[1:], expected, strict=True):
        assert w_T.tolist() == pytest.approx(other_T.tolist())


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("method", ["opd", "mopd", "camopd"])
def test_methods_train_with_every_token_weight_beside_the_other_terms(start, method, name):
    """Nothing is counted twice, and what a step says is of the method's own Jobs."""
    flags = dict(method=method, token_weight=name, rollouts=2, batch=2, steps=2, drop_cut=True,
                 max_new_tokens=40)
    flags |= {"camopd": dict(schedule="1"), "mopd": dict(kl_weight=0.1, loss="rkl"),
              "opd": dict(kl_weight=0.1, loss="pg", reward_weight=1)}[method]
    run = start(**flags)
    opd.train(run)
    for line in metrics(run):
        assert line["rollouts"] == 4 and math.isfinite(line["loss"])
        names = {name.partition(", ")[2] for name in line.get("branches", {})}
        assert names - {""} == ({"eopd"} if name == "eopd" else set()) | (
            {"anchor"} if method != "camopd" else set())
