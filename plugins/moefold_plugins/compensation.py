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
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moefold.errors import StageError

STRIP = 32
"""Columns that push on their errors one by one; the rest of a block follows strip by strip, later blocks at its end."""

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

    def strip(self, start: int, target: Tensor, whole: Tensor, follow: Tensor) -> Tensor | None:
        """A strip of columns at once, as `Walk._strip` defines it; None: go on column by column."""
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


@contextmanager
def damped(moments: Tensor, damping: float, raised: list[int]) -> Iterator[None]:
    """Add to the moments, in place and while inside, what `factor` added to them."""
    each = list(zip(moments.view(-1, *moments.shape[-2:]), raised, strict=True))
    added = [_added(float(moment.diagonal().mean()), damping, count) for moment, count in each]
    for (moment, _), value in zip(each, added, strict=True):
        moment.diagonal().add_(value)
    yield
    for (moment, _), value in zip(each, added, strict=True):
        moment.diagonal().sub_(value)


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
        self.original, self.coder = original.contiguous(), coder
        self.step = block if coder.group is None else -(-block // coder.group) * coder.group
        self.read = torch.empty_like(self.original, dtype=dtype)
        """What has been coded."""
        self.damage = torch.zeros(original.shape[:2], device=original.device)
        """tr((W - Q) H (W - Q)^T) of what has been coded: [batch, slot]."""

    def first(self, factors: Factors) -> Tensor:
        """Go over all columns in order; returns the damage."""
        unit, cost = factors.unit, factors.cost
        now = self.original.to(torch.float32, copy=True)
        flat = now.flatten(0, 1)
        self.damage = torch.zeros_like(self.damage)
        self.coder.weigh(cost)
        for start, stop in self._blocks():
            off = torch.empty_like(now[:, :, start:stop])  # D
            for a, z in self._strips(start, stop):
                self._open(a, now, unit)
                target, whole = now[:, :, a:z], self.original[:, :, a:z].float()
                read = self._strip(a, target, whole, unit[:, :, a:z, a:z])
                own = off[:, :, a - start : z - start] = whole - read
                self.damage += ((target - read).square_().sum(dim=3) * cost[:, :, a:z]).sum(dim=2)
                flat[:, z:stop].baddbmm_(unit[:, :, a:z, z:stop].flatten(0, 1).mT, own.flatten(0, 1))
            flat[:, stop:].baddbmm_(unit[:, :, start:stop, stop:].flatten(0, 1).mT, off.flatten(0, 1))
        return self.damage

    def again(self, moments: Tensor) -> Tensor:
        """Go over all columns once more, with `moments` [batch, slot, columns, columns]; returns the damage."""
        weight = moments.diagonal(dim1=-2, dim2=-1)  # [batch, slot, columns]
        off = self.original.float() - self.read
        self.coder.weigh(weight)
        for start, stop in self._blocks():
            pull = moments[:, :, start:stop] @ off  # [batch, slot, block, rows]: (D H)_k
            flat = pull.flatten(0, 1)
            for a, z in self._strips(start, stop):
                self._open(a)
                before, own = self.read[:, :, a:z].float(), weight[:, :, a:z]
                target = torch.addcdiv(before, pull[:, :, a - start : z - start], own[..., None])
                read = self._strip(a, target, before, moments[:, :, a:z, a:z] / own[:, :, None])
                change = before - read
                off[:, :, a:z] += change
                won = (target - before).square_() - (target - read).square_()
                self.damage = self.damage - (won.sum(dim=3) * own).sum(dim=2)
                follow = moments[:, :, a:z, z:stop].flatten(0, 1).mT
                flat[:, z - start :].baddbmm_(follow, change.flatten(0, 1))
        return self.damage

    def _blocks(self) -> Iterator[tuple[int, int]]:
        columns = self.original.shape[2]
        return ((start, min(start + self.step, columns)) for start in range(0, columns, self.step))

    def _strips(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """A block in pieces of at most STRIP columns, none of which is in two groups."""
        group = self.coder.group or stop - start
        for first in range(start, stop, group):
            last = min(first + group, stop)
            yield from ((a, min(a + STRIP, last)) for a in range(first, last, STRIP))

    def _open(self, column: int, now: Tensor | None = None, unit: Tensor | None = None) -> None:
        """Announce a group where one begins: what it would best be, were it not rounded, given the columns before it.

        D of the group's columns makes `D R` zero there; what `now` has gathered is R's part of earlier columns.
        """
        group = self.coder.group
        if group is None or column % group:
            return
        if now is None or unit is None:
            self.coder.open(column, None)
            return
        some = slice(column, column + group)
        own = self.original[:, :, some].float()
        off = torch.linalg.solve_triangular(
            unit[:, :, some, some].mT, now[:, :, some] - own, upper=False, unitriangular=True
        )
        self.coder.open(column, own + off)

    def _strip(self, start: int, target: Tensor, whole: Tensor, follow: Tensor) -> Tensor:
        """What a strip of columns from number `start` on reads when it is coded; all are [batch, slot, strip, rows].

        Column k is coded from `target[k] + sum_{j<k} (whole - read)[j] follow[j, k]`, put in its place.
        """
        read = self.coder.strip(start, target, whole, follow)
        if read is None:
            read = torch.empty_like(whole)
            for k in range(whole.shape[2]):
                read[:, :, k] = self.coder.code(start + k, target[:, :, k])
                off = whole[:, :, k : k + 1] - read[:, :, k : k + 1]
                target[:, :, k + 1 :].addcmul_(follow[:, :, k, k + 1 :, None], off)
        self.read[:, :, start : start + whole.shape[2]] = read
        return read
