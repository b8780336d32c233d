"""Relations between a batch's samples: the student's geometry is to be the teacher's, whatever its coordinates.

All take (N, ...) features, flattened to (N, D), whose widths may differ. With too few samples to relate, one for pairs
and two for triples and neighbours, the loss is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.loss.kd_loss import kd_loss
from kdfast.objectives._vectors import check_features, gram, mean_of, unit, widened

__all__ = ["pkt", "rkd_angle", "rkd_distance", "similarity_preserving"]


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over pairs of huber(d_s / mean d_s - d_t / mean d_t), with d the pair's distance.

    RKD-D (Park et al. 2019), whose means are over distinct pairs; the authors' code also counts a sample with itself.
    Two samples that coincide have the distance 0 and no gradient from it.

    Raises:
        TypeError, ValueError: no features, other numbers of samples, or a teacher that requires grad.
    """
    x_s, x_t = _vectors(student, teacher)
    if len(x_s) < 2:
        return x_s[:0].sum()  # the gradient of F.pdist of nothing divides by zero
    d_s, d_t = F.pdist(x_s), F.pdist(x_t)
    return mean_of(F.smooth_l1_loss(_over_mean(d_s), _over_mean(d_t), reduction="none"))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over triples (i, j, k) of huber(cos_s - cos_t), with cos that of the angle at j.

    RKD-A (Park et al. 2019) over triples of distinct samples, in O(N^2 D + N^3) memory. Where i or k coincides with j
    the cosine is 0, without a gradient.

    Raises:
        TypeError, ValueError: no features, other numbers of samples, or a teacher that requires grad.
    """
    cos_s, cos_t = (_cosines(x) for x in _vectors(student, teacher))
    other = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    distinct = other[:, :, None] & other[:, None, :] & other
    return mean_of(F.smooth_l1_loss(cos_s, cos_t, reduction="none"), distinct)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """|G_s - G_t|^2 / N^2, with G the matrix of inner products, each row over its length (SP, Tung & Mori 2019).

    Raises:
        TypeError, ValueError: no features, other numbers of samples, or a teacher that requires grad.
    """
    g_s, g_t = (unit(gram(x)) for x in _vectors(student, teacher))
    return mean_of((g_s - g_t).square())


def pkt(student: Tensor, teacher: Tensor, *, backward: str = "fused") -> Tensor:
    """The mean over j of KL(p_j || q_j), with p_j(i) = k_ij / sum over l != j of k_lj and k = (1 + cos) / 2.

    Probabilistic knowledge transfer (Passalis & Tefas 2018) with the cosine kernel. As in the paper, a sample is not
    its own neighbour. The authors' code takes the mean over all N^2 pairs and counts a sample with itself: their weight
    is to be divided by N^2 / (N - 1) here, some 66 at N = 64. Kernels are at least float32's rounding: a teacher's
    neighbour on the student's opposite side costs much, and not everything. ``backward`` is ``kd_loss``'s: "eager" for
    second derivatives.

    Raises:
        TypeError, ValueError: no features, other numbers of samples, or a teacher that requires grad.
    """
    x_s, x_t = _vectors(student, teacher)
    if len(x_s) < 3:  # of one neighbour the similarity is all there is
        return x_s[:0].sum()
    return kd_loss(_log_kernel(x_s), _log_kernel(x_t), backward=backward)


def _vectors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    check_features(student, teacher)
    return widened(student.flatten(1)), widened(teacher.flatten(1))


def _over_mean(distances: Tensor) -> Tensor:
    # Only where all samples coincide is the mean 0, and so is every distance.
    return distances / mean_of(distances).clamp(min=torch.finfo(distances.dtype).tiny)


def _cosines(x: Tensor) -> Tensor:
    """(N, N, N): [j, i, k] is the cosine between i and k as seen from j."""
    return gram(unit(x[None] - x[:, None]))


def _log_kernel(x: Tensor) -> Tensor:
    """(N, N - 1) log-similarities of each sample to the others."""
    n = len(x)
    others = ~torch.eye(n, dtype=torch.bool, device=x.device)
    kernel = (0.5 + 0.5 * gram(unit(x)))[others].view(n, n - 1)
    # The cosine of opposite vectors has no gradient that this would take away.
    return kernel.clamp(min=torch.finfo(torch.float32).eps).log()
