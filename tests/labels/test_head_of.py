"""Head.of: a model's hidden states and output layer, whatever the model does after it and whatever wraps the model."""

import copy
import gc
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kdfast import Head, kd_loss
from kdfast.cache import output_layer
from kdfast.labels import running
from kdfast.labels.tail import measure
from support.language_models import ARCHITECTURES, VOCAB, WIDTH, make, token_ids


def arguments(model):
    """Those of Head.of, and those of the model that its logits come of."""
    inputs = {"input_ids": token_ids()}
    if not model.config.is_encoder_decoder:
        return inputs, inputs
    labels = token_ids(length=4, seed=1)
    decoder = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return {**inputs, "labels": labels}, {**inputs, "decoder_input_ids": decoder}


def loss_and_gradients(logits, model, **options):
    teacher = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    loss = kd_loss(logits, teacher, **options)
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.detach(), dict(zip(parameters, found, strict=True))


def assert_same(head, logits, model, **tolerance):
    assert head.shape == logits.shape
    torch.testing.assert_close(head.logits(), logits.detach().float(), **tolerance)
    got, want = loss_and_gradients(head, model), loss_and_gradients(logits, model)
    torch.testing.assert_close(got, want, **tolerance)
    assert got[1].keys() == want[1].keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_logits(name):
    model = make(name)
    inputs, whole = arguments(model)
    for _ in range(2):  # measured, and remembered
        head = Head.of(model, **inputs)
        assert_same(head, model(**whole).logits, model, rtol=1e-4, atol=1e-5)
    assert (head.scale, head.softcap) == ARCHITECTURES[name][2:]
    assert head.weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("bert", "distilbert")])
def test_an_output_layer_makes_logits_of_the_last_hidden_states(name):
    model = make(name)
    _, whole = arguments(model)
    layer = output_layer(model)
    with torch.no_grad():
        if name == "t5":
            hidden = model(**whole, output_hidden_states=True).decoder_hidden_states[-1]
            assert layer.scale == pytest.approx(WIDTH**-0.5)
        else:
            hidden = model.base_model(**whole).last_hidden_state
            assert (layer.scale, layer.softcap) == ARCHITECTURES[name][2:]
        torch.testing.assert_close(layer.logits(hidden), model(**whole).logits, rtol=1e-4, atol=1e-5)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_an_output_layer_behind_a_transform_is_refused(name):
    with pytest.raises(ValueError, match="does more to its last hidden states than its output layer"):
        output_layer(make(name))


# ---- what wraps a model ---------------------------------------------------------------------------------------------


def test_autocast_gives_the_dtype():
    model, ids = make("llama"), token_ids()
    with torch.autocast("cpu", torch.bfloat16):
        head, logits = Head.of(model, ids), model(ids).logits
    assert head.hidden.dtype == head.weight.dtype == logits.dtype == torch.bfloat16
    assert_same(head, logits.float(), model, rtol=0.02, atol=0.01)  # those logits are rounded to bfloat16


def test_checkpointed_layers_give_their_gradients():
    model, ids = make("llama"), token_ids()
    want = model(ids).logits
    model.train().activation_checkpointing_enable()
    assert_same(Head.of(model, ids, use_cache=False), want, model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from inside the compiler
def test_a_compiled_model_runs_eagerly_and_keeps_no_trace():
    model, x = Classifier(), torch.randn(7, 4)
    want = model(x)
    for compiled in (torch.compile(copy.deepcopy(model), backend="eager"), copy.deepcopy(model)):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend="eager")
        for _ in range(2):
            torch.testing.assert_close(Head.of(compiled, x, layer="fc").logits(), want.detach())
            torch.testing.assert_close(compiled(x), want)

    @torch.compile(backend="eager")
    def step(x):
        return Head.of(model, 2 * x, layer="fc").hidden

    with torch.no_grad():  # PyTorch warns when a graph begins at a tensor with a gradient that is no leaf
        torch.testing.assert_close(step(x), model.body(2 * x).relu())
    torch._dynamo.reset()


class Wrapped(nn.DataParallel):
    calls = 0

    def forward(self, *args, **inputs):
        self.calls += 1
        return self.module(*args, **inputs)


@pytest.mark.parametrize("wrap", [Wrapped, lambda model: nn.DataParallel(Wrapped(model)), AveragedModel])
def test_the_wrapper_runs(wrap):
    model, ids = make("cohere"), token_ids()
    wrapped = wrap(model)
    inner = next(x for x in wrapped.modules() if isinstance(x, type(model)))
    assert_same(Head.of(wrapped, ids), inner(ids).logits, inner)
    assert [x.calls for x in wrapped.modules() if isinstance(x, Wrapped)] in ([1], [])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_teacher_without_gradients(mode):
    teacher, student, ids = make("gemma2"), make("granite"), token_ids()
    with mode():
        head, logits = Head.of(teacher, ids), teacher(ids).logits
    assert not any(x.requires_grad for x in (head.hidden, head.weight))
    want = kd_loss(student(ids).logits, logits.clone())
    for student_side in (student(ids).logits, Head.of(student, ids)):
        loss = kd_loss(student_side, head)
        torch.testing.assert_close(loss, want)
        loss.backward()


def test_what_else_a_model_returns():
    model, ids = make("llama"), token_ids()
    head, output = Head.of(model, ids, return_output=True, output_hidden_states=True)
    assert output.logits is head
    assert torch.equal(output.hidden_states[-1], head.hidden)
    head, output = Head.of(model, ids, labels=ids, return_output=True)  # for a loss that there are no logits for
    assert output.loss is None
    assert head.shape == (2, 5, VOCAB)
    assert Head.of(model, ids, logits_to_keep=2).shape == (2, 2, VOCAB)
    torch.testing.assert_close(Head.of(model, ids, return_dict=False).logits(), model(ids).logits)


class Classifier(nn.Module):
    def __init__(self, after=lambda x: x, calls=1):
        super().__init__()
        self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 5)
        self.after, self.calls = after, calls

    def forward(self, x):
        return self.after(sum(self.fc(self.body(x).relu()) for _ in range(self.calls)))


def test_any_model_whose_layer_is_named():
    model, x = Classifier(lambda logits: 2.0 * logits), torch.randn(7, 4)
    for layer in ("fc", model.fc):
        assert_same(Head.of(model, x, layer=layer), model(x), model)
    with pytest.raises(TypeError, match="a Classifier does not say what its output layer is: give layer="):
        Head.of(model, x)
    with pytest.raises(TypeError, match=r"a model is a torch\.nn\.Module, got function"):
        Head.of(lambda x: x, x)


# ---- what a Head cannot say -----------------------------------------------------------------------------------------


SCALE = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize(
    "after",
    [
        lambda logits: logits.softmax(-1),
        lambda logits: -logits,
        lambda logits: logits + torch.arange(5) * logits,
        lambda logits: logits.masked_fill(torch.arange(5) == 3, -torch.inf),
        lambda logits: logits[..., :4],
        lambda logits: 30 * (logits / 30).sin(),
        lambda logits: logits.argmax(-1),
        nn.BatchNorm1d(5),
        lambda logits: logits * SCALE,
    ],
)
def test_logits_of_another_form_are_refused(after):
    model = Classifier(after).eval()
    with pytest.raises(ValueError, match="makes its logits of its output layer's in a way that a Head cannot say"):
        Head.of(model, torch.randn(7, 4), layer="fc")


def test_a_trained_scale_is_found_after_a_call_without_gradients():
    model, x = Classifier(lambda logits: logits * SCALE), torch.randn(7, 4)
    with torch.no_grad():
        torch.testing.assert_close(Head.of(model, x, layer="fc").logits(), model(x))
    with pytest.raises(ValueError, match="that are not trained"):
        Head.of(model, x, layer="fc")


def test_a_layer_that_is_not_called_once_is_refused():
    with pytest.raises(ValueError, match="called its output layer 2 times, not once"):
        Head.of(Classifier(calls=2), torch.randn(7, 4), layer="fc")
    with pytest.raises(ValueError, match="called its output layer 0 times, not once"):
        Head.of(Classifier(calls=1), torch.randn(7, 4), layer=nn.Linear(8, 5))


def test_hooks_of_the_layer_are_seen():
    model, ids = make("llama"), token_ids()
    Head.of(model, ids)
    before = model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_same(Head.of(model, ids), model(ids).logits, model)
    before.remove()
    after = model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(ValueError, match=r"does not return hidden @ weight.T \+ bias"):
        Head.of(model, ids)
    after.remove()
    assert_same(Head.of(model, ids), model(ids).logits, model)


# ---- adapters -------------------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """As PEFT's layers are built: ``weight`` is that of the frozen base."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class ModulesToSave(nn.Module):
    """As PEFT's wrapper of a layer that is trained whole."""

    def __init__(self, layer):
        super().__init__()
        self.original_module = layer
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(layer)})
        self.active_adapter, self.disable_adapters = "default", False

    @property
    def weight(self):
        return self.modules_to_save["default"].weight

    def forward(self, x):
        return (self.original_module if self.disable_adapters else self.modules_to_save["default"])(x)


def test_an_adapted_output_layer_is_refused():
    model, ids = make("llama"), token_ids()
    model.lm_head = Lora(model.lm_head)
    for use in (
        lambda: Head.of(model, ids),
        lambda: output_layer(model),
        lambda: Head(torch.randn(2, WIDTH), model.lm_head),
        lambda: Head(torch.randn(2, WIDTH), model.get_output_embeddings()),
    ):
        with pytest.raises(TypeError, match="the output layer is adapted"):
            use()


def test_adapters_elsewhere_are_no_matter():
    model, ids = make("llama"), token_ids()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Lora(attention.q_proj)
    assert_same(Head.of(model, ids), model(ids).logits, model)


def test_a_layer_that_an_adapter_trains_whole():
    model, ids = make("llama"), token_ids()
    model.lm_head = ModulesToSave(model.lm_head)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert_same(Head.of(model, ids), model(ids).logits, model)
    torch.testing.assert_close(output_layer(model).weight, model.lm_head.weight.detach())
    model.lm_head.disable_adapters = True
    assert_same(Head.of(model, ids), model(ids).logits, model)


def test_tokens_that_a_prompt_adds_are_rows_of_the_logits():
    inner, ids = make("llama"), token_ids()

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.prompt = inner, nn.Parameter(torch.randn(2, 3, WIDTH))
            self.get_output_embeddings = inner.get_output_embeddings

        def forward(self, ids):
            embedded = self.inner.get_input_embeddings()(ids)
            return self.inner(inputs_embeds=torch.cat([self.prompt, embedded], 1))

    model = Prompted()
    head = Head.of(model, ids)
    assert head.shape == (2, 8, VOCAB)
    assert_same(head, model(ids).logits, model)


# ---- the model stays as it was --------------------------------------------------------------------------------------


def test_an_error_in_the_model_leaves_no_hook():
    def fail(x):
        raise RuntimeError("out of memory")

    model = Classifier(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Head.of(model, torch.randn(7, 4), layer="fc")
    assert not model.fc._forward_hooks
    assert not model.fc._forward_pre_hooks


def test_nothing_is_kept_alive():
    model = Classifier()
    head = Head.of(model, torch.randn(7, 4), layer="fc")
    hidden, layer = weakref.ref(head.hidden), weakref.ref(model)
    del head, model
    gc.collect()
    assert (hidden(), layer()) == (None, None)


def test_another_thread_s_forward_is_not_touched():
    inside, done = threading.Event(), threading.Event()

    def wait(x):
        if threading.current_thread() is not threading.main_thread():
            return x
        inside.set()
        assert done.wait(10)
        return x

    model, x, seen = Classifier(wait), torch.randn(7, 4), []
    want = model.fc(model.body(x).relu())

    def other():
        inside.wait(10)
        seen.append(model(x))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    head = Head.of(model, x, layer="fc")
    thread.join()
    torch.testing.assert_close(seen[0], want)
    torch.testing.assert_close(head.logits(), want.detach())


# ---- what changes between two calls ---------------------------------------------------------------------------------


class Capped(nn.Module):
    """A model whose logits depend on all that a model's may."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.config = SimpleNamespace(cap=5.0)
        self.scale, self.after = 1.0, lambda logits: logits
        self.register_buffer("heat", torch.ones(()))

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, temperature=1.0):
        logits = self.after(self.lm_head(self.embedding(input_ids)) * self.scale * self.heat / temperature)
        cap = self.config.cap if self.training else 3.0
        return logits if cap is None else cap * torch.tanh(logits / cap)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Capped()

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


CHANGES = {
    "an attribute": lambda model: setattr(model, "scale", 3.0),
    "a function": lambda model: setattr(model, "after", lambda logits: logits * 3),
    "a buffer": lambda model: model.heat.fill_(3.0),
    "a loaded buffer": lambda model: model.load_state_dict({**model.state_dict(), "heat": torch.tensor(3.0)}),
    "a configuration": lambda model: setattr(model.config, "cap", 2.0),
    "a cap that is left out": lambda model: setattr(model.config, "cap", None),
    "the mode": lambda model: model.eval(),
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_measurement_holds_for_what_was_measured(change, wrapped, monkeypatch):
    torch.manual_seed(0)
    outer = Around() if wrapped else Capped()
    inner, options = (outer.inner, {"layer": "inner.lm_head"}) if wrapped else (outer, {})
    measured = []
    monkeypatch.setattr(running, "measure", lambda *args: measured.append(1) or measure(*args))
    for _ in range(2):
        assert_same(Head.of(outer, token_ids(), **options), outer(token_ids()), outer)
    # On a device nothing is looked at without need: that there is need shows without a look.
    path = running.path_of(outer, inner.lm_head)
    before = running.circumstances(outer, path, ())
    CHANGES[change](inner)
    assert (running.circumstances(outer, path, ()) == before) == (change == "nothing")
    assert_same(Head.of(outer, token_ids(), **options), outer(token_ids()), outer)
    assert len(measured) == 3


def test_an_argument_may_change_the_logits():
    torch.manual_seed(0)
    model = Capped()
    for temperature in (1.0, 2.0):
        head, logits = (call(token_ids(), temperature=temperature) for call in (partial(Head.of, model), model))
        assert_same(head, logits, model)
    one, other = (running.circumstances(model, "lm_head", [("temperature", x)]) for x in (1.0, 2.0))
    assert one != other


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_that_change_gradients_are_refused(register):
    model = Capped()
    getattr(model.lm_head, register)(lambda *gradients: None)
    with pytest.raises(TypeError, match="the output layer has backward hooks"):
        Head.of(model, token_ids())
    with pytest.raises(TypeError, match="the output layer has backward hooks"):
        Head(torch.zeros(2, WIDTH), model.lm_head)


def test_a_model_that_needs_all_its_rows_is_named():
    model = Capped()
    ids = token_ids()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].reshape(-1, WIDTH),))
    model.after = lambda logits: logits.view(*ids.shape, VOCAB)
    with pytest.raises(ValueError, match="Capped cannot go on with 5 rows or 1 in the place of its logits'"):
        Head.of(model, token_ids())
