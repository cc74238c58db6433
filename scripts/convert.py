"""Convert a checkpoint: python scripts/convert.py --help."""

import sys

from llmfoundry.cli import convert_main

if __name__ == "__main__":
    sys.exit(convert_main())
