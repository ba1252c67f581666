// Random removal of elements, or of whole samples.
//
//   dropout:    y_i = x_i m(word i of the stream)                       m(word) = word >= threshold ? scale : 0
//   drop path:  y_i = x_i m(word s of the stream), s = i / sample length
//
// Both are their own transpose, so the backward is the same kernel with the same stream: no mask is stored.
//
// Tiling: a thread for each 16 bytes, the grid strides over what is left. An element's word follows from its number
// alone, whichever thread computes it; one block of Philox is four words.
// Bytes: each value is read once and written once. About 100 integer operations for each block of Philox: bound by
// memory, in half precision close to the balance.

#include "common/kernel.cuh"

#include "common/index.cuh"
#include "common/philox.cuh"
#include "common/vector.cuh"

namespace {

constexpr u32 THREADS = 256;

template <class T>
__device__ void dropout(T* output, const T* input, u64 elements, u32 threshold, float scale,
                        const RandomStream& stream) {
    constexpr int N = WIDEST<T>;
    const Philox generator = stream.resolve();
    for (u64 group = grid_thread(); group < divide_up<u64>(elements, N); group += grid_threads()) {
        const u64 first = group * N;
        const i64 count = i64(elements - first);
        float values[N];
        load_as_float_tail(values, input + first, count, 0.0f);
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint4 words = generator.block((first + i) / 4);
            values[i] *= words.x >= threshold ? scale : 0.0f;
            values[i + 1] *= words.y >= threshold ? scale : 0.0f;
            values[i + 2] *= words.z >= threshold ? scale : 0.0f;
            values[i + 3] *= words.w >= threshold ? scale : 0.0f;
        }
        store_from_float_tail(output + first, values, count);
    }
}

template <class T>
__device__ void drop_path(T* output, const T* input, u64 elements, u64 sample_length, u32 threshold, float scale,
                          const RandomStream& stream) {
    constexpr int N = WIDEST<T>;
    const Philox generator = stream.resolve();
    for (u64 group = grid_thread(); group < divide_up<u64>(elements, N); group += grid_threads()) {
        const u64 first = group * N;
        const i64 count = i64(elements - first);
        float values[N];
        load_as_float_tail(values, input + first, count, 0.0f);
        u64 sample = first / sample_length;
        u64 left = (sample + 1) * sample_length - first;
        float factor = generator.bits(sample) >= threshold ? scale : 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (left == 0) {
                left = sample_length;
                factor = generator.bits(++sample) >= threshold ? scale : 0.0f;
            }
            --left;
            values[i] *= factor;
        }
        store_from_float_tail(output + first, values, count);
    }
}

}  // namespace

#define INSTANCE(suffix, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        dropout_##suffix(T* output, const T* input, u64 elements, u32 threshold, float scale, RandomStream stream) {   \
        dropout<T>(output, input, elements, threshold, scale, stream);                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) drop_path_##suffix(                                          \
        T* output, const T* input, u64 elements, u64 sample_length, u32 threshold, float scale, RandomStream stream) { \
        drop_path<T>(output, input, elements, sample_length, threshold, scale, stream);                                \
    }
FOR_EACH_FLOAT(INSTANCE)

KERNELS(dropout, KERNEL_FLOATS(dropout), KERNEL_FLOATS(drop_path))
