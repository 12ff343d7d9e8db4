// Attention by blocks of query rows: what stands between the products of matrices (src/ops/attention/blockwise.rs).
//
// Scores are f32 [heads, R, ld]: R query rows of one sequence for every head against the sequence's first keys, ld a
// multiple of 4 and no less than their number; what a row has beyond them is not read for its value and becomes 0.
//
//   attention_softmax           S ← P = exp(S − lse) for visible keys, 0 for the others; lse [N, heads] = ln Σ exp S
//                               reads S up to the row's last visible key, twice (then from the cache), and writes all of
//                               P: at most 8·heads·R·ld bytes, or 12 without a cache
//   attention_softmax_backward  S ← P = exp(S − lse), G ← dS = P∘(G − rowsum(P∘G))·scale, G = dO·Vᵀ, 0 for hidden keys
//                               reads S and G likewise, writes both: at most 16·heads·R·ld bytes, or 24
//
// The block's rows are rows `row`.. of Q and of lse, and queries `query`.. of their sequence; the mask is attention.cuh's.
// A query that sees no key has P = 0, dS = 0 and lse = −∞.
//
// A warp a row, blocks of 256 threads, grid ⌈heads·R / 8⌉. A lane takes 16 bytes at a time. S is read once for maximum and
// sum together (online softmax, Milakov & Gimelshein 2018). Sums are in f32 in an order that only ld decides.
#include "attention.cuh"

// The block of scores, and where it lies among the queries.
struct Scores {
    int heads, rows, ld, row, query;
    Mask mask;
};

// A warp's row.
struct Line {
    size_t scores, lse;  // where they stand
    View seen;           // its keys
    int end, lane;       // no key from `end` on is seen
};

// False if there is no row for this warp.
__device__ __forceinline__ bool line_of(const Scores& s, Line& line) {
    const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp >= s.heads * s.rows) return false;
    const int head = warp / s.rows, i = warp % s.rows;
    line = {size_t(warp) * s.ld, size_t(s.row + i) * s.heads + head, s.mask.keys(s.query + i, 0), s.mask.end(s.query + i),
            int(threadIdx.x % 32)};
    return true;
}

constexpr int V = 4;

__device__ __forceinline__ void softmax(float* s, float* lse, const Scores& b) {
    Line line;
    if (!line_of(b, line)) return;
    const View seen = line.seen;
    s += line.scores;
    float top = -INFINITY, sum = 0.f;  // Σ exp(s − top)
    sweep<4, V>(line.lane, 32, line.end, [=](int j) { return load<V>(s + j); },
                [&](int j, const Pack<float, V>& a) {
                    float high = top;
#pragma unroll
                    for (int k = 0; k < V; k++)
                        if (seen.has(j + k)) high = fmaxf(high, a.at[k]);
                    if (high > top) sum *= expf(top - high), top = high;
#pragma unroll
                    for (int k = 0; k < V; k++)
                        if (seen.has(j + k)) sum += expf(a.at[k] - top);
                });
    const float high = warp_max(top);
    const float total = warp_sum(top == -INFINITY ? 0.f : sum * expf(top - high));
    const float part = total == 0.f ? 0.f : 1.f / total;
    sweep<4, V>(line.lane, 32, b.ld, [=](int j) { return j < line.end ? load<V>(s + j) : Pack<float, V>{}; },
                [=](int j, Pack<float, V> a) {
#pragma unroll
                    for (int k = 0; k < V; k++) a.at[k] = seen.has(j + k) ? expf(a.at[k] - high) * part : 0.f;
                    put(s + j, a);
                });
    if (line.lane == 0) lse[line.lse] = total == 0.f ? -INFINITY : high + logf(total);
}

struct Both {
    Pack<float, V> s, g;
};

__device__ __forceinline__ void softmax_backward(float* s, float* g, const float* lse, float scale, const Scores& b) {
    Line line;
    if (!line_of(b, line)) return;
    const View seen = line.seen;
    s += line.scores, g += line.scores;
    const float shift = lse[line.lse];
    const auto read = [=](int j) { return j < line.end ? Both{load<V>(s + j), load<V>(g + j)} : Both{}; };
    float sum = 0.f;
    sweep<2, V>(line.lane, 32, line.end, read, [&](int j, const Both& a) {
#pragma unroll
        for (int k = 0; k < V; k++)
            if (seen.has(j + k)) sum += expf(a.s.at[k] - shift) * a.g.at[k];
    });
    sum = warp_sum(sum);
    sweep<2, V>(line.lane, 32, b.ld, read, [=](int j, Both a) {
#pragma unroll
        for (int k = 0; k < V; k++) {
            const bool has = seen.has(j + k);
            a.s.at[k] = has ? expf(a.s.at[k] - shift) : 0.f;
            a.g.at[k] = has ? a.s.at[k] * (a.g.at[k] - sum) * scale : 0.f;
        }
        put(s + j, a.s), put(g + j, a.g);
    });
}

#define BLOCK int heads, int rows, int ld, int row, int query, int k_len, int ahead, int skip_from, int skip_begin, int skip_end
#define SCORES {heads, rows, ld, row, query, {0, k_len, ahead, skip_from, skip_begin, skip_end}}

EXPORT(attention_softmax, (float* s, float* lse, BLOCK), const Scores b = SCORES; softmax(s, lse, b))
EXPORT(attention_softmax_backward, (float* s, float* g, const float* lse, BLOCK, float scale), const Scores b = SCORES;
       softmax_backward(s, g, lse, scale, b))
