// Cauchy and Vandermonde sums over conjugate pairs: vectorised over nodes, threaded over tasks.
//
// Complex numbers are interleaved (re, im); arrays are contiguous. Shapes: v (G, q, n), w and x (G, n), z (Gz, l) with
// Gz 1 or G.
//
// Cost of a Cauchy pair (one pole, one vector of nodes), with u = 1/(z-w) and u' = 1/(z-conj w): 13 instructions
// and two divisions (one in double precision) build P = u + u' and M = i (u - u'); every right-hand side then takes
// 4 multiply-adds, as v = a + i b contributes a P + b M. Nothing of size G n l is stored.

constexpr int64_t kBlock = 512;  // nodes whose arrays stay in the first-level cache

// P = 1/(z-w) + 1/(z-conj w) and M = i (1/(z-w) - 1/(z-conj w)) for a vector of nodes z = x + i y and w = p + i q.
template <class T>
struct Pair {
    Vec<T> s, d, e, ia, ib;
    INLINE Pair(Vec<T> x, Vec<T> y, T p, T q) {
        s = x - p, d = y - q, e = y + q;
        const Vec<T> a = s * s + d * d, b = s * s + e * e;
        if constexpr (sizeof(T) == 8) {  // one division for two; in single precision a b could leave the range
            const Vec<T> inverse = 1 / (a * b);
            ia = inverse * b, ib = inverse * a;
        } else {
            ia = 1 / a, ib = 1 / b;
        }
    }
    INLINE Vec<T> p_re() const { return s * (ia + ib); }
    INLINE Vec<T> p_im() const { return -(d * ia + e * ib); }
    INLINE Vec<T> m_re() const { return d * ia - e * ib; }
    INLINE Vec<T> m_im() const { return s * (ia - ib); }
};

// Real and imaginary parts of `count` >= 1 complex numbers in arrays padded to a multiple of the lanes: nodes with
// the last of them, so that no padding meets a pole which no node meets; gradients with zeros.
template <class T>
INLINE void split(const T* from, int64_t count, T* re, T* im, bool zeros = false) {
    const T fill_re = zeros ? T(0) : from[2 * count - 2], fill_im = zeros ? T(0) : from[2 * count - 1];
    for (int64_t i = 0; i < count; ++i) re[i] = from[2 * i], im[i] = from[2 * i + 1];
    for (int64_t i = count; i % kLanes<T> != 0; ++i) re[i] = fill_re, im[i] = fill_im;
}

template <class T>
struct Cauchy {
    const T *v, *z, *w;
    int64_t groups, rows, poles, nodes, z_groups;

    const T* nodes_of(int64_t g) const { return z + (z_groups == 1 ? 0 : g) * nodes * 2; }
    int64_t blocks() const { return (nodes + kBlock - 1) / kBlock; }
};

// out[row] for Q rows at the nodes of one block.
template <class T, int Q>
INLINE void cauchy_rows(const Cauchy<T>& c, const T* v, const T* w, const T* x, const T* y, int64_t count, T* out) {
    constexpr int64_t lanes = kLanes<T>;
    for (int64_t j = 0; j < count; j += lanes) {
        Vec<T> re[Q], im[Q], xs, ys;
        for (int k = 0; k < Q; ++k) re[k] = im[k] = Vec<T>{};
        std::memcpy(&xs, x + j, sizeof xs), std::memcpy(&ys, y + j, sizeof ys);
        for (int64_t n = 0; n < c.poles; ++n) {
            const Pair<T> pair(xs, ys, w[2 * n], w[2 * n + 1]);
            const Vec<T> p_re = pair.p_re(), p_im = pair.p_im(), m_re = pair.m_re(), m_im = pair.m_im();
            for (int k = 0; k < Q; ++k) {
                const T a = v[2 * (k * c.poles + n)], b = v[2 * (k * c.poles + n) + 1];
                re[k] += a * p_re + b * m_re;
                im[k] += a * p_im + b * m_im;
            }
        }
        const int64_t valid = std::min(lanes, count - j);
        for (int k = 0; k < Q; ++k) {
            T r[lanes], i[lanes], both[2 * lanes];
            std::memcpy(r, &re[k], sizeof r), std::memcpy(i, &im[k], sizeof i);
            for (int64_t m = 0; m < lanes; ++m) both[2 * m] = r[m], both[2 * m + 1] = i[m];
            T* place = out + 2 * (k * c.nodes + j);
            if (valid == lanes)
                std::memcpy(place, both, sizeof both);
            else
                std::memcpy(place, both, 2 * valid * sizeof(T));
        }
    }
}

template <class T>
INLINE void cauchy_block(const Cauchy<T>& c, int64_t task, T* out) {
    const int64_t g = task / c.blocks(), start = task % c.blocks() * kBlock;
    const int64_t count = std::min(kBlock, c.nodes - start);
    alignas(64) T x[kBlock], y[kBlock];
    split(c.nodes_of(g) + 2 * start, count, x, y);
    const T *v = c.v + g * c.rows * c.poles * 2, *w = c.w + g * c.poles * 2;
    out += (g * c.rows * c.nodes + start) * 2;
    int64_t k = 0;
    for (; k + 4 <= c.rows; k += 4) cauchy_rows<T, 4>(c, v + k * c.poles * 2, w, x, y, count, out + k * c.nodes * 2);
    for (; k + 2 <= c.rows; k += 2) cauchy_rows<T, 2>(c, v + k * c.poles * 2, w, x, y, count, out + k * c.nodes * 2);
    for (; k < c.rows; ++k) cauchy_rows<T, 1>(c, v + k * c.poles * 2, w, x, y, count, out + k * c.nodes * 2);
}

// Gradients of v and w for a range of poles of one group, given the gradient `grad` (G, q, l) of the sums. With
// E = u^2 + u'^2, O = i (u^2 - u'^2), T1 = sum of a conj(grad), T2 = sum of b conj(grad): the gradient of w is
// Re(T1 E + T2 O) + i Re(T1 O - T2 E), that of z is -conj(T1 E + T2 O).
template <class T, int Q>
INLINE void cauchy_backward_rows(const Cauchy<T>& c, int64_t g, int64_t row, int64_t first, int64_t last,
                                 const T* grad, T* grad_v, T* grad_w) {
    constexpr int64_t lanes = kLanes<T>;
    const T *v = c.v + (g * c.rows + row) * c.poles * 2, *w = c.w + g * c.poles * 2;
    constexpr int kSums = 2 * Q + 2;
    std::vector<T> storage((last - first) * kSums * lanes + lanes, T(0));
    T* sums = storage.data();
    alignas(64) T x[kBlock], y[kBlock], gr[Q][kBlock], gi[Q][kBlock];
    for (int64_t start = 0; start < c.nodes; start += kBlock) {
        const int64_t count = std::min(kBlock, c.nodes - start);
        split(c.nodes_of(g) + 2 * start, count, x, y);
        for (int k = 0; k < Q; ++k)
            split(grad + ((g * c.rows + row + k) * c.nodes + start) * 2, count, gr[k], gi[k], true);
        for (int64_t n = first; n < last; ++n) {
            Vec<T> acc[kSums];
            T* place = sums + (n - first) * kSums * lanes;
            std::memcpy(acc, place, sizeof acc);
            for (int64_t j = 0; j < count; j += lanes) {
                Vec<T> xs, ys, t1r{}, t1i{}, t2r{}, t2i{};
                std::memcpy(&xs, x + j, sizeof xs), std::memcpy(&ys, y + j, sizeof ys);
                const Pair<T> pair(xs, ys, w[2 * n], w[2 * n + 1]);
                const Vec<T> p_re = pair.p_re(), p_im = pair.p_im(), m_re = pair.m_re(), m_im = pair.m_im();
                for (int k = 0; k < Q; ++k) {
                    Vec<T> r, i;
                    std::memcpy(&r, gr[k] + j, sizeof r), std::memcpy(&i, gi[k] + j, sizeof i);
                    const T a = v[2 * (k * c.poles + n)], b = v[2 * (k * c.poles + n) + 1];
                    acc[2 * k] += r * p_re + i * p_im;
                    acc[2 * k + 1] += r * m_re + i * m_im;
                    t1r += a * r, t1i -= a * i, t2r += b * r, t2i -= b * i;
                }
                const Vec<T> ur = pair.s * pair.ia, ui = -pair.d * pair.ia;
                const Vec<T> vr = pair.s * pair.ib, vi = -pair.e * pair.ib;
                const Vec<T> u2r = ur * ur - ui * ui, u2i = 2 * ur * ui, v2r = vr * vr - vi * vi, v2i = 2 * vr * vi;
                const Vec<T> er = u2r + v2r, ei = u2i + v2i, or_ = v2i - u2i, oi = u2r - v2r;
                acc[2 * Q] += t1r * er - t1i * ei + t2r * or_ - t2i * oi;
                acc[2 * Q + 1] += t1r * or_ - t1i * oi - t2r * er + t2i * ei;
            }
            std::memcpy(place, acc, sizeof acc);
        }
    }
    for (int64_t n = first; n < last; ++n) {
        Vec<T> acc[kSums];
        std::memcpy(acc, sums + (n - first) * kSums * lanes, sizeof acc);
        for (int k = 0; k < Q; ++k) {
            grad_v[2 * ((g * c.rows + row + k) * c.poles + n)] = total<T>(acc[2 * k]);
            grad_v[2 * ((g * c.rows + row + k) * c.poles + n) + 1] = total<T>(acc[2 * k + 1]);
        }
        grad_w[2 * (g * c.poles + n)] += total<T>(acc[2 * Q]);
        grad_w[2 * (g * c.poles + n) + 1] += total<T>(acc[2 * Q + 1]);
    }
}

template <class T>
INLINE void cauchy_backward_task(const Cauchy<T>& c, int64_t g, int64_t first, int64_t last, const T* grad, T* grad_v,
                                 T* grad_w) {
    std::fill(grad_w + 2 * (g * c.poles + first), grad_w + 2 * (g * c.poles + last), T(0));
    int64_t k = 0;
    for (; k + 4 <= c.rows; k += 4) cauchy_backward_rows<T, 4>(c, g, k, first, last, grad, grad_v, grad_w);
    for (; k + 2 <= c.rows; k += 2) cauchy_backward_rows<T, 2>(c, g, k, first, last, grad, grad_v, grad_w);
    for (; k < c.rows; ++k) cauchy_backward_rows<T, 1>(c, g, k, first, last, grad, grad_v, grad_w);
}

// Gradient of z (G, l): what `cauchy_backward_rows` leaves out, at the nodes of one block.
template <class T>
INLINE void cauchy_backward_nodes(const Cauchy<T>& c, int64_t task, const T* grad, T* grad_z) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t g = task / c.blocks(), start = task % c.blocks() * kBlock;
    const int64_t count = std::min(kBlock, c.nodes - start);
    alignas(64) T x[kBlock], y[kBlock], gr[kBlock], gi[kBlock], re[kBlock] = {}, im[kBlock] = {};
    split(c.nodes_of(g) + 2 * start, count, x, y);
    const T* w = c.w + g * c.poles * 2;
    for (int64_t k = 0; k < c.rows; ++k) {
        split(grad + ((g * c.rows + k) * c.nodes + start) * 2, count, gr, gi, true);
        const T* v = c.v + (g * c.rows + k) * c.poles * 2;
        for (int64_t j = 0; j < count; j += lanes) {
            Vec<T> xs, ys, r, i, zr{}, zi{}, old;
            std::memcpy(&xs, x + j, sizeof xs), std::memcpy(&ys, y + j, sizeof ys);
            std::memcpy(&r, gr + j, sizeof r), std::memcpy(&i, gi + j, sizeof i);
            for (int64_t n = 0; n < c.poles; ++n) {
                const Pair<T> pair(xs, ys, w[2 * n], w[2 * n + 1]);
                const Vec<T> ur = pair.s * pair.ia, ui = -pair.d * pair.ia;
                const Vec<T> vr = pair.s * pair.ib, vi = -pair.e * pair.ib;
                const Vec<T> u2r = ur * ur - ui * ui, u2i = 2 * ur * ui, v2r = vr * vr - vi * vi, v2i = 2 * vr * vi;
                const T a = v[2 * n], b = v[2 * n + 1];
                zr += a * (u2r + v2r) + b * (v2i - u2i);
                zi += a * (u2i + v2i) + b * (u2r - v2r);
            }
            // -grad conj(v u^2 + conj(v) u'^2)
            std::memcpy(&old, re + j, sizeof old), old -= r * zr + i * zi, std::memcpy(re + j, &old, sizeof old);
            std::memcpy(&old, im + j, sizeof old), old -= i * zr - r * zi, std::memcpy(im + j, &old, sizeof old);
        }
    }
    for (int64_t j = 0; j < count; ++j) {
        grad_z[2 * (g * c.nodes + start + j)] = re[j];
        grad_z[2 * (g * c.nodes + start + j) + 1] = im[j];
    }
}

// A factor rounded to T, or 0 where products with it would be denormal numbers, which cost some 100 cycles each.
template <class T>
INLINE T normal(double value) {
    return std::abs(value) < (sizeof(T) == 4 ? 1e-30 : 1e-290) ? T(0) : T(value);
}

// Powers e^(x b) for b in [0, count), of one exponent, in double precision: by doubling from exact squares, so that
// no error grows faster than log2(count) roundings.
INLINE void powers(std::complex<double> x, int64_t count, double* re, double* im) {
    if (count < 1) return;
    re[0] = 1, im[0] = 0;
    for (int64_t have = 1; have < count; have *= 2) {
        const std::complex<double> jump = std::exp(x * double(have));
        const double cr = jump.real(), ci = jump.imag();
        const int64_t more = std::min(have, count - have);
        for (int64_t b = 0; b < more; ++b) {
            re[have + b] = re[b] * cr - im[b] * ci;
            im[have + b] = re[b] * ci + im[b] * cr;
        }
    }
}

// Steps are l = a T + b with b < T = kBlock / 2: e^(x l) is a product of one of `rows` factors by one of T.
template <class T>
struct Vandermonde {
    const T *v, *x;
    int64_t groups, rows, poles, steps;

    int64_t width() const { return std::min(kBlock / 2, (steps + kLanes<T> - 1) / kLanes<T> * kLanes<T>); }
    int64_t chunks() const { return steps ? (steps + width() - 1) / width() : 0; }
    std::complex<double> exponent(int64_t g, int64_t n) const {
        return {double(x[2 * (g * poles + n)]), double(x[2 * (g * poles + n) + 1])};
    }
};

// e^(x b) for all poles of a group, [pole][b], as real and imaginary parts in the type of the sums; 0 past the last
// step, where a growing mode could overflow.
template <class T>
INLINE void short_powers(const Vandermonde<T>& c, int64_t g, T* re, T* im) {
    const int64_t width = c.width();
    std::vector<double> dr(width), di(width);
    for (int64_t n = 0; n < c.poles; ++n) {
        powers(c.exponent(g, n), std::min(width, c.steps), dr.data(), di.data());
        for (int64_t b = 0; b < width; ++b) re[n * width + b] = normal<T>(dr[b]), im[n * width + b] = normal<T>(di[b]);
    }
}

template <class T, int A>
INLINE void vandermonde_chunks(const T* er, const T* ei, const T* coefficients, int64_t poles, int64_t width,
                               int64_t count, T* out) {
    constexpr int64_t lanes = kLanes<T>;
    for (int64_t j = 0; j < width; j += lanes) {
        Vec<T> acc[A];
        for (int a = 0; a < A; ++a) acc[a] = Vec<T>{};
        for (int64_t n = 0; n < poles; ++n) {
            Vec<T> r, i;
            std::memcpy(&r, er + n * width + j, sizeof r), std::memcpy(&i, ei + n * width + j, sizeof i);
            for (int a = 0; a < A; ++a)
                acc[a] += coefficients[2 * (a * poles + n)] * r - coefficients[2 * (a * poles + n) + 1] * i;
        }
        for (int a = 0; a < A; ++a) {
            T result[lanes];
            std::memcpy(result, &acc[a], sizeof result);
            const int64_t valid = count - a * width - j;
            if (valid >= lanes)
                std::memcpy(out + a * width + j, result, sizeof result);
            else if (valid > 0)
                std::memcpy(out + a * width + j, result, valid * sizeof(T));
        }
    }
}

template <class T>
INLINE void vandermonde_group(const Vandermonde<T>& c, int64_t g, T* out) {
    const int64_t width = c.width(), chunks = c.chunks();
    std::vector<T> er(c.poles * width), ei(c.poles * width), coefficients(chunks * c.poles * 2);
    std::vector<double> jr(c.poles * chunks), ji(c.poles * chunks);
    short_powers(c, g, er.data(), ei.data());
    for (int64_t n = 0; n < c.poles; ++n)
        powers(c.exponent(g, n) * double(width), chunks, &jr[n * chunks], &ji[n * chunks]);
    for (int64_t k = 0; k < c.rows; ++k) {
        const T* v = c.v + (g * c.rows + k) * c.poles * 2;
        for (int64_t a = 0; a < chunks; ++a)
            for (int64_t n = 0; n < c.poles; ++n) {
                const double r = jr[n * chunks + a], i = ji[n * chunks + a];
                coefficients[2 * (a * c.poles + n)] = normal<T>(2 * (v[2 * n] * r - v[2 * n + 1] * i));
                coefficients[2 * (a * c.poles + n) + 1] = normal<T>(2 * (v[2 * n] * i + v[2 * n + 1] * r));
            }
        T* row = out + (g * c.rows + k) * c.steps;
        int64_t a = 0;
        for (; a + 4 <= chunks; a += 4)
            vandermonde_chunks<T, 4>(er.data(), ei.data(), coefficients.data() + 2 * a * c.poles, c.poles, width,
                                     c.steps - a * width, row + a * width);
        for (; a < chunks; ++a)
            vandermonde_chunks<T, 1>(er.data(), ei.data(), coefficients.data() + 2 * a * c.poles, c.poles, width,
                                     c.steps - a * width, row + a * width);
    }
}

// Y_b = sum over a of grad_(aT+b) e^(x a T) and Z_b = the same with the weight a T, for K poles and a vector of b.
template <class T, int K>
INLINE void vandermonde_backward_poles(const Vandermonde<T>& c, const T* padded, const T* jumps, const T* er,
                                       const T* ei, Vec<T>* sums) {
    const int64_t width = c.width(), chunks = c.chunks();
    for (int64_t j = 0; j < width; j += kLanes<T>) {
        Vec<T> acc[4 * K], ramp;
        for (auto& a : acc) a = Vec<T>{};
        for (int64_t a = 0; a < chunks; ++a) {
            Vec<T> gs;
            std::memcpy(&gs, padded + a * width + j, sizeof gs);
            for (int k = 0; k < K; ++k)
                for (int i = 0; i < 4; ++i) acc[4 * k + i] += gs * jumps[(k * chunks + a) * 4 + i];
        }
        for (int64_t i = 0; i < kLanes<T>; ++i) ramp[i] = T(j + i);
        for (int k = 0; k < K; ++k) {
            Vec<T> r, i;
            std::memcpy(&r, er + k * width + j, sizeof r), std::memcpy(&i, ei + k * width + j, sizeof i);
            const Vec<T> yr = acc[4 * k], yi = acc[4 * k + 1];
            const Vec<T> zr = acc[4 * k + 2] + ramp * yr, zi = acc[4 * k + 3] + ramp * yi;
            sums[4 * k] += yr * r - yi * i, sums[4 * k + 1] += yr * i + yi * r;
            sums[4 * k + 2] += zr * r - zi * i, sums[4 * k + 3] += zr * i + zi * r;
        }
    }
}

template <class T>
INLINE void vandermonde_backward_group(const Vandermonde<T>& c, int64_t g, const T* grad, T* grad_v, T* grad_x) {
    constexpr int kPoles = 4;
    const int64_t width = c.width(), chunks = c.chunks();
    std::vector<T> er(c.poles * width), ei(c.poles * width), jumps(c.poles * chunks * 4), padded(chunks * width);
    std::vector<double> jr(chunks), ji(chunks);
    short_powers(c, g, er.data(), ei.data());
    for (int64_t n = 0; n < c.poles; ++n) {
        powers(c.exponent(g, n) * double(width), chunks, jr.data(), ji.data());
        for (int64_t a = 0; a < chunks; ++a) {
            T* jump = &jumps[(n * chunks + a) * 4];
            jump[0] = normal<T>(jr[a]), jump[1] = normal<T>(ji[a]);
            jump[2] = normal<T>(jr[a] * double(a * width)), jump[3] = normal<T>(ji[a] * double(a * width));
        }
    }
    T* gx = grad_x + 2 * g * c.poles;
    std::fill(gx, gx + 2 * c.poles, T(0));
    for (int64_t k = 0; k < c.rows; ++k) {
        std::copy_n(grad + (g * c.rows + k) * c.steps, c.steps, padded.begin());
        const T* v = c.v + (g * c.rows + k) * c.poles * 2;
        T* gv = grad_v + (g * c.rows + k) * c.poles * 2;
        for (int64_t n = 0; n < c.poles;) {
            Vec<T> sums[4 * kPoles];
            for (auto& s : sums) s = Vec<T>{};
            const T *e = er.data() + n * width, *f = ei.data() + n * width, *jump = jumps.data() + n * chunks * 4;
            const int taken = n + kPoles <= c.poles ? kPoles : 1;
            if (taken == kPoles)
                vandermonde_backward_poles<T, kPoles>(c, padded.data(), jump, e, f, sums);
            else
                vandermonde_backward_poles<T, 1>(c, padded.data(), jump, e, f, sums);
            for (int i = 0; i < taken; ++i, ++n) {
                const T yr = 2 * total<T>(sums[4 * i]), yi = 2 * total<T>(sums[4 * i + 1]);
                const T zr = 2 * total<T>(sums[4 * i + 2]), zi = 2 * total<T>(sums[4 * i + 3]);
                gv[2 * n] = yr, gv[2 * n + 1] = -yi;
                gx[2 * n] += v[2 * n] * zr - v[2 * n + 1] * zi;  // the conjugate of v z
                gx[2 * n + 1] -= v[2 * n] * zi + v[2 * n + 1] * zr;
            }
        }
    }
}

// The entry points, once for each type.
#define SUMS(T, SUFFIX)                                                                                                \
    ENTRY(s4_cauchy_##SUFFIX)                                                                                          \
    (const T* v, const T* z, const T* w, T* out, int64_t groups, int64_t rows, int64_t poles, int64_t nodes,           \
     int64_t z_groups, int threads) {                                                                                  \
        const Cauchy<T> c{v, z, w, groups, rows, poles, nodes, z_groups};                                              \
        return parallel(groups * c.blocks(), threads, [&](int64_t task) { cauchy_block(c, task, out); });              \
    }                                                                                                                  \
    ENTRY(s4_cauchy_backward_##SUFFIX)                                                                                 \
    (const T* grad, const T* v, const T* z, const T* w, T* grad_v, T* grad_w, T* grad_z, int64_t groups, int64_t rows, \
     int64_t poles, int64_t nodes, int64_t z_groups, int threads) {                                                    \
        const Cauchy<T> c{v, z, w, groups, rows, poles, nodes, z_groups};                                              \
        const int64_t parts = std::min(poles, std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, groups)));       \
        const int failed = parallel(groups * parts, threads, [&](int64_t task) {                                       \
            const int64_t g = task / parts, part = task % parts;                                                       \
            cauchy_backward_task(c, g, part * poles / parts, (part + 1) * poles / parts, grad, grad_v, grad_w);        \
        });                                                                                                            \
        if (failed || !grad_z) return failed;                                                                          \
        return parallel(groups * c.blocks(), threads,                                                                  \
                        [&](int64_t task) { cauchy_backward_nodes(c, task, grad, grad_z); });                          \
    }                                                                                                                  \
    ENTRY(s4_vandermonde_##SUFFIX)                                                                                     \
    (const T* v, const T* x, T* out, int64_t groups, int64_t rows, int64_t poles, int64_t steps, int threads) {        \
        const Vandermonde<T> c{v, x, groups, rows, poles, steps};                                                      \
        return parallel(steps ? groups : 0, threads, [&](int64_t g) { vandermonde_group(c, g, out); });                \
    }                                                                                                                  \
    ENTRY(s4_vandermonde_backward_##SUFFIX)                                                                            \
    (const T* grad, const T* v, const T* x, T* grad_v, T* grad_x, int64_t groups, int64_t rows, int64_t poles,         \
     int64_t steps, int threads) {                                                                                     \
        const Vandermonde<T> c{v, x, groups, rows, poles, steps};                                                      \
        return parallel(groups, threads, [&](int64_t g) { vandermonde_backward_group(c, g, grad, grad_v, grad_x); });  \
    }

SUMS(float, c64)
SUMS(double, c128)
#undef SUMS
