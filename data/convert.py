"""Converters from public sets to prompt rows (data/chat.py): `--prompts openai/gsm8k`, or by hand

    python -m data.convert openai/gsm8k > gsm8k.jsonl                    from the hub (needs package datasets)
    python -m data.convert 'openai/gsm8k:test[:200]' > gsm8k.jsonl       another split, or a part of one
    python -m data.convert openai/gsm8k --file test.jsonl > gsm8k.jsonl  from a file in the set's own format
"""
import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .flags import first_line

MATH_PROMPT = "{}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def gsm8k(row):
    steps, answer = row["answer"].rsplit("####", 1)
    return {"prompt": MATH_PROMPT.format(row["question"]), "answer": answer.strip(), "grader": "number",
            "solution": f"{steps.strip()}\n\\boxed{{{answer.strip()}}}"}


def math(row):
    return {"prompt": MATH_PROMPT.format(row["problem"]), "answer": str(row["answer"]), "grader": "boxed"}


@dataclass(frozen=True)
class Set:
    convert: Callable
    config: str | None
    split: str


SETS = {"openai/gsm8k": Set(gsm8k, "main", "train"), "HuggingFaceH4/MATH-500": Set(math, None, "test"),
        "math-ai/aime24": Set(math, None, "test"), "math-ai/aime25": Set(math, None, "test"),
        "math-ai/amc23": Set(math, None, "test")}


def rows(name, file=None):
    """The rows of a set, "NAME" or "NAME:SPLIT", from the hub or from JSON lines in the set's own format."""
    name, _, split = name.partition(":")
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}; there are: {', '.join(SETS)}")
    if file:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
        raw = [json.loads(line) for line in lines if line.strip()]
    else:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError(f"{name} is on the hub: pip install datasets, or give a file") from None
        try:
            raw = load_dataset(name, SETS[name].config, split=split or SETS[name].split)
        except Exception as error:                      # no network, no such split, ..
            raise ValueError(f"cannot load {name}: {first_line(error)}") from None
    converted = []
    for number, row in enumerate(raw, 1):
        try:
            converted.append(SETS[name].convert(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file or name}:{number}: not a row of {name}: {error!r}") from None
    return converted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME[:SPLIT]", help=", ".join(SETS))
    parser.add_argument("--file", help="JSON lines in the set's own format")
    args = parser.parse_args()
    try:
        converted = rows(args.name, args.file)
    except (ValueError, OSError, KeyError) as error:
        parser.exit(2, f"data.convert: {error}\n")
    for row in converted:
        print(json.dumps(row, ensure_ascii=False))
