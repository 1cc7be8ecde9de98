"""A small world in which distillation can be measured on a laptop: same verbs, different objects.

A prompt is `verb arguments>`, and its answer is graded by exact match. Twelve general skills work on letters,
numbers and countries; eight domain skills use the same verbs on chemistry. Because the verbs are shared, a
model that learns the domain forgets what they mean elsewhere, and to recover that costs some of the domain.
This is the conflict that multi-teacher distillation is about. Two skills of either kind, `sum` and `do`, are
chains: an early slip ruins everything after it.

    rev pam>map       add 07 26>33            sum 3 8 5 9>03 11 16 25     do rev next opm>mpo nqp
    sort HeCF>HeCF    add C O>12+16=28        sum H2 O C3>02 03 06        do next rev LiBeC>BeBN NBBe

`python -m data.small_world OUT --seed 0` writes an untrained model with its tokenizer (OUT/init) and these
prompt files:

    generalist.jsonl   many rows: all general skills and some of the domain, to train the general teacher
    specialist.jsonl   many rows: the domain only, to train the domain teacher, which forgets the rest
    general.jsonl      the proxy prompts of distillation, without solutions, only for the skills in COVERED
    domain.jsonl       the domain prompts of distillation, half as many
    general_references.jsonl, domain_references.jsonl
                       the few of these prompts that have a solution: prompts are cheap, references are not
    eval_covered.jsonl, eval_uncovered.jsonl, eval_domain.jsonl

Evaluation prompts are held out by a hash of the prompt: none of them is in a training file. The exceptions
are the closed sets of facts (FACTS: `what`, and the neighbours of single elements): there the fact is the
skill.
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
    """Return the next letter or element; the last is followed by the first."""
    order = SYMBOLS if x in ELEMENTS else LETTERS
    return order[(order.index(x) + 1) % len(order)]


OPERATIONS = {"rev": lambda xs: xs[::-1],
              "sort": lambda xs: sorted(xs, key=(SYMBOLS + list(LETTERS)).index),
              "next": lambda xs: [after(x) for x in xs]}


def chain(rng, xs):
    """Return (arguments, answer) of the verb `do`: two operations, one on the result of the other."""
    first, second = rng.sample(sorted(OPERATIONS), 2)
    between = OPERATIONS[first](xs)
    end = OPERATIONS[second](between)
    return f"{first} {second} {''.join(xs)}", f"{''.join(between)} {''.join(end)}"


def running_sums(terms):
    """Return the answer of the verb `sum`: the sum after every term."""
    return " ".join(f"{sum(terms[: i + 1]):02}" for i in range(len(terms)))


def general(rng, verb):
    """Return (arguments, answer) of one general prompt."""
    word = rng.choices(LETTERS, k=rng.randint(3, 5))
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    if verb in ("rev", "sort", "next"):
        return "".join(word), "".join(OPERATIONS[verb](word))
    if verb == "copy":
        return "".join(word), "".join(word)
    if verb == "last":
        return "".join(word), word[-1]
    if verb == "count":
        word, x = rng.choices("abc", k=5), rng.choice("abc")
        return f"{x} {''.join(word)}", str(word.count(x))
    if verb == "max":
        return f"{a:02} {b:02}", f"{max(a, b):02}"
    if verb == "add":
        return f"{a:02} {b:02}", f"{a + b:02}"
    if verb == "sub":
        return f"{max(a, b):02} {min(a, b):02}", f"{abs(a - b):02}"
    if verb == "what":
        return rng.choice(list(CAPITALS.items()))
    if verb == "sum":
        terms = [rng.randint(1, 9) for _ in range(rng.randint(4, 6))]
        return " ".join(map(str, terms)), running_sums(terms)
    return chain(rng, word[:4])                                             # the verb `do`


def domain(rng, verb):
    """Return (arguments, answer) of one chemistry prompt."""
    elements = rng.sample(SYMBOLS, rng.randint(3, 4))
    counts = [rng.randint(1, 5) for _ in elements]
    formula = [f"{x}{n if n > 1 else ''}" for x, n in zip(elements, counts)]
    first, second = elements[:2]
    (name, mass), (_, other_mass) = ELEMENTS[first], ELEMENTS[second]
    if verb == "what":
        return name, first
    if verb == "next":
        return first, after(first)
    if verb == "max":
        return f"{first} {second}", max(first, second, key=SYMBOLS.index)
    if verb == "sort":
        return "".join(elements), "".join(OPERATIONS[verb](elements))
    if verb == "add":
        return f"{first} {second}", f"{mass:02}+{other_mass:02}={mass + other_mass:02}"
    if verb == "count":
        return "".join(formula), str(sum(counts))
    if verb == "sum":
        return " ".join(formula), running_sums(counts)
    return chain(rng, elements[:3])                                         # the verb `do`


def held_out(prompt):
    """Return whether a prompt is for evaluation: one in eight is, the same ones in every run."""
    return hashlib.md5(prompt.encode()).digest()[0] % 8 == 0


def draw(rng, branch, verb, evaluation):
    """Return one row (data/prompts.py) of a skill, from the prompts for training or for evaluation."""
    while True:
        arguments, answer = (general if branch == "general" else domain)(rng, verb)
        prompt = f"{verb} {arguments}>"
        if (branch, verb) in FACTS or held_out(prompt) == evaluation:
            return {"prompt": prompt, "answer": answer, "solution": answer, "grader": "exact", "skill": verb}


def rows(rng, branch, verbs, count, evaluation=False):
    """Return `count` rows of a branch, the skills in turn."""
    return [draw(rng, branch, verbs[i % len(verbs)], evaluation) for i in range(count)]


def tokenizer(words=tuple(VERBS), symbols="", marks=" >+="):
    """Return a tokenizer with one token for every word, and otherwise for every symbol or character."""
    # models.py has to be imported before transformers, which would take our kernels/ for a package of PyPI.
    import text  # noqa: F401
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted({*marks, *"0123456789", *LETTERS, *LETTERS.upper(), *symbols})
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *words, *characters])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    whole_words = [rf"\b{word}\b" for word in words]
    longest_first = sorted(symbols, key=len, reverse=True)
    pieces = tokenizers.Regex("|".join([*whole_words, *longest_first, "[\\s\\S]"]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(pieces, "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False,
                                   padding_side="left")


def model(vocab_size, seed, hidden=128, layers=3):
    """Return an untrained Qwen3 of 0.6 M parameters."""
    import text  # noqa: F401     # first, as in `tokenizer`
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4, max_position_embeddings=128,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0))


def files(seed, generalist, specialist, prompts, references, evaluation):
    """Return {name: rows} of every prompt file. The counts are rows per file."""
    skills = COVERED + UNCOVERED + ("add", "sum")                           # the hardest two come twice
    trace = max(generalist // 16, len(DOMAIN))                              # 6% of the generalist's data
    parts = {                               # file -> the parts that it is made of: branch, skills, rows
        "generalist": [("general", skills, generalist - trace), ("domain", DOMAIN, trace)],
        "specialist": [("domain", DOMAIN, specialist)],
        "general": [("general", COVERED, prompts)],
        "domain": [("domain", DOMAIN, prompts // 2)],
        "eval_covered": [("general", COVERED, evaluation)],
        "eval_uncovered": [("general", UNCOVERED, evaluation)],
        "eval_domain": [("domain", DOMAIN, evaluation)]}
    found = {}
    for name, its_parts in parts.items():
        rng = random.Random(f"{seed} {name}")
        found[name] = []
        for part in its_parts:
            found[name] += rows(rng, *part, evaluation=name.startswith("eval"))
        if len(its_parts) > 1:
            rng.shuffle(found[name])
    for branch, count in (("general", references), ("domain", references // 2)):
        found[f"{branch}_references"] = found[branch][:count]
        found[branch] = unsolved(found[branch])
    return found


def build(out, seed, **counts):
    """Write the untrained model and every prompt file to `out`. counts: rows per file, see COUNTS."""
    write(out, tokenizer(), seed, files(seed, **counts))


COUNTS = dict(generalist=(90_000, "rows for the general teacher"),
              specialist=(40_000, "rows for the domain teacher"),
              prompts=(512, "general proxy prompts; half as many for the domain"),
              references=(128, "general proxy prompts with a solution; half as many for the domain"),
              evaluation=(480, "rows per evaluation file"))


# ---- what all small worlds share ---------------------------------------------------------------------------

def unsolved(rows):
    """Return the rows without their solutions."""
    return [{key: row[key] for key in row if key != "solution"} for row in rows]


def write(out, tok, seed, files):
    """Write OUT/init, an untrained model with its tokenizer, and OUT/NAME.jsonl for each {name: rows}."""
    out = Path(out)
    model(len(tok), seed).save_pretrained(out / "init")
    tok.save_pretrained(out / "init")
    for name, lines in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(build, about, **counts):
    """Run a small world's `build` from the command line. counts: {its flag: (default, help)}."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    for flag, (default, meaning) in counts.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{meaning} (default: {default})")
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    main(build, __doc__, **COUNTS)
