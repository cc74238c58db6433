"""Hugging Face checkpoints in and out: `from_pretrained`, `save_pretrained`, `load_weights`."""

from llmfoundry.hf.pretrained import Loaded, from_pretrained, load_weights, save_pretrained

__all__ = ["Loaded", "from_pretrained", "load_weights", "save_pretrained"]
