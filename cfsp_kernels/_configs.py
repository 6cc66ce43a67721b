"""Launch configurations: a table in ``launch_configs.json``, measured ahead of time.

A table rather than autotuning: the first call costs nothing, and the order of additions, so
every bit of a result, is the same in each run. ``benchmarks`` rewrites the table.
"""

import functools
import json
from importlib.resources import files

import torch

Config = dict[str, int]


@functools.cache
def config_table() -> dict[str, dict[str, Config]]:
    """Op -> architecture ("default", "sm_90", "gfx942", ...) -> launch configuration."""
    return json.loads(files(__package__).joinpath("launch_configs.json").read_text("utf-8"))


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name of a device: "sm_90", "gfx942", or "default" where it is no GPU."""
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launch_config(op: str, device: torch.device) -> Config:
    """The configuration of ``op`` on ``device``: constexprs of its kernel, num_warps, num_stages.

    The dict is the caller's.

    Raises:
        KeyError: the table has no such op.
    """
    return config_for(op, architecture(device))


def config_for(op: str, arch: str) -> Config:
    """:func:`launch_config` by the architecture's name.

    An architecture that the table does not name has the entry of its generation's first ("sm_103"
    that of "sm_100"), else the default.
    """
    entries = config_table()[op]
    return (entries.get(arch) or entries.get(f"{arch[:-1]}0") or entries["default"]).copy()
