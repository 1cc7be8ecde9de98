"""Prompts: from a file to the rows that a run reads.

A prompt file has one JSON object per line:

    prompt      text, or a list of chat messages {"role": .., "content": ..}
    solution    reference completion, for methods that learn from fixed data                    (optional)
    answer      what `grader` compares a completion with                                        (optional)
    grader      a name in data.graders, or FILE.py:NAME; without it that of --grader, exact     (optional)
    chosen, rejected    completions of which dpo prefers the first                              (optional)
    rationales  {teacher's name: text}, what compact weighs                                     (optional)

A row may have further fields, such as its topic, which sai_dpo can cluster by.
Only prompts go through a chat template. Completions are token ids, from the sampler or from
Model.encode_completion (models.py), and the same for student and teacher, whatever prompt each of them saw.
"""
import json
from pathlib import Path

from config import Refused, nearest

from . import convert
from .graders import GRADERS, is_own, own


def load_prompts(source, branch):
    """Return the rows of a prompt file or of a public set (data/convert.py), with branch and row number.

    Anything unusable is refused with its line number.
    """
    prompts = []
    for number, line in enumerate(read_source(source), 1):
        if line.strip():
            row = parse_row(f"{source}:{number}", line)
            if row.get("branch", branch) != branch:
                raise Refused(f"{source}:{number}: this row is of branch {row['branch']!r}, but the file was "
                              f"given as branch {branch!r}; split the file")
            prompts.append({**row, "branch": branch, "row": number})
    if not prompts:
        raise Refused(f"{source} has no prompts")
    return prompts


def read_source(source):
    """Return the lines of a prompt file, or of a public set in the form of one."""
    if source.partition(":")[0] in convert.SETS:
        return [json.dumps(row) for row in convert.rows(source)]
    if not Path(source).is_file():
        raise Refused(f"no prompt file {source} (public sets that are known: {', '.join(convert.SETS)})")
    try:
        return Path(source).read_text(encoding="utf-8-sig").split("\n") # splitlines would split at U+2028
    except UnicodeDecodeError as error:
        raise Refused(f"{source} is not UTF-8 text ({error})") from None


def parse_row(where, line):
    """Return the row on a line; refuse what is not a prompt row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not row.get("prompt"):
        raise Refused(f'{where}: a row is an object with a non-empty "prompt", not {line[:60]}')
    if not isinstance(row["prompt"], str) and not is_chat(row["prompt"]):
        raise Refused(f'{where}: "prompt" is text or a list of {{"role", "content"}} messages')
    if "answer" in row and not isinstance(row["answer"], (str, int, float)):
        raise Refused(f'{where}: "answer" is text or a number, not {row["answer"]!r}')
    if "answer" in row and "grader" in row:
        check_grader(f"{where}: ", row["grader"])
    return row


def check_grader(where, grader):
    """Refuse a name that is no grader's and no function's in a file. where: how the message begins."""
    if is_own(grader):
        own(grader)
    elif str(grader) not in GRADERS:
        raise Refused(f"{where}unknown grader {grader!r}; {nearest(grader, GRADERS)}, or FILE.py:NAME")


def is_chat(prompt):
    """Return whether a prompt is a list of chat messages."""
    return isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt)


def prompt_text(prompt):
    """Return a prompt as one readable text, for logs: of chat messages the last one."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
