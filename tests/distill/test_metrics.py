"""Metrics against scikit-learn's and formulas, and what a model costs."""

import math

import pytest
import torch
from sklearn import metrics as sk
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from kdfast import Distiller, SoftLabels
from kdfast.distill import evaluate, footprint
from kdfast.distill.metrics import NAMES, Metrics
from support.distillers import CLASSES, FEATURES, data, student


@pytest.fixture
def rows():
    """The last class never occurs, as in a small test set."""
    torch.manual_seed(0)
    return torch.randn(60, 4) * 2, torch.randint(0, 3, (60,))


def measure(logits, labels, teacher=None, wanted=None):
    found = Metrics(wanted)
    for part in range(0, len(logits), 25):
        at = slice(part, part + 25)
        found.update(logits[at], labels[at], None if teacher is None else teacher[at])
    return found.compute()


def ece(probabilities, labels, bins=15):
    confidence, predicted = probabilities.max(-1)
    hit = (predicted == labels).float()
    bucket = (confidence * bins).ceil().long() - 1
    gaps = [((hit - confidence)[bucket == b]).sum().abs() for b in range(bins)]
    return float(sum(gaps) / len(labels))


def test_they_are_what_scikit_learn_computes(rows):
    logits, labels = rows
    p, guess = logits.double().softmax(-1), logits.argmax(-1)
    options = {"average": "macro", "zero_division": 0}
    areas = [sk.roc_auc_score(labels == c, p[:, c]) for c in range(3)]
    expected = {
        "accuracy": sk.accuracy_score(labels, guess),
        "precision": sk.precision_score(labels, guess, **options),
        "recall": sk.recall_score(labels, guess, **options),
        "f1": sk.f1_score(labels, guess, **options),
        "auroc": sum(areas) / 3,
        "ece": ece(p, labels),
        "cross_entropy": sk.log_loss(labels, p, labels=range(4)),
        "agreement": sk.accuracy_score(guess, guess.roll(1)),
    }
    assert measure(logits, labels, guess.roll(1)) == pytest.approx(expected, abs=1e-6)
    assert set(expected) == set(NAMES)


def test_the_area_of_one_class_is_none():
    found = measure(torch.randn(8, 3), torch.zeros(8, dtype=torch.long), wanted=["auroc"])
    assert math.isnan(found["auroc"])


def test_many_classes_have_fewer_metrics():
    assert set(measure(torch.randn(5, 1000), torch.arange(5), torch.arange(5))) == {
        "accuracy",
        "cross_entropy",
        "agreement",
    }


def test_one_s_own_are_given_probabilities(rows):
    found = measure(*rows, wanted={"top2": MulticlassAccuracy(4, top_k=2, average="micro")})
    top = rows[0].topk(2).indices
    assert found == pytest.approx({"top2": float((top == rows[1][:, None]).any(-1).float().mean())})
    with pytest.raises(ValueError, match="there is no accurracy"):
        Metrics(["accurracy"])


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.embed = nn.Embedding(7, 7)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.embed(input_ids)}


def test_a_causal_model_is_measured_at_the_next_tokens_without_padding():
    model, guide = Causal(), Causal()
    guide.embed.weight.data = guide.embed.weight.roll(1, 0).detach()
    ids = torch.randint(0, 7, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    found = evaluate(Distiller(model, guide, shift=True), [batch])
    guess, theirs = (m.embed.weight.argmax(-1)[ids] for m in (model, guide))
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert found["accuracy"] == pytest.approx(sum(bool(guess[i, j] == ids[i, j + 1]) for i, j in places) / 6)
    assert found["agreement"] == pytest.approx(sum(bool(guess[i, j] == theirs[i, j]) for i, j in places) / 6)


def test_labels_of_another_shape_are_refused():
    x, y = data(8)
    with pytest.raises(ValueError, match=r"labels must be \(8,\).*got \(8, 1\)"):
        evaluate(Distiller(student()), [(x, y[:, None])])


def test_draws_have_no_likeliest_class():
    """A sampler's labels cannot be compared with; everything else can."""
    x, y = data(8)
    draws = SoftLabels.weights(torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1), vocab_size=CLASSES)
    assert "agreement" not in evaluate(Distiller(student()), [((x, y), draws)])


def test_a_footprint_counts_and_times():
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    found = footprint(model, torch.randn(16, FEATURES), repeats=2)
    parameters = FEATURES * 8 + 8 + 16 + 8 * CLASSES + CLASSES
    assert found.parameters == parameters
    assert found.nbytes == 4 * (parameters + 16) + 8
    assert found.samples_per_second > 0
    assert found.peak_memory > 1 << 20
    assert model.training
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        footprint(model, torch.randn(16, FEATURES), repeats=0)


def test_a_shifted_distribution_is_of_the_next_token():
    model, ids = Causal(), torch.tensor([[0, 1, 2, 3]])
    following = model.embed.weight.argmax(-1)[ids].roll(1, -1)  # what each position's predecessor says
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    distiller = Distiller(model, shift=True)
    for labels in (following, nn.functional.one_hot(following, 7).float()):
        assert evaluate(distiller, [{**batch, "labels": labels}], ["accuracy"]) == {"accuracy": 1.0}


def test_metrics_of_torchmetrics_have_names():
    for metric in (MulticlassAccuracy(CLASSES), MetricCollection([MulticlassAccuracy(CLASSES)])):
        with pytest.raises(TypeError, match=f"got {type(metric).__name__}: give"):
            evaluate(Distiller(student()), [data(8)], metric)
