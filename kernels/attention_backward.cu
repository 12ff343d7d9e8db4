// Gradients of attention over packed sequences from the saved log-sum-exp (FlashAttention-2, Dao 2023), without atomics.
//
// With P = exp(S − lse) and δ = rowsum(dO∘O):  dV = Pᵀ·dO,  dS = P∘(dO·Vᵀ − δ),  dQ = scale·dS·K,  dK = scale·dSᵀ·Q.
// Tables, mask, strides: attention.cuh. Three kernels, each writes every element of its outputs (within the segments):
//
// 1 attention_rows_d…    stats [N, heads, 2] f32 = lse·log₂e, δ; +∞ for the first of a query that sees no key: its P is 0.
//                        Reads O, dO, lse once. Grid ⌈N·heads·a/256⌉, 256 threads, a = the power of two that divides D/8.
// 2 attention_keys_d…    dK, dV of 64 keys of one key head, over its `group` query heads and their blocks of 64 queries.
//                        Grid (tiles, key heads), tiles name blocks of 64 keys; dynamic shared memory 768·D + 1024 bytes.
// 3 attention_queries_d… dQ of 64 queries of one head, over blocks of 64 keys.
//                        Grid (tiles, heads), tiles name blocks of 64 queries; dynamic shared memory 512·D bytes.
//
// 2 and 3 compute S and dO·Vᵀ again, seven products in all where five would do with atomic sums into dQ, and in return
// give the same bits each time. 2 computes their transposes, so that P and dS are operands as they lie in registers.
// A warp has 16 rows of results. Tiles are double-buffered: one barrier a tile.
// Bytes: Q, K, V, dO once and dQ or dK, dV once a block, the streamed tiles mostly from the L2. In 2 the sum over queries
// runs in order of (head, query block), in 3 over keys.
#include "attention.cuh"

constexpr int QUERIES = 64, KEYS = 64;
static_assert(THREADS == 2 * QUERIES, "a thread copies one statistic");

// ---- 1

template <int D>
__device__ __forceinline__ void attention_rows(const bf16* o, const bf16* d_o, const float* lse, float* stats, int rows,
                                               int heads, int o_stride, int do_stride) {
    constexpr int ACROSS = ALIGNED_CHUNKS<D>;
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) / ACROSS;  // row · heads + head
    const size_t row = at / heads, head = at % heads;
    const bool valid = row < size_t(rows);
    float sum = 0.f;
    if (valid)
#pragma unroll
        for (int c = threadIdx.x % ACROSS; c < D / 8; c += ACROSS) {
            const Pack<bf16, 8> x = load<8>(o + row * o_stride + head * D + 8 * c);
            const Pack<bf16, 8> y = load<8>(d_o + row * do_stride + head * D + 8 * c);
#pragma unroll
            for (int e = 0; e < 8; e++) sum += to_f32(x.at[e]) * to_f32(y.at[e]);
        }
#pragma unroll
    for (int s = ACROSS / 2; s; s /= 2) sum += __shfl_xor_sync(FULL, sum, s);
    if (valid && threadIdx.x % ACROSS == 0) {
        const float l = lse[at];
        store(stats + 2 * at, Pack<float, 2>{{l == -INFINITY ? INFINITY : l * LOG2E, sum}});
    }
}

struct Backward {
    const bf16 *q, *k, *v, *d_o;
    const float* stats;
    bf16 *dq, *dk, *dv;
    const int *segments, *tiles;
    int heads, group, q_stride, k_stride, v_stride, do_stride, dq_stride, dk_stride, dv_stride;
    float scale;
    int causal;
};

template <int M, int N> __device__ __forceinline__ void multiply_by(float (&d)[M][N][4], float x) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) d[i][n][e] *= x;
}

// ---- 2

template <int D> __device__ __forceinline__ void attention_keys(const Backward& b) {
    DYNAMIC_SHARED(bf16, memory);
    constexpr int TILE = 64 * ROW<D>, STATS = QUERIES * 8;
    const Address k_tile = shared_address(memory), v_tile = k_tile + TILE, stages = v_tile + TILE, stats_tile = stages + 4 * TILE;

    const Work& w = work_of(b.segments, b.tiles, b.causal);
    const Mask& mask = w.mask;
    const int j0 = w.block * KEYS, count = (mask.q_len + QUERIES - 1) / QUERIES;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = 16 * warp;
    const int first_key = w.k_begin + j0;
    const Matrix k{b.k, b.k_stride, int(blockIdx.y) * D}, v{b.v, b.v_stride, k.column};

    const auto next = [&](int tile) {
        while (tile < count && mask.hidden(tile * QUERIES, QUERIES, j0, KEYS)) tile++;
        return tile;
    };
    const auto fetch = [&](int member, int tile, int stage) {
        if (member < b.group) {
            const int head = blockIdx.y * b.group + member, rows = mask.q_len - tile * QUERIES;
            const int from = w.q_begin + tile * QUERIES;
            const Address to = stages + stage * 2 * TILE;
            load_tile<D, QUERIES>(to, {b.q, b.q_stride, head * D}, from, rows);
            load_tile<D, QUERIES>(to + TILE, {b.d_o, b.do_stride, head * D}, from, rows);
            // lse of the tile's queries, then δ: a thread each.
            const int query = threadIdx.x % QUERIES, which = threadIdx.x / QUERIES;
            const bool valid = query < rows;
            copy_async<4>(stats_tile + stage * STATS + 4 * threadIdx.x,
                          b.stats + 2 * (size_t(valid ? from + query : from) * b.heads + head) + which, valid);
        }
        commit_copies();
    };

    const int first = next(0);
    int member = first < count ? 0 : b.group, tile = first, stage = 0;
    load_tile<D, KEYS>(k_tile, k, first_key, mask.k_len - j0);
    load_tile<D, KEYS>(v_tile, v, first_key, mask.k_len - j0);
    fetch(member, tile, 0);

    const float scale = b.scale * LOG2E;
    float dk[1][D / 8][4], dv[1][D / 8][4];
    clear(dk), clear(dv);
    while (member < b.group) {
        const Address q_tile = stages + stage * 2 * TILE, do_tile = q_tile + TILE;
        const int i0 = tile * QUERIES;
        tile = next(tile + 1);
        if (tile == count) tile = first, member++;
        wait_copies<0>();
        __syncthreads();  // this stage has come; the other is done with
        fetch(member, tile, stage ^ 1);

        float p[1][QUERIES / 8][4], ds[1][QUERIES / 8][4];  // [key, query]
        clear(p);
        product_of_tiles<D, 1, QUERIES>(p, k_tile, row, q_tile);
        // Of queries 8n + 2t and the next: lse, δ.
        const auto stat = [&](int which, int n) {
            return load_shared8(stats_tile + stage * STATS + 4 * (QUERIES * which + 8 * n + 2 * t));
        };
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
            const float2 lse = stat(0, n);
#pragma unroll
            for (int e = 0; e < 4; e++) p[0][n][e] = exp2_fast(fmaf(p[0][n][e], scale, e % 2 ? -lse.y : -lse.x));
        }
        // Queries past the segment's end are zeros in dO and so add nothing.
        if (!mask.open(i0, min(QUERIES, mask.q_len - i0), j0 + row, 16))
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const View seen = mask.queries(i0 + 2 * t, j0 + row + 8 * h + g);
#pragma unroll
                for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (!seen.has(8 * n + e)) p[0][n][2 * h + e] = 0.f;
            }
        Weights<1, QUERIES> x;
        as_operand<1, QUERIES>(x, p);
        product_with_weights<D, 1, QUERIES>(dv, x, do_tile);
        clear(ds);
        product_of_tiles<D, 1, QUERIES>(ds, v_tile, row, do_tile);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
            const float2 delta = stat(1, n);
#pragma unroll
            for (int e = 0; e < 4; e++) ds[0][n][e] = p[0][n][e] * (ds[0][n][e] - (e % 2 ? delta.y : delta.x));
        }
        as_operand<1, QUERIES>(x, ds);
        product_with_weights<D, 1, QUERIES>(dk, x, q_tile);
        stage ^= 1;
    }
    wait_copies<0>();
    __syncthreads();  // where no query sees these keys, the copies of K and V come here

    multiply_by(dk, b.scale);
    const int rows = mask.k_len - j0 - row;
    store_rows<D, 1>(k_tile, row, dk, b.dk + size_t(first_key + row) * b.dk_stride + k.column, b.dk_stride, rows);
    store_rows<D, 1>(v_tile, row, dv, b.dv + size_t(first_key + row) * b.dv_stride + k.column, b.dv_stride, rows);
}

// ---- 3

template <int D> __device__ __forceinline__ void attention_queries(const Backward& b) {
    DYNAMIC_SHARED(bf16, memory);
    constexpr int TILE = 64 * ROW<D>;
    const Address stages = shared_address(memory);

    const Work& w = work_of(b.segments, b.tiles, b.causal);
    const Mask& mask = w.mask;
    const int head = blockIdx.y, q0 = w.block * QUERIES, count = (mask.k_len + KEYS - 1) / KEYS;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = 16 * warp, i0 = q0 + row;
    const int first_query = w.q_begin + q0, column = head / b.group * D;

    const auto next = [&](int tile) {
        while (tile < count && mask.hidden(q0, QUERIES, tile * KEYS, KEYS)) tile++;
        return tile;
    };
    const auto fetch = [&](int tile, int stage) {
        if (tile < count) {
            const int from = w.k_begin + tile * KEYS, rows = mask.k_len - tile * KEYS;
            const Address to = stages + stage * 2 * TILE;
            load_tile<D, KEYS>(to, {b.k, b.k_stride, column}, from, rows);
            load_tile<D, KEYS>(to + TILE, {b.v, b.v_stride, column}, from, rows);
        }
        commit_copies();
    };

    // Q and dO come through the second stage and stay in registers.
    int tile = next(0), stage = 0;
    load_tile<D, QUERIES>(stages + 2 * TILE, {b.q, b.q_stride, head * D}, first_query, mask.q_len - q0);
    load_tile<D, QUERIES>(stages + 3 * TILE, {b.d_o, b.do_stride, head * D}, first_query, mask.q_len - q0);
    commit_copies();
    fetch(tile, 0);
    float lse[2], delta[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const size_t at = size_t(w.q_begin + min(i0 + 8 * h + g, mask.q_len - 1)) * b.heads + head;
        const Pack<float, 2> s = load<2>(b.stats + 2 * at);
        lse[h] = s.at[0], delta[h] = s.at[1];
    }
    wait_copies<1>();
    __syncthreads();
    unsigned q[D / 16][4], d_o[D / 16][4];
    const Lane<D> lane = lane_of_rows<D>();
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        load_matrices<false>(q[step], lane.at(stages + 2 * TILE + row * ROW<D>, 0, step));
        load_matrices<false>(d_o[step], lane.at(stages + 3 * TILE + row * ROW<D>, 0, step));
    }

    const float scale = b.scale * LOG2E;
    float dq[1][D / 8][4];
    clear(dq);
    while (tile < count) {
        const Address k_tile = stages + stage * 2 * TILE, v_tile = k_tile + TILE;
        const int j0 = tile * KEYS;
        tile = next(tile + 1);
        wait_copies<0>();
        __syncthreads();  // this stage has come; the other is done with
        fetch(tile, stage ^ 1);
        if (!mask.hidden(i0, 16, j0, KEYS)) {
            float p[1][KEYS / 8][4], ds[1][KEYS / 8][4];
            clear(p), clear(ds);
            product_with_held<D, KEYS>(p[0], q, k_tile);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) p[0][n][e] = exp2_fast(fmaf(p[0][n][e], scale, -lse[e / 2]));
            if (!mask.open(i0, 16, j0, KEYS))
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const View seen = mask.keys(i0 + 8 * h + g, j0 + 2 * t);
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (!seen.has(8 * n + e)) p[0][n][2 * h + e] = 0.f;
                }
            product_with_held<D, KEYS>(ds[0], d_o, v_tile);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) ds[0][n][e] = p[0][n][e] * (ds[0][n][e] - delta[e / 2]);
            Weights<1, KEYS> x;
            as_operand<1, KEYS>(x, ds);
            product_with_weights<D, 1, KEYS>(dq, x, k_tile);
        }
        stage ^= 1;
    }
    wait_copies<0>();
    __syncthreads();

    multiply_by(dq, b.scale);
    store_rows<D, 1>(stages, row, dq, b.dq + size_t(first_query + row) * b.dq_stride + head * D, b.dq_stride, mask.q_len - i0);
}

#define ARGUMENTS \
    {q, k, v, d_o, stats, dq, dk, dv, segments, tiles, heads, group, q_stride, k_stride, v_stride, do_stride, dq_stride, dk_stride, dv_stride, scale, causal}
#define BACKWARD(D, KEY_BLOCKS, QUERY_BLOCKS)                                                                            \
    EXPORT(attention_rows_d##D##_bf16, (const bf16* o, const bf16* d_o, const float* lse, float* stats, int rows, int heads, int o_stride, int do_stride), \
        attention_rows<D>(o, d_o, lse, stats, rows, heads, o_stride, do_stride))                                         \
    EXPORT_BOUNDS(THREADS, KEY_BLOCKS, attention_keys_d##D##_bf16,                                                       \
        (const bf16* q, const bf16* k, const bf16* v, const bf16* d_o, const float* stats, bf16* dk, bf16* dv, const int* segments, const int* tiles, \
         int heads, int q_stride, int k_stride, int v_stride, int do_stride, int dk_stride, int dv_stride, float scale, int causal), \
        bf16* dq = nullptr; const int dq_stride = 0, group = heads / int(gridDim.y); attention_keys<D>(ARGUMENTS))       \
    EXPORT_BOUNDS(THREADS, QUERY_BLOCKS, attention_queries_d##D##_bf16,                                                  \
        (const bf16* q, const bf16* k, const bf16* v, const bf16* d_o, const float* stats, bf16* dq, const int* segments, const int* tiles, \
         int group, int q_stride, int k_stride, int v_stride, int do_stride, int dq_stride, float scale, int causal),    \
        bf16 *dk = nullptr, *dv = nullptr; const int dk_stride = 0, dv_stride = 0, heads = gridDim.y; attention_queries<D>(ARGUMENTS))

BACKWARD(32, 3, 3)
BACKWARD(64, 2, 2)
BACKWARD(80, 2, 2)
BACKWARD(96, 2, 2)
BACKWARD(128, 2, 2)
