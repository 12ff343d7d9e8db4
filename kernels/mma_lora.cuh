// Beside mma.cuh: the dropout mask on bf16 pairs, guarded loads of such pairs.
#pragma once
#include "mma.cuh"

// A lane's share of a row: N neighbouring bf16 as pairs.
template <int N> using Pairs = Pack<unsigned, N / 2>;

__device__ __forceinline__ unsigned bits(bf16 v) { return __bfloat16_as_ushort(v); }

// The N elements at `at` of which `left` are in the row, zeros beyond. WHOLE: all or none are, and `at` is a multiple of N.
template <int N, bool WHOLE> __device__ __forceinline__ Pairs<N> load_pairs(const bf16* at, int left) {
    Pairs<N> v{};
    if (WHOLE) {
        if (left > 0) v = load<N / 2>(reinterpret_cast<const unsigned*>(at));
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < left) v.at[i / 2] |= bits(at[i]) << 16 * (i % 2);
    }
    return v;
}

// Dropout as src/ops/random.rs draws it: element i goes where word i % 4 at counter i / 4 is below `limit`.
struct Dropout {
    uint2 key, high;
    unsigned limit;  // 0: keep all
};

__device__ __forceinline__ uint4 words(const Dropout& d, size_t i) {
    return philox(d.key, make_uint4(unsigned(i), unsigned(i >> 32), d.high.x, d.high.y));
}

// Zeroes what goes of elements at .. at + N. WHOLE: `at` is a multiple of 4, so that each word is drawn once.
template <int N, bool WHOLE> __device__ __forceinline__ void drop(Pairs<N>& v, Dropout d, size_t at) {
    if (d.limit == 0) return;
#if !defined(CUDA_ON_CPU)
    asm volatile("" : "+r"(d.key.x), "+r"(d.key.y));  // else the 20 round keys stay in registers all through a loop
#endif
    if (WHOLE) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint4 w = words(d, at / 4 + i / 4);
            v.at[i / 2] &= (w.x < d.limit ? 0u : 0xffffu) | (w.y < d.limit ? 0u : 0xffff0000u);
            v.at[i / 2 + 1] &= (w.z < d.limit ? 0u : 0xffffu) | (w.w < d.limit ? 0u : 0xffff0000u);
        }
    } else {
        unsigned gone = 0;
#pragma unroll 1
        for (int i = 0; i < N; i++) {
            const uint4 w = words(d, (at + i) / 4);
            const unsigned k = unsigned(at + i) % 4;
            gone |= unsigned((k == 0 ? w.x : k == 1 ? w.y : k == 2 ? w.z : w.w) < d.limit) << i;
        }
#pragma unroll
        for (int i = 0; i < N; i++)
            if (gone >> i & 1) v.at[i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
    }
}
