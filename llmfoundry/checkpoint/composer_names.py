"""Where the tensors of a model that Composer saved stand in ours.

Two layouts: LLM Foundry's MPT, with dense blocks or MegaBlocks' experts, and our own names, which a checkpoint of
integrations/composer.py has.

Shapes: D d_model, F ffn hidden size, E experts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from llmfoundry.checkpoint.composer_files import METADATA, ComposerFiles, open_composer
from llmfoundry.checkpoint.manifest import CheckpointError
from llmfoundry.dtensor import local_shard
from llmfoundry.hf.pieces import Copy, Pieces, Spec, fill
from llmfoundry.hf.pretrained import our_shapes
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.layers.lora import is_adapter
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

_ROOT = "transformer."  # of every tensor of theirs but an untied head
_HEAD = "lm_head.weight"
_FUSED = "norm_attn_norm"  # the module that holds a layer's norms and attention where `fuse_norm_attn_norm` is true
_ATTENTION = {
    "attn.wqkv": "attn.Wqkv", "attn.wq": "attn.Wq", "attn.out_proj": "attn.out_proj", "attn.q_norm": "attn.q_ln",
    "attn.k_norm": "attn.k_ln",
}  # fmt: skip


def is_composer(path: str) -> bool:
    """Whether a `load_path` means a checkpoint of Composer's: FILE.pt, or a sharded folder."""
    return path.endswith(".pt") or (Path(path) / METADATA).is_file()


def load_composer(path: str, model: CausalLM) -> None:
    """Fill a model with the weights of a checkpoint; each rank of a sharded one reads what it holds.

    Args:
        model: materialised, on any device and mesh. Its adapters are left as they are.

    Raises:
        CheckpointError: what is wrong with the checkpoint, or it is of another model; nothing has changed then.
    """
    files = open_composer(Path(path))
    copies = copies_from(files, model.config)
    for name, tensor in model.state_dict().items():
        if not is_adapter(name):
            shard = local_shard(tensor)
            fill(shard.local, shard.offsets, copies[name], files)


def copies_from(files: ComposerFiles, config: CausalLMConfig) -> dict[str, list[Copy]]:
    """What leads to each tensor of a model of ours.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape, or LLM Foundry's code means another model.
    """
    pieces = Pieces(our_shapes(config))
    theirs = any(name.startswith(_ROOT) for name in files.specs)
    if theirs:
        _check_norms(config, files.path)
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


def _check_norms(config: CausalLMConfig, path: Path) -> None:
    """Refuse norms of queries and keys that are other ones there: LayerNorm of eps 1e-5, whatever the model's are."""
    attention = config.attention
    if not isinstance(attention, GroupedQueryConfig) or not attention.qk_ln:
        return
    if config.norm.is_rms or config.norm_eps != 1e-5:
        raise CheckpointError(
            f"{path}: model.attn_config.qk_ln: LLM Foundry normalises queries and keys by a LayerNorm of eps 1e-5, "
            f"whatever norm_type={config.norm_type} and norm_eps={config.norm_eps} say; this framework cannot have both"
        )


def _add(pieces: Pieces, name: str, specs: Mapping[str, Spec]) -> None:
    """Add what a tensor of ours is made of in LLM Foundry's MPT."""
    parts = name.split(".")
    if name == _HEAD:
        pieces.add(name, name)
    elif apart := _apart(name, pieces.shapes[name], specs):
        start = 0
        for theirs, rows in apart.items():
            pieces.add(name, theirs, (slice(start, start + rows),))
            start += rows
    elif parts[0] != "blocks" or parts[2] != "ffn":
        pieces.add(name, _ROOT + _renamed(name, specs))
    elif parts[3] == "experts":
        _add_experts(pieces, name, f"{_ROOT}blocks.{parts[1]}.ffn.experts", specs)
    elif parts[3] == "router":
        pieces.add(name, f"{_ROOT}blocks.{parts[1]}.ffn.router.layer.{parts[-1]}")
    elif parts[3] == "output_bias":
        pieces.add(name, f"{_ROOT}blocks.{parts[1]}.ffn.experts.bias")
    else:  # a dense block: the layer's own, or the shared expert
        _add_dense(pieces, name, specs)


def _apart(name: str, shape: tuple[int, ...], specs: Mapping[str, Spec]) -> dict[str, int]:
    """Their matrices of queries, keys and values with the rows of each, where `fused_qkv: false` keeps them apart."""
    if ".attn.wqkv." not in name:
        return {}
    names = [_ROOT + _renamed(name, specs).replace("Wqkv", matrix) for matrix in ("Wq", "Wk", "Wv")]
    rows = {each: specs[each].shape[0] for each in names if each in specs and specs[each].shape}
    return rows if sum(rows.values()) == shape[0] and all(rows.values()) else {}


def _renamed(name: str, specs: Mapping[str, Spec]) -> str:
    for ours, theirs in _ATTENTION.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    if f"{_ROOT}blocks.0.{_FUSED}.norm_1.weight" in specs:
        return re.sub(r"^(blocks\.\d+)\.", rf"\1.{_FUSED}.", name)
    return name


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
