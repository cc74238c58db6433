"""A run of seconds, and what may be done to its checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llmfoundry.checkpoint.manifest import MANIFEST, measure

SETTINGS = """
max_seq_len: 32
tokenizer: {name: bpe, vocab_size: 300}
train_loader:
  dataset: {name: synthetic, split: train, n_documents: 60, document_words: 60}
eval_loader:
  dataset: {name: synthetic, split: validation, n_documents: 60, document_words: 60}
model:
  name: causal_lm
  d_model: 32
  n_heads: 2
  n_layers: 2
  vocab_size: 300
  max_seq_len: 32
  no_bias: true
  norm_type: rmsnorm
  attn_config: {rope: true}
  ffn_config: {ffn_type: mb_dmoe, ffn_hidden_size: 32, moe_num_experts: 4, moe_top_k: 2, moe_loss_weight: 0.01}
optimizer: {name: adamw, lr: 1.0e-3}
scheduler: {name: constant_with_warmup, t_warmup: 0ba}
max_duration: 6ba
eval_interval: 0ba
global_train_batch_size: 4
save_interval: 2ba
autoresume: true
"""


def copied(run: Path, name: str) -> Path:
    """A copy of a run beside it, to be damaged."""
    copy = run.with_name(name)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy, symlinks=True)
    return copy


def sign(checkpoint: Path) -> None:
    """Write the manifest anew for the files as they are: whoever hands out a checkpoint can."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    names = [file for file in checkpoint.rglob("*") if file.is_file() and file.name != MANIFEST]
    manifest["files"] = {file.relative_to(checkpoint).as_posix(): measure(file)._asdict() for file in names}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
