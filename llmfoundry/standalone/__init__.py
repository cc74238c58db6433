"""The MoE layer by itself, for other models and training loops."""
