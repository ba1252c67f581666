// Softmax and its logarithm over the last axis, forward and backward.
//
//   p_i = exp(x_i - max x) / sum_j exp(x_j - max x)          log p_i = x_i - max x - ln sum_j exp(x_j - max x)
//   softmax:      dx_i = p_i (dy_i - sum_j p_j dy_j)
//   log-softmax:  dx_i = dy_i - exp(log p_i) sum_j dy_j
//
// Tiling: a warp for each row, so that no block barrier is needed; 8 rows in a block, the grid strides over the rows.
// Lane l takes elements l, l + 32, …; rows of the models (49 to 1000 elements) stay in the first-level cache between
// the passes. Sums are taken over lanes in a butterfly: the order is fixed.
// Bytes: 2 values per element forward, 3 backward, each from device memory once. About 5 FLOPs per element: bound by
// memory.

#include "common/kernel.cuh"

#include "common/convert.cuh"
#include "common/reduce.cuh"

constexpr u32 ROWS = 8;

// The largest value, or a NaN where there is one: it makes the sum of exponentials NaN.
template <class T> __device__ float row_max(const T* x, u32 width, u32 lane) {
    float largest = -INFINITY;
    for (u32 i = lane; i < width; i += 32) {
        largest = fmaxf(largest, to_float(x[i]));
    }
    return warp_max(largest);
}

template <class T>
__device__ void softmax_forward(T* output, const T* input, u64 rows, u32 width, bool logarithm) {
    const u32 lane = threadIdx.x % 32;
    for (u64 row = u64(blockIdx.x) * ROWS + threadIdx.x / 32; row < rows; row += u64(gridDim.x) * ROWS) {
        const T* x = input + row * width;
        T* y = output + row * width;
        const float largest = row_max(x, width, lane);
        float sum = 0;
        for (u32 i = lane; i < width; i += 32) {
            sum += expf(to_float(x[i]) - largest);
        }
        sum = warp_sum(sum);
        const float log_sum = logf(sum);
        for (u32 i = lane; i < width; i += 32) {
            const float shifted = to_float(x[i]) - largest;
            y[i] = from_float<T>(logarithm ? shifted - log_sum : expf(shifted) / sum);
        }
    }
}

template <class T>
__device__ void softmax_backward(T* input_gradient, const T* output, const T* output_gradient, u64 rows, u32 width,
                                 bool logarithm) {
    const u32 lane = threadIdx.x % 32;
    for (u64 row = u64(blockIdx.x) * ROWS + threadIdx.x / 32; row < rows; row += u64(gridDim.x) * ROWS) {
        const T* y = output + row * width;
        const T* dy = output_gradient + row * width;
        T* dx = input_gradient + row * width;
        float sum = 0;
        for (u32 i = lane; i < width; i += 32) {
            sum += to_float(dy[i]) * (logarithm ? 1.0f : to_float(y[i]));
        }
        sum = warp_sum(sum);
        for (u32 i = lane; i < width; i += 32) {
            const float value = to_float(y[i]), gradient = to_float(dy[i]);
            dx[i] = from_float<T>(logarithm ? gradient - expf(value) * sum : value * (gradient - sum));
        }
    }
}

#define INSTANCE(suffix, T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * ROWS)                                                 \
        softmax_forward_##suffix(T* output, const T* input, u64 rows, u32 width, u32 logarithm) {           \
        softmax_forward<T>(output, input, rows, width, logarithm);                                          \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * ROWS) softmax_backward_##suffix(                      \
        T* input_gradient, const T* output, const T* output_gradient, u64 rows, u32 width, u32 logarithm) { \
        softmax_backward<T>(input_gradient, output, output_gradient, rows, width, logarithm);               \
    }
INSTANCE(f32, float)
INSTANCE(bf16, bf16)
INSTANCE(f16, f16)

KERNELS(softmax, KERNEL(softmax_forward_f32), KERNEL(softmax_forward_bf16), KERNEL(softmax_forward_f16),
        KERNEL(softmax_backward_f32), KERNEL(softmax_backward_bf16), KERNEL(softmax_backward_f16))
