// Powers of a diagonal matrix plus a low rank: orbits x, A x, A^2 x, ... and the convolution kernel made of them.
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
// imaginary parts of its modes; kernels (c, q, H, L), orbits (H, q, T, 2n).

constexpr int64_t kDoubles = kLanes<double>;

// Smaller numbers are set to 0: a system that has decayed would compute with denormal ones, of 100 cycles each.
constexpr double kSmallest = 1e8 * DBL_MIN;

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

// A strided matrix: element (i, j) at data[i row + j column].
template <class T>
struct View {
    T* data;
    int64_t row, column;

    INLINE T& operator()(int64_t i, int64_t j) const { return data[i * row + j * column]; }
    INLINE View transposed() const { return {data, column, row}; }
};

constexpr int kTile = S4_BYTES == 64 ? 8 : 4;  // rows: as many as the registers hold

// M rows of a product against two hardware vectors of columns, packed side by side.
template <class T, int M, class C>
INLINE void tile(View<const T> a, int64_t i, int64_t depth, const T* panel, View<C> c, int64_t j, int64_t columns) {
    constexpr int64_t lanes = kLanes<T>;
    Vec<T> sums[M][2];
    for (auto& s : sums) s[0] = s[1] = Vec<T>{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec<T> left, right;
        std::memcpy(&left, panel + 2 * lanes * k, sizeof left);
        std::memcpy(&right, panel + 2 * lanes * k + lanes, sizeof right);
        for (int m = 0; m < M; ++m) {
            const T s = a(i + m, k);
            sums[m][0] += s * left, sums[m][1] += s * right;
        }
    }
    for (int m = 0; m < M; ++m) {
        T out[2 * lanes];
        std::memcpy(out, sums[m], sizeof out);
        for (int64_t l = 0; l < columns; ++l) c(i + m, j + l) = C(out[l]);
    }
}

// c = a b, (rows, depth) by (depth, columns), computed in T; `panel` holds depth times two vectors.
template <class T, class B, class C>
INLINE void product(int64_t rows, int64_t columns, int64_t depth, View<const T> a, View<const B> b, View<C> c,
                    T* panel) {
    constexpr int64_t width = 2 * kLanes<T>;
    for (int64_t j = 0; j < columns; j += width) {
        const int64_t taken = std::min(width, columns - j);
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t l = 0; l < width; ++l) panel[k * width + l] = l < taken ? T(b(k, j + l)) : T(0);
        int64_t i = 0;
        for (; i + kTile <= rows; i += kTile) tile<T, kTile>(a, i, depth, panel, c, j, taken);
        for (; i < rows; ++i) tile<T, 1>(a, i, depth, panel, c, j, taken);
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
    const Krylov& c;
    const int64_t N, width, blocks, rank, q, rows;
    const Channel channel;
    const Matrix& A;
    std::vector<double> store;
    std::vector<T> small;
    double *M, *Mt, *V, *W, *psi, *R, *pw, *panel;
    double *before, *power;  // a^(T-1) and a^T
    T *rounded, *short_panel;

    INLINE explicit Factors(const Krylov& c, int64_t h)
        : c(c), N(c.systems.size()), width(c.width()), blocks(c.blocks()), rank(c.systems.rank), q(c.columns),
          rows(c.rows), channel(c.systems, h), A(channel.A),
          store(N * ((rank ? 2 * N : 0) + (q + 2 * rank) * width + rows * blocks + 2) +
                    2 * kDoubles * std::max({rank * width, N, rows * blocks}), 0.0),
          small(N * rows * blocks + 2 * kLanes<T> * std::max({N, width, rows * blocks})) {
        double* at = store.data();
        const auto take = [&](int64_t count) { at += count; return at - count; };
        M = take(rank ? N * N : 0), Mt = take(rank ? N * N : 0);
        V = take(q * width * N), W = take(rank * width * N), psi = take(rank * width * N), R = take(rows * blocks * N);
        pw = take(2 * N), panel = take(2 * kDoubles * std::max({rank * width, N, rows * blocks}));
        rounded = small.data(), short_panel = rounded + N * rows * blocks;

        const Systems& s = c.systems;
        const int64_t H = s.channels, n2 = 2 * s.modes;

        for (int64_t k = 0; k < q; ++k) {
            s.read(c.X + (h * q + k) * n2, V + k * width * N);
            orbit(A, V + k * width * N, width, N);
        }
        before = pw + N, power = pw;
        std::fill(power, power + s.modes, 1.0);
        for (int64_t k = 0; k < width; ++k) std::swap(before, power), A.diagonal().apply(before, power);
        for (int64_t r = 0; r < rank; ++r) {
            std::copy_n(A.F + r * N, N, W + r * width * N);
            orbit(A, W + r * width * N, width, N);
            double* end = psi + (r * width + width - 1) * N;  // backwards, to meet W in order
            std::copy_n(A.G + r * N, N, end);
            orbit(A.diagonal().transposed(), end, width, -N);
        }
        if (rank) {
            product<double, double, double>(N, N, rank * width, View<const double>{W, 1, N}, View<const double>{psi, N, 1},
                                            View<double>{M, N, 1}, panel);
            const int64_t half = s.half();
            for (int64_t j = 0; j < half; ++j) {
                M[j * N + j] += power[j], M[(half + j) * N + half + j] += power[j];
                M[j * N + half + j] -= power[half + j], M[(half + j) * N + j] += power[half + j];
            }
        }
        for (int64_t k = 0; k < rows; ++k) s.read(c.C + (k * H + h) * n2, R + k * N);
        for (int64_t k = rows; k < rows * blocks; ++k) times(M, true, R + (k - rows) * N, R + k * N);
        for (int64_t k = 0; k < rows * blocks * N; ++k) {
            const double smallest = sizeof(T) == 4 ? 1e8 * FLT_MIN : kSmallest;
            rounded[k] = std::abs(R[k]) < smallest ? T(0) : T(R[k]);
        }
    }

    // y = x A^T, or x times its transpose.
    INLINE void times(const double* matrix, bool forward, const double* x, double* y) const {
        if (rank)
            row_times(x, matrix, N, y);
        else
            Matrix{power, nullptr, nullptr, N / 2, 0, forward ? -1.0 : 1.0}.apply(x, y);
    }
};

template <class T>
INLINE void kernel_of(const Krylov& c, int64_t h, T* out) {
    Factors<T> f(c, h);
    std::vector<T> whole(f.width * f.blocks);
    for (int64_t i = 0; i < f.rows; ++i)
        for (int64_t k = 0; k < f.q; ++k) {
            product<T, double, T>(f.blocks, f.width, f.N, View<const T>{f.rounded + i * f.N, f.rows * f.N, 1},
                                  View<const double>{f.V + k * f.width * f.N, 1, f.N}, View<T>{whole.data(), f.width, 1},
                                  f.short_panel);
            std::copy_n(whole.data(), c.steps, out + ((i * f.q + k) * c.systems.channels + h) * c.steps);
        }
}

struct Gradients {
    double *a, *F, *G, *X, *C;
};

template <class T>
INLINE void kernel_backward(const Krylov& c, int64_t h, const T* grad, const Gradients& to) {
    Factors<T> f(c, h);
    const int64_t N = f.N, width = f.width, blocks = f.blocks, rank = f.rank, q = f.q, rows = f.rows;
    const int64_t H = c.systems.channels, n2 = 2 * c.systems.modes, half = N / 2;
    std::vector<double> space(N * (1 + 2 * rank + (rank ? N : 0) + (q + 2 * rank + 1) * width + 2 * rows * blocks + 2), 0.0);
    double* at = space.data();
    const auto take = [&](int64_t count) { at += count; return at - count; };
    double *a = take(N), *F = take(rank * N), *G = take(rank * N), *M = take(rank ? N * N : 0), *p = take(N);
    double *V = take(q * width * N), *W = take(rank * width * N), *psi = take(rank * width * N);
    double *R = take(rows * blocks * N), *part = take(std::max(rows * blocks, width) * N), *work = take(N);
    std::vector<T> whole(width * blocks, T(0));

    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < q; ++k) {
            std::copy_n(grad + ((i * q + k) * H + h) * c.steps, c.steps, whole.data());
            product<T, double, double>(blocks, N, width, View<const T>{whole.data(), width, 1},
                                       View<const double>{f.V + k * width * N, N, 1}, View<double>{part, N, 1},
                                       f.short_panel);
            for (int64_t b = 0; b < blocks; ++b)
                for (int64_t j = 0; j < N; ++j) R[(b * rows + i) * N + j] += part[b * N + j];
            product<T, T, double>(width, N, blocks, View<const T>{whole.data(), 1, width},
                                  View<const T>{f.rounded + i * N, rows * N, 1}, View<double>{part, N, 1}, f.short_panel);
            for (int64_t j = 0; j < width * N; ++j) V[k * width * N + j] += part[j];
        }

    if (rank)
        for (int64_t i = 0; i < N; ++i)
            for (int64_t j = 0; j < N; ++j) f.Mt[j * N + i] = f.M[i * N + j];
    const Matrix jump{f.power, nullptr, nullptr, half, 0, -1.0};
    for (int64_t k = rows * (blocks - 1) - 1; k >= 0; --k) {  // R_(k + rows) = R_k A^T
        if (!rank) jump.accumulate(f.R + k * N, R + (k + rows) * N, p, nullptr, nullptr);
        f.times(f.Mt, false, R + (k + rows) * N, work);
        for (int64_t j = 0; j < N; ++j) R[k * N + j] += work[j];
    }
    if (rank) {
        product<double, double, double>(N, N, rows * (blocks - 1), View<const double>{f.R, 1, N},
                                        View<const double>{R + rows * N, N, 1}, View<double>{M, N, 1}, f.panel);
        for (int64_t j = 0; j < half; ++j) {
            p[j] = M[j * N + j] + M[(half + j) * N + half + j];
            p[half + j] = M[(half + j) * N + j] - M[j * N + half + j];
        }
        product<double, double, double>(rank * width, N, N, View<const double>{f.psi, N, 1}, View<const double>{M, 1, N},
                                        View<double>{W, N, 1}, f.panel);
        product<double, double, double>(rank * width, N, N, View<const double>{f.W, N, 1}, View<const double>{M, N, 1},
                                        View<double>{psi, N, 1}, f.panel);
    }
    for (int64_t j = 0; j < half; ++j) {  // of a^T: the conjugate of T a^(T-1)
        const double re = width * f.before[j], im = width * f.before[half + j];
        a[j] += re * p[j] + im * p[half + j], a[half + j] += re * p[half + j] - im * p[j];
    }
    for (int64_t r = 0; r < rank; ++r) {
        const int64_t end = (r * width + width - 1) * N;
        orbit_backward(f.A.diagonal().transposed(), f.psi + end, psi + end, width, -N, work, a, nullptr, nullptr);
        orbit_backward(f.A, f.W + r * width * N, W + r * width * N, width, N, work, a, F, G);
        for (int64_t j = 0; j < N; ++j) G[r * N + j] += psi[end + j], F[r * N + j] += W[r * width * N + j];
    }
    for (int64_t k = 0; k < q; ++k) {
        orbit_backward(f.A, f.V + k * width * N, V + k * width * N, width, N, work, a, F, G);
        c.systems.write(V + k * width * N, to.X + (h * q + k) * n2);
    }
    c.systems.write(a, to.a + h * n2);
    for (int64_t r = 0; r < rank; ++r)
        c.systems.write(F + r * N, to.F + (r * H + h) * n2), c.systems.write(G + r * N, to.G + (r * H + h) * n2);
    for (int64_t i = 0; i < rows; ++i) c.systems.write(R + i * N, to.C + (i * H + h) * n2);
}

// Orbits (H, q, T, 2n) of X (H, q, 2n), as they lie in memory.
struct Orbits {
    Systems systems;
    const double* X;
    int64_t columns, steps;
};

INLINE void orbits_of(const Orbits& c, int64_t h, double* out) {
    const Systems& s = c.systems;
    const Channel matrix(s, h);
    std::vector<double> x(2 * s.size());
    double *last = x.data(), *next = last + s.size();
    for (int64_t i = h * c.columns; i < (h + 1) * c.columns; ++i) {
        s.read(c.X + i * 2 * s.modes, last);
        for (int64_t k = 0; k < c.steps; ++k, std::swap(last, next)) {
            s.write(last, out + (i * c.steps + k) * 2 * s.modes);
            if (k + 1 < c.steps) matrix.A.apply(last, next);
        }
    }
}

// `x` is what `orbits_of` gave.
INLINE void orbits_backward(const Orbits& c, int64_t h, const double* x, const double* grad, const Gradients& to) {
    const Systems& s = c.systems;
    const Channel matrix(s, h);
    const int64_t N = s.size(), n2 = 2 * s.modes;
    std::vector<double> space((1 + 2 * s.rank) * N + (2 * c.steps + 1) * N, 0.0);
    double *a = space.data(), *F = a + N, *G = F + s.rank * N, *work = G + s.rank * N, *path = work + N;
    double* g = path + c.steps * N;
    for (int64_t i = h * c.columns; i < (h + 1) * c.columns; ++i) {
        for (int64_t k = 0; k < c.steps; ++k) {
            s.read(x + (i * c.steps + k) * n2, path + k * N);
            s.read(grad + (i * c.steps + k) * n2, g + k * N);
        }
        orbit_backward(matrix.A, path, g, c.steps, N, work, a, F, G);
        s.write(g, to.X + i * n2);
    }
    s.write(a, to.a + h * n2);
    for (int64_t r = 0; r < s.rank; ++r) {
        s.write(F + r * N, to.F + (r * s.channels + h) * n2);
        s.write(G + r * N, to.G + (r * s.channels + h) * n2);
    }
}

ENTRY(s4_orbit)
(const double* a, const double* F, const double* G, const double* X, double* out, int64_t channels, int64_t modes,
 int64_t rank, int64_t columns, int64_t steps, int threads) {
    const Orbits c{{a, F, G, channels, modes, rank}, X, columns, steps};
    return parallel(steps ? channels : 0, threads, [&](int64_t h) { orbits_of(c, h, out); });
}

ENTRY(s4_orbit_backward)
(const double* a, const double* F, const double* G, const double* x, const double* grad, double* grad_a, double* grad_F,
 double* grad_G, double* grad_X, int64_t channels, int64_t modes, int64_t rank, int64_t columns, int64_t steps,
 int threads) {
    const Orbits c{{a, F, G, channels, modes, rank}, nullptr, columns, steps};
    const Gradients to{grad_a, grad_F, grad_G, grad_X, nullptr};
    return parallel(channels, threads, [&](int64_t h) { orbits_backward(c, h, x, grad, to); });
}

#define KERNELS(T, SUFFIX)                                                                                             \
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
        const Gradients to{grad_a, grad_F, grad_G, grad_X, grad_C};                                                    \
        return parallel(steps ? channels : 0, threads, [&](int64_t h) { kernel_backward<T>(c, h, grad, to); });        \
    }

KERNELS(float, f32)
KERNELS(double, f64)
#undef KERNELS
