"""Reports: what a run or a recipe's table looks like, from the files it left (metrics.jsonl, config.json)."""
import json
import statistics
import sys
import textwrap
from pathlib import Path

from .files import read_lines


def step_line(run, s):
    """A step's line, e.g. step 12/300 general | rkl 0.412 | gap -0.83 | kept 32/64 | len 18 (3% cut) | .."""
    cfg, parts = run.cfg, [f"step {s['step'] + 1}/{run.total} {s['branch']}"]
    parts += [f"student {s['tutee']}"] if "tutee" in s else []
    parts += [f"{cfg.loss} {s['value']:.3f}"] if "value" in s else []
    parts += [f"nll {-s['logprob_s']:.3f}"] if cfg.loss == "nll" and "logprob_s" in s else []
    parts += [f"gap {s['gap']:+.3f}, |gap| {s['abs_gap']:.3f}"] if "gap" in s else []
    parts += [f"kept {s['kept']}/{s['rollouts']}", f"len {s['length']:.0f} ({s['cut']:.0%} cut)"]
    parts += [f"acc {s['reward']:.2f}"] if "reward" in s else []
    parts += [f"solved {s['solved']:.0%}"] if "solved" in s else []
    parts += [f"feedback {s['feedback'].get('kept', 0)}/{total}"
              ] if (total := sum(s.get("feedback", {}).values())) else []
    parts += [f"student {i} tutors in {', '.join(domains) or 'nothing'} (gap {gap:.2f})" for i, (gap, domains)
              in enumerate(zip(s["gate"]["gaps"], s["gate"]["tutors"]), 1)] if "gate" in s else []
    times = " ".join(f"{name} {seconds:.2f}" for name, seconds in s["seconds"].items())
    parts += [f"{sum(s['seconds'].values()):.2f}s ({times})", f"{s['memory_gib']:.1f} GiB"]
    parts += ["eval " + " ".join(f"{name} {x:.3f}" for name, x in s["eval"].items())] if s.get("eval") else []
    return " | ".join(parts)


def read_metrics(out):
    """(steps, evals) of a run folder: the lines with losses, and [(updates done, {set: accuracy})].

    In a run of two students the sets are called "1/set" and "2/set".
    """
    lines = read_lines(Path(out) / "metrics.jsonl")
    return [m for m in lines if "loss" in m], [(m["step"] + 1, m["eval"]) for m in lines if m.get("eval")]


def pyplot():
    """matplotlib without a display, or None with a hint: pictures are optional."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: pip install matplotlib", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "figure.dpi": 130, "font.size": 9, "legend.frameon": False})
    return plt


def write_run(out):
    """OUT/report.md and OUT/curves.png of one run."""
    out = Path(out)
    config, (steps, evals) = json.loads((out / "config.json").read_text()), read_metrics(out)
    samples = read_lines(out / "samples.jsonl") if (out / "samples.jsonl").exists() else []
    gates = [line["gate"] for line in read_lines(out / "metrics.jsonl") if "gate" in line]
    students = config["student"]
    name = lambda path: "/".join(Path(path).parts[-2:])
    taught = " tutoring each other" * (len(students) > 1)
    if teachers := " and ".join(dict.fromkeys(map(name, config["teachers"].values()))):
        taught = f" taught by {teachers}"
    lines = [f"# {' and '.join(map(name, students))}{taught}: {config['method']}, {config['loss']}", "",
             about_run(config, steps), ""]
    if evals:
        lines += ["## Accuracy", "", *accuracy_table(evals), "",
                  f"In %, on {', '.join(f'`{path}`' for path in config['eval_prompts'].values())}; "
                  f"{config['eval_rollouts']} completion(s) per prompt at temperature "
                  f"{config['eval_temperature']:g}"
                  + f", top_p {config['eval_top_p']:g}" * (config["eval_top_p"] < 1) + ".", ""]
    if gates:
        lines += ["## Rounds", "", *round_table(gates, config), "", *break_table(gates)]
    if any("feedback" in s for s in steps):
        lines += ["## Feedback", "", *feedback_table(steps), ""]
    lines += ["## Training", ""]
    for tutee in sorted({s.get("tutee", 0) for s in steps}):
        some = [s for s in steps if s.get("tutee", 0) == tutee]
        lines += [f"Student {tutee}, {len(some)} steps:", ""] * bool(tutee) + [*change_table(some), ""]
    folders = [f"/{i}" for i, _ in enumerate(students, 1)] if len(students) > 1 else [""]
    lines += ["![curves](curves.png)", "", "## The model" + "s" * (len(students) > 1), "",
              "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
              f'model = AutoModelForCausalLM.from_pretrained("{out}/final{folders[0]}", dtype="auto")',
              f'tokenizer = AutoTokenizer.from_pretrained("{out}/final{folders[0]}")', "```", ""]
    if config.get("lora_rank"):
        for folder, student in zip(folders, students):
            lines += [f"`{out}/adapter{folder}` is the adapter alone, for `peft.PeftModel.from_pretrained` "
                      f"on `{student}`.", ""]
    lines += ["## Samples", ""]
    for sample in [*samples[:2], *samples[2:][-3:]]:
        facts = [f"step {sample['step'] + 1}", sample["branch"]]
        facts += [f"mean gap {sample['gap']:+.2f}"] if sample["gap"] is not None else []
        facts += [f"reward {sample['reward']:g}"] if sample["reward"] is not None else []
        facts += [] if sample["selected"] else ["not selected"]
        lines += [", ".join(facts) + ":", "", indented(sample["prompt"][-400:]), "", "gets", "",
                  indented(sample["completion"][:800] or "(nothing)"), ""]
    settings = {k: v for k, v in config.items() if k not in ("versions", "started", "device_name")}
    lines += ["## Settings", "", "```json", json.dumps(settings, indent=1), "```", "",
              ", ".join(f"{package} {version}" for package, version in config["versions"].items())]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if plt := pyplot():
        draw_run(plt, steps, evals, out / "curves.png")


def indented(text):
    """A code block in Markdown, whatever the text holds."""
    return textwrap.indent("\n".join(text.splitlines()), "    ", lambda line: True)


def about_run(config, steps):
    """One paragraph: how much, how long, where the time went, how much memory."""
    parts = {name: sum(s["seconds"].get(name, 0) for s in steps) for name in timed_parts(steps)}
    total = max(sum(parts.values()), 1e-9)
    memory = " ".join(f"{name} {max(s.get('memory_gib_by_part', {}).get(name, 0) for s in steps):.1f}"
                      for name in steps[-1].get("memory_gib_by_part", {}))
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
    tokens, peak = steps[-1]["sampled_tokens"], max(s["memory_gib"] for s in steps)
    told = sum(s.get("feedback_tokens", 0) for s in steps)
    return (f"{len(steps)} steps with {tokens:,} sampled tokens" + f" and {told:,} of feedback" * bool(told)
            + f" in {total / 60:.1f} minutes ({shares}); "
            f"peak memory {peak:.1f} GiB" + f" ({memory})" * bool(memory)
            + f". {config['device_name']}, {config['dtype']}, seed {config['seed']}, {config['started']}.")


def timed_parts(steps):
    """Names of the parts that took time in any step, in order of appearance."""
    return list(dict.fromkeys(name for s in steps for name in s["seconds"]))


def accuracy_table(evals):
    names = list(dict.fromkeys(name for _, scores in evals for name in scores))
    percent = lambda scores, name: f"{100 * scores[name]:.1f}" if name in scores else "not run"
    table = ["| after step | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    table += [f"| {step} | " + " | ".join(percent(scores, n) for n in names) + " |" for step, scores in evals]
    first, last = evals[0][1], evals[-1][1]
    change = [f"**{100 * (last[n] - first[n]):+.1f}**" if n in first and n in last else "" for n in names]
    return table + ["| change | " + " | ".join(change) + " |"] * (len(evals) > 1)


CHANGES = {"value": ("divergence, nats per token", 1), "gap": ("gap log q(y) - log p(y), nats", 1),
           "abs_gap": ("size of the gap, nats", 1), "entropy_s": ("student's entropy, nats", 1),
           "entropy_t": ("teacher's entropy, nats", 1), "top1_agree": ("same most likely token, %", 100),
           "logprob_s": ("log p(y), nats", 1), "reward": ("accuracy of the rollouts, %", 100),
           "solved": ("prompts with a correct rollout, %", 100),
           "length": ("completion length, tokens", 1), "cut": ("completions that did not end, %", 100)}


def change_table(steps):
    """What the first and the last tenth of the training were like."""
    tenth = max(len(steps) // 10, 1)
    steps_word = "step" if tenth == 1 else f"{tenth} steps"
    table = [f"| mean of | first {steps_word} | last {steps_word} |", "|---|---|---|"]
    for key, (title, unit) in CHANGES.items():
        ends = [[s[key] for s in part if key in s] for part in (steps[:tenth], steps[-tenth:])]
        if all(ends):
            first, last = (f"{unit * statistics.mean(end):.3g}" for end in ends)
            table += [f"| {title} | {first} | {last} |"]
    return table


def round_table(gates, config):
    """What the gate saw, and where that let each student give feedback."""
    sets = list(gates[0]["scores"][0])
    titles = [*(f"{i}/{name}" for i in (1, 2) for name in sets),
              "gap of 1", "gap of 2", "1 tutors", "2 tutors"]
    table = ["| round | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for gate in gates:
        cells = [f"{100 * scores[name]:.1f}" for scores in gate["scores"] for name in sets]
        cells += [f"{gap:.3f}" for gap in gate["gaps"]]
        cells += [", ".join(domains) or "nothing" for domains in gate["tutors"]]
        table.append(f"| {gate['round'] + 1} | " + " | ".join(cells) + " |")
    return [*table, "", "Accuracy on the validation prompts in %. A student's gap is the sum over sets of "
            f"its relative shortfall from the better one; up to {config['tau']:g} it counts as cognizant. "
            f"Who tutors where: `--gate {config['gate']}`."]


def break_table(gates):
    """Break-rate: the share of correct rollouts that the tutee gets wrong once it has read the feedback."""
    found = [(counts, cognizant) for gate in gates for counts, cognizant
             in zip(gate.get("broken") or [], gate["cognizant"]) if counts]
    table = ["| tutors | correct rollouts | wrong with feedback, % | wrong without, % |", "|---|---|---|---|"]
    for title, wanted in (("cognizant", True), ("incognizant", False)):
        correct, *broken = (sum(counts[key] for counts, cognizant in found if cognizant == wanted)
                            for key in ("correct", "broken", "broken_without"))
        shares = [f"{100 * count / correct:.1f}" if correct else "not run" for count in broken]
        table.append(f"| {title} | {correct} | {' | '.join(shares)} |")
    about = "Break-rate: once correct rollouts, answered once more with the tutor's feedback and without."
    return [*table, "", about, ""] if found else []


def feedback_shares(steps):
    """Per step with feedback: {"step", "branch": its tutor, "kept_feedback": the share that is kept}."""
    shares = [{"step": s["step"], "branch": f"from {3 - s['tutee']}",
               "kept_feedback": s["feedback"].get("kept", 0) / sum(s["feedback"].values())}
              for s in steps if sum(s.get("feedback", {}).values())]
    return sorted(shares, key=lambda share: share["branch"])        # for the colours: student 1 first


def feedback_table(steps):
    """What became of each tutor's feedback. A step names its tutee; the tutor is the other student."""
    counts = {1: {}, 2: {}}
    for s in steps:
        for reason, count in s.get("feedback", {}).items():
            tutor = counts[3 - s["tutee"]]
            tutor[reason] = tutor.get(reason, 0) + count
    reasons = sorted({r for tutor in counts.values() for r in tutor}, key=lambda r: (r != "kept", r))
    total = lambda tutor: sum(tutor.values())
    share = lambda tutor, r: f"{100 * tutor.get(r, 0) / total(tutor):.1f}" if total(tutor) else "none"
    return ["| % | from student 1 | from student 2 |", "|---|---|---|",
            *(f"| {r} | " + " | ".join(share(tutor, r) for tutor in counts.values()) + " |" for r in reasons),
            "| texts | " + " | ".join(str(total(tutor)) for tutor in counts.values()) + " |"]


def series(steps, key):
    """{branch: (steps, values)} of a metric; steps that mix branches say it for each of them.

    A metric of the whole step is of branch "all". Of two students a branch is "1/branch" or "2/branch".
    """
    out = {}
    for s in steps:
        lines = s.get("branches", {s["branch"]: s})
        if key in s and not any(key in line for line in lines.values()):
            lines = {"all": s}
        for branch, line in lines.items():
            if key in line:
                branch = f"{s['tutee']}/{branch}" if "tutee" in s else branch
                xs, ys = out.setdefault(branch, ([], []))
                xs.append(s["step"] + 1)
                ys.append(line[key])
    return out


def smooth(values, window):
    """Mean over the last `window` values, or as many as there are."""
    return [statistics.mean(values[max(0, i + 1 - window):i + 1]) for i in range(len(values))]


def draw_run(plt, steps, evals, path):
    """Every step pale, a moving mean over it strong; one colour per branch, one line style per quantity."""
    panels = [("divergence, nats per token", {"value": ""}, 1),
              ("gap, nats", {"gap": "mean", "abs_gap": "size"}, 1),
              ("entropy, nats", {"entropy_s": "student", "entropy_t": "teacher"}, 1),
              ("-log p(y), nats per token", {"logprob_s": ""}, -1),
              ("completion length, tokens", {"length": ""}, 1),
              ("accuracy of the rollouts, %", {"reward": ""}, 100),
              ("prompts with a correct rollout, %", {"solved": ""}, 100),
              ("feedback that is kept, %", {"kept_feedback": ""}, 100)]
    lines = [*steps, *feedback_shares(steps)]
    panels = [panel for panel in panels if any(series(lines, key) for key in panel[1])]
    if any(title.startswith("divergence") for title, *_ in panels):
        panels = [panel for panel in panels if "log p(y)" not in panel[0]]
    sets = list(dict.fromkeys(name.partition("/")[2] for _, scores in evals for name in scores
                              if name[:2] in ("1/", "2/"))) if any("tutee" in s for s in steps) else []
    names = timed_parts(steps)
    count = len(panels) + bool(evals) + bool(names) + (len(sets) == 2)
    columns = min(count, 3) if count <= 6 else 4
    figure, axes = plt.subplots(-(-count // columns), columns, squeeze=False,
                                figsize=(3.6 * columns, 2.7 * -(-count // columns)))
    axes, window = list(axes.flat), max(len(steps) // 20, 1)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (title, keys, unit) in zip(axes, panels):
        for (key, word), style in zip(keys.items(), ("-", ":")):
            for color, (branch, (xs, ys)) in zip(colors, (found := series(lines, key)).items()):
                ys = [unit * y for y in ys]
                label = " ".join([branch] * (len(found) > 1) + [word] * bool(word))
                axis.plot(xs, ys, color=color, linewidth=0.8, alpha=0.25 if window > 1 else 0)
                axis.plot(xs, smooth(ys, window), style, color=color, linewidth=1.5, label=label)
                if label:
                    axis.legend(fontsize=7)
        axis.set_title(title)
        if "%" in title:
            axis.set_ylim(0)
    if evals:
        axis = axes[len(panels)]
        for name in dict.fromkeys(name for _, scores in evals for name in scores):
            points = [(step, 100 * scores[name]) for step, scores in evals if name in scores]
            axis.plot(*zip(*points), marker="o", markersize=3, label=name)
        axis.set(title="accuracy in evaluation, %")
        axis.set_ylim(0)
        axis.legend(fontsize=7)
    if names:
        axis = axes[len(panels) + bool(evals)]
        axis.stackplot([s["step"] + 1 for s in steps],
                       [smooth([s["seconds"].get(name, 0) for s in steps], window) for name in names],
                       labels=names, alpha=0.7)
        axis.set_title("seconds per step")
        axis.legend(fontsize=7)
    for axis in axes[:count]:
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(sets) == 2:
        draw_ways(axes[count - 1], evals, sets)
    for axis in axes[count:]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_ways(axis, evals, sets):
    """Both students' ways across the two evaluation sets, an arrow per evaluation."""
    for i, color in ((1, "C0"), (2, "C1")):
        x, y = ([100 * scores[f"{i}/{name}"] for _, scores in evals
                 if all(f"{i}/{other}" in scores for other in sets)] for name in sets)
        axis.plot(x, y, "o", color=color, markersize=3, label=f"student {i}")
        for start, end in zip(zip(x, y), zip(x[1:], y[1:])):
            arrow(axis, start, end, color)
    axis.set(title="the students' ways", xlabel=f"{sets[0]}, %", ylabel=f"{sets[1]}, %")
    axis.legend(fontsize=7)


def arrow(axis, start, end, color):
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="->", color=color, linewidth=1.2, shrinkA=0,
                                                  shrinkB=0))


# ---- recipes -----------------------------------------------------------------------------------------------

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
    return (curve, sum(sum(s["seconds"].values()) for steps, _ in runs for s in steps) / 60,
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
    """results.json, report.md and curves.png of a recipe, its table on the screen."""
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
    text = "\n".join("| " + " | ".join(line) + " |" for line in table)
    (out / "results.json").write_text(json.dumps({
        "recipe": name, "form": form, "seeds": seeds, "rows": record, "device": config["device_name"],
        "versions": config["versions"]}, indent=1))
    (out / "report.md").write_text(f"# Recipe {name}\n\n{about}\n\n{text}\n\n![curves](curves.png)\n",
                                   encoding="utf-8")
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    print("\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths))
                    for line in table if line[0] != "---"))
    print(f"\n{out}/report.md  {out}/results.json", end="")
    if plt := pyplot():
        (draw_students if recipe.table else draw_recipe)(plt, recipe, results, out / "curves.png")
        print(f"  {out}/curves.png", end="")
    print()


def draw_recipe(plt, recipe, results, path):
    """Left: the way of every row across the two axes, means over seeds. Right: where they end, enlarged."""
    (x_title, x_sets), (y_title, y_sets) = recipe.axes.items()
    figure, (way, ends) = plt.subplots(1, 2, figsize=(10.5, 4.6))
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    at = lambda scores, sets: 100 * statistics.mean(scores[name] for name in sets)
    for i, (row, found) in enumerate(results.items()):
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
