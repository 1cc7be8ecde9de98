"""The public sets that CaMOPD (2605.27115, appendix A) takes its prompts from.

Its medical prompts are of four sets, with its own system message and closing sentence (figure 7); nothing of
their answers is kept. General prompts are what precedes the first answer in Nemotron's conversations, without
the schemas of tools. CoSER's conversations are split as in the paper: the LONGEST by turns are prompts, up to
the last answer (or to an earlier one, where that is too long), the others are there to learn from.
"""
import json
import string

from config import Refused

LONGEST = 10_000
CHARACTERS = 16_000         # of a prompt, about the 4,096 tokens at which the paper cuts
SYSTEM = ("You are a careful medical reasoning assistant. Provide educational medical information, mention "
          "uncertainty when relevant, and recommend professional medical care for diagnosis or treatment "
          "decisions.")
LETTER = 'Please reason step by step, and end with "Final answer: X", where X is the letter of your choice.'
CHOOSE = "Please reason step by step and give the final answer choice at the end."
ANSWER = ("Please reason step by step and answer clearly. Do not present the answer as a substitute for "
          "professional medical advice.")


def medical(row):
    """Return the prompt row of a row of MedMCQA, MedReason, Medical-R1-Distill-Data or m23k."""
    options = choices(row)
    closing = CHOOSE if options or row.get("answer_letter") else ANSWER     # m23k's prompts hold the choices
    text = "\n".join([(row.get("question") or row["prompt"]).strip(), *options, closing])
    return {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]}


def choices(row):
    """Return the lines of a question's choices: of fields opa, opb, .., or of `options`, JSON or text."""
    if "opa" in row:
        return [f"{letter.upper()}. {row[f'op{letter}']}" for letter in "abcd"]
    options = row.get("options") or ""
    if options in ("None", "null", "{}", "[]"):
        return []
    try:
        options = json.loads(options) if isinstance(options, str) else options
    except ValueError:
        return [options.strip()] if options.strip() else []
    pairs = options.items() if isinstance(options, dict) else zip(string.ascii_uppercase, options)
    return [f"{letter}. {option}" for letter, option in pairs]


def general(row):
    """Return the prompt row of a row of Nemotron-Post-Training-Dataset-v1; None of one that asks nothing."""
    prompt = []
    for message in row["messages"]:
        if message["role"] not in ("system", "user"):
            break
        prompt.append({"role": message["role"], "content": message["content"]})
    return {"prompt": prompt} if prompt and prompt[-1]["role"] == "user" and prompt[-1]["content"] else None


def conversation(row):
    """Return the prompt row of a row of CoSER, of the ShareGPT form; None of one that has no last answer."""
    roles = {"human": "user", "gpt": "assistant"}
    *prompt, last = [{"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
                     for turn in row["conversations"]]
    answered = last["role"] == "assistant" and prompt and prompt[-1]["role"] == "user"
    return {"prompt": prompt, "solution": last["content"]} if answered else None


def split(rows):
    """Return {"train": conversations to learn from, "prompts": the LONGEST, without their last answers}."""
    if len(rows) <= LONGEST:
        raise Refused(f"{len(rows)} conversations are too few for {LONGEST} that are kept as prompts")
    order = sorted(rows, key=lambda row: -len(row["prompt"]))           # stable: ties stay in the set's order
    return {"train": order[LONGEST:],
            "prompts": [{"prompt": shortened(row["prompt"])} for row in order[:LONGEST]]}


def shortened(prompt):
    """Return the first messages of a conversation that have at most CHARACTERS and end with the user's."""
    while len(prompt) > 1 and (characters(prompt) > CHARACTERS or prompt[-1]["role"] != "user"):
        prompt = prompt[:-1]
    return prompt


def characters(prompt):
    """Return the characters of a prompt, of a list of messages all of them."""
    return len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)


def expert(row):
    """Return the prompt row of a row of MedXpertQA Text, up to ten choices; graded as MedQA."""
    options = row["options"]
    text = row["question"].partition("\nAnswer Choices:")[0]
    if row["label"] not in options:
        raise Refused(f"the answer {row['label']!r} is no choice's letter")
    lines = [text, *(f"{letter}. {option}" for letter, option in options.items()), LETTER]
    return {"prompt": "\n".join(lines), "answer": row["label"], "grader": "final_letter"}
