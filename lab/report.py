"""Reports: what a run looks like, from the files it left (metrics.jsonl, config.json, samples.jsonl)."""
import itertools
import json
import statistics
import sys
import textwrap
from pathlib import Path

from .diagnosis import EDGES
from data.files import read_lines


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


def read_diagnoses(out):
    """[(updates done, what lab/diagnosis.py found)] of a run folder."""
    return [(m["step"] + 1, m["diagnosis"]) for m in read_lines(Path(out) / "metrics.jsonl")
            if "diagnosis" in m]


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
    """OUT/report.md, OUT/curves.png and after --diagnose_every OUT/diagnosis.png of one run."""
    out = Path(out)
    config, (steps, evals) = json.loads((out / "config.json").read_text()), read_metrics(out)
    samples = read_lines(out / "samples.jsonl") if (out / "samples.jsonl").exists() else []
    gates = [line["gate"] for line in read_lines(out / "metrics.jsonl") if "gate" in line]
    diagnoses = read_diagnoses(out)
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
    if diagnoses:
        lines += ["## Diagnosis", "", *diagnosis_table(diagnoses), "", "![diagnosis](diagnosis.png)", ""]
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
        if diagnoses:
            draw_diagnosis(plt, diagnoses, out / "diagnosis.png")


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


def number(x, unit=1, form=".2g"):
    return "none" if x is None else f"{unit * x:{form}}"


def diagnosis_table(diagnoses):
    """Branch by branch and pair by pair, what the gradients were like on the way."""
    table = ["| after step | branch | hold the mass, % | coherence | its gain by selection, % | by chance, % "
             "| noise scale, rollouts | step | changes |", "|---" * 9 + "|"]
    pairs = ["| after step | branches | dot product | cosine |", "|---" * 4 + "|"]
    for step, found in diagnoses:
        for branch, b in found["branches"].items():
            taken = found.get("steps", {}).get(branch, {"step": None, "change": {}})
            changes = ", ".join(f"{name} {change:+.2g}" for name, change in taken["change"].items())
            cells = [step, branch, number(b["kept"] / b["rollouts"], 100, ".0f"),
                     number(b["coherence"]), number(b["gcg"], 100, "+.0f"),
                     number(b["gcg_random"], 100, "+.0f"), number(b["noise_scale"], form=".0f"),
                     number(taken["step"]), changes]
            table.append("| " + " | ".join(map(str, cells)) + " |")
        if (mixed := "+".join(found["branches"])) not in found["branches"] and "steps" in found:
            taken = found["steps"][mixed]
            changes = ", ".join(f"{name} {change:+.2g}" for name, change in taken["change"].items())
            table.append(f"| {step} | {mixed} |  |  |  |  |  | {number(taken['step'])} | {changes} |")
        pairs += [f"| {step} | {pair} | {p['dot']:.2g} ± {p['dot_error']:.1g} | {number(p['cosine'])} |"
                  for pair, p in found["pairs"].items()]
    return [*table, "", *([*pairs, ""] if len(pairs) > 2 else []),
            "What they mean: lab/diagnosis.py. By chance: the gain of as many rollouts taken at random. "
            "Changes: of the branches' losses by that branch's step, in nats to first order."]


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


def draw_diagnosis(plt, diagnoses, path):
    """Gradients over the steps, then how the gap is spread at the first and at the last diagnosis."""
    steps, found = zip(*diagnoses)
    branches, pairs = list(found[0]["branches"]), list(found[0]["pairs"])
    figure, axes = plt.subplots(2, 4, figsize=(14.4, 5.4))
    (cosine, coherent, gain, noise), (step, change, mass, spread) = axes

    def lines(axis, title, parts, unit=1):
        """parts: {(colour, style, label): a value per diagnosis, None where there is none}"""
        for (color, style, label), values in parts.items():
            if there := [(x, unit * y) for x, y in zip(steps, values) if y is not None]:
                axis.plot(*zip(*there), style, color=color, marker="o", markersize=3, label=label)
        axis.set(title=title, xlabel="updates done")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)

    of = lambda key: [[f["branches"][b][key] for f in found] for b in branches]
    colored = lambda style, word, values: {(f"C{i}", style, f"{b} {word}".strip()): v
                                           for i, (b, v) in enumerate(zip(branches, values))}
    lines(cosine, "cosine of the branches' gradients",
          {(f"C{i}", "-", pair): [f["pairs"][pair]["cosine"] for f in found] for i, pair in enumerate(pairs)})
    cosine.axhline(0, color="grey", linewidth=0.6)
    lines(coherent, "coherence", colored("-", "", of("coherence")) | colored(":", "selected",
                                                                             of("coherence_kept")))
    lines(gain, "coherence gain, %", colored("-", "selected", of("gcg")) | colored(":", "at random",
                                                                                   of("gcg_random")), 100)
    lines(noise, "noise scale, rollouts", colored("-", "", of("noise_scale")))
    if noise.get_legend_handles_labels()[0]:
        noise.set_yscale("log")
    if all("steps" in f for f in found):
        lines(step, "a step's size", {(f"C{i}", "-", name): [f["steps"][name]["step"] for f in found]
                                      for i, name in enumerate(found[0]["steps"])})
        lines(change, "change of a loss by a step, nats",
              {(f"C{i}", style, f"{loss} by {by}"): [f["steps"][by]["change"][loss] for f in found]
               for i, loss in enumerate(branches)
               for style, by in zip(itertools.cycle(("-", ":", "--", "-.")), branches)})
        change.axhline(0, color="grey", linewidth=0.6)
    names = [f"{a:g}" for a in EDGES]
    names = ["< " + names[0], *names[1:], "> " + names[-1]]
    for i, branch in enumerate(branches):
        for style, (at, f) in zip((":", "-"), (diagnoses[0], diagnoses[-1])):
            b, label = f["branches"][branch], f"{branch}, after {at}"
            if b["deciles"]:
                mass.plot(range(1, 11), [100 * share for share in b["deciles"]], style, color=f"C{i}",
                          label=label)
            tokens = sum(b["histogram"])
            spread.step(range(len(names)), [100 * n / tokens for n in b["histogram"]], style, where="mid",
                        color=f"C{i}", label=label)
    mass.set(title="gap mass by decile of rollouts, %", xlabel="decile, largest first")
    spread.set(title="gap of the tokens, %", yscale="symlog", xlabel="up to nats")
    spread.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    spread.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
