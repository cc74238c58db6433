"""Peak memory and speed of conversion, on a made-up checkpoint of 8 GB in shards of 2 GB, beside plain file copies.

    python scripts/bench/convert.py --folder /a/disk/with/40/GB

Each command runs in a process of its own, which is asked for its peak, start and checksums included; a copy is on disk
when it ends. Files are dropped from the page cache before each. Writes scripts/bench/results/convert.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from llmfoundry.hf.family import read_config
from llmfoundry.hf.files import write_weights
from llmfoundry.hf.pieces import Spec
from llmfoundry.hf.pretrained import pieces_of

ROOT = Path(__file__).resolve().parents[2]
SHARD = 2 * 10**9
MODEL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 2048, "intermediate_size": 7168,
    "num_hidden_layers": 11, "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 4096, "dtype": "bfloat16",
}  # fmt: skip


def make(folder: Path) -> int:
    """Write the checkpoint; returns its bytes."""
    family, config = read_config(MODEL)
    shapes = pieces_of(family, config, family.layouts[0]).their_shapes()
    specs = {name: Spec(torch.bfloat16, shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**25, generator=generator).mul_(0.02).bfloat16()  # the same values over and over

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    write_weights(folder, specs, lambda name, at, box: box.view(-1).copy_(noise[: box.numel()]), SHARD)
    return sum(spec.nbytes for spec in specs.values())


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copied(source: Path, target: Path) -> float:
    """Seconds of a plain copy, on disk when it ends."""
    forget(source)
    start = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        handle = os.open(target / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - start


def converted(way: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    forget(source)
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), way, str(source), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "bench" / "results" / "convert.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = make(folder / "theirs")
        rows: dict[str, list[tuple[float, int]]] = {"copy": [], "from-hf": [], "to-hf": []}
        for _ in range(args.repeats):
            rows["copy"].append((copied(folder / "theirs", folder / "copy"), 0))
            shutil.rmtree(folder / "copy")
            rows["from-hf"].append(converted("from-hf", folder / "theirs", folder / "ours"))
            rows["to-hf"].append(converted("to-hf", folder / "ours", folder / "back"))
            shutil.rmtree(folder / "ours")
            shutil.rmtree(folder / "back")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = {way: statistics.median(row[0] for row in found) for way, found in rows.items()}
    result = {
        "git_sha": git.stdout.strip() or "unknown",
        "machine": platform.platform(),
        "torch": torch.__version__,
        "bytes": size,
        "largest_shard_bytes": SHARD,
        "repeats": args.repeats,
        "seconds": seconds,
        "all_seconds": {way: [row[0] for row in found] for way, found in rows.items()},
        "gb_per_second": {way: size / taken / 1e9 for way, taken in seconds.items()},
        "peak_resident_bytes": {way: max(row[1] for row in rows[way]) for way in ("from-hf", "to-hf")},
        "of_a_copys_bandwidth": {way: seconds["copy"] / seconds[way] for way in ("from-hf", "to-hf")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
