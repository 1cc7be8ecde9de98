"""Every pitfall shows what its page says: its claims are properties of the numbers that it returns."""
import functools
import re

import pytest
import torch

from lab import pitfalls, report
from losses import DIVERGENCES, divergence

PULL, VANISH = ("fkl", "jeffreys", "todi"), ("rkl", "jsd", "skew_fkl", "skew_rkl", "tvd", "pg")


@functools.cache
def found(name):
    """The numbers and the panels of a pitfall."""
    torch.manual_seed(0)
    return pitfalls.PITFALLS[name]()


def number(name, begins):
    """The number, or numbers, of a pitfall whose description begins so."""
    numbers = found(name)[0]
    what, = [what for what in numbers if what.startswith(begins)]
    return numbers[what]


def test_at_certainty_eps_the_gradient_is_of_size_eps_for_what_weighs_with_p_and_1_for_forward_kl():
    for name in VANISH:
        exponent, size, p = number("certainty", f"{name}:")
        assert 0.9 < exponent < 1.01 and size < 1e-4 and p > 0.99, name
    for name in PULL:
        exponent, size, p = number("certainty", f"{name}:")
        assert abs(exponent) < 1e-3 and 0.9 < size < 1.5 and p < 0.05, name
    assert len(found("certainty")[0]) == len(DIVERGENCES) + 1                           # none is left out
    assert number("certainty", "pg:")[:2] == pytest.approx(number("certainty", "rkl:")[:2], rel=1e-6)


def test_raw_top_k_drifts_from_p_equal_to_q_and_collapses_where_the_remedies_hold():
    assert number("raw_top_k", "raw: gradient") > 0.1
    kl, loss, entropy = number("raw_top_k", "raw: KL")
    assert kl > 0.3 and loss < -0.1                                 # the worse the student, the less the loss
    for form in ("sg", "renorm", "tail"):
        assert number("raw_top_k", f"{form}: gradient") < 1e-12
        held = number("raw_top_k", f"{form}: KL")
        assert max(map(abs, held[:2])) < 1e-12 and entropy > held[2] + 0.5
        assert number("raw_top_k", f"{form}: tokens")[1] > number("raw_top_k", "raw: tokens")[1]    # noise


def test_bigram_texts_begin_with_the_token_that_ends_them():
    z_VV = torch.full((3, 3), -50.0)
    z_VV[0, 1] = z_VV[1, 2] = z_VV[2, 0] = 0                        # 0 1 2 0
    assert [ids_T.tolist() for ids_T in pitfalls.bigram_texts(z_VV, 2, 7)] == [[0, 1, 2, 0]] * 2
    assert [ids_T.tolist() for ids_T in pitfalls.bigram_texts(z_VV, 1, 2)] == [[0, 1, 2]]           # cut


def test_a_teacher_loses_with_every_step_of_a_student_and_not_with_its_own():
    itself, better, poor = (number("student_prefixes", f"teacher behind {who}")
                            for who in ("itself", "a better student", "a poor student"))
    assert min(itself) > 90 and max(itself) - min(itself) < 3
    assert sorted(poor, reverse=True) == list(poor) and poor[-1] < itself[-1] - 40
    assert poor[-1] < better[-1] < itself[-1]                       # and less behind a better student


def test_privileged_information_is_averaged_geometrically_by_rkl_and_arithmetically_by_fkl():
    answer, distance = number("privileged", "rkl: answer 3, distance from the geometric mean")
    assert distance < 1e-8 and answer > 0.3
    answer, distance = number("privileged", "fkl: answer 3, distance from the arithmetic mean")
    assert distance < 1e-8 and answer == pytest.approx(0.09)


def test_veto_damps_the_gradient_and_only_a_beta_that_falls_to_0_ends_at_the_teacher():
    sizes = [number("veto", f"beta {beta}: gradient") for beta in (0.0, 0.3, 0.8)]
    assert sizes[0] > 0.95 and sizes[1] < 0.3 and sizes[2] < 1e-3
    ends = [number("veto", f"beta {name}: KL") for name in ("falls to 0", "of 4 processes, to 0.6",
                                                            "stays at 0.8")]
    assert ends[0] < 1e-5 < 0.05 < ends[1] < ends[2]
    to_q, to_square = number("veto", "beta stays at 0.5")
    assert to_square < 1e-10 < 0.01 < to_q


def test_reverse_kl_keeps_to_a_mode_and_forward_kl_covers_the_mass_and_the_valley():
    of = {name: number("modes", f"{name}:") for name in ("teacher", "rkl", "fkl")}
    assert of["rkl"][0] < 0.01 and of["rkl"][1] < 1e-3
    assert of["fkl"][0] > 20 * of["teacher"][0] and of["fkl"][1] == pytest.approx(of["teacher"][1], abs=0.15)


def test_the_sampled_token_has_the_mean_of_the_full_gradient_and_needs_many_draws():
    for name in ("pg", "k1", "k3", "the same"):
        assert number("one_token", f"mean over all y of {name}") < 1e-12, name
    errors = [number("one_token", f"pg, {n} draws") for n in (1, 10, 100, 1000)]
    assert errors[0] > 1
    for error, of_tenth in zip(errors[1:], errors):
        assert of_tenth / error == pytest.approx(10**0.5, rel=0.35)                     # 1 / sqrt(draws)


def test_the_gradients_are_those_of_autograd_and_of_the_formula():
    """dz = p (log p/q - KL) for rkl; each section is built on these two functions."""
    torch.manual_seed(1)
    z_NV, w_NV = torch.randn(2, 3, 5).double().unbind()
    lp, lq = z_NV.log_softmax(-1), w_NV.log_softmax(-1)
    by_hand = lp.exp() * (lp - lq - (lp.exp() * (lp - lq)).sum(-1, keepdim=True))
    assert torch.allclose(pitfalls.gradient(z_NV, w_NV, "rkl"), by_hand, atol=1e-14)
    assert torch.allclose(pitfalls.expected(z_NV, w_NV), by_hand, atol=1e-14)
    y_N, weight_N = torch.tensor([0, 4, 2]), torch.tensor([1.0, -2.0, 0.5]).double()
    one_hot = torch.nn.functional.one_hot(y_N, 5)
    assert torch.allclose(pitfalls.sampled_gradient(z_NV, y_N, weight_N),
                          weight_N[:, None] * (lp.exp() - one_hot), atol=1e-14)
    assert pitfalls.kl(z_NV, w_NV) == pytest.approx(divergence(z_NV, w_NV, "rkl").mean().item())
    path = pitfalls.descend(torch.tensor(1.0), lambda z, done: z * done, 3, 1.0)
    assert [z.item() for z in path] == [1.0, 1.0, 0.5, 0.0]


def test_the_page_has_text_picture_and_numbers_and_the_same_digits_again(tmp_path, capsys):
    for folder in ("first", "again"):
        pitfalls.main(["privileged", "one_token", "--out", str(tmp_path / folder)])
        said = capsys.readouterr().out
    page = (tmp_path / "first" / "pitfalls.md").read_text()
    assert page == (tmp_path / "again" / "pitfalls.md").read_text()
    assert re.findall("^## (.*)", page, re.M) == ["Privileged information is averaged away.",
                                                   pitfalls.one_token.__doc__.split("\n")[0]]
    assert page.count("\nLook for ") == 2 and page.count("| measured |") == 1
    for name in ("privileged", "one_token"):
        assert f"![{name}]({name}.png)" in page and (tmp_path / "first" / f"{name}.png").stat().st_size > 5000
    rows = re.findall(r"^\| ([^`|\n]+) \| (\d.*) \|$", page, re.M)
    assert len(rows) == 10
    for what, numbers in rows:
        assert what in said and numbers.replace(" | ", ", ") in said


def test_a_table_has_a_row_of_every_subject_and_its_columns_whatever_their_names():
    found = pitfalls.tables("x", {"a: k, KL(p || q)": (1, 2.0), "alone": 3, "b: k, KL(p || q)": (4, 0.12345),
                                  "a: more": 5, "b: more": 6})
    assert found == [[["`x`", "k", "KL(p || q)", "more"], ["a", "1", "2", "5"], ["b", "4", "0.123", "6"]],
                     [["`x`", "measured"], ["alone", "3"]]]
    with pytest.raises(ValueError):
        pitfalls.tables("x", {"a: k": (1, 2)})                          # no number is without a name
    for line in report.markdown_table(found[0]).splitlines():
        assert len(re.findall(r"(?<!\\)\|", line)) == 5                 # | in a cell begins no other


def test_every_section_says_what_to_look_for_in_one_sentence():
    for name, function in pitfalls.PITFALLS.items():
        heading, *_, last = function.__doc__.split("\n\n")
        assert heading.endswith(".") and last.split()[:2] == ["Look", "for"] and last.count(". ") == 0, name


def test_an_unknown_name_and_an_out_that_cannot_be_a_folder_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^lab.pitfalls: 'vetoo' is unknown; did you mean veto"):
        pitfalls.main(["vetoo", "--out", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^lab.pitfalls: .*File exists"):
        pitfalls.main(["modes", "--out", str(tmp_path / "file")])
    assert not list(tmp_path.glob("*.md"))
