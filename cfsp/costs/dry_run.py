"""Estimates of runs: from a config alone, or of a model that has been opened for one."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration.gram_sums import check_ranks
from ..errors import CfspError, unknown_name
from ..evaluation.quality import EVALUATION_WINDOWS
from ..io.memory import MemoryBudget, parse_budget
from ..io.safetensors import TensorInfo, Tensors
from ..io.shard_writer import MAX_SHARD_BYTES, pack_shards
from ..models.blockwise import default_micro_batch
from ..models.descriptions import Description, describe, describe_opened
from ..models.layouts import unsupported
from ..models.loading import check_seqlen, model_device, pick_device
from ..models.opening import OpenModel
from ..models.tensors import saved_parameters, saved_tensors, tensor_infos
from ..pruning.allocation import NEEDS_CURVES, SEARCH
from ..pruning.compaction import planned_tensors
from ..pruning.compensation import NEEDS_GRAM
from ..pruning.plan import PruningPlan
from ..pruning.recipe import Recipe
from ..pruning.scoring import SCORERS
from .estimates import Estimate
from .feasibility import even_plan
from .fit_costs import GramCosts
from .flops import ModelCosts, costs_of
from .footprint import Footprints, footprints
from .hardware import HARDWARE, Hardware, resident_bytes, this_machine
from .latency import LatencyTable
from .latency_measurement import known_table
from .refit_costs import RefitCosts
from .workload import TEXT_BYTES, SearchCosts, Workload


@dataclass(frozen=True)
class Job:
    """What is asked of a model."""

    recipe: Recipe
    windows: int
    """Of calibration; 0 where statistics or a plan are at hand."""
    evaluation_windows: int = 0
    prunes: bool = True
    """False: only the statistics are wanted."""
    gram: bool = False
    """Whether Gram matrices are, though nothing that is to be done reads them."""
    plan: PruningPlan | None = None
    ranks: int = 1
    nodes: int = 1
    table: LatencyTable | None = None


def _cut(costs: ModelCosts, tensors: Tensors, blocks: str, sparsity: float) -> Tensors:
    """About what pruning would leave of an architecture whose layout is not known."""
    inner = {
        f"{blocks}.{number}.{name}": 1 if info.shape[-1] != costs.hidden_size else 2
        for number, block in enumerate(costs.blocks)
        for name, info in block.ffn().items()
    }
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        shape = list(info.shape)
        if name in inner:
            shape[-inner[name]] = round(shape[-inner[name]] * (1 - sparsity))
        found[name] = TensorInfo(info.dtype, tuple(shape))
    return found


def _plan(described: Description, job: Job) -> PruningPlan | None:
    """The job's, or one whose result is as large; None where the layout is not known.

    Raises:
        CfspError: a budget, where the layout is not known.
    """
    if described.layout is not None:
        return job.plan or even_plan(described.model, described.layout, job.recipe, job.table)
    if job.recipe.budget is not None:
        raise unsupported(described.model.config.model_type)
    return None


def _after(
    described: Description,
    costs: ModelCosts,
    tensors: Mapping[str, torch.Tensor],
    job: Job,
    plan: PruningPlan | None,
) -> Tensors:
    """What the pruned model's checkpoint will hold."""
    if plan is None or described.layout is None:
        return _cut(costs, tensor_infos(tensors), described.blocks, job.recipe.sparsity)
    return planned_tensors(tensors, described.model, described.layout, plan)


def _file_bytes(tensors: Tensors) -> int:
    """Size of the safetensors files that hold these tensors."""
    shards = pack_shards(tensors, MAX_SHARD_BYTES)
    return sum(len(shard.header()) + shard.nbytes for shard in shards)


def _gram_costs(described: Description, job: Job, costs: ModelCosts) -> GramCosts | None:
    """Of a job that collects or reads Gram matrices; None for any other."""
    recipe, layout = job.recipe, described.layout
    fits = job.prunes and recipe.resolved_compensation in NEEDS_GRAM
    read = job.prunes and recipe.needs_gram(planned=job.plan is not None) is not None
    if layout is None or not (job.gram or read):
        return None
    blocks = [layout.groups(block) for block in layout.find_blocks(described.model)]
    active = costs.blocks[-1].active_experts
    ranks = job.prunes and recipe.ranks_by_gram and job.plan is None
    curves = recipe.resolved_allocator in (*NEEDS_CURVES, SEARCH)
    residuals = recipe.scorer == "cfsp-residual" and not curves
    return GramCosts(blocks, costs.hidden_size, active, recipe.sparsity, fits, ranks, residuals)


def _refit_costs(job: Job, dense: ModelCosts, pruned: ModelCosts | None) -> RefitCosts | None:
    """Of a job that fits blocks again after the cut; None for any other."""
    recipe = job.recipe
    if pruned is None or not recipe.refits:
        return None
    epochs = recipe.epochs if recipe.blockwise else 0
    windows = recipe.calibration
    return RefitCosts(dense, pruned, windows.samples, windows.seqlen, epochs, recipe.sequential)


def _search_costs(job: Job) -> SearchCosts | None:
    """Of a job whose widths are searched for; None for any other."""
    recipe = job.recipe
    if not job.prunes or job.plan is not None or not recipe.searches:
        return None
    return SearchCosts(recipe.search_candidates, recipe.search_windows)


def _workload(described: Description, job: Job, device: str, plan: PruningPlan | None) -> Workload:
    model, recipe = described.model, job.recipe
    tensors = saved_tensors(model)
    counted = tensor_infos(saved_parameters(model))
    itemsize = model.dtype.itemsize

    def costs(of: Tensors, size: int = itemsize) -> ModelCosts:
        return costs_of(model.config, of, described.blocks, size)

    dense = costs(counted)
    pruned, output_bytes = None, 0
    if job.prunes:
        left = _after(described, dense, tensors, job, plan)
        pruned, output_bytes = costs(left), _file_bytes(left)
    widths = [info.dtype.itemsize for info in described.stored.values()]
    micro_batch = recipe.micro_batch
    return Workload(
        dense,
        costs(described.stored, max(widths, key=widths.count)),
        pruned,
        output_bytes,
        job.windows,
        job.evaluation_windows,
        recipe.calibration.seqlen,
        micro_batch or default_micro_batch(torch.device(device), recipe.calibration.seqlen),
        (SCORERS[recipe.scorer].reads_weights or recipe.ranks_by_gram) and job.plan is None,
        described.streamed,
        job.ranks,
        job.nodes,
        device,
        _gram_costs(described, job, dense),
        _refit_costs(job, dense, pruned),
        _search_costs(job),
    )


def _fitted(workload: Workload, room: int | None) -> Workload:
    """With as many windows per call, up to what the workload has, as a device has room for."""
    if room is None:
        return workload
    for micro_batch in range(workload.micro_batch, 1, -1):
        fewer = dataclasses.replace(workload, micro_batch=micro_batch)
        if sum(fewer.device_parts()[1].values()) <= room:
            return fewer
    return dataclasses.replace(workload, micro_batch=1)


def _room(hardware: Hardware, budget: MemoryBudget) -> int | None:
    """Bytes for what a run holds on the device; None: no limit but what the user asks for."""
    if hardware.device != "cpu":
        return min(hardware.device_memory, budget.device or hardware.device_memory)
    stated = [size for size in (budget.device, budget.host) if size is not None]
    return min(stated) - resident_bytes() - TEXT_BYTES if stated else None


def _sizes(described: Description, plan: PruningPlan | None, job: Job) -> Footprints | None:
    if plan is None or described.layout is None:
        return None
    return footprints(described.model, described.layout, plan, job.table)


def _estimate(
    described: Description, job: Job, hardware: Hardware, budget: MemoryBudget
) -> Estimate:
    plan = _plan(described, job) if job.prunes else None
    workload = _workload(described, job, hardware.device, plan)
    if workload.gram is not None and job.windows:
        check_ranks(job.ranks)
    if job.recipe.micro_batch is None:
        workload = _fitted(workload, _room(hardware, budget))
    stage, parts = workload.device_parts()
    costs, pruned = workload.costs, workload.pruned
    return Estimate(
        model=described.name,
        architecture=described.model.config.model_type,
        supported=described.layout is not None,
        streamed=workload.streamed,
        parameters=costs.parameters,
        parameters_after=(pruned or costs).parameters,
        sizes=_sizes(described, plan, job),
        blocks=len(costs.blocks),
        largest_block_bytes=costs.largest_block,
        largest_stored_block_bytes=workload.stored.largest_block,
        dtype=str(described.model.dtype).removeprefix("torch."),
        ranks=job.ranks,
        windows=job.windows,
        evaluation_windows=job.evaluation_windows,
        seqlen=workload.seqlen,
        micro_batch=workload.micro_batch,
        stages=workload.stages(hardware),
        device_stage=stage,
        device_parts=parts,
        host_parts=workload.host_parts(resident_bytes()),
        hardware=hardware,
        gram_bytes=workload.gram.disk_bytes(job.windows) if workload.gram and job.windows else 0,
    )


def estimate_opened(
    opened: OpenModel, job: Job, budget: MemoryBudget, *, measure: bool = True
) -> Estimate:
    """The estimate of a job on a model that was opened for it, on this machine.

    Args:
        opened: the model; no more of its weights is read.
        job: what to do.
        measure: find out how fast the device is; otherwise compute takes no time.
        budget: the micro-batch, where the recipe has none, is the largest up to the default that
            fits into it and into a GPU's free memory.

    Raises:
        CfspError: the sparsity cannot be reached.
    """
    described, model = describe_opened(opened), opened.model
    hardware = this_machine(model_device(model), model.dtype, measure=measure)
    return _estimate(described, job, hardware, budget)


def choose_hardware(
    hardware: Hardware | str | None,
    device: str,
    dtype: torch.dtype,
    tflops: float | None = None,
    disk_gbps: float | None = None,
) -> Hardware:
    """A machine by its name in ``HARDWARE``, or as it is; None: this one, by its device.

    Raises:
        CfspError: no such name or device, or a stated speed that is not above 0.
    """
    if isinstance(hardware, str):
        if hardware not in HARDWARE:
            raise unknown_name("hardware", hardware, HARDWARE)
        hardware = HARDWARE[hardware]
    if hardware is None:
        hardware = this_machine(pick_device(device), dtype, measure=tflops is None)
    return hardware.stated(tflops, disk_gbps)


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
    if eval_windows < 0:
        raise CfspError(f"eval_windows must be 0 or more, got {eval_windows}")
    budget = parse_budget(max_memory)
    described = describe(model, recipe.dtype, whole=recipe.searches)
    calibration = recipe.calibration
    check_seqlen(described.model, calibration.seqlen)
    machine = choose_hardware(hardware, device, described.model.dtype, tflops, disk_gbps)
    where = pick_device(device if hardware is None else "cpu")
    table = None
    if described.layout is not None:
        table = known_table(
            described.model, described.layout, where, recipe.model_budget, latency_table
        )
    job = Job(recipe, calibration.samples, eval_windows, ranks=ranks, nodes=nodes, table=table)
    return _estimate(described, job, machine, budget)
