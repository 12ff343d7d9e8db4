// Attention over packed sequences in one pass, with log-sum-exp for the backward pass (FlashAttention-2, Dao 2023).
//
// S = Q·Kᵀ·scale, P = softmax(S) over the visible keys, O = P·V, lse = ln Σ exp S. Tables, mask, strides: attention.cuh.
//
// A block computes 128 queries of one head, 32 a warp, against 64 keys at a time. With x the running maximum of a row
// and l its running sum, a tile of keys changes them to x' = max(x, max S), l' = l·exp(x − x') + Σ exp(S − x'), and O
// likewise; O is divided by l once at the end. S becomes P in registers and is the next product's operand as it lies.
// Exponentials are powers of two with scale·log₂e in one multiply-add. 32 rows a warp make each K, V fragment serve two
// products: reading fragments, not multiplying, would bound the kernel with 16.
//
// Tiles K₀ V₀ K₁ V₁ … pass through a ring of three: two are under way while one is used, one barrier a tile.
// Bytes: Q, O and lse once, K and V once a block of queries (mostly from the L2).
//
// attention_forward_d{32,64,80,96,128}_bf16: grid (tiles, heads), tiles name blocks of 128 queries; 128 threads;
// dynamic shared memory 640·D bytes. Within a segment the longest rows of tiles should come first (causal: descending).
// `scale` > 0. o [N, heads·D] by its stride, lse [N, heads].
#include "attention.cuh"

constexpr int QUERIES = 128, KEYS = 64;

struct Forward {
    const bf16 *q, *k, *v;
    bf16* o;
    float* lse;
    const int *segments, *tiles;
    int group, q_stride, k_stride, v_stride, o_stride;
    float scale;
    int causal;
};

template <int D> __device__ __forceinline__ void attention_forward(const Forward& f) {
    DYNAMIC_SHARED(bf16, memory);
    const Address q_tile = shared_address(memory), ring = q_tile + QUERIES * ROW<D>;
    constexpr int SLOT = KEYS * ROW<D>;

    const Work& w = work_of(f.segments, f.tiles, f.causal);
    const Mask& mask = w.mask;
    const int heads = gridDim.y, head = blockIdx.y, q0 = w.block * QUERIES;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = 32 * warp, i0 = q0 + row;
    const Matrix q{f.q, f.q_stride, head * D}, k{f.k, f.k_stride, head / f.group * D}, v{f.v, f.v_stride, k.column};

    // The first tile of keys, from key j on, of which some query sees something.
    const auto next = [&](int j) {
        while (j < mask.k_len && mask.hidden(q0, QUERIES, j, KEYS)) j += KEYS;
        return j;
    };
    const auto fetch = [&](const Matrix& m, int j, int slot) {
        if (j < mask.k_len) load_tile<D, KEYS>(ring + slot * SLOT, m, w.k_begin + j, mask.k_len - j);
        commit_copies();
    };

    int j0 = next(0), slot = 0;
    load_tile<D, QUERIES>(q_tile, q, w.q_begin + q0, mask.q_len - q0);
    fetch(k, j0, 0);
    fetch(v, j0, 1);

    const float scale = f.scale * LOG2E;
    float o[2][D / 8][4], top[2][2], sum[2][2];  // [16-row tile][row g or g + 8]
    clear(o);
#pragma unroll
    for (int i = 0; i < 2; i++) top[i][0] = top[i][1] = -INFINITY, sum[i][0] = sum[i][1] = 0.f;

    while (j0 < mask.k_len) {
        const int after = next(j0 + KEYS);
        const bool busy = !mask.hidden(i0, 32, j0, KEYS);
        const auto at = [&](int n) { return ring + (slot + n) % 3 * SLOT; };
        Weights<2, KEYS> p;

        wait_copies<1>();
        __syncthreads();  // K has come; the tile before it is done with
        fetch(k, after, (slot + 2) % 3);
        if (busy) {
            float s[2][KEYS / 8][4];
            clear(s);
            product_of_tiles<D, 2, KEYS>(s, q_tile, row, at(0));
            if (!mask.open(i0, 32, j0, KEYS))
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const View seen = mask.keys(i0 + 8 * r + g, j0 + 2 * t);
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (!seen.has(8 * n + e)) s[r / 2][n][r % 2 * 2 + e] = -INFINITY;
                }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float high = top[i][h];
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) high = fmaxf(high, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
                    high = fmaxf(high, __shfl_xor_sync(FULL, high, 1));
                    high = fmaxf(high, __shfl_xor_sync(FULL, high, 2));
                    const float base = high == -INFINITY ? 0.f : high * scale;  // no visible key yet
                    const float fade = exp2_fast(top[i][h] * scale - base);
                    top[i][h] = high;
                    float total = 0.f;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) {
                        const float x = exp2_fast(fmaf(s[i][n][2 * h], scale, -base)), y = exp2_fast(fmaf(s[i][n][2 * h + 1], scale, -base));
                        total += x + y;
                        p[i][n / 2][n % 2 * 2 + h] = pack_bf16(x, y);  // at once: half the registers
                    }
                    sum[i][h] = sum[i][h] * fade + total;
#pragma unroll
                    for (int n = 0; n < D / 8; n++) o[i][n][2 * h] *= fade, o[i][n][2 * h + 1] *= fade;
                }
        }
        wait_copies<1>();
        __syncthreads();  // V has come; K is done with
        fetch(v, after, slot);
        if (busy) product_with_weights<D, 2, KEYS>(o, p, at(1));
        slot = (slot + 2) % 3;
        j0 = after;
    }
    wait_copies<0>();
    __syncthreads();  // where these queries see no key, other warps' copies of Q come here

#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[i][h];
            total += __shfl_xor_sync(FULL, total, 1);
            total += __shfl_xor_sync(FULL, total, 2);
            const float part = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
            for (int n = 0; n < D / 8; n++) o[i][n][2 * h] *= part, o[i][n][2 * h + 1] *= part;
            const int at = i0 + 16 * i + 8 * h + g;
            if (t == 0 && at < mask.q_len) f.lse[size_t(w.q_begin + at) * heads + head] = total > 0.f ? top[i][h] * f.scale + logf(total) : -INFINITY;
        }
    store_rows<D, 2>(q_tile, row, o, f.o + size_t(w.q_begin + i0) * f.o_stride + head * D, f.o_stride, mask.q_len - i0);
}

#define FORWARD(D, BLOCKS)                                                                                               \
    EXPORT_BOUNDS(THREADS, BLOCKS, attention_forward_d##D##_bf16,                                                        \
        (const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, const int* segments, const int* tiles, int group, \
         int q_stride, int k_stride, int v_stride, int o_stride, float scale, int causal),                               \
        attention_forward<D>({q, k, v, o, lse, segments, tiles, group, q_stride, k_stride, v_stride, o_stride, scale, causal}))

FORWARD(32, 2)
FORWARD(64, 2)
FORWARD(80, 2)
FORWARD(96, 2)
FORWARD(128, 2)
