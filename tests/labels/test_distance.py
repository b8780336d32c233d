"""How far labels lie from the rows that they stand for: of each kind, against sums over columns in plain Python."""

import math

import pytest
import torch

from kdfast.labels import Floor, OutputLayer, SoftLabels
from kdfast.labels.distance import distances

VOCAB = 7


def teacher(rows=3, masked=False):
    logits = torch.randn(rows, VOCAB, dtype=torch.float64) * 2
    if masked:
        logits[0, 2] = -math.inf
    return logits


def softmax(row, temperature=1.0):
    top = max(row)
    mass = [math.exp((z - top) / temperature) for z in row]
    return [m / math.fsum(mass) for m in mass]


def kl(p, q):
    return math.fsum(a * math.log(a / b) if b else math.inf for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_whole_rows_differ_by_what_was_rounded(temperature, masked):
    logits = teacher(masked=masked)
    rounded = (logits * 4).round() / 4
    found = distances(logits, SoftLabels.dense(rounded), temperature)
    for i, row in enumerate(logits.tolist()):
        p = softmax(row, temperature)
        assert float(found.kl[i]) == pytest.approx(kl(p, softmax(rounded[i].tolist(), temperature)), abs=1e-12)
        assert float(found.entropy[i]) == pytest.approx(-math.fsum(x * math.log(x) for x in p if x), abs=1e-12)
    assert found.left_open.tolist() == [0.0] * 3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_lies_as_far_as_its_classes_and_leaves_the_tail_open(temperature):
    logits = teacher()
    log_probs, ids = logits.log_softmax(1).topk(2)
    stored = log_probs + torch.tensor([[0.1, -0.2]])
    stored[2, 1] = -math.inf  # padding, whose id may be another entry's
    ids[2, 1] = ids[2, 0]
    tails = torch.tensor([[0.3, 0.2, 0.5]]).log()
    labels = SoftLabels.topk(ids, stored, tails, vocab_size=VOCAB, temperatures=(temperature,))
    found = distances(logits, labels, temperature)
    for i, row in enumerate(logits.tolist()):
        p, rest = softmax(row, temperature), float(tails[0, i].exp())
        kept = ids[i].tolist()[: 2 if i < 2 else 1]
        shares = [math.exp(x / temperature) for x in stored[i].tolist()[: len(kept)]]
        q = [x / math.fsum(shares) * (1 - rest) for x in shares]
        others = [x for j, x in enumerate(p) if j not in kept]
        mass = math.fsum(others)
        assert float(found.kl[i]) == pytest.approx(kl([*(p[j] for j in kept), mass], [*q, rest]), abs=5e-7)
        whole = [rest / len(others)] * VOCAB
        for j, x in zip(kept, q, strict=True):
            whole[j] = x
        assert float(found.kl[i] + found.left_open[i]) == pytest.approx(kl(p, whole), abs=5e-7)


def test_a_label_without_a_tail_is_infinitely_far_from_a_row_that_has_one():
    logits = teacher(2)
    logits[1, 1:] = -math.inf
    labels = SoftLabels.topk(
        torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1), torch.full((2,), -math.inf), vocab_size=VOCAB
    )
    assert distances(logits, labels, 1.0).kl.tolist() == [math.inf, 0.0]


def test_prototypes_lie_as_far_as_their_shape_of_the_tail():
    logits, table = teacher(), torch.rand(2, VOCAB)
    table[1] = torch.eye(VOCAB)[4]
    probs, ids = logits.softmax(1).topk(2)
    ids[2] = torch.tensor([4, 1])  # all that its prototype has
    tails = torch.tensor([0.2, 0.4, 0.1]).log()
    which = torch.tensor([0, 0, 1])
    labels = SoftLabels.prototype(ids, probs.float(), tails, which, table, vocab_size=VOCAB)
    found = distances(logits, labels, 1.0)
    for i, row in enumerate(logits.tolist()):
        entries, rest = dict(zip(ids[i].tolist(), probs[i].tolist(), strict=True)), float(tails[i].exp())
        total = math.fsum(entries.values())
        shape = [0.0 if j in entries else x for j, x in enumerate(table[which[i]].tolist())]
        rest = rest if any(shape) else 0.0
        q = [
            entries[j] / total * (1 - rest) if j in entries else rest * x / (sum(shape) or 1)
            for j, x in enumerate(shape)
        ]
        assert float(found.kl[i]) == pytest.approx(kl(softmax(row), q), abs=5e-7)
    assert found.kl[:2].isfinite().all()
    assert found.kl[2] == math.inf  # beside the entries there is nothing
    assert found.left_open.tolist() == [0.0] * 3
    logits[2, [0, 2, 3, 5, 6]] = -math.inf  # nor has the row anything there
    assert float(distances(logits, labels, 1.0).kl[2]) == pytest.approx(kl(softmax(logits[2].tolist()), q), abs=5e-7)


def test_hidden_states_are_compared_as_logits():
    layer = OutputLayer(torch.randn(VOCAB, 4), softcap=5.0)
    hidden = torch.randn(3, 4)
    found = distances(layer.logits(hidden), SoftLabels.hidden(hidden.bfloat16(), layer), 2.0)
    want = distances(layer.logits(hidden), SoftLabels.dense(layer.logits(hidden.bfloat16())), 2.0)
    assert torch.equal(found.kl, want.kl)
    assert 0 < float(found.kl.max()) < 1e-3


def test_draws_are_no_distribution_to_be_far_from():
    labels = SoftLabels.weights(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), vocab_size=VOCAB)
    assert distances(teacher(), labels, 1.0) is None


def test_many_rows_are_taken_a_few_at_a_time(monkeypatch):
    logits = teacher(10)
    labels = SoftLabels.dense(logits.half())
    whole = distances(logits, labels, 1.0)
    monkeypatch.setattr("kdfast.labels.distance.CHUNK", 3 * VOCAB)
    for ours, theirs in zip(distances(logits, labels, 1.0), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


# ---- in words, and beside the labels --------------------------------------------------------------------------------


def test_a_floor_says_its_share_and_what_it_is_of():
    floor = Floor(0.43, 0.012, 2.15, 0.0, 1555, 1.0)
    assert floor.share == pytest.approx(0.2)
    assert floor.text() == "0.43 ± 0.01 nats, 20 % of the rows' entropy (KL(teacher || label), 1,555 rows measured)"
    open_ = floor._replace(kl=1e-8, left_open=0.31).text()
    assert open_.startswith("below 1e-6 nats; the tail's shape, 0.31 nats, is left open (KL")
    assert floor._replace(kl=math.inf).text().startswith("infinite: labels rule out columns that the teacher allows (")
    assert (floor._replace(entropy=0.0).share, floor._replace(kl=0.0, entropy=0.0).share) == (math.inf, 0.0)


def test_labels_of_two_floors_together_have_none():
    one = SoftLabels.dense(torch.randn(2, VOCAB))
    floor = Floor(0.1, 0.01, 2.0, 0.0, 50, 1.0)
    measured = SoftLabels.from_fields({**one.to_fields(), "floor": floor})
    assert one.floor is None
    assert measured[:1].floor == measured.to("cpu").floor == SoftLabels.cat([measured, measured]).floor == floor
    assert SoftLabels.cat([measured, one]).floor is None
