"""Check that this machine can run a model, before it is built."""

from __future__ import annotations

import os

import torch

from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.kernels.experts import resolve_backend
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig


def training_bytes(model: CausalLMConfig, weight: torch.dtype) -> int:
    """Bytes of the trained weights and their float32 gradients, which every optimizer needs."""
    return (weight.itemsize + 4) * model.n_trainable_params()


def machine_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(model: CausalLMConfig, device: torch.device, weight: torch.dtype) -> None:
    """Refuse a model that is too large for main memory, before the operating system kills the process."""
    needed, there = training_bytes(model, weight), machine_memory()
    if device.type == "cpu" and runtime.world_size() == 1 and needed > there:
        raise ConfigError(
            f"the model needs at least {needed / 2**30:.1f} GiB to train without a GPU, and this machine has "
            f"{there / 2**30:.1f} GiB; use GPUs (llmfoundry plan YAML says how many), or a smaller model"
        )


def check_device(model: CausalLMConfig, device: torch.device, precision: str) -> None:
    """Refuse implementations that the YAML asks for and this device cannot run."""
    if model.attn_config.attn_impl == "flex" and device.type != "cuda":
        raise ConfigError(f"model.attn_config.attn_impl=flex needs a CUDA device, found {device.type}; use auto")
    if precision == "amp_fp8" and torch.cuda.get_device_capability(device) < (9, 0):
        raise ConfigError(
            "precision: amp_fp8 needs a GPU of compute capability 9.0 (Hopper) or later, found "
            f"{torch.cuda.get_device_name(device)}; write precision=amp_bf16"
        )
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    blocks = (model.ffn(layer) for layer in range(model.n_layers))
    drops = model.lora is not None and model.lora.dropout > 0 and model.adapts_experts
    for impl, kind in {(b.moe_impl, b.kind(model.d_model)) for b in blocks if isinstance(b, MoEConfig)}:
        try:
            resolve_backend(impl, kind._replace(dropout=drops), device, dtype)
        except ValueError as error:
            raise ConfigError(f"model.ffn_config.{error}") from None
