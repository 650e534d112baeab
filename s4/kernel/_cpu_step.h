// One step of a recurrence x <- A x + B u, y = C x + D u, for a batch and all channels: every number is read once.
// What decays in silence becomes 0, not denormal: rounding would keep it there, at three times the cost of a step.
//
// Arrays are contiguous: state and its successor (batch, H, 2n), u and y (batch, H), a, B and C (H, 2n), F and G
// (r, H, 2n) with r up to 2, D (H); a vector holds the n real, then the n imaginary parts of its modes.

// Modes below which one thread steps alone: to wake another takes as long.
constexpr int64_t kAlone = 1 << 15;

template <class T>
struct Step {
    const T *a, *F, *G, *B, *C, *D, *state, *u;
    T *y, *next;
    int64_t batch, channels, modes;
};

template <class T>
INLINE Vec<T> take(const T* from, int64_t count) {
    Vec<T> value{};
    if (count >= kLanes<T>)
        std::memcpy(&value, from, sizeof value);
    else
        std::memcpy(&value, from, count * sizeof(T));
    return value;
}

template <class T>
INLINE void put(T* to, Vec<T> value, int64_t count) {
    if (count >= kLanes<T>)
        std::memcpy(to, &value, sizeof value);
    else
        std::memcpy(to, &value, count * sizeof(T));
}

template <class T>
INLINE Vec<T> normal(Vec<T> value) {
    return (value < kTiny<T>)&(value > -kTiny<T>) ? Vec<T>{} : value;  // NaN stays
}

template <class T>
INLINE T dot(const T* x, const T* y, int64_t count) {
    Vec<T> sum{};
    for (int64_t j = 0; j < count; j += kLanes<T>) sum += take(x + j, count - j) * take(y + j, count - j);
    return total<T>(sum);
}

// Reads a state before it writes there: `next` may be `state`.
template <class T, int R>
INLINE void step_of(const Step<T>& s, int64_t h) {
    const int64_t n = s.modes, N = 2 * n;
    const T *a = s.a + h * N, *B = s.B + h * N, *C = s.C + h * N;
    for (int64_t b = 0; b < s.batch; ++b) {
        const int64_t at = b * s.channels + h;
        const T *x = s.state + at * N, u = s.u[at];
        T* moved = s.next + at * N;
        T coefficient[R + 1];
        for (int r = 0; r < R; ++r) coefficient[r] = dot(s.G + (r * s.channels + h) * N, x, N);
        Vec<T> sum{};
        for (int64_t j = 0; j < n; j += kLanes<T>) {
            const int64_t left = n - j;
            const Vec<T> re = take(x + j, left), im = take(x + n + j, left);
            const Vec<T> a_re = take(a + j, left), a_im = take(a + n + j, left);
            Vec<T> next_re = a_re * re - a_im * im + u * take(B + j, left);
            Vec<T> next_im = a_re * im + a_im * re + u * take(B + n + j, left);
            for (int r = 0; r < R; ++r) {
                const T* F = s.F + (r * s.channels + h) * N;
                next_re += coefficient[r] * take(F + j, left), next_im += coefficient[r] * take(F + n + j, left);
            }
            next_re = normal<T>(next_re), next_im = normal<T>(next_im);
            put(moved + j, next_re, left), put(moved + n + j, next_im, left);
            sum += next_re * take(C + j, left) + next_im * take(C + n + j, left);
        }
        s.y[at] = total<T>(sum) + s.D[h] * u;
    }
}

template <class T, int R>
int steps(const Step<T>& s, int threads) {
    const int64_t tasks = s.batch * s.channels * s.modes < kAlone ? 1 : std::min<int64_t>(s.channels, 64);
    return parallel(tasks, threads, [&](int64_t task) {
        for (int64_t h = task * s.channels / tasks; h < (task + 1) * s.channels / tasks; ++h) step_of<T, R>(s, h);
    });
}

#define STEP(T, SUFFIX)                                                                                                \
    ENTRY(s4_step_##SUFFIX)                                                                                            \
    (const T* a, const T* F, const T* G, const T* B, const T* C, const T* D, const T* state, const T* u, T* y,         \
     T* next, int64_t batch, int64_t channels, int64_t modes, int64_t rank, int threads) {                             \
        const Step<T> s{a, F, G, B, C, D, state, u, y, next, batch, channels, modes};                                  \
        return rank == 0 ? steps<T, 0>(s, threads) : rank == 1 ? steps<T, 1>(s, threads) : steps<T, 2>(s, threads);    \
    }

STEP(float, f32)
STEP(double, f64)
#undef STEP
