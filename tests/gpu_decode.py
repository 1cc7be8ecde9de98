"""Milliseconds per sampled position: transformers' generate, and our own sampler (sampler.py).

    python tests/gpu_decode.py [--device cpu]       a Qwen3-0.6B with random weights; cpu: one in small
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import models                   # before transformers, which it keeps from importing our kernels/
import sampler
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

parser = argparse.ArgumentParser()
parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
on = parser.parse_args().device
size = (1024, 3072, 28, 16, 8, 151936) if on == "cuda" else (64, 128, 2, 4, 2, 320)
names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size")
config = Qwen3Config(**dict(zip(names, size)), head_dim=128 if on == "cuda" else 16, tie_word_embeddings=True,
                     max_position_embeddings=4096)
with torch.device(on):
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
net.generation_config = GenerationConfig()
model = models.Model(path="random", whole_config=net.config, net=net, tok=None, stops=[0],
                     vocab=size[-1] - 267 if on == "cuda" else 300, dtype=torch.bfloat16,
                     device=torch.device(on))


def seconds(f):
    if on == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    out = f()
    if on == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, out


def per_step(f, few, many):
    f(few)
    (a, _), (b, out) = seconds(lambda: f(few)), seconds(lambda: f(many))
    return (b - a) / (many - few) * 1e3, out


def off(prompts, out):
    with torch.no_grad():
        completions, logps = zip(*out[:4])
        exact = model.log_probs(prompts[:4], completions, 4096)
        return max((lp_T - logp_T).abs().mean().item() for lp_T, logp_T in zip(exact, logps))


for B, few, many in ((64, 8, 40), (128, 8, 40)) if on == "cuda" else ((4, 2, 4),):
    lengths = [128 - i % 8 if on == "cuda" else 5 - i % 3 for i in range(B)]
    prompts = [torch.randint(1, 300, (n,)).tolist() for n in lengths]
    for name in ("transformers", "ours"):
        model.served = name == "ours"
        f = lambda n: model.generate(prompts, 1.0, 1.0, n, B)
        try:
            ms, out = per_step(f, few, many)
            print(f"B {B} {name}: {ms:.2f} ms per step, {B / ms * 1e3:.0f} tokens/s, "
                  f"off {off(prompts, out):.1e} nats per token", flush=True)
        except Exception as error:
            print(f"B {B} {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
if on == "cuda":
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        sampler.sample(model, prompts, 1.0, 1.0, 18, B)
    print(measured.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=70))
