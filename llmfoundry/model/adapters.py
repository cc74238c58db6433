"""Saves and loads LoRA adapters in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`), and merges them.

Shapes: D in, N out, r rank, E experts.
PEFT names a tensor after a module of the Hugging Face model, which may hold only a part of one of llmfoundry's fused
weights (`q_proj` is some rows of `wqkv`). So callers pass a `Names` function. When saving, such parts share the same A.
When loading, each part may have its own A: their ranks then add up and must fit the model's rank.
PEFT stacks the experts' A as (E r, D), with the experts outermost, and B as (N, r E), with the experts innermost. Two
stacked parameters of one module are nested: the tensors of the first lie under `base_layer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.atomic import atomic_write
from llmfoundry.dtensor import local_shard, whole
from llmfoundry.kernels.halves import weight_of
from llmfoundry.layers.lora import LoRAConfig, adapted, adapters, frozen_weights, is_adapter
from llmfoundry.model.transformer import CausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# In MoE models, PEFT takes linear layers with these names for the experts of transformers 4, and doubles their rank.
_OLD_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class PeftPart(NamedTuple):
    """A module or stacked parameter of the Hugging Face model that holds all or some rows of an llmfoundry weight."""

    name: str  # without `.weight`
    rows: slice | Tensor = slice(None)  # rows of the llmfoundry weight, along N, in this part's order


Names = Callable[[str], Sequence[PeftPart]]  # from an llmfoundry weight name, without `.weight`


class _Entry(NamedTuple):
    """Where PEFT stores the adapter of one part."""

    name: str  # of the llmfoundry weight
    part: PeftPart
    stacked: bool
    key: str  # tensor name before `.lora_A.weight`


def save_peft(
    model: CausalLM,
    folder: str | Path,
    names: Names,
    base_model: str | None = None,
    optimizer: Optimizer | None = None,
) -> None:
    """Write a model's adapters in PEFT's format.

    Args:
        model: the model, sharded or not. All ranks must call this; rank 0 writes.
        folder: the folder to write to; it is created if needed.
        names: the Hugging Face model's names.
        base_model: the value of `base_model_name_or_path`.
        optimizer: the optimizer of a model in training; it may keep the low halves of weights (kernels/halves.py).

    Raises:
        ValueError: if the model has no adapters.
        OSError: on all ranks, if they cannot be written.
    """
    config = model.config.lora
    if config is None:
        raise ValueError("the model has no adapters; set model.lora")
    entries, tensors = _entries(model, names), {}
    values = {name: (whole(weight_of(a, optimizer)), whole(weight_of(b, optimizer))) for name, a, b in adapters(model)}
    for entry in entries:
        a, b = values[entry.name]
        b = b[..., entry.part.rows, :]
        if entry.stacked:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)  # (E r, D), (N, r E)
        tensors[f"{entry.key}.lora_A.weight"] = a.contiguous().clone()  # safetensors files cannot share memory
        tensors[f"{entry.key}.lora_B.weight"] = b.contiguous()
    mixture = any(p.dim() == 3 for p in model.parameters())
    settings = json.dumps(_peft_config(config, entries, mixture, base_model), indent=2) + "\n"

    def write() -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        atomic_write(Path(folder) / WEIGHTS, [save(tensors, {"format": "pt"})])
        atomic_write(Path(folder) / CONFIG, [settings.encode()])

    runtime.on_rank0(write)


@torch.no_grad()
def load_peft(model: CausalLM, folder: str | Path, names: Names) -> None:
    """Load adapters from PEFT's files into the model's adapters, which keep their rank and scale.

    B is set to 0 for weights that the files do not adapt.

    Raises:
        ValueError: if the files hold adapters that the model cannot represent.
    """
    folder = Path(folder)
    settings = json.loads((folder / CONFIG).read_text())
    unknown = [key for key in ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern") if settings.get(key)]
    if settings.get("peft_type") != "LORA" or unknown:
        raise ValueError(f"{folder / CONFIG}: {', '.join(unknown) or 'peft_type'} is not supported; use plain LORA")
    rank, ours = settings["r"], model.config.lora
    if ours is None:
        raise ValueError("the model has no adapters; set model.lora")
    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    tensors = load_file(folder / WEIGHTS)
    parts: dict[str, list[tuple[PeftPart, Tensor, Tensor]]] = {}
    for entry in _entries(model, names):
        a, b = (tensors.pop(f"{entry.key}.lora_{side}.weight", None) for side in "AB")
        if a is not None and b is not None:
            if entry.stacked:
                a = a.unflatten(0, (-1, rank))  # (E, r, D)
                b = b.unflatten(1, (rank, -1)).permute(2, 0, 1)  # (E, N, r)
            parts.setdefault(entry.name, []).append((entry.part, a, b * (scale / ours.scale)))
    if tensors:
        raise ValueError(f"{folder / WEIGHTS}: {min(tensors)} has no adapter here; add it to lora.target_modules")
    for name, a, b in adapters(model):
        _fill(name, a, b, parts.get(name, []))


def folded(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and full values of the base model's tensors with the adapters merged, one at a time.

    Every rank of a sharded model must iterate over all of them.
    """
    found = {name: (a, b) for name, a, b in adapters(model)}
    unpacked = ((name, frozen.whole(torch.float32)) for name, frozen in frozen_weights(model))
    for name, value in chain(model.state_dict().items(), unpacked):
        if is_adapter(name):
            continue
        a, b = found.get(name.removesuffix(".weight"), (None, None))
        if a is None or b is None or model.config.lora is None:
            yield name, whole(value)
        else:
            yield name, adapted(whole(value), whole(a), whole(b), model.config.lora.scale)


def _entries(model: CausalLM, names: Names) -> list[_Entry]:
    """Return every part of every adapter, with its name in PEFT."""
    found: list[tuple[str, PeftPart, bool]] = []
    for name, a, _ in adapters(model):
        found += [(name, part, a.dim() == 3) for part in names(name)]
    owners = [part.name.rpartition(".")[0] if stacked else "" for _, part, stacked in found]
    entries = []
    for i, (name, part, stacked) in enumerate(found):
        # PEFT wraps each further stacked parameter of a module around the previous ones.
        key = owners[i] + ".base_layer" * owners[i + 1 :].count(owners[i]) if stacked else part.name
        entries.append(_Entry(name, part, stacked, _PREFIX + key))
    return entries


def _peft_config(config: LoRAConfig, entries: list[_Entry], mixture: bool, base_model: str | None) -> dict[str, object]:
    modules, parameters = set(), set()
    for _, part, stacked, _ in entries:
        short = ".".join(part.name.split(".")[-2:])  # PEFT matches by suffix
        if stacked:
            parameters.add(short)
        elif mixture and short.endswith(_OLD_EXPERTS):
            parameters.add(f"{short}.weight")
        else:
            modules.add(short)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
    }


def _fill(name: str, a: Tensor, b: Tensor, parts: list[tuple[PeftPart, Tensor, Tensor]]) -> None:
    """Set one adapter from its parts: each distinct A once, and each part's B in the columns of its A."""
    if not parts:
        local_shard(b).local.zero_()
        return
    whole_a = torch.zeros(a.shape, dtype=parts[0][1].dtype)
    whole_b = torch.zeros(b.shape, dtype=parts[0][2].dtype)
    seen: list[Tensor] = []
    for part, part_a, part_b in parts:
        rank = part_a.shape[-2]
        at = next((i for i, other in enumerate(seen) if torch.equal(other, part_a)), len(seen))
        if at == len(seen):
            seen.append(part_a)
        columns = slice(at * rank, (at + 1) * rank)
        if columns.stop > a.shape[-2]:
            raise ValueError(f"lora.rank={a.shape[-2]} cannot hold the adapters of {name}; set it to {columns.stop}")
        whole_a[..., columns, :] = part_a
        whole_b[..., part.rows, columns] = part_b
    for parameter, value in ((a, whole_a), (b, whole_b)):
        local, _, offsets = local_shard(parameter)
        for dim, (start, size) in enumerate(zip(offsets, local.shape, strict=True)):
            value = value.narrow(dim, start, size)
        local.copy_(value)
