"""Train a model: python scripts/train.py yamls/moe.yaml [key=value ...]; torchrun on many GPUs."""

import sys

from llmfoundry.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
