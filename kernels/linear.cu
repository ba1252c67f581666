// What linear layers need beside products (matmul.cu): sums over the rows of a gradient.
//
//   column sums:           db_j = sum_i dy_ij
//   GELU, backward:        dz_ij = dy_ij (Phi(z_ij) + z_ij phi(z_ij)),   db_j = sum_i dz_ij
//
// Tiling: a block of 8 warps takes 64 columns of `rows_per_block` rows, a lane two neighbours of every eighth row. The
// warps' sums are added in order in shared memory. Where the rows are in several blocks, each writes its sums as f32, and
// the first kernel adds those.
// Bytes: column sums 1 value per element, the backward 3. FLOPs: 1, and about 40. Bound by memory.

#include "common/kernel.cuh"

#include "common/gelu.cuh"
#include "common/index.cuh"
#include "common/vector.cuh"

constexpr u32 WARPS = 8, COLUMNS = 64;

// Sums over the block's rows of what `value(position, pair)` returns for the elements at `position` and, if `pair`,
// after it; to `partials` (blocks down, columns) or, where one block has all rows, to `sums`.
template <class T, class Value>
__device__ void sum_columns(T* sums, float* partials, u64 rows, u32 columns, u64 rows_per_block, Value value) {
    SHARED_ARRAY(float, of_warps, [WARPS][COLUMNS]);
    const u32 own = lane() * 2, column = blockIdx.x * COLUMNS + own;
    const u64 first = blockIdx.y * rows_per_block, end = rows - first < rows_per_block ? rows : first + rows_per_block;
    float left = 0, right = 0;
    if (column < columns) {
        const bool pair = column + 1 < columns;
#pragma unroll 4
        for (u64 row = first + warp(); row < end; row += WARPS) {
            const Vector<float, 2> values = value(row * columns + column, pair);
            left += values[0];
            right += values[1];
        }
    }
    of_warps[warp()][own] = left;
    of_warps[warp()][own + 1] = right;
    __syncthreads();
    const u32 mine = linear_thread();
    if (mine >= COLUMNS || blockIdx.x * COLUMNS + mine >= columns) return;
    float sum = 0;
#pragma unroll
    for (u32 i = 0; i < WARPS; ++i) sum += of_warps[i][mine];
    const u64 at = u64(blockIdx.x) * COLUMNS + mine;
    if (gridDim.y == 1) {
        sums[at] = from_float<T>(sum);
    } else {
        partials[blockIdx.y * u64(columns) + at] = sum;
    }
}

// Two neighbours, or one and a zero; at once where rows have an even width.
template <class T> __device__ __forceinline__ Vector<float, 2> load_pair(const T* from, bool pair, bool even) {
    if (even) {
        const Vector<T, 2> values = load<2>(from);
        return {to_float(values[0]), to_float(values[1])};
    }
    return {to_float(from[0]), pair ? to_float(from[1]) : 0.0f};
}

template <class T> __device__ __forceinline__ void store_pair(T* to, Vector<float, 2> values, bool pair, bool even) {
    if (even) return store_from_float(to, values.v);
    to[0] = from_float<T>(values[0]);
    if (pair) to[1] = from_float<T>(values[1]);
}

template <class T, class S>
__device__ void column_sum(T* sums, float* partials, const S* values, u64 rows, u32 columns, u64 rows_per_block) {
    const bool even = columns % 2 == 0;
    sum_columns(sums, partials, rows, columns, rows_per_block,
                [&](u64 position, bool pair) { return load_pair(values + position, pair, even); });
}

template <class T>
__device__ void gelu_backward(T* input_gradient, T* sums, float* partials, const T* input, const T* output_gradient,
                              u64 rows, u32 columns, u64 rows_per_block) {
    const bool even = columns % 2 == 0;
    sum_columns(sums, partials, rows, columns, rows_per_block, [&](u64 position, bool pair) {
        const Vector<float, 2> z = load_pair(input + position, pair, even);
        const Vector<float, 2> dy = load_pair(output_gradient + position, pair, even);
        const Vector<float, 2> dz{dy[0] * gelu_derivative(z[0]), dy[1] * gelu_derivative(z[1])};
        store_pair(input_gradient + position, dz, pair, even);
        return dz;
    });
}

#define COLUMN_SUM(from, S, to, T)                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) linear_column_sum_##from##_##to(   \
        T* sums, float* partials, const S* values, u64 rows, u32 columns, u64 rows_per_block) { \
        column_sum(sums, partials, values, rows, columns, rows_per_block);                      \
    }
#define GELU_BACKWARD(suffix, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                  \
        linear_gelu_backward_##suffix(T* input_gradient, T* sums, float* partials, const T* input,            \
                                      const T* output_gradient, u64 rows, u32 columns, u64 rows_per_block) {  \
        gelu_backward(input_gradient, sums, partials, input, output_gradient, rows, columns, rows_per_block); \
    }
COLUMN_SUM(f32, f32, f32, f32)
COLUMN_SUM(bf16, bf16, bf16, bf16)
COLUMN_SUM(f16, f16, f16, f16)
COLUMN_SUM(f32, f32, bf16, bf16)
COLUMN_SUM(f32, f32, f16, f16)
FOR_EACH_FLOAT(GELU_BACKWARD)

KERNELS(linear, KERNEL(linear_column_sum_f32_f32), KERNEL(linear_column_sum_bf16_bf16),
        KERNEL(linear_column_sum_f16_f16), KERNEL(linear_column_sum_f32_bf16), KERNEL(linear_column_sum_f32_f16),
        KERNEL_FLOATS(linear_gelu_backward))
