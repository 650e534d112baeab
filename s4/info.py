"""`python -m s4.info`: versions, devices, and which backends can run here."""

import platform

import torch

import s4
from s4.backends import cpu
from s4.kernel import _choice


def report() -> str:
    """What a bug report needs, as text."""
    lines = [
        f"s4       {s4.__version__}",
        f"torch    {torch.__version__}",
        f"python   {platform.python_version()} on {platform.platform()}",
        f"cpu      {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    ]
    for i in range(torch.cuda.device_count()):
        lines.append(f"cuda:{i}   {torch.cuda.get_device_name(i)}")
    if not torch.cuda.is_available():
        lines.append("cuda     not available")
    lines.append("kernel backends")
    for name, state in s4.kernel.backends().items():
        usable = f"available, instruction set {cpu.level()}" if name == "cpu" else "available"
        lines.append(f"  {name:<8} {usable if state is True else f'not available: {state}'}")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for start, device in zip(["auto", *[""] * len(devices)], devices, strict=False):
        sums = _choice.best(torch.device(device))
        short = "powers" if sums == "torch" else "these sums at short L, powers at long L"
        lines.append(
            f"  {start:<8} on {device}: sums by {sums!r}, kernels of S4 by {short}, of S4D by powers"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
