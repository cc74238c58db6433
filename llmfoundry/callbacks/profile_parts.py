"""Attribute each operator and kernel of a profile to a part of the step, and sum the time of each part.

Three rules decide, in this order: names that only one part uses (our kernels, collectives); the module that ran, or for
a backward the module whose forward created the node; and names that hint at a part, either its own or its callers'.
Modules inside compiled blocks are not visible: their products are `dense products`, whichever module they belong to.
`parallel.compile: false` shows them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

from llmfoundry.moe.layer import MoE
from llmfoundry.train.run import STEP

SCOPE = "part: "  # prefix of part names in the trace
BACKWARD = "autograd::engine::evaluate_function"
OTHER, IDLE, COMMUNICATION, DENSE = "other", "idle", "communication", "dense feed-forward"
# Parts by a module's name in its parent.
MODULES = {
    "attn": "attention",
    "self_attn": "attention",
    "router": "router",
    "experts": "experts",
    "shared_expert": DENSE,
    "lm_head": "loss",
}


def _patterns(*pairs: tuple[str, str]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((part, re.compile(pattern, re.IGNORECASE)) for part, pattern in pairs)


SURE = _patterns(
    (
        COMMUNICATION,
        r"nccl|gloo|c10d|memcpy ptop|all_?(gather|reduce|to_all)|reduce_scatter|add_parts"
        r"|split_with_sizes_copy|chunk_cat",
    ),
    (
        "experts",
        r"up_(hopper_)?kernel|up_backward|grouped|weight_grad|experts_(for|back|weight|bias)|expert_sums|_Experts",
    ),
    ("gather and dispatch", r"spread_kernel|sum_rows|slot_sums|index_select|sort_by_expert"),
    ("update", r"^Optimizer\.step#|adam|lion|muon|multi_tensor|lpnorm|square_sum|linalg_vector_norm"),
)
HINTS = _patterns(
    ("router", r"top_?k|_(count|prefix|start|place|tiles|local)_kernel|router|UpcastLinear"),
    ("attention", r"attention|flash|fmha|sdpa|flex"),
    ("loss", r"cross_entropy|softmax_loss|nll_loss|log_softmax|softmax_backward|LinearCrossEntropy"),
    ("update", r"optimizer|foreach"),
)
GENERIC = _patterns(
    ("dense products", r"gemm|cutlass|nvjet|xmma|cublas|aten::(mm|addmm|bmm|matmul|linear|_?mm)|mkldnn|onednn"),
    ("copies and casts", r"memcpy|memset|copy|convert|aten::(to|_to_copy|cat|contiguous|clone|zero_|fill_)"),
)


class Line(NamedTuple):
    """One row of the table."""

    part: str
    milliseconds: float  # per step
    share: float  # fraction of the step


class Span(NamedTuple):
    """A part at work: an interval of time."""

    start: float  # microseconds
    end: float
    part: str


@contextmanager
def scopes(model: nn.Module) -> Iterator[None]:
    """Mark the part of each module while it runs, in a profile; modules of compiled blocks are left unmarked."""
    handles = []
    compiled = any("forward" in vars(block) for block in model.get_submodule("blocks").children())
    for prefix, module in model.named_modules():
        name = prefix.rpartition(".")[2]
        part = MODULES.get(name) or (DENSE if name == "ffn" and not isinstance(module, MoE) else None)
        if part is not None and not (compiled and prefix.startswith("blocks.")):
            handles += _scoped(module, part)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Removable(NamedTuple):
    remove: Callable[[], None]


def _scoped(module: nn.Module, part: str) -> list[_Removable]:
    running: list[record_function] = []

    def enter(*_: object) -> None:
        running.append(record_function(SCOPE + part))
        running[-1].__enter__()

    def leave(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    before, after = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    return [_Removable(before.remove), _Removable(after.remove)]


def part_of(names: Sequence[str], backward_of: str | None = None) -> str:
    """Return the part to which an operator or kernel belongs.

    Args:
        names: its own name, and those of its callers, innermost first.
        backward_of: for a backward, the part whose forward created the node.
    """
    scope = next((name.removeprefix(SCOPE) for name in names if name.startswith(SCOPE)), backward_of)
    return _first(SURE, names) or scope or _first(HINTS, names) or _first(GENERIC, names) or OTHER


def _first(patterns: tuple[tuple[str, re.Pattern[str]], ...], names: Sequence[str]) -> str | None:
    return next((part for name in names for part, pattern in patterns if pattern.search(name)), None)


def lines_of(events: Sequence[FunctionEvent]) -> list[Line]:
    """Return the table of a profile, largest part first; its lines add up to the mean step.

    Args:
        events: events of `torch.profiler.profile`, with one called STEP for each step.
    """
    cpu = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event for event in cpu if event.name == STEP]
    windows = [(step.time_range.start, step.time_range.end) for step in steps]
    chains = Chains(cpu)
    launches = {event.id: event for event in cpu if event.name.startswith("cu")}  # cudaLaunchKernel, cuLaunchKernelEx
    kernels = [
        Span(event.time_range.start, event.time_range.end, chains.part_of_kernel(event.name, launches.get(event.id)))
        for event in events
        if event.device_type == DeviceType.CUDA and not event.name.startswith((SCOPE, STEP))
    ]
    sums = sweep(kernels, windows) if kernels else _self_times(cpu, steps, chains)
    wall = sum(end - start for start, end in windows)
    return [Line(part, cost / 1e3 / len(steps), cost / wall) for part, cost in sums.most_common()]


class Chains:
    """Looks up the callers of an event, and the forward that a backward belongs to."""

    def __init__(self, cpu: Sequence[FunctionEvent]) -> None:
        self._forward: dict[int, str] = {}  # the last forward event with a sequence number creates its autograd node
        for event in sorted(cpu, key=lambda event: event.time_range.start):
            names = names_of(event)
            scope = next((name for name in names if name.startswith(SCOPE)), None)
            if event.sequence_nr >= 0 and scope is not None and not any(name.startswith(BACKWARD) for name in names):
                self._forward[event.sequence_nr] = scope.removeprefix(SCOPE)

    def part_of(self, event: FunctionEvent | None, *first: str) -> str:
        backward, at = None, event
        while at is not None and backward is None:
            if at.name.startswith(BACKWARD):
                backward = self._forward.get(at.sequence_nr)
            at = at.cpu_parent
        return part_of([*first, *names_of(event)], backward)

    def part_of_kernel(self, name: str, launch: FunctionEvent | None) -> str:
        return self.part_of(launch, name)


def names_of(event: FunctionEvent | None) -> list[str]:
    """Return the event's name, and those of its callers, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _self_times(cpu: Sequence[FunctionEvent], steps: Sequence[FunctionEvent], chains: Chains) -> Counter[str]:
    """Microseconds by part, of operators inside the steps, on the steps' thread."""
    sums: Counter[str] = Counter()
    for event in cpu:
        names = names_of(event)
        if STEP in names and event.thread == steps[0].thread:
            between = event.name == STEP or event.name.startswith(SCOPE)
            sums[IDLE if between else chains.part_of(event)] += event.self_cpu_time_total
    return sums


def sweep(spans: Iterable[Span], windows: Iterable[tuple[float, float]]) -> Counter[str]:
    """Microseconds of the windows by part. Each moment counts once; computation takes precedence over communication.

    Moments without a span are IDLE, so all parts together are as long as the windows.
    """
    changes: dict[float, list[tuple[str, int]]] = defaultdict(list)
    for span in spans:
        changes[span.start].append((span.part, 1))
        changes[span.end].append((span.part, -1))
    for start, end in windows:
        changes[start].append((STEP, 1))
        changes[end].append((STEP, -1))
    sums: Counter[str] = Counter()
    active: Counter[str] = Counter()
    before = 0.0
    for now in sorted(changes):
        if active[STEP]:
            at_work = [part for part, n in active.items() if n and part != STEP]
            part = next((part for part in at_work if part != COMMUNICATION), COMMUNICATION if at_work else IDLE)
            sums[part] += now - before  # type: ignore[assignment]
        for part, change in changes[now]:
            active[part] += change
        before = now
    return sums


def table(lines: Sequence[Line]) -> str:
    """Return the table in Markdown, with the whole step in its last line."""
    whole = Line("step", sum(line.milliseconds for line in lines), sum(line.share for line in lines))
    rows = [f"| {line.part:<20} | {line.milliseconds:>9.2f} | {line.share:>6.1%} |" for line in [*lines, whole]]
    return (
        "\n".join([f"| {'part':<20} | {'ms':>9} | {'share':>6} |", f"|{'-' * 22}|{'-' * 11}|{'-' * 8}|", *rows]) + "\n"
    )
