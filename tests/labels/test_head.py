"""Head and OutputLayer: what they take for an output layer, and what they say of anything else."""

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
