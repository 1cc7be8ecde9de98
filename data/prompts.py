"""Prompts: from a file to the rows that a run reads.

A prompt file has one JSON object per line, or is one JSON list of them, a .csv or a .parquet table:

    prompt      text, or a list of chat messages {"role": .., "content": ..}, the last one the user's
    teacher_prompt      the prompt as its teacher sees it, text or chat, where that is another  (optional)
    solution    reference completion, for methods that learn from fixed data                    (optional)
    answer      what `grader` compares a completion with                                        (optional)
    grader      a name in data.graders, or FILE.py:NAME; without it that of --grader, exact     (optional)
    chosen, rejected    completions of which dpo prefers the first                              (optional)
    rationales  {teacher's name: text}, what compact weighs                                     (optional)

A row may have further fields, such as its topic, which sai_dpo can cluster by. A row without a prompt can be
in one of these forms, whose last answer becomes the solution:

    messages                        chat messages
    conversations                   of ShareGPT: {"from": "human", "value": ..}, and the answers "from": "gpt"
    instruction, input, output      of Alpaca
    question                        text

Only prompts go through a chat template. Completions are token ids, from the sampler or from
Reader.encode_completion (text.py), and the same for student and teacher, whatever prompt each of them saw.
"""
import csv
import difflib
import io
import json
import math
from pathlib import Path

from config import Refused, first_line, nearest, parse_json

from . import convert
from .graders import GRADERS, is_own, own

FIELDS = ("prompt", "teacher_prompt", "solution", "answer", "grader", "chosen", "rejected", "rationales",
          "branch")
FORMATS = "JSON lines, a JSON list, .csv or .parquet"
SHAREGPT = {"human": "user", "gpt": "assistant"}


def load_prompts(source, branch):
    """Return the rows of a prompt file or of a public set (data/convert.py), with branch and row number.

    Anything unusable is refused with the number of its line, or in a list or a table of its row.
    """
    prompts = []
    for number, row in read_source(source):
        row = check_prompt(f"{source}:{number}", row)
        if row.get("branch", branch) != branch:
            raise Refused(f"{source}:{number}: this row is of branch {row['branch']!r}, but the file was "
                          f"given as branch {branch!r}; split the file")
        prompts.append({**row, "branch": branch, "row": number})
    if not prompts:
        raise Refused(f"{source} has no prompts")
    return prompts


# ---- formats -----------------------------------------------------------------------------------------------

def read_source(source):
    """Return [(number, row)] of a prompt file or of a public set."""
    if source.partition(":")[0] in convert.SETS:
        return list(enumerate(convert.rows(source), 1))
    path = Path(source)
    try:
        is_file, what = path.is_file(), "is a folder, not a file" if path.is_dir() else "is no file"
    except (OSError, ValueError) as error:                      # a name that is too long, say, or with a NUL
        raise Refused(f"no prompt file {source}: {first_line(error)}") from None
    if not is_file:
        raise Refused(f"no prompt file {source}: it {what} (public sets that are known: "
                      f"{', '.join(convert.SETS)})")
    if path.suffix.lower() == ".parquet":
        return list(enumerate(read_parquet(source), 1))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{source} is not UTF-8 text ({error}); a prompt file is {FORMATS}") from None
    if path.suffix.lower() == ".csv":
        return list(enumerate(read_csv(source, text), 1))
    if text.lstrip().startswith("["):
        return list(enumerate(parse(source, text), 1))
    return [(number, parse(f"{source}:{number}", line))         # splitlines would split at U+2028
            for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_csv(source, text):
    """Return the rows of a table with a line of names; every cell is text, and an empty one no field."""
    csv.field_size_limit(2**31 - 1)                             # of a long, which has 32 bits on some systems
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:                                  # a quote that never closes, say
        raise Refused(f"{source}: line {reader.line_num}: {error}") from None
    names = [name for name in reader.fieldnames or [] if name]      # some programs add empty columns
    if len(set(names)) < len(names):
        raise Refused(f"{source}: two columns have the same name")
    for number, row in enumerate(rows, 1):
        if None in row:                                         # where DictReader puts what is too much
            raise Refused(f"{source}:{number}: more cells than the first line has names")
    return [{name: cell for name, cell in row.items() if name and cell} for row in rows]


def read_parquet(source):
    """Return the rows of a .parquet file; an empty cell is no field."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise Refused(f"{source} needs pyarrow: pip install pyarrow") from None
    try:
        rows = parquet.read_table(source).to_pylist()
    except Exception as error:                                  # pyarrow has errors of its own
        raise Refused(f"cannot read {source}: {first_line(error)}") from None
    for number, row in enumerate(rows, 1):
        for name, cell in row.items():
            try:
                json.dumps(cell)
            except TypeError as error:              # "Object of type date is not JSON serializable"
                raise Refused(f"{source}:{number}: {name}: {error}; give text or numbers") from None
    return [{name: cell for name, cell in row.items() if cell is not None} for row in rows]


def parse(where, text):
    """Return what a JSON text says, or refuse it."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise Refused(f"{where}: not JSON ({error}); a prompt file is {FORMATS}") from None


# ---- rows --------------------------------------------------------------------------------------------------

def check_prompt(where, row):
    """Return a row in our own form; refuse what is not a prompt row."""
    row = in_our_form(row) if isinstance(row, dict) else row
    if not isinstance(row, dict) or not row.get("prompt"):
        found = ", ".join(row) or "an empty one" if isinstance(row, dict) else str(row)[:60]
        raise Refused(f'{where}: a row is an object with a non-empty "prompt" (or messages, conversations, '
                      f"instruction, question), not: {found}")
    for name in ("prompt", "teacher_prompt"):
        if not isinstance(row.get(name, ""), str) and not is_chat(row[name]):
            raise Refused(f'{where}: "{name}" is text or a list of {{"role", "content"}} messages')
    if (text := json.dumps(row, ensure_ascii=False)) != text.encode(errors="replace").decode():
        raise Refused(f"{where}: it has half of a surrogate pair (as in \\ud83d), which is no character")
    for name in row.keys() - set(FIELDS):
        for close in difflib.get_close_matches(name, set(FIELDS) - row.keys(), n=1, cutoff=0.8):
            if not (name in close or close in name or name[:-1] == close[:-1]):     # grade, answers, graded
                raise Refused(f'{where}: the field "{name}" is unknown; did you mean "{close}"?')
    answer = row.get("answer", "")
    number = isinstance(answer, (int, float)) and not isinstance(answer, bool) and abs(answer) < math.inf
    if not isinstance(answer, str) and not number:
        raise Refused(f'{where}: "answer" is text or a number, not {answer!r}')
    if "grader" in row:
        check_grader(f"{where}: ", row["grader"])
    return row


def in_our_form(row):
    """Return a row with a prompt, made from its messages, conversations, instruction or question."""
    if "prompt" in row:
        return row
    row = dict(row)
    for name in ("messages", "conversations"):
        if isinstance(turns := row.get(name), (list, tuple)) and all(isinstance(m, dict) for m in turns):
            row["prompt"] = [{"role": SHAREGPT.get(str(m["from"]), m["from"]), "content": m.get("value")}
                             if "from" in m else m for m in row.pop(name)]
            if "solution" not in row and is_chat(row["prompt"]) and row["prompt"][-1]["role"] == "assistant":
                row["solution"] = row["prompt"].pop()["content"]
            return row
    if "instruction" in row:
        parts = [part for part in (row.pop("instruction"), row.pop("input", "")) if part]
        row["prompt"] = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else parts
        if "output" in row:
            row.setdefault("solution", row.pop("output"))
    elif "question" in row:
        row["prompt"] = row.pop("question")
    return row


def check_grader(where, grader):
    """Refuse a name that is no grader's and no function's in a file. where: how the message begins."""
    if is_own(grader):
        own(grader)
    elif str(grader) not in GRADERS:
        raise Refused(f"{where}unknown grader {grader!r}; {nearest(grader, GRADERS)}, or FILE.py:NAME")


def is_chat(prompt):
    """Return whether a prompt is a list of chat messages."""
    return isinstance(prompt, list) and bool(prompt) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt)


def read_text(flag, path):
    """Return the text of a flag's file; refuse what is no text."""
    try:
        if not Path(path).exists() or Path(path).is_file():         # a pipe would be waited for
            return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refused(f"cannot read {flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{flag} {path} is not UTF-8 text ({error})") from None
    except ValueError as error:                                     # a NUL in its name, say
        raise Refused(f"cannot read {flag} {path!r}: {first_line(error)}") from None
    raise Refused(f"cannot read {flag} {path}: it is no file")


def read_system(path):
    """Return the text of a --teacher_system file; refuse a blank one."""
    text = read_text("--teacher_system", path).strip()
    if not text:
        raise Refused(f"--teacher_system {path} is blank, so a teacher would see nothing more")
    return text


def with_system(prompt, text):
    """Return a chat with a text in its system message, before what is there; a text with it before it."""
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    first, *others = prompt
    if first["role"] == "system":
        return [first | {"content": f"{text}\n\n{first['content']}"}, *others]
    return [{"role": "system", "content": text}, *prompt]


def prompt_text(prompt):
    """Return a prompt as one readable text, for logs: of chat messages the last one."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
