"""The codecs of entries: what they keep of a row, without bias where promised, and that bytes lose nothing of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
import kdfast.cache
from kdfast import SoftLabels
from kdfast.cache import codecs
from kdfast.cache.format.keys import make_key
from kdfast.cache.selection.learn_prototypes import learn_prototypes
from kdfast.cache.selection.prototypes import PrototypeTable
from kdfast.cache.selection.select import threshold, top
from support.entry_checks import VOCAB, learned, make_logits, make_prototypes, through_bytes


def by_id(labels):
    """Everything of the labels, entries by id within each row."""
    rows = np.repeat(np.arange(len(labels)), np.diff(labels.offsets.numpy()))
    order = np.lexsort((labels.ids.numpy(), rows))
    extra = [getattr(labels, name) for name in ("offsets", "tails", "prototype_ids")]
    return [labels.ids[order], labels.values[order], *(x for x in extra if x is not None)]


def assert_same(ours, theirs):
    for a, b in zip(by_id(ours), by_id(theirs), strict=True):
        assert torch.equal(a, b)


CODECS = st.sampled_from(
    [
        ("sample", {"draws": 1}),
        ("sample", {"draws": 23}),
        ("sample", {"draws": 300}),
        ("threshold", {"tau": 1.0}),
        ("threshold", {"tau": 0.05}),
        ("threshold", {"tau": 0.003, "steps": 3}),
        ("prototype", {"k": 0}),
        ("prototype", {"k": 1}),
        ("prototype", {"k": 3, "tail_step": 0.5, "share_step": 0.1}),
        ("prototype", {"k": 40}),
    ]
)


@settings(deadline=None, max_examples=80)
@given(
    codec=CODECS,
    coding=st.sampled_from(["blocks", "rows", "plain"]),
    with_table=st.booleans(),
    vocab=st.sampled_from([1, 2, 3, 50, VOCAB, 2**16 + 3, 2**17 + 3]),
    rows=st.sampled_from([1, 7, 33]),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 1.0, 4.0, 40.0]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_bytes_lose_nothing_of_what_was_selected(codec, coding, with_table, vocab, rows, seed, scale, masked):
    name, options = codec
    if with_table or name == "prototype":
        options = {**options, "prototypes": make_prototypes(vocab)}
    codec = codecs.create(name, vocab, (1.0,), {**options, "coding": coding})
    labels = codec.select(make_logits(rows, vocab, seed, scale, masked), b"key")
    learned(codec, labels)
    assert_same(through_bytes(codec, labels), labels)
    picked = [rows - 1, 0, rows // 2, 0]
    assert_same(through_bytes(codec, labels, picked), labels[picked])


@pytest.mark.parametrize("coding", ["blocks", "rows", "plain"])
@pytest.mark.parametrize("name", ["sample", "threshold", "prototype"])
@pytest.mark.parametrize("with_table", [True, False])
def test_every_coding_goes_through_files(tmp_path, name, coding, with_table):
    prototypes = {"prototypes": make_prototypes(VOCAB)} if with_table or name == "prototype" else {}
    logits = make_logits(9)
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec=name, coding=coding, **prototypes) as writer:
        writer.add("a", logits)
    found = kdfast.cache.open(tmp_path)["a"]
    codec = codecs.create(name, VOCAB, (1.0,), {"coding": coding, **prototypes})
    assert_same(found, codec.select(logits, make_key("a")))


@pytest.mark.parametrize("name", ["sample", "threshold"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_weights_are_unbiased_after_rounding(name, temperature):
    options = {"draws": 7} if name == "sample" else {"tau": 0.11, "steps": 2}
    logits = make_logits(1, 12, scale=1.5)
    redraws = 20_000
    codec = codecs.create(name, 12, (temperature,), options)
    labels = codec.select(logits.expand(redraws, -1), b"")
    row = torch.repeat_interleave(labels.offsets.diff())
    dense = torch.zeros(redraws, 12, dtype=torch.float64)
    dense[row, labels.ids.long()] = labels.values.double()
    probs = (logits[0].double() / temperature).softmax(0)
    error = (dense.mean(0) - probs) / (dense.std(0) / redraws**0.5 + 1e-9)
    assert error.abs().max() < 4  # of 12 columns; a bias of a hundredth of the rarest's probability would show
    assert (dense > 0).any(0).all()


def test_draws_are_a_function_of_seed_key_and_row():
    logits = make_logits(20)

    def select(key, seed=0, name="sample", rows=slice(None)):
        return by_id(codecs.create(name, VOCAB, (1.0,), {"seed": seed}).select(logits[rows], key))

    for name in ("sample", "threshold"):
        base = select(b"a", name=name)
        assert all(torch.equal(a, b) for a, b in zip(base, select(b"a", name=name), strict=True))
        for other in (select(b"b", name=name), select(b"a", 1, name)):
            assert len(other[0]) != len(base[0]) or not torch.equal(other[0], base[0])


def test_systematic_draws_round_a_probability_up_or_down():
    logits = make_logits(400)
    expected = 10 * logits.double().softmax(1)
    codec = codecs.create("sample", VOCAB, (1.0,), {"draws": 10})
    assert codec.sampling == "systematic"
    labels = codec.select(logits, b"")
    counts = torch.zeros_like(expected)
    counts[torch.repeat_interleave(labels.offsets.diff()), labels.ids.long()] = (labels.values * 10).double().round()
    assert (counts > expected.floor() - 1e-6).all()
    assert (counts < expected.ceil() + 1e-6).all()
    independent = codecs.create("sample", VOCAB, (1.0,), {"draws": 10, "sampling": "independent"})
    assert not torch.equal(independent.select(logits, b"").values, labels.values)


def test_caches_of_independent_draws_go_on_with_independent_draws(tmp_path):
    """Their configuration, of before there was a choice, does not name the sampling."""
    logits = make_logits(30)
    options = {"vocab_size": VOCAB, "codec": "sample", "draws": 6, "sampling": "independent"}
    with kdfast.cache.Writer(tmp_path, **options) as writer:
        writer.add("a", logits)
    cache = kdfast.cache.open(tmp_path)
    assert "sampling" not in cache.info.config
    assert cache.codec.sampling == "independent"
    with pytest.raises(kdfast.cache.CacheMismatchError, match="sampling"):
        kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="sample", draws=6)
    with kdfast.cache.Writer(tmp_path, **options) as writer:
        writer.add("b", logits)
    assert_same(
        kdfast.cache.open(tmp_path)["b"],
        codecs.create("sample", VOCAB, (1.0,), {"draws": 6, "sampling": "independent"}).select(logits, make_key("b")),
    )


def test_a_prototype_is_close_to_the_row_in_every_part():
    logits = make_logits(200, scale=2.5)
    probs = logits.double().softmax(1)
    options = {"k": 4, "prototypes": make_prototypes(), "tail_step": 0.25, "share_step": 0.25}
    codec = codecs.create("prototype", VOCAB, (1.0,), options)
    labels = codec.select(logits, b"")
    top, ids = probs.topk(4)
    assert torch.equal(labels.ids.view(-1, 4).sort(1).values, ids.int().sort(1).values)
    tail = 1 - top.sum(1)
    log_tail = labels.tails[0].double()
    assert (log_tail - torch.log1p(-log_tail.exp()) - tail.logit()).abs().max() <= 0.125 + 1e-5
    held = torch.zeros_like(probs).scatter(1, labels.ids.view(-1, 4).long(), labels.values.view(-1, 4).double())
    ratio = held.gather(1, ids) / top
    assert ratio.log().abs().max() < 4 * 0.125 + 0.125
    assert (held.sum(1) + log_tail.exp() - 1).abs().max() < 1e-6


@pytest.mark.parametrize("lead", [50.0, 120.0, 900.0])
def test_a_prototypes_entries_behind_a_lead_that_exponentials_do_not_reach(lead):
    logits = make_logits(4) - lead
    logits[:, 200] = 0.0
    logits[1, :298] = -math.inf  # leaves two columns
    labels = codecs.create("prototype", VOCAB, (1.0,), {"k": 4, "prototypes": make_prototypes()}).select(logits, b"")
    rows = labels.ids.split(labels.counts.tolist())
    wanted = [set(row.topk(4).indices.tolist()) & set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]
    assert [set(row.tolist()) for row in rows] == wanted


def test_the_shape_chosen_is_the_one_whose_label_is_closest():
    prototypes = make_prototypes(count=6)
    logits = make_logits(60, scale=2.0)
    probs = logits.double().softmax(1)
    top, ids = probs.topk(3)
    table = prototypes.table.double()
    table = table / table.sum(1, keepdim=True)
    divergence = []
    for shape in table:
        rest = shape.expand(60, -1).scatter(1, ids, 0.0)
        label = (rest / rest.sum(1, keepdim=True) * (1 - top.sum(1, keepdim=True))).scatter(1, ids, top)
        divergence.append((probs * (probs / label).log()).sum(1))
    divergence = torch.stack(divergence, 1)
    chosen = divergence.gather(1, prototypes.assign(probs, ids)[:, None])[:, 0]
    assert (chosen - divergence.min(1).values).max() < 1e-4


def test_a_sample_finds_a_shape_that_is_nearly_as_close():
    prototypes = make_prototypes(vocab=2000, count=16)
    logits = (make_logits(16, 2000, seed=9) + make_logits(16, 2000, seed=1, scale=2.0)).repeat(20, 1)
    likeliest = top(logits, temperature=1.0, k=3)
    drawn = threshold(logits, temperature=1.0, tau=1 / 2048, seed=0)
    probs = logits.softmax(1)
    best = prototypes.assign(probs, likeliest.ids.long())
    found = prototypes.assign_drawn(drawn, likeliest.ids, likeliest.rest)
    rest = probs.scatter(1, likeliest.ids.long(), 0.0)
    held = prototypes.table.T[likeliest.ids.long()].float().sum(1)
    score = rest @ prototypes.log_table - rest.sum(1, keepdim=True) * torch.log1p(-held)
    lost = (score.gather(1, best[:, None]) - score.gather(1, found[:, None]))[:, 0]
    assert lost.min() > -1e-5
    assert lost.mean() < 1e-3 < (score.amax(1) - score.mean(1)).mean() / 100
    assert len(best.unique()) > 8


@pytest.mark.parametrize("options", [("sample", {"draws": 9}), ("threshold", {"tau": 0.1})])
def test_a_row_of_weights_has_the_prototype_closest_to_the_whole_row(options):
    prototypes = make_prototypes(count=6)
    logits = make_logits(600, scale=1.5)
    labels = codecs.create(options[0], VOCAB, (1.0,), {**options[1], "prototypes": prototypes}).select(logits, b"")
    kl = -logits.softmax(1) @ prototypes.log_table
    assert (kl.gather(1, labels.prototype_ids[:, None])[:, 0] - kl.amin(1)).mean() < 1e-3
    assert len(labels.prototype_ids.unique()) > 1


def test_weights_without_their_rows_are_coded_in_the_prototype_that_finds_their_ids_the_likeliest():
    prototypes = make_prototypes(count=6)
    codec = codecs.create("sample", VOCAB, (1.0,), {"draws": 9, "prototypes": prototypes})
    labels = replace(codec.select(make_logits(60), b""), prototype_ids=None, prototypes=None)
    chosen = codec.to_rows(labels, codec.order).headers[:, 1]
    rows = np.split(labels.ids.numpy(), labels.offsets.numpy()[1:-1])
    assert chosen.tolist() == [int(prototypes.codes[:, row].sum(1, dtype=np.int64).argmin()) for row in rows]
    assert len(set(chosen.tolist())) > 1


def test_learned_shapes_tell_groups_of_rows_apart():
    centres = make_logits(5, scale=4.0, seed=3)
    member = torch.arange(400) % 5
    logits = centres[member] + 0.3 * make_logits(400, scale=1.0, seed=4)
    prototypes = learn_prototypes(lambda: logits.split(64), count=5, entries=2, seed=1)
    assert (len(prototypes), prototypes.vocab_size) == (5, VOCAB)
    probs = logits.softmax(1)
    assigned = prototypes.assign(probs, probs.topk(2).indices)
    groups = [set(assigned[member == i].tolist()) for i in range(5)]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == 5
    assert len(learn_prototypes(lambda: [logits[:70]], count=5)) == 2
    with pytest.raises(ValueError, match="learned from rows, and there is none"):
        learn_prototypes(lambda: [logits[:0]], count=5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_shapes_are_not_learned_of_rows_that_are_no_logits(value):
    logits = make_logits(100)
    logits[3] = -torch.inf if value is None else torch.where(torch.arange(VOCAB) == 7, value, logits[3])
    with pytest.raises(ValueError, match=r"rows that hold NaN or \+inf, or no finite value"):
        learn_prototypes(lambda: [logits], count=2)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        learn_prototypes(lambda: [make_logits(100)], count=2, temperature=0.0)


def test_a_shape_is_0_only_where_its_tail_is():
    tails = torch.tensor([[0.5, 0.5, 1e-30, 0.0], [0.0, 0.0, 0.0, 0.0]])
    table = PrototypeTable.of(tails, torch.full_like(tails, 0.25)).table
    assert (table > 0).tolist() == [[True, True, True, False], [True] * 4]
    assert table[0, 2] < 1e-9
    assert torch.equal(table[1], torch.full((4,), 0.25, dtype=torch.bfloat16))


def test_more_shapes_and_entries_bring_labels_closer():
    logits = make_logits(600, scale=2.5, seed=7) + make_logits(1, scale=2.0, seed=8)
    distance = {}
    for count, k in [(1, 0), (1, 1), (16, 1), (16, 8)]:
        prototypes = learn_prototypes(lambda: [logits], count=count, entries=k)
        codec = codecs.create("prototype", VOCAB, (1.0,), {"k": k, "prototypes": prototypes, "share_step": 0.05})
        labels = codec.select(logits, b"")
        distance[count, k] = kdfast.kd_loss(logits, labels).item()
    assert distance[1, 0] > distance[1, 1] > distance[16, 1] > distance[16, 8] > 0


def test_shapes_come_back_from_their_file():
    prototypes = make_prototypes()
    again = PrototypeTable.from_bytes(prototypes.to_bytes())
    assert again.digest == prototypes.digest
    assert torch.equal(again.table, prototypes.table)
    assert np.array_equal(again.order, prototypes.order)
    assert np.array_equal(np.sort(prototypes.order, 1), np.tile(np.arange(VOCAB), (4, 1)))
    assert np.array_equal(prototypes.order[:, :64], prototypes.favourites)
    assert (prototypes.table.float().sum(1) - 1).abs().max() < 0.01
    with pytest.raises(ValueError, match="is not a table of prototypes"):
        PrototypeTable.from_bytes(b"nonsense")
    codec = codecs.create("prototype", VOCAB, (1.0,), {"prototypes": prototypes})
    (name,) = codec.assets()
    assert name == f"shapes-{prototypes.digest}.safetensors"
    options = type(codec).options(codec.config(), lambda name: codec.assets()[name])
    assert type(codec)(VOCAB, (1.0,), **options).config() == codec.config()
    with pytest.raises(ValueError, match="have the digest"):
        type(codec).options(codec.config(), lambda name: make_prototypes(seed=1).to_bytes())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sample", {"draws": 0}, r"draws must lie in \[1, 2\*\*17\), got 0"),
        ("sample", {"sampling": "iid"}, r"sampling must be one of .* got 'iid'"),
        ("sample", {"coding": "L2"}, r"coding must be one of .* got 'L2'"),
        ("threshold", {"tau": 0.0}, r"tau must lie in \[2\*\*-16, 1\], got 0"),
        ("threshold", {"tau": float("nan")}, "tau must lie in"),
        ("threshold", {"steps": 0}, r"steps must lie in \[1, 1024\], got 0"),
        ("prototype", {"k": -1, "prototypes": make_prototypes()}, "k must not be negative, got -1"),
        ("prototype", {"tail_step": 0, "prototypes": make_prototypes()}, r"steps must lie in \[0.001, 2\] nats, got 0"),
        ("prototype", {"prototypes": make_prototypes(5)}, "the prototypes have 5 columns, the logits 300"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        codecs.create(name, VOCAB, (1.0,), options)


def test_other_misuse():
    with pytest.raises(TypeError, match=r"prototypes must be a kdfast.cache.PrototypeTable, got int"):
        codecs.create("prototype", VOCAB, (1.0,), {"prototypes": 3})
    with pytest.raises(ValueError, match="holds one temperature"):
        codecs.create("sample", VOCAB, (1.0, 2.0), {})
    codec = codecs.create("sample", VOCAB, (1.0,), {"draws": 5, "coding": "plain"})
    odd = SoftLabels.weights(torch.tensor([[3]]), torch.tensor([[0.3]]), vocab_size=VOCAB)
    with pytest.raises(ValueError, match="a weight is not one that this codec gives"):
        codec.encode(odd)


def test_rows_with_masked_columns_keep_off_them():
    logits = make_logits(50, masked=0.9)
    for name, options in [("sample", {}), ("threshold", {}), ("prototype", {"k": 60, "prototypes": make_prototypes()})]:
        labels = codecs.create(name, VOCAB, (1.0,), options).select(logits, b"")
        row = torch.repeat_interleave(labels.offsets.diff())
        assert logits[row, labels.ids.long()].isfinite().all()
