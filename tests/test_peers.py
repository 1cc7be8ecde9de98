"""Students that learn from rewards, from themselves and from each other: GRPO, STaR, OPSD, SDPO, OPCoD."""
import copy
import json

import pytest
import torch
from conftest import WORD_ROWS, die_at, gradients, parameters
from test_data import SHARED
from test_loop import accumulate, double
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from config import Refused
from data import convert, scratch
from data.files import read_lines
from data.folder import solved
from data.graders import complaint
from methods import Rollout, opcod
from methods.feedback import Templates, with_answer
from methods.oneself import demonstrations, self_taught
from methods.rewards import advantages
from models import average_values, follow, offload


@pytest.fixture(scope="session")
def sure(models, tmp_path_factory):
    """Models a and b, surer of what they write, and prompts whose answers are their likeliest tokens."""
    folder, rows = tmp_path_factory.mktemp("sure"), {"a": [], "b": []}
    for name, found in rows.items():
        tok = AutoTokenizer.from_pretrained(models / name)
        net = AutoModelForCausalLM.from_pretrained(models / name)
        with torch.no_grad():
            net.model.norm.weight.mul_(4)
            for row in WORD_ROWS:
                logits_V = net(torch.tensor([tok(row["prompt"]).input_ids])).logits[0, -1]
                answer = tok.decode(logits_V.argmax(), skip_special_tokens=True)
                found.append(row | {"answer": answer, "solution": answer})
        net.save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    return folder, rows


@pytest.fixture
def solvable(start, sure, prompts):
    """start(..) on prompts that tiny random models often get right."""
    folder, rows = sure
    pair = lambda name: [f"{branch}={prompts('solvable' + name + branch, rows[of])}"
                         for branch, of in (("words", "a"), ("more", "b"))]
    common = dict(max_new_tokens=1, lr=1e-3, batch=4, steps=4)
    both = dict(method="opcod", student=[folder / "a", folder / "b"], prompts=pair("train"),
                val_prompts=pair("val"), rounds=2, feedback_tokens=2)
    alone = dict(student=folder / "a", prompts=[prompts("solvable", rows["a"])])
    return lambda **flags: start(**common | (both if flags.get("method") == "opcod" else alone) | flags)


def some(run, rewards, prompt=0):
    """A rollout of each reward for one prompt, of different lengths, with texts of their own."""
    g, row = torch.Generator().manual_seed(prompt), WORD_ROWS[prompt] | {"branch": "main", "row": prompt}
    return [Rollout(row, torch.randint(3, run.student.vocab, (1 + i % 3,), generator=g), *run.views(row),
                    torch.zeros(1 + i % 3), f"text {prompt} {i}", float(reward))
            for i, reward in enumerate(rewards)]


def sees(rollouts):
    """What the self-teacher sees in place of each rollout's prompt; None where it is told nothing."""
    return [r.notes.get("teacher_sees") for r in rollouts]


def log_probs_by_hand(model, prompt, ids_T, vocab):
    """log p [T, V] of a completion after a prompt (text), from the logits of transformers itself."""
    prompt = model.tok(prompt).input_ids
    with model.on_device():
        logits = model.net(torch.tensor(prompt + ids_T.tolist())[None]).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1:-1, :vocab], -1)


# ---- rewards -----------------------------------------------------------------------------------------------

def test_group_advantages_are_relative_to_their_own_prompt():
    rows = [{"branch": b, "row": 1} for b in ("x", "y")]
    rollouts = [Rollout(rows[i % 2], None, [], [], reward=r) for i, r in enumerate((1, 1, 0, 1, 0, 1))]
    assert advantages(rollouts) == pytest.approx([2 / 3, 0, -1 / 3, 0, -1 / 3, 0])


def test_grpo_gradient_is_its_definition(start):
    """Mean over all rollouts, those without advantage too; importance weights are cut at the cap."""
    run = double(start(method="grpo"))
    rollouts = some(run, (1, 0, 0, 1), 0) + some(run, (1, 1), 1)
    for r in rollouts[4:]:
        r.prompt = r.prompt | {"branch": "other"}                # n counts the rollouts of all branches
    g = torch.Generator().manual_seed(0)
    for r in rollouts:
        lp_TV = log_probs_by_hand(run.student, r.prompt["prompt"], r.ids_T, run.student.vocab)
        r.logp_T = lp_TV.gather(1, r.ids_T[:, None])[:, 0].detach() + torch.randn(len(r.ids_T), generator=g)
    run.sample = lambda model, prompts: rollouts
    value = accumulate(run, next(run.jobs()))
    ours, loss, ratios = gradients(run.student), 0.0, []
    run.student.net.zero_grad()
    for r in rollouts:
        a = r.reward - (0.5 if r.prompt["row"] == 0 else 1.0)
        lp_T = log_probs_by_hand(run.student, r.prompt["prompt"], r.ids_T,
                                 run.student.vocab).gather(1, r.ids_T[:, None])[:, 0]
        ratios += (lp_T - r.logp_T).exp().tolist()
        loss = loss - a * ((lp_T - r.logp_T).exp().clamp(max=2).detach() * lp_T).mean() / len(rollouts)
    loss.backward()
    assert max(ratios) > 2 > 1 > min(ratios)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert (ours - gradients(run.student)).abs().max() < 1e-6 * ours.abs().max()


def test_grpo_needs_rollouts_to_compare(argv):
    with pytest.raises(SystemExit, match="--rollouts must be at least 2"):
        opd.main(argv(method="grpo", rollouts=1))


@pytest.mark.parametrize("method", ["star", "grpo", "sdpo"])
def test_methods_of_one_student_resume_where_they_were(solvable, monkeypatch, method):
    """star: what was written before the kill is not written again."""
    flags = dict(method=method, steps=6, save_every=1)
    whole, cut = solvable(**flags), solvable(**flags)
    opd.train(whole)
    monkeypatch.setattr(opd, "update", die_at(opd.update, 3))
    with pytest.raises(KeyboardInterrupt):
        opd.train(cut)
    monkeypatch.undo()
    resumed = solvable(**flags, out=cut.out, resume=True)
    opd.train(resumed)
    assert resumed.state["step"] == 6 and torch.equal(parameters(whole.student), parameters(resumed.student))
    of = lambda run: [line.get("loss") for line in read_lines(run.out / "metrics.jsonl")]
    assert of(whole) == of(resumed)


def test_star_learns_the_plain_prompt_from_answers_written_with_the_hint(solvable, monkeypatch):
    """What is told is not learned from, wrong rationales have no weight, and every prompt is told once."""
    run, asked = solvable(method="star"), []
    real = run.sample
    monkeypatch.setattr(run, "sample", lambda model, prompts, **how: (
        asked.append((model, [p["prompt"] for p in prompts])), real(model, prompts, **how))[1])
    steps, seen = run.jobs(), []
    for _ in range(3):
        jobs = next(steps)
        for job in jobs:
            assert job.weights == [float(r.reward == 1) for r in job.rollouts]
            seen += [r.prompt["prompt"] for r in job.rollouts]
            assert all(r.logp_T is None for r in job.rollouts)   # fixed data
        run.state["step"] += 1
    told = [prompt for model, prompts in asked for prompt in prompts]
    assert all(model is run.self_teacher(run.student) and model is not run.student for model, _ in asked)
    assert sorted(set(seen)) == sorted(r["prompt"] for r in WORD_ROWS) and len(told) == len(set(seen))
    assert all("=" in prompt for prompt in told) and not any("=" in prompt for prompt in seen)


# ---- oneself -----------------------------------------------------------------------------------------------

def test_demonstration_is_the_earliest_other_correct_rollout_of_the_same_prompt(start):
    run = start(method="sdpo")
    rollouts = some(run, (0, 1, 0, 1), 0) + some(run, (0, 1), 1) + some(run, (0, 0), 2)
    assert demonstrations(rollouts) == [
        "text 0 1", "text 0 3", "text 0 1", "text 0 1", "text 1 1", None, None, None]
    assert solved(rollouts) == 2 / 3


@pytest.mark.parametrize("kind", ["live", "frozen", "ema"])     # of a snapshot: test_methods.py
def test_gradient_of_self_distillation_is_its_definition(start, kind):
    """JSD(p(. | x) || sg q(. | x, s)), q the student as it is, was, or is on average, of the informed."""
    run = double(start(method="sdpo", self_teacher=kind, top_k=1000, micro_tokens=20))
    teacher = run.self_teacher(run.student)
    teacher.net.double()
    teacher.values = {p: value.double() for p, value in teacher.values.items()}
    teacher.dtype = torch.float64
    before = copy.deepcopy(run.student.net)
    with torch.no_grad():                                        # an update has been made
        for p in run.student.net.parameters():
            p.mul_(1.05)
    if kind == "ema":
        follow(run.student.average, 0.5)
    rollouts = some(run, (0, 1, 0), 0) + some(run, (0, 0), 1)
    jobs = self_taught(run, run.student, rollouts, demonstrations(rollouts))
    seen = "text 0 1=rev abc>"
    assert sees(rollouts) == [seen, None, seen, None, None]
    value = accumulate(run, jobs)
    ours = gradients(run.student)
    run.student.net.zero_grad()
    if kind == "live":
        before = copy.deepcopy(run.student.net)
    if kind == "ema":
        with torch.no_grad():
            for old, new in zip(before.parameters(), run.student.net.parameters()):
                old.lerp_(new, 0.5)
    loss = 0.0
    for r in (rollouts[0], rollouts[2]):
        lp = log_probs_by_hand(run.student, r.prompt["prompt"], r.ids_T, run.student.vocab)
        prompt = run.student.tok(seen).input_ids
        assert r.teacher_ids == prompt and r.prompt_ids == run.student.tok("rev abc>").input_ids
        w = before(torch.tensor(prompt + r.ids_T.tolist())[None]).logits[0, len(prompt) - 1:-1]
        lq = torch.log_softmax(w[:, :run.student.vocab], -1).detach()
        lm = torch.log((lp.exp() + lq.exp()) / 2)
        ratio = (lp.gather(1, r.ids_T[:, None])[:, 0] - r.logp_T).exp().clamp(max=2).detach()
        jsd_T = 0.5 * (lp.exp() * (lp - lm) + lq.exp() * (lq - lm)).sum(-1)
        loss = loss + (ratio * jsd_T).mean() / 2
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    assert (ours - gradients(run.student)).abs().max() < 1e-5 * ours.abs().max()


def test_sdpo_step_without_anything_to_learn_from_changes_nothing(start):
    run = start(method="sdpo", weight_decay=0.0)                 # no answer is ever right
    before = parameters(run.student).clone()
    opd.train(run)
    assert torch.equal(before, parameters(run.student))
    assert all(line["kept"] == 0 and line["solved"] == 0
               for line in read_lines(run.out / "metrics.jsonl") if line["step"] >= 0)


def test_environment_speaks_only_where_no_demonstration_does(start):
    run = start(method="sdpo")
    rollouts = some(run, (1, 0), 0) + some(run, (0, 0), 1)
    for r in rollouts:
        r.prompt |= {"grader": "letter_tag"}
    run.sample = lambda model, prompts: rollouts
    next(run.jobs())
    ungradable = complaint("letter_tag", "") + "="
    assert sees(rollouts) == [
        f"{ungradable}rev abc>", "text 0 0=rev abc>", *[f"{ungradable}copy hello>"] * 2]


def test_environment_can_be_silent(start, prompts):
    rows = [r | {"grader": "letter_tag", "answer": "A"} for r in WORD_ROWS]
    for flags, informed in ((dict(), True), (dict(no_environment=True), False)):
        run = start(method="sdpo", prompts=[prompts("tags", rows)], max_new_tokens=2, **flags)
        job, = next(run.jobs())
        assert all((seen is not None and "graded" in seen) == informed for seen in sees(job.rollouts))


def test_opsd_teacher_sees_the_solution_and_the_student_does_not(start):
    run = start(method="opsd")
    job, = next(run.jobs())
    assert job.teacher is not job.learner and run.cfg.self_teacher == "frozen"
    objective = job.objective                                    # the paper's
    assert (objective.divergence, objective.support, objective.entry_clip) == ("fkl", "full", 0.05)
    assert run.cfg.temperature == 1.1 and run.method.defaults["max_new_tokens"] == 1024
    for r in job.rollouts:
        seen = f"{r.prompt['solution']}={r.prompt['prompt']}"
        assert sees([r]) == [seen] and r.teacher_ids == run.student.tok(seen).input_ids
        assert r.prompt_ids == run.student.tok(r.prompt["prompt"]).input_ids


@pytest.mark.parametrize("kind", ["frozen", "ema", "live", "snapshot"])
def test_self_teachers_of_an_adapter_take_no_second_model(start, kind, monkeypatch):
    """Frozen: the network without its adapter; ema, snapshot: a second adapter. All start as the student."""
    pytest.importorskip("peft", reason="optional: pip install peft")
    method = "dpo" if kind == "snapshot" else "opsd"
    run = start(method=method, self_teacher=kind, lora_rank=4, lr=1e-2, steps=3)
    teacher = run.self_teacher(run.student)
    assert teacher.net is run.student.net
    kept = sum(value.numel() for value in teacher.values.values())
    adapter = sum(p.numel() for p in run.student.net.parameters() if p.requires_grad)
    assert kept == {"frozen": 0, "ema": adapter, "live": 0, "snapshot": adapter}[kind] and 0 < adapter

    def states(model):
        with torch.no_grad(), model.on_device():
            return model.last_hidden(torch.arange(3, 12)[None])

    before = states(run.student)
    assert torch.equal(states(teacher), before)
    after = {}
    monkeypatch.setattr(opd, "finish", lambda run: after.update(student=states(run.student),
                                                                teacher=states(teacher)))
    opd.train(run)
    moved = lambda name: (after[name] - before).abs().max().item()
    assert {"frozen": moved("teacher") == 0 < moved("student"),
            "ema": 0 < moved("teacher") < moved("student"),
            "live": 0 < moved("teacher") == moved("student"),
            "snapshot": moved("teacher") == 0 < moved("student")}[kind]     # nobody has renewed it
    if kind == "snapshot":
        run.refresh(teacher)
        torch.testing.assert_close(states(teacher), after["student"])


def test_average_follows_the_student_and_leaves_it_alone(solvable, monkeypatch):
    run = solvable(method="sdpo", ema_rate=0.25, steps=3)
    average, expected = run.student.average, parameters(run.student).clone()
    states = []
    real = opd.update
    monkeypatch.setattr(opd, "update", lambda *step: (
        real(*step), states.append(parameters(run.student).clone()))[0])
    opd.train(run)
    for state in states:
        expected = 0.75 * expected + 0.25 * state
    values = torch.cat([v.flatten().double() for v in average.values.values()])
    assert len(states) == 3 and not torch.equal(states[0], states[-1])
    assert torch.allclose(values, expected, atol=1e-6)
    student = parameters(run.student).clone()
    with pytest.raises(KeyError), average.on_device():
        assert torch.equal(parameters(average), values)          # one network, two sets of values
        raise KeyError
    assert torch.equal(parameters(run.student), student)


# ---- each other --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scores, gaps", [                       # OPCoD sec. 3.2, then table 1 of the paper
    (((100, 70), (70, 100)), (0.3, 0.3)), (((51.6, 37.3), (48.6, 56.3)), (0.337, 0.058)),
    (((65.1, 48.1), (56.0, 51.6)), (0.068, 0.140)), (((56.3, 56.1), (37.6, 65.1)), (0.138, 0.332)),
    (((0.5, 0.0), (0.25, 0.0)), (0.0, 0.5))])                    # nobody is ahead where nobody knows anything
def test_cognizance_gaps(scores, gaps):
    assert opcod.cognizance_gaps([dict(zip("AB", s)) for s in scores]) == pytest.approx(gaps, abs=6e-4)


@pytest.mark.parametrize("gate, expected", [
    ("cognizance", {"words": False, "more": False}), ("always", {"words": True, "more": True}),
    ("never", {"words": False, "more": False}), ("selective", {"words": True, "more": False})])
def test_gate_decides_who_may_tutor(gate, expected):
    """The first student is too far behind on `more`; the second, within tau, always has the gate's word."""
    seen = {"scores": [{"words": 0.9, "more": 0.3}, {"words": 0.8, "more": 0.6}], "cognizant": [False, True]}
    assert {domain: opcod.may_tutor(gate, seen, 0, domain) for domain in ("words", "more")} == expected
    assert opcod.may_tutor(gate, seen, 1, "words") == (gate != "never")


def test_opcod_phases_frozen_tutors_and_what_the_self_teacher_sees(solvable, monkeypatch):
    """K updates of student 1, then K of student 2, per round; a tutor and its optimizer do not change."""
    run, order = solvable(method="opcod", steps=4, rounds=2, gate="always", warmup=3), []

    def write(run, tutor, prompts, most):
        i = run.students.index(tutor)                            # the student itself, not its average
        texts = [tutor.tok.decode(ids) for ids in prompts]
        assert all(text.endswith(f">{run.branches[i]} to {run.branches[1 - i]}") for text in texts)
        return [(f"<concept>{'rev' if 'rev' in text else 'zebra'}</concept>1", True) for text in texts]

    monkeypatch.setattr(opcod, "write", write)
    real = opd.update

    def update(run, jobs, weights):
        tutee = jobs[0].learner
        tutor, = [s for s in run.students if s is not tutee]
        before = parameters(tutor).clone()
        stats = real(run, jobs, weights)
        assert torch.equal(before, parameters(tutor)) and not tutor.net.training
        order.append(run.students.index(tutee))
        for job in jobs:
            assert job.learner is tutee and job.teacher is tutee.average
            for r, w in zip(job.rollouts, job.weights):
                others = [o.text for o in job.rollouts if o.reward == 1 and o is not r
                          and o.prompt["row"] == r.prompt["row"]]
                s, f = others[0] + "=" if others else "", "1+" if "rev" in r.prompt["prompt"] else ""
                assert sees([r]) == [(s + f + r.prompt["prompt"]) if s or f else None]
                assert w == float(bool(s or f))
        return stats

    monkeypatch.setattr(opd, "update", update)
    opd.train(run)
    assert order == [0, 0, 1, 1, 0, 0, 1, 1] and [s.updates for s in run.students] == [4, 4]
    assert [len(o.state) > 0 for s in run.students for o in s.optimizers] == [True, True]
    lines = [line for line in read_lines(run.out / "metrics.jsonl") if line["step"] >= 0]
    assert [line["step"] for line in lines if "gate" in line] == [0, 4]
    assert [line["tutee"] for line in lines] == [1, 1, 2, 2, 1, 1, 2, 2]
    warm = [1 / 3, 2 / 3, 1.0, 1.0]                              # each student has its own warm-up
    assert [line["lr"] / 1e-3 for line in lines] == pytest.approx(warm[:2] * 2 + warm[2:] * 2)
    assert all(line["feedback"].keys() <= {"kept", "no_match"} for line in lines)
    for outcome in ("kept", "no_match"):
        assert sum(line["feedback"].get(outcome, 0) for line in lines) > 0
    for i in (1, 2):
        saved = AutoModelForCausalLM.from_pretrained(run.out / "final" / str(i))
        ours = run.students[i - 1].net.parameters()
        assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), ours))


def test_a_tutor_writes_as_it_is_asked_to(start, monkeypatch):
    """At the rollouts' temperature and top_p, within --feedback_tokens; half sentences go."""
    run, asked = start(method="opcod", temperature=0.7, top_p=0.9, feedback_tokens=5), []
    tutor = run.students[1]
    tutor.generate = lambda prompts, temperature, top_p, max_new_tokens, batch: (
        asked.append((prompts, temperature, top_p, max_new_tokens)),
        [(torch.tensor([3, tutor.stops[0]]), None), (torch.tensor([3, 4]), None)])[1]
    texts = opcod.write(run, tutor, [[5], [6]], 5)
    assert asked == [([[5], [6]], 0.7, 0.9, 5)] and run.notes["feedback_tokens"] == 4
    assert texts == [(tutor.tok.decode([3]), True), (tutor.tok.decode([3, 4]), False)]
    assert opcod.write(run, tutor, [], 5) == [] and len(asked) == 1
    rollouts = some(run, (0, 0))
    said, most = "<concept>rev</concept>One two. Three", []
    monkeypatch.setattr(opcod, "write", lambda run, tutor, prompts, tokens: (
        most.append(tokens), [(said, True), (said, False)])[1])
    heard = opcod.feedback(run, *run.students, rollouts)
    assert heard == ["One two. Three", "One two."] and most == [5]
    assert [r.notes["feedback"] for r in rollouts] == [(said, "kept")] * 2


def test_what_has_no_room_is_not_read(start, monkeypatch):
    """Decoded text may have more tokens when it is read: no feedback, no demonstration, no crash."""
    run = start(method="opcod")
    long, short = "a" * 200, "a"
    rollouts = some(run, (0, 1))
    rollouts[0].text = long
    monkeypatch.setattr(opcod, "write", lambda run, tutor, prompts, most: [
        ("<concept>rev</concept>1", True) for _ in prompts])
    assert opcod.feedback(run, *run.students, rollouts) == [None, "1"]
    assert run.notes["feedback"] == {"too_long": 1, "kept": 1}
    job, = self_taught(run, run.student, rollouts, [long, short])
    assert sees(rollouts) == [None, "a=rev abc>"] and job.weights == [0.0, 1.0]


def test_gate_asks_as_often_as_it_says_and_leaves_the_training_alone(solvable):
    run, counts = solvable(method="opcod", gate_rollouts=3, eval_temperature=1.0), []
    real = run.sample
    run.sample = lambda model, prompts, n, *how: (counts.append(n * len(prompts)),
                                                  real(model, prompts, n, *how))[1]
    torch.manual_seed(1)
    expected, tokens = torch.rand(8).tolist(), run.state["sampled_tokens"]
    torch.manual_seed(1)
    pairs = [(opcod.cognizance(run, 0.2, "never", 0)["scores"], torch.rand(1).item()) for _ in range(8)]
    assert counts == [15, 15] * 2 * 8                            # two students, two domains of five prompts
    assert list(run.clock) == ["gate"] and run.state["sampled_tokens"] == tokens
    assert [x for _, x in pairs] == expected                     # as if nothing had been measured
    assert all(scores == pairs[0][0] for scores, _ in pairs)     # each time with the same randomness


def test_break_rates_are_in_the_order_of_the_tutors(start, monkeypatch):
    run = start(method="opcod")
    run.mean_rewards = lambda student, *how: dict.fromkeys(run.branches, 0.5)
    monkeypatch.setattr(opcod, "broken", lambda run, tutor, tutee, count: [
        run.students.index(tutor), run.students.index(tutee), count])
    assert opcod.cognizance(run, 0.2, "never", 2)["broken"] == [[0, 1, 2], [1, 0, 2]]
    assert "broken" not in opcod.cognizance(run, 0.2, "never", 0)


def test_an_incognizant_tutor_is_not_even_asked(solvable, monkeypatch):
    run = solvable(method="opcod", gate="never", break_prompts=0)
    monkeypatch.setattr(opcod, "write", lambda run, tutor, prompts, most: (
        pytest.fail("asked") if prompts else []))
    opd.train(run)


def test_without_feedback_opcod_is_sdpo_on_each_student(solvable):
    """c = s: the first student's phase is --method sdpo to the last bit; the second sees the same prompts."""
    both, drawn = solvable(method="opcod", gate="never", rounds=1, break_prompts=0, steps=2), []
    alone = [solvable(method="sdpo", prompts=[f"{b}={path}" for b, path in both.cfg.prompts.items()], steps=2,
                      student=path) for path in both.cfg.student]
    for run in (both, *alone):
        real = run.sample
        run.sample = lambda model, prompts, *how, real=real: (
            drawn.append([p["prompt"] for p in prompts]), real(model, prompts, *how))[1]
        opd.train(run)
    steps = [prompts for prompts in drawn if len(prompts) == both.cfg.batch]
    assert steps[:2] == steps[2:4] == steps[4:6] == steps[6:8]
    assert torch.equal(parameters(both.students[0]), parameters(alone[0].student))
    assert not torch.equal(parameters(both.students[0]), parameters(both.students[1]))


@pytest.mark.parametrize("rank, deaths", [(0, (2, 4, 6)), (4, (6,))])
def test_opcod_resumes_inside_a_round(solvable, monkeypatch, rank, deaths):
    """Killed in round 1, at its end, in round 2: to the last bit what it would have been."""
    if rank:
        pytest.importorskip("peft", reason="optional: pip install peft")
    flags = dict(method="opcod", steps=4, rounds=2, save_every=1, tau=5, lora_rank=rank)
    whole = solvable(**flags)
    opd.train(whole)
    for died_at in deaths:
        cut = solvable(**flags)
        with monkeypatch.context() as patch:
            patch.setattr(opd, "update", die_at(opd.update, died_at))
            with pytest.raises(KeyboardInterrupt):
                opd.train(cut)
        resumed = solvable(**flags, out=cut.out, resume=True)
        assert resumed.state["step"] == died_at == sum(student.updates for student in resumed.students)
        opd.train(resumed)
        for old, new in zip(whole.students, resumed.students):
            assert torch.equal(parameters(old), parameters(new))
            averages = zip(*map(average_values, (old, new)), strict=True)
            assert all(torch.equal(a, b) for a, b in averages)
        lines = [[{k: v for k, v in line.items() if k not in ("seconds", "memory_gib")}
                  for line in read_lines(run.out / "metrics.jsonl")] for run in (whole, resumed)]
        assert lines[0] == lines[1]


def test_resting_students_compute_the_same(solvable, monkeypatch):
    """--teacher_device swap: who waits is in main memory, optimizer too, and comes to write or to learn."""
    plain, swapped = (solvable(method="opcod", rounds=2, tau=5) for _ in range(2))
    swapped.cfg.teacher_device = "swap"
    for student in swapped.students:
        offload(student)
    opd.train(plain), opd.train(swapped)
    assert [s.offloaded for s in swapped.students] == [True, False]          # the second had the last turn
    for old, new in zip(plain.students, swapped.students):
        assert torch.equal(parameters(old), parameters(new))
    moved, to = [], torch.Tensor.to                              # a CPU has nowhere else to go
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *where: (moved.append(x.data_ptr()), to(x, *where))[1])
    student = plain.students[0]
    offload(student)
    states = [x for o in student.optimizers for state in o.state.values() for x in state.values()]
    assert states and {x.data_ptr() for x in [*states, *student.net.parameters()]} <= set(moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_students_in_turn_on_a_gpu(solvable, monkeypatch):
    """Swapped or not, the same losses; swapped, the last tutee alone is on the GPU, with its optimizer."""
    values = []
    for flags in (dict(), dict(teacher_device="swap")):
        run = solvable(method="opcod", device="cuda", dtype="float32", tau=5, **flags)
        monkeypatch.setattr(opd, "finish", lambda run: None)
        opd.train(run)
        places = [{x.device.type for x in s.net.parameters()} | {
            x.device.type for o in s.optimizers for state in o.state.values() for x in state.values()
            if torch.is_tensor(x)} for s in run.students]
        assert places == [{"cpu"} if flags else {"cuda"}, {"cuda"}]
        values.append([line["loss"] for line in read_lines(run.out / "metrics.jsonl") if line["step"] >= 0])
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_break_rate_counts_correct_rollouts_that_feedback_turns_wrong(solvable, monkeypatch):
    run = solvable(method="opcod")
    first, second = run.students
    real, asked, correct = run.sample, [], []
    poisoned = lambda p: p["prompt"].startswith("1+") or "=1+" in p["prompt"]

    def sample(model, prompts, **how):
        rollouts = real(model, prompts, **how)
        if how.get("n") == 1:
            asked.append([r.prompt["prompt"] for r in rollouts])
            for r in rollouts:
                r.reward = float(not poisoned(r.prompt))
        else:
            correct.extend(r for r in rollouts if r.reward == 1 and r.prompt["prompt"][0] in "rsl")
        return rollouts

    monkeypatch.setattr(run, "sample", sample)
    monkeypatch.setattr(opcod, "write", lambda run, tutor, prompts, most: [
        (f"<concept>{p.split()[0]}</concept>{1 if p[0] in 'rs' else 2}" if p[0] in "rsl" else "nothing", True)
        for p in map(tutor.tok.decode, prompts)])
    run.notes = {"tutee": 2}
    found = opcod.broken(run, first, second, 5)
    assert found["correct"] == len(correct) == len(asked[0])     # of those whose feedback is kept
    assert any("=" in prompt for prompt in asked[1])             # the control has its demonstrations
    assert asked[1] == [prompt.replace("1+", "").replace("2+", "") for prompt in asked[0]]
    assert 0 < found["broken"] < found["correct"] and found["broken_without"] == 0
    assert run.notes == {"tutee": 2}                             # a measurement, not the step's


@pytest.mark.parametrize("flags, message", [
    (dict(student=["a"]), "needs two students"), (dict(val_prompts=[]), "--val_prompts has: none"),
    (dict(prompts=["words.jsonl"]), "needs two branches"),
    (dict(steps=3, rounds=2), "not a multiple of --rounds"),
    (dict(teachers=["a"]), "--teachers has no effect"),
    (dict(method="sdpo", student=["a", "b"]), "has one student"),
    (dict(method="opd", teachers=["a"], tau=0.3, val_prompts=[]), "--tau has no effect on --method opd"),
    (dict(gate_rollouts=4), "--gate_rollouts has no effect without evaluation prompts and an --eval_temp"),
    (dict(self_teacher="frozen", ema_rate=0.1), "--ema_rate has no effect without --self_teacher ema"),
    (dict(templates="none.json"), "none.json"), (dict(loss="akl"), "akl needs the full vocabulary")])
def test_bad_pairs_are_refused_in_one_line(argv, prompts, flags, message):
    prompts("words")
    flags = dict(method="opcod") | flags
    with pytest.raises(SystemExit, match=message) as refused:
        opd.main(argv(**flags))
    assert "\n" not in str(refused.value)


def test_students_with_different_tokenizers_are_refused(argv, models, tmp_path):
    tok = AutoTokenizer.from_pretrained(models / "b")
    tok.add_tokens(["<new>"])
    net = AutoModelForCausalLM.from_pretrained(models / "b")
    net.resize_token_embeddings(len(tok))
    net.save_pretrained(tmp_path / "other"), tok.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="different tokenizers"):
        opd.main(argv(method="opcod", student=[tmp_path / "other", models / "a"]))


@pytest.mark.parametrize("where", ["prompts", "val_prompts"])
@pytest.mark.parametrize("rows, message", [
    ([], "has no prompts"), ([{"prompt": "a"}], 'no "answer"'),
    ([{"prompt": "a", "answer": "Both", "grader": "final_letter"}], "needs an answer with a letter")])
def test_domains_that_cannot_be_learned_from(argv, prompts, tmp_path, where, rows, message):
    flags = {where: [f"words={prompts('fine')}", f"more={prompts('bad', rows)}"]}
    with pytest.raises(SystemExit, match=message):
        opd.main(argv(method="opcod", **flags))
    assert not list(tmp_path.glob("out*/metrics.jsonl"))


def test_solutions_that_show_nothing(argv, prompts):
    rows = [{"prompt": "rev abc>", "solution": "<think>cba</think>"}]
    with pytest.raises(SystemExit, match='blank.jsonl:1: "solution" is blank'):
        opd.main(argv(method="opsd", prompts=[prompts("blank", rows)]))


@pytest.mark.parametrize("row", [{"solution": 5}, {"solution": "a" * 300}])
def test_solutions_that_no_one_reads_do_not_matter(start, prompts, row):
    start(method="sdpo", prompts=[prompts("unread", [WORD_ROWS[0] | row])])


def test_another_experiment_is_not_resumed(solvable, prompts):
    """Templates and validation prompts are compared by what they say."""
    run = solvable(method="opcod")
    opd.begin(run), run.folder.save(run.learners, run.state)
    for path, old, new, what in ((run.cfg.templates, "+", "-", "templates"),
                                 (run.cfg.val_prompts["more"], "rev", "rev a", "val more")):
        text = open(path).read()
        with open(path, "w") as file:
            file.write(text.replace(old, new, 1))
        with pytest.raises(Refused, match=f"--resume with another content of {what} "):
            opd.Run(run.cfg.__class__(**vars(run.cfg) | {"resume": True}))
        with open(path, "w") as file:
            file.write(text)


def test_students_that_never_answer_are_noticed_before_training(argv):
    with pytest.raises(SystemExit, match="neither student answers a prompt of --val_prompts words correctly"):
        opd.main(argv(method="opcod"))


# ---- real questions ----------------------------------------------------------------------------------------

@pytest.mark.skipif(not (SHARED / "sciknoweval").exists(), reason="real data are not part of the project")
def test_the_paths_of_the_recipe_on_real_physics(tmp_path):
    """Convert, star, opcod with the English templates, on a chat model that has learned the answer's form."""
    convert.main(["hicai-zju/SciKnowEval/physics", "--out", str(tmp_path), "--file",
                  str(SHARED / "sciknoweval" / "physics_l3_hub_schema.jsonl")])
    rows = {part: read_lines(tmp_path / f"physics_{part}.jsonl") for part in ("train", "val")}
    short = sorted(rows["train"], key=lambda r: len(r["prompt"][1]["content"]))[:60]
    answered = [r | {"solution": f"<answer>\n{r['answer']}\n</answer>"} for r in short]
    hinted = [r | {"prompt": with_answer(r["prompt"], Templates(), r["answer"])} for r in answered]
    files = {"form": answered[::2] + hinted[1::2], "physics": short[:30], "more": short[30:],
             "val": rows["val"][:8]}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    tok = scratch.tokenizer([r["prompt"][0]["content"] + r["prompt"][1]["content"] + r["solution"]
                             for r in answered + hinted], 600)
    for name, seed in (("a", 0), ("b", 1)):
        scratch.model(tok, seed, 64, 2, 8, positions=8192).save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
        common = ["--device", "cpu", "--chat_template_kwargs",
                  '{"enable_thinking": false}', "--batch", "8", "--micro_tokens", "8192"]
        opd.main(["--student", f"{tmp_path}/{name}", "--prompts", f"{tmp_path}/form.jsonl", "--method", "sft",
                  "--optimizer", "muon", "--lr", "1e-2", "--steps", "25", "--out", f"{tmp_path}/form-{name}",
                  *common])
    common += ["--max_new_tokens", "24"]
    opd.main(["--student", f"{tmp_path}/form-a/final", "--prompts", f"{tmp_path}/physics.jsonl",
              "--method", "star", "--steps", "2", "--out", f"{tmp_path}/star", *common])
    assert sum(line["kept"] for line in read_lines(tmp_path / "star" / "metrics.jsonl")[1:]) > 0
    both = lambda name: [f"{branch}={tmp_path}/{name or branch}.jsonl" for branch in ("physics", "more")]
    opd.main(["--student", f"{tmp_path}/star/final", f"{tmp_path}/form-b/final", "--method", "opcod",
              "--prompts", *both(""), "--val_prompts", *both("val"), "--eval_prompts", *both("val"),
              "--steps", "1", "--rounds", "1", "--rollouts", "4", "--gate_rollouts", "4", "--tau", "9",
              "--eval_temperature", "1", "--feedback_tokens", "24", "--log_samples", "64",
              "--out", f"{tmp_path}/opcod", *common])
    first, second = [line for line in read_lines(tmp_path / "opcod" / "metrics.jsonl") if line["step"] >= 0]
    assert first["gate"]["cognizant"] == [True, True] and 0 < first["solved"] < 1 and first["kept"] > 0
    assert sum(first["feedback"].values()) == 32 == sum(second["feedback"].values())
    seen = [s for s in read_lines(tmp_path / "opcod" / "samples.jsonl") if "teacher_sees" in s]
    assert seen
    for s in seen:
        assert s["teacher_sees"].startswith(s["prompt"] + "\n\nCorrect solution:\n\n<answer>")
        assert s["teacher_sees"].endswith("\n\nCorrectly solve the original question.")
    for i in (1, 2):
        assert (tmp_path / "opcod" / "final" / str(i) / "model.safetensors").exists()
    assert "## Rounds" in (tmp_path / "opcod" / "report.md").read_text()
