"""`python -m s4.info`: versions, devices, what each backend can run here, and what "auto" picks."""

import platform
from pathlib import Path

import torch

import s4
from s4.backends import BACKENDS, OPERATIONS, cpu
from s4.ops import dispatch

__all__ = ["report"]


def report() -> str:
    """What a bug report needs: versions, devices, backends and what "auto" picks.

    Returns:
        the text, of several lines.

    Examples:
        >>> print(report())  # doctest: +ELLIPSIS
        s4 ...
        torch ...
    """
    lines = [
        f"s4       {s4.__version__} in {Path(s4.__file__).parent}",
        f"torch    {torch.__version__}",
        f"python   {platform.python_version()} on {platform.platform()}",
        f"cpu      {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    ]
    for i in range(torch.cuda.device_count()):
        lines.append(f"cuda:{i}   {torch.cuda.get_device_name(i)}")
    if not torch.cuda.is_available():
        lines.append("cuda     not available")
    lines.append("backends")
    for name, operations in dispatch.backends().items():
        if isinstance(operations, str):
            lines.append(f"  {name:<8} not available: {operations}")
            continue
        own = [operation for operation, state in operations.items() if state is True]
        level = f", instruction set {cpu.level()}" if name == "cpu" else ""
        lines.append(f"  {name:<8} available: {', '.join(own)}{level}")
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        took = {o: dispatch.implementation(o, "auto", torch.device(device)) for o in OPERATIONS}
        picks = [
            f"{o} by {next((n for n, it in BACKENDS.items() if it is took[o]), 'torch')!r}" for o in took
        ]
        lines.append(f"auto on {device}: {', '.join(picks)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
