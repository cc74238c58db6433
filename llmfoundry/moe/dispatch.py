"""Expert parallelism: tokens reach the ranks that hold their experts, and their sums return.

Shapes: T tokens of this rank, D d_model, K top_k, P ranks of the group, R rows received.
A rank returns one row for each token that it received: the weighted sum over the experts it holds. The token's own rank
adds these rows in float32, in the order of ranks. There are two ways to the experts: `all_to_all.py` sends a token to
each rank that holds any of its experts, and `all_gather.py` gives every rank all tokens. Reaching the experts and
returning are each other's adjoint, so each one's backward is the other's forward.

An exchange is started in one autograd node and awaited in another, in both directions. Autograd runs, of the nodes
that are ready, the one that forward made last; so what forward makes between `send` and `wait` runs beside the way
there, and beside the gradients' way back: the shared expert, and the experts' weight gradients (kernels/late.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class ExpertInputs(NamedTuple):
    """What experts are given: arguments of `experts_ffn`."""

    x: Tensor  # (T, D)
    weights: Tensor  # (T, K) float32
    experts: Tensor  # (T, K) int32 or int64, counted from the first expert held; the number of experts held: elsewhere
    n_slots: int | None = None  # with an expert held here; None: all


class Exchange(ABC):
    """One layer's exchange of tokens between the ranks that hold its experts. Making it starts what it can.

    Args of its kinds:
        x: (T, D), the tokens of this rank.
        weights: (T, K) float32 (float64 where x is).
        experts: (T, K) ids over all experts; rank r holds [r * n_local, (r + 1) * n_local).
        n_local: experts of one rank.
        group: its ranks hold all experts.
    """

    def __init__(self, x: Tensor, weights: Tensor, experts: Tensor, n_local: int, group: dist.ProcessGroup) -> None:
        self.group, self.n_ranks, self.n_local = group, dist.get_world_size(group), n_local
        self.first = dist.get_rank(group) * n_local  # expert held here

    @abstractmethod
    def send(self, x: Tensor, weights: Tensor) -> InFlight:
        """Start to send the tokens that the exchange was made for, or go on with it."""

    @abstractmethod
    def inputs(self, x: Tensor, routing: Tensor) -> ExpertInputs:
        """What experts are given, of the rows that `send` has sent, once they have arrived."""

    @abstractmethod
    def to_experts(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to send tokens: (T, X) -> (R, X)."""

    @abstractmethod
    def to_tokens(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to return rows (R, X) to their tokens' ranks: what `sum_by_token` sums."""

    @abstractmethod
    def sum_by_token(self, returned: Tensor) -> Tensor:
        """The sum of each token's rows over ranks, in their order: (T, X), accumulated in float32."""


class Transfer:
    """One tensor's transfer to the experts' ranks, and its gradient's back: the collectives that are in flight.

    Args:
        started: what is being received, where the transfer has begun already; without a collective, it has arrived.
    """

    def __init__(self, exchange: Exchange, started: tuple[Tensor, dist.Work | None] | None = None) -> None:
        self.exchange = exchange
        self.back: tuple[Tensor, dist.Work] | None = None
        self._started = started
        self._arriving: dist.Work | None = None

    def start(self, x: Tensor) -> Tensor:
        """What is being received for `x`."""
        # Taken, not kept: a request keeps what it received, whose autograd node keeps the transfer.
        started, self._started = self._started or self.exchange.to_experts(x), None
        self._arriving = started[1]
        return started[0].data  # gloo writes when it is awaited, which autograd would take for a change to its history

    def wait(self) -> None:
        """Make the current stream wait for what is being received."""
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            arriving.wait()


class InFlight(NamedTuple):
    """Tokens that are being received. Nothing may read them before `wait`."""

    x: Tensor  # (R, D)
    routing: Tensor  # (R, X), as the exchange has it
    transfers: tuple[Transfer, Transfer]

    def wait(self) -> ExpertInputs:
        """Make the current stream wait for them. In backward, the transfer of their gradients starts here."""
        x, routing = (cast(Tensor, _Wait.apply(rows, j)) for rows, j in zip(self[:2], self.transfers, strict=True))
        return self.transfers[0].exchange.inputs(x, routing)


def in_flight(x: Tensor, routing: Tensor, transfers: tuple[Transfer, Transfer]) -> InFlight:
    """Let `x` and `routing`, of this rank's tokens, take these transfers."""
    there = [cast(Tensor, _Send.apply(t, j)) for t, j in zip((x, routing), transfers, strict=True)]
    return InFlight(there[0], there[1], transfers)


def return_rows(y: Tensor, exchange: Exchange) -> Tensor:
    """Return each received row to its token's rank: (R, D) -> (T, D), summed over ranks in their order."""
    return cast(Tensor, _ReturnRows.apply(y, exchange))


class _Context(FunctionCtx):
    exchange: Exchange
    transfer: Transfer


class _Send(torch.autograd.Function):
    """(T, X) -> (R, X), being received. Backward waits for the gradient that `_Wait` has sent back."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, _: Tensor) -> tuple[Tensor, None]:
        assert ctx.transfer.back is not None
        (returned, work), ctx.transfer.back = ctx.transfer.back, None
        work.wait()
        return ctx.transfer.exchange.sum_by_token(returned), None


class _Wait(torch.autograd.Function):
    """(R, X), being received -> the same, received. Backward starts to send the gradient back, and does not wait."""

    @staticmethod
    def forward(ctx: _Context, received: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.wait()
        return received.view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.back = ctx.transfer.exchange.to_tokens(grad.contiguous())
        return grad, None


class _ReturnRows(torch.autograd.Function):
    """(R, X) -> (T, X)."""

    @staticmethod
    def forward(ctx: _Context, y: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        returned, work = exchange.to_tokens(y.contiguous())
        work.wait()
        return exchange.sum_by_token(returned)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        received, work = ctx.exchange.to_experts(grad.contiguous())
        work.wait()
        return received, None
