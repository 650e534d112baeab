"""Times of kernels and of the sums they are made of, by who computes them."""

from collections.abc import Iterable

from make_tables.source import Row, cell, measured, number, times


def kernel_cpu() -> Iterable[Row]:
    """The kernel beside the original formula."""
    yield "L", "forward, original", "s4", "with backward, original", "s4", "memory, original", "s4"
    for L in (1024, 4096, 16384):
        row = [f"{L:,}"]
        pairs = [
            [measured("kernels-cpu", what="S4 kernel", who=who, H=128, N=64, L=L, backward=backward)
             for who in ("original formula", "auto")]
            for backward in (False, True)
        ]  # fmt: skip
        for original, ours in pairs:
            row += [number(original["ms"]), f"{number(ours['ms'])} ({times(original['ms'], ours['ms'])})"]
        yield *row, *(f"{number(c['mib'])} MiB" for c in pairs[1])


def kernel_h200() -> Iterable[Row]:
    """The kernel on one H200."""
    names = {"auto": "auto", "cuda sums": "sums, CUDA", "triton sums": "sums, Triton",
             "torch sums": "sums, PyTorch",
             "powers": "powers, PyTorch", "original formula": "original formula"}  # fmt: skip
    yield "L", "pass", *names.values()
    for L in (1024, 16384):
        for backward in (False, True):
            of = [
                cell("kernels-h200", what="S4 kernel", who=who, H=512, N=64, L=L, backward=backward)
                for who in names
            ]
            what = "forward and backward" if backward else "forward"
            yield f"{L:,}", what, *(number(c["ms"]) if c else "not run" for c in of)


def backends_by_sum() -> Iterable[Row]:
    """The Cauchy sums by who computes them."""
    names = ("auto", "cpu", "cuda", "triton", "keops", "torch", "naive")
    yield "machine", "H, N, L", *(f"`{name}`" for name in names)
    for file, machine, H in (("kernels-cpu", "2 cores", 128), ("kernels-h200", "H200", 512)):
        for L in (1024, 16384):
            row = []
            for who in names:
                of = {"what": "cauchy", "who": who, "H": H, "N": 64, "L": L}
                pair = [cell(file, backward=backward, **of) for backward in (False, True)]
                row.append(", ".join(number(c["ms"]) for c in pair if c))
            yield machine, f"{H}, 64, {L:,}", *row
