"""Generation, several processes, and files for other runtimes."""

from collections.abc import Iterable

from make_tables.source import Row, measured, number, results, small


def generation(name: str) -> Iterable[Row]:
    """Tokens a second."""
    cells = results(name)["cells"]
    contexts = list(dict.fromkeys(c["context"] for c in cells))
    yield "batch", "", *(f"after {context:,} tokens" for context in contexts), "held, at the last"
    for batch in dict.fromkeys(c["batch"] for c in cells):
        for who in ("S4", "LSTM", "Transformer"):
            of = [measured(name, who=who, batch=batch, context=context) for context in contexts]
            held = of[-1]["held_mib"]
            kept = f"{number(held / 1024)} GiB" if held >= 1024 else f"{number(held)} MiB"
            yield str(batch), who, *(number(c["tokens_per_second"]) for c in of), kept


def generation_short() -> Iterable[Row]:
    """Of the README: tokens a second of 16 sequences."""
    head, *rows = generation("generation-cpu")
    yield from ([row[1], *row[2:]] for row in (head, *rows) if row[0] in ("batch", "16"))


def distributed_cpu() -> Iterable[Row]:
    """A sequence of a million steps over processes; both directions in brackets."""
    head = ("MiB each, {}", "seconds")
    yield (
        "processes", *(part.format(dtype) for dtype in ("float64", "float32") for part in head),
        "outputs, gradients differ from one process, float64",
    )  # fmt: skip
    for ranks in (1, 2, 4):
        row, apart = [str(ranks)], []
        for dtype in ("float64", "float32"):
            one, two = (
                measured("distributed-cpu", ranks=ranks, dtype=dtype, variant="dplr", bidirectional=both)
                for both in (False, True)
            )
            row.append(f"{number(max(one['mib']))} ({number(max(two['mib']))})")
            row.append(f"{one['seconds']:.1f} ({two['seconds']:.1f})")
            apart += [f"{small(c['outputs'])}, {small(c['gradients'])}" for c in (one, two)]
        yield *row, f"{apart[0]} ({apart[1]})" if ranks > 1 else ""


def deploy_cpu() -> Iterable[Row]:
    """What became of a model, in the runtimes that take it."""
    yield "", "model", "frozen", "onnxruntime", "AOTInductor", "largest error"
    for part, frozen, said in (("chunk", "frozen", "chunk of 64"), ("forward", "frozen, fft", "1,024 steps")):
        for what in ("S4 layer", "S4D layer", "model of 4"):
            of = [
                measured("deploy-cpu", who=who, what=what, part=part)
                for who in ("model", frozen, "onnxruntime", "AOTInductor")
            ]
            name = what.replace("of 4", "of 4 blocks")
            yield f"{name}, {said}", *(number(c["ms"]) for c in of), small(max(c["error"] for c in of))
