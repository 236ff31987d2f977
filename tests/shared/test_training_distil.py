"""Distillation losses against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shared.training.distil import TaughtBatches, distillation_loss, hint_loss, soft_target_loss, taught_loss


def test_soft_targets_by_hand():
    """Two classes, T = 2: teacher (2, 0) gives q = sigmoid(1), student (0, 0) gives one half."""
    q = torch.sigmoid(torch.tensor(1.0))
    expected = 4 * (q * torch.log(2 * q) + (1 - q) * torch.log(2 * (1 - q)))
    loss = soft_target_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), 2.0)
    torch.testing.assert_close(loss, expected)


def test_gradient_at_high_temperature_matches_the_logits():
    """Hinton et al. 2015, equation 4: (z_s - z_t) / N for centred logits, a batch of one."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    student, teacher = (z - z.mean() for z in (student, teacher))
    student.requires_grad_(True)
    soft_target_loss(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 10, atol=1e-4, rtol=1e-3)


def test_gradient_is_the_difference_of_the_probabilities():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    soft_target_loss(student, teacher, 3.0).backward()
    expected = 3 * (F.softmax(student / 3, 1) - F.softmax(teacher / 3, 1)) / 3  # T, and the batch of 3
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_mixture(weight):
    student, teacher, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    expected = (1 - weight) * F.cross_entropy(student, labels) + weight * soft_target_loss(student, teacher, 4.0)
    torch.testing.assert_close(distillation_loss(student, teacher, labels, weight=weight, temperature=4.0), expected)
    targets = torch.cat([labels[:, None].float(), teacher], dim=1)
    torch.testing.assert_close(taught_loss(weight, 4.0)(student, targets), expected)


def test_hint_by_hand():
    regressor = nn.Conv2d(1, 2, 1, bias=False)
    nn.init.ones_(regressor.weight)
    student, teacher = torch.full((2, 1, 1, 1), 3.0), torch.ones(2, 2, 1, 1)
    assert hint_loss(student, teacher, regressor).item() == 0.5 * (2**2 + 2**2)


def test_teacher_sees_what_the_student_sees():
    class Source:
        steps_per_epoch = 7

        def batch(self, epoch, step):
            return torch.full((2, 3), float(10 * epoch + step)), torch.tensor([1, 4])

    teacher = nn.Linear(3, 5)
    taught = TaughtBatches(Source(), teacher)
    inputs, targets = taught.batch(2, 3)
    assert taught.steps_per_epoch == 7
    assert targets[:, 0].tolist() == [1, 4]
    torch.testing.assert_close(targets[:, 1:], teacher(inputs))
    assert not targets.requires_grad
