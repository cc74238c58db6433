"""Memory of a compiled graph: elementwise operators are fused, so only what a kernel writes is counted."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.utils._pytree import tree_iter

from llmfoundry.planning.ledger import Ledger

aten = torch.ops.aten


class FusedGraph(fx.Interpreter):
    """Runs a graph as compiled code would: an elementwise result is in memory only if a reader cannot be fused with it.

    The inputs of fused operators stay alive until the kernel that they are fused into has run, because it reads them.
    """

    ledger: Ledger  # of the simulation that runs; graphs are kept from one to the next

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        (returned,) = (node for node in graph.graph.nodes if node.op == "output")
        kernels = [node for node in graph.graph.nodes if not _fuses(node)]
        self.written = {node for kernel in (*kernels, returned) for node in kernel.all_input_nodes}
        # A view makes no copy, so its base has to be written.
        for node in reversed(graph.graph.nodes):
            if node in self.written and _is_view(node):
                self.written |= set(node.all_input_nodes)
        self.last_read_by = self._last_kernels(graph.graph)
        self.is_read = {node for nodes in self.last_read_by.values() for node in nodes}
        self.kept: dict[fx.Node, object] = {}

    def _last_kernels(self, graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
        """For each kernel, the nodes whose results are read for the last time by it."""
        reads: dict[fx.Node, set[fx.Node]] = {}  # what must be in memory to compute a node's result
        last: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            inputs = {each for read in node.all_input_nodes for each in reads[read]}
            in_memory = node.op == "placeholder" or node in self.written or not _fuses(node) or _is_part(node)
            reads[node] = {node} if in_memory and not _is_view(node) else inputs
            if in_memory:
                last |= dict.fromkeys(inputs, node)
        found: dict[fx.Node, list[fx.Node]] = {}
        for node, kernel in last.items():
            found.setdefault(kernel, []).append(node)
        return found

    def call_function(self, target: Callable[..., object] | str, args: tuple, kwargs: dict) -> object:
        # Attention may draw dropout: a graph that recomputes it keeps the generator's state, a few bytes.
        if target is run_and_save_rng_state:
            return torch.empty(2, dtype=torch.int64), args[0](*args[1:], **kwargs)
        if target is run_with_rng_state:
            return args[1](*args[2:], **kwargs)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> object:
        ledger, fused = type(self).ledger, _fuses(n)
        before, ledger.paused = ledger.paused, fused or ledger.paused
        try:
            result = super().run_node(n)
        finally:
            ledger.paused = before
        if fused and n in self.written and not ledger.paused:
            for part in tree_iter(result):
                if isinstance(part, Tensor):
                    ledger.count(part)
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


def _is_part(node: fx.Node) -> bool:
    """Whether it is one of several results of a kernel, each of which is freed by itself."""
    return node.target is operator.getitem and not _fuses(node.all_input_nodes[0])


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


# Fused as well as what torch itself calls pointwise: reductions, casts, and tensors made without an input.
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
    interpreter = FusedGraph(graph)

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


backend = aot_autograd(
    fw_compiler=_compiler,
    bw_compiler=_compiler,
    partition_fn=min_cut_rematerialization_partition,
    decompositions=select_decomp_table,
)
