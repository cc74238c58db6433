"""Evaluate a checkpoint: python scripts/eval.py --help."""

from llmfoundry.cli.inference import eval_main
from llmfoundry.launch import leave

if __name__ == "__main__":
    leave(eval_main())
