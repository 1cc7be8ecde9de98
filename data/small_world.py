"""A small world in which distillation can be measured on a laptop: same verbs, different objects.

A prompt is `verb arguments>`, its answer is graded by exact match. Twelve general skills work on letters,
numbers and countries; eight domain skills use the same verbs on chemistry. Because the verbs are shared, a
model that learns the domain forgets what they mean elsewhere, and recovering that costs the domain: the
conflict that multi-teacher distillation is about. Two skills of either kind are chains, in which an early
slip ruins everything after it:

    rev pam>map       add 07 26>33            sum 3 8 5 9>03 11 16 25     do rev next opm>mpo nqp
    sort HeCF>HeCF    add C O>12+16=28        sum H2 O C3>02 03 06        do next rev LiBeC>BeBN NBBe

`python -m data.small_world OUT --seed 0` writes an untrained model with its tokenizer (OUT/init) and the
prompt files:

    generalist.jsonl   many: all general skills and some of the domain, for training the general teacher
    specialist.jsonl   many: the domain only, for training the domain teacher (which forgets the rest)
    general.jsonl      the proxy prompts of distillation: fixed, no solutions, only for the skills in COVERED
    domain.jsonl       the domain prompts of distillation, half as many
    general_references.jsonl, domain_references.jsonl
                       the few of these prompts that have a solution: prompts are cheap, references are not
    eval_covered.jsonl, eval_uncovered.jsonl, eval_domain.jsonl

Held out by a hash of the prompt: no evaluation prompt is in a training file, except in the closed fact sets
(FACTS: `what` and the neighbours of single elements), where knowing the fact is the skill.
"""
import argparse
import hashlib
import json
import random
from pathlib import Path

COVERED = ("copy", "rev", "next", "count", "add", "max", "what", "sum")    # skills with general proxy prompts
UNCOVERED = ("last", "sort", "sub", "do")                                  # recovered only by generalisation
DOMAIN = ("what", "next", "max", "sort", "add", "count", "sum", "do")
VERBS = sorted({*COVERED, *UNCOVERED, *DOMAIN})
ELEMENTS = {  # symbol: (name, mass in whole units); in the order of the atomic number
    "H": ("hydrogen", 1), "He": ("helium", 4), "Li": ("lithium", 7), "Be": ("beryllium", 9),
    "B": ("boron", 11), "C": ("carbon", 12), "N": ("nitrogen", 14), "O": ("oxygen", 16),
    "F": ("fluorine", 19), "Ne": ("neon", 20), "Na": ("sodium", 23), "Mg": ("magnesium", 24),
    "Al": ("aluminium", 27), "Si": ("silicon", 28), "P": ("phosphorus", 31), "S": ("sulfur", 32),
    "Cl": ("chlorine", 35), "Ar": ("argon", 40)}
SYMBOLS = list(ELEMENTS)
CAPITALS = {
    "canada": "ottawa", "france": "paris", "japan": "tokyo", "kenya": "nairobi", "peru": "lima",
    "egypt": "cairo", "italy": "rome", "spain": "madrid", "cuba": "havana", "china": "beijing",
    "india": "delhi", "norway": "oslo", "poland": "warsaw", "greece": "athens", "russia": "moscow",
    "qatar": "doha", "ghana": "accra", "chile": "santiago", "nepal": "kathmandu", "austria": "vienna"}
FACTS = {("general", "what"), ("domain", "what"), ("domain", "next")}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def after(x):
    """The next letter or element; the last is followed by the first."""
    row = SYMBOLS if x in ELEMENTS else LETTERS
    return row[(row.index(x) + 1) % len(row)]


CHAIN = {"rev": lambda xs: xs[::-1], "sort": lambda xs: sorted(xs, key=(SYMBOLS + list(LETTERS)).index),
         "next": lambda xs: [after(x) for x in xs]}


def chain(rng, xs):
    ops = rng.sample(sorted(CHAIN), 2)
    states = [xs]
    for op in ops:
        states.append(CHAIN[op](states[-1]))
    return f"{ops[0]} {ops[1]} {''.join(xs)}", " ".join("".join(s) for s in states[1:])


def running(terms):
    return " ".join(f"{sum(terms[: i + 1]):02}" for i in range(len(terms)))


def general(rng, verb):
    """(arguments, answer) of one general prompt."""
    word = rng.choices(LETTERS, k=rng.randint(3, 5))
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    if verb in ("rev", "sort", "next"):
        return "".join(word), "".join(CHAIN[verb](word))
    if verb == "copy":
        return "".join(word), "".join(word)
    if verb == "last":
        return "".join(word), word[-1]
    if verb == "count":
        word = rng.choices("abc", k=5)
        return f"{(x := rng.choice('abc'))} {''.join(word)}", str(word.count(x))
    if verb == "max":
        return f"{a:02} {b:02}", f"{max(a, b):02}"
    if verb == "add":
        return f"{a:02} {b:02}", f"{a + b:02}"
    if verb == "sub":
        return f"{max(a, b):02} {min(a, b):02}", f"{abs(a - b):02}"
    if verb == "what":
        return (country := rng.choice(list(CAPITALS))), CAPITALS[country]
    if verb == "sum":
        terms = [rng.randint(1, 9) for _ in range(rng.randint(4, 6))]
        return " ".join(map(str, terms)), running(terms)
    return chain(rng, word[:4])                                             # do


def domain(rng, verb):
    """(arguments, answer) of one chemistry prompt."""
    some = rng.sample(SYMBOLS, rng.randint(3, 4))
    masses = [ELEMENTS[x][1] for x in some]
    counts = [rng.randint(1, 5) for _ in some]
    formula = [f"{x}{n if n > 1 else ''}" for x, n in zip(some, counts)]
    if verb == "what":
        return ELEMENTS[some[0]][0], some[0]
    if verb == "next":
        return some[0], after(some[0])
    if verb == "max":
        return f"{some[0]} {some[1]}", max(some[:2], key=SYMBOLS.index)
    if verb == "sort":
        return "".join(some), "".join(CHAIN[verb](some))
    if verb == "add":
        return f"{some[0]} {some[1]}", f"{masses[0]:02}+{masses[1]:02}={masses[0] + masses[1]:02}"
    if verb == "count":
        return "".join(formula), str(sum(counts))
    if verb == "sum":
        return " ".join(formula), running(counts)
    return chain(rng, some[:3])                                             # do


def held_out(prompt):
    """One prompt in eight, the same ones in every run."""
    return hashlib.md5(prompt.encode()).digest()[0] % 8 == 0


def draw(rng, branch, verb, evaluation):
    """One prompt row (data/prompts.py) of a skill, from the training or from the held-out side."""
    while True:
        arguments, answer = (general if branch == "general" else domain)(rng, verb)
        prompt = f"{verb} {arguments}>"
        if (branch, verb) in FACTS or held_out(prompt) == evaluation:
            return {"prompt": prompt, "answer": answer, "solution": answer, "grader": "exact", "skill": verb}


def rows(rng, branch, verbs, count, evaluation=False):
    return [draw(rng, branch, verbs[i % len(verbs)], evaluation) for i in range(count)]


def tokenizer(words=tuple(VERBS), symbols="", marks=" >+="):
    """One token per word, one per symbol or character otherwise."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted({*marks, *"0123456789", *LETTERS, *LETTERS.upper(), *symbols})
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *words, *characters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    longest_first = sorted(symbols, key=len, reverse=True)
    pieces = Regex("|".join([*(rf"\b{word}\b" for word in words), *longest_first, "[\\s\\S]"]))
    core.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False,
                                   padding_side="left")


def model(vocab_size, seed, hidden=128, layers=3):
    """An untrained Qwen3 of 0.6 M parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4, max_position_embeddings=128,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0))


def build(out, seed, generalist, specialist, prompts, references, evaluation):
    """Write the untrained model and every prompt file to `out`. The counts are rows per file."""
    out, everything = Path(out), COVERED + UNCOVERED + ("add", "sum")       # the hardest two come twice
    few = max(generalist // 16, len(DOMAIN))                                # 6% of the generalist's data
    draws = {  # file -> (branch, skills, rows)
        "generalist": [("general", everything, generalist - few), ("domain", DOMAIN, few)],
        "specialist": [("domain", DOMAIN, specialist)],
        "general": [("general", COVERED, prompts)],
        "domain": [("domain", DOMAIN, prompts // 2)],
        "eval_covered": [("general", COVERED, evaluation)],
        "eval_uncovered": [("general", UNCOVERED, evaluation)],
        "eval_domain": [("domain", DOMAIN, evaluation)]}
    files = {}
    for name, parts in draws.items():
        rng = random.Random(f"{seed} {name}")
        files[name] = [row for part in parts for row in rows(rng, *part, evaluation=name.startswith("eval"))]
        if len(parts) > 1:
            rng.shuffle(files[name])
    for branch, count in (("general", references), ("domain", references // 2)):
        files[f"{branch}_references"] = files[branch][:count]
        files[branch] = unsolved(files[branch])
    write(out, tokenizer(), seed, files)


def unsolved(rows):
    """The rows without their solutions."""
    return [{key: row[key] for key in row if key != "solution"} for row in rows]


def write(out, tok, seed, files):
    """OUT/init, an untrained model with its tokenizer, and OUT/NAME.jsonl for each {name: rows}."""
    model(len(tok), seed).save_pretrained(out / "init")
    tok.save_pretrained(out / "init")
    for name, lines in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generalist", type=int, default=90_000, help="rows for the general teacher")
    parser.add_argument("--specialist", type=int, default=40_000, help="rows for the domain teacher")
    parser.add_argument("--prompts", type=int, default=512,
                        help="general proxy prompts; half as many for the domain")
    parser.add_argument("--references", type=int, default=128,
                        help="general proxy prompts with a solution; half as many for the domain")
    parser.add_argument("--evaluation", type=int, default=480, help="rows per evaluation file")
    build(**vars(parser.parse_args()))
