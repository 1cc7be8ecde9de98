"""The monitor warns where a loss cannot pull and where rollouts collapse, once per kind, not elsewhere."""
import json
import math
from types import SimpleNamespace

import opd
import pytest
import torch
from conftest import metrics, tiny

from data import small_world
from data.monitor import WINDOW, pull, repeated, saturated, watch
from lab import report
from losses import DIVERGENCES, Objective

PULL = ["fkl", "jeffreys", "todi"]
VANISH = ("rkl", "jsd", "skew_fkl", "skew_rkl", "alpha_beta", "tvd")


def told(size, entropies, objective, name="value"):
    stats = {name: torch.tensor(size), "entropy_s": torch.tensor(entropies)}
    return saturated([SimpleNamespace(objective=objective)], [stats])


def test_saturated_is_the_share_of_the_divergence_at_certain_tokens():
    """The sizes count, not the tokens; several Jobs count together, and each by its own loss."""
    rkl, fkl, pg = (Objective(divergence="rkl"), Objective(divergence="fkl"), Objective(label="pg"))
    token = [6.0, 1.0, 1.0], [1e-5, 0.5, 2.0]
    assert told(*token, rkl) == pytest.approx(6 / 8) and told(*token, fkl) == 0
    assert told([-6.0, 1.0, -1.0], token[1], pg, "gap") == pytest.approx(6 / 8)         # gaps have both signs
    jobs = [SimpleNamespace(objective=rkl), SimpleNamespace(objective=fkl), SimpleNamespace(objective=None)]
    stats = [{"value": torch.tensor([2.0]), "entropy_s": torch.tensor([1e-5])}] * 2 + [{}]
    assert saturated(jobs, stats) == pytest.approx(1 / 2)
    assert told([1e-3, 0.0], [1e-5, 1.0], rkl) is None and saturated([], []) is None
    likelihood = {"logprob_s": torch.tensor([-1.0]), "entropy_s": torch.tensor([1e-5])}
    assert saturated([SimpleNamespace(objective=Objective(label="nll"))], [likelihood]) is None


def test_what_pulls_is_found_from_the_formulas():
    """A divergence that is added is judged by its own gradient, under its knob and target."""
    assert {name for name in DIVERGENCES if pull(Objective(divergence=name)) < 0.1} == set(VANISH)
    assert [n for n in DIVERGENCES if 0.9 < pull(Objective(divergence=n)) < 1.1] == PULL
    assert pull(Objective(divergence="fkl", target=(1.0, 0.8))) < 0.1                   # Veto damps it
    assert pull(Objective(divergence="alpha_beta", knob=[1.0, 0.01])) > 0.5             # nearly fkl
    assert pull(Objective(label="pg")) == 0


def test_repeated_counts_3_grams_that_stood_before_in_the_same_completion():
    repeats, new, short = ([1, 2, 3, 1, 2, 3], [4, 5, 6, 7], [1, 2])
    assert repeated([torch.tensor(repeats)]) == pytest.approx(1 / 4)
    assert repeated([torch.tensor(ids) for ids in (repeats, new, short)]) == pytest.approx(1 / 12)
    assert repeated([torch.tensor(new), torch.tensor(new)]) == 0                    # not across completions
    assert repeated([torch.tensor([9] * 50)]) == pytest.approx(47 / 48) and repeated([]) is None


HEALTHY = dict(repeated=0.05, length=30.0, cut=0.1, entropy_s=0.5, top1_agree=0.7, solved=0.6, saturated=0.1)
SICK = dict(repeated=0.3, length=130.0, cut=0.95, entropy_s=0.02, top1_agree=0.5, solved=0.3, saturated=0.5)


def steps(memory, count, **stats):
    return [words for _ in range(count) for words in watch(memory, HEALTHY | stats)]


@pytest.mark.parametrize("name", SICK)
def test_each_kind_warns_once_when_its_mean_leaves_the_band_also_across_a_restart(name, capsys):
    memory = {}
    assert not steps(memory, 3 * WINDOW)
    assert not steps(memory, 1, **{name: SICK[name]})                                   # one step is noise
    memory = json.loads(json.dumps(memory))                                             # a checkpoint
    warnings = steps(memory, 2 * WINDOW, **{name: SICK[name]})
    assert len(warnings) == 1 and f"note: {warnings[0]}\n" in "".join(capsys.readouterr())
    memory = json.loads(json.dumps(memory))
    assert not steps(memory, 3 * WINDOW) and not steps(memory, 2 * WINDOW, **{name: SICK[name]})
    assert len(steps(memory, 2 * WINDOW, **SICK)) == len(SICK) - 1                      # the other kinds


def test_what_a_run_starts_with_and_what_becomes_better_is_no_collapse():
    """Texts that repeat themselves from the start, growth within the band, a rise of what should rise."""
    memory = {}
    assert not steps(memory, WINDOW, repeated=0.5, cut=0.9, saturated=0.0)
    assert not steps(memory, WINDOW, repeated=0.6, cut=1.0, length=100.0, top1_agree=1.0, solved=1.0)
    assert not steps(memory, WINDOW, length=8.0, entropy_s=0.05, cut=0.0, top1_agree=0.9, solved=0.9)
    assert len(steps(memory, WINDOW, length=6.0, top1_agree=0.9, solved=0.9)) == 1      # too short, too
    memory = {}                                                                         # one odd first step
    assert not steps(memory, 1, length=200.0, top1_agree=1.0, solved=1.0) + steps(memory, 3 * WINDOW)


def test_fixed_data_cannot_collapse_and_two_students_have_a_band_each():
    memory, fixed = {}, {name: x for name, x in HEALTHY.items() if name != "repeated"}
    for stats in [fixed] * WINDOW + [fixed | {"entropy_s": 1e-4, "length": 500.0}] * WINDOW:
        assert not watch(memory, stats)
    assert watch(memory, fixed | {"saturated": 3.0})
    memory = {}
    for tutee, agree in [(1, 0.9), (2, 0.5), (1, 0.9), (2, 0.5)]:
        assert not steps(memory, 2 * WINDOW, top1_agree=agree, tutee=tutee)


def certain(folder):
    """A model that is certain of everything: its head is large."""
    tok = small_world.tokenizer()
    return tiny(folder, small_world.model(len(tok), 0, hidden=32, layers=2), tok, scale=2000)


def test_a_run_says_in_its_first_step_that_its_student_is_certain_and_rkl_cannot_pull(argv, tmp_path, capsys):
    """And not again after --resume. Forward KL on the same student has nothing to warn of."""
    common = dict(student=certain(tmp_path / "certain"), max_new_tokens=8)
    for loss, share in (("rkl", 1), ("fkl", 0), ("pg", 1)):
        words = argv(loss=loss, lr=1e-6, **common)
        opd.main(words)
        said, run = "".join(capsys.readouterr()), opd.Run(opd.configure([*words, "--resume"]))
        assert [line["saturated"] for line in metrics(run)] == pytest.approx([share] * 2, abs=0.3)
        assert said.count("fkl, jeffreys, todi pull there") == (loss != "fkl")
        assert ["warnings" in line for line in metrics(run)] == [loss != "fkl", False]
        assert ("Warning after step 1: " in (run.out / "report.md").read_text()) == (loss != "fkl")
        words[words.index("--steps") + 1] = "4"
        opd.main([*words, "--resume"])
        assert "pull there" not in "".join(capsys.readouterr()) and len(metrics(run)) == 4


def test_metrics_have_both_numbers_for_rollouts_and_not_for_fixed_data(argv):
    for flags, rolled, has_divergence in ((dict(), True, True), (dict(method="sft"), False, False),
                                          (dict(method="kd"), False, True),
                                          (dict(method="grpo"), True, False)):
        words = argv(steps=1, **flags)
        opd.main(words)
        line, = metrics(opd.Run(opd.configure([*words, "--resume"])))
        assert ("repeated" in line, "saturated" in line) == (rolled, has_divergence), flags
        assert all(math.isfinite(line[name]) for name in ("repeated", "saturated") if name in line)


def test_a_report_has_both_numbers():
    lines = [dict(step=i, branch="all", seconds={}, repeated=0.02, saturated=0.4) for i in range(3)]
    table = report.change_table(lines)
    assert "| 3-grams that repeat earlier ones, % | 2 | 2 |" in table
    assert "out of reach, % | 40 | 40 |" in table
    panels = [draw.keywords["panel"][0] for draw in report.plan_panels(lines, []) if "panel" in draw.keywords]
    assert panels == ["3-grams that repeat earlier ones, %", "divergence out of reach, %"]
