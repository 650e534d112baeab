// A recurrence whose step of time differs from input to input, as s4/ops/varying.py defines it, in double precision.
//
// A task takes a group of channels, as wide as a vector, through some sequences of the batch; its state stays in the
// first-level cache. The gradient goes forward once to have the states at borders of chunks, then back chunk by chunk,
// through states made again. What its sequences add to gradients of parameters is summed up in one order.
//
// Arrays are contiguous: u and y (B, L, H), rate (B, L), states (B, P, H, 2n), x (B, H, 2n), Lambda, B and C (H, 2n),
// P (r, H, 2n), D and dt (H), resets (B, L) or null, positions (B, P). A state there holds the n real, then the n
// imaginary parts of its modes.

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
