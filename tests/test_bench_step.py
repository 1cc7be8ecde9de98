"""The benchmark of a step: it measures what it says, on the same work for all."""
import json

import pytest

import sampler
from data import scratch
from lab import bench_step

TINY = (dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16), None, 120, 4, 6, 5)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_step.CASES, "tiny", TINY)
    monkeypatch.setattr(sampler, "obstacle", sampler.obstacle)          # our_steps may replace it
    for seed, name in enumerate(("student", "teacher")):
        scratch.write_sized(tmp_path / name, TINY[0], TINY[2], seed)
    (tmp_path / "prompts.jsonl").write_text("\n".join([json.dumps({"prompt": "a bc d"})] * 4))
    return tmp_path


@pytest.mark.parametrize("by_generate", [False, True])
def test_our_step_is_timed_in_its_parts_with_either_sampler(tiny, monkeypatch, by_generate):
    used = []

    def noted(name, call):
        return lambda *args, **options: (used.append(name), call(*args, **options))[1]
    for name in ("decode", "generate"):
        monkeypatch.setattr(sampler, name, noted(name, getattr(sampler, name)))
    monkeypatch.setattr("sys.argv", [])                                 # our_steps sets it
    steps = bench_step.our_steps(tiny, "tiny", 3, "cpu", by_generate)
    assert len(steps) == 3 and all(step.keys() == set(bench_step.PARTS) for step in steps)
    assert used[-1] == ("generate" if by_generate else "decode") and not (tiny / "ours").exists()


def test_ratios_are_within_rounds_without_the_warm_up(capsys):
    """A machine that is twice as slow in the second round changes no ratio."""
    def result(*steps):
        slow = dict(sample=9.0, score=9.0, update=9.0)
        return {"seconds": [slow, slow, *steps], "memory": 2.0}
    step = lambda sample, rest: dict(sample=sample, score=rest / 2, update=rest / 2)
    found = {"ours": [result(step(1, 2)), result(step(2, 4))],
             "generate": [result(step(3, 2)), result(step(6, 4))], "trl": []}
    whole, parts = bench_step.tables(found, dict(sample=0.15, score=0.75, update=1.0))
    assert whole[1] == ["ours", "4.500", "1.00", "1.500", "1.00", "2.00"]
    assert whole[2] == ["generate", "7.500", "1.67", "4.500", "3.00", "2.00"]
    assert whole[3] == ["trl", *["not run"] * 5]
    assert [row[-1] for row in parts[1:]] == ["10", "50", "67"]


def test_the_floor_counts_the_products_of_a_token(tmp_path):
    """Against the parameters of the model that is written: all but norms, a tied head once."""
    from transformers import AutoModelForCausalLM
    scratch.write_sized(tmp_path / "m", TINY[0], TINY[2], 0)
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert bench_step.parameters(TINY[0], TINY[2]) == sum(p.numel() for p in net.parameters() if p.ndim == 2)


def test_what_cannot_run_is_a_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="^lab.bench_step: argument --steps: 2 is not at least 3$"):
        bench_step.main(["--steps", "2"])
    monkeypatch.setattr(bench_step, "run", lambda *args: {name: [] for name in bench_step.CONTESTANTS})
    monkeypatch.setattr(bench_step, "floors", lambda *args: {})
    with pytest.raises(SystemExit, match="our own step did not run"):
        bench_step.main(["--out", str(tmp_path)])
