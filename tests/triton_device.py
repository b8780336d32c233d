"""Where the Triton kernels' tests run: on a GPU if there is one, else in Triton's interpreter."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
