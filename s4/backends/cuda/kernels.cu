// Cauchy sums over conjugate pairs on a GPU, compiled at first use by __init__.py.
//
// Complex numbers are interleaved (re, im), arrays contiguous: v (G, q, n), w (G, n), z (1 or G, l), sums
// (G, q, l). All sizes are 64-bit. Blocks share nothing and loop over tasks, so any grid computes the same; sums are
// taken in an order that depends on the shapes only: results are the same in every run and on every device.
// Nothing here is specific to a device but `reciprocal`, so that tests compile this file for the CPU as well.
//
// The arithmetic of a Cauchy pair (one pole with its conjugate, one node), in instructions that a multiply-add is one
// of. With u = 1/(z-w), u' = 1/(z-conj w), P = u + u' and M = i (u - u'), the residue a + i b adds a P + b M:
//
//                            float        double
//     z-w, z-conj w, |.|^2   3 + 4        3 + 4
//     reciprocals            2            3 + 7, one division for both
//     u, u', P, M            4 + 4        4 + 4
//     q sums                 4 q          4 q
//     forward                17 + 4 q     25 + 4 q
//     backward of v, w       37 + 8 q     45 + 8 q
//
// An H100 retires 67e12 / 2 of them a second in float, 34e12 / 2 in double. At G = 512, n = 32, q = 4, in microseconds:
//
//                                    l = 513, 8.4e6 pairs    l = 8193, 134e6 pairs
//     float, forward (33)            8                       132
//     float, backward (69)           17                      276
//     double, forward (41)           20                      324
//     double, backward (77)          38                      608
//     sums (G, q, l) at 3.0 TB/s     3 in float, 6 in double 45, 90
//
// So arithmetic is the bound, by 3 to 6 times, and the design keeps everything else off the arithmetic units' path:
// - forward: a thread is one node with its q sums in registers. Poles and residues go through shared memory, where all
//   threads of a warp read the same word at once: q + 1 loads for 17 + 4 q instructions or more. One node a thread is
//   enough for that, and leaves most threads where l is small. Poles are not split over threads: where G l is too
//   small to fill a GPU, the whole takes as long as a launch.
// - backward of v and w: the same turned round. A thread is one pole (or the same pole as others in its block, each
//   with a slice of the nodes), its q + 1 sums stay in registers, nodes and gradients come through shared memory. Nodes
//   are split into parts until there are some 2048 blocks; the parts are added in a second pass.
// - backward of z, when asked for: a thread is one node again.

typedef long long int64;

namespace {

template <class T>
struct alignas(2 * sizeof(T)) Complex {
    T re, im;
};

template <class T>
__device__ inline Complex<T> operator*(Complex<T> a, Complex<T> b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

template <class T>
__device__ inline void operator+=(Complex<T>& a, Complex<T> b) {
    a.re += b.re, a.im += b.im;
}

// Two multiply-adds; of sum += a b + c d the compiler may make three instructions.
template <class T>
__device__ inline void add_products(T& sum, T a, T b, T c, T d) {
    sum += a * b;
    sum += c * d;
}

constexpr int kThreads = 128;      // of a block that sums over nodes; a power of 2
constexpr int kNodeThreads = 256;  // of a block whose threads are nodes, at most
constexpr int kPoles = 16;         // staged at once

// 1/a in one instruction, to 1 ulp; 0 from 2^126 on, where the result would be a denormal number.
__device__ inline float reciprocal(float a) {
#ifdef __CUDA_ARCH__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
    return y;
#else
    return a >= 0x1p126f ? 0 : (1 + 0x1p-23f) / a;  // as wrong as it may be
#endif
}

// The reciprocals of two squared distances. In float, from the hardware: its error is below that of the squares, which
// a division, at some 8 instructions, would not mend. In double, where the hardware has but a seed, one division gives
// both.
__device__ inline void reciprocals(float a, float b, float& ia, float& ib) { ia = reciprocal(a), ib = reciprocal(b); }

__device__ inline void reciprocals(double a, double b, double& ia, double& ib) {
    const double inverse = 1 / (a * b);
    ia = inverse * b, ib = inverse * a;
}

// u = 1/(z-w) and u' = 1/(z-conj w), from z-w itself: an expanded |z-w|^2 would cancel near a pole.
template <class T>
struct Pair {
    Complex<T> u, v;

    __device__ Pair(Complex<T> z, Complex<T> w) {
        const T s = z.re - w.re, d = z.im - w.im, e = z.im + w.im;
        T ia, ib;
        reciprocals(s * s + d * d, s * s + e * e, ia, ib);
        u = {s * ia, -d * ia}, v = {s * ib, -e * ib};
    }
    __device__ Complex<T> p() const { return {u.re + v.re, u.im + v.im}; }
    __device__ Complex<T> m() const { return {v.im - u.im, u.re - v.re}; }
    // E = u^2 + u'^2 and O = i (u^2 - u'^2): with T1 and T2 the sums over right-hand sides of a conj(grad) and
    // b conj(grad), the gradient of w is Re(T1 E + T2 O) + i Re(T1 O - T2 E), that of z is -conj(T1 E + T2 O).
    __device__ void squares(Complex<T>& even, Complex<T>& odd) const {
        const Complex<T> a = u * u, b = v * v;
        even = {a.re + b.re, a.im + b.im}, odd = {b.im - a.im, a.re - b.re};
    }
};

// out[row] for Q rows; v and out begin at the first of them, of `rows` in all. z_stride is 0 for shared nodes.
template <class T, int Q>
__device__ void cauchy(const Complex<T>* v, const Complex<T>* z, const Complex<T>* w, Complex<T>* out, int64 groups,
                       int64 rows, int64 poles, int64 nodes, int64 z_stride) {
    __shared__ Complex<T> stage[kPoles][Q + 1];
    const int64 tiles = (nodes + blockDim.x - 1) / blockDim.x;
    for (int64 task = blockIdx.x; task < groups * tiles; task += gridDim.x) {
        const int64 g = task / tiles, l = task % tiles * blockDim.x + threadIdx.x;
        const Complex<T> at = z[g * z_stride + (l < nodes ? l : nodes - 1)];  // a thread too many meets no new pole
        Complex<T> sum[Q] = {};
        for (int64 first = 0; first < poles; first += kPoles) {
            const int count = poles - first < kPoles ? poles - first : kPoles;
            __syncthreads();
            for (int i = threadIdx.x; i < count * (Q + 1); i += blockDim.x) {
                const int k = i / count, n = i % count;
                stage[n][k] = (k < Q ? v + (g * rows + k) * poles : w + g * poles)[first + n];
            }
            __syncthreads();
            for (int n = 0; n < count; ++n) {
                const Pair<T> pair(at, stage[n][Q]);
                const Complex<T> p = pair.p(), m = pair.m();
#pragma unroll
                for (int k = 0; k < Q; ++k) {
                    const Complex<T> c = stage[n][k];
                    add_products(sum[k].re, c.re, p.re, c.im, m.re);
                    add_products(sum[k].im, c.re, p.im, c.im, m.im);
                }
            }
        }
        if (l < nodes)
#pragma unroll
            for (int k = 0; k < Q; ++k) out[(g * rows + k) * nodes + l] = sum[k];
    }
}

// Adds the sums of the slices of a block, by halves: those of the first slice are then the totals.
template <class T, int N>
__device__ inline void add_slices(Complex<T> (*sums)[N], int lanes) {
    for (int half = kThreads / 2; half >= lanes; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
#pragma unroll
            for (int k = 0; k < N; ++k) sums[threadIdx.x][k] += sums[threadIdx.x + half][k];
    }
}

// Gradients of v (parts, G, rows, n) and w (parts, G, n) by parts of `span` nodes, for Q rows. Thread t of a block is
// pole t % lanes and every (kThreads / lanes)-th node; lanes is a power of 2.
template <class T, int Q>
__device__ void cauchy_backward(const Complex<T>* grad, const Complex<T>* v, const Complex<T>* z, const Complex<T>* w,
                                Complex<T>* grad_v, Complex<T>* grad_w, int64 groups, int64 rows, int64 poles,
                                int64 nodes, int64 z_stride, int64 lanes, int64 parts, int64 span) {
    __shared__ Complex<T> stage[kThreads][Q + 1];  // of nodes and gradients, then of sums
    const int lane = threadIdx.x % lanes, slice = threadIdx.x / lanes, slices = kThreads / lanes;
    const int64 tiles = (poles + lanes - 1) / lanes;
    for (int64 task = blockIdx.x; task < parts * groups * tiles; task += gridDim.x) {
        const int64 part = task / (groups * tiles), g = task / tiles % groups, n = task % tiles * lanes + lane;
        const int64 pole = n < poles ? n : poles - 1;
        const int64 end = (part + 1) * span < nodes ? (part + 1) * span : nodes;
        const Complex<T> at = w[g * poles + pole];
        Complex<T> c[Q], sum[Q + 1] = {};
#pragma unroll
        for (int k = 0; k < Q; ++k) c[k] = v[(g * rows + k) * poles + pole];
        for (int64 first = part * span; first < end; first += kThreads) {
            const int count = end - first < kThreads ? end - first : kThreads;
            __syncthreads();
            if (threadIdx.x < count) {
                stage[threadIdx.x][Q] = z[g * z_stride + first + threadIdx.x];
#pragma unroll
                for (int k = 0; k < Q; ++k)
                    stage[threadIdx.x][k] = grad[(g * rows + k) * nodes + first + threadIdx.x];
            }
            __syncthreads();
            for (int j = slice; j < count; j += slices) {
                const Pair<T> pair(stage[j][Q], at);
                const Complex<T> p = pair.p(), m = pair.m();
                Complex<T> t1{}, t2{}, even, odd;
#pragma unroll
                for (int k = 0; k < Q; ++k) {
                    const Complex<T> r = stage[j][k];
                    add_products(sum[k].re, r.re, p.re, r.im, p.im);
                    add_products(sum[k].im, r.re, m.re, r.im, m.im);
                    t1.re += c[k].re * r.re, t1.im -= c[k].re * r.im;
                    t2.re += c[k].im * r.re, t2.im -= c[k].im * r.im;
                }
                pair.squares(even, odd);
                add_products(sum[Q].re, t1.re, even.re, -t1.im, even.im);
                add_products(sum[Q].re, t2.re, odd.re, -t2.im, odd.im);
                add_products(sum[Q].im, t1.re, odd.re, -t1.im, odd.im);
                add_products(sum[Q].im, -t2.re, even.re, t2.im, even.im);
            }
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k <= Q; ++k) stage[threadIdx.x][k] = sum[k];
        add_slices<T, Q + 1>(stage, lanes);
        if (slice == 0 && n < poles) {  // which this thread has summed
#pragma unroll
            for (int k = 0; k < Q; ++k)
                grad_v[((part * groups + g) * rows + k) * poles + n] = stage[threadIdx.x][k];
            grad_w[(part * groups + g) * poles + n] = stage[threadIdx.x][Q];
        }
    }
}

// Adds to the gradient of z (G, l) that of Q rows.
template <class T, int Q>
__device__ void cauchy_backward_nodes(const Complex<T>* grad, const Complex<T>* v, const Complex<T>* z,
                                      const Complex<T>* w, Complex<T>* grad_z, int64 groups, int64 rows, int64 poles,
                                      int64 nodes, int64 z_stride) {
    __shared__ Complex<T> stage[kPoles][Q + 1];
    const int64 tiles = (nodes + blockDim.x - 1) / blockDim.x;
    for (int64 task = blockIdx.x; task < groups * tiles; task += gridDim.x) {
        const int64 g = task / tiles, place = task % tiles * blockDim.x + threadIdx.x;
        const int64 l = place < nodes ? place : nodes - 1;
        const Complex<T> at = z[g * z_stride + l];
        Complex<T> r[Q], sum{};
#pragma unroll
        for (int k = 0; k < Q; ++k) r[k] = grad[(g * rows + k) * nodes + l];
        for (int64 first = 0; first < poles; first += kPoles) {
            const int count = poles - first < kPoles ? poles - first : kPoles;
            __syncthreads();
            for (int i = threadIdx.x; i < count * (Q + 1); i += blockDim.x) {
                const int k = i / count, n = i % count;
                stage[n][k] = (k < Q ? v + (g * rows + k) * poles : w + g * poles)[first + n];
            }
            __syncthreads();
            for (int n = 0; n < count; ++n) {
                Complex<T> t1{}, t2{}, even, odd;
                Pair<T>(at, stage[n][Q]).squares(even, odd);
#pragma unroll
                for (int k = 0; k < Q; ++k) {
                    const Complex<T> c = stage[n][k];
                    t1.re += c.re * r[k].re, t1.im -= c.re * r[k].im;
                    t2.re += c.im * r[k].re, t2.im -= c.im * r[k].im;
                }
                add_products(sum.re, t1.re, even.re, -t1.im, even.im);
                add_products(sum.re, t2.re, odd.re, -t2.im, odd.im);
                add_products(sum.im, t1.re, even.im, t1.im, even.re);
                add_products(sum.im, t2.re, odd.im, t2.im, odd.re);
            }
        }
        if (place < nodes) grad_z[g * nodes + l] += {-sum.re, sum.im};
    }
}

}  // namespace

// The entry points: arguments are pointers and int64, nothing else.
#define CAUCHY(T, SUFFIX, Q)                                                                                           \
    extern "C" __global__ void __launch_bounds__(kNodeThreads, 2)                                                      \
        cauchy_##SUFFIX##_##Q(const Complex<T>* v, const Complex<T>* z, const Complex<T>* w, Complex<T>* out,          \
                              int64 groups, int64 rows, int64 poles, int64 nodes, int64 z_stride) {                    \
        cauchy<T, Q>(v, z, w, out, groups, rows, poles, nodes, z_stride);                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 4)                                                          \
        cauchy_backward_##SUFFIX##_##Q(const Complex<T>* grad, const Complex<T>* v, const Complex<T>* z,               \
                                       const Complex<T>* w, Complex<T>* grad_v, Complex<T>* grad_w, int64 groups,      \
                                       int64 rows, int64 poles, int64 nodes, int64 z_stride, int64 lanes, int64 parts, \
                                       int64 span) {                                                                   \
        cauchy_backward<T, Q>(grad, v, z, w, grad_v, grad_w, groups, rows, poles, nodes, z_stride, lanes, parts,       \
                              span);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kNodeThreads, 2)                                                      \
        cauchy_backward_nodes_##SUFFIX##_##Q(const Complex<T>* grad, const Complex<T>* v, const Complex<T>* z,         \
                                             const Complex<T>* w, Complex<T>* grad_z, int64 groups, int64 rows,        \
                                             int64 poles, int64 nodes, int64 z_stride) {                               \
        cauchy_backward_nodes<T, Q>(grad, v, z, w, grad_z, groups, rows, poles, nodes, z_stride);                      \
    }

#define ENTRY_POINTS(T, SUFFIX)                                                                                        \
    CAUCHY(T, SUFFIX, 1)                                                                                               \
    CAUCHY(T, SUFFIX, 2)                                                                                               \
    CAUCHY(T, SUFFIX, 3)                                                                                               \
    CAUCHY(T, SUFFIX, 4)                                                                                               \
    CAUCHY(T, SUFFIX, 5)                                                                                               \
    CAUCHY(T, SUFFIX, 6)

ENTRY_POINTS(float, c64)
ENTRY_POINTS(double, c128)
