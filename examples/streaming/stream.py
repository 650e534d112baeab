"""Stream a WAV file through an ONNX file chunk by chunk, with numpy and onnxruntime alone, no PyTorch.

    python examples/streaming/stream.py denoiser.onnx [in.wav] [--out out.wav]

Each channel is a sequence of its own. The file is made by `s4.deploy.export(model, FILE.onnx, "chunk")`: its
first input takes (channels, chunk, 1) samples, the others are the state, zeros at first, and its outputs
are samples and the state for the next chunk.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime
from sounds import RATE, noisy, read, tones, write


def opened(file: Path) -> onnxruntime.InferenceSession:
    """The file in onnxruntime, on one thread.

    Raises:
        ValueError: it is missing, broken, or takes something else than chunks of one feature.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds, which share no class
        raise ValueError(f"cannot load {file}: {str(error).splitlines()[0]}") from None
    shape = session.get_inputs()[0].shape
    if len(session.get_inputs()) < 2 or len(shape) != 3 or not isinstance(shape[1], int) or shape[2] != 1:
        raise ValueError(f"{file} must take chunks (channels, chunk, 1) and a state, got an input of {shape}")
    return session


def streamed(session: onnxruntime.InferenceSession, samples: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Outputs (channels, length) of samples of the same shape, and the seconds that each chunk took."""
    names = [given.name for given in session.get_inputs()]
    chunk = session.get_inputs()[0].shape[1]
    channels, length = samples.shape
    kinds = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
    dtypes = [kinds[given.type] for given in session.get_inputs()]
    state = [
        np.zeros((channels, *given.shape[1:]), dtype)
        for given, dtype in zip(session.get_inputs()[1:], dtypes[1:], strict=True)
    ]
    outputs, seconds = [], []
    for start in progress(range(0, length, chunk)):
        piece = samples[:, start : start + chunk]
        u = np.pad(piece, ((0, 0), (0, chunk - piece.shape[1])))[..., None].astype(dtypes[0])
        begin = time.perf_counter()
        y, *state = session.run(None, dict(zip(names, [u, *state], strict=True)))
        seconds.append(time.perf_counter() - begin)
        outputs.append(y[..., 0])
    return np.concatenate(outputs, 1)[:, :length], seconds


def progress(chunks: range) -> Iterable[int]:
    """With a bar where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return chunks
    return track(chunks, "streaming", console=Console(stderr=True))


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="an ONNX file that takes chunks; denoiser.py writes one")
    parser.add_argument(
        "audio", type=Path, nargs="?", help="a WAV file of 16 bits; without it, five seconds of noisy tones"
    )
    parser.add_argument("--out", type=Path, default=Path("out.wav"), help="what comes out (default: out.wav)")
    options = parser.parse_args(arguments)
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    try:
        session = opened(options.model)
        if options.audio is None:
            samples, rate = noisy(tones(5.0, seed=7), seed=7)[None], RATE
            write(options.out.with_name("noisy.wav"), samples, rate)
        else:
            samples, rate = read(options.audio)
        wanted = session.get_modelmeta().custom_metadata_map.get("sample_rate", str(rate))
        if wanted != str(rate):
            raise ValueError(f"{options.model} is for {wanted} samples a second, {options.audio} has {rate}")
        if not samples.size:
            raise ValueError(f"{options.audio} has no samples")
        outputs, seconds = streamed(session, samples)
        write(options.out, outputs, rate)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    chunk = session.get_inputs()[0].shape[1]
    median, worst = 1e3 * np.median(seconds), 1e3 * max(seconds)
    duration = samples.shape[1] / rate
    print(f"{len(seconds)} chunks of {chunk} samples, {1e3 * chunk / rate:.1f} ms of sound each")
    factor = sum(seconds) / duration
    print(f"{median:.2f} ms a chunk (median), {worst:.2f} at most; real-time factor {factor:.3f}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
