"""A prototype that gpu_decode.py times: sampling in a CUDA graph.

One step (forward, sampling, bookkeeping) is recorded once and replayed. Right-padded prompts, a cache of
fixed size that every row fills at its own position, attention without copies of the cache. Only for networks
whose layers call transformers' attention interface.
"""
import contextlib
import functools

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, Cache


class Slots(Cache):
    """Keys and values [B, heads, T, D] of every layer, in the computation's dtype, written at `at` [B]."""

    def __init__(self, layers, at):
        super().__init__(layers=[])
        self.kept, self.at, self.rows = [None] * layers, at, torch.arange(len(at), device=at.device)
        self.prompt = True

    def update(self, key, value, layer, *args, **kwargs):
        if self.prompt:                                     # right-padded: what lies behind is overwritten
            self.kept[layer][0][:, :, :key.shape[2]] = key
            self.kept[layer][1][:, :, :key.shape[2]] = value
            return key, value
        for kept, new in zip(self.kept[layer], (key, value)):
            kept[self.rows, :, self.at] = new[:, :, 0].to(kept.dtype)
        return self.kept[layer]

    def get_seq_length(self, *args):
        return 0


def attend(module, query, key, value, _, scaling=None, mask=None, **kwargs):
    """One query per row: queries that share a key head become its rows, and the cache is read as it lies."""
    B, heads, T, D = query.shape
    if T > 1:
        out = sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=heads != key.shape[1])
        return out.transpose(1, 2), None
    grouped = query.view(B, key.shape[1], -1, D).to(key.dtype)
    out = sdpa(grouped, key, value, attn_mask=mask.expand(B, 1, grouped.shape[2], -1), scale=scaling)
    return out.reshape(B, 1, heads, D), None


@torch.no_grad()
def decode(model, prompts, max_new_tokens, temperature=1.0, graph=None):
    """As Model.generate without top_p: [(ids_T, logp_T)]."""
    net, device, B = model.net, model.device, len(prompts)
    graph = device.type == "cuda" if graph is None else graph
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    P = int(lengths.max())
    T = -(-(P + max_new_tokens) // 64) * 64
    ids_BP = torch.tensor([p + [0] * (P - len(p)) for p in prompts], device=device)
    text, at = net.config.get_text_config(), lengths.clone()
    cache = Slots(text.num_hidden_layers, at)
    D = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    zeros = lambda: torch.zeros(B, text.num_key_value_heads, T, D, dtype=model.dtype, device=device)
    cache.kept = [[zeros(), zeros()] for _ in cache.kept]
    stops, columns = torch.tensor(model.stops, device=device), torch.arange(T, device=device)
    mask_B1T = torch.zeros(B, 1, 1, T, dtype=model.dtype, device=device)
    ids_B, done_B, t = torch.zeros_like(at), torch.zeros_like(at, dtype=torch.bool), torch.zeros_like(at[:1])
    out_BT = torch.full((B, max_new_tokens), model.stops[0], device=device)
    logp_BT = torch.zeros(B, max_new_tokens, device=device)
    rows = torch.arange(B, device=device)

    def sample(hidden_BH):
        z_BV = net.get_output_embeddings()(hidden_BH)[:, :model.vocab].float()
        z_BV = z_BV * model.logit_scale / temperature
        logp_BV = torch.log_softmax(z_BV, -1)
        ids_B.copy_((logp_BV - torch.empty_like(logp_BV).exponential_().log()).argmax(-1))      # Gumbel-max
        out_BT.index_copy_(1, t, torch.where(done_B, stops[0], ids_B)[:, None])
        logp_BT.index_copy_(1, t, logp_BV.gather(1, ids_B[:, None]))
        done_B.logical_or_(torch.isin(ids_B, stops))
        t.add_(1)

    def step():
        mask_B1T.copy_(torch.where(columns <= at[:, None], 0.0, -torch.inf)[:, None, None])
        hidden = model.body(input_ids=ids_B[:, None], position_ids=at[:, None], past_key_values=cache,
                            use_cache=True).last_hidden_state
        at.add_(1)
        sample(hidden[:, 0])

    AttentionInterface.register("opd_decode", functools.partial(attend, mask=mask_B1T))
    was = text._attn_implementation
    with model.forward_context(), contextlib.ExitStack() as stack:
        text._attn_implementation = "opd_decode"
        stack.callback(setattr, text, "_attn_implementation", was)
        hidden = model.body(input_ids=ids_BP, position_ids=torch.arange(P, device=device)[None],
                            past_key_values=cache, use_cache=True).last_hidden_state
        cache.prompt = False
        sample(hidden[rows, lengths - 1])
        if graph:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()                          # warm-up: also fills autocast's cache of weights
            torch.cuda.current_stream().wait_stream(stream)
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                step()
        while int(t) < max_new_tokens and not done_B.all():     # one look at the rows every 16 tokens
            for _ in range(min(16, max_new_tokens - int(t))):
                recorded.replay() if graph else step()
    out = []
    for i, stop_T in enumerate(torch.isin(out_BT[:, :int(t)], stops).cpu()):
        n = int(stop_T.int().argmax()) + 1 if stop_T.any() else len(stop_T)
        out.append((out_BT[i, :n], logp_BT[i, :n]))
    return out
