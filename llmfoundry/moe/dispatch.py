"""Expert parallelism: tokens go to the ranks that hold their experts, and come back summed.

Shapes: T tokens of this rank, D d_model, K top_k, P ranks of the group, N rows sent, R rows received.
A token is sent once to each rank that holds any of its experts, not once to each expert, and that rank
returns one row: the weighted sum over the experts it holds. With K = 8 on 4 ranks that is half the bytes.

The host waits once a layer, for the counts that size the buffers; backward knows them. Sending and returning
are each other's adjoint, so each one's backward is the other's forward.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llmfoundry.kernels.routing import sum_rows


class Plan(NamedTuple):
    """Who sends which tokens to whom in one layer."""

    group: dist.ProcessGroup
    token: Tensor  # (N,) int32, the token of each row sent, by rank, then by token
    rows_of_token: Tensor  # (T, P) int32, each token's row for each rank; N where none goes there
    n_sent: list[int]  # (P,) rows to each rank
    n_received: list[int]  # (P,) rows from each rank
    n_slots: int  # (row, expert) pairs that arrive here for an expert held here


class Received(NamedTuple):
    """What arrived from all ranks: arguments of this rank's experts. Complete after `wait()`."""

    x: Tensor  # (R, D)
    weights: Tensor  # (R, K) float32
    experts: Tensor  # (R, K) int64, counted from this rank's first; the number of local experts: held elsewhere
    transfers: list[dist.Work]

    def wait(self) -> None:
        """Make the current stream wait for the rows; what is computed before overlaps with their way."""
        for transfer in self.transfers:
            transfer.wait()


def plan_exchange(experts: Tensor, n_local: int, group: dist.ProcessGroup) -> Plan:
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
    dist.all_to_all_single(received, sent, group=group)

    # While the counts are on their way: row numbers by rank, then token. What goes nowhere shares a place.
    most = n_tokens * min(n_ranks, experts.shape[1])
    row = goes.reshape(-1).cumsum(0).sub_(1).masked_fill_(~goes.reshape(-1), most)  # (P*T,)
    token = torch.empty(most + 1, dtype=torch.int32, device=device)
    token[row] = torch.arange(n_tokens, dtype=torch.int32, device=device).repeat(n_ranks)

    counts = torch.stack([sent[:, 0], received[:, 0], received[:, 1]]).tolist()
    n_sent = sum(counts[0])
    rows_of_token = row.view(n_ranks, n_tokens).t().clamp(max=n_sent).int()
    return Plan(group, token[:n_sent], rows_of_token.contiguous(), counts[0], counts[1], sum(counts[2]))


def send(x: Tensor, weights: Tensor, experts: Tensor, n_local: int, plan: Plan) -> Received:
    """Start tokens on their way to the ranks of their experts.

    Args:
        x: (T, D); weights: (T, K); experts: (T, K) int64 ids over all experts.
        n_local: experts of one rank.
        plan: as `plan_exchange` made it from `experts`.
    """
    first = dist.get_rank(plan.group) * n_local
    transfers: list[dist.Work] = []
    # Weights and ids travel together; ids are small enough to be exact in float32.
    routing = torch.cat([weights, experts.to(weights.dtype)], dim=1)  # (T, 2K)
    x_received = cast(Tensor, _Send.apply(x, plan, transfers))
    routing_received = cast(Tensor, _Send.apply(routing, plan, None))
    weights_received, ids = routing_received.chunk(2, dim=1)
    local = ids.detach().long() - first
    held = (local >= 0) & (local < n_local)
    return Received(x_received, weights_received, torch.where(held, local, n_local), transfers)


def give_back(y: Tensor, plan: Plan) -> Tensor:
    """Return each received row to its token's rank: (R, D) -> (T, D), summed over ranks in their order."""
    return cast(Tensor, _GiveBack.apply(y, plan))


class _Context(FunctionCtx):
    plan: Plan


class _Send(torch.autograd.Function):
    """(T, X) -> (R, X)."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, plan: Plan, transfers: list[dist.Work] | None) -> Tensor:
        ctx.plan = plan
        return _to_experts(x, plan, transfers)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return _to_tokens(grad, ctx.plan), None, None


class _GiveBack(torch.autograd.Function):
    """(R, X) -> (T, X)."""

    @staticmethod
    def forward(ctx: _Context, y: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _to_tokens(y, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return _to_experts(grad, ctx.plan, None), None


def _to_experts(x: Tensor, plan: Plan, transfers: list[dist.Work] | None) -> Tensor:
    """(T, X) -> (R, X); with `transfers`, on the way when this returns, and waited for by its caller."""
    received = x.new_empty(sum(plan.n_received), x.shape[1])
    work = dist.all_to_all_single(
        received, x.index_select(0, plan.token), plan.n_received, plan.n_sent, plan.group,
        async_op=transfers is not None,
    )  # fmt: skip
    if transfers is not None:
        transfers.append(work)
    return received


def _to_tokens(rows: Tensor, plan: Plan) -> Tensor:
    """(R, X) -> (T, X), the sum of what each token's ranks return."""
    n_sent = sum(plan.n_sent)
    returned = rows.new_empty(n_sent + 1, rows.shape[1])  # the last row stands for "no row"
    dist.all_to_all_single(returned[:n_sent], rows.contiguous(), plan.n_sent, plan.n_received, plan.group)
    returned[n_sent] = 0
    return sum_rows(returned, plan.rows_of_token)
