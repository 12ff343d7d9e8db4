// RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016) over rows of [N, D], forward and backward.
//
// Forward   [s = x + r]    mean μ (0 for RMSNorm), inverse deviation ρ = 1/√(mean((s − μ)²) + ε);  y = (s − μ)·ρ·w + b
//           reads x [, r], writes y [, s] and [μ, ρ] a row in f32.
// Rebuild   y from x and the saved [μ, ρ]: the same bits.
// Backward  g = w·dy, x̂ = (x − μ)·ρ:  dx = ρ·(g − [mean(g)] − x̂·mean(g·x̂)) [+ what is there already]; the bracket for
//           LayerNorm only. Reads x, dy [, base], writes dx.
// Scale     dw = Σ dy·x̂, db = Σ dy over rows: every block sums a stretch of rows for 32 columns, `reduce_rows` of
//           elementwise.cu adds the stretches in order.
//
// One block of 256 threads a row; a row is read from memory once and again from the cache. 16-byte accesses where D and
// the addresses allow (`wide`). All sums in f32.
#include "common.cuh"

struct Norm {
    int d;
    int layer;  // 0: RMSNorm
    float eps;
};

template <class T, int V> __device__ void norm_row(const T* x, const T* r, const T* w, const T* b, T* s, T* y, float* stats, Norm n, bool rebuild) {
    const size_t row = blockIdx.x;
    x += row * n.d, y += row * n.d;
    if (r) r += row * n.d, s += row * n.d;
    float mean = 0.f, inv;
    if (rebuild) {
        mean = stats[2 * row], inv = stats[2 * row + 1];
    } else {
        if (r || n.layer) {
            float sum[1] = {0.f};
            for (int i = threadIdx.x * V; i < n.d; i += blockDim.x * V) {
                Pack<T, V> a = load<V>(x + i);
                if (r) {
                    const Pack<T, V> c = load<V>(r + i);
#pragma unroll
                    for (int k = 0; k < V; k++) a.at[k] = from_f32<T>(to_f32(a.at[k]) + to_f32(c.at[k]));
                    put(s + i, a);
                }
#pragma unroll
                for (int k = 0; k < V; k++) sum[0] += to_f32(a.at[k]);
            }
            if (n.layer) {
                block_sums(sum);
                mean = sum[0] / n.d;
            }
        }
        if (r) x = s;  // each thread reads back what it wrote itself
        float square[1] = {0.f};
        for (int i = threadIdx.x * V; i < n.d; i += blockDim.x * V) {
            const Pack<T, V> a = load<V>(x + i);
#pragma unroll
            for (int k = 0; k < V; k++) {
                const float c = to_f32(a.at[k]) - mean;
                square[0] += c * c;
            }
        }
        block_sums(square);
        inv = 1.f / sqrtf(square[0] / n.d + n.eps);
        if (threadIdx.x == 0) stats[2 * row] = mean, stats[2 * row + 1] = inv;
    }
    for (int i = threadIdx.x * V; i < n.d; i += blockDim.x * V) {
        const Pack<T, V> a = load<V>(x + i), c = load<V>(w + i);
        Pack<T, V> shift{}, out;
        if (b) shift = load<V>(b + i);
#pragma unroll
        for (int k = 0; k < V; k++) {
            const float v = (to_f32(a.at[k]) - mean) * inv * to_f32(c.at[k]);
            out.at[k] = from_f32<T>(b ? v + to_f32(shift.at[k]) : v);
        }
        put(y + i, out);
    }
}

template <class T, int V> __device__ void norm_back_row(const T* x, const T* w, const float* stats, const T* dy, const T* base, T* dx, Norm n) {
    const size_t row = blockIdx.x;
    x += row * n.d, dy += row * n.d, dx += row * n.d;
    if (base) base += row * n.d;
    const float mean = stats[2 * row], inv = stats[2 * row + 1];
    float sums[2] = {0.f, 0.f};  // Σ g, Σ g·x̂
    for (int i = threadIdx.x * V; i < n.d; i += blockDim.x * V) {
        const Pack<T, V> a = load<V>(x + i), c = load<V>(w + i), e = load<V>(dy + i);
#pragma unroll
        for (int k = 0; k < V; k++) {
            const float g = to_f32(c.at[k]) * to_f32(e.at[k]);
            sums[0] += g;
            sums[1] += g * ((to_f32(a.at[k]) - mean) * inv);
        }
    }
    block_sums(sums);
    const float shift = n.layer ? sums[0] / n.d : 0.f, along = sums[1] / n.d;
    for (int i = threadIdx.x * V; i < n.d; i += blockDim.x * V) {
        const Pack<T, V> a = load<V>(x + i), c = load<V>(w + i), e = load<V>(dy + i);
        Pack<T, V> rest{}, out;
        if (base) rest = load<V>(base + i);
#pragma unroll
        for (int k = 0; k < V; k++) {
            const float g = to_f32(c.at[k]) * to_f32(e.at[k]), hat = (to_f32(a.at[k]) - mean) * inv;
            const float v = inv * (g - shift - hat * along);
            out.at[k] = from_f32<T>(base ? to_f32(rest.at[k]) + v : v);
        }
        put(dx + i, out);
    }
}

// Block (c, p), 32 × 8 threads: columns 32c.., rows p·stretch..; writes part [2, P, D].
template <class T> __device__ void norm_scale(const T* x, const float* stats, const T* dy, float* part, int rows, int d, int stretch) {
    SHARED(float, sums, 2 * 8 * 32);
    const int lane = threadIdx.x % 32, line = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    const int begin = blockIdx.y * stretch, end = min(begin + stretch, rows);
    float dw = 0.f, db = 0.f;
    if (column < d)
        for (int i = begin + line; i < end; i += 8) {
            const float g = to_f32(dy[size_t(i) * d + column]);
            dw += g * ((to_f32(x[size_t(i) * d + column]) - stats[2 * i]) * stats[2 * i + 1]);
            db += g;
        }
    sums[line * 32 + lane] = dw;
    sums[256 + line * 32 + lane] = db;
    __syncthreads();
    if (line < 2 && column < d) {
        float total = 0.f;
        for (int k = 0; k < 8; k++) total += sums[line * 256 + k * 32 + lane];
        part[(size_t(line) * gridDim.y + blockIdx.y) * d + column] = total;
    }
}

#define NORM(T, name)                                                                                                  \
    EXPORT(norm_forward_##name, (const T* x, const T* r, const T* w, const T* b, T* s, T* y, float* stats, int d, int layer, float eps, int rebuild, int wide), \
           if (wide) norm_row<T, WIDE<T>>(x, r, w, b, s, y, stats, {d, layer, eps}, rebuild);                         \
           else norm_row<T, 1>(x, r, w, b, s, y, stats, {d, layer, eps}, rebuild))                                     \
    EXPORT(norm_backward_##name, (const T* x, const T* w, const float* stats, const T* dy, const T* base, T* dx, int d, int layer, int wide), \
           if (wide) norm_back_row<T, WIDE<T>>(x, w, stats, dy, base, dx, {d, layer, 0.f});                           \
           else norm_back_row<T, 1>(x, w, stats, dy, base, dx, {d, layer, 0.f}))                                       \
    EXPORT(norm_scale_##name, (const T* x, const float* stats, const T* dy, float* part, int rows, int d, int stretch), \
           norm_scale<T>(x, stats, dy, part, rows, d, stretch))

NORM(float, f32)
NORM(bf16, bf16)
