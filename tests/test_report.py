"""Reports and tables say what the files of the runs say, and "not run" where there are none."""
import json
import math
from pathlib import Path

import pytest

from lab import recipes, report, tables

CONFIG = {"student": ["models/a"], "eval_top_p": 1.0, "teachers": {}, "method": "sdpo", "loss": "jsd",
          "device_name": "cpu",
          "dtype": "float32", "seed": 0, "started": "today",
          "eval_prompts": {"physics": "p", "chemistry": "c"}, "eval_rollouts": 16, "eval_temperature": 0.6,
          "versions": {"torch": "2"}, "tau": 0.2, "gate": "selective"}


def step(number, **extra):
    return {"step": number, "loss": 1.0, "value": 0.5, "branch": "physics", "seconds": {"sample": 3.0},
            "memory_gib": 1.0, "tokens": 7, "sampled_tokens": 10 * (number + 1)} | extra


def scored(number, **scores):
    return {"step": number, "eval": scores}


def leave(folder, lines, done=True, **config):
    """Make a run's folder as opd.py leaves it."""
    (folder / "final" if done else folder).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def both(physics, chemistry):
    """Return an evaluation of two students from (student 1's, student 2's) per set."""
    return {f"{i}/{name}": score for name, scores in (("physics", physics), ("chemistry", chemistry))
            for i, score in enumerate(scores, 1)}


def table_of(text, first):
    """Return the cells of the table whose header begins with `first`: {first cell: the others}."""
    block = next(b for b in text.split("\n\n") if b.startswith(f"| {first} |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return {row[0]: row[1:] for row in rows}


# ---- runs --------------------------------------------------------------------------------------------------

GATES = [{"round": 0, "scores": [{"physics": 0.5, "chemistry": 0.4}, {"physics": 0.45, "chemistry": 0.6}],
          "gaps": [1 / 3, 0.1], "cognizant": [False, True], "tutors": [[], ["physics", "chemistry"]],
          "broken": [{"correct": 10, "broken": 4, "broken_without": 1},
                     {"correct": 20, "broken": 1, "broken_without": 2}]},
         {"round": 1, "scores": [{"physics": 0.6, "chemistry": 0.6}, {"physics": 0.6, "chemistry": 0.6}],
          "gaps": [0, 0], "cognizant": [True, True], "tutors": [["physics"], ["physics", "chemistry"]],
          "broken": [{"correct": 30, "broken": 4, "broken_without": 2}, None]}]


@pytest.fixture
def tutoring(tmp_path):
    """Two students, two rounds of one phase of three steps each per student."""
    lines, number = [scored(-1, **both((0.5, 0.4), (0.3, 0.6)))], 0
    for gate in GATES:
        lines.append({"step": number, "gate": gate})
        for tutee in (1, 2):
            for _ in range(3):
                tutored = gate["cognizant"][2 - tutee]
                feedback = {"kept": 6, "no_match": 1, "no_concept_tag": 1} if tutored else {}
                lines.append(step(number, tutee=tutee, solved=0.25 * tutee, feedback=feedback,
                                  branches={"physics": {"value": 0.1 * tutee}, "chemistry": {"value": 0.2}},
                                  value=float(tutee)))
                number += 1
            lines.append(scored(number - 1, **both((0.5 + number / 100, 0.4), (0.3, 0.6 + number / 100))))
    leave(tmp_path / "run", lines, student=["models/a", "models/b"], method="opcod", eval_top_p=0.95,
          lora_rank=8)
    return tmp_path / "run"


def test_two_students_report(tutoring):
    report.write_run(tutoring)
    text = (tutoring / "report.md").read_text()
    assert text.startswith("# models/a and models/b tutoring each other: opcod, jsd\n")
    assert "temperature 0.6, top_p 0.95." in text
    for i, name in ((1, "a"), (2, "b")):
        assert f"run/adapter/{i}`" in text and f"on `models/{name}`" in text
    assert 'run/final/1"' in text and "## The models" in text
    assert table_of(text, "after step")["change"] == ["**+12.0**", "**+0.0**", "**+0.0**", "**+12.0**"]


def test_the_rounds_say_scores_gaps_and_decisions(tutoring):
    report.write_run(tutoring)
    text = (tutoring / "report.md").read_text()
    rounds = table_of(text, "round")
    assert rounds["round"] == ["1/physics", "1/chemistry", "2/physics", "2/chemistry", "gap of 1", "gap of 2",
                               "1 tutors", "2 tutors"]
    assert rounds["1"] == ["50.0", "40.0", "45.0", "60.0", "0.333", "0.100", "nothing", "physics, chemistry"]
    assert rounds["2"][-4:] == ["0.000", "0.000", "physics", "physics, chemistry"]
    assert "up to 0.2 it" in text and "`--gate selective`" in text
    broken = table_of(text, "tutors")           # summed over rounds: 20 + 30 correct, 1 + 4 of them broken
    assert broken["cognizant"] == ["50", "10.0", "8.0"] and broken["incognizant"] == ["10", "40.0", "10.0"]


def test_time_of_parts_that_not_every_step_has():
    steps = [step(0, seconds={"gate": 30.0, "sample": 6.0}), step(1, seconds={"sample": 6.0, "update": 18.0})]
    assert "in 1.0 minutes (gate 50%, sample 20%, update 30%)" in report.about_run(CONFIG, steps)


def test_break_rates_that_nobody_measured_are_not_numbers():
    silent = [{**gate, "broken": None} for gate in GATES]
    assert report.break_table(silent) == report.break_table([{**GATES[0], "broken": []}]) == []
    assert "| incognizant | 0 | not run | not run |" in report.break_table(GATES[1:])[0].splitlines()


def test_feedback_is_counted_by_who_wrote_it(tutoring):
    """In round 1 only student 2 tutors, so student 2 wrote twice as much; the steps name who read it."""
    report.write_run(tutoring)
    feedback = table_of((tutoring / "report.md").read_text(), "%")
    assert list(feedback) == ["%", "---", "kept", "no_concept_tag", "no_match", "texts"]
    assert feedback["kept"] == ["75.0", "75.0"] and feedback["texts"] == ["24", "48"]
    only = report.feedback_table([{"tutee": 1, "feedback": {"no_match": 3, "kept": 1}}])
    assert {"| kept | none | 25.0 |", "| no_match | none | 75.0 |"} <= set(only.splitlines())


def test_the_changes_of_each_student_are_its_own(tutoring):
    """The first steps are student 1's and the last student 2's: one table would compare the two."""
    report.write_run(tutoring)
    text = (tutoring / "report.md").read_text()
    assert text.count("| divergence, nats per token | 1 | 1 |") == 1
    assert text.count("| divergence, nats per token | 2 | 2 |") == 1
    assert "| prompts with a correct rollout, % | 25 | 25 |" in text
    assert "Student 1, 6 steps:" in text and "Student 2, 6 steps:" in text


def test_series_of_two_students_and_of_whole_steps(tutoring):
    steps, evals = report.read_metrics(tutoring)
    assert report.series(steps, "value").keys() == both((0, 0), (0, 0)).keys()
    assert report.series(steps, "solved")["2/all"] == ([4, 5, 6, 10, 11, 12], [0.5] * 6)
    shares = report.series(report.feedback_shares(steps), "kept_feedback")
    assert shares == {"from 2": ([1, 2, 3, 7, 8, 9], [0.75] * 6), "from 1": ([10, 11, 12], [0.75] * 3)}


class Panels:
    """Keeps the panels of a figure that a draw function would only write to a file."""

    def __init__(self, monkeypatch):
        self.plt = report.pyplot()
        if self.plt is None:
            pytest.skip("pictures need matplotlib")
        monkeypatch.setattr(self.plt, "close", lambda figure: setattr(self, "figure", figure))

    def __getitem__(self, title):
        return next(axis for axis in self.figure.axes if axis.get_title() == title)

    def titles(self):
        return [axis.get_title() for axis in self.figure.axes if axis.get_title()]


def test_the_picture_has_both_students_trajectories(tutoring, monkeypatch):
    panels = Panels(monkeypatch)
    report.write_run(tutoring)
    assert {"feedback that is kept, %", "prompts with a correct rollout, %", "seconds per step",
            "accuracy in evaluation, %"} <= set(panels.titles())
    axis = panels["the students' trajectories"]
    first, second = axis.get_lines()
    assert list(first.get_xdata()) == pytest.approx([50, 53, 56, 59, 62])
    assert list(second.get_ydata()) == pytest.approx([60, 63, 66, 69, 72])
    assert axis.get_xlabel() == "physics, %" and axis.get_ylabel() == "chemistry, %"
    assert len(axis.texts) == 8                                          # an arrow per evaluation and student
    assert panels["accuracy in evaluation, %"].get_xlabel() == "step"


def test_one_student_has_no_rounds_and_no_trajectories(tmp_path, monkeypatch):
    panels = Panels(monkeypatch)
    leave(tmp_path / "run", teachers={"main": "models/t"}, lines=[
        scored(-1, physics=0.5, chemistry=0.1), step(0), scored(0, physics=0.6, chemistry=0.2)])
    report.write_run(tmp_path / "run")
    text = (tmp_path / "run" / "report.md").read_text()
    assert text.startswith("# models/a taught by models/t: sdpo, jsd\n") and 'run/final"' in text
    absent = ("## Rounds", "## Feedback", "Student 1", "The models", ", top_p")
    assert not [word for word in absent if word in text]
    assert panels.titles() == ["divergence, nats per token", "accuracy in evaluation, %", "seconds per step"]


# ---- tables of recipes -------------------------------------------------------------------------------------

def pair(**changes):
    """Return a recipe that compares two students."""
    return recipes.Recipe(**dict(
        about="Two.", prepare=[], common={}, quick={"": {}}, references=(),
        rows=dict.fromkeys(("first", "second", "solo-1", "solo-2", "co"), {}),
        table={"initial": ("first", "second"), "solo": ("solo-1", "solo-2"), "co": ("co",)},
        columns={"physics": "Phys.", "chemistry": "Chem."},
        axes={"physics, %": ("physics",), "chemistry, %": ("chemistry",)}, expected_label="paper",
        expected={"full": {"initial": [(51.6, None), (37.3, None), (48.6, None), (56.3, None)]}}) | changes)


def seed(out, number, **ends):
    """Make the runs of a seed that end on (physics, chemistry) of one student, or on four scores of two."""
    for name, scores in ends.items():
        name = name.replace("_", "-")
        end = dict(zip(("physics", "chemistry"), scores))
        end = end if len(scores) == 2 else both(scores[::2], scores[1::2])
        leave(out / f"seed{number}" / name,
              [scored(-1, **dict.fromkeys(end, 0.0)), step(0), scored(0, **end)])


INITIAL = dict(first=(0.5, 0.3), second=(0.3, 0.5))


def test_a_table_joins_the_two_students_runs(tmp_path, capsys):
    """Student 1's scores must come from the first run, student 2's from the second."""
    seed(tmp_path, 0, **INITIAL, solo_1=(0.4, 0.5), solo_2=(0.6, 0.5), co=(0.6, 0.4, 0.4, 0.6))
    seed(tmp_path, 1, **INITIAL, solo_1=(0.5, 0.3), solo_2=(0.3, 0.6), co=(0.8, 0.4, 0.5, 0.4))
    tables.write_recipe("pair", pair(), tmp_path, 2, "full")
    table = table_of((tmp_path / "report.md").read_text(), "")
    assert table[""] == ["student 1: Phys.", "student 1: Chem.", "student 2: Phys.", "student 2: Chem.",
                         "Pareto 1", "Pareto 2", "mutual Pareto", "minutes"]
    assert table["initial"][:4] == ["50.0 ± 0.0 (paper 51.6)", "30.0 ± 0.0 (paper 37.3)",
                                    "30.0 ± 0.0 (paper 48.6)", "50.0 ± 0.0 (paper 56.3)"]
    assert table["initial"][4:] == ["", "", "", "0.1"]
    assert table["solo"] == ["45.0 ± 7.1", "40.0 ± 14.1", "45.0 ± 21.2", "55.0 ± 7.1",
                             "0/2 seeds", "2/2 seeds", "0/2 seeds", "0.1"]
    assert table["co"][:1] == ["70.0 ± 14.1"]
    assert table["co"][4:] == ["2/2 seeds", "1/2 seeds", "1/2 seeds", "0.1"]     # of one run, not of two
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["co"]["1/physics"] == [60, 80] and rows["solo"]["2/chemistry"] == [50, 60]
    assert rows["co"]["pareto"] == {"1": [True, True], "2": [True, False], "both": [True, False]}
    assert rows["solo"]["sampled_tokens"] == [20, 20] and rows["co"]["sampled_tokens"] == [10, 10]
    assert "mutual Pareto" in capsys.readouterr().out


@pytest.mark.parametrize("after, better", [((0.5, 0.3), False), ((0.5, 0.4), True), ((0.6, 0.4), True),
                                           ((0.9, 0.2), False), ((0.4, 0.2), False)])
def test_pareto_improvement_is_no_worse_anywhere_and_better_somewhere(after, better):
    names = ("physics", "chemistry")
    assert tables.pareto(dict(zip(names, (0.5, 0.3))), dict(zip(names, after)), names) is better


def test_what_was_not_run_says_so(tmp_path):
    """Neither a crash, nor a number of a run that has not ended, nor a mean that hides a missing seed."""
    seed(tmp_path, 0, first=(0.5, 0.3), solo_1=(0.4, 0.5), solo_2=(0.6, 0.5))
    seed(tmp_path, 1, **INITIAL, solo_1=(0.6, 0.5))
    leave(tmp_path / "seed1" / "solo-2", [scored(-1, physics=0.1, chemistry=0.1), step(0)], done=False)
    tables.write_recipe("pair", pair(), tmp_path, 2, "full")
    table = table_of((tmp_path / "report.md").read_text(), "")
    assert table["initial"][0] == "50.0, 1 of 2 seeds (paper 51.6)"
    assert table["solo"][0] == "40.0, 1 of 2 seeds"
    assert table["solo"][4:7] == ["", "", ""]                       # no seed has both its start and its end
    assert table["co"] == ["not run"] * 4 + [""] * 3 + ["not run"]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["initial"]["1/physics"] == [None, 50] and rows["co"]["minutes"] == [None, None]
    with pytest.raises(ValueError, match="no run of recipe pair"):
        tables.write_recipe("pair", pair(), tmp_path / "nothing", 2, "full")


def test_the_arrows_go_from_the_start_to_each_end(tmp_path, monkeypatch):
    panels = Panels(monkeypatch)
    seed(tmp_path, 0, **INITIAL, co=(0.6, 0.4, 0.4, 0.6))
    seed(tmp_path, 1, **INITIAL, co=(0.8, 0.4, 0.4, 0.4))
    tables.write_recipe("pair", pair(), tmp_path, 2, "full")
    assert panels.titles() == ["student 1", "student 2"]
    for name, start, end, spread in (("student 1", (50, 30), (70, 40), (math.sqrt(200), 0)),
                                     ("student 2", (30, 50), (40, 50), (0, math.sqrt(200)))):
        axis = panels[name]
        arrow, = axis.texts                                             # solo was not run
        assert arrow.xyann == pytest.approx(start) and arrow.xy == pytest.approx(end)
        bars = axis.containers[1][2]
        for bar, coordinate in zip(bars, (0, 1)):
            low, high = bar.get_segments()[0][:, coordinate]
            assert (high - low) / 2 == pytest.approx(spread[coordinate])
    assert (panels["student 1"].get_xlabel(), panels["student 1"].get_ylabel()) == tuple(pair().axes)


def test_recipes_without_a_table_report_as_before(tmp_path):
    plain = pair(rows=dict.fromkeys(("first", "second"), {}), table={}, expected_label="expected",
                 expected={"quick": {"first": [(51.6, None), (37.3, 1.0)]}})
    for number in (0, 1):
        seed(tmp_path, number, first=(0.5 + number / 10, 0.3), second=(0.3, 0.5))
    tables.write_recipe("plain", plain, tmp_path, 2, "quick")
    assert (tmp_path / "report.md").read_text() == (
        "# Recipe plain\n\nTwo. Mean ± standard deviation of 2 seed(s), training minutes per seed. cpu, "
        "torch 2, quick form.\n\n"
        "|  | Phys. | Chem. | minutes |\n| --- | --- | --- | --- |\n"
        "| first | 55.0 ± 7.1 (expected 51.6) | 30.0 ± 0.0 (expected 37.3 ± 1.0) | 0.1 |\n"
        "| second | 30.0 ± 0.0 | 50.0 ± 0.0 | 0.1 |\n\n![curves](curves.png)\n")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["first"] == {"physics": [50, 60], "chemistry": [30, 30], "minutes": [0.05, 0.05],
                             "updates": [1, 1], "sampled_tokens": [10, 10], "step_tokens": [7, 7],
                             "teacher_tokens": [0, 0]}


def test_a_table_of_everything_says_what_each_row_spent_and_shows_every_seed(tmp_path, monkeypatch):
    """Rows that cannot keep to a common budget are seen; of two students the second one is compared."""
    panels = Panels(monkeypatch)
    names = ("start", "alone", "co", "missing")
    recipe = pair(rows=dict.fromkeys(names, {}), table={}, expected={}, spent=True, second=("co",),
                  references=("start",))
    for number in (0, 1):
        for name, scores in (("start", dict(physics=0.5, chemistry=0.3)),
                             ("alone", dict(physics=0.4, chemistry=0.4 + number / 5)),
                             ("co", both((0.1, 0.8), (0.2, 0.9)))):
            lines = [step(i, tokens=400, sampled_tokens=5000 * (i + 1), teacher_tokens=900 * (i + 1))
                     for i in range(3)]
            leave(tmp_path / f"seed{number}" / name, [scored(-1, **scores), *lines, scored(2, **scores)])
    tables.write_recipe("everything", recipe, tmp_path, 2, "full")
    table = table_of((tmp_path / "report.md").read_text(), "")
    assert table[""] == ["Phys.", "Chem.", "updates", "sampled, k", "in steps, k", "by teachers, k",
                         "minutes"]
    assert table["alone"] == ["40.0 ± 0.0", "50.0 ± 14.1", "3", "15", "1", "3", "0.1"]
    assert table["co"][:2] == ["80.0 ± 0.0", "90.0 ± 0.0"] and table["missing"] == ["not run"] * 7
    axis = panels["where each seed (pale) and each mean ends"]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
    assert len(drawn) == 6 and [len(xs) for xs, _ in drawn] == [2, 1] * 3       # every seed, then the mean
    assert [text.get_text() for text in axis.texts] == ["start", "alone", "co"]


def test_further_columns_are_means_of_the_last_tenth_of_the_steps(tmp_path):
    recipe = pair(rows=dict.fromkeys(("first", "second"), {}), table={}, expected={},
                  ends={"entropy_s": ("entropy", 1), "repeated": ("repeated, %", 100)})
    for number in (0, 1):
        for row, more in (("first", dict(repeated=0.5)), ("second", {})):
            lines = [step(i, entropy_s=i + number, **more) for i in range(15)]
            scores = dict(physics=0.5, chemistry=0.3)
            leave(tmp_path / f"seed{number}" / row, [scored(-1, **scores), *lines, scored(14, **scores)])
    tables.write_recipe("ends", recipe, tmp_path, 2, "full")
    table = table_of((tmp_path / "report.md").read_text(), "")
    assert table[""] == ["Phys.", "Chem.", "entropy", "repeated, %", "minutes"]
    assert table["first"][2:4] == ["14", "50"] and table["second"][2:4] == ["14", ""]   # of 13, 14 and 14, 15


def test_a_report_shows_rounds_what_was_left_out_and_the_weights_of_teachers(tmp_path, monkeypatch):
    panels = Panels(monkeypatch)
    weights = lambda i: {"good": 0.6 + i / 100, "misleading": 0.4 - i / 100}
    lines = [step(i, skipped={"all correct": 2, "all wrong": i}, teacher_weight=weights(i), pass_rate=0.5,
                  pass_rate_at_first=0.75) for i in range(4)]
    lines[0]["round"] = {"probed": 320, "pass rate": 0.53125, "drawn": 3}
    lines[2]["round"] = {"probed": 320, "pass rate": None, "drawn": 0}
    leave(tmp_path / "run", lines)
    report.write_run(tmp_path / "run")
    text = (tmp_path / "run" / "report.md").read_text()
    assert table_of(text, "round") == {
        "round": ["probed", "pass rate", "drawn"], "---": ["---"] * 3, "1": ["320", "0.531", "3"],
        "2": ["320", "none", "0"]}
    assert "Left out, as they teach nothing: 8 x all correct, 6 x all wrong." in text
    axis = panels["weight of a teacher's rationales"]
    assert {line.get_label(): line.get_ydata()[-1] for line in axis.get_lines() if line.get_label()[0] != "_"
            } == pytest.approx({"good": 0.63, "misleading": 0.37})
    labels = [line.get_label() for line in panels["correct rollouts of drawn problems, %"].get_lines()]
    assert "in this round" in labels and "when first probed" in labels
