"""Fingerprints change with what changes a teacher's answers and with nothing else, and say in what they differ."""

import io
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn

import kdfast.cache
from kdfast.cache import CacheMismatchError, fingerprint
from kdfast.cache.capture.fingerprint import _first_form, with_tokenizer
from kdfast.cache.format.teacher import Fingerprint

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **{**SIZES, **changes})).eval()


def bert(**changes):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=11, **{**SIZES, **changes}))


HARMLESS = {
    "use_cache": False,
    "pad_token_id": 3,
    "eos_token_id": 3,
    "bos_token_id": 3,
    "output_hidden_states": True,
    "architectures": ["Other"],
    "id2label": {0: "no", 1: "yes"},
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    "problem_type": "single_label_classification",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_answer_does_not_count(name):
    model = llama()
    before = fingerprint(model)
    setattr(model.config, name, HARMLESS[name])
    assert fingerprint(model) == before


def test_saving_and_wrapping_do_not_count(tmp_path):
    model = llama()
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(transformers.LlamaForCausalLM.from_pretrained(tmp_path)) == before
    assert fingerprint(torch.compile(model, backend="eager")) == before
    assert fingerprint(nn.DataParallel(model)) == before
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert fingerprint(model) == before


def test_names_of_classes_do_not_count():
    assert fingerprint(bert()) == fingerprint(bert(id2label={0: "no", 1: "yes"}, hidden_dropout_prob=0.3))


@pytest.mark.parametrize(
    ("name", "value"), [("rope_theta", 7.0), ("rms_norm_eps", 0.1), ("hidden_act", "relu"), ("logits_scaling", 2.0)]
)
def test_what_changes_answers_counts(name, value):
    model = llama()
    before = fingerprint(model)
    setattr(model.config, name, value)
    assert fingerprint(model) != before


def test_padding_counts_where_it_is_looked_at():
    """A decoder that classifies takes the last token that is no padding; RoBERTa counts positions from the padding."""
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(vocab_size=11, **SIZES))
    before = fingerprint(model)
    model.config.pad_token_id = 3
    assert fingerprint(model) != before
    roberta = [
        transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=11, pad_token_id=index, **SIZES))
        for index in (1, 2)
    ]
    roberta[1].load_state_dict(roberta[0].state_dict())
    assert fingerprint(roberta[0]) != fingerprint(roberta[1])


def test_a_module_without_a_configuration_is_told_by_its_modules():
    def model(activation, slope=0.1):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), activation, nn.Dropout(slope), nn.Linear(4, 2))

    found = {fingerprint(model(nn.ReLU())), fingerprint(model(nn.GELU())), fingerprint(model(nn.LeakyReLU(0.3)))}
    assert len(found) == 3
    assert fingerprint(model(nn.ReLU(), 0.1)) == fingerprint(model(nn.ReLU(), 0.9))


class Scaled(nn.Module):
    def __init__(self, scale=1.0, activation=torch.relu, buffer=1.0, heads=2, offset=None, dropout=0.1, limit=9):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.scale, self.activation, self._heads, self.offset = scale, activation, heads, offset
        self.dropout, self.limit, self.calls, self.last = dropout, limit, 0, None
        self.register_buffer("buffer", torch.tensor(buffer), persistent=False)


class Renamed(Scaled):
    pass


def test_a_module_of_one_s_own_is_told_by_its_options():
    models = [
        Scaled(),
        Scaled(scale=2.0),
        Scaled(activation=torch.tanh),
        Scaled(buffer=2.0),
        Scaled(activation=nn.functional.gelu),
        Scaled(heads=4),
        Scaled(offset=torch.ones(2)),
        Scaled(offset=torch.zeros(2)),
        Renamed(),
    ]
    assert len({fingerprint(model) for model in models}) == len(models)
    used = Scaled(dropout=0.3, limit=20)
    used.calls, used.last = 7, torch.ones(3)
    assert fingerprint(used) == fingerprint(Scaled().eval())


def test_options_of_pytorch_s_modules_that_their_repr_leaves_out():
    def layer(heads=2, **options):
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, heads, 8, **options)

    models = [layer(), layer(4), layer(norm_first=True), layer(activation=nn.functional.gelu)]
    assert len({fingerprint(model) for model in models}) == len(models)
    assert fingerprint(layer(dropout=0.7)) == fingerprint(layer())


def test_a_model_inside_a_module_brings_its_configuration():
    class Wrapped(nn.Module):
        def __init__(self, **changes):
            super().__init__()
            self.model = llama(**changes)

    assert fingerprint(Wrapped()) != fingerprint(Wrapped(rope_theta=7.0))
    assert fingerprint(Wrapped()) == fingerprint(Wrapped(use_cache=False))
    other = Wrapped()
    other.model = torch.compile(other.model, backend="eager")
    assert fingerprint(other) == fingerprint(Wrapped())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": [x]}, lambda x: io.BytesIO(x.numpy().tobytes())])
def test_the_extra_state_of_a_module_counts_whole(wrap):
    """Its ``repr`` would leave out the middle of a long tensor, and is another one for each open buffer."""

    class Extra(nn.Module):
        def __init__(self, middle):
            super().__init__()
            self._extra = torch.zeros(3000)
            self._extra[1500] = middle

        def get_extra_state(self):
            return wrap(self._extra)

    assert fingerprint(Extra(0.0)) == fingerprint(Extra(0.0))
    assert fingerprint(Extra(0.0)) != fingerprint(Extra(1.0))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_count_whole():
    class Packed(nn.Module):
        def __init__(self, middle, scale=0.1):
            super().__init__()
            values = torch.zeros(3000)
            values[1500] = middle
            self.register_buffer("packed", torch.quantize_per_tensor(values, scale, 0, torch.qint8))

    found = [fingerprint(model) for model in (Packed(1.0), Packed(1.0), Packed(2.0), Packed(1.0, 0.2))]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_adapters_count():
    class Adapted(nn.Linear):
        scaling, active_adapters, disable_adapters = {"a": 2.0}, ["a"], False

    torch.manual_seed(0)
    model = nn.ModuleDict({"x": Adapted(2, 2)})
    found = {fingerprint(model)}
    model["x"].scaling = {"a": 4.0}
    found.add(fingerprint(model))
    model["x"].disable_adapters = True
    found.add(fingerprint(model))
    assert len(found) == 3


def test_the_tokenizers_padding_does_not_count():
    def tokenizer(**special):
        made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token="<unk>", eos_token="</s>", **special
        )

    plain, padded = tokenizer(), tokenizer()
    padded.pad_token = padded.eos_token
    assert with_tokenizer("t", plain, True) == with_tokenizer("t", padded, True)
    assert with_tokenizer("t", plain, True) != with_tokenizer("t", plain, False)
    assert with_tokenizer("t", None, True) == "t"


def write(path, teacher, key=0):
    with kdfast.cache.Writer(path, vocab_size=5, codec="topk", k=2, teacher=teacher) as w:
        if key not in w:
            w.add(key, torch.arange(5.0))
        return w.records


def test_a_cache_of_an_earlier_version_is_gone_on_with(tmp_path):
    model = llama()
    first = _first_form(model)
    assert first != fingerprint(model)
    write(tmp_path, first)
    (tmp_path / "cache.json").unlink()  # which that version did not write
    assert write(tmp_path, fingerprint(model), 1) == 1
    assert write(tmp_path, fingerprint(torch.compile(model, backend="eager")), 2) == 1
    assert kdfast.cache.open(tmp_path).info.teacher == first
    assert len(kdfast.cache.open(tmp_path)) == 3
    with pytest.raises(CacheMismatchError, match="teacher="):
        write(tmp_path, fingerprint(llama(rope_theta=7.0)))


def test_a_mismatch_says_what_differs(tmp_path):
    model = llama()
    write(tmp_path, fingerprint(model))
    model.config.rms_norm_eps = 0.125
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(CacheMismatchError) as caught:
        write(tmp_path, fingerprint(model))
    message = str(caught.value)
    assert "of the teachers differ: config.rms_norm_eps (0.125 here, 1e-06 there), weight.lm_head.weight (" in message
    assert message.count(" here, ") == 2


def test_a_mismatch_of_tokenizers_says_so(tmp_path):
    teacher = Fingerprint("t", {"weight.x": "1"})
    tokenizer = SimpleNamespace(special_tokens_map={}, get_vocab=lambda: {"a": 0})
    write(tmp_path, with_tokenizer(teacher, tokenizer, True))
    tokenizer.get_vocab = lambda: {"a": 0, "b": 1}
    with pytest.raises(CacheMismatchError, match=r"of the teachers differ: tokenizer.rules \(\w+ here, \w+ there\)$"):
        write(tmp_path, with_tokenizer(teacher, tokenizer, True))


def test_it_is_a_text_and_pickles():
    made = fingerprint(nn.Linear(2, 2))
    assert len(made) == 32
    copy = pickle.loads(pickle.dumps(made))
    assert (copy, copy.parts, copy.older()) == (made, made.parts, [])
    assert json.loads(json.dumps(made)) == made


def test_a_tokenizer_of_another_library_is_named():
    with pytest.raises(TypeError, match=r"got Tokenizer: .*PreTrainedTokenizerFast\(tokenizer_object=tokenizer\)"):
        with_tokenizer("t", Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), add_special_tokens=True)
