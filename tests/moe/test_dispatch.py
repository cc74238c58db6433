"""The exchange of tokens between ranks: what is computed while it is on its way."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from llmfoundry.config import check
from llmfoundry.moe.all_gather import AllGather, gathers
from llmfoundry.moe.all_to_all import AllToAll
from llmfoundry.moe.dispatch import Exchange, ExpertInputs, return_rows
from llmfoundry.moe.layer import Experts, MoEConfig

pytestmark = pytest.mark.dist
T, D, E, K = 12, 16, 4, 2
WAYS = pytest.mark.parametrize("way", [AllToAll, AllGather])


class Watch(TorchDispatchMode):
    """The exchanges, products and sums over slots, in the order in which they are asked for."""

    NAMES = {  # noqa: RUF012
        "alltoall_base_": "exchange", "_allgather_base_": "exchange", "mm": "product",
        "_embedding_bag_forward_only": "sum", "add_parts_": "sum",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = self.NAMES.get(func.overloadpacket.__name__)
        if name is not None:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def _experts(impl: str) -> tuple[Experts, Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    keys = {"ffn_type": "moe", "ffn_hidden_size": 24, "moe_num_experts": E, "moe_top_k": K, "moe_impl": impl,
            "ffn_act_fn": {"name": "silu"}, "bias": True}  # fmt: skip
    experts = Experts(check(MoEConfig, keys), D).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, weights = torch.randn(T, D, dtype=torch.float64), torch.rand(T, K, dtype=torch.float64)
    ids = torch.rand(T, E).topk(K).indices
    return experts, lambda: (x.clone().requires_grad_(), weights.clone().requires_grad_(), ids)


@WAYS
@pytest.mark.parametrize("impl", ["grouped_mm", "reference"])
def test_an_exchange_changes_nothing(group: dist.ProcessGroup, impl: str, way: type[Exchange]) -> None:
    experts, draw = _experts(impl)
    found = []
    for travel in (False, True):
        x, weights, ids = draw()
        if travel:
            exchange = way(x, weights, ids, E, group)
            y = return_rows(experts(exchange.send(x, weights)), exchange)
        else:
            y = experts(ExpertInputs(x, weights, ids))
        y.square().sum().backward()
        found.append([y, x.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())])
        experts.zero_grad()
    for here, there in zip(*found, strict=True):
        assert here is not None and torch.equal(here, there)


def test_auto_gathers_where_nearly_every_token_needs_nearly_every_rank() -> None:
    least = {ranks: next(k for k in range(1, 99) if gathers("auto", ranks, k, True)) for ranks in (2, 4, 8, 16)}
    assert least == {2: 2, 4: 4, 8: 9, 16: 18}
    assert all(gathers("auto", 4, k, True) for k in range(4, 65)) and not gathers("auto", 4, 64, False)
    assert gathers("gather", 64, 1, False) and not gathers("all_to_all", 2, 64, True)


@WAYS
def test_weight_gradients_are_computed_while_the_gradients_of_tokens_travel(
    group: dist.ProcessGroup, way: type[Exchange]
) -> None:
    experts, draw = _experts("grouped_mm")
    x, weights, ids = draw()
    exchange = way(x, weights, ids, E, group)
    y = return_rows(experts(exchange.send(x, weights)), exchange)
    loss = y.square().sum()
    with Watch() as watch:
        loss.backward()
    products = ["product"] * E
    there = ["exchange", *products, *products, "sum"]  # dy travels; da and dx of each expert; dx summed over experts
    back = ["exchange"] * 2  # of weights and of x
    assert watch.seen == [*there, *back, *products, *products, "sum", "sum"]  # dw2 and dw1, and then they are awaited


@WAYS
def test_nothing_received_outlives_its_step(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, way: type[Exchange]
) -> None:
    """A request keeps what it received, which remembers its autograd node: kept there, it would never be freed.

    And nothing waits for the garbage collector, which does not know how much memory a GPU has left.
    """
    experts, draw = _experts("grouped_mm")
    seen: list[weakref.ref[torch.Tensor]] = []

    def watch(name: str) -> None:
        start = getattr(way, name)

        def watched(self: Exchange, x: torch.Tensor) -> tuple[torch.Tensor, dist.Work]:
            received, work = start(self, x)
            seen.append(weakref.ref(received))
            return received, work

        monkeypatch.setattr(way, name, watched)

    watch("to_experts")
    watch("to_tokens")
    x, weights, ids = draw()
    gc.disable()
    try:
        exchange = way(x, weights, ids, E, group)
        y = return_rows(experts(exchange.send(x, weights)), exchange)
        y.square().sum().backward()
        exchanged = weakref.ref(exchange)
        del y, x, weights, exchange
        assert len(seen) == 6 and [ref() for ref in seen] == [None] * 6
        assert exchanged() is None
    finally:
        gc.enable()
