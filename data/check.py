"""The check of all prompts before weights are read. What would fail later is refused, with file and line.

A prompt is what its author meant: every word of it is in what each model reads, and the user spoke last.
"""
import contextlib
import json
import re
from types import SimpleNamespace

from tqdm import tqdm

from config import Refused, first_line, nearest
from text import messages, opens_thinking

from .graders import can_be_correct, without_thinking
from .prompts import check_grader, with_system

RULES = {                   # what a row can break, in the order of the checks -> in words for --dry_run
    "fields": "lack what the method learns from, or what evaluation compares with",
    "user": "do not end with a word of the user",
    "wrapped": "are in the chat template already",
    "template": "cannot be read by a model with every word in them",
    "completion": "have a text to learn from that cannot follow the prompt, or goes on behind its end",
    "answer": "have an answer that no completion can give",
    "tokens": "have tokens that a model does not know",
    "length": "have no room for a completion"}


@contextlib.contextmanager
def breaking(rule):
    """Context manager: whatever is refused in it breaks this rule."""
    try:
        yield
    except Exception as error:                      # graders of one's own, say, raise what they like
        raise error if hasattr(error, "rule") else Fault(rule, first_line(error)) from None


class Fault(Refused):
    """What is wrong with a row. rule: a key of RULES."""

    def __init__(self, rule, message):
        super().__init__(message)
        self.rule = rule


def check_prompts(run):
    """Refuse rows that cannot be rendered, do not fit the models, or cannot be graded or learned from.

    A row that has an answer and names no grader gets that of --grader; with --teacher_system a row to train
    on gets its teacher_prompt. With --drop_long rows that are too long are left out. Return the largest
    lengths in tokens: .prompt, of a prompt as any of the models sees it; .completion; and .read, of a prompt
    that a self-teacher or a tutor can get to read.
    """
    cfg, longest, found = run.cfg, SimpleNamespace(prompt=0, completion=0, read=0), {}
    check_grader("--grader: ", "exact" if cfg.grader is None else cfg.grader)
    every = [*run.prompts.values(), *run.evals.values(), *run.gate_prompts.values()]
    graded = [row for rows in every for row in rows if "answer" in row and "grader" not in row]
    if cfg.grader and not graded:
        raise Refused(f"--grader {cfg.grader} has no effect: every row names its own, or has no answer")
    for row in graded:
        row["grader"] = cfg.grader or "exact"
    check_options(run)
    if run.system:
        tell_teachers(run)
    for branch, rows in run.prompts.items():
        teachers = [run.teachers[branch]] if branch in run.teachers else []
        teachers = run.teachers.values() if run.method.teachers == "any" else teachers
        readers = dict.fromkeys([*run.students, *teachers])     # each model once: a list would repeat one
        check_file(run, cfg.prompts[branch], rows, readers, longest, found, trained=True,
                   read=run.method.reads)
    for name, rows in run.evals.items():
        check_file(run, cfg.eval_prompts[name], rows, run.students, longest, found)
    for name, rows in run.gate_prompts.items():
        check_file(run, cfg.val_prompts[name], rows, run.students, longest, found, read=run.method.reads)
    refuse(found, cfg.dry_run)
    warn_of_training_prompts(run)
    if run.method.samples and run.student.may_think():
        tqdm.write(f"note: {run.student.path} may think before it answers, in completions of up to "
                   f"{cfg.max_new_tokens} tokens; to let it answer at once, where its template can: "
                   """--chat_template_kwargs '{"enable_thinking": false}'""")
    return longest


def check_options(run):
    """Refuse an option that no chat template reads: it is misspelt, and would change nothing."""
    cfg = run.cfg
    sees_more = hasattr(cfg, "templates") or hasattr(cfg, "self_teacher") and hasattr(cfg, "teacher_system")
    teachers = [*run.teachers.values(), *(run.self_teachers if sees_more else [])]
    own = run.method.defaults.get("teacher_chat_template_kwargs") or {}     # read where a template can
    for flag, readers in (("chat_template_kwargs", [*run.students, *teachers]),
                          ("teacher_chat_template_kwargs", teachers)):
        if flag[0] == "t" and getattr(cfg, flag) == cfg.chat_template_kwargs | own:     # the default
            continue
        names = {name for reader in readers for name in reader.variables}
        for option in getattr(cfg, flag):
            if option not in names:
                raise Refused(f"--{flag}: no chat template of {', '.join({r.path: 0 for r in readers})} "
                              f"reads {option!r}; {nearest(option, sorted(names))}")


def tell_teachers(run):
    """Let the teacher of every training prompt see it with the text of --teacher_system."""
    for branch, rows in run.prompts.items():
        teacher = run.teachers.get(branch, run.self_teachers[0])
        try:
            if teacher.template:
                check_messages(with_system(messages("a question"), run.system), teacher)
        except Exception as error:                  # templates raise what they like
            raise Refused(f"--teacher_system {run.cfg.teacher_system}: {first_line(error)}") from None
        for row in rows:
            if "teacher_prompt" in row:
                raise Refused(f'{run.cfg.prompts[branch]}:{row["row"]}: it has a "teacher_prompt", which '
                              "--teacher_system would replace; give one of both")
            seen = messages(row["prompt"]) if teacher.template else row["prompt"]
            row["teacher_prompt"] = with_system(seen, run.system)


def check_file(run, path, rows, readers, longest, found, trained=False, read=None):
    """Check the rows of a file for the models that read them, and update the lengths in `longest`.

    read: the method's function that returns the longest prompt of a self-teacher or a tutor, or None.
    found: {rule: messages}, to which the faults are added.
    """
    kept, marked = [], []
    for row in rows:
        where = f"{path}:{row['row']}"
        try:
            check_fields(run, row, trained)
            lengths = [check_row(run, row, reader, trained, read) for reader in readers]
            for name, known in zip(("prompt", "completion", "read"), zip(*lengths)):
                setattr(longest, name, max(getattr(longest, name), *known))
        except Exception as error:                  # templates, tokenizers and graders raise what they like
            rule = getattr(error, "rule", "template")
            if rule == "length" and run.cfg.drop_long:
                continue
            found.setdefault(rule, []).append(f"{where}: {first_line(error)}")
        kept.append(row)
        if any(run.student.special.search(m["content"]) for m in messages(row["prompt"])):
            marked.append(where)
    if len(kept) < len(rows):
        tqdm.write(f"note: {len(rows) - len(kept)} of {len(rows)} rows of {path} are too long and left out")
    if marked:
        tqdm.write(f"note: {len(marked)} of {len(rows)} rows of {path} have a special token in their text, "
                   f"which is read as one; {marked[0]} is the first")
    if not kept:
        raise Refused(f"{path}: --drop_long leaves no row of it")
    rows[:] = kept


def refuse(found, everything):
    """Refuse the rows that broke a rule, with the first of them; before it print `everything`, by rule."""
    count = sum(map(len, found.values()))
    if everything:
        for rule in RULES:
            if rule in found:
                print(f"{len(found[rule]):>6} rows {RULES[rule]}, such as\n       {found[rule][0]}")
    if count:
        others = f" ({count - 1} other rows cannot be used; --dry_run shows one of every kind)" * (count > 1)
        raise Refused(next(iter(found.values()))[0] + others)


def warn_of_training_prompts(run):
    """Write a note of how many validation prompts are also training prompts."""
    training = {str(row["prompt"]) for rows in run.prompts.values() for row in rows}
    for name, rows in run.gate_prompts.items():
        if seen := sum(str(row["prompt"]) in training for row in rows):
            tqdm.write(f"note: {seen} of {len(rows)} validation prompts of {name} are training prompts, too")


# ---- one row -----------------------------------------------------------------------------------------------

def check_fields(run, row, trained):
    """Refuse a row that lacks what the method learns from, or what evaluation compares with."""
    method, name = run.method, run.cfg.method
    if not trained:
        row.pop("teacher_prompt", None)         # no teacher sees it
        if "answer" not in row:
            raise Fault("fields", 'no "answer", so it cannot be evaluated')
        return
    rewarded = ("answer",) if getattr(run.cfg, "reward_weight", 0) else ()
    for need in method.needs + rewarded:        # "a|b": one of these fields is enough
        if not any(field in row for field in need.split("|")):
            fields = '" or "'.join(need.split("|"))
            purpose = {"solution": "learns from", "answer": "needs for its rewards", "teacher_prompt":
                       "shows its teacher; or give --teacher_system"}.get(need, "needs")
            raise Fault("fields", f'no "{fields}", which --method {name} {purpose}')
    if "teacher_prompt" in row and "teacher_system" not in method.defaults:
        raise Fault("fields", f'a "teacher_prompt", but --method {name} has no teacher that sees it')
    for field in fixed_texts(method):
        if field in row and not isinstance(row[field], str):
            raise Fault("fields", f'"{field}", which --method {name} learns from, is text, not '
                                  f"{str(row[field])[:60]!r}")


def fixed_texts(method):
    """Return the names of the fields whose texts the method learns from, as they are in the row."""
    fields = {field for need in method.needs for field in need.split("|")}
    return [field for field in ("solution", "chosen", "rejected") if field in fields]


def check_row(run, row, reader, trained, read):
    """Refuse a row that a model does not read as it was meant, that has no room, or cannot be solved.

    Return the tokens of its prompt, of its longest completion, and of what a self-teacher can get to read.
    """
    cfg, method = run.cfg, run.method
    prompt = row["prompt"] if reader in run.students else row.get("teacher_prompt", row["prompt"])
    check_messages(prompt, reader)
    ids = reader.encode(prompt)
    with breaking("fields"):
        seen = read(run, run.self_teacher(reader) if reader in run.students else reader, row) if read else []
    texts = {field: row[field] for field in fixed_texts(method) if field in row} if trained else {}
    learned = [check_completion(run.student, row["prompt"], *named) for named in texts.items()]
    with breaking("answer"):
        if "answer" in row and not can_be_correct(row["grader"], row["answer"], row):
            raise Refused(f"the grader {row['grader']} calls no completion correct if the answer is "
                          f"{row['answer']!r}")
    if 2 * ids.count(reader.tok.unk_token_id) > len(ids):
        raise Fault("tokens", f"most of its text is unknown to the tokenizer of {reader.path}")
    largest, known = max(max(some) for some in [ids + seen, *learned]), reader.config.vocab_size
    if largest >= known:
        raise Fault("tokens", f"the token {reader.tok.decode(largest)!r}, id {largest}, has no row in "
                              f"{reader.path} ({known})")
    sampled = cfg.max_new_tokens if method.samples or not trained else 0
    completion = max([sampled, *map(len, learned)])
    most = max(len(ids), len(seen)) + completion
    if most > reader.positions:
        as_read = " as the self-teacher reads them" if len(seen) > len(ids) else ""
        raise Fault("length", f"prompt and completion can have {most} tokens{as_read}, but {reader.path} has "
                              f"{reader.positions} positions; lower --max_new_tokens, or drop the row "
                              "(--drop_long)")
    return len(ids), completion, len(seen)


def check_messages(prompt, reader):
    """Refuse a prompt that does not end with the user's word, or of which a model would not see all words."""
    turns = messages(prompt)
    if turns[-1]["role"] not in ("user", "tool", "ipython"):
        raise Fault("user", f"the last message is of role {turns[-1]['role']!r}, not of the user; what a "
                            'model is to learn goes into "solution"')
    if not turns[-1]["content"].strip() or all(m["role"] != "user" for m in turns):
        raise Fault("user", "the user says nothing")
    if not reader.template:
        return
    for m in turns:
        if reader.is_wrapped(m["content"]):
            raise Fault("wrapped", f"the text has {reader.turn!r} and so is in the chat template of "
                                   f"{reader.path} already; give its messages without the template")
    # Templates trim texts, and leave out what was thought in earlier turns, and some the switch /no_think.
    plain = lambda text: " ".join(re.sub(r"/(?:no_)?think\b", "", text).split()).casefold()
    seen = plain(reader.rendered(prompt))
    for m in sorted(turns, key=lambda m: -len(m["content"])):       # a short one may be part of a long one
        said = plain(without_thinking(m["content"]) if m["role"] == "assistant" else m["content"])
        if said not in seen:                                        # as a tool's message can be
            said = plain(json.dumps(m["content"], ensure_ascii=False)[1:-1])
        if said not in seen:
            raise Fault("template", f"the chat template of {reader.path} leaves out the text of a message of "
                                    f"role {m['role']!r}")
        seen = seen.replace(said, "\0", 1)


def check_completion(student, prompt, field, text):
    """Return the token ids of a fixed text; refuse one that cannot follow the prompt as it is rendered."""
    if student.template and opens_thinking(student.rendered(prompt)):
        if "</think>" not in text or text.lstrip().startswith("<think>"):
            raise Fault("completion", f'the chat template of {student.path} opens <think>, so "{field}" has '
                                      "to begin with thinking and </think>, or the template be told not to "
                                      "(--chat_template_kwargs)")
    ids = student.encode_completion(text)
    if not text.strip() and field != "rejected":
        raise Fault("completion", f'"{field}" is blank, so the student would learn to say nothing')
    if inside := [i for i in ids[:-1] if i in student.stops]:
        raise Fault("completion", f'"{field}" has {student.tok.decode(inside[0])!r}, which ends a completion'
                                  ", before its end")
    return ids
