"""The preflight of --dry_run: what a run would do and need, from configs, tokenizers and prompts alone.

Everything that takes no weights is the run's own code: prompts are read, rendered and checked, tokenizers
compared, flags completed. Memory is counted on fake tensors, which have shapes but no contents: the model's
own forward and backward pass for one micro-batch, every tensor from its creation to its end (Live). What the
model does not compute is counted by formula: optimizer, KV cache, logits, the buffers of the fused loss.
"""
import functools
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.check import fixed_texts
from kernels.chunked import CHUNK_BYTES
from models import average_values, fake_mode, tensors

from .diagnosis import LARGEST, watched

PHASES = ("sample", "score", "update")
UNKNOWN = -1                        # bytes of what cannot run on fake tensors
SAMPLED_LOGITS = 5                  # float32 copies of the last logits while a token is drawn
STATES = {torch.optim.AdamW: 2, torch.optim.Muon: 1, torch.optim.SGD: 0}     # float32 numbers per parameter


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made in this context and still alive, and their peak.

    known: tensors that were there before, whose views are not new.
    """

    def __init__(self, known=()):
        super().__init__()
        self.sizes, self.now, self.peak = {x.untyped_storage()._cdata: 0 for x in known}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, storage._cdata)
        return out

    def forget(self, key):
        self.now -= self.sizes.pop(key, 0)


def show(run):
    """Print the preflight of a Run whose networks are fake."""
    for part in (about_models, about_tokens, about_prompts, about_steps, about_memory):
        part(run)
    print("not looked at: the weights, and what shows only when they compute")


def distinct(run):
    """The teachers with weights of their own, each once; a moving average is part of its student here."""
    own = [t for t in run.self_teachers if t and t not in run.students and not t.values]
    return list(dict.fromkeys([*run.teachers.values(), *own]))


def about_models(run):
    for role, model in [*(("student", student) for student in run.students),
                        *(("teacher", teacher) for teacher in distinct(run))]:
        count = sum(p.numel() for p in model.net.parameters()) / 1e9
        learns = sum(p.numel() for p in model.net.parameters() if p.requires_grad) / 1e9
        what = ("the student without its adapter" if model.without_adapter else
                f"{count:.3f} B parameters" + f", of which {learns:.3f} B learn" * (role == "student"))
        print(f"{role}  {model.path}: {type(model.net).__name__}, {what}, {run.cfg.dtype}")


def about_tokens(run):
    tok = run.student.tok
    names = lambda ids: ", ".join(f"{tok.decode(i)!r} ({i})" for i in ids)
    print(f"stops    a completion ends at {names(run.student.stops)}, learned like any other token")
    pad = "none" if tok.pad_token_id is None else names([tok.pad_token_id])
    print(f"padding  is known from lengths; the tokenizer's pad token, {pad}, plays no role")
    for model in [*run.students, *distinct(run)]:
        print(f"ids      {model.path}: {len(model.tok.get_vocab()):,} in the tokenizer, "
              f"{len(model.net.get_output_embeddings().weight):,} rows in the head; the first "
              f"{run.student.vocab:,} are shared, the other rows have no probability")
    if kind := getattr(run.cfg, "self_teacher", None):
        print(f"itself   the student is its own teacher ({kind}), and reads up to "
              f"{run.longest.read:,} tokens before the completion")


def about_prompts(run):
    """The first prompt of every branch as both models see it, and where the loss begins and ends."""
    student = run.student
    for branch, rows in run.prompts.items():
        row, teacher = rows[0], run.teachers.get(branch)
        seen = student.encode(row["prompt"])
        print(f"\nfirst of {len(rows):,} prompts of {branch!r} as the student sees it, {len(seen)} tokens",
              f"  {student.tok.decode(seen)!r}", sep="\n")
        if teacher:
            theirs = teacher.encode(row["prompt"])
            print("the teacher sees the same tokens" if theirs == seen else
                  f"as the teacher sees it, {len(theirs)} tokens:\n  {teacher.tok.decode(theirs)!r}")
        fixed = next((row[field] for field in fixed_texts(run.method) if field in row), "")
        *answer, stop = student.encode_completion(fixed)
        token = lambda loss, i: f"  {loss:6}{i:<9}{student.tok.decode(i)!r}"
        print(f"and where the loss is{', with its fixed text for a completion' if answer else ''}:",
              "  loss  id       token", "  ..", *(token("no", i) for i in seen[-3:]),
              *(token("yes", i) for i in answer[:3]), "  ..", token("yes", stop), sep="\n")


def about_steps(run):
    cfg = run.cfg
    print(f"\nsteps    {run.total} with {cfg.method}, loss {cfg.loss}, lr {cfg.lr:g}; each {cfg.batch} "
          f"prompts (at most {run.longest.prompt} tokens) with {getattr(cfg, 'rollouts', 1)} completion(s) (at most "
          f"{run.longest.completion})")
    mixed = " if every step takes all branches" * (len(run.shares) > 1)
    for branch, count in run.shares.items():
        rows = len(run.prompts[branch])
        print(f"         {branch}: {count * cfg.steps / rows:.2f} epochs of {rows:,} prompts{mixed}"
              + " for each student" * (len(run.students) > 1))


# ---- memory ------------------------------------------------------------------------------------------------

def about_memory(run):
    title = f"memory on {run.cfg.device}, GiB, predicted"
    print(f"\n{title:50}" + "".join(f"{phase:>9}" for phase in PHASES))
    parts, sums = memory(run), Counter()
    gib = lambda size: f"{'?':>9}" if size == UNKNOWN else f"{size / 2**30:9.2f}" if size else f"{'-':>9}"
    for name, sizes in parts.items():
        name = name if len(name) <= 48 else f"{name[:20]}..{name[-26:]}"
        print(f"  {name:48}" + "".join(gib(sizes.get(phase, 0)) for phase in PHASES))
        sums.update({phase: size for phase, size in sizes.items() if size != UNKNOWN})
    print(f"  {'all':48}" + "".join(gib(sums[phase]) for phase in PHASES))
    print("  beside them about 0.6 GiB for the libraries, and a few percent between the blocks")
    if any(size == UNKNOWN for sizes in parts.values() for size in sizes.values()):
        print("  ? = not predicted: does not run on fake tensors (layers that route tokens by value do not)")
    if run.cfg.device != "cpu" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(run.cfg.device)
        print(f"  this card, {card.name}, has {card.total_memory / 2**30:.1f} GiB")


def memory(run):
    """{part: {phase: bytes}} on the student's device, where prompts and completions have their full length.

    The phases are the loop's; evaluation belongs to "sample". The student samples: what a teacher or a tutor
    takes that writes (seqkd, opcod) is not counted there. Of two students only the one that learns is, with
    --teacher_device swap.
    """
    cfg, student, teachers = run.cfg, run.student, [t for t in distinct(run) if not t.without_adapter]
    students = run.students[:1] if cfg.teacher_device == "swap" else run.students
    on_cpu, sequences = cfg.device == "cpu", cfg.batch * getattr(cfg, "rollouts", 1)
    length = run.longest.prompt + run.longest.completion
    read = max(run.longest.read, run.longest.prompt) + run.longest.completion      # by the teacher
    micro, micro_t = (max(1, min(sequences, cfg.micro_tokens // n)) for n in (length, read))
    here = cfg.teacher_device != "cpu" or on_cpu
    always = lambda size: dict.fromkeys(PHASES, size)
    parts = {"student's weights": always(weight_bytes(student))}
    if len(students) > 1:
        parts = {"both students' weights": always(sum(map(weight_bytes, students)))}
    if student.average:
        kept = sum(value.nbytes for s in students for value in average_values(s))
        parts["moving averages"] = {"score": kept} if cfg.teacher_device == "swap" else always(kept)
    if cfg.teacher_device == "swap":                            # one at a time
        parts["weights of a teacher"] = {"score": max(map(weight_bytes, teachers), default=0)}
    else:
        parts |= {f"weights of {teacher.path}": always(weight_bytes(teacher)) for teacher in teachers if here}
    parts["optimizer"] = always(sum(
        4 * STATES[type(optimizer)] * p.numel() for s in students for optimizer in s.optimizers
        for group in optimizer.param_groups for p in group["params"]))
    parts["gradients"] = {"update": sum(p.nbytes for p in student.net.parameters() if p.requires_grad)}
    written = max([sequences * run.method.samples,
                   *(len(rows) * cfg.eval_rollouts for rows in run.evals.values())])
    if sampled := min(written, cfg.sample_batch):
        parts[f"sampling {sampled} x {length:,} tokens"] = {
            "sample": sampling_bytes(student, sampled, run.longest.prompt, length)}
    reading = [student, *(distinct(run) if here else [])] if run.teachers or any(run.self_teachers) else []
    peaks = [forward_bytes(model, micro_t, read) for model in reading]
    parts[f"{micro} x {length:,} tokens through the layers"] = {
        "score": UNKNOWN if UNKNOWN in peaks else max(peaks, default=0),
        "update": update_bytes(student, micro, length, sequences > micro)}
    tokens = micro * run.longest.completion
    buffers = buffer_bytes(run, tokens)                         # a CPU keeps them from call to call
    parts["logits of the fused loss"] = always(buffers) if on_cpu else dict.fromkeys(PHASES[1:], buffers)
    parts["gradients in it, states of both models"] = {"update": loss_bytes(run, tokens, teachers)}
    if getattr(cfg, "diagnose_every", 0):
        one, branches = 4 * sum(p.numel() for p in watched(student, cfg.diagnose_layers)), len(run.branches)
        kept = min(one * branches * (cfg.diagnose_rollouts or max(2, min(cfg.batch, 64))), LARGEST)
        parts["diagnosis, gradients of branches and rollouts"] = {"update": one * (4 * branches + 2) + kept}
    return parts


def weight_bytes(model):
    """Of parameters and buffers; of a quantised folder, what its files hold."""
    files = list(Path(model.path).glob("*.safetensors"))
    if getattr(model.net.config, "quantization_config", None) and files:
        return sum(file.stat().st_size for file in files)
    return sum(x.nbytes for x in tensors(model.net))


def simulation(bytes_of):
    """Mark a function that runs a model on fake tensors; where the model cannot, the answer is UNKNOWN."""
    @functools.wraps(bytes_of)
    def call(*args):
        try:
            return bytes_of(*args)
        except Exception:                       # each layer that needs values fails in its own way
            return UNKNOWN
    return call


@simulation
def sampling_bytes(model, sequences, prompt, length):
    """The KV cache at full length, a layer's twice as it grows, logits, bfloat16 copies of the weights."""
    with fake_mode(), torch.no_grad(), Live(tensors(model.net)) as live, model.forward_context():
        out = model.body(input_ids=torch.zeros(sequences, prompt, dtype=torch.long), use_cache=True)
        started, casts = live.peak, cast_bytes(model)
    grown, largest = 0, 0
    for layer in (getattr(out, "cache", None) or out.past_key_values).layers:
        held = sum(x.nbytes for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor))
        if getattr(layer, "keys", None) is not None:            # linear attention's states do not grow
            held *= min(length, getattr(layer, "sliding_window", None) or length) / layer.keys.shape[-2]
        grown, largest = grown + held, max(largest, held)
    grown += largest
    logits = SAMPLED_LOGITS * 4 * sequences * model.net.get_output_embeddings().out_features
    return int(max(started, grown + casts + logits))


def cast_bytes(model):
    """Autocast's copies of the float32 matrices that learn."""
    return sum(p.numel() * model.dtype.itemsize for p in model.net.parameters()
               if p.ndim > 1 and p.dtype == torch.float32 and model.dtype != torch.float32)


@simulation
def forward_bytes(model, sequences, length):
    """The peak of a forward pass without gradient."""
    with fake_mode(), torch.no_grad(), Live(tensors(model.net)) as live:
        model.last_hidden(torch.zeros(sequences, length, dtype=torch.long))
    return live.peak


@simulation
def update_bytes(model, sequences, length, again):
    """The peak of forward and backward beside the gradients; `again`: they are there from one before."""
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    with fake_mode(), Live(tensors(model.net)) as live:
        for _ in range(2 if again else 1):
            live.peak = 0
            hidden_BTH = model.last_hidden(torch.zeros(sequences, length, dtype=torch.long))
            hidden_BTH.backward(torch.zeros_like(hidden_BTH))
            del hidden_BTH
    peak = live.peak - sum(p.grad.nbytes for p in parameters if p.grad is not None)
    for p in parameters:
        p.grad = None
    return max(peak, 0)


def buffer_bytes(run, tokens):
    """The logit buffers of the fused loss (kernels/chunked.py)."""
    row = 4 * run.student.vocab * (2 if run.objective.divergence else 1)
    return min(max(CHUNK_BYTES["cpu" if run.cfg.device == "cpu" else "gpu"] // row, 1), tokens) * row


def loss_bytes(run, tokens, teachers):
    """What the fused loss holds besides: the head's gradient, its bfloat16 copy, states, their gradient."""
    head_VH, size = run.student.net.get_output_embeddings().weight, run.student.dtype.itemsize
    out = 3 * tokens * head_VH.shape[1] * size
    if head_VH.requires_grad:                                   # its gradient is scaled, on a GPU into a copy
        out += 4 * head_VH.numel() * (1 if run.cfg.device == "cpu" else 2)
        out += head_VH.numel() * size if size < 4 else 0
    heads = [t.net.get_output_embeddings().weight for t in teachers] if run.objective.divergence else []
    away = run.cfg.teacher_device != run.cfg.device.split(":")[0]       # its head comes alone
    return out + max([tokens * w.shape[1] * size + (w.nbytes if away else 0) for w in heads], default=0)
