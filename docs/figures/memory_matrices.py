"""The matrices of the live page: `python docs/figures/memory_matrices.py` writes assets/memory/matrices.js.

For each choice of variant and init and each N, float64 in base64, row by row:

- "dplr": A (N, N) and B (N,) of `s4.hippo.transition`, whose state holds the coefficients of the past;
- "diag": Lambda and B (N/2,) of `s4.hippo.diag`, each complex number as real and imaginary part, and "past"
  (N, N), which makes of the state what a past is read from: for "legs" the coefficients, by
  `s4.hippo.from_modes`; for "lin" and "inv" the pseudo-inverse of the Gramian, see `quietest`.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s4 import hippo

SIZES = (4, 8, 16, 32, 64)
CHOICES = [(variant, init) for variant in ("dplr", "diag") for init in hippo.names(variant)]
TARGET = Path(__file__).parents[1] / "assets" / "memory" / "matrices.js"


def matrices(variant: str, init: str, N: int) -> dict[str, Tensor]:
    """What the page needs of one choice, in float64."""
    if variant == "dplr":
        A, B = hippo.transition(init, N)
        return {"A": A, "B": B}
    Lambda, B = hippo.diag(init, N)
    if init in hippo.names("dplr"):
        past = hippo.from_modes(init, torch.eye(N, dtype=torch.float64)).T
    else:
        past = quietest(Lambda, B)
    return {"Lambda": torch.view_as_real(Lambda), "B": torch.view_as_real(B), "past": past}


def quietest(Lambda: Tensor, B: Tensor) -> Tensor:
    """Pseudo-inverse W of the Gramian of the N real states, G = integral over s >= 0 of k(s) k(s)^T.

    With k(s) the response of the states to an impulse s ago, the state is x = integral of k(s) u(t - s). Of
    all pasts u that lead to x, k(s)^T W x has the least energy.
    """
    pairs, rates = torch.cat([B, B.conj()]), torch.cat([Lambda, Lambda.conj()])
    modes = -torch.outer(pairs, pairs.conj()) / (rates[:, None] + rates.conj())  # of z and of its conjugate
    # Re z = (z + conj z) / 2 and Im z = (z - conj z) / 2i
    eye = torch.eye(len(Lambda), dtype=rates.dtype)
    take = torch.cat([torch.cat([eye, eye], -1), torch.cat([-1j * eye, 1j * eye], -1)]) / 2
    return torch.linalg.pinv((take @ modes @ take.mH).real, hermitian=True, rtol=1e-12)


def packed(numbers: Tensor) -> str:
    """Float64, little-endian, in base64."""
    return base64.b64encode(numbers.contiguous().numpy().astype("<f8").tobytes()).decode()


def read() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """The numbers that the page has, flat."""
    text = TARGET.read_text()
    kept = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return {
        choice: {
            N: {name: np.frombuffer(base64.b64decode(packed), "<f8") for name, packed in parts.items()}
            for N, parts in sizes.items()
        }
        for choice, sizes in kept.items()
    }


def main() -> None:
    choices = {
        f"{variant} {init}": {N: {k: packed(v) for k, v in matrices(variant, init, N).items()} for N in SIZES}
        for variant, init in CHOICES
    }
    text = json.dumps(choices, indent=1)
    TARGET.write_text(
        f"// Made by docs/figures/memory_matrices.py, which says what they are.\nconst MATRICES = {text};\n"
    )


if __name__ == "__main__":
    main()
