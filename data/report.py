"""Reports: what a run or a recipe's table looks like, from the files it left (metrics.jsonl, config.json)."""
import json
import statistics
import sys
import textwrap
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
    samples = read_lines(out / "samples.jsonl") if (out / "samples.jsonl").exists() else []
    name = lambda path: "/".join(Path(path).parts[-2:])
    teachers = " and ".join(dict.fromkeys(map(name, config["teachers"].values())))
    lines = [f"# {name(config['student'])}" + f" taught by {teachers}" * bool(teachers)
             + f": {config['method']}, {config['loss']}", "", about_run(config, steps), ""]
    if evals:
        lines += ["## Accuracy", "", *accuracy_table(evals), "",
                  f"In %, on {', '.join(f'`{path}`' for path in config['eval_prompts'].values())}; "
                  f"{config['eval_rollouts']} completion(s) per prompt at temperature "
                  f"{config['eval_temperature']:g}.", ""]
    lines += ["## Training", "", *change_table(steps), "", "![curves](curves.png)", "", "## The model", "",
              "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
              f'model = AutoModelForCausalLM.from_pretrained("{out}/final", dtype="auto")',
              f'tokenizer = AutoTokenizer.from_pretrained("{out}/final")', "```", ""]
    if config.get("lora_rank"):
        lines += [f"`{out}/adapter` is the adapter alone, for `peft.PeftModel.from_pretrained` on "
                  f"`{config['student']}`.", ""]
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
    parts = {name: sum(s["seconds"].get(name, 0) for s in steps) for name in steps[-1]["seconds"]}
    total = max(sum(parts.values()), 1e-9)
    memory = " ".join(f"{name} {max(s.get('memory_gib_by_part', {}).get(name, 0) for s in steps):.1f}"
                      for name in steps[-1].get("memory_gib_by_part", {}))
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
    tokens, peak = steps[-1]["sampled_tokens"], max(s["memory_gib"] for s in steps)
    return (f"{len(steps)} steps with {tokens:,} sampled tokens in {total / 60:.1f} minutes ({shares}); "
            f"peak memory {peak:.1f} GiB" + f" ({memory})" * bool(memory)
            + f". {config['device_name']}, {config['dtype']}, seed {config['seed']}, {config['started']}.")


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


def series(steps, key):
    """{branch: (steps, values)} of a metric; steps that mix branches say it for each of them."""
    out = {}
    for s in steps:
        for branch, line in s.get("branches", {s["branch"]: s}).items():
            if key in line:
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
              ("accuracy of the rollouts, %", {"reward": ""}, 100)]
    panels = [panel for panel in panels if any(series(steps, key) for key in panel[1])]
    if any(title.startswith("divergence") for title, *_ in panels):
        panels = [panel for panel in panels if "log p(y)" not in panel[0]]
    count = len(panels) + bool(evals) + bool(names := list(steps[-1]["seconds"]))
    columns = min(count, 3) if count <= 6 else 4
    figure, axes = plt.subplots(-(-count // columns), columns, squeeze=False,
                                figsize=(3.6 * columns, 2.7 * -(-count // columns)))
    axes, window = list(axes.flat), max(len(steps) // 20, 1)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (title, keys, unit) in zip(axes, panels):
        for (key, word), style in zip(keys.items(), ("-", ":")):
            for color, (branch, (xs, ys)) in zip(colors, (found := series(steps, key)).items()):
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
        axis = axes[count - 1]
        axis.stackplot([s["step"] + 1 for s in steps],
                       [smooth([s["seconds"].get(name, 0) for s in steps], window) for name in names],
                       labels=names, alpha=0.7)
        axis.set_title("seconds per step")
        axis.legend(fontsize=7)
    for axis in axes[:count]:
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[count:]:
        axis.axis("off")
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
