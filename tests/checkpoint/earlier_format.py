"""Checkpoints as they were written before November 2026: each chunk of each tensor by its file, start and offsets."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmfoundry.checkpoint.manifest import INDEX, MANIFEST, measure

_NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64", torch.bfloat16: "BF16", torch.int8: "I8"}


def to_earlier_format(checkpoint: Path, ranks: int) -> None:
    """Rewrite a checkpoint of one process as so many ranks would have saved it then."""
    tensors: dict[str, dict[str, object]] = {}
    for group in ("model", "optimizer", "rng"):
        file = checkpoint / f"{group}-00000.safetensors"
        if not file.exists():
            continue
        held = load_file(file)
        file.unlink()
        parts: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
        for name, tensor in held.items():
            if group == "rng":  # each rank had tensors of its own, by its number in their names
                name, tensor = f"0/{name}", tensor[0]
            cut = tensor.chunk(ranks) if tensor.dim() and group != "rng" else (tensor,)
            chunks, row = [], 0
            for rank, part in enumerate(cut):
                parts[rank][name] = part.contiguous()
                offsets = [row, *[0] * (tensor.dim() - 1)] if tensor.dim() else []
                where = {"file": f"{group}-{rank:05d}.safetensors", "start": 0}  # which nobody believes
                chunks.append(where | {"offsets": offsets, "shape": list(part.shape)})
                row += part.shape[0] if part.dim() else 0
            tensors[f"{group}/{name}"] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "chunks": chunks}
        for rank, mine in enumerate(parts):
            if mine:
                save_file(mine, checkpoint / f"{group}-{rank:05d}.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"tensors": tensors}))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest.pop("finite")
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.name != MANIFEST]
    manifest["files"] = {file.relative_to(checkpoint).as_posix(): measure(file)._asdict() for file in files}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
