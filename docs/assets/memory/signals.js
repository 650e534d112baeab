// Signals to begin with, of L values from -1 to 1.
"use strict";

const SIGNALS = {
  sine: (L) => Float64Array.from({ length: L }, (_, t) => 0.8 * Math.sin((2 * Math.PI * t) / 64)),
  chirp: (L) => Float64Array.from({ length: L }, (_, t) => 0.8 * Math.sin((40 * Math.PI * t * t) / (L * L))),
  steps: (L) => {
    const random = randomNumbers(4), levels = Array.from({ length: Math.ceil(L / 48) }, () => 1.6 * random() - 0.8);
    return Float64Array.from({ length: L }, (_, t) => levels[Math.floor(t / 48)]);
  },
  noise: (L) => {
    const random = randomNumbers(1);
    return Float64Array.from({ length: L }, () => 1.6 * random() - 0.8);
  },
  "smooth noise": (L) => {
    const random = randomNumbers(2), waves = Array.from({ length: 9 }, (_, k) => [k + 1, random() * 2 * Math.PI]);
    return Float64Array.from({ length: L }, (_, t) =>
      waves.reduce((sum, [k, phase]) => sum + 0.25 * Math.sin((2 * Math.PI * k * t) / L + phase), 0));
  },
  spikes: (L) => Float64Array.from({ length: L }, (_, t) => (t % 96 === 24 ? 1 : t % 96 === 72 ? -1 : 0)),
  silence: (L) => new Float64Array(L),
};

/** Numbers from 0 to 1, the same at each call: a linear congruence. */
function randomNumbers(seed) {
  let state = seed;
  return () => (state = (1664525 * state + 1013904223) % 4294967296) / 4294967296;
}
