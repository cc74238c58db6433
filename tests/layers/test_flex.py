from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from llmfoundry.layers import flex
from llmfoundry.layers.scores import plain_attention

CPU = torch.device("cpu")


def _ids(rows: int, length: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(rows, length, generator=generator) < 0.01
    ordered = starts.cumsum(1).int()
    return ordered if kind == "ordered" else ordered % 3


def _theirs(window: int, length: int, ids: Tensor | None) -> BlockMask:
    seen = flex._near(window) if ids is None else flex._near_in_document(window, ids)
    return create_block_mask(seen, None if ids is None else len(ids), None, length, length, device="cpu")


def _blocks(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """(B, N, N) each: the blocks seen in part, and in whole."""
    counts = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    dense = []
    for count, index in counts:
        assert count is not None and index is not None
        listed = torch.arange(index.shape[-1]) < count[..., None]
        dense.append(torch.zeros_like(listed).scatter(-1, index.long(), listed)[:, 0])
    return dense[0], dense[1]


@pytest.mark.parametrize("length", [1, 100, 128, 129, 640, 700])
@pytest.mark.parametrize("window", [0, 1, 127, 128, 200, flex.NO_WINDOW])
def test_blocks_are_those_that_looking_at_each_pair_finds(window: int, length: int) -> None:
    partial_, whole = _blocks(flex.block_mask(window, length, None, CPU))
    true_partial, true_whole = _blocks(_theirs(window, length, None))
    assert torch.equal(partial_, true_partial) and torch.equal(whole, true_whole)


@pytest.mark.parametrize("kind", ["ordered", "any"])
@pytest.mark.parametrize("window", [200, flex.NO_WINDOW])
def test_blocks_of_documents(window: int, kind: str) -> None:
    ids = _ids(3, 1500, kind)
    partial_, whole = _blocks(flex.block_mask(window, 1500, ids, CPU))
    true_partial, true_whole = _blocks(_theirs(window, 1500, ids))
    assert torch.equal(whole, true_whole)
    assert not (true_partial & ~partial_).any(), "a block that is seen is not visited"
    if kind == "ordered" and window == flex.NO_WINDOW:
        assert torch.equal(partial_, true_partial)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs of this test alone, which no compiler turns into code; passing a recompile limit is an error."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(flex, "_compiled", {})
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def _capped(cap: float, slopes: Tensor) -> flex.Score:
    def changed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap) + slopes[h] * (j - i)

    return changed


@pytest.mark.usefixtures("forgetful")
def test_each_kind_has_graphs_of_its_own_and_too_many_sizes_start_anew() -> None:
    """All kinds once shared the eight graphs that torch keeps of one function."""
    slopes, kinds = torch.rand(2), [(2.0, 3, 24), (5.0, 3, 24), (5.0, flex.NO_WINDOW, 24), (5.0, flex.NO_WINDOW, 200)]
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for cap, window, length in kinds:
            ids = _ids(2, length, "any")
            q, k, v = (torch.randn(2, heads, length, 8) for heads in (2, 1, 1))
            y, _ = flex.attend(q, k, v, flex.block_mask(window, length, ids, CPU), 0.3, _capped(cap, slopes))
            i, j = torch.arange(length)[:, None], torch.arange(length)
            seen = (j <= i) & (i - j <= window) & (ids[:, :, None] == ids[:, None])
            expected = plain_attention(q, k, v, seen[:, None], 0.3, cap, bias=slopes[:, None, None] * (j - i))
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert len(flex._compiled) == 3 and counters["stats"]["unique_graphs"] == 4
