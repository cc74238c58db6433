"""Hugging Face checkpoints, loaded and saved: `from_pretrained`, `save_pretrained`, `load_weights`, `export_note`."""

from llmfoundry.hf.family import export_note
from llmfoundry.hf.pretrained import Loaded, from_pretrained, load_weights, save_pretrained

__all__ = ["Loaded", "export_note", "from_pretrained", "load_weights", "save_pretrained"]
