"""The sampler: many completions at a time, one token each per step.

    admit    prompts, padded on the right, go through the network once and fill free rows of the cache
    step     every row's newest token goes through, attends to its own row, and draws the next one
    collect  rows that are done leave, and make room for waiting prompts (continuous batching)

The cache has a fixed size and is written in place. The forward pass is the network's own: transformers hands
a cache and an attention function to any network whose layers ask for them. On a GPU a step is recorded in a
CUDA graph and replayed: the step of a small model is hundreds of kernels of a few microseconds each, and it
takes longer to launch them than to run them.

`obstacle` says which networks this cannot serve, those with sliding windows or state-space layers, say.
Transformers' generate completes their prompts, one batch after the other.

Suffixes: B rows of the cache, T positions in it, N new tokens, V vocabulary, H hidden width.
"""
import contextlib
import functools
import inspect
import math
import warnings
from collections import deque

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import (AttentionInterface, Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList,
                          TemperatureLogitsWarper, TopPLogitsWarper)

from config import Refused, first_line

STEPS = {"cuda": 16, "cpu": 1}          # between two looks at which rows are done
REFILL = 8                              # free rows are filled when they are one in so many
PREFILL = 16384                         # tokens of prompts, padding included, in one forward pass
LENGTHS = 256                           # a graph's attention reads the cache up to a multiple of so many
FEW = 8                                 # rows that are not worth shrinking
MOST_ROWS, ROWS = 512, 64               # of the default; of the default with transformers' generate
SHARE, ASSUMED = 1 / 4, 80 * 2**30      # of a GPU's memory for the cache; that of a GPU that is not here
CPU_CACHE = 2**30                       # bytes of the cache on a CPU
LOGITS = 5                              # float32 copies of the newest logits while a token is drawn


@torch.no_grad()
def sample(model, prompts, temperature, top_p, max_new_tokens, rows):
    """Complete prompts (lists of token ids), `rows` at a time, and return [(ids_T, logp_T)].

    Each completion ends with its first stop token. With temperature 0 it is greedy, and logp_T is None.
    Otherwise logp_T are the log-probabilities under the distribution that was sampled from, with temperature
    and top_p applied.
    """
    if not prompts:
        return []
    complete = decode if model.served else generate
    broken = Refused(f"{model.path} computes what is not a number while it samples: its weights are broken")
    try:
        with model.forward_context():
            found = complete(model, prompts, temperature, top_p, max_new_tokens, min(rows, len(prompts)))
    except RuntimeError as error:
        raise broken if "probability tensor" in str(error) else error from None
    if temperature > 0 and not all(logp_T.isfinite().all() for _, logp_T in found):
        raise broken
    return [(ids_T, logp_T if temperature > 0 else None) for ids_T, logp_T in found]


def decode(model, prompts, temperature, top_p, max_new_tokens, rows):
    """`sample` by a Decoder."""
    out, waiting = [None] * len(prompts), deque(range(len(prompts)))
    longest = max(map(len, prompts))
    decoder = Decoder(model, rows, longest + max_new_tokens, temperature, top_p, max_new_tokens)
    with decoder.attention(), tqdm(total=len(prompts), desc="sample", leave=False, delay=2) as progress:
        while waiting or decoder.busy():
            free = decoder.free()
            if len(free) * REFILL >= rows:
                while group := next_group(waiting, prompts, len(free)):
                    decoder.admit(free[:len(group)], [prompts[i] for i in group], group)
                    free = free[len(group):]
            decoder.run(STEPS[model.device.type])
            for owner, ids_T, logp_T in decoder.collect():
                out[owner] = ids_T, logp_T
                progress.update()
            if not waiting:
                decoder.shrink()
    return out


def next_group(waiting, prompts, most):
    """Take from the queue the prompts, at most so many, that go through the network together."""
    group, width = [], 0
    while waiting and len(group) < most:
        width = max(width, len(prompts[waiting[0]]))
        if group and width * (len(group) + 1) > PREFILL:
            break
        group.append(waiting.popleft())
    return group


# ---- the cache, and attention to it ------------------------------------------------------------------------

class Slots(Cache):
    """Keys and values [B, heads, T, width] of every layer; every row is filled up to its own position."""

    def __init__(self, rows, positions, dtype):
        super().__init__(layers=[])
        self.size, self.dtype = (rows, positions), dtype
        self.kept = {}                  # layer -> its keys and values, made when the first prompts arrive
        self.admitted_b = None          # the rows that prompts fill; None while all rows make a step
        self.at_B = None                # where every row writes in a step
        self.mask_B1T = None            # which positions its query attends to

    def update(self, key, value, layer, *args, **kwargs):
        """Keep the new keys and values of a layer, and return those that its queries attend to."""
        if layer not in self.kept:
            rows, positions = self.size
            self.kept[layer] = tuple(x.new_zeros(rows, x.shape[1], positions, x.shape[3], dtype=self.dtype)
                                     for x in (key, value))
        pairs = list(zip(self.kept[layer], (key, value)))
        if self.admitted_b is not None:                         # of prompts, which attend to themselves
            for old, new in pairs:
                old[self.admitted_b, :, :new.shape[2]] = new.to(old.dtype)  # padding will be overwritten
            return key, value
        rows = torch.arange(len(self.at_B), device=key.device)
        for old, new in pairs:
            old[rows, :, self.at_B] = new[:, :, 0].to(old.dtype)
        return tuple(old[:, :, :self.mask_B1T.shape[-1]] for old, _ in pairs)

    def keep(self, rows):
        """Keep some rows only."""
        for layer, pair in self.kept.items():                   # one by one, so that the old ones go
            self.kept[layer] = tuple(x[rows] for x in pair)

    def get_seq_length(self, *args):
        """Return 0: the network is always told the positions."""
        return 0


KNOWN = {"dropout", "is_causal", "position_ids", "use_cache", "cache", "past_key_values"}


def attend(slots, module, query, key, value, mask, scaling=None, **kwargs):
    """Attention of prompts to themselves, or of one query per row to what its row holds.

    Queries that share a head of the keys become rows of one product, so that the cache is read as it lies.
    """
    if unknown := [name for name, x in kwargs.items() if name not in KNOWN and x is not None]:
        raise NotImplementedError(f"its attention has {', '.join(unknown)}")
    B, heads, T, width = query.shape
    if slots.admitted_b is not None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                           enable_gqa=heads != key.shape[1])
        return out.transpose(1, 2), None
    grouped = query.reshape(B, key.shape[1], -1, width).to(key.dtype)
    out = scaled_dot_product_attention(grouped, key, value, scale=scaling,
                                       attn_mask=slots.mask_B1T.expand(B, 1, grouped.shape[2], -1))
    return out.reshape(B, 1, heads, value.shape[-1]), None


# ---- the loop over tokens ----------------------------------------------------------------------------------

class Decoder:
    """Rows that complete prompts, each at its own pace."""

    def __init__(self, model, rows, positions, temperature, top_p, max_new_tokens):
        self.model, self.temperature, self.top_p, self.most = model, temperature, top_p, max_new_tokens
        zeros = lambda *shape, dtype=torch.long: torch.zeros(shape, dtype=dtype, device=model.device)
        self.slots = Slots(rows, positions, model.dtype)
        self.columns_T = torch.arange(positions, device=model.device)
        self.stops = torch.tensor(model.stops, device=model.device)
        self.ids_B, self.at_B, self.count_B = zeros(rows), zeros(rows), zeros(rows)
        self.idle_B = torch.ones(rows, dtype=torch.bool, device=model.device)   # done, or never used
        self.out_BN, self.logp_BN = zeros(rows, self.most), zeros(rows, self.most, dtype=torch.float)
        self.owner = [None] * rows      # which prompt a row completes
        self.graphs = {}                # positions that are read -> the recorded step
        inputs = inspect.signature(type(model.body).forward).parameters
        self.cache_name = "cache" if "cache" in inputs else "past_key_values"   # transformers before 5.20

    @contextlib.contextmanager
    def attention(self):
        """Context manager: the network's layers use `attend` and these rows."""
        AttentionInterface.register("opd", functools.partial(attend, self.slots))
        config, before = self.model.config, self.model.config._attn_implementation
        config._attn_implementation = "opd"
        try:
            yield
        finally:
            config._attn_implementation = before
            AttentionInterface.register("opd", attend)          # which lets the rows go

    def free(self):
        """Return the rows without a prompt."""
        return [row for row, owner in enumerate(self.owner) if owner is None]

    def busy(self):
        """Return the rows with a prompt."""
        return [row for row, owner in enumerate(self.owner) if owner is not None]

    def forward(self, ids_BT, positions_BT):
        """Return the last hidden states [B, T, H]."""
        return self.model.body(input_ids=ids_BT, position_ids=positions_BT, use_cache=True,
                               **{self.cache_name: self.slots}).last_hidden_state

    def admit(self, rows, prompts, owners):
        """Fill free rows with prompts, and draw the first token of each."""
        device = self.model.device
        length_b = torch.tensor([len(p) for p in prompts], device=device)
        P = max(map(len, prompts))
        ids_bP = torch.tensor([p + [0] * (P - len(p)) for p in prompts], device=device)
        rows_b = self.slots.admitted_b = torch.tensor(rows, device=device)
        hidden_bPH = self.forward(ids_bP, self.columns_T[None, :P].expand(len(rows), P))
        self.slots.admitted_b = None
        ids_b, logp_b = self.draw(hidden_bPH[torch.arange(len(rows), device=device), length_b - 1])
        self.ids_B[rows_b], self.at_B[rows_b], self.count_B[rows_b] = ids_b, length_b, 1
        self.out_BN[rows_b, 0], self.logp_BN[rows_b, 0] = ids_b, logp_b
        self.idle_B[rows_b] = self.ends(ids_b) | (self.most == 1)
        for row, owner in zip(rows, owners):
            self.owner[row] = owner

    def ends(self, ids_B):
        """Return which tokens are stop tokens. (torch.isin may sort, which cannot be recorded.)"""
        return (ids_B[:, None] == self.stops).any(1)

    def draw(self, hidden_BH):
        """Return the next token of every row and its log-probability under the distribution drawn from."""
        model = self.model
        z_BV = model.net.get_output_embeddings()(hidden_BH)[:, :model.vocab].float() * model.logit_scale
        if model.softcap:
            z_BV = model.softcap * torch.tanh(z_BV / model.softcap)
        if self.temperature == 0:
            return z_BV.argmax(-1), z_BV.new_zeros(len(z_BV))
        logp_BV = torch.log_softmax(z_BV / self.temperature, -1)
        if self.top_p < 1:
            logp_BV = nucleus(logp_BV, self.top_p)
        # Gumbel-max: where log p less the logarithm of exponential noise is largest, a sample from p is.
        ids_B = (logp_BV - torch.empty_like(logp_BV).exponential_().log()).argmax(-1)
        return ids_B, logp_BV.gather(1, ids_B[:, None])[:, 0]

    def step(self, length):
        """Draw one more token in every row that is not idle. length: the positions that are read."""
        self.slots.at_B = self.at_B
        self.slots.mask_B1T = (self.columns_T[:length] <= self.at_B[:, None])[:, None, None]
        hidden_B1H = self.forward(self.ids_B[:, None], self.at_B[:, None])
        busy_B = ~self.idle_B
        place_B1 = self.count_B.clamp(max=self.most - 1)[:, None]
        ids_B, logp_B = self.draw(hidden_B1H[:, 0])
        # All in place, since a recorded step finds its tensors where they were.
        for old_BN, new_B in ((self.out_BN, ids_B), (self.logp_BN, logp_B)):
            old_B = old_BN.gather(1, place_B1)[:, 0]
            old_BN.scatter_(1, place_B1, torch.where(busy_B, new_B, old_B)[:, None])
        self.ids_B.copy_(torch.where(busy_B, ids_B, self.ids_B))
        self.at_B.add_(busy_B)
        self.count_B.add_(busy_B)
        self.idle_B.logical_or_(self.ends(self.ids_B) | (self.count_B >= self.most))

    def run(self, steps):
        """Make some steps, on a GPU by replaying a recorded one."""
        if self.idle_B.all():
            return
        length, most = int(self.at_B.max()) + steps, len(self.columns_T)
        if self.model.device.type == "cpu":
            for _ in range(steps):
                self.step(min(length, most))
            return
        length = min(math.ceil(length / LENGTHS) * LENGTHS, most)
        if length not in self.graphs:
            self.graphs[length] = self.record(length)
            steps -= 1                                          # recording makes one
        for _ in range(steps):
            self.graphs[length].replay()

    def record(self, length):
        """Make a step, which also fills autocast's cache of weights, then record one and return it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            with forbidden_to_wait():
                self.step(length)
        torch.cuda.current_stream().wait_stream(stream)
        graph, others = torch.cuda.CUDAGraph(), list(self.graphs.values())
        with torch.cuda.graph(graph, pool=others[0].pool() if others else None):    # they run in turn
            self.step(length)
        return graph

    def collect(self):
        """Yield (owner, ids_T, logp_T) of every row that is done, and free it."""
        counts = self.count_B.tolist()
        for row, idle in enumerate(self.idle_B.tolist()):
            if idle and self.owner[row] is not None:
                owner, self.owner[row] = self.owner[row], None
                yield owner, self.out_BN[row, :counts[row]].clone(), self.logp_BN[row, :counts[row]].clone()

    def shrink(self):
        """Keep only the busy rows, once they are at most half of all. A new size is recorded anew."""
        busy = self.busy()
        if not busy or len(busy) * 2 > len(self.owner) or len(self.owner) <= FEW:
            return
        rows = torch.tensor(busy, device=self.model.device)
        self.slots.keep(rows)
        for name in ("ids_B", "at_B", "count_B", "idle_B", "out_BN", "logp_BN"):
            setattr(self, name, getattr(self, name)[rows])
        self.owner, self.graphs = [self.owner[row] for row in busy], {}


@contextlib.contextmanager
def forbidden_to_wait():
    """Context manager: what would wait for the GPU raises an error, as it could not be recorded."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def nucleus(logp_BV, top_p):
    """Return the log-probabilities within the fewest tokens that together hold top_p; -inf elsewhere."""
    sorted_BV, order_BV = logp_BV.sort(descending=True, stable=True)
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()    # what the more likely tokens hold
    kept_BV = torch.zeros_like(order_BV, dtype=torch.bool).scatter(1, order_BV, before_BV < top_p)
    return torch.log_softmax(logp_BV.masked_fill(~kept_BV, -torch.inf), -1)


# ---- which networks, how many rows -------------------------------------------------------------------------

@torch.no_grad()
def obstacle(model, try_it=True):
    """Return why a Decoder cannot serve a model, in a few words, or None.

    Attention must be to all tokens before. With try_it, the log-probabilities of some samples are compared
    with those of the forward pass that is trained.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
        return "its attention has a sliding window"
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(x, str) and x in ("dynamic", "longrope") for x in rope.values()):
        return "its rotary embedding depends on the longest text"
    if not try_it:
        return None
    prompts = [[i % model.vocab for i in range(1, n + 1)] for n in (5, 2, 7)]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), model.forward_context():
            found = decode(model, prompts, 1.0, 1.0, 4, rows=2)
        lps = model.log_probs(prompts, [ids_T for ids_T, _ in found], micro_tokens=64)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                  # networks fail in many ways
        return first_line(error)[:100]
    off = max((lp_T - logp_T).abs().max().item() for lp_T, (_, logp_T) in zip(lps, found))
    if not off < (1e-3 if model.dtype == torch.float32 else 0.5):
        return f"its log-probabilities would be off by {off:.2g} nats"
    return None


def default_rows(model, positions, device):
    """Return how many completions of so many positions are sampled at a time without --sample_batch.

    It depends on what a device has and not on what is free, so that a resumed run samples as before.
    """
    if not model.served:
        return ROWS
    memory = CPU_CACHE
    if device != "cpu":
        here = torch.cuda.is_available()
        memory = SHARE * (torch.cuda.get_device_properties(device).total_memory if here else ASSUMED)
    return max(1, min(MOST_ROWS, int(memory // row_bytes(model, positions))))


def row_bytes(model, positions):
    """Return the bytes of a row of the cache, and of the logits that its next token is drawn from."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * positions * model.dtype.itemsize
    return cache + LOGITS * 4 * model.net.get_output_embeddings().out_features


# ---- transformers' generate --------------------------------------------------------------------------------

def generate(model, prompts, temperature, top_p, max_new_tokens, rows):
    """`sample` by transformers."""
    out, starts = [], range(0, len(prompts), rows)
    for start in tqdm(starts, "sample", leave=False, disable=len(starts) == 1):
        out += generate_batch(model, prompts[start:start + rows], temperature, top_p, max_new_tokens)
    return out


def generate_batch(model, prompts, temperature, top_p, max_new_tokens):
    """Complete some prompts together, with padding on the left, until the last of them is done."""
    P, device = max(map(len, prompts)), model.device
    ids_BP = torch.tensor([[model.stops[0]] * (P - len(p)) + p for p in prompts], device=device)
    mask_BP = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
    recorder, sampling = SampledLogProbs(), {}
    processors = LogitsProcessorList([OnlyKnownTokens(model.vocab)])
    if temperature > 0:
        # A list times False is empty. The processors do the work of generate's own options, in an order that
        # is known here: the recorder comes last.
        processors += [TemperatureLogitsWarper(temperature)] * (temperature != 1)
        processors += [TopPLogitsWarper(top_p)] * (top_p < 1) + [recorder]
        sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    ids_BT = model.net.generate(
        ids_BP, attention_mask=mask_BP, logits_processor=processors,
        generation_config=GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=model.stops,
                                           pad_token_id=model.stops[0], **sampling))
    logp_BT = recorder.finish(ids_BT) if temperature > 0 else None
    stop_BT = torch.isin(ids_BT[:, P:], torch.tensor(model.stops, device=device))
    out = []
    for i, stop_T in enumerate(stop_BT):
        # argmax finds the first stop token; behind it is padding.
        T = int(stop_T.int().argmax()) + 1 if stop_T.any() else len(stop_T)
        out.append((ids_BT[i, P:P + T], logp_BT[i, :T] if temperature > 0 else None))
    return out


class SampledLogProbs(LogitsProcessor):
    """A logits processor that keeps log p(y) of every sampled token, and changes nothing.

    It has to be the last one, which sees the distribution that generate samples from. The token itself is
    known only when the processor is called for the next one.
    """

    def __init__(self):
        self.previous_BV, self.logps = None, []

    def __call__(self, ids_BT, scores_BV):
        if self.previous_BV is not None:
            self.take(ids_BT)
        self.previous_BV = torch.log_softmax(scores_BV.float(), -1)
        return scores_BV

    def take(self, ids_BT):
        """Keep the log-probabilities of the newest tokens."""
        self.logps.append(self.previous_BV.gather(1, ids_BT[:, -1:]))

    def finish(self, ids_BT):
        """Return the log-probabilities [B, T] of all sampled tokens; no call comes after the last token."""
        self.take(ids_BT)
        return torch.cat(self.logps, 1)


class OnlyKnownTokens(LogitsProcessor):
    """A logits processor: ids beyond the tokenizer's, which only pad the head, are never sampled."""

    def __init__(self, vocab):
        self.vocab = vocab

    def __call__(self, ids_BT, scores_BV):
        scores_BV[:, self.vocab:] = -torch.inf
        return scores_BV
