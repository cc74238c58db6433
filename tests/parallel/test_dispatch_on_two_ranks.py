"""The exchange between two real ranks, by itself: outputs and gradients are those of all experts in one place.

Shapes: T tokens per rank, D d_model, E experts, K top_k.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from llmfoundry.kernels.experts import experts_ffn
from llmfoundry.moe.all_gather import AllGather
from llmfoundry.moe.all_to_all import AllToAll
from llmfoundry.moe.dispatch import Exchange, return_rows
from llmfoundry.standalone.moe import MoE

pytestmark = pytest.mark.dist
T, D, F, E, K = 13, 16, 24, 4, 2


def draw(rank: int, routing: str) -> list[torch.Tensor]:
    """x (T, D), weights (T, K), experts (T, K) of a rank; w1 (E, 2F, D), w2 (E, D, F) of all."""
    g = torch.Generator().manual_seed(rank)
    experts = torch.rand(T, E, generator=g).topk(K, 1).indices
    if routing == "to rank 1":
        experts = experts % 2 + 2
    if routing == "rank 0 to itself" and rank == 0:
        experts = experts % 2
    x, weights = torch.randn(T, D, generator=g), torch.rand(T, K, generator=g)
    shared = torch.Generator().manual_seed(9)
    w1, w2 = torch.randn(E, 2 * F, D, generator=shared), torch.randn(E, D, F, generator=shared)
    return [x.double(), weights.double(), experts, w1.double(), w2.double()]


def job(routing: str, way: type[Exchange]) -> None:
    rank, kwargs = dist.get_rank(), {"activation": "silu", "gated": True, "backend": "reference"}
    x, weights, experts, w1, w2 = draw(rank, routing)
    leaves = [v.requires_grad_() for v in (x, weights)]
    own = [w[rank * E // 2 : (rank + 1) * E // 2].clone().requires_grad_() for w in (w1, w2)]
    exchange = way(x, weights, experts, E // 2, dist.group.WORLD)
    here = exchange.send(x, weights).wait()
    assert here.n_slots == int((here.experts < E // 2).sum())
    y = return_rows(experts_ffn(here.x, here.weights, here.experts, *own, n_rows=here.n_slots, **kwargs), exchange)
    g = torch.Generator().manual_seed(100 + rank)
    dy = torch.randn(T, D, generator=g).double()
    y.backward(dy)

    true_own = [w.clone().requires_grad_() for w in (w1, w2)]
    for other in range(2):  # the weights' gradients are those of both ranks' tokens
        ox, oweights, oexperts, _, _ = draw(other, routing)
        true_leaves = [v.requires_grad_() for v in (ox, oweights)]
        true = experts_ffn(ox, oweights, oexperts, *true_own, **kwargs)
        true.backward(torch.randn(T, D, generator=torch.Generator().manual_seed(100 + other)).double())
        if other == rank:
            torch.testing.assert_close(y, true, rtol=1e-12, atol=1e-12)
            for found, leaf in zip(leaves, true_leaves, strict=True):
                torch.testing.assert_close(found.grad, leaf.grad, rtol=1e-10, atol=1e-10)
    for found, leaf in zip(own, true_own, strict=True):
        assert leaf.grad is not None
        expected = leaf.grad[rank * E // 2 : (rank + 1) * E // 2]
        torch.testing.assert_close(found.grad, expected, rtol=1e-10, atol=1e-10)


def layer_job() -> None:
    """A whole layer; with gathered tokens in training, and with as many tokens as each rank happens to have after."""
    rank = dist.get_rank()
    settings = {
        "ffn_hidden_size": F,
        "moe_num_experts": E,
        "moe_top_k": K,
        "shared_expert": True,
        "dtype": torch.float64,
    }
    whole = MoE(D, **settings, init_std=0.5, moe_capacity_factor=0.8)
    part = MoE(D, **settings, init_std=0.5, moe_capacity_factor=0.8, expert_group=dist.group.WORLD)
    part.gathers = True
    for n_tokens, training in ((7, True), (1, True), (3 + 4 * rank, False), (5 * rank, False), (0, False)):
        x = torch.randn(n_tokens, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        found, true = part.train(training)(x), whole.train(training)(x)
        torch.testing.assert_close(found.y, true.y, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.load, true.load)
    with torch.no_grad():
        torch.testing.assert_close(part(x[:0]).y, x[:0])


def jobs(routings: list[str]) -> None:
    layer_job()
    for routing in routings:
        for way in (AllToAll, AllGather):
            job(routing, way)


def test_two_ranks_compute_what_one_does() -> None:
    run_ranks([2], jobs, ["natural", "to rank 1", "rank 0 to itself"])
