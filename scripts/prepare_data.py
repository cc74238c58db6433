"""Tokenize a data set into shards ahead of a run: python scripts/prepare_data.py --help."""

from llmfoundry.cli.prepare import prepare_data_main
from llmfoundry.launch import leave

if __name__ == "__main__":
    leave(prepare_data_main())
