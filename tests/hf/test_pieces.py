"""The rule engine by itself: pieces tile both sides, and any box of either side can be filled alone."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from theirs import CASES, Case
from torch import Tensor
from transformers import AutoConfig

from llmfoundry.hf.family import read_config
from llmfoundry.hf.pieces import Copy, Part, Pieces, Spec, fill
from llmfoundry.hf.pretrained import pieces_of


class Tensors:
    """Tensors in memory, each kept in bands of so many rows."""

    def __init__(self, tensors: dict[str, Tensor], rows: int = 10**9) -> None:
        self.tensors, self.rows = tensors, rows
        self.specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def parts(self, name: str) -> Iterable[Part]:
        tensor = self.tensors[name]
        for start in range(0, tensor.shape[0], self.rows):
            yield Part((start, *[0] * (tensor.dim() - 1)), tensor[start : start + self.rows])


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors in which every value is another one."""
    found, count = {}, 0
    for name, shape in shapes.items():
        found[name] = torch.arange(count, count + torch.Size(shape).numel(), dtype=torch.float64).view(shape)
        count += found[name].numel()
    return found


def whole(copies: dict[str, list[Copy]], shapes: dict[str, tuple[int, ...]], source: Tensors) -> dict[str, Tensor]:
    found = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name, shape in shapes.items()}
    for name, tensor in found.items():
        fill(tensor, (0,) * tensor.dim(), copies[name], source)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model_type}: {case.about}")
def test_every_value_has_one_place_on_either_side(case: Case) -> None:
    settings = AutoConfig.for_model(case.model_type, **case.settings).to_dict()
    family, config = read_config(settings)
    for layout in family.layouts:
        pieces = pieces_of(family, config, layout)
        ours = numbered(pieces.shapes)
        theirs = whole(pieces.writing(), pieces.their_shapes(), Tensors(ours))
        values = torch.cat([tensor[pieces.left.get(name, 0) :].flatten() for name, tensor in theirs.items()])
        assert torch.equal(values.sort().values, torch.arange(len(values), dtype=torch.float64))
        back = whole(pieces.reading(), pieces.shapes, Tensors(theirs))
        assert all(torch.equal(back[name], ours[name]) for name in ours)


def interleaved() -> Pieces:
    """Stacked, transposed, interleaved: (E, 2F, D) of ours is (E, D, 2F) of theirs, as in gpt-oss."""
    pieces = Pieces({"w": (4, 6, 5)})
    every = slice(None)
    pieces.add("w", "t", (every, slice(0, 3)), (every, every, slice(0, None, 2)), transposed=True)
    pieces.add("w", "t", (every, slice(3, 6)), (every, every, slice(1, None, 2)), transposed=True)
    return pieces


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_any_box_is_filled_alone(rows: int) -> None:
    """What a rank reads: every box of every size, from a source that is itself in parts."""
    pieces = interleaved()
    ours = numbered(pieces.shapes)
    theirs = whole(pieces.writing(), pieces.their_shapes(), Tensors(ours, rows))
    assert torch.equal(theirs["t"], torch.stack([ours["w"][:, :3], ours["w"][:, 3:]], 2).flatten(1, 2).mT)
    for (name, tensor), copies, source in (
        (("w", ours["w"]), pieces.reading(), Tensors(theirs, rows)),
        (("t", theirs["t"]), pieces.writing(), Tensors(ours, rows)),
    ):
        for start in torch.cartesian_prod(*(torch.arange(n) for n in tensor.shape)).tolist():
            for size in ((1, 1, 1), (2, 3, 2), (4, 6, 6)):
                index = tuple(slice(a, min(a + n, e)) for a, n, e in zip(start, size, tensor.shape, strict=True))
                box = torch.full_like(tensor[index], torch.nan)
                fill(box, tuple(start), copies[name], source)
                assert torch.equal(box, tensor[index])


def test_an_empty_shard_reads_nothing() -> None:
    fill(torch.empty(0, 6, 5), (4, 0, 0), interleaved().reading()["w"], Tensors({}))


def test_pieces_that_leave_something_out_are_found() -> None:
    pieces = Pieces({"w": (4, 3)})
    pieces.add("w", "t", (slice(0, 3),))
    with pytest.raises(AssertionError, match="w: the pieces cover 9 values"):
        pieces.check()
