"""The sampler: it draws from the model's own distribution, whoever shares the batch, and says its log p."""
import gc
import weakref

import pytest
import torch
import transformers
from conftest import tiny
from transformers import GenerationConfig

import models
import opd
import sampler
from data import small_world

SIZES = dict(vocab_size=85, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1, pad_token_id=0,
             bos_token_id=None)
EVERYWHERE = {"Qwen3": dict(head_dim=8), "Qwen2": {}, "Llama": {}, "Mistral": dict(sliding_window=None),
              "Gemma": dict(head_dim=16), "Phi3": {}, "Granite": dict(logits_scaling=3.0), "Cohere": {},
              "Olmo2": {}, "Starcoder2": dict(sliding_window=None),
              "Qwen3Moe": dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8),
              "GPTNeoX": dict(num_key_value_heads=None)}
WINDOWS = {"Mistral": dict(sliding_window=8), "Gemma2": dict(head_dim=16, sliding_window=8),
           "Gemma3": dict(head_dim=16, sliding_window=8), "Bloom": dict(hidden_size=32, n_layer=2, n_head=4)}


def family(name, **more):
    """An untrained model of a family, as the sampler sees it."""
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config(**SIZES | more)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    net.generation_config = GenerationConfig()
    return models.Model(path=name, whole_config=net.config, net=net, tok=None, stops=[1], vocab=80,
                        dtype=torch.float32, device=torch.device("cpu"))


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 80, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_greedy_completions_are_those_of_transformers(name):
    """Prompts of very different lengths, more of them than rows: whoever shares a batch changes nothing."""
    model, prompts = family(name, **EVERYWHERE[name]), prompts_of(1, 40, 3, 17, 2, 9, 5)
    assert sampler.obstacle(model) is None
    complete = lambda f, rows: [ids_T.tolist() for ids_T, _ in f(model, prompts, 0, 1.0, 12, rows)]
    with torch.no_grad(), model.forward_context():
        theirs = complete(sampler.generate, 7)
        assert complete(sampler.decode, 7) == theirs and complete(sampler.decode, 3) == theirs
    assert len(set(map(tuple, theirs))) > 1


def exact(model, prompt, temperature, top_p):
    """The distribution of the next token, from the network's own logits in float64."""
    with torch.no_grad():
        z_V = model.net(torch.tensor([prompt])).logits[0, -1, :model.vocab].double() / temperature
    p_V = torch.softmax(z_V, 0)
    order = p_V.argsort(descending=True)
    kept = order[:int((p_V[order].cumsum(0) < top_p).sum()) + 1]
    out_V = torch.zeros_like(p_V)
    out_V[kept] = p_V[kept] / p_V[kept].sum()
    return out_V


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.5, 0.9)])
def test_samples_come_from_the_distribution_that_was_asked_for(temperature, top_p):
    """Chi-square of 6,000 first and second tokens: a false sampler's would be many deviations too large."""
    model, prompt, count = family("Qwen3", head_dim=8), prompts_of(6)[0], 6000
    torch.manual_seed(3)
    out = sampler.sample(model, [prompt] * count, temperature, top_p, 2, rows=256)
    first = torch.tensor([ids_T[0].item() for ids_T, _ in out])
    common = first.mode().values.item()
    second = torch.tensor([ids_T[1].item() for ids_T, _ in out if ids_T[0] == common and len(ids_T) > 1])
    for drawn, p_V in ((first, exact(model, prompt, temperature, top_p)),
                       (second, exact(model, [*prompt, common], temperature, top_p))):
        expected_V, seen_V = p_V * len(drawn), torch.bincount(drawn, minlength=model.vocab).double()
        assert not seen_V[p_V == 0].any()
        often = expected_V >= 5
        seen, expected = (torch.cat([x_V[often], x_V[~often].sum()[None]]) for x_V in (seen_V, expected_V))
        chi2 = ((seen - expected) ** 2 / expected.clamp(min=1)).sum().item()
        assert chi2 < len(seen) + 6 * (2 * len(seen)) ** 0.5, (chi2, len(seen))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.8)])
def test_log_probabilities_are_those_of_the_distribution_that_was_sampled(temperature, top_p):
    model, prompts = family("Llama"), prompts_of(3, 11, 1)
    out = sampler.sample(model, prompts, temperature, top_p, 6, rows=2)
    for prompt, (ids_T, logp_T) in zip(prompts, out):
        assert len(ids_T) == len(logp_T)
        for t, y in enumerate(ids_T.tolist()):
            p_V = exact(model, prompt + ids_T[:t].tolist(), temperature, top_p)
            assert logp_T[t].item() == pytest.approx(p_V[y].log().item(), abs=1e-4)


def test_a_completion_ends_with_its_first_stop_token_or_at_the_limit():
    model, prompts = family("Qwen2"), prompts_of(4, 9, 2, 30)
    model.stops = list(range(0, 80, 3))
    lengths = set()
    for rows in (1, 4):
        for ids_T, _ in sampler.sample(model, prompts * 10, 1.0, 1.0, 5, rows):
            *before, last = ids_T.tolist()
            assert not set(before) & set(model.stops) and (last in model.stops or len(ids_T) == 5)
            lengths.add(len(ids_T))
    assert lengths == {1, 2, 3, 4, 5}
    assert [len(ids_T) for ids_T, _ in sampler.sample(model, prompts, 1.0, 1.0, 1, rows=3)] == [1] * 4
    model.stops = list(range(80))                                # all end at once
    assert [len(ids_T) for ids_T, _ in sampler.sample(model, prompts, 1.0, 1.0, 5, rows=2)] == [1] * 4


def test_rows_that_only_pad_the_head_are_never_sampled():
    model = family("Llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.net.lm_head.weight[80:] = 50 * model.net.lm_head.weight[:5]
    assert all(ids_T.max() < 80 for ids_T, _ in sampler.sample(model, prompts_of(*[5] * 40), 1.0, 1.0, 4, 8))


def test_the_same_seed_gives_the_same_completions():
    model, prompts = family("Qwen3", head_dim=8), prompts_of(3, 4, 5, 6)
    seeds, drawn = (1, 1, 2), []
    for seed in seeds:
        torch.manual_seed(seed)
        drawn.append([ids_T.tolist() for ids_T, _ in sampler.sample(model, prompts, 1.0, 1.0, 8, 2)])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", WINDOWS)
def test_other_families_go_on_with_transformers_and_the_run_says_so(name, tmp_path, argv, capsys):
    """A window is seen in the config; what is not, shows when a few samples are tried."""
    model = family(name, **WINDOWS[name])
    assert sampler.obstacle(model)
    tiny(tmp_path / "m", model.net, small_world.tokenizer(), scale=1)
    run = opd.Run(opd.configure(argv(student=tmp_path / "m", teachers=[tmp_path / "m"], max_new_tokens=12)))
    assert not run.student.served and "is sampled by transformers' generate" in capsys.readouterr().out
    opd.train(run)                                               # with its check of the sampler


def test_an_adapter_is_sampled_with_and_without(tmp_path):
    peft = pytest.importorskip("peft", reason="optional: pip install peft")
    model, prompts = family("Qwen3", head_dim=8), prompts_of(3, 12)
    greedy = lambda m: [ids_T.tolist() for ids_T, _ in sampler.sample(m, prompts, 0, 1.0, 8, 2)]
    before = greedy(model)
    model.adapter = peft.get_peft_model(model.net, peft.LoraConfig(r=4, target_modules="all-linear",
                                                                   init_lora_weights=False))
    assert greedy(model) != before and greedy(models.twin(model, without_adapter=True)) == before
    assert sampler.obstacle(model) is None


def test_how_many_rows_fit_is_decided_once(start, monkeypatch):
    """The default depends on the machine and the student; a resumed run keeps the number it began with."""
    model = family("Llama")
    most = [sampler.default_rows(model, positions, "cpu") for positions in (10, 10**5, 10**9)]
    assert most[0] == sampler.MOST_ROWS > most[1] > most[2] == 1
    run = start(steps=1)
    opd.train(run)
    assert run.cfg.sample_batch == sampler.MOST_ROWS
    if not torch.cuda.is_available():
        assert sampler.default_rows(model, 10**5, "cuda") > most[1]             # of an assumed GPU
    monkeypatch.setattr(sampler, "CPU_CACHE", 1)
    assert start(steps=1, out=run.out, resume=True).cfg.sample_batch == sampler.MOST_ROWS
    assert start(steps=1).cfg.sample_batch == 1


def test_the_rows_are_freed_when_sampling_ends(monkeypatch):
    made, init = [], sampler.Slots.__init__
    monkeypatch.setattr(sampler.Slots, "__init__",
                        lambda slots, *args: (made.append(weakref.ref(slots)), init(slots, *args))[1])
    sampler.sample(family("Llama"), prompts_of(3), 1.0, 1.0, 2, 1)
    gc.collect()
    assert len(made) == 1 and made[0]() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_recorded_on_cuda_samples_what_is_trained(dtype, top_p):
    """Replayed steps, several recorded lengths, refilled and shrunk rows."""
    model = family("Qwen3", head_dim=8, max_position_embeddings=2048)
    model.net.cuda()
    model.device, model.dtype = torch.device("cuda"), dtype
    prompts = prompts_of(3, 300, 17, 40, 2, 500)
    assert sampler.obstacle(model) is None
    with torch.no_grad():
        theirs = sampler.generate(model, prompts, 0, 1.0, 70, 6)
        ours = sampler.decode(model, prompts, 0, 1.0, 70, 4)
    if dtype == torch.float32:
        for (a_T, _), (b_T, _) in zip(theirs, ours):
            assert (a_T[:8] == b_T[:8]).all()                    # rounding may part them later
    out = sampler.sample(model, prompts, 1.0, top_p, 70, 4)
    if top_p == 1:
        lps = model.log_probs(prompts, [ids_T for ids_T, _ in out], 4096)
        off = max((lp_T - logp_T).abs().mean() for lp_T, (_, logp_T) in zip(lps, out))
        assert off < (1e-3 if dtype == torch.float32 else 0.2)
    torch.manual_seed(0)
    again = [sampler.sample(model, prompts, 1.0, top_p, 20, 4) for _ in range(2)]
    assert any(not torch.equal(a_T, b_T) for (a_T, _), (b_T, _) in zip(*again))     # new noise every time
