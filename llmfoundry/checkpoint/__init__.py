"""Checkpoints: manifest, storage, tensors, saving and loading, and conversion from and to Hugging Face."""
