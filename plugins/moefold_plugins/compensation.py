"""Coding weight matrices column by column, each column's error made up for by those after it (GPTQ, arXiv 2210.17323).

For W [rows, columns] whose inputs have second moments H, coding to Q costs tr((W - Q) H (W - Q)^T). With H = R R^T,
R upper triangular, and D = W - Q that is the sum over columns k of

    R_kk^2 || w_k - q_k ||^2,    w_k = W_k + sum_{j<k} D_j R_jk / R_kk,

so that walking k upwards and coding w_k as well as can be, given all before it, is the greedy solution. It is GPTQ's
(whose factor of the inverse is U = R^-1, with U_kk = 1 / R_kk) for one Cholesky factor instead of two and an inverse.
Blocks of columns make most of the work matrix products.
"""

from __future__ import annotations

import math
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

    def open(self, start: int, columns: Tensor) -> None:
        """The group of columns [batch, slot, column, rows] from number `start` comes next."""

    def code(self, number: int, column: Tensor) -> Tensor:
        """What the column reads when it is coded: both [batch, slot, rows]."""


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


def _root(moment: Tensor, damping: float) -> tuple[Tensor, int]:
    """The upper triangular R with R R^T = H: the lower factor of H read backwards, read backwards."""
    backwards = moment.double().flip(0, 1)
    mean = float(backwards.diagonal().mean())
    if not math.isfinite(mean):
        raise StageError("moments of calibration are not finite; check the checkpoint and the calibration text")
    unit, added = mean if mean > 0 else 1.0, 0.0  # no input but zeros: any R serves
    for count in range(RAISES):
        wanted = (damping if mean > 0 else 1.0) * unit * 10**count
        backwards.diagonal().add_(wanted - added)
        added = wanted
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not int(failed):
            return lower.flip(0, 1), count
    raise StageError(
        f"moments of calibration have no Cholesky factor with damping {damping:g} raised {RAISES - 1} times; "
        "write a larger damping"
    )


def walk(original: Tensor, factors: Factors, coder: Coder, block: int) -> tuple[Tensor, Tensor]:
    """Code all columns in order, and tell what of them was coded and what that cost.

    `original` is [batch, slot, columns, rows], `factors` those of [batch, slot]. Returns the columns as they were when
    their turn came (float32, like `original`), and tr((W - Q) H (W - Q)^T) [batch, slot].
    """
    batch, slots, columns, rows = original.shape
    now = original.float() if original.dtype != torch.float32 else original.clone()
    damage = torch.zeros(batch, slots, device=original.device)
    step = block if coder.group is None else -(-block // coder.group) * coder.group
    unit = factors.unit
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        part = now[:, :, start:stop]
        off = original[:, :, start:stop].float()  # W, and W - Q for columns that have been coded
        missed = torch.empty_like(off)
        for k in range(stop - start):
            if coder.group is not None and (start + k) % coder.group == 0:
                coder.open(start + k, part[:, :, k : k + coder.group])
            read = coder.code(start + k, part[:, :, k])
            torch.sub(part[:, :, k], read, out=missed[:, :, k])
            off[:, :, k] -= read
            if k + 1 < stop - start:
                part[:, :, k + 1 :].addcmul_(unit[:, :, start + k, start + k + 1 : stop, None], off[:, :, k : k + 1])
        damage += (missed.square_().sum(dim=3) * factors.cost[:, :, start:stop]).sum(dim=2)
        if stop < columns:
            later = now.view(batch * slots, columns, rows)[:, stop:]
            pushed = unit[:, :, start:stop, stop:].flatten(0, 1).mT  # [batch * slot, later columns, block]
            later.baddbmm_(pushed, off.flatten(0, 1))
    return now, damage
