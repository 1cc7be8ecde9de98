"""Reports: what a run or a recipe's table looks like, from the files it left (metrics.jsonl, config.json)."""
import json
import statistics
import sys
from pathlib import Path

from .files import read_lines


def read_metrics(out):
    """(steps, evals) of a run folder: the lines with losses, and [(updates done, {set: accuracy})]."""
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
    lines = [f"# {config['method']} with {config['loss']}: {config['student']}", "",
             f"{len(steps)} steps on {config['device_name']}, started {config['started']}, "
             f"seed {config['seed']}, {steps[-1]['sampled_tokens']:,} tokens sampled, "
             f"{sum(sum(s['seconds'].values()) for s in steps) / 60:.1f} minutes, "
             f"peak memory {max(s['memory_gib'] for s in steps):.1f} GiB.", ""]
    if evals:
        names = list(dict.fromkeys(name for _, scores in evals for name in scores))
        lines += ["| after step | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {step} | " + " | ".join(f"{100 * scores[n]:.1f}" if n in scores else "not run"
                                            for n in names) + " |" for step, scores in evals]
        lines += ["", f"Accuracy in %, {config['eval_rollouts']} completion(s) per prompt at temperature "
                  f"{config['eval_temperature']:g}.", ""]
    lines += ["![curves](curves.png)", "", "## Last samples", ""]
    for sample in read_lines(out / "samples.jsonl")[-4:] if (out / "samples.jsonl").exists() else []:
        gap = "" if sample["gap"] is None else f" (mean gap {sample['gap']:+.2f})"
        lines += [f"step {sample['step'] + 1}, {sample['branch']}{gap}:", "", "```json",
                  json.dumps({"prompt": sample["prompt"][-300:], "completion": sample["completion"][:600]},
                             ensure_ascii=False, indent=1), "```", ""]
    settings = {k: v for k, v in config.items() if k not in ("versions", "started", "device_name")}
    lines += ["", "## Settings", "", "```json", json.dumps(settings, indent=1), "```", "",
              json.dumps(config["versions"])]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if plt := pyplot():
        draw_run(plt, steps, evals, out / "curves.png")


def draw_run(plt, steps, evals, path):
    panels = [("divergence, nats per token", ["value"]), ("gap: log q(y) - log p(y)", ["gap", "abs_gap"]),
              ("completion length, tokens", ["length"]), ("-log p(y)", ["logprob_s"])]
    panels = [(title, [k for k in keys if k in steps[-1]]) for title, keys in panels]
    panels = [(title, keys) for title, keys in panels if keys][:3]
    figure, axes = plt.subplots(1, len(panels) + bool(evals), figsize=(3.6 * (len(panels) + bool(evals)), 3),
                                squeeze=False)
    branches = list(dict.fromkeys(s["branch"] for s in steps))              # alternating ones get a line each
    for axis, (title, keys) in zip(axes[0], panels):
        for key, branch in ((key, branch) for key in keys for branch in branches):
            some = [s for s in steps if key in s and s["branch"] == branch]
            label = " ".join([key] * (len(keys) > 1) + [branch] * (len(branches) > 1))
            sign = -1 if key == "logprob_s" else 1
            axis.plot([s["step"] + 1 for s in some], [sign * s[key] for s in some], linewidth=1, label=label)
            if label:
                axis.legend()
        axis.set_title(title)
        axis.set_xlabel("step")
    if evals:
        axis = axes[0][-1]
        for name in dict.fromkeys(name for _, scores in evals for name in scores):
            points = [(step, 100 * scores[name]) for step, scores in evals if name in scores]
            axis.plot(*zip(*points), marker="o", markersize=3, label=name)
        axis.set(title="accuracy, %", xlabel="step", ylim=(-3, 103))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


# ---- recipes -----------------------------------------------------------------------------------------------

def collect(recipe, out, seeds):
    """{row: {"curve": [per seed: [(step, scores)]], "minutes": [..], ..}} of a recipe's runs."""
    results = {}
    for row in recipe.rows:
        runs = [read_metrics(out / f"seed{seed}" / row) for seed in range(seeds)]
        results[row] = {
            "curve": [evals for _, evals in runs],
            "minutes": [sum(sum(s["seconds"].values()) for s in steps) / 60 for steps, _ in runs],
            "sampled_tokens": [steps[-1]["sampled_tokens"] for steps, _ in runs]}
    return results


def mean_spread(values):
    """Mean and standard deviation over seeds; a single seed has no spread."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def cell(mean, spread):
    return f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def write_recipe(name, recipe, out, seeds, form):
    """results.json, report.md and curves.png of a recipe, its table on the screen."""
    results = collect(recipe, out, seeds)
    expected = recipe.expected.get(form, {})
    header = ["", *recipe.columns.values(), "minutes"]
    table, record = [header, ["---"] * len(header)], {}
    for row, found in results.items():
        cells, record[row] = [], {}
        for i, column in enumerate(recipe.columns):
            values = [100 * curve[-1][1][column] for curve in found["curve"]]
            record[row][column] = values
            wanted = f" (expected {cell(*expected[row][i])})" if row in expected else ""
            cells.append(cell(*mean_spread(values)) + wanted)
        record[row] |= {"minutes": found["minutes"], "sampled_tokens": found["sampled_tokens"]}
        table.append([row, *cells, f"{statistics.mean(found['minutes']):.1f}"])
    config = json.loads((out / "seed0" / next(iter(recipe.rows)) / "config.json").read_text())
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
        draw_recipe(plt, recipe, results, out / "curves.png")
        print(f"  {out}/curves.png", end="")
    print()


def draw_recipe(plt, recipe, results, path):
    """Left: the way of every row across the two axes, means over seeds. Right: where they end, enlarged."""
    (x_title, x_sets), (y_title, y_sets) = recipe.axes.items()
    figure, (way, ends) = plt.subplots(1, 2, figsize=(10.5, 4.6))
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    at = lambda scores, sets: 100 * statistics.mean(scores[name] for name in sets)
    for i, (row, found) in enumerate(results.items()):
        points = list(zip(*found["curve"]))                     # evaluation -> one (step, scores) per seed
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
