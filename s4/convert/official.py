"""A converted layer beside the original itself, from a checkout of github.com/state-spaces/s4."""

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s4.convert.entries import Entries
from s4.convert.kinds import Options, Site
from s4.convert.layers import read_layer


class Difference(NamedTuple):
    """Largest differences of outputs, relative to the largest output.

    float64: between the two, in float64.
    float32: between the two, in float32.
    ours, theirs: of each in float32 from the original in float64.
    """

    float64: float
    float32: float
    ours: float
    theirs: float


class Official:
    """The original's layers, made to hold given parameters.

    Args:
        path: a checkout, as of version 4.

    Raises:
        ValueError: it is none.
        ImportError: what it needs is not installed.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "models" / "s4" / "s4.py").is_file():
            raise ValueError(f"no models/s4/s4.py in {path}: give a checkout of the original, version 4")
        sys.path.insert(0, str(path))
        try:
            self._s4 = import_module("models.s4.s4")
            self._s4d = import_module("models.s4.s4d")
        except ImportError as error:
            raise ImportError(f"the checkout {path} needs what is not installed here: {error}") from error
        finally:
            sys.path.remove(str(path))

    def layer(self, entries: Entries, site: Site, options: Options) -> nn.Module | None:
        """The original's layer without its activation, (B, L, H) to the same and a state.

        None for kinds that a checkout of version 4 does not have, and for a kernel alone.
        """
        if site.alone or site.kind.mark not in ("A_real", "log_A_real"):
            return None
        p = {name: entries[site.kernel + name] for name in site.names}
        if site.minimal:
            made = self._s4d.S4D(p["C"].shape[-3], 2 * p["C"].shape[-2], transposed=False)
            made.activation = made.output_linear = nn.Identity()
            names = made.state_dict().keys()
        else:
            made = self._s4.FFTConv(
                p["inv_dt"].shape[0],
                bidirectional=len(p["C"]) == 2,
                activation=None,
                transposed=False,
                mode="dplr" if site.dplr else "diag",
                **_kernel(p, site, site.resolved(options)),
            )
            names = made.state_dict().keys()
        made.load_state_dict({name: entries[site.layer + name] for name in names})
        return made

    def difference(self, entries: Entries, site: Site, options: Options) -> Difference | None:
        """Of the two on a random input of the length that the parameters were made for, or 1024."""
        narrow = _in(torch.float32, entries)  # both start from the same numbers
        length = int(entries[site.kernel + "l_kernel"]) if "l_kernel" in site.names else 0
        outputs = {}
        for dtype in (torch.float32, torch.float64):
            theirs = self.layer(narrow, site, options)
            if theirs is None:
                return None
            ours = read_layer(_in(dtype, narrow), site, options)
            generator = torch.Generator().manual_seed(0)
            u = torch.randn(1, length or 1024, ours.d_model, generator=generator)
            with torch.no_grad():
                outputs["theirs", dtype] = theirs.to(dtype).eval()(u.to(dtype))[0].double()
                outputs["ours", dtype] = ours.eval()(u.to(dtype)).double()
        truth = outputs["theirs", torch.float64]

        def apart(a: Tensor, b: Tensor) -> float:
            return float((a - b).abs().max() / truth.abs().max())

        ours32, theirs32 = outputs["ours", torch.float32], outputs["theirs", torch.float32]
        return Difference(
            apart(outputs["ours", torch.float64], truth),
            apart(ours32, theirs32),
            apart(ours32, truth),
            apart(theirs32, truth),
        )


def _in(dtype: torch.dtype, entries: Entries) -> Entries:
    return Entries({k: v.to("cpu", dtype) if v.is_floating_point() else v for k, v in entries.items()})


def _kernel(p: Mapping[str, Tensor], site: Site, options: Options) -> dict[str, Any]:
    """The arguments of an original kernel with such parameters."""
    S, n = p["A_real"].shape
    return {
        "d_state": n if site.real else 2 * n,
        "n_ssm": S,
        "init": "diag-real" if site.real else "diag-lin",
        "rank": len(p["P"]) if site.dplr else 1,
        "dt_tie": p["inv_dt"].shape[1] == 1,
        "dt_transform": options.dt_transform,
        "real_transform": options.real_transform,
        "imag_transform": options.imag_transform,
        "backend": "naive",
        "verbose": False,
        **({} if site.dplr else {"disc": options.discretization, "is_real": site.real}),
    }
