// The live page: its controls, the drawing of a signal, and what is shown at a moment of it.
"use strict";

const LENGTH = 512; // steps of the signal

const memory = {
  signal: SIGNALS["smooth noise"](LENGTH),
  now: 400, // the last step that the state has seen
  pen: 256, // where the keyboard draws
  playing: false,

  /** Make everything that depends on the choice, N and dt. */
  choose(choice, N, dt) {
    this.system = makeSystem(choice, N, dt);
    this.responses = responses(this.system, LENGTH);
    this.rows = pastRows(this.system, LENGTH, this.responses);
    this.read();
  },

  /** Run the recurrence over the signal. */
  read() {
    this.states = runStates(this.system, this.signal);
    this.largest = reach(this.states);
  },

  /** The state after step `now`. */
  state() {
    const { N } = this.system;
    return this.states.slice(this.now * N, (this.now + 1) * N);
  },

  /** What the state holds of the past: at j about the input j steps before `now`. */
  remembered() {
    const known = Math.min(this.rows.length / this.system.N, this.now + 1);
    return matrixVector(this.rows.subarray(0, known * this.system.N), this.state());
  },

  /** How much an input of j steps ago counts. */
  weight(j) {
    const s = (j + 0.5) * this.system.dt;
    return ["legt", "fout"].includes(this.system.init) ? Number(s <= 1) : Math.exp(-s);
  },

  /** The output row C that was chosen. */
  output() {
    const { N } = this.system, number = Number(control("number").value);
    const C = new Float64Array(N);
    if (control("output").value === "one") C[Math.min(number, N - 1)] = 1;
    if (control("output").value === "sum") C.fill(1);
    if (control("output").value === "recall") {
      const j = Math.min(number, this.rows.length / N - 1);
      C.set(this.rows.subarray(j * N, (j + 1) * N));
    }
    return C;
  },

  kernel() {
    return kernelOf(this.output(), this.responses);
  },
};

const control = (name) => document.getElementById(`memory-${name}`);
const say = (name, text) => (control(name).textContent = text);
const signalPlot = new Plot(control("signal"));
const statePlot = new Plot(control("state"));
const kernelPlot = new Plot(control("kernel"));

function draw() {
  drawSignal();
  drawState();
  drawKernel();
}

function drawSignal() {
  const plot = signalPlot, { now, signal, system } = memory, past = memory.remembered();
  plot.begin({ steps: LENGTH - 1, low: -1.5, high: 1.5 });
  const weights = Array.from({ length: now + 1 }, (_, j) => [now - j, -1.5 + 0.6 * memory.weight(j)]);
  plot.area(weights, -1.5, "weight");
  plot.axes([0, 128, 256, 384, LENGTH - 1], (step) => (step === 0 ? "step 0" : String(step)));
  const points = Array.from(signal, (value, t) => [t, value]);
  plot.path(points.slice(now), "future", 1.5);
  plot.path(points.slice(0, now + 1), "truth", 2);
  plot.path(Array.from(past, (value, j) => [now - j, value]), "memory", 2.5);
  plot.path([[now, -1.5], [now, 1.5]], "now", 1.5);
  if (document.activeElement === plot.canvas) {
    plot.path([[memory.pen, -1.5], [memory.pen, 1.5]], "memory", 1, [4, 4]);
  }

  const window = Math.min(Math.round(1 / system.dt), past.length);
  const missed = rootMeanSquare(past.slice(0, window).map((value, j) => value - signal[now - j]));
  const size = rootMeanSquare(past.slice(0, window).map((_, j) => signal[now - j]));
  say("missed", `Over the last ${window} steps the memory is off by ${missed.toFixed(3)}, the signal's own size is ` +
    `${size.toFixed(3)} (root mean squares).`);
}

function drawState() {
  const { N, variant } = memory.system, plot = statePlot, chosen = memory.output();
  plot.begin({ steps: N, low: -memory.largest, high: memory.largest });
  const halves = variant === "diag";
  plot.axes(halves ? [0, N / 2, N] : [0, N], (n) =>
    halves ? { 0: "real parts", [N / 2]: "imaginary parts", [N]: "" }[n] : n === 0 ? "x0" : `x${N - 1}`);
  const one = control("output").value === "one";
  plot.bars(memory.state(), (k) => (one && chosen[k] ? "now" : "memory"));
}

function drawKernel() {
  const plot = kernelPlot, kernel = memory.kernel(), most = reach(kernel);
  plot.begin({ steps: LENGTH - 1, low: -most, high: most });
  plot.axes([0, 256, LENGTH - 1], (j) => (j === 0 ? "now" : `${j} steps ago`));
  plot.path(Array.from(kernel, (value, j) => [j, value]), "now", 2);
}

function rootMeanSquare(values) {
  return Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / Math.max(values.length, 1));
}

/** Draw soon, once for all that changes until then. */
let waiting = false;
function refresh() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

// Controls

function chooseSystem() {
  const dt = 10 ** Number(control("dt").value), N = Number(control("N").value);
  memory.choose(control("init").value, N, dt);
  say("dt-says", `dt = ${Number(dt.toPrecision(3))}, 1/dt = ${Math.round(1 / dt)} steps`);
  chooseOutput();
}

function chooseOutput() {
  const kind = control("output").value, number = control("number");
  number.max = kind === "one" ? memory.system.N - 1 : Math.min(memory.rows.length / memory.system.N, LENGTH) - 1;
  number.disabled = kind === "sum";
  const value = number.value;
  say("number-says", { one: `x${value}`, sum: "all states", recall: `${value} steps ago` }[kind]);
  refresh();
}

function chooseSignal() {
  memory.signal = SIGNALS[control("preset").value](LENGTH);
  memory.read();
  refresh();
}

function goTo(step) {
  memory.now = Math.max(0, Math.min(LENGTH - 1, Math.floor(step)));
  control("now").value = memory.now;
  say("now-says", `step ${memory.now}`);
  refresh();
}

let nextTick = 0; // of requestAnimationFrame, while it plays
function play(playing) {
  memory.playing = playing;
  control("play").textContent = playing ? "Pause" : "Play";
  cancelAnimationFrame(nextTick);
  if (!playing) return;
  if (memory.now >= LENGTH - 1) goTo(0);
  let position = memory.now, last = null;
  const tick = (time) => {
    if (Math.floor(position) !== memory.now) position = memory.now; // moved by hand meanwhile
    position += last === null ? 0 : ((time - last) / 1000) * Number(control("speed").value);
    last = time;
    goTo(position);
    if (position >= LENGTH - 1) play(false);
    else nextTick = requestAnimationFrame(tick);
  };
  nextTick = requestAnimationFrame(tick);
}

// Drawing with mouse, finger or keyboard

/** Set the signal on a line between two points; steps outside are left out. */
function stroke(from, to) {
  const [left, right] = from.step <= to.step ? [from, to] : [to, from];
  const limit = (value) => Math.max(-1.2, Math.min(1.2, value));
  for (let t = Math.max(0, Math.round(left.step)); t <= Math.min(LENGTH - 1, Math.round(right.step)); t++) {
    const part = right.step === left.step ? 1 : Math.max(0, Math.min(1, (t - left.step) / (right.step - left.step)));
    memory.signal[t] = limit(left.value + part * (right.value - left.value));
  }
  memory.read();
  refresh();
}

function drawByPointer(canvas) {
  let last = null, finger = null; // the one that draws: others wait
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    return signalPlot.at(event.clientX - box.left, event.clientY - box.top);
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || last !== null) return;
    canvas.setPointerCapture(event.pointerId);
    finger = event.pointerId;
    last = point(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last === null || event.pointerId !== finger) return;
    const to = point(event);
    stroke(last, to);
    last = to;
  });
  canvas.addEventListener("lostpointercapture", (event) => { // lifted, or taken away
    if (event.pointerId === finger) last = finger = null;
  });
}

function drawByKeyboard(canvas) {
  canvas.addEventListener("keydown", (event) => {
    const along = { ArrowLeft: -4, ArrowRight: 4 }[event.key], up = { ArrowUp: 0.1, ArrowDown: -0.1 }[event.key];
    const ofBrowser = event.altKey || event.ctrlKey || event.metaKey; // such as Alt and ← to go back
    if (ofBrowser || (along === undefined && up === undefined)) return;
    event.preventDefault();
    if (along) memory.pen = Math.max(0, Math.min(LENGTH - 1, memory.pen + along));
    const value = memory.signal[memory.pen] + (up ?? 0);
    if (up) stroke({ step: memory.pen - 2, value }, { step: memory.pen + 2, value });
    say("pen-says", `Pen at step ${memory.pen}, value ${memory.signal[memory.pen].toFixed(1)}`);
    refresh();
  });
  for (const change of ["focus", "blur"]) canvas.addEventListener(change, refresh);
}

for (const name of ["init", "N", "dt"]) control(name).addEventListener("input", chooseSystem);
for (const name of ["output", "number"]) control(name).addEventListener("input", chooseOutput);
control("preset").addEventListener("input", chooseSignal);
control("now").addEventListener("input", () => goTo(Number(control("now").value)));
control("play").addEventListener("click", () => play(!memory.playing));
drawByPointer(control("signal"));
drawByKeyboard(control("signal"));
new ResizeObserver(refresh).observe(control("signal"));
new MutationObserver(refresh).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
chooseSystem();
goTo(memory.now);
document.querySelector(".memory").hidden = false;
