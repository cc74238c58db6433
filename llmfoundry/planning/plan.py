"""Traffic of a run over its links, and the time of a step: arithmetic with measured rates.

Collectives are rings that enter a node once: of what comes from other nodes, each GPU receives its part over the
network and passes it on over NVLink. The time assumes that all-gathers of weights and reductions of gradients overlap
with compute and do not slow it down, that the exchange of tokens overlaps with nothing, and that routing is even.
"""

from __future__ import annotations

from typing import NamedTuple

from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel.direct import MOST_RANKS
from llmfoundry.parallel.mesh import Degrees, single_process
from llmfoundry.planning import hardware
from llmfoundry.planning.job import Job, Work

MASTER = 4  # bytes of a float32 weight or gradient


class Link(NamedTuple):
    """Bytes that one GPU receives."""

    nvlink: float
    network: float

    @property
    def total(self) -> float:
        """Bytes over both links."""
        return self.nvlink + self.network

    def seconds(self, nvlink_rate: float) -> float:
        """Return the seconds on the slower link, because both work at the same time."""
        return max(self.nvlink / nvlink_rate, self.network / hardware.NETWORK)


class Traffic(NamedTuple):
    """What one GPU receives per step."""

    gather: Link  # weights, forward and backward
    reduce: Link  # gradients
    replicate: Link  # gradients again, over the replicas of the model
    tokens: Link  # to the experts and back, forward and backward


class Time(NamedTuple):
    """Seconds of a step."""

    compute: float  # forward, backward and recompute
    communication: float  # weights and gradients
    exchange: float  # exchange of tokens
    update: float  # of the weights, and the copies that shard them

    @property
    def total(self) -> float:
        """Compute and communication overlap, so the longer counts; the exchange and the update overlap with nothing."""
        return max(self.compute, self.communication) + self.exchange + self.update

    @property
    def exposed(self) -> float:
        """Seconds in which a GPU waits for its links."""
        return max(0.0, self.communication - self.compute) + self.exchange


class Plan(NamedTuple):
    """Traffic and time of a run on one mesh; `memory.memory` simulates what each GPU holds."""

    degrees: Degrees
    work: Work
    traffic: Traffic
    time: Time
    tokens_per_second: float  # per GPU
    mfu: float  # of an H100


def plan(job: Job, degrees: Degrees) -> Plan:
    """Return the plan of a run on one mesh."""
    work, received = job.work(degrees), traffic(job, degrees)
    time = seconds(job, degrees, received)
    speed = job.global_rows / (degrees.replicate * degrees.shard) * work.seq_len / time.total
    mfu = speed * job.model.flops_per_token(work.seq_len) / hardware.PEAK_FLOPS
    return Plan(degrees, work, received, time, speed, mfu)


def traffic(job: Job, degrees: Degrees) -> Traffic:
    """Return what a GPU receives per step."""
    model, parallel, work = job.model, job.parallel, job.work(degrees)
    dense, experts = _params(model)
    embeddings = model.vocab_size * model.d_model * (1 if model.tie_word_embeddings else 2)
    own = experts / degrees.expert
    passes = 2 if parallel.reshard_after_forward else 1
    counted = work.counted if parallel.reshard_after_forward else 0  # otherwise the weights stay gathered
    blocks = passes * work.microbatches + counted
    trained = model.n_trainable_params() / model.n_params()
    sums = (work.microbatches if parallel.reduce_once_a_step is False else 1) * MASTER * trained

    def over_shards(of_dense: float, of_experts: float) -> Link:
        apart = _ring(of_experts, degrees.expert_shard, degrees.expert)
        return _both(_ring(of_dense, degrees.shard, 1), apart)

    # Embedding and head are gathered once per forward: the gradient of a look-up does not need the weight, and the
    # head's backward directly follows its forward. A pass that counts loads has no head.
    looked_up = model.vocab_size * model.d_model * counted
    gather = over_shards(
        (blocks * dense + embeddings * work.microbatches + looked_up) * job.compute_bytes,
        blocks * own * job.compute_bytes,
    )
    # Whole sums of microbatches are float32; otherwise experts' gradients may travel as they are computed (direct.py).
    each = work.microbatches == 1 or parallel.reduce_once_a_step is False
    directly = each and degrees.replicate == 1 and degrees.expert_shard <= MOST_RANKS and _gathers_directly(job)
    reduce = over_shards((dense + embeddings) * sums, own * sums * (job.compute_bytes / MASTER if directly else 1))
    copies = _ring(2 * model.n_trainable_params() / degrees.shard * MASTER, degrees.replicate, degrees.shard)
    return Traffic(gather, reduce, copies, _exchange(job, degrees))


def _ring(total: float, ranks: int, stride: int) -> Link:
    """Return what one of `ranks` GPUs, each `stride` from the next, receives of the `total` bytes that all get."""
    here = max(1, min(ranks, hardware.NODE // stride))  # ranks in one node
    network = total * (1 - here / ranks) / here
    return Link(total * (1 - 1 / ranks) - network, network)


def _both(a: Link, b: Link) -> Link:
    return Link(a.nvlink + b.nvlink, a.network + b.network)


def _exchange(job: Job, degrees: Degrees) -> Link:
    """Return the traffic of tokens: each goes to each rank with any of its experts once, or to each rank, and back.

    Recomputation of a block ends before its rows return, because backward needs nothing after that.
    """
    ranks, work = degrees.expert, job.work(degrees)
    times = (4 if job.parallel.recompute == "none" else 5) + 2 * work.counted / work.microbatches
    nvlink = network = 0.0
    for layer in range(job.model.n_layers):
        ffn = job.model.ffn(layer)
        if not isinstance(ffn, MoEConfig) or ranks == 1:
            continue
        sent = times * work.rows * work.seq_len * job.model.d_model * job.compute_bytes
        each = sent * (1.0 if job.gathers(degrees, ffn.moe_top_k) else 1 - (1 - 1 / ranks) ** ffn.moe_top_k)  # to one
        here = min(ranks, hardware.NODE)
        nvlink += each * (here - 1)
        network += each * (ranks - here)
    return Link(nvlink, network)


def seconds(job: Job, degrees: Degrees, received: Traffic) -> Time:
    """Return the time of a step on H100s: FLOPs and bytes divided by the rates in hardware.py."""
    communication = (
        received.gather.seconds(hardware.ALL_GATHER)
        + received.reduce.seconds(hardware.REDUCE_SCATTER)
        + received.replicate.seconds(hardware.ALL_REDUCE)
    )
    work = job.work(degrees)
    compute = work.rows * work.seq_len * _seconds_per_token(job, work.counted / work.microbatches)
    return Time(compute, communication, received.tokens.seconds(hardware.ALL_TO_ALL), _update(job, degrees))


def _seconds_per_token(job: Job, counted: float) -> float:
    """Return the seconds of forward and backward per token; `counted` is the share of tokens counted first."""
    model, recompute, e4m3 = job.model, job.parallel.recompute, job.precision == "amp_fp8"
    products = model.flops_per_token(1)  # one token has nothing to attend to
    attention = (model.flops_per_token(job.seq_len) - products) / hardware.ATTENTION_FLOPS
    of_weight = 6 if model.lora is None else 4  # FLOPs; a frozen weight has no gradient
    routed = experts = 0.0  # of the active experts: FLOPs, and seconds
    for layer in range(model.n_layers):
        ffn = model.ffn(layer)
        if isinstance(ffn, MoEConfig):
            flops = of_weight * ffn.moe_top_k * ffn.expert.n_params(model.d_model)
            routed += flops
            experts += flops / hardware.experts_flops(model.d_model, ffn.expert.hidden_size, e4m3=e4m3)
    head = of_weight * model.vocab_size * model.d_model / hardware.DENSE_FLOPS
    dense = ((products - routed) / hardware.DENSE_FLOPS - head) / (hardware.E4M3_DENSE if e4m3 else 1.0) + head
    small = hardware.BLOCK_BYTES * model.n_layers * model.d_model / hardware.COPY_BYTES
    loss = hardware.LOSS_BYTES * model.vocab_size / hardware.COPY_BYTES
    once = experts + dense + attention + small + loss
    # Forward of the experts, and of the rest of the blocks. A third of attention's time is forward.
    forward_experts = 2 / of_weight * experts
    forward_rest = 2 / of_weight * (dense - head) + (attention + small) / 3
    # `selective` keeps the results of dense products and attention, but not of the experts' products.
    again = {"none": 0.0, "selective": forward_experts, "full": forward_experts + forward_rest}[recompute]
    return once + again + counted * (forward_experts + forward_rest)


def _update(job: Job, degrees: Degrees) -> float:
    """Return the seconds of clipping and the optimizer on this GPU's shard, and of copies around each collective.

    All of it is bound by memory bandwidth, except for Muon's products.

    Bytes per parameter of the shard: 4 for the norm of the gradient, 12 and the moments for the update, 6 for the cast
    before an all-gather; over ranks also 8 to scale the gradient, as when two GPUs were last timed (now the update
    does it). Bytes per gathered parameter: 4 for a copy, and 6 for a float32 copy of its gradient; if whole gradients
    of microbatches are added up, 6 for the first and 10 for each other one. A single process casts its weights and
    gradients once per microbatch; in a lean step (parallel/single.py) it casts neither, and sums bfloat16 gradients.
    Weights in bfloat16 take 4 bytes less in the update, and no cast.
    """
    model, parallel, microbatches = job.model, job.parallel, job.work(degrees).microbatches
    dense, experts = _params(model)
    whole = dense + experts / degrees.expert + model.vocab_size * model.d_model
    share = model.n_trainable_params() / degrees.shard
    half = job.optimizer.weight_dtype.itemsize == 2
    update = ((12 if half and not job.optimizer.halves else 16) + 2 * job.optimizer.state_bytes) * share
    cast = 0 if half else 6
    products = job.optimizer.update_flops(model) / degrees.shard / hardware.MUON_FLOPS
    if single_process(parallel, degrees):
        lean = microbatches == 1 or parallel.sum_gradients_in == "bf16"
        lean_copies = 6 * (microbatches - 1) * whole - (4 if half else 2) * share
        copies = lean_copies if lean else (6 * microbatches + cast) * whole
        return (update + copies) / hardware.COPY_BYTES + products
    gathers = 2 * microbatches + job.work(degrees).counted if parallel.reshard_after_forward else microbatches
    reductions = microbatches if parallel.reduce_once_a_step is False else 1
    own, ranks = experts / degrees.expert, degrees.expert_shard
    added = 0 if reductions == microbatches else 6 + 10 * (microbatches - 1)  # to whole sums in float32
    whole -= own
    copies = gathers * (cast / degrees.shard + 4) * whole + reductions * 6 * whole
    if ranks > 1 and _gathers_directly(job):
        sums = 2 + 4 / ranks if degrees.replicate == 1 and ranks <= MOST_RANKS else 6
        copies += (gathers * cast / ranks + reductions * sums) * own
    elif not half or degrees.expert == 1 or max(ranks, degrees.replicate) > 1 or parallel.cpu_offload:
        copies += (gathers * (cast / ranks + 4) + reductions * 6) * own  # otherwise they are not in an FSDP unit
    copies += added * (whole + own)
    return (update + 8 * share + copies) / hardware.SHARDED_COPY_BYTES + products


def _gathers_directly(job: Job) -> bool:
    return job.parallel.gather_experts != "packed" and not job.parallel.cpu_offload


def _params(model: CausalLMConfig) -> tuple[int, int]:
    """Return the number of parameters of all blocks outside the experts, and in the experts."""
    d, dense, experts = model.d_model, 0, 0
    for layer in range(model.n_layers):
        ffn = model.ffn(layer)
        routed = ffn.moe_num_experts * ffn.expert.n_params(d) if isinstance(ffn, MoEConfig) else 0
        around = model.attention_params(layer) + 2 * model.norm.n_params(d)
        dense, experts = dense + around + ffn.n_params(d) - routed, experts + routed
    return dense, experts
