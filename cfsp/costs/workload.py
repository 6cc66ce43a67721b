"""A run in numbers: what its stages read, write and compute, and what memory holds meanwhile."""

import math
from dataclasses import dataclass

from ..calibration.gram_sums import Split
from ..evaluation.quality import ROWS_PER_LOSS
from .fit_costs import FP64_SLOWER, GramCosts
from .flops import ModelCosts
from .hardware import Hardware
from .refit_costs import RefitCosts

TEXT_BYTES = 300 << 20
"""Host memory of the tokenizer, the text and its tokens."""
SLACK = 0.05
"""Share of a GPU's memory that its allocator loses between tensors."""
WORKSPACE_BYTES = 256 << 20
"""Of a GPU's libraries."""


@dataclass(frozen=True)
class Stage:
    """A part of a run whose reading, computing and writing overlap."""

    name: str
    bytes_read: int
    """From disk, by each node."""
    bytes_written: int
    """By all ranks together."""
    flops: float
    """By all ranks together."""
    seconds: float
    bound: str
    """What takes these seconds: compute, read, write or copy."""


@dataclass(frozen=True)
class SearchCosts:
    """A search for widths, on a model in memory."""

    candidates: int
    """Pruned models that are measured."""
    windows: int
    """That each is measured on."""


@dataclass(frozen=True)
class Workload:
    """What is run on which model.

    Bytes and FLOPs follow :mod:`cfsp.run`: a model that is streamed is read once for the
    statistics, its FFNs once more for scorers that read weights, once for the cut, and the output
    once to be verified. Gram matrices are written once and read once, for the cut.
    """

    costs: ModelCosts
    """In the run's dtype."""
    stored: ModelCosts
    """As the checkpoint has it."""
    pruned: ModelCosts | None
    """What is left; None: nothing is cut."""
    output_bytes: int
    windows: int
    """Of calibration; 0: none."""
    evaluation_windows: int
    seqlen: int
    micro_batch: int
    """Windows per forward call of calibration."""
    reads_weights: bool
    """Whether the scorer does."""
    streamed: bool
    """One block at a time; otherwise the model is in memory whole."""
    ranks: int
    nodes: int
    device: str
    """cpu or cuda."""
    gram: GramCosts | None = None
    """Of Gram matrices, where these are collected or read."""
    refit: RefitCosts | None = None
    """Of blocks that are fitted again after the cut."""
    search: SearchCosts | None = None
    """Of widths that are searched for."""

    @property
    def _split(self) -> Split:
        return Split(self.windows, self.seqlen, self.micro_batch)

    def _windows_of_rank(self) -> int:
        """Calibration windows of the busiest rank: whole micro-batches are shared out."""
        calls = math.ceil(self.windows / self.micro_batch)
        return min(self.windows, math.ceil(calls / self.ranks) * self.micro_batch)

    def _evaluation_windows_of_rank(self) -> int:
        return math.ceil(self.evaluation_windows / self.ranks)

    def calibration_flops(self) -> float:
        """Of all windows through all blocks; the head does not run."""
        gram = self.gram.sum_flops() if self.gram is not None else 0.0
        return self.windows * self.seqlen * (self.costs.block_flops(self.seqlen) + gram)

    def _fitting(self) -> tuple[int, float, float]:
        """(bytes read, FLOPs of all ranks, and as if they were those of a forward pass those of
        the busiest) of least squares. Each rank fits the blocks that its windows go through."""
        if self.gram is None or not self.gram.fits:
            return 0, 0.0, 0.0
        flops = self.gram.fit_flops()
        ranks = self.ranks if self.evaluation_windows else min(2, self.ranks)
        return (
            self.gram.disk_bytes(self.windows or 2),
            flops * ranks,
            flops * FP64_SLOWER[self.device],
        )

    def _searching(self) -> tuple[int, float, float]:
        """(bytes read, FLOPs, FLOPs as if all were those of a forward pass) of a search: its
        candidates' forward passes, and the cuts of all FFNs once and of those that exchange
        channels, each with another, twice a candidate on average."""
        if self.search is None or self.pruned is None:
            return 0, 0.0, 0.0
        tokens = self.search.candidates * self.search.windows * self.seqlen
        forward = tokens * self.pruned.flops(self.seqlen)
        if self.gram is None or not self.gram.fits:
            return 0, forward, forward
        passes = 1 + (self.search.candidates - 1) * 4 / len(self.costs.blocks)
        read = round(passes * self.gram.disk_bytes(self.windows or 2))
        flops = passes * self.gram.fit_flops()
        return read, forward + flops, forward + flops * FP64_SLOWER[self.device]

    def evaluation_flops(self) -> float:
        """Of all windows through the model, before and after."""
        if self.pruned is None:
            return 0.0
        models = (self.costs, self.pruned)
        per_token = sum(model.flops(self.seqlen) for model in models)
        return self.evaluation_windows * self.seqlen * per_token

    def _stage(
        self,
        name: str,
        hardware: Hardware,
        read: int = 0,
        written: int = 0,
        flops: float = 0.0,
        busiest: float = 0.0,
        copied: int = 0,
    ) -> Stage:
        """``busiest``: share of the FLOPs that the busiest rank does."""
        seconds = {
            "compute": flops * busiest / hardware.flops,
            "read": read / hardware.disk_read,
            "write": written / self.nodes / hardware.disk_write,
            "copy": copied / hardware.copy if self.device != "cpu" else 0.0,
        }
        bound = max(seconds, key=lambda kind: seconds[kind])
        return Stage(name, read, written, flops, seconds[bound], bound)

    def stages(self, hardware: Hardware) -> tuple[Stage, ...]:
        """The stages in order."""
        blocks, outer = self.stored.block_bytes, self.stored.outer_bytes
        opened = outer if self.streamed else outer + blocks
        per_pass = blocks if self.streamed else 0
        found = [self._stage("open", hardware, read=opened, copied=opened)]
        if self.windows:
            share = self._windows_of_rank() / self.windows
            flops = self.calibration_flops()
            grams = self.gram.disk_bytes(self.windows) if self.gram is not None else 0
            found.append(
                self._stage(
                    "calibrate", hardware, per_pass, grams, flops, share, copied=per_pass + grams
                )
            )
        if self.pruned is None:
            return tuple(found)
        ranks = self.gram is not None and self.gram.ranks
        if (self.reads_weights and self.streamed) or ranks:
            read, flops, slower = self.stored.ffn_bytes if self.streamed else 0, 0.0, 1.0
            if self.gram is not None and ranks:
                read += self.gram.disk_bytes(self.windows or 2)
                flops, slower = self.gram.rank_flops(), FP64_SLOWER[self.device]
            found.append(self._stage("score", hardware, read, 0, flops, slower, copied=read))
        if self.search is not None:
            read, flops, slower = self._searching()
            found.append(
                self._stage("search", hardware, read, 0, flops, slower / flops, copied=read)
            )
        share = self._evaluation_windows_of_rank() / max(1, self.evaluation_windows)
        read, fitting, busiest = self._fitting()
        refitting = self.refit.flops() if self.refit is not None else 0.0
        flops = self.evaluation_flops() + fitting + refitting
        busiest += refitting
        busiest += self.evaluation_flops() * share
        found.append(
            self._stage(
                "prune",
                hardware,
                per_pass + read,
                self.output_bytes,
                flops,
                busiest / max(1.0, flops),
                copied=per_pass + read + self.pruned.block_bytes,
            )
        )
        found.append(self._stage("verify", hardware, self.output_bytes, copied=self.output_bytes))
        return tuple(found)

    def _states(self, windows: int) -> int:
        """Hidden states of windows."""
        return windows * self.seqlen * self.costs.hidden_size * self.costs.itemsize

    def _blocks_at_work(self) -> int:
        """Weights of blocks on the device: two buffers as stored, for the one at work and the next,
        and where the run has another dtype the one at work in it."""
        if not self.streamed:
            return self.costs.block_bytes
        cast = self.costs.itemsize != self.stored.itemsize
        return 2 * self.stored.largest_block + cast * self.costs.largest_block

    def moments(self) -> dict[str, dict[str, int]]:
        """What the device holds, part by part, when most is held in each stage."""
        costs, outer = self.costs, self.costs.outer_bytes
        found: dict[str, dict[str, int]] = {}
        if self.windows:
            found["calibrate"] = {
                "embeddings, norm, head": outer,
                "blocks": self._blocks_at_work(),
                "hidden states": self._states(self._windows_of_rank()),
                "micro-batch": costs.working_bytes(self.micro_batch, self.seqlen, self.device),
            }
            if self.gram is not None:
                held = self.gram.sum_bytes(self._split, self.ranks, costs.itemsize)
                found["calibrate"]["Gram matrices"] = held
        if self.pruned is not None and self.gram is not None and self.gram.ranks:
            found["score"] = {
                "embeddings, norm, head": outer,
                "blocks": self._blocks_at_work(),
                "ranking": self.gram.rank_bytes(),
            }
        if self.pruned is not None and self.search is not None:
            found["search"] = {
                "embeddings, norm, head": outer,
                "blocks": self._blocks_at_work(),
                "cut FFNs": costs.ffn_bytes + self.pruned.largest_block,
                "micro-batch": max(
                    costs.working_bytes(1, self.seqlen, self.device),
                    costs.logits_bytes(self.seqlen, ROWS_PER_LOSS),
                ),
            }
            if self.gram is not None and self.gram.fits:
                found["search"]["least squares"] = self.gram.fit_bytes()
        if self.pruned is not None:
            pruned = self.pruned.largest_block
            evaluated = self._evaluation_windows_of_rank()
            working = costs.working_bytes(1, self.seqlen, self.device) if evaluated else 0
            logits = costs.logits_bytes(self.seqlen, ROWS_PER_LOSS) if evaluated else 0
            found["prune"] = {
                "embeddings, norm, head": outer,
                "blocks": self._blocks_at_work(),
                # On a CPU measured: the one that waits to be written, and about as much again.
                "pruned block": pruned * (2 if self.streamed and self.device == "cpu" else 1),
                "hidden states": 2 * self._states(evaluated) if self.streamed else 0,
                "micro-batch": max(working, 0 if self.streamed else logits),
            }
            if self.gram is not None and self.gram.fits:
                found["prune"]["least squares"] = self.gram.fit_bytes()
            if self.refit is not None:
                found["prune"]["blocks fitted again"] = self.refit.fit_bytes()
                found["prune"]["hidden states"] += self.refit.state_bytes()
                found["prune"]["micro-batch"] = max(
                    found["prune"]["micro-batch"], costs.working_bytes(1, self.seqlen, self.device)
                )
            if self.streamed:
                found["evaluate"] = {
                    "embeddings, norm, head": outer,
                    "hidden states": 2 * self._states(evaluated),
                    "logits": logits,
                }
                found["verify"] = {
                    "embeddings, norm, head": outer,
                    "blocks": 2 * pruned,
                    "hidden states": 2 * self._states(evaluated),
                }
        for parts in found.values():
            if self.device != "cpu":
                parts["allocator"] = WORKSPACE_BYTES + math.ceil(SLACK * sum(parts.values()))
            else:  # a heap keeps what calls of changing sizes leave: measured, about as much again
                parts["allocator"] = parts.get("micro-batch", 0)
        return found

    def device_parts(self) -> tuple[str, dict[str, int]]:
        """(stage, parts) of the moment when the device holds most."""
        moments = self.moments()
        stage = max(moments, key=lambda name: sum(moments[name].values()))
        return stage, moments[stage]

    def host_parts(self, process: int) -> dict[str, int]:
        """What the host holds at most, part by part; ``process``: what it does now."""
        parts = {"process": process, "text": TEXT_BYTES}
        if self.gram is not None and self.windows:
            parts["Gram matrices, written"] = self.gram.panel_bytes(self._split, self.ranks)
        if self.device == "cpu":
            return {**parts, **self.device_parts()[1]}
        if not self.streamed:
            return {**parts, "model": self.stored.block_bytes + self.stored.outer_bytes}
        parts["blocks read ahead"] = 2 * self.stored.largest_block
        if self.pruned is not None:
            parts["block written behind"] = self.pruned.largest_block
        return parts
