"""Write text: python scripts/generate.py --checkpoint DIR --prompt 'def '."""

import sys

from llmfoundry.cli import generate_main

if __name__ == "__main__":
    sys.exit(generate_main())
