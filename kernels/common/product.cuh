// The kernel body of matrix products in memory, and what happens to a sum before it is stored.
#pragma once
#include "common/gelu.cuh"
#include "common/gemm.cuh"

constexpr int BATCH_AXES = 4;

// The first `count` of N values, at `to` and every `stride` elements from there; at once where `aligned`.
template <class T, u32 N>
__device__ __forceinline__ void store_run(T* to, u64 stride, u32 count, bool aligned, const float (&values)[N]) {
    if (aligned && count >= N) return store_from_float(to, values);
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        if (i < count) to[i * stride] = from_float<T>(values[i]);
    }
}

// What follows a sum, and where the result goes: the bias, where there is one, and the GELU, if it is asked for.
// `auxiliary`, where there is one, takes the sums before the GELU.
template <class T> struct Store {
    T* output;
    T* auxiliary;
    const T* bias;
    u32 activate;

    // N sums from `column` on, of which `count` are in C, to `position` and every `stride` elements from there;
    // `aligned`: as `store_from_float` wants it. Without FUSED the sums are stored as they are.
    template <bool FUSED, u32 N>
    __device__ __forceinline__ void operator()(u64 position, u64 stride, u32 column, u32 count, bool aligned,
                                               float (&sums)[N]) const {
        if constexpr (FUSED) {
            if (bias) {
#pragma unroll
                for (u32 i = 0; i < N; ++i) {
                    if (i < count) sums[i] += to_float(bias[column + i]);
                }
            }
            if (activate) {
                if (auxiliary) store_run(auxiliary + position, stride, count, aligned, sums);
#pragma unroll
                for (float& sum : sums) sum = gelu(sum);
            }
        }
        store_run(output + position, stride, count, aligned, sums);
    }
};

// The place of a matrix in an operand: its index along each axis of the batch times the operand's stride there.
struct Batch {
    Array<u32, BATCH_AXES> extents;
    Array<u64, BATCH_AXES> a, b;  // strides in elements, 0 where the operand is broadcast

    __device__ __forceinline__ void place(u32 matrix, u64& offset_a, u64& offset_b) const {
        offset_a = offset_b = 0;
#pragma unroll
        for (int axis = BATCH_AXES - 1; axis >= 0; --axis) {
            if (matrix == 0) break;  // so are the indices along the axes in front
            const u32 extent = extents[axis], index = matrix % extent;
            matrix /= extent;
            offset_a += index * a[axis];
            offset_b += index * b[axis];
        }
    }
};

// C (m, n) = A B for a batch of matrices, or the partial sums of a part of k.
//
// A block computes tile blockIdx.x of C over part blockIdx.y of k, `depth` terms each (a multiple of Tile::K unless
// there is one part), of the matrices blockIdx.z, + gridDim.z, …. Tiles are numbered in bands of 8 rows of tiles, down
// before across, so that the blocks that run together share operands in the L2 cache. With `partials` (part, matrix,
// position in C), sums go there instead of to C; another kernel adds them in the order of the parts.
template <class T> struct Product {
    Store<T> store;
    float* partials;
    const T* a;
    const T* b;
    u32 m, n, k, depth;
    u64 row_stride, column_stride;  // of C, in elements
    u32 batches;
    Batch batch;

    template <class Tile, bool A_ALONG_K, bool B_ALONG_K, u32 RUN, bool FUSED> __device__ __forceinline__ void run() {
        // For the main loop, then for rows of sums.
        constexpr u32 ROWS = Tile::M < 64 ? Tile::M : 64, PITCH = Tile::N + 8, SUMS = ROWS * PITCH * sizeof(float);
        SHARED_ARRAY(unsigned char, shared, [SUMS > Tile::SHARED_BYTES ? SUMS : Tile::SHARED_BYTES]);
        u32 row, column;
        place_tile<Tile>(row, column);
        const u32 first = blockIdx.y * depth, end = k - first < depth ? k : first + depth;
        for (u32 matrix = blockIdx.z; matrix < batches; matrix += gridDim.z) {
            u64 offset_a, offset_b;
            batch.place(matrix, offset_a, offset_b);
            const MatrixSource<T, A_ALONG_K, RUN> source_a{a + offset_a, m, k, A_ALONG_K ? k : m};
            const MatrixSource<T, B_ALONG_K, RUN> source_b{b + offset_b, n, k, B_ALONG_K ? k : n};
            Tile tile;
            tile.clear();
            tile.accumulate(source_a, source_b, row, column, first, end, shared);
            float* sums = reinterpret_cast<float*>(&shared);
#pragma unroll 1
            for (u32 from = 0; from < Tile::M; from += ROWS) {
                tile.for_each_pair(0, 0, [&](u32 row, u32 column, float first, float second) {
                    if (row - from >= ROWS) return;
                    ::store(sums + (row - from) * PITCH + column, Vector<float, 2>{first, second});
                });
                __syncthreads();
                store_rows<Tile, FUSED, ROWS, PITCH>(sums, matrix, row + from, column);
                __syncthreads();
            }
        }
    }

  private:
    template <class Tile> __device__ __forceinline__ void place_tile(u32& row, u32& column) const {
        const u32 down = divide_up(m, Tile::M), across = divide_up(n, Tile::N), band = blockIdx.x / (8 * across);
        const u32 rows = down - band * 8 < 8 ? down - band * 8 : 8, within = blockIdx.x - band * 8 * across;
        row = (band * 8 + within % rows) * Tile::M;
        column = within / rows * Tile::N;
    }

    // Stores ROWS rows of sums in shared memory, of C's rows from `row` and columns from `column` on.
    template <class Tile, bool FUSED, u32 ROWS, u32 PITCH>
    __device__ __forceinline__ void store_rows(const float* sums, u32 matrix, u32 row, u32 column) const {
        constexpr u32 WIDTH = 16 / sizeof(T), ACROSS = Tile::N / WIDTH;
        static_assert(ROWS * ACROSS % Tile::THREADS == 0, "every thread stores the same number of runs");
        const bool aligned = column_stride == 1 && row_stride % WIDTH == 0;
#pragma unroll 1
        for (u32 index = linear_thread(); index < ROWS * ACROSS; index += Tile::THREADS) {
            const u32 i = index / ACROSS, j = index % ACROSS * WIDTH;
            if (row + i >= m || column + j >= n) continue;
            float values[WIDTH];
            load_as_float(values, sums + i * PITCH + j);
            const u64 position = (row + i) * row_stride + (column + j) * column_stride;
            if (partials) {
                float* to = partials + (u64(blockIdx.y) * batches + matrix) * m * n;
                store_run(to + position, column_stride, n - column - j, aligned, values);
            } else {
                store.template operator()<FUSED>(u64(matrix) * m * n + position, column_stride, column + j,
                                                 n - column - j, aligned, values);
            }
        }
    }
};
