"""Voice-assistant parsing: the domain that makes a small chat model forget how to chat.

    python -m data.assistant OUT --seed 0 [--model NAME] [--snips DIR] [--instructions FILE] [--held_out FILE]

A request becomes one line of JSON with its intent and slots (SNIPS, Coucke et al., 1805.10190):

    wake me at seven     {"intent": "SetAlarm", "time": "seven"}

OUT gets model/ (data/pretrained.py), domain.jsonl (requests with their line as solution and answer),
eval_domain.jsonl (others, graded by slot F1), general.jsonl (proxy instructions without answers) and
eval_general.jsonl (held-out questions, graded by whether the answer is prose: after this specialisation
everything is answered in JSON).

context.jsonl has requests whose teacher sees an example of every intent before them (teacher_prompt), and
eval_context.jsonl others, graded by whether the answer is a line of JSON: what the student makes a habit of.

Sources: SNIPS is a folder with the files of sonos/nlu-benchmark, or train.jsonl and validate.jsonl;
instructions and held-out questions are JSON lines with `instruction` and perhaps `input`. Without these flags
they are fetched from where their authors keep them.
"""
import argparse
import json
import random
import urllib.request
from pathlib import Path

# Not as "from . import": as the file of a grader this one is read alone.
from config import Refused
from data import pretrained
from data.files import write_file
from data.graders import without_thinking

RAW = "https://raw.githubusercontent.com"
SNIPS = f"{RAW}/sonos/nlu-benchmark/master/2017-06-custom-intent-engines"                      # CC0
INTENTS = ("AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook", "SearchCreativeWork",
           "SearchScreeningEvent")
INSTRUCTIONS = (f"{RAW}/yizhongw/self-instruct/main/data/seed_tasks.jsonl",                    # Apache-2.0
                f"{RAW}/yizhongw/self-instruct/main/human_eval/user_oriented_instructions.jsonl")
HELD_OUT = (f"{RAW}/lm-sys/FastChat/main/fastchat/llm_judge/data/mt_bench/question.jsonl",     # Apache-2.0
            f"{RAW}/lm-sys/FastChat/main/fastchat/llm_judge/data/vicuna_bench/question.jsonl")
COUNTS = dict(train=3500, evaluation=120, held_out=48, context=480)
MOST_WORDS = 45                                                 # of a proxy instruction


# ---- graders, as FILE.py:NAME ------------------------------------------------------------------------------

def slot_f1(completion, row):
    """Return F1 of the pairs (slot, value) of a line of JSON, the intent among them; 0 for other texts."""
    found, right = pairs(completion), pairs(row["answer"])
    both = len(found & right)
    return 2 * both / (len(found) + len(right)) if found else 0.0


def pairs(text):
    """Return the set of (name, value) of a text that is one JSON object of texts; otherwise the empty set."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return set()
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return set()
    return {(name, " ".join(value.split()).casefold()) for name, value in found.items()}


def line_of_json(completion, row):
    """Return whether an answer is one JSON object of texts, with whatever intent and slots."""
    return float(bool(pairs(completion)))


def prose(completion, row):
    """Return whether an answer is not JSON: whether it does not begin with a brace."""
    return float(not without_thinking(completion).lstrip().startswith("{"))


# ---- sources -----------------------------------------------------------------------------------------------

def read(source):
    """Return the text of a file or of an address; refuse what cannot be reached."""
    try:
        if "://" not in str(source):
            return Path(source).read_text(encoding="utf-8")
        with urllib.request.urlopen(source, timeout=30) as page:
            return page.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"cannot read {source}: {error}; give files instead (--help)") from None


def lines(source):
    """Return the objects of a source of JSON lines."""
    return [json.loads(line) for line in read(source).splitlines() if line.strip()]


def snips(folder, part):
    """Return [(intent, pieces of the request)] of SNIPS's part "train" or "validate"."""
    if folder and (Path(folder) / f"{part}.jsonl").exists():
        return [(row["intent"], row["data"]) for row in lines(Path(folder) / f"{part}.jsonl")]
    out = []
    for intent in INTENTS:
        name = f"{intent}/{part}_{intent}{'_full' * (part == 'train')}.json"
        found = json.loads(read(Path(folder) / name if folder else f"{SNIPS}/{name}"))
        out += [(intent, row["data"]) for row in found[intent]]
    return out


def parsed(intent, pieces):
    """Return a request's prompt row: its text, and its intent and slots in one line of JSON."""
    slots = {}
    for piece in pieces:
        if "entity" in piece:
            name, value = piece["entity"], piece["text"].strip()
            slots[name] = f"{slots[name]}, {value}" if name in slots else value
    line = json.dumps({"intent": intent, **slots}, ensure_ascii=False)
    prompt = "".join(piece["text"] for piece in pieces).strip()
    return {"prompt": prompt, "solution": line, "answer": line, "grader": "data/assistant.py:slot_f1"}


def instructions(sources):
    """Return the texts of instructions, each once, in the order of the sources."""
    found = {}
    for source in sources:
        for row in lines(source):
            first = (row.get("instances") or [{}])[0]           # self-instruct keeps inputs there
            asked = row.get("instruction") or (row.get("turns") or [""])[0]
            text = "\n\n".join(part for part in (asked, row.get("input") or first.get("input", "")) if part)
            found[text.strip()] = len(text.split()) <= MOST_WORDS
    return [text for text, short in found.items() if text and short]


def examples(rows):
    """Return the chat messages that show the first request of every intent with its line."""
    first = {json.loads(row["answer"])["intent"]: row for row in reversed(rows)}
    return [{"role": role, "content": first[intent][field]} for intent in sorted(first)
            for role, field in (("user", "prompt"), ("assistant", "answer"))]


def build(out, seed, snips_folder, proxies, questions, train, evaluation, held_out, context):
    """Write the six files into a folder."""
    rng = random.Random(seed)
    requests = {part: [parsed(*row) for row in snips(snips_folder, part)] for part in ("train", "validate")}
    seen = {row["prompt"] for row in requests["validate"]}
    requests["train"] = [row for row in requests["train"] if row["prompt"] not in seen]
    pick = lambda rows, count: rng.sample(rows, min(count, len(rows)))
    files = {"domain": pick(requests["train"], train), "eval_domain": pick(requests["validate"], evaluation),
             "general": [{"prompt": text} for text in instructions(proxies)],
             "eval_general": [{"prompt": text, "answer": "prose", "grader": "data/assistant.py:prose"}
                              for text in pick(instructions(questions), held_out)]}
    shown = examples(files["domain"])
    files["context"] = [{"prompt": row["prompt"],
                         "teacher_prompt": [*shown, {"role": "user", "content": row["prompt"]}]}
                        for row in pick(files["domain"], context)]
    files["eval_context"] = [{"prompt": row["prompt"], "answer": "JSON",
                              "grader": "data/assistant.py:line_of_json"}
                             for row in files["eval_domain"][:held_out]]
    asked = {row["prompt"] for row in files["eval_general"]}
    files["general"] = [row for row in files["general"] if row["prompt"] not in asked]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_file(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{out}/{name}.jsonl  {len(rows)} rows")


def main(argv=None):
    """Write the model and the files from the command line."""
    parser = argparse.ArgumentParser(prog="data.assistant", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME", help="see data/pretrained.py")
    parser.add_argument("--snips", metavar="DIR")
    parser.add_argument("--instructions", nargs="+", default=INSTRUCTIONS, metavar="FILE")
    parser.add_argument("--held_out", nargs="+", default=HELD_OUT, metavar="FILE")
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}_rows", type=int, default=count, metavar="N")
    args = parser.parse_args(argv)
    try:
        pretrained.main([args.model, str(args.out / "model")])
        build(args.out, args.seed, args.snips, args.instructions, args.held_out,
              **{name: getattr(args, f"{name}_rows") for name in COUNTS})
    except (ValueError, KeyError, OSError) as error:
        parser.exit(2, f"data.assistant: {error}\n")


if __name__ == "__main__":
    main()
