"""Tokenize a data set into shards ahead of a run: python scripts/prepare_data.py --help."""

import sys

from llmfoundry.cli import prepare_data_main

if __name__ == "__main__":
    sys.exit(prepare_data_main())
