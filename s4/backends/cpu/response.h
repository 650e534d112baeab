// C A^l X for l < L: a convolution kernel.

struct Response {
    Systems systems;
    const double *X, *C;
    int64_t columns, rows, steps;

    // b < width() and a < blocks(), with l = a width() + b, so that both sides cost about the same.
    int64_t width() const {
        const double balanced = std::sqrt(double(steps) * rows / std::max<int64_t>(columns, 1));
        const int64_t whole = (int64_t(balanced) + 31) / 32 * 32;
        return std::min(std::max<int64_t>(whole, 32), (steps + 31) / 32 * 32);
    }
    int64_t blocks() const { return (steps + width() - 1) / width(); }
};

// All factors of one channel's kernel; the backward computes them again.
template <class T>
struct Factors {
    const int64_t N, width, blocks, rank, q, rows;
    const Channel channel;
    const Jump jump;
    std::vector<double> numbers;
    std::vector<T> rounded;
    double *M, *V, *R;  // A^T (nothing for a diagonal), columns (q, T, N), rows (blocks, c, N)

    Factors(const Response& c, int64_t h)
        : N(c.systems.size()), width(c.width()), blocks(c.blocks()), rank(c.systems.rank), q(c.columns), rows(c.rows),
          channel(c.systems, h), jump(channel.A, width), numbers(N * ((rank ? N : 0) + q * width + rows * blocks)),
          rounded(N * rows * blocks), M(numbers.data()), V(M + (rank ? N * N : 0)), R(V + q * width * N) {
        const Systems& s = c.systems;
        const int64_t n2 = 2 * s.modes;
        for (int64_t k = 0; k < q; ++k) {
            s.read(c.X + (h * q + k) * n2, V + k * width * N);
            orbit(channel.A, V + k * width * N, width, N);
        }
        if (rank) jump.dense(M);
        for (int64_t k = 0; k < rows; ++k) s.read(c.C + (k * s.channels + h) * n2, R + k * N);
        for (int64_t k = rows; k < rows * blocks; ++k) {
            if (rank)
                row_times(R + (k - rows) * N, M, N, R + k * N);
            else
                powers().transposed().apply(R + (k - rows) * N, R + k * N);
        }
        for (int64_t k = 0; k < rows * blocks * N; ++k) rounded[k] = T(R[k]);
    }

    Matrix powers() const { return {jump.power, nullptr, nullptr, N / 2, 0, 1.0}; }  // A^T of a diagonal
};

template <class T>
void response_of(const Response& c, int64_t h, T* out) {
    const Factors<T> f(c, h);
    const int64_t N = f.N, width = f.width;
    std::vector<T> whole(width * f.blocks);
    for (int64_t i = 0; i < f.rows; ++i)
        for (int64_t k = 0; k < f.q; ++k) {
            product<T, double, T>(f.blocks, width, N, {f.rounded.data() + i * N, f.rows * N, 1},
                                  View<const double>{f.V + k * width * N, 1, N}, View<T>{whole.data(), width, 1});
            std::copy_n(whole.data(), c.steps, out + ((i * f.q + k) * c.systems.channels + h) * c.steps);
        }
}

template <class T>
void response_backward_of(const Response& c, int64_t h, const T* grad, const Gradients& to) {
    const Factors<T> f(c, h);
    const Systems& s = c.systems;
    const int64_t N = f.N, width = f.width, blocks = f.blocks, rank = f.rank, q = f.q, rows = f.rows;
    std::vector<double> numbers(N * (3 + 2 * rank + (rank ? 2 * N : 0) + q * width + rows * blocks));
    double *a = numbers.data(), *p = a + N, *work = p + N, *F = work + N, *G = F + rank * N, *V = G + rank * N;
    double *R = V + q * width * N, *M = R + rows * blocks * N, *Mt = M + N * N;
    std::vector<double> part(std::max(blocks, width) * N);
    std::vector<T> whole(width * blocks);

    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < q; ++k) {
            std::copy_n(grad + ((i * q + k) * s.channels + h) * c.steps, c.steps, whole.data());
            product<T, double, double>(blocks, N, width, {whole.data(), width, 1},
                                       View<const double>{f.V + k * width * N, N, 1}, View<double>{part.data(), N, 1});
            for (int64_t b = 0; b < blocks; ++b)
                for (int64_t j = 0; j < N; ++j) R[(b * rows + i) * N + j] += part[b * N + j];
            product<T, T, double>(width, N, blocks, {whole.data(), 1, width},
                                  View<const T>{f.rounded.data() + i * N, rows * N, 1},
                                  View<double>{part.data(), N, 1});
            for (int64_t j = 0; j < width * N; ++j) V[k * width * N + j] += part[j];
        }

    if (rank)
        for (int64_t i = 0; i < N; ++i)
            for (int64_t j = 0; j < N; ++j) Mt[j * N + i] = f.M[i * N + j];
    for (int64_t k = rows * (blocks - 1) - 1; k >= 0; --k) {  // R_(k + rows) = R_k A^T
        const double* g = R + (k + rows) * N;
        if (rank) {
            row_times(g, Mt, N, work);
        } else {
            f.powers().transposed().accumulate(f.R + k * N, g, p, nullptr, nullptr);
            f.powers().apply(g, work);
        }
        for (int64_t j = 0; j < N; ++j) R[k * N + j] += work[j];
    }
    if (rank) {
        product<double, double, double>(N, N, rows * (blocks - 1), {f.R, 1, N}, View<const double>{R + rows * N, N, 1},
                                        View<double>{M, N, 1});
        f.jump.backward(M, work, a, F, G);
    } else {
        f.jump.diagonal_backward(p, a);
    }
    for (int64_t k = 0; k < q; ++k) {
        orbit_backward(f.channel.A, f.V + k * width * N, V + k * width * N, width, N, work, a, F, G);
        s.write(V + k * width * N, to.X + (h * q + k) * 2 * s.modes);
    }
    to.write(s, h, a, F, G);
    for (int64_t i = 0; i < rows; ++i) s.write(R + i * N, to.C + (i * s.channels + h) * 2 * s.modes);
}

template <class T>
int response(Arguments in, int threads) {
    const Response c{{in, in, in, in, in, in}, in, in, in, in, in};
    T* out = in;
    return parallel(c.steps ? c.systems.channels : 0, threads, [&](int64_t h) { response_of<T>(c, h, out); });
}

template <class T>
int response_backward(Arguments in, int threads) {
    const Response c{{in, in, in, in, in, in}, in, in, in, in, in};
    const T* grad = in;
    const Gradients to{in, in, in, in, in, nullptr};
    return parallel(c.steps ? c.systems.channels : 0, threads,
                    [&](int64_t h) { response_backward_of<T>(c, h, grad, to); });
}
