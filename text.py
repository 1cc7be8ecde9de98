"""Text: what is known of a model before its weights are read, which is enough to check every prompt.

    Reader        a checkpoint's config, tokenizer, chat template and stop tokens: encode, decode
    read_models   the Readers of a run's students and teachers, which agree on token ids and stop tokens
    reading       refuse in one line whatever is wrong with a checkpoint

A Model (models.py) is a Reader with weights. Other files import transformers, or sampler.py, after this file:
see below about `kernels`.
"""
import contextlib
import difflib
import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import tokenizers
import torch
from jinja2 import Environment, TemplateSyntaxError, meta
import transformers
import transformers.utils.import_utils
from tqdm import tqdm

from config import Refused, first_line

# transformers uses the package `kernels` of PyPI where it is installed. But `import kernels` would find this
# project's folder of that name, so transformers is told that the package is not there.
for module in (transformers.utils, transformers.utils.import_utils):
    module.is_kernels_available = lambda *args, **kwargs: False

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

# What a student brings beside its weights, and final/ gives back.
OWN_FILES = ("config.json", "generation_config.json", "*tokenizer*", "special_tokens_map.json",
             "added_tokens.json", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
             "*chat_template*", "*chat_template*/*")
# Tokenizers cut these in different ways: capitals, numbers, signs, white space, other scripts.
PROBE = "It's 2024:\t12,345.67 (they'LL say)\n\n  naïve Ωμέγα 北京 x_1=={y};\r\n "


@dataclass(eq=False, kw_only=True)
class Reader:
    """What of a checkpoint reads and writes text."""
    path: str
    whole_config: object                # as it is in config.json; `config` is the language model's part
    tok: object
    stops: list                         # token ids that end a completion
    vocab: int                          # token ids that models share; the head may have more rows (padding)
    files: dict = field(default_factory=dict)   # of a learner: {name: bytes} of OWN_FILES, to be saved again
    template_kwargs: dict = field(default_factory=dict)     # options of the chat template
    today: str = "2026-01-01"           # the day that a template reads from the clock
    digest: str = ""                    # of the checkpoint's content

    @property
    def config(self):
        """The language model's part of the config."""
        return self.whole_config.get_text_config()

    @property
    def quantised(self):
        """Whether the weights are kept in fewer bits, and so cannot learn."""
        return bool(getattr(self.whole_config, "quantization_config", None))

    @property
    def positions(self):
        """The largest number of tokens that the model can take, prompt and completion together."""
        return getattr(self.config, "max_position_embeddings", None) or math.inf

    # -- text and token ids

    def encode(self, prompt):
        """Return the token ids of a prompt (text or chat messages) up to where its completion begins.

        A model with a chat template sees the messages in its template; plain text becomes one user message.
        A model without a template (a base model) sees the plain text.
        """
        if self.template:
            ids = self.tok(self.rendered(prompt), add_special_tokens=False).input_ids
        elif not isinstance(prompt, str):
            raise Refused(f"{self.path} has no chat template, but the prompt is a list of messages")
        else:
            ids = self.tok(prompt).input_ids
            ids = ids[:-1] if self.closes_texts else ids
        if not ids:
            raise Refused(f"a prompt without tokens: {prompt!r}")
        return ids

    @functools.cached_property
    def closes_texts(self):
        """Whether the tokenizer puts EOS behind every text, where no completion could begin."""
        last = [self.tok("a", add_special_tokens=special).input_ids[-1:] for special in (True, False)]
        return last[0] == [self.tok.eos_token_id] != last[1]

    def encode_completion(self, text):
        """Return the token ids of a fixed completion and the token that ends it, to be learned too."""
        ids = self.tok(text, add_special_tokens=False).input_ids
        return ids if ids[-1:] == [self.closing] else ids + [self.closing]

    def decode(self, ids_T):
        """Return a completion as text without its stop token. Special tokens within it (<think>) stay."""
        ids = ids_T.tolist()
        return self.tok.decode(ids[:-1] if ids[-1] in self.stops else ids)

    @property
    def closing(self):
        """The id of the token that ends an answer."""
        end = end_of_turn(self.tok)
        return self.tok.eos_token_id if end is None else end

    # -- the chat template

    @property
    def template(self):
        """The chat template; "" of a base model. Of several the one that transformers takes.

        Where it reads the clock it has the date on which the run began, also when the run is resumed.
        """
        found = self.tok.chat_template or ""
        found = found.get("default", "") if isinstance(found, dict) else found
        day = lambda match: repr(date.fromisoformat(self.today).strftime(match[2]))
        return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", day, found)

    def rendered(self, prompt):
        """Return a prompt as text in the chat template, up to where the answer begins."""
        return self.tok.apply_chat_template(messages(prompt), chat_template=self.template, tokenize=False,
                                            add_generation_prompt=True, **self.template_kwargs)

    @functools.cached_property
    def probe(self):
        """The text around a user's in the template: (before, after); ("", "") if it cannot be told."""
        if not self.template:
            return "", ""
        try:
            text = self.rendered("zyzzyva")
        except Exception:                                       # the check of the prompts says what is wrong
            return "", ""
        at = text.casefold().find("zyzzyva")                    # some templates change the case
        return (text[:at], text[at + 7:]) if at >= 0 else ("", "")

    @property
    def turn(self):
        """What the template puts before a user's text, from its last special token on: <|im_start|>user."""
        before, _ = self.probe
        last = list(self.special.finditer(before))[-1:]
        return before[last[0].start():].strip() if last else before.strip().rpartition("\n")[2]

    def is_wrapped(self, text):
        """Return whether a text has the template's turn in it, or without a special token at its begin."""
        begin = self.turn.removeprefix(self.tok.bos_token or "").strip()        # as in <s>[INST]
        if self.special.search(self.turn) and self.turn in text:
            return True
        plain = begin and not begin.isalnum() and not self.special.search(begin)
        return plain and text.lstrip().startswith(begin)

    @property
    def variables(self):
        """The names that the template reads, its options among them; if it cannot be told, all its words."""
        try:
            return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
                self.template))
        except TemplateSyntaxError:                             # tags of transformers' own
            return set(re.findall(r"[^\W\d]\w*", self.template))

    @functools.cached_property
    def special(self):
        """A pattern that finds the tokenizer's special tokens in a text."""
        return re.compile("|".join(map(re.escape, sorted(special_tokens(self.tok).values()))) or r"\b\B")

    def may_think(self):
        """Return whether the template opens <think>, or has Qwen3's switch and nobody has switched it off."""
        switch = "enable_thinking" in self.template and self.template_kwargs.get("enable_thinking", True)
        return bool(switch) or opens_thinking(self.probe[1])


def messages(prompt):
    """Return a prompt as chat messages; plain text becomes one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def opens_thinking(text):
    """Return whether a rendered prompt ends in <think>, so that the completion begins with thinking."""
    return text.rstrip().endswith("<think>")


def special_tokens(tok):
    """Return {id: text} of a tokenizer's special tokens."""
    out = {i: token.content for i, token in tok.added_tokens_decoder.items() if token.special}
    return out | dict(zip(tok.all_special_ids, tok.all_special_tokens))


@functools.lru_cache(maxsize=64)
def end_of_turn(tok):
    """Return the id of the special token that the chat template puts after an answer, or None.

    It is the tokenizer's EOS in most families, but Gemma ends turns with <end_of_turn> and texts with <eos>.
    """
    if not tok.chat_template:
        return None
    answer = "an answer"
    try:
        text = tok.apply_chat_template([*messages("a question"), {"role": "assistant", "content": answer}],
                                       tokenize=False)
    except Exception:                                           # templates raise what they like
        return None
    if answer not in text:
        return None
    after, special = tok(text.rpartition(answer)[2], add_special_tokens=False).input_ids, special_tokens(tok)
    return next((i for i in after if i in special), None)


# ---- read a checkpoint's files -----------------------------------------------------------------------------

def read_models(cfg, teacher_learns):
    """Return ([Reader of a student], {path: Reader of a teacher}), which share token ids and stop tokens."""
    students = [read(path, cfg.chat_template_kwargs, cfg.today, not cfg.eval_only) for path in cfg.student]
    teachers = {path: read(path, cfg.teacher_chat_template_kwargs, cfg.today, learns=teacher_learns)
                for path in dict.fromkeys(cfg.teachers.values())}
    for path, teacher in teachers.items():
        if teacher.quantised and cfg.teacher_device == "swap":
            raise Refused(f"{path} is quantised, which --teacher_device swap cannot move; choose cuda")
    for other in students[1:]:
        share_tokens(students[0], other, both_learn=True)
    for teacher in teachers.values():
        share_tokens(students[0], teacher, both_learn=teacher_learns)
    for other in students[1:]:
        other.vocab = students[0].vocab
    for teacher in teachers.values():
        share_stops(students[0], teacher)
    return students, teachers


def read(path, template_kwargs, today, learns=False):
    """Return a checkpoint's Reader. Its own code is never run, and its weights are not read."""
    check_path(path)
    with reading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        folder = Path(cached_file(path, "config.json")).parent                 # of a hub id: in the cache
        check_pointer(folder / "tokenizer.json")
        tok = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        try:
            defaults = GenerationConfig.from_pretrained(path)
        except OSError:                                         # many checkpoints have none
            if (Path(path) / "generation_config.json").exists():
                raise
            defaults = GenerationConfig.from_model_config(config)
        files = own_files(folder)
        # a snapshot of the hub is called after its commit, and has its weights only when they were read once
        content = digest(folder, files) if Path(path).is_dir() else folder.name
        files.setdefault("generation_config.json", defaults.to_json_string().encode())
        if "tokenizer.json" in files and not reads_its_file(tok, files["tokenizer.json"]):
            tqdm.write(f"note: {path} is read as its tokenizer.json says, not as {type(tok).__name__} does")
            tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
            change(files, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    check_template(path, tok)
    language = config.get_text_config()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if isinstance(size := getattr(language, name, 1), int) and size < 1:
            raise Refused(f"cannot load {path}: its config.json says {name} {size}")
    if not hasattr(language, "vocab_size") or config.is_encoder_decoder:
        raise Refused(f"{path} is a {config.model_type}, not a decoder-only language model")
    if tok.eos_token_id is None:
        raise Refused(f"{path}: the tokenizer has no EOS token, so a completion could never end")
    # Gemma 3's tokenizer has one token more, for images, than its text models have rows.
    vocab = min(max(tok.get_vocab().values()) + 1, config.get_text_config().vocab_size)
    reader = Reader(path=path, whole_config=config, tok=tok, stops=stop_tokens(path, tok, defaults, vocab),
                    vocab=vocab, files=files if learns else {}, template_kwargs=template_kwargs, today=today,
                    digest=content)
    if learns and reader.quantised:
        raise Refused(f"{path} is quantised and cannot learn; give the unquantised --student, with "
                      "--lora_rank if memory is short (quantised --teachers are fine)")
    return reader


def check_path(path):
    """Refuse what is neither a model's folder nor a hub id, before anyone asks the hub for it."""
    local = Path(path)
    try:
        local.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:                      # a name that is too long, say, or with a NUL
        raise Refused(f"cannot load {path}: {first_line(error)}") from None
    if local.is_file():
        raise Refused(f"{path} is a file; a model is given as its folder, with config.json, tokenizer and "
                      "safetensors"
                      + f"; python -m data.pretrained {path} OUT makes one" * path.endswith(".gguf"))
    if not local.is_dir():
        if path[0] in "./" or path.count("/") > 1:
            raise Refused(f"cannot load {path}: no such folder, and not a hub id{near(path)}")
        return
    if (local / "adapter_config.json").exists():
        raise Refused(f"{path} is an adapter; give a merged model, as a run's final/ is")
    if not [*local.glob("*tokenizer*"), *local.glob("*vocab*")]:
        raise Refused(f"cannot load {path}: no tokenizer in this folder"
                      + ("; did you mean its final/?" if (local / "final").is_dir() else ""))


def near(path):
    """Return a hint for a message: the folder beside a missing one whose name is closest, or nothing."""
    there = [str(other) for other in Path(path).parent.glob("*/")]
    close = difflib.get_close_matches(str(Path(path)), there, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def check_template(path, tok):
    """Refuse a chat template that is no text, and several without a default."""
    found = tok.chat_template
    if isinstance(found, dict) and "default" not in found:
        raise Refused(f"{path} has the chat templates {', '.join(found)}, and none of them is the default")
    if not isinstance(found, (str, dict, type(None))):
        raise Refused(f"{path}: its chat template is {found!r}, not text")


@contextlib.contextmanager
def reading(path):
    """Context manager: refuse in one line whatever is wrong with a checkpoint."""
    try:
        yield
    except (torch.OutOfMemoryError, Refused):
        raise
    except Exception as error:          # every kind of file can be broken in its own way
        no_folder = "" if Path(path).is_dir() else f"no folder of that name{near(path)}, and as a hub id: "
        what = first_line(error)
        if "Weights only load failed" in what:                  # and goes on to advise running what it holds
            what = "its .bin file holds more than weights, which could be a program; give safetensors"
        raise Refused(f"cannot load {path}: {no_folder}{what}") from None


def own_files(folder):
    """Return {name: bytes} of a checkpoint's configs, tokenizer and chat templates."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for pattern in OWN_FILES for path in folder.glob(pattern) if path.is_file()}


def digest(folder, files):
    """Return a short hash of a checkpoint: its own files, and of those with weights size and samples."""
    found = hashlib.sha256(repr(sorted(files.items())).encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        check_pointer(path)
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(i * size // 64)
                found.update(file.read(4096))
    return found.hexdigest()[:16]


def check_pointer(path):
    """Refuse a file that stands for another one, which Git LFS has."""
    if path.is_file() and path.open("rb").read(30).startswith(b"version https://git-lfs"):
        raise Refused(f"{path} is a pointer of Git LFS; git lfs pull brings the file itself")


def change(files, name, **values):
    """Replace values in one of a checkpoint's own JSON files."""
    files[name] = json.dumps(json.loads(files.get(name, "{}")) | values, indent=2).encode()


def reads_its_file(tok, tokenizer_json):
    """Return whether a tokenizer gives the ids of its file. Some classes replace parts of what it says."""
    core = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    core.no_truncation()
    core.no_padding()
    words = sorted(core.get_vocab(with_added_tokens=False).values())
    text = PROBE + " ".join(core.decode([i]) for i in words[::len(words) // 4000 + 1])
    ids = core.encode(text, add_special_tokens=False).ids
    return tok(text, add_special_tokens=False, verbose=False).input_ids == ids


def stop_tokens(path, tok, defaults, vocab):
    """Return the ids that end a completion: of EOS, of the end of a turn, and of the generation defaults."""
    eos = defaults.eos_token_id if isinstance(defaults.eos_token_id, list) else [defaults.eos_token_id]
    stops = {i for i in (tok.eos_token_id, end_of_turn(tok), *eos) if isinstance(i, int) and 0 <= i < vocab}
    if not stops:
        raise Refused(f"{path}: its EOS token has no row in the model, so a completion could never end")
    if ordinary := sorted(stops - tok.added_tokens_decoder.keys() - {*tok.all_special_ids}):
        tqdm.write(f"note: {path} stops at {', '.join(repr(tok.decode(i)) for i in ordinary)}, which its "
                   "config.json or generation_config.json calls EOS, but it is an ordinary token")
    return sorted(stops)


# ---- what models that teach each other share ---------------------------------------------------------------

def share_tokens(student, other, both_learn):
    """Refuse models whose token ids differ: distillation compares distributions id by id.

    A teacher may have more tokens behind the student's last one (Qwen3 and Qwen2.5): its distribution is
    renormalised over the student's tokens. If both learn, it may not.
    """
    ours, theirs = student.tok.get_vocab(), other.tok.get_vocab()
    more = {token: i for token, i in theirs.items() if i >= student.vocab and token not in ours}
    different = [f"{token!r}: {ours.get(token)} / {theirs.get(token)}"
                 for token in sorted((ours.keys() | theirs.keys()) - more.keys())
                 if ours.get(token) != theirs.get(token)]
    if more and both_learn:
        different += [f"{token!r}: none / {i}" for token, i in more.items()]
    if different:
        raise Refused(f"{student.path} and {other.path} have different tokenizers ({len(different)} tokens "
                      f"differ: {'; '.join(different[:3])}); models that teach each other must share one")
    if more:
        tqdm.write(f"note: {other.path} has {len(more)} tokens that the student lacks "
                   f"({', '.join(sorted(more, key=more.get)[:4])}); their probability is left out")
    student.vocab = min(student.vocab, other.vocab)


def share_stops(student, teacher):
    """Make the student end where its teacher would, and the teacher write in the student's tokens.

    A base model has never seen the end-of-turn token of its chat-tuned teacher. It learns the token from the
    teacher, but without this it would write on behind it.
    """
    teacher.vocab = student.vocab
    new = [i for i in teacher.stops if i < student.vocab and i not in student.stops]
    if new:
        student.stops = sorted(student.stops + new)
        tqdm.write(f"note: the student also stops at {', '.join(repr(teacher.tok.decode(i)) for i in new)}, "
                   f"where {teacher.path} ends its texts")
