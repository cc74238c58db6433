"""Train a model: python scripts/train.py yamls/moe.yaml [key=value ...]; torchrun on many GPUs."""

from llmfoundry.cli.train import train_main
from llmfoundry.launch import leave

if __name__ == "__main__":
    leave(train_main())
