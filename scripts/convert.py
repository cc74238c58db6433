"""Convert a checkpoint: python scripts/convert.py --help."""

from llmfoundry.cli.convert import convert_main
from llmfoundry.launch import leave

if __name__ == "__main__":
    leave(convert_main())
