"""The loss of logits and its gradient, reading each logit from memory only once.

Shapes: N tokens, V vocab, S slices of a row.
A row of logits is larger than what one SM can hold (151,936 float32 values are 608 KB), so several programs share it.
Each keeps its slice in registers, publishes the slice's maximum and sum of exponentials, waits for those of the others,
and writes its slice of the gradient. All programs combine the sums in the same order, so results are deterministic.

Waiting cannot deadlock, because programs take their slices in the order in which they start: those of all earlier rows
have started, need nothing more and finish. So a row's programs wait at most for programs of the same row that are yet
to start, and these can start as long as the GPU can hold S programs at once, whatever else runs on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmfoundry.kernels.whole import cdiv, next_power_of_2

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch do not include it
    triton = None

IGNORE = -100


def softmax_loss(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    softcap: float | None = None,
    weights: Tensor | None = None,
) -> None:
    """Write the cross-entropy of each token, and the gradient of their sum with respect to the logits.

    Args:
        logits: (N, V) float32 or float64, contiguous; with a softcap, the result of `softcap * tanh(logit / softcap)`.
        labels: (N,) int64; -100 is ignored.
        loss: (N,) in the dtype of the logits, written: nats of each token, unweighted.
        gradient: (N, V), contiguous, of any float dtype, written; with respect to the logits before the softcap. None:
            not needed.
        softcap: None: no cap.
        weights: (N,) weights of the tokens in the sum.
    """
    on_gpu = logits.is_cuda and triton is not None and logits.dtype == torch.float32
    (softmax_loss_triton if on_gpu else softmax_loss_reference)(logits, labels, loss, gradient, softcap, weights)


def softmax_loss_reference(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    softcap: float | None = None,
    weights: Tensor | None = None,
) -> None:
    """`softmax_loss` in plain PyTorch."""
    counts = labels != IGNORE
    index = labels.where(counts, 0).unsqueeze(1)
    log_p = torch.log_softmax(logits, dim=-1)
    loss.copy_(torch.where(counts, -log_p.gather(1, index).squeeze(1), 0))
    if gradient is None:
        return
    exact = log_p.exp_()
    exact.scatter_add_(1, index, -torch.ones_like(index, dtype=exact.dtype))
    if weights is not None:
        exact *= weights.unsqueeze(1)
    if softcap is not None:
        exact *= 1 - (logits / softcap) ** 2
    gradient.copy_(exact.masked_fill_(~counts.unsqueeze(1), 0))  # also if an ignored token's logits are not finite


if triton is not None:
    _BLOCK, _WARPS, _REGISTERS = 4096, 4, 64  # an SM holds eight programs, and half of its registers hold logits

    @triton.jit
    def _pack(top, total):
        # (maximum, sum) in one number, so that other programs cannot see a partial write. It is never 0: a maximum of 0
        # has a sum of 1 or more.
        high = top.to(tl.int32, bitcast=True).to(tl.int64) << 32
        return high | (total.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)

    @triton.jit
    def softmax_loss_kernel(
        logits_ptr, labels_ptr, weights_ptr, loss_ptr, gradient_ptr, sums_ptr, vocab, per_cap,
        IGNORE: tl.constexpr, CAPPED: tl.constexpr, SLICES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
        SUMS: tl.constexpr, RESULTS: tl.constexpr,
    ):  # fmt: skip
        """One program per slice of a token's logits.

        sums_ptr: (N * SLICES + 1,) int64, zero before the launch that writes them; the last one counts programs.
        SUMS, RESULTS: whether to write the sums, and whether to read them for the loss and the gradient.
        """
        if SUMS and RESULTS:
            program = tl.atomic_add(sums_ptr + tl.num_programs(0), 1, sem="relaxed").to(tl.int32)
        else:
            program = tl.program_id(0)
        row, part = program // SLICES, program % SLICES
        logits_ptr += row.to(tl.int64) * vocab
        sums_ptr += row.to(tl.int64) * SLICES
        at = part * BLOCK + tl.arange(0, BLOCK)
        inside = at < vocab
        z = tl.load(logits_ptr + at, inside, float("-inf"))
        if SUMS:
            top = tl.max(z)
            # If a slice is all -inf, avoid exp(-inf - -inf) in the sum, but keep NaN, which tl.max ignores.
            total = tl.sum(tl.exp(z - tl.where(top == float("-inf"), 0.0, top)))
            tl.atomic_xchg(sums_ptr + part, _pack(top, total), sem="relaxed")
        if RESULTS:
            lane = tl.arange(0, LANES)  # as many as threads, so that all of them see what one warp reads
            if SUMS and SLICES > 1:
                missing = SLICES
                while missing > 0:
                    seen = tl.load(sums_ptr + lane, lane < SLICES, other=1, volatile=True)
                    missing = tl.sum((seen == 0).to(tl.int32))
            # volatile: do not read from this SM's L1 cache
            seen = tl.load(sums_ptr + lane, lane < SLICES, other=0, volatile=True)
            tops = tl.where(lane < SLICES, (seen >> 32).to(tl.int32).to(tl.float32, bitcast=True), float("-inf"))
            totals = seen.to(tl.int32).to(tl.float32, bitcast=True)
            peak = tl.max(tops)
            logsumexp = peak + tl.log(tl.sum(tl.where(tops == float("-inf"), totals, totals * tl.exp(tops - peak))))
            label = tl.load(labels_ptr + row)
            counts, known = label != IGNORE, (label >= 0) & (label < vocab)
            # A label outside of the vocabulary makes the loss and the gradient NaN, so that the step is skipped.
            logsumexp = tl.where(known, logsumexp, float("nan"))
            if part == 0:
                chosen = tl.load(logits_ptr + label, known, 0.0)
                tl.store(loss_ptr + row, tl.where(counts, logsumexp - chosen, 0.0))
            if gradient_ptr is not None:
                g = tl.exp(z - logsumexp) - tl.where(at == label, 1.0, 0.0)
                if weights_ptr is not None:
                    g *= tl.load(weights_ptr + row)
                if CAPPED:
                    g *= 1 - (z * per_cap) * (z * per_cap)
                tl.store(gradient_ptr + row.to(tl.int64) * vocab + at, tl.where(counts, g, 0.0), inside)


def softmax_loss_triton(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    softcap: float | None = None,
    weights: Tensor | None = None,
) -> None:
    """`softmax_loss` by the Triton kernel, for float32 logits."""
    n, vocab = logits.shape
    if n == 0:
        return
    # Autograd passes the gradient of a sum as one expanded number.
    labels, weights = labels.contiguous(), None if weights is None else weights.contiguous()
    block = min(_BLOCK, next_power_of_2(vocab))
    slices = cdiv(vocab, block)
    sums = torch.zeros(n * slices + 1, dtype=torch.int64, device=logits.device)
    for launch in [(True, True)] if _fit_at_once(slices, logits.device) else [(True, False), (False, True)]:
        softmax_loss_kernel[(n * slices,)](
            logits, labels, weights, loss, gradient, sums, vocab, 0.0 if softcap is None else 1 / softcap,
            IGNORE=IGNORE, CAPPED=softcap is not None, SLICES=slices, LANES=max(32 * _WARPS, next_power_of_2(slices)),
            BLOCK=block, SUMS=launch[0], RESULTS=launch[1], num_warps=_WARPS, maxnreg=_REGISTERS,
        )  # fmt: skip


def _fit_at_once(slices: int, device: torch.device) -> bool:
    """Return whether a GPU can surely hold this many programs at once; else two launches read the logits twice.

    Each SM holds at least one, and collectives leave more than half of the SMs free. Triton's interpreter runs programs
    one after another.
    """
    return device.type == "cuda" and slices <= torch.cuda.get_device_properties(device).multi_processor_count // 2
