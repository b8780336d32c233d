"""A run that is taken up is the run that was asked for: with any option changed, a checkpoint is refused by name."""

import copy
import inspect
import warnings
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

import kdfast
import kdfast.cache
from kdfast import Distiller, Divergence
from kdfast._description import Description, differences
from kdfast.distill import KD, inverse_decay
from kdfast.distill.arguments import FitOptions
from kdfast.distill.identity import Identity
from kdfast.loss.kd_loss import kd_loss
from support.distillers import CLASSES, FEATURES, data, quick, student, teacher


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    quick(monkeypatch)


FIELDS = set(FitOptions.__dataclass_fields__)
PLAN = {x.name: x.default for x in inspect.signature(Distiller.fit).parameters.values() if x.name in FIELDS}


def linear(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, CLASSES, **options)


def described(options=None, plan=None, loader=None, model=None, taught_by=None, evaluated=None):
    """The description of a run with those options, each part made anew, as another process does."""
    model = student() if model is None else model
    distiller = Distiller(model, teacher() if taught_by is None else taught_by, **(options or {}))
    torch.manual_seed(0)
    batches = [data(8, 0), data(8, 1)] if loader is None else loader
    return Identity(distiller, batches, evaluated, FitOptions(**{**PLAN, "epochs": 1, **(plan or {})})).texts()


def changed(one, other):
    return differences(described(**one), described(**other))


# ---- every option of the trainer ------------------------------------------------------------------------------------

SGD = torch.optim.SGD
OPTIONS = {
    "objective": [{"objective": KD()}, {"objective": KD(temperature=3.0)}],
    "optimizer": [{}, {"optimizer": lambda parameters: SGD(parameters, 1e-3)}],
    "lr": [{}, {"lr": 0.01}],
    "schedule": [{}, {"schedule": "cosine"}],
    "freeze": [{}, {"freeze": ["0.*"]}],
    "inputs": [{}, {"inputs": lambda batch: batch[0]}],
    "labels": [{"labels": lambda batch: batch[1]}, {"labels": lambda batch: batch[1] * 0}],
    "key": [{}, {"key": lambda batch: range(8)}],
    "outputs": [{}, {"outputs": lambda output, batch: output}],
    "mask": [{}, {"mask": "real"}],
    "cache_mask": [{}, {"cache_mask": lambda batch: None}],
    "amp": [{}, {"amp": torch.bfloat16}],
    "accumulate": [{}, {"accumulate": 2}],
    "clip_norm": [{"clip_norm": 1.0}, {"clip_norm": 2.0}],
    "teacher": [{}, {"taught_by": teacher(3)}],
}
# Where and how fast a run goes, and what is only checked; the student is compared by its architecture.
MAY_DIFFER = {"student", "compile", "folder", "device", "options", "compare_targets"}


@pytest.mark.parametrize("name", sorted(set(inspect.signature(Distiller).parameters) - MAY_DIFFER))
def test_another_option_of_the_trainer_is_another_run(name):
    one, other = ({"taught_by": x["taught_by"]} if "taught_by" in x else {"options": x} for x in OPTIONS[name])
    assert changed(one, one) == {}
    found = changed(one, other)
    place = {"lr": "optimizer.lr", "freeze": "optimizer.parameters"}.get(name, name)
    assert any(path.startswith(place) for path in found), found


FIT = {
    "eval_every": 2,
    "patience": 3,
    "monitor": "loss",
    "metrics": ["accuracy"],
    "eval_loader": [data(16)],
    "loader": [data(8, 0), data(8, 2)],
}
FIT_MAY_DIFFER = {"self", "epochs", "checkpoint_every", "log_every", "resume", "progress", "on_epoch"}


@pytest.mark.parametrize("name", sorted(set(inspect.signature(Distiller.fit).parameters) - FIT_MAY_DIFFER))
def test_another_option_of_fit_is_another_run(name):
    other = {"eval_loader": {"evaluated": FIT[name]}, "loader": {"loader": FIT[name]}}.get(name)
    assert any(path.startswith(name) for path in changed({}, other or {"plan": {name: FIT[name]}}))


@pytest.mark.parametrize("name", sorted(FIT_MAY_DIFFER - {"self", "epochs"}))
def test_what_a_run_logs_may_differ(name):
    value = print if name == "on_epoch" else 7
    assert changed({}, {"plan": {name: value}}) == {}


# ---- every option of the loss ---------------------------------------------------------------------------------------

LOSS = {
    "temperature": 3.0,
    "kd_weight": 0.25,
    "ce_weight": 0.25,
    "divergence": "reverse_kl",
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "ignore_index": -1,
    "row_weight": lambda step: torch.ones(8),
    "teacher_temperature": 1.0,
    "scale_by_t2": False,
    "shift": True,
    "backward": "recompute",
    "group": lambda step: None,
}
TAKEN = set(kd_loss.__kwdefaults__) - {"reduction", "num_items", "return_parts"}


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_another_option_of_the_loss_is_another_run(name):
    default = kd_loss.__kwdefaults__[name]
    value = LOSS.get(name, not default if isinstance(default, bool) else 12345)
    found = changed({}, {"options": {name: value}})
    assert found
    assert all(path.startswith(f"objective.{name}") for path in found)


def test_a_default_that_is_spelled_out_is_the_same_run():
    spelled = {"temperature": 2, "divergence": Divergence("forward_kl"), "shift": False}
    assert changed({}, {"options": spelled}) == {}
    assert changed({}, {"options": {"objective": KD()}}) == {}


@pytest.mark.parametrize("other", [Divergence("jsd", a=0.3), Divergence("forward_kl", standardize=True)], ids=str)
def test_another_parameter_of_a_divergence_is_another_run(other):
    assert any("divergence" in path for path in changed({}, {"options": {"divergence": other}}))


# ---- every option of the recipes ------------------------------------------------------------------------------------

R = kdfast.recipes


def one_feature(step):
    return step.logits, step.teacher


def another_feature(step):
    return step.logits * 2, step.teacher


# Per recipe and parameter: two values.
RECIPES = {
    "Adversarial": {"discriminator": (linear(), nn.Linear(4, 1)), "weight": (0.1, 0.2)},
    "GraphAttention": {"temperature": (0.1, 0.2)},
    "Combined": {"objectives": (KD(), KD(temperature=3.0)), "weights": ((0.5,), (0.25,))},
    "EachStudent": {"objectives": (KD(), KD(temperature=3.0))},
    "MutualLearning": {"own": (None, KD(kd_weight=0.1)), "peer_weight": (1.0, 0.5), "temperature": (1.0, 2.0)},
    "MultiTask": {
        "objectives": ({"a": KD()}, {"a": KD(temperature=3.0)}),
        "weights": ({"a": 1.0}, {"a": 0.5}),
        "labels": (lambda batch: batch[1], lambda batch: batch[0]),
    },
    "Unlabelled": {"objective": (KD(), KD(temperature=3.0))},
    "ProbabilityEnsemble": {"weights": ((0.5, 0.5), (0.1, 0.9)), "options": ({}, {"temperature": 3.0})},
    "LogitEnsemble": {"weights": (R.label_trust, (0.1, 0.9)), "options": ({}, {"temperature": 3.0})},
    "HardTargets": {"options": ({}, {"ignore_index": 3})},
    "ClassAttention": {
        "weights": (torch.ones(4), torch.arange(4.0)),
        "temperature": (2.0, 3.0),
        "keep_optimum": (True, False),
    },
    "EMATeacher": {"student": (linear(), nn.Linear(2, 2)), "decay": (0.9, 0.99), "warm_up": (True, False)},
    "sequence_level": {"word_weight": (0.0, 1.0), "temperature": (1.0, 2.0)},
    "soft_targets": {"temperature": (4.0, 3.0), "options": ({}, {"shift": True})},
    "focal_temperature": {"base": (8.0, 9.0), "beta": (0.9, 0.5), "gamma": (2.0, 1.0)},
    "entropy_temperature": {"share": (0.2, 0.3), "low": (0.25, 0.5), "high": (32.0, 16.0)},
    "anneal": {"start": (8.0, 4.0), "end": (1.0, 2.0), "shape": ("linear", "cosine")},
    "ramp_up": {"end": (1.0, 2.0), "share": (0.2, 0.3)},
    "sample_attention": {"score": (R.confidence, R.disagreement), "temperature": (1.0, 2.0)},
    "confident": {"threshold": (0.8, 0.9)},
    "class_attention": {"temperature": (1.0, 2.0)},
    **{
        name: {
            first: values,
            "by": ("ce", "kd"),
            "temperature": (1.0, 2.0),
            "shift": (False, True),
            "ignore_index": (-100, -1),
        }
        for name, first, values in (("hardest", "share", (0.5, 0.6)), ("focal", "gamma", (2.0, 1.0)))
    },
    "LoRALinear": {"base": (linear(), nn.Linear(8, 2)), "rank": (1, 2), "alpha": (1.0, 2.0)},
}
for _name in ("Adversarial", "GraphAttention"):
    RECIPES[_name]["features"] = one_feature, another_feature
# Loops give their options to the trainer or keep a plan; models and data are compared as such; others are functions of
# tensors, of which an objective's code or a partial tells.
NOT_OBJECTIVES = {
    *("AdaptiveKD", "Bootstrap", "BornAgain", "Chain", "CrossDomain", "Growing", "TeacherAssistants"),
    *("self_distillation", "Cohort", "CohortOutput", "Detections", "TaskOutput", "ViewedExamples"),
    *("add_lora", "merge_lora", "deepen", "widen", "discriminator", "teacher_sequences", "pad_sequences"),
    *("capture_views", "crop_and_flip", "noise_tokens", "random_view", "view_span", "temperature_of_entropy"),
    *("channel_wise_kd", "detection_kd", "gaussian_kd", "listwise_kd", "ranking_distillation", "regression_kd"),
    *("segmentation_kd", "teacher_bounded", "confidence", "disagreement", "label_trust", "row_losses"),
    *("fake_quantize", "bake", "FakeQuantizedLinear", "FakeQuantizedEmbedding", "drop_layers"),
}


@pytest.mark.parametrize(
    "options", [{"format": "int8"}, {"format": "int4", "group_size": 16}, None], ids=["format", "group", "plain"]
)
def test_a_student_rounded_otherwise_is_another_run(tmp_path, options):
    data = [{"input": torch.randn(2, 32), "labels": torch.zeros(2, dtype=torch.long)}]

    def fit(options):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(32, 3))
        if options is not None:
            R.fake_quantize(student, **options)
        Distiller(student, nn.Linear(32, 3), folder=tmp_path).fit(data, epochs=1, progress=False)

    fit({"format": "int4"})
    with pytest.raises(ValueError, match="is of another student"):
        fit(options)


def test_no_recipe_is_forgotten():
    assert set(R.__all__) == {*RECIPES, *NOT_OBJECTIVES}
    for name, values in RECIPES.items():
        assert set(inspect.signature(getattr(R, name)).parameters) == set(values), name


def built(name, **values):
    make = getattr(R, name)
    kinds = {x.name: x.kind for x in inspect.signature(make).parameters.values()}
    options = values.pop("options", {})
    places = [v for n, v in values.items() if kinds[n] in (0, 1, 2)]
    torch.manual_seed(0)
    return make(*places, **{n: v for n, v in values.items() if kinds[n] == 3}, **options)


def text_of(value):
    found = Description(restored=[value])
    found.add("objective", value)
    return found.folded()


@pytest.mark.parametrize(("name", "parameter"), [(name, each) for name in RECIPES for each in RECIPES[name]])
def test_another_option_of_a_recipe_is_another_run(name, parameter):
    values = {each: pair[0] for each, pair in RECIPES[name].items()}
    one, again = (text_of(built(name, **values)) for _ in range(2))
    assert differences(one, again) == {}
    assert differences(one, text_of(built(name, **{**values, parameter: RECIPES[name][parameter][1]})))


# ---- functions ------------------------------------------------------------------------------------------------------

TEMPERATURE = 4.0


class OneSlot:
    __slots__ = "weight"  # the name of the only one, without a tuple

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, step):
        return self.weight * step.loss


def test_a_slot_is_an_attribute():
    found = Description()
    found.add("objective", OneSlot(0.5))
    assert found.entries["objective.weight"] == "0.5"


def scheduled(start):
    def temperature(step, end=1.0, *, scale=1.0):
        return scale * (start + (end - start) * step.progress)

    return temperature


class Own:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, step):
        return self.weight * nn.functional.mse_loss(step.logits, step.teacher)


class Scaled(Own):
    def __call__(self, step):
        return 2 * super().__call__(step)


def method_of(weight):
    return Own(weight).__call__


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: scheduled(4.0), lambda: scheduled(8.0)),
        (lambda: lambda step: 4 - 3 * step.progress, lambda: lambda step: 8 - 3 * step.progress),
        (lambda: lambda step: step.epoch, lambda: lambda step: step.progress),
        (lambda: partial(kd_loss, temperature=1.0), lambda: partial(kd_loss, temperature=2.0)),
        (lambda: Own(1.0), lambda: Own(2.0)),
        (lambda: Own(1.0), lambda: Scaled(1.0)),
        (lambda: method_of(1.0), lambda: method_of(2.0)),
        (lambda: Own(SimpleNamespace(a=1)), lambda: Own(SimpleNamespace(a=2))),
        (lambda: Own(np.arange(20)), lambda: Own(np.arange(20) + 1)),
        (lambda: Own(torch.arange(20)), lambda: Own(torch.arange(20).float())),
        (lambda: Own([1, 2]), lambda: Own([1, 3])),
        (lambda: Own({"a": 1}), lambda: Own({"b": 1})),
        (lambda: Own({3, 4}), lambda: Own({3, 5})),
        (lambda: Own(nn.Linear), lambda: Own(nn.Conv2d)),
        (lambda: Own(linear()), lambda: Own(linear(1))),
        (lambda: inverse_decay(0.1), lambda: inverse_decay(0.2)),
        (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), lambda: nn.CrossEntropyLoss()),
    ],
)
def test_a_function_is_known_by_what_it_computes_with(one, other):
    assert differences(text_of(one()), text_of(one())) == {}
    assert differences(text_of(one()), text_of(other()))


def test_a_variable_that_a_function_uses_counts(monkeypatch):
    def objective(step):
        return TEMPERATURE * step.student.sum()

    before = text_of(objective)
    monkeypatch.setitem(globals(), "TEMPERATURE", 1.0)
    assert differences(before, text_of(objective)) == {"objective.TEMPERATURE": ("4.0", "1.0")}
    # An attribute of the same name is none.
    monkeypatch.setitem(globals(), "student", 3)
    assert list(differences(before, text_of(objective))) == ["objective.TEMPERATURE"]


class Settings:
    weight = 1.0


class Using:
    weight = 1.0

    def __call__(self, step):
        return self.weight * TEMPERATURE * step.student.sum()

    def temperature(self, step):
        return 4 - step.progress


def using_a_class(step):
    return Settings.weight * step.student.sum()


SETTINGS = ModuleType("settings")
SETTINGS.weight = 1.0


def using_a_file(step):
    return SETTINGS.weight * step.student.sum()


@pytest.mark.parametrize(
    ("objective", "place"),
    [
        (Using(), (Using, "weight")),
        (Using(), None),
        (using_a_class, (Settings, "weight")),
        (using_a_file, (SETTINGS, "weight")),
    ],
)
def test_settings_of_classes_and_files_count(monkeypatch, objective, place):
    before = text_of(objective)
    assert differences(before, text_of(objective)) == {}
    if place is None:
        monkeypatch.setitem(globals(), "TEMPERATURE", 1.0)
    else:
        monkeypatch.setattr(*place, 2.0)
    assert len(differences(before, text_of(objective))) == 1


def test_another_body_of_a_method_is_another_run(monkeypatch):
    before = text_of(Using().temperature)
    monkeypatch.setattr(Using, "temperature", Using.__call__)
    assert differences(before, text_of(Using().temperature))


def test_a_device_is_no_option():
    def on(device):
        return lambda batch: batch[0].to(device)

    one = text_of(on(torch.device("cpu")))
    assert differences(one, text_of(on(torch.device("cuda", 1)))) == {}
    assert differences(one, text_of(on("cuda:0"))) == {}
    assert differences(one, text_of(on(torch.float32)))


def test_code_of_another_version_of_python_is_not_compared():
    one = {"objective.code": "code of Python 3.10.1: 1234"}
    assert differences(one, {"objective.code": "code of Python 3.11.7: 5678"}) == {}
    assert differences(one, {"objective.code": "code of Python 3.10.1: 5678"})


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [lambda: linear(bias=False), lambda: nn.Sequential(linear()), lambda: linear().double()], ids=range(3)
)
def test_another_architecture_is_another_run(other):
    assert any(path.startswith("student") for path in changed({"model": linear()}, {"model": other()}))


class Forward(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        return self.layer(x)


class Halved(Forward):
    def forward(self, x):
        return self.layer(x) / 2


Halved.__qualname__ = Halved.__name__ = "Forward"


def test_another_forward_is_another_student():
    assert changed({"model": Forward()}, {"model": Forward()}) == {}
    assert list(changed({"model": Forward()}, {"model": Halved()})) == ["student.code"]


def test_a_compiled_student_is_the_same_and_is_resumed(tmp_path):
    compiled = torch.compile(linear(), backend="eager")
    assert changed({"model": linear()}, {"model": compiled}) == {}
    assert fit(tmp_path)[0] == fit(tmp_path, epochs=2, model=compiled)[0]
    assert set(torch.load(tmp_path / "last.pt")["student"]) == {"weight", "bias"}
    assert fit(tmp_path, epochs=3)[2]["epoch"] == 3


def test_initial_weights_may_differ_and_dropout_may_not():
    assert changed({"model": student(1)}, {"model": student(5)}) == {}
    other = student()
    other[3].p = 0.1
    assert list(changed({}, {"model": other})) == ["student.3.p"]


def test_a_part_in_evaluation_mode_is_another_run():
    other = student()
    other[1].eval()
    assert list(changed({}, {"model": other})) == ["student.in evaluation mode"]


def test_one_weight_of_the_teacher_makes_another_run():
    other = teacher()
    with torch.no_grad():
        other[0].weight[3, 2] += 1e-6
    assert list(changed({}, {"taught_by": other})) == ["teacher.weights"]
    x = linear(1)
    assert changed({"taught_by": lambda v: x(v)}, {"taught_by": lambda v: x(v)}) == {}
    y = linear(2)
    assert changed({"taught_by": lambda v: x(v)}, {"taught_by": lambda v: y(v)})
    assert changed({}, {"taught_by": (teacher(), teacher(3))})


def test_another_cache_is_another_run(tmp_path):
    def written(name, scale):
        with kdfast.cache.Writer(tmp_path / name, vocab_size=CLASSES, codec="dense", temperatures=(2.0,)) as writer:
            for key in range(16):
                writer.add(f"{key}", scale * torch.arange(float(CLASSES))[None])
        return kdfast.cache.open(tmp_path / name)

    one, same, other = written("a", 1.0), written("b", 1.0), written("c", 2.0)
    del same
    (tmp_path / "moved").mkdir()
    for file in (tmp_path / "a").iterdir():
        (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
    moved = kdfast.cache.open(tmp_path / "moved")
    assert changed({"taught_by": one}, {"taught_by": moved}) == {}
    assert list(changed({"taught_by": one}, {"taught_by": other})) == ["teacher"]


# ---- data -----------------------------------------------------------------------------------------------------------


class Pictures(Dataset):
    def __init__(self, names, noise=0.0):
        self.names, self.noise, self.open = names, noise, None

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        self.open = object()
        return torch.zeros(FEATURES), 0


def loading(dataset=None, batch=8, **options):
    return DataLoader(TensorDataset(*data()) if dataset is None else dataset, batch, **options)


def elastic(**options):
    sampler = kdfast.cache.ElasticSampler(48, **{"batch_size": 8, "seed": 3, **options})
    return DataLoader(TensorDataset(*data()), batch_sampler=sampler)


def bad(x, y):
    y = y.clone()
    y[7] = (y[7] + 1) % CLASSES
    return TensorDataset(x, y)


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        (loading, lambda: loading(batch=16), "loader.batch_size"),
        (loading, lambda: loading(drop_last=True), "loader.drop_last"),
        (loading, lambda: loading(shuffle=True), "loader.sampler"),
        (loading, lambda: loading(TensorDataset(*data(seed=1))), "loader.dataset.tensors[0]"),
        (loading, lambda: loading(bad(*data())), "loader.dataset.tensors[1]"),
        (loading, lambda: loading(TensorDataset(*data(40))), "loader.dataset.tensors[0]"),
        (loading, lambda: loading(collate_fn=lambda items: items), "loader.collate_fn"),
        (lambda: loading(generator=seeded(1)), lambda: loading(generator=seeded(2)), "loader.generator"),
        (
            lambda: loading(sampler=RandomSampler(range(48), num_samples=16)),
            lambda: loading(sampler=RandomSampler(range(48), num_samples=24)),
            "loader.sampler.num_samples",
        ),
        (lambda: loading(Pictures(["a", "b"])), lambda: loading(Pictures(["a", "c"])), "loader.dataset.names"),
        (lambda: loading(Pictures(["a"])), lambda: loading(Pictures(["a"], 0.1)), "loader.dataset.noise"),
        (elastic, lambda: elastic(batch_size=16), "loader.batch_size"),
        (elastic, lambda: elastic(seed=4), "loader.sampler.seed"),
        (lambda: [data(8)], lambda: [data(8, 1)], "loader[0][0]"),
        (lambda: [data(8)], lambda: [data(8), data(8)], "loader"),
        (lambda: [data(16)], lambda: [data(8)], "loader[0][0]"),
    ],
)
def test_other_data_is_another_run(one, other, place):
    assert changed({"loader": one()}, {"loader": one()}) == {}
    assert place in changed({"loader": one()}, {"loader": other()})


class Kept(Dataset):
    """Whose parts have private names, as a careful author's have."""

    def __init__(self, scale=1.0, files=("a",), transforms=()):
        self._scale, self._files, self.transforms = scale, list(files), list(transforms)
        self._file, self._read = None, {}

    def __len__(self):
        return 48

    def __getitem__(self, i):
        self._file, self._read[i] = object(), i
        return self._scale * torch.zeros(FEATURES), 0


class Doubled(Kept):
    def __getitem__(self, i):
        return 2 * torch.zeros(FEATURES), 0


Doubled.__qualname__ = Doubled.__name__ = "Kept"


class Blur:
    def __init__(self, radius):
        self.radius = radius

    def __call__(self, x):
        return x


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def both(scale):
    return torch.utils.data.ConcatDataset([TensorDataset(*data()), TensorDataset(scale * data()[0])])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Kept, lambda: Kept(2.0)),
        (Kept, lambda: Kept(files=("b",))),
        (Kept, Doubled),
        (lambda: Kept(transforms=[Blur(1)]), lambda: Kept(transforms=[Blur(2)])),
        (lambda: both(1.0), lambda: both(2.0)),
        (
            lambda: Items({f"{i}.png": i % 4 for i in range(100)}),
            lambda: Items({f"{i}.png": i % 5 for i in range(100)}),
        ),
    ],
)
def test_whatever_a_dataset_holds_counts(one, other):
    assert changed({"loader": loading(one())}, {"loader": loading(one())}) == {}
    assert changed({"loader": loading(one())}, {"loader": loading(other())})


def test_what_a_dataset_opened_and_remembers_is_no_other_data():
    used = Kept()
    used[0]
    assert changed({"loader": loading(Kept())}, {"loader": loading(used)}) == {}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.complex64, np.float32, np.int64])
def test_every_element_of_large_data_counts(kind):
    made = torch.arange(700_001)
    large = made.numpy().astype(kind) if isinstance(kind, type) else made.to(kind)
    for places in ([123_457], [700_000], [5, 6], [5, 5 + 4096]):
        other = large.copy() if isinstance(kind, type) else large.clone()
        # One value is another, or two have changed their places.
        other[places] = 0 if len(places) == 1 else other[places[::-1]]
        assert changed({"loader": [(large,)]}, {"loader": [(large + 0,)]}) == {}
        if not (kind is torch.bfloat16 and len(places) == 2 and large[places[0]] == large[places[1]]):
            assert changed({"loader": [(large,)]}, {"loader": [(other,)]})


def test_a_label_in_a_very_long_list_counts():
    labels = [i % 4 for i in range(50_000)]
    other = [*labels[:33_333], 5, *labels[33_334:]]
    assert changed({"loader": loading(Items(labels))}, {"loader": loading(Items(other))})


@pytest.mark.parametrize("place", [0, 40, 99])
def test_an_item_of_a_long_list_counts(place):
    def pairs(wrong=None):
        x, y = data(100)
        return [(x[i], int(y[i]) + (i == wrong)) for i in range(100)]

    assert changed({"loader": loading(pairs())}, {"loader": loading(pairs())}) == {}
    assert changed({"loader": loading(pairs())}, {"loader": loading(pairs(place))})


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_how_fast_data_is_loaded_may_differ():
    for options in ({"num_workers": 2}, {"num_workers": 2, "prefetch_factor": 4}, {"timeout": 0}):
        assert changed({"loader": loading()}, {"loader": loading(**options)}) == {}
    used, sampler = Pictures(["a"] * 48), BatchSampler(SequentialSampler(range(48)), 8, False)
    used[0]
    assert changed({"loader": loading(Pictures(["a"] * 48))}, {"loader": loading(used)}) == {}
    assert changed({"loader": loading()}, {"loader": DataLoader(TensorDataset(*data()), batch_sampler=sampler)}) == {}


def test_a_description_of_a_large_model_is_short():
    large = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)) for _ in range(200)))
    one = text_of(large)
    assert len(one) <= 400
    large[150][1].p = 0.2
    assert len(differences(one, text_of(large))) == 1


# ---- through fit ----------------------------------------------------------------------------------------------------


def fit(folder, *, epochs=2, batch=8, seed=0, loader=None, plan=None, model=None, **options):
    torch.manual_seed(seed)
    model = linear() if model is None else model
    taught_by = linear(1)
    torch.manual_seed(seed)
    distiller = Distiller(model, taught_by, folder=folder, **options)
    return distiller.fit(loading(batch=batch) if loader is None else loader, epochs=epochs, **(plan or {}))


def test_a_finished_run_is_told_and_another_one_is_refused(tmp_path, capsys):
    first = fit(tmp_path, temperature=4.0)
    capsys.readouterr()
    assert fit(tmp_path, temperature=4.0) == first
    assert f"resumed {tmp_path}/last.pt at epoch 2 of 2: nothing left to train\n" == capsys.readouterr().err
    with pytest.raises(
        ValueError,
        match=r"last.pt is of another objective: it is a run with objective.temperature=4.0; this one has 1.0. "
        "resume=False, or another folder, starts over",
    ):
        fit(tmp_path, temperature=1.0)
    with pytest.raises(ValueError, match=r"objective.temperature=4.0, optimizer.lr=0.001; this one has"):
        fit(tmp_path, temperature=1.0, lr=0.1)
    with pytest.raises(ValueError, match=r"loader.batch_size=8; this one has 16"):
        fit(tmp_path, temperature=4.0, batch=16)
    assert fit(tmp_path, temperature=1.0, plan={"resume": False})[0]["loss"] != first[0]["loss"]


def test_more_epochs_are_told_and_fewer_refused(tmp_path, capsys):
    fit(tmp_path)
    assert len(fit(tmp_path, epochs=3)) == 3
    error = capsys.readouterr().err
    assert "last.pt is of a run with epochs=2; this one has 3\n" in error
    assert f"resumed {tmp_path}/last.pt at epoch 2 of 3\n" in error
    with pytest.raises(ValueError, match=r"last.pt is in epoch 3, and epochs=2 are asked for"):
        fit(tmp_path)


def test_a_folder_is_the_one_that_it_was_when_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    R, options = kdfast.recipes, {"teacher_score": 1.0}
    made = [
        lambda folder: Distiller(linear(), linear(1), folder=folder),
        lambda folder: R.BornAgain(None, [linear()], folder=folder),
        lambda folder: R.Bootstrap(linear(), linear(1), folder=folder),
        lambda folder: R.Growing(linear(), linear(1), grow=copy.deepcopy, folder=folder),
        lambda folder: R.CrossDomain(linear(), linear(1), folder=folder),
        lambda folder: R.AdaptiveKD(linear(), linear(1), folder=folder, **options),
    ]
    for number, make in enumerate(made):
        for folder, place in ((f"run{number}", tmp_path), (f"~/run{number}", tmp_path / "home")):
            recipe = make(folder)
            monkeypatch.chdir("/")
            plan = {"eval_loader": [data(8)], "metrics": lambda *_: {"accuracy": 0.5}}
            plan |= {1: {}, 2: {"rounds": 1}, 4: {"rounds": 1}, 5: {"rounds": 1}}.get(number, {})
            (recipe.fit(None, [data(8)], epochs=2, **plan) if number == 4 else recipe.fit([data(8)], epochs=2, **plan))
            monkeypatch.chdir(tmp_path)
            assert list((place / f"run{number}").glob("**/last.pt"))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["home", *(f"run{number}" for number in range(6))]
    assert set(kdfast.distill.load_best("~/run0")) == {"weight", "bias"}


def test_another_seed_is_told(tmp_path, capsys):
    first = fit(tmp_path, seed=1)
    assert fit(tmp_path, seed=2) == first
    assert "is of a run with torch.initial_seed()=1; this one has 2" in capsys.readouterr().err


def test_a_second_fit_of_one_distiller_is_the_same_run(tmp_path):
    torch.manual_seed(0)
    model = student()
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=18)
    distiller = Distiller(model, teacher(), schedule=lambda optimizer, steps, epochs: cycle(optimizer), folder=tmp_path)
    batches = loading()
    assert len(distiller.fit(batches, epochs=1)) == 1
    assert len(distiller.fit(batches, epochs=3)) == 3


class Counted(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls, self.seen = layer, 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        return self.layer(x)


def test_what_counts_in_training_is_no_option(tmp_path):
    model, taught_by = Counted(linear()), Counted(linear(1))
    for epochs in (1, 2):
        assert len(Distiller(model, taught_by, folder=tmp_path).fit([data(8)], epochs=epochs)) == epochs
    model = Counted(linear())
    assert len(Distiller(model, Counted(linear(1)), folder=tmp_path).fit([data(8)], epochs=2)) == 2
    assert model.calls == 0


class Remembering(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        self.last = self.layer(x)
        return self.last


def test_what_a_model_remembers_is_no_option(tmp_path):
    model, taught_by = Remembering(linear()), Remembering(linear(1))
    for epochs in (1, 2, 3):
        assert len(Distiller(model, taught_by, folder=tmp_path).fit([data(8)], epochs=epochs)) == epochs
    again = Distiller(Remembering(linear()), Remembering(linear(1)), folder=tmp_path)
    assert len(again.fit([data(8)], epochs=4)) == 4


def test_all_is_silent_and_new_without_a_folder(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(None)[0]["loss"] == fit(None)[0]["loss"]
    assert capsys.readouterr().err == ""


def test_a_folder_stays_where_it_was_named(tmp_path, monkeypatch):
    """A chdir must not begin the run again somewhere else, ``~`` is the home, and a URL is no folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("run", "~/run"):
        assert Distiller(student(), teacher(), folder=path).folder == tmp_path / "run"
    with pytest.raises(ValueError, match="memory://run is a URL"):
        Distiller(student(), teacher(), folder="memory://run")
