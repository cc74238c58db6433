"""What one GPU holds when a training step stands highest, from the config alone.

Shapes: T tokens of a microbatch on one rank, D d_model, H query heads, G kv heads, C head_dim, F ffn hidden size,
E experts, K top_k, R = T*K routed rows, V vocab, L layers.
Walks backward through a step that is not the first: the head, each block, the embedding. What is kept shrinks on
the way and gradients grow, so either end may be the highest. Each moment is a sum of what is alive in it.
Assumes float32 master weights, gradients and AdamW moments (the fused update needs nothing more), a head whose
loss comes in a GPU's chunks, experts by the Triton kernels, and even routing. tests/parallel/test_memory.py holds
it against the real step, simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llmfoundry.kernels.cross_entropy import CHUNK_LOGITS
from llmfoundry.layers.attention import AttentionConfig, GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig, MLPConfig
from llmfoundry.layers.latent_attention import LatentConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel.mesh import Degrees, ParallelConfig, alone

MASTER = 4  # bytes of a float32 weight, gradient or moment


class Memory(NamedTuple):
    """Bytes on one GPU at the highest moment of a step."""

    weights: float  # its share
    gradients: float  # that exist then: its share of finished ones, whole ones, and the buffers that sum them
    optimizer: float  # AdamW's two moments
    gathered: float  # whole weights in the compute type, in use or on their way
    activations: float  # kept for backward, of one microbatch
    temporaries: float  # inside one block's backward, recomputed activations included, or in the head's loss

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class _Block(NamedTuple):
    """One block on one rank."""

    dense: float  # parameters that all of `fsdp` split
    experts: float  # parameters of the experts that this rank gathers
    stored: float  # bytes from its forward to its backward
    attention: float  # bytes that the backward of its attention needs
    inputs: float  # bytes beside what is stored, at most, until the gradient of the feed-forward part's input is there
    weights: float  # the same while the gradients of its weights are made

    @property
    def params(self) -> float:
        return self.dense + self.experts


def memory(
    model: CausalLMConfig,
    parallel: ParallelConfig,
    degrees: Degrees,
    tokens: int,
    compute_bytes: int,
    microbatches: int = 1,
) -> Memory:
    """The highest moment of a step.

    Args:
        tokens: T of one microbatch on one rank.
        compute_bytes: of one activation: 2 in bf16, 4 in float32.
        microbatches: of one rank in a step.
    """
    return max(_Walk(model, parallel, degrees, tokens, compute_bytes, microbatches).moments(), key=lambda m: m.total)


class _Walk:
    """The last microbatch, moment by moment, from the end of its forward."""

    def __init__(
        self,
        model: CausalLMConfig,
        parallel: ParallelConfig,
        degrees: Degrees,
        tokens: int,
        compute_bytes: int,
        microbatches: int,
    ) -> None:
        self.degrees, self.parallel, self.bytes = degrees, parallel, compute_bytes
        self.model, self.tokens, self.again = model, tokens, microbatches > 1
        self.alone = alone(parallel, degrees)
        self.casts = not self.alone or compute_bytes != MASTER
        # Weights that were gathered, or cast by a process alone, until their backward.
        self.keeps = not parallel.reshard_after_forward
        if self.alone:
            self.keeps = parallel.compile is not False or parallel.recompute == "none"
        self.blocks = [_block(model, parallel, degrees, i, tokens, compute_bytes) for i in range(model.n_layers)]
        self.last = model.n_layers - 1
        self.share = 0.0 if parallel.cpu_offload else MASTER / degrees.shard  # bytes here of what is split
        self.weights = model.n_params() * self.share
        self.trained = model.n_trainable_params() / model.n_params()
        vocab = model.vocab_size * model.d_model
        positions = model.max_seq_len * model.d_model if model.has_learned_positions else 0
        # Parameters of the head's unit; a tied one, and positions, are the root's, which stays gathered.
        self.vocab, self.head = vocab, 0 if model.tie_word_embeddings else vocab
        self.root = vocab - self.head + positions
        self.stream = tokens * model.d_model  # numbers of one (T, D)

    def moments(self) -> Iterator[Memory]:
        """All that may be the highest."""
        yield self._forward()
        yield from self._loss()
        for layer in range(self.last, -1, -1):
            yield from self._backward(layer)
        yield self._embedding()

    def _moment(self, gradients: float, gathered: float, waiting: int, temporaries: float) -> Memory:
        """While that many blocks wait for their backward; `gathered` in parameters, the rest in bytes."""
        kept = sum(block.stored for block in self.blocks[:waiting]) + self.stream * self.bytes
        gathered = gathered * self.bytes if self.casts else 0.0
        moments = 2 * self.trained * self.weights
        return Memory(self.weights, gradients * self.trained, moments, gathered, kept, temporaries)

    def _finished(self, waiting: int, head: bool = True) -> float:
        """Bytes of gradients while that many blocks, and perhaps the head, wait for their backward.

        Of what is done a share. Of what waits, only what earlier microbatches left: whole and float32 with
        `reduce_once_a_step`, else a share.
        """
        share = self.share
        done, rest = self.blocks[waiting:], self.blocks[:waiting]
        of_done = sum(self._everyones(block) for block in done) + (self.head if head else 0)
        embeddings = self.root + self.head + (0 if head else self.head)
        if not self.again:
            return of_done * share
        if self.parallel.reduce_once_a_step and not self.alone:
            return of_done * share + (sum(block.params for block in rest) + embeddings) * MASTER
        return (of_done + sum(self._everyones(block) for block in rest) + embeddings) * share

    def _everyones(self, block: _Block) -> float:
        """Parameters of a block, the experts of all ranks counted."""
        return block.dense + block.experts * self.degrees.expert

    def _summing(self, params: float, ranks: int) -> float:
        """Bytes that sum a unit's gradients over `ranks`: they, and a float32 copy to send; or this, and what returns.

        Among one rank with replicas there is a copy more, for the division. Alone they are cast, one after the other.
        """
        if self.alone:
            return params * max(self.bytes, MASTER) if self.casts else 0.0
        sent_and_summed = MASTER * (1 + 1 / ranks + (1 if ranks == 1 and self.degrees.replicate > 1 else 0))
        return params * max(MASTER + self.bytes, sent_and_summed)

    def _pending(self, params: float) -> float:
        """Bytes that were sent for the sum of a unit's gradients: they live until the next unit's are."""
        return 0.0 if self.alone else params * MASTER

    def _forward(self) -> Memory:
        """The last block's weights arrive: whole, in the buffer that they came in, beside the one before."""
        block, before = self.blocks[-1], self.blocks[-2:-1]
        if self.alone:
            return self._moment(
                self._finished(self.last + 1, head=False), self._cast(self.last) + self.root + self.head,
                self.last, self.stream * self.bytes,
            )  # fmt: skip
        gathered = block.params + sum(each.params for each in (block, *before)) + self.root
        gathered += sum(each.params for each in self.blocks[:-1]) + self.head if self.keeps else 0
        ffn, degrees = self.model.ffn(self.last), self.degrees
        if isinstance(ffn, MoEConfig) and ffn.moe_num_experts // degrees.expert % degrees.expert_shard:
            gathered += block.experts  # cut through each expert: put together in a copy
        return self._moment(self._finished(self.last + 1, head=False), gathered, self.last, self.stream * self.bytes)

    def _cast(self, layer: int) -> float:
        """Parameters of the copies that a process alone has while a block runs."""
        return sum(block.params for block in (self.blocks[: layer + 1] if self.keeps else [self.blocks[layer]]))

    def _loss(self) -> Iterator[Memory]:
        """The loss, which makes its gradients at once, in float32; and their way back."""
        before = self._finished(self.last + 1, head=False)
        made = self.stream * self.bytes + (self.stream + self.vocab) * MASTER
        logits = self.tokens * self.model.vocab_size
        chunk = logits / -(-logits // CHUNK_LOGITS["cuda"])
        chunks = chunk * (MASTER + self.bytes)  # logits and their gradient
        kept = sum(block.params for block in self.blocks) if self.keeps else 0
        kept += self.head if self.keeps and not self.alone else 0
        held = self.root + self.head + kept
        buffer = 0 if self.alone else self.head  # that the head's weights came in
        yield self._moment(before, held + buffer, self.last + 1, made + chunks)
        scaled = self.vocab * (MASTER + self.bytes) + self.stream * self.bytes
        ahead = 0 if self.keeps or self.alone else sum(block.params for block in self.blocks[-self.parallel.prefetch :])
        yield self._moment(before, kept if self.alone else held + ahead, self.last + 1, made + scaled)

    def _backward(self, layer: int) -> Iterator[Memory]:
        """A block: the gradient of its experts' (or dense part's) input, those of its weights, and their sum."""
        block, parallel, degrees = self.blocks[layer], self.parallel, self.degrees
        before = self._finished(layer + 1)
        tied = 0 if self.head else self.vocab * self.bytes  # the head's gradient waits for the look-up's
        apart = degrees.expert > 1 and block.experts > 0  # a unit of their own
        after = self.blocks[layer + 1] if layer < self.last else None
        previous = self.head if after is None else after.dense if apart else after.params
        ahead = self.blocks[: layer + 1] if self.keeps else self.blocks[max(0, layer - parallel.prefetch) : layer + 1]
        gathered = sum(each.params for each in ahead) + self.root + (self.head if self.keeps else 0)
        if self.alone:
            gathered = self._cast(layer)
        waiting = before + tied + self._pending(previous)
        yield self._moment(waiting, gathered, layer + 1, block.inputs)
        made = (block.experts or block.dense) * self.bytes
        yield self._moment(waiting + made, gathered, layer + 1, block.weights)
        unit, ranks = (block.experts, degrees.expert_shard) if apart else (block.params, degrees.shard)
        yield self._moment(
            before + tied + self._summing(unit, ranks), gathered - unit,
            layer, self.stream * self.bytes + (block.attention if apart else 0.0),
        )  # fmt: skip

    def _embedding(self) -> Memory:
        """The gradient of the look-up, whole, and its sum."""
        gathered = 0 if self.alone else self.root
        return self._moment(self._finished(0) + self._summing(self.vocab, self.degrees.shard), gathered, 0, 0.0)


def block_params(model: CausalLMConfig, layer: int) -> tuple[int, int]:
    """Parameters of the block of a layer: those that are no expert's, and all experts'."""
    d, ffn = model.d_model, model.ffn(layer)
    experts = ffn.moe_num_experts * ffn.expert.n_params(d) if isinstance(ffn, MoEConfig) else 0
    around = model.attention.n_params(d, model.n_heads, model.norm) + 2 * model.norm.n_params(d)
    return around + ffn.n_params(d) - experts, experts


def _block(
    model: CausalLMConfig, parallel: ParallelConfig, degrees: Degrees, layer: int, tokens: int, size: int
) -> _Block:
    """The block of a layer; `size` bytes an activation."""
    d, ffn = model.d_model, model.ffn(layer)
    compiled = parallel.compile is not False
    dense, everyone = block_params(model, layer)
    attention, ours = _attention(model.attention, d, model.n_heads), _feed_forward(ffn, d, degrees, size, compiled)
    # The residual stream and its norm's output, before attention and before the feed-forward part.
    before = (2 * d + attention.kept) * size
    kept = before + 2 * d * size + ours.kept
    products = (d + attention.products) * size + ours.products  # `recompute.DEAR`: dense products and attention
    stored = {"none": kept, "selective": min(products, kept), "full": d * size}[parallel.recompute]
    again = late = kept - stored
    if again and compiled and degrees.expert == 1:  # in one graph, what is computed again lives no longer than it must
        if parallel.recompute == "selective":
            # A mixture's backward reads its input as a whole; a dense one needs it after the widest moment.
            around = 2 * d * size if isinstance(ffn, MoEConfig) else 0
            again = late = min(again, around + ours.kept - ours.products)
        again -= ours.activation
        late -= ours.activation + ours.pre_activation
    return _Block(
        dense,
        everyone / degrees.expert,
        tokens * stored,
        tokens * before,
        tokens * (again + ours.inputs),
        tokens * (late + ours.weights),
    )


class _Attention(NamedTuple):
    """Numbers a token."""

    kept: int  # beside its input
    products: int  # results of dense products and of attention itself


def _attention(config: AttentionConfig, d_model: int, n_heads: int) -> _Attention:
    if isinstance(config, LatentConfig):
        q, v, latent = n_heads * config.qk_head_dim, n_heads * config.v_head_dim, config.kv_lora_rank
        down, q_rank = latent + config.qk_rope_head_dim, config.q_lora_rank or 0
        up = n_heads * (config.qk_nope_head_dim + config.v_head_dim)
        # Latents and their norms' outputs, keys and values expanded, queries and keys put together, the output.
        return _Attention(2 * q_rank + down + latent + up + 2 * q + v, q_rank + q + down + up + v + d_model)
    assert isinstance(config, GroupedQueryConfig)
    head = config.rotary_dim(d_model, n_heads)
    q, kv = n_heads * head, config.kv_heads(n_heads) * head
    # What the projection made, queries and keys again if they are rotated or normalised, the output.
    changed = config.rope or config.qk_norm or config.qk_ln
    clipped = q + 2 * kv if config.clip_qkv is not None else 0
    return _Attention(q + 2 * kv + clipped + (q + kv if changed else 0) + q, q + 2 * kv + q + d_model)


class _FeedForward(NamedTuple):
    """Bytes a token."""

    kept: float  # beside its input
    products: float  # of that, results of dense products
    inputs: float  # in backward until its input's gradient is there
    weights: float  # in backward while the gradients of its weights are made
    pre_activation: float = 0.0  # what that does not need, of an expert's
    activation: float = 0.0  # of what is kept, what is gone before the gradient at the pre-activation is there


def _feed_forward(ffn: FFNConfig, d: int, degrees: Degrees, size: int, compiled: bool) -> _FeedForward:
    if isinstance(ffn, MoEConfig):
        return _mixture(ffn, d, degrees, size, compiled)
    assert isinstance(ffn, MLPConfig)
    f, rows = ffn.hidden_size, ffn.rows
    if compiled:  # the pre-activation and the activation; their gradients
        kept = (rows + f) * size
        return _FeedForward(
            kept, rows * size, (f + rows + 2 * d) * size, (rows + 2 * d) * size, activation=f * size
        )  # fmt: skip
    # Uncompiled, a gated unit keeps gate, up and the activated gate in float32.
    kept = rows * MASTER + f * MASTER + f * size if ffn.gated else (rows + f) * size
    inputs = 3 * f * MASTER - f * size if ffn.gated else 2 * f * size
    return _FeedForward(kept, (rows + d) * size, inputs + 2 * d * size, (rows + 2 * d) * size)


def _mixture(ffn: MoEConfig, d: int, degrees: Degrees, size: int, compiled: bool) -> _FeedForward:
    k, e, expert = ffn.moe_top_k, ffn.moe_num_experts, ffn.expert
    kept: float
    products: float
    inputs: float
    weights: float
    f, rows = expert.hidden_size, expert.rows
    # The pre-activation h of each row; scores and logits in float32; ids, weights and order of each slot.
    kept, products = k * rows * size + 2 * e * MASTER + 24 * k, e * MASTER + 16 * k
    # dy by expert, h's gradient, the activation, x's gradient by expert and by token, dy by token. Then, with the
    # first and the last two gone, x by expert.
    inputs = (2 * k * d + k * rows + k * f + 2 * d) * size
    weights = (k * d + k * rows + 2 * d) * size
    if degrees.expert > 1:
        # A token goes once to each rank that has one of its experts: x there, its gradient, and y's.
        received = degrees.expert * (1 - (1 - 1 / degrees.expert) ** k)
        kept += received * d * size
        inputs += 2 * received * d * size
        weights += 2 * received * d * size
    if ffn.shared is not None:
        shared = _feed_forward(ffn.shared, d, degrees, size, compiled)
        kept, products = kept + shared.kept, products + shared.products
    return _FeedForward(kept, products, inputs, weights, k * rows * size)
