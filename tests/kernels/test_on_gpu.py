"""What only a GPU can show: graphs, streams, other devices, offsets past 2^31 in compiled code.

The real thing is skipped without a GPU. The same bodies run everywhere as a rehearsal, on small
tensors, with a graph that is a call and a stream that is no other: a mistake in a test would else
first be seen on a rented machine.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from kernel_cases import gram_dtype, random_matrix, same_bits

from cfsp_kernels import (
    ChannelAccumulator,
    block_influence,
    channel_importance,
    channel_statistics,
    gather_columns,
    gather_ffn,
    gather_rows,
    gram,
    swiglu_statistics,
)
from cfsp_kernels._triton import triton_installed
from cfsp_kernels.gram import FORMS

pytestmark = pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
GPU = torch.cuda.is_available()
Inputs = dict[str, torch.Tensor]
Call = Callable[[], Any]


@pytest.fixture(params=["rehearsal", "real"])
def real(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether to do it at full size, which needs a GPU."""
    if request.param == "real" and not GPU:
        pytest.skip("needs a GPU")
    yield request.param == "real"
    if GPU:
        torch.cuda.empty_cache()  # other processes may be at it


def needs_memory(real: bool, gigabytes: int) -> None:
    """Skips a test for which the GPU has no room."""
    if real and torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


def flat(results: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    if isinstance(results, tuple | list):
        return [part for result in results for part in flat(result)]
    return [results] if isinstance(results, torch.Tensor) else []


def assert_same(mine: Any, others: Any) -> None:
    """Two results are equal bit for bit."""
    for a, b in zip(flat(mine), flat(others), strict=True):
        assert a.shape == b.shape
        assert same_bits(a, b)


def make_inputs(real: bool, device: torch.device) -> Inputs:
    """Something for every op to read."""
    tokens, channels, width = (2048, 1024, 512) if real else (30, 48, 32)
    shapes = {
        "x": (tokens, channels),
        "y": (tokens, channels),
        "up": (channels, width),
        "gate": (channels, width),
        "down": (width, channels),
        "experts": (2 * width, channels),
        "norms": (2, channels),
    }
    inputs = {name: random_matrix(*shape, torch.bfloat16) for name, shape in shapes.items()}
    inputs["norms"] = inputs["norms"].float().abs()
    inputs["experts"] = inputs["experts"].view(2, width, channels)
    inputs["offsets"] = torch.tensor([0, 9, 9, tokens - 7, tokens])
    inputs["index"] = torch.randperm(channels, generator=torch.Generator().manual_seed(0))[::2]
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def other_values(inputs: Inputs, seed: int) -> Inputs:
    """For all inputs but offsets, on the CPU."""
    values = {}
    for number, (name, tensor) in enumerate(inputs.items()):
        if tensor.is_floating_point():
            drawn = random_matrix(1, tensor.numel(), tensor.dtype, seed=100 * seed + number)
            values[name] = drawn.abs() if name == "norms" else drawn
    generator = torch.Generator().manual_seed(seed)
    channels = inputs["x"].shape[1]
    return {**values, "index": torch.randperm(channels, generator=generator)[::2].contiguous()}


def refill(inputs: Inputs, values: Inputs) -> None:
    """Other values in the same memory."""
    for name, tensor in values.items():
        inputs[name].copy_(tensor.view(inputs[name].shape))


def calls(i: Inputs) -> dict[str, Call]:
    """Every public op; results depend on the inputs alone."""
    channels = i["x"].shape[1]
    weights = {name: i[name] for name in ("gate", "up", "down")}
    table: dict[str, Call] = {
        "channel_statistics": lambda: channel_statistics(i["x"], backend="triton"),
        "channel_statistics of segments": lambda: channel_statistics(
            i["x"], offsets=i["offsets"], backend="triton"
        ),
        "swiglu_statistics": lambda: swiglu_statistics(i["x"], i["y"], backend="triton"),
        "swiglu_statistics of segments": lambda: swiglu_statistics(
            i["x"], i["y"], "gelu_tanh", offsets=i["offsets"], backend="triton"
        ),
        "block_influence": lambda: block_influence(i["x"], i["y"], backend="triton"),
        "gram": lambda: gram(i["x"], backend="triton"),
        "gram, ragged": lambda: gram(i["x"][:, : channels - 3], backend="triton"),
        "gram of segments": lambda: gram(i["x"], offsets=i["offsets"], backend="triton"),
        "gram, fp32": lambda: gram(i["x"][:100].float(), backend="triton"),
        "gather_rows": lambda: gather_rows(i["up"], i["index"], backend="triton"),
        "gather_columns": lambda: gather_columns(i["down"], i["index"], backend="triton"),
        "gather_ffn": lambda: gather_ffn(
            i["gate"], i["up"], i["down"], i["index"], backend="triton"
        ),
        "channel_importance of experts": lambda: channel_importance(
            "balanced", down=i["experts"], norms=i["norms"], backend="triton"
        ),
    }
    for score in ("magnitude", "wanda", "flap", "eq8", "balanced"):
        table[f"channel_importance {score}"] = lambda score=score: channel_importance(
            score, **weights, norms=i["norms"][0], variance=i["norms"][1], backend="triton"
        )
    return table


def running(i: Inputs) -> dict[str, tuple[Call, torch.Tensor]]:
    """Calls that write to memory of the caller's, and that memory."""
    channels, device = i["x"].shape[1], i["x"].device
    totals = torch.zeros(2, channels, dtype=torch.float64, device=device)
    of_segments = torch.zeros(4, 2, channels, dtype=torch.float64, device=device)
    triangle = torch.zeros(channels, channels, device=device)
    influence = torch.zeros(4, dtype=torch.float64, device=device)
    options = {"backend": "triton"}
    return {
        "channel_statistics": (
            lambda: channel_statistics(i["x"], totals=totals, **options),
            totals,
        ),
        "channel_statistics of segments": (
            lambda: channel_statistics(i["x"], offsets=i["offsets"], totals=of_segments, **options),
            of_segments,
        ),
        "swiglu_statistics": (
            lambda: swiglu_statistics(i["x"], i["y"], totals=totals, **options),
            totals,
        ),
        "block_influence": (
            lambda: block_influence(i["x"], i["y"], out=influence, **options),
            influence,
        ),
        "gram": (lambda: gram(i["x"], out=triangle, **options), triangle),
        "gather_columns": (
            lambda: gather_columns(i["x"], i["index"], out=i["y"][:, : channels // 2], **options),
            i["y"],
        ),
    }


CALLS = list(calls(make_inputs(False, torch.device("cpu"))))
RUNNING = list(running(make_inputs(False, torch.device("cpu"))))


def graph_of(real: bool, call: Call) -> tuple[Call, Any]:
    """What replays ``call`` as it was captured, and the result that each replay overwrites."""
    if not real:
        result = flat(call())

        def again() -> None:
            for old, new in zip(result, flat(call()), strict=True):
                old.copy_(new)

        return again, result
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles, and has the libraries allocate what they need
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_graph_gives_what_eager_calls_give(real, device, name):
    inputs = make_inputs(real, device)
    call = calls(inputs)[name]
    replay, result = graph_of(real, call)
    for seed in (1, 2):
        refill(inputs, other_values(inputs, seed))
        replay()
        assert_same(result, call())


@pytest.mark.parametrize("name", RUNNING)
def test_a_replay_adds_to_running_totals_once_more(real, device, name):
    inputs = make_inputs(real, device)
    call, memory = running(inputs)[name]
    before = memory.clone()
    replay, _ = graph_of(real, call)
    refill(inputs, other_values(inputs, 1))
    memory.copy_(before)
    replay()
    replay()
    replayed = memory.clone()
    memory.copy_(before)
    call()
    call()
    assert same_bits(replayed, memory)
    assert not torch.equal(memory, before)


def test_a_captured_update_feeds_the_accumulator(real, device):
    inputs = make_inputs(real, device)
    x = inputs["x"]
    accumulator, expected = (ChannelAccumulator(backend="triton") for _ in range(2))
    replay, _ = graph_of(real, lambda: accumulator.update(x))
    expected.update(x)  # graph_of made the call once
    for seed in (1, 2):
        refill(inputs, other_values(inputs, seed))
        replay()
        expected.update(x)
    assert same_bits(accumulator.statistics.sum, expected.statistics.sum)
    assert same_bits(accumulator.norm, expected.norm)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_runs_on_the_current_stream_and_waits_for_no_other(real, device, name):
    inputs = make_inputs(real, device)
    call = calls(inputs)[name]
    values, more = (other_values(inputs, seed) for seed in (1, 2))
    refill(inputs, values)
    expected = call()
    refill(inputs, more)
    side, done, context = None, None, contextlib.nullcontext
    if real:
        side, done = torch.cuda.Stream(), torch.cuda.Event()
        context = partial(torch.cuda.stream, side)
    with context():
        call()  # code and memory are there from now on
    if real:
        ones, busy = (torch.ones(8192, 8192, device=device) for _ in range(2))
        torch.mm(ones, ones, out=busy)
        torch.cuda.synchronize()
        for _ in range(60):  # of some 20 ms each, on the default stream
            torch.mm(ones, ones, out=busy)
        done.record()
    with context():
        refill(inputs, values)
        result = call()
    if real:
        side.synchronize()
        assert not done.query()
    assert_same(result, expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_runs_on_the_device_of_its_tensors(real, device, name):
    if real and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1) if real else device
    inputs = make_inputs(real, device)
    call = calls(inputs)[name]
    with torch.cuda.device(1) if real else contextlib.nullcontext():
        expected = call()
    result = call()  # device 0 is the current one
    assert all(tensor.device == inputs["x"].device for tensor in flat(result))
    assert_same(result, expected)


def noise(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """bf16, drawn where it is used."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)


def matrix(rows: int, columns: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """bf16 whole numbers from -3 to 3, whose sums and products are exact in any order."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, kind = (rows, columns), {"dtype": torch.int8, "device": device}
    return torch.randint(-3, 4, shape, generator=generator, **kind).bfloat16()


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_on_every_run(real, device, name):
    """With all multiprocessors busy, programs end in another order on each run."""
    inputs = make_inputs(False, device)
    if real:
        tokens, channels, width = 16384, 4096, 2048
        for key in ("x", "y"):
            inputs[key] = noise(tokens, channels, device=device)
        for key in ("gate", "up"):
            inputs[key] = noise(channels, width, device=device)
        inputs["down"] = noise(width, channels, device=device)
        inputs["experts"] = noise(2, width, channels, device=device)
        inputs["norms"] = noise(2, channels, device=device).float().abs()
        inputs["offsets"] = torch.tensor([0, 3000, 3000, 9000, tokens], device=device)
        inputs["index"] = torch.randperm(channels, device=device)[::2]
    call = calls(inputs)[name]
    first = call()
    for _ in range(10 if real else 1):
        assert_same(call(), first)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_gram_has_the_same_bits_on_every_run(real, device, form):
    dtype = gram_dtype(form, device)
    x = noise(*((8192, 4096) if real else (40, 96)), device=device).to(dtype)

    def call() -> torch.Tensor:
        out = torch.zeros(x.shape[1], x.shape[1], device=device)
        FORMS[form](x, out)
        return out

    first = call()
    for _ in range(10 if real else 1):
        assert_same(call(), first)


@pytest.mark.parametrize("cuts", [[256], [512, 768], list(range(256, 1100, 256))], ids=str)
def test_bits_do_not_depend_on_how_tokens_were_divided(real, device, cuts):
    tokens, channels, factor = (1100 * 64, 3000, 64) if real else (1100, 70, 1)
    x, y = (noise(tokens, channels, device=device, seed=seed) for seed in (0, 1))
    bounds = [0, *(cut * factor for cut in cuts), tokens]
    accumulator = ChannelAccumulator(backend="triton")
    of_x, of_product = torch.zeros(2, 2, channels, dtype=torch.float64, device=device)
    for a, b in pairwise(bounds):
        accumulator.update(x[a:b])
        channel_statistics(x[a:b], totals=of_x, backend="triton")
        swiglu_statistics(x[a:b], y[a:b], totals=of_product, backend="triton")
    whole = channel_statistics(x, backend="triton")
    assert_same(whole, of_x.unbind())
    assert_same(whole, accumulator.statistics)
    assert_same(swiglu_statistics(x, y, backend="triton")[1], of_product.unbind())


def large(real: bool) -> tuple[int, int]:
    """Tokens and channels: 3.8e9 elements, of a 405B model's FFN and a long calibration."""
    return (131072, 28672) if real else (600, 48)


def exact_sums(x: torch.Tensor) -> list[torch.Tensor]:
    """Sum and sum of squares of the columns of whole numbers."""
    total = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(4096):
        total[0] += rows.double().sum(0)
        total[1] += rows.double().square().sum(0)
    return list(total)


def test_statistics_past_2_to_31_elements(real, device):
    needs_memory(real, 16)
    x = matrix(*large(real), device)
    tokens = x.shape[0]
    assert_same(channel_statistics(x, backend="triton"), exact_sums(x))
    offsets = torch.tensor([0, 300, tokens - 5, tokens - 5], device=device)
    got = channel_statistics(x, offsets=offsets, backend="triton")
    for e, (a, b) in enumerate(pairwise(offsets.tolist())):
        assert_same((got.sum[e], got.sum_of_squares[e]), exact_sums(x[a:b]))


def test_swiglu_statistics_past_2_to_31_elements(real, device):
    needs_memory(real, 28)
    gate, up = (matrix(*large(real), device, seed) for seed in (0, 1))
    product, statistics = swiglu_statistics(gate, up, "relu2", backend="triton")
    for g, u, p in zip(gate.split(4096), up.split(4096), product.split(4096), strict=True):
        assert torch.equal(p, g.relu().square() * u)
    assert_same(statistics, exact_sums(product))


def test_block_influence_of_a_long_calibration(real, device):
    needs_memory(real, 8)
    tokens, width = (131072, 8192) if real else (300, 100)
    x = matrix(tokens, width, device)
    y = x + matrix(tokens, width, device, seed=1) / 8
    got = block_influence(x, y, backend="triton")
    assert got.tokens == tokens
    expected = block_influence(x, y, backend="torch")
    torch.testing.assert_close(torch.stack(got[1:3]), torch.stack(expected[1:3]), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack(got[3:]), torch.stack(expected[3:]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [*FORMS, "segments"])
def test_gram_past_2_to_31_elements(real, device, form):
    needs_memory(real, 20)
    dtype = gram_dtype(form, device)
    x = matrix(*large(real), device).to(dtype)
    channels = x.shape[1]
    out = torch.zeros(channels, channels, device=device)
    if form == "segments":
        offsets = torch.tensor([0, x.shape[0]], device=device)
        gram(x, offsets=offsets, out=out[None], backend="triton")
    else:
        FORMS[form](x, out)
    sample = [0, 1, channels // 2, channels - 129, channels - 2, channels - 1]
    rows = [row for row in sample if row >= 0]
    exact = torch.zeros(len(rows), channels, dtype=torch.float64, device=device)
    for part in x.split(4096):
        exact += part[:, rows].double().T @ part.double()
    for row, values in zip(rows, exact, strict=True):
        assert torch.equal(out[row, : row + 1].double(), values[: row + 1])
        assert (out[row, row + 1 :] == 0).all()


def test_gathers_past_2_to_31_elements(real, device):
    needs_memory(real, 20)
    weight = matrix(*large(real), device)
    rows, columns = weight.shape
    generator = torch.Generator(device).manual_seed(0)
    index = torch.randperm(columns, generator=generator, device=device)[: columns // 2]
    got = gather_columns(weight, index, backend="triton")
    for mine, source in zip(got.split(4096), weight.split(4096), strict=True):
        assert torch.equal(mine, source[:, index])
    del got
    index = torch.randperm(rows, generator=generator, device=device)[: rows // 2]
    got = gather_rows(weight, index, backend="triton")
    for mine, part in zip(got.split(4096), index.split(4096), strict=True):
        assert torch.equal(mine, weight[part])


def test_importance_past_2_to_31_elements(real, device):
    needs_memory(real, 16)
    weight = matrix(*large(real), device)
    rows, columns = weight.shape
    ones = [torch.ones(n, device=device) for n in (rows, columns)]
    down = channel_importance("flap", down=weight, variance=ones[1], backend="triton")
    assert torch.equal(down.double(), exact_sums(weight)[1])
    up = channel_importance("flap", up=weight, variance=ones[0], backend="triton")
    exact = torch.cat([part.double().square().sum(1) for part in weight.split(4096)])
    assert torch.equal(up.double(), exact)
    experts = weight.view(2, rows // 2, columns)
    up = channel_importance(
        "flap", up=experts, variance=ones[0].view(2, rows // 2), backend="triton"
    )
    assert torch.equal(up.double().flatten(), exact)


def test_rows_that_lie_2_to_30_elements_apart(real, device):
    """As test_large.py has it for the interpreter.

    Of whole numbers: a stride that is no multiple of 16 makes for an order of additions of its own.
    """
    needs_memory(real, 24)
    stride, rows, columns = (1 << 30) + 64 if real else 64, 4, 40

    def spread(values: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros((rows - 1) * stride + columns, dtype=values.dtype, device=device)
        return whole.as_strided((rows, columns), (stride, 1)).copy_(values)

    compact, other = (matrix(rows, columns, device, seed) for seed in (0, 1))
    x, y = spread(compact), spread(other)
    index = torch.arange(0, columns, 3, device=device)
    options = {"backend": "triton"}
    for op in (channel_statistics, gram):
        assert_same(op(x, **options), op(compact, **options))
    for op in (partial(swiglu_statistics, activation="relu2"), block_influence):
        assert_same(op(x, y, **options), op(compact, other, **options))
    for name, channels in (("up", rows), ("down", columns)):
        norms = torch.arange(1.0, channels + 1, device=device)
        got, expected = (
            channel_importance("balanced", **{name: weight}, norms=norms, **options)
            for weight in (x, compact)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    for dtype in (torch.int32, torch.int64):
        assert_same(gather_columns(x, index.to(dtype), **options), compact[:, index])
    last_first = torch.tensor([3, 0], device=device)
    assert_same(gather_rows(x, last_first, **options), compact[last_first])
    del y
    out = spread(torch.zeros_like(compact))[:, : index.numel()]
    assert_same(gather_columns(compact, index, out=out, **options), compact[:, index])


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_gram_are_exact_over_many_tiles_and_panels(real, device, form):
    tokens, channels = (3000, 5000) if real else (20, 300)
    if form == "tma":
        channels -= channels % 16
    x = matrix(tokens, channels, device).to(gram_dtype(form, device))
    out = torch.ones(channels, channels, device=device)
    FORMS[form](x, out)
    exact = (x.double().T @ x.double()).tril() + 1
    assert torch.equal(out.double(), exact)
