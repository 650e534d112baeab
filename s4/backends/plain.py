"""Backend "torch": no operation of its own, so the plain definition of each, on any device."""

import torch


def status(device: torch.device) -> bool | str:
    """True: it runs everywhere."""
    return True
