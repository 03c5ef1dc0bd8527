"""Newton-Krylov: a step of sampling solved for where it started, where repeating a fixed-point map stalls.

The steps that stall are those at the lowest noise levels: what is noise to the network it takes away, so that the step's
Jacobian has eigenvalues around zero, some of them negative. There the step folds, and several states lead to the same next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KRYLOV = 30
"""Jacobian-vector products a Newton step at most."""
RESIDUAL = 0.1
"""What GMRES may leave of a Newton step's linear system."""
CAP = 0.02
"""How far a step goes at most, in norms of the states. Folds of trained models lie about that far apart."""
PATIENCE = 5
"""Whole Newton steps away from folds after which a row that came no nearer by a tenth is given up: it is at rounding."""
_DIFFERENCE = 1e-3  # of finite differences, in norms of the states: float32 predictions are exact to about its square


@dataclass(frozen=True)
class Solved:
    """states: for each row the best that was found. errors: (n,), how far it leads from the target, in the target's norm.
    folded: (n,), whether the Jacobian had a negative eigenvalue on the way: the solution may then be one of several.
    """

    states: Tensor
    errors: Tensor
    folded: Tensor


def solve(step: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, *, tolerance: float, most: int) -> Solved:
    """The states that a step leads from to `target`, each row by itself, by Jacobian-free Newton-Krylov.

    As Knoll and Keyes (2004, section 2) have it: Jacobian-vector products are finite differences, one call of `step` each, and
    GMRES (Saad and Schultz 1986) solves with them for the Newton step. Whatever only makes the residual less ends where the
    Jacobian is singular, at a fold and no solution. So there is no line search, and where the Jacobian has negative eigenvalues
    it is shifted to have none, as in pseudo-transient continuation (Kelley and Keyes 1998): the states go on over the fold the
    way that repeating the fixed-point map in small steps would take them, to where the Jacobian is positive. Steps are `CAP`
    long at most. Each row keeps the best state that it came by. Ends where all rows lead within `tolerance` of the target
    or are at rounding, or after `most` calls.
    """
    scale = _norms(target).clamp_min(torch.finfo(target.dtype).tiny)
    states, made = start, step(start)
    best, least = states, _norms(target - made) / scale
    folded = torch.zeros_like(least, dtype=torch.bool)
    stale = torch.zeros_like(folded, dtype=torch.long)
    calls = 1
    while (unsolved := (least > tolerance) & (stale < PATIENCE)).any() and calls + 2 <= most:
        basis, hessenberg = _arnoldi(step, states, made, target - made, unsolved, min(KRYLOV, most - calls - 1))
        lowest = _lowest(hessenberg)
        folded |= unsolved & (lowest < 0)
        weights, _ = _combined(hessenberg, shift=-2 * lowest)
        change = torch.bmm((weights * _norms(target - made)[:, None])[:, None], basis[:, :-1])[:, 0]
        shorter = CAP * scale / change.norm(dim=1).clamp_min(torch.finfo(target.dtype).tiny)
        change = change * shorter.clamp(max=1)[:, None]
        states = torch.where(_rows(unsolved, states), states + change.view_as(states), best)
        made = step(states)
        calls += hessenberg.shape[2] + 1
        error = _norms(target - made) / scale
        stale = torch.where(error < 0.9 * least, 0, stale + ((lowest == 0) & (shorter >= 1)))
        better = error < least
        best = torch.where(_rows(better, states), states, best)
        least = torch.minimum(error, least)
    return Solved(best, least, folded)


def _arnoldi(
    step: Callable[[Tensor], Tensor], states: Tensor, made: Tensor, residual: Tensor, unsolved: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (n, k + 1, d) of the Krylov space of each row's residual, and the Jacobian in it, (n, k + 1, k)."""
    tiny = torch.finfo(states.dtype).tiny
    flat = residual.flatten(1)
    most = min(most, flat.shape[1])
    basis = (flat / flat.norm(dim=1).clamp_min(tiny)[:, None])[:, None]
    hessenberg = flat.new_zeros(len(flat), most + 1, most)
    size = _DIFFERENCE * _norms(states).clamp_min(1e-6)
    for j in range(most):
        moved = states + (size[:, None] * basis[:, j]).view_as(states)
        product = ((step(moved) - made).flatten(1)) / size[:, None]
        length = product.norm(dim=1)
        for _ in range(2):  # once loses orthogonality where the Jacobian is nearly singular
            along = torch.bmm(basis, product[:, :, None])[:, :, 0]
            hessenberg[:, : j + 1, j] += along
            product = product - torch.bmm(along[:, None], basis)[:, 0]
        rest = product.norm(dim=1)
        rest = torch.where(rest > 1e-10 * length, rest, 0)  # the space is exhausted: its basis ends here
        hessenberg[:, j + 1, j] = rest
        following = torch.where(rest > 0, 1 / rest.clamp_min(tiny), 0)[:, None] * product
        basis = torch.cat([basis, following[:, None]], 1)
        found = hessenberg[:, : j + 2, : j + 1]
        if (_combined(found, shift=-2 * _lowest(found))[1][unsolved] <= RESIDUAL).all():
            break
    return basis, found


def _combined(hessenberg: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """GMRES's least squares for a residual of norm 1: the combination (n, k), and what is left. shift: of the diagonal."""
    small = hessenberg.double().cpu()  # mps has neither float64 nor this
    small = small + shift.double().cpu()[:, None, None] * torch.eye(*small.shape[1:], dtype=small.dtype)
    first = small.new_zeros(len(small), small.shape[1], 1)
    first[:, 0] = 1
    weights = torch.linalg.lstsq(small, first, driver="gelsd").solution
    left = (small @ weights - first).flatten(1).norm(dim=1)
    return weights[:, :, 0].to(hessenberg), left.to(hessenberg)


def _lowest(hessenberg: Tensor) -> Tensor:
    """The Jacobian's lowest eigenvalue, (n,), by its Ritz values; 0 where it is not below what finite differences pretend."""
    ritz = torch.linalg.eigvals(hessenberg[:, :-1].double().cpu())
    lowest = ritz.real.amin(1)
    return torch.where(lowest < -2 * _DIFFERENCE * ritz.abs().amax(1), lowest, 0).to(hessenberg)


def _norms(states: Tensor) -> Tensor:
    return states.flatten(1).norm(dim=1)


def _rows(chosen: Tensor, states: Tensor) -> Tensor:
    return chosen.view(-1, *[1] * (states.ndim - 1))
