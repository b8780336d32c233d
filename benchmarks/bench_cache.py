"""pytest-benchmark's view of the cache: each codec's way from logits to bytes, and back to labels.

`kdfast bench cache` sets bytes against noise and KL on a real teacher; this is for watching the times:
`pytest benchmarks --benchmark-autosave`, later `--benchmark-compare`.
"""

import pytest
import torch

import kdfast.cache
from kdfast.bench.cache import ARMS
from kdfast.bench.cache_speed import one_thread
from kdfast.cache.selection.learn_prototypes import learn_prototypes

ROWS, VOCAB, RECORDS = 128, 8192, 8
NAMES = [name for name in ARMS if "1024" not in name]


@pytest.fixture(scope="module")
def logits():
    # 1 / rank, as words have it, and every row its own likeliest ones.
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randperm(VOCAB, generator=generator) + 1
    return -1.3 * ranks.log() + 1.5 * torch.randn(ROWS, VOCAB, generator=generator)


@pytest.fixture(scope="module")
def prototypes(logits):
    return learn_prototypes(lambda: [logits], count=16)


@pytest.fixture
def packed(logits, prototypes, tmp_path, request):
    """Some records, from files and still compressed."""
    arm = ARMS[request.param]
    extra = {"prototypes": prototypes} if arm.prototypes else {}
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec=arm.codec, **arm.options, **extra) as writer:
        for key in range(RECORDS):
            writer.add(key, logits)
    return kdfast.cache.open(tmp_path).pack(range(RECORDS))


@pytest.mark.parametrize("packed", NAMES, indirect=True)
def test_write(benchmark, packed, logits):
    benchmark.group = "select and encode"
    codec = packed.codec
    with one_thread():
        benchmark.pedantic(lambda: codec.encode(codec.select(logits, bytes(16))), rounds=10, warmup_rounds=1)
    benchmark.extra_info["tokens"] = ROWS


@pytest.mark.parametrize("packed", NAMES, indirect=True)
def test_read(benchmark, packed):
    benchmark.group = "decode"
    with one_thread():
        benchmark.pedantic(packed.unpack, rounds=10, warmup_rounds=1)
    benchmark.extra_info["tokens"] = len(packed)
    benchmark.extra_info["bytes"] = packed.data.numel()


def test_logsumexp(benchmark, logits):
    benchmark.group = "select and encode"
    with one_thread():
        benchmark.pedantic(lambda: torch.logsumexp(logits, 1), rounds=10, warmup_rounds=1)
