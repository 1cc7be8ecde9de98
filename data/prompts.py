"""Prompts: from a file to the token ids that a model sees, and back.

A prompt file has one JSON object per line:

    prompt      text, or a list of chat messages {"role": .., "content": ..}
    solution    reference completion, for methods that learn from fixed data                    (optional)
    answer      what `grader` compares a completion with                                        (optional)
    grader      a name in data.graders.GRADERS; "exact" when there is an answer but no grader   (optional)

A model with a chat template sees its own template around the messages (plain text becomes one user message);
one without (a base model) sees the plain text. The completion is never rendered: it is token ids from the
sampler or from encode_completion, the same for student and teacher, whatever each of them saw before it.
"""
import functools
import json
from pathlib import Path

from . import convert
from .graders import GRADERS


def load_prompts(source, branch):
    """The rows of a prompt file or of a public set (data/convert.py), each with its branch and row number.

    Anything unusable is refused with its line number.
    """
    if source.partition(":")[0] in convert.SETS:
        lines = [json.dumps(row) for row in convert.rows(source)]
    elif Path(source).is_file():
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").split("\n")      # U+2028 does not end a line
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 text ({error})") from None
    else:
        raise ValueError(f"no prompt file {source} (public sets that are known: {', '.join(convert.SETS)})")
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{source}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not row.get("prompt"):
            raise ValueError(f'{source}:{number}: a row is an object with a non-empty "prompt", '
                             f'not {line[:60]}')
        if not isinstance(row["prompt"], str) and not is_chat(row["prompt"]):
            raise ValueError(f'{source}:{number}: "prompt" is text or a list of '
                             '{"role", "content"} messages')
        if "answer" in row and not isinstance(row["answer"], (str, int, float)):
            raise ValueError(f'{source}:{number}: "answer" is text or a number, not {row["answer"]!r}')
        if "answer" in row and str(row.setdefault("grader", "exact")) not in GRADERS:
            raise ValueError(f"{source}:{number}: unknown grader {row['grader']!r}; "
                             f"there are: {', '.join(GRADERS)}")
        if row.get("branch", branch) != branch:
            raise ValueError(f"{source}:{number}: this row is of branch {row['branch']!r}, but the file was "
                             f"given as branch {branch!r}; split the file")
        prompts.append({**row, "branch": branch, "row": number})
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    return prompts


def is_chat(prompt):
    return isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt)


def messages(prompt):
    """A prompt as chat messages; plain text is one of the user's."""
    return prompt if is_chat(prompt) else [{"role": "user", "content": prompt}]


def rendered(tok, prompt, template_kwargs=None):
    """A prompt as text in its model's chat template, up to where the answer begins."""
    return tok.apply_chat_template(messages(prompt), tokenize=False, add_generation_prompt=True,
                                   **(template_kwargs or {}))


def encode_prompt(tok, prompt, template_kwargs=None):
    """Token ids of a prompt as the model sees it, up to where its completion begins."""
    if tok.chat_template:
        ids = tok(rendered(tok, prompt, template_kwargs), add_special_tokens=False).input_ids
    elif is_chat(prompt):
        raise ValueError(f"{tok.name_or_path} has no chat template, but the prompt is a list of messages")
    else:
        ids = tok(prompt).input_ids
        if len(ids) > 1 and ids[-1] == tok.eos_token_id:         # some tokenizers close every text
            ids = ids[:-1]
    if not ids:
        raise ValueError(f"a prompt without tokens: {prompt!r}")
    return ids


@functools.lru_cache(maxsize=64)
def end_of_turn(tok):
    """Id of the special token that the chat template puts after an answer; None: there is none.

    It is the tokenizer's EOS in most families, but Gemma ends turns with <end_of_turn> and texts with <eos>.
    """
    if not tok.chat_template:
        return None
    answer = "an answer"
    try:
        text = tok.apply_chat_template([*messages("a question"), {"role": "assistant", "content": answer}],
                                       tokenize=False)
    except Exception:                                            # templates raise what they like
        return None
    if answer not in text:
        return None
    after = tok(text.rpartition(answer)[2], add_special_tokens=False).input_ids
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special} | set(tok.all_special_ids)
    return next((i for i in after if i in special), None)


def reads_nothing(tok):
    """Whether the chat template leaves out what messages say: some know only lists of parts (text, image)."""
    try:
        return bool(tok.chat_template) and "a question" not in rendered(tok, "a question").lower()
    except Exception:                                            # the prompts themselves will tell
        return False


def may_think(tok, template_kwargs):
    """Whether the chat template has Qwen3's switch for thinking, on unless it is switched off."""
    return "enable_thinking" in (tok.chat_template or "") and template_kwargs.get("enable_thinking", True)


def encode_completion(tok, text):
    """Token ids of a reference completion, closed as its model closes one: it has to learn to stop."""
    end = end_of_turn(tok)
    return tok(text, add_special_tokens=False).input_ids + [tok.eos_token_id if end is None else end]


def prompt_text(prompt):
    """One readable line, for logs."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
