// Sums, copies, casts and masks: memory-bound work whose floor is the bytes named here (e: bytes of an element).
//
// Flat, n elements. Any grid and block give the same bits; ⌈n / (256·V·U)⌉ blocks of 256 are best.
//   add      c += α·x                                                     3e·n     U = 2
//   dropout  y = x·keep, or 0 where word[i] < limit                       2e·n     U = 2
//            word[i] is word i mod 4 of Philox at counter (i div 4, high), as in src/ops/random.rs; y may be x
// Rows, [N, d]. Block (x, y) of any shape: x threads share a row; grid ⌈N / y⌉. Best: about 256 threads, x the power of two
// from d/V up if d ≤ 32·V, else ⌈d/(4V)⌉ rounded up to a multiple of 32, at most 256.
//   fill_rows    out[i] = bias                                            e·N·d
//   scale_rows   y[i] = x[i]·s[i], s in f32; y may be x                   2e·N·d
//   gather       out[i] = table[ids[i]]                                   2e·N·d
//   scatter      table[ids[i]] = rows[i]; ids differ from each other      2e·N·d
//   scatter_add  table[target[m]] += rows[order[k]], offsets[m] ≤ k < offsets[m + 1], in that order, targets differing
//                (N: number of targets)                                   e·rows·d + 2·(table's e)·N·d
//   unfold       pixels [B, C, H, W] → [B·(H/p)·(W/p), C·p·p], one row a patch; im2col for stride = kernel
// Sum of rows in f32 without atomics, in two launches; the stretch decides the order, so it must not depend on the device.
//   sum_rows     part [P, d]: block (c, p) of 256 threads sums rows p·stretch.. of columns 32·V·c..; reads e·N·d
//   reduce_rows  out[k] = Σ_p part[k, p], part [K, P, d], out [K, d]: grid (⌈d / 256⌉, K), 256 threads
//
// `wide` chooses accesses of 16 bytes (V = 16/e; of the larger type where two meet): n or d a multiple of V, all
// addresses of 16 bytes (with two types: of V elements). Otherwise V = 1.
#include "common.cuh"

// ---- flat

template <class C, class T, int V> __device__ void add(C* c, const T* x, size_t n, float alpha) {
    struct Pair { Pack<C, V> c; Pack<T, V> x; };
    flat<2, V>(n, [=](size_t i) { return Pair{load<V>(c + i), load<V>(x + i)}; },
               [=](size_t i, Pair p) {
#pragma unroll
                   for (int k = 0; k < V; k++) p.c.at[k] = from_f32<C>(to_f32(p.c.at[k]) + alpha * to_f32(p.x.at[k]));
                   put(c + i, p.c);
               });
}

// A thread takes whole groups of four, the elements of one Philox counter, also where it accesses them one by one.
template <class T, int V> __device__ void dropout(const T* x, T* y, size_t n, uint2 key, uint2 high, unsigned limit, float keep) {
    constexpr int Q = V > 4 ? V : 4;
    const auto in = [=](size_t i) {
        if constexpr (V > 1) return load<Q>(x + i);
        Pack<T, Q> a{};
#pragma unroll
        for (int k = 0; k < Q; k++)
            if (i + k < n) a.at[k] = x[i + k];
        return a;
    };
    flat<2, Q>(n, in, [=](size_t i, Pack<T, Q> a) {
#pragma unroll
        for (int q = 0; q < Q; q += 4) {
            const size_t c = (i + q) / 4;
            const uint4 r = philox(key, make_uint4(unsigned(c), unsigned(c >> 32), high.x, high.y));
            const unsigned word[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
            for (int k = 0; k < 4; k++) a.at[q + k] = from_f32<T>(word[k] < limit ? 0.f : to_f32(a.at[q + k]) * keep);
        }
        if constexpr (V > 1) {
            put(y + i, a);
        } else {
#pragma unroll
            for (int k = 0; k < Q; k++)
                if (i + k < n) y[i + k] = a.at[k];
        }
    });
}

// ---- rows

template <class T, int V> __device__ void copy_row(const T* from, T* to, int d) {
    across<4, V>(d, [=](int j) { return load<V>(from + j); }, [=](int j, const Pack<T, V>& a) { put(to + j, a); });
}

template <class T, int V> __device__ void scale_row(const T* x, float s, T* y, int d) {
    across<4, V>(d, [=](int j) { return load<V>(x + j); },
                 [=](int j, Pack<T, V> a) {
#pragma unroll
                     for (int k = 0; k < V; k++) a.at[k] = from_f32<T>(to_f32(a.at[k]) * s);
                     put(y + j, a);
                 });
}

template <class C, class T, int V>
__device__ void add_rows(C* target, const unsigned* order, unsigned begin, unsigned end, const T* rows, int d) {
    for (int j = threadIdx.x * V; j < d; j += blockDim.x * V) {
        Pack<C, V> sum = load<V>(target + j);
        float v[V];
#pragma unroll
        for (int k = 0; k < V; k++) v[k] = to_f32(sum.at[k]);
#pragma unroll 4
        for (unsigned i = begin; i < end; i++) {
            const Pack<T, V> a = load<V>(rows + size_t(order[i]) * d + j);
#pragma unroll
            for (int k = 0; k < V; k++) v[k] += to_f32(a.at[k]);
        }
#pragma unroll
        for (int k = 0; k < V; k++) sum.at[k] = from_f32<C>(v[k]);
        put(target + j, sum);
    }
}

template <class S, class T> __device__ void unfold_row(const S* pixels, T* out, size_t row, int c, int h, int w, int p) {
    const unsigned gw = w / p, gh = h / p, area = p * p, d = c * area;
    const size_t image = row / (gw * gh);
    const unsigned patch = row % (gw * gh), y = patch / gw * p, x = patch % gw * p;
    pixels += image * c * h * w + size_t(y) * w + x;
    out += row * d;
    for (unsigned j = threadIdx.x; j < d; j += blockDim.x) {
        const unsigned channel = j / area, r = j % area / p;
        out[j] = from_f32<T>(to_f32(pixels[(size_t(channel) * h + r) * w + j % p]));
    }
}

// ---- sum of rows

template <class T, int V> __device__ void sum_rows(const T* x, float* part, int rows, int d, int stretch) {
    SHARED(float, sums, 8 * 32 * V);
    const int lane = threadIdx.x % 32, line = threadIdx.x / 32, first = blockIdx.x * 32 * V, column = first + lane * V;
    const int begin = blockIdx.y * stretch, end = min(begin + stretch, rows);
    float v[V] = {};
    if (column < d)
#pragma unroll 4
        for (int i = begin + line; i < end; i += 8) {
            const Pack<T, V> a = load<V>(x + size_t(i) * d + column);
#pragma unroll
            for (int k = 0; k < V; k++) v[k] += to_f32(a.at[k]);
        }
#pragma unroll
    for (int k = 0; k < V; k++) sums[(line * 32 + lane) * V + k] = v[k];
    __syncthreads();
    for (int j = threadIdx.x; j < 32 * V && first + j < d; j += 256) {
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) total += sums[i * 32 * V + j];
        part[size_t(blockIdx.y) * d + first + j] = total;
    }
}

__device__ __forceinline__ void reduce(const float* part, float* out, int p, int d) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= d) return;
    part += size_t(blockIdx.y) * p * d + column, out += size_t(blockIdx.y) * d + column;
    float total = 0.f;
#pragma unroll 8
    for (int i = 0; i < p; i++) total += part[size_t(i) * d];
    *out = total;
}

// ---- entries

// One statement for V = N or 1, whichever `wide` says.
#define BY_WIDTH(N, ...)        \
    if (wide) {                 \
        constexpr int V = N;    \
        __VA_ARGS__;            \
    } else {                    \
        constexpr int V = 1;    \
        __VA_ARGS__;            \
    }
// The same for the row of this thread, if there is one.
#define ROW_BY_WIDTH(N, ...)                                        \
    const size_t i = size_t(blockIdx.x) * blockDim.y + threadIdx.y; \
    if (i >= size_t(n)) return;                                     \
    BY_WIDTH(N, __VA_ARGS__)

#define ADD(C, T, name) \
    EXPORT(add_##name, (C* c, const T* x, size_t n, float alpha, int wide), BY_WIDTH(WIDE<C>, add<C, T, V>(c, x, n, alpha)))
#define SCATTER_ADD(C, T, name)                                                                                        \
    EXPORT(scatter_add_##name, (C* table, const unsigned* target, const unsigned* offsets, const unsigned* order, const T* rows, int n, int d, int wide), \
           ROW_BY_WIDTH(WIDE<C>, add_rows<C, T, V>(table + size_t(target[i]) * d, order, offsets[i], offsets[i + 1], rows, d)))
#define UNFOLD(S, T, name)                                                                                             \
    EXPORT(unfold_##name, (const S* pixels, T* out, int n, int c, int h, int w, int p),                                \
           const size_t i = size_t(blockIdx.x) * blockDim.y + threadIdx.y;                                             \
           if (i < size_t(n)) unfold_row<S, T>(pixels, out, i, c, h, w, p))
#define ELEMENTWISE(T, name)                                                                                           \
    ADD(T, T, name)                                                                                                    \
    SCATTER_ADD(T, T, name)                                                                                            \
    UNFOLD(T, T, name)                                                                                                 \
    EXPORT(dropout_##name, (const T* x, T* y, size_t n, unsigned key0, unsigned key1, unsigned high0, unsigned high1, unsigned limit, float keep, int wide), \
           BY_WIDTH(WIDE<T>, dropout<T, V>(x, y, n, make_uint2(key0, key1), make_uint2(high0, high1), limit, keep)))   \
    EXPORT(fill_rows_##name, (T* out, const T* bias, int n, int d, int wide),                                          \
           ROW_BY_WIDTH(WIDE<T>, copy_row<T, V>(bias, out + i * d, d)))                                                \
    EXPORT(scale_rows_##name, (const T* x, const float* s, T* y, int n, int d, int wide),                              \
           ROW_BY_WIDTH(WIDE<T>, scale_row<T, V>(x + i * d, s[i], y + i * d, d)))                                      \
    EXPORT(gather_##name, (const T* table, const unsigned* ids, T* out, int n, int d, int wide),                       \
           ROW_BY_WIDTH(WIDE<T>, copy_row<T, V>(table + size_t(ids[i]) * d, out + i * d, d)))                          \
    EXPORT(scatter_##name, (T* table, const unsigned* ids, const T* rows, int n, int d, int wide),                     \
           ROW_BY_WIDTH(WIDE<T>, copy_row<T, V>(rows + i * d, table + size_t(ids[i]) * d, d)))                         \
    EXPORT(sum_rows_##name, (const T* x, float* part, int rows, int d, int stretch, int wide),                         \
           BY_WIDTH(WIDE<T>, sum_rows<T, V>(x, part, rows, d, stretch)))

ELEMENTWISE(float, f32)
ELEMENTWISE(bf16, bf16)
ADD(float, bf16, f32_bf16)
SCATTER_ADD(float, bf16, f32_bf16)
EXPORT(reduce_rows, (const float* part, float* out, int p, int d), reduce(part, out, p, d))
