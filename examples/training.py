"""The training loop of the examples, on several processes: with GPUs each takes one, without they share the CPU."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from student import LanguageModel, batches, label
from torch import nn

from kdfast import global_items


def train(wrap: Callable[[nn.Module], nn.Module], about: str | None) -> None:
    """Distils for a number of steps, of which the first process prints the losses."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    torch.manual_seed(0)  # the same teacher and student everywhere
    teacher, student = LanguageModel(192).to(device), LanguageModel(96).to(device)
    wrapped = wrap(student)
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    for step, (ids, labels) in enumerate(batches(dist.get_rank(), steps, device)):
        # Rows with a label are not spread evenly: the mean is over all processes'.
        loss = wrapped(ids, label(teacher, ids), labels, global_items(labels, shift=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step}: {mean.item():.4f}", flush=True)
    dist.barrier()  # nobody leaves while another still listens to it
    dist.destroy_process_group()
