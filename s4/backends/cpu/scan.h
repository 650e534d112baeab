// The chunked scan of s4/ops/scan.py, fused: a channel's maps are packed once, and a block of chunks stays in cache from its
// inputs to its outputs. With rows u_c of T inputs and x_c of N states, and * for the transpose,
//
//     x_(c+1) = u_c inward + x_c onward,    y_c = u_c Toep(taps) + x_c outward*,
//
// from the first chunk to the last, or reversed from the last to the first. Toep has the lag j - i in row i, column j;
// taps at lags < 0, or reversed > 0, are 0, and most of those are not read: half of its flops are saved.
//
// Arrays are contiguous but for u and the gradient of y: u and y (B, L, H), x and what comes out after the last whole
// chunk (H, B, N), taps (H, 2T-1), inward and outward (H, T, N), onward (H, N, N). A task takes a few channels, that
// fill cache lines, brings their sequences side by side, scans one after the other and brings the outputs back.
//
// With resets a table (3, B, chunks) says for each chunk which input is its first, how many there are, the rest being
// zeros, and whether it is fresh: no state passes from the chunk before.

template <class T>
struct Scan {
    const T *x, *taps, *inward, *outward, *onward;
    int64_t channels, batch, length, size, width, reverse;
    const int64_t* table = nullptr;
    int64_t listed = 0;  // chunks of a sequence in the table

    // Numbers from one channel's rows to the next's: they start at other places of the caches, each at that of a line.
    int64_t apart() const { return (batch * length + 31) / 16 * 16; }
    int64_t chunks() const { return table ? listed : std::max<int64_t>(1, (length + width - 1) / width); }
    bool ragged() const { return !table && chunks() * width > length; }
    // Of a chunk in the table: its first input, how many it holds, and whether states end at the border before it.
    int64_t start(int64_t b, int64_t chunk) const { return table[b * listed + chunk]; }
    int64_t filled(int64_t b, int64_t chunk) const { return table[(batch + b) * listed + chunk]; }
    bool cut(int64_t b, int64_t chunk) const {
        return table && chunk < listed && table[(2 * batch + b) * listed + chunk];
    }
    int64_t block() const { return std::min(chunks(), std::max<int64_t>(1, 256 / std::max<int64_t>(batch, 1))); }
};

// Memory that starts where a line of the caches does.
template <class T>
struct Buffer {
    T* data;

    explicit Buffer(int64_t count) : data(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
};

// A matrix in panels.
template <class T>
struct Packed {
    int64_t depth, columns;
    Buffer<T> numbers;

    Packed(int64_t depth, int64_t columns)
        : depth(depth), columns(columns), numbers(depth * ((columns + kPanel<T> - 1) / kPanel<T> * kPanel<T>)) {}

    void fill(View<const T> from) {
        for (int64_t j = 0; j < columns; j += kPanel<T>)
            pack_panel<T>(depth, j, columns, from, &numbers.data[j * depth]);
    }
    // c = a times this, or c += that. Of a triangle, only rows up to (+1) or from (-1) the column are not zero.
    void times(int64_t rows, View<const T> a, View<T> c, bool add, int triangle = 0) const {
        for (int64_t j = 0; j < columns; j += kPanel<T>) {
            const int64_t from = triangle < 0 ? std::min(j, depth) : 0;
            const int64_t to = triangle > 0 ? std::min(j + kPanel<T>, depth) : depth;
            tiles<T>(0, rows, a, from, to, &numbers.data[j * depth], c, j, std::min(kPanel<T>, columns - j), add);
        }
    }
    // c += a^T times this, a (depth, rows); of a triangle only what `times` reads.
    void transposed_times(int64_t rows, View<const T> a, View<T> c, int triangle = 0) const {
        for (int64_t j = 0; j < columns; j += kPanel<T>) {
            const int64_t begin = triangle < 0 ? std::min(j, rows) / kTile * kTile : 0;
            const int64_t end = triangle > 0 ? std::min(j + kPanel<T>, rows) : rows;
            tiles<T>(begin, end, a.transposed(), 0, depth, &numbers.data[j * depth], c, j,
                     std::min(kPanel<T>, columns - j), true);
        }
    }
};

// (batch, time, channels), with any strides.
template <class T>
struct Sequences {
    T* data;
    int64_t batch, time, channel;
};

// Of the numbers of a, then of b, number `from(l)` in lane l.
template <class T, class From, int... Lane>
INLINE Vec<T> picked(Vec<T> a, Vec<T> b, From from, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, from(Lane)...);
#else
    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Index Indices __attribute__((vector_size(S4_BYTES)));
    return __builtin_shuffle(a, b, Indices{from(Lane)...});
#endif
}

// Rows, of which those `Apart` and more of each other are in place: swaps one bit of the row's number with one of the
// column's, then the next.
template <class T, int Apart = 1>
INLINE void exchange(Vec<T>* rows) {
    constexpr int lanes = kLanes<T>;
    if constexpr (Apart < lanes) {
        constexpr std::make_integer_sequence<int, lanes> all{};
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
            if (i & Apart) continue;
            const Vec<T> a = rows[i], b = rows[i + Apart];
            rows[i] = picked<T>(a, b, [](int l) constexpr { return l & Apart ? lanes + (l ^ Apart) : l; }, all);
            rows[i + Apart] = picked<T>(a, b, [](int l) constexpr { return l & Apart ? lanes + l : l ^ Apart; }, all);
        }
        exchange<T, 2 * Apart>(rows);
    }
}

// A square of kLanes rows, transposed.
template <class T>
void transpose(const T* from, int64_t from_row, T* to, int64_t to_row) {
    constexpr int lanes = kLanes<T>;
    Vec<T> rows[lanes];
    for (int i = 0; i < lanes; ++i) std::memcpy(&rows[i], from + i * from_row, sizeof rows[i]);
    exchange<T>(rows);
    for (int i = 0; i < lanes; ++i) std::memcpy(to + i * to_row, &rows[i], sizeof rows[i]);
}

// `count` channels from the first on, to rows (batch, length) of each, `apart` numbers from one to the next.
template <class T>
void to_rows(const Scan<T>& s, Sequences<const T> from, int64_t first, int64_t count, T* rows) {
    constexpr int64_t lanes = kLanes<T>;
    for (int64_t b = 0; b < s.batch; ++b) {
        const T* start = from.data + b * from.batch + first * from.channel;
        const int64_t whole = from.channel == 1 ? count / lanes * lanes : 0;
        const int64_t steps = s.length / lanes * lanes;
        for (int64_t l = 0; l < steps; l += lanes)
            for (int64_t i = 0; i < whole; i += lanes)
                transpose(start + l * from.time + i, from.time, rows + i * s.apart() + b * s.length + l, s.apart());
        for (int64_t i = 0; i < count; ++i) {
            T* row = rows + i * s.apart() + b * s.length;
            for (int64_t l = i < whole ? steps : 0; l < s.length; ++l)
                row[l] = start[l * from.time + i * from.channel];
        }
    }
}

// The inverse, to a contiguous array.
template <class T>
void from_rows(const Scan<T>& s, const T* rows, int64_t first, int64_t count, T* to) {
    constexpr int64_t lanes = kLanes<T>;
    for (int64_t b = 0; b < s.batch; ++b) {
        T* start = to + b * s.length * s.channels + first;
        const int64_t whole = count / lanes * lanes, steps = s.length / lanes * lanes;
        for (int64_t l = 0; l < steps; l += lanes)
            for (int64_t i = 0; i < whole; i += lanes)
                transpose(rows + i * s.apart() + b * s.length + l, s.apart(), start + l * s.channels + i, s.channels);
        for (int64_t i = 0; i < count; ++i) {
            const T* row = rows + i * s.apart() + b * s.length;
            for (int64_t l = i < whole ? steps : 0; l < s.length; ++l) start[l * s.channels + i] = row[l];
        }
    }
}

// Runs task(first, count) over groups of channels that fill a cache line, or smaller ones if there are many threads.
template <class Task>
int in_groups(int64_t channels, int threads, const Task& task) {
    const int64_t each = (channels + std::max(threads, 1) - 1) / std::max(threads, 1);
    const int64_t group = std::min<int64_t>(std::max<int64_t>(each, 4), 16);
    return parallel((channels + group - 1) / group, threads,
                    [&](int64_t i) { task(i * group, std::min(group, channels - i * group)); });
}

// Chunks [first, first + count) of the rows (B, L) of a channel are rows (B count, T) as they lie: none is ragged.
template <class T>
bool in_rows(const Scan<T>& s, int64_t first, int64_t count) {
    return !s.table && (first + count) * s.width <= s.length && (s.batch == 1 || s.length == count * s.width);
}

// Calls run(sequence, chunk, chunks, first input, inputs) for each run of chunks whose inputs lie side by side.
template <class T, class Run>
void each_run(const Scan<T>& s, int64_t first, int64_t count, const Run& run) {
    const int64_t start = first * s.width;
    for (int64_t b = 0; b < s.batch; ++b) {
        if (s.table)
            for (int64_t k = first; k < first + count; ++k) run(b, k, 1, s.start(b, k), s.filled(b, k));
        else
            run(b, first, count, start, std::min(count * s.width, s.length - start));
    }
}

// Those rows, copied together unless they are already, the ragged one filled up with zeros.
template <class T>
const T* gather(const Scan<T>& s, const T* from, int64_t first, int64_t count, T* rows) {
    if (in_rows(s, first, count)) return from + first * s.width;
    each_run(s, first, count, [&](int64_t b, int64_t chunk, int64_t chunks, int64_t start, int64_t taken) {
        T* to = rows + (b * count + chunk - first) * s.width;
        std::copy_n(from + b * s.length + start, taken, to);
        std::fill(to + taken, to + chunks * s.width, T(0));
    });
    return rows;
}

// Where to write rows that `scatter` then brings to their place, if they are not there yet.
template <class T>
T* place(const Scan<T>& s, T* to, int64_t first, int64_t count, T* rows) {
    return in_rows(s, first, count) ? to + first * s.width : rows;
}

template <class T>
void scatter(const Scan<T>& s, const T* rows, int64_t first, int64_t count, T* to) {
    if (in_rows(s, first, count)) return;
    each_run(s, first, count, [&](int64_t b, int64_t chunk, int64_t, int64_t start, int64_t taken) {
        std::copy_n(rows + (b * count + chunk - first) * s.width, taken, to + b * s.length + start);
    });
}

// S (B count, N), what each chunk from the first on adds to the state, becomes the state before each; x (B, N) moves along.
// `space` takes three times as much. Of states that end nothing is multiplied.
template <class T>
void recur(const Scan<T>& s, const Packed<T>& onward, int64_t first, int64_t count, bool reverse, T* S, T* x, T* space) {
    const int64_t N = onward.columns, batch = s.batch;
    T *next = space, *live = next + batch * N, *moved = live + batch * N;
    for (int64_t k = 0; k < count; ++k) {
        const int64_t at = reverse ? count - 1 - k : k, border = first + at + reverse;
        int64_t going = 0;
        for (int64_t b = 0; b < batch; ++b) {
            if (s.cut(b, border))
                std::fill_n(x + b * N, N, T(0));
            else
                std::copy_n(x + b * N, N, live + going++ * N);
        }
        if (going == batch) {
            for (int64_t b = 0; b < batch; ++b) std::copy_n(S + (b * count + at) * N, N, next + b * N);
            onward.times(batch, View<const T>{x, N, 1}, View<T>{next, N, 1}, true);
        } else {
            onward.times(going, View<const T>{live, N, 1}, View<T>{moved, N, 1}, false);
            const T* from = moved;
            for (int64_t b = 0; b < batch; ++b) {
                const T* S_b = S + (b * count + at) * N;
                if (s.cut(b, border)) {
                    std::copy_n(S_b, N, next + b * N);
                } else {
                    for (int64_t j = 0; j < N; ++j) next[b * N + j] = S_b[j] + from[j];
                    from += N;
                }
            }
        }
        for (int64_t b = 0; b < batch; ++b) std::copy_n(x + b * N, N, S + (b * count + at) * N);
        std::copy_n(next, batch * N, x);
    }
    if (reverse && first == 0)
        for (int64_t b = 0; b < batch; ++b)
            if (s.cut(b, 0)) std::fill_n(x + b * N, N, T(0));
}

template <class T>
View<const T> toeplitz(const T* taps, int64_t width) {
    return {taps + width - 1, -1, 1};
}

// u and y are rows (B, L) of the channel.
template <class T>
void scan_of(const Scan<T>& s, int64_t h, const T* u, T* y, T* last) {
    const int64_t B = s.batch, N = s.size, W = s.width, block = s.block();
    Packed<T> inward(W, N), outward(N, W), onward(N, N), within(W, W);
    inward.fill({s.inward + h * W * N, N, 1}), outward.fill({s.outward + h * W * N, 1, N});
    onward.fill({s.onward + h * N * N, N, 1}), within.fill(toeplitz(s.taps + h * (2 * W - 1), W));
    const Buffer<T> space(B * (block * (2 * W + N) + 4 * N));
    T *rows = space.data, *more = rows + B * block * W, *X = more + B * block * W, *x = X + B * block * N;
    T* next = x + B * N;
    std::copy_n(s.x + h * B * N, B * N, x);
    for (int64_t done = 0; done < s.chunks(); done += block) {
        const int64_t count = std::min(block, s.chunks() - done);
        const int64_t first = s.reverse ? s.chunks() - done - count : done;
        const bool ends = !s.reverse && s.ragged() && first + count == s.chunks();
        const T* U = gather(s, u, first, count, rows);
        T* Y = place(s, y, first, count, more);
        inward.times(B * count, View<const T>{U, W, 1}, View<T>{X, N, 1}, false);
        recur<T>(s, onward, first, count, s.reverse, X, x, next);
        if (ends)  // the state before a ragged chunk
            for (int64_t b = 0; b < B; ++b) std::copy_n(X + (b * count + count - 1) * N, N, x + b * N);
        within.times(B * count, View<const T>{U, W, 1}, View<T>{Y, W, 1}, false, s.reverse ? -1 : 1);
        outward.times(B * count, View<const T>{X, N, 1}, View<T>{Y, W, 1}, true);
        scatter(s, Y, first, count, y);
    }
    std::copy_n(x, B * N, last + h * B * N);
}

// Of one channel's rows (B, L) of inputs, and gradients of outputs `y` and inputs `u`; all else in the order of the
// forward's arguments, `last` the gradient of what it gave.
template <class T>
struct ScanGradients {
    const T *inputs, *y, *last;
    T *u, *x, *taps, *inward, *outward, *onward;
};

template <class T>
void scan_backward_of(const Scan<T>& s, int64_t h, const ScanGradients<T>& g) {
    const int64_t B = s.batch, N = s.size, W = s.width, block = s.block(), c = s.chunks();
    const int triangle = s.reverse ? -1 : 1;
    Packed<T> inward(W, N), onward(N, N), inward_t(N, W), outward_t(W, N), onward_t(N, N), within_t(W, W);
    const View<const T> in{s.inward + h * W * N, N, 1}, on{s.onward + h * N * N, N, 1};
    inward.fill(in), inward_t.fill(in.transposed()), onward.fill(on), onward_t.fill(on.transposed());
    outward_t.fill({s.outward + h * W * N, N, 1});
    within_t.fill(toeplitz(s.taps + h * (2 * W - 1), W).transposed());
    const Buffer<T> space(B * (c * N + block * (3 * W + N) + 4 * N) + W * W);
    T *X = space.data, *rows = X + B * c * N, *more = rows + B * block * W, *most = more + B * block * W;
    T *Z = most + B * block * W, *x = Z + B * block * N, *next = x + B * N, *grad_within = next + 3 * B * N;
    std::fill(grad_within, grad_within + W * W, T(0));
    T *grad_in = g.inward + h * W * N, *grad_out = g.outward + h * N * W, *grad_on = g.onward + h * N * N;
    std::fill(grad_in, grad_in + W * N, T(0)), std::fill(grad_out, grad_out + N * W, T(0));
    std::fill(grad_on, grad_on + N * N, T(0));

    std::copy_n(s.x + h * B * N, B * N, x);
    for (int64_t done = 0; done < c; done += block) {  // states before each chunk, block by block
        const int64_t count = std::min(block, c - done), first = s.reverse ? c - done - count : done;
        const T* U = gather(s, g.inputs, first, count, rows);
        inward.times(B * count, View<const T>{U, W, 1}, View<T>{X + B * first * N, N, 1}, false);
        recur<T>(s, onward, first, count, s.reverse, X + B * first * N, x, next);
    }
    const T* last = g.last + h * B * N;
    const bool ragged = s.ragged() && !s.reverse;  // what came out is the state before the last chunk, not after
    for (int64_t i = 0; i < B * N; ++i) x[i] = ragged ? T(0) : last[i];
    for (int64_t done = 0; done < c; done += block) {
        const int64_t before = (c - 1) / block * block - done;  // the same blocks, the last first
        const int64_t size = std::min(block, c - before), first = s.reverse ? c - before - size : before;
        const T* U = gather(s, g.inputs, first, size, rows);
        const T* G = gather(s, g.y, first, size, more);
        T* R = place(s, g.u, first, size, most);
        outward_t.times(B * size, View<const T>{G, W, 1}, View<T>{Z, N, 1}, false);
        if (ragged && first + size == c)
            for (int64_t b = 0; b < B; ++b)
                for (int64_t j = 0; j < N; ++j) Z[(b * size + size - 1) * N + j] += last[b * N + j];
        recur<T>(s, onward_t, first, size, !s.reverse, Z, x, next);  // gradients of the state after each chunk
        within_t.times(B * size, View<const T>{G, W, 1}, View<T>{R, W, 1}, false, -triangle);
        inward_t.times(B * size, View<const T>{Z, N, 1}, View<T>{R, W, 1}, true);
        scatter(s, R, first, size, g.u);
        Packed<T> of_outputs(B * size, W), of_states(B * size, N);
        of_outputs.fill({G, W, 1}), of_states.fill({Z, N, 1});
        of_outputs.transposed_times(W, {U, W, 1}, {grad_within, W, 1}, triangle);
        of_outputs.transposed_times(N, {X + B * first * N, N, 1}, {grad_out, 1, N});
        of_states.transposed_times(W, {U, W, 1}, {grad_in, N, 1});
        of_states.transposed_times(N, {X + B * first * N, N, 1}, {grad_on, N, 1});
    }
    std::copy_n(x, B * N, g.x + h * B * N);
    T* taps = g.taps + h * (2 * W - 1) + W - 1;
    std::fill(taps - W + 1, taps + W, T(0));
    for (int64_t i = 0; i < W; ++i)
        for (int64_t j = s.reverse ? 0 : i; j < (s.reverse ? i + 1 : W); ++j) taps[j - i] += grad_within[i * W + j];
}

// What comes out of a channel lies where the inputs of the one before were.
template <class T>
int scan(Arguments in, int threads) {
    const T* u = in;
    Scan<T> s{in, in, in, in, in, in, in, in, in, in, in};
    T *y = in, *last = in;
    s.table = in, s.listed = in;
    const Sequences<const T> from{u, in, in, in};
    return in_groups(s.channels, threads, [&](int64_t first, int64_t count) {
        const Buffer<T> rows((count + 1) * s.apart());
        T *outputs = rows.data, *inputs = outputs + s.apart();
        to_rows(s, from, first, count, inputs);
        for (int64_t i = 0, at = 0; i < count; ++i, at += s.apart())
            scan_of(s, first + i, inputs + at, outputs + at, last);
        from_rows(s, outputs, first, count, y);
    });
}

template <class T>
int scan_backward(Arguments in, int threads) {
    const T* u = in;
    Scan<T> s{in, in, in, in, in, in, in, in, in, in, in};
    const T *grad_y = in, *grad_last = in;
    T* grad_u = in;
    const ScanGradients<T> to{nullptr, nullptr, grad_last, nullptr, in, in, in, in, in};
    s.table = in, s.listed = in;
    const Sequences<const T> from{u, in, in, in}, back{grad_y, in, in, in};
    return in_groups(s.channels, threads, [&](int64_t first, int64_t count) {
        const Buffer<T> rows((2 * count + 1) * s.apart());
        T *found = rows.data, *inputs = found + s.apart(), *outputs = inputs + count * s.apart();
        to_rows(s, from, first, count, inputs);
        to_rows(s, back, first, count, outputs);
        for (int64_t i = 0, at = 0; i < count; ++i, at += s.apart()) {
            ScanGradients<T> g = to;
            g.inputs = inputs + at, g.y = outputs + at, g.u = found + at;
            scan_backward_of(s, first + i, g);
        }
        from_rows(s, found, first, count, grad_u);
    });
}
