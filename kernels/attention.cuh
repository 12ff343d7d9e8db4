// What the attention kernels share: work tables, the mask, tiles in shared memory, fragments of them.
//
// Tables (int32, on the device, aligned to 16 and 8 bytes)
//     segments [S, 8]   q_begin, q_len, k_begin, k_len, skip_from, skip_begin, skip_end, 0: a sequence's rows of Q and of
//                       K, V. Segments do not overlap in Q, nor in K and V.
//     tiles [W, 2]      segment, block: the grid is (W, heads or key heads). Rows outside every segment are neither read
//                       nor written: the host zeroes those outputs.
// Mask, with query i and key j counted from their segment's begin: i sees j if
//     j < k_len,  j ≤ i + k_len − q_len where causal,  and not (i ≥ skip_from and skip_begin ≤ j < skip_end).
//     skip_begin = skip_end: no skip. Two answers after one prompt (p, c and r rows, causal): skip_from = p + c,
//     skip_begin = p, skip_end = p + c. A query that sees no key has o = 0, lse = −∞ and no gradient.
// Grouped queries: query head h reads key head h / group.
// Rows of a matrix are `stride` elements apart, a head's columns adjacent; strides are multiples of 8 elements,
// addresses of 16 bytes. Products are by tensor cores from bf16, everything else is in f32.
#pragma once
#include "mma.cuh"
#include <climits>

constexpr int THREADS = 128;  // of every block: four warps

// Of places 0, 1, 2, …: those in [begin, end) without `size` of them from `gap`.
struct View {
    int begin, end, gap;
    unsigned size;
    __device__ __forceinline__ bool has(int n) const { return n >= begin && n < end && unsigned(n - gap) >= size; }
};

struct Mask {
    int q_len, k_len, ahead, skip_from, skip_begin, skip_end;

    // Keys from here on are hidden from query i.
    __device__ __forceinline__ int end(int i) const { return min(k_len, i + ahead + 1); }
    __device__ __forceinline__ bool skips(int i, int j) const { return i >= skip_from && j >= skip_begin && j < skip_end; }
    // The keys j + n that query i sees, and the queries i + n that see key j.
    __device__ __forceinline__ View keys(int i, int j) const {
        return {INT_MIN, end(i) - j, skip_begin - j, i >= skip_from ? unsigned(skip_end - skip_begin) : 0u};
    }
    __device__ __forceinline__ View queries(int i, int j) const {
        const int last = j >= k_len ? INT_MIN : j >= skip_begin && j < skip_end ? skip_from - i : INT_MAX;
        return {j - ahead - i, last, 0, 0};
    }
    // No query of [i, i + m) sees a key of [j, j + n).
    __device__ __forceinline__ bool hidden(int i, int m, int j, int n) const {
        return i >= q_len || j >= end(min(i + m, q_len) - 1) || (skips(i, j) && min(j + n, k_len) <= skip_end);
    }
    // Every query of [i, i + m) sees every key of [j, j + n).
    __device__ __forceinline__ bool open(int i, int m, int j, int n) const {
        return j + n <= end(i) && (i + m <= skip_from || j + n <= skip_begin || j >= skip_end);
    }
};

// A block's work: where its segment begins, which of the segment's blocks it is, and the mask.
struct Work {
    int q_begin, k_begin, block;
    Mask mask;
};
// It stays in shared memory: registers are what the kernels run out of.
__device__ __forceinline__ const Work& work_of(const int* segments, const int* tiles, int causal) {
    SHARED(Work, work, 1);
    if (threadIdx.x == 0) {
        const Pack<int, 2> tile = load<2>(tiles + 2 * blockIdx.x);
        const Pack<int, 4> rows = load<4>(segments + 8 * tile.at[0]), skip = load<4>(segments + 8 * tile.at[0] + 4);
        const int q_len = rows.at[1], k_len = rows.at[3];
        *work = {rows.at[0], rows.at[2], tile.at[1],
                 {q_len, k_len, causal ? k_len - q_len : k_len, skip.at[0], skip.at[1], skip.at[2]}};
    }
    __syncthreads();
    return *work;
}

// ---- tiles [rows, D] of bf16 in shared memory
//
// Rows are not padded. The 16-byte chunks of a row are permuted (exclusive or) so that one column of eight adjacent
// rows, which is what a matrix load asks for, lies in all 32 banks; so do eight adjacent chunks.

template <int D> constexpr int ALIGNED_CHUNKS = (D / 8) & -(D / 8);  // the power of two that divides a row's chunks
template <int D> constexpr int SPREAD = ALIGNED_CHUNKS<D> < 8 ? ALIGNED_CHUNKS<D> : 8;
template <int D> constexpr int ROW = 2 * D;  // bytes

template <int D> __device__ __forceinline__ unsigned turn(unsigned row) { return row / (8 / SPREAD<D>) % SPREAD<D>; }
template <int D> __device__ __forceinline__ unsigned place(unsigned row, unsigned chunk) {
    return row * ROW<D> + 16 * (chunk ^ turn<D>(row));
}

// A matrix in global memory, and the columns of one head in it.
struct Matrix {
    const bf16* data;
    int stride, column;
};
// Starts the block's copy of a tile: `rows` rows of the matrix from `begin`, zeros below.
template <int D, int ROWS> __device__ __forceinline__ void load_tile(Address tile, const Matrix& m, int begin, int rows) {
    constexpr int ACROSS = ALIGNED_CHUNKS<D>, DOWN = THREADS / ACROSS;  // a pass of the block: chunks of a row, rows
    static_assert(ROWS % DOWN == 0 && DOWN % 8 == 0, "");
    const unsigned row = threadIdx.x / ACROSS, chunk = threadIdx.x % ACROSS;
    const bf16* at = m.data + (size_t(begin + row) * m.stride + m.column + 8 * chunk);
    tile += place<D>(row, chunk);
#pragma unroll
    for (int r = 0; r < ROWS; r += DOWN) {
        const bool valid = int(row) + r < rows;
#pragma unroll
        for (int c = 0; c < D / 8; c += ACROSS) copy_async<16>(tile + r * ROW<D> + 16 * c, valid ? at + 8 * c : m.data, valid);
        at += size_t(DOWN) * m.stride;
    }
}

// A lane's part of the address of a fragment: 16 rows from a multiple of 16, columns 16·step to 16·step + 15.
template <int D> struct Lane {
    unsigned base, low;
    __device__ __forceinline__ Lane(unsigned row, unsigned chunk) : base(row * ROW<D>), low(chunk ^ turn<D>(row)) {}
    __device__ __forceinline__ Address at(Address tile, int row, int step) const {
        const unsigned wrap = 2 * step % SPREAD<D>;
        return tile + base + 16 * (low ^ wrap) + (row * ROW<D> + 16 * (2 * step - wrap));
    }
};
// For the a of a product from rows (not transposed), and the b of one whose sum runs over rows (transposed).
template <int D> __device__ __forceinline__ Lane<D> lane_of_rows() {
    const unsigned lane = threadIdx.x % 32;
    return Lane<D>(lane % 16, lane / 16);
}
// For the b of a product whose sum runs over columns: r[0], r[1] are rows 0 to 7, r[2], r[3] rows 8 to 15.
template <int D> __device__ __forceinline__ Lane<D> lane_of_columns() {
    const unsigned lane = threadIdx.x % 32;
    return Lane<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// d [16·M, N] += rows `row`.. of tile a · rows 0..N of tile b, transposed.
template <int D, int M, int N>
__device__ __forceinline__ void product_of_tiles(float (&d)[M][N / 8][4], Address a, int row, Address b) {
    const Lane<D> left = lane_of_rows<D>(), right = lane_of_columns<D>();
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        unsigned x[M][4];
#pragma unroll
        for (int i = 0; i < M; i++) load_matrices<false>(x[i], left.at(a + row * ROW<D>, 16 * i, step));
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            unsigned y[4];
            load_matrices<false>(y, right.at(b, 16 * n, step));
#pragma unroll
            for (int i = 0; i < M; i++) multiply(d[i][2 * n], x[i], y[0], y[1]), multiply(d[i][2 * n + 1], x[i], y[2], y[3]);
        }
    }
}
// The same with fragments of a that are held already.
template <int D, int N>
__device__ __forceinline__ void product_with_held(float (&d)[N / 8][4], const unsigned (&x)[D / 16][4], Address b) {
    const Lane<D> right = lane_of_columns<D>();
#pragma unroll
    for (int step = 0; step < D / 16; step++)
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            unsigned y[4];
            load_matrices<false>(y, right.at(b, 16 * n, step));
            multiply(d[2 * n], x[step], y[0], y[1]), multiply(d[2 * n + 1], x[step], y[2], y[3]);
        }
}
// A product as left operand of the next one, rounded to bf16: the same lanes hold what they need.
template <int M, int N> using Weights = unsigned[M][N / 16][4];
template <int M, int N> __device__ __forceinline__ void as_operand(Weights<M, N>& x, const float (&p)[M][N / 8][4]) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) x[i][n / 2][n % 2 * 2 + h] = pack_bf16(p[i][n][2 * h], p[i][n][2 * h + 1]);
}
// d [16·M, D] += x [16·M, N] · rows 0..N of tile b.
template <int D, int M, int N>
__device__ __forceinline__ void product_with_weights(float (&d)[M][D / 8][4], const Weights<M, N>& x, Address b) {
    const Lane<D> right = lane_of_rows<D>();
#pragma unroll
    for (int step = 0; step < N / 16; step++)
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            unsigned y[4];
            load_matrices<true>(y, right.at(b, 16 * step, n));
#pragma unroll
            for (int i = 0; i < M; i++)
                multiply(d[i][2 * n], x[i][step], y[0], y[1]), multiply(d[i][2 * n + 1], x[i][step], y[2], y[3]);
        }
}

template <int M, int N> __device__ __forceinline__ void clear(float (&d)[M][N][4]) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) d[i][n][e] = 0.f;
}

// A warp's 16·M rows of results, the first `rows` of them, to global memory in 16-byte pieces. They pass through rows
// `row`.. of `tile`, which no other warp reads or writes any more; since the warp itself read them it has passed a barrier.
template <int D, int M>
__device__ __forceinline__ void store_rows(Address tile, int row, const float (&d)[M][D / 8][4], bf16* to, int stride,
                                           int rows) {
    constexpr int ACROSS = ALIGNED_CHUNKS<D>, DOWN = 32 / ACROSS;
    const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    tile += row * ROW<D>;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                store_shared(tile + place<D>(16 * i + 8 * h + g, n) + 4 * t, pack_bf16(d[i][n][2 * h], d[i][n][2 * h + 1]));
    __syncwarp();
    for (int r = lane / ACROSS; r < min(16 * M, rows); r += DOWN)
#pragma unroll
        for (int c = lane % ACROSS; c < D / 8; c += ACROSS)
            store_global16(to + size_t(r) * stride + 8 * c, load_shared16(tile + place<D>(r, c)));
}
