"""Blocks, models and all public methods on a device that refuses float64: see no_float64.py."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from no_float64 import LAYERS, MPS, B, Device, H, L, N, back, build, sent, truth
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from s4 import S4Block, S4Layer, S4Model, State, categorical, hippo, info, param_groups


@pytest.mark.promise("devices without float64", "made on the device, by device= or as the default one")
@pytest.mark.parametrize("name", LAYERS)
def test_made_there(name: str, mps: Device) -> None:
    own = hippo.diag("lin", N) if "diag" in name else hippo.dplr("fout", N)
    on_it = tuple(t.to(torch.complex64).to("mps") for t in own)
    with torch.device("mps"):
        layers = [
            S4Layer(H, N, **LAYERS[name]),
            S4Layer(H, N, variant=LAYERS[name].get("variant", "dplr"), init=on_it),
            S4Layer(H, N, variant=LAYERS[name].get("variant", "dplr"), init=tuple(t.numpy() for t in own)),
        ]
        block = S4Block(S4Layer(H, N, **LAYERS[name]))
        y = block(torch.randn(B, L, H))
        layers[0].kernel(9)
    layers += [S4Layer(H, N, **LAYERS[name], device="mps"), block.layer]
    cpu = S4Layer(H, N, **LAYERS[name])
    assert back(y).isfinite().all()
    for layer in layers:
        layer.reset_parameters()
        assert all(p.device == MPS for p in layer.parameters())
        assert layer.dt.device == layer.Lambda.device == layer.D.device
    for layer in (layers[0], layers[3]):
        oracle.close(back(layer.Lambda), cpu.Lambda, 1e-6)
        layer.load_state_dict(cpu.state_dict())
        oracle.close(back(layer.C.detach()), cpu.C, 0)


def stack(pooling: str = "none") -> S4Model:
    blocks = [
        S4Block(S4Layer(8, N, **LAYERS[name]), norm=norm)
        for name, norm in (("dplr", "batch"), ("diag", "rms"))
    ]
    return S4Model(nn.Embedding(7, 8), blocks, nn.Linear(8, 7), norm=nn.LayerNorm(8), pooling=pooling)


@pytest.mark.promise(
    "devices without float64", "blocks and models: pooling, lengths, states, training with AdamW"
)
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_model_trains(pooling: str, mps: Device) -> None:
    """As on the CPU, from the same parameters."""
    cpu = stack(pooling)
    there = stack(pooling)
    there.load_state_dict(cpu.state_dict())
    there.to("mps")
    tokens, lengths = torch.randint(7, (3, 20)), torch.tensor([20, 5, 11])
    losses = []
    for it, u, n in ((cpu, tokens, lengths), (there, tokens.to("mps"), lengths.to("mps"))):
        optimizer = torch.optim.AdamW(param_groups(it, lr=1e-2))
        losses.append([])
        for _ in range(4):
            loss = it(u, lengths=n).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        it.eval()
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    with torch.no_grad():
        y, state = there(tokens.to("mps"), lengths=lengths.to("mps"), return_state=True)
        z, after = there.step(tokens[:, 0].to("mps"), state)
        wanted, before = cpu(tokens, lengths=lengths, return_state=True)
        want, _ = cpu.step(tokens[:, 0], before)
    # Adam's first steps have the size of the rate, whatever the gradient's.
    oracle.close(back(y), wanted, 1e-2)
    oracle.close(back(z), want, 1e-2)
    both = State.cat([after.select([0, 2]), after.reset([1]).detach()])
    assert {t.device for t in (*both.layers, both.total, both.length)} == {MPS}
    assert back(both.length).tolist() == [21, 12, 21, 0, 12]
    assert after.to("cpu").total.device.type == "cpu"


@pytest.mark.promise("devices without float64", "generate, greedy and drawn")
def test_generation(mps: Device) -> None:
    cpu, tokens = stack().eval(), torch.randint(7, (3, 12))
    want = cpu.generate(tokens, 6)
    there = cpu.to("mps")
    given = tokens.to("mps")
    assert torch.equal(back(there.generate(given, 6)), want)
    lengths = torch.tensor([12, 3, 7]).to("mps")
    for sample in (categorical(), categorical(0.5, top_k=3, top_p=0.9), categorical(1e-300)):
        drawn = back(there.generate(given, 6, sample, lengths=lengths, stop=3))
        assert set(drawn.flatten().tolist()) <= set(range(7))
    assert torch.equal(back(there.generate(given, 6, categorical(1e-300))), want)
    logits = torch.tensor([[0.0, 1.0, -torch.inf]]).log_softmax(-1).expand(20000, 3)
    share = back(categorical()(logits.to("mps"))).float().mean()
    assert abs(share - 0.7311) < 0.02  # six deviations


# Of each class, its public methods; each is called.
CALLS: dict[type, dict[str, Callable[[Any], Any]]] = {
    S4Layer: {
        "forward": lambda it: it(sent(B, L, H).half()),
        "step": lambda it: it.step(sent(B, H), it.initial_state(B)),
        "initial_state": lambda it: it.initial_state(B),
        "states": lambda it: it.states(sent(B, L, H), torch.tensor([[0, L - 1]] * B).to("mps")),
        "kernel": lambda it: it.kernel(L),
        "dense": lambda it: it.dense()[0].to(torch.float32).to("mps"),
        "dt": lambda it: it.dt,
        "Lambda": lambda it: it.Lambda,
        "ssm_parameters": lambda it: it.ssm_parameters(),
        "reset_parameters": lambda it: it.reset_parameters(),
        "config": lambda it: S4Layer(**it.config()).to("mps").D,
        "from_config": lambda it: it.from_config(it.config()).to("mps").D,
        "extra_repr": lambda it: it.extra_repr(),
        "train": lambda it: it.eval().train().D,
    },
    S4Block: {
        "config": lambda it: it.config()["norm"],
        "from_config": lambda it: it.from_config(it.config()).to("mps").layer.D,
        "forward": lambda it: it(sent(B, L, 8)),
        "step": lambda it: it.step(sent(B, 8), it.initial_state(B)),
        "initial_state": lambda it: it.initial_state(B),
    },
    S4Model: {
        "config": lambda it: it.config()["pooling"],
        "from_config": lambda it: it.from_config(it.config()).to("mps").encoder.weight,
        "forward": lambda it: it(torch.zeros(B, L).long().to("mps"), return_state=True),
        "step": lambda it: it.step(torch.zeros(B).long().to("mps"), it.initial_state(B)),
        "initial_state": lambda it: it.initial_state(B),
        "generate": lambda it: it.generate(torch.zeros(B, L).long().to("mps"), 2),
        "stream": lambda it: next(it.stream(torch.zeros(B, L).long().to("mps"))),
    },
}


@pytest.mark.promise("devices without float64", "every public method of layer, block and model")
def test_every_public_method(mps: Device) -> None:
    """Under autocast, too; a method that is new has to come into the table."""
    there = stack().to("mps")
    things = {S4Layer: build("dplr", mode="scan"), S4Block: there.blocks[0], S4Model: there.eval()}
    for kind, calls in CALLS.items():
        assert {name for name in vars(kind) if not name.startswith("_")} == calls.keys()
        for name, call in calls.items():
            for found in tree_leaves(call(things[kind])):
                assert not isinstance(found, Tensor) or back(found).isfinite().all(), name
    with torch.autocast("mps", torch.bfloat16):
        layer, u = things[S4Layer], sent(B, L, H)
        y = layer(u)
    oracle.close(back(y), truth(layer, u)[0], 0.02)
    assert info.report()
