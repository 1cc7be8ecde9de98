"""Tables: what a recipe's runs look like beside each other, from the files that they left."""
import json
import statistics

from .report import arrow, pyplot, read_diagnoses, read_metrics


def finished(folder):
    """(steps, evals) of a run that is finished and evaluated, or None."""
    found = read_metrics(folder) if (folder / "final").exists() else ([], [])
    return found if all(found) else None


def table_columns(recipe):
    """{evaluation set: heading} of the recipe's table: each of its columns, or each of them per student."""
    if not recipe.table:
        return recipe.columns
    return {f"{i}/{name}": f"student {i}: {heading}" for i in (1, 2)
            for name, heading in recipe.columns.items()}


def collect(recipe, out, seeds):
    """{row: {"curve": [per seed: [(step, scores)]], "minutes": [..], ..}} of a recipe's runs.

    None stands for a seed that was not run.
    """
    results = {}
    for row, names in (recipe.table or {row: (row,) for row in recipe.rows}).items():
        found = [together([finished(out / f"seed{seed}" / name) for name in names]) for seed in range(seeds)]
        results[row] = dict(zip(("curve", "minutes", "sampled_tokens"), map(list, zip(*found))))
    return results


def together(runs):
    """(curve, minutes, sampled tokens) of one row of one seed.

    Of two runs, the first trained student 1 and the second student 2; their curve is its end.
    """
    if None in runs:
        return None, None, None
    curve = runs[0][1]
    if len(runs) > 1:
        curve = [(0, {f"{i}/{name}": score for i, (_, evals) in enumerate(runs, 1)
                      for name, score in evals[-1][1].items()})]
    seconds = sum(x for steps, _ in runs for s in steps for part, x in s["seconds"].items()
                  if part != "diagnose")
    return (curve, seconds / 60,
            sum(steps[-1]["sampled_tokens"] for steps, _ in runs))


def pareto(before, after, names):
    """Whether scores got worse in none of `names` and better in one: OPCoD, definitions A.1 and A.2."""
    return (all(after[name] >= before[name] for name in names)
            and any(after[name] > before[name] for name in names))


def improvements(recipe, first, curves):
    """{"1": per seed, "2": .., "both": ..}: Pareto improvement over the table's first row; definition A.3."""
    found = {"1": [], "2": [], "both": []}
    for before, after in zip(first, curves):
        better = [pareto(before[-1][1], after[-1][1], [f"{i}/{name}" for name in recipe.columns])
                  if before and after else None for i in (1, 2)]
        for key, value in zip(found, (*better, all(better) if None not in better else None)):
            found[key].append(value)
    return found


def mean_spread(values):
    """Mean and standard deviation over seeds; a single seed has no spread."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
       2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
       2.045, 2.042)                # half of a 95% interval in standard errors; 2, 3, .. 31 values


def interval(values):
    """Mean and half the width of its 95% interval by Student's t; a single value has none."""
    mean, spread = mean_spread(values)
    return mean, spread and T95[min(len(values) - 1, len(T95)) - 1] * spread / len(values) ** 0.5


def differences(recipe, results):
    """{title: {heading: [row minus its baseline in points, per seed that has both]}}.

    At the end for every column, and for the columns of the picture also "on the way": the mean of all
    evaluations after the first, which says who was sooner where all arrive.
    """
    pictured = [column for sets in recipe.axes.values() for column in sets]
    value = {heading: lambda curve, c=column: curve[-1][1][c] for column, heading in recipe.columns.items()}
    value |= {f"{recipe.columns[column]}, on the way": lambda curve, c=column: statistics.mean(
        scores[c] for _, scores in curve[1:]) for column in dict.fromkeys(pictured)}
    pairs = {title: [(a, b) for a, b in zip(results[row]["curve"], results[baseline]["curve"]) if a and b]
             for title, (row, baseline) in recipe.differences.items()}
    return {title: {heading: [100 * (of(a) - of(b)) for a, b in both] for heading, of in value.items()}
            for title, both in pairs.items()}


def difference_table(found, seeds):
    def points(values):
        if not values:
            return "not run"
        mean, half = interval(values)
        few = f", {len(values)} of {seeds} seeds" * (len(values) < seeds)
        return f"{mean:+.1f}" + ("" if half is None else f" ± {half:.1f}") + few
    headings = list(next(iter(found.values())))
    return [["difference", *headings], ["---"] * (len(headings) + 1),
            *([title, *(points(values[heading]) for heading in headings)]
              for title, values in found.items())]


def diagnosed(recipe, out, seeds):
    """{row: {number: [a value per seed]}}: means over a run's diagnoses, of rows that have some.

    Without the one before the first step, where a student that is one of its teachers has no gap to it.
    """
    found = {}
    for row in recipe.rows:
        folders = [folder for seed in range(seeds) if finished(folder := out / f"seed{seed}" / row)]
        runs = [[flat(f) for step, f in read_diagnoses(folder) if step] for folder in folders]
        means = [{key: mean_of(line.get(key) for line in run) for line in run for key in line}
                 for run in runs]
        if any(runs):
            found[row] = {key: [mean[key] for mean in means if mean.get(key) is not None]
                          for mean in means for key in mean}
    return found


def flat(found):
    """The numbers of one diagnosis that a table of many runs shows, by heading; None where undefined."""
    out, several = {}, len(found["pairs"]) > 1
    for name, pair in found["pairs"].items():
        of = f"{name}: " * several
        errors = pair["dot"] / pair["dot_error"] if pair["dot_error"] else None
        out |= {f"{of}cosine": pair["cosine"], f"{of}dot product in its errors": errors}
    steps, mixed = found.get("steps", {}), "+".join(found["branches"])
    for name, b in found["branches"].items():
        gain = None if b["gcg"] is None else (1 + b["gcg"]) / (1 + b["gcg_random"]) - 1
        out |= {f"{name}: {word}": value if value is None else unit * value for word, unit, value in (
            ("hold the mass, %", 100, b["kept"] / b["rollouts"]), ("GCG, %", 100, b["gcg"]),
            ("GCG beyond chance, %", 100, gain), ("alignment, %", 100, b["alignment"]),
            ("alignment of these, %", 100, b["alignment_kept"]),
            ("step, 1e-3", 1e3, steps[name]["step"] if steps else None),
            ("change by own step, 1e-3 nats", 1e3, steps[name]["change"][name] if steps else None),
            ("by the mixture's", 1e3, steps[mixed]["change"][name] if steps else None))}
    return out


def mean_of(values):
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


def diagnosis_table(found):
    """Rows that were diagnosed, and the means of what was found."""
    headings = list(dict.fromkeys(heading for values in found.values() for heading in values))

    def shown(values):
        if not values:
            return "none"
        mean, half = interval(values)
        return f"{mean:.3g}" + ("" if half is None else f" ± {half:.2g}")

    return [["diagnosis", *headings], ["---"] * (len(headings) + 1),
            *([row, *(shown(values.get(key)) for key in headings)] for row, values in found.items())]


def cell(mean, spread):
    return f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def over_seeds(values, spread=True):
    """A cell from a value per seed, None where it was not run."""
    there = [value for value in values if value is not None]
    if not there:
        return "not run"
    few = f", {len(there)} of {len(values)} seeds" * (len(there) < len(values))
    return (cell(*mean_spread(there)) if spread else f"{statistics.mean(there):.1f}") + few


def write_recipe(name, recipe, out, seeds, form):
    """results.json, report.md and pictures of a recipe, its tables on the screen."""
    results, columns = collect(recipe, out, seeds), table_columns(recipe)
    expected = recipe.expected.get(form, {})
    initial = next(iter(recipe.table), None)
    header = ["", *columns.values(), *["Pareto 1", "Pareto 2", "mutual Pareto"] * bool(initial), "minutes"]
    table, record = [header, ["---"] * len(header)], {}
    for row, found in results.items():
        cells, record[row] = [], {}
        for i, column in enumerate(columns):
            values = [curve and 100 * curve[-1][1][column] for curve in found["curve"]]
            record[row][column] = values
            wanted = f" ({recipe.beside} {cell(*expected[row][i])})" if row in expected else ""
            cells.append(over_seeds(values) + wanted)
        if initial:
            record[row]["pareto"] = improvements(recipe, results[initial]["curve"], found["curve"])
            known = [[v for v in values if v is not None] for values in record[row]["pareto"].values()]
            cells += [f"{sum(values)}/{len(values)} seeds" if values and row != initial else ""
                      for values in known]
        record[row] |= {"minutes": found["minutes"], "sampled_tokens": found["sampled_tokens"]}
        table.append([row, *cells, over_seeds(found["minutes"], spread=False)])
    configs = [path for seed in range(seeds) for row in recipe.rows
               if (path := out / f"seed{seed}" / row / "config.json").exists()]
    if not configs:
        raise ValueError(f"{out} has no run of recipe {name}")
    config = json.loads(configs[0].read_text())
    about = (f"{recipe.about} Mean ± standard deviation of {seeds} seed(s), training minutes per seed. "
             f"{config['device_name']}, torch {config['versions']['torch']}, "
             f"{form} form.")
    compared, examined = differences(recipe, results), diagnosed(recipe, out, seeds)
    (out / "results.json").write_text(json.dumps({
        "recipe": name, "form": form, "seeds": seeds, "rows": record, "device": config["device_name"],
        "versions": config["versions"]} | ({"differences": compared} if compared else {})
        | ({"diagnosis": examined} if examined else {}), indent=1))
    found = [table, *([difference_table(compared, seeds)] if compared else []),
             *([diagnosis_table(examined)] if examined else [])]
    pictures = ["curves", *["differences"] * bool(compared), *["diagnosis"] * bool(examined)]
    (out / "report.md").write_text("\n\n".join([
        f"# Recipe {name}", about, *map(in_markdown, found),
        *(f"![{picture}]({picture}.png)" for picture in pictures)]) + "\n", encoding="utf-8")
    print("\n\n".join(map(aligned, found)))
    print(f"\n{out}/report.md  {out}/results.json", end="")
    if plt := pyplot():
        (draw_students if recipe.table else draw_recipe)(plt, recipe, results, out / "curves.png")
        if compared:
            shown = [recipe.columns[column] for sets in recipe.axes.values() for column in sets]
            draw_dots(plt, compared, lambda heading: heading.split(", on the way")[0] in shown, "points",
                      out / "differences.png")
        if examined:
            draw_dots(plt, examined, lambda heading: heading.split(": ")[-1] in DRAWN, "",
                      out / "diagnosis.png")
        print(*(f"  {out}/{picture}.png" for picture in pictures), end="", sep="")
    print()


def in_markdown(table):
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def aligned(table):
    """A table for the screen."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths))
                     for line in table if "---" not in line)


DRAWN = ("cosine", "GCG, %", "GCG beyond chance, %", "step, 1e-3")           # of what `flat` finds


def draw_dots(plt, found, wanted, unit, path):
    """A panel per quantity, a line per row: every seed pale, the mean with its 95% interval strong.

    found: {row: {quantity: [a value per seed]}}. wanted: of a quantity, whether it has a panel. Panels show
    every seed; an interval of few seeds may reach beyond its panel.
    """
    headings = list(dict.fromkeys(h for values in found.values() for h in values if wanted(h)))
    figure, panels = plt.subplots(1, len(headings), sharey=True, squeeze=False,
                                  figsize=(2.5 + 2 * len(headings), 1 + 0.2 * len(found)))
    for axis, heading in zip(panels[0], headings):
        every = [0.0, *(value for values in found.values() for value in values.get(heading, []))]
        margin = 0.1 * (max(every) - min(every) or 1)
        for y, values in enumerate(values.get(heading) for values in found.values()):
            if values:
                mean, half = interval(values)
                axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.3, markersize=3)
                axis.errorbar(mean, y, xerr=half, fmt="o", color="C0", markersize=4, linewidth=1.5)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(xlabel=unit, xlim=(min(every) - margin, max(every) + margin), ylim=(len(found) - 0.5, -0.5))
        axis.set_title(heading, fontsize=8)
    panels[0][0].set_yticks(range(len(found)), list(found), fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_recipe(plt, recipe, results, path):
    """Left: the way of every row across the two axes, means over seeds. Right: where they end, enlarged."""
    (x_title, x_sets), (y_title, y_sets) = recipe.axes.items()
    figure, (way, ends) = plt.subplots(1, 2, figsize=(10.5, 4.6))
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    at = lambda scores, sets: 100 * statistics.mean(scores[name] for name in sets)
    for i, (row, found) in enumerate((row, results[row]) for row in recipe.pictured or results):
        points = list(zip(*filter(None, found["curve"])))       # evaluation -> one (step, scores) per seed
        if not points:
            continue
        x, y = ([[at(scores, sets) for _, scores in point] for point in points] for sets in (x_sets, y_sets))
        mean_x, mean_y = ([statistics.mean(values) for values in axis] for axis in (x, y))
        if row in recipe.references:
            way.plot(mean_x[-1], mean_y[-1], "k*", markersize=12)
            way.annotate(f"  {row}  ", (mean_x[-1], mean_y[-1]), ha="left" if mean_x[-1] < 70 else "right",
                         va="bottom")
            continue
        way.plot(mean_x, mean_y, marker="o", markersize=3, linewidth=1, color=colors[i % len(colors)])
        ends.errorbar(mean_x[-1], mean_y[-1], xerr=mean_spread(x[-1])[1], yerr=mean_spread(y[-1])[1], fmt="o",
                      markersize=6, linewidth=1, color=colors[i % len(colors)], label=row)
    for axis, title in ((way, "the way there"), (ends, "where each ends")):
        axis.set(xlabel=x_title, ylabel=y_title, title=title)
    ends.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_students(plt, recipe, results, path):
    """A panel per student: an arrow per row from the table's first row to where it ends, means over seeds.

    Above and to the right of the grey lines is a Pareto improvement.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.6), sharex=True, sharey=True)
    for i, axis in enumerate(panels, 1):
        start = None                                        # stays so where the first row was not run
        for number, (row, found) in enumerate(results.items()):
            ends = [curve[-1][1] for curve in found["curve"] if curve]
            if not ends:
                continue
            (x, x_spread), (y, y_spread) = (
                mean_spread([100 * statistics.mean(scores[f"{i}/{s}"] for s in sets) for scores in ends])
                for sets in recipe.axes.values())
            color = "black" if number == 0 else f"C{(number - 1) % 10}"
            axis.errorbar(x, y, xerr=x_spread, yerr=y_spread, fmt="*" if number == 0 else "o", color=color,
                          markersize=9 if number == 0 else 5, linewidth=1, label=row)
            if number == 0:
                start = x, y
                axis.axvline(x, color="grey", linewidth=0.6)
                axis.axhline(y, color="grey", linewidth=0.6)
            elif start:
                arrow(axis, start, (x, y), color)
        axis.set(title=f"student {i}", xlabel=next(iter(recipe.axes)), ylabel=list(recipe.axes)[1])
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
