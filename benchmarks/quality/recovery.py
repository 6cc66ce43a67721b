"""Recover one pruned model by ranks that follow importance and by uniform ones, seed by seed.

``python -m benchmarks.quality.recovery --checkpoint DIR --work DIR --json RESULT.json``

The checkpoint is pruned once; then, for every seed, it is recovered with each allocation on the
same windows, with as many parameters to half a rank of a block. ``--distilled`` seeds are also
recovered a third way: ranks by importance, and on the same windows the distributions and hidden
states of the dense model as the only goal, not the text. Perplexity is measured on the held-out
text of the training dataset and on another text. A run that is done is kept in ``--work`` and not
done again; one that was interrupted goes on from its last checkpoint. With the JSON come the
answers to two claims: perplexity falls by at least a tenth of the pruned model's, and ranks by
importance beat uniform ones with every seed. Either may be false.
"""

import argparse
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsp.io.files import write_json

from ..common import environment
from ..common.results import write_result

ALLOCATIONS = ("importance", "uniform")
DISTILLED = "distilled"
DOMAINS = ("in_domain", "other_domain")


def pruned_folder(options: argparse.Namespace) -> Path:
    """The pruned model, made where it is not there yet."""
    import cfsp

    out: Path = options.work / "pruned"
    if not out.exists():
        calibration = cfsp.Calibration(
            dataset=options.dataset, samples=options.samples, seqlen=options.seqlen
        )
        recipe = cfsp.Recipe(sparsity=options.sparsity, calibration=calibration)
        cfsp.prune(options.checkpoint, recipe=recipe, out=out, eval_windows=0, resume=True)
    return out


def perplexities(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    """On the first windows of both texts."""
    import cfsp
    from cfsp.evaluation.quality import evaluation_windows

    found = {}
    for domain, text in zip(DOMAINS, (options.eval_dataset, options.other_dataset), strict=True):
        windows = evaluation_windows(tokenizer, text, options.seqlen, options.eval_windows, "auto")
        found[domain] = cfsp.perplexity(model, windows, dataset=text).perplexity
    return found


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers of a run follow from."""
    names = (
        *("sparsity", "samples", "dataset", "seqlen", "steps", "batch_size", "rank"),
        *("learning_rate", "targets", "eval_dataset", "other_dataset", "eval_windows"),
    )
    return {name: getattr(options, name) for name in names}


def kept(file: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """An earlier result of the same question."""
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    if found["asked"] != asked(options):
        raise SystemExit(f"{file} answers another question; choose another --work")
    return found


def keep(file: Path, options: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """Write a result whole."""
    found = {"asked": asked(options), **values}
    write_json(file, found)
    return found


def unrecovered(pruned: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexities of the dense model and of the pruned one."""
    from cfsp import open_model

    file = options.work / "unrecovered.json"
    found = kept(file, options)
    if found is None:
        values = {}
        for name, folder in (("dense", options.checkpoint), ("pruned", pruned)):
            opened = open_model(folder)
            values[name] = perplexities(opened.model, opened.tokenizer, options)
        found = keep(file, options, values)
    return found


def recovered(pruned: Path, way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: perplexities, losses, parameters, seconds."""
    import cfsp

    file = options.work / f"{way}-{seed}.json"
    found = kept(file, options)
    if found is not None:
        return found
    out = options.work / f"{way}-{seed}"
    choice: dict[str, Any] = {"allocation": way}
    if way == DISTILLED:
        choice = {"distillation": cfsp.Distillation(str(options.checkpoint), text_weight=0.0)}
    settings = cfsp.Recovery(
        **choice,
        targets=options.targets,
        rank=options.rank,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        dataset=options.dataset,
        seqlen=options.seqlen,
        seed=seed,
    )
    start = time.perf_counter()
    result = cfsp.recover(pruned, out, settings, eval_windows=0, resume=True, overwrite=True)
    seconds = time.perf_counter() - start
    report = result.report
    values = {
        "way": way,
        "seed": seed,
        **perplexities(result.model, result.tokenizer, options),
        "ranks": report.ranks,
        "trained_parameters": report.trained_parameters,
        "uniform_parameters": report.uniform_parameters,
        "losses": report.losses,
        "learning_rate": report.settings.learning_rate,
        "seconds_of_last_start": seconds,
    }
    if not options.keep:
        shutil.rmtree(out)
    return keep(file, options, values)


def summary(base: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and whether the claims hold."""
    found: dict[str, Any] = {}
    for way in dict.fromkeys(run["way"] for run in runs):
        own = [run for run in runs if run["way"] == way]
        for domain in DOMAINS:
            values = [run[domain] for run in own]
            found.setdefault(way, {})[domain] = {
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "change": statistics.mean(values) / base["pruned"][domain] - 1,
            }
    pairs = list(zip(*([r for r in runs if r["way"] == a] for a in ALLOCATIONS), strict=True))
    differences = [[guided[d] - uniform[d] for guided, uniform in pairs] for d in DOMAINS]
    found["importance_minus_uniform"] = dict(zip(DOMAINS, differences, strict=True))
    found["falls_by_a_tenth"] = found["importance"]["in_domain"]["change"] <= -0.1
    found["importance_beats_uniform_with_every_seed"] = all(d < 0 for d in differences[0])
    return found


def markdown(result: dict[str, Any]) -> str:
    """The result as a table with a sentence on each claim."""
    question, found = result["asked"], result["summary"]
    lines = [
        f"Sparsity {question['sparsity']:.0%}, {question['steps']} steps, rank {question['rank']}, "
        f"{question['targets']}, {question['batch_size']} windows of {question['seqlen']} tokens a "
        "step; perplexity, mean ± deviation over seeds.",
        "",
        f"| | seeds | `{Path(question['eval_dataset']).stem}` "
        f"| `{Path(question['other_dataset']).stem}` |",
        "|---|---:|---:|---:|",
    ]
    for name in ("dense", "pruned"):
        values = " | ".join(f"{result[name][domain]:.2f}" for domain in DOMAINS)
        lines.append(f"| {name} | | {values} |")
    for way, seeds in Counter(run["way"] for run in result["runs"]).items():
        cells = [found[way][domain] for domain in DOMAINS]
        values = " | ".join(map(_mean_and_change, cells))
        lines.append(f"| {way} | {seeds} | {values} |")
    differences = found["importance_minus_uniform"]["in_domain"]
    listed = ", ".join(f"{difference:+.3f}" for difference in differences)
    verdict = "beats" if found["importance_beats_uniform_with_every_seed"] else "does not beat"
    falls = "falls" if found["falls_by_a_tenth"] else "does not fall"
    lines += [
        "",
        f"Perplexity {falls} by a tenth of the pruned model's. Importance {verdict} uniform with "
        f"every seed: {listed}.",
    ]
    return "\n".join(lines) + "\n"


def _mean_and_change(cell: dict[str, Any]) -> str:
    spread = f" ± {cell['deviation']:.2f}" if cell["deviation"] is not None else ""
    return f"{cell['mean']:.2f}{spread} ({cell['change']:+.1%})"


def _without_folder(value: Any) -> Any:
    """Names of files: where they lay concerns nobody else."""
    return Path(value).name if isinstance(value, str) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.recovery", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the dense model")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is done")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--markdown", type=Path, help="where its table goes")
    parser.add_argument("--dataset", default="wikitext2", help="calibrated and trained on")
    parser.add_argument("--eval-dataset", default="wikitext2", help="in-domain, held out")
    parser.add_argument("--other-dataset", default="builtin", help="of another domain")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=128, help="windows of calibration")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, help="default: by size")
    parser.add_argument("--targets", default="ffn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--distilled", type=int, default=0, help="seeds recovered from the dense model alone too"
    )
    parser.add_argument("--eval-windows", type=int, default=64)
    parser.add_argument("--keep", action="store_true", help="keep the recovered models")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    pruned = pruned_folder(options)
    base = unrecovered(pruned, options)
    planned = [(way, seed) for seed in range(options.seeds) for way in ALLOCATIONS]
    planned += [(DISTILLED, seed) for seed in range(options.distilled)]
    runs = [recovered(pruned, way, seed, options) for way, seed in planned]
    for found in (base, *runs):
        del found["asked"]
    result = {
        "asked": {name: _without_folder(value) for name, value in asked(options).items()},
        **base,
        "runs": runs,
        "summary": summary(base, runs),
        "environment": environment.describe(),
    }
    write_result(options.json, result)
    if options.markdown:
        options.markdown.write_text(markdown(result), "utf-8")
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
