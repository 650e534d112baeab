// Cauchy sums over conjugate pairs: vectorised over nodes, threaded over tasks.
//
// Complex numbers are interleaved (re, im); arrays are contiguous. Shapes: v (G, q, n), w (G, n), z (Gz, l) with Gz
// 1 or G.
//
// Cost of a Cauchy pair (one pole, one vector of nodes), with u = 1/(z-w) and u' = 1/(z-conj w): 13 instructions
// and two divisions (one in double precision) build P = u + u' and M = i (u - u'); every right-hand side then takes
// 4 multiply-adds, as v = a + i b contributes a P + b M. Nothing of size G n l is stored.

constexpr int64_t kBlock = 512;  // nodes whose arrays stay in the first-level cache

// P = 1/(z-w) + 1/(z-conj w) and M = i (1/(z-w) - 1/(z-conj w)) for a vector of nodes z = x + i y and w = p + i q.
template <class T>
struct Pair {
    Vec<T> s, d, e, ia, ib;
    Pair(Vec<T> x, Vec<T> y, T p, T q) {
        s = x - p, d = y - q, e = y + q;
        const Vec<T> a = s * s + d * d, b = s * s + e * e;
        if constexpr (sizeof(T) == 8) {  // one division for two; in single precision a b could leave the range
            const Vec<T> inverse = 1 / (a * b);
            ia = inverse * b, ib = inverse * a;
        } else {
            ia = 1 / a, ib = 1 / b;
        }
    }
    Vec<T> p_re() const { return s * (ia + ib); }
    Vec<T> p_im() const { return -(d * ia + e * ib); }
    Vec<T> m_re() const { return d * ia - e * ib; }
    Vec<T> m_im() const { return s * (ia - ib); }

    // E = u^2 + u'^2 and O = i (u^2 - u'^2), of u = 1/(z-w) and u' = 1/(z-conj w).
    void squares(Vec<T>& e_re, Vec<T>& e_im, Vec<T>& o_re, Vec<T>& o_im) const {
        const Vec<T> ur = s * ia, ui = -d * ia, vr = s * ib, vi = -e * ib;
        const Vec<T> u_re = ur * ur - ui * ui, u_im = 2 * ur * ui, v_re = vr * vr - vi * vi, v_im = 2 * vr * vi;
        e_re = u_re + v_re, e_im = u_im + v_im, o_re = v_im - u_im, o_im = u_re - v_re;
    }
};

// Real and imaginary parts of `count` >= 1 complex numbers in arrays padded to a multiple of the lanes: nodes with
// the last of them, so that no padding meets a pole which no node meets; gradients with zeros.
template <class T>
void split(const T* from, int64_t count, T* re, T* im, bool zeros = false) {
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
void cauchy_rows(const Cauchy<T>& c, const T* v, const T* w, const T* x, const T* y, int64_t count, T* out) {
    constexpr int64_t lanes = kLanes<T>;
    for (int64_t j = 0; j < count; j += lanes) {
        Vec<T> re[Q], im[Q];
        for (int k = 0; k < Q; ++k) re[k] = im[k] = Vec<T>{};
        const Vec<T> xs = load(x + j), ys = load(y + j);
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
            store(r, re[k]), store(i, im[k]);
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
void cauchy_block(const Cauchy<T>& c, int64_t task, T* out) {
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
void cauchy_backward_rows(const Cauchy<T>& c, int64_t g, int64_t row, int64_t first, int64_t last,
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
                Vec<T> t1r{}, t1i{}, t2r{}, t2i{}, er, ei, or_, oi;
                const Pair<T> pair(load(x + j), load(y + j), w[2 * n], w[2 * n + 1]);
                const Vec<T> p_re = pair.p_re(), p_im = pair.p_im(), m_re = pair.m_re(), m_im = pair.m_im();
                for (int k = 0; k < Q; ++k) {
                    const Vec<T> r = load(gr[k] + j), i = load(gi[k] + j);
                    const T a = v[2 * (k * c.poles + n)], b = v[2 * (k * c.poles + n) + 1];
                    acc[2 * k] += r * p_re + i * p_im;
                    acc[2 * k + 1] += r * m_re + i * m_im;
                    t1r += a * r, t1i -= a * i, t2r += b * r, t2i -= b * i;
                }
                pair.squares(er, ei, or_, oi);
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
void cauchy_backward_task(const Cauchy<T>& c, int64_t g, int64_t first, int64_t last, const T* grad, T* grad_v,
                                 T* grad_w) {
    std::fill(grad_w + 2 * (g * c.poles + first), grad_w + 2 * (g * c.poles + last), T(0));
    int64_t k = 0;
    for (; k + 4 <= c.rows; k += 4) cauchy_backward_rows<T, 4>(c, g, k, first, last, grad, grad_v, grad_w);
    for (; k + 2 <= c.rows; k += 2) cauchy_backward_rows<T, 2>(c, g, k, first, last, grad, grad_v, grad_w);
    for (; k < c.rows; ++k) cauchy_backward_rows<T, 1>(c, g, k, first, last, grad, grad_v, grad_w);
}

// Gradient of z (G, l): what `cauchy_backward_rows` leaves out, at the nodes of one block.
template <class T>
void cauchy_backward_nodes(const Cauchy<T>& c, int64_t task, const T* grad, T* grad_z) {
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
            const Vec<T> xs = load(x + j), ys = load(y + j), r = load(gr + j), i = load(gi + j);
            Vec<T> zr{}, zi{}, er, ei, or_, oi;
            for (int64_t n = 0; n < c.poles; ++n) {
                Pair<T>(xs, ys, w[2 * n], w[2 * n + 1]).squares(er, ei, or_, oi);
                zr += v[2 * n] * er + v[2 * n + 1] * or_;
                zi += v[2 * n] * ei + v[2 * n + 1] * oi;
            }
            store(re + j, load(re + j) - (r * zr + i * zi));  // grad conj(v u^2 + conj(v) u'^2)
            store(im + j, load(im + j) - (i * zr - r * zi));
        }
    }
    for (int64_t j = 0; j < count; ++j) {
        grad_z[2 * (g * c.nodes + start + j)] = re[j];
        grad_z[2 * (g * c.nodes + start + j) + 1] = im[j];
    }
}

template <class T>
int cauchy(Arguments in, int threads) {
    const Cauchy<T> c{in, in, in, in, in, in, in, in};
    T* out = in;
    return parallel(c.groups * c.blocks(), threads, [&](int64_t task) { cauchy_block(c, task, out); });
}

template <class T>
int cauchy_backward(Arguments in, int threads) {
    const T* grad = in;
    const Cauchy<T> c{in, in, in, in, in, in, in, in};
    T *grad_v = in, *grad_w = in, *grad_z = in;
    const int64_t parts = std::min(c.poles, std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, c.groups)));
    const int failed = parallel(c.groups * parts, threads, [&](int64_t task) {
        const int64_t g = task / parts, part = task % parts;
        cauchy_backward_task(c, g, part * c.poles / parts, (part + 1) * c.poles / parts, grad, grad_v, grad_w);
    });
    if (failed || !grad_z) return failed;
    return parallel(c.groups * c.blocks(), threads,
                    [&](int64_t task) { cauchy_backward_nodes(c, task, grad, grad_z); });
}
