"""What tests run in processes of their own. A child imports it by name, which it cannot do with a test module."""

import pickle

from cache_toys import write


def write_and_tell(path, codec, records, pipe):
    write(path, range(records), codec, announce=pipe.send)


def write_as(path, name, start):
    start.wait()
    write(path, range(int(name) * 100, int(name) * 100 + 30), writer=name)


def unpack(data, queue):
    queue.put(pickle.loads(data).unpack().values.numpy())
