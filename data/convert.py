"""Converters from public sets to prompt rows (data/prompts.py): `--prompts openai/gsm8k`, or by hand

    python -m data.convert openai/gsm8k > gsm8k.jsonl                    from the hub (needs package datasets)
    python -m data.convert 'openai/gsm8k:test[:200]' > gsm8k.jsonl       another split, or a part of one
    python -m data.convert openai/gsm8k --file test.jsonl > gsm8k.jsonl  from a file in the set's own format

SciKnowEval (data/sciknoweval.py) is four sets, each with the parts train, val and test:

    python -m data.convert hicai-zju/SciKnowEval/physics:val > val.jsonl
    python -m data.convert hicai-zju/SciKnowEval/{physics,chemistry} --out DIR   all of DIR/physics_val.jsonl
    .. --file physics=hub.jsonl chemistry=train.json chemistry=test.json         one to split, or two parts
"""
import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from config import Parser, Refused, first_line, nearest, parse_json

from . import camopd, ifeval, sciknoweval
from .files import write_file

MATH_PROMPT = "{}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def gsm8k(row):
    """Return the prompt row of a row of GSM8K."""
    steps, answer = row["answer"].rsplit("####", 1)
    return {"prompt": MATH_PROMPT.format(row["question"]), "answer": answer.strip(), "grader": "number",
            "solution": f"{steps.strip()}\n\\boxed{{{answer.strip()}}}"}


def math(row):
    """Return the prompt row of a row of MATH, AIME or AMC."""
    return {"prompt": MATH_PROMPT.format(row["problem"]), "answer": str(row["answer"]), "grader": "boxed"}


def medqa(row):
    """Return the prompt row of a row of MedQA: {question, options, answer_idx}, or {prompt, answer}."""
    letter, text = row.get("answer_idx", row["answer"]), row.get("prompt")
    if "options" in row:
        text = f"{row['question']}\nAnswer Choices: " + " ".join(f"({x}) {row['options'][x]}"
                                                                  for x in sorted(row["options"]))
    if not letter or f"({letter}) " not in text:
        raise Refused(f"the answer {letter!r} is no choice's letter")
    return {"prompt": f"{text}\n\n{camopd.LETTER}", "answer": letter, "grader": "final_letter"}


def worked(row):
    """Return the prompt row of a row with a problem and its solution, which is not graded."""
    return {"prompt": MATH_PROMPT.format(row["problem"]), "solution": row["solution"]}


def dapo(row):
    """Return the prompt row of a row of DAPO-Math-17k, whose `solution` is the bare answer."""
    return math({"problem": row["prompt"], "answer": row["solution"]})


@dataclass(frozen=True)
class Set:
    """A public set, and how its rows become prompt rows."""
    convert: Callable                   # row -> prompt row, or None where the row is not of this set
    config: str | None                  # the configuration on the hub
    split: str                          # the split on the hub, if none is named
    hub: str | None = None              # the set's name on the hub, if it is another one
    parts: Callable | None = None       # of sets that we split: a list of rows per file -> {part: rows}
    file: str | None = None             # the file on the hub, where the set's folder holds other things too
    most: int | None = None             # of a set too large to fetch, the rows of a split that are read


SETS = {"openai/gsm8k": Set(gsm8k, "main", "train"), "HuggingFaceH4/MATH-500": Set(math, None, "test"),
        "math-ai/aime24": Set(math, None, "test"), "math-ai/aime25": Set(math, None, "test"),
        "math-ai/amc23": Set(math, None, "test"), "MathArena/hmmt_feb_2025": Set(math, None, "train"),
        "google/IFEval": Set(ifeval.prompt_row, None, "train"),
        "GBaker/MedQA-USMLE-4-options": Set(medqa, None, "train"),
        "open-r1/DAPO-Math-17k-Processed": Set(dapo, "en", "train"),
        "siyanzhao/Openthoughts_math_30k_opsd": Set(worked, None, "train")}
SETS |= {f"hicai-zju/SciKnowEval/{domain}": Set(sciknoweval.converter(domain), None, "test",
                                                "hicai-zju/SciKnowEval", sciknoweval.splitter(domain))
         for domain in sciknoweval.TESTS}
SETS |= {name: Set(camopd.medical, config, "train") for name, config in (
    ("openlifescienceai/medmcqa", None), ("UCSC-VLAA/MedReason", None), ("UCSC-VLAA/m23k-tokenized", None),
    ("FreedomIntelligence/Medical-R1-Distill-Data", "en"))}
SETS |= {"TsinghuaC3I/MedXpertQA": Set(camopd.expert, "Text", "test"),
         "nvidia/Nemotron-Post-Training-Dataset-v1": Set(camopd.general, None, "chat", most=40_000),
         "Neph0s/CoSER": Set(camopd.conversation, None, "train", parts=camopd.split,
                             file="train/sft_conversations_sharegpt.json")}


def rows(name, *files):
    """Return the rows of a set, "NAME" or "NAME:SPLIT", from the hub or from files in the set's format."""
    name, _, split = name.partition(":")
    if not known(name).parts:
        if split and files:
            raise Refused(f"{name}:{split}: a file is taken whole; leave out :{split}")
        return [row for raw in files or [None] for row in converted(name, split, raw)]
    found = parts(name, *files)
    if (split or "train") not in found:
        raise Refused(f"{name} has the parts {', '.join(found)}, not {split!r}")
    return found[split or "train"]


def parts(name, *files):
    """Return {part: rows} of a set that we split: from the hub or one file, or from its train and test."""
    if len(files) > 2:
        raise Refused(f"{name} is one file that is split here, or its train and its test file; not "
                         f"{len(files)} files")
    return known(name).parts(*(converted(name, "", raw) for raw in files or [None]))


def known(name):
    """Return the Set of this name; refuse an unknown name."""
    if name not in SETS:
        raise Refused(f"unknown set {name!r}; {nearest(name, SETS)}")
    return SETS[name]


def converted(name, split, file=None):
    """Return the prompt rows of one file, or of a split on the hub; refuse a row in another format."""
    found = []
    for number, row in enumerate(read(file) if file else load(name, split), 1):
        try:
            if prompt := SETS[name].convert(row):
                found.append(prompt)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refused(f"{file or name}:{number}: not a row of {name}: {error!r}") from None
    if not found:
        raise Refused(f"{file or name} has no rows of {name}")
    return found


def read(file):
    """Return the rows of a file of JSON lines, or of one JSON list."""
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise Refused(f"{file} is not UTF-8 text ({error})") from None
    except (OSError, ValueError) as error:              # ValueError: a name with a NUL
        raise Refused(f"cannot read {file!r}: {error}") from None
    found, number = [], 1
    try:
        if text.startswith("["):
            return parse_json(text)
        for number, line in enumerate(text.split("\n"), 1):
            found += [parse_json(line)] if line.strip() else []
    except ValueError as error:
        raise Refused(f"{file}:{number}: not JSON ({error})") from None
    return found


def load(name, split):
    """Return the rows of a split on the hub; "" means the set's own split."""
    known, further = SETS[name], {}
    if known.file:
        further["data_files"] = known.file
    if known.most:
        further["streaming"] = True
    try:
        from datasets import load_dataset
    except ImportError:
        raise Refused(f"{name} is on the hub: pip install datasets, or give a file") from None
    try:
        found = load_dataset(known.hub or name, known.config, split=split or known.split, **further)
        return list(islice(found, known.most)) if known.most else found
    except Exception as error:                          # no network, no such split, ..
        raise Refused(f"cannot load {name}: {first_line(error)}") from None


def write_parts(folder, name, *files):
    """Write FOLDER/NAME_PART.jsonl for every part of a set, unless all are there: they may be from --file."""
    domain = name.rpartition("/")[2]
    if all((folder / f"{domain}_{part}.jsonl").exists() for part in ("train", "val", "test")):
        return print(f"{folder}/{domain}_*.jsonl are there and stay")
    if not known(name).parts:
        raise Refused(f"{name} has no parts: leave out --out, and redirect what is printed")
    if folder.exists() and not folder.is_dir():
        raise Refused(f"--out {folder} is a file; it must be a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for part, found in parts(name, *files).items():
        write_file(folder / f"{domain}_{part}.jsonl", "".join(map(line, found)))
        print(f"{folder}/{domain}_{part}.jsonl  {len(found)} rows")


def line(row):
    """Return a row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def main(argv=None):
    """Convert sets from the command line."""
    parser = Parser(prog="data.convert", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME[:SPLIT]", help=", ".join(SETS))
    parser.add_argument("--file", nargs="+", default=[], metavar="[SET=]FILE",
                        help="JSON in the set's own format; of several sets, SET is the last word of NAME")
    parser.add_argument("--out", metavar="DIR", help="write all parts of the sets, one file each")
    try:
        args = parser.parse_args(argv)
        files = {name: [] for name in args.names}
        # The last word of a set's name -> the name, as in --file physics=hub.jsonl.
        last = {name.partition(":")[0].rpartition("/")[2]: name for name in args.names}
        for file in args.file:
            word, found, path = file.partition("=")
            if Path(file).exists() or not found:        # a path with = in it, or a bare one
                word, path = next(iter(last)), file
                if len(last) > 1:
                    raise Refused(f"--file {file}: of several sets, say which: {', '.join(last)}")
            if word not in last:
                raise Refused(f"--file {file}: the sets are {', '.join(last)}")
            files[last[word]].append(path)
        if args.out:
            for name in args.names:
                write_parts(Path(args.out), name, *files[name])
        else:
            print(end="".join(line(row) for name in args.names for row in rows(name, *files[name])))
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.convert: {error}\n")


if __name__ == "__main__":
    main()
