"""Distillation: a student learns from a teacher's answers (Hinton et al. 2015) or from its features (FitNets).

The teacher sees the very input that the student sees, augmentation included (Beyer et al. 2022, 'a good teacher is
patient and consistent').
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.training.loop import BatchSource


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`, batch mean, in nats (Hinton et al. 2015, section 2).

    Both are logits `[B, classes]`. The factor keeps the gradient's scale; for a large T the gradient by a logit tends
    to `(z_s - mean z_s - z_t + mean z_t) / (B * classes)`.
    """
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, *, weight: float, temperature: float) -> Tensor:
    """`(1 - weight) * cross-entropy + weight * soft_target_loss`; `labels` `[B]`."""
    hard = F.cross_entropy(student, labels)
    return (1 - weight) * hard + weight * soft_target_loss(student, teacher, temperature)


def hint_loss(student: Tensor, teacher: Tensor, regressor: nn.Module) -> Tensor:
    """`1/2 * mean ||teacher - regressor(student)||^2` over the batch (Romero et al. 2015, equation 3).

    Args:
        student: features of the guided layer, `[B, C_s, H, W]`.
        teacher: features of the hint layer, `[B, C_t, H, W]`.
        regressor: maps the student's features to the teacher's shape; learned with the student, then thrown away.
    """
    difference: Tensor = teacher - regressor(student)
    return 0.5 * (difference**2).flatten(1).sum(dim=1).mean()


class TaughtBatches:
    """The batches of another source, whose targets also hold the teacher's logits: `[B, 1 + classes]`, label first."""

    def __init__(self, source: BatchSource, teacher: nn.Module) -> None:
        self.source, self.teacher = source, teacher.eval().requires_grad_(False)
        self.steps_per_epoch = source.steps_per_epoch

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs as they are; targets for `taught_loss`."""
        inputs, labels = self.source.batch(epoch, step)
        with torch.no_grad():
            logits = self.teacher(inputs).float()  # [B, classes]
        return inputs, torch.cat([labels[:, None].float(), logits], dim=1)


def taught_loss(weight: float, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`distillation_loss` for the targets of `TaughtBatches`."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        labels, teacher = targets[:, 0].long(), targets[:, 1:]
        return distillation_loss(logits, teacher, labels, weight=weight, temperature=temperature)

    return loss
