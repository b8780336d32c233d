"""Layer dropping: what stays, its configuration, and what is refused."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from kdfast.recipes import drop_layers, fake_quantize

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def llama(layers=5):
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_hidden_layers=layers)).eval()


def gemma(types):
    torch.manual_seed(1)
    names = {"s": "sliding_attention", "f": "full_attention"}
    types = [names[x] for x in types]
    config = hf.Gemma3TextConfig(**SIZES, num_hidden_layers=len(types), layer_types=types, sliding_window=3)
    return hf.Gemma3ForCausalLM(config).eval()


def llama4():
    """Mixtures of experts in all layers, by a list of their numbers, and a list of which layers have no rotation."""
    torch.manual_seed(3)
    config = hf.Llama4TextConfig(**SIZES, num_hidden_layers=4, num_local_experts=2, intermediate_size_mlp=24)
    model = hf.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def ids(length=9):
    return torch.randint(3, 40, (2, length), generator=torch.Generator().manual_seed(2))


def skipping(model, drop):
    """The logits of ``model`` where the layers ``drop`` return what they get."""
    model = copy.deepcopy(model)
    for i in drop:
        model.model.layers[i].forward = lambda hidden, *_, **__: hidden
    return model(ids(), use_cache=False).logits


@pytest.mark.parametrize("drop", [[1, 3], [0], [-1, 2]])
def test_the_others_stay_as_they_are(drop):
    teacher = llama()
    student, want = copy.deepcopy(teacher), skipping(teacher, drop)
    assert drop_layers(student, drop) == [f"model.layers.{i}" for i in sorted(i % 5 for i in drop)]
    assert torch.equal(student(ids(), use_cache=False).logits, want)
    assert len(teacher.model.layers) == teacher.config.num_hidden_layers == 5


def test_layers_find_their_keys_and_values():
    student = llama()
    drop_layers(student, [1, 2])
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    past = student(ids()[:, :6], use_cache=True).past_key_values
    later = student(ids()[:, 6:], past_key_values=past).logits
    torch.testing.assert_close(later, student(ids()).logits[:, 6:])


@pytest.mark.parametrize("make", [llama, lambda: gemma("ssfssf"), llama4])
def test_a_student_can_be_saved_and_loaded(make, tmp_path):
    student = make()
    drop_layers(student, [1, 2])
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids()).logits, student(ids()).logits)


def test_lists_with_an_item_per_layer_lose_those_of_dropped_layers():
    teacher = gemma("ssfssf")
    student, want = copy.deepcopy(teacher), skipping(teacher, [0, 2])
    drop_layers(student, [0, 2])
    assert student.config.layer_types == ["sliding_attention"] * 3 + ["full_attention"]
    torch.testing.assert_close(student(ids()).logits, want)


def test_a_model_that_shares_the_configuration_stays():
    config = hf.LlamaConfig(**SIZES, num_hidden_layers=4)
    teacher, student = hf.LlamaForCausalLM(config).eval(), hf.LlamaForCausalLM(config).eval()
    want = teacher(ids()).logits
    drop_layers(student, [0, 1])
    assert config.num_hidden_layers == 4
    assert torch.equal(teacher(ids()).logits, want)
    assert student.config is student.model.config is student.model.layers[0].self_attn.config
    assert student.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("model", "config", "name"),
    [
        (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2), "transformer.h"),
        (hf.BertForMaskedLM, hf.BertConfig(**SIZES, num_hidden_layers=3), "bert.encoder.layer"),
        (
            hf.DistilBertForMaskedLM,
            hf.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_heads=2, n_layers=3),
            "distilbert.transformer.layer",
        ),
        (hf.MixtralForCausalLM, hf.MixtralConfig(**SIZES, num_hidden_layers=3, num_local_experts=3), "model.layers"),
    ],
)
def test_stacks_of_other_names(model, config, name):
    student = model(config).eval()
    assert drop_layers(student, [1]) == [f"{name}.1"]
    assert student.config.num_hidden_layers == 2
    assert student(ids()).logits.shape == (2, 9, 40)
    counts = [getattr(module, "n_layers", 2) for module in student.modules()]
    assert set(counts) == {2}


def test_a_rounded_student_can_lose_layers():
    student = llama()
    fake_quantize(student, "int8", modules="*.layers.0.mlp.*")
    drop_layers(student, [3])
    assert len(student.model.layers) == 4


def test_a_model_within_a_module():
    model = nn.ModuleDict({"language": gemma("ssf"), "vision": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
    assert drop_layers(model, [0]) == ["language.model.layers.0"]
    assert model["language"].config.layer_types == ["sliding_attention", "full_attention"]
    assert len(model["vision"]) == 3


def test_layers_whose_pattern_follows_from_their_number_are_refused():
    """Of ``attn_layer_period``, layer 3 of Jamba is an attention layer, and is the second once layer 1 is gone."""
    sizes = {**SIZES, "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False, "num_experts": 2}
    del sizes["head_dim"]
    period = {"attn_layer_period": 4, "attn_layer_offset": 3, "expert_layer_period": 8, "expert_layer_offset": 7}
    model = hf.JambaForCausalLM(hf.JambaConfig(**sizes, **period, num_hidden_layers=4))
    kinds = [type(layer) for layer in model.model.layers]
    with pytest.raises(ValueError, match=r"does not say layer by layer .* of model\.layers\.3"):
        drop_layers(model, [1])
    assert [type(layer) for layer in model.model.layers] == kinds
    assert model.config.num_hidden_layers == 4


def test_modules_without_a_configuration():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}))
    last = model[1]["blocks"][2]
    assert drop_layers(model, [0, 1]) == ["1.blocks.0", "1.blocks.1"]
    assert list(model[1]["blocks"]) == [last]


def test_one_of_several_stacks_is_named():
    model = nn.ModuleDict({name: nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for name in ("left", "right")})
    with pytest.raises(ValueError, match=r"2 \(left of 3, right of 3\) can be the stack of layers: name it by layers="):
        drop_layers(model, [0])
    assert drop_layers(model, [0], layers="right") == ["right.0"]
    assert (len(model["left"]), len(model["right"])) == (3, 2)


@pytest.mark.parametrize(
    ("drop", "error", "message"),
    [
        ([], ValueError, "drop names no layer of model.layers, which has 5"),
        ([5], ValueError, r"has the layers 0 \.\.\. 4, got \[5\]"),
        ([1, -4], ValueError, r"drop names a layer of model.layers twice: \[1, -4\]"),
        (range(5), ValueError, "drop names all 5 layers of model.layers: at least one must stay"),
        ([1.0], TypeError, "cannot be interpreted as an integer"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(drop, error, message):
    model = llama()
    with pytest.raises(error, match=message):
        drop_layers(model, drop)
    assert len(model.model.layers) == model.config.num_hidden_layers == 5


def test_models_without_a_stack_are_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        drop_layers("model", [0])
    with pytest.raises(ValueError, match=r"of no nn\.ModuleList, none can be the stack"):
        drop_layers(nn.Linear(2, 2), [0])
    with pytest.raises(
        TypeError, match=r"layers must name an nn\.ModuleList, got 'lm_head'; there are model\.layers of 5"
    ):
        drop_layers(llama(), [0], layers="lm_head")
    config = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="an encoder and a decoder, which one configuration counts"):
        drop_layers(hf.T5ForConditionalGeneration(config), [0])
