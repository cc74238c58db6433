"""The mixture layer by itself, for other models and training loops."""
