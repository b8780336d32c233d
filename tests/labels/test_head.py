"""Head and OutputLayer: what they take for an output layer, and what they say of anything else."""

import numpy
import pytest
import torch
from torch import nn

from kdfast import Head, OutputLayer, kd_loss

D, VOCAB = 6, 11
HIDDEN, TEACHER = torch.randn(4, D), torch.randn(4, VOCAB)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_stands_for_its_weight_and_bias(bias):
    layer = nn.Linear(D, VOCAB, bias=bias)
    head = Head(HIDDEN, layer)
    assert head.weight is layer.weight
    assert head.bias is layer.bias
    assert OutputLayer(layer).weight is layer.weight
    assert head.shape == (4, VOCAB)
    loss, want = kd_loss(head, TEACHER), kd_loss(layer(HIDDEN), TEACHER)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, list(layer.parameters()))
    torch.testing.assert_close(got, torch.autograd.grad(want, list(layer.parameters())))


def test_a_parametrised_layer_trains_what_its_weight_is_made_of():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(D, VOCAB))
    loss, want = kd_loss(Head(HIDDEN, layer), TEACHER), kd_loss(layer(HIDDEN), TEACHER)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, list(layer.parameters()))
    torch.testing.assert_close(got, torch.autograd.grad(want, list(layer.parameters())))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(D, VOCAB)
        self.weight = self.base_layer.weight


def hooked(kind):
    layer = nn.Linear(D, VOCAB)
    getattr(layer, f"register_forward{kind}hook")(lambda *_: None)
    return layer


def replaced():
    layer = nn.Linear(D, VOCAB)
    layer.forward = lambda x: x
    return layer


def quantised():
    layer = nn.Linear(D, VOCAB)
    layer.weight = nn.Parameter(torch.zeros(VOCAB, D, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Adapted(), "the output layer is adapted"),
        (Scaled(D, VOCAB), "Scaled with a forward of its own"),
        (replaced(), "Linear with a forward of its own"),
        (hooked("_"), r"has forward hooks \(<lambda>\).*Head.of\(model"),
        (hooked("_pre_"), r"has forward hooks \(<lambda>\)"),
        (quantised(), "weight is quantised .* of torch.int8"),
        (nn.Embedding(VOCAB, D), "is a torch.nn.modules.sparse.Embedding, not an nn.Linear.*weight"),
        (nn.Sequential(nn.Linear(D, VOCAB)), "Sequential, not an nn.Linear"),
        (None, "weight must be a .* tensor or the nn.Linear .* got NoneType"),
        ([[1.0]], "weight must be a .* got list"),
    ],
)
def test_what_is_no_output_layer_is_named(layer, message):
    for make in (lambda: Head(HIDDEN, layer), lambda: OutputLayer(layer)):
        with pytest.raises(TypeError, match=message):
            make()


WEIGHT = torch.randn(VOCAB, D)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Head(HIDDEN.tolist(), WEIGHT), "hidden must be a tensor of hidden states, got list"),
        (lambda: Head(None, WEIGHT), "hidden must be a tensor of hidden states, got NoneType"),
        (lambda: Head(HIDDEN.long(), WEIGHT), "hidden must be float32, .* got torch.int64"),
        (lambda: Head(HIDDEN.to(torch.float8_e4m3fn), WEIGHT), "hidden must be float32, .* got torch.float8_e4m3fn"),
        (lambda: Head(HIDDEN, WEIGHT.to(torch.float8_e4m3fn)), "weight must be float32, .* got torch.float8_e4m3fn"),
        (lambda: Head(HIDDEN.to_sparse(), WEIGHT), "hidden is a torch.sparse_coo tensor"),
        (
            lambda: Head(torch.nested.nested_tensor([HIDDEN, HIDDEN[:2]], layout=torch.jagged), WEIGHT),
            "hidden is a nested tensor: pass its values",
        ),
        (lambda: Head(HIDDEN, WEIGHT, 3), "bias must be a .* tensor or None, got int"),
        (lambda: Head(HIDDEN, nn.Linear(D, VOCAB), torch.zeros(VOCAB)), "a Linear brings its own bias"),
    ],
)
def test_other_tensors_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_numbers_of_a_head_are_numbers():
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    for two in (2, torch.tensor(2.0), torch.tensor([2.0]), numpy.float32(2)):
        head = Head(hidden, weight, scale=two, softcap=two)
        assert (head.scale, head.softcap) == (2.0, 2.0)
        assert OutputLayer(weight, scale=two).fingerprint
    for name in ("scale", "softcap"):
        for wrong in ("2", [2.0], torch.ones(3), True, 2j):
            with pytest.raises(TypeError, match=f"{name} must be a number"):
                Head(hidden, weight, **{name: wrong})
        # A learned one, as CLIP's, would get no gradient.
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            Head(hidden, weight, **{name: torch.tensor(2.0, requires_grad=True)})
        with torch.no_grad():
            assert getattr(Head(hidden, weight, **{name: torch.tensor(2.0, requires_grad=True)}), name) == 2.0
    with pytest.raises(TypeError, match="weight_grad must be a tensor or None, got str"):
        Head(hidden, weight, weight_grad="sum")


def test_a_head_on_the_meta_device_names_what_does_not_agree():
    """Autocast, which would make the dtypes agree, does not know that device."""
    with pytest.raises(TypeError, match="must agree"):
        Head(torch.empty(2, 3, device="meta"), torch.empty(5, 3, device="meta", dtype=torch.bfloat16))
