// One step of time of a continuous system, forward and back, by each discretisation of s4/system.py: of varying.h.
//
// A vector holds one number of each of kDoubles neighbouring channels, so that sums over modes need no sums over lanes.
// The real and the imaginary part of a mode are neighbours.

using Lanes = Vec<double>;
constexpr int64_t kGroup = kDoubles;  // channels

struct Complex {
    Lanes re, im;
};

INLINE Complex complex(const double* from) { return {load(from), load(from + kGroup)}; }
INLINE void store(double* to, Complex z) { store<double>(to, z.re), store<double>(to + kGroup, z.im); }
INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
INLINE Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
INLINE Complex operator*(Lanes s, Complex a) { return {s * a.re, s * a.im}; }
INLINE Complex conjugate(Complex a) { return {a.re, -a.im}; }
INLINE Lanes dot(Complex a, Complex b) { return a.re * b.re + a.im * b.im; }
INLINE Lanes all(double value) { return value - Lanes{}; }
INLINE void add(double* to, Complex z) { store(to, complex(to) + z); }

// coefficients[0] + x coefficients[1] + ...
template <int Count, class V>
INLINE V polynomial(V x, const double (&coefficients)[Count]) {
    V sum = coefficients[Count - 1] - V{};
#pragma GCC unroll 16
    for (int k = Count - 2; k >= 0; --k) sum = sum * x + coefficients[k];
    return sum;
}

// e^x - 1 for x up to 0, or to 708, to all digits. With x = k log 2 + r, |r| < 0.35; polynomials here are interpolated
// at Chebyshev's nodes, within 2^-55 of the function.
INLINE Lanes expm1(Lanes x) {
    typedef int64_t Bits __attribute__((vector_size(S4_BYTES)));
    constexpr double series[] = {
        0x1.0000000000001p-1, 0x1.5555555555556p-3, 0x1.5555555553d63p-5, 0x1.11111111109b3p-7,
        0x1.6c16c1788bd90p-10, 0x1.a01a01a7c41d5p-13, 0x1.a019b90d2ae7ap-16, 0x1.71de0dae63bb3p-19,
        0x1.289185613a3d6p-22, 0x1.af38a9b0ec855p-26};
    constexpr double shift = 6755399441055744.0;  // 1.5 2^52: the last bits of a sum with it are an integer
    x = x < -708.0 ? all(-708.0) : x;
    const Lanes shifted = x * 0x1.71547652b82fep+0 + shift, k = shifted - shift;
    const Lanes r = x - k * 0x1.62e42fefa2p-1 - k * 0x1.9ef35793c7673p-41;
    const Lanes mean = r + r * r * polynomial(r, series);
    Bits bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;
    Lanes power;
    std::memcpy(&power, &bits, sizeof power);
    return power * mean + (power - 1);
}

// e^z - 1, of a size as exact as that of z: from the sine and cosine of a quarter of z.im, less whole turns.
INLINE Complex expm1(Complex z) {
    constexpr double sines[] = {
        -0x1.5555555555555p-3, 0x1.1111111110bb2p-7, -0x1.a01a019e83816p-13, 0x1.71de379654304p-19,
        -0x1.ae600aca92c64p-26, 0x1.5e0b05bff20f2p-33};
    constexpr double cosines[] = {
        0x1.5555555555555p-5, -0x1.6c16c16c16967p-10, 0x1.a01a019f4e9b4p-16, -0x1.27e4fa17bf139p-22,
        0x1.1eeb68cd22f56p-29, -0x1.907d8f29fe831p-37};
    constexpr double shift = 6755399441055744.0;
    const Lanes turns = (z.im * 0x1.45f306dc9c883p-3 + shift) - shift;
    // The first two products are exact up to 2^22 turns.
    Lanes t = (z.im - turns * 0x1.921fb544p+2 - turns * 0x1.0b4611a4p-32 - turns * 0x1.13198a2e03707p-63) / 4;
    t = t > 1.0 ? all(1.0) : t;  // past all digits
    t = t < -1.0 ? all(-1.0) : t;
    const Lanes square = t * t;
    const Lanes sine = t + t * square * polynomial(square, sines);
    const Lanes cosine = 1 - square / 2 + square * square * polynomial(square, cosines);
    const Lanes half_sine = 2 * sine * cosine, half_cosine = 1 - 2 * sine * sine;
    const Lanes growth = expm1(z.re), less = -2 * half_sine * half_sine;  // cos - 1
    const Lanes size = growth + 1;
    return {growth + size * less, size * (2 * half_sine * half_cosine)};
}

// A discretisation is how a state goes one step of time, and how a gradient comes back. Fields of a mode: Lambda, B, C,
// then its own; those of gradients begin with the same three.

// Tustin's rule: with w = x + dt/2 B u and v = (I - dt/2 A)^-1 w, x' = 2 v - x. By Woodbury's identity, where D is the
// inverse of the diagonal part, v = D (w - P c) with c = S^-1 dt Re(P* D w), S = I + dt Re(P* D P) over stored modes.
template <int R>
struct Bilinear {
    static constexpr int64_t kFields = 6 + 2 * R + R * R, kGradients = 6 + 2 * R;
    static constexpr int64_t kKept = R + R * R;  // numbers that a step keeps for its gradient: c and the inverse of S

    static void prepare(double* f) {
        if constexpr (R > 0) {
            const Complex p = complex(f + 6 * kGroup);
            store<double>(f + (6 + 2 * R) * kGroup, dot(p, p));
            if constexpr (R == 2) {
                const Complex q = complex(f + 8 * kGroup);
                store<double>(f + 11 * kGroup, dot(q, q));
                store(f + 12 * kGroup, conjugate(p) * q);
            }
        }
    }

    INLINE static Complex low_rank(const double* f, const Lanes* c) {
        Complex sum{};
        for (int r = 0; r < R; ++r) sum = sum + c[r] * complex(f + (6 + 2 * r) * kGroup);
        return sum;
    }

    // Returns C x'. `inverse` takes D of all modes; `next` may be x.
    INLINE static Lanes forward(const double* f, int64_t n, Lanes step, Lanes u, const double* x, double* next,
                                double* inverse, double* kept) {
        const Lanes h = step / 2, hu = h * u;
        Lanes s[R + 1]{}, S[4]{}, c[R + 1]{}, y{};
        for (int64_t j = 0; j < n; ++j) {
            const double* mode = f + j * kFields * kGroup;
            const Complex Lambda = complex(mode);
            const Lanes a = 1 - h * Lambda.re, b = h * Lambda.im, size = 1 / (a * a + b * b);
            const Complex D{a * size, b * size};
            store(inverse + 2 * j * kGroup, D);
            if constexpr (R > 0) {
                const Complex w = complex(x + 2 * j * kGroup) + hu * complex(mode + 2 * kGroup), Dw = D * w;
                for (int r = 0; r < R; ++r) s[r] += dot(complex(mode + (6 + 2 * r) * kGroup), Dw);
                S[0] += load(mode + (6 + 2 * R) * kGroup) * D.re;
                if constexpr (R == 2) {
                    const Complex both = complex(mode + 12 * kGroup);
                    S[3] += load(mode + 11 * kGroup) * D.re;
                    S[1] += both.re * D.re - both.im * D.im, S[2] += both.re * D.re + both.im * D.im;
                }
            }
        }
        if constexpr (R == 1) {
            const Lanes found = 1 / (1 + step * S[0]);
            c[0] = found * (step * s[0]);
            store<double>(kept, c[0]), store<double>(kept + kGroup, found);
        }
        if constexpr (R == 2) {
            const Lanes first = 1 + step * S[0], last = 1 + step * S[3], upper = step * S[1], lower = step * S[2];
            const Lanes scale = 1 / (first * last - upper * lower);
            const Lanes found[4] = {scale * last, -scale * upper, -scale * lower, scale * first};
            c[0] = step * (found[0] * s[0] + found[1] * s[1]), c[1] = step * (found[2] * s[0] + found[3] * s[1]);
            for (int r = 0; r < 2; ++r) store<double>(kept + r * kGroup, c[r]);
            for (int i = 0; i < 4; ++i) store<double>(kept + (2 + i) * kGroup, found[i]);
        }
        for (int64_t j = 0; j < n; ++j) {
            const double* mode = f + j * kFields * kGroup;
            const Complex before = complex(x + 2 * j * kGroup), w = before + hu * complex(mode + 2 * kGroup);
            const Complex v = complex(inverse + 2 * j * kGroup) * (w - low_rank(mode, c));
            const Complex after{2 * v.re - before.re, 2 * v.im - before.im};
            store(next + 2 * j * kGroup, after);
            y += dot(complex(mode + 4 * kGroup), after);
        }
        return y;
    }

    // With g the gradient of x', (I - dt/2 A)* q = 2 g gives that of w; c' is to q what c is to v.
    INLINE static void backward(const double* f, int64_t n, Lanes step, Lanes u, Lanes of_y, const double* x,
                                const double* next, const double* inverse, const double* kept, double* g,
                                double* sums, Lanes& of_u, Lanes& of_step) {
        const Lanes h = step / 2, hu = h * u;
        Lanes s[R + 1]{}, c[R + 1]{}, before[R + 1]{}, of_A{}, of_input{};
        for (int64_t j = 0; j < n; ++j) {
            const double* mode = f + j * kFields * kGroup;
            const Complex whole = complex(g + 2 * j * kGroup) + of_y * complex(mode + 4 * kGroup);
            store(g + 2 * j * kGroup, whole);
            if constexpr (R > 0) {
                const Complex Dg = conjugate(complex(inverse + 2 * j * kGroup)) * whole;
                for (int r = 0; r < R; ++r) s[r] += dot(complex(mode + (6 + 2 * r) * kGroup), Dg);
            }
        }
        for (int r = 0; r < R; ++r) {
            before[r] = load(kept + r * kGroup);
            for (int i = 0; i < R; ++i) c[r] += load(kept + (R + R * i + r) * kGroup) * (2 * step * s[i]);
        }
        for (int64_t j = 0; j < n; ++j) {
            const double* mode = f + j * kFields * kGroup;
            double* sum = sums + j * kGradients * kGroup;
            const Complex Lambda = complex(mode), whole = complex(g + 2 * j * kGroup);
            const Complex after = complex(next + 2 * j * kGroup), mean = complex(x + 2 * j * kGroup) + after;
            const Complex v{mean.re / 2, mean.im / 2};
            const Complex rest = whole + whole - low_rank(mode, c);
            const Complex q = conjugate(complex(inverse + 2 * j * kGroup)) * rest;
            const Complex of_Lambda = q * conjugate(v);
            of_A += dot(Lambda, of_Lambda), of_input += dot(q, complex(mode + 2 * kGroup));
            add(sum, h * of_Lambda), add(sum + 2 * kGroup, hu * q), add(sum + 4 * kGroup, of_y * after);
            for (int r = 0; r < R; ++r)
                add(sum + (6 + 2 * r) * kGroup, Complex{} - (before[r] * q + c[r] * v));
            store(g + 2 * j * kGroup, q - whole);
        }
        of_u = h * of_input;
        of_step = (of_A + u * of_input) / 2;
        for (int r = 0; r < R; ++r) of_step -= (c[r] / step) * (before[r] / step);
    }

    static void finish(const double*, int64_t, double*) {}
};

// Zero-order hold of a diagonal system: with q = e^(dt Lambda) - 1, x' = x + q (x + B u / Lambda).
struct Hold {
    static constexpr int64_t kFields = 10, kGradients = 8, kKept = 0;

    // 1 / Lambda and B / Lambda. A Lambda next to 0 is one that leaves all digits to the limit.
    static void prepare(double* f) {
        constexpr double least = 1e-140;
        for (int64_t lane = 0; lane < kGroup; ++lane) {
            double &re = f[lane], &im = f[kGroup + lane];
            if (std::abs(re) < least && std::abs(im) < least) re = -least, im = 0;
            const double scale = std::max(std::abs(re), std::abs(im)), a = re / scale, b = im / scale;
            f[6 * kGroup + lane] = a / (a * a + b * b) / scale, f[7 * kGroup + lane] = -b / (a * a + b * b) / scale;
        }
        store(f + 8 * kGroup, complex(f + 2 * kGroup) * complex(f + 6 * kGroup));
    }

    INLINE static Lanes forward(const double* f, int64_t n, Lanes step, Lanes u, const double* x, double* next,
                                double* grown, double*) {
        Lanes y{};
        for (int64_t j = 0; j < n; ++j) {
            const double* mode = f + j * kFields * kGroup;
            const Complex q = expm1(step * complex(mode)), before = complex(x + 2 * j * kGroup);
            const Complex after = before + q * (before + u * complex(mode + 8 * kGroup));
            store(grown + 2 * j * kGroup, q);
            store(next + 2 * j * kGroup, after);
            y += dot(complex(mode + 4 * kGroup), after);
        }
        return y;
    }

    INLINE static void backward(const double* f, int64_t n, Lanes step, Lanes u, Lanes of_y, const double* x,
                                const double* next, const double* grown, const double*, double* g, double* sums,
                                Lanes& of_u, Lanes& of_step) {
        constexpr double series[] = {1.0 / 2, 1.0 / 3, 1.0 / 8, 1.0 / 30, 1.0 / 144, 1.0 / 840};
        of_u = of_step = Lanes{};
        for (int64_t j = 0; j < n; ++j) {
            const double* mode = f + j * kFields * kGroup;
            double* sum = sums + j * kGradients * kGroup;
            const Complex Lambda = complex(mode), B = complex(mode + 2 * kGroup), inverse = complex(mode + 6 * kGroup);
            const Complex q = complex(grown + 2 * j * kGroup), before = complex(x + 2 * j * kGroup);
            const Complex whole = complex(g + 2 * j * kGroup) + of_y * complex(mode + 4 * kGroup);
            const Complex back = whole + conjugate(q) * whole;
            const Complex held = q * inverse;  // Bbar / B
            // Its derivative by Lambda: dt^2 (z e^z - e^z + 1) / z^2, next to z = dt Lambda = 0 by its series.
            const Complex z = step * Lambda, away = (Complex{step, Lanes{}} + step * q - held) * inverse;
            Complex near{all(series[5]), Lanes{}};
#pragma GCC unroll 8
            for (int k = 4; k >= 0; --k) near = near * z, near.re += series[k];
            near = (step * step) * near;
            const auto small = dot(z, z) < 1e-4;
            const Complex slope{small ? near.re : away.re, small ? near.im : away.im};
            of_step += dot(back, Lambda * before + u * B);
            of_u += dot(whole, held * B);
            add(sum, step * (back * conjugate(before)));
            add(sum + 2 * kGroup, u * (conjugate(held) * whole));
            add(sum + 4 * kGroup, of_y * complex(next + 2 * j * kGroup));
            add(sum + 6 * kGroup, u * (conjugate(slope) * whole));
            store(g + 2 * j * kGroup, back);
        }
    }

    static void finish(const double* f, int64_t n, double* sums) {
        for (int64_t j = 0; j < n; ++j) {
            double* sum = sums + j * kGradients * kGroup;
            add(sum, conjugate(complex(f + (j * kFields + 2) * kGroup)) * complex(sum + 6 * kGroup));
        }
    }
};
