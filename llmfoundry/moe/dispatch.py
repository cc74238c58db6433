"""Expert parallelism: tokens are sent to the ranks that hold their experts, and their sums are returned.

Shapes: T tokens of this rank, D d_model, K top_k, P ranks of the group, N rows sent, R rows received.
A token is sent once to each rank that holds any of its experts, not once to each expert, and that rank
returns one row: the weighted sum over the experts it holds. With K = 8 on 4 ranks that is half the bytes.

The host waits once a layer, for the counts that size the buffers; backward knows them. Sending and returning
are each other's adjoint, so each one's backward is the other's forward.

An exchange is started in one autograd node and awaited in another, in both directions. Autograd runs, of the nodes
that are ready, the one that forward made last; so what forward makes between `send` and `wait` runs beside the way
there, and beside the gradients' way back: the shared expert, and the experts' weight gradients (kernels/late.py).
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llmfoundry import runtime
from llmfoundry.kernels.routing import sum_rows_torch


class Exchange(NamedTuple):
    """Which tokens each rank sends to which other in one layer."""

    group: dist.ProcessGroup
    token: Tensor  # (N,) int32, the token of each row sent, by rank, then by token
    rows_of_token: Tensor  # (T, P) int32, each token's row for each rank; N where none goes there
    n_sent: list[int]  # (P,) rows to each rank
    n_received: list[int]  # (P,) rows from each rank
    n_slots: int  # (row, expert) pairs that arrive here for an expert held here


class ExpertInputs(NamedTuple):
    """What experts are given: arguments of `experts_ffn`."""

    x: Tensor  # (T, D)
    weights: Tensor  # (T, K) float32
    experts: Tensor  # (T, K) int64, counted from the first expert held; the number of experts held: elsewhere
    n_slots: int | None = None  # with an expert held here; None: all


class InFlight(NamedTuple):
    """Tokens that are being received. Nothing may read them before `wait`."""

    x: Tensor  # (R, D)
    routing: Tensor  # (R, 2K) weights, then ids over all experts
    transfers: tuple[Transfer, Transfer]
    n_local: int

    def wait(self) -> ExpertInputs:
        """Make the current stream wait for them. In backward, the transfer of their gradients starts here."""
        x, routing = (cast(Tensor, _Wait.apply(rows, j)) for rows, j in zip(self[:2], self.transfers, strict=True))
        plan = self.transfers[0].plan
        weights, ids = routing.chunk(2, dim=1)
        local = ids.detach().long() - dist.get_rank(plan.group) * self.n_local
        held = (local >= 0) & (local < self.n_local)
        return ExpertInputs(x, weights, torch.where(held, local, self.n_local), plan.n_slots)


class Transfer:
    """One tensor's transfer to the experts' ranks, and its gradient's back: the collectives that are in flight."""

    def __init__(self, plan: Exchange) -> None:
        self.plan = plan
        self.out: dist.Work | None = None
        self.back: tuple[Tensor, dist.Work] | None = None


def plan_exchange(experts: Tensor, n_local: int, group: dist.ProcessGroup) -> Exchange:
    """Count and place the rows of an exchange. The one place where the host waits for the device.

    Args:
        experts: (T, K) int64 ids over all experts; rank r holds [r * n_local, (r + 1) * n_local).
        n_local: experts of one rank.
        group: its ranks hold all experts.
    """
    n_ranks, n_tokens, device = dist.get_world_size(group), experts.shape[0], experts.device
    rank_of_slot = experts // n_local  # (T, K)
    slots = torch.zeros(n_tokens, n_ranks, dtype=torch.int64, device=device)
    slots.scatter_add_(1, rank_of_slot, torch.ones_like(rank_of_slot))  # (T, P) slots of each token on each rank
    goes = (slots > 0).t()  # (P, T)
    sent = torch.stack([goes.sum(1), slots.sum(0)], dim=1)  # (P, 2) rows and slots for each rank
    received = torch.empty_like(sent)
    runtime.meet()
    dist.all_to_all_single(received, sent, group=group)

    # While the counts are on their way: row numbers by rank, then token. What goes nowhere shares a place.
    most = n_tokens * min(n_ranks, experts.shape[1])
    row = goes.reshape(-1).cumsum(0).sub_(1).masked_fill_(~goes.reshape(-1), most)  # (P*T,)
    token = torch.empty(most + 1, dtype=torch.int32, device=device)
    token[row] = torch.arange(n_tokens, dtype=torch.int32, device=device).repeat(n_ranks)

    counts = torch.stack([sent[:, 0], received[:, 0], received[:, 1]]).tolist()
    n_sent = sum(counts[0])
    rows_of_token = row.view(n_ranks, n_tokens).t().clamp(max=n_sent).int()
    return Exchange(group, token[:n_sent], rows_of_token.contiguous(), counts[0], counts[1], sum(counts[2]))


def send(x: Tensor, weights: Tensor, experts: Tensor, n_local: int, plan: Exchange) -> InFlight:
    """Start to send tokens to the ranks of their experts.

    Args:
        x: (T, D); weights: (T, K); experts: (T, K) int64 ids over all experts.
        n_local: experts of one rank.
        plan: as `plan_exchange` made it from `experts`.
    """
    # Weights and ids travel together; ids are small enough to be exact in float32.
    routing = torch.cat([weights, experts.to(weights.dtype)], dim=1)  # (T, 2K)
    transfers = Transfer(plan), Transfer(plan)
    there = [cast(Tensor, _Send.apply(t, j)) for t, j in zip((x, routing), transfers, strict=True)]
    return InFlight(there[0], there[1], transfers, n_local)


def return_rows(y: Tensor, plan: Exchange) -> Tensor:
    """Return each received row to its token's rank: (R, D) -> (T, D), summed over ranks in their order."""
    return cast(Tensor, _ReturnRows.apply(y, plan))


class _Context(FunctionCtx):
    plan: Exchange
    transfer: Transfer


class _Send(torch.autograd.Function):
    """(T, X) -> (R, X), being received. Backward waits for the gradient that `_Wait` has sent back."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        received, transfer.out = _start_to_experts(x, transfer.plan)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, _: Tensor) -> tuple[Tensor, None]:
        assert ctx.transfer.back is not None
        (returned, work), ctx.transfer.back = ctx.transfer.back, None
        work.wait()
        return sum_rows_torch(returned, ctx.transfer.plan.rows_of_token), None


class _Wait(torch.autograd.Function):
    """(R, X), being received -> the same, received. Backward starts to send the gradient back, and does not wait."""

    @staticmethod
    def forward(ctx: _Context, received: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        # Taken, not kept: a request keeps what it received, whose autograd node keeps the transfer.
        work, transfer.out = transfer.out, None
        assert work is not None
        work.wait()
        return received.view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.back = _start_to_tokens(grad, ctx.transfer.plan)
        return grad, None


class _ReturnRows(torch.autograd.Function):
    """(R, X) -> (T, X)."""

    @staticmethod
    def forward(ctx: _Context, y: Tensor, plan: Exchange) -> Tensor:
        ctx.plan = plan
        returned, work = _start_to_tokens(y, plan)
        work.wait()
        return sum_rows_torch(returned, plan.rows_of_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        received, work = _start_to_experts(grad, ctx.plan)
        work.wait()
        return received, None


def _start_to_experts(x: Tensor, plan: Exchange) -> tuple[Tensor, dist.Work]:
    """(T, X) -> (R, X)."""
    received = x.new_empty(sum(plan.n_received), x.shape[1])
    rows = x.index_select(0, plan.token)
    return received, _exchange(received, rows, plan.n_received, plan.n_sent, plan.group)


def _start_to_tokens(rows: Tensor, plan: Exchange) -> tuple[Tensor, dist.Work]:
    """(R, X) -> (N + 1, X), whose rows `sum_rows_torch` sums per token; the last row stands for "no row"."""
    n_sent = sum(plan.n_sent)
    returned = rows.new_empty(n_sent + 1, rows.shape[1])
    returned[n_sent] = 0
    return returned, _exchange(returned[:n_sent], rows.contiguous(), plan.n_sent, plan.n_received, plan.group)


def _exchange(
    received: Tensor, sent: Tensor, n_received: list[int], n_sent: list[int], group: dist.ProcessGroup
) -> dist.Work:
    runtime.meet()
    return dist.all_to_all_single(received, sent, n_received, n_sent, group, async_op=True)
