"""How far are a student's classes from its teacher's (chapter 5)?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradprune.core.checks import number, require


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Return T² KL(teacher || student) at the temperature T, the mean over all leading dimensions.

    The factor T² keeps the gradient's size when T changes. Half precision is computed in float32.

    Args:
        student_logits: shape (..., classes), floating, finite.
        teacher_logits: the same shape and device; no gradient flows to it.
        temperature: what the logits are divided by before the softmax, positive.

    Returns:
        A scalar, at least 0 up to rounding.

    Raises:
        TypeError: where the logits are no floating tensors, or the temperature is no number.
        ValueError: where shapes or devices differ, there are no logits, or the temperature is not positive.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> gp.distill_loss(logits, logits, temperature=4.0).abs() < 1e-6
        tensor(True)

    Hinton et al. (2015), section 2; chapter 5.
    """
    student, teacher = _logits("student_logits", student_logits), _logits("teacher_logits", teacher_logits).detach()
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise TypeError("temperature must be a plain number: no gradient would flow to this tensor")
    t = number("temperature", temperature)
    require(t > 0, f"temperature must be positive, got {temperature}")
    shapes = tuple(student.shape), tuple(teacher.shape)
    require(shapes[0] == shapes[1], f"student and teacher must give logits of one shape, got {shapes[0]}, {shapes[1]}")
    devices = student.device, teacher.device
    require(devices[0] == devices[1], f"student and teacher must be on one device, got {devices[0]}, {devices[1]}")
    require(student.dim() > 0, "logits must have shape (..., classes), got a tensor without dimensions")
    require(student.numel() > 0, "there are no logits to compare")
    classes = shapes[0][-1]
    student = functional.log_softmax(student.reshape(-1, classes) / t, dim=-1)
    target = functional.log_softmax(teacher.reshape(-1, classes) / t, dim=-1)
    return functional.kl_div(student, target, reduction="batchmean", log_target=True) * t**2


def _logits(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        hint = "; give its logits, output.logits" if hasattr(value, "logits") else ""
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
