"""Models: from a checkpoint to what the loop uses, and back to a checkpoint.

    load          any decoder-only model that transformers loads, checked; with --lora_rank an adapter on it
    Model         its last hidden states and its head, which is all that the loss needs (kernels/)
    average       a moving average of a student, in the student's own network; rest, wake: the one that waits
    check_*       refuse by name what would train wrongly: unknown logits, attention to later tokens
    share_*       what student and teacher must agree on: token ids, where a completion ends
    save_model    what from_pretrained, or peft, reads again

What learns is kept in float32; what is frozen in --dtype, as is all computation, but residual stream and
norms are float32 in both (a quantised teacher's norms are as they come): otherwise two equal models would
show a gap of rounding.
"""
import contextlib
import functools
import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
import transformers.utils.import_utils
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# transformers looks for a distribution called `kernels`, and where one is installed it would import ours.
for module in (transformers.utils, transformers.utils.import_utils):
    module.is_kernels_available = lambda *args, **kwargs: False

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from data.prompts import end_of_turn
from config import fail, first_line


@dataclass(eq=False)
class Model:
    """A causal language model with its tokenizer; the one that learns also has optimizers."""
    path: str
    net: torch.nn.Module
    tok: object
    stops: list                         # token ids that end a completion
    vocab: int                          # token ids that models share; the head may have more rows (padding)
    dtype: torch.dtype                  # of the computation; parameters that learn are float32
    device: torch.device                # of the computation
    generation_config: GenerationConfig  # as found in the checkpoint, kept to be saved again
    optimizers: tuple = ()
    adapter: object = None              # peft's wrapper of `net`, when only an adapter learns
    without_adapter: bool = False       # `net` is the student's; this is the model that it was
    swapped: bool = False               # weights wait in main memory while the model is not `present`
    average: object = None              # the Model that follows this one as its moving average
    values: dict = field(default_factory=dict)  # parameter of `net` -> its value here, where it is another

    @property
    def config(self):
        """The language model's part of the config."""
        return self.net.config.get_text_config()

    @property
    def body(self):
        """The network without its head."""
        return self.net.base_model if self.net.base_model is not self.net else self.net.model

    @property
    def head_VH(self):
        """The output head; a bias is one more column, to go with the ones in `hidden`."""
        head = self.net.get_output_embeddings()
        weight_VH = self.values.get(head.weight, head.weight)
        if head.bias is None:
            return weight_VH
        bias_V = self.values.get(head.bias, head.bias)
        return pad(torch.cat([weight_VH, bias_V[:, None]], 1), (0, 7))          # widths stay multiples of 8

    @property
    def logit_scale(self):
        """What the model multiplies its logits with (Cohere, Granite)."""
        return (getattr(self.config, "logit_scale", None)
                or 1 / (getattr(self.config, "logits_scaling", None) or 1))

    @property
    def softcap(self):
        """Logits become c * tanh(logits / c) (Gemma 2); None: they do not."""
        return getattr(self.config, "final_logit_softcapping", None)

    @contextlib.contextmanager
    def running(self):
        """The context of every forward pass."""
        bare = self.adapter.disable_adapter() if self.without_adapter else contextlib.nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16), bare:
            yield

    @contextlib.contextmanager
    def present(self):
        """The time in which the network has this model's values, on its device.

        What a swapped model has there are copies, which are dropped: nothing has changed.
        """
        waiting = [(x, x.data) for x in (tensors(self.net) if self.swapped else self.values)]
        try:
            for x, data in waiting:
                x.data = self.values.get(x, data).to(self.device, non_blocking=True)
            yield
        finally:
            for x, data in waiting:
                x.data = data

    def hidden(self, ids_BT):
        """Last hidden states [B, T, H] as the loss wants them: logits = softcapped(hidden @ head_VH.T)."""
        with self.running():
            hidden_BTH = self.body(input_ids=ids_BT.to(self.device), use_cache=False).last_hidden_state
        if self.logit_scale != 1:
            hidden_BTH = hidden_BTH * self.logit_scale
        if self.net.get_output_embeddings().bias is not None:
            hidden_BTH = pad(pad(hidden_BTH, (0, 1), value=1.0), (0, 7))
        return hidden_BTH


# ---- load --------------------------------------------------------------------------------------------------

def load(path, cfg, learns=False, weights=None):
    """A Model from anything from_pretrained takes: the student (`learns`) or a teacher.

    weights: read parameters, or the adapter's, from this folder (a checkpoint) instead. With cfg.dry_run only
    config and tokenizer are read, and the parameters are fake tensors, which have shapes but no memory.
    """
    transformers.utils.logging.disable_progress_bar()
    dtype, lora = getattr(torch, cfg.dtype), cfg.lora_rank if learns else 0
    config, tok, defaults = read_folder(path)
    quantised = getattr(config, "quantization_config", None)
    if learns and quantised:
        fail(f"{path} is quantised and cannot learn; give the unquantised --student, with --lora_rank if "
             "memory is short (quantised --teachers are fine)")
    swapped, device = False, torch.device("cpu" if cfg.dry_run else cfg.device)
    if not learns:
        swapped = cfg.teacher_device == "swap" and not cfg.dry_run
        device = torch.device("cpu") if cfg.teacher_device == "cpu" else device
        if swapped and quantised:
            fail(f"{path} is quantised, which --teacher_device swap cannot move; choose cuda")
    kept = torch.float32 if learns and not lora else dtype
    with reading(path):
        net = (fake_net(config, kept) if cfg.dry_run else
               read_net(path if lora else weights or path, kept, device if quantised else None))
    if not (cfg.dry_run or quantised or swapped):
        net.to(device)
    net.eval().requires_grad_(learns and not lora)
    # A checkpoint's own sampling defaults (top_k 20, say) would make sampling off-policy without a word.
    net.generation_config = GenerationConfig()
    compute_alike(net, kept, dtype, quantised)
    if swapped and device.type == "cuda":
        for x in tensors(net):
            x.data = x.data.pin_memory()
    check_head(path, net)
    # Gemma 3's tokenizer has an image token more than its text models have rows.
    vocab = min(max(tok.get_vocab().values()) + 1, len(net.get_output_embeddings().weight))
    eos = defaults.eos_token_id if isinstance(defaults.eos_token_id, list) else [defaults.eos_token_id]
    stops = {i for i in (tok.eos_token_id, end_of_turn(tok), *eos) if isinstance(i, int) and 0 <= i < vocab}
    if not stops:
        fail(f"{path}: its EOS token has no row in the model, so a completion could never end")
    model = Model(path, net, tok, sorted(stops), vocab, dtype, device, defaults, swapped=swapped)
    if lora:
        model.adapter = add_adapter(model, cfg, weights)
    if not cfg.dry_run:
        with model.present():
            check_forward(model)
    if learns and cfg.gradient_checkpointing:
        recompute_layers(model)
    return model


def compute_alike(net, kept, dtype, quantised):
    """Make networks kept in float32 and in `dtype` compute the same: norms and residual stream are float32.

    Autocast does the rest, but for experts that grouped_mm multiplies: those run as they are kept.
    """
    if dtype == torch.float32:
        return
    for module in net.modules():
        if isinstance(module, torch.nn.Embedding) and torch.is_tensor(getattr(module, "embed_scale", None)):
            module.register_forward_hook(functools.partial(scaled_once, dtype=dtype))       # Gemma 3 and 4
    if kept == torch.float32:
        return
    for parameter in net.parameters():
        if parameter.ndim < 2 and not quantised:
            parameter.data = parameter.data.float()
    net.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.float())


def scaled_once(module, inputs, out, dtype):
    """An embedding times its scale, the scale rounded to `dtype` as transformers does, the product not."""
    embedded = torch.nn.functional.embedding(inputs[0], module.weight)
    return embedded.float() * module.embed_scale.to(dtype).float()


def read_folder(path):
    """(config, tokenizer, generation config) of a checkpoint, whose weights are not touched."""
    local = Path(path)
    if not local.is_dir() and (path[0] in "./" or path.count("/") > 1):
        fail(f"cannot load {path}: no such folder, and not a hub id")
    if (local / "adapter_config.json").exists():
        fail(f"{path} is an adapter; give a merged model, as a run's final/ is")
    if local.is_dir() and not [*local.glob("*tokenizer*"), *local.glob("*vocab*")]:
        fail(f"cannot load {path}: no tokenizer in this folder"
             + ("; did you mean its final/?" if (local / "final").is_dir() else ""))
    with reading(path):
        tok, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
        try:
            defaults = GenerationConfig.from_pretrained(path)
        except OSError:                                         # many checkpoints have none
            if (local / "generation_config.json").exists():
                raise
            defaults = GenerationConfig.from_model_config(config)
    if tok.eos_token_id is None:
        fail(f"{path}: the tokenizer has no EOS token, so a completion could never end")
    return config, tok, defaults


@contextlib.contextmanager
def reading(path):
    """Whatever is wrong with a checkpoint becomes one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:          # every kind of file can be broken in its own way
        fail(f"cannot load {path}: {first_line(error)}")


def read_net(source, dtype, device):
    """The network with the weights in `source`. device: where a quantised one has to be put at once."""
    net, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, **(dict(device_map={"": device}) if device else {}))
    if found["missing_keys"]:
        fail(f"cannot load {source}: {len(found['missing_keys'])} weights are missing, "
             f"{', '.join(sorted(found['missing_keys'])[:3])} among them")
    return net


@functools.cache
def fake_mode():
    """All fake tensors of a process have to be of one mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    return FakeTensorMode()


def fake_net(config, dtype):
    """The network with shapes and dtypes but without memory or values, of any size, in about a second."""
    with fake_mode():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def add_adapter(model, cfg, weights):
    """A LoRA adapter on every linear layer but the head: a saved one, or one that changes nothing yet."""
    try:
        import peft
    except ImportError:
        fail("--lora_rank needs peft: pip install peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=cfg.lora_rank, lora_alpha=cfg.lora_alpha,
                             target_modules="all-linear")
    torch.manual_seed(cfg.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)          # peft calls what transformers has renamed
        if weights and not cfg.dry_run:
            with reading(weights):
                return peft.PeftModel.from_pretrained(model.net, weights, is_trainable=True)
        try:
            adapter = peft.get_peft_model(model.net, config, low_cpu_mem_usage=cfg.dry_run)
        except ValueError as error:                             # layers that read their weights by name, say
            fail(f"--lora_rank: peft cannot adapt {type(model.net).__name__}: {first_line(error)}")
    for module in model.net.modules() if cfg.dry_run else ():   # peft makes meta tensors, the others are fake
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                with fake_mode():
                    setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
    return adapter


def without_adapter(student):
    """The model that the student was before its adapter, as a teacher that costs no memory."""
    return replace(student, optimizers=(), without_adapter=True)


def average(student, cfg):
    """The student's exponential moving average, a teacher in the student's own network (`values`).

    Only what learns is kept twice, an adapter for example; with --teacher_device swap in main memory.
    """
    device = "cpu" if cfg.teacher_device == "swap" else student.device
    values = {p: p.detach().to(device, copy=True) for p in student.net.parameters() if p.requires_grad}
    return replace(student, optimizers=(), values=values)


def averaged(student):
    """The numbers of its moving average, in the order of its parameters; none where it has no average."""
    return list(student.average.values.values()) if student.average else []


@torch.no_grad()
def follow(average, rate):
    """After an update of the student: average = (1 - rate) average + rate student. SDPO, 2601.20802."""
    for p, value in average.values.items():
        value.lerp_(p.to(value.device), rate)


def rest(student):
    """Weights and optimizer state go to main memory. `present` fetches the weights while they are needed."""
    student.swapped = True
    move(student, "cpu")


def wake(student):
    """Everything back to the student's device: it is going to learn."""
    student.swapped = False
    move(student, student.device)


def move(student, device):
    """Weights, buffers and optimizer state, in place: the optimizers keep their parameters."""
    for x in tensors(student.net):
        x.data = x.data.to(device)
    for state in [state for optimizer in student.optimizers for state in optimizer.state.values()]:
        for name, x in state.items():
            state[name] = x.to(device) if torch.is_tensor(x) else x


def tensors(net):
    return [*net.parameters(), *net.buffers()]


def recompute_layers(model):
    """Gradient checkpointing: of every layer only the input is kept, the rest is computed again in backward.

    transformers' own switch works in training mode only, where dropout is on.
    """
    def recomputed(forward):
        def call(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return call

    layers = [module for module in model.net.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        fail(f"{model.path}: {type(model.net).__name__} has no layers that --gradient_checkpointing knows")
    for layer in layers:
        layer.forward = recomputed(layer.forward)


# ---- check -------------------------------------------------------------------------------------------------

def check_head(path, net):
    """The output head must be a matrix."""
    head = net.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.weight.shape != (head.out_features, head.in_features):
        fail(f"{path}: the output head of {type(net).__name__} is not a plain matrix, which is not supported")


@torch.no_grad()
def check_forward(model):
    """Refuse a model whose logits are not what the loss will compute from `hidden`, head and softcap.

    What goes into the head must be the last hidden states, and what comes out of the model the transforms
    that are known here, tried on a probe in place of the head's output. No token may see a later one, and the
    model must generate.
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
        with model.running():
            net.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=GenerationConfig(
                max_new_tokens=2, eos_token_id=model.stops, pad_token_id=model.stops[0]))
            hidden_BTH, changed_BTH = (model.body(ids, use_cache=False).last_hidden_state.float()
                                       for ids in (ids_BT, changed_BT))
            theirs_BTV = net(ids_BT, use_cache=False).logits.float()[..., :model.vocab]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                  # every network can fail in its own way
        fail(f"{model.path}: {kind} does not run in {model.dtype} on {model.device.type}: "
             f"{first_line(error)}")
    finally:
        hook.remove()
    ours_BTV = model.logit_scale * probe_BTV[..., :model.vocab]
    if model.softcap:
        ours_BTV = model.softcap * torch.tanh(ours_BTV / model.softcap)
    close = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=5e-3, atol=1e-3)      # bf16 logits
    if not hidden_BTH.isfinite().all():
        fail(f"{model.path}: {kind} computes what is not a number: its weights are broken")
    if not ("input" in seen and close(seen["input"], hidden_BTH) and close(theirs_BTV, ours_BTV)):
        fail(f"{model.path}: {kind} transforms its logits in a way that is unknown here: not a bias, "
             "logit_scale, logits_scaling or final_logit_softcapping")
    if not close(hidden_BTH[:, :-1], changed_BTH[:, :-1]):
        fail(f"{model.path}: in {kind} a token sees the ones after it; a language model must not")


def positions(model):
    """How many tokens the model can take, prompt and completion together."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def share_tokens(student, teacher):
    """Token ids must mean the same in both models: distillation compares distributions id by id.

    A teacher may know more tokens after the student's last one (Qwen3 after Qwen2.5): its distribution is
    renormalised over the student's. Another student (it has optimizers) may not.
    """
    ours, theirs = student.tok.get_vocab(), teacher.tok.get_vocab()
    more = {token: i for token, i in theirs.items() if i >= student.vocab and token not in ours}
    different = [f"{token!r}: {ours.get(token)} / {theirs.get(token)}"
                 for token in sorted((ours.keys() | theirs.keys()) - more.keys())
                 if ours.get(token) != theirs.get(token)]
    if more and teacher.optimizers:
        different += [f"{token!r}: none / {i}" for token, i in more.items()]
    if different:
        fail(f"{student.path} and {teacher.path} have different tokenizers ({len(different)} tokens differ: "
             f"{'; '.join(different[:3])}); models that teach each other must share one")
    if more:
        tqdm.write(f"note: {teacher.path} has {len(more)} tokens that the student lacks "
                   f"({', '.join(sorted(more, key=more.get)[:4])}); their probability is left out")
    student.vocab = min(student.vocab, teacher.vocab)


def share_stops(student, teacher):
    """A student ends where its teacher would, and the teacher writes in the student's tokens.

    A base model has never seen the end-of-turn token of its chat-tuned teacher; it learns the token from the
    teacher, and would write on after it.
    """
    teacher.vocab = student.vocab
    new = [i for i in teacher.stops if i < student.vocab and i not in student.stops]
    if new:
        student.stops = sorted(student.stops + new)
        tqdm.write(f"note: the student also stops at {', '.join(repr(teacher.tok.decode(i)) for i in new)}, "
                   f"where {teacher.path} ends its texts")


# ---- save --------------------------------------------------------------------------------------------------

def save_model(model, folder):
    """save_pretrained: the adapter in peft's format, or the model, to stop where it did here.

    The other generation defaults are those that the model came with.
    """
    if model.adapter:
        return model.adapter.save_pretrained(folder, save_embedding_layers=False)
    model.net.save_pretrained(folder)
    model.generation_config.eos_token_id = model.stops if len(model.stops) > 1 else model.stops[0]
    model.generation_config.to_json_file(folder / "generation_config.json")     # as it came, valid or not


def merge(model):
    """Add the adapter's product to the weights: from now on a plain model."""
    model.net, model.adapter = model.adapter.merge_and_unload(), None
