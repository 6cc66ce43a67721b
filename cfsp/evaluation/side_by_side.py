"""Several models measured on the same text, workload and tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..calibration.text import check_dataset
from ..calibration.tokens import check_tokens
from ..calibration.windows import Calibration
from ..distributed import ALONE, Ranks
from ..errors import CfspError
from ..models.finding import find_model
from ..models.loading import check_seqlen, pick_device
from ..models.opening import open_model
from ..typed import check_whole
from .quality import evaluation_windows, perplexity
from .speed import Generation, PeakMemory, measure_speed, time_round
from .tasks import find_tasks, run_tasks


def evaluate(
    models: Sequence[str | Path],
    *,
    dataset: str = Calibration.dataset,
    seqlen: int = Calibration.seqlen,
    windows: int | None = None,
    bos: str = Calibration.bos,
    text_column: str | None = None,
    speed: bool = False,
    batch: int = Generation.batch,
    prompt_tokens: int = Generation.prompt_tokens,
    new_tokens: int = Generation.new_tokens,
    rounds: int = Generation.rounds,
    tasks: Sequence[str] = (),
    task_path: str | Path | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Perplexity of models on held-out text and, where asked for, their speed and task scores.

    Args:
        models: hub ids, folders or .gguf files.
        dataset: whose held-out text perplexity is measured on.
        seqlen: tokens of a window.
        windows: only the first so many; 0: no perplexity; None: all.
        bos: as in :class:`cfsp.Calibration`.
        text_column: likewise.
        speed: time prefill and decode of random prompts, the models taking turns; holds all of
            them in memory.
        batch: prompts at a time; of tasks, examples.
        prompt_tokens: of each prompt.
        new_tokens: generated after each prompt.
        rounds: turns of each model, of which the median counts.
        tasks: tasks or groups of the lm-evaluation-harness, which the extra ``eval`` installs.
        task_path: folder of task files of one's own.
        limit: only the first examples of each task.
        dtype: of the weights; auto: as the checkpoint stores them.
        device: auto, cpu, cuda, cuda:1.
        progress: show bars on stderr.
        ranks: of :func:`distributed.joined`, where several processes share the windows.

    Returns:
        For each model what `cfsp evaluate --json` prints of it: ``model`` and ``parameters``; the
        fields of :class:`cfsp.Perplexity`; ``speed`` with ``prefill_tokens_per_second``,
        ``decode_tokens_per_second``, ``peak_memory_bytes`` and ``workload``; ``tasks``, metrics by
        task. :func:`cfsp.write_report` takes it.

    Raises:
        CfspError: bad input or nothing to measure, in one line.
    """
    workload = Generation(batch, prompt_tokens, new_tokens, rounds)
    if ranks.size > 1 and (speed or tasks):
        raise CfspError("`speed` and `tasks` are for one process; start it without torchrun")
    if windows == 0 and not speed and not tasks:
        raise CfspError("nothing to measure: `windows=0` leaves out the perplexity")
    if windows is not None:
        check_whole("windows", windows)
    if windows != 0:
        check_dataset(dataset)
    if limit is not None:
        check_whole("limit", limit, 1)
    index = find_tasks(tasks, task_path, progress=progress) if tasks else None
    for name in models:
        find_model(name)
    kept: list[PreTrainedModel] = []
    found: list[dict[str, Any]] = []
    peaks: list[int | None] = []
    for name in models:
        memory = PeakMemory(pick_device(ranks.device(device)))
        opened = open_model(name, dtype, ranks.device(device))
        model, tokenizer = opened.model, opened.tokenizer
        values = {"model": str(name), "parameters": model.num_parameters()}
        if speed:
            memory.restart()
            time_round(model, workload)
            peaks.append(memory.measure())
            kept.append(model)
        if windows != 0:
            Calibration(seqlen=seqlen, bos=bos)  # refuses what is neither
            check_seqlen(model, seqlen)
            held_out = evaluation_windows(tokenizer, dataset, seqlen, windows, bos, text_column)
            check_tokens(model, tokenizer, held_out)
            bars = progress and ranks.first
            measured = perplexity(model, held_out, dataset=dataset, progress=bars, ranks=ranks)
            values |= measured.to_dict()
        if tasks:
            values["tasks"] = run_tasks(
                opened, tasks, index, limit=limit, batch=batch, progress=progress
            )
        found.append(values)
        del opened, model
    speeds = measure_speed(kept, workload, peak_memory=peaks)
    for values, measured_speed in zip(found, speeds, strict=False):
        values["speed"] = measured_speed.to_dict()
    return found
