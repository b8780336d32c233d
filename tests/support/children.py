"""What tests run in processes of their own. A child imports it by name, which it cannot do with a test module."""

import os
import pickle

import torch
from torch import nn

from kdfast.cache import capture
from support.caches import VOCAB, write


def write_and_tell(path, codec, records, pipe):
    write(path, range(records), codec, announce=pipe.send)


def write_as(path, name, start):
    start.wait()
    write(path, range(int(name) * 100, int(name) * 100 + 30), writer=name)


def unpack(data, queue):
    queue.put(pickle.loads(data).unpack().values.numpy())


def gather_there(data, folder, keys, queue):
    os.chdir(folder)
    queue.put(len(pickle.loads(data).gather(keys)))


CAPTURE_BATCHES = 30
CAPTURES = {
    "topk": {"codec": "topk", "k": 3},
    "sample": {"codec": "sample", "draws": 6},
    "threshold": {"codec": "threshold", "tau": 0.1, "coding": "rows"},
    "prototype": {"codec": "prototype", "k": 2, "prototypes": 2},
}


def batches():
    """Batches of ids of several lengths."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(CAPTURE_BATCHES):
        ids = torch.randint(0, VOCAB, (3, 9), generator=generator)
        lengths = torch.randint(1, 10, (3, 1), generator=generator)
        yield {"input_ids": ids, "attention_mask": (torch.arange(9) < lengths).long()}


class Teacher(nn.Module):
    """Tells how often it has been called."""

    def __init__(self, tell=lambda count: None):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)
        self.tell, self.calls = tell, 0

    def forward(self, input_ids, attention_mask):
        self.calls += 1
        self.tell(self.calls)
        return self.head(self.embed(input_ids).cumsum(1))


def capture_and_tell(path, name, tell):
    """A capture that writes small blocks and shards. ``tell`` hears of every teacher pass, learning's included."""
    options = {"block_rows": 16, "shard_bytes": 900, "progress": False, **CAPTURES[name]}
    return capture(Teacher(tell), batches(), path, vocab_size=VOCAB, **options)


def capture_until_killed(path, name, pipe):
    capture_and_tell(path, name, pipe.send)
