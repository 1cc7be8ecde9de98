"""The loop: sample, score, select, update. Each test names a way in which well-known trainers were wrong."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import WORD_ROWS, die_at, gradients, metrics, parameters, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from config import Refused
from data import small_world
from data.files import checksums, read_lines
from losses import Objective
from methods import METHODS, Job, Rollout
from methods.camopd import absolute_gap, positive_gap, scheduled, select, top_gap_mass
from methods.focus import in_demand


def rollouts(run, seed=0, count=6, rows=WORD_ROWS):
    """Completions of different lengths, some cut, some closed by EOS, as if sampled."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        ids_T = torch.randint(3, run.student.vocab, (1 + i,), generator=g)
        if i % 2:
            ids_T = torch.cat([ids_T, torch.tensor(run.student.stops)])
        logp_T = -4 + 2 * torch.randn(len(ids_T), generator=g)  # importance weights beyond both bounds
        prompt = {"prompt": rows[i % len(rows)]["prompt"], "branch": "main"}
        out.append(run.rollout(prompt, ids_T, logp_T=logp_T))
    return out


def double(run):
    for model in filter(None, (run.student, run.teacher)):
        model.net.double()
        model.dtype = torch.float64
    return run


def accumulate(run, jobs):
    """score, weigh and backward as the loop does them, without the optimizer's step."""
    run.score(jobs, gaps=False)
    weights = opd.weigh(jobs)
    run.student.net.zero_grad()
    return sum(opd.backward(run, job, w)[0] for job, w in zip(jobs, weights))


def on_whole_logits(run, r):
    """log p and log q [T, V] at every token of a rollout, from the logits of transformers itself."""
    prompt = run.student.tok(r.prompt["prompt"]).input_ids
    ids_BT = torch.cat([torch.tensor(prompt), r.ids_T])[None]
    at = slice(len(prompt) - 1, ids_BT.shape[1] - 1)             # position t predicts token t + 1
    lp, lq = (torch.log_softmax(model.net(ids_BT).logits[0, at, :run.student.vocab], -1)
              for model in (run.student, run.teacher))
    return lp, lq.detach()


def by_hand(run, job, selection, divergence):
    """A Job's loss by autograd, one rollout at a time, on whole logits: mean over rollouts of token means."""
    return sum(keep * divergence(*on_whole_logits(run, r), r).mean() / sum(k != 0 for k in selection)
               for r, keep in zip(job.rollouts, selection))


def pg(lp, lq, r):
    """CaMOPD eq. 2: -w A log p(y), A = sg[log q(y) - log p(y)], w = sg[p / p_sampler] in [0.1, 10] or 0."""
    lp, lq = (x.gather(1, r.ids_T[:, None])[:, 0] for x in (lp, lq))
    w = (lp - r.logp_T).exp().detach()
    return -torch.where((w >= 0.1) & (w <= 10), w, 0.0) * (lq - lp).detach() * lp


DEFINITIONS = {
    "rkl": lambda lp, lq, r: (lp.exp() * (lp - lq)).sum(-1),
    "fkl": lambda lp, lq, r: (lq.exp() * (lq - lp)).sum(-1),
    "pg": pg, "nll": lambda lp, lq, r: -lp.gather(1, r.ids_T[:, None])[:, 0]}


@pytest.mark.parametrize("loss", list(DEFINITIONS))
@pytest.mark.parametrize("micro_tokens", [1, 30, 10_000])
def test_gradient_of_any_micro_batches_is_float64_autograd_on_the_whole(start, loss, micro_tokens):
    """Off by one, EOS or first token masked, a loss averaged per micro-batch: each would show here."""
    run = double(start(micro_tokens=micro_tokens))
    objective = (Objective(label=loss, importance=(0.1, 10)) if loss in ("pg", "nll")
                 else Objective(divergence=loss))
    selection = [1.0, 0.0, 2.0, 1.0, 0.0, 1.0]
    selected = Job(run.student, run.teacher, rollouts(run), objective)
    run.score([selected])                                            # selection is on the gaps ..
    selected.weights = selection
    known = Job(run.student, run.teacher, rollouts(run), objective, selection)      # .. or known before
    results = [(accumulate(run, [job]), gradients(run.student)) for job in (selected, known)]
    run.student.net.zero_grad()
    expected = by_hand(run, selected, selection, DEFINITIONS[loss])
    expected.backward()
    exact = gradients(run.student)
    if loss == "pg":
        w_N = torch.cat([(lp_T - r.logp_T).exp() for lp_T, r in zip(selected.lp, selected.rollouts)])
        assert ((w_N < 0.1) | (w_N > 10)).any() and ((w_N > 0.1) & (w_N < 10)).sum() > 5
    for value, ours in results:
        assert value == pytest.approx(expected.item(), rel=1e-6)
        assert (ours - exact).abs().max() < 1e-6 * exact.abs().max()     # gaps are float32 statistics


FAMILIES = {                                                     # the head: what is special about it
    "Qwen3": dict(tie_word_embeddings=True, head_dim=16), "Llama": dict(tie_word_embeddings=False),
    "Qwen2": {}, "Mistral": {},                                  # biases in attention; a sliding window
    "Gemma": dict(head_dim=16),                                  # embeddings are scaled, norms are 1 + weight
    "Gemma2": dict(final_logit_softcapping=1.5, head_dim=16),
    "Gemma3Text": dict(head_dim=16, query_pre_attn_scalar=16),
    "Cohere": dict(logit_scale=0.3), "Cohere2": dict(logit_scale=0.3),
    "Granite": dict(logits_scaling=3.0, tie_word_embeddings=False),
    "Phi": {},                                                   # the head has a bias
    "GPT2": {}, "OPT": dict(word_embed_proj_dim=32),             # LayerNorm, learned positions, tied
    "Mixtral": dict(num_local_experts=4), "Qwen3Next": dict(
        num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, head_dim=16)}        # experts; linear attention
EXPERTS = ("Mixtral", "Qwen3Next")


def family(name, seed, folder, tok, **more):
    """A tiny model of another family, with logits of some size and a bias that is not 0."""
    torch.manual_seed(seed)
    common = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
                  pad_token_id=0, max_position_embeddings=64)
    config = getattr(transformers, f"{name}Config")(**common | FAMILIES[name] | more)
    net = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1).add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())                # as checkpoints are
    return tiny(folder, net, tok, scale=1)


@pytest.mark.parametrize("loss", ["rkl", "nll"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in EXPERTS])        # no float64 there
def test_heads_of_other_families_train_as_their_own_logits_say(start, models, tmp_path, name, loss):
    """Bias, softcap and logit scale, of student and teacher: against the logits of transformers itself."""
    tok = AutoTokenizer.from_pretrained(models / "a")
    run = double(start(student=family(name, 0, tmp_path / "s", tok),
                       teachers=[family(name, 1, tmp_path / "t", tok)]))
    objective = Objective(label="nll") if loss == "nll" else Objective(divergence=loss)
    job = Job(run.student, run.teacher, rollouts(run), objective)
    value = accumulate(run, [job])
    grads = lambda: {n: p.grad for n, p in run.student.net.named_parameters() if p.grad is not None}
    ours = {n: g.clone() for n, g in grads().items()}
    run.student.net.zero_grad()
    expected = by_hand(run, job, [1.0] * 6, DEFINITIONS[loss])
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6) and ours.keys() == grads().keys()
    for n, g in grads().items():
        assert (ours[n] - g).abs().max() < 1e-6 * g.abs().max() + 1e-12, n
    scored = Job(run.student, run.teacher, job.rollouts, objective)
    run.score([scored])
    for r, ours_T, gap_T in zip(scored.rollouts, scored.lp, scored.gaps):   # it sees the same logits of both
        lp_T, lq_T = (logp.gather(1, r.ids_T[:, None])[:, 0] for logp in on_whole_logits(run, r))
        assert (ours_T - lp_T).abs().max() < 1e-5 and (gap_T - (lq_T - lp_T)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_run_from_end_to_end(start, models, tmp_path, name, dtype):
    """Sampling is on-policy (checked before step 1), equal models have no gap, final/ is what was trained."""
    folder = family(name, 0, tmp_path / "s", AutoTokenizer.from_pretrained(models / "a"))
    run = start(student=folder, teachers=[folder], dtype=dtype, lr=1e-3, loss="fkl", rollouts=2)
    opd.train(run)
    first, second = metrics(run)
    exact = dtype == "float32" or name != "Qwen3Next"            # experts: match_precision
    assert abs(first["value"]) < (1e-4 if exact else 1e-3) and (first["grad_norm"] < 1e-2 or not exact)
    final = AutoModelForCausalLM.from_pretrained(run.out / "final", dtype=run.student.dtype)
    assert final.get_output_embeddings() is not None and type(final) is type(run.student.net)
    for (name, ours), (_, theirs) in zip(run.student.net.named_parameters(), final.named_parameters()):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("name, tied", [("Qwen3", False), ("Llama", True), ("GPT2", False)])
def test_tied_and_untied_heads_stay_what_they_are(start, models, tmp_path, name, tied):
    folder = family(name, 0, tmp_path / "s", AutoTokenizer.from_pretrained(models / "a"),
                    tie_word_embeddings=tied)
    run = start(student=folder, lr=1e-2)
    opd.train(run)
    net = AutoModelForCausalLM.from_pretrained(run.out / "final")
    before = AutoModelForCausalLM.from_pretrained(folder)
    heads = [x.get_output_embeddings().weight for x in (net, before)]
    assert (heads[0] is net.get_input_embeddings().weight) == tied and not torch.equal(*heads)


def test_muon_leaves_the_ends_of_a_model_with_a_bias_to_adamw(start, models, tmp_path):
    tok = AutoTokenizer.from_pretrained(models / "a")
    run = start(student=family("Phi", 0, tmp_path / "s", tok), optimizer="muon")
    in_muon = {id(p) for group in run.student.optimizers[0].param_groups for p in group["params"]}
    assert in_muon and id(run.student.net.get_output_embeddings().weight) not in in_muon


def test_every_completion_token_carries_loss_the_first_and_eos_included(start):
    run = double(start())
    r = rollouts(run)[3]
    assert r.ids_T[-1] in run.student.stops and run.student.tok.eos_token_id in run.student.stops
    for t in range(len(r.ids_T)):
        one_token = [torch.zeros(len(r.ids_T)).index_fill(0, torch.tensor([t]), 1.0)]
        accumulate(run, [Job(run.student, run.teacher, [r], Objective(divergence="rkl"), one_token)])
        assert gradients(run.student).abs().max() > 1e-6, f"token {t} of {len(r.ids_T)} has no loss"


def test_selection_sees_the_whole_batch_and_normalisation_only_what_is_kept(start):
    """Dropping a rollout must change the others' weight from 1/n to 1/(n - 1), whatever its micro-batch."""
    run = start()
    job = Job(run.student, run.teacher, rollouts(run), Objective(divergence="rkl"), [1.0] * 5 + [0.0])
    other = Job(run.student, run.teacher, rollouts(run, 1, count=3), Objective(divergence="rkl"))
    weights = opd.weigh([job, other])
    assert sum(w_T.sum() for ws in weights for w_T in ws) == pytest.approx(1.0)
    for ws, jb in zip(weights, (job, other)):
        for w_T, r in zip(ws, jb.rollouts):
            assert w_T.tolist() == pytest.approx([1 / 8 / len(r.ids_T)] * len(r.ids_T)) or not w_T.any()


@pytest.mark.parametrize("flags, targets", [
    (dict(target="veto", veto_beta=0.8), [(1.0, 0.8), (1.0, 0.4), (1.0, 0.0)]),
    (dict(target="taid", taid_start=0.4), [(0.4, 0.6), (0.7, 0.3), (1.0, 0.0)])], ids=str)
def test_targets_move_from_step_to_step_and_end_at_the_teacher(start, monkeypatch, flags, targets):
    seen, ours = [], opd.linear_divergence
    monkeypatch.setattr(opd, "linear_divergence", lambda *args, **kwargs: (
        seen.append(kwargs["target"]), ours(*args, **kwargs))[1])
    run = start(steps=3, **flags)
    opd.train(run)
    assert [pytest.approx(t) for t in targets] == seen[:3]       # the fourth is check_sound's
    assert not any("gap" in line for line in metrics(run))       # logprob_t is the target's


def test_a_moving_target_depends_on_where_the_training_ends(start, argv):
    run = start(steps=2, target="veto")
    opd.train(run)
    with pytest.raises(Refused, match="another steps"):
        opd.Run(opd.configure(argv(steps=4, target="veto", out=run.out, resume=True)))


def test_the_gap_is_the_teachers_whatever_the_target(start):
    """CaMOPD selects on log q(y) - log p(y) of the teacher itself."""
    plain, taid = (start(method="mopd", loss="rkl", **flags) for flags in ({}, dict(target="taid")))
    gaps = []
    for run in (plain, taid):
        job = Job(run.student, run.teacher, rollouts(run), run.objective)
        run.score([job])
        gaps.append(torch.cat(job.gaps))
    torch.testing.assert_close(*gaps)


@pytest.mark.parametrize("flags", [
    dict(loss="rkl", support="student_sg", top_k=5), dict(loss="jsd", jsd_beta=0.1),
    dict(loss="fkl", entry_clip=0.01), dict(loss="akl", akl_mu=0.3),
    dict(loss="alpha_beta", alpha_beta=[0.5, 0.5]), dict(loss="skew_rkl", skew_alpha=0.5),
    dict(loss="power", power_lambda=-1.5), dict(loss="rkl", loss_temperature=2)], ids=str)
def test_flags_of_the_objective_reach_the_kernel(start, flags):
    """The logged value changes with the flag: it is the divergence of that name, knob and support."""
    values = []
    for given in (flags, dict(loss=flags["loss"])):
        run = start(steps=1, **given)
        opd.train(run)
        values.append(metrics(run)[0]["value"])
    assert values[0] != pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("method", ["opd", "gkd", "opsd"])
def test_the_top_k_of_the_rollout_are_those_of_the_update(start, monkeypatch, method):
    """2605.11182 fixes a support at the rollout. With one update per batch it is the same student's."""
    run = start(method=method, steps=4, lr=1e-2, temperature=1, loss="rkl", support="student_renorm", top_k=5)
    sample, update, at_rollout, at_update = run.sample, opd.update, {}, []

    @torch.no_grad()
    def top_5(r):
        hidden_TH = run.student.hidden_states([r.prompt_ids], [r.ids_T])
        return (hidden_TH @ run.student.head_VH[:run.student.vocab].T).topk(5).indices.tolist()

    def sampling(*args, **kwargs):
        rollouts = sample(*args, **kwargs)
        at_rollout.update({r.ids_T: top_5(r) for r in rollouts})
        return rollouts

    def updating(run, jobs, weights):
        at_update.extend((r, top_5(r)) for job in jobs for r in job.rollouts if r.ids_T in at_rollout)
        return update(run, jobs, weights)
    monkeypatch.setattr(run, "sample", sampling)
    monkeypatch.setattr(opd, "update", updating)
    opd.train(run)
    assert len(at_update) >= 8 and all(at_rollout[r.ids_T] == ids for r, ids in at_update)
    assert any(top_5(r) != ids for r, ids in at_update)          # which the updates do change


def test_equal_student_and_teacher_do_not_move(start, models):
    """p = q: zero loss and zero gradient through the whole program; the weights stay, at learning rate 1."""
    for loss in ("rkl", "fkl", "jsd", "pg"):
        run = start(teachers=[models / "a"], loss=loss, method="opd", optimizer="sgd", lr=1, weight_decay=0)
        before = parameters(run.student)
        opd.train(run)
        steps = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
        assert all(abs(s["loss"]) < 1e-6 and s["grad_norm"] < 1e-4 for s in steps if "loss" in s)
        assert (parameters(run.student) - before).abs().max() < 1e-4


def test_equal_models_have_no_gap_in_bfloat16(start, models, tmp_path):
    """The student is kept in float32 and the teacher is not: both must still compute the same numbers."""
    half = AutoModelForCausalLM.from_pretrained(models / "a", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in half.parameters():         # queries and keys are normed in bfloat16 ..
            parameter.add_(torch.randn_like(parameter) / 4)     # .. unless the norm is float32
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(models / "a").save_pretrained(tmp_path / "half")
    run = start(student=tmp_path / "half", teachers=[tmp_path / "half"], loss="pg", dtype="bfloat16", steps=1)
    assert {p.dtype for p in run.student.net.parameters()} == {torch.float32}
    assert {p.dtype for p in run.teacher.net.parameters() if p.ndim > 1} == {torch.bfloat16}
    opd.train(run)
    step = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()][-1]
    assert step["abs_gap"] == 0 and step["grad_norm"] == 0


def trained(run):
    opd.train(run)
    return parameters(run.student)


def test_mopd_with_one_branch_is_opd(start):
    opd_run, mopd_run = (start(method=m, loss="rkl", lr=1e-3) for m in ("opd", "mopd"))
    assert torch.equal(trained(opd_run), trained(mopd_run))


def two_branches(models, prompts, **flags):
    return dict(prompts=[f"general={prompts('g')}", f"domain={prompts('d', WORD_ROWS[::-1])}"],
                teachers=[f"general={models / 'wide'}", f"domain={models / 'b'}"], steps=5, lr=1e-3, **flags)


def test_camopd_with_everything_off_is_plain_alternation(start, models, prompts, monkeypatch):
    """Kept mass 1 and scales 1: nothing is dropped and nothing is scaled, to the last bit."""
    def alternate(run, **own):
        for step in run.steps():
            branch = "general" if step % 4 < 3 else "domain"
            yield run.route(run.sample(run.student, run.draw(branch)))

    camopd = start(**two_branches(models, prompts, method="camopd", mass=1, scale=1))
    ours = trained(camopd)
    monkeypatch.setitem(METHODS, "camopd", replace(METHODS["camopd"], generator=alternate))
    assert torch.equal(ours, trained(start(**two_branches(models, prompts, method="camopd"))))
    kept = [json.loads(line) for line in (camopd.out / "metrics.jsonl").read_text().splitlines()]
    assert all(s["kept"] == s["rollouts"] == 4 for s in kept if "loss" in s)


def test_camopd_mixed_without_selection_is_mopd(start, models, prompts):
    mixed = start(**two_branches(models, prompts, method="camopd", schedule="mixed", mass=1, scale=1,
                                 mixture="3:1"))
    mopd = start(**two_branches(models, prompts, method="mopd", mixture="3:1"))
    assert torch.equal(trained(mixed), trained(mopd))


def test_camopd_switches_change_what_they_name(start, models, prompts):
    runs = {name: start(**two_branches(models, prompts, method="camopd", optimizer="sgd", **flags))
            for name, flags in {"default": {}, "mass": {"mass": 0.3}, "scale": {"scale": "general=1"},
                                "schedule": {"schedule": "1:2"}}.items()}
    ends = {name: trained(run) for name, run in runs.items()}
    assert all(not torch.equal(ends["default"], end) for name, end in ends.items() if name != "default")
    lines = {name: [json.loads(x) for x in (run.out / "metrics.jsonl").read_text().splitlines()][1:]
             for name, run in runs.items()}
    branches = {name: [s["branch"] for s in some if "loss" in s] for name, some in lines.items()}
    assert branches["default"] == ["general", "general", "general", "domain", "general"]
    assert branches["schedule"] == ["general", "domain", "domain", "general", "domain"]
    assert lines["mass"][0]["kept"] < 4 == lines["mass"][0]["rollouts"]


def test_focus_on_nothing_is_mopd(start, models, prompts):
    ends = [trained(start(**two_branches(models, prompts, **flags))) for flags in (
        dict(method="focus", focus=0, mixture="3:1"), dict(method="mopd", mixture="3:1"))]
    assert torch.equal(*ends)


def test_focus_asks_again_where_the_gap_was_largest(start, models, prompts, monkeypatch):
    pool = [{"row": row} for row in range(1, 8)]
    known = {1: 0.1, 2: 0.9, 3: 0.5, 6: 0.7}
    rows = lambda count, but: [p["row"] for p in in_demand(pool, known, count, [{"row": r} for r in but])]
    assert rows(2, []) == [2, 6] and rows(2, [6, 7]) == [2, 3]
    assert rows(9, [2]) == [6, 3, 1] and rows(0, []) == []

    flags = two_branches(models, prompts, method="focus", focus=0.5, batch=4, save_every=2) | dict(steps=6)
    whole = start(**flags)
    asked_at = []
    sample = whole.sample
    whole.sample = lambda model, some, *rest, **more: (
        asked_at.append(some) or sample(model, some, *rest, **more))
    end, asked = trained(whole), whole.memory["demand"]
    assert all([p["branch"] for p in some] == ["general"] * 2 + ["domain"] * 2 for some in asked_at)
    assert len({p["row"] for some in asked_at[:2] for p in some[:2]}) >= 3      # nothing was known at first
    assert whole.state["cursor"] == [{"general": 7, "domain": 7}]               # 2, and then one new a step
    assert asked.keys() == {"general", "domain"} and all(score > 0 for score in asked["general"].values())
    cut = start(**flags)
    monkeypatch.setattr(opd, "update", die_at(opd.update, 4))
    with pytest.raises(KeyboardInterrupt):
        opd.train(cut)
    monkeypatch.undo()
    again = start(**flags, out=cut.out, resume=True)
    assert torch.equal(trained(again), end) and again.memory["demand"] == asked


def test_gap_selection_is_equation_6_to_9():
    score_B = torch.tensor([1.0, 4.0, 0.0, 3.0, 2.0])            # shares of the mass: 4, 3, 2, 1, 0 tenths
    keep = lambda mass: top_gap_mass(score_B, mass).nonzero()[:, 0].tolist()
    assert keep(0.1) == keep(0.4) == [1] and keep(0.41) == keep(0.7) == [1, 3]
    assert keep(0.8) == [1, 3, 4] and keep(0.95) == [0, 1, 3, 4] and keep(1) == [0, 1, 2, 3, 4]
    assert top_gap_mass(torch.zeros(3), 0.5).all()
    gap_T = torch.tensor([-3.0, 1.0, 0.5])
    assert absolute_gap(gap_T) == pytest.approx(1.5) and positive_gap(gap_T) == pytest.approx(0.5)

    def selected(branch, mass, scale):
        gaps = [torch.tensor([g, g]) for g in (1.0, -4.0, 0.1)]
        rollout = Rollout({"branch": branch}, torch.arange(2), [3], [3])
        job = Job(SimpleNamespace(stops=[1]), None, [rollout] * 3, None,
                  lp=[torch.full((2,), -5.0)] * 3, lq=[gap_T - 5 for gap_T in gaps])
        run = SimpleNamespace(branches=["g", "d"], cfg=SimpleNamespace(drop_cut=False))
        select(run, [job], mass={"g": 2, "d": 2} | {branch: mass}, scale={"g": 7, "d": 7} | {branch: scale})
        return job.weights
    assert selected("g", 0.8, 2.0) == [2, 2, 0]                  # 4 of 5.1 is less than 0.8 ..
    assert selected("g", 0.78, 2.0) == [0, 2, 0]                 # .. and more than 0.78
    assert selected("d", 0.8, 1.0) == [1, 0, 0]
    assert [scheduled("3:1", ["g", "d"], t) for t in range(8)] == list("gggdgggd")
    assert scheduled("mixed", ["g", "d"], 0) is None


def test_teachers_never_change(start, models, prompts):
    run = start(**two_branches(models, prompts, method="mopd", loss="rkl"))
    before = {branch: parameters(model) for branch, model in run.teachers.items()}
    assert not torch.equal(parameters(run.student), trained(run))
    for branch, model in run.teachers.items():
        assert torch.equal(before[branch], parameters(model))
        assert not model.net.training and not run.student.net.training      # dropout is off in both
        assert all(p.grad is None for p in model.net.parameters())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.students == 1])
def test_same_seed_same_numbers(start, method):
    flags = dict(method=method, lr=1e-3) | {"camopd": {"schedule": "1"}}.get(method, {})
    first, again = start(**flags), start(**flags)
    assert torch.equal(trained(first), trained(again))
    if method in ("opd", "mopd", "camopd"):
        assert not torch.equal(parameters(first.student), trained(start(**flags, seed=1)))


def test_resume_continues_where_the_run_was(start, monkeypatch):
    """Weights, optimizer, prompts, randomness and learning rate, which counts the updates of a learner."""
    flags = dict(lr=1e-3, steps=6, method="opd", lr_schedule="linear")
    whole = trained(start(**flags))
    cut = start(**flags, save_every=2)
    monkeypatch.setattr(opd, "update", die_at(opd.update, 5))
    with pytest.raises(KeyboardInterrupt):
        opd.train(cut)
    monkeypatch.undo()
    resumed = start(**flags, save_every=2, out=cut.out, resume=True)
    assert resumed.state["step"] == 4 and torch.equal(trained(resumed), whole)
    steps = [json.loads(line)["step"] for line in (cut.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [-1, 0, 1, 2, 3, 4, 5]


def test_resume_keeps_every_stop_token_and_survives_odd_logs(start, models, tmp_path):
    """Chat models list several EOS ids; samples may hold U+2028; a kill may cut the last line of a log."""
    net = AutoModelForCausalLM.from_pretrained(models / "a")
    net.generation_config.update(eos_token_id=[1, 7], do_sample=True, top_k=20)
    net.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(models / "a").save_pretrained(tmp_path / "two")
    flags = dict(student=tmp_path / "two", save_every=1, lr=1e-3)
    run = start(**flags, steps=2)
    opd.train(run)
    with open(run.out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 2, "text": "\u2028"}, ensure_ascii=False) + '\n{"step": 2, "lo')
    again = start(**flags, steps=3, out=run.out, resume=True, micro_tokens=64)
    assert run.student.stops == again.student.stops == [1, 7]
    opd.train(again)
    assert json.loads((run.out / "final" / "generation_config.json").read_text())["eos_token_id"] == [1, 7]
    assert [m["step"] for m in read_lines(run.out / "metrics.jsonl")] == [-1, 0, 1, 2]
    assert json.loads((run.out / "config.json").read_text())["steps"] == 3


def test_what_another_version_or_hand_has_written_is_not_continued(start):
    run = start(save_every=1, steps=1)
    opd.train(run)
    log = run.out / "metrics.jsonl"
    checkpoint = run.out / "checkpoint"
    torch.save({"optimizers": [], "state": {}}, checkpoint / "trainer.pt")
    (checkpoint / "checksums.json").write_text(json.dumps(checksums(checkpoint)))
    with pytest.raises(Refused, match="written by another version of opd"):
        start(save_every=1, steps=2, out=run.out, resume=True)


def test_a_kill_between_the_renames_of_a_checkpoint_loses_nothing(start):
    run = start(save_every=1, steps=2)
    opd.train(run)
    (run.out / "checkpoint").rename(run.out / "checkpoint.old")
    assert start(save_every=1, steps=3, out=run.out, resume=True).state["step"] == 2


def test_random_student_reaches_its_teacher(tmp_path, prompts):
    """On a vocabulary of 50 tokens, KL(p || q) on the student's own rollouts falls by ten times."""
    from tokenizers import Tokenizer, decoders, models as tokens, pre_tokenizers
    core = Tokenizer(tokens.WordLevel({"<eos>": 0, **{chr(65 + i): i + 1 for i in range(49)}},
                                      unk_token="<eos>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    for name, seed in (("student", 0), ("teacher", 1)):
        net = small_world.model(50, seed, hidden=32, layers=1)
        net.config.eos_token_id = net.generation_config.eos_token_id = 0
        with torch.no_grad():
            net.get_output_embeddings().weight.mul_(10)
        tiny(tmp_path / name, net, tok, scale=1)
    opd.main(["--student", str(tmp_path / "student"), "--teachers", str(tmp_path / "teacher"),
              "--out", str(tmp_path / "o"),
              "--prompts", str(prompts("p", [{"prompt": c} for c in "ABCDEFGH"])), "--steps", "150",
              "--lr", "1e-2", "--batch", "32", "--max_new_tokens", "6", "--lr_schedule", "linear",
              "--device", "cpu"])
    kl = [s["value"] for s in map(json.loads, (tmp_path / "o" / "metrics.jsonl").read_text().splitlines())
          if "loss" in s]
    assert sum(kl[-5:]) / 5 < kl[0] / 10, (kl[0], kl[-5:])


# ---- sampling ----------------------------------------------------------------------------------------------

def test_sampling_ignores_the_checkpoints_own_decoding_defaults(start, models, tmp_path):
    """A generation_config.json with top_k 1 would make every rollout greedy, silently off-policy."""
    net = AutoModelForCausalLM.from_pretrained(models / "a")
    net.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=5.0)
    net.save_pretrained(tmp_path / "greedy")
    AutoTokenizer.from_pretrained(models / "a").save_pretrained(tmp_path / "greedy")
    prompts = [{"prompt": "rev abc>", "branch": "main"}] * 8
    ours, plain = start(student=tmp_path / "greedy"), start()
    drawn = []
    for run in (ours, plain):
        torch.manual_seed(0)
        drawn.append([r.ids_T.tolist() for r in run.sample(run.student, prompts)])
    assert drawn[0] == drawn[1] and len(set(map(tuple, drawn[0]))) > 1
    opd.train(ours)                                 # and the saved model still has its own defaults
    assert json.loads((ours.out / "final" / "generation_config.json").read_text())["top_k"] == 1


def test_sampler_log_probs_are_the_training_forwards(start):
    """Left padding, stop tokens and the KV cache must not change the distribution."""
    run = start(max_new_tokens=12)
    some = run.sample(run.student, [{**row, "branch": "main", "grader": "exact"} for row in WORD_ROWS] * 4)
    assert len({len(r.ids_T) for r in some}) > 1
    lps = run.student.log_probs([r.prompt_ids for r in some], [r.ids_T for r in some], run.cfg.micro_tokens)
    for r, lp_T in zip(some, lps):
        torch.testing.assert_close(r.logp_T, lp_T, rtol=1e-4, atol=1e-4)
    hot = start(temperature=2.0, top_p=0.5)
    for r in hot.sample(hot.student, [{"prompt": "rev abc>", "branch": "main"}] * 8):
        lp_T = hot.student.log_probs([r.prompt_ids], [r.ids_T], hot.cfg.micro_tokens)[0]
        assert r.logp_T.isfinite().all() and not torch.allclose(r.logp_T, lp_T, atol=1e-2)


def test_completions_end_at_their_first_stop_token_and_left_padding_is_harmless(start):
    run = start(max_new_tokens=20)
    prompts = [run.student.tok(row["prompt"]).input_ids for row in WORD_ROWS]
    together = run.complete(run.student, prompts, temperature=0)
    for prompt, (ids_T, _) in zip(prompts, together):
        assert torch.equal(ids_T, run.complete(run.student, [prompt], temperature=0)[0][0])
    torch.manual_seed(0)
    for ids_T, logp_T in run.complete(run.student, prompts * 8, temperature=1.5):
        assert all(i not in run.student.stops for i in ids_T[:-1].tolist()) and len(ids_T) == len(logp_T)
        assert ids_T[-1] in run.student.stops or len(ids_T) == 20


def test_padding_rows_of_the_head_are_never_sampled(start):
    run = start()
    run.student.vocab -= 40                         # as if the head had 40 rows more than the tokenizer
    for r in run.sample(run.student, [{"prompt": "last q>", "branch": "main"}] * 32):
        assert r.ids_T.max() < run.student.vocab


def test_rewards_belong_to_their_prompts(start, monkeypatch):
    """Several rollouts per prompt: a completion with its prompt's answer must be right, in any order."""
    run = start(rollouts=3)
    rows = [{**row, "branch": "main", "grader": "exact"} for row in WORD_ROWS]
    answers = {tuple(run.student.tok(r["prompt"]).input_ids): r["answer"] for r in rows[:-1]}

    def oracle(prompts, *how):
        return [(torch.tensor(run.student.tok(answers.get(tuple(p), "wrong")).input_ids + run.student.stops),
                 None) for p in prompts]
    monkeypatch.setattr(run.student, "generate", oracle)
    rewards = [(r.prompt["answer"], r.reward) for r in run.sample(run.student, rows)]
    assert rewards == [(row["answer"], float(row is not rows[-1])) for row in rows for _ in range(3)]


def test_evaluating_changes_nothing(start, prompts):
    evals = dict(eval_prompts=[f"words={prompts('e')}"], eval_temperature=1.0, lr=1e-3, steps=4, method="opd")
    assert torch.equal(trained(start(**evals, eval_every=1)), trained(start(**evals)))


def test_a_measurement_within_a_step_leaves_the_step_as_it_was(start, prompts):
    """Its samples would change the step's own, its prompts the next step's, its tokens the costs of a run."""
    run = start(eval_prompts=[f"words={prompts('e')}"], eval_temperature=1.0)
    run.folder.take()
    run.draw()
    run.notes["pairs"] = 3

    def everything():
        return json.dumps([run.state, run.notes, run.clock]), torch.get_rng_state().tolist()

    scores = []
    for _ in range(2):
        torch.rand(1)
        before = everything()
        with run.without_side_effects():
            rollouts = run.sample(run.student, run.draw())
            run.notes["pairs"] = 4
            scores.append((run.evaluate(), [r.ids_T.tolist() for r in rollouts]))
        assert everything() == before
    assert scores[0] == scores[1]                   # and every measurement has the same randomness


def test_every_epoch_shows_every_prompt_once(start, prompts):
    run = start(batch=2)
    drawn = [p["prompt"] for _ in range(10) for p in run.draw()]
    assert all(sorted(drawn[i:i + 5]) == sorted(r["prompt"] for r in WORD_ROWS) for i in range(0, 20, 5))
    assert len({tuple(drawn[i:i + 5]) for i in range(0, 20, 5)}) > 1


def hotter(student):
    """A sampler at twice the temperature that it is asked for."""
    generate = student.generate
    return "generate", lambda prompts, temperature, *how: generate(prompts, 2 * temperature, *how)


def leaky(student):
    """A forward pass in which prompts see the padding of their batch."""
    hidden_states = student.hidden_states
    return "hidden_states", lambda prompts, completions: hidden_states(prompts, completions) * (
        1 + 0.1 * len(prompts))


@pytest.mark.parametrize("broken, expected", [
    (hotter, "the rollouts are not on-policy"), (leaky, r"KL\(student, student\) = .* instead of 0")])
def test_start_check_notices_a_sampler_that_is_not_the_student(start, monkeypatch, broken, expected):
    """It stops the run before the first step and before anything is written."""
    run = start()
    monkeypatch.setattr(run.student, *broken(run.student))
    with pytest.raises(Refused, match=expected):
        opd.train(run)
    assert run.state["step"] == run.student.updates == 0 and not run.out.exists()


def test_a_broken_gradient_stops_the_run_and_keeps_the_checkpoint(start, monkeypatch):
    def poisoned(run, *args):
        if run.state["step"] == 2:
            parameter = next(run.student.net.parameters())
            parameter.grad = torch.full_like(parameter, math.nan)
        return update(run, *args)

    run, update = start(steps=3, save_every=1, lr=1e-3), opd.update
    monkeypatch.setattr(opd, "update", poisoned)
    with pytest.raises(Refused, match="step 3: loss or gradient are not a number"):
        opd.train(run)
    resumed = start(steps=3, save_every=1, lr=1e-3, out=run.out, resume=True)
    assert resumed.state["step"] == 2 and parameters(resumed.student).isfinite().all()


@pytest.mark.parametrize("loss", ["tvd", "jsd"])
def test_a_broken_teacher_stops_the_run(start, loss):
    """tvd's gradient stays finite where q is not a number: the loss has to say it."""
    run = start(loss=loss, method="opd")
    with torch.no_grad():
        run.teacher.head_VH[5] = math.nan
    with pytest.raises(Refused, match="wide computes what is not a number for one of the prompts of main"):
        opd.train(run)
