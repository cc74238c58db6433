"""The mixture layer by itself, for models and training loops that are not ours."""
