// Softmax cross-entropy on a chunk of logits z [R, V], and its gradient in their place (as in Liger's fused head).
//
//   logp = z_t − log Σ_j e^(z_j),  argmax = the first of the largest;  z_j ← coef·([j = t] − softmax(z)_j)
//
// Logits are f32, as the product has summed them. logp, argmax: [R], f32 and u32, or null. coef [R] f32, null for 1. One
// block of 512 threads a row: grid R.
//
// z is read once (maximum, sum and argmax together, the online softmax of Milakov & Gimelshein 2018) and, if the gradient
// is to `overwrite` it, once more: e·R·V [+ 2e·R·V] bytes.
//
// `wide`: accesses of 16 bytes; V a multiple of 16/e and z at an address of 16. Elements belong to threads by their index
// alone, so wide or not, the bits are the same.
#include "common.cuh"
#include <cfloat>

constexpr int THREADS = 512;
// Accesses in flight a thread: more would spill at 64 registers. One by one, V elements are enough.
template <bool ALIGNED> constexpr int STEPS = ALIGNED ? 4 : 1;

struct Row {
    float max, sum;  // Σ e^(z − max)
    unsigned at;     // where max first stands
};

// The V elements from j on; beyond v, −∞.
template <bool ALIGNED, class T, int V> __device__ __forceinline__ Pack<T, V> read(const T* z, int j, int v) {
    if constexpr (ALIGNED) return load<V>(z + j);
    Pack<T, V> a;
#pragma unroll
    for (int k = 0; k < V; k++) a.at[k] = j + k < v ? z[j + k] : from_f32<T>(-INFINITY);
    return a;
}

template <int V, class T> __device__ __forceinline__ void take(Row& r, const Pack<T, V>& a, int j) {
    float x[V], top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int k = 0; k < V; k++) x[k] = to_f32(a.at[k]), top = fmaxf(top, x[k]);
    if (top > r.max) {
        r.sum *= exp2_fast((r.max - top) * LOG2E);
        r.max = top;
#pragma unroll
        for (int k = V - 1; k >= 0; k--)
            if (x[k] == top) r.at = j + k;
    }
#pragma unroll
    for (int k = 0; k < V; k++) sum += exp2_fast((x[k] - r.max) * LOG2E);
    r.sum += sum;
}

// The row's maximum, sum and place of the maximum from its threads'; all threads get them.
__device__ __forceinline__ Row join(Row mine) {
    SHARED(float, tops, 32);
    SHARED(unsigned, places, 32);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float top = warp_max(mine.max);
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    Row r;
    r.max = warp_max(lane < THREADS / 32 ? tops[lane] : -FLT_MAX);
    unsigned at = mine.max == r.max ? mine.at : ~0u;
#pragma unroll
    for (int o = 16; o; o >>= 1) at = min(at, __shfl_xor_sync(FULL, at, o));
    if (lane == 0) places[warp] = at;
    float sum[1] = {mine.sum * exp2_fast((mine.max - r.max) * LOG2E)};
    block_sums(sum);  // its barriers also stand between the places' writers and readers
    r.sum = sum[0];
    at = places[lane % (THREADS / 32)];
#pragma unroll
    for (int o = 16; o; o >>= 1) at = min(at, __shfl_xor_sync(FULL, at, o));
    r.at = at == ~0u ? 0 : at;
    return r;
}

// z_j ← coef·([j = t] − e^(z_j − shift)·scale)
template <bool ALIGNED, class T> __device__ void write_gradient(T* z, int v, int t, float shift, float scale, float coef) {
    constexpr int V = WIDE<T>;
    scale *= -coef;
    sweep<STEPS<ALIGNED>, V>(int(threadIdx.x), THREADS, v, [=](int j) { return read<ALIGNED, T, V>(z, j, v); },
                [=](int j, Pack<T, V> a) {
#pragma unroll
                    for (int k = 0; k < V; k++) {
                        const float g = exp2_fast((to_f32(a.at[k]) - shift) * LOG2E) * scale;
                        a.at[k] = from_f32<T>(j + k == t ? g + coef : g);
                    }
                    if (ALIGNED) {
                        put(z + j, a);
                    } else {
#pragma unroll
                        for (int k = 0; k < V; k++)
                            if (j + k < v) z[j + k] = a.at[k];
                    }
                });
}

template <bool ALIGNED, class T>
__device__ void cross_entropy(T* z, const unsigned* targets, const float* coef, float* logp, unsigned* argmax, int v, bool overwrite) {
    constexpr int V = WIDE<T>;
    const size_t row = blockIdx.x;
    const int t = targets[row];
    z += row * v;
    const float hit = to_f32(z[t]);  // before it is overwritten
    Row r{-FLT_MAX, 0.f, ~0u};       // finite: −∞ − (−∞) would not be a number
    {
        Row* to = &r;
        sweep<STEPS<ALIGNED>, V>(int(threadIdx.x), THREADS, v, [=](int j) { return read<ALIGNED, T, V>(z, j, v); },
                    [=](int j, const Pack<T, V>& a) { take(*to, a, j); });
    }
    r = join(r);
    if (threadIdx.x == 0) {
        if (logp) logp[row] = hit - r.max - logf(r.sum);
        if (argmax) argmax[row] = r.at;
    }
    if (overwrite) write_gradient<ALIGNED>(z, v, t, r.max, 1.f / r.sum, coef ? coef[row] : 1.f);
}

#define CROSS_ENTROPY(T, name)                                                                                         \
    EXPORT_BOUNDS(THREADS, 2, cross_entropy_##name, (T* z, const unsigned* targets, const float* coef, float* logp, unsigned* argmax, int v, int overwrite, int wide), \
                  if (wide) cross_entropy<true>(z, targets, coef, logp, argmax, v, overwrite);            \
                  else cross_entropy<false>(z, targets, coef, logp, argmax, v, overwrite))

CROSS_ENTROPY(float, f32)
