"""The live page computes what s4 computes, and serves mouse, finger and keyboard on every screen."""

import ast
import re
from collections.abc import Callable

import memory_matrices as figure
import numpy as np
import pytest
import torch
from pages import ROOT
from playwright.sync_api import Page
from scipy.linalg import expm, solve_continuous_lyapunov

from s4 import S4Layer, hippo

CHOICES = [f"{variant} {init}" for variant, init in figure.CHOICES]
STEP_SIZES = (0.001, 0.0173, 0.1)
L = 300


def dense(choice: str, N: int) -> tuple[np.ndarray, np.ndarray]:
    """A (N, N) and B (N,) in continuous time, of the state as the page has it."""
    variant, init = choice.split()
    if variant == "dplr":
        return tuple(part.numpy() for part in hippo.transition(init, N))
    Lambda, B = (part.numpy() for part in hippo.diag(init, N))
    re, im = np.diag(Lambda.real), np.diag(Lambda.imag)
    return np.block([[re, -im], [im, re]]), np.concatenate([B.real, B.imag])


def discrete(choice: str, N: int, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """Abar and Bbar, by a solve or by the exponential of a matrix."""
    A, B = dense(choice, N)
    if choice.startswith("dplr"):
        left = np.eye(N) - dt / 2 * A
        return np.linalg.solve(left, np.eye(N) + dt / 2 * A), np.linalg.solve(left, dt * B)
    both = expm(dt * np.block([[A, B[:, None]], [np.zeros((1, N + 1))]]))
    return both[:N, :N], both[:N, N]


def states(choice: str, N: int, dt: float, u: np.ndarray) -> np.ndarray:
    """The state after each input, (L, N)."""
    Abar, Bbar = discrete(choice, N, dt)
    x, found = np.zeros(N), []
    for value in u:
        x = Abar @ x + Bbar * value
        found.append(x)
    return np.array(found)


def past(choice: str, N: int, dt: float, x: np.ndarray, count: int) -> np.ndarray:
    """What the state x remembers of the last `count` inputs, newest first."""
    variant, init = choice.split()
    if init in hippo.names("dplr"):
        state = torch.from_numpy(x)
        lags = (torch.arange(count, dtype=torch.float64) + 0.5) * dt
        state = state if variant == "dplr" else hippo.from_modes(init, state)
        return hippo.reconstruct(init, state, lags).numpy()
    A, B = dense(choice, N)  # the least energy, Gramian G: A G + G A^T + B B^T = 0
    impulse = np.zeros(count)
    impulse[0] = 1
    rows = states(choice, N, dt, impulse) / dt
    G = solve_continuous_lyapunov(A, -np.outer(B, B))
    return rows @ np.linalg.lstsq(G, x, rcond=1e-12)[0]


def close(found: object, truth: np.ndarray, error: float = 1e-5) -> bool:
    return np.abs(np.array(found) - truth).max() <= error * max(1, np.abs(truth).max())


ON_PAGE = """([choice, N, dt, u]) => {
    const system = makeSystem(choice, N, dt), left = responses(system, u.length);
    const rows = pastRows(system, u.length, left), states = runStates(system, Float64Array.from(u));
    const x = states.slice(-N), C = Float64Array.from({length: N}, (_, n) => Math.cos(n));
    return [x, matrixVector(rows, x), kernelOf(C, left)].map((numbers) => Array.from(numbers));
}"""


@pytest.mark.parametrize("choice", CHOICES)
def test_it_is_the_recurrence_and_the_reconstruction(choice: str, visit: Callable[..., Page]) -> None:
    page = visit("memory/")
    u = np.sin(0.05 * np.arange(L)) + np.random.default_rng(0).normal(size=L)
    for N in figure.SIZES:
        for dt in STEP_SIZES:
            x, remembered, kernel = page.evaluate(ON_PAGE, [choice, N, dt, u.tolist()])
            truth = states(choice, N, dt, u)[-1]
            assert close(x, truth), (N, dt)
            windowed = choice.split()[1] in ("legt", "fout")
            assert len(remembered) == (min(L, int(1 / dt + 0.5)) if windowed else L)
            assert close(remembered, past(choice, N, dt, truth, len(remembered))), (N, dt)
            impulse = np.eye(1, L)[0]
            assert close(kernel, states(choice, N, dt, impulse) @ np.cos(np.arange(N))), (N, dt)


@pytest.mark.parametrize("choice", CHOICES)
def test_it_is_the_state_of_a_layer(choice: str, visit: Callable[..., Page]) -> None:
    variant, init = choice.split()
    N, dt = 16, 0.02
    layer = S4Layer(1, N, variant=variant, init=init, dtype="float64", dt_min=dt, dt_max=dt)
    u = torch.randn(1, L, 1, dtype=torch.float64)
    state = layer(u, return_state=True)[1][0, 0].detach()
    x, _, _ = visit("memory/").evaluate(ON_PAGE, [choice, N, dt, u.flatten().tolist()])
    if variant == "dplr":
        state = hippo.from_modes(init, state)
    # A layer keeps Re Lambda at -1e-4 or below, where that of legt and fout is 0.
    assert close(x, state.numpy(), 1e-4 if init in ("legt", "fout") else 1e-6)


def test_the_matrices_are_those_of_the_library() -> None:
    """docs/assets/memory/matrices.js is what docs/figures/memory_matrices.py writes, but for rounding."""
    kept = figure.read()
    assert set(kept) == set(CHOICES)
    for choice, sizes in kept.items():
        assert set(sizes) == {str(N) for N in figure.SIZES}
        for N, parts in sizes.items():
            for name, truth in figure.matrices(*choice.split(), int(N)).items():
                assert np.allclose(parts[name], truth.flatten(), rtol=1e-9, atol=1e-9), (choice, N, name)


SHOWN = """() => {
    const {signal, now, system} = memory;
    const past = Array.from(memory.remembered());
    return {signal: Array.from(signal), now, past, choice: system.choice, N: system.N, dt: system.dt};
}"""


def right(page: Page) -> dict:
    """What the page shows, after a check that it is the memory of the signal that it shows."""
    shown = page.evaluate(SHOWN)
    u = np.array(shown["signal"][: shown["now"] + 1])
    x = states(shown["choice"], shown["N"], shown["dt"], u)[-1]
    assert close(shown["past"], past(shown["choice"], shown["N"], shown["dt"], x, len(shown["past"])))
    return shown


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_is_shown(choice: str, visit: Callable[..., Page]) -> None:
    page = visit("memory/")
    page.get_by_label("Variant and init").select_option(choice)
    page.get_by_label("State size N").select_option("8")
    page.get_by_label("Step size").fill("-2")
    page.get_by_label("Now").fill("350")
    for preset in ("sine", "chirp", "steps", "spikes", "noise", "silence", "smooth noise"):
        page.get_by_label("Signal", exact=True).select_option(preset)
        shown = right(page)
        assert (shown["choice"], shown["N"], shown["dt"], shown["now"]) == (choice, 8, 0.01, 350)
        assert (max(map(abs, shown["signal"])) > 0.3) == (preset != "silence")
    missed = page.locator("#memory-missed").text_content()
    assert missed.startswith("Over the last 100 steps the memory is off by 0.")


def test_the_figure_says_what_the_page_prints(visit: Callable[..., Page]) -> None:
    """Of the sine, with all else as it begins."""
    printed = re.search(r"^{'legs'.*}$", (ROOT / "docs" / "memory.md").read_text(), re.MULTILINE)
    assert printed
    page = visit("memory/")
    page.get_by_label("Signal", exact=True).select_option("sine")
    for init, missed in ast.literal_eval(printed[0]).items():
        page.get_by_label("Variant and init").select_option(f"dplr {init}")
        says = f"Over the last 200 steps the memory is off by {missed:.3f},"
        page.locator("#memory-missed").filter(has_text=says).wait_for()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_mouse_draws(width: int, scheme: str, visit: Callable[..., Page]) -> None:
    page = visit("memory/", width=width, color_scheme=scheme, device_scale_factor=2)
    page.get_by_label("Signal", exact=True).select_option("silence")
    canvas = page.locator("#memory-signal")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert canvas.evaluate("c => c.width") == round(2 * box["width"])  # sharp
    at = [(box["x"] + box["width"] * a, box["y"] + box["height"] * b) for a, b in [(0.2, 0.5), (0.6, 0.1)]]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=5)
    page.mouse.up()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 5)  # with no button: nothing
    drawn = np.array(right(page)["signal"])
    there = np.flatnonzero(drawn)
    assert 40 < there[0] < 110
    assert 270 < there[-1] < 340
    assert (np.diff(drawn[there]) >= 0).all()
    assert drawn.max() > 1


def test_a_finger_draws(visit: Callable[..., Page]) -> None:
    page = visit("memory/", width=400, has_touch=True, is_mobile=True)
    page.get_by_label("Signal", exact=True).select_option("silence")
    page.locator("#memory-signal").tap(position={"x": 200, "y": 60})
    assert np.count_nonzero(right(page)["signal"]) == 1


def test_a_second_finger_waits(visit: Callable[..., Page]) -> None:
    page = visit("memory/", width=400, has_touch=True, is_mobile=True)
    page.get_by_label("Signal", exact=True).select_option("silence")
    canvas = page.locator("#memory-signal")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    touch = page.context.new_cdp_session(page)

    def fingers(kind: str, *at: tuple[int, int]) -> None:
        points = [{"id": k, "x": box["x"] + x, "y": box["y"] + y} for k, (x, y) in enumerate(at)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    fingers("touchStart", (100, 60))
    fingers("touchStart", (100, 60), (300, 100))
    fingers("touchMove", (110, 60), (320, 100))
    fingers("touchEnd")
    drawn = np.flatnonzero(right(page)["signal"])
    assert 0 < drawn[-1] - drawn[0] < 40
    canvas.tap(position={"x": 300, "y": 60})  # the next one draws again
    assert np.flatnonzero(right(page)["signal"])[-1] > drawn[-1] + 100


def test_the_keyboard_draws_and_moves(visit: Callable[..., Page]) -> None:
    page = visit("memory/")
    page.get_by_label("Signal", exact=True).select_option("silence")
    page.get_by_label("Signal", exact=True).focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "memory-signal"
    page.keyboard.press("Control+ArrowUp")  # the browser's
    for key in ["ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowDown"]:
        page.keyboard.press(key)
    drawn = np.array(right(page)["signal"])
    assert np.flatnonzero(drawn).tolist() == [246, 247, 248, 249, 250]
    assert np.allclose(drawn[246:251], 0.2)
    assert page.get_by_role("status").text_content() == "Pen at step 248, value 0.2"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_by_role("button", name="Pause").is_visible()
    page.wait_for_function("memory.now > 405")
    page.keyboard.press("Enter")
    before = right(page)["now"]
    page.wait_for_timeout(100)
    assert page.evaluate("memory.now") == before


def test_it_plays_to_the_end_and_from_the_start(visit: Callable[..., Page]) -> None:
    page = visit("memory/")
    page.get_by_label("Speed").select_option("fast")
    page.get_by_label("Now").fill("480")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Play").wait_for()  # again, at the end
    assert page.evaluate("memory.now") == 511
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("memory.now > 2 && memory.now < 300")
    page.get_by_role("button", name="Pause").click()


def test_it_plays_on_from_where_it_is_put(visit: Callable[..., Page]) -> None:
    page = visit("memory/")
    page.get_by_label("Now").fill("100")
    page.get_by_label("Speed").select_option("slow")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("memory.now > 101")
    page.get_by_label("Now").fill("300")
    page.wait_for_function("memory.now > 301")
    page.get_by_role("button", name="Pause").click()
    assert 300 < page.evaluate("memory.now") < 400


def test_the_kernel_is_that_of_the_chosen_output(visit: Callable[..., Page]) -> None:
    page = visit("memory/")
    page.get_by_label("Step size").fill("-2")
    left = states("dplr legs", 16, 0.01, np.eye(1, 512)[0])
    rows = np.array([past("dplr legs", 16, 0.01, e, 512) for e in np.eye(16)]).T
    output, which = page.get_by_label("The output reads"), page.get_by_label("Which")
    for option, number, C in [("one", 3, np.eye(16)[3]), ("sum", 3, np.ones(16)), ("recall", 50, rows[50])]:
        output.select_option(option)
        if option != "sum":
            which.fill(str(number))
        assert which.is_disabled() == (option == "sum")
        assert close(page.evaluate("Array.from(memory.kernel())"), left @ C)
    page.get_by_label("Variant and init").select_option("dplr legt")  # a window: fewer steps to choose from
    assert which.get_attribute("max") == "99"


def test_the_colours_follow_the_scheme(visit: Callable[..., Page]) -> None:
    """The signal is dark ink on a light page and light ink on a dark one, also after a change."""
    page = visit("memory/", color_scheme="light")
    ink = "() => signalPlot.colour('truth')"
    page.wait_for_function("signalPlot.pen")
    light = page.evaluate(ink)
    page.wait_for_timeout(300)
    picture = "document.getElementById('memory-signal').toDataURL()"
    before = page.evaluate(picture)
    page.get_by_title("Dark").click()
    page.wait_for_function(f"before => {picture} !== before", arg=before)
    assert page.evaluate(ink) != light
