// The maps of a chunk of T steps as s4/ops/maps.py defines them: taps (c, H, 2T-1), inward (H, T, N), outward
// (c, H, T, N), onward (H, N, N), of B (H, 2n), C (c, H, 2n) and D (H). A second row C runs backward in time.
struct Maps {
    Systems systems;
    const double *B, *C, *D;
    int64_t rows, width;

    int64_t padded(int64_t i) const { return i < systems.modes ? i : systems.half() + i - systems.modes; }
};

// Orbits of B and, under the transpose, of the rows of C.
struct Paths {
    const Channel channel;
    std::vector<double> numbers;
    double *V, *R;  // (T, N) and (c, T + 1, N)

    Paths(const Maps& c, int64_t h)
        : channel(c.systems, h), numbers(channel.A.size() * (c.width + c.rows * (c.width + 1))), V(numbers.data()),
          R(V + c.width * channel.A.size()) {
        const Systems& s = c.systems;
        const int64_t N = s.size();
        s.read(c.B + h * 2 * s.modes, V);
        orbit(channel.A, V, c.width, N);
        for (int64_t i = 0; i < c.rows; ++i) {
            double* row = R + i * (c.width + 1) * N;
            s.read(c.C + (i * s.channels + h) * 2 * s.modes, row);
            orbit(channel.A.transposed(), row, c.width + 1, N);
        }
    }
};

// Where row t of `outward` comes from, and tap l of the kernel goes to: the second runs backward, from lag -1.
int64_t power_of(bool second, int64_t t, int64_t width) { return second ? width - 1 - t : t + 1; }
int64_t tap_of(bool second, int64_t l, int64_t width) { return second ? width - 2 - l : width - 1 + l; }

template <class T>
void maps_of(const Maps& c, int64_t h, T* taps, T* inward, T* outward, T* onward) {
    const Paths paths(c, h);
    const Systems& s = c.systems;
    const int64_t N = s.size(), n2 = 2 * s.modes, width = c.width;
    for (int64_t t = 0; t < width; ++t) s.round(paths.V + t * N, inward + (h * width + width - 1 - t) * n2);
    for (int64_t i = 0; i < c.rows; ++i) {
        const double* row = paths.R + i * (width + 1) * N;
        T* tap = taps + (i * s.channels + h) * (2 * width - 1);
        std::fill(tap, tap + 2 * width - 1, T(0));
        for (int64_t l = 0; l < width - i; ++l) {
            const double d = l == 0 && i == 0 ? c.D[h] : 0.0;
            tap[tap_of(i, l, width)] = T(paths.channel.A.dot(row, paths.V + l * N) + d);
        }
        for (int64_t t = 0; t < width; ++t)
            s.round(row + power_of(i, t, width) * N, outward + ((i * s.channels + h) * width + t) * n2);
    }
    std::vector<double> M(N * N);
    Jump(paths.channel.A, width).dense(M.data(), true);
    for (int64_t i = 0; i < n2; ++i) s.round(&M[c.padded(i) * N], onward + (h * n2 + i) * n2);
}

template <class T>
void maps_backward_of(const Maps& c, int64_t h, const T* taps, const T* inward, const T* outward,
                           const T* onward, const Gradients& to) {
    const Paths paths(c, h);
    const Systems& s = c.systems;
    const Matrix& A = paths.channel.A;
    const int64_t N = s.size(), n2 = 2 * s.modes, width = c.width, rank = s.rank;
    std::vector<double> numbers(N * (2 + 2 * rank + N + width + c.rows * (width + 1)));
    double *a = numbers.data(), *work = a + N, *F = work + N, *G = F + rank * N, *M = G + rank * N, *V = M + N * N;
    double* R = V + width * N;
    for (int64_t t = 0; t < width; ++t) s.widen(inward + (h * width + width - 1 - t) * n2, V + t * N);
    for (int64_t i = 0; i < c.rows; ++i) {
        const double* row = paths.R + i * (width + 1) * N;
        double* of_row = R + i * (width + 1) * N;
        const T* tap = taps + (i * s.channels + h) * (2 * width - 1);
        for (int64_t t = 0; t < width; ++t)
            s.widen(outward + ((i * s.channels + h) * width + t) * n2, of_row + power_of(i, t, width) * N);
        for (int64_t l = 0; l < width - i; ++l) {
            const double g = tap[tap_of(i, l, width)];
            for (int64_t j = 0; j < N; ++j) V[l * N + j] += g * row[j], of_row[j] += g * paths.V[l * N + j];
        }
        if (i == 0) to.D[h] = tap[width - 1];
        orbit_backward(A.transposed(), row, of_row, width + 1, N, work, a, G, F);
        s.write(of_row, to.C + (i * s.channels + h) * n2);
    }
    for (int64_t i = 0; i < n2; ++i)
        for (int64_t j = 0; j < n2; ++j) M[c.padded(j) * N + c.padded(i)] = onward[(h * n2 + i) * n2 + j];
    Jump(A, width).backward(M, work, a, F, G);
    orbit_backward(A, paths.V, V, width, N, work, a, F, G);
    s.write(V, to.X + h * n2);
    to.write(s, h, a, F, G);
}

template <class T>
int maps(Arguments in, int threads) {
    const Maps c{{in, in, in, in, in, in}, in, in, in, in, in};
    T *taps = in, *inward = in, *outward = in, *onward = in;
    return parallel(c.systems.channels, threads, [&](int64_t h) { maps_of<T>(c, h, taps, inward, outward, onward); });
}

template <class T>
int maps_backward(Arguments in, int threads) {
    const Maps c{{in, in, in, in, in, in}, in, in, in, in, in};
    const T *taps = in, *inward = in, *outward = in, *onward = in;
    const Gradients to{in, in, in, in, in, in};
    return parallel(c.systems.channels, threads,
                    [&](int64_t h) { maps_backward_of<T>(c, h, taps, inward, outward, onward, to); });
}
