// Copies that change where elements are: permutations, broadcasts, slices, joins and padding.
//
//   copy:      output[sum_a p_a to_a] = input[sum_a p_a from_a] for every position p
//   transpose: the same where the output's innermost axis (columns) and the input's (rows) differ
//   pad:       every row of the input, `before` units into a longer row of the output, zeros around it
//
// Elements are moved in units of 1 to 16 bytes, whatever they mean: the host joins neighbouring elements into the
// largest unit that all strides are multiples of.
//
// Tiling: copy and pad have a thread for each unit. transpose moves tiles of 32 x 32 units through shared memory, whose
// rows are one unit longer so that columns lie in different banks; a block of 256 threads for each tile.
// Bytes: 2 per byte of output; pad does not read its zeros. No FLOPs.

#include "common/kernel.cuh"

#include "common/strided.cuh"
#include "common/vector.cuh"

constexpr u32 THREADS = 256;
constexpr u32 TILE = 32;

template <int BYTES> using Unit = typename vector_detail::Word<BYTES>::Type;

template <class U>
__device__ __forceinline__ void copy(U* output, const U* input, u64 units, u32 rank, const Axes& extents,
                                     const Axes& to, const Axes& from) {
    for (u64 i = grid_thread(); i < units; i += grid_threads()) {
        u64 target = 0, source = 0;
        for_each_position(i, rank, extents, [&](int axis, u64 position) {
            target += position * to[axis];
            source += position * from[axis];
        });
        output[target] = input[source];
    }
}

// Rows are `row_stride` apart in the output and follow each other in the input, columns the other way round. The axes
// are those around the matrix.
template <class U>
__device__ __forceinline__ void transpose(U* output, const U* input, u64 rows, u64 columns, u64 row_stride,
                                          u64 column_stride, u64 tiles, u32 rank, const Axes& extents, const Axes& to,
                                          const Axes& from) {
    SHARED_ARRAY(U, tile, [TILE][TILE + 1]);
    const u32 x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    const u64 across = divide_up<u64>(columns, TILE), down = divide_up<u64>(rows, TILE);
    for (u64 i = blockIdx.x; i < tiles; i += gridDim.x) {
        const Division by_column = divide(i, across), by_row = divide(by_column.quotient, down);
        const u64 column = by_column.remainder * TILE, row = by_row.remainder * TILE;
        u64 target = 0, source = 0;
        for_each_position(by_row.quotient, rank, extents, [&](int axis, u64 position) {
            target += position * to[axis];
            source += position * from[axis];
        });
        for (u32 k = y; k < TILE && column + k < columns; k += THREADS / TILE) {
            if (row + x < rows) tile[k][x] = input[source + (column + k) * column_stride + row + x];
        }
        __syncthreads();
        for (u32 k = y; k < TILE && row + k < rows; k += THREADS / TILE) {
            if (column + x < columns) output[target + (row + k) * row_stride + column + x] = tile[x][k];
        }
        __syncthreads();
    }
}

template <class U>
__device__ __forceinline__ void pad(U* output, const U* input, u64 units, u64 padded, u64 before, u64 width) {
    for (u64 i = grid_thread(); i < units; i += grid_threads()) {
        const Division division = divide(i, padded);
        // Wraps to a large number left of the content.
        const u64 column = division.remainder - before;
        output[i] = column < width ? input[division.quotient * width + column] : U{};
    }
}

#define INSTANCE(bytes)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) copy_b##bytes(                                            \
        Unit<bytes>* output, const Unit<bytes>* input, u64 units, u32 rank, const __grid_constant__ Axes extents,   \
        const __grid_constant__ Axes to, const __grid_constant__ Axes from) {                                       \
        copy(output, input, units, rank, extents, to, from);                                                        \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
        transpose_b##bytes(Unit<bytes>* output, const Unit<bytes>* input, u64 rows, u64 columns, u64 row_stride,    \
                           u64 column_stride, u64 tiles, u32 rank, const __grid_constant__ Axes extents,            \
                           const __grid_constant__ Axes to, const __grid_constant__ Axes from) {                    \
        transpose(output, input, rows, columns, row_stride, column_stride, tiles, rank, extents, to, from);         \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
        pad_b##bytes(Unit<bytes>* output, const Unit<bytes>* input, u64 units, u64 padded, u64 before, u64 width) { \
        pad(output, input, units, padded, before, width);                                                           \
    }
INSTANCE(1)
INSTANCE(2)
INSTANCE(4)
INSTANCE(8)
INSTANCE(16)

#define WIDTHS(name) KERNEL(name##_b1), KERNEL(name##_b2), KERNEL(name##_b4), KERNEL(name##_b8), KERNEL(name##_b16)
KERNELS(layout, WIDTHS(copy), WIDTHS(transpose), WIDTHS(pad))
