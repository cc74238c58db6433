"""Where the tensors of a model that Composer saved stand in ours.

Two layouts: LLM Foundry's MPT, with dense blocks or MegaBlocks' experts, and our own names, which a checkpoint of
integrations/composer.py has.

Shapes: D d_model, F ffn hidden size, E experts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from llmfoundry.checkpoint.composer_files import ComposerFiles
from llmfoundry.checkpoint.manifest import CheckpointError
from llmfoundry.hf.pieces import Copy, Pieces, Spec
from llmfoundry.hf.pretrained import our_shapes
from llmfoundry.model.transformer import CausalLMConfig

_ROOT = "transformer."  # of every tensor of theirs but an untied head
_HEAD = "lm_head.weight"
_ATTENTION = {
    "attn.wqkv": "attn.Wqkv", "attn.wq": "attn.Wq", "attn.out_proj": "attn.out_proj", "attn.q_norm": "attn.q_ln",
    "attn.k_norm": "attn.k_ln",
}  # fmt: skip


def copies_from(files: ComposerFiles, config: CausalLMConfig) -> dict[str, list[Copy]]:
    """What leads to each tensor of a model of ours.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    pieces = Pieces(our_shapes(config))
    theirs = any(name.startswith(_ROOT) for name in files.specs)
    for name in pieces.shapes:
        if theirs:
            _add(pieces, name, files.specs)
        else:
            pieces.add(name, name)
    expected = pieces.their_shapes()
    for name, shape in expected.items():
        if name not in files.specs:
            close = difflib.get_close_matches(name, files.specs.keys() - expected.keys(), n=1)
            hint = f"; the nearest that is there is {close[0]!r}" if close else ""
            raise CheckpointError(f"{files.path}: tensor {name!r} is missing, which the model's config asks for{hint}")
        if files.specs[name].shape != shape:
            raise CheckpointError(
                f"{files.path}: tensor {name!r} has shape {list(files.specs[name].shape)}, "
                f"but the model's config makes it {list(shape)}"
            )
    for name in sorted(files.specs.keys() - expected.keys()):
        raise CheckpointError(f"{files.path}: tensor {name!r} has no place in a model of this config")
    pieces.check()
    return pieces.reading()


def _add(pieces: Pieces, name: str, specs: Mapping[str, Spec]) -> None:
    """Add what a tensor of ours is made of in LLM Foundry's MPT."""
    parts = name.split(".")
    if name == _HEAD:
        pieces.add(name, name)
    elif parts[0] == "blocks" and parts[3] == "wqkv" and f"{_ROOT}blocks.{parts[1]}.attn.Wk.{parts[-1]}" in specs:
        _add_unfused(pieces, name, f"{_ROOT}blocks.{parts[1]}.attn", specs)
    elif parts[0] != "blocks" or parts[2] != "ffn":
        pieces.add(name, _ROOT + _renamed(name))
    elif parts[3] == "experts":
        _add_experts(pieces, name, f"{_ROOT}blocks.{parts[1]}.ffn.experts", specs)
    elif parts[3] == "router":
        pieces.add(name, f"{_ROOT}blocks.{parts[1]}.ffn.router.layer.{parts[-1]}")
    elif parts[3] == "output_bias":
        pieces.add(name, f"{_ROOT}blocks.{parts[1]}.ffn.experts.bias")
    else:  # a dense block: the layer's own, or the shared expert
        _add_dense(pieces, name, specs)


def _renamed(name: str) -> str:
    for ours, theirs in _ATTENTION.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _add_unfused(pieces: Pieces, name: str, theirs: str, specs: Mapping[str, Spec]) -> None:
    """`attn_config.fused_qkv: false` keeps queries, keys and values apart."""
    kind, start = name.rsplit(".", 1)[1], 0
    for part in ("Wq", "Wk", "Wv"):
        spec = specs.get(f"{theirs}.{part}.{kind}")
        rows = 0 if spec is None else spec.shape[0]
        pieces.add(name, f"{theirs}.{part}.{kind}", (slice(start, start + rows),))
        start += rows


def _add_dense(pieces: Pieces, name: str, specs: Mapping[str, Spec]) -> None:
    block, matrix, kind = name.rsplit(".", 2)  # blocks.0.ffn, w1, weight
    if matrix == "w2":
        pieces.add(name, f"{_ROOT}{block}.down_proj.{kind}")
    elif f"{_ROOT}{block}.gate_proj.{kind}" in specs:
        half = pieces.shapes[name][0] // 2
        pieces.add(name, f"{_ROOT}{block}.gate_proj.{kind}", (slice(0, half),))
        pieces.add(name, f"{_ROOT}{block}.up_proj.{kind}", (slice(half, 2 * half),))
    else:
        pieces.add(name, f"{_ROOT}{block}.up_proj.{kind}" if matrix == "w1" else _ROOT + name)


def _add_experts(pieces: Pieces, name: str, theirs: str, specs: Mapping[str, Spec]) -> None:
    """Experts of MegaBlocks: dMoE stacks their rows, (E F, D); MoE keeps matrices for `x @ w`, (E, D, F)."""
    matrix = name.rsplit(".", 1)[1]
    if matrix not in ("w1", "w2"):
        pieces.add(name, f"{theirs}.{matrix}")  # nothing there has its name
        return
    n_experts, rows, columns = pieces.shapes[name]
    stacked = specs.get(f"{theirs}.mlp.{matrix}")
    if stacked is not None and len(stacked.shape) == 3:
        pieces.add(name, f"{theirs}.mlp.{matrix}", transposed=True)
        return
    hidden = columns if matrix == "w2" else rows // 2 if f"{theirs}.mlp.v1" in specs else rows
    for expert in range(n_experts):
        there = (slice(expert * hidden, None),)
        if matrix == "w2":
            pieces.add(name, f"{theirs}.mlp.w2", (expert,), there, transposed=True)
            continue
        pieces.add(name, f"{theirs}.mlp.w1", (expert, slice(0, hidden)), there)
        if hidden < rows:
            pieces.add(name, f"{theirs}.mlp.v1", (expert, slice(hidden, rows)), there)
