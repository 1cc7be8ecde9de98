"""SAI-DPO-style: preferences on problems that suit the student as it is (after Rao et al., 2505.16176).

The paper's code is not public, and we did not have its full text: what is not marked [paper] is ours.

    once:  clusters of problems by what they ask for [paper: K-means on embeddings of knowledge points, which
           a language model names]: a field of the prompt file, or K-means on the student's mean hidden states
    for round in 1 .. R:                                        the reference is the student as it is now
      K graded rollouts of every problem that is probed                                        [paper: K = 8]
      weight of a cluster: the share of its rollouts that are wrong         [paper: failing ones weigh more]
      difficulty of a problem: correct rollouts, then steps, then length             [paper: in this order]
      problems: some of those with a correct and a wrong rollout, from the clusters by their weights; in a
                cluster first those nearest to K/2 correct rollouts, then with fewer steps, then shorter ones
      updates by DPO on one correct and one wrong rollout of each                                    [paper]

A rollout's steps are the lines of its text.
"""
import math
from statistics import mean

from tqdm import tqdm

from config import AMOUNT, COUNT, POSITIVE, PROBABILITY, SEVERAL, Refused

from . import by_prompt, embed, items_of_step, method, prompt_key, prompts_by_key
from .dpo import check_rounds_and_reference, graded_pairs, preference_job

CLUSTERS = 8


def check(cfg):
    """Refuse rounds as apt does, a single rollout, which is no pair, and clusters that have no effect."""
    check_rounds_and_reference(cfg)
    if cfg.cluster_field and cfg.clusters != CLUSTERS:
        raise Refused("--clusters has no effect with --cluster_field")
    if cfg.rollouts == 1:
        raise Refused(f"--method {cfg.method} compares a prompt's rollouts: --rollouts must be at least 2")


def reads(run, model, row):
    """Refuse a row without its cluster. Nobody reads more than the prompt."""
    field = run.cfg.cluster_field
    if field and field not in row:
        raise Refused(f'no "{field}", which --cluster_field {field} names as its cluster')
    return model.encode(row["prompt"])


@method(losses=("nll",), teachers="none", needs=("answer",), check=check, reads=reads,
        defaults=dict(rollouts=8, self_teacher="snapshot"))
def sai_dpo(run, *, rounds: COUNT = 4, probe: AMOUNT = 0, drawn: PROBABILITY = 0.5,
            clusters: SEVERAL = CLUSTERS, cluster_field: str = "", dpo_beta: POSITIVE = 0.1):
    """Prefer the student's own correct answers, on problems of the right difficulty where it fails most.

    rounds          rounds R; each has --steps / R updates of each student
    probe           problems that a round measures at least, whole batches of the next ones; 0 = all
    drawn           share of the problems with a pair that a round trains on
    clusters        clusters of K-means, which needs scikit-learn
    cluster_field   field of the prompt file that says which cluster a problem is of, such as its topic,
                    instead of K-means
    dpo_beta        as in dpo
    """
    reference, length = run.self_teacher(run.student), run.cfg.steps // rounds
    prompts = prompts_by_key(run)
    cluster = run.once("clusters", lambda: find_clusters(run, prompts, clusters, cluster_field))
    if len({*cluster.values()}) == 1:
        tqdm.write("note: all problems are in one cluster, so only their difficulty selects")
    for step in run.steps():
        number, step_of_round = divmod(step, length)
        if step_of_round == 0:
            run.refresh(reference)
        problems = run.once("problems", lambda: find_problems(run, probe, drawn, cluster), of=number)
        batch = items_of_step(problems, run.cfg.batch, step_of_round, f"{run.cfg.seed} {number}")
        pairs = [tuple(run.fixed(prompts[key], *side) for side in pair) for key, pair, *_ in batch]
        if batch:
            passes, first = zip(*[(now, then) for _, _, now, then in batch])
            run.notes["pass_rate"] = mean(passes)
            run.notes["pass_rate_at_first"] = mean(first)
        # A round without a pair has a step that changes nothing.
        rollouts = [r for pair in pairs for r in pair] or run.sample(run.student, run.draw(), n=1)
        yield [preference_job(run, reference, rollouts, pairs, dpo_beta)]


def find_clusters(run, prompts, count, field):
    """Return {prompt's key: its cluster}, by a field of the prompt file or else by K-means."""
    if field:
        return {key: str(prompt[field]) for key, prompt in prompts.items()}
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise Refused("clusters need scikit-learn (pip install scikit-learn) or --cluster_field") from None
    means = KMeans(min(count, len(prompts)), n_init=10, random_state=run.cfg.seed % 2**32)
    found = means.fit_predict(embed(run, list(prompts.values())).cpu().numpy())
    return {key: f"cluster {i}" for key, i in zip(prompts, found.tolist())}


def find_problems(run, probe, drawn, cluster):
    """Return the problems of a round: [(prompt's key, pair, pass rate, pass rate when first probed)].

    A pair is ((ids, text, reward) of a correct rollout, the same of a wrong one).
    """
    every = prompts_by_key(run)
    probed = {} if probe else every
    while len(probed) < min(probe, len(every)):
        probed |= {prompt_key(prompt): prompt for prompt in run.draw()}
    rollouts = run.sample(run.student, list(probed.values()))
    passes, difficulty, wrong = {}, {}, {}
    for key, group in by_prompt(rollouts).items():
        passes[key] = mean(r.reward for r in group)
        steps = mean(sum(1 for line in r.text.splitlines() if line.strip()) for r in group)
        length = mean(len(r.ids_T) for r in group)
        difficulty[key] = round(abs(passes[key] - 0.5), 6), steps, length       # ties but for rounding
        wrong.setdefault(cluster[key], []).append(1 - passes[key])
    pairs = {prompt_key(pair[0].prompt): pair for pair in graded_pairs(run, rollouts)}
    wrong = {name: mean(shares) for name, shares in sorted(wrong.items())}
    chosen = choose(sorted(pairs, key=difficulty.get), cluster, wrong, math.ceil(drawn * len(pairs)))

    first = run.memory.setdefault("first pass rates", {})
    for key in passes:
        first.setdefault(key, passes[key])
    rate = lambda rates, keys: mean(rates[key] for key in keys) if keys else None
    run.notes["round"] = {
        "probed": len(probed), "pass rate": rate(passes, list(passes)), "with a pair": len(pairs),
        "drawn": len(chosen), "their pass rate": rate(passes, chosen),
        "when first probed": rate(first, chosen),
        "their length": mean(difficulty[key][2] for key in chosen) if chosen else None}
    run.notes["wrong"] = wrong
    saved = lambda r: (r.ids_T.tolist(), r.text, r.reward)
    return [(key, tuple(map(saved, pairs[key])), passes[key], first[key]) for key in chosen]


def choose(keys, cluster, weight, count):
    """Return `count` of the keys: from every cluster its first ones, as many as are due to its weight."""
    waiting, taken, chosen = {}, {}, []
    for key in keys:
        waiting.setdefault(cluster[key], []).append(key)
    total = sum(weight[name] for name in waiting)
    while len(chosen) < count:
        due = lambda name: weight[name] / total * (len(chosen) + 1) - taken.get(name, 0)
        name = max((name for name in waiting if waiting[name]), key=due)
        taken[name] = taken.get(name, 0) + 1
        chosen.append(waiting[name].pop(0))
    return chosen
