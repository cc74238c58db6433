"""Evaluate a checkpoint: python scripts/eval.py --help."""

import sys

from llmfoundry.cli import eval_main

if __name__ == "__main__":
    sys.exit(eval_main())
