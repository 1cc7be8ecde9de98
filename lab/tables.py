"""Tables: what the runs of a recipe look like beside each other, from the files that they left."""
import json
import math
import statistics

from config import Refused

from .report import arrow, markdown_table, pyplot, read_diagnoses, read_metrics, save_figure


def write_recipe(name, recipe, out, seeds, form):
    """Write results.json, report.md and the pictures of a recipe, and print its tables.

    form: "full" or "quick". A table is a list of rows of text, of which the first is the header.
    """
    config = first_config(recipe, out, seeds)
    if config is None:
        raise Refused(f"{out} has no run of recipe {name}")
    results = collect(recipe, out, seeds)
    compared, examined = differences(recipe, results), diagnosed(recipe, out, seeds)
    found = [main_table(recipe, results, form)]
    pictures = ["curves"] if recipe.axes else []
    if compared:
        found.append(difference_table(compared, seeds))
        pictures.append("differences")
    if examined:
        found.append(diagnosis_table(examined))
        pictures.append("diagnosis")

    record = {"recipe": name, "form": form, "seeds": seeds, "rows": record_rows(recipe, results),
              "device": config["device_name"], "versions": config["versions"]}
    if compared:
        record["differences"] = compared
    if examined:
        record["diagnosis"] = examined
    (out / "results.json").write_text(json.dumps(record, indent=1))
    about = (f"{recipe.about} Mean ± standard deviation of {seeds} seed(s), training minutes per seed. "
             f"{config['device_name']}, torch {config['versions']['torch']}, {form} form.")
    links = [f"![{picture}]({picture}.png)" for picture in pictures]
    changed = [f"- {deviation}" for deviation in recipe.deviations]
    blocks = [f"# Recipe {name}", about, *map(markdown_table, found), *links,
              *(["## What differs from the paper", "\n".join(changed)] if changed else [])]
    (out / "report.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")

    print("\n\n".join(map(screen_table, found)))
    files = [out / "report.md", out / "results.json"]
    if plt := pyplot():
        draw_pictures(plt, recipe, results, compared, examined, out)
        files += [out / f"{picture}.png" for picture in pictures]
    print("\n" + "  ".join(map(str, files)))


def screen_table(table):
    """Return a table with aligned columns, for the screen."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for row in table:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)))
    return "\n".join(lines)


# ---- reading the runs --------------------------------------------------------------------------------------

def read_finished(folder):
    """Return (steps, evals) of a run that is finished and was evaluated, or None."""
    found = read_metrics(folder) if (folder / "final").exists() else ([], [])
    return found if all(found) else None


def first_config(recipe, out, seeds):
    """Return the settings of the recipe's first run, or None where there is none."""
    for seed in range(seeds):
        for row in recipe.rows:
            path = out / f"seed{seed}" / row / "config.json"
            if path.exists():
                return json.loads(path.read_text())
    return None


# What a row spent -> its heading; tokens are in thousands. Those in steps are of all the steps' completions,
# kept or not; by teachers is what teachers, self-teachers and references read and wrote.
SPENT = {"updates": "updates", "sampled_tokens": "sampled, k", "step_tokens": "in steps, k",
         "teacher_tokens": "by teachers, k"}


def collect(recipe, out, seeds):
    """Return {row: {"curve": [a value per seed], "minutes": [..], and of SPENT and recipe.ends [..] each}}.

    A curve is [(updates done, {set: accuracy})]. None stands for a seed that was not run.
    """
    results = {}
    for row, names in (recipe.table or {row: (row,) for row in recipe.rows}).items():
        results[row] = {key: [] for key in ("curve", "minutes", *SPENT, *recipe.ends)}
        for seed in range(seeds):
            runs = [read_finished(out / f"seed{seed}" / name) for name in names]
            values = {} if None in runs else combine(runs, recipe.ends, row in recipe.second)
            for key, found in results[row].items():
                found.append(values.get(key))
    return results


def combine(runs, wanted=(), second=False):
    """Return {"curve", "minutes", and what SPENT and `wanted` name} of one row of one seed.

    wanted: statistics, of which the mean over the last tenth of the steps is taken. second: of student 2
    alone.

    Of two runs, the first trained student 1 and the second student 2; their curve is its end.
    """
    curve = runs[0][1]
    if second:
        curve = [(step, {name[2:]: score for name, score in scores.items() if name.startswith("2/")})
                 for step, scores in curve]
    if len(runs) > 1:
        ends = {f"{student}/{name}": score for student, (_, evals) in enumerate(runs, 1)
                for name, score in evals[-1][1].items()}
        curve = [(0, ends)]
    steps = [step for steps, _ in runs for step in steps]
    seconds = [x for step in steps for part, x in step["seconds"].items() if part != "diagnose"]
    ends = [steps[-1] for steps, _ in runs]
    last = [step for steps, _ in runs for step in steps[-math.ceil(len(steps) / 10):]]
    found = {name: [step[name] for step in last if step.get(name) is not None] for name in wanted}
    return {"curve": curve, "minutes": sum(seconds) / 60, "updates": len(steps),
            **{name: statistics.mean(values) for name, values in found.items() if values},
            "sampled_tokens": sum(end["sampled_tokens"] for end in ends),
            "step_tokens": sum(step["tokens"] for step in steps),
            "teacher_tokens": sum(end.get("teacher_tokens", 0) for end in ends)}


# ---- statistics --------------------------------------------------------------------------------------------

def mean_spread(values):
    """Return the mean and the standard deviation over seeds; a single seed has none."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
       2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
       2.045, 2.042)                # half of a 95% interval in standard errors; 2, 3, .. 31 values


def interval(values):
    """Return the mean and half the width of its 95% interval by Student's t; a single value has none."""
    mean, spread = mean_spread(values)
    if spread is None:
        return mean, None
    return mean, T95[min(len(values) - 1, len(T95)) - 1] * spread / len(values) ** 0.5


def defined(values):
    """Return the values that are not None."""
    return [value for value in values if value is not None]


def pareto(before, after, names):
    """Return whether no score of `names` got worse and one got better: OPCoD, definitions A.1 and A.2."""
    worse = any(after[name] < before[name] for name in names)
    return not worse and any(after[name] > before[name] for name in names)


def improvements(recipe, first, curves):
    """Return {"1": [of student 1, per seed], "2": .., "both": ..}: whether it is a Pareto improvement.

    It is one over the table's first row, where the students start; OPCoD, definition A.3. None: not run.
    """
    found = {"1": [], "2": [], "both": []}
    for before, after in zip(first, curves):
        better = [None, None]
        if before and after:
            for i, student in enumerate((1, 2)):
                names = [f"{student}/{name}" for name in recipe.columns]
                better[i] = pareto(before[-1][1], after[-1][1], names)
        both = None if None in better else all(better)
        for key, value in zip(found, (*better, both)):
            found[key].append(value)
    return found


# ---- the main table ----------------------------------------------------------------------------------------

def table_columns(recipe):
    """Return {evaluation set: heading} of a recipe's table; where two students are compared, for each."""
    if not recipe.table:
        return recipe.columns
    return {f"{student}/{name}": f"student {student}: {heading}" for student in (1, 2)
            for name, heading in recipe.columns.items()}


def record_rows(recipe, results):
    """Return what results.json keeps of every row: a value per seed and column, None where not run."""
    record = {}
    for row, found in results.items():
        record[row] = {column: [curve and 100 * curve[-1][1][column] for curve in found["curve"]]
                       for column in table_columns(recipe)}
        if recipe.table:
            first = next(iter(recipe.table))
            record[row]["pareto"] = improvements(recipe, results[first]["curve"], found["curve"])
        record[row] |= {key: found[key] for key in ("minutes", *SPENT, *recipe.ends)}
    return record


def main_table(recipe, results, form):
    """Return a row per row of the recipe: its accuracies over seeds beside the expected ones, its minutes.

    Behind them come a paper's columns and rows that are not measured here, with what they need.
    """
    columns, expected = table_columns(recipe), recipe.expected.get(form, {})
    first = next(iter(recipe.table), None)
    pareto_headings = ["Pareto 1", "Pareto 2", "mutual Pareto"] if recipe.table else []
    spent = SPENT if recipe.spent else {}
    table = [["", *columns.values(), *pareto_headings, *spent.values(),
              *(heading for heading, _ in recipe.ends.values()), "minutes", *recipe.elsewhere]]
    for row, record in record_rows(recipe, results).items():
        wanted = wanted_cells(recipe, expected, row)
        cells = [seeds_cell(record[column]) + cell for column, cell in zip(columns, wanted)]
        for values in record.get("pareto", {}).values():
            known = defined(values)
            cells.append(f"{sum(known)}/{len(known)} seeds" if known and row != first else "")
        for key in spent:
            known, unit = defined(record[key]), 1 if key == "updates" else 1000
            cells.append(f"{statistics.mean(known) / unit:.0f}" if known else "not run")
        for name, (_, factor) in recipe.ends.items():
            known = defined(record[name])
            cells.append(f"{factor * statistics.mean(known):.3g}" if known else "")
        cells.append(seeds_cell(record["minutes"], spread=False))
        table.append([row, *cells, *judged_cells(recipe, wanted)])
    for row in (row for row in expected if row not in results):
        wanted, gap = wanted_cells(recipe, expected, row), [""] * len([*spent, *recipe.ends])
        table.append([row, *(f"not here{cell}" for cell in wanted[:len(columns)]), *gap, "",
                      *judged_cells(recipe, wanted)])
    return table


def wanted_cells(recipe, expected, row):
    """Return " (expected 70.6 ± 2.8)" for every column of a row and those elsewhere; "": not known."""
    known = expected.get(row, [])
    count = len(table_columns(recipe)) + len(recipe.elsewhere)
    return [f" ({recipe.expected_label} {mean_cell(*cell)})" if cell[0] is not None else ""
            for cell in [*known, *[(None, None)] * (count - len(known))]]


def judged_cells(recipe, wanted):
    """Return the cells of a row in the columns that are not measured here."""
    return [f"{needs}{cell}" for needs, cell in zip(recipe.elsewhere.values(),
                                                    wanted[len(table_columns(recipe)):])]


def mean_cell(mean, spread):
    """Return a mean with its spread, if it has one."""
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def seeds_cell(values, spread=True):
    """Return the mean of a value per seed, None where it was not run; say so if seeds are missing."""
    known = defined(values)
    if not known:
        return "not run"
    mean, deviation = mean_spread(known)
    return mean_cell(mean, deviation if spread else None) + missing_seeds(known, len(values))


def missing_seeds(values, seeds):
    """Return how many of the seeds there are, unless it is all of them."""
    return f", {len(values)} of {seeds} seeds" if len(values) < seeds else ""


# ---- differences between rows ------------------------------------------------------------------------------

def differences(recipe, results):
    """Return {title: {heading: [row minus its baseline in points, per seed that has both]}}.

    Every column is compared at the end. The columns of the picture are compared "on the way" too: in the mean
    of all evaluations after the first, which tells who was sooner where all arrive.
    """
    pictured = [column for sets in recipe.axes.values() for column in sets]
    found = {}
    for title, (row, baseline) in recipe.differences.items():
        pairs = [(a, b) for a, b in zip(results[row]["curve"], results[baseline]["curve"]) if a and b]
        found[title] = {}
        for column, heading in recipe.columns.items():
            found[title][heading] = [100 * (a[-1][1][column] - b[-1][1][column]) for a, b in pairs]
        for column in dict.fromkeys(pictured):
            found[title][f"{recipe.columns[column]}, on the way"] = [
                100 * (mean_on_the_way(a, column) - mean_on_the_way(b, column)) for a, b in pairs]
    return found


def mean_on_the_way(curve, column):
    """Return the mean accuracy over all evaluations after the first, which comes before any training."""
    return statistics.mean(scores[column] for _, scores in curve[1:])


def difference_table(found, seeds):
    """Return the differences as a table: the mean over seeds with its 95% interval."""
    def points(values):
        if not values:
            return "not run"
        mean, half = interval(values)
        width = "" if half is None else f" ± {half:.1f}"
        return f"{mean:+.1f}{width}{missing_seeds(values, seeds)}"
    headings = list(next(iter(found.values())))
    rows = [[title, *(points(values[heading]) for heading in headings)] for title, values in found.items()]
    return [["difference", *headings], *rows]


# ---- the runs' diagnoses -----------------------------------------------------------------------------------

def diagnosed(recipe, out, seeds):
    """Return {row: {heading: [a value per seed]}} of the rows with diagnoses: the means over each run.

    The diagnosis before the first step is left out: a student that is one of its teachers has no gap to it.
    """
    found = {}
    for row in recipe.rows:
        values = {}
        for seed in range(seeds):
            folder = out / f"seed{seed}" / row
            if not read_finished(folder):
                continue
            run = [diagnosis_numbers(one) for step, one in read_diagnoses(folder) if step]
            for heading in dict.fromkeys(heading for line in run for heading in line):
                known = defined(line.get(heading) for line in run)
                values.setdefault(heading, [])
                if known:
                    values[heading].append(statistics.mean(known))
        if values:
            found[row] = values
    return found


def diagnosis_numbers(found):
    """Return {heading: number} of one diagnosis, as far as a table of many runs shows it; None: undefined."""
    out = {}
    for name, pair in found["pairs"].items():
        prefix = f"{name}: " if len(found["pairs"]) > 1 else ""
        out[f"{prefix}cosine"] = pair["cosine"]
        error = pair["dot_error"]
        out[f"{prefix}dot product in its errors"] = pair["dot"] / error if error else None
    steps, undefined = found.get("steps", {}), {"step": None, "change": {}}
    mixed = steps.get("+".join(found["branches"]), undefined)
    for name, b in found["branches"].items():
        alone = steps.get(name, undefined)
        beyond_chance = None if b["gcg"] is None else (1 + b["gcg"]) / (1 + b["gcg_random"]) - 1
        numbers = [("hold the mass, %", 100, b["kept"] / b["rollouts"]), ("GCG, %", 100, b["gcg"]),
                   ("GCG beyond chance, %", 100, beyond_chance), ("alignment, %", 100, b["alignment"]),
                   ("alignment of these, %", 100, b["alignment_kept"]),
                   ("step, 1e-3", 1e3, alone["step"]),
                   ("change by own step, 1e-3 nats", 1e3, alone["change"].get(name)),
                   ("by the mixture's", 1e3, mixed["change"].get(name))]
        for heading, unit, value in numbers:
            out[f"{name}: {heading}"] = None if value is None else unit * value
    return out


def diagnosis_table(found):
    """Return the rows that were diagnosed, and the means of what was found."""
    def shown(values):
        if not values:
            return "none"
        mean, half = interval(values)
        return f"{mean:.3g}" if half is None else f"{mean:.3g} ± {half:.2g}"
    headings = list(dict.fromkeys(heading for values in found.values() for heading in values))
    rows = [[row, *(shown(values.get(heading)) for heading in headings)] for row, values in found.items()]
    return [["diagnosis", *headings], *rows]


# ---- pictures ----------------------------------------------------------------------------------------------

DRAWN = ("cosine", "GCG, %", "GCG beyond chance, %", "step, 1e-3")          # of the numbers of a diagnosis


def draw_pictures(plt, recipe, results, compared, examined, out):
    """Draw where the rows went, their differences, and what was diagnosed."""
    draw = draw_students if recipe.table else draw_ends if recipe.spent or recipe.ends else draw_rows
    if recipe.axes:
        draw(plt, recipe, results, out / "curves.png")
    if compared:
        pictured = [recipe.columns[column] for sets in recipe.axes.values() for column in sets]
        draw_dots(plt, compared, lambda heading: heading.split(", on the way")[0] in pictured, "points",
                  out / "differences.png")
    if examined:
        draw_dots(plt, examined, lambda heading: heading.split(": ")[-1] in DRAWN, "", out / "diagnosis.png")


def draw_dots(plt, found, wanted, unit, path):
    """Draw a panel per quantity and a line per row: every seed pale, the mean with its interval strong.

    found: {row: {quantity: [a value per seed]}}. wanted: tells of a quantity whether it has a panel. Panels
    show every seed; the 95% interval of few seeds may reach beyond its panel.
    """
    headings = dict.fromkeys(heading for values in found.values() for heading in values)
    headings = [heading for heading in headings if wanted(heading)]
    figure, panels = plt.subplots(1, len(headings), sharey=True, squeeze=False,
                                  figsize=(2.5 + 2 * len(headings), 1 + 0.2 * len(found)))
    for axis, heading in zip(panels[0], headings):
        lines = [values.get(heading, []) for values in found.values()]
        every = [0.0, *(value for values in lines for value in values)]
        margin = 0.1 * (max(every) - min(every) or 1)
        for y, values in enumerate(lines):
            if values:
                mean, half = interval(values)
                axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.3, markersize=3)
                axis.errorbar(mean, y, xerr=half, fmt="o", color="C0", markersize=4, linewidth=1.5)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(xlabel=unit, xlim=(min(every) - margin, max(every) + margin), ylim=(len(found) - 0.5, -0.5))
        axis.set_title(heading, fontsize=8)
    panels[0][0].set_yticks(range(len(found)), list(found), fontsize=7)
    save_figure(plt, figure, path)


def percent(scores, sets, prefix=""):
    """Return the mean accuracy over evaluation sets, in %."""
    return 100 * statistics.mean(scores[prefix + name] for name in sets)


def draw_rows(plt, recipe, results, path):
    """Draw the trajectory of every row across the two axes, means over seeds, and enlarged where it ends."""
    (x_title, x_sets), (y_title, y_sets) = recipe.axes.items()
    figure, (trajectories, ends) = plt.subplots(1, 2, figsize=(10.5, 4.6))
    for i, row in enumerate(recipe.pictured or results):
        curves = [curve for curve in results[row]["curve"] if curve]
        if not curves:
            continue
        points = list(zip(*curves))                     # of each evaluation one (step, scores) per seed
        x = [[percent(scores, x_sets) for _, scores in point] for point in points]
        y = [[percent(scores, y_sets) for _, scores in point] for point in points]
        mean_x, mean_y = list(map(statistics.mean, x)), list(map(statistics.mean, y))
        if row in recipe.references:
            trajectories.plot(mean_x[-1], mean_y[-1], "k*", markersize=12)
            trajectories.annotate(f"  {row}  ", (mean_x[-1], mean_y[-1]), va="bottom",
                                  ha="left" if mean_x[-1] < 70 else "right")
            continue
        color = f"C{i % 10}"
        trajectories.plot(mean_x, mean_y, marker="o", markersize=3, linewidth=1, color=color)
        ends.errorbar(mean_x[-1], mean_y[-1], xerr=mean_spread(x[-1])[1], yerr=mean_spread(y[-1])[1], fmt="o",
                      markersize=6, linewidth=1, color=color, label=row)
    trajectories.set(xlabel=x_title, ylabel=y_title, title="trajectories")
    ends.set(xlabel=x_title, ylabel=y_title, title="where each ends")
    ends.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(plt, figure, path)


def draw_ends(plt, recipe, results, path):
    """Draw where every seed of every row ends, pale, and the row's mean with its name."""
    (x_title, x_sets), (y_title, y_sets) = recipe.axes.items()
    figure, axis = plt.subplots(figsize=(9, 6.5))
    for i, (row, found) in enumerate(results.items()):
        ends = [curve[-1][1] for curve in found["curve"] if curve]
        if not ends:
            continue
        x, y = ([percent(scores, sets) for scores in ends] for sets in (x_sets, y_sets))
        reference, marker = row in recipe.references, "os^Dv"[i // 10 % 5]
        color = "black" if reference else f"C{i % 10}"
        axis.plot(x, y, marker, color=color, alpha=0.25, markersize=4)
        axis.plot(statistics.mean(x), statistics.mean(y), "*" if reference else marker, color=color,
                  markersize=11 if reference else 7, label=row)
        axis.annotate(row, (statistics.mean(x), statistics.mean(y)), xytext=(5, 4), fontsize=7,
                      textcoords="offset points")
    axis.set(xlabel=x_title, ylabel=y_title, title="where each seed (pale) and each mean ends")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(plt, figure, path)


def draw_students(plt, recipe, results, path):
    """Draw a panel per student: an arrow per row from the table's first row to where it ends.

    All are means over seeds. Above and to the right of the grey lines is a Pareto improvement.
    """
    (x_title, x_sets), (y_title, y_sets) = recipe.axes.items()
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.6), sharex=True, sharey=True)
    for student, axis in enumerate(panels, 1):
        start = None                                        # stays so where the first row was not run
        for number, (row, found) in enumerate(results.items()):
            ends = [curve[-1][1] for curve in found["curve"] if curve]
            if not ends:
                continue
            x, x_spread = mean_spread([percent(scores, x_sets, f"{student}/") for scores in ends])
            y, y_spread = mean_spread([percent(scores, y_sets, f"{student}/") for scores in ends])
            if number == 0:
                start, color, marker, size = (x, y), "black", "*", 9
                axis.axvline(x, color="grey", linewidth=0.6)
                axis.axhline(y, color="grey", linewidth=0.6)
            else:
                color, marker, size = f"C{(number - 1) % 10}", "o", 5
            axis.errorbar(x, y, xerr=x_spread, yerr=y_spread, fmt=marker, color=color, markersize=size,
                          linewidth=1, label=row)
            if start and number > 0:
                arrow(axis, start, (x, y), color)
        axis.set(title=f"student {student}", xlabel=x_title, ylabel=y_title)
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(plt, figure, path)
