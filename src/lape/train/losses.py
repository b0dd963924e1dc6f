"""What training minimises: DeiT's classification losses and its distillation losses. Logits are (B, C)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits_BC: Tensor, target: Tensor, *, smoothing: float = 0.0, bce: bool = False) -> Tensor:
    """The mean loss of a batch.

    Cross entropy -sum_c t_c log p_c, or, with `bce`, the mean over B and C of the binary cross entropy against
    [t_c > 0]: a mixed image then belongs to both of its classes (Wightman et al. 2021, DeiT III).

    Args:
        target: class numbers (B,), smoothed here; or probabilities (B, C) of Mixup, which has smoothed them already.
        smoothing: label smoothing s: t = (1 - s) onehot + s / C. Must be 0 with `bce`, or every class would be > 0.
    """
    if bce:
        assert smoothing == 0, "label smoothing makes every target positive"
        hot = F.one_hot(target, logits_BC.shape[1]) if target.ndim == 1 else target
        return F.binary_cross_entropy_with_logits(logits_BC, hot.gt(0).to(logits_BC.dtype))
    return F.cross_entropy(logits_BC, target, label_smoothing=smoothing if target.ndim == 1 else 0.0)


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor, *, kind: str, tau: float = 1.0) -> Tensor:
    """How far the student's distillation head is from the teacher (Touvron et al. 2021, section 3).

    hard: cross entropy with the teacher's class. soft: tau^2 / (B C) KL(teacher || student) at temperature tau;
    the mean over B *and* C is that of DeiT's code, C times smaller than the usual batch mean.
    """
    if kind == "hard":
        return F.cross_entropy(student_BC, teacher_BC.argmax(dim=1))
    assert kind == "soft", kind
    student, teacher = (F.log_softmax(logits.float() / tau, dim=1) for logits in (student_BC, teacher_BC))
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / student.numel()
