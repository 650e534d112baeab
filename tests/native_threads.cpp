// Every function of the library at once from two callers, each with several threads: for ThreadSanitizer, .ci/sanitize.py.
//
// Both callers read the same operands. Threads are the library's own, then those of a pool like torch's.

#include <cstdio>

#include "../s4/backends/cpu/native.h"

using Entry = int (*)(const int64_t*, int, int);
constexpr int kThreads = 4;
constexpr int64_t B = 3, L = 83, H = 19, n = 7, N = 2 * n, r = 1, q = 2, c = 2, W = 16;  // as __init__.py has them
int calls = 0;

void pooled(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned t = 1; t < threads; ++t) team.emplace_back(body, data);
    body(data);
    for (auto& each : team) each.join();
}

using Tensors = std::vector<std::vector<char>>;  // the memory of each

template <class T>
Tensors tensors(std::initializer_list<int64_t> counts) {
    Tensors found;
    for (const int64_t count : counts) {
        std::vector<char>& bytes = found.emplace_back(count * sizeof(T));
        for (int64_t i = 0; i < count; ++i) {
            const T value = T(0.5 * std::cos(1.0 + i + found.size()));
            std::memcpy(&bytes[i * sizeof(T)], &value, sizeof value);
        }
    }
    return found;
}

Tensors operator+(Tensors left, const Tensors& right) {
    left.insert(left.end(), right.begin(), right.end());
    return left;
}

void call(Entry entry, const Tensors& operands, const Tensors& results, const std::vector<int64_t>& sizes) {
    Tensors own[2] = {results, results};
    std::atomic<int> failed{0};
    const auto caller = [&](int which) {
        std::vector<int64_t> values;
        for (const auto& t : operands) values.push_back(reinterpret_cast<int64_t>(t.data()));
        for (auto& t : own[which]) values.push_back(reinterpret_cast<int64_t>(t.data()));
        const int tensors = values.size();
        values.insert(values.end(), sizes.begin(), sizes.end());
        failed += entry(values.data(), tensors, kThreads);
    };
    std::thread other(caller, 1);
    caller(0);
    other.join();
    if (failed) std::fprintf(stderr, "a call failed\n"), std::exit(1);
    calls += 2;
}

template <class T>
void run(const Entry (&entries)[11]) {
    const auto [cauchy, cauchy_backward, response, response_backward, maps, maps_backward, scan, scan_backward, step,
                varying, varying_backward] = entries;
    const auto doubles = tensors<double>;
    const auto numbers = tensors<T>;
    for (const int64_t nodes : {int64_t(1), H}) {  // complex numbers: two each
        const std::vector<int64_t> sizes{H, q, n, L, nodes};
        call(cauchy, numbers({2 * H * q * n, 2 * nodes * L, 2 * H * n}), numbers({2 * H * q * L}), sizes);
        call(cauchy_backward, numbers({2 * H * q * L, 2 * H * q * n, 2 * nodes * L, 2 * H * n}),
             numbers({2 * H * q * n, 2 * H * n, 2 * H * L}), sizes);
    }
    for (const int64_t rank : {int64_t(0), r}) {
        const int64_t F = rank * H * N;
        const auto systems = [&](int64_t X) { return doubles({H * N, F, F, X, c * H * N}); };
        const std::vector<int64_t> steps{H, n, rank, q, c, L}, chunk{H, n, rank, c, W};
        call(response, systems(H * q * N), numbers({c * q * H * L}), steps);
        call(response_backward, systems(H * q * N) + numbers({c * q * H * L}), systems(H * q * N), steps);
        const std::initializer_list<int64_t> found{c * H * (2 * W - 1), H * W * N, c * H * W * N, H * N * N};
        call(maps, systems(H * N) + doubles({H}), numbers(found), chunk);
        call(maps_backward, systems(H * N) + doubles({H}) + numbers(found), systems(H * N) + doubles({H}), chunk);
        const int64_t batch = 256;  // enough for a step to be shared
        call(step, numbers({H * N, F, F, H * N, H * N, H, batch * H * N, batch * H}),
             numbers({batch * H, batch * H * N}), {batch, H, n, rank});
    }
    for (const int64_t reverse : {0, 1}) {
        const Tensors inputs = numbers({B * L * H, H * B * N, H * (2 * W - 1), H * W * N, H * W * N, H * N * N});
        std::vector<int64_t> sizes{H, B, L, N, W, reverse, L * H, H, 1};
        call(scan, inputs, numbers({B * L * H, H * B * N}), sizes);
        sizes.insert(sizes.end(), {L * H, H, 1});
        call(scan_backward, inputs + numbers({B * L * H, H * B * N}), inputs, sizes);
    }
    for (const auto [rank, hold] : {std::pair<int64_t, int64_t>{0, 0}, {0, 1}, {1, 0}, {2, 0}}) {
        const int64_t F = rank * H * N, positions = 2;
        const Tensors sequences[3] = {numbers({B * L * H}), doubles({B * L}), numbers({B * H * N})};
        const Tensors inputs = sequences[0] + sequences[1] + sequences[2] + doubles({H * N, F, H * N, H * N, H, H});
        const Tensors where{std::vector<char>(B * L), std::vector<char>(B * positions * sizeof(int64_t))};
        const Tensors found = numbers({B * L * H, B * positions * H * N});
        const std::vector<int64_t> sizes{B, L, H, n, rank, positions, hold};
        call(varying, inputs + where, found, sizes);
        call(varying_backward, found + inputs + where, inputs, sizes);
    }
}

int main() {
    for (const auto pool : {static_cast<decltype(&pooled)>(nullptr), &pooled}) {
        s4_pool(pool);
        run<float>({s4_cauchy_c64, s4_cauchy_backward_c64, s4_response_f32, s4_response_backward_f32, s4_maps_f32,
                    s4_maps_backward_f32, s4_scan_f32, s4_scan_backward_f32, s4_step_f32, s4_varying_f32, s4_varying_backward_f32});
        run<double>({s4_cauchy_c128, s4_cauchy_backward_c128, s4_response_f64, s4_response_backward_f64, s4_maps_f64,
                     s4_maps_backward_f64, s4_scan_f64, s4_scan_backward_f64, s4_step_f64, s4_varying_f64, s4_varying_backward_f64});
    }
    std::printf("%d calls of %s, %d threads each\n", calls, s4_level(), kThreads);
}
