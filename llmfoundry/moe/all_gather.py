"""Expert parallelism by all-gather: every rank receives all tokens of the group, and computes its own experts for them.

Shapes: T tokens of each rank, D d_model, K top_k, P ranks of the group, R = P * T rows.
If P is small relative to K, nearly every token needs nearly every rank (with 2 ranks and K = 8: 99.6 %), so sending
only what is needed saves nothing. With an all-gather, all sizes are known in advance: no rows are counted, copied or
looked up, and partial sums return in equal parts. Every rank must have the same number of tokens.

The expert kernels still need the number of slots whose expert is on this rank. The routing, which is small, is gathered
first, and that number is copied to the host while the tokens are in flight, so that the host has launched the experts
before the tokens arrive.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.kernels.accumulate import sum_parts
from llmfoundry.kernels.routing import LocalRouting, has_kernels, local_routing, packed_routing
from llmfoundry.moe.dispatch import Exchange, ExpertInputs, InFlight, Transfer, in_flight
from llmfoundry.numbers import Numbers

Way = Literal["auto", "gather", "all_to_all"]
# A gather may receive this many times the rows that all-to-all would. A choice, not a measurement.
MOST_ROWS = 1.5


def gathers(way: Way, n_ranks: int, top_k: int, within_node: bool) -> bool:
    """Return whether to gather tokens rather than send them; implements `parallel.exchange_tokens`.

    With a gather, each token is received by the P - 1 other ranks. With all-to-all, it is received by the ranks that
    hold any of its experts: for evenly chosen experts, (P - 1) * (1 - (1 - 1/P)^K). `auto` gathers if the former is at
    most `MOST_ROWS` times the latter: on 2 ranks from K = 2, on 4 from K = 4, on 8 from K = 9. It does so only within a
    node, because links between nodes are slow.

    Args:
        way: gather, all_to_all or auto.
        n_ranks: P, the ranks that share the experts.
        top_k: K.
        within_node: whether these ranks are on one node.
    """
    if way != "auto":
        return way == "gather"
    return within_node and MOST_ROWS * (1 - (1 - 1 / n_ranks) ** top_k) >= 1


class AllGather(Exchange):
    """The exchange by all-gather: rows of all ranks, in rank order."""

    def __init__(self, x: Tensor, weights: Tensor, experts: Tensor, n_local: int, group: dist.ProcessGroup) -> None:
        super().__init__(x, weights, experts, n_local, group)
        routing, arriving = self.to_experts(packed_routing(weights.detach(), experts))
        tokens = self.to_experts(x.detach())
        arriving.wait()
        routed = self._local(routing, experts.shape[1], weights.dtype)
        self._experts = routed.experts
        self._begin_counting(routed.n_slots)
        self._started = tokens, (routed.weights, None)

    def _local(self, routing: Tensor, top_k: int, dtype: torch.dtype) -> LocalRouting:
        if not has_kernels(routing) or dtype != torch.float32:
            return local_routing(routing, top_k, dtype, self.first, self.n_local)
        from llmfoundry.kernels.routing_triton import local_routing_triton  # triton may not be installed

        return local_routing_triton(routing, self.first, self.n_local)

    def _begin_counting(self, n_slots: Tensor) -> None:
        self._numbers = Numbers(n_slots)

    @property
    def n_slots(self) -> int:
        """Number of (row, expert) pairs whose expert is on this rank; the host waits for it here."""
        return int(self._numbers.read().tolist()[0])

    def send(self, x: Tensor, weights: Tensor) -> InFlight:
        """Return the tokens in flight; their transfer began when the exchange was created."""
        tokens, routing = self._started
        del self._started  # a transfer refers to its exchange: a reference back would keep both alive
        return in_flight(x, weights, (Transfer(self, tokens), Transfer(self, routing)))

    def inputs(self, x: Tensor, routing: Tensor) -> ExpertInputs:
        """Return the experts' inputs. Here `routing` (R, K) holds only the weights."""
        return ExpertInputs(x, routing, self._experts, self.n_slots)

    def to_experts(self, x: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to gather tokens: (T, X) -> (P * T, X)."""
        received = x.new_empty(self.n_ranks * x.shape[0], x.shape[1])
        runtime.meet()
        return received, runtime.all_gather(received, x.contiguous(), group=self.group, async_op=True)

    def to_tokens(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to return rows: (P * T, X) of this rank's experts -> (P * T, X) of this rank's tokens, by rank."""
        returned = rows.new_empty(rows.shape)
        runtime.meet()
        return returned, dist.all_to_all_single(returned, rows, group=self.group, async_op=True)

    def sum_by_token(self, returned: Tensor) -> Tensor:
        """Sum over ranks: (P * T, X) -> (T, X)."""
        total = returned.new_empty(returned.shape[0] // self.n_ranks, returned.shape[1])
        sum_parts(total, None, returned.view(self.n_ranks, -1), 0, begins=True)
        return total
