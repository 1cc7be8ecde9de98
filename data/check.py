"""The check of all prompts before the first step. What would fail later is refused, with file and line."""
from types import SimpleNamespace

from tqdm import tqdm

from config import Refused
from models import ignores_text, may_think

from .graders import can_be_correct
from .prompts import check_grader


def check_prompts(run):
    """Refuse a row that cannot be rendered, does not fit the models, or cannot be graded or learned from.

    A row that has an answer and names no grader gets that of --grader.
    Return the largest lengths in tokens: .prompt, of a prompt as any of the models sees it; .completion; and
    .read, of a prompt that a self-teacher or a tutor can get to read.
    """
    cfg, longest = run.cfg, SimpleNamespace(prompt=0, completion=0, read=0)
    check_grader("--grader: ", cfg.grader or "exact")
    for rows in (*run.prompts.values(), *run.evals.values(), *run.gate_prompts.values()):
        for row in rows:
            if "answer" in row:
                row.setdefault("grader", cfg.grader or "exact")
    for branch, rows in run.prompts.items():
        teachers = [run.teachers[branch]] if branch in run.teachers else []
        teachers = run.teachers.values() if run.method.teachers == "any" else teachers
        readers = dict.fromkeys([*run.students, *teachers])     # each model once: a list would repeat one
        check_file(run, cfg.prompts[branch], rows, readers, longest, trained=True, read=run.method.reads)
    for name, rows in run.evals.items():
        check_file(run, cfg.eval_prompts[name], rows, run.students, longest)
    for name, rows in run.gate_prompts.items():
        check_file(run, cfg.val_prompts[name], rows, run.students, longest, read=run.method.reads)
    warn_of_training_prompts(run)
    if run.method.samples and may_think(run.student):
        tqdm.write(f"note: {run.student.path} may think before it answers, in completions of up to "
                   f"{cfg.max_new_tokens} tokens; to let it answer at once: "
                   """--chat_template_kwargs '{"enable_thinking": false}'""")
    return longest


def warn_of_training_prompts(run):
    """Write a note of how many validation prompts are also training prompts."""
    training = {str(row["prompt"]) for rows in run.prompts.values() for row in rows}
    for name, rows in run.gate_prompts.items():
        if seen := sum(str(row["prompt"]) in training for row in rows):
            tqdm.write(f"note: {seen} of {len(rows)} validation prompts of {name} are training prompts, too")


def check_file(run, path, rows, readers, longest, trained=False, read=None):
    """Check the rows of one file for the models that read them, and update the lengths in `longest`.

    read: the method's function that returns the longest prompt of a self-teacher or a tutor, or None.
    """
    for model in readers:
        if ignores_text(model.tok):
            raise Refused(f"{model.path}: its chat template leaves out the text of messages")
    for row in rows:
        where = f"{path}:{row['row']}"
        check_fields(run, where, row, trained)
        for model in readers:
            try:
                check_row(run, row, model, longest, trained, read)
            except Exception as error:              # of a template, a tokenizer or a grader
                raise Refused(f"{where}{'' if isinstance(error, Unfit) else ':'} {error}") from None


class Unfit(Refused):
    """A Refused whose message goes on after the row's place without a colon: "FILE:3 has the token .."."""


def check_fields(run, where, row, trained):
    """Refuse a row that lacks what the method learns from, or what evaluation compares with."""
    method, name = run.method, run.cfg.method
    if not trained:
        if "answer" not in row:
            raise Refused(f'{where} has no "answer", so it cannot be evaluated')
        return
    for need in method.needs:                   # "a|b": one of these fields is enough
        if not any(field in row for field in need.split("|")):
            fields = '" or "'.join(need.split("|"))
            purpose = {"solution": "learns from", "answer": "needs for its rewards"}.get(need, "needs")
            raise Refused(f'{where} has no "{fields}", which --method {name} {purpose}')
    for field in fixed_texts(method):
        if field in row and not isinstance(row[field], str):
            raise Refused(f'{where}: "{field}", which --method {name} learns from, is text, not '
                          f"{str(row[field])[:60]!r}")


def fixed_texts(method):
    """Return the names of the fields whose texts the method learns from, as they are in the row."""
    fields = {field for need in method.needs for field in need.split("|")}
    return [field for field in ("solution", "chosen", "rejected") if field in fields]


def check_row(run, row, model, longest, trained, read):
    """Refuse a row that the model cannot read, that leaves no room for a completion, or cannot be solved."""
    cfg, method = run.cfg, run.method
    ids = model.encode(row["prompt"])
    fields = fixed_texts(method) if trained else []
    learned = [run.student.encode_completion(row[field]) for field in fields if field in row]
    seen = read(run, model, row) if read else []
    if "answer" in row and not can_be_correct(row["grader"], row["answer"], row):
        raise Refused(f"the grader {row['grader']} calls no completion correct if the answer is "
                      f"{row['answer']!r}")
    largest = max(max(some) for some in [ids + seen, *learned])
    known = len(model.net.get_input_embeddings().weight)
    if largest >= known:
        raise Unfit(f"has the token {model.tok.decode(largest)!r}, id {largest}, for which {model.path} has "
                    f"no row ({known})")
    sampled = cfg.max_new_tokens if method.samples or not trained else 0
    completion = max([sampled, *map(len, learned)])
    longest.prompt = max(longest.prompt, len(ids))
    longest.completion = max(longest.completion, completion)
    longest.read = max(longest.read, len(seen))
    most = max(len(ids), len(seen)) + completion
    if most > model.positions:
        as_read = " as the self-teacher reads them" if len(seen) > len(ids) else ""
        raise Refused(f"prompt and completion can have {most} tokens{as_read}, but {model.path} has "
                      f"{model.positions} positions; lower --max_new_tokens or drop the row")
