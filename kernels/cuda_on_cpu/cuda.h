// The part of CUDA C++ that our kernels use, for a C++ compiler: every kernel of kernels/ runs on the CPU, where the
// tests compare it with the reference. No header of NVIDIA's is needed.
//
//     c++ -std=c++17 -O1 -fPIC -shared -fvisibility=hidden -x c++ -include kernels/cuda_on_cpu/cuda.h kernels/norm.cu
//
// One block runs at a time, with one fiber a thread. A fiber runs until it waits (barrier, shuffle, tensor-core
// product) or ends; the order in which ready fibers are picked is the launch's: forward, reverse, shuffled anew each
// round from a seed, or skewed. A result that changes with the order shows a missing barrier. What else is caught:
//
// - shared memory is 0xFF (NaN) when a block begins, and stands between guards;
// - a vector access (`Pack`) at an address that is not a multiple of its size;
// - a barrier that some threads never reach;
// - cp.async copies happen at their wait, as late as the hardware may do them.
//
// Skewed: each warp runs at a speed of its own, up to a thousand times that of another, drawn anew now and then; some of
// its lanes may stay behind; a fiber may also be left before it reads or writes shared memory through mma.cuh, before it
// waits for copies, and behind a barrier. Copies land where they are issued, at any time after, or at their wait, by block.
//
// Global memory is the caller's to poison and guard. What cannot be seen here: timing, and races within stretches that are
// never left.
#pragma once
#define CUDA_ON_CPU 1
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// bf16: the upper half of an f32, rounded to nearest even.
struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 h) {
    uint32_t u = uint32_t(h.bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t u) { return {u}; }

namespace cuda_cpu {

// What the caller of a kernel says beside its arguments.
struct Launch {
    unsigned grid[3], block[3], shared;
    unsigned order;  // 0 forward, 1 reverse, 2 shuffled, 3 skewed
    unsigned seed;
};

struct Copy { char* to; const char* from; unsigned bytes, zeros; bool landed; };

// Marsaglia's xorshift.
struct Random {
    uint64_t state;
    unsigned below(unsigned n) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return unsigned((state >> 32) % n);
    }
};

// When the copies of a skewed block arrive.
enum Landing { AT_WAIT, AT_ISSUE, AT_ANY_TIME };

struct Fiber {
    void* sp = nullptr;
#if !defined(__x86_64__)
    ucontext_t ctx;
#endif
    std::vector<char> stack;
    uint3 tid{};
    unsigned lane = 0, warp = 0, index = 0;
    bool done = false;
    const unsigned* wait = nullptr;  // runs again when *wait differs from `seen`
    unsigned seen = 0;
    std::vector<std::vector<Copy>> groups;  // committed cp.async groups
    std::vector<Copy> open;
};

struct Warp {
    unsigned arrived = 0, generation = 0, live = 0;
    alignas(16) unsigned char slot[2][32][32];  // what lanes hand to each other, by parity of the generation
};

struct Arena { std::vector<char> bytes; size_t size; };

struct State {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::map<const void*, Arena> shared;  // this block's arrays by their place in the program
    std::vector<char> dynamic;
    dim3 grid, block;
    uint3 bid{};
    unsigned live = 0, arrived = 0, generation = 0;
    Fiber* now = nullptr;
    bool skewed = false;
    Landing landing = AT_WAIT;
    Random random{1};
    void* scheduler = nullptr;
#if !defined(__x86_64__)
    ucontext_t main;
#endif
    void (*body)(void*) = nullptr;
    void* closure = nullptr;
    std::string error;
};
inline State& state() { static thread_local State s; return s; }

inline void fail(const std::string& what) {
    State& s = state();
    if (!s.error.empty()) return;
    char at[128];
    const Fiber* f = s.now;
    snprintf(at, sizeof at, " (block %u,%u,%u thread %u)", s.bid.x, s.bid.y, s.bid.z, f ? f->index : 0);
    s.error = what + at;
}

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack and goes on with another.
extern "C" __attribute__((visibility("hidden"))) void cuda_cpu_switch(void** save, void* load);
asm(R"(
    .text
    .globl cuda_cpu_switch
    .hidden cuda_cpu_switch
    .type cuda_cpu_switch,@function
cuda_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cuda_cpu_switch,.-cuda_cpu_switch
)");
inline void resume(Fiber& f) { cuda_cpu_switch(&state().scheduler, f.sp); }
inline void leave(Fiber& f) { cuda_cpu_switch(&f.sp, state().scheduler); }
#else
inline void resume(Fiber& f) { swapcontext(&state().main, &f.ctx); }
inline void leave(Fiber& f) { swapcontext(&f.ctx, &state().main); }
#endif

inline void wait_for(const unsigned& generation, unsigned seen) {
    Fiber& f = *state().now;
    f.wait = &generation;
    f.seen = seen;
    leave(f);
}

// Where threads are skewed, others may run first; the more rarely, the greater `rarely`.
inline void pause(unsigned rarely = 1) {
    State& s = state();
    if (s.skewed && s.random.below(rarely) == 0) leave(*s.now);
}

inline void syncthreads() {
    State& s = state();
    unsigned g = s.generation;
    if (++s.arrived >= s.live) {
        s.arrived = 0;
        s.generation++;
        return pause();
    }
    wait_for(s.generation, g);
}

inline void syncwarp() {
    State& s = state();
    Warp& w = s.warps[s.now->warp];
    unsigned g = w.generation;
    if (++w.arrived >= w.live) {
        w.arrived = 0;
        w.generation++;
        return;
    }
    wait_for(w.generation, g);
}

// Hands `mine` to the warp; all lanes' values can be read from the returned array until the lane's next exchange.
inline unsigned char (*exchange(const void* mine, size_t bytes))[32] {
    State& s = state();
    Warp& w = s.warps[s.now->warp];
    unsigned parity = w.generation & 1;
    memcpy(w.slot[parity][s.now->lane], mine, bytes);
    syncwarp();
    return w.slot[parity];
}

template <class T> T shuffle(T v, int from) {
    static_assert(sizeof(T) <= 32, "");
    auto lanes = exchange(&v, sizeof v);
    T r;
    memcpy(&r, lanes[from & 31], sizeof r);
    return r;
}

inline void end_of_thread() {
    State& s = state();
    Fiber& f = *s.now;
    if (!f.open.empty() || !f.groups.empty()) fail("cp.async copies were never waited for");
    f.done = true;
    s.live--;
    Warp& w = s.warps[f.warp];
    w.live--;
    if (s.arrived && s.arrived >= s.live) s.arrived = 0, s.generation++;
    if (w.arrived && w.arrived >= w.live) w.arrived = 0, w.generation++;
    leave(f);
}

inline void entry() {
    State& s = state();
    s.body(s.closure);
    end_of_thread();
    abort();
}

inline void prepare(Fiber& f) {
    constexpr size_t STACK = 256 << 10;
    if (f.stack.empty()) f.stack.resize(STACK);
    f.done = false;
    f.wait = nullptr;
    f.open.clear();
    f.groups.clear();
#if defined(__x86_64__)
    // As after a call: the stack is 8 off a multiple of 16 when `entry` begins. Below its address lie six registers.
    uintptr_t top = (uintptr_t(f.stack.data()) + STACK) & ~uintptr_t(15);
    void** sp = reinterpret_cast<void**>(top) - 1;
    *--sp = reinterpret_cast<void*>(&entry);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.sp = sp;
#else
    getcontext(&f.ctx);
    f.ctx.uc_stack.ss_sp = f.stack.data();
    f.ctx.uc_stack.ss_size = f.stack.size();
    f.ctx.uc_link = nullptr;
    makecontext(&f.ctx, reinterpret_cast<void (*)()>(entry), 0);
#endif
}

constexpr size_t GUARD = 256;

// An array of the block's shared memory, poisoned when the block first names it; `place` is its declaration.
inline char* shared_array(const void* place, size_t bytes) {
    auto& all = state().shared;
    auto it = all.find(place);
    if (it == all.end()) it = all.emplace(place, Arena{std::vector<char>(bytes + 3 * GUARD, char(0xFF)), bytes}).first;
    return reinterpret_cast<char*>((uintptr_t(it->second.bytes.data()) + 2 * GUARD - 1) & ~uintptr_t(GUARD - 1));
}

inline char* dynamic_shared() {
    return reinterpret_cast<char*>((uintptr_t(state().dynamic.data()) + 2 * GUARD - 1) & ~uintptr_t(GUARD - 1));
}

inline void check_guards(const char* begin, const char* end, const char* data, size_t size, const char* what) {
    for (const char* p = begin; p < end; p++)
        if ((p < data || p >= data + size) && *p != char(0xFF)) return fail(std::string("a write outside ") + what);
}

inline bool ready(const Fiber& f) { return !f.done && !(f.wait && *f.wait == f.seen); }

inline void go_on(Fiber& f) {
    f.wait = nullptr;
    state().now = &f;
    resume(f);
}

// All ready fibers, round by round. False if none is ready before all have ended.
inline bool run_in_rounds(unsigned kind) {
    State& s = state();
    unsigned n = unsigned(s.fibers.size());
    std::vector<unsigned> order(n);
    for (unsigned i = 0; i < n; i++) order[i] = kind == 1 ? n - 1 - i : i;
    while (s.live) {
        if (kind == 2)
            for (unsigned i = n - 1; i > 0; i--) std::swap(order[i], order[s.random.below(i + 1)]);
        bool any = false;
        for (unsigned i : order)
            if (ready(s.fibers[i])) any = true, go_on(s.fibers[i]);
        if (!any) return false;
    }
    return true;
}

inline void land(Copy& c) {
    if (c.landed) return;
    c.landed = true;
    memcpy(c.to, c.from, c.bytes);
    memset(c.to + c.bytes, 0, c.zeros);
}

// A ready warp at a time, each as often as its speed says. False if none is ready before all have ended.
inline bool run_skewed() {
    State& s = state();
    unsigned n = unsigned(s.fibers.size()), warps = unsigned(s.warps.size());
    std::vector<unsigned> speed(warps), open(warps);
    for (unsigned long long turn = 0; s.live; turn++) {
        if (turn == 0 || s.random.below(128) == 0)
            for (unsigned& v : speed) v = 1u << s.random.below(11);
        open = speed;
        const auto any = [&](unsigned w) {
            for (unsigned i = 32 * w; i < std::min(n, 32 * w + 32); i++)
                if (ready(s.fibers[i])) return true;
            return false;
        };
        unsigned chosen = warps;
        while (chosen == warps) {
            unsigned total = 0;
            for (unsigned v : open) total += v;
            if (total == 0) return false;
            unsigned at = s.random.below(total), w = 0;
            while (at >= open[w]) at -= open[w++];
            if (any(w)) chosen = w;
            else open[w] = 0;
        }
        // In an order of its own; of every third turn some lanes are left out.
        const unsigned turned = s.random.below(32), some = s.random.below(3) == 0 ? s.random.below(~0u) : ~0u;
        for (unsigned k = 0; k < 32; k++) {
            const unsigned lane = k ^ turned, i = 32 * chosen + lane;
            if (i < n && (some >> lane & 1) && ready(s.fibers[i])) go_on(s.fibers[i]);
        }
        if (s.landing != AT_ANY_TIME) continue;
        for (unsigned k = 0; k < 8; k++) {
            Fiber& f = s.fibers[s.random.below(n)];
            for (Copy& c : f.open)
                if (s.random.below(2)) land(c);
            for (auto& group : f.groups)
                for (Copy& c : group)
                    if (s.random.below(2)) land(c);
        }
    }
    return true;
}

inline void run_block(const Launch& l, unsigned long long number) {
    State& s = state();
    s.shared.clear();
    std::fill(s.dynamic.begin(), s.dynamic.end(), char(0xFF));
    unsigned n = unsigned(s.fibers.size());
    s.live = n;
    s.arrived = 0;
    for (auto& w : s.warps) w.arrived = 0, w.live = 0;
    for (unsigned i = 0; i < n; i++) {
        Fiber& f = s.fibers[i];
        f.index = i, f.lane = i % 32, f.warp = i / 32;
        f.tid = {i % l.block[0], i / l.block[0] % l.block[1], i / (l.block[0] * l.block[1])};
        s.warps[f.warp].live++;
        prepare(f);
    }
    s.random = {(uint64_t(l.seed) << 32) ^ (number * 0x9E3779B97F4A7C15ull) ^ 0xD1B54A32D192ED03ull};
    s.skewed = l.order == 3;
    s.landing = s.skewed ? Landing(s.random.below(3)) : AT_WAIT;
    if (!(s.skewed ? run_skewed() : run_in_rounds(l.order))) return fail("some threads wait at a barrier that others never reach");
    if (l.shared) check_guards(s.dynamic.data(), s.dynamic.data() + s.dynamic.size(), dynamic_shared(), l.shared, "dynamic shared memory");
    for (auto& a : s.shared)
        check_guards(a.second.bytes.data(), a.second.bytes.data() + a.second.bytes.size(), shared_array(a.first, 0), a.second.size, "a shared array");
}

template <class F> const char* launch(const Launch& l, F body) {
    State& s = state();
    s.error.clear();
    s.grid = {l.grid[0], l.grid[1], l.grid[2]};
    s.block = {l.block[0], l.block[1], l.block[2]};
    unsigned n = l.block[0] * l.block[1] * l.block[2];
    if (n == 0 || n > 1024 || l.shared > 227 * 1024) {
        fail("a block of 1 to 1024 threads with at most 227 KiB of shared memory is needed");
        return s.error.c_str();
    }
    s.fibers.resize(n);
    s.warps.resize((n + 31) / 32);
    s.dynamic.assign(l.shared + 3 * GUARD, char(0xFF));
    s.closure = &body;
    s.body = [](void* c) { (*static_cast<F*>(c))(); };
    unsigned long long blocks = 1ull * l.grid[0] * l.grid[1] * l.grid[2];
    for (unsigned long long k = 0; k < blocks && s.error.empty(); k++) {
        // Blocks come in any order on a GPU.
        unsigned long long b = l.order == 1 || (l.order == 3 && l.seed % 2) ? blocks - 1 - k : k;
        s.bid = {unsigned(b % l.grid[0]), unsigned(b / l.grid[0] % l.grid[1]), unsigned(b / (1ull * l.grid[0] * l.grid[1]))};
        run_block(l, b);
    }
    return s.error.empty() ? nullptr : s.error.c_str();
}

template <class... P, size_t... I>
const char* call(const Launch& l, void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    return launch(l, [&] { kernel(*static_cast<std::remove_cv_t<std::remove_reference_t<P>>*>(args[I])...); });
}
// `args` as cuLaunchKernel takes them: one pointer an argument. Returns what went wrong, or null.
template <class... P> const char* run(const Launch& l, void (*kernel)(P...), void** args) {
    return call(l, kernel, args, std::index_sequence_for<P...>{});
}

inline void aligned(const void* p, size_t bytes) {
    if (uintptr_t(p) % bytes) fail("a vector access at an address that is not a multiple of " + std::to_string(bytes));
}

inline void async_copy(void* to, const void* from, unsigned bytes, unsigned zeros) {
    auto& open = state().now->open;
    open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, zeros, false});
    if (state().landing == AT_ISSUE) land(open.back());
}
inline void async_wait(unsigned keep) {
    pause();
    auto& g = state().now->groups;
    while (g.size() > keep) {
        for (Copy& c : g.front()) land(c);
        g.erase(g.begin());
    }
}
}  // namespace cuda_cpu

#define threadIdx (cuda_cpu::state().now->tid)
#define blockIdx (cuda_cpu::state().bid)
#define blockDim (cuda_cpu::state().block)
#define gridDim (cuda_cpu::state().grid)

inline void __syncthreads() { cuda_cpu::syncthreads(); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_cpu::syncwarp(); }
template <class T> T __shfl_xor_sync(unsigned, T v, int o) { return cuda_cpu::shuffle(v, int(cuda_cpu::state().now->lane) ^ o); }
template <class T> T __shfl_sync(unsigned, T v, int i) { return cuda_cpu::shuffle(v, i); }
template <class T> T __shfl_down_sync(unsigned, T v, unsigned d) {
    unsigned l = cuda_cpu::state().now->lane;
    return cuda_cpu::shuffle(v, int(l + d < 32 ? l + d : l));
}
template <class T> T __shfl_up_sync(unsigned, T v, unsigned d) {
    unsigned l = cuda_cpu::state().now->lane;
    return cuda_cpu::shuffle(v, int(l >= d ? l - d : l));
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    auto lanes = cuda_cpu::exchange(&predicate, sizeof predicate);
    unsigned live = cuda_cpu::state().warps[cuda_cpu::state().now->warp].live, all = 0;
    for (unsigned i = 0; i < live; i++) {
        int p;
        memcpy(&p, lanes[i], sizeof p);
        all |= unsigned(p != 0) << i;
    }
    return all;
}

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
template <class T> T __ldg(const T* p) { return *p; }
using std::max;
using std::min;

// A kernel's entry for the tests.
#define EMULATE(name)                                                                                          \
    extern "C" __attribute__((visibility("default"))) const char* emulate_##name(const cuda_cpu::Launch* l, void** args) { \
        return cuda_cpu::run(*l, name, args);                                                                  \
    }
