"""A run in numbers: what its stages read, write and compute, and what memory holds meanwhile.

Each feature of a run hands in its loads on the stages and the memory that it holds in them: the
passes over all blocks are here, fits and searches in fit_costs.py.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..evaluation.quality import ROWS_PER_LOSS
from ..io.block_reader import buffer_count
from .flops import ModelCosts
from .hardware import Hardware

TEXT_BYTES = 300 << 20
"""Host memory of the tokenizer, the text and its tokens."""
SLACK = 0.05
"""Share of a GPU's memory that its allocator loses between tensors."""
WORKSPACE_BYTES = 256 << 20
"""Memory of a GPU's libraries."""
STAGES = ("open", "depth", "calibrate", "score", "search", "prune", "verify")
EMBEDDING, REFITTING, EVALUATION, HOST = "embed", "refit", "evaluate", "host"
"""Loads of memory alone: of the embedding that begins the stage prune, of blocks that are fitted
again in it, of the evaluation that ends it; of the host, at any time."""
OUTER = "embeddings, norm, head"
MICRO_BATCH, CHUNK = "micro-batch", "activations of a chunk"
SOLVING, RANKING = "least squares", "ranking"
"""What is held when the calls of a block, with the two parts above, are over."""


@dataclass(frozen=True)
class Stage:
    """A part of a run whose reading, computing and writing overlap."""

    name: str
    bytes_read: int
    """Bytes that each node reads from disk."""
    bytes_written: int
    """Bytes that all ranks write together."""
    flops: float
    """FLOPs of all ranks together."""
    seconds: float
    bound: str
    """What takes these seconds: compute, read, write or copy."""


@dataclass(frozen=True)
class Load:
    """What a feature adds to a stage."""

    stage: str
    read: int = 0
    written: int = 0
    copied: int = 0
    """Bytes between the host and each device."""
    flops: float = 0.0
    """FLOPs of all ranks together."""
    busiest: float = 0.0
    """FLOPs of a forward pass that takes as long as the busiest rank."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each part that the device holds meanwhile."""


@dataclass(frozen=True)
class Workload:
    """What is run on which model: the numbers that all loads follow from."""

    dense: ModelCosts
    """The model in the run's dtype."""
    stored: ModelCosts
    """The model as the checkpoint has it."""
    pruned: ModelCosts | None
    """What is left; None: nothing is cut."""
    widest: ModelCosts
    """Blocks as wide as they may be left: the dense ones, where only the sum of widths is known."""
    output_bytes: int
    windows: int
    fit_windows: int
    """Of calibration, that go through the pass that cuts as well; 0: none do."""
    evaluation_windows: int
    seqlen: int
    micro_batch: int
    streamed: bool
    made: bool
    """Whether a block at work lies beside what was read of it: cast, decoded or put together."""
    decoded: bool
    """Whether it is decoded, of what then waits on the host alone."""
    scores: bool
    """Whether weights are read for scores, with statistics at hand."""
    ranks: int
    device: str
    """cpu or cuda."""
    fp32_slower: float = 1.0
    fp64_slower: float = 1.0
    """How much faster a forward pass multiplies than the device does in these."""
    attention: bool = False
    """Whether attention is cut too."""

    def of_rank(self, windows: int) -> int:
        """Calibration windows of the busiest rank: whole micro-batches are shared out."""
        calls = math.ceil(windows / self.micro_batch)
        return min(windows, math.ceil(calls / self.ranks) * self.micro_batch)

    def share_of(self, windows: int) -> float:
        """Share of the calibration windows that the busiest rank has."""
        return self.of_rank(windows) / max(1, windows)

    def states(self, windows: int) -> int:
        """Bytes of the hidden states of windows."""
        return windows * self.seqlen * self.dense.hidden_size * self.dense.itemsize

    def working(self, windows: int = 1) -> int:
        """Bytes that a forward call of a block over windows holds."""
        return self.dense.working_bytes(windows, self.seqlen, self.device)

    def logits(self) -> int:
        """Bytes of a window's logits and their loss."""
        return self.dense.logits_bytes(self.seqlen, ROWS_PER_LOSS)

    def model_parts(self) -> dict[str, int]:
        """Bytes on the device while blocks are at work. Streamed: what is read of the block at work
        and, unless blocks are large, of the next, and the former itself where it is made of that;
        what is outside of the blocks is then on the host."""
        outer = {OUTER: self.dense.outer_bytes}
        if not self.streamed:
            return {**outer, "blocks": self.dense.block_bytes}
        on_cpu = self.device == "cpu"
        read = 0 if self.decoded and not on_cpu else self.read_ahead(self.stored)
        blocks = read + self.made * self.dense.largest_block
        return {**outer, "blocks": blocks} if on_cpu else {"blocks": blocks}

    def read_ahead(self, model: ModelCosts) -> int:
        """Bytes of the blocks of a checkpoint that are in memory as they are stored."""
        return buffer_count(model.largest_block) * model.largest_block

    def evaluation_states(self) -> int:
        """Bytes of the hidden states of the busiest rank's evaluation windows, dense and pruned."""
        evaluated = math.ceil(self.evaluation_windows / self.ranks)
        return 2 * self.states(evaluated) if self.streamed else 0

    def cutting_parts(self) -> dict[str, int]:
        """Bytes on the device while blocks are cut, but for what calls and fits hold."""
        if self.pruned is None:
            raise ValueError("nothing is cut")
        pruned = self.widest.largest_block
        if self.streamed and self.device == "cpu":
            # Measured: the one that waits to be written, and about as much again.
            pruned *= 2
        elif self.streamed:  # experts are cut in place
            pruned = max(block.nbytes_but_experts for block in self.widest.blocks)
        return {
            **self.model_parts(),
            "pruned block": pruned,
            "hidden states": self.evaluation_states() + self.states(self.of_rank(self.fit_windows)),
        }


Feature = Callable[[Workload], Iterable[Load]]


def passes(run: Workload) -> Iterator[Load]:
    """The passes of :mod:`cfsp.run`. A streamed model is read once for the statistics, its FFNs
    again for scorers that read weights, once for the cut; the output once to be verified."""
    model, outer = run.model_parts(), {OUTER: run.dense.outer_bytes}
    per_pass = run.stored.block_bytes if run.streamed else 0
    opened = run.stored.outer_bytes + (0 if run.streamed else run.stored.block_bytes)
    yield Load("open", opened, copied=opened)
    if run.windows:
        flops = run.windows * run.seqlen * run.dense.block_flops(run.seqlen)
        busiest = flops * run.share_of(run.windows)
        states = {"hidden states": run.states(run.of_rank(run.windows))}
        parts = {**model, **states, MICRO_BATCH: run.working(run.micro_batch)}
        yield Load("calibrate", per_pass, 0, per_pass, flops, busiest, parts)
    if run.pruned is None:
        return
    if run.scores and run.streamed:
        read = sum(block.scored_bytes(run.attention) for block in run.stored.blocks)
        yield Load("score", read, copied=read)

    evaluated = math.ceil(run.evaluation_windows / run.ranks)
    per_token = run.dense.flops(run.seqlen) + run.pruned.flops(run.seqlen)
    flops = run.evaluation_windows * run.seqlen * per_token
    busiest = flops * (evaluated / max(1, run.evaluation_windows))
    passed = run.fit_windows * run.seqlen * run.dense.block_flops(run.seqlen)
    flops, busiest = flops + passed, busiest + passed * run.share_of(run.fit_windows)
    working, logits = (run.working(), run.logits()) if evaluated else (0, 0)
    working = max(working, run.working(run.micro_batch) if run.fit_windows else 0)
    cutting = run.cutting_parts()
    states = {"hidden states": cutting["hidden states"]}
    parts = {**cutting, MICRO_BATCH: max(working, 0 if run.streamed else logits)}
    copied = per_pass + run.pruned.block_bytes
    yield Load("prune", per_pass, run.output_bytes, copied, flops, busiest, parts)
    if run.streamed:
        yield Load(EVALUATION, parts={**outer, **states, "logits": logits})
        yield Load(EMBEDDING, parts={**outer, **states})
    evaluating = {"hidden states": run.evaluation_states()}
    parts = {**outer, "blocks": run.read_ahead(run.widest), **evaluating} if run.streamed else {}
    yield Load("verify", run.output_bytes, copied=run.output_bytes, parts=parts)


def stages_of(loads: Sequence[Load], hardware: Hardware, nodes: int) -> tuple[Stage, ...]:
    """The stages of a run in order, each as long as what takes longest in it."""
    found = []
    for name in sorted({load.stage for load in loads} & {*STAGES}, key=STAGES.index):
        own = [load for load in loads if load.stage == name]
        read, written = sum(load.read for load in own), sum(load.written for load in own)
        flops = sum(load.flops for load in own)
        # Summed from the fits to the passes: the order decides on the last digit.
        share = sum(load.busiest for load in reversed(own)) / max(1.0, flops)
        copied = sum(load.copied for load in own) if hardware.device != "cpu" else 0
        seconds = {
            "compute": flops * share / hardware.flops,
            "read": read / hardware.disk_read,
            "write": written / nodes / hardware.disk_write,
            "copy": copied / hardware.copy,
        }
        bound = max(seconds, key=lambda kind: seconds[kind])
        found.append(Stage(name, read, written, flops, seconds[bound], bound))
    return tuple(found)


def _held(loads: Sequence[Load]) -> dict[str, dict[str, int]]:
    """What is held in each stage. Micro-batches take turns, all else adds up."""
    names = (*STAGES, EMBEDDING, REFITTING, EVALUATION, HOST)
    found: dict[str, dict[str, int]] = {stage: {} for stage in names}
    for load in loads:
        parts = found[load.stage]
        for part, count in load.parts.items():
            known = parts.get(part, 0)
            parts[part] = max(known, count) if part == MICRO_BATCH else known + count
    return found


def device_peak(loads: Sequence[Load], device: str) -> tuple[str, dict[str, int]]:
    """(stage, bytes by part) of the moment when the device holds most."""
    held = _held(loads)
    del held[HOST]
    for parts in held.values():
        if device != "cpu":
            # What a call holds is gone when a block is fitted.
            turns = (MICRO_BATCH, CHUNK), (SOLVING, RANKING)
            for part in min(turns, key=lambda turn: sum(parts.get(x, 0) for x in turn)):
                parts.pop(part, None)
            parts["allocator"] = allocator_bytes(sum(parts.values()))
        else:  # a heap keeps what calls of changing sizes leave: measured, about as much again
            parts["allocator"] = parts.get(MICRO_BATCH, 0)
    stage = max(held, key=lambda name: sum(held[name].values()))
    return stage, held[stage]


def allocator_bytes(held: int) -> int:
    """Bytes that a GPU's libraries and allocator take beside the tensors that it holds."""
    return WORKSPACE_BYTES + math.ceil(SLACK * held)


def host_parts(run: Workload, loads: Sequence[Load], process: int) -> dict[str, int]:
    """Bytes that the host holds at most, by part; ``process``: what it holds now."""
    parts = {"process": process, "text": TEXT_BYTES, **_held(loads)[HOST]}
    if run.device == "cpu":
        return {**parts, **device_peak(loads, run.device)[1]}
    if not run.streamed:
        return {**parts, "model": run.stored.block_bytes + run.stored.outer_bytes}
    parts["blocks read ahead"] = run.read_ahead(run.stored)
    parts[OUTER] = run.dense.outer_bytes
    if run.pruned is not None:
        parts["block written behind"] = run.widest.largest_block
    return parts
