"""What a batch and a model mean: whose mask it is, where logits lie, which modules a teacher is made of."""

import weakref
from collections import UserDict, deque, namedtuple
from functools import lru_cache, partial

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div
from transformers import BartConfig, BartForSequenceClassification

import kdfast.cache
from kdfast import Distiller
from kdfast.cache import capture
from support.language_models import make, token_ids

CLASSES = 5


def kl(student, teacher, rows):
    """The mean of KL(teacher || student) over the rows that count, in float64."""
    student, teacher = (x[rows].double().log_softmax(-1) for x in (student, teacher))
    return kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean().float()


def distiller(student, teacher=None, **options):
    defaults = {"kd_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0}
    return Distiller(student, teacher, **(defaults if "objective" not in options else {}) | options)


# ---- encoder-decoders -----------------------------------------------------------------------------------------------


def translation():
    """A batch whose source and target have one length, and are padded in other places."""
    ids, labels = token_ids(3, 5), token_ids(3, 5, seed=1)
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, 2:] = 0
    mask[1, 4:] = 0
    labels[2, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def whole_logits(model, batch):
    decoder = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, decoder_input_ids=decoder).logits


def other(model):
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.3 * torch.randn_like(x))
    return model


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_a_decoder_gets_its_labels_and_not_its_encoder_s_mask(name):
    student, teacher, batch = make(name), other(make(name)), translation()
    loss = distiller(student, teacher).step(batch)
    rows = batch["labels"] != -100
    logits = whole_logits(student, batch)
    want = kl(logits, whole_logits(teacher, batch).detach(), rows)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    trained = [x for x in student.parameters() if x.requires_grad]
    got, want = (torch.autograd.grad(x, trained, allow_unused=True) for x in (loss, want))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_a_wrapped_decoder_is_one():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask, decoder_input_ids=token_ids(3, 5, seed=3)).logits

    student, teacher, batch = Wrapper(make("t5")), Wrapper(other(make("t5"))), translation()
    loss = distiller(student, teacher).step(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(loss, kl(student(**inputs), teacher(**inputs).detach(), batch["labels"] != -100))


def test_a_classifier_on_an_encoder_decoder_has_a_row_per_sample():
    counts = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    sizes = {**dict.fromkeys(counts, 1), "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "d_model": 8, "vocab_size": 40}
    student, teacher = (BartForSequenceClassification(BartConfig(**sizes, num_labels=CLASSES)).eval() for _ in "ab")
    ids = token_ids(3, 5)
    ids[:, -1] = 2  # the end, where it looks
    batch = {"input_ids": ids, "attention_mask": torch.ones(3, 5).long(), "labels": torch.tensor([0, 1, 2])}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = distiller(student, teacher).step(batch)
    torch.testing.assert_close(loss, kl(student(**inputs).logits, teacher(**inputs).logits.detach(), ...))


def test_a_decoder_s_own_mask_is_taken():
    student, teacher, batch = make("t5"), other(make("t5")), translation()
    decoder = {"decoder_input_ids": token_ids(3, 5, seed=2), "decoder_attention_mask": torch.ones(3, 5).long()}
    decoder["decoder_attention_mask"][1, 1:] = 0
    batch = {**{name: batch[name] for name in ("input_ids", "attention_mask")}, **decoder}
    loss = distiller(student, teacher).step(batch)
    real = decoder["decoder_attention_mask"].bool()
    torch.testing.assert_close(loss, kl(student(**batch).logits, teacher(**batch).logits.detach(), real))


def test_a_cache_of_a_decoder_has_the_labelled_rows(tmp_path):
    student, teacher, batch = make("t5"), other(make("t5")), {**translation(), "key": ["a", "b", "c"]}
    report = capture(teacher, [batch], tmp_path, vocab_size=40, codec="dense", progress=False)
    assert report.rows == int((batch["labels"] != -100).sum()) == 13
    cache = kdfast.cache.open(tmp_path)
    loss = distiller(student, cache).step(batch)
    want = kl(whole_logits(student, batch), whole_logits(teacher, batch), batch["labels"] != -100)
    torch.testing.assert_close(loss, want, rtol=0.02, atol=0.02)  # stored in 8 bits


def test_without_a_way_to_make_them_a_decoder_s_inputs_are_asked_for():
    class Bare(nn.Module):
        config = type("Config", (), {"is_encoder_decoder": True})()

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, CLASSES)

        def forward(self, **inputs):
            raise AssertionError

    with pytest.raises(ValueError, match="a Bare does not say how it makes its decoder's inputs"):
        distiller(Bare(), None).step(translation())


# ---- masks of other positions ---------------------------------------------------------------------------------------


class Speech(nn.Module):
    """Logits of frames, two samples each. The mask is over samples."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, CLASSES)

    def forward(self, input_values, attention_mask):
        return self.fc((input_values * attention_mask).unflatten(-1, (-1, 2)))


def speech():
    mask = torch.ones(3, 8)
    mask[0, 4:] = 0
    mask[1, 6:] = 0
    return {"input_values": torch.randn(3, 8), "attention_mask": mask}


def frames(batch):
    return batch["attention_mask"].bool()[:, ::2]


def test_a_mask_of_samples_is_not_one_of_frames():
    student, teacher, batch = Speech(), Speech(), speech()
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 8\), the logits' rows are \(3, 4\): say by mask="):
        distiller(student, teacher).step(batch)
    logits = [model(**batch) for model in (student, teacher)]
    loss = distiller(student, teacher, mask=frames).step(batch)
    torch.testing.assert_close(loss, kl(*logits, frames(batch)))
    loss = distiller(student, teacher, mask=lambda batch: None).step(batch)
    torch.testing.assert_close(loss, kl(*logits, torch.ones(3, 4, dtype=torch.bool)))


def test_a_field_is_named_as_the_mask():
    class Takes(Speech):
        def forward(self, input_values, attention_mask, frames):
            return super().forward(input_values, attention_mask)

    student, teacher, batch = Takes(), Takes(), speech()
    batch["frames"] = frames(batch).long()
    loss = distiller(student, teacher, mask="frames").step(batch)
    torch.testing.assert_close(loss, kl(student(**batch), teacher(**batch), frames(batch)))
    with pytest.raises(ValueError, match="mask='frame' names a field that the batch does not have"):
        distiller(student, teacher, mask="frame").step(batch)
    with pytest.raises(TypeError, match="a mask must be a tensor, got list"):
        distiller(student, teacher, mask=lambda batch: [1]).step(batch)


def test_accumulated_batches_are_weighed_by_the_mask():
    student, teacher = Speech(), Speech()
    batches = [speech(), speech()]
    batches[1]["attention_mask"][:, 2:] = 0
    rows = [frames(batch) for batch in batches]
    pairs = [tuple(model(**batch) for model in (student, teacher)) for batch in batches]
    want = sum(kl(*pair, row) * row.sum() for pair, row in zip(pairs, rows, strict=True)) / sum(x.sum() for x in rows)
    trained = distiller(student, teacher, mask=frames, accumulate=2, lr=0.0)
    record = trained.fit(batches, epochs=1, progress=False)[0]
    assert record["loss"] == pytest.approx(want.item(), rel=1e-5)


def test_a_capture_of_frames(tmp_path):
    teacher, batch = Speech(), {**speech(), "key": ["a", "b", "c"]}

    def run(name, **options):
        return capture(teacher, [batch], tmp_path / name, vocab_size=CLASSES, codec="dense", progress=False, **options)

    with pytest.raises(ValueError, match=r"attention_mask is \(3, 8\), the logits' rows are \(3, 4\)"):
        run("none")
    assert run("function", mask=frames).rows == int(frames(batch).sum())
    loss = distiller(Speech(), kdfast.cache.open(tmp_path / "function"), mask=frames).step(batch)
    assert loss.isfinite()


def test_a_capture_names_the_field_of_its_mask(tmp_path):
    teacher, batch = make("llama"), {"input_ids": token_ids(2, 4), "attention_mask": torch.ones(2, 4).long()}
    batch["attention_mask"][:, 3] = 0
    options = {"vocab_size": 40, "codec": "dense", "progress": False, "inputs": lambda batch: batch["input_ids"]}
    assert capture(teacher, [batch], tmp_path / "a", **options).rows == 6
    batch["real"] = torch.ones(2, 4).bool()
    assert capture(teacher, [batch], tmp_path / "b", mask="real", **options).rows == 8


# ---- what models return ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, after=lambda logits: logits, classes=CLASSES):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.fc, self.after = nn.Linear(8, classes), after

    def forward(self, x):
        return self.after(self.fc(self.body(x)))


def first(output, batch):
    return output[0]


def test_outputs_take_the_logits_of_both_models():
    student, teacher = (Net(lambda logits: (logits, logits.sum())).eval() for _ in range(2))
    x = torch.randn(6, 4)
    loss = distiller(student, teacher, outputs=first).step(x)
    torch.testing.assert_close(loss, kl(student(x)[0], teacher(x)[0].detach(), slice(None)))
    trained = distiller(student, teacher, outputs=first)
    records = trained.fit([(x, torch.arange(6) % CLASSES)], epochs=1, eval_loader=[(x, torch.arange(6) % CLASSES)])
    assert 0 <= records[0]["accuracy"] <= 100


def test_a_tuple_names_the_model_that_returned_it():
    plain, pair = Net().eval(), Net(lambda logits: (logits, logits.sum())).eval()
    x = torch.randn(6, 4)
    with pytest.raises(TypeError, match="the student returned a tuple without logits: say by outputs="):
        distiller(pair, plain).step(x)
    with pytest.raises(ValueError, match=r"2 teachers, or one that returns a tuple of 2.*say by outputs="):
        distiller(plain, pair).step(x)


@pytest.mark.parametrize(
    ("models", "batch", "message"),
    [
        (lambda: (Net(), Net(lambda x: x.softmax(-1))), torch.randn(6, 4), "the teacher gives probabilities"),
        (lambda: (Net(classes=1), Net(classes=1)), torch.randn(6, 4), r"the student has one logit, \(6, 1\)"),
        (lambda: (Net(classes=1), None), (torch.randn(6, 4), torch.rand(6, 1)), "the student has one logit"),
        (lambda: (squeezed(), squeezed()), torch.randn(6, 4), r"the student's logits are \(6,\), one per sample"),
        (lambda: (Net(), nn.Sequential(Net(), nn.Sigmoid())), torch.randn(6, 4), "the teacher ends in a sigmoid"),
        (lambda: (nn.Sequential(Net(), nn.Sigmoid()), Net()), torch.randn(6, 4), "the student ends in a sigmoid"),
        (
            lambda: (image_model(), image_model()),
            (torch.randn(2, 2, CLASSES, CLASSES), torch.zeros(2, CLASSES, CLASSES, dtype=torch.int64)),
            "classes must be the last dimension, and a convolution puts them in dimension 1",
        ),
        (
            lambda: (Net(), Net()),
            (torch.randn(6, 4), torch.ones(6, CLASSES)),
            "class probabilities must be rows that sum to 1, got a sum of 5 .*a binary problem per class",
        ),
        (
            lambda: (Net(), Net()),
            (torch.randn(6, 4), torch.eye(CLASSES)[[0, 1, 2, 3, 4, 0]] - 0.1),
            "class probabilities must be rows that sum to 1, got .* values down to -0.1",
        ),
    ],
)
def test_what_is_no_choice_among_classes_is_refused(models, batch, message):
    student, teacher = models()
    with pytest.raises(ValueError, match=message):
        distiller(student, teacher, ce_weight=1.0 if isinstance(batch, tuple) else 0.0).step(batch)


def test_a_row_of_zeros_has_no_label():
    torch.manual_seed(0)
    student, x, labels = Net().eval(), torch.randn(6, 4), torch.eye(CLASSES)[[0, 1, 2, 3, 4, 0]]
    labels[2] = 0.0
    want = -(labels.double() * student(x).double().log_softmax(-1)).sum(-1).mean().float()
    torch.testing.assert_close(distiller(student, Net(), kd_weight=0.0, ce_weight=1.0).step((x, labels)), want)


def test_labels_of_several_classes_are_no_matter_without_cross_entropy():
    torch.manual_seed(0)
    student, teacher, x = Net().eval(), Net().eval(), torch.randn(6, 4)
    want = kl(student(x), teacher(x), slice(None))
    torch.testing.assert_close(distiller(student, teacher).step((x, torch.ones(6, CLASSES))), want)


def squeezed():
    return nn.Sequential(Net(classes=1), nn.Flatten(0))


def test_a_capture_of_independent_classes_is_refused(tmp_path):
    batch = {"x": torch.randn(6, 4), "key": list(range(6))}
    options = {"vocab_size": CLASSES, "inputs": lambda batch: batch["x"], "teacher": "t", "progress": False}
    with pytest.raises(ValueError, match="the teacher ends in a sigmoid"):
        capture(nn.Sequential(Net(), nn.Sigmoid()), [batch], tmp_path, codec="dense", **options)


def image_model(dims=2):
    conv = nn.Conv2d if dims == 2 else nn.Conv1d
    return nn.Sequential(conv(2, 8, 1), nn.ReLU(), conv(8, CLASSES, 1))


def last(output, batch):
    return output.movedim(1, -1)


@pytest.mark.parametrize("shape", [(2, 2, 6, 7), (2, 2, 7)])
def test_classes_in_dimension_1_are_refused_or_moved(shape):
    dims = len(shape) - 2
    student, teacher, x = image_model(dims), image_model(dims), torch.randn(shape)
    with pytest.raises(
        ValueError, match="classes must be the last dimension, and a convolution puts them in dimension 1"
    ):
        distiller(student, teacher).step(x)
    loss = distiller(student, teacher, outputs=last).step(x)
    torch.testing.assert_close(loss, kl(*(model(x).detach().movedim(1, -1) for model in (student, teacher)), ...))


def test_four_dimensions_need_something_that_says_which_are_classes():
    student, teacher, x = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES), torch.randn(2, 3, 3, 4)
    with pytest.raises(ValueError, match="classes must be the last dimension, which nothing says here"):
        distiller(student, teacher).step(x)
    want = kl(student(x), teacher(x).detach(), ...)
    torch.testing.assert_close(distiller(student, teacher, outputs=lambda output, batch: output).step(x), want)
    labels = torch.zeros(2, 3, 3, dtype=torch.int64)
    torch.testing.assert_close(distiller(student, teacher).step((x, labels)), want)


def test_a_capture_of_images_says_where_classes_belong(tmp_path):
    batch = {"x": torch.randn(2, 2, 6, 7), "key": [0, 1]}
    options = {"vocab_size": CLASSES, "codec": "dense", "progress": False, "inputs": lambda batch: batch["x"]}
    with pytest.raises(ValueError, match="classes are the last dimension, outputs="):
        capture(image_model(), [batch], tmp_path, **options)
    report = capture(
        image_model(),
        [batch],
        tmp_path,
        outputs=lambda output, batch: output.movedim(1, -1).flatten(1, -2),
        **options,
    )
    assert report.rows == 2 * 6 * 7


@pytest.mark.parametrize("rows", [6, 1])
def test_a_capture_of_probabilities_is_refused(tmp_path, rows):
    teacher = Net(lambda logits: logits.softmax(-1))
    loader = [{"x": torch.randn(rows, 4), "key": list(range(n, n + rows))} for n in range(0, 4 * rows, rows)]
    options = {"vocab_size": CLASSES, "codec": "dense", "progress": False, "inputs": lambda batch: batch["x"]}
    with pytest.raises(ValueError, match=r"the rows are probabilities .* leave the teacher's softmax out"):
        capture(teacher, loader, tmp_path / "refused", **options)
    capture(teacher, loader, tmp_path / "log", outputs=lambda output, batch: output.log(), **options)
    labels = kdfast.cache.open(tmp_path / "log")[0].to_dense().values.softmax(-1)
    torch.testing.assert_close(labels, teacher.eval()(loader[0]["x"])[:1], rtol=0.05, atol=0.02)


def test_one_logit_is_no_cache(tmp_path):
    with pytest.raises(ValueError, match="a teacher with one logit has no distribution"):
        capture(Net(classes=1), [], tmp_path, vocab_size=1, codec="dense", progress=False)


# ---- the modules of a teacher ---------------------------------------------------------------------------------------

torch.manual_seed(0)
GLOBAL = Net()


class Holder:
    def __init__(self, model):
        self.parts = {"model": [model]}

    def __call__(self, x):
        return self.parts["model"][0](x)

    def run(self, x):
        return self(x)


class Ensemble:
    """Holds models, and is not called itself."""

    def __init__(self, *models):
        self.models = {"all": deque(models)}


ENSEMBLE = Ensemble(GLOBAL)


def by_default(x, model=GLOBAL):
    return model(x)


def by_global(x):
    return GLOBAL(x)


def by_another(x):
    return by_global(x)


class Hidden(nn.Module):
    """Keeps its models out of its parameters."""

    def __init__(self, *models):
        super().__init__()
        self.members = [models]

    def forward(self, x):
        return sum(model(x) for model in self.members[0])


class Aside(nn.Module):
    """Keeps a model out of its state, as people do who would not have it saved."""

    def __init__(self, model, name):
        super().__init__()
        object.__setattr__(self, name, model)

    def forward(self, x):
        held = vars(self)
        return (held["model"] if "model" in held else held["_models"][0])(x)


class Slotted:
    __slots__ = ("model",)

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x)


def of_class(model):
    class Teacher:
        net = model

        def __call__(self, x):
            return self.net(x)

        def run(self, x):
            return self(x)

        @staticmethod
        def static(x):
            return Teacher.net(x)

        @classmethod
        def of(cls, x):
            return cls.net(x)

    return Teacher


class Global:
    @property
    def model(self):
        return ENSEMBLE.models["all"][0]

    def by_property(self, x):
        return self.model(x)

    def by_another(self, x):
        return self(x)

    def __call__(self, x):
        return by_another(x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: Slotted(model),
        lambda model: of_class(model)(),
        lambda model: of_class(model)().run,
        lambda model: of_class(model).static,
        lambda model: of_class(model).of,
        lambda model: Global(),
        lambda model: Global().by_property,
        lambda model: Global().by_another,
        lambda model: (lambda kept: lambda x: kept()(x))(weakref.ref(model)),
        lambda model: Aside(model, "model"),
        lambda model: Aside(Holder(model), "model"),
        lambda model: Aside((model,), "_models"),
        lambda model: Hidden(model),
        lambda model: lambda x: model(x),
        lambda model: lambda x: (lambda y: model(y))(x),
        lambda model: partial(lambda model, x: model(x), model),
        lambda model: partial(model),
        lambda model: model.forward,
        lambda model: Holder(model),
        lambda model: Holder(model).run,
        lambda model: by_default,
        lambda model: by_global,
        lambda model: by_another,
        lambda model: lambda x: sum(model(x) for model in ENSEMBLE.models["all"]),
        lambda model: lru_cache(lambda x: model(x)),
        lambda model: torch.no_grad()(lambda x: model(x)),
    ],
)
def test_a_teacher_inside_a_function_is_evaluated(wrap, tmp_path):
    model, x = GLOBAL, torch.randn(6, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    want = model.eval()(x).detach()
    model.train()
    teacher = wrap(model)
    step = distiller(Net().eval(), teacher).forward(x)
    torch.testing.assert_close(step.teacher, want)
    batch = {"x": x, "key": list(range(6))}
    options = {"codec": "topk", "k": CLASSES, "value_dtype": "float32", "teacher": "t", "progress": False}
    capture(teacher, [batch], tmp_path, vocab_size=CLASSES, inputs=lambda batch: batch["x"], **options)
    labels = kdfast.cache.open(tmp_path)[0]
    stored = torch.empty(CLASSES).scatter(0, labels.ids.view(-1).long(), labels.values.view(-1))
    torch.testing.assert_close(stored, want[0].log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_module_of_outputs_is_evaluated_for_a_teacher():
    head, x = nn.Sequential(nn.BatchNorm1d(CLASSES), nn.Dropout(0.5)), torch.randn(6, 4)
    step = distiller(Net().eval(), GLOBAL, outputs=lambda output, batch: head(output)).forward(x)
    assert all(module.training for module in head.modules())
    assert head[0].num_batches_tracked == 1  # of the student's own call
    assert not step.teacher.requires_grad
    logits = GLOBAL.eval()(x)
    GLOBAL.train()
    torch.testing.assert_close(step.teacher, head.eval()(logits).detach())


# ---- what a mask and an output may look like ------------------------------------------------------------------------


class Tokens(nn.Module):
    """A causal model of few tokens, whose padding is told by the mask alone."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, CLASSES))

    def forward(self, input_ids, **others):
        return self.layers(input_ids).cumsum(1)


def padded():
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    mask[2, :3] = 0
    return {"input_ids": token_ids(3, 6) % 9, "attention_mask": mask}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "layout",
    [
        lambda batch: batch,
        lambda batch: UserDict(batch),
        lambda batch: {**batch, "attention_mask": batch["attention_mask"][:, None, None]},
        lambda batch: {**batch, "attention_mask": batch["attention_mask"].float()},
        lambda batch: (batch, None),
        lambda batch: [batch, torch.zeros(3, 6, dtype=torch.int64)],
    ],
)
def test_padding_never_counts_whatever_the_layout(layout, accumulate):
    student, teacher, batch = Tokens(1), Tokens(2), padded()
    with torch.no_grad():
        logits = student(**batch), teacher(**batch)
    real = batch["attention_mask"].bool()
    trained = distiller(student, teacher, optimizer=lambda x: torch.optim.SGD(x, 0.1), accumulate=accumulate)
    given = layout(batch)
    torch.testing.assert_close(trained.step(given).detach(), kl(*logits, real))
    record = trained.fit([given], epochs=1, progress=False)[0]
    assert record["loss"] == pytest.approx(float(kl(*logits, real)), rel=1e-5)


def test_a_mask_that_is_added_to_scores_is_refused():
    batch = padded()
    batch["attention_mask"] = (batch["attention_mask"] - 1) * 1e9
    with pytest.raises(ValueError, match="the attention_mask has negative numbers"):
        distiller(Tokens(1), Tokens(2)).step(batch)


def test_a_named_tuple_with_logits_is_one_output():
    Output = namedtuple("Output", "loss logits")

    class Named(Tokens):
        def forward(self, **inputs):
            return Output(torch.zeros(1), super().forward(**inputs))

    batch = padded()
    want = distiller(Tokens(1), Tokens(2)).step(batch)
    torch.testing.assert_close(distiller(Named(1), Named(2)).step(batch), want)
