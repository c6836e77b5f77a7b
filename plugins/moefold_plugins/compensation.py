"""Coding weight matrices column by column, each column's error made up for by those after it (GPTQ, arXiv 2210.17323).

For W [rows, columns] whose inputs have second moments H, coding to Q costs tr((W - Q) H (W - Q)^T). With H = R R^T,
R upper triangular, and D = W - Q that is the sum over columns k of

    R_kk^2 || w_k - q_k ||^2,    w_k = W_k + sum_{j<k} D_j R_jk / R_kk,

so that walking k upwards and coding w_k as well as can be, given all before it, is the greedy solution. It is GPTQ's
(whose factor of the inverse is U = R^-1, with U_kk = 1 / R_kk) for one Cholesky factor instead of two and an inverse.
Then the columns are gone over again: with all others as they are, column k is best coded from

    w_k = Q_k + (D H)_k / H_kk,    at a cost of H_kk || w_k - q_k ||^2,

so that no step makes it worse. Blocks of columns make most of the work matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moefold.errors import StageError

RAISES = 8
"""How often damping is raised tenfold before a moment matrix is given up."""


class Coder(Protocol):
    """What a column becomes."""

    @property
    def group(self) -> int | None:
        """How many columns are announced at once, with `open`; None: none are."""
        ...

    def weigh(self, cost: Tensor) -> None:
        """What a squared error costs from now on: [batch, slot, columns]."""
        ...

    def open(self, start: int, columns: Tensor | None) -> None:
        """The group of columns from number `start` comes next: [batch, slot, column, rows]; None: once more."""
        ...

    def code(self, number: int, column: Tensor) -> Tensor:
        """What the column reads when it is coded: both [batch, slot, rows]."""
        ...


class Factors(NamedTuple):
    """R of many moment matrices, and what it took."""

    unit: Tensor  # [..., columns, columns] float32: R_jk / R_kk
    cost: Tensor  # [..., columns] float32: R_kk^2
    raised: list[int]
    """How often the damping of each matrix was raised tenfold."""


def factor(moments: Tensor, damping: float) -> Factors:
    """R of `moments + damping * mean diagonal`, in float64 and one matrix after the other; overwrites `moments`.

    Takes [..., columns, columns]. Where there is no Cholesky factor damping is raised tenfold and counted. Raises
    StageError when no damping helps: the moments are not finite.
    """
    flat, raised = moments.view(-1, *moments.shape[-2:]), []
    cost = torch.empty(flat.shape[:2], device=moments.device)
    for number, moment in enumerate(flat):
        root, count = _root(moment, damping)
        cost[number] = root.diagonal().square()
        moment.copy_(root / root.diagonal())
        raised.append(count)
    return Factors(moments, cost.view(moments.shape[:-1]), raised)


def damp(moments: Tensor, damping: float, raised: list[int]) -> None:
    """Add to the moments, in place, what `factor` added to them."""
    for moment, count in zip(moments.view(-1, *moments.shape[-2:]), raised, strict=True):
        moment.diagonal().add_(_added(float(moment.diagonal().mean()), damping, count))


def _added(mean: float, damping: float, count: int) -> float:
    least = damping * mean if mean > 0 else 1.0  # no input but zeros: anything serves
    return least * 10.0**count


def _root(moment: Tensor, damping: float) -> tuple[Tensor, int]:
    """The upper triangular R with R R^T = H: the lower factor of H read backwards, read backwards."""
    backwards = moment.double().flip(0, 1)
    mean = float(backwards.diagonal().mean())
    if not math.isfinite(mean):
        raise StageError("moments of calibration are not finite; check the checkpoint and the calibration text")
    before = 0.0
    for count in range(RAISES):
        added = _added(mean, damping, count)
        backwards.diagonal().add_(added - before)
        before = added
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not int(failed):
            return lower.flip(0, 1), count
    raise StageError(
        f"moments of calibration have no Cholesky factor with damping {damping:g} raised {RAISES - 1} times; "
        "write a larger damping"
    )


class Walk:
    """Codes the columns of many matrices at once: first in order, then again."""

    def __init__(self, original: Tensor, coder: Coder, block: int, dtype: torch.dtype) -> None:
        """`original` is [batch, slot, columns, rows]; `dtype` holds exactly what the coder makes of a column."""
        self.original, self.coder = original, coder
        self.step = block if coder.group is None else -(-block // coder.group) * coder.group
        self.read = torch.empty_like(original, dtype=dtype)
        """What has been coded."""

    def blocks(self) -> Iterator[tuple[int, int]]:
        columns = self.original.shape[2]
        return ((start, min(start + self.step, columns)) for start in range(0, columns, self.step))

    def first(self, factors: Factors) -> Tensor:
        """Go over all columns in order; returns tr((W - Q) H (W - Q)^T): [batch, slot]."""
        group, unit = self.coder.group, factors.unit
        now = self.original.to(torch.float32, copy=True)
        flat = now.flatten(0, 1)
        damage = torch.zeros(now.shape[:2], device=now.device)
        self.coder.weigh(factors.cost)
        for start, stop in self.blocks():
            part = now[:, :, start:stop]
            off = self.original[:, :, start:stop].to(
                torch.float32, copy=True
            )  # W, and D of the columns that have been coded
            missed = torch.empty_like(off)
            for k in range(stop - start):
                if group is not None and k % group == 0:
                    self.coder.open(start + k, self._expected(now, unit, start + k, start + k + group))
                read = self.coder.code(start + k, part[:, :, k])
                self.read[:, :, start + k] = read
                torch.sub(part[:, :, k], read, out=missed[:, :, k])
                off[:, :, k] -= read
                follow = unit[:, :, start + k, start + k + 1 : stop, None]
                part[:, :, k + 1 :].addcmul_(follow, off[:, :, k : k + 1])
            damage += (missed.square_().sum(dim=3) * factors.cost[:, :, start:stop]).sum(dim=2)
            follow = unit[:, :, start:stop, stop:].flatten(0, 1).mT  # [batch * slot, later columns, block]
            flat[:, stop:].baddbmm_(follow, off.flatten(0, 1))
        return damage

    def _expected(self, now: Tensor, unit: Tensor, start: int, stop: int) -> Tensor:
        """What columns `start` to `stop` would best be, were they not rounded, given those before them.

        D of theirs makes `D R` zero there; what `now` has gathered is R's part of earlier columns.
        """
        own = self.original[:, :, start:stop].float()
        gathered = now[:, :, start:stop] - own
        inside = unit[:, :, start:stop, start:stop].mT
        off: Tensor = torch.linalg.solve_triangular(inside, gathered, upper=False, unitriangular=True)
        return own + off

    def again(self, moments: Tensor) -> Tensor:
        """Go over all columns once more, with `moments` [batch, slot, columns, columns]; returns what `first` does."""
        group, weight = self.coder.group, moments.diagonal(dim1=-2, dim2=-1)  # [batch, slot, columns]
        off = self.original.float() - self.read
        self.coder.weigh(weight)
        for start, stop in self.blocks():
            pull = moments[:, :, start:stop] @ off  # [batch, slot, block, rows]: (D H)_k
            for k in range(stop - start):
                number = start + k
                if group is not None and number % group == 0:
                    self.coder.open(number, None)
                before = self.read[:, :, number].float()
                read = self.coder.code(number, before.addcdiv(pull[:, :, k], weight[:, :, number, None]))
                change = read - before
                self.read[:, :, number] = read
                off[:, :, number] -= change
                follow = moments[:, :, number, number + 1 : stop, None]
                pull[:, :, k + 1 :].addcmul_(follow, change[:, :, None], value=-1)
        return self._damage(off, moments)

    def _damage(self, off: Tensor, moments: Tensor) -> Tensor:
        parts = [((moments[:, :, a:b] @ off) * off[:, :, a:b]).sum(dim=(2, 3)) for a, b in self.blocks()]
        return torch.stack(parts).sum(dim=0)
