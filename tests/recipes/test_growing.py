"""Growth keeps the function, to rounding, and what has grown trains further."""

import pytest
import torch
from torch import nn

from kdfast.recipes import Growing, deepen, widen
from support.recipes import batches, blobs, mlp


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 5),
    ).double()


def trained_statistics(model, x):
    """Batch norms with something to remember."""
    for _ in range(3):
        model(x * 2 + 1)
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("layer", "width"), [(0, 11), (4, 7), (7, 6), (7, 20)])
def test_widening_keeps_the_function(layer, width, train):
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    model = trained_statistics(convolutional(), x).train(train)
    wide = widen(model, layer, width, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(wide(x), model(x), rtol=1e-12, atol=1e-13)
    assert wide[layer].weight.shape[0] == width
    assert model[layer].weight.shape[0] < width or width == 6
    assert wide.training is train


@pytest.mark.parametrize("layer", [0, 7])
def test_deepening_keeps_the_function(layer):
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    model = trained_statistics(convolutional(), x).eval()
    deep = deepen(model, layer)
    assert len(deep) == len(model) + 2
    assert torch.allclose(deep(x), model(x), rtol=1e-12, atol=1e-13)


def test_units_of_every_position_are_widened():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3)).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.allclose(widen(model, 0, 9)(x), model(x), rtol=1e-12, atol=1e-13)


def test_a_layer_in_two_places_is_not_widened_and_stays_one_when_deepened():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 3))
    for layer in (0, 2):
        with pytest.raises(ValueError, match="a Linear, is in two places: widening would change both"):
            widen(model, layer, 6)
    deep = deepen(model, 0)
    assert deep[0] is deep[4]
    assert deep[0] is not shared


@pytest.mark.parametrize("train", [False, True])
def test_deepening_leaves_each_part_in_its_mode(train):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).train(train)
    model[1].train(not train)
    assert [module.training for module in deepen(model, 0)] == [train, not train, train, train, train, train]
    assert deepen(model, 0).training is train


def test_growth_upon_growth_leaves_the_small_one_alone():
    model, x = mlp().double(), torch.randn(9, 4, dtype=torch.float64)
    before = model(x)
    large = deepen(widen(model, 0, 32), 0)
    large = widen(large, 2, 40)
    assert torch.allclose(large(x), before, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        large[0].weight.zero_()
    assert torch.equal(model(x), before)


def test_copies_part_at_the_first_step():
    model = widen(mlp().double(), 0, 16)
    x, labels = blobs()
    copies = [(i, j) for i in range(16) for j in range(i) if torch.equal(model[0].weight[i], model[0].weight[j])]
    assert len(copies) >= 8
    nn.functional.cross_entropy(model(x.double()), labels).backward()
    gradients = model[0].weight.grad
    active = [(i, j) for i, j in copies if gradients[i].abs().sum() > 0]
    assert active
    assert all(not torch.allclose(gradients[i], gradients[j], rtol=1e-3) for i, j in active)


@pytest.mark.parametrize(
    ("layer", "width", "message"),
    [
        (1, 9, r"one of the weight layers \[0, 2\], got 1"),
        (0, 7, "8 outputs: widening to 7 would lose some"),
        (2, 9, "layer 2 is the last: its outputs are the classes"),
    ],
)
def test_what_cannot_be_widened(layer, width, message):
    with pytest.raises(ValueError, match=message):
        widen(mlp(), layer, width)


def test_what_mixes_units_is_refused():
    with pytest.raises(ValueError, match="module 1, a LayerNorm, may mix units"):
        widen(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), 0, 16)
    with pytest.raises(ValueError, match="module 1, a MaxPool2d, may mix units"):
        widen(nn.Sequential(nn.Linear(4, 8), nn.MaxPool2d(2), nn.Linear(4, 3)), 0, 16)
    with pytest.raises(ValueError, match="module 1 normalises 5 features, not layer 0's 8 units"):
        widen(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(8, 3)), 0, 16)
    with pytest.raises(ValueError, match="grouped convolution"):
        widen(nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)), 0, 16)
    with pytest.raises(ValueError, match="has no ReLU right after it"):
        deepen(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), 0)
    with pytest.raises(ValueError, match=r"needs an nn\.Sequential, got Linear"):
        deepen(nn.Linear(4, 8), 0)


def test_a_student_that_grows_keeps_what_it_has_learned_and_trains_further():
    torch.manual_seed(1)
    data = batches(*blobs(samples=96))
    growing = Growing(mlp(hidden=3), mlp(), grow=lambda model: deepen(widen(model, 0, 12), 0), ce_weight=1.0, lr=0.01)
    before, after = growing.fit(data, epochs=8, at=0.5, eval_loader=data, progress=False)
    assert [len(before), len(after)] == [4, 4]
    assert len(growing.student) == 5
    losses = [record["loss"] for record in (*before, *after)]
    assert losses == sorted(losses, reverse=True)


def test_growth_is_not_judged_by_the_rounding_of_autocast():
    torch.manual_seed(0)
    data = batches(torch.randn(32, 16), torch.randint(3, (32,)))
    small = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    growing = Growing(small, nn.Linear(16, 3), grow=lambda model: deepen(widen(model, 0, 64), 0), amp=torch.bfloat16)
    assert [len(history) for history in growing.fit(data, epochs=2, progress=False)] == [1, 1]


def test_a_fresh_large_student_is_refused():
    data = batches(*blobs())
    growing = Growing(mlp(hidden=3), mlp(), grow=lambda model: mlp(hidden=12))
    with pytest.raises(ValueError, match="growth changed what the student has learned"):
        growing.fit(data, epochs=2, progress=False)
    with pytest.raises(ValueError, match="both phases need an epoch, got 0 and 1 of 1"):
        growing.fit(data, epochs=1, progress=False)
