"""Estimates of runs: from a config alone, or of a model that has been opened for one."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration.grams import check_ranks
from ..errors import CfspError
from ..evaluation.quality import EVALUATION_WINDOWS
from ..io.safetensors import TensorInfo, Tensors
from ..io.shard_writer import MAX_SHARD_BYTES, pack_shards
from ..models.blockwise import default_micro_batch
from ..models.depth import shallower_description
from ..models.descriptions import Description, describe
from ..models.loading import check_seqlen, model_device, pick_device
from ..models.opening import OpenModel
from ..pruning.compaction import planned_tensors
from ..pruning.plan import PruningPlan
from ..pruning.recipe import Recipe
from ..pruning.refit import check_refits
from ..pruning.scoring import SCORERS
from ..pruning.whole.blocks import any_stretch, blocks_left
from ..typed import check_whole
from .budgets import check_processes, check_recipe, even_plan
from .depth_costs import DepthCosts, depth_windows_of
from .estimates import Estimate
from .fit_costs import GramCosts, RefitCosts, SearchCosts
from .flops import ModelCosts, model_costs
from .footprint import Footprints, footprints
from .hardware import (
    Hardware,
    MemoryBudget,
    choose_hardware,
    parse_memory,
    resident_bytes,
    this_machine,
)
from .latency import LatencyTable
from .latency_measurement import known_table
from .workload import (
    TEXT_BYTES,
    Feature,
    Load,
    Workload,
    device_peak,
    host_parts,
    passes,
    stages_of,
)


@dataclass(frozen=True)
class Request:
    recipe: Recipe
    windows: int
    """Windows that statistics are made of; 0 where these or a plan are at hand."""
    evaluation_windows: int = 0
    prunes: bool = True
    """Whether more than the statistics is wanted."""
    plan: PruningPlan | None = None
    ranks: int = 1
    nodes: int = 1
    table: LatencyTable | None = None
    depth_windows: int = 0
    """Windows that the blocks to take out are chosen by, in a pass over all."""


def _cut(costs: ModelCosts, tensors: Tensors, blocks: str, sparsity: float) -> Tensors:
    """Roughly what pruning would leave of an architecture whose layout is not known."""
    inner = {
        f"{blocks}.{number}.{name}": 1 if info.shape[-1] != costs.hidden_size else 2
        for number, block in enumerate(costs.blocks)
        for name, info in block.ffn.items()
    }
    found = dict(tensors)
    for name in inner.keys() & tensors.keys():
        shape = list(tensors[name].shape)
        shape[-inner[name]] = round(shape[-inner[name]] * (1 - sparsity))
        found[name] = TensorInfo(tensors[name].dtype, tuple(shape))
    return found


def _pruned(
    described: Description, request: Request, dense: ModelCosts
) -> tuple[Tensors, Footprints | None]:
    """What the pruned checkpoint will hold, and the sizes where the layout is known. Without a
    plan all widths are about equal: the result of any other plan is as large in all."""
    recipe, tensors = request.recipe, described.tensors
    if described.layout is None:
        return _cut(dense, tensors, described.blocks, recipe.sparsity), None
    plan = request.plan or even_plan(described, recipe, request.table)
    sizes = footprints(described, plan, request.table)
    return planned_tensors(tensors, described.parts, plan), sizes


def _features(described: Description, request: Request, run: Workload) -> list[Feature]:
    recipe, scores = request.recipe, request.plan is None
    found: list[Feature] = [passes]
    if described.dense is not None:
        whole, read = described.dense, described.dense.read.tensors
        costs = model_costs(whole, whole.parameters), model_costs(whole, read)
        found.append(DepthCosts(*costs, request.depth_windows).loads)
    if described.layout is None:
        return found
    gram = GramCosts(
        blocks=described.units,
        hidden_size=run.dense.hidden_size,
        active_experts=run.dense.blocks[-1].active_experts,
        sparsity=recipe.sparsity,
        even=recipe.cuts_evenly,
        removes=scores and SCORERS[recipe.scorer].needs_gram,
        curves=scores and recipe.makes_curves,
        fits=recipe.fits,
    )
    if (gram.ranks and run.windows) or (gram.fits and run.fit_windows):
        check_ranks(request.ranks)
        found.append(gram.loads)
    if run.pruned is not None and recipe.refits:
        epochs = recipe.epochs if recipe.blockwise else 0
        found.append(RefitCosts(run.pruned, epochs, recipe.sequential).loads)
    if request.prunes and request.plan is None and recipe.searches:
        fits = gram if gram.fits else None
        found.append(SearchCosts(recipe.search_candidates, recipe.search_windows, fits).loads)
    return found


def _fitted(
    run: Workload, features: Sequence[Feature], room: int | None
) -> tuple[Workload, list[Load]]:
    """The workload with as many windows per call, up to its own, as the device has room for."""
    while True:
        loads = [load for feature in features for load in feature(run)]
        held = sum(device_peak(loads, run.device)[1].values())
        if room is None or held <= room or run.micro_batch == 1:
            return run, loads
        run = dataclasses.replace(run, micro_batch=run.micro_batch - 1)


def _estimate(
    described: Description, request: Request, hardware: Hardware, budget: MemoryBudget
) -> Estimate:
    model, recipe = described.model, request.recipe
    dense = before = model_costs(described, described.parameters)
    if described.dense is not None:
        before = model_costs(described.dense, described.dense.parameters)
    left, sizes = _pruned(described, request, dense) if request.prunes else (None, None)
    shards = pack_shards(left, MAX_SHARD_BYTES) if left is not None else ()
    seqlen, where = recipe.calibration.seqlen, torch.device(hardware.device)
    again = request.prunes and (recipe.fits or recipe.refits)
    slower = [hardware.flops / x if x else 1.0 for x in (hardware.fp32_flops, hardware.fp64_flops)]
    pruned = model_costs(described, left) if left is not None else None
    run = Workload(
        dense=dense,
        stored=model_costs(described, described.read.tensors),
        pruned=pruned,
        widest=pruned if pruned and (request.plan or recipe.cuts_evenly) else dense,
        output_bytes=sum(shard.file_bytes for shard in shards),
        windows=request.windows,
        fit_windows=recipe.calibration.samples if again else 0,
        evaluation_windows=request.evaluation_windows,
        seqlen=seqlen,
        micro_batch=recipe.micro_batch or default_micro_batch(where, seqlen),
        streamed=described.streamed,
        made=described.read.made,
        decoded=described.read.decoded,
        scores=not request.windows
        and request.plan is None
        and SCORERS[recipe.scorer].reads_weights,
        attention=recipe.cuts_attention,
        ranks=request.ranks,
        device=hardware.device,
        fp32_slower=slower[0],
        fp64_slower=slower[1],
    )
    room, host = budget.limits(hardware) if recipe.micro_batch is None else (None, None)
    if room is None and host is not None:
        room = host - resident_bytes() - TEXT_BYTES
    run, loads = _fitted(run, _features(described, request, run), room)
    stage, parts = device_peak(loads, hardware.device)
    return Estimate(
        model=described.name,
        architecture=model.config.model_type,
        refusal=described.refusal,
        streamed=described.streamed,
        parameters=before.parameters,
        parameters_after=(run.pruned or dense).parameters,
        sizes=sizes,
        blocks=len(dense.blocks),
        largest_block_bytes=dense.largest_block,
        largest_stored_block_bytes=run.stored.largest_block,
        dtype=str(model.dtype).removeprefix("torch."),
        ranks=request.ranks,
        windows=request.windows,
        fit_windows=run.fit_windows,
        evaluation_windows=request.evaluation_windows,
        seqlen=seqlen,
        micro_batch=run.micro_batch,
        stages=stages_of(loads, hardware, request.nodes),
        device_stage=stage,
        device_parts=parts,
        host_parts=host_parts(run, loads, resident_bytes()),
        hardware=hardware,
    )


def estimate_opened(
    opened: OpenModel,
    request: Request,
    budget: MemoryBudget,
    *,
    shallower: Description | None = None,
    measure: bool = True,
) -> Estimate:
    """The estimate for an opened model on this machine, with the largest micro-batch up to the
    default that the budget allows; unless ``measure``, compute takes no time. ``shallower``: what
    it will be without some of its blocks."""
    hardware = this_machine(model_device(opened.model), opened.model.dtype, measure=measure)
    return _estimate(shallower or opened.described, request, hardware, budget)


def estimate(
    model: str | Path,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    eval_windows: int = EVALUATION_WINDOWS,
    max_memory: str | None = None,
    ranks: int = 1,
    nodes: int = 1,
    device: str = "auto",
    hardware: Hardware | str | None = None,
    tflops: float | None = None,
    disk_gbps: float | None = None,
    latency_table: str | Path | None = None,
) -> Estimate:
    """What :func:`cfsp.prune` will take of a model, from its config alone; weights are not read.

    Args:
        model: hub id, folder, config.json or .gguf file, of any causal LM of transformers.
        recipe: how to prune.
        eval_windows: windows to measure perplexity on, before and after.
        max_memory: see :func:`cfsp.prune`.
        ranks: processes of the job, each with a device of its own.
        nodes: machines that they run on.
        device: of this machine; its speed is measured for a moment.
        hardware: another machine instead, or the name of one in ``cfsp.costs.hardware.HARDWARE``.
        tflops: 1e12 FLOP/s that a device sustains, instead.
        disk_gbps: 1e9 bytes/s that the disk of a node sustains, instead.
        latency_table: see :func:`cfsp.prune`; nothing is measured here, so that a recipe with a
            latency needs one, or one kept from before.

    Raises:
        CfspError: no config, seqlen beyond the model's positions, no widths meet the sparsity.
    """
    if not 1 <= nodes <= ranks:
        raise CfspError(f"ranks must be at least nodes, and nodes 1, got {ranks} and {nodes}")
    check_whole("eval_windows", eval_windows)
    budget = parse_memory(max_memory)
    whole = recipe.searches or recipe.chooses_by_loss
    described = describe(model, whole=whole, **recipe.opening)
    skeleton, layout = described.model, described.layout
    if layout is None and (recipe.budget is not None or recipe.blocks is not None):
        raise CfspError(described.refusal)
    check_seqlen(skeleton, recipe.calibration.seqlen)
    depth_windows = 0
    if recipe.blocks is not None:
        left = blocks_left(described, recipe.blocks)
        depth_windows = depth_windows_of(described, left, recipe)
        described = shallower_description(described, any_stretch(described, left))
        skeleton, layout = described.model, described.layout
    machine = choose_hardware(hardware, device, skeleton.dtype, tflops, disk_gbps)
    where = pick_device(device if hardware is None else "cpu")
    table = None
    if layout is not None:
        table = known_table(
            skeleton,
            layout,
            where,
            recipe.model_budget,
            latency_table,
            whole_ffns=recipe.removes_ffns,
        )
        check_recipe(described, recipe, table)
        check_processes(recipe, ranks)
        if recipe.refits:
            check_refits(skeleton, layout, ranks)
    windows = 0 if recipe.only_blocks else recipe.statistics_windows
    request = Request(
        recipe,
        windows,
        eval_windows,
        ranks=ranks,
        nodes=nodes,
        table=table,
        depth_windows=depth_windows,
    )
    return _estimate(described, request, machine, budget)
