"""Rates and sizes of an H100 and its links, each with its source. Every such constant of a plan is here.

"Measured" means: in November 2026 on one and two H100 80GB HBM3 (torch 2.11, CUDA 13, bf16; NCCL over NVLink with
512 MiB). The rates of experts are those of a whole layer with our kernels, forward and backward, router included, at
16,384 tokens (`scripts/bench/results/moe_layer.json`).
"""

from __future__ import annotations

import math

import numpy as np

GIB = 2**30

GPU_MEMORY = 79.0 * GIB  # as the driver shows 80 GB
# Kept free: the CUDA context, NCCL's buffers, cuBLAS' workspaces, fragmentation. An assumption.
RESERVE = 5.0 * GIB

PEAK_FLOPS = 989.4e12  # dense bf16, datasheet; MFU is relative to it
DENSE_FLOPS = 665e12  # measured: cuBLAS, the slowest of four layers' products (665 to 715)
# Measured on an H200: Muon's iteration for 64 matrices of 1024 x 2048, and 526 for 32 of 2048 x 2048. It counts half of
# each symmetric product.
MUON_FLOPS = 514e12
# Measured in a training step: cuDNN's attention, 16 heads of 128, 4,096 tokens, causal, forward and backward.
ATTENTION_FLOPS = 449e12
COPY_BYTES = 2.97e12  # bytes per second, read plus written; measured
# The same for FSDP's copies and AdamW's update of a shard, which are many small launches: 77 ms for 144 GB in a profile
# of two GPUs.
SHARDED_COPY_BYTES = 1.87e12
# Bytes read and written in forward and backward: by norms, rotary embedding and residuals, per token, layer and element
# of d_model; by the loss, per token and vocabulary entry. In the same profile (OLMoE, 8 layers, 8 rows) the largest
# kernels of the former take 16 ms, which is 88 bytes; 100 includes the small ones. The latter take 6 ms.
BLOCK_BYTES, LOSS_BYTES = 100, 11

# Of the host, to launch the kernels of a layer of experts, forward and backward, not compiled. Measured: at 1,024
# tokens OLMoE's took 3.3 ms and Qwen3-30B-A3B's 2.9, where their products need 0.6 and 0.5 (docs/experiments.md).
LAUNCH_SECONDS = 3e-3

NODE = 8  # GPUs connected by NVLink
ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = 268e9, 257e9, 273e9  # bytes per second and GPU on NVLink, measured
ALL_REDUCE = 315e9  # bus bandwidth, measured
# Bytes per second and GPU between nodes: 400 Gb/s, of which NCCL carries 80 %. An assumption.
NETWORK = 0.8 * 400e9 / 8

# Weights of one expert's product (D * F) -> FLOP/s of its layer in bfloat16, and how many times as fast it is in e4m3:
# Qwen3-30B-A3B, OLMoE, Mixtral, DBRX. Measured, but for the last one's e4m3, which is Mixtral's.
_EXPERTS = (
    (2048 * 768, 461e12, 1.21),
    (2048 * 1024, 505e12, 1.41),
    (4096 * 14336, 627e12, 1.65),
    (6144 * 10752, 637e12, 1.65),
)
# The same for linear layers: what is left of two training steps in e4m3 (Mixtral, OLMoE) beside their experts.
E4M3_DENSE = 1.35


def experts_flops(d_model: int, hidden: int, *, e4m3: bool = False) -> float:
    """FLOP/s of experts of this size: interpolated over the logarithm of their size, constant beyond both ends."""
    sizes = [math.log(size) for size, *_ in _EXPERTS]
    rates = [rate * (gain if e4m3 else 1.0) for _, rate, gain in _EXPERTS]
    return float(np.interp(math.log(d_model * hidden), sizes, rates))
