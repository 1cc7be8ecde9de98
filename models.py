"""Models: from a checkpoint to what the loop uses, and back to a checkpoint.

    Model         a causal language model with its tokenizer: encode, generate, hidden_states, log_probs
    Learner       a Model that learns: with its optimizers and, if it has one, its moving average
    load          load and check any decoder-only model that transformers knows; --lora_rank adds an adapter
    check_*       refuse by name what would train wrongly: unknown logits, attention to later tokens
    share_*       make student and teacher agree on the token ids, and on where a completion ends
    save_*        write what from_pretrained, or peft, reads again, and what a restart needs

Parameters that learn are kept in float32, and frozen ones in --dtype. The computation is in --dtype for both,
but the residual stream and the norms are float32 in both (a quantised teacher's norms stay as they come).
Otherwise the gap between two equal models would not be 0 but their rounding errors.

Other files import transformers, or sampler.py, after this file: see below about `kernels`.
"""
import contextlib
import copy
import functools
import json
import math
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import tokenizers
import torch
import transformers
import transformers.utils.import_utils
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from config import Refused, first_line
from kernels import linear_divergence, linear_logprob

# transformers uses the package `kernels` of PyPI where it is installed. But `import kernels` would find this
# project's folder of that name, so transformers is told that the package is not there.
for module in (transformers.utils, transformers.utils.import_utils):
    module.is_kernels_available = lambda *args, **kwargs: False

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

import sampler

# What a student brings beside its weights, and final/ gives back.
OWN_FILES = ("config.json", "generation_config.json", "*tokenizer*", "special_tokens_map.json",
             "added_tokens.json", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
             "*chat_template*", "*chat_template*/*")
# Tokenizers cut these in different ways: capitals, numbers, signs, white space, other scripts.
PROBE = "It's 2024:\t12,345.67 (they'LL say)\n\n  naïve Ωμέγα 北京 x_1=={y};\r\n "


@dataclass(eq=False)
class Model:
    """A causal language model with its tokenizer."""
    path: str
    net: torch.nn.Module
    tok: object
    stops: list                         # token ids that end a completion
    vocab: int                          # token ids that models share; the head may have more rows (padding)
    dtype: torch.dtype                  # of the computation; parameters that learn are float32
    device: torch.device                # of the computation
    files: dict                         # of a learner: {name: bytes} of OWN_FILES, to be saved again
    template_kwargs: dict = field(default_factory=dict)     # options of the chat template
    adapter: object = None              # peft's wrapper of `net`, when only an adapter learns
    without_adapter: bool = False       # `net` is the student's; its adapter is off in this model
    offloaded: bool = False             # the weights wait in main memory while the model is not `on_device`
    values: dict = field(default_factory=dict)  # parameter of `net` -> its other value in this model
    served: bool = True                 # by our own sampler; otherwise by transformers' generate

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
        if self.tok.chat_template:
            text = rendered(self.tok, prompt, self.template_kwargs)
            ids = self.tok(text, add_special_tokens=False).input_ids
        elif not isinstance(prompt, str):
            raise Refused(f"{self.tok.name_or_path} has no chat template, but the prompt is a list of "
                          "messages")
        else:
            ids = self.tok(prompt).input_ids
            if len(ids) > 1 and ids[-1] == self.tok.eos_token_id:   # some tokenizers close every text
                ids = ids[:-1]
        if not ids:
            raise Refused(f"a prompt without tokens: {prompt!r}")
        return ids

    def encode_completion(self, text):
        """Return the token ids of a fixed completion and the token that ends it, to be learned too."""
        end = end_of_turn(self.tok)
        closing = self.tok.eos_token_id if end is None else end
        return self.tok(text, add_special_tokens=False).input_ids + [closing]

    def decode(self, ids_T):
        """Return a completion as text without its stop token. Special tokens within it (<think>) stay."""
        ids = ids_T.tolist()
        return self.tok.decode(ids[:-1] if ids[-1] in self.stops else ids)

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


@dataclass(eq=False)
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


# ---- chat templates ----------------------------------------------------------------------------------------

def messages(prompt):
    """Return a prompt as chat messages; plain text becomes one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def rendered(tok, prompt, template_kwargs=None):
    """Return a prompt as text in the tokenizer's chat template, up to where the answer begins."""
    return tok.apply_chat_template(messages(prompt), tokenize=False, add_generation_prompt=True,
                                   **(template_kwargs or {}))


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
    after = tok(text.rpartition(answer)[2], add_special_tokens=False).input_ids
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special} | set(tok.all_special_ids)
    return next((i for i in after if i in special), None)


def ignores_text(tok):
    """Return whether the chat template leaves out the text: some templates know only lists of parts."""
    try:
        return bool(tok.chat_template) and "a question" not in rendered(tok, "a question").lower()
    except Exception:                                           # the check of the prompts says what is wrong
        return False


def may_think(model):
    """Return whether the chat template has Qwen3's switch for thinking, and nobody has switched it off."""
    return ("enable_thinking" in (model.tok.chat_template or "")
            and model.template_kwargs.get("enable_thinking", True))


# ---- load --------------------------------------------------------------------------------------------------

def load(path, cfg, learns=False, weights=None, name="student"):
    """Return a Model from anything that from_pretrained takes; a Learner called `name` if it `learns`.

    weights: a folder (a checkpoint) to read the parameters, or the adapter's, from instead. With cfg.dry_run
    only the config and the tokenizer are read, and the parameters are fake tensors: shapes without memory.
    """
    transformers.utils.logging.disable_progress_bar()
    dtype, lora = getattr(torch, cfg.dtype), cfg.lora_rank if learns else 0
    config, tok, defaults, files = read_folder(path)
    quantised = getattr(config, "quantization_config", None)
    if learns and quantised:
        raise Refused(f"{path} is quantised and cannot learn; give the unquantised --student, with "
                      "--lora_rank if memory is short (quantised --teachers are fine)")
    offloaded, device = False, torch.device("cpu" if cfg.dry_run else cfg.device)
    if not learns:
        offloaded = cfg.teacher_device == "swap" and not cfg.dry_run
        device = torch.device("cpu") if cfg.teacher_device == "cpu" else device
        if offloaded and quantised:
            raise Refused(f"{path} is quantised, which --teacher_device swap cannot move; choose cuda")
    kept = torch.float32 if learns and not lora else dtype     # the dtype that the parameters are kept in
    with reading(path):
        net = (fake_net(config, kept) if cfg.dry_run else
               read_net(path if lora else weights or path, kept, device if quantised else None))
    if not (cfg.dry_run or quantised or offloaded):
        net.to(device)
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
    # Gemma 3's tokenizer has one token more, for images, than its text models have rows.
    vocab = min(max(tok.get_vocab().values()) + 1, len(net.get_output_embeddings().weight))
    common = dict(path=path, net=net, tok=tok, stops=stop_tokens(path, tok, defaults, vocab), vocab=vocab,
                  dtype=dtype, device=device, files=files if learns else {},
                  template_kwargs=cfg.chat_template_kwargs, offloaded=offloaded)
    model = Learner(name=name, **common) if learns else Model(**common)
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


def read_folder(path):
    """Return (config, tokenizer, generation config, own files) of a checkpoint, whose code is never run."""
    local = Path(path)
    if not local.is_dir() and (path[0] in "./" or path.count("/") > 1):
        raise Refused(f"cannot load {path}: no such folder, and not a hub id")
    if (local / "adapter_config.json").exists():
        raise Refused(f"{path} is an adapter; give a merged model, as a run's final/ is")
    if local.is_dir() and not [*local.glob("*tokenizer*"), *local.glob("*vocab*")]:
        raise Refused(f"cannot load {path}: no tokenizer in this folder"
                      + ("; did you mean its final/?" if (local / "final").is_dir() else ""))
    with reading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tok = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        files = own_files(Path(cached_file(path, "config.json")).parent)       # of a hub id: in the cache
        try:
            defaults = GenerationConfig.from_pretrained(path)
        except OSError:                                         # many checkpoints have none
            if (local / "generation_config.json").exists():
                raise
            defaults = GenerationConfig.from_model_config(config)
            files["generation_config.json"] = defaults.to_json_string().encode()
        if "tokenizer.json" in files and not reads_its_file(tok, files["tokenizer.json"]):
            tqdm.write(f"note: {path} is read as its tokenizer.json says, not as {type(tok).__name__} does")
            tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
            change(files, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    if tok.eos_token_id is None:
        raise Refused(f"{path}: the tokenizer has no EOS token, so a completion could never end")
    return config, tok, defaults, files


def own_files(folder):
    """Return {name: bytes} of a checkpoint's configs, tokenizer and chat templates."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for pattern in OWN_FILES for path in folder.glob(pattern) if path.is_file()}


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


@contextlib.contextmanager
def reading(path):
    """Context manager: refuse in one line whatever is wrong with a checkpoint."""
    try:
        yield
    except (torch.OutOfMemoryError, Refused):
        raise
    except Exception as error:          # every kind of file can be broken in its own way
        raise Refused(f"cannot load {path}: {first_line(error)}") from None


def read_net(source, dtype, device):
    """Return the network with the weights in `source`. device: of a quantised one, which cannot be moved."""
    net, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, trust_remote_code=False,
        **(dict(device_map={"": device}) if device else {}))
    unused = [] if device else found["unexpected_keys"]         # a quantised one may have scales to spare
    for keys, wrong in ((found["missing_keys"], "missing"), (unused, "not in its config's model")):
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

def load_students(cfg, checkpoint, teacher_learns):
    """Return the Learners of --student: "student", or "1" and "2". checkpoint: to resume from, or None."""
    names = ["student"] if len(cfg.student) == 1 else [str(i + 1) for i in range(len(cfg.student))]
    several = len(names) > 1 or teacher_learns
    students = [load(path, cfg, learns=True, weights=learner_folder(checkpoint, name, several), name=name)
                for path, name in zip(cfg.student, names)]
    for other in students[1:]:
        share_tokens(students[0], other)
    if len(students) > 1 and cfg.teacher_device == "swap" and not cfg.dry_run:
        for student in students:
            offload(student)
    return students


def load_teachers(cfg, checkpoint, students, teacher_learns):
    """Return {path: Model} of --teachers, Learners if teacher_learns. They share the students' tokens."""
    student, teachers = students[0], {}
    for path in dict.fromkeys(cfg.teachers.values()):
        name = f"teacher{len(teachers) or ''}"
        if teacher_learns:
            weights, adapted = learner_folder(checkpoint, name, several=True), copy.copy(cfg)
            adapted.lora_rank = getattr(cfg, "teacher_rank", cfg.lora_rank)
            teachers[path] = load(path, adapted, learns=True, weights=weights, name=name)
        else:
            teachers[path] = load_frozen(path, student, cfg)
        share_tokens(student, teachers[path])
    for other in students[1:]:
        other.vocab = student.vocab
    for teacher in teachers.values():
        share_stops(student, teacher)
    return teachers


def learner_folder(folder, name, several):
    """Return a learner's place in a folder: the folder itself, or if there are several FOLDER/NAME."""
    return folder and (folder / name if several else folder)


def load_frozen(path, student, cfg):
    """Return a frozen teacher. The student without its adapter is one that takes no memory."""
    if cfg.lora_rank and path == student.path:
        return twin(student, without_adapter=True)
    return load(path, cfg)


def make_self_teacher(student, kind, cfg):
    """Return a student's self-teacher of --self_teacher's kind; None where the method has none."""
    if kind == "frozen":
        start = load_frozen(student.path, student, cfg)
        share_stops(student, start)
        return start
    if kind in ("ema", "snapshot"):
        student.average = make_average(student, cfg)
        return student.average
    return student if kind == "live" else None


# ---- models that share the student's network ---------------------------------------------------------------

def twin(student, **changes):
    """Return a frozen Model that uses the student's network. changes: its fields that differ."""
    return Model(**{f.name: getattr(student, f.name) for f in fields(Model)} | changes)


def make_average(student, cfg):
    """Return a teacher that uses the student's network with other values: a moving average or a snapshot.

    Only the parameters that learn (of an adapter, say) are kept twice; with --teacher_device swap the second
    copy is in main memory.
    """
    device = "cpu" if cfg.teacher_device == "swap" else student.device
    values = {p: p.detach().to(device, copy=True) for p in student.net.parameters() if p.requires_grad}
    return twin(student, values=values)


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
    if not ("input" in seen and close(seen["input"], hidden_BTH) and close(theirs_BTV, ours_BTV)):
        raise Refused(f"{model.path}: {kind} transforms its logits in a way that is unknown here: not a "
                      "bias, logit_scale, logits_scaling or final_logit_softcapping")
    if not close(hidden_BTH[:, :-1], changed_BTH[:, :-1]):
        raise Refused(f"{model.path}: in {kind} a token sees the ones after it; a language model must not")


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


def share_tokens(student, other):
    """Refuse models whose token ids differ: distillation compares distributions id by id.

    A teacher may have more tokens behind the student's last one (Qwen3 and Qwen2.5): its distribution is
    renormalised over the student's tokens. Another learner may not.
    """
    ours, theirs = student.tok.get_vocab(), other.tok.get_vocab()
    more = {token: i for token, i in theirs.items() if i >= student.vocab and token not in ours}
    different = [f"{token!r}: {ours.get(token)} / {theirs.get(token)}"
                 for token in sorted((ours.keys() | theirs.keys()) - more.keys())
                 if ours.get(token) != theirs.get(token)]
    if more and isinstance(other, Learner):
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


# ---- save --------------------------------------------------------------------------------------------------

def save_model(model, folder):
    """Write the adapter in peft's format, or else the model in that of transformers."""
    if model.adapter:
        return model.adapter.save_pretrained(folder, save_embedding_layers=False)
    model.net.save_pretrained(folder)


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
    if not {"learners", "state"} <= saved.keys():
        raise Refused(f"{folder} was written by another version of opd; choose another --out")
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
