// Rotary position embedding (Su et al. 2021) in the half-split layout of HF's LLaMA, in place on q and k in one launch.
//
// q [N, heads·hd], k [N, kv·hd]; cos, sin [N, hd/2] in f32. Column i of a head's first half and column i of its second
// form a pair: (a, b) → (a·cos − sign·b·sin, b·cos + sign·a·sin), sign 1 forward and −1 backward (the inverse of a
// rotation is its transpose). Moves 2e·N·(heads + kv)·hd bytes, and 4·N·hd of angles.
//
// Block (x, y, z) of any shape: x threads share the pairs of a head, y the heads, z rows; grid ⌈N / z⌉. A thread keeps the
// angles of its pairs for all its heads. Best: x = hd/(2V), y = ⌈(heads + kv) / 4⌉, z = as many as 256 threads hold (≤ 64).
// `wide`: V = 16/e; hd/2 a multiple of V, addresses of 16 bytes. Otherwise V = 1.
#include "common.cuh"

struct Heads {
    int n, q, kv, hd;
};

template <class T, int V> __device__ void rotate(T* q, T* k, const float* cos, const float* sin, Heads s, float sign) {
    constexpr int A = V < 4 ? V : 4;  // angles of one access
    constexpr int U = 4;              // heads in flight
    const int half = s.hd / 2, heads = s.q + s.kv, step = blockDim.y;
    const size_t row = size_t(blockIdx.x) * blockDim.z + threadIdx.z;
    if (row >= size_t(s.n)) return;
    for (int i = threadIdx.x * V; i < half; i += blockDim.x * V) {
        float c[V], d[V];
#pragma unroll
        for (int j = 0; j < V; j += A) {
            const Pack<float, A> cs = load<A>(cos + row * half + i + j), sn = load<A>(sin + row * half + i + j);
#pragma unroll
            for (int l = 0; l < A; l++) c[j + l] = cs.at[l], d[j + l] = sign * sn.at[l];
        }
        const auto place = [=](int h) { return i + (h < s.q ? q + (row * s.q + h) * s.hd : k + (row * s.kv + h - s.q) * s.hd); };
        for (int first = threadIdx.y; first < heads; first += U * step) {
            Pack<T, V> a[U], b[U];
#pragma unroll
            for (int u = 0; u < U; u++)
                if (first + u * step < heads) {
                    const T* p = place(first + u * step);
                    a[u] = load<V>(p), b[u] = load<V>(p + half);
                }
#pragma unroll
            for (int u = 0; u < U; u++)
                if (first + u * step < heads) {
#pragma unroll
                    for (int j = 0; j < V; j++) {
                        const float x = to_f32(a[u].at[j]), y = to_f32(b[u].at[j]);
                        a[u].at[j] = from_f32<T>(x * c[j] - y * d[j]);
                        b[u].at[j] = from_f32<T>(y * c[j] + x * d[j]);
                    }
                    T* p = place(first + u * step);
                    store(p, a[u]), store(p + half, b[u]);
                }
        }
    }
}

#define ROPE(T, name)                                                                                                  \
    EXPORT_BOUNDS(256, 2, rope_##name, (T* q, T* k, const float* cos, const float* sin, int n, int heads, int kv, int hd, float sign, int wide), \
                  if (wide) rotate<T, WIDE<T>>(q, k, cos, sin, {n, heads, kv, hd}, sign);                              \
                  else rotate<T, 1>(q, k, cos, sin, {n, heads, kv, hd}, sign))

ROPE(float, f32)
ROPE(bf16, bf16)
