"""One file per architecture family; see `llmfoundry/hf/family.py`."""
