"""Maps the tensors of Composer checkpoints to llmfoundry tensors.

There are two layouts: LLM Foundry's MPT (hf/families/mpt_foundry.py), and llmfoundry's own names, as saved by
integrations/composer.py.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from llmfoundry.checkpoint.composer_files import METADATA, ComposerFiles, open_composer
from llmfoundry.checkpoint.manifest import CheckpointError
from llmfoundry.dtensor import local_shard
from llmfoundry.hf.families.mpt_foundry import FoundryMPT
from llmfoundry.hf.pieces import Copy, Pieces, fill
from llmfoundry.hf.pretrained import our_shapes
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.layers.lora import is_adapter
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

_FAMILY = FoundryMPT()


def is_composer(path: str) -> bool:
    """Return whether a `load_path` is a Composer checkpoint: FILE.pt, or a sharded folder."""
    return path.endswith(".pt") or (Path(path) / METADATA).is_file()


def load_composer(path: str, model: CausalLM) -> None:
    """Load the weights of a Composer checkpoint into a model; each rank of a sharded model reads what it holds.

    Args:
        path: FILE.pt, or a sharded folder.
        model: materialized, on any device and mesh. Its adapters are not changed.

    Raises:
        CheckpointError: if the checkpoint is damaged, or of another model; the model is then unchanged.
    """
    files = open_composer(Path(path))
    copies = copies_from(files, model.config)
    for name, tensor in model.state_dict().items():
        if not is_adapter(name):
            shard = local_shard(tensor)
            fill(shard.local, shard.offsets, copies[name], files)


def copies_from(files: ComposerFiles, config: CausalLMConfig) -> dict[str, list[Copy]]:
    """Return the copies that fill each tensor of an llmfoundry model.

    Raises:
        CheckpointError: if a tensor is missing, unexpected or of the wrong shape, or LLM Foundry's code computes
            another model.
    """
    pieces = Pieces(our_shapes(config))
    if any(name.startswith(_FAMILY.prefix) for name in files.specs):
        _check_attention(config, files.path)
        _FAMILY.add_pieces(config, pieces, _FAMILY.layout_of(files.specs))
        for name in sorted(pieces.shapes.keys() - {piece.ours.name for piece in pieces.pieces}):
            raise CheckpointError(f"{files.path}: no tensor there is {name!r}, which the model's config requires")
    else:
        for name in pieces.shapes:
            pieces.add(name, name)
    expected = pieces.their_shapes()
    for name, shape in expected.items():
        if name not in files.specs:
            close = difflib.get_close_matches(name, files.specs.keys() - expected.keys(), n=1)
            hint = f"; the nearest that is there is {close[0]!r}" if close else ""
            raise CheckpointError(f"{files.path}: tensor {name!r} is missing, which the model's config requires{hint}")
        if files.specs[name].shape != shape:
            raise CheckpointError(
                f"{files.path}: tensor {name!r} has shape {list(files.specs[name].shape)}, "
                f"but the model's config makes it {list(shape)}"
            )
    for name in sorted(files.specs.keys() - expected.keys()):
        raise CheckpointError(f"{files.path}: tensor {name!r} has no place in a model of this config")
    pieces.check()
    return pieces.reading()


def _check_attention(config: CausalLMConfig, path: Path) -> None:
    """Raise CheckpointError for attention or QK-norms that LLM Foundry lacks: it uses LayerNorm with eps 1e-5."""
    attention = config.attention
    if not isinstance(attention, GroupedQueryConfig):
        raise CheckpointError(f"{path}: model.attn_config.attn_type: LLM Foundry has no {attention.attn_type}")
    norm = attention.head_norm(config.norm)
    if (attention.qk_ln or attention.qk_norm) and (norm.is_rms or norm.eps != 1e-5):
        raise CheckpointError(
            f"{path}: model.attn_config: LLM Foundry normalises queries and keys by a LayerNorm of eps 1e-5, whatever "
            f"norm_type={config.norm_type} and norm_eps={config.norm_eps} say; write attn_config.norm_type: layernorm "
            "and attn_config.norm_eps: 1.0e-5"
        )
