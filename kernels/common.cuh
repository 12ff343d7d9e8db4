// What all kernels share: element types, vector accesses, reductions, Philox.
//
// The same text is compiled by nvcc for a GPU and by a C++ compiler for the tests (cuda_on_cpu/cuda.h).
#pragma once
#if !defined(CUDA_ON_CPU)
#include <cuda_bf16.h>
#include <cstdint>
#define EMULATE(name)
#endif

using bf16 = __nv_bfloat16;

// A kernel's entry: EXPORT(name, (parameters), body). Names end in the element type: norm_forward_bf16.
#define EXPORT(name, params, ...)                  \
    extern "C" __global__ void name params { __VA_ARGS__; } \
    EMULATE(name)
// The same with at most `threads` a block and at least `blocks` on a multiprocessor, which caps its registers.
#define EXPORT_BOUNDS(threads, blocks, name, params, ...)                                    \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name params { __VA_ARGS__; } \
    EMULATE(name)

// SHARED(T, name, n): an array of shared memory. DYNAMIC_SHARED(T, name): the launch's dynamic shared memory.
#if defined(CUDA_ON_CPU)
#define SHARED(T, name, n)        \
    static const char name##_at = 0; \
    T* name = reinterpret_cast<T*>(cuda_cpu::shared_array(&name##_at, sizeof(T) * (n)))
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_cpu::dynamic_shared())
#else
#define SHARED(T, name, n) __shared__ alignas(16) T name[n]
#define DYNAMIC_SHARED(T, name)                        \
    extern __shared__ __align__(128) unsigned char dynamic_shared_[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared_)
#endif

constexpr unsigned FULL = 0xffffffffu;

// ---- element types: everything is computed in f32

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return __float2bfloat16(x); }

// ---- vector accesses: N elements at once, at an address that is a multiple of their size together

template <class T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };
// Elements of a 16-byte access.
template <class T> constexpr int WIDE = 16 / sizeof(T);

template <int N, class T> __device__ __forceinline__ Pack<T, N> load(const T* p) {
#if defined(CUDA_ON_CPU)
    cuda_cpu::aligned(p, sizeof(Pack<T, N>));
#endif
    return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, class T> __device__ __forceinline__ void store(T* p, const Pack<T, N>& v) {
#if defined(CUDA_ON_CPU)
    cuda_cpu::aligned(p, sizeof(v));
#endif
    *reinterpret_cast<Pack<T, N>*>(p) = v;
}

// ---- reductions: the same order whatever the hardware does, so the same bits every time

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, o));
    return v;
}

// Sums of `N` values over a block (a multiple of 32 threads); all threads get them. May be called again at once.
template <int N> __device__ __forceinline__ void block_sums(float (&v)[N]) {
    SHARED(float, part, 32 * N);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = warp_sum(v[i]);
    __syncthreads();  // an earlier call's readers are done
    if (lane == 0)
#pragma unroll
        for (int i = 0; i < N; i++) part[i * 32 + warp] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = warp_sum(lane < warps ? part[i * 32 + lane] : 0.f);
}

// ---- random bits: Philox4x32-10 (Salmon et al. 2011), the same words as src/ops/philox.rs

__device__ __forceinline__ uint4 philox(uint2 key, uint4 c) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x;
        const unsigned h1 = __umulhi(0xCD9E8D57u, c.z), l1 = 0xCD9E8D57u * c.z;
        c = make_uint4(h1 ^ c.y ^ key.x, l1, h0 ^ c.w ^ key.y, l0);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return c;
}

// ---- hardware approximations, about 2 ulp; results below 2^-126 become 0

#if defined(CUDA_ON_CPU)
inline float exp2_fast(float x) { return exp2f(x); }
inline float rcp_fast(float x) { return 1.f / x; }
#else
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rcp_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
constexpr float LOG2E = 1.44269504088896341f;

// ---- streaming: this lane of `lanes` does every step of `V` elements that falls to it, `U` steps at a time: all are
// read (`in(i)`) before the first is written (`out(i, held)`), to keep memory busy also where a buffer is updated in place

template <int U, int V, class I, class In, class Out>
__device__ __forceinline__ void sweep(I lane, I lanes, I n, In in, Out out) {
    const I step = lanes * V;
    I at = lane * V;
    for (; at + (U - 1) * step < n; at += U * step) {
        decltype(in(at)) held[U];
#pragma unroll
        for (int u = 0; u < U; u++) held[u] = in(at + u * step);
#pragma unroll
        for (int u = 0; u < U; u++) out(at + u * step, held[u]);
    }
    for (; at < n; at += step) out(at, in(at));
}
// Over n elements by the whole grid: blocks of any size, any number of them.
template <int U, int V, class In, class Out> __device__ __forceinline__ void flat(size_t n, In in, Out out) {
    sweep<U, V>(size_t(blockIdx.x) * blockDim.x + threadIdx.x, size_t(gridDim.x) * blockDim.x, n, in, out);
}
// Over the d columns of a row by the threads of one `threadIdx.y`.
template <int U, int V, class In, class Out> __device__ __forceinline__ void across(int d, In in, Out out) {
    sweep<U, V>(int(threadIdx.x), int(blockDim.x), d, in, out);
}

// `store` in one instruction for sure: where a loop is unrolled, nvcc 13.0 splits some stores of a Pack into elements.
template <int N, class T> __device__ __forceinline__ void put(T* p, const Pack<T, N>& v) {
#if !defined(CUDA_ON_CPU)
    if constexpr (sizeof(v) == 16) {
        unsigned w[4];
        memcpy(w, &v, 16);
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
        return;
    } else if constexpr (sizeof(v) == 8) {
        unsigned w[2];
        memcpy(w, &v, 8);
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1]) : "memory");
        return;
    }
#endif
    store(p, v);
}
