"""PLD and its gradient in one launch on CUDA, given the teacher's order of the classes.

This is the closed form of `likelihood.py`. One program computes one row, in tiles of BLOCK steps of
the ranking. Sums are kept as z exp(m), where m is the largest logit of the sum. Differences of
logits are then exact to their last bit, and float32 is enough for any range of the logits:

    backwards over the tiles    the sum Z of exp(s) over all later tiles, for each tile; the
                                normalisation of the teacher's softmax
    forwards over the tiles     Z and R at each step, the loss, A (the sum of w / Z over the steps
                                before), and the gradient

The module is imported on CUDA only, and where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # steps in a tile
NOTHING = tl.constexpr(-1e30)  # stands for the logit of no class; finite, so that no NaN arises
TINY = tl.constexpr(1e-37)


@triton.jit
def _add(m1, z1, m2, z2):
    """Add the sums z1 exp(m1) and z2 exp(m2)."""
    m = tl.maximum(m1, m2)
    return m, z1 * tl.exp(m1 - m) + z2 * tl.exp(m2 - m)


@triton.jit
def _class(order, k, label, columns):
    """Return the class of step k, and whether there is one: the order's label is passed over."""
    inside = (k >= 1) & (k <= columns)
    found = tl.load(order + k - 1, inside, 0).to(tl.int64)
    first = k == 0
    return tl.where(first, label, found), first | (inside & (found != label))


@triton.jit
def _logits(values, c, there):
    """Return the logits of some classes."""
    return tl.where(there, tl.load(values + c, there, 0.0).to(tl.float32), NOTHING)


@triton.jit
def _pld(
    student, teacher, labels, order, losses, gradient, later,
    classes, columns, tiles, temperature,
    WANTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one row; `later` holds the sum of the later tiles, [N, tiles, 2]."""
    row = tl.program_id(0).to(tl.int64)
    student += row * classes
    teacher += row * classes
    gradient += row * classes
    order += row * columns
    later += row * tiles * 2
    label = tl.load(labels + row)
    step = tl.arange(0, BLOCK)

    nothing, zero = tl.full([], NOTHING, tl.float32), tl.full([], 0.0, tl.float32)
    m_sum, z_sum, t_max, t_sum = nothing, zero, nothing, zero
    for back in range(tiles):
        tile = tiles - 1 - back
        tl.store(later + 2 * tile, m_sum)
        tl.store(later + 2 * tile + 1, z_sum)
        c, there = _class(order, tile * BLOCK + step, label, columns)
        s, t = _logits(student, c, there), _logits(teacher, c, there)
        m_tile, t_tile = tl.max(s, 0), tl.max(t, 0)
        z_tile = tl.sum(tl.where(there, tl.exp(s - m_tile), 0.0), 0)
        m_sum, z_sum = _add(m_sum, z_sum, m_tile, z_tile)
        top = tl.maximum(t_max, t_tile)
        exps = tl.where(there, tl.exp((t - top) / temperature), 0.0)
        t_sum = t_sum * tl.exp((t_max - top) / temperature) + tl.sum(exps, 0)
        t_max = top
    tl.debug_barrier()  # the stores above are read below

    loss, e_sum, a_sum = zero, nothing, zero
    for tile in range(tiles):
        m_later, z_later = tl.load(later + 2 * tile), tl.load(later + 2 * tile + 1)
        k = tile * BLOCK + step
        c, there = _class(order, k, label, columns)
        s, t = _logits(student, c, there), _logits(teacher, c, there)
        w = tl.where(there, tl.exp((t - t_max) / temperature) / t_sum, 0.0)
        m, z = tl.associative_scan((s, tl.where(there, 1.0, 0.0)), 0, _add, reverse=True)
        m, z = _add(m, z, m_later, z_later)
        after, there_after = _class(order, k + 1, label, columns)
        there_after = there_after & (step < BLOCK - 1)  # the next tile is in m_later
        s_after = _logits(student, after, there_after)
        pair = s_after, tl.where(there_after, 1.0, 0.0)
        m_rest, z_rest = tl.associative_scan(pair, 0, _add, reverse=True)
        m_rest, z_rest = _add(m_rest, z_rest, m_later, z_later)
        more = there & (z_rest > 0)  # at the last step no choice is left, so it costs nothing
        x = tl.log(tl.maximum(z_rest, TINY)) + m_rest - s
        small = tl.exp(tl.minimum(x, -x))
        # log(1 + small) with Kahan's correction, which keeps the precision of a small number
        u = 1.0 + small
        log1p = tl.where(u == 1.0, small, tl.log(u) * (small / tl.where(u == 1.0, 1.0, u - 1.0)))
        loss += tl.sum(tl.where(more, w * (tl.maximum(x, 0.0) + log1p), 0.0), 0)
        if WANTED:
            before, there_before = _class(order, k - 1, label, columns)
            there_before = there_before & (k > 0) & (k <= columns)
            s_b = _logits(student, before, there_before)
            t_b = _logits(teacher, before, there_before)
            w_b = tl.where(there_before, tl.exp((t_b - t_max) / temperature) / t_sum, 0.0)
            m_b, z_b = _add(m, z, s_b, tl.where(there_before, 1.0, 0.0))  # Z one step before
            e = tl.where(there_before, -m_b, NOTHING)
            share = tl.where(there_before, w_b / tl.maximum(z_b, TINY), 0.0)
            e_k, a_k = tl.associative_scan((e, share), 0, _add)
            e_k, a_k = _add(e_k, a_k, e_sum, a_sum)
            push = tl.where(a_k > 0, a_k * tl.exp(tl.minimum(s + e_k, 0.0)), 0.0)
            pull = w * z_rest / tl.maximum(z, TINY) * tl.exp(tl.minimum(m_rest - m, 0.0))
            tl.store(gradient + c, push - tl.where(more, pull, 0.0), there)
            e_tile = tl.max(e, 0)
            e_sum, a_sum = _add(e_sum, a_sum, e_tile, tl.sum(share * tl.exp(e - e_tile), 0))
    tl.store(losses + row, loss)


def pld(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    order: Tensor,
    temperature: float,
    wanted: bool,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor | None]:
    """Compute PLD with the weights softmax(teacher / temperature).

    Args:
        student: Student logits [N, C], float32.
        teacher: Teacher logits [N, C], float32; -inf for classes that are masked.
        labels: Labels [N], int64.
        order: The teacher's order of the classes [N, K], of any integer type, with all classes but
            for the label, which may be at any places or missing.
        temperature: The temperature of the teacher's softmax.
        wanted: Whether to compute the gradient.
        block: The steps of a tile, a power of two.

    Returns:
        Losses [N], and their gradients [N, C] if they are wanted.
    """
    student, teacher, order = student.contiguous(), teacher.contiguous(), order.contiguous()
    (rows, classes), columns = student.shape, order.shape[1]
    losses, gradient = student.new_empty(rows), torch.empty_like(student) if wanted else student
    block = min(block, triton.next_power_of_2(columns + 1))
    tiles = triton.cdiv(columns + 1, block)
    later = student.new_empty(rows, tiles, 2)
    _pld[(rows,)](
        student, teacher, labels, order, losses, gradient, later,
        classes, columns, tiles, temperature,
        WANTED=wanted, BLOCK=block, num_warps=max(1, min(8, block // 128)),
    )  # fmt: skip
    return losses, gradient if wanted else None
