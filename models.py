"""Models: from a checkpoint to what the loop uses, and back to a checkpoint.

    Model         a Reader (text.py) with weights, a causal language model: generate, hidden_states, log_probs
    Learner       a Model that learns: with its optimizers and, if it has one, its moving average
    load          load and check any decoder-only model that transformers knows; --lora_rank adds an adapter
    check_*       refuse by name what would train wrongly: unknown logits, attention to later tokens
    save_*        write what from_pretrained, or peft, reads again, and what a restart needs

Parameters that learn are kept in float32, and frozen ones in --dtype. The computation is in --dtype for both,
but the residual stream and the norms are float32 in both (a quantised teacher's norms stay as they come).
Otherwise the gap between two equal models would not be 0 but their rounding errors.
"""
import contextlib
import copy
import functools
import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from config import Refused, first_line
from kernels import linear_divergence, linear_logprob

# First, so that transformers is imported there.
from text import Reader, change, reading

import sampler
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(eq=False, kw_only=True)
class Model(Reader):
    """A causal language model with its tokenizer."""
    net: torch.nn.Module
    dtype: torch.dtype                  # of the computation; parameters that learn are float32
    device: torch.device                # of the computation
    adapter: object = None              # peft's wrapper of `net`, when only an adapter learns
    without_adapter: bool = False       # `net` is the student's; its adapter is off in this model
    offloaded: bool = False             # the weights wait in main memory while the model is not `on_device`
    values: dict = field(default_factory=dict)  # parameter of `net` -> its other value in this model
    served: bool = True                 # by our own sampler; otherwise by transformers' generate

    @property
    def body(self):
        """The network without its head."""
        return self.net.base_model if self.net.base_model is not self.net else self.net.model

    @property
    def head_VH(self):
        """The output head [V, H]. A bias is one more column, which meets a column of ones in last_hidden."""
        head = self.net.get_output_embeddings()
        weight_VH = self.values.get(head.weight, head.weight)
        if head.bias is None:
            return weight_VH
        bias_V = self.values.get(head.bias, head.bias)
        # With 7 columns of zeros beside it, a width that is a multiple of 8 stays one.
        return pad(torch.cat([weight_VH, bias_V[:, None]], 1), (0, 7))

    @property
    def logit_scale(self):
        """The factor on the logits: Cohere multiplies them by a number, Granite divides them by one."""
        scale = getattr(self.config, "logit_scale", None)
        return scale or 1 / (getattr(self.config, "logits_scaling", None) or 1)

    @property
    def softcap(self):
        """The c of c * tanh(logits / c), which bounds the logits (Gemma 2); None where nothing does."""
        return getattr(self.config, "final_logit_softcapping", None)

    # -- forward passes

    @contextlib.contextmanager
    def forward_context(self):
        """Context manager of a forward pass: compute in the model's dtype, with its adapter on or off."""
        bare = self.adapter.disable_adapter() if self.without_adapter else contextlib.nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16), bare:
            yield

    @contextlib.contextmanager
    def on_device(self):
        """Context manager: put this model's weights into the network, on the device of its computation.

        For an offloaded model these are copies, which are dropped in the end: its weights stay in main memory
        as they are. For an average they stand in for the student's own parameters.
        """
        # Pairs of a tensor and its present data, which it gets back in the end.
        waiting = [(x, x.data) for x in (tensors(self.net) if self.offloaded else self.values)]
        try:
            for x, data in waiting:
                x.data = self.values.get(x, data).to(self.device, non_blocking=True)
            yield
        finally:
            for x, data in waiting:
                x.data = data

    def last_hidden(self, ids_BT):
        """Return the last hidden states [B, T, H] with logits = softcapped(hidden @ head_VH.T)."""
        with self.forward_context():
            hidden_BTH = self.body(input_ids=ids_BT.to(self.device), use_cache=False).last_hidden_state
        if self.logit_scale != 1:
            hidden_BTH = hidden_BTH * self.logit_scale
        if self.net.get_output_embeddings().bias is not None:
            hidden_BTH = pad(pad(hidden_BTH, (0, 1), value=1.0), (0, 7))    # see head_VH
        return hidden_BTH

    def hidden_states(self, prompts, completions):
        """Return the hidden states [N, H] that predict the N tokens of some completions, concatenated.

        prompts: lists of token ids; completions: tensors [T]. The state before a token predicts it: the last
        prompt token predicts the first completion token, and the last completion token (EOS) is predicted but
        never read. Padding is on the right, where causal attention never sees it.
        """
        rows = [prompt + completion.tolist()[:-1] for prompt, completion in zip(prompts, completions)]
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        predicts_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for i, (prompt, row) in enumerate(zip(prompts, rows)):
            ids_BT[i, :len(row)] = torch.tensor(row)
            predicts_BT[i, len(prompt) - 1:len(row)] = True
        return self.last_hidden(ids_BT)[predicts_BT.to(self.device)].to(self.dtype)

    def token_log_probs(self, hidden_NH, completions, temperature=1.0, head_VH=None, vocab=None):
        """Return the log-probabilities [T] of each completion's tokens, from the states that predict them."""
        head_VH = self.head_VH if head_VH is None else head_VH
        _, stats = linear_logprob(hidden_NH, head_VH, torch.cat(completions), temperature=temperature,
                                  vocab=vocab or self.vocab, softcap=self.softcap)
        return stats["logprob_s"].split([len(ids_T) for ids_T in completions])

    @torch.no_grad()
    def log_probs(self, prompts, completions, micro_tokens, temperature=1.0):
        """Return log p(y), [T], of each completion's tokens, from the same forward pass as in training."""
        out = [None] * len(completions)
        lengths = {i: len(prompts[i]) + len(ids_T) for i, ids_T in enumerate(completions)}
        for group in micro_batches(lengths, micro_tokens):
            some = [completions[i] for i in group]
            hidden_NH = self.hidden_states([prompts[i] for i in group], some)
            for i, lp_T in zip(group, self.token_log_probs(hidden_NH, some, temperature)):
                out[i] = lp_T
        return out

    @torch.no_grad()
    def mean_hidden(self, prompts, completions, micro_tokens):
        """Return [B, H] of unit length: the means over the hidden states that predict a completion's tokens.

        They say where texts are in this model's own space: the product of two rows is a cosine.
        """
        out = [None] * len(completions)
        lengths = {i: len(prompts[i]) + len(ids_T) for i, ids_T in enumerate(completions)}
        for group in micro_batches(lengths, micro_tokens):
            some = [completions[i] for i in group]
            hidden_NH = self.hidden_states([prompts[i] for i in group], some).float()
            for i, hidden_TH in zip(group, hidden_NH.split([len(ids_T) for ids_T in some])):
                out[i] = hidden_TH.mean(0)
        return torch.nn.functional.normalize(torch.stack(out), dim=1)

    def generate(self, prompts, temperature, top_p, max_new_tokens, rows):
        """Complete prompts (lists of token ids), `rows` at a time: [(ids_T, logp_T)]. See sampler.sample."""
        return sampler.sample(self, prompts, temperature, top_p, max_new_tokens, rows)


@dataclass(eq=False, kw_only=True)
class Learner(Model):
    """A Model that learns. The loop updates it, and saves and restores it under its name."""
    name: str = "student"
    optimizers: tuple = ()
    updates: int = 0                    # optimizer steps done
    lr_factor: float = 1.0              # of the run's learning rate
    average: object = None              # the Model that follows this one: a moving average or a snapshot


def micro_batches(lengths, micro_tokens):
    """Return micro-batches: groups of indices, longest first, with at most micro_tokens tokens each.

    lengths: {index: tokens}. Padding counts too: every sequence of a group takes as much as its longest one,
    which is its first. A sequence longer than micro_tokens is a group of its own.
    """
    groups = []
    for i in sorted(lengths, key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= micro_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# ---- load --------------------------------------------------------------------------------------------------

def load(reader, cfg, learns=False, weights=None, name="student"):
    """Return a Reader's Model; a Learner called `name` if it `learns`.

    weights: a folder (a checkpoint) to read the parameters, or the adapter's, from instead. With cfg.dry_run
    the parameters are fake tensors: shapes without memory.
    """
    transformers.utils.logging.disable_progress_bar()
    path, quantised = reader.path, reader.quantised
    dtype, lora = getattr(torch, cfg.dtype), cfg.lora_rank if learns else 0
    offloaded, device = False, torch.device("cpu" if cfg.dry_run else cfg.device)
    if not learns:
        offloaded = cfg.teacher_device == "swap" and not cfg.dry_run
        device = torch.device("cpu") if cfg.teacher_device == "cpu" else device
    kept = torch.float32 if learns and not lora else dtype     # the dtype that the parameters are kept in
    source = path if lora else weights or path
    with reading(source):
        net = (fake_net(reader.whole_config, kept) if cfg.dry_run else
               read_net(source, kept, device if quantised else None))
    if not (cfg.dry_run or quantised or offloaded):
        net.to(device)
    if not (cfg.dry_run or quantised) and not is_finite(net):
        broken = next(name for name, p in net.named_parameters() if not p.isfinite().all())
        raise Refused(f"{source}: its {broken} has values that are not numbers")
    net.eval().requires_grad_(learns and not lora)
    for module in net.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None       # its row would learn nothing, and is often that of EOS
    # A checkpoint's own sampling defaults (top_k 20, say) would silently make sampling off-policy.
    net.generation_config = GenerationConfig()
    match_precision(net, kept, dtype, quantised)
    if offloaded and device.type == "cuda":
        for x in tensors(net):
            x.data = x.data.pin_memory()                        # pages that the GPU can copy by itself
    check_head(path, net)
    facts = {f.name: getattr(reader, f.name) for f in fields(Reader)} | dict(
        whole_config=net.config, net=net, dtype=dtype, device=device, offloaded=offloaded)
    model = Learner(**facts, name=name) if learns else Model(**facts)
    if lora:
        model.adapter = add_adapter(model, cfg, weights).eval()
    with model.on_device():
        if not cfg.dry_run:
            check_forward(model)
        if reason := sampler.obstacle(model, try_it=not cfg.dry_run):
            model.served = False
            tqdm.write(f"note: {path} is sampled by transformers' generate, which is slower: {reason}")
    if learns and cfg.gradient_checkpointing:
        recompute_layers(model)
    if learns:
        model.optimizers = build_optimizers(model, cfg)
    return model


def match_precision(net, kept, dtype, quantised):
    """Make networks kept in float32 and in `dtype` compute the same: norms and residual stream are float32.

    Autocast does the rest, except for experts that grouped_mm multiplies, which run in the dtype that they
    are kept in.
    """
    if dtype == torch.float32:
        return
    for module in net.modules():
        if isinstance(module, torch.nn.Embedding) and torch.is_tensor(getattr(module, "embed_scale", None)):
            module.register_forward_hook(functools.partial(scale_embedding_fp32, dtype=dtype))  # Gemma 3, 4
    if kept == torch.float32:
        return
    for parameter in net.parameters():
        if parameter.ndim < 2 and not quantised:                # norms and biases
            parameter.data = parameter.data.float()
    # The residual stream begins as the embedding, and keeps its dtype from layer to layer.
    net.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.float())


def scale_embedding_fp32(module, inputs, out, dtype):
    """Return an embedding times its scale in float32; the scale is rounded to `dtype` as in transformers."""
    embedded = torch.nn.functional.embedding(inputs[0], module.weight)
    return embedded.float() * module.embed_scale.to(dtype).float()


def read_net(source, dtype, device):
    """Return the network with the weights in `source`. device: of a quantised one, which cannot be moved."""
    net, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True,
        **(dict(device_map={"": device}) if device else {}))
    unused = [] if device else found["unexpected_keys"]         # a quantised one may have scales to spare
    shapes = [key[0] for key in found["mismatched_keys"]]
    for keys, wrong in ((shapes, "of another shape than its config says"), (found["missing_keys"], "missing"),
                        (unused, "not in its config's model")):
        if keys:
            raise Refused(f"cannot load {source}: {len(keys)} weights are {wrong}, "
                          f"{', '.join(sorted(keys)[:3])} among them")
    return net


@functools.cache
def fake_mode():
    """Return the mode of fake tensors. A process has only one: tensors of different modes do not mix."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    return FakeTensorMode()


def fake_net(config, dtype):
    """Return the network with shapes and dtypes, but without memory and values. It takes about a second."""
    with fake_mode():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def add_adapter(model, cfg, weights):
    """Return a LoRA adapter on all linear layers but the head: a saved one, or a new one without effect."""
    try:
        import peft
    except ImportError:
        raise Refused("--lora_rank needs peft: pip install peft") from None
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=cfg.lora_rank, lora_alpha=cfg.lora_alpha,
                             target_modules="all-linear")
    torch.manual_seed(cfg.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)          # peft uses old names of transformers
        if weights and not cfg.dry_run:
            with reading(weights):
                return peft.PeftModel.from_pretrained(model.net, weights, is_trainable=True)
        try:
            adapter = peft.get_peft_model(model.net, config, low_cpu_mem_usage=cfg.dry_run)
        except ValueError as error:                             # layers that read their weights by name, say
            raise Refused(f"--lora_rank: peft cannot adapt {type(model.net).__name__}: "
                          f"{first_line(error)}") from None
    if cfg.dry_run:
        replace_meta_tensors(model.net)
    return adapter


def replace_meta_tensors(net):
    """Replace the meta tensors that peft makes by fake ones, since both kinds do not mix."""
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                with fake_mode():
                    setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))


def tensors(net):
    """Return all parameters and buffers of a network."""
    return [*net.parameters(), *net.buffers()]


def recompute_layers(model):
    """Switch on gradient checkpointing: keep only every layer's input, and compute the rest again later.

    The switch of transformers works only in training mode, where dropout is on, so this is our own.
    """
    def recomputed(forward):
        def call(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return call

    layers = [module for module in model.net.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise Refused(f"{model.path}: {type(model.net).__name__} has no layers that "
                      "--gradient_checkpointing knows")
    for layer in layers:
        layer.forward = recomputed(layer.forward)


def build_optimizers(model, cfg):
    """Return AdamW or SGD on everything, or Muon on hidden matrices and AdamW on the rest; matrices decay."""
    ends = {id(model.net.get_output_embeddings().weight), id(model.net.get_input_embeddings().weight)}
    params = [p for p in model.net.parameters() if p.requires_grad]
    hidden = [p for p in params if p.ndim == 2 and id(p) not in ends and cfg.optimizer == "muon"]
    rest = [p for p in params if not any(p is h for h in hidden)]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    if cfg.optimizer == "sgd":
        return (torch.optim.SGD(groups, lr=cfg.lr),)
    fused = model.device.type == "cuda" or None                 # needs no temporaries as large as the model
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.adam_beta2), fused=fused)
    if cfg.optimizer == "adamw":
        return (adamw,)
    return torch.optim.Muon(hidden, lr=cfg.lr, weight_decay=cfg.weight_decay,
                            adjust_lr_fn="match_rms_adamw"), adamw


# ---- the models of a run -----------------------------------------------------------------------------------

def load_students(readers, cfg, checkpoint, teacher_learns):
    """Return the students as Learners: "student", or "1" and "2"; with --eval_only as a Model.

    checkpoint: to resume from, or None.
    """
    names = ["student"] if len(readers) == 1 else [str(i + 1) for i in range(len(readers))]
    several = len(names) > 1 or teacher_learns
    students = [load(reader, cfg, not cfg.eval_only, learner_folder(checkpoint, name, several), name)
                for reader, name in zip(readers, names)]
    if len(students) > 1 and cfg.teacher_device == "swap" and not cfg.dry_run:
        for student in students:
            offload(student)
    return students


def load_teachers(readers, student, cfg, checkpoint, teacher_learns):
    """Return {path: Model} from {path: Reader}, Learners if teacher_learns."""
    teachers = {}
    for path, reader in readers.items():
        name = f"teacher{len(teachers) or ''}"
        if teacher_learns:
            weights, adapted = learner_folder(checkpoint, name, several=True), copy.copy(cfg)
            adapted.lora_rank = getattr(cfg, "teacher_rank", cfg.lora_rank)
            teachers[path] = load(reader, adapted, learns=True, weights=weights, name=name)
        else:
            teachers[path] = load_frozen(reader, student, cfg)
    return teachers


@torch.no_grad()
def is_finite(net):
    """Return whether all weights are numbers."""
    return all(p.isfinite().all() for p in net.parameters() if p.is_floating_point())


def learner_folder(folder, name, several):
    """Return a learner's place in a folder: the folder itself, or if there are several FOLDER/NAME."""
    return folder and (folder / name if several else folder)


def load_frozen(reader, student, cfg):
    """Return a frozen teacher. The student without its adapter is one that takes no memory."""
    if cfg.lora_rank and reader.path == student.path:
        return twin(student, without_adapter=True, template_kwargs=reader.template_kwargs)
    return load(reader, cfg)


def make_self_teacher(reader, student, kind, cfg):
    """Return a student's self-teacher of --self_teacher's kind; None where the method has none."""
    if kind == "frozen":
        return load_frozen(reader, student, cfg)
    if kind in ("ema", "snapshot"):
        student.average = make_average(reader, student, cfg)
        return student.average
    return student if kind == "live" else None


# ---- models that share the student's network ---------------------------------------------------------------

def twin(student, **changes):
    """Return a frozen Model that uses the student's network. changes: its fields that differ."""
    return Model(**{f.name: getattr(student, f.name) for f in fields(Model)} | changes)


def make_average(reader, student, cfg):
    """Return a teacher that uses the student's network with other values: a moving average or a snapshot.

    Only the parameters that learn (of an adapter, say) are kept twice; with --teacher_device swap the second
    copy is in main memory.
    """
    device = "cpu" if cfg.teacher_device == "swap" else student.device
    values = {p: p.detach().to(device, copy=True) for p in student.net.parameters() if p.requires_grad}
    return twin(student, values=values, template_kwargs=reader.template_kwargs)


def average_values(student):
    """Return the values of a student's average in the order of its parameters; [] where it has no average."""
    return list(student.average.values.values()) if student.average else []


@torch.no_grad()
def follow(average, rate):
    """Update an average: average = (1 - rate) average + rate student. SDPO, 2601.20802."""
    for p, value in average.values.items():
        value.lerp_(p.to(value.device), rate)


def offload(student):
    """Move weights and optimizer state to main memory. `on_device` copies the weights back while needed."""
    student.offloaded = True
    move(student, "cpu")


def onload(student):
    """Move weights and optimizer state back to the student's device, before it learns."""
    student.offloaded = False
    move(student, student.device)


def move(student, device):
    """Move weights, buffers and optimizer state in place, so that the optimizers keep their parameters."""
    for x in tensors(student.net):
        x.data = x.data.to(device)
    for state in [state for optimizer in student.optimizers for state in optimizer.state.values()]:
        for name, x in state.items():
            state[name] = x.to(device) if torch.is_tensor(x) else x


# ---- check -------------------------------------------------------------------------------------------------

def check_head(path, net):
    """Refuse an output head that is not a matrix."""
    head = net.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.weight.shape != (head.out_features, head.in_features):
        raise Refused(f"{path}: the output head of {type(net).__name__} is not a plain matrix, which is not "
                      "supported")


@torch.no_grad()
def check_forward(model):
    """Refuse a model whose logits are not what the loss will compute from hidden states, head and softcap.

    The head's input must be the last hidden states. For its output, a probe is put in its place: the model
    must turn it into what logit_scale and softcap make of it. No token may see a later one: changing the last
    token must leave the other states as they are. And the model must be able to generate.
    """
    net, head, seen, kind = model.net, model.net.get_output_embeddings(), {}, type(model.net).__name__
    ids_BT = torch.arange(8, device=model.device)[None] % model.vocab
    changed_BT = ids_BT.clone()
    changed_BT[0, -1] = 0
    probe_BTV = torch.linspace(-100, 100, 8 * head.out_features, device=model.device).view(1, 8, -1)

    def replace_output(module, inputs, output):
        seen["input"] = inputs[0].float()
        return probe_BTV.clone()

    hook = head.register_forward_hook(replace_output)
    try:
        with model.forward_context():
            net.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=GenerationConfig(
                max_new_tokens=2, eos_token_id=model.stops, pad_token_id=model.stops[0]))
            hidden_BTH, changed_BTH = (model.body(ids, use_cache=False).last_hidden_state.float()
                                       for ids in (ids_BT, changed_BT))
            theirs_BTV = net(ids_BT, use_cache=False).logits.float()[..., :model.vocab]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                  # every network can fail in its own way
        raise Refused(f"{model.path}: {kind} does not run in {model.dtype} on {model.device.type}: "
                      f"{first_line(error)}") from None
    finally:
        hook.remove()
    ours_BTV = model.logit_scale * probe_BTV[..., :model.vocab]
    if model.softcap:
        ours_BTV = model.softcap * torch.tanh(ours_BTV / model.softcap)
    close = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=5e-3, atol=1e-3)      # bf16 logits
    if not hidden_BTH.isfinite().all():
        raise Refused(f"{model.path}: {kind} computes what is not a number: its weights are broken")
    if not close(hidden_BTH[:, :-1], changed_BTH[:, :-1]):
        raise Refused(f"{model.path}: in {kind} a token sees the ones after it; a language model must not")
    if not ("input" in seen and close(seen["input"], hidden_BTH) and close(theirs_BTV, ours_BTV)):
        raise Refused(f"{model.path}: {kind} transforms its logits in a way that is unknown here: not a "
                      "bias, logit_scale, logits_scaling or final_logit_softcapping")


@torch.no_grad()
def check_sampler(student, prompts, max_new_tokens, batch, micro_tokens):
    """Refuse a student whose samples do not come from the distribution that is trained.

    KL(student, student) must be 0 between two rollouts in one padded forward pass and the same two, each
    alone. The sampler's log-probabilities must be those of the training's forward pass.
    """
    completions, logps = zip(*student.generate(prompts, 1.0, 1.0, max_new_tokens, batch))
    short = sorted(range(len(prompts)), key=lambda i: len(completions[i]))[:2]
    pair = [prompts[i] for i in short], [completions[i] for i in short]
    together_NH = student.hidden_states(*pair)
    alone_NH = torch.cat([student.hidden_states([prompt], [ids_T]) for prompt, ids_T in zip(*pair)])
    kl, _ = linear_divergence(together_NH, student.head_VH, alone_NH, student.head_VH, vocab=student.vocab,
                              softcap_s=student.softcap, softcap_t=student.softcap)
    kl = kl.item() / len(alone_NH)
    if not abs(kl) < (1e-4 if student.dtype == torch.float32 else 1e-2):
        raise Refused(f"KL(student, student) = {kl:.2e} nats per token instead of 0: forward pass or loss is "
                      "broken")
    off = check_log_probs(student, student.log_probs(prompts, completions, micro_tokens), logps)
    tqdm.write(f"check, nats per token: KL(student, student) {kl:.1e}, sampler against training {off:.1e}")


def check_log_probs(student, lps, sampled_lps):
    """Refuse log-probabilities of the sampler that are not the training's; return their mean distance."""
    off = (torch.cat(lps) - torch.cat(sampled_lps)).abs().mean().item()
    if not off < (1e-3 if student.dtype == torch.float32 else 0.2):
        raise Refused(f"{student.path}: in {type(student.net).__name__} the sampler's log-probs differ from "
                      f"the training forward's by {off:.3f} nats per token: the rollouts are not on-policy")
    return off


# ---- save --------------------------------------------------------------------------------------------------

def save_model(model, folder):
    """Write the adapter in peft's format, or else the model in that of transformers."""
    if not model.adapter:
        return model.net.save_pretrained(folder)
    model.adapter.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    saved = json.loads(file.read_text())
    saved["target_modules"].sort()                              # of a set, in the order of this process
    if Path(model.path).is_dir():
        saved["base_model_name_or_path"] = str(Path(model.path).absolute())     # found from everywhere
    file.write_text(json.dumps(saved, indent=2))


def save_learners(learners, folder, state):
    """Write what a restart needs: weights, optimizers, averages, and the state of the run."""
    for learner in learners:
        save_model(learner, learner_folder(folder, learner.name, len(learners) > 1))
    kept = {learner.name: {"updates": learner.updates, "average": average_values(learner),
                           "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers]}
            for learner in learners}
    torch.save({"learners": kept, "state": state}, folder / "trainer.pt")


def restore_learners(learners, folder):
    """Read what save_learners wrote, except the weights, which `load` reads. Return the run's state."""
    with reading(folder):
        saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or not {"learners", "state"} <= saved.keys():
        raise Refused(f"{folder} was written by another version of opd; choose another --out")
    if (names := {learner.name for learner in learners}) != saved["learners"].keys():
        raise Refused(f"{folder} is of {', '.join(saved['learners'])}, not of {', '.join(sorted(names))}; "
                      "choose another --out")
    for learner in learners:
        kept = saved["learners"][learner.name]
        learner.updates = kept["updates"]
        for optimizer, state in zip(learner.optimizers, kept["optimizers"], strict=True):
            fused = [group.get("fused") for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, here in zip(optimizer.param_groups, fused):
                group["fused"] = here                           # the state may come from another device
        for value, then in zip(average_values(learner), kept["average"], strict=True):
            value.copy_(then)
    return saved["state"]


def save_adapters(students, folder):
    """Write the students' adapters, as peft loads them."""
    for student in students:
        save_model(student, learner_folder(folder, student.name, len(students) > 1))


def save_final(students, folder):
    """Write plain folders that from_pretrained loads, in the run's dtype, with adapters merged.

    Beside the weights are the files that the student came with, so that whoever could read it reads them
    alike. Only the config has another dtype, and the generation defaults have stop tokens that are new.
    """
    for student in students:
        if student.adapter:
            student.net, student.adapter = student.adapter.merge_and_unload(), None
        student.net.to(student.dtype)
        where = learner_folder(folder, student.name, len(students) > 1)
        save_model(student, where)
        files = dict(student.files)
        saved, came = json.loads((where / "config.json").read_bytes()), json.loads(files["config.json"])
        if came.get("model_type") != saved["model_type"]:       # the language model of a larger one
            came = came.get("text_config", {})
        files["config.json"] = json.dumps(in_both_words(saved, came), indent=2).encode()
        eos = json.loads(files["generation_config.json"]).get("eos_token_id")
        if sorted([eos] if isinstance(eos, int) else eos or []) != student.stops:
            change(files, "generation_config.json", eos_token_id=student.stops)
        for name, data in files.items():
            (where / name).parent.mkdir(exist_ok=True)
            (where / name).write_bytes(data)


def in_both_words(saved, came):
    """Return a config as it came, with what transformers 5 has saved, and RoPE in the words of 4 and of 5.

    Transformers 4 reads rope_theta and rope_scaling. Where they are missing it takes 10,000 without a word.
    """
    rope = saved.get("rope_parameters") or {}
    older = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name not in older}
    both = {**saved, **older, **came}
    for name in both.keys() & saved.keys():
        if isinstance(both[name], dict) and isinstance(saved[name], dict):
            both[name] = in_both_words(saved[name], both[name])
    both |= {name: saved["dtype"] for name in ("dtype", "torch_dtype") if name in both and "dtype" in saved}
    both.pop("auto_map", None)                                  # the code does not come along, nor was it run
    return both
