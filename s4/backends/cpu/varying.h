// A recurrence whose step of time differs from input to input, as s4/ops/varying.py defines it, in double precision.
//
// A vector holds one number of each of kDoubles neighbouring channels, so that sums over modes need no sums over lanes.
// A task takes such a group through some sequences of the batch. Its states stay in the first-level cache. The gradient
// runs forward once to have the states at borders of chunks, then goes back, chunk by chunk, through states made again.
//
// Arrays are contiguous: u and y (B, L, H), rate (B, L), states (B, P, H, 2n), x (B, H, 2n), Lambda, B and C (H, 2n),
// P (r, H, 2n), D and dt (H), resets (B, L) or null, positions (B, P). A state holds the n real, then the n imaginary
// parts of its modes; within a group the two of a mode are neighbours.

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

template <class T>
struct Varying {
    const T* u;
    const double* rate;
    const T* x;
    const double *Lambda, *P, *B, *C, *D, *dt;
    const bool* resets;
    const int64_t* positions;
    int64_t batch, length, channels, modes, rank, wanted, hold;

    int64_t groups() const { return (channels + kGroup - 1) / kGroup; }
    int64_t lanes(int64_t group) const { return std::min(kGroup, channels - group * kGroup); }
    bool starts(int64_t b, int64_t t) const { return resets && resets[b * length + t]; }

    Lanes take(const T* from, int64_t count) const {
        typedef T Narrow __attribute__((vector_size(kGroup * sizeof(T))));
        Narrow narrow{};
        if (count == kGroup)
            std::memcpy(&narrow, from, sizeof narrow);
        else
            for (int64_t i = 0; i < count; ++i) narrow[i] = from[i];
        return __builtin_convertvector(narrow, Lanes);
    }
    void put(T* to, Lanes value, int64_t count) const {
        typedef T Narrow __attribute__((vector_size(kGroup * sizeof(T))));
        const Narrow narrow = __builtin_convertvector(value, Narrow);
        if (count == kGroup)
            std::memcpy(to, &narrow, sizeof narrow);
        else
            for (int64_t i = 0; i < count; ++i) to[i] = narrow[i];
    }
    // A state of a group, from the rows of its channels, and back; `fields` vectors from a mode to the next.
    template <class S>
    void gather(const S* from, int64_t count, double* to, int64_t fields = 2, bool add = false) const {
        for (int64_t j = 0; j < modes; ++j)
            for (int64_t part = 0; part < 2; ++part)
                for (int64_t i = 0; i < count; ++i) {
                    double& value = to[(j * fields + part) * kGroup + i];
                    value = from[i * 2 * modes + part * modes + j] + (add ? value : 0.0);
                }
    }
    template <class S>
    void scatter(const double* from, int64_t count, S* to, int64_t fields = 2) const {
        for (int64_t j = 0; j < modes; ++j)
            for (int64_t part = 0; part < 2; ++part)
                for (int64_t i = 0; i < count; ++i)
                    to[i * 2 * modes + part * modes + j] = S(from[(j * fields + part) * kGroup + i]);
    }
    // Positions of a sequence in their order, and which they are; those that there are none of come last.
    std::vector<std::pair<int64_t, int64_t>> order(int64_t b) const {
        std::vector<std::pair<int64_t, int64_t>> found(wanted);
        for (int64_t p = 0; p < wanted; ++p) found[p] = {positions[b * wanted + p], p};
        std::sort(found.begin(), found.end());
        return found;
    }
};

// The systems of one group; channels that there are none of have zeros, and one unit of time.
template <class Rule, class T>
struct Group {
    Buffer<double> fields;
    Lanes dt, D;
    int64_t first, count;

    Group(const Varying<T>& c, int64_t group)
        : fields(c.modes * Rule::kFields * kGroup), dt(all(1.0)), D(all(0.0)), first(group * kGroup), count(c.lanes(group)) {
        std::fill(fields.data, fields.data + c.modes * Rule::kFields * kGroup, 0.0);
        const int64_t start = first * 2 * c.modes;
        c.gather(c.Lambda + start, count, fields.data, Rule::kFields);
        c.gather(c.B + start, count, fields.data + 2 * kGroup, Rule::kFields);
        c.gather(c.C + start, count, fields.data + 4 * kGroup, Rule::kFields);
        for (int64_t r = 0; r < c.rank; ++r)
            c.gather(c.P + r * c.channels * 2 * c.modes + start, count, fields.data + (6 + 2 * r) * kGroup, Rule::kFields);
        for (int64_t j = 0; j < c.modes; ++j) Rule::prepare(fields.data + j * Rule::kFields * kGroup);
        for (int64_t i = 0; i < count; ++i) dt[i] = c.dt[first + i], D[i] = c.D[first + i];
    }
};

template <class Rule, class T>
void varying_of(const Varying<T>& c, int64_t group, int64_t from, int64_t to, T* y, T* states) {
    const Group<Rule, T> g(c, group);
    const int64_t N = 2 * c.modes, size = N * kGroup;
    const Buffer<double> numbers(2 * size + Rule::kKept * kGroup);
    double *x = numbers.data, *work = x + size, *kept = work + size;
    for (int64_t b = from; b < to; ++b) {
        const auto order = c.order(b);
        auto next = order.begin();
        const auto give = [&](bool due) {
            T* out = states + ((b * c.wanted + next->second) * c.channels + g.first) * N;
            if (due) c.scatter(x, g.count, out), ++next;
            return due;
        };
        std::fill(x, x + size, 0.0);
        c.gather(c.x + (b * c.channels + g.first) * N, g.count, x);
        while (next != order.end() && give(next->first < 0)) {}
        for (int64_t t = 0; t < c.length; ++t) {
            if (c.starts(b, t)) std::fill(x, x + size, 0.0);
            const int64_t at = (b * c.length + t) * c.channels + g.first;
            const Lanes u = c.take(c.u + at, g.count), step = c.rate[b * c.length + t] * g.dt;
            c.put(y + at, Rule::forward(g.fields.data, c.modes, step, u, x, x, work, kept) + g.D * u, g.count);
            while (next != order.end() && give(next->first <= t)) {}
        }
        while (next != order.end()) give(true);
    }
}

// What the gradient of a task's sequences adds to those that all sequences share: fields of all modes, dt and D.
template <class Rule, class T>
struct Backward {
    const Varying<T>& c;
    const T *of_y, *of_states;
    T *of_u, *of_x;
    double *of_rate, *shared;  // (groups, B, L); (groups, parts, ...)
    int64_t parts;

    int64_t numbers() const { return (c.modes * Rule::kGradients + 2) * kGroup; }
    int64_t chunk() const {
        int64_t K = 16;
        while (2 * K * K < c.length) K *= 2;
        return std::min(K, std::max<int64_t>(c.length, 1));
    }

    void run(int64_t group, int64_t part) const {
        const Group<Rule, T> g(c, group);
        const int64_t L = c.length, N = 2 * c.modes, size = N * kGroup, K = chunk(), count = (L + K - 1) / K;
        double *sums = shared + (group * parts + part) * numbers(), *rest = sums + c.modes * Rule::kGradients * kGroup;
        std::fill(sums, sums + numbers(), 0.0);
        const Buffer<double> memory((2 + std::max<int64_t>(count, 1) + 2 * K) * size + K * Rule::kKept * kGroup);
        double *none = memory.data, *gradient = none + size, *borders = gradient + size;
        double *states = borders + std::max<int64_t>(count, 1) * size, *work = states + K * size, *kept = work + K * size;
        std::fill(none, none + size, 0.0);
        Lanes of_dt{}, of_D{};
        for (int64_t b = part * c.batch / parts; b < (part + 1) * c.batch / parts; ++b) {
            const auto order = c.order(b);
            auto next = order.rbegin();
            const auto step = [&](int64_t t) { return c.rate[b * L + t] * g.dt; };
            const auto input = [&](int64_t t) { return c.take(c.u + (b * L + t) * c.channels + g.first, g.count); };
            const auto receive = [&] {
                const T* from = of_states + ((b * c.wanted + next->second) * c.channels + g.first) * N;
                c.gather(from, g.count, gradient, 2, true), ++next;
            };
            std::fill(borders, borders + size, 0.0);
            c.gather(c.x + (b * c.channels + g.first) * N, g.count, borders);
            for (int64_t t = 0; t < (count - 1) * K; ++t) {
                double* border = borders + t / K * size;
                const double* before = c.starts(b, t) ? none : t % K ? states : border;
                double* after = (t + 1) % K ? states : border + size;
                Rule::forward(g.fields.data, c.modes, step(t), input(t), before, after, work, kept);
            }
            std::fill(gradient, gradient + size, 0.0);
            while (next != order.rend() && next->first >= L) ++next;  // there are none
            for (int64_t chunk = count - 1; chunk >= 0; --chunk) {
                const int64_t first = chunk * K, steps = std::min(K, L - first);
                const auto before = [&](int64_t k) {
                    return c.starts(b, first + k) ? none : k ? states + (k - 1) * size : borders + chunk * size;
                };
                for (int64_t k = 0; k < steps; ++k)
                    Rule::forward(g.fields.data, c.modes, step(first + k), input(first + k), before(k), states + k * size,
                                  work + k * size, kept + k * Rule::kKept * kGroup);
                for (int64_t k = steps - 1; k >= 0; --k) {
                    const int64_t t = first + k, at = (b * L + t) * c.channels + g.first;
                    while (next != order.rend() && next->first == t) receive();
                    const Lanes u = input(t), gy = c.take(of_y + at, g.count);
                    Lanes found_u, found_step;
                    Rule::backward(g.fields.data, c.modes, step(t), u, gy, before(k), states + k * size, work + k * size,
                                   kept + k * Rule::kKept * kGroup, gradient, sums, found_u, found_step);
                    if (c.starts(b, t)) std::fill(gradient, gradient + size, 0.0);
                    of_dt += c.rate[b * L + t] * found_step, of_D += gy * u;
                    of_rate[(group * c.batch + b) * L + t] = total<double>(found_step * g.dt);
                    c.put(of_u + at, found_u + g.D * gy, g.count);
                }
            }
            while (next != order.rend()) receive();
            c.scatter(gradient, g.count, of_x + (b * c.channels + g.first) * N);
        }
        Rule::finish(g.fields.data, c.modes, sums);
        store<double>(rest, of_dt), store<double>(rest + kGroup, of_D);
    }
};

template <class Rule, class T>
int varying_by(const Varying<T>& c, T* y, T* states, int threads) {
    const int64_t parts = std::clamp<int64_t>(4 * threads / std::max<int64_t>(1, c.groups()), 1, std::max<int64_t>(1, c.batch));
    return parallel(c.groups() * parts, threads, [&](int64_t task) {
        const int64_t part = task % parts;
        varying_of<Rule, T>(c, task / parts, part * c.batch / parts, (part + 1) * c.batch / parts, y, states);
    });
}

struct Found {
    double *rate, *Lambda, *P, *B, *C, *D, *dt;
};

template <class Rule, class T>
int varying_backward_by(const Varying<T>& c, const T* of_y, const T* of_states, T* of_u, T* of_x, const Found& to,
                        int threads) try {
    const int64_t groups = c.groups(), N = 2 * c.modes, steps = c.batch * c.length;
    const int64_t parts = std::clamp<int64_t>(c.batch, 1, 8);  // of any number of threads: sums have one order
    Backward<Rule, T> run{c, of_y, of_states, of_u, of_x, nullptr, nullptr, parts};
    const Buffer<double> memory(groups * (steps + parts * run.numbers()));
    run.of_rate = memory.data, run.shared = memory.data + groups * steps;
    if (parallel(groups * parts, threads, [&](int64_t task) { run.run(task / parts, task % parts); })) return 1;
    std::fill(to.rate, to.rate + steps, 0.0);
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t i = 0; i < steps; ++i) to.rate[i] += run.of_rate[group * steps + i];
        double* sums = run.shared + group * parts * run.numbers();
        for (int64_t i = run.numbers(); i < parts * run.numbers(); ++i) sums[i % run.numbers()] += sums[i];
        const int64_t count = c.lanes(group), first = group * kGroup, start = first * N;
        c.scatter(sums, count, to.Lambda + start, Rule::kGradients);
        c.scatter(sums + 2 * kGroup, count, to.B + start, Rule::kGradients);
        c.scatter(sums + 4 * kGroup, count, to.C + start, Rule::kGradients);
        for (int64_t r = 0; r < c.rank; ++r)
            c.scatter(sums + (6 + 2 * r) * kGroup, count, to.P + r * c.channels * N + start, Rule::kGradients);
        const double* rest = sums + c.modes * Rule::kGradients * kGroup;
        std::copy_n(rest, count, to.dt + first), std::copy_n(rest + kGroup, count, to.D + first);
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

template <class T>
int varying(Arguments in, int threads) {
    const Varying<T> c{in, in, in, in, in, in, in, in, in, in, in, in, in, in, in, in, in, in};
    T *y = in, *states = in;
    if (c.hold) return varying_by<Hold>(c, y, states, threads);
    if (c.rank == 0) return varying_by<Bilinear<0>>(c, y, states, threads);
    return c.rank == 1 ? varying_by<Bilinear<1>>(c, y, states, threads) : varying_by<Bilinear<2>>(c, y, states, threads);
}

template <class T>
int varying_backward(Arguments in, int threads) {
    const T *y = in, *states = in;
    const Varying<T> c{in, in, in, in, in, in, in, in, in, in, in, in, in, in, in, in, in, in};
    T* u = in;
    double* rate = in;
    T* x = in;
    const Found to{rate, in, in, in, in, in, in};
    if (c.hold) return varying_backward_by<Hold>(c, y, states, u, x, to, threads);
    if (c.rank == 0) return varying_backward_by<Bilinear<0>>(c, y, states, u, x, to, threads);
    return c.rank == 1 ? varying_backward_by<Bilinear<1>>(c, y, states, u, x, to, threads)
                       : varying_backward_by<Bilinear<2>>(c, y, states, u, x, to, threads);
}
