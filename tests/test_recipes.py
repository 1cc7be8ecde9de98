"""Recipes: every row can run, what is finished is not run again, what cannot work is refused in one line."""
import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from config import parse
from lab import papers, recipes
from methods import METHODS

ROOT = Path(__file__).parent.parent


def said(words):
    """Return what the program says before it stops."""
    with pytest.raises(SystemExit) as stop:
        recipes.main(words)
    message = str(stop.value)
    assert message.startswith("lab.recipes: ") and "\n" not in message
    return message


def test_every_row_of_every_recipe_parses_and_its_names_exist():
    for recipe in recipes.RECIPES.values():
        assert set(recipe.references) | set(recipe.quick) - {""} <= recipe.rows.keys()
        assert {name for sets in recipe.axes.values() for name in sets} <= recipe.columns.keys()
        for quick in (False, True):
            for row in recipe.rows:
                cfg = parse(recipes.arguments(recipe, row, Path("runs/x/seed3"), 3, quick), "", METHODS)
                filled = json.dumps(vars(cfg))
                assert cfg.seed == 3 and "{dir}" not in filled and "{seed}" not in filled


def test_recipe_runs_once_and_reports(tmp_path, monkeypatch):
    few = recipes.RECIPES["small"]
    rows = {name: few.rows[name] for name in ("generalist", "specialist", "sft", "camopd")}
    tiny = dataclasses.replace(
        few, rows=rows, quick={"": dict(steps=2, eval_every=1)},
        quick_prepare=["--generalist", "300", "--specialist", "300", "--evaluation", "8"],
        expected={"quick": {"sft": [(1, 2)] * 3}})
    monkeypatch.setitem(recipes.RECIPES, "small", tiny)
    out = tmp_path / "small"
    recipes.main(["small", "--quick", "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert (results["rows"].keys() == rows.keys()
            and all(len(r["domain"]) == 1 for r in results["rows"].values()))
    assert ((out / "curves.png").stat().st_size > 10_000
            and "expected 1.0 ± 2.0" in (out / "report.md").read_text())
    again = (out / "seed0" / "camopd" / "final" / "config.json").stat().st_mtime_ns
    recipes.main(["small", "--quick", "--out", str(out)])
    assert again == (out / "seed0" / "camopd" / "final" / "config.json").stat().st_mtime_ns
    assert "quick form" in said(["small", "--out", str(out)])


def test_a_failing_row_ends_the_recipe(tmp_path, monkeypatch):
    calls = []

    def run_child(command, row, folder, *rest):
        calls.append((folder.name, row))
        (recipes.ROOT / folder).mkdir(parents=True, exist_ok=True)
        if row == "generalist":
            raise recipes.Refused("broken")
    monkeypatch.setattr(recipes, "run_child", run_child)
    assert "broken" in said(["small", "--seeds", "3", "--out", str(tmp_path / "r")])
    assert calls == [("seed0", "data"), ("seed0", "generalist")]


def test_a_row_that_fails_names_its_log(tmp_path):
    out = tmp_path / "seed0"
    with pytest.raises(recipes.Refused, match="seed0: sft ended with exit code 3 .*sft.log.* continues"):
        recipes.run_child(["-c", "print('last words'); raise SystemExit(3)"], "sft", out, 1)
    assert (out / "sft.log").read_text() == "last words\n"


@pytest.mark.parametrize("words, expected", [
    (["smal-opcd"], "unknown recipe smal-opcd; did you mean small-opcod?"),
    (["small", "--seeds", "0"], "--seeds: 0 is not at least 1"),
    (["small", "--jobs", "two"], "--jobs: invalid int value: 'two'"),
    (["small", "--lr", "3"], "unrecognized arguments: --lr 3"),
    (["--quick"], "need a recipe's name; there are: small, "),
    (["small", "--out", "/dev/null"], "--out /dev/null cannot be made a folder"),
    (["small", "--out", "/dev/null/x"], "--out /dev/null/x cannot be made a folder")], ids=str)
def test_bad_input_is_refused_in_one_line(words, expected):
    assert expected in said(words)


def test_without_a_name_every_recipe_is_listed_in_a_line(capsys):
    recipes.main([])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["recipe", "rows", "expected", "predicted", "cost", "about"]
    assert [line.split()[0] for line in lines] == list(recipes.RECIPES)
    assert lines[0].split()[1:6] == ["11", "5", "seeds", "not", "predicted"]
    assert all(len(line) <= 110 for line in lines)


def test_train_small_runs_from_any_folder_and_takes_a_recipes_name(tmp_path):
    """A file of the user's own that is called as one of ours must not be imported in its place."""
    (tmp_path / "config.py").write_text("raise SystemExit('the wrong config.py')")

    def run(*words):
        done = subprocess.run(["bash", str(ROOT / "train_small.sh"), *words], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr.strip()
    (tmp_path / "file").write_text("x")
    for words in ([], ["small-opcod"]):
        assert run(*words, "--quick", "--out", "file") == (
            f"lab.recipes: --out {tmp_path / 'file'} cannot be made a folder (File exists)")
    assert "unknown recipe small-opcd; did you mean small-opcod?" in run("small-opcd")


@pytest.mark.parametrize("name", ["small", "small-opcod"])
def test_the_studies_show_the_expected_numbers(name):
    """Whoever measures a table anew has to change both places."""
    page = (ROOT / "lab" / "README.md").read_text().replace("**", "")
    for row, cells in recipes.RECIPES[name].expected["full"].items():
        shown = " | ".join(f"{mean} ± {spread}" for mean, spread in cells)
        assert f"| {shown} |" in page, row


# ---- the paper's pairs -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, rounds, domains", [
    ("opcod-phys-chem", 2, ["physics", "chemistry"]), ("opcod-chem-mat", 2, ["chemistry", "material"]),
    ("opcod-mat-phys", 5, ["material", "physics"])])
def test_the_papers_pairs_are_complete(name, rounds, domains):
    recipe = recipes.RECIPES[name]
    runs = [run for names in recipe.table.values() for run in names]
    assert runs == list(recipe.rows) and list(recipe.columns) == domains
    assert recipe.rows["opcod"]["rounds"] == rounds and recipe.rows["opcod"]["steps"] == 100
    for row, flags in recipe.rows.items():
        students = [flags["student"]] if isinstance(flags["student"], str) else flags["student"]
        earlier = [path for path in students if "{dir}" in path]
        assert all(path.split("/")[1] in list(recipe.rows)[:list(recipe.rows).index(row)] for path in earlier)
    assert recipe.expected["full"].keys() == recipe.table.keys()
    assert all(len(row) == 4 for row in recipe.expected["full"].values())
    initial, last = recipe.expected["full"]["initial"], recipe.expected["full"]["OPCoD"]
    assert all(after > before for (before, _), (after, _) in zip(initial, last))     # the paper's claim
    assert initial[0] > initial[2] and initial[3] > initial[1]          # each is stronger in its own domain
    argv = recipes.arguments(recipe, "opcod", Path("runs/x/seed0"), 0, False)
    assert argv[argv.index("--chat_template_kwargs") + 1] == '{"enable_thinking": false}'
    assert argv[argv.index("--gradient_checkpointing") + 1].startswith("--")


def test_the_papers_numbers_have_the_papers_averages():
    """Its table 1 prints the mean of each student's two scores: a slip of the pen here would show."""
    means = {("physics", "chemistry"): [44.5, 52.5, 54.0, 58.6, 53.9, 63.2, 56.5, 64.5],
             ("chemistry", "material"): [56.2, 51.4, 63.8, 61.2, 68.4, 57.7, 70.6, 62.0],
             ("material", "physics"): [56.6, 53.8, 60.8, 60.0, 57.2, 55.4, 62.9, 60.2]}
    for pair_of, rows in papers.PAPER.items():
        ours = [sum(scores[i:i + 2]) / 2 for scores in rows.values() for i in (0, 2)]
        assert ours == pytest.approx(means[pair_of], abs=0.0501)
