"""Other libraries: a model in their hands does what it does in one's own."""

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from stacks import D_MODEL, L, build, inputs, same, trained
from torch import Tensor, nn

from s4 import S4Layer, S4Model, param_groups

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def mean(y: Tensor) -> Tensor:
    """What a model of reals takes next."""
    return y[..., : inputs(1).shape[-1]]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What accelerate, and the Trainer through it, sets for the whole process."""
    with mock.patch.dict(os.environ):
        yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def u() -> Tensor:
    return inputs(4)


def away(model: S4Model, how: str, folder: Path) -> S4Model:
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(model)
    if how == "cpu":
        accelerate.cpu_offload(model, "cpu")
    elif how == "disk":
        accelerate.disk_offload(model, str(folder), "cpu")
    else:
        places = {"encoder": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "norm": "disk", "decoder": "cpu"}
        whole = ["S4Block"] if how == "blocks" else None  # which a block's own `forward` brings all of
        accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(folder), preload_module_classes=whole
        )
    assert model.blocks[1].layer.D.is_meta
    return model


@pytest.mark.promise(
    "other libraries",
    "accelerate's `cpu_offload`, `disk_offload` and `dispatch_model`, `generate` and `step` with them",
)
@pytest.mark.parametrize("how", ["cpu", "disk", "parts", "blocks"])
def test_offloaded_by_accelerate(u: Tensor, how: str, tmp_path: Path) -> None:
    """Parameters come when a module is called, and are on meta else; a state is where it is used."""
    model = trained("mixed", "final norm", "none")
    other = away(model, how, tmp_path)
    with torch.no_grad():
        same(other.initial_state(4), model.initial_state(4), 0)
        for got, want in zip(
            (
                *other(u, other.initial_state(4), return_state=True),
                *other.step(u[:, 0], other.initial_state(4)),
            ),
            (*model(u, return_state=True), *model.step(u[:, 0], model.initial_state(4))),
            strict=True,
        ):
            same(got, want) if isinstance(got, tuple) else oracle.close(got, want, 1e-9)
        lengths = torch.tensor([L, 1, 5, 9])
        made = [m.generate(u, 5, mean, lengths=lengths) for m in (other, model)]
        oracle.close(*made, 1e-9)
        part, its = (m.blocks[1] if how == "blocks" else m.blocks[1].layer for m in (other, model))
        x, ones = part.initial_state(4), torch.ones(4, 3, D_MODEL, dtype=torch.float64)
        for _ in range(3):
            y, x = part.step(ones[:, 0], x)
        oracle.close(y, its(ones, return_state=True)[0][:, -1], 1e-9)
    assert other.blocks[1].layer.D.is_meta


@pytest.mark.promise(
    "other libraries",
    "accelerate's `Accelerator`, also with mixed precision, and `generate` of what it prepared",
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_by_accelerate(u: Tensor, precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, u = build("mixed", "final norm").float(), u.float()
    plain = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(param_groups(model, lr=0.1)))
    own = torch.optim.SGD(param_groups(plain, lr=0.1))
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    for _ in range(2):
        accelerator.backward(prepared(u).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        with half:
            y = plain(u)
        y.float().square().mean().backward()
        own.step()
        own.zero_grad()
    for (name, p), w in zip(model.named_parameters(), plain.parameters(), strict=True):
        oracle.close(p, w, 1e-6, name)
    with torch.no_grad(), half:
        want = plain.eval().generate(u, 3, lambda y: mean(y).float())
    oracle.close(prepared.eval().generate(u, 3, mean), want, 0.02)


# Hugging Face


def hugged() -> Any:
    """A model of their kind around ours."""
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "s4-of-the-tests"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.body = build("mixed", "final norm").to(torch.get_default_dtype())
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """As the modules have it."""

        def forward(self, u: Tensor, labels: Tensor) -> dict[str, Tensor]:
            y = self.body(u)
            return {"loss": nn.functional.mse_loss(y.float(), labels), "logits": y}

    return Model(Config())


@pytest.mark.promise(
    "other libraries",
    "Hugging Face's `Trainer` in bf16, eager and with `torch_compile`; `from_pretrained` in bfloat16, too",
)
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_trained_by_hugging_face(u: Tensor, compiled: bool, tmp_path: Path) -> None:
    """As a loop of one's own under autocast does, from the same sequence at every step."""
    transformers = pytest.importorskip("transformers")
    model = hugged()
    plain, first = copy.deepcopy(model), copy.deepcopy(model)
    data = [{"u": u[0].float(), "labels": torch.ones(L, 5)}]
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, bf16=True, max_steps=3, max_grad_norm=0, report_to=[],
        save_strategy="no", disable_tqdm=True, torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, constant))
    trainer.train()
    own = torch.optim.SGD(param_groups(plain, lr=0.1))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain(**{name: t[None] for name, t in data[0].items()})["loss"]
        loss.backward()
        own.step()
        own.zero_grad()
    for (name, p), w, before in zip(
        model.named_parameters(), plain.parameters(), first.parameters(), strict=True
    ):
        # What was rounded to bfloat16, 2^-8, in other places moves the parameters by as much less or more.
        moved = (w - before).abs().max()
        assert (p - w).abs().max() <= 1e-6 * w.abs().max() + moved / 64, name
    assert not torch.equal(model.body.encoder.weight, first.body.encoder.weight)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), back.parameters(), strict=True))
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(
        torch.equal(p.bfloat16(), q) for p, q in zip(model.parameters(), half.parameters(), strict=True)
    )
    y = half(u.bfloat16(), torch.zeros(1))["logits"]
    assert torch.equal(y, model.bfloat16()(u.bfloat16(), torch.zeros(1))["logits"])


# torchao


@pytest.mark.promise(
    "other libraries",
    "torchao's int8 weights, with and without dynamic int8 inputs: S4 layers stay as they are",
)
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantised_by_torchao(u: Tensor, config: str) -> None:
    """Each linear map within the rounding of its weights and inputs, everything else the same numbers."""
    quantization = pytest.importorskip("torchao.quantization")
    model, u = trained("mixed", "final norm", "none").float(), u.float()
    other = copy.deepcopy(model)
    quantization.quantize_(other, getattr(quantization, config)())
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, part in other.named_modules():
        if isinstance(part, nn.Linear | S4Layer):
            part.register_forward_hook(lambda part, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        y = other(u)
        for name, (x, got) in seen.items():
            part = model.get_submodule(name)
            if isinstance(part, S4Layer):
                assert torch.equal(got, part(x))
                continue
            # Of 127 steps to the largest number of a row, in weights and, if they are, in inputs.
            step = x.abs().amax(-1, keepdim=True) / 127 if "Dynamic" in config else torch.zeros(1)
            w = part.weight.abs()
            bound = x.abs().sum(-1, keepdim=True) * w.amax(1) / 127 + step * w.sum(1)
            assert ((got - part(x)).abs() <= bound + 1e-5).all(), name
        assert len(seen) == 6
        stepped, _ = other.step(u[:, 0], other.initial_state(4))
        oracle.close(stepped, y[:, 0], 0.05)
    kinds = {name: type(p.data) is Tensor for name, p in other.named_parameters()}
    assert [name for name, plain in kinds.items() if not plain] == [
        "encoder.weight", "blocks.0.mixer.0.weight", "blocks.1.mixer.0.weight", "decoder.0.weight",
    ]  # fmt: skip
