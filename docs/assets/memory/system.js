// The systems of the live page: from the matrices of matrices.js to states, kernels and the remembered past.
// Every function is pure. Matrices are Float64Arrays, row by row; a complex number is two reals in a row.
"use strict";

/** The numbers of a base64 text of float64. */
function decode(text) {
  return new Float64Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

/** The discrete system of a choice such as "dplr legs": x = A x' + B u, with `step(x, u)` changing x in place. */
function makeSystem(choice, N, dt) {
  const found = Object.fromEntries(Object.entries(MATRICES[choice][N]).map(([k, v]) => [k, decode(v)]));
  const [variant, init] = choice.split(" ");
  const discrete = variant === "dplr" ? bilinear(found.A, found.B, N, dt) : zeroOrderHold(found, N, dt);
  return { choice, variant, init, N, dt, past: found.past, ...discrete };
}

/** Abar = (I - dt/2 A)^-1 (I + dt/2 A) and Bbar = (I - dt/2 A)^-1 dt B, of dense A. */
function bilinear(A, B, N, dt) {
  const left = A.map((a, k) => (k % (N + 1) === 0 ? 1 : 0) - (dt / 2) * a);
  const right = new Float64Array(N * (N + 1)); // (I + dt/2 A | dt B)
  for (let i = 0; i < N; i++) {
    for (let j = 0; j < N; j++) right[i * (N + 1) + j] = (i === j ? 1 : 0) + (dt / 2) * A[i * N + j];
    right[i * (N + 1) + N] = dt * B[i];
  }
  solve(left, right, N, N + 1);
  const Abar = new Float64Array(N * N).map((_, k) => right[Math.floor(k / N) * (N + 1) + (k % N)]);
  const Bbar = new Float64Array(N).map((_, i) => right[i * (N + 1) + N]);
  const next = new Float64Array(N);
  const step = (x, u) => {
    for (let i = 0; i < N; i++) {
      let sum = Bbar[i] * u;
      for (let j = 0; j < N; j++) sum += Abar[i * N + j] * x[j];
      next[i] = sum;
    }
    x.set(next);
  };
  return { Bbar, step };
}

/** Abar = e^(dt Lambda), Bbar = (Abar - 1) / Lambda B; the state is N/2 real, then N/2 imaginary parts. */
function zeroOrderHold({ Lambda, B }, N, dt) {
  const n = N / 2, a = new Float64Array(N), Bbar = new Float64Array(N);
  for (let k = 0; k < n; k++) {
    const [re, im] = [Lambda[2 * k], Lambda[2 * k + 1]], growth = Math.exp(dt * re);
    a[k] = growth * Math.cos(dt * im);
    a[n + k] = growth * Math.sin(dt * im);
    const size = re * re + im * im, p = a[k] - 1, q = a[n + k]; // (p + iq) / (re + i im)
    const [x, y] = [(p * re + q * im) / size, (q * re - p * im) / size];
    Bbar[k] = x * B[2 * k] - y * B[2 * k + 1];
    Bbar[n + k] = x * B[2 * k + 1] + y * B[2 * k];
  }
  const step = (x, u) => {
    for (let k = 0; k < n; k++) {
      const [re, im] = [x[k], x[n + k]];
      x[k] = a[k] * re - a[n + k] * im + Bbar[k] * u;
      x[n + k] = a[n + k] * re + a[k] * im + Bbar[n + k] * u;
    }
  };
  return { Bbar, step };
}

/** Replace `right` (N, M) by left^-1 right: Gauss with row pivots. Both are overwritten. */
function solve(left, right, N, M) {
  for (let k = 0; k < N; k++) {
    let pivot = k;
    for (let i = k + 1; i < N; i++) if (Math.abs(left[i * N + k]) > Math.abs(left[pivot * N + k])) pivot = i;
    swapRows(left, N, k, pivot);
    swapRows(right, M, k, pivot);
    for (let i = k + 1; i < N; i++) {
      const factor = left[i * N + k] / left[k * N + k];
      for (let j = k; j < N; j++) left[i * N + j] -= factor * left[k * N + j];
      for (let j = 0; j < M; j++) right[i * M + j] -= factor * right[k * M + j];
    }
  }
  for (let i = N - 1; i >= 0; i--) {
    for (let j = 0; j < M; j++) {
      let sum = right[i * M + j];
      for (let k = i + 1; k < N; k++) sum -= left[i * N + k] * right[k * M + j];
      right[i * M + j] = sum / left[i * N + i];
    }
  }
}

function swapRows(matrix, width, i, j) {
  if (i === j) return;
  const row = matrix.slice(i * width, (i + 1) * width);
  matrix.copyWithin(i * width, j * width, (j + 1) * width);
  matrix.set(row, j * width);
}

/** The state after each input, from zero on: (L, N). */
function runStates(system, u) {
  const { N } = system, x = new Float64Array(N), states = new Float64Array(u.length * N);
  for (let t = 0; t < u.length; t++) {
    system.step(x, u[t]);
    states.set(x, t * N);
  }
  return states;
}

/** What an impulse j steps ago left in each state, Abar^j Bbar: (L, N). */
function responses(system, L) {
  return runStates(system, Float64Array.from({ length: L }, (_, j) => (j === 0 ? 1 : 0)));
}

/** The kernel K_j = C Abar^j Bbar of an output row C (N,). */
function kernelOf(C, responses) {
  return matrixVector(responses, C);
}

/**
 * Rows (M, N) that read the past from a state: the input j steps before the last is about rows[j] . x. A window
 * ends after 1/dt steps, and with it the rows.
 *
 * For legs, legt and fout a row holds the values of the N basis functions at the lag (j + 1/2) dt, as
 * s4.hippo.reconstruct has them; for the diagonal lin and inv it is that of the quietest past, k(s)^T W with k(s)
 * the response to an impulse: its mean over step j is responses[j] / dt.
 */
function pastRows(system, L, responses) {
  const { N, dt, init, past } = system;
  const windowed = init === "legt" || init === "fout";
  const M = windowed ? Math.min(L, Math.floor(1 / dt + 0.5 + 1e-9)) : L;
  const rows = new Float64Array(M * N);
  for (let j = 0; j < M; j++) {
    const s = (j + 0.5) * dt;
    if (init === "legs") rows.set(legendre(N, Math.exp(-s)), j * N);
    else if (init === "legt") rows.set(legendre(N, 1 - s), j * N);
    else if (init === "fout") rows.set(fourier(N, s), j * N);
    else rows.set(responses.subarray(j * N, (j + 1) * N).map((r) => r / dt), j * N);
  }
  return past ? matrixMatrix(rows, past, N) : rows;
}

/** L_n(z) for n < N: Legendre polynomials of unit norm on [0, 1]. */
function legendre(N, z) {
  const x = 2 * z - 1, P = new Float64Array(N);
  P[0] = 1;
  P[1] = x;
  for (let n = 2; n < N; n++) P[n] = ((2 * n - 1) * x * P[n - 1] - (n - 1) * P[n - 2]) / n;
  return P.map((p, n) => p * Math.sqrt(2 * n + 1));
}

/** 1, 0, sqrt2 cos 2 pi s, sqrt2 sin 2 pi s, sqrt2 cos 4 pi s, ... */
function fourier(N, s) {
  const P = new Float64Array(N);
  for (let k = 0; k < N / 2; k++) {
    P[2 * k] = Math.SQRT2 * Math.cos(2 * Math.PI * k * s);
    P[2 * k + 1] = Math.SQRT2 * Math.sin(2 * Math.PI * k * s);
  }
  P[0] = 1;
  return P;
}

/** matrix (M, N) times vector (N,). */
function matrixVector(matrix, vector) {
  const N = vector.length, product = new Float64Array(matrix.length / N);
  for (let i = 0; i < product.length; i++) {
    for (let j = 0; j < N; j++) product[i] += matrix[i * N + j] * vector[j];
  }
  return product;
}

/** left (M, N) times right (N, N). */
function matrixMatrix(left, right, N) {
  const product = new Float64Array(left.length);
  for (let i = 0; i < left.length / N; i++) {
    for (let k = 0; k < N; k++) {
      for (let j = 0; j < N; j++) product[i * N + j] += left[i * N + k] * right[k * N + j];
    }
  }
  return product;
}
