"""Loading: identical labels whatever the workers and ranks, and a state that any number of ranks resumes from."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import kdfast.cache
from kdfast.cache import CacheDataset, ElasticSampler, pack_spans
from kdfast.cache.read.loader import permute

VOCAB = 11
SIZES = [i % 4 for i in range(40)]


@pytest.fixture
def cache(tmp_path):
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="topk", k=3, shard_bytes=400, block_rows=4) as w:
        for i, rows in enumerate(SIZES):
            w.add(i, torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(i)))
    return kdfast.cache.open(tmp_path)


def batches(dataset, sampler, **options):
    """Everything that an epoch gives, batch by batch."""
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, **options)
    result = []
    for examples, packed in loader:
        result.append((examples.tolist(), packed.unpack()))
        sampler.step()
    return result


def assert_same(got, want):
    assert [examples for examples, _ in got] == [examples for examples, _ in want]
    for (_, ours), (_, theirs) in zip(got, want, strict=True):
        for field in ("values", "ids", "offsets", "tails"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


# ---- the dataset ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_what_the_process_itself_gives(cache, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    dataset = CacheDataset(cache, range(40), torch.arange(40) * 10)
    want = batches(dataset, ElasticSampler(40, 8, seed=1))
    assert sorted(x for examples, _ in want for x in examples) == list(range(0, 400, 10))
    for examples, labels in want:
        direct = cache.gather([x // 10 for x in examples])
        assert torch.equal(labels.values, direct.values)
    got = batches(dataset, ElasticSampler(40, 8, seed=1), num_workers=2, multiprocessing_context=method)
    assert_same(got, want)


def test_labels_follow_the_order_of_the_keys(cache):
    order = np.random.default_rng(0).permutation(40)
    straight, shuffled = CacheDataset(cache, range(40)), CacheDataset(cache, cache.index(order.tolist()))
    place = np.argsort(order)
    for chosen in ([3, 0, 39], [7] * 3):
        _, ours = shuffled.collate([shuffled[int(place[i])] for i in chosen])
        _, theirs = straight.collate([straight[i] for i in chosen])
        assert torch.equal(ours.unpack().values, theirs.unpack().values)


@pytest.mark.parametrize("row_length", [7, 8])  # neither fills its rows
def test_packing_documents_otherwise_gives_each_token_the_same_label(cache, row_length):
    rows = pack_spans(SIZES, row_length)
    dataset = CacheDataset(cache, rows, [[doc for doc, _, n in row for _ in range(n)] for row in rows], collate=list)
    assert len(dataset) == len(rows)
    examples, packed = dataset.collate([dataset[i] for i in reversed(range(len(rows)))])
    assert len(packed) == row_length * len(rows)
    documents = [doc for row in examples for doc in row]
    labels = packed.unpack()
    assert labels.present.tolist() == [doc is not None for doc in documents]
    for doc in range(40):
        mine = labels[torch.tensor([d == doc for d in documents])]
        assert torch.equal(mine.values, cache[doc].values)


def test_a_dataset_pickles_and_keeps_its_examples(cache):
    dataset = pickle.loads(pickle.dumps(CacheDataset(cache, [3, (2, 0, 1)], TensorDataset(torch.tensor([7, 8])))))
    (examples,), packed = dataset.collate([dataset[0], dataset[1]])
    assert examples.tolist() == [7, 8]
    assert torch.equal(packed.unpack().values, cache.gather([3, (2, 0, 1)]).values)


def test_bad_datasets_are_named(cache):
    with pytest.raises(ValueError, match="each example needs a key, got 3 examples and 2 keys"):
        CacheDataset(cache, [1, 2], [0, 0, 0])
    with pytest.raises(KeyError, match="40 is not in"):
        CacheDataset(cache, [1, 40])


# ---- the sampler ------------------------------------------------------------------------------------------------


def take(sampler, steps):
    """The next batches, over the ends of epochs."""
    result = []
    while len(result) < steps:
        for batch in sampler:
            result.append(batch)
            sampler.step()
            if len(result) == steps:
                break
    return result


def ranks(size, batch, seed, world, state=None, **options):
    samplers = [ElasticSampler(size, batch, seed, rank, world, **options) for rank in range(world)]
    for sampler in samplers:
        if state is not None:
            sampler.load_state_dict(state)
    return samplers


def together(samplers, steps):
    """The global batches that the ranks take between them, in the global order."""
    parts = [take(sampler, steps) for sampler in samplers]
    return [[x for column in zip(*batch, strict=True) for x in column] for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [24, 28])
def test_any_number_of_ranks_resumes_in_the_same_order(size, drop_last):
    want = take(ElasticSampler(size, 8, seed=5, drop_last=drop_last), 12)
    for first, second in ((1, 4), (4, 2), (2, 1)):
        for stop in (1, 4, 7):
            before = ranks(size, 8, 5, first, drop_last=drop_last)
            got = together(before, stop)
            assert len({str(sampler.state_dict()) for sampler in before}) == 1
            state = pickle.loads(pickle.dumps(before[0].state_dict()))
            after = ranks(size, 8, 0, second, state, drop_last=drop_last)
            assert got + together(after, 12 - stop) == want


def test_an_epoch_has_every_sample_once_and_the_next_another_order():
    sampler = ElasticSampler(30, 7, seed=2)
    assert len(sampler) == 5
    first, second = take(sampler, 5), take(sampler, 5)
    for epoch in (first, second):
        assert sorted(x for batch in epoch for x in batch) == list(range(30))
        assert [len(batch) for batch in epoch] == [7, 7, 7, 7, 2]
    assert first != second
    assert take(ElasticSampler(30, 7, seed=3), 5) != first
    assert sampler.state_dict() == {"size": 30, "seed": 2, "epoch": 2, "samples_consumed": 0}


def test_the_order_is_the_same_for_ever():
    assert permute(np.arange(5), 1000, 42, 3).tolist() == [245, 844, 880, 963, 312]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_orders_are_permutations_that_differ(size):
    orders = {tuple(permute(np.arange(size), size, seed, epoch).tolist()) for seed in range(8) for epoch in range(8)}
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(orders) >= min(64, {1: 1, 2: 2, 3: 6}.get(size, 40))


def test_every_order_of_a_few_is_as_likely():
    counts = {}
    for seed in range(1200):
        order = tuple(permute(np.arange(3), 3, seed, 0).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 20.5  # chi-squared, 5 degrees of freedom, p = .001


def test_stopping_within_an_epoch_loses_and_repeats_nothing(cache):
    dataset = CacheDataset(cache, range(40), torch.arange(40))
    want = batches(dataset, ElasticSampler(40, 8, seed=1))
    sampler = ElasticSampler(40, 8, seed=1)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=2)
    got = []
    for examples, packed in loader:  # the workers are ahead of this loop when it stops
        got.append((examples.tolist(), packed.unpack()))
        sampler.step()
        if len(got) == 2:
            break
    later = ElasticSampler(40, 8)
    later.load_state_dict(sampler.state_dict())
    assert len(later) == 3
    assert_same(got + batches(dataset, later), want)


def test_a_forgotten_step_is_noticed():
    sampler = ElasticSampler(6, 3)
    assert len(list(sampler)) == 2
    with pytest.raises(RuntimeError, match="without a step"):
        list(sampler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "got size 0, batch_size 8"),
        ({"rank": 2}, r"rank in \[0, world_size\) .* got .*rank 2, world_size 2"),
        ({"batch_size": 9}, "batches of 9 out of 40, the last one of 4, cannot be shared by 2 ranks evenly"),
        ({"size": 41}, "the last one of 1, cannot be shared"),
        ({"size": 6, "drop_last": True}, "drop_last leaves nothing of 6 samples"),
    ],
)
def test_bad_samplers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ElasticSampler(**{"size": 40, "batch_size": 8, "world_size": 2, **arguments})


def test_a_state_of_another_corpus_is_refused():
    state = ElasticSampler(40, 8).state_dict()
    with pytest.raises(ValueError, match="the state is of a sampler of 40 samples, this one has 41"):
        ElasticSampler(41, 8).load_state_dict(state)
    with pytest.raises(ValueError, match="the last batch would have 6 samples, which 4 ranks cannot share"):
        ElasticSampler(40, 8, world_size=4).load_state_dict({**state, "samples_consumed": 2})
