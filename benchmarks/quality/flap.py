"""Compare FLAP with heads, as it is here, with the masks of its released code on SmolLM2-135M.

``python -m benchmarks.quality.flap MODEL --calibration wikitext2-validation.parquet``

The released code (``benchmarks/results/released-flap.json``) ran on the same tokens: the first 16
windows of 1024, rows joined with a space, without BOS. Its fluctuation is no plain variance, since
both factors of its update use the new mean and the first window counts for nothing; all else is
the same, so that what differs is near the threshold.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import cfsp
from cfsp.calibration.collect import collect_statistics
from cfsp.calibration.text import CALIBRATE, load_text
from cfsp.calibration.tokens import consecutive_windows, tokenize
from cfsp.models.fingerprints import tokens_fingerprint
from cfsp.models.opening import open_any
from cfsp.run.job import plan_model

RELEASED = Path(__file__).parents[1] / "results" / "released-flap.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.flap")
    parser.add_argument("model", help="SmolLM2-135M-Instruct, as `cfsp demo` unpacks it")
    parser.add_argument("--calibration", required=True, help="WikiText-2 validation")
    options = parser.parse_args(arguments)
    opened = open_any(options.model, dtype="float32", attention=True)
    text = load_text(options.calibration, CALIBRATE)
    windows = consecutive_windows(tokenize(opened.tokenizer, text), 1024, 16)
    print(f"tokens {tokens_fingerprint(windows)[:16]}")
    found = collect_statistics(opened.model, opened.layout, windows, weights=opened.blocks)
    for ratio, released in json.loads(RELEASED.read_text("utf-8"))["ratios"].items():
        recipe = cfsp.Recipe(
            scorer="flap", units="channels,groups", sparsity=float(ratio), width_multiple=1
        )
        plan = plan_model(opened, found, recipe)
        differ = {"channels": 0, "groups": 0}
        for number, block in enumerate(plan.blocks):
            mask = bin(int(released["kept_mask_hex"][number], 16))[2:].zfill(block.units[0].count)
            theirs = {place for place, bit in enumerate(mask) if bit == "1"}
            groups = set(released["kept_groups_index"][number])
            differ["channels"] += len(theirs ^ set(block.kept[0][0].tolist()))
            differ["groups"] += len(groups ^ set(block.kept[1][0].tolist()))
        kept = plan.groups[0] if plan.groups else 0
        print(
            f"{ratio}: {kept} groups and {sum(plan.widths)} channels kept, released "
            f"{released['total_groups']} and {released['total_channels']}; other fate: "
            f"{differ['groups']} groups, {differ['channels']} channels"
        )


if __name__ == "__main__":
    main()
