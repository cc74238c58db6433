"""What an H100 and its links do, as far as plans need it: every constant with its source, and nowhere else.

Measured: by us in November 2026 on one and on two H100 80GB HBM3 (torch 2.11, CUDA 13, bf16; NCCL over NVLink at
512 MiB). The rates of experts are those of a layer by our kernels, forward and backward, router included, 16,384 tokens
(`scripts/bench/results/moe_layer.json`).
"""

from __future__ import annotations

import math

GIB = 2**30

GPU_MEMORY = 79.0 * GIB  # what the driver shows of 80 GB
# Kept free of it, an assumption: the CUDA context, NCCL's buffers, cuBLAS' workspaces, fragmentation.
RESERVE = 5.0 * GIB

PEAK_FLOPS = 989.4e12  # dense bf16, datasheet: what MFU is a share of
DENSE_FLOPS = 665e12  # measured: cuBLAS, the least of four layers' products (665 to 715)
# Measured in a training step: cuDNN's attention, 16 heads of 128, 4,096 tokens, causal, forward and backward.
ATTENTION_FLOPS = 449e12
COPY_BYTES = 2.97e12  # bytes a second read and written, measured
# Of FSDP's copies and AdamW's update on a share: many small launches. A profile of two GPUs has 77 ms for 144 GB.
SHARDED_COPY_BYTES = 1.87e12
# What norms, rotary embedding and residuals read and write, forward and backward: bytes a token, layer and d_model; and
# the loss, a token and word. The same profile has 16 ms for the largest of the former, 88 bytes, and 100 allow for the
# small ones that it does not list; and 6 ms for the latter, at OLMoE's 8 layers and 8 rows.
BLOCK_BYTES, LOSS_BYTES = 100, 11

NODE = 8  # GPUs that NVLink joins
ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = 268e9, 257e9, 273e9  # bytes a second and GPU on NVLink, measured
ALL_REDUCE = 315e9  # bus bandwidth, measured
# Bytes a second and GPU between nodes, an assumption: 400 Gb/s, of which NCCL carries 80 %.
NETWORK = 0.8 * 400e9 / 8

# Weights of one expert's product (D * F) -> FLOP/s of its layer: Qwen3-30B-A3B, OLMoE, Mixtral, DBRX. Measured.
_EXPERTS = ((2048 * 768, 461e12), (2048 * 1024, 505e12), (4096 * 14336, 627e12), (6144 * 10752, 637e12))


def experts_flops(d_model: int, hidden: int) -> float:
    """FLOP/s of a mixture's experts of this size: between the measured ones by the logarithm, flat beyond."""
    size = float(d_model * hidden)
    if size <= _EXPERTS[0][0]:
        return _EXPERTS[0][1]
    for (small, low), (large, high) in zip(_EXPERTS[:-1], _EXPERTS[1:], strict=True):
        if size <= large:
            return low + (high - low) * math.log(size / small) / math.log(large / small)
    return _EXPERTS[-1][1]
