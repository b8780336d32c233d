"""Distils on several processes with DDP: torchrun --nproc-per-node 2 examples/train_ddp.py"""

from torch.nn.parallel import DistributedDataParallel
from training import train

if __name__ == "__main__":
    train(DistributedDataParallel, __doc__)
