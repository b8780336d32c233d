"""What ``kd_loss``'s options are called elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["OPTION_TERMS", "REDUCTION_TERMS"]

OPTION_TERMS: Mapping[str, str] = MappingProxyType(
    {
        "alpha": "ce_weight or kd_weight",
        "lambda_": "ce_weight or kd_weight",
        "lam": "divergence=kdfast.skew_forward_kl(lam), or kd_weight",
        "beta": "divergence=kdfast.jsd(beta), or kd_weight",
        "gamma": "kd_weight",
        "weight": "row_weight, or kdfast.objectives.class_weighted_ce",
        "class_weight": "kdfast.objectives.class_weighted_ce",
        "weights": "row_weight",
        "sample_weight": "row_weight",
        "mask": "row_weight",
        "loss_mask": "row_weight",
        "padding_mask": "row_weight",
        "attention_mask": "row_weight",
        "t": "temperature",
        "tau": "temperature",
        "temp": "temperature",
        "student_temperature": "temperature",
        "temperature_teacher": "teacher_temperature",
        "t2": "scale_by_t2",
        "kd_alpha": "kd_weight",
        "distill_weight": "kd_weight",
        "distillation_weight": "kd_weight",
        "soft_weight": "kd_weight",
        "hard_weight": "ce_weight",
        "z_loss": "z_weight",
        "smoothing": "label_smoothing",
        "epsilon": "label_smoothing",
        "target": "labels",
        "targets": "labels",
        "y": "labels",
        "ignore_label": "ignore_index",
        "pad_token_id": "ignore_index",
        "loss": "divergence",
        "loss_type": "divergence",
        "kind": "divergence",
        "kl": "divergence",
        "reduce": "reduction",
        "size_average": "reduction",
        "num_items_in_batch": "num_items",
        "shift_labels": "shift",
        "return_outputs": "return_parts",
        "process_group": "group",
        "tp_group": "group",
    }
)

REDUCTION_TERMS: Mapping[str, str] = MappingProxyType(
    {
        "batchmean": '"mean", which divides by the rows that count as PyTorch\'s "batchmean" does by samples',
        "avg": '"mean"',
        "average": '"mean"',
        "token_mean": '"mean"',
        "elementwise_mean": '"mean"',
        "total": '"sum"',
        "add": '"sum"',
        "no": '"none"',
    }
)
