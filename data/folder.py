"""A run's folder: what a run writes, and what it goes on from."""
import json

import models
from config import Refused

from .files import atomic_folder, read_lines, recover, write_file


class Folder:
    """A run's folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/, adapter/ and final/."""

    def __init__(self, out):
        self.out = out

    def write_config(self, record):
        """Write config.json, the settings of the run."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_file(self.out / "config.json", json.dumps(record, indent=1))

    def log(self, name, record):
        """Append one JSON line to metrics.jsonl or samples.jsonl."""
        with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def put_logs_aside(self):
        """Rename the logs of a run that died before its first checkpoint."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.out / name).exists():
                (self.out / name).replace(self.out / f"{name}.old")

    def find_checkpoint(self, look_only=False):
        """Return the folder to resume from; None: the run died before its first checkpoint."""
        if recover(self.out / "checkpoint", look_only):
            return self.out / "checkpoint"
        if (self.out / "final").exists():
            raise Refused(f"{self.out} is finished (final/) and its checkpoint/ is gone; choose another "
                          "--out")
        return None

    def save(self, learners, state):
        """Write checkpoint/, everything a restart needs. A kill meanwhile leaves the one before."""
        with atomic_folder(self.out / "checkpoint") as folder:
            models.save_learners(learners, folder, state)

    def restore(self, learners):
        """Take learners back to the checkpoint, forget what lost steps wrote, and return the run's state."""
        state = models.restore_learners(learners, self.out / "checkpoint")
        for path in (self.out / "metrics.jsonl", self.out / "samples.jsonl"):
            if path.exists():
                kept = [line for line in read_lines(path) if line["step"] < state["step"]]
                write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        return state

    def finish(self, students):
        """Write final/, plain folders that from_pretrained loads, and for an adapter adapter/ beside it.

        Two students lie in final/1 and final/2.
        """
        if students[0].adapter:
            with atomic_folder(self.out / "adapter") as folder:
                models.save_adapters(students, folder)
        with atomic_folder(self.out / "final") as folder:
            models.save_final(students, folder)
