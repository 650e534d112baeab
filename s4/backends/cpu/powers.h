// Powers of a diagonal matrix plus a low rank, and what is made of them: convolution kernels, the maps of a chunk.
//
// A x = a * x + sum over r of F_r (G_r . x) takes O(N) flops, so T powers take O(N T). The kernel of L steps is a
// Krylov product, K_(aT+b) = (C A^(aT)) (A^b X) with T about sqrt(L): columns are an orbit, rows are repeated
// products with the dense M = A^T, which needs no squaring, as
//
//     A^T = D^T + sum over k < T of (A^k F) (G D^(T-1-k)),    D = diag(a),
//
// is one product of two orbits. Flops a channel: 2 N^2 T r for M, 2 N^2 L / T for the rows, 2 N L for the product; the
// backward takes three times that. Factors are in double precision, the last product in the type of the kernel.
// All of a channel stays in the second-level cache; nothing but the kernel itself is written to memory.
//
// Arrays are contiguous: a (H, 2n), F and G (r, H, 2n), X (H, q, 2n), C (c, H, 2n), a vector the n real, then the n
// imaginary parts of its modes; kernels (c, q, H, L).

constexpr int64_t kDoubles = kLanes<double>;
constexpr double kSmallest = kTiny<double>;

INLINE Vec<double> load(const double* from) {
    Vec<double> value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(double* to, Vec<double> value) { std::memcpy(to, &value, sizeof value); }

INLINE void store_normal(double* to, Vec<double> value) {
    store(to, (value < kSmallest) & (value > -kSmallest) ? Vec<double>{} : value);  // NaN stays
}

// Systems of all channels as they lie in memory. A vector of modes is padded to whole hardware vectors on its way in.
struct Systems {
    const double *a, *F, *G;
    int64_t channels, modes, rank;

    int64_t half() const { return (modes + kDoubles - 1) / kDoubles * kDoubles; }
    int64_t size() const { return 2 * half(); }

    INLINE void read(const double* from, double* to) const {
        std::fill(to, to + size(), 0.0);
        std::copy_n(from, modes, to);
        std::copy_n(from + modes, modes, to + half());
    }
    INLINE void write(const double* from, double* to) const {
        std::copy_n(from, modes, to);
        std::copy_n(from + half(), modes, to + modes);
    }
    // The same in the type of the results, in which tiny numbers are 0.
    template <class T>
    INLINE void round(const double* from, T* to) const {
        typedef T Narrow __attribute__((vector_size(kDoubles * sizeof(T))));
        const double tiny = kTiny<T>;
        for (int64_t part = 0; part < 2; ++part, from += half(), to += modes)
            for (int64_t j = 0; j < modes; j += kDoubles) {
                const Vec<double> value = load(from + j);
                const Vec<double> kept = (value < tiny) & (value > -tiny) ? Vec<double>{} : value;
                const Narrow narrow = __builtin_convertvector(kept, Narrow);
                if (j + kDoubles <= modes)
                    std::memcpy(to + j, &narrow, sizeof narrow);
                else
                    std::memcpy(to + j, &narrow, (modes - j) * sizeof(T));
            }
    }
    template <class T>
    INLINE void widen(const T* from, double* to) const {
        for (int64_t part = 0; part < 2; ++part, from += modes, to += half())
            for (int64_t j = 0; j < modes; ++j) to[j] = from[j];
    }
};

// A matrix A = diag(a) + F G, or its transpose, or either with the diagonal alone (rank 0).
struct Matrix {
    const double *a, *F, *G;
    int64_t half, rank;
    double sign;  // -1: the diagonal is conjugated

    Matrix transposed() const { return {a, G, F, half, rank, -sign}; }
    Matrix diagonal() const { return {a, F, G, half, 0, sign}; }
    int64_t size() const { return 2 * half; }

    INLINE double dot(const double* x, const double* y) const {
        Vec<double> sum{};
        for (int64_t j = 0; j < size(); j += kDoubles) sum += load(x + j) * load(y + j);
        return total<double>(sum);
    }

    // y = A x
    INLINE void apply(const double* x, double* y) const {
        for (int64_t j = 0; j < half; j += kDoubles) {
            const Vec<double> re = load(x + j), im = load(x + half + j);
            const Vec<double> a_re = load(a + j), a_im = sign * load(a + half + j);
            store_normal(y + j, a_re * re - a_im * im);
            store_normal(y + half + j, a_re * im + a_im * re);
        }
        for (int64_t r = 0; r < rank; ++r) {
            const double s = dot(G + r * size(), x);
            for (int64_t j = 0; j < size(); j += kDoubles) store_normal(y + j, load(y + j) + s * load(F + r * size() + j));
        }
    }

    // Gradients of a, F and G from one y = A x, given the gradient g of y.
    INLINE void accumulate(const double* x, const double* g, double* grad_a, double* grad_F, double* grad_G) const {
        for (int64_t j = 0; j < half; j += kDoubles) {
            const Vec<double> re = load(x + j), im = load(x + half + j), g_re = load(g + j), g_im = load(g + half + j);
            store(grad_a + j, load(grad_a + j) + (re * g_re + im * g_im));
            store(grad_a + half + j, load(grad_a + half + j) + sign * (re * g_im - im * g_re));
        }
        for (int64_t r = 0; r < rank; ++r) {
            const double s = dot(G + r * size(), x), t = dot(F + r * size(), g);
            for (int64_t j = 0; j < size(); j += kDoubles) {
                store(grad_F + r * size() + j, load(grad_F + r * size() + j) + s * load(g + j));
                store(grad_G + r * size() + j, load(grad_G + r * size() + j) + t * load(x + j));
            }
        }
    }
};

// The matrix of one channel.
struct Channel {
    std::vector<double> numbers;
    Matrix A;

    INLINE Channel(const Systems& s, int64_t h) : numbers((1 + 2 * s.rank) * s.size()) {
        double *a = numbers.data(), *F = a + s.size(), *G = F + s.rank * s.size();
        s.read(s.a + h * 2 * s.modes, a);
        for (int64_t r = 0; r < s.rank; ++r) {
            s.read(s.F + (r * s.channels + h) * 2 * s.modes, F + r * s.size());
            s.read(s.G + (r * s.channels + h) * 2 * s.modes, G + r * s.size());
        }
        A = {a, F, G, s.half(), s.rank, 1.0};
    }
};

// x, A x, ..., A^(steps-1) x, each `stride` numbers after the last; the first is given.
INLINE void orbit(const Matrix& A, double* x, int64_t steps, int64_t stride) {
    for (int64_t k = 1; k < steps; ++k) A.apply(x + (k - 1) * stride, x + k * stride);
}

// Gradients of the matrix from those of an orbit, and in g[0] that of its first vector. `work` holds one vector.
INLINE void orbit_backward(const Matrix& A, const double* x, double* g, int64_t steps, int64_t stride, double* work,
                           double* grad_a, double* grad_F, double* grad_G) {
    const Matrix transposed = A.transposed();
    for (int64_t k = steps - 2; k >= 0; --k) {
        A.accumulate(x + k * stride, g + (k + 1) * stride, grad_a, grad_F, grad_G);
        transposed.apply(g + (k + 1) * stride, work);
        for (int64_t j = 0; j < A.size(); j += kDoubles) store(g + k * stride + j, load(g + k * stride + j) + load(work + j));
    }
}

// y = x M for V vectors of columns from column j on; M (size, size) lies row by row.
template <int V>
INLINE void row_times(const double* x, const double* M, int64_t size, int64_t j, double* y) {
    Vec<double> sums[V];
    for (auto& s : sums) s = Vec<double>{};
    for (int64_t i = 0; i < size; ++i)
        for (int v = 0; v < V; ++v) sums[v] += x[i] * load(M + i * size + j + kDoubles * v);
    for (int v = 0; v < V; ++v) store_normal(y + j + kDoubles * v, sums[v]);
}

INLINE void row_times(const double* x, const double* M, int64_t size, double* y) {
    int64_t j = 0;
    for (; j + 8 * kDoubles <= size; j += 8 * kDoubles) row_times<8>(x, M, size, j, y);
    for (; j < size; j += 2 * kDoubles) row_times<2>(x, M, size, j, y);
}

// Gradients of all channels, as they lie in memory.
struct Gradients {
    double *a, *F, *G, *X, *C, *D;

    INLINE void write(const Systems& s, int64_t h, const double* of_a, const double* of_F, const double* of_G) const {
        const int64_t n2 = 2 * s.modes;
        s.write(of_a, a + h * n2);
        for (int64_t r = 0; r < s.rank; ++r) {
            s.write(of_F + r * s.size(), F + (r * s.channels + h) * n2);
            s.write(of_G + r * s.size(), G + (r * s.channels + h) * n2);
        }
    }
};

// A^T of one channel, and the way back from its gradient.
struct Jump {
    const Matrix A;
    const int64_t width, N, rank;
    std::vector<double> numbers;
    double *W, *psi, *before, *power;  // orbits of F and, backwards to meet it, of G; a^(T-1), a^T

    INLINE Jump(const Matrix& A, int64_t width)
        : A(A), width(width), N(A.size()), rank(A.rank), numbers(N * (2 * rank * width + 2)), W(numbers.data()),
          psi(W + rank * width * N), before(psi + rank * width * N), power(before + N) {
        std::fill(power, power + A.half, 1.0);
        for (int64_t k = 0; k < width; ++k) std::swap(before, power), A.diagonal().apply(before, power);
        for (int64_t r = 0; r < rank; ++r) {
            std::copy_n(A.F + r * N, N, W + r * width * N);
            orbit(A, W + r * width * N, width, N);
            std::copy_n(A.G + r * N, N, psi + (r * width + width - 1) * N);
            orbit(A.diagonal().transposed(), psi + (r * width + width - 1) * N, width, -N);
        }
    }

    // Row by row, or column by column.
    INLINE void dense(double* M, bool transposed = false) const {
        const View<const double> left{transposed ? psi : W, 1, N}, right{transposed ? W : psi, N, 1};
        product<double, double, double>(N, N, rank * width, left, right, View<double>{M, N, 1});
        const double sign = transposed ? -1 : 1;
        for (int64_t j = 0; j < A.half; ++j) {
            const int64_t i = A.half + j;
            M[j * N + j] += power[j], M[i * N + i] += power[j];
            M[j * N + i] -= sign * power[i], M[i * N + j] += sign * power[i];
        }
    }

    // Adds what the gradient of a^T gives: times the conjugate of T a^(T-1).
    INLINE void diagonal_backward(const double* p, double* grad_a) const {
        for (int64_t j = 0; j < A.half; ++j) {
            const int64_t i = A.half + j;
            const double re = width * before[j], im = width * before[i];
            grad_a[j] += re * p[j] + im * p[i], grad_a[i] += re * p[i] - im * p[j];
        }
    }

    // Adds what the gradient M of the dense A^T gives. `work` holds one vector.
    INLINE void backward(const double* M, double* work, double* grad_a, double* grad_F, double* grad_G) const {
        std::vector<double> p(N), of_orbits(2 * rank * width * N);
        double *of_W = of_orbits.data(), *of_psi = of_W + rank * width * N;
        for (int64_t j = 0; j < A.half; ++j) {
            const int64_t i = A.half + j;
            p[j] = M[j * N + j] + M[i * N + i], p[i] = M[i * N + j] - M[j * N + i];
        }
        diagonal_backward(p.data(), grad_a);
        product<double, double, double>(rank * width, N, N, {psi, N, 1}, View<const double>{M, 1, N}, View<double>{of_W, N, 1});
        product<double, double, double>(rank * width, N, N, {W, N, 1}, View<const double>{M, N, 1}, View<double>{of_psi, N, 1});
        for (int64_t r = 0; r < rank; ++r) {
            const int64_t start = r * width * N, end = start + (width - 1) * N;
            orbit_backward(A.diagonal().transposed(), psi + end, of_psi + end, width, -N, work, grad_a, nullptr, nullptr);
            orbit_backward(A, W + start, of_W + start, width, N, work, grad_a, grad_F, grad_G);
            for (int64_t j = 0; j < N; ++j) grad_G[r * N + j] += of_psi[end + j], grad_F[r * N + j] += of_W[start + j];
        }
    }
};

struct Krylov {
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

    INLINE Factors(const Krylov& c, int64_t h)
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
        for (int64_t k = 0; k < rows * blocks * N; ++k) rounded[k] = std::abs(R[k]) < kTiny<T> ? T(0) : T(R[k]);
    }

    INLINE Matrix powers() const { return {jump.power, nullptr, nullptr, N / 2, 0, 1.0}; }  // A^T of a diagonal
};

template <class T>
INLINE void kernel_of(const Krylov& c, int64_t h, T* out) {
    const Factors<T> f(c, h);
    const int64_t N = f.N, width = f.width;
    std::vector<T> whole(width * f.blocks);
    for (int64_t i = 0; i < f.rows; ++i)
        for (int64_t k = 0; k < f.q; ++k) {
            product<T, double, T>(f.blocks, width, N, {&f.rounded[i * N], f.rows * N, 1},
                                  View<const double>{f.V + k * width * N, 1, N}, View<T>{whole.data(), width, 1});
            std::copy_n(whole.data(), c.steps, out + ((i * f.q + k) * c.systems.channels + h) * c.steps);
        }
}

template <class T>
INLINE void kernel_backward(const Krylov& c, int64_t h, const T* grad, const Gradients& to) {
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
                                  View<const T>{&f.rounded[i * N], rows * N, 1}, View<double>{part.data(), N, 1});
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

// The maps of a chunk of T steps as s4/scan.py defines them: taps (c, H, 2T-1), inward (H, T, N), outward (c, H, T, N),
// onward (H, N, N), of B (H, 2n), C (c, H, 2n) and D (H). A second row C runs backward in time.
struct Chunk {
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

    INLINE Paths(const Chunk& c, int64_t h)
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
INLINE int64_t power_of(bool second, int64_t t, int64_t width) { return second ? width - 1 - t : t + 1; }
INLINE int64_t tap_of(bool second, int64_t l, int64_t width) { return second ? width - 2 - l : width - 1 + l; }

template <class T>
INLINE void chunk_of(const Chunk& c, int64_t h, T* taps, T* inward, T* outward, T* onward) {
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
INLINE void chunk_backward(const Chunk& c, int64_t h, const T* taps, const T* inward, const T* outward,
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

#define POWERS(T, SUFFIX)                                                                                              \
    ENTRY(s4_krylov_##SUFFIX)                                                                                          \
    (const double* a, const double* F, const double* G, const double* X, const double* C, T* out, int64_t channels,    \
     int64_t modes, int64_t rank, int64_t columns, int64_t rows, int64_t steps, int threads) {                         \
        const Krylov c{{a, F, G, channels, modes, rank}, X, C, columns, rows, steps};                                  \
        return parallel(steps ? channels : 0, threads, [&](int64_t h) { kernel_of<T>(c, h, out); });                   \
    }                                                                                                                  \
    ENTRY(s4_krylov_backward_##SUFFIX)                                                                                 \
    (const double* a, const double* F, const double* G, const double* X, const double* C, const T* grad,               \
     double* grad_a, double* grad_F, double* grad_G, double* grad_X, double* grad_C, int64_t channels, int64_t modes,  \
     int64_t rank, int64_t columns, int64_t rows, int64_t steps, int threads) {                                        \
        const Krylov c{{a, F, G, channels, modes, rank}, X, C, columns, rows, steps};                                  \
        const Gradients to{grad_a, grad_F, grad_G, grad_X, grad_C, nullptr};                                           \
        return parallel(steps ? channels : 0, threads, [&](int64_t h) { kernel_backward<T>(c, h, grad, to); });        \
    }                                                                                                                  \
    ENTRY(s4_chunk_##SUFFIX)                                                                                           \
    (const double* a, const double* F, const double* G, const double* B, const double* C, const double* D, T* taps,    \
     T* inward, T* outward, T* onward, int64_t channels, int64_t modes, int64_t rank, int64_t rows, int64_t width,     \
     int threads) {                                                                                                    \
        const Chunk c{{a, F, G, channels, modes, rank}, B, C, D, rows, width};                                         \
        return parallel(channels, threads, [&](int64_t h) { chunk_of<T>(c, h, taps, inward, outward, onward); });      \
    }                                                                                                                  \
    ENTRY(s4_chunk_backward_##SUFFIX)                                                                                  \
    (const double* a, const double* F, const double* G, const double* B, const double* C, const double* D,             \
     const T* taps, const T* inward, const T* outward, const T* onward, double* grad_a, double* grad_F,                \
     double* grad_G, double* grad_B, double* grad_C, double* grad_D, int64_t channels, int64_t modes, int64_t rank,    \
     int64_t rows, int64_t width, int threads) {                                                                       \
        const Chunk c{{a, F, G, channels, modes, rank}, B, C, D, rows, width};                                         \
        const Gradients to{grad_a, grad_F, grad_G, grad_B, grad_C, grad_D};                                            \
        return parallel(channels, threads,                                                                             \
                        [&](int64_t h) { chunk_backward<T>(c, h, taps, inward, outward, onward, to); });               \
    }

POWERS(float, f32)
POWERS(double, f64)
#undef POWERS
