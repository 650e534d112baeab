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

// Systems of all channels as they lie in memory. A vector of modes is padded to whole hardware vectors on its way in.
struct Systems {
    const double *a, *F, *G;
    int64_t channels, modes, rank;

    int64_t half() const { return (modes + kDoubles - 1) / kDoubles * kDoubles; }
    int64_t size() const { return 2 * half(); }

    void read(const double* from, double* to) const {
        std::fill(to, to + size(), 0.0);
        std::copy_n(from, modes, to);
        std::copy_n(from + modes, modes, to + half());
    }
    void write(const double* from, double* to) const {
        std::copy_n(from, modes, to);
        std::copy_n(from + half(), modes, to + modes);
    }
    // The same in the type of the results.
    template <class T>
    void round(const double* from, T* to) const {
        typedef T Narrow __attribute__((vector_size(kDoubles * sizeof(T))));
        for (int64_t part = 0; part < 2; ++part, from += half(), to += modes)
            for (int64_t j = 0; j < modes; j += kDoubles) {
                const Narrow narrow = __builtin_convertvector(load(from + j), Narrow);
                if (j + kDoubles <= modes)
                    std::memcpy(to + j, &narrow, sizeof narrow);
                else
                    std::memcpy(to + j, &narrow, (modes - j) * sizeof(T));
            }
    }
    template <class T>
    void widen(const T* from, double* to) const {
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
            store(y + j, a_re * re - a_im * im);
            store(y + half + j, a_re * im + a_im * re);
        }
        for (int64_t r = 0; r < rank; ++r) {
            const double s = dot(G + r * size(), x);
            for (int64_t j = 0; j < size(); j += kDoubles) store(y + j, load(y + j) + s * load(F + r * size() + j));
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

    Channel(const Systems& s, int64_t h) : numbers((1 + 2 * s.rank) * s.size()) {
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
void row_times(const double* x, const double* M, int64_t size, int64_t j, double* y) {
    Vec<double> sums[V];
    for (auto& s : sums) s = Vec<double>{};
    for (int64_t i = 0; i < size; ++i)
        for (int v = 0; v < V; ++v) sums[v] += x[i] * load(M + i * size + j + kDoubles * v);
    for (int v = 0; v < V; ++v) store(y + j + kDoubles * v, sums[v]);
}

void row_times(const double* x, const double* M, int64_t size, double* y) {
    int64_t j = 0;
    for (; j + 8 * kDoubles <= size; j += 8 * kDoubles) row_times<8>(x, M, size, j, y);
    for (; j < size; j += 2 * kDoubles) row_times<2>(x, M, size, j, y);
}

// Gradients of all channels, as they lie in memory.
struct Gradients {
    double *a, *F, *G, *X, *C, *D;

    void write(const Systems& s, int64_t h, const double* of_a, const double* of_F, const double* of_G) const {
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

    Jump(const Matrix& A, int64_t width)
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
    void dense(double* M, bool transposed = false) const {
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
    void diagonal_backward(const double* p, double* grad_a) const {
        for (int64_t j = 0; j < A.half; ++j) {
            const int64_t i = A.half + j;
            const double re = width * before[j], im = width * before[i];
            grad_a[j] += re * p[j] + im * p[i], grad_a[i] += re * p[i] - im * p[j];
        }
    }

    // Adds what the gradient M of the dense A^T gives. `work` holds one vector.
    void backward(const double* M, double* work, double* grad_a, double* grad_F, double* grad_G) const {
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
