"""Train mixture-of-experts language models with PyTorch."""
