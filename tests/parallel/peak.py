"""The peak of a training step's memory, simulated: the real code on fake tensors, as one rank of a fake process group.

Build, FSDP, forward, loss, backward, clipping and AdamW run as the trainer runs them, on tensors that have a shape and
no values, so a model of any size fits. What a GPU would do otherwise than a CPU is put in its place here: its RMSNorm
is one operator, Triton kernels are not launched (their wrappers still allocate), logits come in a GPU's chunks, a
compiled graph fuses what is elementwise. Not simulated: fragmentation, the workspaces of cuBLAS and NCCL, the context.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import triton
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._library.custom_ops import CustomOpDef
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmfoundry.data.loader import Batch
from llmfoundry.kernels import cross_entropy, experts_triton, tune
from llmfoundry.layers import latent_attention, norm
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe import dispatch, layer, router
from llmfoundry.moe.balance import Balance
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel import recompute
from llmfoundry.parallel.apply import parallelize
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh
from llmfoundry.train.optim import AdamWConfig
from llmfoundry.train.step import train_step

aten = torch.ops.aten


class Peak(NamedTuple):
    """Where a step stood highest."""

    bytes: int
    held: dict[str, int]  # bytes by the lines that allocated them
    at: str  # where it ran then


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive."""

    def __init__(self, explain: bool) -> None:
        super().__init__()
        self.explain = explain
        self.sizes: dict[int, tuple[int, str]] = {}
        self.now = 0
        self.paused = False
        self.best = Peak(0, {}, "")

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts may run below this mode."""
        return True

    def restart(self) -> None:
        """Forget the peak so far."""
        self.best = Peak(0, {}, "")

    def count(self, tensor: Tensor) -> None:
        """A tensor that was allocated, or has changed its size."""
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._gone, key)
            self.sizes[key] = (0, _where() if self.explain else "")
        self._set(key, storage.nbytes())

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage that got another size; FSDP frees and fills gathered weights so."""
        if storage._cdata in self.sizes:
            self._set(storage._cdata, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        before, by = self.sizes[key]
        self.sizes[key] = (size, by)
        self.now += size - before
        if self.now <= self.best.bytes:
            return
        held: Counter[str] = Counter()
        if self.explain:
            for n, line in self.sizes.values():
                held[line] += n
        self.best = Peak(self.now, dict(held), _where() if self.explain else "")

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)[0]

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return 1  # all values are fake; the step asks one: whether the gradient is finite
        body = _BODIES.get(func)
        if body is not None:
            with self:
                result = body(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if not self.paused:
            for part in tree_iter(result):
                if isinstance(part, Tensor):
                    self.count(part)
        return result


def _where() -> str:
    frame, found = sys._getframe(2), []
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if ("llmfoundry" in name or "_fully_shard" in name) and "/tests/" not in name:
            found.append(f"{name.rsplit('/', 1)[1]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


# What a compiler does not look into; here it is looked into, for what is allocated inside.
_BODIES: dict[object, Callable[..., object]] = {
    op._opoverload: op._init_fn for op in vars(experts_triton).values() if isinstance(op, CustomOpDef)
}


class _FusedRMSNorm(torch.autograd.Function):
    """What `F.rms_norm` is on a GPU: keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.empty_like(x), torch.empty_like(weight)


class _UpcastLinear(torch.autograd.Function):
    """The router's product as a GPU does it, without a float32 copy of x in forward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    backward = router._UpcastLinear.backward


@torch.library.custom_op("peak::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention whose values are shorter than its keys as a GPU's kernels do it: a CPU has it only with all scores."""
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("peak::attention_backward", mutates_args=())
def _attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_attention.register_fake(lambda q, k, v: (
    q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)
))  # fmt: skip
_attention_backward.register_fake(
    lambda dy, q, k, v, y, lse: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)
_attention.register_autograd(
    lambda ctx, dy, _: _attention_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


class _Functional:
    """`torch.nn.functional` as latent attention sees it."""

    @staticmethod
    def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        return _attention(q, k, v)[0]


def _softmax_loss(logits: Tensor, labels: Tensor, dtype: torch.dtype, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """What the Triton kernel of the loss allocates."""
    return logits.new_empty(len(logits)), torch.empty_like(logits, dtype=dtype) if needs_grad else None


def _even_exchange(experts: Tensor, n_local: int, group: dist.ProcessGroup) -> dispatch.Plan:
    """The plan of an exchange under even routing, whose counts nobody has to be asked for."""
    ranks, (tokens, top_k) = group.size(), experts.shape
    rows = round(tokens * (1 - (1 - 1 / ranks) ** top_k))  # to each rank
    token = experts.new_empty(rows * ranks, dtype=torch.int32)
    of_token = experts.new_empty(tokens, ranks, dtype=torch.int32)
    return dispatch.Plan(group, token, of_token, [rows] * ranks, [rows] * ranks, tokens * top_k)


class _Fused(fx.Interpreter):
    """Runs a graph as a compiler would: what is elementwise is written out only for who cannot be fused with it.

    Then its inputs are still there: a kernel reads what the elementwise operators that it took in would have read.
    """

    live: Live

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        (returned,) = (node for node in graph.graph.nodes if node.op == "output")
        kernels = [node for node in graph.graph.nodes if not _fuses(node)]
        self.written = {node for kernel in (*kernels, returned) for node in kernel.all_input_nodes}
        # A view of what is written is no copy; a view of what is not makes its base be written.
        for node in reversed(graph.graph.nodes):
            if node in self.written and _is_view(node):
                self.written |= set(node.all_input_nodes)
        self.last_read_by = self._last_kernels(graph.graph)
        self.is_read = {node for nodes in self.last_read_by.values() for node in nodes}
        self.kept: dict[fx.Node, object] = {}

    def _last_kernels(self, graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
        """The nodes whose results nobody reads after a kernel, for each kernel."""
        reads: dict[fx.Node, set[fx.Node]] = {}  # what has to be in memory to have a node's result
        last: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            inputs = {each for read in node.all_input_nodes for each in reads[read]}
            in_memory = node.op == "placeholder" or node in self.written or not _fuses(node)
            reads[node] = {node} if in_memory and not _is_view(node) else inputs
            if in_memory:
                last |= dict.fromkeys(inputs, node)
        found: dict[fx.Node, list[fx.Node]] = {}
        for node, kernel in last.items():
            found.setdefault(kernel, []).append(node)
        return found

    def call_function(self, target: object, args: tuple, kwargs: dict) -> object:
        # Attention may draw dropout: a graph that recomputes it keeps the generator's state, a few bytes.
        if target is run_and_save_rng_state:
            return torch.empty(2, dtype=torch.int64), args[0](*args[1:], **kwargs)
        if target is run_with_rng_state:
            return args[1](*args[2:], **kwargs)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> object:
        live, fused = type(self).live, _fuses(n)
        before, live.paused = live.paused, fused or live.paused
        try:
            result = super().run_node(n)
        finally:
            live.paused = before
        if fused and n in self.written and not live.paused:
            for part in tree_iter(result):
                if isinstance(part, Tensor):
                    live.count(part)
        if n in self.is_read:
            self.kept[n] = result
        for read in self.last_read_by.get(n, []):
            del self.kept[read]
        return result


def _fuses(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op != "output"
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return torch.Tag.pointwise in node.target.tags or node.target in _ALSO_FUSED or _is_view(node)


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


# Reductions, casts and what is made from nothing, beside what torch itself calls pointwise.
_ALSO_FUSED = {
    aten._to_copy.default,
    aten.amax.default,
    aten.arange.start_step,
    aten.cat.default,
    aten.clone.default,
    aten.full.default,
    aten.gather.default,
    aten.mean.dim,
    aten.sum.default,
    aten.sum.dim_IntList,
    torch.ops.prims.convert_element_type.default,
    torch.ops.prims.iota.default,
}


def _compiler(graph: fx.GraphModule, inputs: Sequence[object]) -> Callable[[list[object]], object]:
    interpreter = _Fused(graph)

    def run(arguments: list[object]) -> object:
        given = list(arguments)
        arguments.clear()  # as compiled code does, so that what is not used again is freed
        inputs = zip(graph.graph.find_nodes(op="placeholder"), given, strict=True)
        interpreter.kept = {node: value for node, value in inputs if node in interpreter.is_read}
        try:
            return interpreter.boxed_run(given)
        finally:
            interpreter.env = {}
            interpreter.kept = {}

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


_backend = aot_autograd(
    fw_compiler=_compiler,
    bw_compiler=_compiler,
    partition_fn=min_cut_rematerialization_partition,
    decompositions=select_decomp_table,
)


@contextmanager
def _as_on_a_gpu(live: Live) -> Iterator[None]:
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        live.resized(storage)

    compile_, interface = torch.compile, triton.runtime.jit.KernelInterface
    no_launch = lambda self, grid: lambda *args, **kwargs: None  # noqa: E731
    with (
        patch.object(torch.UntypedStorage, "resize_", resize_),
        patch.object(interface, "__getitem__", no_launch),
        patch.object(FakeTensor, "is_cuda", property(lambda self: True), create=True),
        patch.object(tune, "_fixed", lambda candidates, problem: candidates.large[0]),
        patch.object(layer, "resolve_backend", lambda *_: "triton"),
        patch.object(layer, "plan_exchange", _even_exchange),
        patch.object(router, "_UpcastLinear", _UpcastLinear),
        patch.object(norm.RMSNorm, "forward", _rms_norm),
        patch.object(latent_attention, "F", _Functional),
        patch.object(recompute, "DEAR", (*recompute.DEAR, "peak.attention")),
        patch.object(cross_entropy, "CHUNK_LOGITS", {"cpu": cross_entropy.CHUNK_LOGITS["cuda"]}),
        patch.object(cross_entropy, "_product", lambda a, b, dtype: a.new_empty(len(a), b.shape[1], dtype=dtype)),
        patch.object(cross_entropy, "_add_product", lambda total, a, b: None),  # in place
        patch.object(cross_entropy, "_softmax_loss", _softmax_loss),
        patch.object(torch, "compile", lambda function: compile_(function, backend=_backend)),
    ):
        yield


def _rms_norm(self: norm.RMSNorm, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
    return _FusedRMSNorm.apply(x, self.weight)


def simulate(
    model: CausalLMConfig,
    parallel: ParallelConfig,
    *,
    world: int,
    rows: int,
    micro_rows: int,
    seq_len: int,
    explain: bool = False,
) -> Peak:
    """The highest that one rank of `world` stands in a step that is not the first.

    Args:
        rows: of this rank a step, in microbatches of `micro_rows`.
        explain: say also which lines hold how much.
    """
    moe = model.ffn_config if isinstance(model.ffn_config, MoEConfig) else None
    live = Live(explain)
    _Fused.live = live
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    torch._dynamo.reset()
    try:
        mesh = build_mesh(parallel, "cpu", moe.moe_num_experts if moe else 0)
        with torch.device("meta"):
            built = model.build()
        with _as_on_a_gpu(live):
            built = parallelize(built, mesh, parallel, "amp_bf16")
            with FakeTensorMode(allow_non_fake_inputs=True), live:
                built.to_empty(device="cpu")
                optimizer = AdamWConfig(name="adamw", lr=1.0e-3).build(built)
                tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
                batch = Batch(tokens, tokens.clone(), torch.zeros(rows, dtype=torch.int64))
                for _ in range(2):
                    live.restart()
                    train_step(
                        built, optimizer, batch, microbatch_rows=micro_rows, max_grad_norm=1.0,
                        balance=Balance.of(model),
                    )  # fmt: skip
        return live.best
    finally:
        dist.destroy_process_group()
