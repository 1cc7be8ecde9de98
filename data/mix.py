"""Prompt files that are drawn at random from several sets, a given number of rows from each.

    python -m data.mix OUT --seed 0 domain=4000:openlifescienceai/medmcqa domain=3000:UCSC-VLAA/MedReason

writes OUT/domain.jsonl with 7,000 rows. A source is a public set (data/convert.py) or a prompt file. The same
seed draws the same rows; files that are there stay as they are.
"""
import argparse
import random
import re
from pathlib import Path

from config import AMOUNT, COUNT, Parser, Refused

from .camopd import CHARACTERS, characters
from .convert import line
from .files import write_file
from .prompts import load_prompts


def draw(source, count, most, rng):
    """Return `count` rows of a source whose prompts have at most this many characters."""
    found = load_prompts(source, "main")
    short = [row for row in found if characters(row["prompt"]) <= most]
    if len(short) < count:
        raise Refused(f"{source} has {len(short)} prompts of at most {most} characters (and {len(found)} in "
                      f"all); {count} were asked for")
    chosen = sorted(rng.sample(range(len(short)), count))
    return [{name: value for name, value in short[i].items() if name not in ("branch", "row")}
            for i in chosen]


def main(argv=None):
    """Write the files from the command line."""
    parser = Parser(prog="data.mix", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("parts", nargs="+", metavar="NAME=COUNT:SOURCE",
                        help="add so many rows of this set to OUT/NAME.jsonl")
    parser.add_argument("--characters", type=COUNT, default=CHARACTERS, metavar="N",
                        help="longest prompt that is taken (default: %(default)s)")
    parser.add_argument("--seed", type=AMOUNT, default=0)
    try:
        args, files = parser.parse_args(argv), {}
        out = Path(args.out)
        for part in args.parts:
            if not (found := re.fullmatch(r"([\w-]+)=(0*[1-9]\d*):(.+)", part)):
                raise Refused(f"{part} is not NAME=COUNT:SOURCE, as in domain=4000:openlifescienceai/medmcqa")
            files.setdefault(found[1], []).append((int(found[2]), found[3]))
        out.mkdir(parents=True, exist_ok=True)
        for name, sources in files.items():
            path = out / f"{name}.jsonl"
            if path.exists():
                print(f"{path} is there and stays as it is")
            else:
                rows = [row for count, source in sources
                        for row in draw(source, count, args.characters,
                                        random.Random(f"mix {args.seed} {name} {source}"))]
                write_file(path, "".join(map(line, rows)))
                print(f"{path}  {len(rows)} rows")
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.mix: {error}\n")


if __name__ == "__main__":
    main()
