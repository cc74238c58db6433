"""Compile the experts' kernels for an H100, on any machine, and say what they use: run as a script by test_compiles.py.

A process of its own, for the tests' interpret the same kernels. Each argument is a case, `SHAPE,DTYPE,TURNS,RANK`.
Prints one JSON object a kernel; what two cases share is compiled once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from llmfoundry.kernels import e4m3, eight_bit, norm_rotate, scaled, softmax_loss, symmetric  # noqa: E402
from llmfoundry.kernels.accumulate import add_kernel, add_parts_kernel  # noqa: E402
from llmfoundry.kernels.grouped import GroupedConfig, grouped_kernel  # noqa: E402
from llmfoundry.kernels.lion import lion_kernel  # noqa: E402
from llmfoundry.kernels.muon import apply_kernel, momentum_kernel  # noqa: E402
from llmfoundry.kernels.narrow import (  # noqa: E402
    MOST_RANKS,
    NarrowConfig,
    NarrowGradConfig,
    narrow_grad_kernel,
    narrow_kernel,
)
from llmfoundry.kernels.scale import scale_kernel  # noqa: E402
from llmfoundry.kernels.square_sum import square_sum_kernel  # noqa: E402
from llmfoundry.kernels.tiles import TILE_ROWS  # noqa: E402
from llmfoundry.kernels.tune import (  # noqa: E402
    DOWN,
    DW1,
    DX,
    NARROW,
    NARROW_GRAD,
    UP,
    UP_BACKWARD,
    Candidates,
    Config,
)
from llmfoundry.kernels.up import UpConfig, up_kernel  # noqa: E402
from llmfoundry.kernels.up_backward import UpBackwardConfig, up_backward_kernel  # noqa: E402
from llmfoundry.kernels.update import adamw_kernel  # noqa: E402
from llmfoundry.kernels.weight_grad import WeightGradConfig, weight_grad_kernel  # noqa: E402

SHAPES = {"qwen30b": (2048, 768), "dbrx": (6144, 10752), "gpt_oss": (2880, 2880)}  # D, F
PROGRAMS = 132  # SMs of an H100
# What is compiled; the dtype of operands or of the optimizer's state; the rank of adapters, 0: none.
CASE, DTYPE, TURNS, RANK = "", "bf16", 1, 0
TILES = {"start_ptr": "*i32", "expert_ptr": "*i32", "row_ptr": "*i32", "count_ptr": "*i32"}


def descriptor(*block: int) -> str:
    return f"tensordesc<{DTYPE}[{','.join(map(str, block))}]>"


def ragged(*block: int) -> str:
    """A ragged descriptor has two dims more: they clip at an expert's last row."""
    return descriptor(1, 1, *block)


def up(d: int, f: int, c: UpConfig) -> None:
    types = {
        "x_desc": descriptor(TILE_ROWS, c.depth),
        "w1_desc": descriptor(2, c.columns, c.depth),
        "h_desc": ragged(TILE_ROWS, 1, c.columns),
        "a_desc": ragged(TILE_ROWS, c.columns),
        "weights_ptr": "*fp32",
        "row_slot_ptr": "*i32",
        "D": "i32",
    }
    types |= {"bias_ptr": f"*{DTYPE}"} if CASE.startswith("gpt_oss") else {}
    types |= beside(c.depth, [2, c.columns, c.depth]) if RANK else {}
    constants = {"F": f, "GATED": True, **unit(), "BM": TILE_ROWS, "RANK": RANK,
                 "BN": c.columns, "BK": c.depth, "GROUP": c.group, "PROGRAMS": PROGRAMS, "TURNS": TURNS,
                 "FLATTEN": c.flatten}  # fmt: skip
    constants |= {} if "bias_ptr" in types else {"bias_ptr": None}
    report("up", up_kernel, types | TILES, constants, c.num_warps, c.num_stages)


def unit() -> dict[str, object]:
    return (
        {"ACTIVATION": "swiglu_oss", "LIMIT": 7.0}
        if CASE.startswith("gpt_oss")
        else {"ACTIVATION": "silu", "LIMIT": None}
    )


def beside(depth: int, block: list[int]) -> dict[str, str]:
    """The operands of an adapter, in the blocks of the wide product's."""
    return {"u_desc": descriptor(TILE_ROWS, depth), "v_desc": descriptor(*block)}


def grouped(name: str, width: int, c: GroupedConfig, transposed: bool) -> None:
    block = [1, c.depth, c.columns] if transposed else [1, c.columns, c.depth]
    types = {
        "rows_desc": descriptor(TILE_ROWS, c.depth),
        "w_desc": descriptor(*block),
        "out_desc": ragged(TILE_ROWS, c.columns // c.pieces),
        "J": "i32",
    }
    types |= beside(c.depth, block) if RANK else {}
    constants = {"N": width, "RANK": RANK, "TRANSPOSED": transposed, "BM": TILE_ROWS,
                 "BN": c.columns, "BK": c.depth,
                 "GROUP": c.group, "PROGRAMS": PROGRAMS, "TURNS": TURNS, "FLATTEN": c.flatten,
                 "PIECES": c.pieces}  # fmt: skip
    report(name, grouped_kernel, types | TILES, constants, c.num_warps, c.num_stages)


def up_backward(d: int, f: int, c: UpBackwardConfig) -> None:
    types = {
        "dy_desc": descriptor(TILE_ROWS, c.depth),
        "w2_desc": descriptor(1, c.depth, c.columns),
        "h_ptr": f"*{DTYPE}",
        "dh_ptr": f"*{DTYPE}",
        "a_ptr": f"*{DTYPE}",
        "ds_ptr": "*fp32",
        "weights_ptr": "*fp32",
        "row_slot_ptr": "*i32",
        "D": "i32",
        "M": "i32",
    }
    types |= beside(c.depth, [1, c.depth, c.columns]) if RANK else {}
    constants = {"F": f, "GATED": True, **unit(), "BM": TILE_ROWS, "BN": c.columns, "BK": c.depth,
                 "RANK": RANK, "SLICES": c.slices, "GROUP": c.group, "PROGRAMS": PROGRAMS,
                 "TURNS": TURNS, "FLATTEN": c.flatten}  # fmt: skip
    report("up_backward", up_backward_kernel, types | TILES, constants, c.num_warps, c.num_stages)


def weight_grad(p: int, n: int, c: WeightGradConfig) -> None:
    types = {
        "left_desc": ragged(c.depth, c.height),
        "right_desc": ragged(c.depth, c.width),
        "out_desc": descriptor(1, c.height, c.width // c.pieces),
        "start_ptr": "*i32",
        "by_load_ptr": "*i32",
        "E": "i32",
    }
    constants = {"P": p, "N": n, "BM": c.height, "BN": c.width, "BK": c.depth, "GROUP": c.group,
                 "PROGRAMS": PROGRAMS, "TURNS": TURNS, "FLATTEN": c.flatten, "PIECES": c.pieces}  # fmt: skip
    report("weight_grad", weight_grad_kernel, types, constants, c.num_warps, c.num_stages)


def narrow(c: NarrowConfig, top_k: int) -> None:
    types = TILES | dict.fromkeys(("rows_ptr", "w_ptr", "out_ptr"), f"*{DTYPE}")
    types |= {"row_slot_ptr": "*i32", "scale": "fp32", "J": "i32", "R": "i32"}
    for transposed in (False, True):
        constants = {"K": top_k, "TRANSPOSED": transposed, "BM": TILE_ROWS, "BR": min(RANK, MOST_RANKS), "BK": c.depth}
        report("narrow", narrow_kernel, types, constants, c.num_warps, c.num_stages)


def narrow_grad(c: NarrowGradConfig, top_k: int) -> None:
    types = dict.fromkeys(("rows_ptr", "u_ptr", "out_ptr"), f"*{DTYPE}")
    types |= dict.fromkeys(("row_slot_ptr", "start_ptr", "by_load_ptr"), "*i32") | {"J": "i32", "R": "i32"}
    for wide_first in (False, True):
        constants = {"K": top_k, "WIDE_FIRST": wide_first, "BJ": c.width, "BR": min(RANK, MOST_RANKS), "BK": c.depth}
        report("narrow_grad", narrow_grad_kernel, types, constants, c.num_warps, c.num_stages)


def updates() -> None:
    """The kernels of an optimizer's step, with weights, gradients and moments of one dtype."""
    moment = {"bf16": tl.bfloat16, "fp32": tl.float32}[DTYPE]
    types = dict.fromkeys(("lr", "beta1", "rest1", "beta2", "rest2", "eps", "keep"), "fp32")
    types |= dict.fromkeys(("rest", "momentum"), "fp32")
    types |= dict.fromkeys(("n", "number", "start", "inner", "step", "n_tensors", "key"), "i64")
    types |= dict.fromkeys(("steps_ptr", "factors_ptr", "divisor_ptr", "skip_ptr", "step_ptr"), "*fp32")
    types |= dict.fromkeys(("b_ptr", "x_ptr", "total_ptr"), "*bf16") | {"table_ptr": "*i64"}
    types |= dict.fromkeys(("w_ptr", "m_ptr", "g_ptr", "out_ptr", "d_ptr"), f"*{DTYPE}")
    constants = {"BLOCK": 2048, "TENSORS": 128, "ALIGNED": True, "WEIGHT": moment, "GRAD": moment,
                 "MOMENT": moment, "BESIDE": tl.bfloat16, "NESTEROV": True}  # fmt: skip
    kernels = {"adamw": adamw_kernel, "momentum": momentum_kernel, "apply": apply_kernel, "add": add_kernel}
    report("add parts", add_parts_kernel, types | {"own_ptr": "*bf16", "others_ptr": "*bf16", "total_ptr": "*fp32"},
           {"N": 2, "OWN": 0, "BEGINS": False, "BLOCK": 4096}, 8, 3)  # fmt: skip
    types |= {"v_ptr": "*u8", "ms_ptr": "*fp32", "vs_ptr": "*fp32", "count_ptr": "*fp32"}
    types |= {"columns": "i32", "per_row": "i32"}
    eight = {"BESIDE": True, "BLOCKS": 8, "BLOCK": 256}
    report("adamw of 8 bits", eight_bit.adamw_kernel, types | {"m_ptr": "*i8"}, eight, 8, 3)
    report("lion", lion_kernel, types | {"m_ptr": "*fp32"}, {"BESIDE": True, "BLOCK": 2048}, 8, 3)
    side = symmetric.BLOCK
    depth = symmetric.DEPTH_BYTES * 8 // moment.primitive_bitwidth
    for name, columns in (("wide", False), ("tall", True)):  # products of rows, or of columns
        operand = descriptor(1, depth, side) if columns else descriptor(1, side, depth)
        named = dict.fromkeys(("left_desc", "right_desc"), operand) | {"S": "i32", "K": "i32"}
        named |= dict.fromkeys(("plus_desc", "out_desc"), descriptor(1, side, side)) | {"diagonal": "fp32"}
        named |= dict.fromkeys(("alpha", "beta"), "*fp32")
        constant = {"COLUMNS": columns, "PLUS": not columns, "ALPHAS": True, "BETAS": True, "BLOCK": side,
                    "DEPTH": depth}  # fmt: skip
        report(f"symmetric, {name}", symmetric.symmetric_kernel, named, constant, symmetric.WARPS, symmetric.STAGES)
    whole = {"BESIDE": tl.bfloat16, "WEIGHT": tl.float32, "GRAD": moment, "MOMENT": moment}
    whole |= {key: constants[key] for key in ("BLOCK", "TENSORS", "ALIGNED")}
    report("adamw of float32 weights", adamw_kernel, types, whole, 8, 3)
    halves = types | {"b_ptr": "*i16", "w_ptr": "*bf16"}
    report("adamw of halves", adamw_kernel, types, whole | {"BESIDE": tl.int16, "WEIGHT": tl.bfloat16}, 8, 3)
    report("adamw of 8 bits, halves", eight_bit.adamw_kernel, halves | {"m_ptr": "*i8"}, eight, 8, 3)
    report("lion of halves", lion_kernel, halves | {"m_ptr": "*fp32"}, {"BESIDE": True, "BLOCK": 2048}, 8, 3)
    for name, kernel in kernels.items():
        report(name, kernel, types, {key: constants[key] for key in constants if key in kernel.arg_names}, 8, 3)


def queries_and_keys() -> None:
    """The norm of all heads and their rotation, at OLMoE's shape."""
    types = dict.fromkeys(("wq_ptr", "wk_ptr", "q_ptr", "k_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "dx_ptr"), f"*{DTYPE}")
    types |= {"x_ptr": f"*{DTYPE}", "eps": "fp32"} | dict.fromkeys(("cos_ptr", "sin_ptr", "parts_ptr"), "*fp32")
    types |= {f"d{name}_{of}": "i32" for name in "qkv" for of in ("row", "token", "head")}
    types |= dict.fromkeys(("n_tokens", "length", "n_positions"), "i32")
    constants = {"H": 16, "G": 16, "HALF": 64, "HP": 16, "GP": 16, "HALFP": 64, "EACH": False}
    report("norm and rotation", norm_rotate.forward_kernel, types, constants, 4, 3)
    report("norm and rotation, backward", norm_rotate.backward_kernel, types, constants, 4, 3)


def loss_and_norm() -> None:
    """The loss of Qwen3's vocabulary, the scaling of its gradient, and the gradients' norm."""
    types = dict.fromkeys(("logits_ptr", "loss_ptr", "x_ptr", "factor_ptr"), "*fp32")
    types |= dict.fromkeys(("gradient_ptr", "out_ptr"), f"*{DTYPE}")
    types |= dict.fromkeys(("labels_ptr", "table_ptr"), "*i64") | {"vocab": "i32", "n": "i32", "n_tensors": "i32"}
    block, warps = softmax_loss._BLOCK, softmax_loss._WARPS
    shared = {"weights_ptr": None, "IGNORE": -100, "CAPPED": False, "SLICES": 38, "LANES": 32 * warps, "BLOCK": block}
    shared |= {"SUMS": True, "RESULTS": True}
    report("loss", softmax_loss.softmax_loss_kernel, types | {"sums_ptr": "*i64", "per_cap": "fp32"}, shared, warps, 3,
           maxnreg=softmax_loss._REGISTERS)  # fmt: skip
    report("scale", scale_kernel, types, {"BLOCK": 4096}, 8, 3)
    kind = {"bf16": tl.bfloat16, "fp32": tl.float32}[DTYPE]
    listed = {"KIND": kind, "ALIGNED": True, "TENSORS": 128, "BLOCK": 8192}
    report("norm", square_sum_kernel, types | {"sums_ptr": "*fp32"}, listed, 8, 3)


def in_e4m3(f: int) -> None:
    """The kernels of `precision: amp_fp8`, with experts of this hidden size."""
    eight = "fp8e4nv"
    types = dict.fromkeys(("q_ptr", "dh_ptr", "a_ptr", "out_ptr"), f"*{eight}")
    types |= dict.fromkeys(("x_ptr", "w_ptr", "h_ptr", "da_ptr"), "*bf16")
    types |= dict.fromkeys(("scale_ptr", "dh_scale_ptr", "a_scale_ptr", "ds_ptr", "weights_ptr"), "*fp32")
    types |= dict.fromkeys(("expert_scale_ptr", "row_scale_ptr", "w_scale_ptr"), "*fp32")
    types |= dict.fromkeys(("left_scale_ptr", "right_scale_ptr"), "*fp32")
    types |= dict.fromkeys(("row_slot_ptr", "slot_row_ptr", "end_ptr", "by_load_ptr", "first_ptr"), "*i32") | TILES
    types |= dict.fromkeys(("N", "J", "E"), "i32")
    unit: dict[str, Any] = {"F": f, "GATED": True, "ACTIVATION": "silu", "BLOCK": triton.next_power_of_2(f)}
    rows = {"J": 4096, "D": 4096, "K": 2, "BLOCK": 4096}
    launch = {"PROGRAMS": PROGRAMS, "TURNS": TURNS}

    def one(name: str, kernel: triton.JITFunction, constants: dict[str, object], warps: int, stages: int = 3) -> None:
        own = {key: constants[key] for key in kernel.arg_names if key in constants}
        report(name, kernel, {key: kind for key, kind in types.items() if key not in own}, own, warps, stages)

    one("scale rows", e4m3.scale_rows_kernel, rows, 16)
    one("gather", e4m3.spread_scaled_kernel, rows, 16)
    one("transpose a weight", e4m3.transpose_weight_kernel, {"BN": 128, "BJ": 64}, 4)
    for top_k in (0, 8):
        turned = {"N": 4096, "K": top_k, "BM": TILE_ROWS, "BN": 128} | ({} if top_k else {"row_slot_ptr": None})
        one("transpose rows", e4m3.transpose_rows_kernel, turned, 8)
    one("activate", e4m3.activate_scaled_kernel, unit, e4m3._warps(unit["BLOCK"]))
    one("activate backward", e4m3.activate_backward_scaled_kernel, unit, e4m3._warps(unit["BLOCK"], 32))
    for per_channel in (True, False):
        c = scaled.PRODUCT[0]
        types["rows_desc"] = f"tensordesc<{eight}[{TILE_ROWS},{c.depth}]>"
        types["w_desc"] = f"tensordesc<{eight}[1,{c.columns},{c.depth}]>"
        types["out_desc"] = f"tensordesc<bf16[1,1,{TILE_ROWS},{c.columns // c.pieces}]>"
        product = {"N": 2 * f, "PER_CHANNEL": per_channel, "BM": TILE_ROWS, "BN": c.columns, "BK": c.depth,
                   "GROUP": c.group, "FLATTEN": c.flatten, "PIECES": c.pieces}  # fmt: skip
        one("product", scaled.scaled_grouped_kernel, product | launch, c.num_warps, c.num_stages)
    w = scaled.WEIGHT_GRAD[0]
    types["left_desc"] = f"tensordesc<{eight}[1,{w.height},{TILE_ROWS}]>"
    types["right_desc"] = f"tensordesc<{eight}[1,{w.width},{TILE_ROWS}]>"
    types["out_desc"] = f"tensordesc<bf16[1,{w.height},{w.width // w.pieces}]>"
    gradient = {"P": 2 * f, "N": 4096, "BM": w.height, "BN": w.width, "BK": TILE_ROWS, "GROUP": w.group,
                "FLATTEN": w.flatten, "PIECES": w.pieces}  # fmt: skip
    one("weight gradient", scaled.scaled_weight_grad_kernel, gradient | launch, w.num_warps, w.num_stages)


def report(
    name: str,
    kernel: triton.JITFunction,
    types: dict[str, str],
    constants: dict[str, object],
    num_warps: int,
    num_stages: int,
    **options: int,
) -> None:
    """Compile, and print registers, bytes a thread that spill, and shared memory."""
    signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options |= {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    row = {
        "case": CASE,
        "kernel": name,
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "shared": compiled.metadata.shared,
    }
    row["precision"] = sorted(set(re.findall(r"inputPrecision = (\w+)", compiled.asm["ttir"])))
    launch = {"warps": num_warps, "stages": num_stages}
    print(json.dumps(row | launch | constants, default=str), flush=True)


def configs(candidates: Candidates[Config]) -> tuple[Config, ...]:
    return candidates.large if DTYPE == "bf16" else (candidates.small,)


def main() -> None:
    global CASE, DTYPE, TURNS, RANK
    for CASE in sys.argv[1:]:
        shape, DTYPE, turns, rank = CASE.split(",")
        TURNS, RANK = int(turns), int(rank)
        if shape == "updates":
            updates()
            queries_and_keys()
            loss_and_norm()
        elif DTYPE == "e4m3":
            in_e4m3(SHAPES[shape][1])
        else:
            compile_case(*SHAPES[shape])


def compile_case(d: int, f: int) -> None:
    for config in configs(UP):
        up(d, f, config)
    for config in configs(DOWN):
        grouped("down", d, config, transposed=False)
    for config in configs(DX):
        grouped("dx", d, config, transposed=True)
    for config in configs(UP_BACKWARD):
        up_backward(d, f, config)
    for config in configs(DW1):
        weight_grad(2 * f, d, config)
        weight_grad(d, f, config)
    if RANK:
        for top_k in (0, 8):  # rows; tokens by index
            for narrow_config in configs(NARROW):
                narrow(narrow_config, top_k)
            for grad_config in configs(NARROW_GRAD):
                narrow_grad(grad_config, top_k)


if __name__ == "__main__":
    main()
