"""Fake quantisation: the formats' numbers, straight-through gradients, and models that round, save and bake."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kdfast import Head, kd_loss
from kdfast.cache import fingerprint
from kdfast.recipes import FakeQuantizedLinear, add_lora, bake, fake_quantize, merge_lora
from support.language_models import VOCAB, make, token_ids

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
FORMATS = {"int8": 8, "int4": 8, "mxfp4": 32}  # with group sizes


def layer(weight, format, group_size=None):
    """A fake-quantised linear layer of this weight."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype))
    model[0].weight = nn.Parameter(weight.clone())
    fake_quantize(model, format, group_size=group_size)
    return model[0]


def rounded(weight, format, group_size=None):
    return layer(weight, format, group_size).rounded_weight.detach()


def block(*values):
    """A row of one block of 32 numbers, zeros after ``values``."""
    return torch.tensor([[*values, *[0.0] * (32 - len(values))]])


def oracle(weight, format, group_size):
    """The nearest number of the format, ties to even, by a search through all of them in float64."""
    groups = weight.double().unflatten(1, (-1, group_size))
    amax = groups.abs().amax(2, keepdim=True)
    if format == "mxfp4":
        scale = (amax.log2().floor() - 2).exp2()
        numbers = torch.cat([-E2M1.flip(0), E2M1])
        even = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0])
        even = torch.cat([even.flip(0), even])
    else:
        bits = int(format[3:])
        scale = amax / ((2**bits - 1) / 2)
        numbers = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
        even = 1 - numbers.long() % 2
    distance = (groups[..., None] / scale[..., None] - numbers).abs()
    ties = distance - distance.amin(-1, keepdim=True) < 1e-6  # float32's quotient may fall on a tie that is near
    best = (ties.double() * (1 + even)).argmax(-1)
    return (numbers[best] * scale).flatten(1).float()


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_the_nearest_numbers_of_the_format(format):
    torch.manual_seed(0)
    weight, size = torch.randn(40, 96) * torch.randn(40, 1).exp(), FORMATS[format]
    got, want = rounded(weight, format, size), oracle(weight, format, size)
    groups = weight.abs().unflatten(1, (-1, size))
    inner = (groups < groups.amax(2, keepdim=True)).flatten(1)
    torch.testing.assert_close(got[inner], want[inner], rtol=3e-7, atol=0)
    # Integers put amax halfway between two numbers: either is as near.
    torch.testing.assert_close((got - weight).abs(), (want - weight).abs(), rtol=1e-3, atol=1e-5)


def test_integers_are_those_of_torchao():
    """``IntxFakeQuantizer`` of torchao 0.18: scale = amax / 7.5 or amax / 127.5, ends -8 ... 7 or -128 ... 127."""
    weight = torch.tensor([[3.0, -1.4, 0.6, -0.7, 0.2, 0.0, 2.9, -2.9], [-3.0, 1.0, 0.5, 0.45, -0.25, 2.9, 2.7, -0.1]])
    steps = torch.tensor([[7, -4, 2, -2, 0, 0, 7, -7], [-8, 2, 1, 1, -1, 7, 7, 0]])
    assert torch.equal(rounded(weight, "int4", 8), steps * torch.tensor(3 / 7.5))
    steps = torch.tensor([[127, -60, 26, -30, 8, 0, 123, -123], [-128, 42, 21, 19, -11, 123, 115, -4]])
    assert torch.equal(rounded(weight, "int8"), steps * torch.tensor(3 / 127.5))


def test_mxfp4_rounds_ties_to_even_and_saturates():
    # The scale of a block with amax in [4, 8) is 1.
    weight = block(0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, -7.9, -0.26, -5.01, 0.24)
    want = block(0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -6.0, -0.5, -6.0, 0.0)
    assert torch.equal(rounded(weight, "mxfp4"), want)


@pytest.mark.parametrize("power", [-126, -125, -60, 0, 60, 125])
def test_mxfp4_scales_by_powers_of_two_to_the_ends(power):
    """amax at both edges of a power of two: 4 and just below 8 times the scale."""
    scale = 2.0**power
    for amax, top in ((4.0, 4.0), (torch.tensor(8.0).nextafter(torch.tensor(0.0)).item(), 6.0)):
        weight = block(amax, 1.3, -0.5, -2.9).double() * scale
        want = block(top, 1.5, -0.5, -3.0).double() * scale
        assert torch.equal(rounded(weight.float(), "mxfp4"), want.float())


def test_mxfp4_of_the_smallest_numbers():
    """The least scale that E8M0 has is 2^-127, which float32 has as a subnormal number."""
    least = 2.0**-127
    weight = (block(6.0, 3.9, 0.3, -1.2, 0.2).double() * least).float()
    assert torch.equal(rounded(weight, "mxfp4").double(), block(6.0, 4.0, 0.5, -1.0, 0.0).double() * least)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_and_blocks_do_not_touch_each_other(format):
    size = FORMATS[format]
    weight = torch.zeros(2, 4 * size)
    weight[0, size : 2 * size] = torch.linspace(-1, 1, size)
    weight[1, 0], weight[1, size] = 1e30, 1e-30
    result = rounded(weight, format, size)
    assert torch.equal(result == 0, weight == 0) or format == "mxfp4"
    assert torch.equal(result[0, :size], torch.zeros(size))
    assert (result[1, size] / 1e-30 - 1).abs() < 0.3
    assert result.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_is_not_hidden(format, bad):
    size = FORMATS[format]
    weight = torch.ones(1, 2 * size)
    weight[0, 3] = bad
    result = rounded(weight, format, size)
    assert result[0, :size].isnan().all()
    assert result[0, size:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
def test_other_dtypes_are_rounded_in_float32(format, dtype):
    torch.manual_seed(1)
    weight = torch.randn(8, 64).to(dtype)
    result = rounded(weight, format, FORMATS[format])
    assert result.dtype == dtype
    assert torch.equal(result, rounded(weight.float(), format, FORMATS[format]).to(dtype))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_pass_straight_through(format):
    torch.manual_seed(2)
    weight, x, out = torch.randn(5, 64), torch.randn(7, 64), torch.randn(7, 5)
    linear = layer(weight, format, FORMATS[format])
    assert torch.equal(linear(x), x @ rounded(weight, format, FORMATS[format]).T)
    x.requires_grad_()
    linear(x).backward(out)
    torch.testing.assert_close(linear.weight.grad, out.T @ x.detach())
    torch.testing.assert_close(x.grad, out @ rounded(weight, format, FORMATS[format]))


def test_training_moves_the_weights_behind():
    torch.manual_seed(3)
    linear = layer(torch.randn(4, 32), "mxfp4")
    x, y = torch.randn(64, 32), torch.randn(64, 4)
    optimizer = torch.optim.SGD(linear.parameters(), 0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (linear(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert not torch.equal(linear.rounded_weight, linear.weight)


# Dynamo's own, of any autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_as_one_graph():
    linear, x = layer(torch.randn(4, 32), "mxfp4"), torch.randn(3, 32)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    got = linear.weight.grad.clone()
    assert torch.equal(compiled(x), linear(x))
    assert torch.equal(got, x.sum(0).expand(4, 32))


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tied():
    """A language model whose output layer has the embedding's weight, and ids for it."""
    torch.manual_seed(4)
    return make("tied"), token_ids()


def logits(model, ids):
    return model(ids).logits


def test_a_language_model_rounds_all_but_embedding_and_output_layer(tied):
    model, ids = tied
    before, plain = logits(model, ids), copy.deepcopy(model.state_dict())
    names = fake_quantize(model, "int8")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(names) == linear - {"lm_head"}
    assert 0 < (logits(model, ids) - before).abs().max() < 0.1
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    assert "format='int8', group_size=16" in repr(model)


def test_without_tying_the_output_layer_stays_too():
    model = make("llama")
    assert "lm_head" not in fake_quantize(model, "int8")
    assert type(model.lm_head) is nn.Linear


def test_tied_weights_are_rounded_in_all_places_or_none(tied):
    model, ids = tied
    for one, other in (("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")):
        with pytest.raises(ValueError, match=rf"{one} shares its weight with {other}.*name both"):
            fake_quantize(model, "int4", group_size=8, modules=one)
        assert type(model.lm_head) is nn.Linear
    assert fake_quantize(model, "int4", group_size=8, modules=["lm_head", "*.embed_tokens"]) == [
        "model.embed_tokens",
        "lm_head",
    ]
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens(ids), rounded(weight.detach(), "int4", 8)[ids])
    head = Head.of(model, input_ids=ids)
    assert torch.equal(head.weight, rounded(weight.detach(), "int4", 8))
    assert torch.equal(Head(head.hidden.detach(), model.lm_head).weight, head.weight)
    torch.testing.assert_close(head.hidden @ head.weight.T, logits(model, ids))
    teacher = torch.randn(*ids.shape, VOCAB)
    kd_loss(head, teacher).backward()
    got = weight.grad.clone()
    weight.grad = None
    kd_loss(logits(model, ids), teacher).backward()
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-6)
    after = logits(model, ids)
    bake(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, ids), after)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_baked_models_compute_the_same(tied, format):
    model, ids = tied
    names = fake_quantize(model, format, group_size=8)
    after = logits(model, ids)
    assert bake(model) == names
    assert torch.equal(logits(model, ids), after)
    assert not any(isinstance(module, FakeQuantizedLinear) for module in model.modules())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert "format" not in repr(model)


def test_unrounded_weights_stay_on_request(tied):
    model, ids = tied
    before = logits(model, ids)
    fake_quantize(model, "int4", group_size=8)
    bake(model, rounded=False)
    assert torch.equal(logits(model, ids), before)


def test_what_it_saves_loads_into_plain_and_rounding_models(tied, tmp_path):
    model, ids = tied
    fake_quantize(model, "int4", group_size=8)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    fake_quantize(loaded, "int4", group_size=8)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


class Reader(nn.Module):
    """Multiplies by a layer's weight itself, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.outer(x.to(self.outer.weight.dtype) @ self.inner.weight)


def test_layers_whose_weight_another_reads_are_left_out_or_refused():
    model = nn.Sequential(Reader())
    assert fake_quantize(model, "int8") == ["0.outer"]
    with pytest.raises(
        ValueError, match=r"Reader reads the weight of 0\.inner itself, past the layer and its rounding"
    ):
        fake_quantize(model, "int8", modules="*.inner")
    assert type(model[0].inner) is nn.Linear


def test_copies_and_pickles_round(tied):
    model, ids = tied
    fake_quantize(model, "int4", group_size=8)
    want = logits(model, ids)
    assert torch.equal(logits(copy.deepcopy(model), ids), want)
    linear = model.model.layers[0].mlp.up_proj
    assert torch.equal(pickle.loads(pickle.dumps(linear)).rounded_weight, linear.rounded_weight)


def test_calls_give_layers_formats_of_their_own(tied):
    model, _ = tied
    fake_quantize(model, "int4", group_size=8, modules="*.mlp.*")
    rest = fake_quantize(model, "int8")
    assert len(rest) == 4
    assert all("self_attn" in name for name in rest)
    block = model.model.layers[0]
    assert (block.mlp.up_proj.format, block.self_attn.q_proj.format) == ("int4", "int8")


def test_a_layer_in_two_places_and_its_hooks_stay():
    linear = nn.Linear(8, 8)
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(linear, linear)
    assert fake_quantize(model, "int8") == ["0", "1"]
    assert model[0] is model[1] is linear
    model(torch.randn(2, 8))
    assert bake(model) == ["0", "1"]
    assert len(seen) == 2
    assert type(linear) is nn.Linear


def test_adapters_over_rounded_weights_merge(tied):
    """A LoRA whose frozen base is rounded: its merged weight is the rounded one and the update."""
    model, ids = tied
    add_lora(model, "*.mlp.up_proj", rank=2)
    fake_quantize(model, "int4", group_size=8, modules="*.up_proj.base")
    adapter = model.model.layers[0].mlp.up_proj
    nn.init.normal_(adapter.up)
    want = logits(model, ids)
    base = adapter.base.rounded_weight.detach()
    merge_lora(model)
    torch.testing.assert_close(logits(model, ids), want)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, base)


def test_a_rounding_teacher_has_fingerprints_of_its_own(tied):
    model, _ = tied
    seen = {str(fingerprint(model))}
    for format in ("int8", "int4"):
        other = copy.deepcopy(model)
        fake_quantize(other, format, group_size=8)
        seen.add(str(fingerprint(other)))
    assert len(seen) == 3
    bake(other, rounded=False)
    assert str(fingerprint(other)) in seen


def test_sharded_layers_round_their_whole_weights():
    """FSDP2 reads a layer's parameter as its attribute, and puts layers into classes of its own."""
    model, x = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4)), torch.randn(3, 32)
    fake_quantize(model, "int8")
    want = model(x)
    want.sum().backward()
    grads = [p.grad for p in model.parameters()]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = copy.deepcopy(model)
        sharded.zero_grad()
        mesh = init_device_mesh("cpu", (1,))
        for part in (*sharded, sharded):
            fully_shard(part, mesh=mesh)
        got = sharded(x)
        got.sum().backward()
        assert torch.equal(got, want)
        assert all(torch.equal(p.grad.full_tensor(), g) for p, g in zip(sharded.parameters(), grads, strict=True))
        with pytest.raises(TypeError, match="0 is a FSDPFakeQuantizedLinear, a wrapped layer: bake a plain copy"):
            bake(sharded)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "nf4"}, "format must be one of 'int8', 'int4', 'mxfp4', got 'nf4'"),
        ({"format": "int4"}, "has 16 inputs, which are no whole groups of 32: give a group_size"),
        ({"format": "int8", "group_size": 5}, "16 inputs, which are no whole groups of 5"),
        ({"format": "int8", "group_size": 0}, "group_size must be a whole number of inputs, 1 or more, got 0"),
        ({"format": "mxfp4", "group_size": 16}, "a block of mxfp4 has 32 numbers, got group_size=16"),
        ({"format": "int8", "modules": ["*.mlp.*", "*.qproj"]}, r"within the model fits '\*\.qproj'; there are model"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(tied, options, message):
    model, _ = tied
    with pytest.raises(ValueError, match=message):
        fake_quantize(model, **options)
    assert not any(isinstance(module, FakeQuantizedLinear) for module in model.modules())


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        fake_quantize([])
    with pytest.raises(ValueError, match=r"Embedding has no nn\.Linear to round"):
        fake_quantize(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="Linear has no fake-quantised layer: fake_quantize makes them"):
        bake(nn.Linear(3, 4))
