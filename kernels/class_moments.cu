// Moments of features by class. With labels y_i, features g_i, a pivot p, and the rows whose label is one of the classes:
//
//   count_k = rows of class k    sum_k[f] = sum over rows of class k of g_i[f] - p[f]
//   squares[f] = sum over rows of (g_i[f] - p[f])^2, or, of each block of features, the matrix
//   squares[f, h] = sum over rows of (g_i[f] - p[f]) (g_i[h] - p[h])
//
// Features of many blocks lie side by side in a row; matrices of all blocks follow each other. All in f32; sums run over
// rows in order.
//
// Tiling. sums: a warp per class and 32 features; its lanes look at 32 labels at once and then add the rows that match,
// so that features are read once over all classes. squares_diagonal: 32 features by 8 slices of rows, added in a fixed
// tree. squares_full: blockIdx.y is the block of features, blockIdx.x one of its 64 by 64 tiles on or below the diagonal,
// 256 threads of 4 by 4 sums each over panels of 16 rows in shared memory; a tile is stored twice, mirrored.
// Bytes: sums and squares_diagonal read every feature once, sums also 8 bytes per row, class and 32 features, from the
// caches; squares_full reads F / 64 times the features from the L2 cache and writes 4 bytes per entry. FLOPs: 2 and 3
// per feature, N F^2 for a matrix.
// ResNet-56's 28 maps (1008 features) of 50,000 images: 202 MB, 47 us at 4.3 TB/s for each of sums and squares_diagonal.
// squares_full of their blocks of 16, 32 and 64: 2.4 GFLOP, 40 us at 60 TFLOP/s of f32, but only 28 tiles: bound by the
// latency of a tile's loop, some ms; in batches of 1024 rows of 16 blocks of 2048 features, 69 GFLOP, by arithmetic.

#include "common/kernel.cuh"

#include "common/rows.cuh"

namespace {

constexpr u32 THREADS = 256;
constexpr u32 LANES = 32;
constexpr u32 SLICES = THREADS / LANES;
// As in src/ops/class_moments/gpu.rs.
constexpr u32 MOST = 512;
constexpr u32 TILE = 64;
constexpr u32 PANEL = 16;
constexpr u32 PITCH = TILE + 4;

// First features of the blocks, and the number of all after the last one.
using Offsets = Array<u32, MOST + 1>;

__device__ __forceinline__ bool is_class(i64 label, u32 classes) { return label >= 0 && label < classes; }

// Rows of features less the pivot, 0 where the label is no class.
struct Panel {
    const float* features;
    const float* pivot;
    const i64* labels;
    u32 rows, pitch, classes;

    __device__ __forceinline__ float operator()(u32 row, u32 feature) const {
        if (row >= rows || !is_class(labels[row], classes)) return 0;
        return features[u64(row) * pitch + feature] - pivot[feature];
    }
};

// PANEL rows of TILE features from `feature` on, 0 from `end` on.
__device__ __forceinline__ void stage(float (*tile)[PITCH], const Panel& panel, u32 row, u32 feature, u32 end) {
#pragma unroll
    for (u32 i = threadIdx.x; i < PANEL * TILE; i += THREADS) {
        const u32 at = feature + i % TILE;
        tile[i / TILE][i % TILE] = at < end ? panel(row + i / TILE, at) : 0;
    }
}

}  // namespace

// Warps along blockIdx.y for classes, blocks along blockIdx.x for features.
extern "C" __global__ void __launch_bounds__(THREADS)
    class_moments_sums(i64* counts, float* sums, const float* features, const i64* labels, const float* pivot, u32 rows,
                       u32 pitch, u32 classes) {
    const u32 feature = blockIdx.x * LANES + threadIdx.x, kind = blockIdx.y * SLICES + threadIdx.y;
    if (kind >= classes) return;  // the whole warp
    const float origin = feature < pitch ? pivot[feature] : 0;
    float sum = 0;
    u32 count = 0;
    for (u32 first = 0; first < rows; first += LANES) {
        const u32 row = first + threadIdx.x;
        u32 matches = __ballot_sync(0xFFFFFFFFu, row < rows && labels[row] == i64(kind));
        count += __popc(matches);
        for (; matches != 0; matches &= matches - 1) {
            const u32 match = first + __ffs(int(matches)) - 1;
            if (feature < pitch) sum += features[u64(match) * pitch + feature] - origin;
        }
    }
    if (feature < pitch) sums[u64(kind) * pitch + feature] = sum;
    if (feature == 0) counts[kind] = count;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    class_moments_squares_diagonal(float* squares, const float* features, const i64* labels, const float* pivot,
                                   u32 rows, u32 pitch, u32 classes) {
    SHARED_ARRAY(float, scratch, [THREADS]);
    const u32 feature = blockIdx.x * LANES + threadIdx.x;
    const Panel panel{features, pivot, labels, rows, pitch, classes};
    float sums[1] = {};
    for (u32 row = threadIdx.y; feature < pitch && row < rows; row += SLICES) {
        const float value = panel(row, feature);
        sums[0] = fmaf(value, value, sums[0]);
    }
    reduce_slices(sums, Sum{}, scratch);
    if (threadIdx.y == 0 && feature < pitch) squares[feature] = sums[0];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    class_moments_squares_full(float* squares, const float* features, const i64* labels, const float* pivot, u32 rows,
                               u32 pitch, u32 classes, const __grid_constant__ Offsets offsets) {
    SHARED_ARRAY(float, left, [PANEL][PITCH]);
    SHARED_ARRAY(float, right, [PANEL][PITCH]);
    const u32 begin = offsets[int(blockIdx.y)], end = offsets[int(blockIdx.y) + 1], width = end - begin;
    // Tiles on or below the diagonal, row by row.
    u32 down = 0, across = blockIdx.x;
    while (across > down) across -= ++down;
    if (down * TILE >= width) return;
    // Matrices of the blocks before.
    for (u32 block = 0; block < blockIdx.y; ++block) {
        const u64 before = offsets[int(block) + 1] - offsets[int(block)];
        squares += before * before;
    }
    const Panel panel{features, pivot, labels, rows, pitch, classes};
    const u32 i = threadIdx.x / 16 * 4, j = threadIdx.x % 16 * 4;
    float sums[4][4] = {};
    for (u32 row = 0; row < rows; row += PANEL) {
        __syncthreads();  // the last panel may still be read
        stage(left, panel, row, begin + down * TILE, end);
        stage(right, panel, row, begin + across * TILE, end);
        __syncthreads();
#pragma unroll 4
        for (u32 k = 0; k < PANEL; ++k) {
            const Vector<float, 4> a = load<4>(&left[k][i]), b = load<4>(&right[k][j]);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
#pragma unroll
                for (int n = 0; n < 4; ++n) sums[m][n] = fmaf(a[m], b[n], sums[m][n]);
            }
        }
    }
#pragma unroll
    for (u32 m = 0; m < 4; ++m) {
#pragma unroll
        for (u32 n = 0; n < 4; ++n) {
            const u32 f = down * TILE + i + m, h = across * TILE + j + n;
            if (f >= width || h > f) continue;  // on a diagonal tile both orders are there; one is stored, mirrored
            squares[u64(f) * width + h] = sums[m][n];
            squares[u64(h) * width + f] = sums[m][n];
        }
    }
}

KERNELS(class_moments, KERNEL(class_moments_sums), KERNEL(class_moments_squares_diagonal),
        KERNEL(class_moments_squares_full))
