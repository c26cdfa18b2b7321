"""Ranking losses and their gradient in one launch on CUDA, given the order of the classes.

This is the closed form of `likelihood.py`. A program computes one row after another, in tiles of
BLOCK steps of the ranking. Sums are kept as z exp(m), where m is the largest logit of the sum.
Differences of logits are then exact to their last bit, and float32 is enough for any range of the
logits:

    over the classes            only if the ranking leaves out classes: the sum of exp(s) over them
    backwards over the tiles    the logits in the order of the ranking, which are kept; the sum of
                                exp(s) over all later steps, for each tile; the normalisation of
                                the teacher's softmax
    forwards over the tiles     the weights w, R and Z at each step, the loss, A (the sum of w / Z
                                over the steps before), and the gradient

There are only as many programs as run at once, so that what they keep stays in the cache. Logits
are read in the order of the ranking once, since reading them from any places is what takes longest.

The module is imported on CUDA only, and where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pld_ray.losses.likelihood import Weighting

BLOCK = 4096  # the most steps in a tile
WARPS = 16  # of one multiprocessor that are in use at once; more rows would not fit its cache
NOTHING = tl.constexpr(-1e30)  # stands for the logit of no class; finite, so that no NaN arises
LEAST = tl.constexpr(-9.9e29)  # the least finite logit; smaller ones are taken for it
TINY = tl.constexpr(1e-37)


@triton.jit
def _add(m1, z1, m2, z2):
    """Add the sums z1 exp(m1) and z2 exp(m2)."""
    m = tl.maximum(m1, m2)
    return m, z1 * tl.exp(m1 - m) + z2 * tl.exp(m2 - m)


@triton.jit
def _add_tile(m, z, x, there, temperature):
    """Add the sum of exp(x / temperature) over a tile to the sum z exp(m / temperature)."""
    top = tl.maximum(m, tl.max(tl.where(there, x, NOTHING), 0))
    exps = tl.where(there, tl.exp((x - top) / temperature), 0.0)
    return top, z * tl.exp((m - top) / temperature) + tl.sum(exps, 0)


@triton.jit
def _class(order, k, label, columns):
    """Return the class of step k, and whether there is one: the order's label is passed over."""
    inside = (k >= 1) & (k <= columns)
    found = tl.load(order + k - 1, inside, 0).to(tl.int64)
    first = k == 0
    return tl.where(first, label, found), first | (inside & (found != label))


@triton.jit
def _logits(row, c, there):
    """Return the student's logits of classes that are there; NOTHING stands for the others."""
    s = tl.load(row + c, there, 0.0).to(tl.float32)
    s = tl.where((s <= NOTHING) & (s > -float("inf")), LEAST, s)
    return tl.where(there, s, NOTHING)


@triton.jit
def _find_tail(tail, order_row, label, classes, columns, tiles, BLOCK: tl.constexpr):
    """Write 1 to `tail` [classes] for the classes that the ranking leaves out, 0 for the others."""
    at = tl.arange(0, BLOCK)
    one = tl.full([BLOCK], 1, tl.int8)
    for start in range(0, classes, BLOCK):
        tl.store(tail + start + at, one, start + at < classes)
    tl.debug_barrier()
    for tile in range(tiles):
        c, there = _class(order_row, tile * BLOCK + at, label, columns)
        tl.store(tail + c, one - 1, there)
    tl.debug_barrier()


@triton.jit
def _ranking(
    student, teacher, schedule, labels, order, losses, gradient, later, ranked, tails,
    rows, classes, columns, tiles, temperature, tolerance,
    SCHEDULED: tl.constexpr, CUT: tl.constexpr, TAILED: tl.constexpr, WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute every row whose number is that of the program, modulo the number of programs.

    `later` holds the sum of the later steps, [programs, tiles, 2]; `ranked` holds the student's
    logits in the order of the ranking, and the teacher's, which the weights replace,
    [programs, 2, columns + 1]; `tails` marks the classes in the tail, [programs, classes].
    """
    program = tl.program_id(0).to(tl.int64)
    steps = columns + 1
    later += program * tiles * 2
    ranked_s = ranked + program * 2 * steps
    ranked_w = ranked_s + steps
    tail = tails + program * classes
    at = tl.arange(0, BLOCK)
    nothing, zero = tl.full([], NOTHING, tl.float32), tl.full([], 0.0, tl.float32)

    for row in range(program, rows, tl.num_programs(0)):
        s_row, t_row = student + row * classes, teacher + row * classes
        order_row = order + row * columns
        label = tl.load(labels + row)

        m_sum, z_sum, t_max, t_sum = nothing, zero, nothing, zero
        if TAILED:
            _find_tail(tail, order_row, label, classes, columns, tiles, BLOCK)
            for start in range(0, classes, BLOCK):
                c = start + at
                left = tl.load(tail + c, c < classes, 0) != 0
                m_sum, z_sum = _add_tile(m_sum, z_sum, _logits(s_row, c, left), left, 1.0)
                if not SCHEDULED:
                    t = tl.load(t_row + c, left, 0.0).to(tl.float32)
                    t_max, t_sum = _add_tile(t_max, t_sum, t, left, temperature)
        again = steps  # the step at which the order lists the label, if it does
        for back in range(tiles):
            tile = tiles - 1 - back
            tl.store(later + 2 * tile, m_sum)
            tl.store(later + 2 * tile + 1, z_sum)
            k = tile * BLOCK + at
            c, there = _class(order_row, k, label, columns)
            s = _logits(s_row, c, there)
            tl.store(ranked_s + k, s, k < steps)
            m_sum, z_sum = _add_tile(m_sum, z_sum, s, there, 1.0)
            if SCHEDULED:
                again = tl.minimum(again, tl.min(tl.where(there | (k >= steps), steps, k), 0))
            else:
                t = tl.where(there, tl.load(t_row + c, there, 0.0).to(tl.float32), NOTHING)
                tl.store(ranked_w + k, t, k < steps)
                t_max, t_sum = _add_tile(t_max, t_sum, t, there, temperature)
        tl.debug_barrier()  # the stores above are read below
        whole = z_sum + t_sum  # NaN if a logit is not finite, which a maximum may pass over

        loss, e_sum, a_sum, w_sum = zero, nothing, zero, zero
        for tile in range(tiles):
            m_later, z_later = tl.load(later + 2 * tile), tl.load(later + 2 * tile + 1)
            k = tile * BLOCK + at
            s = tl.load(ranked_s + k, k < steps, NOTHING)
            there = s != NOTHING  # also if it is NaN
            if SCHEDULED:  # classes after the label in the order come one step earlier
                w = tl.load(schedule + tl.where(k > again, k - 1, k), there & (k < classes), 0.0)
            else:
                t = tl.load(ranked_w + k, k < steps, NOTHING)
                w = tl.where(there, tl.exp((t - t_max) / temperature) / t_sum, 0.0)
            if CUT:
                before_k = tl.cumsum(w, 0) - w + w_sum
                w_sum += tl.sum(w, 0)
                w = tl.where((k == 0) | (1 - before_k >= tolerance), w, 0.0)
            # R sums over the steps after k; those of the next tile are in m_later
            next_inside = (k + 1 < steps) & (at < BLOCK - 1)
            s_after = tl.load(ranked_s + k + 1, next_inside, NOTHING)
            pair = s_after, tl.where(s_after != NOTHING, 1.0, 0.0)
            m_rest, z_rest = tl.associative_scan(pair, 0, _add, reverse=True)
            m_rest, z_rest = _add(m_rest, z_rest, m_later, z_later)
            more = there & (z_rest > 0)  # at the last step no choice is left, so it costs nothing
            x = tl.log(tl.maximum(z_rest, TINY)) + m_rest - s
            small = tl.exp(tl.minimum(x, -x))
            # log(1 + small) with Kahan's correction, which keeps the precision of a small number
            u = 1.0 + small
            kahan = tl.log(u) * (small / tl.where(u == 1.0, 1.0, u - 1.0))
            log1p = tl.where(u == 1.0, small, kahan)
            loss += tl.sum(tl.where(more, w * (tl.maximum(x, 0.0) + log1p), 0.0), 0)
            if WANTED:
                tl.store(ranked_w + k, w, k < steps)
                tl.debug_barrier()  # the weights of the steps before are read below
                m, z = _add(m_rest, z_rest, s, tl.where(there, 1.0, 0.0))
                before = (k > 0) & (k <= steps)
                s_b = tl.load(ranked_s + k - 1, before, NOTHING)
                w_b = tl.load(ranked_w + k - 1, before, 0.0)
                there_b = s_b != NOTHING
                m_b, z_b = _add(m, z, s_b, tl.where(there_b, 1.0, 0.0))  # Z one step before
                e = tl.where(there_b, -m_b, NOTHING)
                share = tl.where(there_b, w_b / tl.maximum(z_b, TINY), 0.0)
                e_k, a_k = tl.associative_scan((e, share), 0, _add)
                e_k, a_k = _add(e_k, a_k, e_sum, a_sum)
                push = tl.where(a_k > 0, a_k * tl.exp(tl.minimum(s + e_k, 0.0)), 0.0)
                pull = w * z_rest / tl.maximum(z, TINY) * tl.exp(tl.minimum(m_rest - m, 0.0))
                c, _ = _class(order_row, k, label, columns)
                value = push - tl.where(more, pull, 0.0)
                value = tl.where(whole == whole, value, whole)
                tl.store(gradient + row * classes + c, value, there)
                e_tile = tl.max(e, 0)
                a_tile = tl.sum(share * tl.exp(e - e_tile), 0)
                e_sum, a_sum = _add(e_sum, a_sum, e_tile, a_tile)
        if TAILED and WANTED:
            for start in range(0, classes, BLOCK):
                c = start + at
                left = tl.load(tail + c, c < classes, 0) != 0
                value = a_sum * tl.exp(tl.minimum(_logits(s_row, c, left) + e_sum, 0.0))
                value = tl.where(whole == whole, value, whole)
                tl.store(gradient + row * classes + c, value, left)
        tl.store(losses + row, tl.where(whole == whole, loss, whole))
        tl.debug_barrier()  # the next row overwrites what was read above


def plackett_luce(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    order: Tensor,
    weighting: Weighting,
    wanted: bool,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor | None]:
    """Compute the weighted Plackett-Luce likelihood.

    Args:
        student: Student logits [N, C], float32.
        teacher: Teacher logits [N, C], float32; -inf for classes that are masked.
        labels: Labels [N], int64.
        order: The teacher's order of the classes to rank [N, K], of any integer type. The label may
            be at any place or missing. Other classes that are missing form the tail.
        weighting: The weights of the steps.
        wanted: Whether to compute the gradient.
        block: The most steps of a tile, a power of two.

    Returns:
        Losses [N], and their gradients [N, C] if they are wanted.
    """
    given = student, teacher, labels, order
    student, teacher, labels, order = (x.contiguous() for x in given)
    schedule = None if weighting.schedule is None else weighting.schedule.float().contiguous()
    (rows, classes), columns = student.shape, order.shape[1]
    losses, gradient = student.new_empty(rows), torch.empty_like(student) if wanted else student
    tailed = columns < classes
    needed = columns + 1 + tailed  # A for the tail sums over all steps, which takes one more
    block = min(block, triton.next_power_of_2(needed))
    tiles = triton.cdiv(needed, block)
    warps = max(1, min(WARPS, block // 128))
    programs = min(rows, _multiprocessors(student.device) * (WARPS // warps))
    later, ranked = (student.new_empty(programs, 2, length) for length in (tiles, columns + 1))
    tails = labels.new_empty(programs, classes if tailed else 0, dtype=torch.int8)
    _ranking[(programs,)](
        student, teacher, student if schedule is None else schedule, labels,
        order, losses, gradient, later, ranked, tails,
        rows, classes, columns, tiles, weighting.temperature, weighting.tolerance or 0.0,
        SCHEDULED=schedule is not None, CUT=weighting.tolerance is not None,
        TAILED=tailed, WANTED=wanted, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return losses, gradient if wanted else None


@cache
def _multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; 1 for Triton's interpreter."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
