"""Expert parallelism by all-to-all: each token is sent only to the ranks that hold any of its experts.

Shapes: T tokens of this rank, D d_model, K top_k, P ranks of the group, N rows sent, R rows received.
A token is sent once to each such rank, not once per expert: with K = 8 on 4 ranks, that halves the bytes. Rows are
ordered by rank, then by token. To the kernels this is an order by expert, with ranks in place of experts.

The host waits once per layer, for the counts that determine the buffer sizes; backward reuses them. The counts are
exchanged when the exchange is created, and read by `send`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.kernels.routing import Order, has_kernels, sort_by_expert, sum_rows_torch
from llmfoundry.moe.dispatch import Exchange, ExpertInputs, InFlight, Transfer, in_flight
from llmfoundry.numbers import Numbers


class Counts(NamedTuple):
    """The number of rows that this rank sends and receives."""

    n_sent: list[int]  # (P,) rows to each rank
    n_received: list[int]  # (P,) rows from each rank
    n_slots: int  # received (row, expert) pairs whose expert is on this rank


class AllToAll(Exchange):
    """The exchange by all-to-all, with different numbers of rows to and from each rank."""

    def __init__(self, x: Tensor, weights: Tensor, experts: Tensor, n_local: int, group: dist.ProcessGroup) -> None:
        super().__init__(x, weights, experts, n_local, group)
        self._kernels, self._experts = has_kernels(x), experts
        ranks = torch.arange(self.n_ranks, device=experts.device)
        slots = (experts.unsqueeze(2) // n_local == ranks).sum(1)  # (T, P) number of slots of each token on each rank
        sent = torch.stack([(slots > 0).sum(0), slots.sum(0)], dim=1)  # (P, 2) rows and slots for each rank
        self._begin_counting(sent)
        # This overlaps with the exchange of counts. Tokens that do not go to a rank are sorted last.
        self._order = _sorted(torch.where(slots > 0, ranks, self.n_ranks), self.n_ranks, self._kernels)

    def _begin_counting(self, sent: Tensor) -> None:
        received = torch.empty_like(sent)
        runtime.meet()
        dist.all_to_all_single(received, sent, group=self.group)
        self._numbers = Numbers(torch.cat([sent[:, 0], received.t().reshape(-1)]))

    def _counted(self) -> Counts:
        numbers = [int(number) for number in self._numbers.read()]
        n_sent, n_received, slots = (numbers[i * self.n_ranks : (i + 1) * self.n_ranks] for i in range(3))
        return Counts(n_sent, n_received, sum(slots))

    def send(self, x: Tensor, weights: Tensor) -> InFlight:
        """Wait for the counts, and start to send."""
        self.counts = self._counted()
        # Weights and ids are sent together; ids are small enough to be exact in float32.
        routing = torch.cat([weights, self._experts.to(weights.dtype)], dim=1)  # (T, 2K)
        return in_flight(x, routing, (Transfer(self), Transfer(self)))

    def inputs(self, x: Tensor, routing: Tensor) -> ExpertInputs:
        """Return the experts' inputs. Here `routing` (R, 2K) holds weights, then ids over all experts."""
        weights, ids = routing.chunk(2, dim=1)
        local = ids.detach().long() - self.first
        held = (local >= 0) & (local < self.n_local)
        return ExpertInputs(x, weights, torch.where(held, local, self.n_local), self.counts.n_slots)

    def to_experts(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to send tokens: (T, X) -> (R, X)."""
        n_sent = sum(self.counts.n_sent)
        if self._kernels:
            from llmfoundry.kernels.gather import gather  # triton may not be installed

            rows = gather(x.contiguous(), self._order, n_sent)
        else:
            rows = x.index_select(0, self._order.row_slot[:n_sent] // self.n_ranks)
        received = x.new_empty(sum(self.counts.n_received), x.shape[1])
        return received, self._exchange(received, rows, self.counts.n_received, self.counts.n_sent)

    def to_tokens(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to return rows: (R, X) -> (N + 1, X). The last row is zero and stands for "no row"."""
        n_sent = sum(self.counts.n_sent)
        returned = rows.new_empty(n_sent + 1, rows.shape[1])
        returned[n_sent] = 0
        return returned, self._exchange(returned[:n_sent], rows, self.counts.n_sent, self.counts.n_received)

    def sum_by_token(self, returned: Tensor) -> Tensor:
        """Sum over ranks: (N + 1, X) -> (T, X)."""
        if self._kernels:
            from llmfoundry.kernels.gather import sum_rows

            return sum_rows(returned, self._order, self.n_ranks)
        of_token = self._order.slot_row.clamp(max=returned.shape[0] - 1)
        return sum_rows_torch(returned, of_token.view(-1, self.n_ranks))

    def _exchange(self, received: Tensor, sent: Tensor, n_received: list[int], n_sent: list[int]) -> dist.Work:
        runtime.meet()
        return dist.all_to_all_single(received, sent, n_received, n_sent, self.group, async_op=True)


def _sorted(ranks: Tensor, n_ranks: int, by_kernels: bool) -> Order:
    if not by_kernels:
        return sort_by_expert(ranks, n_ranks)
    from llmfoundry.kernels.routing_triton import sort_by_expert_triton

    return sort_by_expert_triton(ranks, n_ranks)
