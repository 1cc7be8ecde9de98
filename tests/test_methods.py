"""The protocol between methods and the loop, and the methods that no other file tests."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORD_ROWS, die_at, gradients, metrics, parameters

import methods
import opd
from config import Refused
from data.folder import rollout_stats
from losses import LOSSES, Objective
from methods import METHODS, Job, any_divergence, method

ROOT = Path(__file__).parent.parent
PAIRS = [{"prompt": "rev abc>", "chosen": "cba", "rejected": "abc"},
         {"prompt": "last q>", "chosen": "q", "rejected": "xy"}]

GRADED = [{key: row[key] for key in ("prompt", "answer")} for row in WORD_ROWS]


# ---- rooms -------------------------------------------------------------------------------------------------

FLOORS = ["losses", "kernels", "config", "models", "data", "methods", "lab", "opd"]     # each uses lower ones
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


# ---- dpo ---------------------------------------------------------------------------------------------------

def double(run):
    teacher = run.self_teacher(run.student)
    for model in (run.student, teacher):
        model.net.double()
        model.dtype = torch.float64
    teacher.values = {p: value.double() for p, value in teacher.values.items()}
    return run


def dpo_by_hand(run, beta, rows):
    """DPO's loss by autograd on the logits of transformers itself, with another model as reference."""
    def log_prob(net, prompt, text):
        ids, answer = run.student.encode(prompt), run.student.encode_completion(text)
        logp = torch.log_softmax(net(torch.tensor([ids + answer])).logits[0, :, :run.student.vocab], -1)
        return sum(logp[len(ids) - 1 + t, i] for t, i in enumerate(answer))

    reference, margins = run.self_teacher(run.student), []
    for row in rows:
        ratio = {}
        for side in ("chosen", "rejected"):
            with torch.no_grad(), reference.on_device():
                anchor = log_prob(reference.net, row["prompt"], row[side])
            ratio[side] = log_prob(run.student.net, row["prompt"], row[side]) - anchor
        margins.append(beta * (ratio["chosen"] - ratio["rejected"]))
    margins = torch.stack(margins)
    return -torch.nn.functional.logsigmoid(margins).mean(), margins


@pytest.mark.parametrize("kind", ["frozen", "snapshot"])
def test_the_gradient_of_dpo_is_that_of_its_loss(start, prompts, kind):
    """Sums over tokens, the mean over pairs, beta in both places: against autograd in float64."""
    run = double(start(method="dpo", prompts=[prompts("p", PAIRS)], self_teacher=kind, dpo_beta=0.3, batch=2))
    with torch.no_grad():                                           # a student that has moved
        for p in run.student.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    [job] = next(run.jobs())
    opd.backward(run, job, opd.weigh([job])[0])
    ours, noted = gradients(run.student), dict(run.notes)
    run.student.net.zero_grad()
    loss, margins = dpo_by_hand(run, 0.3, PAIRS)
    loss.backward()
    exact = gradients(run.student)
    assert margins.abs().max() > 1e-3 and (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    assert noted["dpo_loss"] == pytest.approx(loss.item(), rel=1e-5) and noted["pairs"] == 2
    assert noted["preferred"] == pytest.approx((margins > 0).double().mean().item())


def test_dpo_learns_to_prefer_the_chosen_and_its_reference_stays_or_is_renewed(start, prompts):
    flags = dict(method="dpo", prompts=[prompts("p", PAIRS)], batch=2, steps=6, lr=3e-3)
    fixed, renewed = start(**flags), start(**flags, renew_every=2)
    anchor = [value.clone() for value in fixed.self_teacher(fixed.student).values.values()]
    for run in (fixed, renewed):
        opd.train(run)
    margins = [line["margin"] for line in metrics(fixed)]
    assert margins[0] == 0 and margins[-1] > max(margins[1], 0.1) and metrics(fixed)[-1]["preferred"] == 1
    assert all(torch.equal(a, b) for a, b in zip(anchor, fixed.self_teacher(fixed.student).values.values()))
    assert [line["margin"] == 0 for line in metrics(renewed)] == [True, False] * 3
    with pytest.raises(Refused, match="--renew_every needs --self_teacher snapshot"):
        start(**flags, renew_every=2, self_teacher="frozen")


def test_dpo_makes_pairs_of_graded_rollouts_and_skips_prompts_without_one(start, prompts, monkeypatch):
    """A correct and a wrong rollout of one prompt are a pair; all correct or all wrong teach nothing."""
    run = start(method="dpo", rollouts=3, batch=3, prompts=[prompts("g", GRADED)])
    rewards = iter([0, 1, 0, 1, 1, 1, 0, 0, 0])
    monkeypatch.setattr(opd, "grade", lambda *args: float(next(rewards)))
    rollouts, pairs = methods.dpo.preferences(run, run.prompts["main"][:3])
    assert len(rollouts) == 9 and pairs == [(1, 0)]


def test_dpo_reads_only_the_rollouts_that_are_paired(start, prompts, monkeypatch):
    """Seven of eight rollouts of a prompt teach nothing; reading them would cost the most of a step."""
    run = start(method="dpo", rollouts=4, batch=2, steps=1, prompts=[prompts("g", GRADED)])
    rewards = iter([0, 1, 0, 1, 1, 1, 1, 1])
    monkeypatch.setattr(opd, "grade", lambda *args: float(next(rewards)))
    [job] = next(run.jobs())
    assert [gap_T is not None for gap_T in job.gaps] == [True, True] + [False] * 6
    assert job.weights[0] == -job.weights[1] == -0.05 and not any(job.weights[2:])


def test_dpo_refuses_prompts_without_pairs_and_answers(start, prompts):
    with pytest.raises(Refused, match="needs --rollouts of at least 2"):
        start(method="dpo", rollouts=1, prompts=[prompts("g", GRADED)])
    with pytest.raises(Refused, match='has no "chosen" or "answer", which --method dpo needs'):
        start(method="dpo", prompts=[prompts("p", [{"prompt": "last q>"}])])


def test_dpo_step_without_a_pair_changes_nothing_but_is_logged(start, prompts, monkeypatch):
    run = start(method="dpo", rollouts=2, steps=1, optimizer="sgd", weight_decay=0.0,
                prompts=[prompts("g", GRADED)])
    monkeypatch.setattr(opd, "grade", lambda *args: 0.0)
    before = parameters(run.student)
    opd.train(run)
    [line] = metrics(run)
    assert torch.equal(parameters(run.student), before) and line["pairs"] == line["kept"] == 0
    assert json.loads((run.out / "config.json").read_text())["dpo_beta"] == 0.1
