"""All rows of the record of training steps that the GPUs here allow, each in a fork of this process, in one call.

    python scripts/bench/record_steps.py                      # needs one GPU, or two for all rows
    python scripts/bench/record_steps.py --only "shard 2" --list

Text is the source of Python's standard library. A row that fails is reported and the next one runs; each row goes into
scripts/bench/results/train_step.json when it is done (train_step.py), so a call that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shlex
import socket
import sys
import sysconfig
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
import train_step

from llmfoundry import runtime

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "FOLDER_OF_TEXT"
SETTINGS = (f"variables.data={FOLDER}", "tokenizer.name=bpe", "tokenizer.vocab_size=8192", "eval_loader=null")


class Row(NamedTuple):
    """A row of the record."""

    name: str
    yaml: str
    rows: int  # of a microbatch on one GPU
    overrides: tuple[str, ...] = ()
    gpus: int = 1
    microbatches: int = 1

    def arguments(self, options: list[str], text: str) -> list[str]:
        """Of train_step.py, on the text of a folder."""
        settings = (setting.replace(FOLDER, text) for setting in self.settings)
        return [f"yamls/{self.yaml}.yaml", "--name", self.name, *options, *settings]

    def command(self, options: list[str], text: str) -> list[str]:
        """What measures it by itself."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus)]
        script = [*(launcher if self.gpus > 1 else []), "scripts/bench/train_step.py"]
        return ["python", *script, *self.arguments(options, text)]

    def measure(self, options: list[str], text: str, log: Path) -> bool:
        """Run it in forks, one for each GPU, which share what is imported; returns whether all succeeded."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        group = {
            "WORLD_SIZE": self.gpus,
            "LOCAL_WORLD_SIZE": self.gpus,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        fork, arguments = multiprocessing.get_context("fork"), self.arguments(options, text)
        ranks = [
            fork.Process(target=_run, args=(arguments, group | {"RANK": rank, "LOCAL_RANK": rank}, log))
            for rank in range(self.gpus)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
        return all(each.exitcode == 0 for each in ranks)

    @property
    def settings(self) -> list[str]:
        """The overrides of its YAML."""
        own = [f"global_train_batch_size={self.rows * self.microbatches * self.gpus}",
               f"device_train_microbatch_size={self.rows}"]  # fmt: skip
        experts = [] if any(key.startswith("parallel.expert=") for key in self.overrides) else ["parallel.expert=1"]
        return [*SETTINGS, *own, *experts, *self.overrides]


def _run(arguments: list[str], group: dict[str, object], log: Path) -> None:
    """What a fork does."""
    if group["WORLD_SIZE"] != 1:
        os.environ |= {key: str(value) for key, value in group.items()}
    with log.open("a", buffering=1) as out, redirect_stdout(out), redirect_stderr(out):
        try:
            train_step.main(arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
    runtime.leave(code)


EIGHT, SIXTEEN = "OLMoE, 8 layers", "OLMoE, 16 layers"
EIGHT_LAYERS = ("model.n_layers=8",)
TWO_LAYERS = ("model.n_layers=2", "parallel.recompute=none")
FP8 = "precision=amp_fp8"
RUNNING = ("model.ffn_config.moe_lbl_accumulation=running",)
BF16_STATES, BF16_WEIGHTS = "optimizer.state_dtype=bf16", "optimizer.master_weights=bf16_sr"
MUON = "name: muon, lr: 4.0e-4, weight_decay: 0.1"
ROWS = [
    Row(f"{EIGHT}, 8 rows", "olmoe-1b-7b", 8, EIGHT_LAYERS),
    Row(f"{EIGHT}, 8 rows, bf16 states", "olmoe-1b-7b", 8, (*EIGHT_LAYERS, BF16_STATES)),
    Row(f"{EIGHT}, 4 x 8 rows", "olmoe-1b-7b", 8, (*EIGHT_LAYERS, *RUNNING, "parallel.sum_gradients_in=bf16"),
        microbatches=4),
    Row("Qwen3-30B-A3B, 5 layers, 8 rows", "qwen3-30b-a3b", 8, ("model.n_layers=5",)),
    Row("Mixtral-8x7B, 2 layers, 4 rows", "mixtral-8x7b", 4, TWO_LAYERS),
    Row("Mixtral-8x7B, 2 layers, 4 rows, fp8", "mixtral-8x7b", 4, (*TWO_LAYERS, FP8)),
    Row(f"{EIGHT}, 8 rows, fp8", "olmoe-1b-7b", 8, (*EIGHT_LAYERS, FP8)),
    Row(f"{SIXTEEN}, 4 rows per GPU, shard 2", "olmoe-1b-7b", 4, gpus=2),
    Row(f"{SIXTEEN}, 4 rows per GPU, shard 2, expert 2", "olmoe-1b-7b", 4, ("parallel.expert=2",), gpus=2),
    Row(f"{SIXTEEN}, 4 x 4 rows per GPU, shard 2", "olmoe-1b-7b", 4, RUNNING, gpus=2, microbatches=4),
    # Not named by the record's plan, for the settings that came since.
    Row(f"{EIGHT}, 8 rows per GPU, shard 2", "olmoe-1b-7b", 8, EIGHT_LAYERS, gpus=2),  # against one GPU
    Row(f"{SIXTEEN}, 4 rows per GPU, shard 2, packed", "olmoe-1b-7b", 4, ("parallel.gather_experts=packed",), gpus=2),
    Row(f"{SIXTEEN}, 4 rows per GPU, shard 2, direct", "olmoe-1b-7b", 4, ("parallel.gather_experts=direct",), gpus=2),
    Row(f"{EIGHT}, 8 rows, bf16_sr weights", "olmoe-1b-7b", 8, (*EIGHT_LAYERS, BF16_WEIGHTS)),
    Row(f"{EIGHT}, 8 rows, bf16_sr weights, bf16 states", "olmoe-1b-7b", 8,
        (*EIGHT_LAYERS, BF16_WEIGHTS, BF16_STATES)),
    Row(f"{SIXTEEN}, 4 x 4 rows per GPU, shard 2, bf16_sr weights, bf16 states", "olmoe-1b-7b", 4,
        (*RUNNING, BF16_WEIGHTS, BF16_STATES), gpus=2, microbatches=4),
    Row(f"{EIGHT}, 8 rows, muon", "olmoe-1b-7b", 8, (*EIGHT_LAYERS, f"optimizer={{{MUON}}}")),
    Row(f"{EIGHT}, 4 x 8 rows, muon", "olmoe-1b-7b", 8,
        (*EIGHT_LAYERS, *RUNNING, "parallel.sum_gradients_in=bf16", f"optimizer={{{MUON}}}"), microbatches=4),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after these")
    parser.add_argument("--profiles", type=Path, metavar="FOLDER", help="profile each row; its output goes here")
    args = parser.parse_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        return record(args, folder)


def write_text(folder: Path) -> None:
    """The text that all rows are measured on: 10 MB of Python."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    with (folder / "stdlib.txt").open("wb") as out:
        for file in files:
            if out.tell() < 10e6 and "site-packages" not in file.parts:
                out.write(file.read_bytes())


def record(args: argparse.Namespace, folder: str) -> int:
    """Measure the rows; returns the exit code."""
    begun, failed = time.monotonic(), 0
    for row in ROWS:
        if not re.search(args.only, row.name):
            continue
        profile = ["--profile"] if row.gpus > 1 or args.profiles else []
        options = ["--warmup", str(args.warmup), "--steps", str(args.steps), *profile]
        if args.list:
            print(shlex.join(row.command(options, FOLDER)))
        elif row.gpus > torch.cuda.device_count():
            print(f"{row.name}: needs {row.gpus} GPU(s)", flush=True)
        elif time.monotonic() - begun > args.seconds:
            print(f"{row.name}: no time left", flush=True)
        else:
            logs = args.profiles or Path(folder)
            logs.mkdir(parents=True, exist_ok=True)
            log = logs / f"{re.sub('[^a-z0-9]+', '-', row.name.lower())}.txt"
            log.unlink(missing_ok=True)
            done = row.measure(options, folder, log)
            failed += not done
            said = "recorded" if done else " ".join(log.read_text().strip().splitlines()[-1:])
            print(f"{row.name}: {time.monotonic() - begun:.0f} s, {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
