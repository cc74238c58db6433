"""Expert parallelism: sends tokens to the ranks that hold their experts, and returns the sums of their outputs.

Shapes: T tokens of this rank, D d_model, K top_k, P ranks of the group, R rows received.
A rank returns one row for each token that it received: the weighted sum over its own experts. The token's rank adds
these rows in float32, in rank order. There are two implementations: `all_to_all.py` sends a token to each rank that
holds any of its experts, and `all_gather.py` sends all tokens to every rank. Sending and returning are adjoint, so the
backward of each is the forward of the other.

In both directions, an exchange is started in one autograd node and awaited in another. Of the nodes that are ready,
autograd runs the one that forward created last. So what forward creates between `send` and `wait` overlaps with the
transfer, and in backward with the transfer of the gradients: the shared expert, and the experts' weight gradients
(kernels/late.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class ExpertInputs(NamedTuple):
    """Inputs of the experts: arguments of `experts_ffn`."""

    x: Tensor  # (T, D)
    weights: Tensor  # (T, K) float32
    experts: Tensor  # (T, K) int32 or int64, relative to this rank's first expert; experts on other ranks are n_local
    n_slots: int | None = None  # number of slots whose expert is on this rank; None: all


class Exchange(ABC):
    """One layer's exchange of tokens between the ranks that hold its experts. Creating it starts what can be started.

    Arguments of subclasses:
        x: (T, D), the tokens of this rank.
        weights: (T, K) float32 (float64 if `x` is).
        experts: (T, K) ids over all experts; rank r holds [r * n_local, (r + 1) * n_local).
        n_local: number of experts per rank.
        group: the ranks that hold all experts.
    """

    def __init__(self, x: Tensor, weights: Tensor, experts: Tensor, n_local: int, group: dist.ProcessGroup) -> None:
        self.group, self.n_ranks, self.n_local = group, dist.get_world_size(group), n_local
        self.first = dist.get_rank(group) * n_local  # this rank's first expert

    @abstractmethod
    def send(self, x: Tensor, weights: Tensor) -> InFlight:
        """Start to send the tokens that the exchange was created for, unless this has begun."""

    @abstractmethod
    def inputs(self, x: Tensor, routing: Tensor) -> ExpertInputs:
        """Return the experts' inputs, made from the rows that `send` sent, once they have arrived."""

    @abstractmethod
    def to_experts(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to send tokens: (T, X) -> (R, X)."""

    @abstractmethod
    def to_tokens(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to return rows (R, X) to their tokens' ranks; returns the input of `sum_by_token`."""

    @abstractmethod
    def sum_by_token(self, returned: Tensor) -> Tensor:
        """Sum each token's rows over ranks, in rank order: (T, X), accumulated in float32."""


class Transfer:
    """The transfer of one tensor to the experts' ranks, and of its gradient back, as collectives in flight.

    Args:
        exchange: how to transfer.
        started: the tensor being received, if the transfer has already begun; if its collective is None, it has
            arrived.
    """

    def __init__(self, exchange: Exchange, started: tuple[Tensor, dist.Work | None] | None = None) -> None:
        self.exchange = exchange
        self.back: tuple[Tensor, dist.Work] | None = None
        self._started = started
        self._arriving: dist.Work | None = None

    def start(self, x: Tensor) -> Tensor:
        """Return the tensor being received for `x`."""
        # Do not keep a reference: a work handle keeps what it received, and the autograd node keeps this transfer.
        started, self._started = self._started or self.exchange.to_experts(x), None
        self._arriving = started[1]
        return started[0].data  # gloo writes in wait(), which autograd would take for an in-place change

    def wait(self) -> None:
        """Make the current stream wait until the tensor has been received."""
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            arriving.wait()


class InFlight(NamedTuple):
    """Tokens that are being received. They must not be read before `wait`."""

    x: Tensor  # (R, D)
    routing: Tensor  # (R, X), in the exchange's own format
    transfers: tuple[Transfer, Transfer]

    def wait(self) -> ExpertInputs:
        """Make the current stream wait for the tokens. In backward, the transfer of their gradients starts here."""
        x, routing = (cast(Tensor, _Wait.apply(rows, j)) for rows, j in zip(self[:2], self.transfers, strict=True))
        return self.transfers[0].exchange.inputs(x, routing)


def in_flight(x: Tensor, routing: Tensor, transfers: tuple[Transfer, Transfer]) -> InFlight:
    """Start the transfers of `x` and `routing`, which belong to this rank's tokens."""
    there = [cast(Tensor, _Send.apply(t, j)) for t, j in zip((x, routing), transfers, strict=True)]
    return InFlight(there[0], there[1], transfers)


def return_rows(y: Tensor, exchange: Exchange) -> Tensor:
    """Return each received row to its token's rank: (R, D) -> (T, D), summed over ranks in rank order."""
    return cast(Tensor, _ReturnRows.apply(y, exchange))


class _Context(FunctionCtx):
    exchange: Exchange
    transfer: Transfer


class _Send(torch.autograd.Function):
    """(T, X) -> (R, X), still being received. Backward waits for the gradient that `_Wait` sent back."""

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
    """(R, X) being received -> (R, X) received. Backward starts to send the gradient back, without waiting."""

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
    """(R, X) -> (T, X). Transfers in forward and backward."""

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
