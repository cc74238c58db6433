"""Write text: python scripts/generate.py --checkpoint DIR --prompt 'def '."""

from llmfoundry.cli.inference import generate_main
from llmfoundry.launch import leave

if __name__ == "__main__":
    leave(generate_main())
