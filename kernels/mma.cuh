// Tensor cores and asynchronous copies of sm_80 and later, with the same lane layouts on the CPU.
//
// Operands of multiply(d, a, b0, b1), D[16, 8] += A[16, 16]·B[16, 8] in bf16 with f32 sums; lane = 4·g + t:
//     a[0], a[1]   rows g, g + 8, columns 2t, 2t + 1;    a[2], a[3]   the same rows, columns 2t + 8, 2t + 9
//     b0, b1       column g, rows 2t, 2t + 1 and 2t + 8, 2t + 9
//     d[0], d[1]   row g, columns 2t, 2t + 1;            d[2], d[3]   row g + 8
// A product's d, rounded to bf16 and taken two column tiles at a time, therefore is the next product's a.
// Source: PTX ISA, "Matrix fragments for mma.m16n8k16", ldmatrix, cp.async.
#pragma once
#include "common.cuh"

// ---- shared memory by its own addresses, in bytes

#if defined(CUDA_ON_CPU)
using Address = uintptr_t;
inline Address shared_address(const void* p) { return Address(p); }
#else
using Address = unsigned;
__device__ __forceinline__ Address shared_address(const void* p) { return Address(__cvta_generic_to_shared(p)); }
#endif

__device__ __forceinline__ void store_shared(Address a, unsigned v) {
#if defined(CUDA_ON_CPU)
    cuda_cpu::aligned(reinterpret_cast<void*>(a), 4);
    cuda_cpu::pause(16);
    memcpy(reinterpret_cast<void*>(a), &v, 4);
#else
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(v) : "memory");
#endif
}
__device__ __forceinline__ uint4 load_shared16(Address a) {
    uint4 v;
#if defined(CUDA_ON_CPU)
    cuda_cpu::aligned(reinterpret_cast<void*>(a), 16);
    cuda_cpu::pause(16);
    memcpy(&v, reinterpret_cast<void*>(a), 16);
#else
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a) : "memory");
#endif
    return v;
}
__device__ __forceinline__ float2 load_shared8(Address a) {
    float2 v;
#if defined(CUDA_ON_CPU)
    cuda_cpu::aligned(reinterpret_cast<void*>(a), 8);
    cuda_cpu::pause(16);
    memcpy(&v, reinterpret_cast<void*>(a), 8);
#else
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(a) : "memory");
#endif
    return v;
}
__device__ __forceinline__ void store_global16(void* p, uint4 v) {
#if defined(CUDA_ON_CPU)
    cuda_cpu::aligned(p, 16);
    memcpy(p, &v, 16);
#else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

// ---- cp.async: global to shared memory past the registers. A thread's copies up to a commit are a group.

// BYTES (4 or 16) at `from`, or zeros where not `valid`; nothing is read then.
template <int BYTES> __device__ __forceinline__ void copy_async(Address to, const void* from, bool valid) {
    static_assert(BYTES == 4 || BYTES == 16, "");
#if defined(CUDA_ON_CPU)
    cuda_cpu::aligned(reinterpret_cast<void*>(to), BYTES);
    if (valid) cuda_cpu::aligned(from, BYTES);
    const unsigned bytes = valid ? BYTES : 0;
    cuda_cpu::async_copy(reinterpret_cast<void*>(to), from, bytes, BYTES - bytes);
#else
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#if defined(CUDA_ON_CPU)
    auto& f = *cuda_cpu::state().now;
    f.groups.push_back(std::move(f.open));
    f.open.clear();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most the newest KEEP groups of this thread are under way. Other threads' copies need a barrier after it.
template <int KEEP> __device__ __forceinline__ void wait_copies() {
#if defined(CUDA_ON_CPU)
    cuda_cpu::async_wait(KEEP);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(KEEP) : "memory");
#endif
}

// ---- fragments

// Four 8 × 8 matrices of 16-bit elements: lane 8j + i names row i of matrix j; r[j] holds row g, columns 2t, 2t + 1 of
// matrix j, or with TRANSPOSED rows 2t, 2t + 1 of column g.
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(unsigned (&r)[4], Address row) {
#if defined(CUDA_ON_CPU)
    cuda_cpu::aligned(reinterpret_cast<void*>(row), 16);
    auto rows = cuda_cpu::exchange(reinterpret_cast<void*>(row), 16);
    const unsigned g = cuda_cpu::state().now->lane / 4, t = cuda_cpu::state().now->lane % 4;
    for (unsigned j = 0; j < 4; j++)
        for (unsigned e = 0; e < 2; e++) {
            const unsigned i = TRANSPOSED ? 2 * t + e : g, c = TRANSPOSED ? g : 2 * t + e;
            memcpy(reinterpret_cast<char*>(&r[j]) + 2 * e, rows[8 * j + i] + 2 * c, 2);
        }
#else
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
#endif
}

__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if defined(CUDA_ON_CPU)
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    auto lanes = cuda_cpu::exchange(mine, sizeof mine);
    const unsigned g = cuda_cpu::state().now->lane / 4, t = cuda_cpu::state().now->lane % 4;
    // Element k of row i of A, and of column j of B.
    auto element = [&](unsigned line, unsigned word, unsigned k) {
        uint16_t h;
        memcpy(&h, lanes[4 * line + k % 8 / 2] + 4 * word + 2 * (k % 2), 2);
        return __bfloat162float({h});
    };
    for (unsigned e = 0; e < 4; e++)
        for (unsigned k = 0; k < 16; k++) d[e] += element(g, e / 2 + k / 8 * 2, k) * element(2 * t + e % 2, 4 + k / 8, k);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Two floats rounded to bf16, `low` in the lower half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#if defined(CUDA_ON_CPU)
    return __float2bfloat16(low).bits | unsigned(__float2bfloat16(high).bits) << 16;
#else
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#endif
}
