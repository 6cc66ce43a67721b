"""Compile every kernel ahead of time for every target and report what it uses. Needs no GPU.

    python -m benchmarks.ops.compile_gate              # one line per kernel and target
    python -m benchmarks.ops.compile_gate --markdown   # the coverage table of docs/kernels.md
    python -m benchmarks.ops.compile_gate --json       # what tests/kernels/test_compile.py reads

``--candidates ENTRY --target sm_90`` reads a JSON list of launch configurations from the standard
input and prints the list of their faults: what a tuner asks before it times them (``--first``, of
bf16 in the main), and of the fastest before it becomes the one in force.

Registers and spills are read from the machine code, wide accesses from it or from PTX.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: here the compiler must run

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cfsp_kernels._configs import config_for, config_table
from cfsp_kernels._partials import ROWS_PER_PARTIAL, fold_kernel
from cfsp_kernels._triton import COUNTS, Kernel
from cfsp_kernels.block_influence import block_influence_kernel
from cfsp_kernels.channel_importance import column_sums_kernel, row_sums_kernel
from cfsp_kernels.channel_statistics import channel_statistics_kernel
from cfsp_kernels.gather import gather_columns_kernel
from cfsp_kernels.gram import gram_kernel, gram_tma_kernel, precision
from cfsp_kernels.swiglu_statistics import ACTIVATIONS, swiglu_statistics_kernel

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Target -> bytes of shared memory that one program may use."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIONS = ("num_warps", "num_stages")
WORKERS = min(16, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one dtype. Arguments are pointers by dtype, else int32."""

    op: str
    """Its name in the table of launch configurations."""
    variant: str
    kernel: Kernel
    dtype: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    unaligned: frozenset[str] = frozenset()
    """Arguments not divisible by 16: counts of rows always, the others where a case says so."""
    wide_loads: bool = True
    wide_stores: bool = False
    targets: tuple[str, ...] = tuple(SHARED_LIMIT)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses."""

    op: str
    variant: str
    dtype: str
    target: str
    entry: str
    """The entry of the table: "default" or an architecture."""
    registers: int
    spills: int
    """Spilled registers and bytes of stack."""
    shared: int
    """Bytes of shared memory."""
    wide_loads: int
    """16-byte loads from global memory."""
    wide_stores: int
    expect_loads: bool
    expect_stores: bool


def cases() -> Iterator[Case]:
    """Every kernel at every dtype and variant that its op launches."""
    rows = frozenset(COUNTS)
    partial = {"ROWS": ROWS_PER_PARTIAL}
    for variant in ("", "segments", "fresh", "reciprocal"):
        total = "*fp32" if variant == "reciprocal" else "*fp64"
        pointers = {"partials_ptr": "*fp32", "total_ptr": total, "offsets_ptr": "*i32"}
        constants = {
            **partial,
            "SEGMENTED": variant == "segments",
            "FRESH": variant in ("fresh", "reciprocal"),
            "RECIPROCAL": variant == "reciprocal",
        }
        yield Case("fold_partials", variant, fold_kernel, "fp32", pointers, constants, rows, False)
    for dtype in DTYPES:
        x = f"*{dtype}"
        whole, experts = {**partial, "SEGMENTS": 0}, {**partial, "SEGMENTS": 256}
        pointers = {"x_ptr": x, "partials_ptr": "*fp32", "offsets_ptr": "*i32"}
        for variant, constants in {"": whole, "segments": experts}.items():
            yield Case(
                "channel_statistics",
                variant,
                channel_statistics_kernel,
                dtype,
                pointers,
                constants,
                rows,
            )
        pointers = dict.fromkeys(("gate_ptr", "up_ptr", "product_ptr"), x)
        pointers |= {"partials_ptr": "*fp32", "offsets_ptr": "*i32"}
        variants = {activation: (activation, whole) for activation in ACTIVATIONS}
        for variant, (activation, sums) in {**variants, "segments": ("silu", experts)}.items():
            yield Case(
                "swiglu_statistics",
                variant,
                swiglu_statistics_kernel,
                dtype,
                pointers,
                {**sums, "ACTIVATION": activation, "ROUND_BF16": False},
                rows,
                wide_stores=True,
            )
        pointers = {"x_ptr": x, "y_ptr": x, "out_ptr": "*fp32"}
        yield Case("block_influence", "", block_influence_kernel, dtype, pointers, {})
        for variant, constants in {
            "square": {"SQUARE": True, "WEIGHTED": False},
            "absolute": {"SQUARE": False, "WEIGHTED": False},
            "weighted": {"SQUARE": False, "WEIGHTED": True},
        }.items():
            weight = "*fp32" if variant == "weighted" else x
            pointers = {"matrix_ptr": x, "weight_ptr": weight, "out_ptr": "*fp32"}
            yield Case("row_sums", variant, row_sums_kernel, dtype, pointers, constants, rows)
            pointers = {"matrix_ptr": x, "weight_ptr": weight, "partials_ptr": "*fp32"}
            yield Case(
                "column_sums",
                variant,
                column_sums_kernel,
                dtype,
                pointers,
                {**constants, **partial},
                rows,
            )
        pointers = {"weight_ptr": x, "index_ptr": "*i32", "out_ptr": x}
        yield Case(
            "gather_columns",
            "",
            gather_columns_kernel,
            dtype,
            pointers,
            {},
            rows,
            wide_loads=False,
            wide_stores=True,
        )
        pointers = {"x_ptr": x, "out_ptr": "*fp32", "offsets_ptr": "*i32"}
        entries = ["gram_fp32"] if dtype == "fp32" else ["gram", "gram_ragged"]
        for entry in entries:
            for variant, segments in {"": False, "segments": True}.items():
                constants = {"WIDEN": False, "SEGMENTED": segments}
                case = Case(entry, variant, gram_kernel, dtype, pointers, constants, rows)
                ragged = entry == "gram_ragged"
                yield dataclasses.replace(unaligned(case), variant=variant) if ragged else case
        if dtype != "fp32":
            config = config_for("gram_tma", "sm_90")
            m, n, t = (config[f"BLOCK_{axis}"] for axis in "MNT")
            descriptors = {
                "left_desc": f"tensordesc<{dtype}[{t},{m}]>",
                "right_desc": f"tensordesc<{dtype}[{t},{n}]>",
                "out_desc": f"tensordesc<fp32[{m},{n // 4}]>",
            }
            yield Case(
                "gram_tma",
                "",
                gram_tma_kernel,
                dtype,
                descriptors,
                {"WIDEN": False, "REDUCE": True},
                rows | set(descriptors),
                wide_loads=False,
                targets=("sm_90", "sm_100"),
            )


def unaligned(case: Case) -> Case:
    """``case`` for a ragged channel count and a padded stride: it promises no wide access."""
    names = {n for n in case.kernel.jitted.arg_names if n not in case.pointers}
    return dataclasses.replace(
        case,
        variant=f"{case.variant} ragged".strip(),
        unaligned=frozenset(names),
        wide_loads=False,
        wide_stores=False,
    )


def target_of(name: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as a Triton target."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def compile_case(case: Case, target_name: str, entry: str) -> Resources:
    """Compile ``case`` for a target with one entry of the table and read its machine code."""
    config = config_for(case.op, entry)
    function = case.kernel.jitted
    names = function.arg_names
    constants = {**case.constants, **{k: v for k, v in config.items() if k not in OPTIONS}}
    if "PRECISION" in names:
        constants["PRECISION"] = precision(DTYPES[case.dtype], target_name.startswith("gfx"))
    signature = {
        name: "constexpr" if name in constants else case.pointers.get(name, "i32") for name in names
    }
    if "offsets_ptr" in names and not (constants.get("SEGMENTS") or constants.get("SEGMENTED")):
        signature["offsets_ptr"] = signature[names[0]]  # a launch passes this for what is not read
    aligned = [n for n in names if n not in constants and n not in case.unaligned]
    source = ASTSource(
        function,
        signature,
        {(names.index(k),): v for k, v in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {k: v for k, v in config.items() if k in OPTIONS}
    options["enable_fp_fusion"] = True
    kernel = triton.compile(source, target=target_of(target_name), options=options)
    read = _read_nvidia if "cubin" in kernel.asm else _read_amdgcn
    registers, spills, loads, stores = read(kernel.asm)
    return Resources(
        op=case.op,
        variant=case.variant,
        dtype=case.dtype,
        target=target_name,
        entry=entry,
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        wide_loads=loads,
        wide_stores=stores,
        expect_loads=case.wide_loads,
        expect_stores=case.wide_stores,
    )


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, int, int]:
    """Registers, stack, wide loads and wide stores of an NVIDIA kernel.

    A spilled register has its place on the stack, and nothing else of ours has. Wide accesses are
    counted in PTX: ptxas never splits one, and disassembling takes ten times as long.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    wide = r"global[.\w:]*\.(?:v4\.b32|v2\.b64|v8\.b16)\b"
    loads = len(re.findall(rf"\bld\.{wide}|\bcp\.async\.cg\.shared\.global\b", asm["ptx"]))
    return registers, stack, loads, len(re.findall(rf"\bst\.{wide}", asm["ptx"]))


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, int, int]:
    """Registers, spills, wide loads and wide stores of an AMD kernel."""
    text = asm["amdgcn"]

    def field(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    spilled = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return (
        field("vgpr_count"),
        sum(field(key) for key in spilled),
        len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
        len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
    )


def compile_entry(case: Case, target: str, entry: str) -> list[Resources]:
    """``case`` with one entry of its table, and for the main targets with ragged shapes too."""
    rows = [compile_case(case, target, entry)]
    ragged = case.op not in ("gram", "gram_ragged", "gram_tma") and case.dtype == "bf16"
    if (ragged or case.op == "gram_fp32") and target in ("sm_90", "gfx942"):
        rows.append(compile_case(unaligned(case), target, entry))
    return rows


def survey_case(number: int) -> list[Resources]:
    """One case with every entry of its table: on its own architecture, default on all four."""
    case = list(cases())[number]
    return [
        row
        for entry in config_table()[case.op]
        for target in (case.targets if entry == "default" else [entry])
        for row in compile_entry(case, target, entry)
    ]


def survey(only: str | None = None) -> Iterator[Resources]:
    """Every case, or those of the ops whose name contains ``only``."""
    numbers = [i for i, case in enumerate(cases()) if only is None or only in case.op]
    with ProcessPoolExecutor(WORKERS) as pool:
        for rows in pool.map(survey_case, numbers):
            yield from rows


def try_candidate(number: int, entry: str, target: str, config: dict[str, int]) -> list[str]:
    """Faults of one case of ``entry``, which is launched with ``config`` on ``target``."""
    config_table()[entry][target] = config
    case = [case for case in cases() if case.op == entry][number]  # some depend on the table
    try:
        return [fault for row in compile_entry(case, target, target) for fault in faults(row)]
    # whatever the compiler stumbles over is why this candidate cannot be the one
    except Exception as error:
        last_line = (str(error).strip() or "no message").splitlines()[-1]
        return [f"{type(error).__name__}: {last_line}"]


def try_candidates(
    entry: str, target: str, configs: list[dict[str, int]], first: bool
) -> list[list[str]]:
    """Faults of every candidate in any case of ``entry``, or in the ``first`` of them."""
    numbers = range(1 if first else sum(case.op == entry for case in cases()))
    with ProcessPoolExecutor(WORKERS) as pool:
        found = [
            [pool.submit(try_candidate, number, entry, target, config) for number in numbers]
            for config in configs
        ]
        return [sorted({fault for case in tried for fault in case.result()}) for tried in found]


def faults(used: Resources) -> list[str]:
    """What ``used`` breaks of what the design promises."""
    found = []
    if used.spills:
        found.append(f"spills: {used.spills}")
    if used.shared > SHARED_LIMIT.get(used.target, 99 << 10):
        found.append(f"{used.shared} bytes of shared memory")
    if used.expect_loads and not used.wide_loads:
        found.append("no 16-byte loads")
    if used.expect_stores and not used.wide_stores:
        found.append("no 16-byte stores")
    return found


def markdown(rows: list[Resources]) -> str:
    """op x dtype x target: registers / KiB of shared memory / wide loads / wide stores."""
    targets = list(SHARED_LIMIT)
    lines = [
        "| kernel | dtype | " + " | ".join(targets) + " |",
        "|---|---|" + "---|" * len(targets),
    ]
    served = {}
    for row in rows:
        if row.variant.endswith("ragged"):
            continue
        key = (f"{row.op} {row.variant}".strip(), row.dtype)
        own = served.setdefault(key, {})
        if row.entry != "default" or row.target not in own:  # what a launch there would pick
            own[row.target] = row
    for (name, dtype), own in served.items():
        cells = [_cell(own.get(target)) for target in targets]
        lines.append(f"| {name} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Resources | None) -> str:
    if row is None:
        return ""
    fault = " **" + ", ".join(faults(row)) + "**" if faults(row) else ""
    shared = row.shared / 1024
    return f"{row.registers} / {shared:.3g} / {row.wide_loads} / {row.wide_stores}{fault}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the table of docs/kernels.md")
    form.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--op", help="only kernels whose name contains this")
    parser.add_argument("--candidates", metavar="ENTRY", help="faults of configurations for it")
    parser.add_argument("--target", default="sm_90", help="of --candidates (default: sm_90)")
    parser.add_argument("--first", action="store_true", help="of the entry's cases only the first")
    arguments = parser.parse_args()
    if arguments.candidates:
        entry, configs = arguments.candidates, json.load(sys.stdin)
        print(json.dumps(try_candidates(entry, arguments.target, configs, arguments.first)))
        return
    rows = []
    for row in survey(arguments.op):
        rows.append(row)
        if not (arguments.markdown or arguments.json):
            name = f"{row.op} {row.variant}".strip()
            print(f"{name:28} {row.dtype} {row.target:7} {row.entry:8} {_cell(row)}", flush=True)
    if arguments.markdown:
        print(markdown(rows))
    if arguments.json:
        print(json.dumps([{**dataclasses.asdict(row), "faults": faults(row)} for row in rows]))


if __name__ == "__main__":
    main()
