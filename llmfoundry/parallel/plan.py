"""What a run will hold on each GPU and send over its links, from the config alone: what `--dry-run` prints.

Shapes: D d_model, F ffn hidden size, K top_k, T tokens of a microbatch on one rank, P parameters, L layers.
Assumes float32 master weights, gradients and AdamW moments, split over `shard` ranks (experts' over `expert` and then
the rest of `shard`: the same number in all), and activations in the compute type. Each formula says what it counts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from llmfoundry.model.config import CausalLMConfig, ModelConfig
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel.mesh import Degrees, ParallelConfig, plan_mesh

GIB = 2**30
MASTER = 4  # bytes of a float32 weight, gradient or moment


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # weights of whole blocks in the compute type, in use or on their way
    activations: float  # kept for backward, of one microbatch

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class Traffic(NamedTuple):
    """Bytes that one GPU receives a step."""

    gather: float  # weights, forward and backward
    reduce: float  # gradients
    replicate: float  # gradients again, over copies of the model
    tokens: float  # to the experts and back, forward and backward; even routing


def memory(
    model: CausalLMConfig, parallel: ParallelConfig, degrees: Degrees, tokens: int, compute_bytes: int
) -> Memory:
    """Bytes a GPU.

    Args:
        tokens: T of one microbatch on one rank.
        compute_bytes: of one activation: 2 in bf16, 4 in float32.
    """
    share, trained = model.n_params() / degrees.shard, model.n_trainable_params() / degrees.shard
    blocks = [_block_params(model, layer, degrees) for layer in range(model.n_layers)]
    spread = degrees.shard > 1 or degrees.replicate > 1 or compute_bytes != MASTER
    in_flight = (1 + parallel.prefetch) if parallel.reshard_after_forward else model.n_layers
    gathered = (min(in_flight, model.n_layers) * max(blocks) + 2 * _embedding(model)) * compute_bytes if spread else 0.0
    kept = _kept_activations(model, parallel, tokens) * compute_bytes
    return Memory(share * MASTER, trained * MASTER, 2 * trained * MASTER, gathered, kept)


def traffic(
    model: CausalLMConfig,
    parallel: ParallelConfig,
    degrees: Degrees,
    tokens: int,
    microbatches: int,
    compute_bytes: int,
) -> Traffic:
    """Bytes received a GPU and step, by ring collectives; `tokens` a microbatch on one rank."""
    blocks = sum(_block_params(model, layer, degrees) for layer in range(model.n_layers)) + _embedding(model)
    others = (degrees.shard - 1) / degrees.shard
    passes = (2 if parallel.reshard_after_forward else 1) * microbatches
    reductions = 1 if parallel.reduce_once_a_step else microbatches
    trained = model.n_trainable_params() / model.n_params()
    copies = 2 * (degrees.replicate - 1) / degrees.replicate
    sent = 0.0
    for layer in range(model.n_layers):
        ffn = model.ffn(layer)
        if isinstance(ffn, MoEConfig) and degrees.expert > 1:
            # A token goes once to each rank that has one of its experts: there and back, forward and backward.
            ranks = degrees.expert * (1 - (1 - 1 / degrees.expert) ** ffn.moe_top_k)
            away = ranks * (degrees.expert - 1) / degrees.expert
            sent += 4 * microbatches * tokens * away * model.d_model * compute_bytes
    return Traffic(
        gather=passes * blocks * compute_bytes * others,
        reduce=reductions * blocks * trained * MASTER * others,
        replicate=copies * model.n_trainable_params() / degrees.shard * MASTER,
        tokens=sent,
    )


def describe(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    world: int,
    global_rows: int,
    micro_rows: int | Literal["auto"],
    seq_len: int,
    compute_bytes: int = 2,
) -> str:
    """The plan in words, for `world` GPUs.

    Raises:
        ConfigError: the degrees do not fit the GPUs or the model.
    """
    assert isinstance(model, CausalLMConfig)
    moe = next((f for f in map(model.ffn, range(model.n_layers)) if isinstance(f, MoEConfig)), None)
    degrees = plan_mesh(parallel, world, moe.moe_num_experts if moe else 0)
    rows = -(-global_rows // world)
    micro = rows if micro_rows == "auto" else min(micro_rows, rows)
    held = memory(model, parallel, degrees, micro * seq_len, compute_bytes)
    moved = traffic(model, parallel, degrees, micro * seq_len, -(-rows // micro), compute_bytes)
    mesh = f"replicate {degrees.replicate} x shard {degrees.shard}, expert {degrees.expert}"
    lines = [f"on {world} device(s) ({mesh}), {rows} rows each in microbatches of {micro}, estimated for each:"]
    lines += [f"  {name:<12}{size / GIB:10.2f} GiB" for name, size in held._asdict().items()]
    lines.append(f"  {'in all':<12}{held.total / GIB:10.2f} GiB")
    if world > 1:
        lines.append("received by each a step:")
        lines += [f"  {name:<12}{size / GIB:10.2f} GiB" for name, size in moved._asdict().items()]
    return "\n".join(lines)


def _embedding(model: CausalLMConfig) -> float:
    return model.vocab_size * model.d_model


def _block_params(model: CausalLMConfig, layer: int, degrees: Degrees) -> float:
    """Parameters of one block that one rank gathers: all dense ones, and its own experts'."""
    d = model.d_model
    ffn = model.ffn(layer)
    params = model.attention.n_params(d, model.n_heads, model.norm) + 2 * model.norm.n_params(d)
    if not isinstance(ffn, MoEConfig):
        return params + ffn.n_params(d)
    experts = ffn.moe_num_experts * ffn.expert.n_params(d)
    return params + ffn.n_params(d) - experts + experts / degrees.expert


def _kept_activations(model: CausalLMConfig, parallel: ParallelConfig, tokens: int) -> float:
    """Numbers kept for backward by all layers: the residual stream alone under full recompute."""
    d = model.d_model
    if parallel.recompute == "full":
        return (model.n_layers + 1) * tokens * d
    kept = 0.0
    for layer in range(model.n_layers):
        # Two norms' inputs and outputs, queries, keys, values, the attention's output.
        attention = 4 * d + 3 * model.attention.score_dims(d, model.n_heads)
        ffn = model.ffn(layer)
        hidden = ffn.ffn_hidden_size or 0
        copies = ffn.moe_top_k if isinstance(ffn, MoEConfig) else 1.5  # an expert keeps H alone, a dense block H and A
        kept += tokens * (attention + copies * 2 * hidden)
    return kept + tokens * d
