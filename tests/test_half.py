"""Parameters in bfloat16 and float16: what a layer of them computes, and what it refuses.

The mathematics is that of the numbers that the parameters hold, in float64: the dense oracle of those numbers
is the truth, and what an output may differ from it by is its own rounding, half of `eps`.
"""

import copy
import json
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from refusals import refuses
from test_process import run
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model, State, categorical, param_groups

HALF = [torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
KINDS: dict[str, dict[str, Any]] = {
    "dplr": {"n_ssm": 3},
    "dplr legt": {"init": "legt"},
    "diag": {"variant": "diag", "init": "inv"},
    "both ways": {"bidirectional": True},
}


def build(dtype: torch.dtype | str | None, kind: str = "dplr", d_state: int = 8, **options: Any) -> S4Layer:
    torch.manual_seed(0)
    return S4Layer(3, d_state, dtype=dtype, **KINDS[kind], **options)


def stack(d_model: int = 8, **options: Any) -> S4Model:
    """A language model, in float32."""
    blocks = [S4Block(S4Layer(d_model, 8), d_ff=16), S4Block(S4Layer(d_model, 8, variant="diag"), norm="rms")]
    decoder = nn.Linear(d_model, 11)
    return S4Model(nn.Embedding(11, d_model), blocks, decoder, norm=nn.LayerNorm(d_model), **options)


def rounding(dtype: torch.dtype, room: float = 1e-5) -> float:
    """Of a number, relative to the largest one there is."""
    return torch.finfo(dtype).eps / 2 + room


def truth(layer: S4Layer, u: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Outputs and the last state of the dense recurrence, and the parameters it is of, differentiable."""
    numbers = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    y, last = oracle.forward(oracle.discrete(numbers, layer.discretization), u, x)
    return y, last, numbers


@pytest.mark.promise(
    "half precision",
    "a layer in bfloat16 or float16: outputs, states, kernel and gradients are those of its numbers",
)
@pytest.mark.parametrize("mode", ["fft", "scan", "auto"])
@pytest.mark.parametrize("kind", KINDS)
@DTYPES
def test_a_layer_is_the_dense_one_of_its_numbers(dtype: torch.dtype, kind: str, mode: str) -> None:
    layer = build(dtype, kind, mode=mode)
    u = torch.randn(2, 70, 3).to(dtype).requires_grad_()
    grad = torch.randn(2, 70, 3).to(dtype)
    v = u.detach().double().requires_grad_()
    want, _, numbers = truth(layer, v)
    y = layer(u)
    y.backward(grad)
    want.backward(grad.double())
    assert y.dtype == dtype
    oracle.close(y, want, rounding(dtype))
    for name, p, number in [("u", u, v), *((n, p, numbers[n]) for n, p in layer.named_parameters())]:
        assert p.grad.dtype == dtype, name  # type: ignore[union-attr]
        oracle.close(p.grad, number.grad, rounding(dtype, 1e-4), name)  # type: ignore[arg-type]
    kernel = layer.kernel(70)
    assert kernel.dtype == layer.dt.dtype == torch.float32
    assert layer.Lambda.dtype == torch.complex64
    want_kernel = oracle.kernel(oracle.discrete(numbers, layer.discretization), 70)
    oracle.close(kernel, want_kernel if layer.bidirectional else want_kernel[0], 1e-5)
    oracle.close(layer.dt, layer.log_dt.double().exp(), 1e-6)


@pytest.mark.promise(
    "half precision",
    "the state is float32 with parameters in half precision, in chunks and in steps, and never rounded",
)
@pytest.mark.parametrize("kind", ["dplr", "diag"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "trained"])
@DTYPES
def test_states_are_float32(dtype: torch.dtype, kept: bool, kind: str) -> None:
    layer = build(dtype, kind).train(not kept)
    u = torch.randn(2, 60, 3).to(dtype)
    want, last, _ = truth(layer, u)
    x, outputs = layer.initial_state(2), []
    with torch.set_grad_enabled(not kept):
        for t in range(20):
            y, x = layer.step(u[:, t], x)
            outputs.append(y[:, None])
        for piece in u[:, 20:].split([3, 37], 1):
            y, x = layer(piece, x, return_state=True)
            outputs.append(y)
    assert {y.dtype for y in outputs} == {dtype}
    assert x.dtype == torch.float32
    oracle.close(torch.cat(outputs, 1), want, rounding(dtype))
    oracle.close(x, last, 1e-5)


@pytest.mark.promise(
    "half precision",
    "a step in evaluation sees every change of a parameter in half precision, also under torch.compile",
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("unchecked")
def test_a_step_sees_a_changed_bit(compiled: bool) -> None:
    layer = build(torch.bfloat16).eval()
    u, x = torch.randn(2, 3).bfloat16(), torch.randn(2, 3, 8)
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager") if compiled else layer.step
    with torch.no_grad():
        for name in ("B", "D", "log_dt"):
            getattr(layer, name).view(torch.int16).flatten()[-1] += 1  # the next number
            y, after = step(u, x)
            want, last, _ = truth(layer, u[:, None], x)
            assert y.dtype == torch.bfloat16
            oracle.close(y, want[:, 0], rounding(torch.bfloat16))
            oracle.close(after, last, 1e-6)


COMPILE = """
import torch
from s4 import S4Layer
torch.manual_seed(0)
u = torch.randn(2, 40, 3).bfloat16()
layer, found = S4Layer(3, 8, dtype="bfloat16", mode="fft"), []
for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
    layer.zero_grad()
    y, after = run(u, layer.initial_state(2), return_state=True)
    (y.float().square().sum() + after.sum()).backward()
    found.append([y, after, *(p.grad for p in layer.parameters())])
for eager, compiled in zip(*found):
    assert eager.dtype == compiled.dtype
    bound = 1e-5 if eager.dtype == torch.float32 else 1.01 * torch.finfo(eager.dtype).eps
    assert (compiled - eager).abs().max() <= bound * eager.abs().max()
"""


@pytest.mark.promise(
    "half precision", "torch.compile with fullgraph=True of a layer in bfloat16, forward and backward"
)
def test_a_layer_compiles() -> None:
    """To one graph; what differs in the last digit of float32 may round to the next bfloat16."""
    run(COMPILE)


@pytest.mark.promise(
    "half precision",
    "dtype= and torch's default dtype: a seed draws the rounded float32 layer, and config() keeps the dtype",
)
@DTYPES
def test_a_seed_draws_the_same_numbers_rounded(dtype: torch.dtype) -> None:
    want = build(torch.float32).to(dtype).state_dict()
    name = str(dtype).removeprefix("torch.")
    made = [build(name), build(dtype)]
    torch.set_default_dtype(dtype)
    try:
        made.append(build(None))
        again = S4Layer(**json.loads(json.dumps(made[2].config())))
        Lambda = torch.tensor([-0.5 + 1001j, -0.5 + 2.002j], dtype=torch.complex128)
        own = S4Layer(3, 4, variant="diag", init=(Lambda, Lambda), dtype=torch.float32)
        listed = S4Layer(**json.loads(json.dumps(own.config())))  # all digits of what a file has
        y = made[0](torch.ones(1, 9, 3, dtype=dtype))
    finally:
        torch.set_default_dtype(torch.float32)
    oracle.close(y, truth(made[0], torch.ones(1, 9, 3))[0], rounding(dtype))
    assert again.config()["dtype"] == name
    assert {p.dtype for p in again.parameters()} == {dtype}
    torch.testing.assert_close(listed.state_dict()["A_imag"], torch.tensor([[1001.0, 2.002]]))
    for layer in made:
        for key, value in layer.state_dict().items():
            assert torch.equal(value, want[key]), key


@pytest.mark.promise(
    "half precision",
    "parameters of several dtypes in one layer, such as dt in float32 and the rest in bfloat16",
)
@pytest.mark.parametrize("fine", [("log_dt",), ("log_dt", "A_imag"), ("D",)], ids=str)
def test_dtypes_may_differ_within_a_layer(fine: tuple[str, ...]) -> None:
    exact = build(torch.float32)
    layer = copy.deepcopy(exact).bfloat16()
    for name in fine:
        getattr(layer, name).data = getattr(exact, name).data.clone()
    u = torch.randn(2, 50, 3).bfloat16()
    want, last, numbers = truth(layer, u)
    y, x = layer(u, return_state=True)
    y.float().square().sum().backward()
    oracle.close(y, want, rounding(torch.bfloat16))
    oracle.close(x, last, 1e-5)
    assert (layer.dt.dtype, layer.Lambda.dtype) == (torch.float32, torch.complex64)
    assert torch.equal(numbers["log_dt"], layer.log_dt.double())
    optimizer = torch.optim.AdamW(param_groups(layer, lr=0.1, ssm_lr=0.1))
    before = copy.deepcopy(layer.state_dict())
    optimizer.step()
    for name, p in layer.named_parameters():
        assert p.dtype == p.grad.dtype == (torch.float32 if name in fine else torch.bfloat16)  # type: ignore[union-attr]
        assert not torch.equal(p, before[name]), name


@pytest.mark.promise(
    "half precision",
    "S4 layers kept in float32 in a model in bfloat16: `layer.float()`; its inputs and outputs stay bfloat16",
)
def test_layers_in_float32_within_a_model_in_bfloat16() -> None:
    model = stack().bfloat16()
    for module in model.modules():
        if isinstance(module, S4Layer):
            module.float()
    tokens = torch.randint(11, (2, 12))
    y, state = model(tokens, return_state=True)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert state.total.dtype == torch.float32
    for name, p in model.named_parameters():
        kind = torch.float32 if ".layer." in name else torch.bfloat16
        assert p.dtype == p.grad.dtype == kind, name  # type: ignore[union-attr]
    groups = [
        {name: group[name] for name in ("name", "lr", "weight_decay")} for group in param_groups(model, 1e-2)
    ]
    assert groups == [{n: g[n] for n in ("name", "lr", "weight_decay")} for g in param_groups(stack(), 1e-2)]


@pytest.mark.promise(
    "half precision",
    "blocks and models in half precision: forward, chunks, step, pooling, lengths, generate and stream",
)
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
@DTYPES
def test_models(dtype: torch.dtype, pooling: str) -> None:
    model = stack(pooling=pooling).to(dtype).eval()
    tokens = torch.randint(11, (2, 12))
    # Outside the S4 layers it is torch's own arithmetic of half precision, some roundings an output.
    bound = 8 * rounding(dtype)
    with torch.no_grad():
        whole, _ = model(tokens, return_state=True)
        _, state = model(tokens[:, :5], return_state=True)
        for t in range(5, 12):
            y, state = model.step(tokens[:, t], state)
        ragged = model(tokens, lengths=torch.tensor([12, 7]))
        oracle.close(ragged[0], whole[0], bound)
        oracle.close(whole, copy.deepcopy(model).float()(tokens), bound)
    assert {whole.dtype, y.dtype, ragged.dtype} == {dtype}
    assert {x.dtype for x in (*state.layers, state.total, *model.initial_state(2)[:1][0])} == {torch.float32}
    oracle.close(y, whole[:, -1] if pooling == "none" else whole, bound)
    if pooling == "none":
        drawn = model.generate(tokens, 4, categorical(0.5, top_k=3), lengths=torch.tensor([12, 7]))
        assert drawn.shape == next(model.stream(tokens))[:, None].expand(-1, 4).shape


@pytest.mark.promise(
    "half precision",
    "autocast with parameters in bfloat16: the state is float32, products are bfloat16 in mode='scan' alone",
)
@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_autocast(mode: str) -> None:
    layer = build(torch.bfloat16, mode=mode)
    u = torch.randn(2, 100, 3).bfloat16()
    want, last, _ = truth(layer, u)
    with torch.autocast("cpu", torch.bfloat16):
        y, x = layer(u, return_state=True)
    assert (y.dtype, x.dtype) == (torch.bfloat16, torch.float32)
    oracle.close(y, want, 2e-2 if mode == "scan" else rounding(torch.bfloat16))
    oracle.close(x, last, 2e-2 if mode == "scan" else 1e-5)


LARGE: dict[str, dict[str, Any]] = {
    "dplr legs": {"init": "legs"},
    "dplr legt": {"init": "legt"},
    "diag legs": {"variant": "diag", "init": "legs"},
    "diag inv": {"variant": "diag", "init": "inv"},
}


@pytest.mark.promise(
    "half precision",
    "float16 where Lambda passes 65504: init legs, legt and inv with d_state=456 or more",
    supported=False,
)
@pytest.mark.parametrize("case", LARGE)
def test_float16_ends_where_lambda_passes_it(case: str) -> None:
    told = r"A_imag .*init='(legs|legt|inv)' and d_state=456 reaches 66\d+, and float16 ends at 65504: use bf"
    options = LARGE[case]
    refuses(ValueError, told, lambda: S4Layer(1, 456, **options, dtype="float16"))
    refuses(ValueError, told, lambda: S4Layer(1, 456, **options, dtype=torch.float16, device="meta"))
    layer = S4Layer(1, 456, **options)
    before = copy.deepcopy(layer.state_dict())
    refuses(ValueError, told, layer.half)
    refuses(ValueError, told, lambda: layer.to(torch.float16))
    for name, p in layer.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])
    assert layer.bfloat16().kernel(3).isfinite().all()
    S4Layer(1, 448, **options, dtype="float16")


@pytest.mark.promise(
    "half precision", "float16 where training has taken a parameter past 65504", supported=False
)
def test_float16_ends_where_a_trained_number_passes_it() -> None:
    model = stack()
    with torch.no_grad():
        model.blocks[1].layer.C[0, 0, 0, 0] = 7e4
    refuses(ValueError, r"C of a layer .*7e\+04|C of a layer .*70000", model.half)
    own = torch.tensor([-1e5 + 1j, -1 + 9e4j], dtype=torch.complex128)
    refuses(
        ValueError,
        "A_imag of a layer with an init of one's own.*90000",
        lambda: S4Layer(
            1, 4, variant="diag", init=(own, torch.ones(2, dtype=torch.complex128)), dtype="float16"
        ),
    )


@pytest.mark.promise(
    "half precision", "a state in half precision, which a step would round again and again", supported=False
)
@DTYPES
def test_a_state_is_never_rounded(dtype: torch.dtype) -> None:
    layer, model, tokens = build(dtype), stack().to(dtype), torch.zeros(2, 4, dtype=torch.long)
    u, x = torch.zeros(2, 5, 3, dtype=dtype), torch.zeros(2, 3, 8, dtype=dtype)
    told = f"state.* must have dtype torch.float32, got {dtype}: a state is never.*cast_forward_inputs=False"
    state = model.initial_state(2).to(dtype)
    assert isinstance(state, State)
    calls: list[Callable[[], Any]] = [
        lambda: layer(u, x),
        lambda: layer.step(u[:, 0], x),
        lambda: model(tokens, state),
        lambda: model.step(tokens[:, 0], state),
    ]
    for call in calls:
        refuses(TypeError, told, call)


@pytest.fixture
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of Hugging Face's, around ours, and where it was saved in float32."""
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):  # type: ignore[misc]
        model_type = "s4-of-a-test"

    class Model(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.stack = stack()
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, S4Layer):
                module.reset_parameters()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.stack(tokens)  # type: ignore[no-any-return]

    folder = tmp_path_factory.mktemp("pretrained")
    model = Model(Config())
    model.save_pretrained(folder)
    return Model, model, folder


@pytest.mark.promise(
    "half precision",
    "Hugging Face's from_pretrained(dtype=...), also with `_keep_in_fp32_modules_strict` of some parameters",
)
@pytest.mark.parametrize("kept", [[], ["log_dt"]], ids=["all", "but dt"])
@DTYPES
def test_from_pretrained(pretrained: Any, dtype: torch.dtype, kept: list[str]) -> None:
    Model, saved, folder = pretrained
    Model._keep_in_fp32_modules_strict = kept
    loaded = Model.from_pretrained(folder, dtype=dtype)
    for name, p in loaded.named_parameters():
        kind = torch.float32 if any(part in name for part in kept) else dtype
        assert p.dtype == kind, name
        assert torch.equal(p, saved.get_parameter(name).to(kind)), name
    tokens = torch.randint(11, (2, 9))
    oracle.close(loaded(tokens), saved(tokens), 0.1)
