// Activations and SwiGLU (Shazeer 2020), forward and backward, over n elements.
//
//   kind 0 gelu        x·Φ(x)                                   (Hendrycks & Gimpel 2016)
//        1 gelu_tanh   x·σ(2u), u = √(2/π)·(x + 0.044715·x³): the same as ½x(1 + tanh u)
//        2 quick_gelu  x·σ(1.702x)
//        3 silu        x·σ(x)
//        4 relu        max(x, 0)
//   activation_forward   y = act(x); y may be x                         2e·n bytes (e: bytes of an element)
//   activation_backward  dx = dy·act′(x); dx may be x or dy             3e·n
//   swiglu_forward       y = silu(gate)·up; y may be gate or up         3e·n
//   swiglu_backward      s = σ(gate): dgate = dy·up·s·(1 + gate·(1 − s)), dup = dy·gate·s; also y again, with the bits of
//                        swiglu_forward, unless y is null. dgate may be gate, dup may be up, y may be dy   5e·n [+ e·n]
//
// Any grid and block give the same bits; blocks of 256 threads are best, ⌈n / (256·V·U)⌉ of them, U = 4 for
// activation_forward and 2 for the rest. `wide`: V = 16/e; n a multiple of V, addresses of 16 bytes. Otherwise V = 1.
//
// bf16 uses the hardware's exponential and reciprocal, and Abramowitz & Stegun's 7.1.26 for Φ (error 3e-7 in f32): the
// exact functions would take longer than the memory. f32 uses the exact ones.
#include "common.cuh"

enum Kind { GELU, GELU_TANH, QUICK_GELU, SILU, RELU };

constexpr float SQRT_2_OVER_PI = 0.797884560802865356f, CUBIC = 0.044715f, QUICK = 1.702f;

template <class T> constexpr bool FAST = sizeof(T) == 2;

template <class T> __device__ __forceinline__ float sigmoid(float x) {
    if constexpr (FAST<T>) return rcp_fast(1.f + exp2_fast(-LOG2E * x));
    return 1.f / (1.f + expf(-x));
}

// Φ(x), and e^(−x²/2) on the way.
template <class T> __device__ __forceinline__ float normal_cdf(float x, float& bell) {
    if constexpr (FAST<T>) {
        bell = exp2_fast(-0.5f * LOG2E * x * x);
        const float t = rcp_fast(1.f + 0.3275911f * 0.707106781f * fabsf(x));
        const float poly = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
        const float tail = 0.5f * poly * bell;
        return x > 0.f ? 1.f - tail : tail;
    }
    bell = expf(-0.5f * x * x);
    return 0.5f * (1.f + erff(x * 0.707106781186547524f));
}

template <class T, int K> __device__ __forceinline__ float value(float x) {
    float bell;
    if constexpr (K == GELU) return x * normal_cdf<T>(x, bell);
    if constexpr (K == GELU_TANH) return x * sigmoid<T>(2.f * SQRT_2_OVER_PI * x * (1.f + CUBIC * x * x));
    if constexpr (K == QUICK_GELU) return x * sigmoid<T>(QUICK * x);
    if constexpr (K == SILU) return x * sigmoid<T>(x);
    return x > 0.f ? x : 0.f;
}

template <class T, int K> __device__ __forceinline__ float slope(float x) {
    if constexpr (K == GELU) {
        float bell;
        const float cdf = normal_cdf<T>(x, bell);
        return cdf + x * 0.398942280401432678f * bell;
    }
    if constexpr (K == GELU_TANH) {
        const float s = sigmoid<T>(2.f * SQRT_2_OVER_PI * x * (1.f + CUBIC * x * x));
        return s * (1.f + x * (1.f - s) * 2.f * SQRT_2_OVER_PI * (1.f + 3.f * CUBIC * x * x));
    }
    if constexpr (K == QUICK_GELU) {
        const float s = sigmoid<T>(QUICK * x);
        return s * (1.f + QUICK * x * (1.f - s));
    }
    if constexpr (K == SILU) {
        const float s = sigmoid<T>(x);
        return s * (1.f + x * (1.f - s));
    }
    return x > 0.f ? 1.f : 0.f;
}

template <class T, int V, int K> __device__ void forward(const T* x, T* y, size_t n) {
    flat<4, V>(n, [=](size_t i) { return load<V>(x + i); },
               [=](size_t i, Pack<T, V> a) {
#pragma unroll
                   for (int k = 0; k < V; k++) a.at[k] = from_f32<T>(value<T, K>(to_f32(a.at[k])));
                   put(y + i, a);
               });
}

template <class T, int V> struct Two { Pack<T, V> a, b; };
template <class T, int V> struct Three { Pack<T, V> a, b, c; };

template <class T, int V, int K> __device__ void backward(const T* x, const T* dy, T* dx, size_t n) {
    flat<2, V>(n, [=](size_t i) { return Two<T, V>{load<V>(x + i), load<V>(dy + i)}; },
               [=](size_t i, Two<T, V> p) {
#pragma unroll
                   for (int k = 0; k < V; k++) p.a.at[k] = from_f32<T>(to_f32(p.b.at[k]) * slope<T, K>(to_f32(p.a.at[k])));
                   put(dx + i, p.a);
               });
}

template <class T, int V> __device__ void swiglu(const T* gate, const T* up, T* y, size_t n) {
    flat<2, V>(n, [=](size_t i) { return Two<T, V>{load<V>(gate + i), load<V>(up + i)}; },
               [=](size_t i, Two<T, V> p) {
#pragma unroll
                   for (int k = 0; k < V; k++) p.a.at[k] = from_f32<T>(value<T, SILU>(to_f32(p.a.at[k])) * to_f32(p.b.at[k]));
                   put(y + i, p.a);
               });
}

template <class T, int V> __device__ void swiglu_back(const T* gate, const T* up, const T* dy, T* dgate, T* dup, T* y, size_t n) {
    flat<2, V>(n, [=](size_t i) { return Three<T, V>{load<V>(gate + i), load<V>(up + i), load<V>(dy + i)}; },
               [=](size_t i, Three<T, V> p) {
#pragma unroll
                   for (int k = 0; k < V; k++) {
                       const float g = to_f32(p.a.at[k]), u = to_f32(p.b.at[k]), d = to_f32(p.c.at[k]);
                       const float s = sigmoid<T>(g), act = g * s;
                       p.a.at[k] = from_f32<T>(d * u * s * (1.f + g * (1.f - s)));
                       p.b.at[k] = from_f32<T>(d * act);
                       p.c.at[k] = from_f32<T>(act * u);
                   }
                   put(dgate + i, p.a);
                   put(dup + i, p.b);
                   if (y) put(y + i, p.c);
               });
}

// One call of `f<T, V, kind>`.
#define BY_KIND(f, T, V, ...)                                  \
    switch (kind) {                                            \
        case GELU: f<T, V, GELU>(__VA_ARGS__); break;          \
        case GELU_TANH: f<T, V, GELU_TANH>(__VA_ARGS__); break; \
        case QUICK_GELU: f<T, V, QUICK_GELU>(__VA_ARGS__); break; \
        case SILU: f<T, V, SILU>(__VA_ARGS__); break;          \
        default: f<T, V, RELU>(__VA_ARGS__);                   \
    }

#define ACTIVATION(T, name)                                                                                            \
    EXPORT(activation_forward_##name, (const T* x, T* y, size_t n, int kind, int wide),                                \
           if (wide) BY_KIND(forward, T, WIDE<T>, x, y, n) else BY_KIND(forward, T, 1, x, y, n))                       \
    EXPORT(activation_backward_##name, (const T* x, const T* dy, T* dx, size_t n, int kind, int wide),                 \
           if (wide) BY_KIND(backward, T, WIDE<T>, x, dy, dx, n) else BY_KIND(backward, T, 1, x, dy, dx, n))           \
    EXPORT(swiglu_forward_##name, (const T* gate, const T* up, T* y, size_t n, int wide),                              \
           if (wide) swiglu<T, WIDE<T>>(gate, up, y, n); else swiglu<T, 1>(gate, up, y, n))                            \
    EXPORT(swiglu_backward_##name, (const T* gate, const T* up, const T* dy, T* dgate, T* dup, T* y, size_t n, int wide), \
           if (wide) swiglu_back<T, WIDE<T>>(gate, up, dy, dgate, dup, y, n);                                          \
           else swiglu_back<T, 1>(gate, up, dy, dgate, dup, y, n))

ACTIVATION(float, f32)
ACTIVATION(bf16, bf16)
