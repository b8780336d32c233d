"""Every kind of teacher that a head's loss takes, of the same hidden states."""

import torch

from kdfast import Head, SoftLabels
from kdfast.labels.head import OutputLayer

TEACHERS = ["logits", "head", "topk", "weights", "prototype", "dense", "hidden"]


def make_teacher(kind, states, layer):
    """Of (rows, d) states and a (vocabulary, d) layer."""
    logits, rows, vocab = states @ layer.T, len(states), len(layer)
    top, ids = logits.log_softmax(-1).topk(4)
    tail = torch.log1p(-top.exp().sum(-1))
    if kind == "logits":
        return logits
    if kind == "head":
        return Head(states, layer)
    if kind == "hidden":
        return SoftLabels.hidden(states, OutputLayer(layer))
    if kind == "dense":
        return SoftLabels.dense(logits)
    if kind == "topk":
        return SoftLabels.topk(ids, top.float(), tail[None], vocab_size=vocab)
    if kind == "weights":
        return SoftLabels.weights(ids, top.exp().float(), vocab_size=vocab)
    table = torch.rand(3, vocab, generator=torch.Generator().manual_seed(1))
    return SoftLabels.prototype(ids, top.exp().float(), tail, torch.arange(rows) % 3, table, vocab_size=vocab)
