"""Which weights give a layer's outputs best, for masks that are given or chosen with them (chapter 5)?

A row w of a layer's weights answers an input x by w x. Over all inputs, the rows of X, what changing w to v changes of
the answers is (v - w)' H (v - w) with H = X'X, so that H is all that need be known of the data. To it comes damping, a
multiple of the identity: it counts the change of the weights themselves, and settles what the data leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

AT_A_TIME = 2**20  # entries: of inputs that are squared, of reduced systems that are solved together
_LEAST = 1e-10  # the share of an input that must not follow from those before it, or the damping is raised to this
_BATCHED = 64  # columns; on a CPU larger systems are factored faster one by one
_COLUMNS = 8  # that are eliminated one by one before the others hear of it by one product


def dtype_on(device: torch.device) -> torch.dtype:
    """The precision in which systems are summed and solved: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64  # pragma: no mutate: needs a Mac


class Gram:
    """X'X over all inputs, in float64 where the device has it: rounding is amplified by as much as inputs are alike."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, columns, dtype=dtype_on(device), device=device)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs (samples, columns). Only the blocks on and above the diagonal are formed."""
        columns = len(self._sum)
        step = max(128, -(-columns // 8))
        for rows in x.split(max(1, AT_A_TIME // max(columns, 1))):
            wide = rows.to(self._sum.dtype)
            for start in range(0, columns, step):
                self._sum[start : start + step, start:].addmm_(wide[:, start : start + step].T, wide[:, start:])
        self.samples += len(x)

    def finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return bool(self._sum.diagonal().isfinite().all())

    def full(self) -> Tensor:
        """Return X'X whole; what was summed is used up."""
        upper, self._sum = self._sum, self._sum[:0]
        return upper.triu_().add_(upper.triu(1).T)


class System:
    """X'X with damping on its diagonal, and what is computed of it once for all weights that share it.

    Args:
        h: X'X; it is changed.
        damp: what is added, as a share of the mean of the diagonal. Where that is none and an input follows from
            others, as much is as lets the system be solved, and `raised` is true. Where all inputs are zero, so that
            nothing is known, magnitudes alone count.
    """

    def __init__(self, h: Tensor, damp: float) -> None:
        alive = h.diagonal() > 0
        self.inputs, self.raised = int(alive.sum()), False
        mean = float(h.diagonal().mean()) if self.inputs else 1.0
        if damp < _LEAST and not _definite(h):
            damp, self.raised = _LEAST, True
        h.diagonal().add_(damp * mean)
        h.diagonal().masked_fill_(~alive, max(damp, _LEAST) * mean)
        self.h = h

    @cached_property
    def inverse(self) -> Tensor:
        """H^-1."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.h))

    @cached_property
    def upper(self) -> Tensor:
        """The upper triangular U with H^-1 = U'U: with H = R R', R upper triangular, it is R^-1."""
        r = torch.linalg.cholesky(self.h.flip(0, 1)).flip(0, 1)
        u = torch.eye(
            len(r), dtype=r.dtype, device=r.device
        ).mT  # by columns, as it is solved: in place, nothing copied
        torch.linalg.solve_triangular(r, u, upper=True, out=u)
        return u


def _definite(h: Tensor) -> bool:
    """Whether no input follows from those before it, but for rounding, of those that are not always zero."""
    size = torch.where(h.diagonal() > 0, h.diagonal(), 1.0)
    factor, failed = torch.linalg.cholesky_ex(h + torch.diag(size - h.diagonal()))
    return not bool(failed) and bool((factor.diagonal().square() > _LEAST * size).all())


# ------------------------------------------------------------------------------------------------------- masks given


def least_squares(weights: Tensor, system: System, masks: Tensor) -> Tensor:
    """Return for each row the weights, zero where its mask is False, that change its answers least.

    Each row solves the normal equations of what it keeps, H_KK v = (H w)_K, or where less is pruned than kept those of
    the change that prunes it, v = w - H^-1_:P (H^-1_PP)^-1 w_P (Hassibi and Stork 1993, equation 5, of several weights
    at once). Rows of one mask share a factor; the others are factored many at a time.

    Args:
        weights: (rows, columns), in the dtype of the system.
        system: of the layer's inputs.
        masks: bool, as `weights`; True stays.

    Returns:
        A new tensor as `weights`.
    """
    found = weights * masks
    for rows, kept in _alike(masks):
        pruned = masks.shape[1] - kept
        if not kept or not pruned:
            continue
        for some, which, mask in _together(rows, masks, min(kept, pruned)):
            at = (mask if kept <= pruned else ~mask).nonzero()[:, 1].view(len(mask), -1)
            if kept <= pruned:
                solved = _solve(system.h, at, (weights[some] @ system.h).gather(1, at[which]))
                found[some] = torch.zeros_like(weights[some]).scatter_(1, at[which], solved)
            else:
                solved = _solve(system.inverse, at, weights[some].gather(1, at[which]))
                change = torch.zeros_like(weights[some]).scatter_(1, at[which], solved) @ system.inverse
                found[some] = (weights[some] - change) * mask[which]
    return found


def _solve(h: Tensor, at: Tensor, right: Tensor) -> Tensor:
    """Solve with the rows and columns of h at `at[i]` for `right[i]`; one `at` serves all."""
    size = at.shape[1]
    systems = h.reshape(-1).index_select(0, (at[:, :, None] * len(h) + at[:, None, :]).view(-1)).view(-1, size, size)
    if len(at) == 1:
        return torch.cholesky_solve(right.T, torch.linalg.cholesky(systems[0])).T
    if h.is_cuda or size < _BATCHED:
        return torch.cholesky_solve(right.unsqueeze(-1), torch.linalg.cholesky(systems)).squeeze(-1)
    found = [torch.cholesky_solve(r[:, None], torch.linalg.cholesky(s)) for s, r in zip(systems, right, strict=True)]
    return torch.stack(found).squeeze(-1)


def _alike(masks: Tensor) -> Iterator[tuple[Tensor, int]]:
    """The rows that keep the same number of weights, and that number."""
    counts = masks.sum(1)
    for kept in counts.unique().tolist():
        yield (counts == kept).nonzero()[:, 0], kept


def _together(rows: Tensor, masks: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows that are solved at once, which mask each has, and the masks: one mask's rows, or rows with one each."""
    packed = masks[rows]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(1, 2**40, (masks.shape[1],), generator=generator).to(masks.device)
    keys = (packed * random).sum(1)  # exact, and different for different masks unless chance wills it
    _, which, counts = keys.unique(return_inverse=True, return_counts=True)
    alone = []
    for key in (counts > 1).nonzero()[:, 0].tolist():
        same = (which == key).nonzero()[:, 0]
        equal = (packed[same] == packed[same[0]]).all(1)
        alone.append(same[~equal])
        yield rows[same[equal]], torch.zeros(int(equal.sum()), dtype=torch.long, device=rows.device), packed[same[:1]]
    alone.append((counts[which] == 1).nonzero()[:, 0])
    left = torch.cat(alone)
    for some in left.split(max(1, AT_A_TIME // size**2)) if len(left) else ():
        yield rows[some], torch.arange(len(some), device=rows.device), packed[some]


# ------------------------------------------------------------------------------------------ masks chosen with weights

Choose = Callable[[Tensor, int], Tensor]  # (what pruning each weight costs, its first column) -> the mask of these


def eliminate(weights: Tensor, system: System, choose: Choose, width: int) -> tuple[Tensor, Tensor]:
    """Return weights and mask: columns go from left to right, and what each loses is made good by those to its right.

    What pruning weight j of a row costs, given what stands to its left, is w_j^2 / u_jj^2, with U the upper triangular
    factor of the inverse, H^-1 = U'U, and the best answer of those to its right is -w_j / u_jj times the rest of row j
    of U. One factor serves all rows, as all go through the columns in one order.

    Args:
        weights: (rows, columns), in the dtype of the system.
        system: of the layer's inputs.
        choose: says what stays of the next `width` columns, of what each weight's pruning would cost.
        width: how many columns are chosen at once.

    Returns:
        The weights, a new tensor, and the bool mask; True stays.

    Frantar and Alistarh (2023), algorithm 1.
    """
    columns = weights.T.clone(memory_format=torch.contiguous_format)  # a column's weights lie side by side
    keep = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    _walk(columns, system.upper, keep, torch.empty_like(columns), choose, width)
    return columns.T.contiguous(), keep.T.contiguous()


def _walk(columns: Tensor, u: Tensor, keep: Tensor, errors: Tensor, choose: Choose, width: int, start: int = 0) -> None:
    """Go through columns, the left half first; `errors` is what it has left to answer for those to its right."""
    if len(columns) <= width:
        costs = (columns / u.diagonal()[:, None]).square_()
        keep.copy_(choose(costs.T, start).T)
        _eliminate(columns, u, keep, errors)
        return
    half = -(-len(columns) // (2 * width)) * width
    _walk(columns[:half], u[:half, :half], keep[:half], errors[:half], choose, width, start)
    columns[half:].addmm_(u[:half, half:].T, errors[:half], alpha=-1)
    _walk(columns[half:], u[half:, half:], keep[half:], errors[half:], choose, width, start + half)


def _eliminate(columns: Tensor, u: Tensor, keep: Tensor, errors: Tensor) -> None:
    """Prune columns of which it is known what stays."""
    half = len(columns) // 2
    if len(columns) > _COLUMNS:
        _eliminate(columns[:half], u[:half, :half], keep[:half], errors[:half])
        columns[half:].addmm_(u[:half, half:].T, errors[:half], alpha=-1)
        _eliminate(columns[half:], u[half:, half:], keep[half:], errors[half:])
        return
    for i in range(len(columns)):
        torch.div(columns[i].masked_fill(keep[i], 0.0), u[i, i], out=errors[i])
        columns[i].masked_fill_(~keep[i], 0.0)
        columns[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
