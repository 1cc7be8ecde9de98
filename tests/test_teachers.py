"""Teachers that learn (okd) or explain (compact), and what both need: cross entropy, answers, mean states."""
import itertools
import statistics

import pytest
import torch
from conftest import WORD_ROWS, die_at, metrics, parameters
from transformers import AutoModelForCausalLM

import opd
from config import Refused
from data.files import read_lines
from data.graders import GRADERS, complaint, grade, last_boxed, split_at_answer, without_thinking
from methods import compact

PLAIN_SGD = dict(optimizer="sgd", lr=0.5, weight_decay=0.0, grad_clip=0)
OWN_TEMPLATE = "{% for m in messages %}={{ m.content }}{% endfor %}"


def in_float64(run):
    for model in {*run.students, *run.teachers.values()}:
        model.net.double()
        model.dtype = torch.float64
    return run


def one_step(run):
    """A step as the loop makes it: the Jobs, and how far each learner has moved, in learning rates."""
    jobs = next(run.jobs())
    run.score(jobs, gaps=False)
    before = [parameters(learner) for learner in run.learners]
    opd.update(run, jobs, opd.weigh(jobs))
    return jobs, [(old - parameters(learner)) / run.cfg.lr for old, learner in zip(before, run.learners)]


def exact_gradient(model):
    """What autograd has left in a network; 0 where nothing is learned."""
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                      for p in model.net.parameters()])


def close(ours, exact):
    assert exact.abs().max() > 1e-3
    return (ours - exact).abs().max() < 1e-5 * exact.abs().max()


def dense(model, prompt_ids, ids, temperature=1.0):
    """Log-probabilities [T, V] at every token of a completion, from the logits of transformers itself."""
    logits_TV = model.net(torch.tensor([[*prompt_ids, *ids]])).logits[0, :, :model.vocab]
    return torch.log_softmax(logits_TV / temperature, -1)[len(prompt_ids) - 1:-1]


def at(lp_TV, ids):
    return lp_TV[range(len(ids)), ids]


# ---- cross entropy beside a divergence ---------------------------------------------------------------------

def kl(la, lb):
    return (la.exp() * (la - lb)).sum(-1)


def jsd(lp, lq, b=0.3):
    lm = (b * lq.exp() + (1 - b) * lp.exp()).log()
    return b * kl(lq, lm) + (1 - b) * kl(lp, lm)


DISTANCES = {"fkl": lambda lp, lq: kl(lq, lp), "rkl": kl, "jsd": jsd,
             "jeffreys": lambda lp, lq: kl(lq, lp) + kl(lp, lq),
             "tvd": lambda lp, lq: 0.5 * (lp.exp() - lq.exp()).abs().sum(-1)}


def backward_by_hand(run, loss, pull, ce):
    """Autograd on okd's two losses, on all prompts; without a teacher that learns it is kd's."""
    total, temperature = sum(map(len, run.prompts.values())), run.cfg.loss_temperature
    for branch, rows in run.prompts.items():
        teacher = run.teachers[branch]
        for row in rows:
            ids = [*run.student.tok(row["solution"]).input_ids, run.student.tok.eos_token_id]
            lp, lq = (dense(model, model.encode(row["prompt"]), ids, temperature)
                      for model in (run.student, teacher))
            students = DISTANCES[loss](lp, lq.detach()) - ce * at(lp, ids)
            teachers = pull * DISTANCES[loss](lp.detach(), lq) - ce * at(lq, ids)
            (students.mean() / total + teachers.mean() / len(rows)).backward()


def test_the_gradient_of_kd_with_ce_weight_is_that_of_both_terms(start):
    """KL(q || p) + c CE(p), each with the weight of its token: against autograd in float64."""
    run = in_float64(start(method="kd", ce_weight=0.3, loss_temperature=1.5, batch=5, **PLAIN_SGD))
    backward_by_hand(run, "fkl", 0.0, 0.3)
    exact = exact_gradient(run.student)
    run.student.net.zero_grad()
    _, [moved] = one_step(run)
    assert close(moved, exact)


@pytest.mark.parametrize("given", [{}, dict(ce_weight=0)], ids=str)
def test_without_ce_weight_kd_is_what_it_was_bit_for_bit(start, monkeypatch, given):
    """The fused loss is not even asked for the other term."""
    asked, fused = [], opd.linear_divergence

    def asking(*args, label_weight_N, **more):
        asked.append(label_weight_N)
        return fused(*args, **more)
    monkeypatch.setattr(opd, "linear_divergence", asking)
    run = start(method="kd", batch=5, **given)
    one_step(run)
    assert asked == [None]


# ---- okd ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, more, rank", [
    ("fkl", {}, 4), ("fkl", {}, 0), ("rkl", {}, 0), ("jsd", dict(jsd_beta=0.3), 0), ("jeffreys", {}, 0),
    ("tvd", {}, 0)], ids=str)
def test_student_and_teacher_of_okd_learn_from_each_other_as_they_were_before_the_step(
        start, loss, more, rank):
    """Mirrored divergences, c, mu, both learning rates, each model's own prompt: autograd in float64."""
    if rank:
        pytest.importorskip("peft", reason="optional: pip install peft")
    run = start(method="okd", loss=loss, **more, teacher_rank=rank, teacher_pull=0.7, ce_weight=0.4,
                teacher_lr_factor=3, loss_temperature=1.5, batch=5, **PLAIN_SGD)
    with torch.no_grad():
        for name, p in run.teacher.net.named_parameters():          # a new adapter is without effect
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    run.teacher.tok.chat_template = OWN_TEMPLATE
    in_float64(run)
    backward_by_hand(run, loss, 0.7, 0.4)
    exact = [exact_gradient(learner) for learner in run.learners]
    for learner in run.learners:
        learner.net.zero_grad()
    jobs, moved = one_step(run)
    assert [r.prompt_ids for r in jobs[0].rollouts] == [r.teacher_ids for r in jobs[1].rollouts]
    assert close(moved[0], exact[0]) and close(moved[1], 3 * exact[1])


@pytest.fixture
def two_branches(prompts, models):
    """Flags of okd with two teachers: three prompts of one branch, two of the other, all in every step."""
    pytest.importorskip("peft", reason="optional: pip install peft")
    return dict(method="okd", batch=5, mixture="3:2", teachers=[f"x={models / 'wide'}", f"y={models / 'b'}"],
                prompts=[f"x={prompts('x', WORD_ROWS[:3])}", f"y={prompts('y', WORD_ROWS[3:])}"])


def test_each_teacher_of_okd_learns_from_its_own_branch_alone(start, two_branches):
    run = in_float64(start(**two_branches, teacher_rank=0, **PLAIN_SGD))
    backward_by_hand(run, "fkl", 1.0, 1.0)
    exact = [exact_gradient(learner) for learner in run.learners]
    for learner in run.learners:
        learner.net.zero_grad()
    _, moved = one_step(run)
    assert [learner.name for learner in run.learners] == ["student", "teacher", "teacher1"]
    assert all(close(ours, rate * theirs) for ours, theirs, rate in zip(moved, exact, (1, 1, 1)))


def test_what_a_step_says_is_of_the_student(start):
    """The teachers' own Jobs are beside it, by name; what a student reads for them is no teacher's token."""
    run = start(method="okd", steps=2, teacher_rank=0)
    opd.train(run)
    for line in metrics(run):
        assert line["branches"].keys() == {"main", "main, teacher"}
        for name in ("entropy_s", "entropy_t", "logprob_s"):
            assert line[name] == line["branches"]["main"][name] != line["branches"]["main, teacher"][name]
    read = sum(len(r.teacher_ids) + len(r.ids_T) for r in run.references(run.prompts["main"]))
    assert 0 < metrics(run)[0]["teacher_tokens"] <= read


def changed(run, models):
    """Train, and return for each model the names of its parameters that are another number now."""
    before = [{name: p.detach().clone() for name, p in model.net.named_parameters()} for model in models]
    opd.train(run)
    return [{name for name, p in model.net.named_parameters() if not torch.equal(p, old[name])}
            for model, old in zip(models, before)]


@pytest.mark.parametrize("given", [{}, dict(teacher_rank=0)], ids=str)
def test_of_a_teacher_of_okd_the_adapter_learns_or_with_rank_0_everything(start, given):
    """The base weights stay bit for bit, and the student has no adapter: its rank is another flag."""
    pytest.importorskip("peft", reason="optional: pip install peft")
    run = start(method="okd", steps=3, lr=1e-3, **given)
    names = [{name for name, _ in model.net.named_parameters()} for model in run.learners]
    adapter = {name for name in names[1] if "lora_" in name}
    assert not run.student.adapter and bool(adapter) == (not given)
    assert changed(run, run.learners) == [names[0], adapter or names[1]]


def test_student_and_teacher_of_okd_have_ranks_of_their_own(start):
    pytest.importorskip("peft", reason="optional: pip install peft")
    for given, expected in ((dict(lora_rank=4), [4, 8]), (dict(lora_rank=4, teacher_rank=2), [4, 2])):
        run = start(method="okd", **given)
        ranks = [{len(p) for name, p in model.net.named_parameters() if "lora_A" in name}
                 for model in run.learners]
        assert ranks == [{rank} for rank in expected]


def test_a_teacher_of_okd_that_is_not_pulled_learns_the_solutions_alone(start, models):
    """Whoever the student is. And it is the limit of a weak pull, also at another temperature of the loss."""
    flags = dict(method="okd", teacher_rank=0, loss_temperature=2, batch=5, **PLAIN_SGD)
    moved = lambda **more: one_step(in_float64(start(**flags, **more)))[1][1]
    alone, with_another = (moved(teacher_pull=0, student=models / name) for name in "ab")
    assert torch.equal(alone, with_another) and close(alone, moved(teacher_pull=1e-9))
    with pytest.raises(Refused, match="teach the teacher nothing"):
        start(method="okd", teacher_pull=0, ce_weight=0)


def moments(learner):
    """All that the optimizers of a learner remember."""
    return torch.cat([torch.as_tensor(x).flatten().double() for optimizer in learner.optimizers
                      for state in optimizer.state.values() for x in state.values()])


def test_okd_resumes_bit_for_bit_and_only_the_student_is_in_final(start, two_branches, monkeypatch):
    """The teachers' adapters and optimizers are in the checkpoint, too."""
    flags = two_branches | dict(steps=4, lr=1e-3, save_every=2)
    whole, cut = start(**flags), start(**flags)
    opd.train(whole)
    monkeypatch.setattr(opd, "update", die_at(opd.update, 3))
    with pytest.raises(KeyboardInterrupt):
        opd.train(cut)
    monkeypatch.undo()
    again = start(**flags, out=cut.out, resume=True)
    opd.train(again)
    for ours, theirs in zip(again.learners, whole.learners, strict=True):
        assert torch.equal(parameters(ours), parameters(theirs))
        assert torch.equal(moments(ours), moments(theirs))
    assert (cut.out / "checkpoint" / "teacher1" / "adapter_model.safetensors").exists()
    final = AutoModelForCausalLM.from_pretrained(cut.out / "final")
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), whole.student.net.parameters()))
    assert not (cut.out / "adapter").exists()
    assert all(path.is_file() for path in (cut.out / "final").iterdir())


# ---- where a completion begins to answer -------------------------------------------------------------------

@pytest.mark.parametrize("grader, text, answer, rationale, closing", [
    ("number", "2 of 3\n#### 5", "6", "2 of 3", "\n#### 6"),
    ("number", "#### 1\n#### 5 apples", "6", "#### 1", "\n#### 6"),
    ("number", "it is \\boxed{5}, not 4", "6", "it is", " \\boxed{6}"),
    ("number", "first 3, then 18.", "18", "first 3, then", " 18"),
    ("number", "costs $1,234.50 a day", "1,000", "costs", " 1,000"), ("number", "-7", "7", "", "7"),
    ("number", "is 10-5", "7", "is", " 7"), ("number", "--5", "7", "", "7"),
    ("number", "5 and 2 + 5", "7", "5 and 2 +", " #### 7"),
    ("boxed", "\\boxed{1} so \\boxed{\\frac{1}{2}}.", "3", "\\boxed{1} so", " \\boxed{3}"),
    ("letter_tag", "<reasoning>A</reasoning>\n<answer>\nA\n</answer> ok", "B", "<reasoning>A</reasoning>",
     "\n<answer>B</answer>"),
    ("letter_tag", "so <answer>A</answer> or <answer>", "B", "so", " <answer>B</answer>"),
    ("letter_tag", "an <answer>is <answer>A</answer>", "B", "an <answer>is", " <answer>B</answer>"),
    ("final_letter", "Final answer: B? No. Final Answer: **C**", "D", "Final answer: B? No.",
     " Final answer: D"),
    ("final_letter", "it is\nfinal answer: (c)", "c", "it is", "\nFinal answer: c"),
    ("exact", "06 08 11", "06 08 10", "06 08", " 10"), ("exact", "09 99 ", "09 10", "09", " 10"),
    ("exact", "map", "pam", "", "pam"), ("exact", " map", "mop pam", "", "mop pam"),
    ("exact", "it is paris", "new york", "", "new york"),
    ("exact", "", "pam", "", "pam")])
def test_a_completion_is_split_where_its_answer_begins_and_ends_in_the_right_one(
        grader, text, answer, rationale, closing):
    assert split_at_answer(grader, text, answer) == (rationale, closing)


@pytest.mark.parametrize("grader, text", [
    ("number", "none"), ("number", "in 1.2.3"), ("number", "\\boxed{3} 5 \\boxed{"), ("number", "5 ####"),
    ("number", "5 \\boxed{x}"), ("boxed", "5"),
    ("boxed", "\\boxed{5"), ("letter_tag", "A"), ("letter_tag", "<answer> </answer>"),
    ("letter_tag", "<answer>A"), ("final_letter", "Final answer: Both")])
def test_a_completion_without_an_answer_is_not_split(grader, text):
    assert split_at_answer(grader, text, "7") is None


PIECES = {"number": (["x = ", "5", "-", ".", "$", "1,2", "\\boxed{3}", "\\boxed{", "####", " "],
                     ["7", "-7", "$1,000", "a\n#### 7"]),
          "boxed": (["\\boxed{", "}", "{", "3", " ", "<think>", "</think>"], ["7", "\\frac{1}{2}"]),
          "letter_tag": (["<answer>", "</answer>", "A", " ", "so\n", "<think>", "</think>"], ["B"]),
          "final_letter": (["Final answer: ", "final answer:", "B", "(c)", "Both", "\n", "**"], ["D", "d"]),
          "exact": (["no", " yes", "maybe"], ["it", "yes it"])}


@pytest.mark.parametrize("grader", PIECES)
def test_a_rationale_with_the_right_answer_is_graded_as_correct(grader):
    """Whatever the text is made of. Only exact grades the rationale, too: it has to be right by itself."""
    assert PIECES.keys() == {name for name in GRADERS if GRADERS[name].form}
    pieces, answers = PIECES[grader]
    texts, split = [text for n in range(5) for text in map("".join, itertools.product(pieces, repeat=n))], 0
    for text, answer in itertools.product(texts, answers):
        found = split_at_answer(grader, text, answer)
        assert (found is None) == (complaint(grader, text) is not None), text
        if found is None:
            continue
        rationale, whole = found[0], "".join(found)
        assert without_thinking(text).startswith(rationale) and rationale == rationale.rstrip(), text
        if grader == "exact" and rationale not in ("", answer.rpartition(" ")[0]):
            assert whole == f"{rationale} it"
        elif grader == "boxed":                                     # math-verify is optional
            assert last_boxed(whole) == answer, (text, whole)
        else:
            assert grade(grader, whole, answer) == 1, (text, whole)
        split += 1
    assert split > 30


# ---- mean states -------------------------------------------------------------------------------------------

def test_a_texts_place_is_its_mean_state_whatever_it_is_read_with(start):
    student = start().student
    prompts = [student.encode(row["prompt"]) for row in WORD_ROWS]
    texts = [torch.arange(5, 6 + 2 * i) for i in range(len(prompts))]       # the longest last
    together_BH = student.mean_hidden(prompts, texts, 4096)
    for place_H, prompt, ids_T in zip(together_BH, prompts, texts, strict=True):
        mean_H = student.hidden_states([prompt], [ids_T]).mean(0)
        torch.testing.assert_close(place_H, mean_H / mean_H.norm())
    torch.testing.assert_close(together_BH.norm(dim=1), torch.ones(len(prompts)))
    assert not together_BH.requires_grad and (together_BH @ together_BH.T).min() < 0.9
    for micro_tokens in (1, 40):
        torch.testing.assert_close(student.mean_hidden(prompts, texts, micro_tokens), together_BH)


# ---- compact -----------------------------------------------------------------------------------------------

# prompt -> answer, and by teacher what the student learns of its text: rationale, closing
EXPLAINED = {
    "add 07 26>": ("33", {"long": ("7+6=13 2+1=3", " 33"), "short": ("", "33"), "odd": ("26+7=", " 33")}),
    "add 10 05>": ("15", {"long": ("10+5=5+10 0+5", " 15"), "odd": ("rev 10 05", "  15")})}
NUMBERS = [{"prompt": prompt, "answer": answer, "grader": "number",
            "rationales": {name: said + end.replace(answer, "99") for name, (said, end) in texts.items()}}
           for prompt, (answer, texts) in EXPLAINED.items()]
SILENT = {"prompt": "rev 12>", "answer": "21", "grader": "number", "rationales": {"long": "no", "odd": ""}}


def parts(run, r):
    """The token ids of a rollout's rationale and of its answer, from EXPLAINED."""
    rationale, closing = EXPLAINED[r.prompt["prompt"]][1][r.notes["teacher"]]
    return [run.student.tok(text).input_ids for text in (rationale, closing)]


def test_the_loss_of_compact_is_the_prompts_mean_of_the_weighted_texts(start, prompts):
    """Rationale, right answer and EOS, whatever the teacher answered; weights sum to 1 and stay fixed."""
    run = in_float64(start(method="compact", teachers=[], prompts=[prompts("n", NUMBERS)], batch=2,
                           weight_temperature=3))
    [job] = next(run.jobs())
    assert all(isinstance(w, float) for w in job.weights)
    totals, loss = {}, 0.0
    for r, w in zip(job.rollouts, job.weights, strict=True):
        rationale, closing = parts(run, r)
        ids = [*rationale, *closing, run.student.tok.eos_token_id]
        assert r.ids_T.tolist() == ids and 0.01 < w < 0.99
        totals[r.prompt["prompt"]] = totals.get(r.prompt["prompt"], 0) + w
        loss = loss - w * at(dense(run.student, r.prompt_ids, ids), ids).mean() / len(EXPLAINED)
    assert list(totals.values()) == pytest.approx([1, 1]) and totals.keys() == EXPLAINED.keys()
    loss.backward()
    exact = exact_gradient(run.student)
    run.student.net.zero_grad()
    opd.backward(run, job, opd.weigh([job])[0])
    assert close(exact_gradient(run.student), exact)


def test_what_suits_the_student_is_measured_on_its_own_logits(start, prompts):
    """m: how much more likely the rationale makes the answer; d: how likely each of its own tokens is."""
    run = in_float64(start(method="compact", teachers=[], prompts=[prompts("n", NUMBERS)], batch=2))
    [job] = next(run.jobs())
    answers = [len(parts(run, r)[1]) + 1 for r in job.rollouts]
    where, jump, ease = compact.suitability(run, job.rollouts, answers)
    with torch.no_grad():
        for i, r in enumerate(job.rollouts):
            (rationale, closing), end = parts(run, r), run.student.tok.eos_token_id
            n, answer = len(rationale), [*closing, end]
            told = at(dense(run.student, r.prompt_ids, rationale + answer), rationale + answer)
            untold = at(dense(run.student, r.prompt_ids, answer), answer)
            assert jump[i].item() == pytest.approx((told[n:].sum() - untold.sum()).item(), abs=1e-4)
            assert ease[i].item() == pytest.approx(told[:n or None].mean().item(), abs=1e-4)
            states = run.student.hidden_states([r.prompt_ids], [torch.tensor(rationale or answer)])
            torch.testing.assert_close(where[i], (states.mean(0) / states.mean(0).norm()).float())
    assert jump.abs().max() > 0.1 and ease.min() < -0.1


@pytest.mark.parametrize("weight_temperature", [0.5, 1e9], ids=str)
def test_weights_are_a_softmax_of_consensus_help_and_ease(start, prompts, monkeypatch, weight_temperature):
    """All in standard deviations. Consensus is the mean cosine to the others; large tau makes all alike."""
    where = torch.tensor([[1, 0], [0.6, 0.8], [0, 1]])
    jump, ease = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-3.0, -1.0, -1.5])
    monkeypatch.setattr(compact, "suitability", lambda run, rollouts, answers: (where, jump, ease))
    run = start(method="compact", teachers=[], prompts=[prompts("n", NUMBERS[:1])], batch=1,
                weight_temperature=weight_temperature)
    [job] = next(run.jobs())
    z = [[(x - statistics.mean(column)) / statistics.pstdev(column) for x in column]
         for column in ([0.3, 0.7, 0.4], jump.tolist(), ease.tolist())]
    expected = torch.tensor([sum(scores) for scores in zip(*z)]).div(weight_temperature).softmax(0)
    assert job.weights == pytest.approx(expected.tolist(), rel=1e-4)
    if weight_temperature > 1:
        assert job.weights == pytest.approx([1 / 3] * 3)
    noted = run.notes["teacher_weight"]
    assert noted == {"long": job.weights[0], "odd": job.weights[2]}     # short has no rationale
    for r, scores in zip(job.rollouts, zip(*z)):
        assert r.notes["scores"] == pytest.approx(scores, abs=0.006)


def test_standardised_columns_have_mean_0_and_deviation_1_or_are_0():
    """Cosines of near equal texts differ by their rounding only, which must not become a weight."""
    x_K3 = torch.tensor([[1, -900, 0.9], [2, -900.0001, 0.9 + 1e-6], [4, -900, 0.9 - 1e-6]]).double()
    small_K1 = 0.5 + torch.tensor([[0.0], [0.002], [-0.001]]).double()       # a real difference
    z = compact.standardised(torch.cat([x_K3, small_K1], 1))
    assert not z[:, 1:3].any()
    for column in (0, 3):
        torch.testing.assert_close(z[:, column].mean(), z.new_zeros(()))
        torch.testing.assert_close(z[:, column].std(correction=0), z.new_ones(()))
    assert z[:, 0].argsort().tolist() == [0, 1, 2] and not compact.standardised(x_K3[:1]).any()


def test_a_text_without_an_answer_is_left_out_and_counted(start, prompts):
    """The others of its prompt share its weight, and a prompt without any text does not count."""
    rows = [NUMBERS[0] | {"rationales": NUMBERS[0]["rationales"] | {"mute": "no number"}}, NUMBERS[1], SILENT]
    run = start(method="compact", teachers=[], prompts=[prompts("n", rows)], batch=3)
    [job] = next(run.jobs())
    assert run.notes["skipped"] == {f"{name} gives no answer": 1 for name in ("mute", "long", "odd")}
    weights = {prompt: [r.notes["weight"] for r in job.rollouts if r.prompt["prompt"] == prompt]
               for prompt in EXPLAINED}
    assert [len(some) for some in weights.values()] == [3, 2] and len(job.rollouts) == 5
    assert [sum(some) for some in weights.values()] == pytest.approx([1, 1])
    assert sum(w_T.sum() for w_T in opd.weigh([job])[0]) == pytest.approx(1)


def test_a_step_without_any_answer_changes_nothing_and_the_run_goes_on(start, prompts, monkeypatch):
    run = start(method="compact", teachers=[], prompts=[prompts("s", [SILENT, NUMBERS[0]])], batch=1, steps=6)
    still, update = [], opd.update

    def watched(run, *args):
        before = parameters(run.student)
        stats = update(run, *args)
        still.append(torch.equal(parameters(run.student), before))
        return stats
    monkeypatch.setattr(opd, "update", watched)
    opd.train(run)
    kept = [line["kept"] for line in metrics(run)]
    assert sorted(kept) == [0, 0, 0, 3, 3, 3] and still == [n == 0 for n in kept]


def explained(rows, **texts):
    return [row | {"rationales": texts} for row in rows]


def often_end(run):
    """Make untrained teachers end their texts before the limit, as they have to."""
    for teacher in run.teachers.values():
        teacher.stops = [i for i in range(teacher.vocab) if i % 5]


def test_a_text_that_was_cut_off_is_left_out_and_counted(start, prompts):
    """Its last number is not its answer."""
    run = start(method="compact", prompts=[prompts("w", explained(WORD_ROWS, x="ab c"))], batch=2)
    for teacher in run.teachers.values():
        teacher.stops = [teacher.vocab + 1]
    [job] = next(run.jobs())
    assert [r.notes["teacher"] for r in job.rollouts] == ["x", "x"]
    assert run.notes["skipped"] == {"b does not end": 2, "wide does not end": 2}


@pytest.mark.parametrize("branches, models_of, given", [
    ("words", "kl", {}), ("words more", ["words", "more"], {}), ("words", "", dict(x="a b", y="b")),
    ("words more", "k", dict(x="a b"))], ids=["free names", "names of branches", "file alone", "mixed"])
def test_teachers_have_free_names_or_stand_in_the_file(start, prompts, models, branches, models_of, given):
    """Every teacher explains every prompt of all branches, in its own words."""
    rows = explained(WORD_ROWS[:3], **given) if given else WORD_ROWS[:3]
    branches, paths = branches.split(), dict(zip(models_of, (models / "wide", models / "b")))
    run = start(method="compact", steps=1, batch=3 * len(branches), log_samples=99,
                prompts=[f"{branch}={prompts('of_' + branch, rows)}" for branch in branches],
                teachers=[f"{name}={path}" for name, path in paths.items()])
    assert {name: model.path for name, model in run.teachers.items()} == {
        name: str(path) for name, path in paths.items()}
    often_end(run)
    expected = {}
    for branch, row, name in itertools.product(branches, rows, [*paths, *given]):
        text = given.get(name)
        if text is None:
            [(ids_T, _)] = run.complete(run.teachers[name], [run.teachers[name].encode(row["prompt"])], 0)
            text = run.teachers[name].decode(ids_T)
        expected[branch, row["prompt"], name] = "".join(split_at_answer("exact", text, row["answer"]))
    opd.train(run)
    samples = read_lines(run.out / "samples.jsonl")
    assert {(s["branch"], s["prompt"], s["teacher"]): s["completion"] for s in samples} == expected
    assert len(samples) == len(expected)
    assert sum(sample["weight"] for sample in samples) == pytest.approx(3 * len(branches))


@pytest.mark.parametrize("named, rationales, message", [
    ([], dict(x="33"), "compact weighs the rationales of at least two teachers"),
    (["m"], {}, "compact weighs the rationales of at least two teachers"),
    ([], ["33", "33"], '"rationales" is an object'), ([], dict(x="33", y=33), '"rationales" is an object'),
    (["m"], "33", '"rationales" is an object'),
    (["m"], dict(m="33", y="33"), r"a teacher has the name of one of --teachers \(m\)")], ids=str)
def test_rows_that_compact_cannot_learn_from_are_refused_in_a_line(
        argv, prompts, models, named, rationales, message):
    file = prompts("n", [NUMBERS[0], NUMBERS[1] | {"rationales": rationales}])
    with pytest.raises(SystemExit, match=f"^opd.py: {file}:2: {message}") as refused:
        opd.main(argv(method="compact", prompts=[file],
                      teachers=[f"{name}={models / 'b'}" for name in named]))
    assert "\n" not in str(refused.value)


def test_a_model_without_a_name_is_one_teacher_however_many_branches_there_are(start, prompts, models):
    """Elsewhere it stands for the teacher of each branch, which would make it agree with itself here."""
    flags = dict(method="compact", teachers=[models / "b"], batch=2)
    files = lambda rows: dict(prompts=[f"{branch}={prompts(branch, rows)}" for branch in ("first", "second")])
    with pytest.raises(Refused, match="at least two teachers"):
        start(**flags, **files(WORD_ROWS))
    run = start(**flags, **files(explained(WORD_ROWS, x="ab c")))
    often_end(run)
    [job] = next(run.jobs())
    assert {r.notes["teacher"] for r in job.rollouts} == {"x", "teacher"}


def test_a_teacher_that_learns_computes_where_the_student_does(start):
    with pytest.raises(Refused, match="--teacher_device swap: a teacher that learns computes where the stu"):
        start(method="okd", device="cuda", dry_run=True, teacher_device="swap")


def test_teachers_of_compact_write_once_and_an_interrupted_run_ends_as_the_whole_one(
        start, prompts, models, monkeypatch):
    """In the last steps of the resumed run nobody writes: what was written is in the checkpoint."""
    flags = dict(method="compact", prompts=[prompts("w", explained(WORD_ROWS, x="ab c"))], batch=5, steps=4,
                 teachers=[f"k={models / 'wide'}", f"l={models / 'b'}"], lr=1e-3, save_every=2)
    whole, cut = start(**flags), start(**flags)
    opd.train(whole)
    wrote, sample = [], opd.Run.sample

    def counted(run, model, prompts, **more):
        wrote.extend((model.path, prompt["row"]) for prompt in prompts)
        return sample(run, model, prompts, **more)
    monkeypatch.setattr(opd.Run, "sample", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(opd, "update", die_at(opd.update, 3))
        opd.train(cut)
    again = start(**flags, out=cut.out, resume=True)
    opd.train(again)
    assert len(wrote) == len(set(wrote)) == 2 * len(WORD_ROWS)
    assert torch.equal(parameters(again.student), parameters(whole.student))
    assert torch.equal(moments(again.student), moments(whole.student))
    noted = [[line["teacher_weight"] for line in metrics(run)] for run in (again, whole)]
    assert noted[0] == noted[1] and len(noted[0]) == 4
