// Low-rank updates (LoRA, Hu et al. 2021) around a frozen linear layer y = x·Wᵀ, with dropout inside, in bf16 with f32
// sums. The graph is cut at the small tensors h and u [N, r], as in LoRAFusion (Zhu et al. 2025): a large tensor passes
// by once a kernel, the products with W stay cuBLAS's, and dropout masks are drawn again from Philox, never stored.
//
//     lora_down   h = scale·(m∘x)·Aᵀ              reads x            up to 3 adapters that share x (q/k/v; gate/up)
//     lora_up     y += scale·h·Bᵀ                 reads, writes y    up to 3 pairs of y and adapter
//     lora_dy     u = dY·B and dB = dYᵀ·h         reads dY           r ≤ 32
//     lora_u      u = scale·dY·B                  reads dY           any r
//     lora_db     dB = dYᵀ·h                      reads dY           any r
//     lora_da     dA = uᵀ·(m∘x)                   reads x            up to 3 adapters
//     lora_dx     dX += scale·Σ m∘(u·A)           reads, writes dX   up to 3 adapters
//
// m is the mask of zeros and ones; the factor 1/(1 − p) goes into `scale` (of lora_reduce for dA). A scale meets the f32
// sums, once. What leaves in parts is added up in order by lora_reduce_f32 and lora_reduce_bf16: no atomics. The bits
// depend on S (and for u of lora_dy on L) alone, which the host must derive from the shapes, never from the device.
//
// Layout  x [N, in], dX, y and dY [N, out] with a row stride `ld`: they may be column slices. A [r, in], B [out, r], h and
//         u [G, N, r] dense at 16-byte addresses; r a multiple of 8 up to 256. W of an entry's name is the ranks that a
//         warp takes: the least of 16, 32, 64, 128 that is not below r, else 128. Where a row's length or stride is no
//         multiple of 8, or an address none of 16 bytes: the `odd` entries.
// Launch  U = G·⌈r/W⌉ units, L warps each: a block is 32·U·L threads, no more than the entry's bound; C = 64 columns a
//         warp for W ≤ 32, else 32; S parts. Dynamic shared memory in bytes, depth = r rounded up to 32:
//             lora_down     ⌈N/(16·L)⌉ × S                       256·U·W
//             lora_u        ⌈N/(16·L)⌉ × S                       256·U·max(W, 64)
//             lora_da, db   ⌈columns/(C·L)⌉ × S                  256·U·max(W, 64)
//             lora_dy       ⌈columns/(64·L)⌉ × S                 16384 + 128·L·W + 128·L·(W + 8)
//             lora_up       ⌈N/(threads/2)⌉ × S × G              256·(depth % 64 ? depth : depth + 32)
//             lora_dx       ⌈N/(threads/2)⌉ × S                  256·depth·G
//
// Bytes a token with in = out = d, beside [N, r] and weights. Unfused is PEFT's order of operations: dropout writes m∘x
// and a mask byte; h·Bᵀ is written, scaled, added; s·dY is written and read twice; u·A is written, masked, added.
//     forward    unfused 19·d    here x 2, y 4: 6·d (0.32)                      q/k/v: 57·d, here 14·d (0.25)
//     backward   unfused 23·d    here dY 2, x 2, dX 4: 8·d (0.35), parts aside  q/k/v: 69·d, here 12·d (0.17)
//                                with dY read twice: 10·d (0.43)                       here 18·d (0.26)
// Parts are 8 bytes a sum, written and read: S·r·d for dA and dB each, N·r·⌈d/(64·L)⌉ for u of lora_dy. At N = 16384,
// d = 4096, S = 32 lora_dy moves 1.22 times dY for r = 16 (L = 12) and 1.5 times for r = 32 (L = 8); for r = 64 the sums
// leave room for half as many columns, it would be over 2 times, and two passes cost no more. From r = 128 on the
// products are the limit: 4·N·d·r FLOPs for u and dB, 62 µs at 550 TFLOP/s, as long as two passes over dY (estimates).
//
// How: no operand is transposed through memory. The contraction index and the output columns of mma.sync may be renumbered
// as long as both operands agree, so a lane takes eight neighbours of a row by one 16-byte access: as k = 8t.. of two
// products (down, u), as output columns 8t.. (up, dx), or as output rows 8g.. over four rows' k (da, db). The large
// operand goes from global memory to registers one or more steps ahead, the small one to shared memory in two stages.
// A random word is drawn by one lane only (r > 128: by one a slice of 128).
#include "mma_lora.cuh"

constexpr int TILE = 64;  // contraction indices (down, u), columns (up, dx), rows (da, db) of a stage

struct Small {  // the small operand of each adapter
    const bf16* at[3];
    __device__ const bf16* operator[](int g) const { return g == 0 ? at[0] : g == 1 ? at[1] : at[2]; }
};

__device__ __forceinline__ Dropout stream(int g, uint64_t key, uint64_t h0, uint64_t h1, uint64_t h2, unsigned limit) {
    const uint64_t h = g == 0 ? h0 : g == 1 ? h1 : h2;
    return {{unsigned(key), unsigned(key >> 32)}, {unsigned(h), unsigned(h >> 32)}, limit};
}

// Warps of a block: `units` of an adapter and a slice of W ranks, `lines` of rows or columns of the large tensor each.
struct Team {
    int units, slices, unit, line, lines, group, first;
    __device__ Team(int groups, int rank, int width) {
        slices = (rank + width - 1) / width, units = groups * slices, lines = blockDim.x / 32 / units;
        unit = threadIdx.x / 32 / lines, line = threadIdx.x / 32 % lines;
        group = unit / slices, first = unit % slices * width;
    }
};

// A part of ⌈n / TILE⌉ tiles: [begin, end).
struct Stretch {
    int begin, end;
    __device__ Stretch(int n, int part, int parts) {
        const int tiles = (n + TILE - 1) / TILE, each = (tiles + parts - 1) / parts;
        begin = min(part * each, tiles), end = min(begin + each, tiles);
    }
};

// Copies rows top.. and columns left.. of m [height, width] to `to`, R rows of C columns `stride` elements apart, zeros outside.
// Chunk c of 8 columns goes where chunk c ^ swizzle(row) is. `aligned`: 16-byte copies; the caller commits and waits.
template <int C, class F>
__device__ __forceinline__ void fill(Address to, int stride, int rows, const bf16* m, int top, int left, int height, int width, bool aligned, F swizzle) {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * (C / 8); i += blockDim.x) {
        const int row = i / (C / 8), c = i % (C / 8), column = left + 8 * c;
        const Address at = to + (row * stride + 8 * (c ^ swizzle(row))) * 2;
        const bf16* from = m + size_t(top + row) * width + column;
        if (aligned) {
            copy_async<16>(at, from, top + row < height && column < width);
        } else {
            const Pairs<8> v = load_pairs<8, false>(from, top + row < height ? width - column : 0);
#pragma unroll
            for (int k = 0; k < 4; k++) store_shared(at + 4 * k, v.at[k]);
        }
    }
}

// ---- h = scale·(m∘x)·Aᵀ (ALONG: the small operand is [r, K]), u = scale·dY·B (it is [K, r])
//
// Block (i, s): rows 16·lines·i.., part s of K. A lane holds rows g and g + 8, k = 8t.. of every 32: a[0], a[1] are the
// first pairs of the two rows, a[2], a[3] the second, and the next product takes the third and fourth.

template <int W, bool ALONG, bool WHOLE>
__device__ __forceinline__ void down(const bf16* x, size_t ld, const Small& small, bf16* h, float* part, int n, int k, int r, int groups, float scale, const Dropout& mask, const Team& team) {
    constexpr int WIDTH = ALONG ? TILE : (W < 64 ? 64 : W), ROWS = ALONG ? W : TILE;  // of a small tile
    constexpr unsigned BYTES = WIDTH * ROWS * 2;
    DYNAMIC_SHARED(bf16, stage);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, i = lane % 8;
    const int row = (blockIdx.x * team.lines + team.line) * 16 + g;
    const Stretch range(k, blockIdx.y, gridDim.y);
    const Address base = shared_address(stage);
    const bf16* from = x + row * ld;

    auto fetch = [&](int tile) {
        Address to = base + (tile & 1) * team.units * BYTES;
#pragma unroll 1
        for (int a = 0; a < groups; a++)
#pragma unroll 1
            for (int first = 0; first < r; first += W, to += BYTES) {
                if (ALONG) fill<TILE>(to, WIDTH, ROWS, small[a], first, tile * TILE, min(r, first + W), k, WHOLE, [](int j) { return (j & 1) * 4; });
                else fill<W>(to, WIDTH, ROWS, small[a], tile * TILE, first, k, r, true, [](int j) { return (j & 1) | (j >> 3 & 3) << 1; });
            }
    };
    Pairs<8> ahead[2][2];  // the next two 32s of k, rows g and g + 8
    int at = range.begin * TILE + 8 * t;
    const int end = min(range.end * TILE, k);
    auto read = [&](Pairs<8>(&to)[2]) {
#pragma unroll
        for (int e = 0; e < 2; e++) to[e] = load_pairs<8, WHOLE>(from + 8 * e * ld + at, row + 8 * e < n ? end - at : 0);
        at += 32;
    };

    float sum[W / 8][4] = {};
    if (range.begin < range.end) fetch(range.begin), read(ahead[0]), read(ahead[1]);
    commit_copies();
    for (int tile = range.begin; tile < range.end; tile++) {
        wait_copies<0>();
        __syncthreads();  // this stage is filled, and the other one has been read
        if (tile + 1 < range.end) fetch(tile + 1);
        commit_copies();
        // Swizzles are exclusive ors of the address, so that one register serves all j.
        const Address b = base + ((tile & 1) * team.units + team.unit) * BYTES +
                          (ALONG ? g * WIDTH * 2 + (t ^ (g & 1) * 4) * 16 : (8 * (i >> 1) + (i & 1) + 2 * (lane / 8)) * WIDTH * 2 + i * 16);
#pragma unroll(W < 128 ? 2 : 1)
        for (int s = 0; s < 2; s++) {
            Pairs<8> p = ahead[0][0], q = ahead[0][1];
            ahead[0][0] = ahead[1][0], ahead[0][1] = ahead[1][1];
            read(ahead[1]);
            const size_t element = size_t(row) * k + tile * TILE + 32 * s + 8 * t;
            drop<8, WHOLE>(p, mask, element), drop<8, WHOLE>(q, mask, element + 8 * size_t(k));
            const unsigned a[2][4] = {{p.at[0], q.at[0], p.at[1], q.at[1]}, {p.at[2], q.at[2], p.at[3], q.at[3]}};
#pragma unroll
            for (int j = 0; j < W / 8; j++) {
                unsigned v[4];
                if (ALONG) {
                    const uint4 w = load_shared16((b ^ 64 * s) + 8 * j * WIDTH * 2);
                    v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
                } else {
                    load_matrices<true>(v, (b ^ j % 8 * 16) + j / 8 * 128 + 32 * s * WIDTH * 2);
                }
                multiply(sum[j], a[0], v[0], v[1]);
                multiply(sum[j], a[1], v[2], v[3]);
            }
        }
    }
    wait_copies<0>();
    const int columns = r - team.first - 2 * t;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        if (row + 8 * e >= n) break;
        const size_t at = (size_t(team.group) * n + row + 8 * e) * r + team.first + 2 * t;
        float* sums = part + size_t(blockIdx.y) * groups * n * r + at;
        unsigned* to = reinterpret_cast<unsigned*>(h + at);
#pragma unroll
        for (int j = 0; j < W / 8; j++) {
            if (8 * j >= columns) break;
            if (part) store(sums + 8 * j, Pack<float, 2>{sum[j][2 * e], sum[j][2 * e + 1]});
            else store(to + 4 * j, Pack<unsigned, 1>{pack_bf16(scale * sum[j][2 * e], scale * sum[j][2 * e + 1])});
        }
    }
}

// ---- y += scale·h·Bᵀ, and dX += scale·Σ m∘(u·A)
//
// Block (i, c[, adapter]): 8 warps of 16 rows, part c of the columns. A lane's sums are columns 8t.. of every 32 of rows g, g + 8.

template <bool DX, bool WHOLE>
__device__ __forceinline__ void up(const bf16* h, const Small& small, bf16* y, size_t ld, int n, int columns, int r, int groups, float scale, uint64_t key, uint64_t h0, uint64_t h1, uint64_t h2, unsigned limit) {
    DYNAMIC_SHARED(bf16, stage);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, i = lane % 8;
    const int row = blockIdx.x * (blockDim.x / 2) + threadIdx.x / 32 * 16 + g, depth = (r + 31) / 32 * 32;
    // Rows of B lie an odd multiple of 64 bytes apart: no bank conflicts. A's tile is stored with its columns renumbered.
    const int stride = DX ? TILE : depth % 64 ? depth : depth + 32;
    const unsigned bytes = DX ? depth * TILE * 2 : stride * TILE * 2;
    const Stretch range(columns, blockIdx.y, gridDim.y);
    const Address base = shared_address(stage);

    auto fetch = [&](int tile) {
#pragma unroll 1
        for (int u = 0; u < groups; u++) {
            const Address to = base + ((tile & 1) * groups + u) * bytes;
            if (!DX) {
#pragma unroll 1
                for (int k = threadIdx.x; k < TILE * (depth / 8); k += blockDim.x) {
                    const int line = k / (depth / 8), c = k % (depth / 8), column = tile * TILE + line;
                    copy_async<16>(to + (line * stride + 8 * c) * 2, small[blockIdx.z] + size_t(column) * r + 8 * c, column < columns && 8 * c < r);
                }
            } else {
#pragma unroll 1
                for (int k = threadIdx.x; k < depth * 32; k += blockDim.x) {
                    const int line = k / 32, w = k % 32, column = tile * TILE + 2 * w;
                    const int chunk = (w / 16 * 4 + w % 4) ^ ((line & 1) | (line >> 3 & 3) << 1);
                    const Address at = to + line * TILE * 2 + chunk * 16 + w % 16 / 4 * 4;
                    const bf16* from = small[u] + size_t(line) * columns + column;
                    if (WHOLE) copy_async<4>(at, from, line < r && column < columns);
                    else store_shared(at, load_pairs<2, false>(from, line < r ? columns - column : 0).at[0]);
                }
            }
        }
    };
    if (range.begin < range.end) fetch(range.begin);
    commit_copies();
    for (int tile = range.begin; tile < range.end; tile++) {
        Pairs<8> old[2][2];  // [row g, g + 8][half of the tile]
        const int left = tile * TILE + 8 * t;
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int q = 0; q < 2; q++) old[e][q] = load_pairs<8, WHOLE>(y + (row + 8 * e) * ld + left + 32 * q, row + 8 * e < n ? columns - left - 32 * q : 0);
        wait_copies<0>();
        __syncthreads();  // this stage is filled, and the other one has been read
        if (tile + 1 < range.end) fetch(tile + 1);
        commit_copies();
        float total[8][4] = {};
#pragma unroll 1
        for (int u = 0; u < groups; u++) {
            const Address b = base + ((tile & 1) * groups + u) * bytes +
                              (DX ? (8 * (i >> 1) + (i & 1) + 2 * (lane / 8)) * TILE * 2 + i * 16 : ((8 * (g >> 1) + (g & 1)) * stride + 8 * t) * 2);
            const bf16* from = h + (size_t(DX ? u : blockIdx.z) * n + row) * r + 8 * t;
            float sum[8][4] = {};
#pragma unroll 1
            for (int s = 0; s < depth / 32; s++) {
                const Pairs<8> p = load_pairs<8, true>(from + 32 * s, row < n ? r - 32 * s - 8 * t : 0);
                const Pairs<8> q = load_pairs<8, true>(from + 8 * r + 32 * s, row + 8 < n ? r - 32 * s - 8 * t : 0);
                const unsigned a[2][4] = {{p.at[0], q.at[0], p.at[1], q.at[1]}, {p.at[2], q.at[2], p.at[3], q.at[3]}};
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    unsigned v[4];
                    if (DX) {
                        load_matrices<true>(v, (b ^ j * 16) + 32 * s * TILE * 2);
                    } else {
                        const uint4 w = load_shared16(b + ((j / 4 * 32 + j % 4 * 2) * stride + 32 * s) * 2);
                        v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
                    }
                    multiply(sum[j], a[0], v[0], v[1]);
                    multiply(sum[j], a[1], v[2], v[3]);
                }
            }
            const Dropout mask = stream(u, key, h0, h1, h2, DX ? limit : 0);
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    Pairs<8> keep{{FULL, FULL, FULL, FULL}};
                    if (DX) drop<8, WHOLE>(keep, mask, size_t(row + 8 * e) * columns + left + 32 * q);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        if (keep.at[j] & 1) total[4 * q + j][2 * e] += sum[4 * q + j][2 * e];
                        if (keep.at[j] >> 31) total[4 * q + j][2 * e + 1] += sum[4 * q + j][2 * e + 1];
                    }
                }
        }
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int q = 0; q < 2; q++) {
                if (row + 8 * e >= n) continue;
                bf16* to = y + (row + 8 * e) * ld + left + 32 * q;
                Pairs<8> v;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const unsigned w = old[e][q].at[j];
                    v.at[j] = pack_bf16(__uint_as_float(w << 16) + scale * total[4 * q + j][2 * e], __uint_as_float(w & 0xffff0000u) + scale * total[4 * q + j][2 * e + 1]);
                }
                if (WHOLE) {
                    if (left + 32 * q < columns) store(reinterpret_cast<unsigned*>(to), v);
                } else {
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        if (left + 32 * q + k < columns) to[k] = __ushort_as_bfloat16(uint16_t(v.at[k / 2] >> 16 * (k % 2)));
                }
            }
    }
    wait_copies<0>();
}

// ---- dA = uᵀ·(m∘x), dB = dYᵀ·h: parts [S, G, r, C] or [S, G, C, r] in f32, one a stretch of rows, for lora_reduce
//
// Block (i, s): columns 8·L·lines·i.., stretch s. A lane reads rows 4t .. 4t + 3 of every 16, columns L·g.. of its warp's:
// k = 2t, 2t + 1 are the first two rows, 2t + 8, 2t + 9 the others; output rows g, g + 8 of product i columns 2i, 2i + 1.
//
// DY besides computes dY·B of the block's columns, parts [gridDim.x, N, r]: a warp reads the same 16 rows once more, now from
// L1, as `down` does, and the warps' sums meet in shared memory. One of dB and u has to leave the block in parts; a block
// as wide as registers hold dB for (C·r sums) makes u's parts 4·r/C of dY's 2 bytes: little up to r = 32, too much beyond.

enum Product { DA, DB, DY };

// A warp's 16 rows × 64 columns of dY (of which `rows` and `columns` are there) times its 64 rows of B at `b`, to `to` [16, W + 8].
template <int W, bool WHOLE>
__device__ __forceinline__ void across(const bf16* dy, size_t ld, int rows, int columns, Address b, float* to) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, i = lane % 8;
    dy += 8 * t, columns -= 8 * t, b += (8 * (i >> 1) + (i & 1) + 2 * (lane / 8)) * W * 2 + (i >> 1 & (W / 8 - 1)) * 16;
    float sum[W / 8][4] = {};
#pragma unroll
    for (int s = 0; s < 2; s++) {
        const Pairs<8> p = load_pairs<8, WHOLE>(dy + g * ld + 32 * s, g < rows ? columns - 32 * s : 0);
        const Pairs<8> q = load_pairs<8, WHOLE>(dy + (g + 8) * ld + 32 * s, g + 8 < rows ? columns - 32 * s : 0);
        const unsigned a[2][4] = {{p.at[0], q.at[0], p.at[1], q.at[1]}, {p.at[2], q.at[2], p.at[3], q.at[3]}};
#pragma unroll
        for (int j = 0; j < W / 8; j++) {
            unsigned v[4];
            load_matrices<true>(v, (b ^ j * 16) + 32 * s * W * 2);
            multiply(sum[j], a[0], v[0], v[1]);
            multiply(sum[j], a[1], v[2], v[3]);
        }
    }
#pragma unroll
    for (int j = 0; j < W / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) store(to + (g + 8 * e) * (W + 8) + 8 * j + 2 * t, Pack<float, 2>{sum[j][2 * e], sum[j][2 * e + 1]});
}

template <int W, Product WHAT, bool WHOLE>
__device__ __forceinline__ void outer(const bf16* x, size_t ld, const bf16* v, const bf16* b, float* part, float* u, int n, int columns, int r, int groups, const Dropout& mask, const Team& team) {
    constexpr int L = W <= 32 ? 8 : 4, AHEAD = L == 8 ? 1 : 3, WIDTH = W < 64 ? 64 : W;
    constexpr int LINE = W + 8;  // of a warp's sums: no bank conflicts
    constexpr unsigned BYTES = TILE * WIDTH * 2;
    DYNAMIC_SHARED(bf16, stage);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, i = lane % 8;
    const int left = (blockIdx.x * team.lines + team.line) * 8 * L + L * g;
    const Stretch range(n, blockIdx.y, gridDim.y);
    const Address base = shared_address(stage), small = base + 2 * team.units * BYTES;
    float* meet = reinterpret_cast<float*>(stage + team.units * BYTES + (WHAT == DY ? 64 * team.lines * W : 0));

    auto fetch = [&](int tile) {
        Address to = base + (tile & 1) * team.units * BYTES;
#pragma unroll 1
        for (int a = 0; a < groups; a++)
#pragma unroll 1
            for (int first = 0; first < r; first += W, to += BYTES)
                fill<W>(to, WIDTH, TILE, v + size_t(a) * n * r, tile * TILE, first, n, r, true, [](int j) { return (j & 1) | (j >> 2 & 3) << 1; });
    };
    if (WHAT == DY) fill<W>(small, W, 64 * team.lines, b, blockIdx.x * 64 * team.lines, 0, columns, r, true, [](int k) { return k >> 3 & (W / 8 - 1); });
    const int end = min(range.end * TILE, n);
    Pairs<L> ring[AHEAD + 1][4];  // 16 rows each
    const bf16* from = x + size_t(range.begin * TILE + 4 * t) * ld + left;
    int ahead = range.begin * TILE + 4 * t;  // the row that `from` is in
    auto read = [&](Pairs<L>(&to)[4]) {
        const bf16* line = from;
#pragma unroll
        for (int e = 0; e < 4; e++, line += ld) to[e] = load_pairs<L, WHOLE>(line, ahead + e < end ? columns - left : 0);
        from += 16 * ld, ahead += 16;
    };

    float sum[L / 2][W / 8][4] = {};
    if (range.begin < range.end) {
        fetch(range.begin);
#pragma unroll
        for (int s = 0; s < AHEAD; s++) read(ring[s]);
    }
    commit_copies();
    for (int tile = range.begin; tile < range.end; tile++) {
        wait_copies<0>();
        __syncthreads();  // this stage is filled, and the other one has been read
        if (tile + 1 < range.end) fetch(tile + 1);
        commit_copies();
        const Address rows = base + ((tile & 1) * team.units + team.unit) * BYTES + (4 * (i >> 1) + (i & 1) + 2 * (lane / 8 % 2)) * WIDTH * 2 + (i ^ lane / 16) * 16;
#pragma unroll
        for (int s = 0; s < TILE / 16; s++) {
            read(ring[(s + AHEAD) % (AHEAD + 1)]);
            Pairs<L>(&now)[4] = ring[s % (AHEAD + 1)];
            if (WHAT == DA)
#pragma unroll
                for (int e = 0; e < 4; e++) drop<L, WHOLE>(now[e], mask, size_t(tile * TILE + 16 * s + 4 * t + e) * columns + left);
            unsigned a[L / 2][4];
#pragma unroll
            for (int c = 0; c < L / 2; c++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const unsigned p = now[2 * e].at[c], q = now[2 * e + 1].at[c];
                    a[c][2 * e] = (p & 0xffffu) | q << 16;
                    a[c][2 * e + 1] = p >> 16 | (q & 0xffff0000u);
                }
#pragma unroll
            for (int j = 0; j < W / 8; j += 2) {
                unsigned w[4];
                load_matrices<true>(w, (rows ^ j % 8 * 16) + j / 8 * 128 + 16 * s * WIDTH * 2);
#pragma unroll
                for (int c = 0; c < L / 2; c++) {
                    multiply(sum[c][j], a[c], w[0], w[1]);
                    multiply(sum[c][j + 1], a[c], w[2], w[3]);
                }
            }
            if (WHAT == DY) {
                const int first = tile * TILE + 16 * s;
                float* mine = meet + ((s & 1) * team.lines + team.line) * 16 * LINE;
                across<W, WHOLE>(x + first * ld + left - L * g, ld, end - first, columns - left + L * g, small + team.line * 64 * W * 2, mine);
                __syncthreads();  // the other half of `meet` is free again after the next one
                for (int j = threadIdx.x; j < 16 * W; j += blockDim.x) {
                    const int row = j / W, k = j % W;
                    float total = 0.f;
                    for (int warp = 0; warp < team.lines; warp++) total += meet[(((s & 1) * team.lines + warp) * 16 + row) * LINE + k];
                    if (first + row < end && k < r) u[(size_t(blockIdx.x) * n + first + row) * r + k] = total;
                }
            }
        }
    }
    wait_copies<0>();
    part += (size_t(blockIdx.y) * groups + team.group) * columns * r;
#pragma unroll
    for (int j = 0; j < W / 8; j++) {
        const int k = team.first + 8 * j + 2 * t;
        if (k >= r) continue;
        if (WHAT == DA) {
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int c = 0; c < L; c += 4) {
                    float* to = part + size_t(k + e) * columns + left + c;
                    const Pack<float, 4> f{{sum[c / 2][j][e], sum[c / 2][j][2 + e], sum[c / 2 + 1][j][e], sum[c / 2 + 1][j][2 + e]}};
                    if (WHOLE) {
                        if (left + c < columns) store(to, f);
                    } else {
#pragma unroll
                        for (int q = 0; q < 4; q++)
                            if (left + c + q < columns) to[q] = f.at[q];
                    }
                }
        } else {
#pragma unroll
            for (int c = 0; c < L; c++)
                if (left + c < columns) store(part + size_t(left + c) * r + k, Pack<float, 2>{{sum[c / 2][j][c % 2 * 2], sum[c / 2][j][c % 2 * 2 + 1]}});
        }
    }
}

// ---- out = [out +] scale·Σ parts, in order; parts lie `stride` elements apart

template <class T> __device__ __forceinline__ void reduce(const float* part, T* out, size_t n, int count, size_t stride, float scale, int add) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        float sum = 0.f;
#pragma unroll 4
        for (int s = 0; s < count; s++) sum += part[s * stride + i];
        out[i] = from_f32<T>(add ? to_f32(out[i]) + scale * sum : scale * sum);
    }
}

// Entries: lora_<what>_<W>_bf16 for ranks up to W where rows are `wide`, lora_<what>_<W>_odd_bf16 for all other shapes.
// `most`, `threads`: the most threads a block that leave a thread the registers it needs.
#define STREAMS uint64_t key, uint64_t high0, uint64_t high1, uint64_t high2, unsigned limit
#define LORA(W, suffix, WHOLE, most, threads)                                                                          \
    EXPORT_BOUNDS(most, 1, lora_down_##W##suffix, (const bf16* x, int ld, const bf16* a0, const bf16* a1, const bf16* a2, bf16* h, float* part, int n, int k, int r, int groups, float scale, STREAMS), \
        const Team team(groups, r, W);                                                                                 \
        down<W, true, WHOLE>(x, ld, {{a0, a1, a2}}, h, part, n, k, r, groups, scale, stream(team.group, key, high0, high1, high2, limit), team)) \
    EXPORT_BOUNDS(threads, 1, lora_u_##W##suffix, (const bf16* dy, int ld, const bf16* b, bf16* u, float* part, int n, int k, int r, float scale), \
        down<W, false, WHOLE>(dy, ld, {{b, b, b}}, u, part, n, k, r, 1, scale, Dropout{}, Team(1, r, W)))              \
    EXPORT_BOUNDS(threads, 1, lora_da_##W##suffix, (const bf16* x, int ld, const bf16* u, float* part, int n, int columns, int r, int groups, STREAMS), \
        const Team team(groups, r, W);                                                                                 \
        outer<W, DA, WHOLE>(x, ld, u, nullptr, part, nullptr, n, columns, r, groups, stream(team.group, key, high0, high1, high2, limit), team))
#define LORA_DB(W, suffix, WHOLE, threads) \
    EXPORT_BOUNDS(threads, 1, lora_db_##W##suffix, (const bf16* dy, int ld, const bf16* h, float* part, int n, int columns, int r), \
        outer<W, DB, WHOLE>(dy, ld, h, nullptr, part, nullptr, n, columns, r, 1, Dropout{}, Team(1, r, W)))
#define LORA_DY(W, suffix, WHOLE, threads)                                                                             \
    EXPORT_BOUNDS(threads, 1, lora_dy_##W##suffix, (const bf16* dy, int ld, const bf16* h, const bf16* b, float* part, float* u, int n, int columns, int r), \
        outer<W, DY, WHOLE>(dy, ld, h, b, part, u, n, columns, r, 1, Dropout{}, Team(1, r, W)))
#define LORA_UP(suffix, WHOLE, most, threads)                                                                          \
    EXPORT_BOUNDS(most, 1, lora_up##suffix, (const bf16* h, const bf16* b0, const bf16* b1, const bf16* b2, bf16* y0, bf16* y1, bf16* y2, int ld0, int ld1, int ld2, int out0, int out1, int out2, int n, int r, float scale), \
        const int z = blockIdx.z;                                                                                      \
        up<false, WHOLE>(h, {{b0, b1, b2}}, z == 0 ? y0 : z == 1 ? y1 : y2, z == 0 ? ld0 : z == 1 ? ld1 : ld2, n, z == 0 ? out0 : z == 1 ? out1 : out2, r, 1, scale, 0, 0, 0, 0, 0)) \
    EXPORT_BOUNDS(threads, 1, lora_dx##suffix, (const bf16* u, const bf16* a0, const bf16* a1, const bf16* a2, bf16* dx, int ld, int n, int columns, int r, int groups, float scale, STREAMS), \
        up<true, WHOLE>(u, {{a0, a1, a2}}, dx, ld, n, columns, r, groups, scale, key, high0, high1, high2, limit))

LORA(16, _bf16, true, 512, 384)
LORA(32, _bf16, true, 512, 384)
LORA(64, _bf16, true, 384, 384)
LORA(128, _bf16, true, 384, 256)
LORA_DB(64, _bf16, true, 384)
LORA_DB(128, _bf16, true, 256)
LORA_DY(16, _bf16, true, 384)
LORA_DY(32, _bf16, true, 256)
LORA_UP(_bf16, true, 512, 384)
LORA(16, _odd_bf16, false, 256, 256)
LORA(32, _odd_bf16, false, 256, 256)
LORA(64, _odd_bf16, false, 256, 256)
LORA(128, _odd_bf16, false, 256, 256)
LORA_DB(64, _odd_bf16, false, 256)
LORA_DB(128, _odd_bf16, false, 256)
LORA_DY(16, _odd_bf16, false, 256)
LORA_DY(32, _odd_bf16, false, 256)
LORA_UP(_odd_bf16, false, 256, 256)
EXPORT(lora_reduce_f32, (const float* part, float* out, uint64_t n, int count, uint64_t stride, float scale, int add), reduce(part, out, n, count, stride, scale, add))
EXPORT(lora_reduce_bf16, (const float* part, bf16* out, uint64_t n, int count, uint64_t stride, float scale, int add), reduce(part, out, n, count, stride, scale, add))
