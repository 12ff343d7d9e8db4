// Row sums y[row] = Σ x[row, :], right once and wrong in every way that the emulator must show. One block of 128 threads
// a row.
#include "common.cuh"

enum Fault { NONE, NO_BARRIER, LANE_0_WRITES, WRONG_INDEX, WRITES_OUTSIDE, WRITES_INPUT, SHARED_OUTSIDE, UNALIGNED, LOST_THREADS, GAP };

template <int F> __device__ void row_sum(const float* x, float* y, int d) {
    SHARED(float, part, 4);
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float v = 0.f;
    for (int i = threadIdx.x; i < d; i += blockDim.x) v += x[size_t(row) * d + i + (F == WRONG_INDEX ? 1 : 0)];
    v = warp_sum(v);
    if (F == LANE_0_WRITES) {
        // Every lane reads what lane 0 of its warp has written, with nothing between.
        if (lane == 0) part[warp] = v;
        const float mine = part[warp];
        __syncthreads();
        if (lane == 31) part[warp] = mine;
    } else if (lane == 0) {
        part[F == SHARED_OUTSIDE ? warp + 1 : warp] = v;
    }
    if (F == LOST_THREADS && threadIdx.x == 5) __syncwarp();
    if (F != NO_BARRIER) __syncthreads();
    if (F == WRITES_INPUT && threadIdx.x == 0) const_cast<float*>(x)[0] = 0.f;
    if (F == UNALIGNED && threadIdx.x == 0) (void)load<4>(x + 1);
    if (F == GAP && row == 1) return;
    if (threadIdx.x == 0) y[F == WRITES_OUTSIDE ? row + int(gridDim.x) : row] = part[0] + part[1] + part[2] + part[3];
}

#define ROW_SUM(name, F) EXPORT(row_sum_##name, (const float* x, float* y, int d), row_sum<F>(x, y, d))
ROW_SUM(none, NONE)
ROW_SUM(no_barrier, NO_BARRIER)
ROW_SUM(lane_0_writes, LANE_0_WRITES)
ROW_SUM(wrong_index, WRONG_INDEX)
ROW_SUM(writes_outside, WRITES_OUTSIDE)
ROW_SUM(writes_input, WRITES_INPUT)
ROW_SUM(shared_outside, SHARED_OUTSIDE)
ROW_SUM(unaligned, UNALIGNED)
ROW_SUM(lost_threads, LOST_THREADS)
ROW_SUM(gap, GAP)
