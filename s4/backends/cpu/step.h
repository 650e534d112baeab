// One step of a recurrence x <- A x + B u, y = C x + D u, for a batch and all channels, in one pass.
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

template <class V, class T>
INLINE V take(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Channel h of the sequences [first, first + Rows). Reads a state before it writes there: `next` may be `state`.
template <class T, class V, int R, int Rows>
INLINE void step_of(const Step<T>& s, int64_t h, int64_t first) {
    constexpr int64_t lanes = sizeof(V) / sizeof(T);
    const int64_t n = s.modes, N = 2 * n, row = s.channels * N, at = first * s.channels + h;
    const T *a = s.a + h * N, *B = s.B + h * N, *C = s.C + h * N, *x = s.state + at * N;
    T* moved = s.next + at * N;
    T u[Rows], coefficient[R + 1][Rows];
    for (int b = 0; b < Rows; ++b) u[b] = s.u[at + b * s.channels];
    for (int r = 0; r < R; ++r) {
        const T* G = s.G + (r * s.channels + h) * N;
        V sum[Rows]{};
        for (int64_t j = 0; j < N; j += lanes)
            for (int b = 0; b < Rows; ++b) sum[b] += take<V>(G + j) * take<V>(x + b * row + j);
        for (int b = 0; b < Rows; ++b) coefficient[r][b] = total<T>(sum[b]);
    }
    V sum[Rows]{};
    for (int64_t j = 0; j < n; j += lanes) {
        const V a_re = take<V>(a + j), a_im = take<V>(a + n + j), B_re = take<V>(B + j), B_im = take<V>(B + n + j),
                C_re = take<V>(C + j), C_im = take<V>(C + n + j);
        V F_re[R + 1], F_im[R + 1];
        for (int r = 0; r < R; ++r) {
            const T* F = s.F + (r * s.channels + h) * N;
            F_re[r] = take<V>(F + j), F_im[r] = take<V>(F + n + j);
        }
        for (int b = 0; b < Rows; ++b) {
            const V re = take<V>(x + b * row + j), im = take<V>(x + b * row + n + j);
            V next_re = a_re * re - a_im * im + u[b] * B_re, next_im = a_re * im + a_im * re + u[b] * B_im;
            for (int r = 0; r < R; ++r)
                next_re += coefficient[r][b] * F_re[r], next_im += coefficient[r][b] * F_im[r];
            std::memcpy(moved + b * row + j, &next_re, sizeof next_re);
            std::memcpy(moved + b * row + n + j, &next_im, sizeof next_im);
            sum[b] += next_re * C_re + next_im * C_im;
        }
    }
    for (int b = 0; b < Rows; ++b) s.y[at + b * s.channels] = total<T>(sum[b]) + s.D[h] * u[b];
}

// With the widest vectors, of up to `Bytes`, that divide the modes: none is read in part.
template <class T, int R, int Bytes = S4_BYTES>
int steps(const Step<T>& s, int threads) {
    if constexpr (Bytes > int(sizeof(T)))
        if (s.modes % (Bytes / sizeof(T))) return steps<T, R, Bytes / 2>(s, threads);
    using V = typename Vector<T, Bytes>::type;
    constexpr int kRows = 4;  // that share what is read of a system
    // One part a thread, which mostly takes the same at every step: its states are still in the cache of its core.
    const int64_t tasks = s.batch * s.channels * s.modes < kAlone ? 1 : std::min<int64_t>(s.channels, threads);
    return parallel(tasks, threads, [&](int64_t task) {
        const int64_t from = task * s.channels / tasks, to = (task + 1) * s.channels / tasks;
        int64_t b = 0;
        for (; b + kRows <= s.batch; b += kRows)
            for (int64_t h = from; h < to; ++h) step_of<T, V, R, kRows>(s, h, b);
        for (; b < s.batch; ++b)
            for (int64_t h = from; h < to; ++h) step_of<T, V, R, 1>(s, h, b);
    });
}

template <class T>
int step(Arguments in, int threads) {
    const Step<T> s{in, in, in, in, in, in, in, in, in, in, in, in, in};
    const int64_t rank = in;
    return rank == 0 ? steps<T, 0>(s, threads) : rank == 1 ? steps<T, 1>(s, threads) : steps<T, 2>(s, threads);
}
