"""One training step, simulated: the real code on tensors without values, as one rank of a fake process group.

Build, FSDP, forward, loss, backward, clipping and optimizer run as in the trainer; without values, a model of any size
fits on a laptop. Where a GPU allocates other memory than a CPU, this file substitutes what a GPU does: RMSNorm is one
operator, attention keeps no scores, Triton kernels are not launched (their wrappers still allocate), logits come in
chunks of a GPU's size, a compiled graph fuses elementwise operators, tokens are exchanged evenly, the GPUs of a node
reach each other's memory. Not simulated: fragmentation, the workspaces of cuBLAS and NCCL, the CUDA context.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import NamedTuple, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._functorch import config as functorch
from torch._higher_order_ops import wrap
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_iter

from llmfoundry import runtime
from llmfoundry.data.loader import Batch
from llmfoundry.kernels import activations, cross_entropy, experts, experts_grouped
from llmfoundry.layers import attention, graphs, norm
from llmfoundry.model import transformer
from llmfoundry.model.transformer import CausalLM
from llmfoundry.moe import layer, router
from llmfoundry.moe.all_gather import AllGather
from llmfoundry.moe.all_to_all import AllToAll, Counts
from llmfoundry.moe.balance import Balance
from llmfoundry.parallel import compile as compiling
from llmfoundry.parallel import direct, recompute
from llmfoundry.parallel.apply import keep_weights_in, parallelize
from llmfoundry.parallel.direct import Inbox
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.mesh import Degrees, build_mesh
from llmfoundry.parallel.peers import Peers, Shared
from llmfoundry.planning import hardware
from llmfoundry.planning.fusion import FusedGraph, backend
from llmfoundry.planning.job import Job
from llmfoundry.planning.ledger import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    TEMPORARIES,
    WEIGHTS,
    Ledger,
    Memory,
    Moment,
    Received,
)
from llmfoundry.train.step import train_step

HAS_TRITON = importlib.util.find_spec("triton") is not None
MOST_MICROBATCHES = 2  # the first and the last; those between hold what one of these does


class CannotSimulateError(Exception):
    """The step needs the values of tensors, for example how many are not zero."""


class Step(NamedTuple):
    """What one rank holds and receives in a step that is not the first."""

    held: dict[Moment, list[list[Memory]]]  # after each allocation, for each time that the moment occurs
    received: list[Received]

    @property
    def highest(self) -> Memory:
        """The memory of the highest moment."""
        every = (memory for times in self.held.values() for time in times for memory in time)
        return max(every, key=lambda memory: memory.total)


def simulate(job: Job, degrees: Degrees) -> Step:
    """Simulate rank 0's step, of at most two microbatches.

    Compiled graphs are kept for later calls. Call `torch._dynamo.reset()` before the process compiles anything else.

    Raises:
        CannotSimulateError: an operator's result depends on values.
    """
    work, ledger = job.work(degrees), Ledger()
    job = job.on(degrees)
    rows = work.micro_rows * min(work.microbatches, MOST_MICROBATCHES)
    ledger.bodies, ledger.on_host = _bodies(), job.parallel.cpu_offload
    FusedGraph.ledger = ledger
    world = degrees.replicate * degrees.shard
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        mesh = build_mesh(job.parallel, "cpu", n_experts(job.model))
        with torch.device("meta"):
            model = job.model.build()
            beside = job.model.build() if job.loss.pairs and job.model.lora is None else None
        for each in filter(None, (model, beside)):
            keep_weights_in(job.optimizer.weight_dtype, each)
        with _as_on_a_gpu(ledger):
            with patch.object(runtime, "device", lambda: torch.device("cuda")):
                model = parallelize(model, mesh, job.parallel, job.precision)
                if beside is not None:
                    beside = parallelize(beside, mesh, job.parallel, job.precision).requires_grad_(False)
            with FakeTensorMode(allow_non_fake_inputs=True), ledger:
                model.to_empty(device="cpu")
                if beside is not None:
                    beside.to_empty(device="cpu")
                ledger.parameters = list(model.parameters())
                ledger.kind = OPTIMIZER
                optimizer = job.optimizer.build(model)
                _make_state(optimizer)
                _mark_moments(model, ledger)
                objective = job.loss.build(beside)
                n = objective.sequences
                tokens = torch.zeros(rows // n, n * work.seq_len, dtype=torch.int64)
                batch = Batch(tokens, tokens.clone(), torch.zeros(rows // n, dtype=torch.int64))
                ledger.enter(Moment("forward", -1), ACTIVATIONS)
                ledger.restart()
                train_step(
                    model, optimizer, batch, microbatch_rows=work.micro_rows // n, max_grad_norm=1.0,
                    balance=Balance.of(job.model), objective=objective,
                )  # fmt: skip
        return Step(ledger.held, ledger.received)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise CannotSimulateError(f"the result of {error.func} depends on values") from error
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds meshes of this group


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer allocate its state, as its first step does."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _mark_moments(model: CausalLM, ledger: Ledger) -> None:
    """Tell the ledger of each boundary between blocks, in forward and backward."""

    def backward(block: int, gradient: Tensor) -> None:
        ledger.enter(Moment("backward", block), TEMPORARIES)

    def before(block: int, module: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        ledger.enter(Moment("forward", block), ACTIVATIONS)
        _hook(inputs, partial(backward, block - 1))

    def after(block: int, module: torch.nn.Module, inputs: tuple[object, ...], output: object) -> None:
        ledger.enter(Moment("forward", block + 1), ACTIVATIONS)
        _hook(output, partial(backward, block))

    model.register_forward_pre_hook(lambda *_: ledger.enter(Moment("forward", -1), ACTIVATIONS))
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(partial(before, i))
    model.blocks[-1].register_forward_hook(partial(after, len(model.blocks) - 1))


def _hook(tensors: object, call: Callable[[Tensor], None]) -> None:
    """Call once the gradient of the first of these tensors, the residual stream, is computed."""
    stream = next(part for part in tree_iter(tensors) if isinstance(part, Tensor))
    if stream.requires_grad:
        stream.register_hook(call)


def _bodies() -> dict[object, Callable[..., object]]:
    """Return operators that are opaque to a compiler, with their bodies, which are run to count what they allocate."""
    if not HAS_TRITON:
        return {}
    from llmfoundry.kernels import experts_scaled, experts_triton, scaled_linear

    modules = experts_triton, experts_scaled, scaled_linear
    operators = [each for module in modules for each in vars(module).values() if isinstance(each, CustomOpDef)]
    return {operator._opoverload: operator._init_fn for operator in operators}


class _FusedRMSNorm(torch.autograd.Function):
    """`F.rms_norm` as on a GPU: it keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(self: norm.RMSNorm, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
    return _FusedRMSNorm.apply(x, self.weight)


class _UpcastLinear(torch.autograd.Function):
    """The router's product as on a GPU, without a float32 copy of x in forward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    backward = router._UpcastLinear.backward  # type: ignore[assignment]


def _attention_results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, H, S, C) in the order (B, S, H, C), as the kernels write it, and one number per query."""
    batch, heads, length, _ = q.shape
    y = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    return y, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _attention_gradients(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, *_ = inputs
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.custom_op("planning::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention as GPU kernels compute it, windowed or not: without storing the scores."""
    return _attention_results(q, k, v)


@torch.library.custom_op("planning::attention_backward", mutates_args=())
def _attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_gradients(dy, q, k, v)


_attention.register_fake(_attention_results)
_attention_backward.register_fake(_attention_gradients)
_attention.register_autograd(
    lambda ctx, dy, _: _attention_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def _attend(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return _attention(q, k, v)[0]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Allocate what a product of the loss allocates."""
    return a.new_empty(len(a), b.shape[1], dtype=dtype) if out is None else out


def _even_counts(exchange: AllToAll) -> Counts:
    """Return the counts of even routing, so that no rank has to be asked."""
    ranks, (tokens, top_k) = exchange.n_ranks, exchange._experts.shape
    rows = round(tokens * (1 - (1 - 1 / ranks) ** top_k))  # to each rank
    return Counts([rows] * ranks, [rows] * ranks, tokens * top_k)


class _Signals(NamedTuple):
    """The signals between the GPUs of a group."""

    group: dist.ProcessGroup

    def barrier(self, channel: int, timeout_ms: int) -> None:
        """Do nothing: there are no streams here."""


class _Neighbours(Peers):
    """GPUs of one node, as copy engines see them (parallel/peers.py): this rank's memory stands for everyone's."""

    def __init__(self, group: dist.ProcessGroup, ledger: Ledger) -> None:
        super().__init__(group)
        self.ledger = ledger

    @classmethod
    def within_a_node(cls, ledger: Ledger, group: dist.ProcessGroup, device: torch.device) -> Peers | None:
        """Return the peers of a group, or None if it spans nodes or has one rank."""
        ranks = dist.get_process_group_ranks(group)
        alone = len(ranks) == 1 or len({rank // hardware.NODE for rank in ranks}) > 1
        return None if alone else cls(group, ledger)

    def allocate(self, n: int, dtype: torch.dtype, device: torch.device) -> Shared:
        """Allocate what one rank would; the others are not asked whether they can, because there are none."""
        before = self.ledger.kind
        self.ledger.kind = GRADIENTS if dtype == torch.uint8 else WEIGHTS  # bytes: slots of an inbox
        try:
            mine = torch.empty(n, dtype=dtype, device=device)
        finally:
            self.ledger.kind = before
        return Shared(self.rank, [mine] * self.size, _Signals(self.group))  # type: ignore[arg-type]


def _gather_copies(shared: Shared, whole: Tensor) -> None:
    """Run `Shared.gather` as a collective, so that it is recorded."""
    runtime.all_gather(whole, shared.of_rank[shared.rank], group=cast(_Signals, shared.handle).group)


def _send_copies(ledger: Ledger, inbox: Inbox, grad: Tensor) -> Tensor:
    """Record `Inbox.exchange`; the slots exist already."""
    ranks = dist.get_process_group_ranks(inbox._peers.group)
    ledger.received.append(Received("reduce", tuple(ranks), grad.nbytes))
    return grad[1:]  # of the size of what is in a slot


@contextmanager
def _as_on_a_gpu(ledger: Ledger) -> Iterator[None]:
    resize, compile_, resolve = torch.UntypedStorage.resize_, torch.compile, layer.resolve_backend

    def resize_(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        ledger.resized(storage)

    patches = [
        patch.object(torch.UntypedStorage, "resize_", resize_),
        patch.object(torch, "compile", lambda function: compile_(function, backend=backend)),
        patch.object(compiling, "with_own_code", _one_copy),
        torch._dynamo.config.patch(
            recompile_limit=1024, accumulated_recompile_limit=1024, automatic_dynamic_shapes=False
        ),
        functorch.patch(force_non_lazy_backward_lowering=True),  # a lazy one would copy its graph with fake constants
        patch.object(wrap, "warning_once", lambda *_: None),  # of recompute inside a compiled graph
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.object(FakeTensor, "is_cuda", property(lambda self: True), create=True),
        patch.object(layer, "resolve_backend", lambda choice, kind, _, dtype: resolve(choice, kind, _GPU, dtype)),
        patch.object(experts_grouped, "_on_gpu", lambda _: True),
        patch.object(experts, "_say_once", _say_once),  # so that a run in this process still warns
        patch.object(activations, "_BLOCK_VALUES", 2**62),  # only a CPU cuts rows into blocks
        patch.object(AllToAll, "_begin_counting", lambda *_: None),
        patch.object(AllToAll, "_counted", _even_counts),
        patch.object(AllGather, "_begin_counting", lambda *_: None),
        patch.object(AllGather, "n_slots", property(lambda self: self._experts.numel() // self.n_ranks)),
        patch.object(runtime, "local_world_size", lambda: hardware.NODE),
        patch.object(Peers, "of", partial(_Neighbours.within_a_node, ledger)),
        patch.object(direct.log, "info", lambda *_: None),  # what a run says of its own memory
        patch.object(Shared, "gather", _gather_copies),
        patch.object(Inbox, "exchange", lambda inbox, grad: _send_copies(ledger, inbox, grad)),
        patch.object(router, "_UpcastLinear", _UpcastLinear),
        patch.object(norm.RMSNorm, "forward", _rms_norm),
        patch.object(transformer, "attention_mask", lambda *_: None),
        patch.object(attention, "plain_attention", _attend),
        patch.object(attention, "alibi_bias", lambda *_: None),
        patch.object(attention.F, "scaled_dot_product_attention", _attend),
        patch.object(recompute, "DEAR", (*recompute.DEAR, "planning.attention")),
        patch.object(cross_entropy, "SIZES", {"cpu": cross_entropy.SIZES["cuda"]}),
        patch.object(cross_entropy, "_product", _product),
        patch.object(cross_entropy, "_add_product", lambda *_, **__: None),  # in place
        patch.object(cross_entropy, "softmax_loss", lambda *_: None),
        patch.object(cross_entropy, "scaled_to", lambda x, _, dtype: torch.empty_like(x, dtype=dtype)),
    ]
    if HAS_TRITON:
        import triton

        from llmfoundry.kernels import tune

        launcher = triton.runtime.jit.KernelInterface
        patches += [
            patch.object(launcher, "__getitem__", lambda self, grid: lambda *args, **kwargs: None),
            patch.object(tune, "_fixed", lambda candidates, problem: candidates.large[0]),
        ]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


_GPU = torch.device("cuda")
# torch keeps graphs by code object: with the same one in every simulation, they are traced once.
_one_copy = cache(graphs.with_own_code)
_say_once = cache(experts.log.warning)
