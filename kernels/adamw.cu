// AdamW (Loshchilov & Hutter 2019) over all parameters in one launch, behind a global gradient norm in two stages.
//
//   g ← clip·g    m ← m + (1 − β₁)(g − m)    v ← β₂·v + ((1 − β₂)·g)·g    p ← p·keep − size·m / (√v / correction + ε)
//   with keep = 1 − lr·λ, size = lr / (1 − β₁ᵗ), correction = √(1 − β₂ᵗ): by the host, in f64, rounded to f32.
//
// With f32 moments every operation is rounded by itself (no fused multiply-add), in the order of src/ops/adamw/reference.rs:
// the f32 form has that file's bits, and a GPU those of the emulator. With 8-bit moments they may be fused and approximate.
//
// Tables on the device (all offsets in bytes; a row of `Rate` for each row of `Param`, in the same order):
//   Param 80  0 p  8 shadow  16 g  24 m  32 v  40 m_scale  48 v_scale  56 n (i64)  64 id (u32)  68 group (i32)
//             72 leaf (i64): where the tensor's leaves begin in `leaves`
//   Rate  16  0 keep  4 size  8 correction (f32)  12 active (i32): 0 leaves the tensor, moments included, as it is
//   Chunk  8  0 tensor (i32): row of Param  4 index (i32): elements index·chunk .. min(n, (index + 1)·chunk)
//   Clip  16  0 norm (f64), before clipping  8 scale (f32)  12 skip (i32): a gradient is not finite, change nothing
// `chunk` is a multiple of 4096; it and the number of threads change no bit of any result.
//
// Forms, one kernel each; a launch takes the chunks of the tensors of its form. Bytes moved for an element:
//   adamw_f32    p, m, v f32 [n]; shadow: bf16 [n], p rounded to nearest even, or null          28, shadow + 2
//   adamw_bf16   p bf16 [n], rounded stochastically, without a master; m, v f32 [n]             24
//   adamw8_f32   as adamw_f32 with m int8 [n], v uint8 [n], m_scale and v_scale f32 [n / 256]   16, shadow + 2
//   adamw8_bf16  as adamw_bf16 with those                                                       12
// g is f32 everywhere. Where p, shadow, g, m and v lie at multiples of 16 a lane takes 4 elements (f32 moments) or 8 at a
// time, otherwise and in tails element by element, with the same bits. 8-bit moments start as zeros, scales included.
//
// Noise: Philox4x32-10, key = seed, counter = (step, id, element / 8, stream): element e takes 16 bits, the word
// e % 8 / 2, its low half first. Stream 0 rounds parameters, stream 1 moments. The state alone determines the next
// bits: a resumed run has them too.
//
// 8-bit moments, block-wise (Dettmers et al. 2022): blocks of 256 elements, the last may be short, with one f32 scale.
//   m = ±scale·(c / 127)⁴, scale = max |m|, c in −127..127        √v = scale·(c / 255)², scale = max √v, c in 0..255
// The fourth power is the smooth form of their dynamic tree: neighbours differ by 4/c, so 1.6 % of v and 3.1 % of m at
// the top, and the smallest m is 4·10⁻⁹ of the largest; it needs no table, and rounds with square roots. Rounding to
// nearest would swallow steps of (1 − β)·(x − moment) below half a gap, so it is stochastic (m: 5 bits, v: 11). A v
// above 0 never gets code 0: m / ε would explode. The update itself uses the moments before they are rounded.
//
// Norm: `grad_squares` adds the squares of leaves of 4096 elements, one warp a leaf, in f64: a square of an f32 is exact
// there, nothing finite overflows, and as all terms are positive the sum of n elements in T tensors and G groups is off
// by less than (50 + n / 2¹⁷ + T / 32 + G)·2⁻⁵³ of itself. `grad_norm`, one block, adds the leaves of a tensor, the tensors
// of a group and the groups in a fixed order. Bytes moved: 4 an element.
#include "common.cuh"

constexpr int LEAF = 4096;   // elements of a partial sum of the norm
constexpr int BLOCK8 = 256;  // elements that share the scales of 8-bit moments: 8 a lane
using i64 = long long;

struct Param {
    void* p;
    bf16* shadow;
    const float* g;
    void *m, *v;
    float *m_scale, *v_scale;
    i64 n;
    unsigned id;
    int group;
    i64 leaf;
};
struct Rate { float keep, size, correction; int active; };
struct Chunk { int tensor, index; };
struct Clip { double norm; float scale; int skip; };
static_assert(sizeof(Param) == 80 && sizeof(Rate) == 16 && sizeof(Chunk) == 8 && sizeof(Clip) == 16,
    "mirrored in Rust");

struct Betas { float w1, beta2, w2, eps; };  // 1 − β₁, β₂, 1 − β₂, ε
struct Noise { uint2 key; unsigned step; };

__device__ __forceinline__ bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- stochastic rounding

// Rounds x away from zero for as many of the 65,536 values of `random` as its low 16 bits say. What bf16 can hold stays,
// infinities and NaN (made quiet) too; a finite value beyond bf16's largest rounds to that or to infinity alike.
__device__ __forceinline__ bf16 stochastic(float x, unsigned random) {
    const unsigned u = __float_as_uint(x);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    return __ushort_as_bfloat16(uint16_t((nan ? u | 0x400000u : u + random) >> 16));
}

// Eight elements' words; `element` is any of theirs.
__device__ __forceinline__ uint4 noise_words(const Noise& noise, unsigned id, i64 element, unsigned stream) {
    return philox(noise.key, make_uint4(noise.step, id, unsigned(element >> 3), stream));
}
// The 16 bits of element k of 8.
__device__ __forceinline__ unsigned noise_bits(const uint4& w, int k) {
    const unsigned word = k < 4 ? (k < 2 ? w.x : w.y) : (k < 6 ? w.z : w.w);
    return k % 2 ? word >> 16 : word & 0xffffu;
}

__device__ __forceinline__ float rounded(float x, float, unsigned) { return x; }
__device__ __forceinline__ bf16 rounded(float x, bf16, unsigned random) { return stochastic(x, random); }

// ---- the update

struct Step {
    Rate rate;
    Betas betas;
    float clip;
};

// Returns the new p.
__device__ __forceinline__ float update(float p, float g, float& m, float& v, const Step& s) {
    g = __fmul_rn(g, s.clip);
    m = __fadd_rn(m, __fmul_rn(s.betas.w1, __fsub_rn(g, m)));
    v = __fadd_rn(__fmul_rn(v, s.betas.beta2), __fmul_rn(__fmul_rn(s.betas.w2, g), g));
    const float move = __fmul_rn(s.rate.size, m) / __fadd_rn(sqrtf(v) / s.rate.correction, s.betas.eps);
    return __fsub_rn(__fmul_rn(p, s.rate.keep), move);
}

// V elements from e on; `at` is e's place in the tensor, a multiple of V.
template <class P, int V>
__device__ __forceinline__ void update_pack(P* p, bf16* shadow, const float* g, float* m, float* v, int e, i64 at,
    unsigned id, const Step& s, const Noise& noise) {
    Pack<P, V> a = load<V>(p + e);
    const Pack<float, V> b = load<V>(g + e);
    Pack<float, V> c = load<V>(m + e), d = load<V>(v + e);
    Pack<bf16, V> copy;
    uint4 words{};
    if constexpr (sizeof(P) == 2) {
        words = noise_words(noise, id, at, 0);
        if (at & 4) words.x = words.z, words.y = words.w;
    }
    const int first = V == 1 ? int(at & 3) : 0;
#pragma unroll
    for (int k = 0; k < V; k++) {
        const float x = update(to_f32(a.at[k]), b.at[k], c.at[k], d.at[k], s);
        a.at[k] = rounded(x, P{}, noise_bits(words, first + k));
        copy.at[k] = from_f32<bf16>(x);
    }
    store(p + e, a);
    store(m + e, c);
    store(v + e, d);
    if (shadow) store(shadow + e, copy);
}

template <class P>
__device__ void adamw(const Param* params, const Rate* rates, const Chunk* chunks, const Clip* clip, int chunk,
    const Betas& betas, const Noise& noise) {
    const Chunk c = chunks[blockIdx.x];
    const Param t = params[c.tensor];
    const Step s{rates[c.tensor], betas, clip->scale};
    if (clip->skip || !s.rate.active) return;
    const i64 begin = i64(c.index) * chunk;
    const int n = int(min(i64(chunk), t.n - begin));
    P* p = static_cast<P*>(t.p) + begin;
    bf16* shadow = t.shadow ? t.shadow + begin : nullptr;
    const float* g = t.g + begin;
    float *m = static_cast<float*>(t.m) + begin, *v = static_cast<float*>(t.v) + begin;
    const bool wide = aligned16(p) && aligned16(shadow) && aligned16(g) && aligned16(m) && aligned16(v);
    const int whole = wide ? n & ~3 : 0;
    for (int e = threadIdx.x * 4; e < whole; e += blockDim.x * 4)
        update_pack<P, 4>(p, shadow, g, m, v, e, begin + e, t.id, s, noise);
    for (int e = whole + threadIdx.x; e < n; e += blockDim.x)
        update_pack<P, 1>(p, shadow, g, m, v, e, begin + e, t.id, s, noise);
}

// ---- 8-bit moments

constexpr float NEGLIGIBLE = 1e-30f;  // a block's largest |m|: 127⁴ over less overflows
constexpr float M_TOP = 127.f * 127.f * 127.f * 127.f, V_TOP = 255.f * 255.f;
// f32 + ROUND has the nearest whole number in its low bits: conversions at the speed of additions.
constexpr float ROUND = 12582912.f;

// At 12 bytes an element the instructions count: approximate roots and quotients, to 2 ulp.
__device__ __forceinline__ float fast_sqrt(float x) {
#if defined(CUDA_ON_CPU)
    return sqrtf(x);
#else
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The update with √v for v, and 1 / correction in the place of correction; returns the new p.
__device__ __forceinline__ float fast_update(float p, float g, float& m, float& root, const Step& s) {
    g *= s.clip;
    m += s.betas.w1 * (g - m);
    // An unclipped gradient's square may overflow, which the block's scale must not.
    root = fminf(fast_sqrt(root * root * s.betas.beta2 + s.betas.w2 * g * g), 1.8e19f);
    return p * s.rate.keep - __fdividef(s.rate.size * m, root * s.rate.correction + s.betas.eps);
}

// Byte k of eight, as 0 to 255; `base` is taken off.
__device__ __forceinline__ float byte_to_f32(const uint2& codes, int k, float base) {
    return __uint_as_float(0x4b000000u | ((k < 4 ? codes.x : codes.y) >> k % 4 * 8 & 255u)) - (8388608.f + base);
}
// `unit` is scale / 127⁴; the codes are int8, whose sign bit flipped is an offset of 128.
__device__ __forceinline__ float decode_m(const uint2& codes, int k, float unit) {
    const float c = byte_to_f32({codes.x ^ 0x80808080u, codes.y ^ 0x80808080u}, k, 128.f);
    return c * fabsf(c) * (c * c) * unit;
}
// √v; `unit` is scale / 255².
__device__ __forceinline__ float decode_root(const uint2& codes, int k, float unit) {
    const float c = byte_to_f32(codes, k, 0.f);
    return c * c * unit;
}

// `per` is 1 / unit, or 0 for a block of zeros; `random` has 5 and 11 bits.
__device__ __forceinline__ unsigned encode_m(float m, float per, unsigned random) {
    const float c = fast_sqrt(fast_sqrt(fabsf(m) * per));
    const float dither = (__uint_as_float(0x4b000000u | random) - 8388608.f - 15.5f) * (1.f / 32);  // in −½..½
    return __float_as_uint(copysignf(fmaxf(fminf(c + dither, 127.f), 0.f), m) + ROUND) & 255u;
}
__device__ __forceinline__ unsigned encode_root(float root, float per, unsigned random) {
    const float t = root * per;  // v is t² units
    const float low = fminf(fmaxf(fast_sqrt(t) - 0.5f, root > 0.f ? 1.f : 0.f), 254.f) + ROUND, a = low - ROUND;
    const float a2 = a * a, step = 2.f * a + 1.f;  // (a + 1)⁴ − a⁴ = step·(2·a² + step)
    const float gap = step * (2.f * a2 + step), above = (t - a2) * (t + a2);
    const float threshold = (__uint_as_float(0x4b000000u | random) - 8388607.5f) * (1.f / 2048);
    return (__float_as_uint(low) & 255u) + (threshold * gap < above ? 1u : 0u);
}

// The scales of a warp's block of new moments (8 a lane) and their codes.
__device__ __forceinline__ void encode_block(const float (&m)[8], const float (&root)[8], const uint4& words,
    uint2& m_codes, uint2& v_codes, float& m_scale, float& v_scale) {
    m_scale = v_scale = 0.f;
#pragma unroll
    for (int k = 0; k < 8; k++) m_scale = fmaxf(m_scale, fabsf(m[k])), v_scale = fmaxf(v_scale, root[k]);
    m_scale = warp_max(m_scale), v_scale = warp_max(v_scale);
    if (m_scale < NEGLIGIBLE) m_scale = 0.f;
    const float m_per = m_scale > 0.f ? M_TOP / m_scale : 0.f, v_per = v_scale > 0.f ? V_TOP / v_scale : 0.f;
    m_codes = v_codes = make_uint2(0, 0);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const unsigned bits = noise_bits(words, k), shift = k % 4 * 8;
        (k < 4 ? m_codes.x : m_codes.y) |= encode_m(m[k], m_per, bits & 31u) << shift;
        (k < 4 ? v_codes.x : v_codes.y) |= encode_root(root[k], v_per, bits >> 5) << shift;
    }
}

// Eight codes as two words, byte by byte where they are not aligned or fewer.
__device__ __forceinline__ uint2 load_codes(const uint8_t* codes, i64 e, i64 left, bool wide) {
    if (wide) return *reinterpret_cast<const uint2*>(codes + e);
    uint2 out = make_uint2(0, 0);
#pragma unroll
    for (int k = 0; k < 8; k++)
        if (k < left) (k < 4 ? out.x : out.y) |= unsigned(codes[e + k]) << k % 4 * 8;
    return out;
}
__device__ __forceinline__ void store_codes(uint8_t* codes, i64 e, i64 left, bool wide, const uint2& v) {
    if (wide) {
        *reinterpret_cast<uint2*>(codes + e) = v;
        return;
    }
#pragma unroll
    for (int k = 0; k < 8; k++)
        if (k < left) codes[e + k] = uint8_t((k < 4 ? v.x : v.y) >> k % 4 * 8);
}

// Eight elements from e on, `left` of them in the tensor; others are 0.
template <class T> __device__ __forceinline__ Pack<T, 8> load_some(const T* p, i64 e, i64 left, bool wide) {
    Pack<T, 8> out{};
    if (wide) {
        constexpr int N = sizeof(T) * 8 > 16 ? 4 : 8;
#pragma unroll
        for (int k = 0; k < 8; k += N) {
            const Pack<T, N> part = load<N>(p + e + k);
#pragma unroll
            for (int i = 0; i < N; i++) out.at[k + i] = part.at[i];
        }
    } else {
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (k < left) out.at[k] = p[e + k];
    }
    return out;
}
template <class T> __device__ __forceinline__ void store_some(T* p, i64 e, i64 left, bool wide, const Pack<T, 8>& v) {
    if (wide) {
        constexpr int N = sizeof(T) * 8 > 16 ? 4 : 8;
#pragma unroll
        for (int k = 0; k < 8; k += N) {
            Pack<T, N> part;
#pragma unroll
            for (int i = 0; i < N; i++) part.at[i] = v.at[k + i];
            store(p + e + k, part);
        }
    } else {
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (k < left) p[e + k] = v.at[k];
    }
}

// A warp takes a block of 256 elements at a time, so no barrier of the whole thread block is needed.
template <class P>
__device__ void adamw8(const Param* params, const Rate* rates, const Chunk* chunks, const Clip* clip, int chunk,
    const Betas& betas, const Noise& noise) {
    const Chunk c = chunks[blockIdx.x];
    const Param t = params[c.tensor];
    Step s{rates[c.tensor], betas, clip->scale};
    if (clip->skip || !s.rate.active) return;
    s.rate.correction = 1.f / s.rate.correction;
    P* p = static_cast<P*>(t.p);
    uint8_t *m = static_cast<uint8_t*>(t.m), *v = static_cast<uint8_t*>(t.v);
    const bool aligned = aligned16(p) && aligned16(t.shadow) && aligned16(t.g) && aligned16(m) && aligned16(v);
    const i64 begin = i64(c.index) * chunk, end = min(begin + chunk, t.n);
    const int lane = threadIdx.x % 32;
    for (i64 start = begin + threadIdx.x / 32 * BLOCK8; start < end; start += blockDim.x / 32 * BLOCK8) {
        const i64 e = start + lane * 8, left = end - e, block = start / BLOCK8;
        const bool wide = aligned && left >= 8;
        Pack<P, 8> a = load_some(p, e, left, wide);
        const Pack<float, 8> g = load_some(t.g, e, left, wide);
        uint2 m_codes = load_codes(m, e, left, wide), v_codes = load_codes(v, e, left, wide);
        float m_scale = t.m_scale[block], v_scale = t.v_scale[block], mean[8], root[8];
        const float m_unit = m_scale / M_TOP, v_unit = v_scale / V_TOP;
        uint4 words{};
        if constexpr (sizeof(P) == 2) words = noise_words(noise, t.id, e, 0);
        Pack<bf16, 8> copy;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            mean[k] = decode_m(m_codes, k, m_unit);
            root[k] = decode_root(v_codes, k, v_unit);
            const float x = fast_update(to_f32(a.at[k]), g.at[k], mean[k], root[k], s);
            a.at[k] = rounded(x, P{}, noise_bits(words, k));
            copy.at[k] = from_f32<bf16>(x);
        }
        store_some(p, e, left, wide, a);
        if (t.shadow) store_some(t.shadow, e, left, wide, copy);
        encode_block(mean, root, noise_words(noise, t.id, e, 1), m_codes, v_codes, m_scale, v_scale);
        store_codes(m, e, left, wide, m_codes);
        store_codes(v, e, left, wide, v_codes);
        if (lane == 0) t.m_scale[block] = m_scale, t.v_scale[block] = v_scale;
    }
}

// ---- the global norm

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    return v;
}

// leaves[t.leaf + i] = Σ g² of a tensor's elements 4096·i .. 4096·(i + 1). Lane l adds the elements with e / 4 % 32 = l.
__device__ void grad_squares_chunk(const Param* params, const Rate* rates, const Chunk* chunks, int chunk,
    double* leaves) {
    const Chunk c = chunks[blockIdx.x];
    const Param t = params[c.tensor];
    if (!rates[c.tensor].active) return;
    const i64 begin = i64(c.index) * chunk, end = min(begin + chunk, t.n);
    const bool wide = aligned16(t.g);
    for (i64 start = begin + threadIdx.x / 32 * LEAF; start < end; start += blockDim.x / 32 * LEAF) {
        const float* g = t.g + start;
        const int n = int(min(i64(LEAF), end - start));
        double sum[4] = {0., 0., 0., 0.};
#pragma unroll 8
        for (int e = threadIdx.x % 32 * 4; e < n; e += 128) {
            Pack<float, 4> x{};
            if (wide && e + 4 <= n) {
                x = load<4>(g + e);
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (e + k < n) x.at[k] = g[e + k];
            }
#pragma unroll
            for (int k = 0; k < 4; k++) sum[k] += double(x.at[k]) * double(x.at[k]);
        }
        const double total = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
        if (threadIdx.x % 32 == 0) leaves[t.leaf + start / LEAF] = total;
    }
}

// tensor_squares [tensors]: Σ g² (0 if not active; NaN or infinite just where the gradient is), group_norms [groups].
__device__ void grad_norm_total(const Param* params, const Rate* rates, int tensors, int groups,
    const double* leaves, double max_norm, double* tensor_squares, double* group_norms, Clip* clip) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int i = warp; i < tensors; i += warps) {
        const i64 count = rates[i].active ? (params[i].n + LEAF - 1) / LEAF : 0;
        const double* leaf = leaves + params[i].leaf;
        double sum = 0.;
#pragma unroll 8
        for (i64 k = lane; k < count; k += 32) sum += leaf[k];
        sum = warp_sum(sum);
        if (lane == 0) tensor_squares[i] = sum;
    }
    __syncthreads();
    for (int q = warp; q < groups; q += warps) {
        double sum = 0.;
        for (int i = lane; i < tensors; i += 32)
            if (params[i].group == q) sum += tensor_squares[i];
        sum = warp_sum(sum);
        if (lane == 0) group_norms[q] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0.;
        for (int q = 0; q < groups; q++) {
            sum += group_norms[q];
            group_norms[q] = sqrt(group_norms[q]);
        }
        const double norm = sqrt(sum), scale = max_norm / (norm + 1e-6);
        const bool skip = !(sum - sum == 0.);
        *clip = {norm, skip ? 0.f : max_norm == 0. || scale > 1. ? 1.f : float(scale), skip};
    }
}

// ---- for the tests

// out[i] = x rounded with the random word i, a thread each, 65,536 in all.
__device__ void stochastic_all(float x, bf16* out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < 65536u) out[i] = stochastic(x, i);
}

// What m [n] and v [n] become by being stored in 8 bits and read back. One warp a block.
__device__ void moments8(const float* m, const float* v, float* m_back, float* v_back, int n, const Noise& noise) {
    const i64 e = i64(blockIdx.x) * BLOCK8 + threadIdx.x * 8, left = n - e;
    const Pack<float, 8> a = load_some(m, e, left, false), b = load_some(v, e, left, false);
    float mean[8], root[8], m_scale, v_scale;
#pragma unroll
    for (int k = 0; k < 8; k++) mean[k] = a.at[k], root[k] = sqrtf(b.at[k]);
    uint2 m_codes, v_codes;
    encode_block(mean, root, noise_words(noise, 0, e, 1), m_codes, v_codes, m_scale, v_scale);
    Pack<float, 8> x, y;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float r = decode_root(v_codes, k, v_scale / V_TOP);
        x.at[k] = decode_m(m_codes, k, m_scale / M_TOP), y.at[k] = r * r;
    }
    store_some(m_back, e, left, false, x);
    store_some(v_back, e, left, false, y);
}

#define ADAMW(kernel, body, T)                                                                                       \
    EXPORT_BOUNDS(256, 4, kernel,                                                                                    \
           (const Param* params, const Rate* rates, const Chunk* chunks, const Clip* clip, int chunk, float w1,      \
            float beta2, float w2, float eps, unsigned seed_low, unsigned seed_high, unsigned step),                 \
           body<T>(params, rates, chunks, clip, chunk, {w1, beta2, w2, eps}, {make_uint2(seed_low, seed_high), step}))

ADAMW(adamw_f32, adamw, float)
ADAMW(adamw_bf16, adamw, bf16)
ADAMW(adamw8_f32, adamw8, float)
ADAMW(adamw8_bf16, adamw8, bf16)
EXPORT(grad_squares, (const Param* params, const Rate* rates, const Chunk* chunks, int chunk, double* leaves),
       grad_squares_chunk(params, rates, chunks, chunk, leaves))
EXPORT(grad_norm, (const Param* params, const Rate* rates, int tensors, int groups, const double* leaves,
    double max_norm, double* tensor_squares, double* group_norms, Clip* clip),
       grad_norm_total(params, rates, tensors, groups, leaves, max_norm, tensor_squares, group_norms, clip))
EXPORT(stochastic_test, (float x, bf16* out), stochastic_all(x, out))
EXPORT(moments8_test, (const float* m, const float* v, float* m_back, float* v_back, int n, unsigned seed_low,
    unsigned seed_high, unsigned step),
       moments8(m, v, m_back, v_back, n, {make_uint2(seed_low, seed_high), step}))
