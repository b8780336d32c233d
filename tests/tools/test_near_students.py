"""The frontier's near students: what is cut, rounded, adapted and trained is what their descriptions say."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import kdfast

FOLDER = Path(__file__).parents[2] / "benchmarks/frontier"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def near():
    sys.path.insert(0, str(FOLDER))
    import near_student

    yield near_student
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def report(near):
    import near_report

    return near_report


@pytest.fixture
def make(near):
    def make(kind="llama", **options):
        torch.manual_seed(0)
        model = (
            LlamaForCausalLM(LlamaConfig(**SIZES))
            if kind == "llama"
            else Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=4, sliding_window_pattern=2))
        ).eval()
        for parameter in model.parameters():  # norms too
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model, near.NearStudent(model, replace(sys.modules["distances"].Distance(""), **options))

    return make


def logits(student):
    """In float32 throughout."""
    with torch.no_grad():
        hidden = student.upper(inputs_embeds=student.inputs(IDS), use_cache=False).last_hidden_state
    return hidden @ student.weight.T


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_student_of_all_layers_is_its_teacher(make, kind):
    model, student = make(kind)
    assert torch.equal(logits(student), model(IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_cut_leaves_these_layers_out_and_those_below_it_alone(make, kind):
    model, student = make(kind, cut=(2, 3))
    layers = model.model.layers
    found, skipped = logits(student), []
    layers[2].register_forward_pre_hook(lambda module, args: skipped.append(args[0]))
    layers[4].register_forward_pre_hook(lambda module, args: (skipped[0], *args[1:]))
    torch.testing.assert_close(found, model(IDS).logits)
    assert {id(p) for p in student.trained} == {
        id(p) for part in (layers[4], model.model.norm) for p in part.parameters()
    }
    assert all(p.requires_grad for p in student.trained)
    assert not any(p.requires_grad for p in (*layers[:2].parameters(), model.lm_head.weight))


def test_weights_are_rounded_to_multiples_of_their_groups_scale(near):
    weight = torch.linspace(-7, 7, 64).view(1, 64)
    weight[0, 32:] *= 3
    low = near.rounded(weight, 4)
    assert torch.equal(low[0, :32], weight[0, :32].round())  # the largest of the group is 7: a scale of 1
    assert torch.equal(low[0, 32:] / 3, (weight[0, 32:] / 3).round())
    assert (near.rounded(weight, 8) - weight).abs().max() <= 21 / 127 / 2 + 1e-6
    assert torch.equal(near.rounded(torch.zeros(2, 32), 4), torch.zeros(2, 32))


def test_rounded_weights_are_trained_straight_through(make, near):
    model, student = make(bits=4)
    layer = model.model.layers[0].self_attn.q_proj.weight
    exact = next(w for w, r in zip(student.exact, student.rounded, strict=True) if r is layer)
    assert torch.equal(layer, near.rounded(exact, 4))
    assert not torch.equal(layer, exact)
    assert any(p is exact for p in student.trained)
    assert not any(p is layer for p in student.trained)
    before = exact.clone()
    kdfast.kd_loss(student.head(student.inputs(IDS)), torch.randn(24, 40)).backward()
    gradient = layer.grad.clone()
    student.before_step()
    torch.optim.SGD(student.trained, lr=1.0).step()
    student.after_step()
    torch.testing.assert_close(exact, before - gradient)
    assert torch.equal(layer, near.rounded(exact, 4))
    assert layer.grad is None


def test_adapters_begin_at_the_rounded_weights_and_alone_are_trained(make):
    _, plain = make(bits=4)
    model, student = make(bits=4, rank=2)
    assert torch.equal(logits(student), logits(plain))
    assert {tuple(p.shape)[:1] for p in student.trained[::2]} == {(2,)}
    assert len(student.trained) == 2 * 7 * 5
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in student.trained}


def row(arm, seed, kl, **more):
    return {"arm": arm, "seed": seed, "kl": kl, "ce": 1.0, "setting": "", **more}


def test_the_share_lost_is_paired_by_seed_and_judged_by_its_interval(report):
    rows = [row("start", 0, 1.0), *(row("dense", seed, 0.4 + 0.1 * seed) for seed in range(3))]
    rows += [row("sample-5", seed, 0.405 + 0.1 * seed, bytes_per_token=3.9) for seed in range(3)]
    rows += [row("sample-10", seed, 0.4 + 0.102 * seed, bytes_per_token=7.0) for seed in range(3)]
    rows += [row("topk-16", 0, 0.55, bytes_per_token=68.0)]
    results, start = report.summarise(rows)
    by_arm = {result.arm: result for result in results}
    assert start == 1.0
    assert [by_arm[arm].lost for arm in ("sample-5", "sample-10", "topk-16")] == pytest.approx([0.01, 0.004, 0.3])
    # Differences of 0, .004 and .008 of a gain of .5: a standard error of .004 / sqrt(3), and t = 4.303.
    assert by_arm["sample-10"].interval == pytest.approx(4.303 * 0.004 / 3**0.5)
    assert by_arm["sample-5"].interval == pytest.approx(0.0, abs=1e-9)
    assert by_arm["topk-16"].interval is None
    assert by_arm["topk-16"].within is None
    assert by_arm["sample-10"].within is False
    assert replace(by_arm["sample-5"], lost=0.0099).within is True


def test_earlier_tries_with_another_setting_are_no_pairs(report):
    rows = [row("dense", 0, 1.0) | {"setting": "old"}, row("dense", 0, 2.0), row("start", 0, 3.0)]
    assert [r["kl"] for r in report._current(rows)] == [2.0, 3.0]


def test_a_run_that_is_cut_short_has_the_most_telling_students(report):
    distances = sys.modules["distances"]
    planned = list(distances.plan([*distances.DECIDING, *distances.OTHERS]))
    assert len(set(planned)) == len(planned)
    assert planned[:2] == [("cut-3", "start", 0), ("cut-3", "dense", 0)]
    assert ("cut-3", "none", 1) not in planned
    first = {name: planned.index((name, "dense", 0)) for name in distances.DISTANCES}
    assert planned.index(("cut-1", "topk-16-tail", 4)) < first["rounded-4"] < first["gemma-cut-1"]
    assert first["gemma-cut-1"] < planned.index(("rounded-4", "dense", 1)) < first["cut-3-long"]
    assert first["cut-3-long"] == max(first.values())
