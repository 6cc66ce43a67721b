"""Launch every kernel as every specialisation that Triton's JIT makes of it. Needs no GPU.

    PYTHONPATH=. python tests/kernels/jit_sweep.py

Triton compiles a kernel anew for an integer argument that is 1 (a Python int in the kernel then,
and no tensor), a multiple of 16, or an int64, and for a pointer that is a multiple of 16. What
compiles as one need not as another, and the interpreter knows none of them. Here public ops are
called on tensors that make each; ``benchmarks.ops.fake_device`` leaves out the launch alone, so
that no memory is touched. What each kernel was specialised for is read from Triton: a class of an
argument that no call made is a fault, as is a kernel that none launched, or one that was launched
with what it was not compiled for.
"""

import functools
import importlib
import mmap
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

import cfsp_kernels as k
from benchmarks.ops.fake_device import fake_device
from cfsp_kernels._triton import Kernel
from cfsp_kernels.gram import FORMS

ONE, MULTIPLE, OTHER, INT64 = "1", "a multiple of 16", "not a multiple of 16", "an int64"
ALIGNED, UNALIGNED = "aligned to 16 bytes", "not aligned to 16 bytes"
DESCRIPTOR = "a descriptor"
Call = tuple[str, Callable[[], Any]]
Never = dict[tuple[str, str, str], set[str]]
"""Kernel, a part of its mode or "", and argument -> classes that no launch can have."""


class Seen(NamedTuple):
    """One argument of a launched kernel."""

    kernel: str
    mode: str
    """The constexprs that choose branches: all but sizes, which are numbers other than 0."""
    argument: str
    what: str
    """The class that Triton specialised it for."""


def arguments_of(variant: Any) -> Iterator[Seen]:
    """What Triton specialised in a variant of a kernel: integers and pointers."""
    parameters = variant.fn.params
    constants = {p.name: variant.constants[p.num,] for p in parameters if p.is_constexpr}
    flags = (f"{n}={v}" for n, v in constants.items() if isinstance(v, bool | str) or not v)
    mode = ", ".join(flags)
    for p in parameters:
        if p.is_constexpr or p.do_not_specialize:
            continue
        kind = variant.signature[p.name]
        divisible = ["tt.divisibility", 16] in variant.attrs.get((p.num,), [])
        if kind.startswith("*"):
            what = ALIGNED if divisible else UNALIGNED
        elif kind == "constexpr":
            what = ONE
        elif kind in ("i32", "i64"):
            what = INT64 if kind == "i64" else MULTIPLE if divisible else OTHER
        else:
            what = DESCRIPTOR
        yield Seen(variant.fn.__name__, mode, p.name, what)


def classes(argument: str, seen: set[str]) -> set[str]:
    """Those that an argument must be seen in, if it was seen in these."""
    if DESCRIPTOR in seen:
        return {DESCRIPTOR}
    if seen & {ALIGNED, UNALIGNED}:
        return {ALIGNED, UNALIGNED}
    return {ONE, MULTIPLE, OTHER} | ({INT64} if argument.endswith("stride") else set())


def kernels_of(package: str) -> list[str]:
    """Names of the kernels in a package that a host launches: those that no other one calls.

    To be asked before one of them is first used, which replaces what it calls.
    """
    modules = [importlib.import_module(package)]
    for info in pkgutil.iter_modules(modules[0].__path__):
        modules.append(importlib.import_module(f"{package}.{info.name}"))
    found = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, Kernel)}
    functions = [kernel.function for kernel in found.values()]
    called = {
        id(f.__globals__[name])
        for f in functions
        for name in f.__code__.co_names
        if isinstance(f.__globals__.get(name), Kernel)
    }
    return sorted(kernel.function.__name__ for i, kernel in found.items() if i not in called)


KINDS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def check_fit(variant: Any, values: tuple[Any, ...]) -> None:
    """A variant is launched with what it was compiled for: whoever keeps some may mix them up."""
    for p, value in zip(variant.fn.params, values, strict=True):
        kind, attributes = variant.signature[p.name], variant.attrs.get((p.num,), [])
        divisible = ["tt.divisibility", 16] in attributes
        if kind == "constexpr":
            fits = value == variant.constants[p.num,]
        elif kind.startswith("*"):
            near = ["tt.pointer_range", 32] in attributes  # of AMD: 32-bit offsets will do
            fits = kind == KINDS[value.dtype]
            fits &= not (divisible and value.data_ptr() % 16)
            fits &= not (near and value.untyped_storage().size() > 2**31)
        elif kind in ("i32", "i64"):
            fits = not (divisible and value % 16) and (kind == "i64" or abs(value) < 2**31)
        else:
            fits = True
        if not fits:
            raise ValueError(f"{variant.fn.__name__} is not compiled for this {p.name}")


def launch(calls: Iterable[Call], target: str = "sm_90") -> tuple[list[str], set[Seen]]:
    """Make every call; the errors of those that failed, and what was specialised."""
    errors = []
    with fake_device(target, check_fit) as device:
        for name, call in calls:
            try:
                call()
                call()  # again, with what the first left behind
            except Exception as error:
                errors.append(f"{name}: {type(error).__name__}: {str(error).strip()}")
    return errors, {seen for variant in device.variants for seen in arguments_of(variant)}


def compiled_again(calls: Iterable[tuple[str, Callable[[int], Any], list[int]]]) -> list[str]:
    """Which of the calls compile more than once, though they differ in a count alone."""
    faults = []
    with fake_device("sm_90") as device:
        for name, call, counts in calls:
            for count in counts:
                before = len(device.variants)
                call(count)
                if count != counts[0] and len(device.variants) > before:
                    again = {variant.fn.__name__ for variant in device.variants[before:]}
                    faults.append(f"{name}: {count} compiles {', '.join(sorted(again))} again")
    return faults


def gaps(seen: set[Seen], kernels: Iterable[str], never: Never) -> list[str]:
    """What the calls left out, and what of ``never`` is not so."""
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for kernel, mode, argument, what in seen:
        found[kernel, mode, argument].add(what)
    faults = [f"{name} was never launched" for name in set(kernels) - {s.kernel for s in seen}]
    for (kernel, mode, argument), whats in sorted(found.items()):
        excused = {
            what
            for (name, part, of_it), excuses in never.items()
            if (name, of_it) == (kernel, argument) and part in mode
            for what in excuses
        }
        missing = classes(argument, whats) - whats - excused
        faults += [f"{kernel} ({mode}): {argument} was never {what}" for what in sorted(missing)]
        faults += [f"{kernel} ({mode}): {argument} was {what}" for what in whats & excused]
    for name, part, argument in never:
        if not any((k, a) == (name, argument) and part in mode for k, mode, a in found):
            faults.append(f"{name} ({part}): no {argument} was seen")
    return faults


FAR = 2**31 + 64
ROWS = {  # rows, columns, row stride, first element
    "multiples of 16": (32, 48, 64, 0),
    "ones": (1, 1, 1, 1),
    "other": (3, 5, 7, 1),
    "far": (2, 2, FAR, 0),
}


@functools.cache
def memory(purpose: str) -> torch.Tensor:
    """Addresses for inputs or for outputs, 17 GB of them, without a page behind any."""
    noreserve = 0x4000  # of Linux; the module names it from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    return torch.frombuffer(mmap.mmap(-1, 8 * (FAR + 4096), flags=flags), dtype=torch.float64)


def tensor(
    dtype: torch.dtype, *shape: int, stride: int, first: int = 0, purpose: str = "input"
) -> torch.Tensor:
    """Of a unit stride along the last dimension, and ``stride`` along every other."""
    strides = [*[stride] * (len(shape) - 1), 1]
    return memory(purpose).view(dtype).as_strided(shape, strides, first)


def segments(tokens: int, first: int) -> torch.Tensor:
    """One segment; its offsets are not aligned where ``first`` is not 0."""
    dtype = torch.int32 if first else torch.int64
    return torch.tensor([*[0] * first, 0, tokens], dtype=dtype)[first:]


def of_tokens() -> Iterator[Call]:
    """Ops on activations."""
    bf16, fp64 = torch.bfloat16, torch.float64
    for name, (rows, columns, stride, first) in ROWS.items():
        x = tensor(bf16, rows, columns, stride=stride, first=first)
        yield f"block_influence, {name}", functools.partial(k.block_influence, x, x)
        for offsets, shape in ((None, ()), (segments(rows, first), (1,))):
            totals = tensor(fp64, *shape, 2, columns, stride=stride, first=first, purpose="output")
            options = {"offsets": offsets, "totals": totals}
            yield (
                f"channel_statistics, {name}, {len(shape)}",
                functools.partial(k.channel_statistics, x, **options),
            )
            for activation in ("silu", "gelu", "gelu_tanh", "relu2"):
                yield (
                    f"swiglu_statistics {activation}, {name}, {len(shape)}",
                    functools.partial(k.swiglu_statistics, x, x, activation, **options),
                )


def of_weights() -> Iterator[Call]:
    """Ops on weights."""
    bf16 = torch.bfloat16
    experts = {"multiples of 16": 16, "ones": 1, "other": 3, "far": 1}
    for name, (rows, columns, stride, first) in ROWS.items():
        gate = tensor(bf16, experts[name], rows, columns, stride=stride, first=first)
        down = tensor(bf16, experts[name], columns, rows, stride=stride, first=first)
        norms = torch.ones(experts[name], rows)
        for score in ("magnitude", "wanda", "balanced"):
            yield (
                f"channel_importance {score}, {name}",
                functools.partial(
                    k.channel_importance, score, gate=gate, up=gate, down=down, norms=norms
                ),
            )
        index = torch.zeros(first + columns, dtype=torch.int32)[first:]
        out = tensor(bf16, rows, columns, stride=stride, first=first, purpose="output")
        yield (
            f"gather_columns, {name}",
            functools.partial(k.gather_columns, gate[0], index, out=out),
        )


def of_grams(dtype: torch.dtype) -> Iterator[Call]:
    """Both kernels of gram."""
    for name, (rows, columns, stride, first) in ROWS.items():
        x = tensor(dtype, rows, columns, stride=stride, first=first)
        place = {"stride": stride, "first": first, "purpose": "output"}
        out = tensor(torch.float32, columns, columns, **place)
        yield f"gram, {name}", functools.partial(FORMS["tiles"], x, out)
        out = tensor(torch.float32, 1, columns, columns, **place)
        offsets = segments(rows, first)
        yield f"gram of segments, {name}", functools.partial(k.gram, x, offsets=offsets, out=out)
        if dtype != torch.float32 and name in ("multiples of 16", "far"):
            yield f"gram by TMA, {name}", functools.partial(FORMS["tma"], x, out[0])


def of_counts() -> Iterator[tuple[str, Callable[[int], Any], list[int]]]:
    """Calls that differ in the number of rows alone."""

    def matrix(rows: int) -> torch.Tensor:
        return tensor(torch.bfloat16, rows, 48, stride=48)

    def magnitude(rows: int) -> torch.Tensor:
        return k.channel_importance("magnitude", down=matrix(rows))

    index = torch.zeros(16, dtype=torch.int32)
    for name, call in {
        "channel_statistics": lambda n: k.channel_statistics(matrix(n)),
        "channel_statistics of a segment": lambda n: k.channel_statistics(
            matrix(n), offsets=segments(n, 0)
        ),
        "swiglu_statistics": lambda n: k.swiglu_statistics(matrix(n), matrix(n)),
        "block_influence": lambda n: k.block_influence(matrix(n), matrix(n)),
        "channel_importance": magnitude,
        "gather_columns": lambda n: k.gather_columns(matrix(n), index),
        "gram": lambda n: FORMS["tiles"](matrix(n), torch.zeros(48, 48)),
    }.items():
        yield name, call, [300, 1, 16, 4096]  # partials: 2, 1, 1, 16


def of_twins() -> Iterator[Call]:
    """Calls alike but for the dtype, or for the memory behind a tensor: AMD's kernels are compiled
    anew for 2 GiB and more, which 32-bit offsets do not reach."""
    bf16, fp16 = torch.bfloat16, torch.float16
    index = torch.zeros(16, dtype=torch.int32)
    for name, x in {
        "small": torch.zeros(32, 48, dtype=bf16),
        "large": tensor(bf16, 32, 48, stride=48),
        "fp16": torch.zeros(32, 48, dtype=fp16),
        "large, fp16": tensor(fp16, 32, 48, stride=48),
    }.items():
        for op, call in {
            "channel_statistics": lambda x: k.channel_statistics(x),
            "swiglu_statistics": lambda x: k.swiglu_statistics(x, x),
            "block_influence": lambda x: k.block_influence(x, x),
            "gram": lambda x: FORMS["tiles"](x, torch.zeros(48, 48)),
            "gather_columns": lambda x: k.gather_columns(x, index),
            "channel_importance, rows": lambda x: k.channel_importance("magnitude", up=x),
            "channel_importance, columns": lambda x: k.channel_importance("magnitude", down=x),
        }.items():
            yield f"{op}, {name}", functools.partial(call, x)
        for dtype in (torch.int32, torch.int64):
            offsets = torch.tensor([0, 32], dtype=dtype)
            yield (
                f"channel_statistics of a segment, {name}, {dtype}",
                functools.partial(k.channel_statistics, x, offsets=offsets),
            )


NEVER: Never = {
    # Ops allocate these, and allocations are aligned.
    ("block_influence_kernel", "", "out_ptr"): {UNALIGNED},
    ("channel_statistics_kernel", "", "partials_ptr"): {UNALIGNED},
    ("swiglu_statistics_kernel", "", "partials_ptr"): {UNALIGNED},
    ("swiglu_statistics_kernel", "", "product_ptr"): {UNALIGNED},
    ("fold_kernel", "", "partials_ptr"): {UNALIGNED},
    ("fold_kernel", "SEGMENTED=False", "offsets_ptr"): {UNALIGNED},  # the partials once more
    ("row_sums_kernel", "WEIGHTED=True", "weight_ptr"): {UNALIGNED},
    ("column_sums_kernel", "WEIGHTED=True", "weight_ptr"): {UNALIGNED},
    ("column_sums_kernel", "WEIGHTED=True", "partials_ptr"): {UNALIGNED},
    ("fold_kernel", "FRESH=True", "total_ptr"): {UNALIGNED},
    ("fold_kernel", "FRESH=True", "segment_stride"): {INT64},
    ("fold_kernel", "FRESH=True", "group_stride"): {INT64},
    # Totals that are added to are a sum and a sum of squares.
    ("fold_kernel", "FRESH=False", "groups"): {ONE, MULTIPLE},
}


def part(number: int) -> tuple[list[str], set[Seen]]:
    """A share of the sweep, for one process."""
    match number:
        case 0:
            return launch(of_tokens())
        case 1:
            return launch(of_grams(torch.float32))
        case 2:
            return launch(of_grams(torch.bfloat16))
        case 3:
            return launch(of_weights())
        case 4:
            return launch(of_twins(), "gfx942")[0], set()
        case _:
            return compiled_again(of_counts()), set()


def main() -> int:
    """Print faults; returns the exit code."""
    kernels = kernels_of("cfsp_kernels")
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(part, range(6)))
    seen = set().union(*(found for _, found in results))
    faults = [error for errors, _ in results for error in errors] + gaps(seen, kernels, NEVER)
    print(f"{len(kernels)} kernels, {len(seen)} classes of their arguments in each of their modes")
    print("\n".join(faults) or "all of them compile")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
