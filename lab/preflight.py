"""The preflight of --dry_run: what a run would do and need, from configs, tokenizers and prompts alone.

Everything that takes no weights is the run's own code: prompts are read, rendered and checked, tokenizers are
compared, and flags are completed. The memory is counted on fake tensors, which have shapes but no contents:
the model's own forward and backward pass runs on them for one micro-batch, and every tensor counts from its
creation to its end (Live). What the model does not compute is counted by formula: the optimizer, the KV
cache, the logits, and the buffers of the fused loss.
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
from methods.token_weights import RULES
from models import average_values, fake_mode, tensors
from sampler import LOGITS, PREFILL, row_bytes

from .diagnosis import LARGEST, rollouts_per_branch, watched

PHASES = ("sample", "score", "update")
UNKNOWN = -1                        # the size of what cannot run on fake tensors
STATES = {torch.optim.AdamW: 2, torch.optim.Muon: 1, torch.optim.SGD: 0}     # float32 numbers per parameter
GIB = 2**30


class Live(TorchDispatchMode):
    """Context manager: count the bytes of the tensors made in it that are still alive, and their peak.

    known: tensors that were there before, whose views are not new.
    """

    def __init__(self, known=()):
        super().__init__()
        self.sizes = {x.untyped_storage()._cdata: 0 for x in known}     # address of a storage -> its bytes
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run an operation, and count the storages in its result that are new."""
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        """Count a storage from now until it is freed. A view shares the storage of its tensor."""
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        """Take off the bytes of a storage that was freed."""
        self.now -= self.sizes.pop(key, 0)


def show(run):
    """Print the preflight of a Run whose networks are fake."""
    training = () if run.cfg.eval_only else (about_prompts, about_steps)
    for part in (about_models, about_tokens, *training, about_memory):
        part(run)
    print("not looked at: the weights, and what shows only when they compute")


def distinct(run):
    """Return the teachers that are not a student or its average, each once."""
    own = [t for t in run.self_teachers if t and t not in run.students and not t.values]
    return list(dict.fromkeys([*run.teachers.values(), *own]))


def about_models(run):
    """Say which models there are, how large they are, and how much of them learns."""
    roles = dict.fromkeys(run.self_teachers, "itself") | dict.fromkeys(run.students, "student")
    for model in [*run.students, *distinct(run)]:
        role = roles.get(model, "teacher")
        count = sum(p.numel() for p in model.net.parameters())
        learns = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
        what = f"{count / 1e9:.3f} B parameters"
        if model.without_adapter:
            what = "the student without its adapter"
        elif learns:
            what += f", of which {learns / 1e9:.3f} B learn"
        print(f"{role:8} {model.path}: {type(model.net).__name__}, {what}, {run.cfg.dtype}")


def about_tokens(run):
    """Say which tokens end a completion, and which token ids the models share."""
    student, tok = run.student, run.student.tok
    names = lambda ids: ", ".join(f"{tok.decode(i)!r} ({i})" for i in ids)
    print(f"stops    a completion ends at {names(student.stops)}, learned like any other token")
    pad = "none" if tok.pad_token_id is None else names([tok.pad_token_id])
    print(f"padding  is known from lengths; the tokenizer's pad token, {pad}, plays no role")
    for model in [*run.students, *distinct(run)]:
        print(f"ids      {model.path}: {len(model.tok.get_vocab()):,} in the tokenizer, "
              f"{len(model.net.get_output_embeddings().weight):,} rows in the head; the first "
              f"{student.vocab:,} are shared, the other rows have no probability")
    if kind := getattr(run.cfg, "self_teacher", None):
        print(f"itself   the student is its own teacher or reference ({kind}), and reads up to "
              f"{longest_read(run):,} tokens before the completion")


def longest_read(run):
    """Return the tokens of the longest prompt that any model reads."""
    return max(run.longest.read, run.longest.prompt)


def about_prompts(run):
    """Show the first prompt of every branch as both models see it, and where the loss begins and ends."""
    student = run.student
    for branch, rows in run.prompts.items():
        row, teacher = rows[0], run.teachers.get(branch)
        seen, theirs = run.views(row)
        print(f"\nfirst of {len(rows):,} prompts of {branch!r} as the student sees it, {len(seen)} tokens")
        print(f"  {student.tok.decode(seen)!r}")
        if teacher or theirs != seen:
            print("the teacher sees the same tokens" if theirs == seen else
                  f"as the teacher sees it, {len(theirs)} tokens:\n  {student.tok.decode(theirs)!r}")
        show_loss(run, row, seen)


def show_loss(run, row, seen):
    """Show the tokens around the point where the loss begins, and the token where it ends."""
    student = run.student
    fixed = next((row[field] for field in fixed_texts(run.method) if field in row), "")
    *answer, stop = student.encode_completion(fixed)
    line = lambda loss, i: print(f"  {loss:6}{i:<9}{student.tok.decode(i)!r}")
    print(f"and where the loss is{', with its fixed text for a completion' if answer else ''}:")
    print("  loss  id       token")
    print("  ..")
    for i in seen[-3:]:
        line("no", i)
    for i in answer[:3]:
        line("yes", i)
    print("  ..")
    line("yes", stop)


def about_steps(run):
    """Say how many steps there are, of what size, and how often they go through the prompts."""
    cfg, longest = run.cfg, run.longest
    print(f"\nsteps    {run.total} with {cfg.method}, loss {cfg.loss}, lr {cfg.lr:g}; each {cfg.batch} "
          f"prompts (at most {longest.prompt} tokens) with {per_prompt(cfg)} completion(s) (at most "
          f"{longest.completion})")
    mixed = " if every step takes all branches" if len(run.shares) > 1 else ""
    each = " for each student" if len(run.students) > 1 else ""
    for branch, count in run.shares.items():
        rows = len(run.prompts[branch])
        print(f"         {branch}: {count * cfg.steps / rows:.2f} epochs of {rows:,} prompts{mixed}{each}")


def per_prompt(cfg):
    """Return how many completions a prompt has; a method without --rollouts has one."""
    return getattr(cfg, "rollouts", 1)


# ---- memory ------------------------------------------------------------------------------------------------

def about_memory(run):
    """Print the predicted memory as a table of parts by phases, with the sum of every phase."""
    title = f"memory on {run.cfg.device}, GiB, predicted"
    print(f"\n{title:50}" + "".join(f"{phase:>9}" for phase in PHASES))
    parts, sums = memory(run), Counter()
    for name, sizes in parts.items():
        name = name if len(name) <= 48 else f"{name[:20]}..{name[-26:]}"
        print(f"  {name:48}" + "".join(gib(sizes.get(phase, 0)) for phase in PHASES))
        sums.update({phase: size for phase, size in sizes.items() if size != UNKNOWN})
    print(f"  {'all':48}" + "".join(gib(sums[phase]) for phase in PHASES))
    print("  beside them about 0.6 GiB for the libraries, and a few percent between the blocks")
    if any(UNKNOWN in sizes.values() for sizes in parts.values()):
        print("  ? = not predicted: does not run on fake tensors (layers that route tokens by value do not)")
    if run.cfg.device != "cpu" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(run.cfg.device)
        print(f"  this card, {card.name}, has {card.total_memory / GIB:.1f} GiB")


def gib(size):
    """Return a cell of the table: GiB, or a mark for nothing and for what is not known."""
    if size == UNKNOWN:
        return f"{'?':>9}"
    return f"{size / GIB:9.2f}" if size else f"{'-':>9}"


def always(size):
    """Return the sizes of a part that is there in every phase."""
    return dict.fromkeys(PHASES, size)


def memory(run):
    """Return {part: {phase: bytes}} on the student's device if all prompts and completions have full length.

    The phases are the loop's, and evaluation belongs to "sample". The student samples: what a teacher or a
    tutor takes while it writes (seqkd, opcod) is not counted there.
    """
    if run.cfg.eval_only:
        return {"student's weights": {"sample": weight_bytes(run.student)}} | sampling_parts(run)
    teachers = [teacher for teacher in distinct(run) if not teacher.without_adapter]
    parts = kept_bytes(run, teachers) | passing_bytes(run, teachers)
    if getattr(run.cfg, "diagnose_every", 0):
        parts["diagnosis, gradients of branches and rollouts"] = {"update": diagnosis_bytes(run)}
    return parts


def teachers_compute_here(cfg):
    """Return whether the teachers compute on the student's device."""
    return cfg.teacher_device != "cpu" or cfg.device == "cpu"


def kept_bytes(run, teachers):
    """Return the parts that stay from step to step: weights, averages, optimizer, and the gradients."""
    swap = run.cfg.teacher_device == "swap"
    students = run.students[:1] if swap else run.students       # with swap only the one that learns is there
    name = "student's weights" if len(students) == 1 else "both students' weights"
    parts = {name: always(sum(map(weight_bytes, students)))}
    if run.student.average:
        kept = sum(value.nbytes for student in students for value in average_values(student))
        parts["moving averages"] = {"score": kept} if swap else always(kept)
    if swap:                                                    # one teacher at a time
        parts["weights of a teacher"] = {"score": max(map(weight_bytes, teachers), default=0)}
    elif teachers_compute_here(run.cfg):
        for teacher in teachers:
            parts[f"weights of {teacher.path}"] = always(weight_bytes(teacher))
    parts["optimizer"] = always(sum(map(optimizer_bytes, students + learning(run)[1:])))
    parts["gradients"] = {"update": sum(p.nbytes for learner in learning(run)
                                        for p in learner.net.parameters() if p.requires_grad)}
    return parts


def learning(run):
    """Return the learners of a step: one student, as two learn in turn, and the teachers that learn."""
    return [run.student, *(learner for learner in run.learners if learner not in run.students)]


def passing_bytes(run, teachers):
    """Return the parts that come and go within a step: sampling, one micro-batch, and the loss."""
    cfg, student, parts = run.cfg, run.student, sampling_parts(run)
    prompt, completion = run.longest.prompt, run.longest.completion
    length, read = prompt + completion, longest_read(run) + completion
    sequences = cfg.batch * per_prompt(cfg)
    micro, micro_read = (max(1, min(sequences, cfg.micro_tokens // tokens)) for tokens in (length, read))

    readers = []                                                # the models that score
    if run.teachers or any(run.self_teachers):
        readers = [student, *(distinct(run) if teachers_compute_here(cfg) else [])]
    peaks = [forward_bytes(model, micro_read, read) for model in readers]
    updates = [update_bytes(learner, micro, length, sequences > micro) for learner in learning(run)]
    parts[f"{micro} x {length:,} tokens through the layers"] = {
        "score": UNKNOWN if UNKNOWN in peaks else max(peaks, default=0),
        "update": max(updates, default=0) if UNKNOWN not in updates else UNKNOWN}

    tokens = micro * completion
    buffers = buffer_bytes(run, tokens)                         # a CPU keeps them from call to call
    parts["logits of the fused loss"] = always(buffers) if cfg.device == "cpu" else {
        "score": buffers, "update": buffers}
    parts["gradients in it, states of both models"] = {"update": loss_bytes(run, tokens, teachers)}
    return parts


def sampling_parts(run):
    """Return what sampling takes, in training or in evaluation, or nothing where nothing is sampled."""
    cfg, prompt, length = run.cfg, run.longest.prompt, run.longest.prompt + run.longest.completion
    evaluated = [len(rows) * cfg.eval_rollouts for rows in run.evals.values()]
    written = max([cfg.batch * per_prompt(cfg) if run.method.samples else 0, *evaluated])
    sampled = min(written, cfg.sample_batch)
    return {f"sampling {sampled} x {length:,} tokens": {
        "sample": sampling_bytes(run.student, sampled, prompt, length)}} if sampled else {}


def weight_bytes(model):
    """Return the bytes of a model's parameters and buffers; of a quantised folder, what its files hold."""
    files = list(Path(model.path).glob("*.safetensors"))
    if getattr(model.net.config, "quantization_config", None) and files:
        return sum(file.stat().st_size for file in files)
    return sum(x.nbytes for x in tensors(model.net))


def optimizer_bytes(learner):
    """Return the bytes of a learner's optimizer states, which are float32."""
    total = 0
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            total += 4 * STATES[type(optimizer)] * sum(p.numel() for p in group["params"])
    return total


def diagnosis_bytes(run):
    """Return the bytes of the gradients that a diagnosis keeps (lab/diagnosis.py)."""
    cfg, branches = run.cfg, len(run.branches)
    one = 4 * sum(p.numel() for p in watched(run.student, cfg.diagnose_layers))
    rollouts = min(one * branches * rollouts_per_branch(cfg), LARGEST)
    return one * (4 * branches + 2) + rollouts      # of a branch two halves, plain and weighted


def simulation(bytes_of):
    """Decorate a function that runs a model on fake tensors: return UNKNOWN where the model cannot."""
    @functools.wraps(bytes_of)
    def call(*args):
        try:
            return bytes_of(*args)
        except Exception:                       # layers that need values fail in many ways
            return UNKNOWN
    return call


@simulation
def sampling_bytes(model, sequences, prompt, length):
    """Return the bytes of sampling: the KV cache at full length, logits, and weights cast to bfloat16.

    Our own sampler has a cache of fixed size; in transformers' generate a layer's is there twice as it grows.
    """
    if model.served:
        together = max(1, min(sequences, PREFILL // prompt))
        with fake_mode(), torch.no_grad(), Live(tensors(model.net)) as live, model.forward_context():
            model.body(input_ids=torch.zeros(together, prompt, dtype=torch.long), use_cache=False)
        return int(sequences * row_bytes(model, length) + live.peak + cast_bytes(model))
    with fake_mode(), torch.no_grad(), Live(tensors(model.net)) as live, model.forward_context():
        out = model.body(input_ids=torch.zeros(sequences, prompt, dtype=torch.long), use_cache=True)
        started, casts = live.peak, cast_bytes(model)
    grown, largest = 0, 0
    for layer in (getattr(out, "cache", None) or out.past_key_values).layers:
        held = sum(x.nbytes for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor))
        if getattr(layer, "keys", None) is not None:            # linear attention's states do not grow
            positions = min(length, getattr(layer, "sliding_window", None) or length)
            held *= positions / layer.keys.shape[-2]
        grown, largest = grown + held, max(largest, held)
    grown += largest
    logits = LOGITS * 4 * sequences * model.net.get_output_embeddings().out_features
    return int(max(started, grown + casts + logits))


def cast_bytes(model):
    """Return the bytes of autocast's copies of the float32 matrices that learn."""
    if model.dtype == torch.float32:
        return 0
    matrices = [p for p in model.net.parameters() if p.ndim > 1 and p.dtype == torch.float32]
    return sum(p.numel() for p in matrices) * model.dtype.itemsize


@simulation
def forward_bytes(model, sequences, length):
    """Return the peak of a forward pass without gradient."""
    with fake_mode(), torch.no_grad(), Live(tensors(model.net)) as live:
        model.last_hidden(torch.zeros(sequences, length, dtype=torch.long))
    return live.peak


@simulation
def update_bytes(model, sequences, length, again):
    """Return the peak of a forward and a backward pass beside the gradients.

    again: the gradients are there already, from a micro-batch before.
    """
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


def has_divergence(run):
    """Return whether a step computes a divergence, as its loss or beside it."""
    rule = RULES.get(getattr(run.cfg, "token_weight", None))
    return run.objective.divergence or getattr(run.cfg, "kl_weight", 0) or rule and rule.sees == "both"


def buffer_bytes(run, tokens):
    """Return the bytes of the fused loss's logit buffers (kernels/chunked.py); a divergence has two."""
    row = 4 * run.student.vocab * (2 if has_divergence(run) else 1)
    most = CHUNK_BYTES["cpu" if run.cfg.device == "cpu" else "gpu"]
    return min(max(most // row, 1), tokens) * row


def loss_bytes(run, tokens, teachers):
    """Return what else the fused loss holds.

    That is the gradient of the head with the head's copy in bfloat16, and the hidden states of both models
    with the student's gradient.
    """
    head_VH, size = run.student.net.get_output_embeddings().weight, run.student.dtype.itemsize
    out = 3 * tokens * head_VH.shape[1] * size
    if head_VH.requires_grad:                                   # its float32 gradient is scaled in place
        out += 4 * head_VH.numel()
        out += head_VH.numel() * size if size < 4 else 0
    if not has_divergence(run):
        return out
    alone = run.cfg.teacher_device != run.cfg.device.split(":")[0]      # the teacher's head comes alone
    needed = []
    for teacher in teachers:
        weight = teacher.net.get_output_embeddings().weight
        needed.append(tokens * weight.shape[1] * size + (weight.nbytes if alone else 0))
    return out + max(needed, default=0)
