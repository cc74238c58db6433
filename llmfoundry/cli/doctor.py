"""`llmfoundry doctor [YAML]`: checks this machine, and how a run would do on it.

Every line is measured or read here; nothing is sent anywhere, and no key is printed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from llmfoundry.cli.command import command, read_run_config
from llmfoundry.cli.parser import Parser
from llmfoundry.config import ConfigError

if TYPE_CHECKING:
    from llmfoundry.train.config import RunConfig

GIB, MIB = 2**30, 2**20
_WRITTEN = 256 * MIB  # bytes written and read to time a disk
_LEAST_FILES = 1024  # open files that a run with many data shards may need
_OPTIONAL = {
    "wandb": "loggers.wandb", "mlflow": "loggers.mlflow", "peft": "adapters in peft's format",
    "lm_eval": "eval --tasks", "bitsandbytes": "", "trl": "", "gguf": "GGUF files",
}  # fmt: skip


class Finding(NamedTuple):
    """One fact about the machine."""

    name: str
    says: str
    state: Literal["ok", "note", "wrong"] = "ok"  # wrong: a run will fail or be far slower than it could


@command
def doctor_main(argv: Sequence[str] | None = None) -> None:
    """`doctor [YAML] [--folder DIR] [key=value ...]`."""
    parser = Parser(
        "llmfoundry doctor",
        "Check this machine: GPUs, memory, disk, packages. With a YAML, also whether its run fits here.",
        ["llmfoundry doctor", "llmfoundry doctor yamls/moe.yaml", "llmfoundry doctor --folder /mnt/scratch"],
    )
    parser.add_argument("yaml", nargs="?", help="also plan this run for this machine")
    parser.add_overrides("replace settings of the YAML")
    parser.add_argument("--folder", type=Path, default=Path(), help="measure the disk of this folder")
    args = parser.parse_intermixed_args(argv)
    if not args.folder.is_dir():
        raise ConfigError(f"--folder {args.folder}: is not a folder")
    config = None if args.yaml is None else read_run_config(args.yaml, args.overrides)  # reports mistakes in it first
    wrong = 0
    for finding in findings(args.folder):
        mark = {"ok": " ", "note": "-", "wrong": "!"}[finding.state]
        print(f"{mark} {finding.name + ':':<18} {finding.says}", flush=True)
        wrong += finding.state == "wrong"
    print(f"{wrong} problem{'s' * (wrong > 1)} found, marked with !" if wrong else "no problems found")
    if config is not None:
        from llmfoundry.planning.report import describe

        config.model.check_trainable()
        gpus, memory = _cards()
        print(f"\n{args.yaml} on this machine (a large model takes up to a minute):", flush=True)
        if gpus is None:
            print(_on_cpu(config))
        for line in describe(config, gpus, *memory):
            print(line, flush=True)


def _on_cpu(config: RunConfig) -> str:
    """Return whether there is enough memory for weights, gradients and optimizer in a run without a GPU."""
    from llmfoundry.model.transformer import CausalLMConfig
    from llmfoundry.train.machine import machine_memory, training_bytes

    assert isinstance(config.model, CausalLMConfig)
    needed, there = training_bytes(config.model, config.optimizer.weight_dtype) / GIB, machine_memory() / GIB
    verdict = "too little memory" if needed > there else "AdamW adds as much again, and activations"
    return f"without a GPU: weights and gradients take {needed:.1f} of {there:.1f} GiB; {verdict}\nwith GPUs:"


def _cards() -> tuple[int | None, list[int]]:
    """Return the number of GPUs and the smallest one's memory in bytes; without a GPU, what a plan assumes."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count or None, [min(torch.cuda.mem_get_info(i)[1] for i in range(count))] if count else []


def findings(folder: Path) -> Iterator[Finding]:
    """Run all checks.

    Args:
        folder: a folder on the disk to measure.
    """
    yield Finding("system", f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    yield from _packages()
    yield from _gpus()
    yield from _memory()
    yield from _disk(folder)
    yield _locks(folder)
    yield _open_files()
    yield _hub()


def _packages() -> Iterator[Finding]:
    import torch

    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    if found < (2, 11):
        yield Finding("torch", f"{torch.__version__}, {build}; 2.11 or newer is needed", "wrong")
    else:
        yield Finding("torch", f"{torch.__version__}, {build}")
    try:
        yield Finding("triton", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        needed = torch.cuda.is_available()
        yield Finding("triton", "is not installed; experts run by grouped_mm", "wrong" if needed else "note")
    have, lack = [], []
    for name, serves in _OPTIONAL.items():
        try:
            have.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lack.append(f"{name} ({serves})" if serves else name)
    yield Finding("optional packages", ", ".join(have) or "none")
    if lack:
        yield Finding("not installed", ", ".join(lack), "note")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda and shutil.which("nvidia-smi"):
            yield Finding("GPU", "there is a driver, but torch finds no GPU; compare `nvidia-smi` with torch's CUDA",
                          "wrong")  # fmt: skip
        else:
            yield Finding("GPU", "none; models are trained on the CPU in float32", "note")
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        busy = free < 0.9 * total
        yield Finding(
            f"GPU {number}",
            f"{card.name}, compute {card.major}.{card.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            + ("; another process holds the rest" if busy else ""),
            "note" if busy else "ok",
        )
    driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("driver, NCCL", f"CUDA {driver // 1000}.{driver % 1000 // 10}, NCCL {nccl}")


def _memory() -> Iterator[Finding]:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        yield Finding("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB available")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < 64 * MIB
        why = "; NCCL between GPUs of one machine needs more: start the container with --ipc=host" if small else ""
        yield Finding("/dev/shm", f"{free / GIB:.1f} GiB free{why}", "wrong" if small else "ok")


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    name = str(folder.resolve())
    if not os.access(folder, os.W_OK):
        yield Finding("disk", f"{name} cannot be written", "wrong")
        return
    if free < 2 * _WRITTEN:
        yield Finding("disk", f"{name}: {free / GIB:.1f} GiB free", "wrong")
        return
    block = os.urandom(MIB)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(_WRITTEN // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write = _WRITTEN / (time.perf_counter() - start)
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read from disk
        start = time.perf_counter()
        file.seek(0)
        while file.read(MIB):
            pass
        read = _WRITTEN / (time.perf_counter() - start)
    says = f"{name}: {free / GIB:.1f} GiB free, writes {write / MIB:,.0f} MiB/s, reads {read / MIB:,.0f} MiB/s"
    yield Finding("disk", says)


def _locks(folder: Path) -> Finding:
    """Return whether file locks work between processes: caches and checkpoints rely on them."""
    from filelock import FileLock, Timeout

    path = folder / f".llmfoundry-doctor-{os.getpid()}.lock"
    try:
        with FileLock(path):
            try:
                FileLock(path).acquire(timeout=0)
            except Timeout:
                return Finding("file locks", "work here")
            return Finding("file locks", "do not keep a second process out; set cache_dir to a local disk", "wrong")
    except OSError as error:
        return Finding("file locks", f"cannot be taken here: {error.strerror}; set cache_dir to a local disk", "wrong")
    finally:
        path.unlink(missing_ok=True)


def _open_files() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = limit < _LEAST_FILES
    return Finding("open files", f"{limit:,} at most" + ("; raise it by ulimit -n 65536" if few else ""),
                   "wrong" if few else "ok")  # fmt: skip


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "", "false")
    token = "a token is set" if os.environ.get("HF_TOKEN") else "no token (HF_TOKEN)"
    return Finding("Hugging Face hub", f"{token}, {'offline by HF_HUB_OFFLINE' if offline else 'online if reachable'}")
