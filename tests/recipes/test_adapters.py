"""LoRA: what trains, what stays, and that merging changes nothing."""

import copy

import pytest
import torch
from torch import nn

from kdfast.recipes import LoRALinear, add_lora, merge_lora


def network():
    return nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)), "head": nn.Linear(8, 3, bias=False)}
    ).double()


def run(model, x):
    return model["head"](model["body"](x))


def trained(model, x):
    """``model`` after some steps towards other outputs."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (run(model, x) - 1).square().mean().backward()
        optimizer.step()
    return model


def test_an_adapter_adds_the_scaled_low_rank_product():
    base = nn.Linear(6, 4).double()
    layer = LoRALinear(copy.deepcopy(base), rank=2, alpha=3.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.up)
    torch.testing.assert_close(layer(x), base(x) + 1.5 * x @ layer.down.T @ layer.up.T)


def test_only_adapters_train_and_merging_preserves_the_function():
    model, x = network(), torch.randn(7, 6, dtype=torch.float64)
    before, weights = run(model, x), {name: p.detach().clone() for name, p in model.named_parameters()}
    assert add_lora(model, ["body.*"], rank=2, alpha=4.0) == ["body.0", "body.2"]
    assert torch.equal(run(model, x), before)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"body.{i}.{part}" for i in (0, 2) for part in ("up", "down")}
    trained(model, x)
    assert all(
        torch.equal(p, weights[name.replace("base.", "")]) for name, p in model.named_parameters() if name not in names
    )
    after = run(model, x)
    assert (after - before).abs().max() > 1e-3
    merge_lora(model)
    torch.testing.assert_close(run(model, x), after, rtol=1e-13, atol=1e-13)
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in weights.items()}
    assert all(p.requires_grad for p in model.parameters())
    change = model["body"][0].weight - weights["body.0.weight"]
    assert torch.linalg.matrix_rank(change).item() == 2


def test_a_layer_in_two_places_has_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    add_lora(model, "2", rank=1)
    assert isinstance(model[2], LoRALinear)
    assert model[0] is shared
    model = nn.Sequential(shared, nn.ReLU(), shared)
    add_lora(model, rank=1)
    assert model[0] is model[2]
    merge_lora(model)
    assert model[0] is model[2]


def test_modules_that_look_into_their_layers_see_the_adapted_weight():
    """In evaluation an encoder layer of PyTorch does not call its layers: it takes their weights."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, dtype=torch.float64)
    assert add_lora(layer, rank=2) == ["linear1", "linear2"]
    nn.init.normal_(layer.linear1.up), nn.init.normal_(layer.linear2.up)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    slow = layer.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), slow)


def test_bad_input_is_named_and_leaves_the_model_alone():
    model = network()
    with pytest.raises(ValueError, match=r"no nn.Linear within the model fits 'tail'; there are body.0, body.2, head"):
        add_lora(model, ["head", "tail"])
    with pytest.raises(ValueError, match=r"rank must lie in 1 ... 3 for Linear\(in_features=8, out_features=3"):
        add_lora(model, rank=4)
    with pytest.raises(ValueError, match="there are none"):
        add_lora(nn.Linear(3, 3))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    with pytest.raises(ValueError, match="ModuleDict has no LoRALinear"):
        merge_lora(model)
