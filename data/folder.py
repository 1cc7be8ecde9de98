"""What a run writes: its folder, from which it can be resumed, and the line and record of every step."""
import hashlib
import json
import math
import sys

import torch
from tqdm import tqdm

import models
from config import Refused, identity

from .files import atomic_folder, check_whole, own, read_lines, recover, write_file
from .graders import complaint
from .monitor import repeated, saturated
from .prompts import prompt_text


LOGS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl")


class Folder:
    """A run's folder: config.json, the LOGS, checkpoint/, adapter/ and final/."""

    def __init__(self, out, cfg):
        self.out, self.cfg = out, cfg
        self.lock, self.saved = None, None                      # saved: the steps that checkpoint/ has

    def take(self):
        """Make the folder if it is not there, and make it this process's own."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock or own(self.out)

    def write_config(self, record):
        """Write config.json, the settings of the run."""
        write_file(self.out / "config.json", json.dumps(record, indent=1))

    def log(self, name, *records):
        """Append JSON lines to one of the LOGS."""
        with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def open_checkpoint(self):
        """Put the checkpoint in its place after a kill between two renames; refuse a damaged, foreign one."""
        path, now = self.out / "checkpoint", identity(self.cfg)
        recover(path)
        check_whole(path)
        then = json.loads((path / "run.json").read_text())
        if other := [name for name in now if then.get(name) != now[name]]:
            raise Refused(f"{path} is of another run, with another {', '.join(other)}; put the run's own one "
                          "there")

    def put_logs_aside(self):
        """Rename the logs of a run that was killed before its first checkpoint, since it begins again."""
        for name in LOGS:
            if (self.out / name).exists():
                (self.out / name).replace(self.out / f"{name}.old")

    def find_checkpoint(self):
        """Return the folder to resume from; None if the run was killed before its first checkpoint."""
        if recover(self.out / "checkpoint", look_only=True):
            return self.out / "checkpoint"
        if (self.out / "final").exists():
            raise Refused(f"{self.out} is finished (final/) and its checkpoint/ is gone; choose another "
                          "--out")
        return None

    def save(self, learners, state):
        """Write checkpoint/, everything that a restart needs. A kill in between leaves the last one."""
        with atomic_folder(self.out / "checkpoint", with_checksums=True) as folder:
            models.save_learners(learners, folder, state)
            (folder / "run.json").write_text(json.dumps(identity(self.cfg), indent=1))
        self.saved = state["step"]

    @property
    def holds(self):
        """What of the run is safe, in words, for messages."""
        if self.saved is None:
            return f"{self.out} has no checkpoint yet; with --resume the same command begins again"
        return f"with --resume the same command continues at the checkpoint in {self.out}, step {self.saved}"

    def restore(self, learners):
        """Restore learners from the checkpoint, drop log lines of later steps, and return the run's state."""
        state = models.restore_learners(learners, self.out / "checkpoint")
        self.saved = state["step"]
        for path in (self.out / name for name in LOGS):
            kept = [line for line in read_lines(path, "step") if line["step"] < state["step"]]
            if path.name == "metrics.jsonl" and (lost := state["step"] + 1 - len(kept)):
                tqdm.write(f"note: {path} has lost {lost} lines of {state['step'] + 1}; the report goes "
                           "without")
            if path.exists():
                write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        return state

    def finish(self, students):
        """Write final/, which from_pretrained loads, and of an adapter also adapter/, which peft loads.

        Two students are in final/1 and final/2. Saving final/ merges the adapters, so adapter/ comes first.
        """
        if students[0].adapter:
            with atomic_folder(self.out / "adapter") as folder:
                models.save_adapters(students, folder)
        with atomic_folder(self.out / "final") as folder:
            models.save_final(students, folder)


# ---- what a run says of a step -----------------------------------------------------------------------------

def rollout_stats(jobs, weights, stats):
    """Return the statistics of some Jobs: means over rollouts, and means over tokens in nats."""
    mean = lambda parts: torch.cat(parts).mean().item() if parts else None
    # Jobs on the same completions count them once: the key is the identity of the token ids.
    distinct = {}
    for job, job_weights in zip(jobs, weights):
        for r, gap_T, w_T, cut in zip(job.rollouts, job.gaps, job_weights, job.cut):
            distinct.setdefault(id(r.ids_T), (r, gap_T, bool(w_T.any()), cut))
    rollouts, gaps, kept, cut = zip(*distinct.values())
    gaps = [gap_T for gap_T in gaps if gap_T is not None]
    rewards = [r.reward for r in rollouts if r.reward is not None]
    lengths = [len(r.ids_T) for r in rollouts]
    out = {"rollouts": len(rollouts), "kept": sum(kept), "tokens": sum(lengths),
           "length": sum(lengths) / len(rollouts), "cut": sum(cut) / len(rollouts),
           "reward": sum(rewards) / len(rewards) if rewards else None, "solved": solved(rollouts),
           "gap": mean(gaps), "abs_gap": mean([gap_T.abs() for gap_T in gaps]),
           "repeated": repeated([r.ids_T for r in rollouts if r.logp_T is not None]),
           "saturated": saturated(jobs, stats)}
    for name in ("value", "entropy_s", "entropy_t", "top1_agree", "logprob_s"):
        out[name] = mean([s[name] for s in stats if len(s.get(name, ()))])
    return {name: x for name, x in out.items() if x is not None and math.isfinite(x)}


def solved(rollouts):
    """Return the share of prompts with a correct rollout; None if all have one rollout, or some no answer."""
    if any(r.reward is None for r in rollouts):
        return None
    groups = {}
    for r in rollouts:
        groups.setdefault((r.prompt["branch"], r.prompt["row"]), []).append(r.reward)
    several = [rewards for rewards in groups.values() if len(rewards) > 1]
    return sum(1 in rewards for rewards in several) / len(several) if several else None


def step_line(s, loss, total, notes):
    """Return a step's line: step 12/300 general | rkl 0.410 | gap .. | kept 32/64 | len 18 (3% cut) | .."""
    parts = [f"step {s['step'] + 1}/{total} {s['branch']}"]
    parts += [f"{loss} {s['value']:.3f}"] if "value" in s else []
    parts += [f"nll {-s['logprob_s']:.3f}"] if loss == "nll" and "logprob_s" in s else []
    parts += [f"gap {s['gap']:+.3f}, |gap| {s['abs_gap']:.3f}"] if "gap" in s else []
    parts += [f"kept {s['kept']}/{s['rollouts']}", f"len {s['length']:.0f} ({s['cut']:.0%} cut)"]
    parts += [f"acc {s['reward']:.2f}"] if "reward" in s else []
    parts += [f"solved {s['solved']:.0%}"] if "solved" in s else []
    parts += [f"{name} {x:.3g}" for name, x in notes.items() if isinstance(x, (int, float))]
    times = " ".join(f"{name} {seconds:.2f}" for name, seconds in s["seconds"].items())
    parts += [f"{sum(s['seconds'].values()):.2f}s ({times})", f"{s['memory_gib']:.1f} GiB"]
    parts += ["eval " + " ".join(f"{name} {x:.3f}" for name, x in s["eval"].items())] if s.get("eval") else []
    return " | ".join(parts)


def logged_samples(job, weights, count):
    """Yield what samples.jsonl keeps of each of a Job's first `count` rollouts."""
    for r, gap_T, w_T in list(zip(job.rollouts, job.gaps, weights))[:count]:
        yield {"branch": r.prompt["branch"], "prompt": prompt_text(r.prompt["prompt"]), "completion": r.text,
               **r.notes, "reward": r.reward, "selected": bool(w_T.any()),
               "gap": None if gap_T is None else gap_T.mean().item()}


def answer_records(step, name, rollouts, n, stops):
    """Yield what eval.jsonl keeps of every question of a set: n rollouts in a row are of one question.

    question: digest of what was asked and how it is graded. lengths: in tokens. cut: whether a completion
    reached the limit without a stop token. unread: whether the grader found nothing in it to grade.
    """
    for i in range(0, len(rollouts), n):
        some, row = rollouts[i:i + n], rollouts[i].prompt
        content = json.dumps([row["prompt"], row["answer"], row["grader"].rpartition("/")[2]])
        yield {"step": step, "set": name, "row": row["row"],
               "question": hashlib.sha256(content.encode()).hexdigest()[:16],
               "rewards": [r.reward for r in some], "lengths": [len(r.ids_T) for r in some],
               "cut": [r.ids_T[-1].item() not in stops for r in some],
               "unread": [complaint(row["grader"], r.text) is not None for r in some]}


def warn_of_first_step(cfg, stats):
    """Write a note if the first step shows that the training cannot go well."""
    if stats["cut"] > 0.5:
        tqdm.write(f"note: {stats['cut']:.0%} of the first completions did not end within "
                   f"--max_new_tokens {cfg.max_new_tokens}; what lies beyond is never trained")
    if stats["kept"] == 0:
        none_correct = ", and none is correct: does the grader fit?" * (stats.get("reward") == 0)
        tqdm.write(f"note: no rollout of the first step has anything to learn from{none_correct}")


def process_memory():
    """Return the largest memory of the process so far in GiB: on a CPU torch has no finer measure."""
    import resource             # here, since not every system has it
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
