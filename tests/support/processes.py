"""Runs a function on several processes of this machine that form a group; a dead one fails the test in bounded time."""

import os
import tempfile
from datetime import timedelta
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120  # that a process waits for another


def run(function, world, *arguments):
    """``function(rank, world, *arguments)`` on each of them. Raises what the first one to fail has raised."""
    place = function.__code__.co_filename, function.__name__
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(enter, (world, f"file://{Path(folder, 'store')}", place, arguments), nprocs=world)


def enter(rank, world, store, place, arguments):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=SECONDS)}
    dist.init_process_group("gloo", init_method=store, **options)
    # By its file: pytest's modules have no name that another process could import.
    file, name = place
    spec = spec_from_file_location(Path(file).stem, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(rank, world, *arguments)
    dist.barrier()  # nobody leaves while another still listens to it
    dist.destroy_process_group()
