"""Rows, prototype tables and codecs that the tests of entry codecs share."""

import torch

from kdfast.cache.selection.prototypes import PrototypeTable

VOCAB = 300


def make_logits(rows, vocab=VOCAB, seed=0, scale=3.0, masked=0.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocab, generator=generator) * scale
    if masked:
        gone = torch.rand(rows, vocab, generator=generator) < masked
        gone[torch.arange(rows), z.argmax(1)] = False
        z[gone] = -torch.inf
    return z


def make_prototypes(vocab=VOCAB, count=4, seed=9):
    probs = make_logits(count, vocab, seed).softmax(1)
    return PrototypeTable.of(0.99 * probs + 0.01 / vocab, probs)


def learned(codec, labels):
    if codec.learn_rows:
        codec.use_model(codec.learn(labels))
    return codec
