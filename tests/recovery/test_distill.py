"""The distillation loss is the divergence of the paper, in the precision it needs, and teaches the student only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradprune as gp


@given(st.integers(0, 1000), st.floats(0.5, 10.0), st.sampled_from([(3,), (4, 3), (2, 5, 3)]))
def test_the_distillation_loss_is_the_divergence_at_that_temperature(
    seed: int, temperature: float, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = (torch.softmax(logits / temperature, -1) for logits in (teacher, student))
    expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
    torch.testing.assert_close(gp.distill_loss(student, teacher, temperature), expected)


def test_the_distillation_loss_is_zero_for_equals_and_teaches_the_student_only() -> None:
    student, teacher = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    assert gp.distill_loss(student, student.detach(), 3.0).item() == pytest.approx(0.0, abs=1e-6)
    gp.distill_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_wrong_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        gp.distill_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2\), \(1, 3\)"):
        gp.distill_loss(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="no logits"):
        gp.distill_loss(torch.zeros(0, 2), torch.zeros(0, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (20 * torch.randn(8, 1000, generator=generator) for _ in range(2))
    half = student.to(dtype).requires_grad_()
    loss = gp.distill_loss(half, teacher.to(dtype), 2.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, gp.distill_loss(half.detach().float(), teacher.to(dtype).float(), 2.0))
    loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype


@pytest.mark.parametrize("temperature", [3, np.float32(3), torch.tensor(3.0), np.array(3)])
def test_a_temperature_is_any_plain_number(temperature: Any) -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(gp.distill_loss(student, teacher, temperature), gp.distill_loss(student, teacher, 3.0))


LOGITS = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "error", "says"),
    [
        (LOGITS, LOGITS, True, TypeError, "temperature must be a number, got True"),
        (LOGITS, LOGITS, "2", TypeError, "temperature must be a number, got '2'"),
        (LOGITS, LOGITS, None, TypeError, "temperature must be a number, got None"),
        (LOGITS, LOGITS, torch.ones(2), TypeError, "temperature must be a number, got a tensor"),
        (LOGITS, LOGITS, torch.tensor(2.0, requires_grad=True), TypeError, "no gradient would flow"),
        (LOGITS, LOGITS, float("nan"), ValueError, "temperature must be .* got nan"),
        (LOGITS, LOGITS, float("inf"), ValueError, "temperature must be .* got inf"),
        (LOGITS, LOGITS, -1.0, ValueError, "temperature must be positive, got -1.0"),
        (None, LOGITS, 2.0, TypeError, "student_logits must be a tensor, got NoneType"),
        (LOGITS, [1.0], 2.0, TypeError, "teacher_logits must be a tensor, got list"),
        (LOGITS, type("Output", (), {"logits": LOGITS})(), 2.0, TypeError, r"give its logits, output\.logits"),
        (LOGITS.long(), LOGITS.long(), 2.0, TypeError, r"student_logits must be floating, got torch\.int64"),
        (LOGITS, LOGITS.cfloat(), 2.0, TypeError, r"teacher_logits must be floating, got torch\.complex64"),
        (torch.ones(()), torch.ones(()), 2.0, ValueError, r"shape \(\.\.\., classes\)"),
        (LOGITS, LOGITS.to("meta"), 2.0, ValueError, "on one device, got cpu, meta"),
    ],
)
def test_what_is_no_logits_or_no_temperature_is_refused_by_name(
    student: Any, teacher: Any, temperature: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        gp.distill_loss(student, teacher, temperature)
