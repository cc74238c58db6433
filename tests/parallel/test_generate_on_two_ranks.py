"""Text for many prompts with divided experts: the same on two ranks as on one, also where it is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from llmfoundry import runtime
from llmfoundry.cli.inference import generate_main
from llmfoundry.data.tokenizer import PLAIN_TEXT
from llmfoundry.eval.generate import Sampling
from llmfoundry.eval.generate_many import generate_many, request_of
from llmfoundry.eval.likelihood import Ranks
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh
from tests.eval import tasks as small
from tests.eval.test_generate_many import saved
from tests.hf.theirs import MOE, Case

PROMPTS = ["the red cat", "a", "dog bird runs sits sleeps under", "green", "big small old the a red green"]


def _write(folder: str, hugging_face: str) -> None:
    torch.manual_seed(0)
    tokenizer = small.tokenizer()
    made = small.model(len(tokenizer))
    parallel = ParallelConfig(expert=runtime.world_size(), compile=False)
    mesh = build_mesh(parallel, "cpu", 4)
    with torch.device("meta"):
        shell = made.config.build()
    shell = materialize(parallelize(shell, mesh, parallel, "fp32"), parallel, seed=1).eval()
    requests = [request_of(prompt, tokenizer, PLAIN_TEXT, None) for prompt in PROMPTS]
    # Rows of one: the last forwards have a row on one rank alone.
    ranks = Ranks(1, mesh.data_rank, mesh.data_ranks)
    texts = [
        list(generate_many(shell, tokenizer, requests, how, ranks, set()))
        for how in (Sampling(12, temperature=0), Sampling(12, temperature=1.3, seed=5))
    ]
    out = Path(folder) / f"{runtime.world_size()}-{runtime.rank()}.json"
    out.write_text(json.dumps([mesh.data_ranks, texts]))
    options = [*(f"--prompt={prompt}" for prompt in PROMPTS), "--max-new-tokens=12", "--batch-size=2"]
    world = runtime.world_size()
    file = f"{folder}/{world}.jsonl"
    assert generate_main(
        ["--checkpoint", hugging_face, *options, "--output", file, f"parallel.expert={world}", "precision=fp32"]
    ) == 0  # fmt: skip


@pytest.mark.dist
def test_texts_are_the_same_on_one_rank_and_with_experts_on_two(tmp_path: Path) -> None:
    settings = MOE | {"num_local_experts": 4, "max_position_embeddings": 512}
    model = saved(Case("mixtral", "", settings), tmp_path / "model")
    run_ranks([2, 1], _write, str(tmp_path), str(model))
    (n, one), *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert n == 1 and two == [[2, one], [2, one]]
    greedy, drawn = one
    files = [(tmp_path / f"{world}.jsonl").read_text() for world in (1, 2)]
    assert files[0] == files[1] and [json.loads(line)["prompt"] for line in files[0].splitlines()] == PROMPTS
    assert greedy != drawn and len({text for text, _, _ in drawn}) == len(PROMPTS)
