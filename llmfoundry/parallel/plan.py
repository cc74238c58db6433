"""What a run sends over its links and how long a step takes, from the config alone; memory.py says what it holds.

Shapes: D d_model, F ffn hidden size, E experts, K top_k, T tokens of a microbatch on one rank, L layers, V vocab.
Collectives are rings, and rings enter a node once: of what a node's GPUs gather from other nodes, each receives its
part over the network and passes it on over NVLink. The time assumes that gathering and summing hide behind compute
up to the longer of both and slow it in nothing, that the exchange of tokens hides nowhere, and even routing.
"""

from __future__ import annotations

from typing import NamedTuple

from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel import hardware
from llmfoundry.parallel.memory import MASTER, Memory, block_params, memory
from llmfoundry.parallel.mesh import Degrees, ParallelConfig, alone


class Link(NamedTuple):
    """Bytes that one GPU receives."""

    nvlink: float
    network: float

    @property
    def total(self) -> float:
        """Over both."""
        return self.nvlink + self.network

    def seconds(self, nvlink_rate: float) -> float:
        """Both at once: the slower one counts."""
        return max(self.nvlink / nvlink_rate, self.network / hardware.NETWORK)


class Traffic(NamedTuple):
    """What one GPU receives a step."""

    gather: Link  # weights, forward and backward
    reduce: Link  # gradients
    replicate: Link  # gradients again, over copies of the model
    tokens: Link  # to the experts and back, forward and backward; even routing


class Time(NamedTuple):
    """Seconds of a step."""

    compute: float  # forward, backward and what is computed again
    communication: float  # weights and gradients
    exchange: float  # of tokens
    update: float  # of the weights, and the copies that split them

    @property
    def total(self) -> float:
        """Communication hides behind compute up to the longer of both; the exchange and the update hide nowhere."""
        return max(self.compute, self.communication) + self.exchange + self.update

    @property
    def exposed(self) -> float:
        """Seconds in which a GPU waits for its links."""
        return max(0.0, self.communication - self.compute) + self.exchange


class Work(NamedTuple):
    """One rank's part of a step."""

    rows: int  # of the rank
    micro_rows: int
    seq_len: int
    compute_bytes: int = 2  # of one activation: 2 in bf16, 4 in float32

    @property
    def tokens(self) -> int:
        """T."""
        return self.micro_rows * self.seq_len

    @property
    def microbatches(self) -> int:
        """Of the rank."""
        return -(-self.rows // self.micro_rows)


class Plan(NamedTuple):
    """A run on one mesh."""

    degrees: Degrees
    work: Work
    memory: Memory
    traffic: Traffic
    time: Time
    tokens_per_second: float  # a GPU
    mfu: float  # of an H100

    def fits(self, gpu_memory: float) -> bool:
        """Whether a GPU of so many bytes holds it."""
        return self.memory.total <= gpu_memory - hardware.RESERVE


def plan(model: CausalLMConfig, parallel: ParallelConfig, degrees: Degrees, work: Work) -> Plan:
    """All that is foretold of a run on one mesh."""
    held = memory(model, parallel, degrees, work.tokens, work.compute_bytes, work.microbatches)
    moved = traffic(model, parallel, degrees, work)
    time = seconds(model, parallel, degrees, work, moved)
    speed = work.rows * work.seq_len / time.total
    mfu = speed * model.flops_per_token(work.seq_len) / hardware.PEAK_FLOPS
    return Plan(degrees, work, held, moved, time, speed, mfu)


def traffic(model: CausalLMConfig, parallel: ParallelConfig, degrees: Degrees, work: Work) -> Traffic:
    """What a GPU receives a step."""
    dense, experts = _params(model)
    whole = model.vocab_size * model.d_model * (1 if model.tie_word_embeddings else 2)
    mine = experts / degrees.expert
    trained = model.n_trainable_params() / model.n_params()
    again = 2 if parallel.reshard_after_forward else 1
    gathers = work.microbatches * work.compute_bytes
    sums = (1 if parallel.reduce_once_a_step else work.microbatches) * MASTER * trained

    def over_shards(of_dense: float, of_experts: float) -> Link:
        apart = _ring(of_experts, degrees.expert_shard, degrees.expert)
        return _both(_ring(of_dense, degrees.shard, 1), apart)

    # Embedding and head are gathered once: a look-up's gradient needs no weight, the head's backward follows at once.
    gather = over_shards((again * dense + whole) * gathers, again * mine * gathers)
    reduce = over_shards((dense + whole) * sums, mine * sums)
    copies = _ring(2 * model.n_trainable_params() / degrees.shard * MASTER, degrees.replicate, degrees.shard)
    return Traffic(gather, reduce, copies, _exchange(model, parallel, degrees, work))


def _ring(total: float, ranks: int, stride: int) -> Link:
    """What one of `ranks`, every `stride`-th GPU, receives of the `total` bytes that all of them end up with."""
    here = max(1, min(ranks, hardware.NODE // stride))  # of them in a node
    network = total * (1 - here / ranks) / here
    return Link(total * (1 - 1 / ranks) - network, network)


def _both(a: Link, b: Link) -> Link:
    return Link(a.nvlink + b.nvlink, a.network + b.network)


def _exchange(model: CausalLMConfig, parallel: ParallelConfig, degrees: Degrees, work: Work) -> Link:
    """A token goes once to each rank that has one of its experts: there and back, forward and backward."""
    ranks, times = degrees.expert, 4 if parallel.recompute == "none" else 6
    nvlink = network = 0.0
    for layer in range(model.n_layers):
        ffn = model.ffn(layer)
        if not isinstance(ffn, MoEConfig) or ranks == 1:
            continue
        sent = times * work.rows * work.seq_len * model.d_model * work.compute_bytes
        each = sent * (1 - (1 - 1 / ranks) ** ffn.moe_top_k)  # to one rank
        here = min(ranks, hardware.NODE)
        nvlink += each * (here - 1)
        network += each * (ranks - here)
    return Link(nvlink, network)


def seconds(model: CausalLMConfig, parallel: ParallelConfig, degrees: Degrees, work: Work, moved: Traffic) -> Time:
    """How long a step takes on H100s: arithmetic over the rates in hardware.py, bytes over those of links."""
    communication = (
        moved.gather.seconds(hardware.ALL_GATHER)
        + moved.reduce.seconds(hardware.REDUCE_SCATTER)
        + moved.replicate.seconds(hardware.ALL_REDUCE)
    )
    compute = work.rows * work.seq_len * _compute(model, parallel, work.seq_len)
    update = _update(model, parallel, degrees, work)
    return Time(compute, communication, moved.tokens.seconds(hardware.ALL_TO_ALL), update)


def _compute(model: CausalLMConfig, parallel: ParallelConfig, seq_len: int) -> float:
    """Seconds of forward and backward, a token."""
    products = model.flops_per_token(1)  # one token has nothing to attend to
    attention = (model.flops_per_token(seq_len) - products) / hardware.ATTENTION_FLOPS
    of_weight = 6 if model.lora is None else 4  # FLOPs; a frozen one has no gradient
    routed = experts = 0.0  # FLOPs of the experts that a token meets, and their seconds
    for layer in range(model.n_layers):
        ffn = model.ffn(layer)
        if isinstance(ffn, MoEConfig):
            flops = of_weight * ffn.moe_top_k * ffn.expert.n_params(model.d_model)
            routed += flops
            experts += flops / hardware.experts_flops(model.d_model, ffn.expert.hidden_size)
    dense = (products - routed) / hardware.DENSE_FLOPS
    small = hardware.BLOCK_BYTES * model.n_layers * model.d_model / hardware.COPY_BYTES
    loss = hardware.LOSS_BYTES * model.vocab_size / hardware.COPY_BYTES
    once = experts + dense + attention + small + loss
    # `selective` keeps what is dear, but not the experts' products; attention's forward is a third of it.
    again = 2 / of_weight * experts
    if parallel.recompute == "full":
        head = of_weight * model.vocab_size * model.d_model / hardware.DENSE_FLOPS
        again += 2 / of_weight * (dense - head) + (attention + small) / 3
    return once if parallel.recompute == "none" else once + again


def _update(model: CausalLMConfig, parallel: ParallelConfig, degrees: Degrees, work: Work) -> float:
    """Seconds of what is bound by memory: clipping and AdamW on the share, and the copies around each collective.

    Bytes a parameter of the share: 4 to measure the gradient, 8 to scale it, 28 for the update, 6 to round it before a
    gathering. Of what is gathered: 4 to put it in place; of gradients 6, for a float32 copy. A process alone rounds its
    weights once a microbatch, and its gradients.
    """
    dense, experts = _params(model)
    whole = dense + experts / degrees.expert + model.vocab_size * model.d_model
    share = model.n_trainable_params() / degrees.shard
    if alone(parallel, degrees):
        return (40 * share + (6 * work.microbatches + 6) * whole) / hardware.COPY_BYTES
    gathers = work.microbatches * (2 if parallel.reshard_after_forward else 1)
    reductions = 1 if parallel.reduce_once_a_step else work.microbatches
    return (40 * share + gathers * (6 * share + 4 * whole) + reductions * 6 * whole) / hardware.SHARDED_COPY_BYTES


def _params(model: CausalLMConfig) -> tuple[int, int]:
    """Parameters of all blocks: dense ones, and experts'."""
    dense, experts = zip(*(block_params(model, layer) for layer in range(model.n_layers)), strict=True)
    return sum(dense), sum(experts)
