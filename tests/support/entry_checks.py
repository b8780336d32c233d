"""Rows, prototype tables and codecs that the tests of entry codecs share."""

import numpy as np
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


def through_bytes(codec, labels, wanted=None):
    """The labels, or the rows ``wanted`` of them, from the bytes of the block that they make."""
    block = np.frombuffer(codec.encode(labels), np.uint8)
    rows = np.arange(len(labels)) if wanted is None else np.array(wanted)
    unit = np.array([[0, len(block), len(labels)]])
    if codec.coding == "blocks":
        return codec.decode(block, unit, rows)
    spans = codec.locate(block, unit.repeat(len(rows), 0), rows)
    units = np.concatenate([spans, np.ones((len(rows), 1), np.int64)], 1)
    return codec.decode(block, units, np.arange(len(rows)))
