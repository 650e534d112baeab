"""What worked at an earlier commit still does: its seeds, parameters and results, and a run that goes on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from golden.make import HERE, MODELS, RUN, SEED, STOPPED, Golden, layer, losses, of_layer, of_model
from torch import Tensor

from s4 import S4Model

OF_LAYERS, OF_MODELS = Golden("layers"), Golden("models")


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], bound: float = 1e-6) -> None:
    """The same names in the same order, dtypes and shapes; differences relative to the largest value of each.

    Not bit for bit: between kinds of processor torch differs in the rounding of its draws, of normal
    ones by up to 5e-7, and of eigh, which A, B and P come from.
    """
    assert [*got] == [*want]
    for name, x in want.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
    errors = {name: float((got[name] - x).abs().max()) for name, x in want.items()}
    assert {name: e for name, e in errors.items() if not e <= bound * float(want[name].abs().max())} == {}


def bound(case: str) -> float:
    return 1e-12 if case.endswith("float64") else 1e-6


@pytest.mark.parametrize("case", OF_LAYERS.cases)
def test_a_seed_draws_the_same_layer(case: str) -> None:
    torch.manual_seed(SEED)
    drawn = layer(OF_LAYERS.cases[case]["arguments"])
    assert_close(drawn.state_dict(), OF_LAYERS.parameters(case), bound(case))


@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("case", OF_LAYERS.cases)
def test_a_layer_computes_the_same(case: str, mode: str) -> None:
    one = layer(OF_LAYERS.cases[case]["arguments"], mode=mode)
    one.load_state_dict(OF_LAYERS.parameters(case))
    assert_close(of_layer(one, OF_LAYERS["u"]), OF_LAYERS.outputs(case), bound(case))


@pytest.mark.parametrize("case", OF_MODELS.cases)
def test_a_seed_draws_the_same_model(case: str) -> None:
    torch.manual_seed(SEED)
    assert_close(MODELS[case]().state_dict(), OF_MODELS.parameters(case))


@pytest.mark.parametrize("case", OF_MODELS.cases)
def test_a_model_computes_the_same(case: str) -> None:
    model = MODELS[case]()
    model.load_state_dict(OF_MODELS.parameters(case))
    got = of_model(model, OF_MODELS["tokens" if isinstance(model, S4Model) else "u"])
    assert_close(got, OF_MODELS.outputs(case))


@pytest.mark.filterwarnings("ignore:(?s).*(in v4|only one Jsonarg):DeprecationWarning")  # Lightning's
def test_a_checkpoint_trains_on_with_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="the examples need the extra 'examples'")
    import train

    monkeypatch.chdir(tmp_path)
    shutil.copy(HERE / "run" / "last.ckpt", tmp_path)
    options = ["--data.cache_dir", "cache", "--ckpt_path", "last.ckpt"]
    assert train.run([*RUN, *options]).resume_step == STOPPED
    want = json.loads((HERE / "run" / "losses.json").read_text())
    # Weights off by 1e-6 of themselves, or another kind of processor, move a loss by up to 5e-7; second
    # moments of the optimizer off by 1% move one by 2e-5, first moments that are lost by 5e-3.
    assert losses(tmp_path) == pytest.approx(want, rel=0, abs=2e-6)


RESULTS = Path(__file__).parents[1] / "examples" / "results"
# Of weights that are committed, the logits of one input as the commit that wrote the folder had them.
COMMITTED = {
    "smnist_small": [0.9071, -3.4762, 1.2334, -1.6458, -4.1061, 3.766, -7.2319, 4.2684, 1.2141, 0.7876],
    "text_small": [1.2006, -1.3938],
}


@pytest.mark.parametrize("name", COMMITTED)
def test_folders_of_earlier_commits_are_read(name: str) -> None:
    pytest.importorskip("safetensors")
    model = S4Model.from_pretrained(RESULTS / name)
    u = torch.linspace(-1, 1, 784).sin()[None, :, None] if name == "smnist_small" else torch.arange(32, 127)
    y = model(u if u.dim() == 3 else u[None])[0]
    torch.testing.assert_close(y, torch.tensor(COMMITTED[name]), rtol=1e-3, atol=1e-3)
