"""``kd_loss`` and ``KDLoss``, at the path that they had before 0.2."""

from kdfast.loss.kd_loss import KDLoss, LossParts, kd_loss

__all__ = ["KDLoss", "LossParts", "kd_loss"]
