"""The example of streaming audio: an ONNX file without PyTorch equals the model's forward."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from processes import printed, process
from torch import nn

from s4 import S4Block, S4Layer, S4Model
from s4.deploy import export

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
FOLDER = Path(__file__).parents[1] / "examples" / "streaming"
sys.path.insert(0, str(FOLDER))  # as the scripts are started

import sounds  # noqa: E402

STREAM = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
runpy.run_path(script, run_name="__main__")
print([name for name in sys.modules if name.partition(".")[0] in ("torch", "s4")])
"""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.promise("s4.deploy", "streaming through onnxruntime, with no torch imported, equals forward")
def test_stream(tmp_path: Path) -> None:
    """Two channels, and a last chunk that is not full; a WAV file rounds to half of 2^-15."""
    block = S4Block(S4Layer(4, 8, variant="diag", dt_min=0.01))
    model = S4Model(nn.Linear(1, 4), [block], nn.Linear(4, 1)).eval()
    file = export(model, tmp_path / "model.onnx", "chunk", chunk=32)
    first = sounds.tones(0.02, 1)
    sounds.write(tmp_path / "in.wav", sounds.noisy(first[None].repeat(2, 0), 2), sounds.RATE)
    samples, rate = sounds.read(tmp_path / "in.wav")
    assert samples.shape == (2, 320)
    samples = samples[:, :310]
    sounds.write(tmp_path / "in.wav", samples, rate)
    arguments = [file, tmp_path / "in.wav", "--out", tmp_path / "out.wav"]
    said = printed(process(STREAM, str(FOLDER / "stream.py"), *map(str, arguments)))
    assert "10 chunks of 32 samples, 2.0 ms" in said
    assert "real-time factor" in said
    assert said.endswith("[]")
    got, _ = sounds.read(tmp_path / "out.wav")
    with torch.no_grad():
        want = model(torch.tensor(samples)[..., None])[..., 0]
    assert want.abs().max() > 0.05
    assert (torch.tensor(got) - want.clamp(-1, 1 - 2**-15)).abs().max() <= 2**-16 + 1e-5


def test_denoiser_is_trained_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse")
    onnx = pytest.importorskip("onnx")
    file = tmp_path / "denoiser.onnx"
    options = ["--steps", "2", "--d_model", "4", "--seconds", "0.05", "--chunk", "16", "--batch_size", "2"]
    program = STREAM.replace("print(", "(")
    said = printed(process(program, str(FOLDER / "denoiser.py"), "--out", str(file), *options))
    assert "signal to noise" in said
    properties = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert properties["sample_rate"] == "16000"
    sounds.write(tmp_path / "slow.wav", sounds.tones(0.1, 1)[None], 8000)
    sounds.write(tmp_path / "none.wav", sounds.tones(0.1, 1)[None, :0], 16000)
    main = runpy.run_path(str(FOLDER / "stream.py"))["main"]
    for audio, message in [
        ("slow", "for 16000 samples a second"),
        ("none", "no samples"),
        ("no", "cannot read"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([str(file), str(tmp_path / f"{audio}.wav")])
        assert ended.value.code == 1
        assert message in capsys.readouterr().err


def test_broken_files_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = runpy.run_path(str(FOLDER / "stream.py"))
    (tmp_path / "x.onnx").write_text("nothing")
    (tmp_path / "x.wav").write_text("nothing")
    for arguments, words in [
        (["--help"], "WAV"),
        ([str(tmp_path / "none.onnx")], "cannot load"),
        ([str(tmp_path / "x.onnx")], "cannot load"),
    ]:
        with pytest.raises(SystemExit):
            stream["main"](arguments)
        said = capsys.readouterr()
        assert words in said.out + said.err
        assert "Traceback" not in said.err
    with pytest.raises(ValueError, match=r"cannot read .*x\.wav"):
        sounds.read(tmp_path / "x.wav")
