"""Estimates of Gram matrices, rankings, least squares and refits against what they take."""

import gc
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import cfsp
from cfsp.calibration.collect import DensePass
from cfsp.calibration.curves import curve_widths
from cfsp.calibration.grams import Gram, GramSums, HeldOut, Split, _Sum, products_held
from cfsp.costs import fit_costs
from cfsp.costs.fit_costs import GramCosts, RefitCosts, solving_bytes, solving_flops
from cfsp.costs.flops import ModelCosts
from cfsp.costs.hardware import H100, RTX_4090, parse_memory
from cfsp.costs.workload import Workload
from cfsp.distributed import ALONE
from cfsp.errors import CfspError
from cfsp.models.layouts import LAYOUTS
from cfsp.models.parts.channels import Units
from cfsp.pruning import least_squares
from cfsp.pruning.compaction import prune_block_
from cfsp.pruning.least_squares import fit_down, output_errors, solve_damped
from cfsp.pruning.obs import error_curve, plain_error_curve, removal_order
from cfsp.pruning.plan import BlockPlan
from cfsp.pruning.refit import Refitting
from cfsp.pruning.second_pass import SecondPass

from ..conftest import make_tokenizer
from ..models.test_streaming import RECIPE
from .test_estimate import MOE, Counted, Live, build, costs, reference

DEFAULT = cfsp.Recipe()
TOKENS = torch.randint(0, 500, (21, 8), generator=torch.Generator().manual_seed(0))


def problem(
    channels: int, hidden: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Gram]:
    """x [T, F] with correlated channels, down [D, F], kept [width], the Gram matrix of x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * channels, channels, generator=generator)
    x = x @ torch.randn(channels, channels, generator=generator) + 0.5
    down = torch.randn(hidden, channels, generator=generator).to(dtype)
    kept = torch.randperm(channels, generator=generator)[:width].sort().values
    return x, down, kept, Gram(len(x), x.double().sum(0), x.T @ x)


def storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of all storages of tensors, each once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def grams_of(name: str, **options: object) -> tuple[torch.nn.Module, GramCosts]:
    model = build(name, "eager", **options)
    layout = LAYOUTS[name]
    units = [layout.units(block) for block in layout.find_blocks(model)]
    return model, GramCosts(units, 64, MOE.get(name, {}).get("num_experts_per_tok", 1), 0.3)


@pytest.mark.parametrize(
    ("name", "widest"),
    [
        ("llama", 2 * 176),  # kept, and in one piece
        ("qwen3_moe", 3 * 2 * 48),  # and sorted, of two experts a token
        ("deepseek_v3", 2 * 176),  # with a dense block before the experts
        ("shared expert", 3 * 2 * 48 + 48),  # which is kept meanwhile
    ],
)
def test_memory_of_the_sums_of_a_pass(
    name: str, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"first_k_dense_replace": 0} if name == "shared expert" else {}
    name = name if name in LAYOUTS else "deepseek_v3"
    model, costs = grams_of(name, **options)
    products, held_out, chunks = [], [], []
    at_work: list[GramSums] = []
    init, result, end_chunk = GramSums.__init__, GramSums.result, _Sum.end_chunk

    def begun(sums: GramSums, *arguments: object) -> None:
        init(sums, *arguments)
        at_work[:] = [sums]

    def counted(sums: GramSums) -> tuple[Gram, ...]:
        found = result(sums)
        products.append(storage_bytes([gram.product for gram in found]))
        held_out.append(storage_bytes([x for g in found for x in g.held_out.rows.values()]))
        return found

    def watched(own: _Sum) -> None:
        kept = storage_bytes([rows for each in at_work[0].sums for rows in each.rows])
        new, indices = not own.products and bool(own.rows), storage_bytes(own.experts)
        with Live([own.rows, own.experts, own.products, own.sums, own.tokens]) as live:
            end_chunk(own)
        made = storage_bytes([*own.products, *own.sums]) if new else 0
        # The order of rows by expert, and what sorting makes of it, are no activations.
        chunks.append((kept + live.peak - made, 3 * indices + 1000))

    monkeypatch.setattr(sys.modules["cfsp_kernels.gram"], "BLOCK", 1)  # rows of a CPU's own
    monkeypatch.setattr(GramSums, "__init__", begun)
    monkeypatch.setattr(GramSums, "result", counted)
    monkeypatch.setattr(_Sum, "end_chunk", watched)
    dense = DensePass(model, LAYOUTS[name], TOKENS, micro_batch=2, gram=True)
    for number in range(len(dense.blocks)):
        dense.run(number)
    split = Split(*TOKENS.shape, 2)
    assert split.chunk_tokens == 2 * 2 * 8
    assert max(products) == costs.sum_bytes(split, 1)
    assert max(held_out) == costs.held_out_bytes(*TOKENS.shape, 4)
    said = costs.chunk_bytes(split, 4)
    assert said == split.chunk_tokens * widest * 4
    most, indices = max(chunks)
    assert said * 0.9 <= most <= said * 1.1 + indices


def test_products_held_by_ranks() -> None:
    split = Split(160, 1024, 8)
    assert [products_held(split, ranks) for ranks in (1, 2, 4, 8)] == [1, 4, 2, 1]
    assert products_held(Split(1, 1024, 8), 1) == 1
    costs = GramCosts([[Units(100)], [Units(50, 3)]], 10, 1, 0.3)
    by_ranks = [costs.sum_bytes(split, ranks) // 4 for ranks in (1, 2, 4, 8)]
    assert by_ranks == [100**2, 4 * 100**2, 2 * 100**2, 100**2]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_flops_of_the_sums_of_a_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["cfsp_kernels.gram"], "BLOCK", 16)  # little beside a triangle
    model, costs = grams_of(name)
    found = []
    for summed in (False, True):
        with Counted() as counter:
            dense = DensePass(model, LAYOUTS[name], TOKENS, micro_batch=2, gram=summed)
            for number in range(len(dense.blocks)):
                dense.run(number)
        found.append(counter.get_total_flops())
    fitted = (len(TOKENS) - 2) * TOKENS.shape[1]  # a tenth is held out
    diagonals = sum(16 * g.count for block in costs.blocks for g in block if g.experts == 1)
    assert found[1] - found[0] == fitted * (costs.sum_flops() + diagonals)


SHAPES = [
    (300, 100, 210, 50),  # an FFN wider than the hidden states, solved for in parts
    (800, 400, 560, 1024),  # in one part
    (1000, 300, 200, 50),  # of which little is kept
    (200, 800, 140, 100),  # and one of many experts
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "hidden", "width", "rows"), SHAPES)
def test_flops_and_memory_of_a_fit(
    channels: int,
    hidden: int,
    width: int,
    rows: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (least_squares, fit_costs):
        monkeypatch.setattr(module, "ROWS", rows)
    x, down, kept, gram = problem(channels, hidden, width, dtype)
    share = 1 - width / channels
    costs = GramCosts([[Units(channels)]], hidden, 1, share, even=True, fits=True)
    windows, seqlen = 20, 35  # of which two are held out
    held_out = HeldOut({0: x[: 2 * seqlen].to(dtype)}, 2 * seqlen, 1, ALONE)
    plain = down[:, kept]
    with Counted() as counter:
        with Live([down, kept, gram.product, gram.sum]) as live:
            fit = fit_down(down, kept, gram)
        assert fit is not None
        candidates = [(plain, None), (fit.weight, None)]
        with Live([down, kept, plain, dict(held_out.rows)]) as judging:
            output_errors(down, kept, candidates, held_out)
    # Of every part one row is checked: made of the right side, and through the matrix.
    checked = 2 * hidden * width * 2 + -(-hidden // rows) * 2 * width**2
    expected = costs.fit_flops() + costs.judging_flops(windows, seqlen)
    assert counter.get_total_flops() == pytest.approx(expected + checked, rel=1e-9)
    assert costs.fit_bytes() == pytest.approx(live.peak, rel=0.1)
    whole = replace(costs, sparsity=0.0)
    uneven = replace(costs, even=False)
    assert uneven.fit_bytes() == whole.fit_bytes() > costs.fit_bytes()
    assert uneven.judging_bytes(windows, seqlen, 2) == whole.judging_bytes(windows, seqlen, 2)
    assert uneven.fit_flops() == costs.fit_flops()
    judged = judging.peak + fit.weight.nbytes
    # Within one operation: the squares in fp64, where the output in fp32 is gone, if there was one.
    summed = 2 * seqlen * hidden * 2 * dtype.itemsize
    assert costs.judging_bytes(windows, seqlen, dtype.itemsize) == pytest.approx(
        judged + summed, rel=0.1
    )


@pytest.mark.parametrize("bias", [False, True])
def test_means_are_taken_off_without_another_matrix(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (least_squares, fit_costs):
        monkeypatch.setattr(module, "ROWS", 50)
    monkeypatch.setattr("cfsp.calibration.grams.PANEL", 32)
    _, down, kept, gram = problem(400, 100, 280)
    costs = GramCosts([[Units(400)]], 100, 1, 0.3, even=True)
    with Live([down, kept, gram.product, gram.sum]) as live:
        assert fit_down(down, kept, gram, bias=bias) is not None
    assert costs.fit_bytes() == pytest.approx(live.peak, rel=0.1)


def test_memory_of_solving(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32; in fp64, which is the exception, the matrix and its factor are twice as large."""
    for module in (least_squares, fit_costs):
        monkeypatch.setattr(module, "ROWS", 50)
    width, hidden = 300, 100
    x = torch.randn(2 * width, width)
    for residual, most in ((1e-4, 1.1), (0.0, 2.0)):
        monkeypatch.setattr(least_squares, "RESIDUAL", residual)
        with Live([x]) as live, Counted() as counter:
            solved = solve_damped(x.T @ x / len(x), torch.randn(hidden, width), 0.2)
        assert solved is not None
        assert 0.9 < live.peak / solving_bytes(hidden, width) < most
        product = 2 * len(x) * width**2
        assert counter.get_total_flops() - product > solving_flops(hidden, width)
    assert solved[0].dtype == torch.float32


@pytest.mark.parametrize(("channels", "hidden"), [(384, 64), (384, 192), (192, 384)])
def test_flops_and_memory_of_a_ranking(channels: int, hidden: int) -> None:
    _, down, _, gram = problem(channels, hidden, channels)
    removes = GramCosts([[Units(channels)]], hidden, 1, 0.3, removes=True)
    curves = replace(removes, removes=False, curves=True, fits=True)
    plain = replace(curves, fits=False)
    both, widths = replace(curves, removes=True), curve_widths(channels)
    known = [down, gram.product, gram.sum]

    with Live(known) as live, Counted() as counter:
        order = removal_order(down, gram.moments()).order
    assert removes.rank_bytes() == pytest.approx(live.peak, rel=0.1)
    assert counter.get_total_flops() == pytest.approx(removes.rank_flops(), rel=0.1)

    with Live([*known, order, widths]) as live, Counted() as counter:
        error_curve(down, gram.moments(), order, widths)
    assert curves.rank_bytes() == pytest.approx(live.peak, rel=0.1)
    assert counter.get_total_flops() == pytest.approx(curves.rank_flops(), rel=0.05)

    with Live([*known, order, widths]) as live, Counted() as counter:
        plain_error_curve(down, gram.moments(), order, widths)
    assert plain.rank_bytes() == pytest.approx(live.peak, rel=0.1)
    assert counter.get_total_flops() == plain.rank_flops()

    assert both.rank_flops() == removes.rank_flops() + curves.rank_flops()
    assert both.rank_bytes() == max(removes.rank_bytes(), curves.rank_bytes())
    assert not replace(plain, curves=False).ranks
    assert removes.ranks
    assert plain.ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe", [cfsp.Recipe(compensation="blockwise", epochs=1), cfsp.Recipe(sequential=True)]
)
def test_memory_of_fitting_a_block_again(
    recipe: cfsp.Recipe, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["cfsp_kernels.gram"], "BLOCK", 16)  # little beside a triangle
    model = build("llama", dtype=dtype, hidden_size=256, intermediate_size=1024)
    layout, windows = LAYOUTS["llama"], TOKENS[:6]
    dense = DensePass(model, layout, windows, micro_batch=1)
    refits = Refitting(model, dense, recipe)
    refits.run(0)
    for block in refits.blocks:
        plan = BlockPlan((torch.arange(700)[None],), 0.0, (Units(1024),))
        prune_block_(block, layout, plan, "none", 0.0, None)
    with Live([list(model.parameters()), refits.pruned, refits.targets]) as live:
        refits.run_pruned(0)
    pruned = costs(model)
    refit = RefitCosts(pruned, recipe.epochs if recipe.blockwise else 0, recipe.sequential)
    run = workload(pruned, fit_windows=6, seqlen=8)
    loads = {load.stage: load for load in refit.loads(run)}
    own = loads["refit"].parts["blocks fitted again"]
    kept = 2 * refits.pruned.nbytes
    assert own + kept == pytest.approx(live.peak, rel=0.12)
    assert loads["refit"].parts["hidden states"] == 4 * refits.pruned.nbytes
    solving = 2 * solving_flops(256, 700) if recipe.sequential else 0
    assert loads["prune"].flops == pytest.approx(refit.flops(run) + solving)


def workload(model: ModelCosts, fit_windows: int, seqlen: int) -> Workload:
    """Of a model that is its own result, in memory."""
    return Workload(
        dense=model,
        stored=model,
        pruned=model,
        widest=model,
        output_bytes=0,
        windows=0,
        fit_windows=fit_windows,
        evaluation_windows=0,
        seqlen=seqlen,
        micro_batch=1,
        streamed=False,
        made=False,
        decoded=False,
        scores=False,
        ranks=1,
        device="cuda",
    )


def test_gram_matrices_are_gone_when_a_block_is_fitted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that what both take is not held at a time."""
    seen: list[list[int]] = [[], []]

    def matrices() -> int:
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return storage_bytes([x for x in tensors if x.shape[-2:] == (176, 176)])

    turn, run_pruned = SecondPass.turn, Refitting.run_pruned

    def turned(self: SecondPass, number: int, block: torch.nn.Module) -> object:
        found = turn(self, number, block)
        seen[0].append(matrices())
        return found

    def ran(self: Refitting, number: int) -> None:
        seen[1].append(matrices())
        run_pruned(self, number)

    monkeypatch.setattr(SecondPass, "turn", turned)
    monkeypatch.setattr(Refitting, "run_pruned", ran)
    recipe = replace(RECIPE, scorer="cfsp-output", sequential=True)
    gc.disable()
    try:
        cfsp.prune(build("llama"), make_tokenizer(), recipe=recipe, progress=False, eval_windows=0)
    finally:
        gc.enable()
    assert seen == [[4 * 176**2] * 2, [0, 0]]


def test_a_70b_model_says_what_they_take() -> None:
    plain, fitted = reference("Llama-3-70B"), reference("Llama-3-70B", recipe=DEFAULT)
    a, b = ({stage.name: stage for stage in x.stages} for x in (plain, fitted))
    assert list(a) == list(b) == ["open", "calibrate", "prune", "verify"]
    # Widths are of 16 windows; all 128 go through the second pass.
    assert b["calibrate"].flops == a["calibrate"].flops / 8
    assert (fitted.windows, fitted.fit_windows) == (16, 128)
    f, d, blocks, kept = 28672, 8192, 80, round(0.7 * 28672)
    fits = 2 * d * (f - kept) * kept + kept**3 / 3 + 2 * d * kept**2
    more = a["calibrate"].flops + blocks * (124 * 1024 * f**2 + fits + 3 * 2 * 4096 * d * f)
    assert b["prune"].flops - a["prune"].flops == pytest.approx(more)
    fp32_more = blocks * fits * (H100.flops / H100.fp32_flops - 1)
    assert b["prune"].seconds == pytest.approx((b["prune"].flops + fp32_more) / H100.flops)
    assert b["prune"].bound == "compute"
    # Nothing but the result is written, and the model is read twice.
    for name in a:
        moved = [(x[name].bytes_read, x[name].bytes_written) for x in (a, b)]
        assert moved[0] == moved[1]
    assert [x.bytes_written > 0 for x in b.values()] == [False, False, True, False]
    parts = fitted.device_parts
    assert parts["Gram matrices"] == 4 * f**2
    assert parts["held-out activations"] == 4096 * f * 2
    # Of the widths only the sum is known: a block may keep all its channels.
    assert parts["least squares"] == 8 * f * (f + d + 1024)
    assert 2 * parts["pruned block"] == parts["blocks"]
    even = reference("Llama-3-70B", recipe=replace(DEFAULT, allocator="uniform")).device_parts
    assert even["least squares"] == 8 * kept * (kept + d + 1024)
    assert even["pruned block"] == parts["pruned block"] - 3 * 2 * d * (f - 20096)
    assert "embeddings, norm, head" not in parts
    with pytest.raises(CfspError, match=r"device memory: .* 15\.0 GiB to be had"):
        fitted.check(parse_memory("15GiB"))
    fitted.check(parse_memory("20GiB"))


def test_larger_recipes_on_a_70b_model() -> None:
    """Greedy removal in fp64 and training need more than a card of 24 GiB has, and say so."""
    obs, trained, solved = (
        reference("Llama-3-70B", recipe=recipe, hardware=RTX_4090)
        for recipe in (
            cfsp.Recipe(scorer="obs"),
            cfsp.Recipe(compensation="blockwise"),
            cfsp.Recipe(sequential=True),
        )
    )
    assert obs.device_stage == "calibrate"
    assert obs.device_parts["ranking"] == 36 * 28672**2 + 8 * 8192 * 28672
    assert "micro-batch" not in obs.device_parts
    with pytest.raises(CfspError, match=r"24\.0 GiB to be had; no option lowers .*ranking 29\.3"):
        obs.check(parse_memory(None))
    assert trained.device_stage == solved.device_stage == "refit"
    with pytest.raises(CfspError, match=r"24\.0 GiB to be had; lower `samples` or `seqlen`"):
        trained.check(parse_memory(None))
    solved.check(parse_memory(None))


def test_experts_and_ranks() -> None:
    with pytest.raises(CfspError, match="take 1, 2, 4 or 8 ranks, not 6"):
        reference("Llama-3-70B", recipe=DEFAULT, ranks=6)
    assert reference("Llama-3-70B", ranks=6).seconds > 0
    one, two = (reference("Llama-3-70B", recipe=DEFAULT, ranks=n) for n in (1, 2))
    assert two.device_parts["Gram matrices"] == 4 * one.device_parts["Gram matrices"]
    experts = reference("Qwen3-235B-A22B", recipe=DEFAULT)
    parts, chunk = experts.device_parts, 128 * 1024 // 8 * 8 * 1536 * 2  # 8 experts a token, bf16
    assert parts["Gram matrices"] == 128 * 1536**2 * 4
    assert parts["held-out activations"] == 4 * 1024 * 8 * 1536 * 2
    assert parts["activations of a chunk"] == 3 * chunk
