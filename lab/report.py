"""Reports: what one run looks like, written from the files that it left.

Reads config.json and the logs (metrics, samples, eval) of a run's folder, and writes report.md and pictures
there.
"""
import functools
import itertools
import json
import math
import statistics
import sys
import textwrap
from pathlib import Path

from config import Refused
from data.files import read_lines, write_file

SAMPLES = 2, 3                      # how many of the first and of the last samples a report shows


def read_metrics(out):
    """Return (steps, evals) of a run's folder: the lines with a loss, and [(updates done, {set: accuracy})].

    In a run of two students the sets are called "1/set" and "2/set".
    """
    lines = read_lines(Path(out) / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    evals = [(line["step"] + 1, line["eval"]) for line in lines if line.get("eval")]
    return steps, evals


def read_answers(out):
    """Return {updates done: {set: records}} of a run's eval.jsonl, which has a record per question."""
    found = {}
    for record in read_lines(Path(out) / "eval.jsonl", "step"):
        if not {"set", "row", "question", "rewards", "cut", "unread"} <= record.keys():
            raise Refused(f"{out}/eval.jsonl has a line that is no record of a question: {str(record)[:80]}")
        found.setdefault(record["step"] + 1, {}).setdefault(record["set"], []).append(record)
    return found


def read_diagnoses(out):
    """Return [(updates done, what lab/diagnosis.py found)] of a run's folder."""
    lines = read_lines(Path(out) / "metrics.jsonl")
    return [(line["step"] + 1, line["diagnosis"]) for line in lines if "diagnosis" in line]


def pyplot():
    """Return matplotlib's pyplot without a display, or None after a hint: pictures are optional."""
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


def save_figure(plt, figure, path):
    """Write a figure to a file and free its memory."""
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


# ---- the report of a run -----------------------------------------------------------------------------------

def write_run(out):
    """Write OUT/report.md and OUT/curves.png, and after --diagnose_every also OUT/diagnosis.png."""
    out = Path(out)
    config = json.loads((out / "config.json").read_text())
    steps, evals = read_metrics(out)
    diagnoses = read_diagnoses(out)
    gates = [line["gate"] for line in read_lines(out / "metrics.jsonl") if "gate" in line]
    samples = read_lines(out / "samples.jsonl") if (out / "samples.jsonl").exists() else []

    if not steps and not config.get("eval_only"):
        return write_file(out / "report.md", f"{title(config)}\n\nmetrics.jsonl has no step.\n")
    blocks = [title(config), about_run(config, steps)] if steps else [title(config)]
    if evals:
        blocks += ["## Accuracy", accuracy_table(evals), about_accuracy(config)]
    if answers := read_answers(out):
        blocks += [answers_table(answers), ABOUT_ANSWERS]
    if not steps:
        return write_file(out / "report.md", "\n\n".join(blocks + settings(config)) + "\n")
    if gates:
        blocks += ["## Rounds", gate_table(gates), about_gates(config), *break_table(gates)]
    if rounds := [line["round"] for line in steps if "round" in line]:
        blocks += ["## Rounds", round_table(rounds)]
    if any("feedback" in step for step in steps):
        blocks += ["## Feedback", feedback_table(steps)]
    blocks += ["## Training", *change_tables(steps), *about_skipped(steps), *about_warnings(steps)]
    if diagnoses:
        blocks += ["## Diagnosis", *diagnosis_tables(diagnoses), "![diagnosis](diagnosis.png)"]
    blocks += ["![curves](curves.png)", *about_models(config, out), "## Samples"]
    first, last = SAMPLES
    for sample in [*samples[:first], *samples[first:][-last:]]:
        blocks += sample_blocks(sample)
    blocks += settings(config)
    if plt := pyplot():
        draw_run(plt, steps, evals, out / "curves.png")
        if diagnoses:
            draw_diagnosis(plt, diagnoses, out / "diagnosis.png")
    write_file(out / "report.md", "\n\n".join(blocks) + "\n")      # last: a recipe's row that has it is done


def markdown_table(rows):
    """Return a table in Markdown. The first row is the header; every cell is text or a number.

    A | in a cell, as in KL(p || q), would begin another one.
    """
    header, *others = ["| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |"
                       for row in rows]
    return "\n".join([header, "| " + " | ".join(["---"] * len(rows[0])) + " |", *others])


def indented(text):
    """Return a text as a code block of Markdown, whatever the text holds."""
    return textwrap.indent("\n".join(text.splitlines()), "    ", lambda line: True)


def title(config):
    """Return the report's heading: who learned, from whom, by which method and loss."""
    def name(path):
        return "/".join(Path(path).parts[-2:])
    students = " and ".join(map(name, config["student"]))
    teachers = " and ".join(dict.fromkeys(map(name, config["teachers"].values())))
    taught = ""
    if teachers:
        taught = f" taught by {teachers}"
    elif len(config["student"]) > 1:
        taught = " tutoring each other"
    learned = "evaluation" if config.get("eval_only") else f"{config['method']}, {config['loss']}"
    return f"# {students}{taught}: {learned}"


def about_run(config, steps):
    """Return one paragraph: how many steps and tokens, how long, where the time went, how much memory."""
    seconds = {name: sum(step["seconds"].get(name, 0) for step in steps) for name in timed_parts(steps)}
    total = max(sum(seconds.values()), 1e-9)
    shares = ", ".join(f"{name} {part / total:.0%}" for name, part in seconds.items())
    tokens = f"{steps[-1]['sampled_tokens']:,} sampled tokens"
    if feedback := sum(step.get("feedback_tokens", 0) for step in steps):
        tokens += f" and {feedback:,} of feedback"
    memory = f"peak memory {max(step['memory_gib'] for step in steps):.1f} GiB"
    peaks = {name: max(step.get("memory_gib_by_part", {}).get(name, 0) for step in steps)
             for name in steps[-1].get("memory_gib_by_part", {})}
    if peaks:
        memory += " (" + " ".join(f"{name} {peak:.1f}" for name, peak in peaks.items()) + ")"
    return (f"{len(steps)} steps with {tokens} in {total / 60:.1f} minutes ({shares}); {memory}. "
            f"{config['device_name']}, {config['dtype']}, seed {config['seed']}, {config['started']}.")


def timed_parts(steps):
    """Return the names of the parts that took time in any step, in the order of their appearance."""
    return list(dict.fromkeys(name for step in steps for name in step["seconds"]))


def accuracy_table(evals):
    """Return a table with a row per evaluation and a column per set, and the change from first to last."""
    names = list(dict.fromkeys(name for _, scores in evals for name in scores))
    rows = [["after step", *names]]
    for step, scores in evals:
        rows.append([step, *(f"{100 * scores[name]:.1f}" if name in scores else "not run" for name in names)])
    if len(evals) > 1:
        first, last = evals[0][1], evals[-1][1]
        rows.append(["change", *(f"**{100 * (last[name] - first[name]):+.1f}**"
                                 if name in first and name in last else "" for name in names)])
    return markdown_table(rows)


def about_accuracy(config):
    """Return on which prompts the accuracy was measured, and how completions were sampled for it."""
    files = ", ".join(f"`{path}`" for path in config["eval_prompts"].values())
    top_p = f", top_p {config['eval_top_p']:g}" if config["eval_top_p"] < 1 else ""
    return (f"In %, on {files}; {config['eval_rollouts']} completion(s) per prompt at temperature "
            f"{config['eval_temperature']:g}{top_p}.")


ABOUT_ANSWERS = (
    "In %, with a 95% interval over questions: Wilson's, for as many questions as would give the variance "
    "that the questions' values have. pass@k: of k completions of a question one is right (reward 1), the "
    "unbiased estimate of Chen et al., 2107.03374. Cut: completions that did not end; unread: those in which "
    "the grader found nothing to grade, as far as it can say.")


def answers_table(answers):
    """Return a table with a row per set at the first and the last evaluation. answers: of read_answers."""
    rewards = [r["rewards"] for sets in answers.values() for some in sets.values() for r in some]
    ks = sorted({k for of_question in rewards for k in some_ks(len(of_question))})
    if all(reward in (0, 1) for of_question in rewards for reward in of_question):
        ks.remove(1)                                        # the mean is pass@1
    rows = [["after step", "set", "questions", "mean", *(f"pass@{k}" for k in ks), "cut", "unread"]]
    for step in dict.fromkeys([min(answers), max(answers)]):
        for name, some in answers[step].items():
            of_k = [[pass_at(k, r["rewards"]) for r in some if len(r["rewards"]) >= k] for k in ks]
            counts = [f"{sum(sum(r[what]) for r in some):,} of {sum(len(r[what]) for r in some):,}"
                      for what in ("cut", "unread")]
            means = [statistics.mean(r["rewards"]) for r in some]
            rows.append([step, name, len(some), with_interval(means), *map(with_interval, of_k), *counts])
    return markdown_table(rows)


def some_ks(most):
    """Return the k of pass@k that are shown: powers of 2 up to the completions of a question, and these."""
    return {2**i for i in range(most.bit_length())} | {most}


def pass_at(k, rewards):
    """Return the chance that of k of these completions one has reward 1: 1 - C(n - c, k) / C(n, k)."""
    wrong = sum(reward < 1 for reward in rewards)
    return 1 - math.comb(wrong, k) / math.comb(len(rewards), k)


def interval(values):
    """Return the ends of the 95% interval of a mean of values in [0, 1], one per question (ABOUT_ANSWERS)."""
    p, variance, z = statistics.mean(values), statistics.pvariance(values), 1.96
    n = len(values) * (p * (1 - p) / variance if variance else 1)
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


def with_interval(values):
    """Return a mean in % with its interval, as in "50.0 [23.7, 76.3]"; "" without values."""
    if not values:
        return ""
    low, high = interval(values)
    return f"{100 * statistics.mean(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def change_tables(steps):
    """Return a table of the changes during training, one for each student and for branches in turn."""
    blocks = []
    for tutee in sorted({step.get("tutee", 0) for step in steps}):
        own = [step for step in steps if step.get("tutee", 0) == tutee]
        for branch in dict.fromkeys(step["branch"] for step in own):        # steps may alternate
            some = [step for step in own if step["branch"] == branch]
            titles = [f"Student {tutee}"] * bool(tutee) + [branch] * (len(some) < len(own))
            if titles:
                blocks.append(f"{', '.join(titles)}, {len(some)} steps:")
            blocks.append(change_table(some))
    return blocks


# metric -> (its name in the report, the factor that turns it into the unit of that name)
CHANGES = {"value": ("divergence, nats per token", 1), "gap": ("gap log q(y) - log p(y), nats", 1),
           "abs_gap": ("size of the gap, nats", 1), "entropy_s": ("student's entropy, nats", 1),
           "entropy_t": ("teacher's entropy, nats", 1), "top1_agree": ("same most likely token, %", 100),
           "logprob_s": ("log p(y), nats", 1), "reward": ("accuracy of the rollouts, %", 100),
           "solved": ("prompts with a correct rollout, %", 100),
           "dpo_loss": ("loss of a pair", 1),
           "margin": ("margin of the chosen completion, nats", 1),
           "preferred": ("pairs in which the chosen one is preferred, %", 100),
           "reward_chosen": ("reward of the chosen completion, nats", 1),
           "reward_rejected": ("reward of the rejected completion, nats", 1),
           "length_chosen": ("its length, tokens", 1),
           "length_rejected": ("length of the rejected one, tokens", 1),
           "length": ("completion length, tokens", 1), "cut": ("completions that did not end, %", 100),
           "repeated": ("3-grams that repeat earlier ones, %", 100),
           "saturated": ("divergence out of reach, %", 100)}


def change_table(steps):
    """Return a table that compares the first and the last tenth of the training."""
    tenth = max(len(steps) // 10, 1)
    steps_word = "step" if tenth == 1 else f"{tenth} steps"
    rows = [["mean of", f"first {steps_word}", f"last {steps_word}"]]
    for key, (name, unit) in CHANGES.items():
        first = [step[key] for step in steps[:tenth] if key in step]
        last = [step[key] for step in steps[-tenth:] if key in step]
        if first and last:
            rows.append([name, *(f"{unit * statistics.mean(values):.3g}" for values in (first, last))])
    return markdown_table(rows)


def about_models(config, out):
    """Return how to load what the run has trained."""
    students = config["student"]
    several = len(students) > 1
    folders = [f"/{i}" for i in range(1, len(students) + 1)] if several else [""]
    final = f"{out}/final{folders[0]}"
    blocks = ["## The models" if several else "## The model", "\n".join([
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{final}", dtype="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{final}")', "```"])]
    if config.get("lora_rank"):
        for folder, student in zip(folders, students):
            blocks.append(f"`{out}/adapter{folder}` is the adapter alone, for `peft.PeftModel."
                          f"from_pretrained` on `{student}`.")
    return blocks


def sample_blocks(sample):
    """Return a rollout of samples.jsonl: what is known about it, its prompt and its completion."""
    facts = [f"step {sample['step'] + 1}", sample["branch"]]
    if sample["gap"] is not None:
        facts.append(f"mean gap {sample['gap']:+.2f}")
    if sample["reward"] is not None:
        facts.append(f"reward {sample['reward']:g}")
    if not sample["selected"]:
        facts.append("not selected")
    return [", ".join(facts) + ":", indented(sample["prompt"][-400:]), "gets",
            indented(sample["completion"][:800] or "(nothing)")]


def settings(config):
    """Return every setting of the run, and the versions that it ran with."""
    shown = {key: value for key, value in config.items()
             if key not in ("versions", "started", "device_name")}
    versions = ", ".join(f"{package} {version}" for package, version in config["versions"].items())
    return ["## Settings", "```json\n" + json.dumps(shown, indent=1) + "\n```", versions]


# ---- methods with rounds, skipped prompts ------------------------------------------------------------------

def round_table(rounds):
    """Return a table of what a method noted at the start of every round: {what: number, or None}."""
    cell = lambda x: "none" if x is None else f"{x:.3g}" if isinstance(x, float) else x
    return markdown_table([["round", *rounds[0]],
                           *([i, *map(cell, noted.values())] for i, noted in enumerate(rounds, 1))])


def about_skipped(steps):
    """Return how many steps, and prompts or texts of a method, were left out, by reason, in a list."""
    dropped = sum(step["loss"] is None for step in steps)
    total = {"a step with a loss or gradient that is not a number": dropped} if dropped else {}
    for step in steps:
        for reason, count in step.get("skipped", {}).items():
            total[reason] = total.get(reason, 0) + count
    counts = ", ".join(f"{count:,} x {reason}" for reason, count in total.items())
    return [f"Left out, as they teach nothing: {counts}."] if total else []


def about_warnings(steps):
    """Return what the run has warned of (data/monitor.py), as sentences in a list."""
    return [f"Warning after step {step['step'] + 1}: {words}." for step in steps
            for words in step.get("warnings", [])]


# ---- co-distillation: rounds and feedback ------------------------------------------------------------------

def gate_table(gates):
    """Return a table of what the gate saw, and where it let each student give feedback."""
    sets = list(gates[0]["scores"][0])
    scored = [f"{student}/{name}" for student in (1, 2) for name in sets]
    rows = [["round", *scored, "gap of 1", "gap of 2", "1 tutors", "2 tutors"]]
    for gate in gates:
        scores = [f"{100 * of_student[name]:.1f}" for of_student in gate["scores"] for name in sets]
        gaps = [f"{gap:.3f}" for gap in gate["gaps"]]
        tutors = [", ".join(domains) or "nothing" for domains in gate["tutors"]]
        rows.append([gate["round"] + 1, *scores, *gaps, *tutors])
    return markdown_table(rows)


def about_gates(config):
    """Return how to read the table of rounds."""
    return ("Accuracy on the validation prompts in %. A student's gap is the sum over sets of its relative "
            f"shortfall from the better one; up to {config.get('tau', 0):g} it counts as cognizant. "
            f"Who tutors where: `--gate {config.get('gate')}`.")


def break_table(gates):
    """Return the break-rates and what they are, or nothing where nobody measured them.

    A break-rate is the share of correct rollouts that the tutee gets wrong once it has read the feedback.
    """
    measured = []
    for gate in gates:
        for counts, cognizant in zip(gate.get("broken") or [], gate["cognizant"]):
            if counts:
                measured.append((counts, cognizant))
    if not measured:
        return []
    rows = [["tutors", "correct rollouts", "wrong with feedback, %", "wrong without, %"]]
    for name, wanted in (("cognizant", True), ("incognizant", False)):
        some = [counts for counts, cognizant in measured if cognizant == wanted]
        correct, *broken = [sum(counts[key] for counts in some)
                            for key in ("correct", "broken", "broken_without")]
        rows.append([name, correct, *(f"{100 * n / correct:.1f}" if correct else "not run" for n in broken)])
    return [markdown_table(rows),
            "Break-rate: once correct rollouts, answered once more with the tutor's feedback and without."]


def feedback_table(steps):
    """Return a table of what became of each tutor's feedback.

    A step names its tutee, who reads the feedback; the tutor, who wrote it, is the other student.
    """
    counts = {1: {}, 2: {}}
    for step in steps:
        for reason, count in step.get("feedback", {}).items():
            of_tutor = counts[3 - step["tutee"]]
            of_tutor[reason] = of_tutor.get(reason, 0) + count
    totals = [sum(of_tutor.values()) for of_tutor in counts.values()]
    reasons = {reason for of_tutor in counts.values() for reason in of_tutor}
    rows = [["%", "from student 1", "from student 2"]]
    for reason in sorted(reasons, key=lambda reason: (reason != "kept", reason)):
        shares = [f"{100 * of_tutor.get(reason, 0) / total:.1f}" if total else "none"
                  for of_tutor, total in zip(counts.values(), totals)]
        rows.append([reason, *shares])
    return markdown_table([*rows, ["texts", *totals]])


# ---- the diagnosis -----------------------------------------------------------------------------------------

def diagnosis_tables(diagnoses):
    """Return a table by branch and one by pair of branches, and how to read them."""
    rows = [["after step", "branch", "hold the mass, %", "coherence", "its gain by selection, %",
             "by chance, %", "noise scale, rollouts", "step", "changes"]]
    pairs = [["after step", "branches", "dot product", "cosine"]]
    for step, found in diagnoses:
        taken = found.get("steps", {})              # absent with --diagnose_layers
        for branch, b in found["branches"].items():
            rows.append([step, branch, format_number(b["kept"] / b["rollouts"], 100, ".0f"),
                         format_number(b["coherence"]), format_number(b["gcg"], 100, "+.0f"),
                         format_number(b["gcg_random"], 100, "+.0f"),
                         format_number(b["noise_scale"], form=".0f"), *step_cells(taken.get(branch))])
        mixture = "+".join(found["branches"])
        if mixture in taken and mixture not in found["branches"]:
            rows.append([step, mixture, "", "", "", "", "", *step_cells(taken[mixture])])
        for pair, p in found["pairs"].items():
            product = f"{p['dot']:.2g} ± {p['dot_error']:.1g}"
            pairs.append([step, pair, product, format_number(p["cosine"])])
    tables = [rows, pairs] if len(pairs) > 1 else [rows]
    return [*map(markdown_table, tables),
            "What they mean: lab/diagnosis.py. By chance: the gain of as many rollouts taken at random. "
            "Changes: of the branches' losses by that branch's step, in nats to first order."]


def step_cells(taken):
    """Return two cells: the size of a branch's step, and what it does to every branch's loss."""
    if taken is None:
        return ["none", ""]
    changes = ", ".join(f"{name} {change:+.2g}" for name, change in taken["change"].items())
    return [format_number(taken["step"]), changes]


def format_number(value, unit=1, form=".2g"):
    """Return a number as text, in a unit; "none" where it is not defined."""
    return "none" if value is None else f"{unit * value:{form}}"


# ---- the picture of a run ----------------------------------------------------------------------------------

# (title, {metric: its word in the legend}, the factor that turns it into the unit of the title)
PANELS = [("divergence, nats per token", {"value": ""}, 1),
          ("gap, nats", {"gap": "mean", "abs_gap": "size"}, 1),
          ("entropy, nats", {"entropy_s": "student", "entropy_t": "teacher"}, 1),
          ("-log p(y), nats per token", {"logprob_s": ""}, -1),
          ("completion length, tokens", {"length": ""}, 1),
          ("3-grams that repeat earlier ones, %", {"repeated": ""}, 100),
          ("divergence out of reach, %", {"saturated": ""}, 100),
          ("accuracy of the rollouts, %", {"reward": ""}, 100),
          ("prompts with a correct rollout, %", {"solved": ""}, 100),
          ("reward, nats", {"reward_chosen": "chosen", "reward_rejected": "rejected"}, 1),
          ("chosen completion is preferred, %", {"preferred": ""}, 100),
          ("correct rollouts of drawn problems, %",
           {"pass_rate": "in this round", "pass_rate_at_first": "when first probed"}, 100),
          ("weight of a teacher's rationales", {"of_teacher": ""}, 1),
          ("feedback that is kept, %", {"kept_feedback": ""}, 100)]


def draw_run(plt, steps, evals, path):
    """Draw a panel for every metric that the run has, for its evaluations and for its time."""
    drawings = plan_panels(steps, evals)
    columns = min(len(drawings), 3) if len(drawings) <= 6 else 4
    lines = -(-len(drawings) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=(3.6 * columns, 2.7 * lines))
    for axis, draw in zip(axes.flat, drawings):
        draw(axis)
    for axis in axes.flat[len(drawings):]:
        axis.axis("off")
    save_figure(plt, figure, path)


def plan_panels(steps, evals):
    """Return a function for every panel of a run's picture; it draws on the axis that it is given."""
    lines = [*steps, *feedback_shares(steps), *teacher_weights(steps)]
    window = max(len(steps) // 20, 1)
    panels = [panel for panel in PANELS if any(series(lines, key) for key in panel[1])]
    if PANELS[0] in panels and PANELS[3] in panels:
        panels.remove(PANELS[3])                    # where there is a divergence, the likelihood says little
    drawings = [functools.partial(draw_metric, lines=lines, panel=panel, window=window) for panel in panels]
    if evals:
        drawings.append(functools.partial(draw_accuracy, evals=evals))
    if timed_parts(steps):
        drawings.append(functools.partial(draw_seconds, steps=steps, window=window))
    sets = sets_of_both_students(steps, evals)
    if len(sets) == 2:
        drawings.append(functools.partial(draw_trajectories, evals=evals, sets=sets))
    return drawings


def sets_of_both_students(steps, evals):
    """Return the names of the evaluation sets in a run of two students, less their "1/" or "2/"."""
    if not any("tutee" in step for step in steps):
        return []
    names = [name for _, scores in evals for name in scores if name.startswith(("1/", "2/"))]
    return list(dict.fromkeys(name.partition("/")[2] for name in names))


def series(steps, key):
    """Return {branch: (steps, values)} of a metric. A step that mixes branches tells it for each of them.

    A metric of the whole step is of branch "all". Of two students a branch is "1/branch" or "2/branch".
    """
    out = {}
    for step in steps:
        lines = step.get("branches", {step["branch"]: step})
        if key in step and not any(key in line for line in lines.values()):
            lines = {"all": step}
        for branch, line in lines.items():
            if key in line:
                name = f"{step['tutee']}/{branch}" if "tutee" in step else branch
                xs, ys = out.setdefault(name, ([], []))
                xs.append(step["step"] + 1)
                ys.append(line[key])
    return out


def feedback_shares(steps):
    """Return, per step with feedback, {"step", "branch": its tutor, "kept_feedback": the share kept}."""
    shares = []
    for step in steps:
        if total := sum(step.get("feedback", {}).values()):
            shares.append({"step": step["step"], "branch": f"from {3 - step['tutee']}",
                           "kept_feedback": step["feedback"].get("kept", 0) / total})
    return sorted(shares, key=lambda share: share["branch"])        # for the colours: student 1 first


def teacher_weights(steps):
    """Return, per step and teacher of compact, {"step", "branch": the teacher, "of_teacher": its weight}."""
    return [{"step": step["step"], "branch": name, "of_teacher": weight}
            for step in steps for name, weight in step.get("teacher_weight", {}).items()]


def moving_mean(values, window):
    """Return the mean over the last `window` values at every place, or over as many as there are."""
    return [statistics.mean(values[max(0, i + 1 - window):i + 1]) for i in range(len(values))]


def draw_metric(axis, lines, panel, window):
    """Draw every step pale and a moving mean strong: one colour per branch, one line style per metric."""
    heading, words, unit = panel
    for (key, word), style in zip(words.items(), ("-", ":")):
        found = series(lines, key)
        for i, (branch, (xs, ys)) in enumerate(found.items()):
            ys, color = [unit * y for y in ys], f"C{i % 10}"
            label = " ".join([branch] * (len(found) > 1) + [word] * bool(word))
            axis.plot(xs, ys, color=color, linewidth=0.8, alpha=0.25 if window > 1 else 0)
            axis.plot(xs, moving_mean(ys, window), style, color=color, linewidth=1.5, label=label)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    if "%" in heading:
        axis.set_ylim(0)
    over_steps(axis, heading)


def draw_accuracy(axis, evals):
    """Draw the accuracy of every evaluation set over the steps."""
    for name in dict.fromkeys(name for _, scores in evals for name in scores):
        points = [(step, 100 * scores[name]) for step, scores in evals if name in scores]
        axis.plot(*zip(*points), marker="o", markersize=3, label=name)
    axis.set_ylim(0)
    axis.legend(fontsize=7)
    over_steps(axis, "accuracy in evaluation, %")


def draw_seconds(axis, steps, window):
    """Draw how long the parts of a step took, one above the other."""
    names = timed_parts(steps)
    seconds = [moving_mean([step["seconds"].get(name, 0) for step in steps], window) for name in names]
    axis.stackplot([step["step"] + 1 for step in steps], seconds, labels=names, alpha=0.7)
    axis.legend(fontsize=7)
    over_steps(axis, "seconds per step")


def over_steps(axis, heading):
    """Give a panel its title and a horizontal axis of whole steps."""
    axis.set(title=heading, xlabel="step")
    axis.xaxis.get_major_locator().set_params(integer=True)


def draw_trajectories(axis, evals, sets):
    """Draw both students' trajectories across the two evaluation sets, an arrow per evaluation."""
    for student, color in ((1, "C0"), (2, "C1")):
        x_name, y_name = (f"{student}/{name}" for name in sets)
        points = [(100 * scores[x_name], 100 * scores[y_name]) for _, scores in evals
                  if x_name in scores and y_name in scores]
        axis.plot([x for x, _ in points], [y for _, y in points], "o", color=color, markersize=3,
                  label=f"student {student}")
        for start, end in zip(points, points[1:]):
            arrow(axis, start, end, color)
    axis.set(title="the students' trajectories", xlabel=f"{sets[0]}, %", ylabel=f"{sets[1]}, %")
    axis.legend(fontsize=7)


def arrow(axis, start, end, color):
    """Draw an arrow between two points of a panel."""
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="->", color=color, linewidth=1.2, shrinkA=0,
                                                  shrinkB=0))


# ---- the picture of a diagnosis ----------------------------------------------------------------------------

def draw_diagnosis(plt, diagnoses, path):
    """Draw the gradients over the steps, and how the gap is spread at the first and the last diagnosis."""
    steps, found = [step for step, _ in diagnoses], [one for _, one in diagnoses]
    figure, (above, below) = plt.subplots(2, 4, figsize=(14.4, 5.4))
    draw_gradients(above, steps, found)
    draw_trial_steps(below[:2], steps, found)
    draw_gaps(below[2:], diagnoses[0], diagnoses[-1])
    save_figure(plt, figure, path)


def draw_curve(axis, steps, values, color, label, style="-"):
    """Draw one number over the diagnoses, where it is defined."""
    points = [(step, value) for step, value in zip(steps, values) if value is not None]
    if points:
        axis.plot(*zip(*points), style, color=color, marker="o", markersize=3, label=label)


def over_updates(axis, heading):
    """Give a panel its title, and a legend if it shows anything."""
    axis.set(title=heading, xlabel="updates done")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def draw_gradients(axes, steps, found):
    """Draw what the gradients of pairs of branches and of single branches were like, on four panels."""
    cosine, coherence, gain, noise = axes
    for i, pair in enumerate(found[0]["pairs"]):
        draw_curve(cosine, steps, [f["pairs"][pair]["cosine"] for f in found], f"C{i}", pair)
    for i, branch in enumerate(found[0]["branches"]):
        def values(key, unit=1):
            numbers = [f["branches"][branch][key] for f in found]
            return [None if x is None else unit * x for x in numbers]
        draw_curve(coherence, steps, values("coherence"), f"C{i}", branch)
        draw_curve(coherence, steps, values("coherence_kept"), f"C{i}", f"{branch} selected", ":")
        draw_curve(gain, steps, values("gcg", 100), f"C{i}", f"{branch} selected")
        draw_curve(gain, steps, values("gcg_random", 100), f"C{i}", f"{branch} at random", ":")
        draw_curve(noise, steps, values("noise_scale"), f"C{i}", branch)
    cosine.axhline(0, color="grey", linewidth=0.6)
    if noise.get_legend_handles_labels()[0]:
        noise.set_yscale("log")
    for axis, heading in zip(axes, ("cosine of the branches' gradients", "coherence", "coherence gain, %",
                                    "noise scale, rollouts")):
        over_updates(axis, heading)


def draw_trial_steps(axes, steps, found):
    """Draw how far each branch's step goes, and by how much it changes the loss of every branch."""
    size, change = axes
    if not all("steps" in f for f in found):        # --diagnose_layers leaves them out
        return
    for i, name in enumerate(found[0]["steps"]):
        draw_curve(size, steps, [f["steps"][name]["step"] for f in found], f"C{i}", name)
    for i, loss in enumerate(found[0]["branches"]):
        for style, by in zip(itertools.cycle(("-", ":", "--", "-.")), found[0]["branches"]):
            values = [f["steps"][by]["change"][loss] for f in found]
            draw_curve(change, steps, values, f"C{i}", f"{loss} by {by}", style)
    change.axhline(0, color="grey", linewidth=0.6)
    over_updates(size, "a step's size")
    over_updates(change, "change of a loss by a step, nats")


def draw_gaps(axes, first, last):
    """Draw how the gap is spread over the rollouts and over the tokens: dotted at first, solid at last."""
    from .diagnosis import EDGES        # here, since a report without a diagnosis needs files only
    mass, spread = axes
    names = [f"{edge:g}" for edge in EDGES]
    names = ["< " + names[0], *names[1:], "> " + names[-1]]
    for i, branch in enumerate(first[1]["branches"]):
        for style, (step, found) in ((":", first), ("-", last)):
            gaps, label = found["branches"][branch], f"{branch}, after {step}"
            if gaps["deciles"]:
                shares = [100 * share for share in gaps["deciles"]]
                mass.plot(range(1, 11), shares, style, color=f"C{i}", label=label)
            tokens = sum(gaps["histogram"])
            shares = [100 * count / tokens for count in gaps["histogram"]]
            spread.step(range(len(names)), shares, style, where="mid", color=f"C{i}", label=label)
    mass.set(title="gap mass by decile of rollouts, %", xlabel="decile, largest first")
    spread.set(title="gap of the tokens, %", yscale="symlog", xlabel="up to nats")
    spread.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    spread.legend(fontsize=7)
