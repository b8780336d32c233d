"""Distils with FSDP2, whose processes share out the weights: torchrun --nproc-per-node 2 examples/train_fsdp2.py

The loss is computed in the student's forward: there, and only there, each process sees whole weights.
"""

from torch.distributed.fsdp import fully_shard
from training import train

if __name__ == "__main__":
    train(fully_shard, __doc__)
