// Batch normalisation of rows of channels, forward and backward.
//
//   y = (x - mean) slope + bias with slope = scale weight and scale = 1 / sqrt(variance + eps)
//   dw = scale sum of dy (x - mean),  db = sum of dy
//   dx = slope (dy - db / n - (x - mean) scale dw / n); slope dy where the statistics are constants
//
// `partial_statistics` takes mean and squared deviations of every chunk of 8 values of a thread and combines them by
// the rule of Chan, Golub and LeVeque (1979): in a thread, over the slices of a block, and in `finish_statistics` over
// the parts of the rows. So a mean far from zero costs no precision.
//
// A ReLU may follow: y = max(0, …), and then dy counts where the sum before it, computed again, is positive.
//
// Tensors may have a leading model axis, along z of the grid, each model with parameters and statistics of its own over
// its real samples. Padding behind them has no part in any sum; its outputs and gradients are zero. Parts have a fixed
// number of rows then, and those without a real row change no bit.
//
// Tiling: a block of 256 threads takes a tile of columns (4 channels for each thread where 4 divides their number, else
// 1) and a part of the rows; the threads that the columns leave over are slices of the part: row by row in turn. A
// thread keeps what belongs to its channels in registers. Partial results are combined over slices in a tree and over
// parts in order.
// Bytes: statistics read a value per element, apply reads and writes one, the backward reads 4 and writes one. 2 to 8
// FLOPs per element: bound by memory.

#include "common/kernel.cuh"

#include "common/rows.cuh"

namespace {

constexpr u32 THREADS = 256;
// Channels of a thread.
constexpr int WIDE = 4;
// Rows whose loads a thread has under way together.
constexpr u32 CHUNK = 8;
// Tiles of `finish_*`: columns and slices of parts.
constexpr u32 COLUMNS = 32, SLICES = 8;

// Parameters and rows of a vector of channels may have different dtypes: 0 is f32, 1 bf16, 2 f16.
struct Parameter {
    const void* values;
    u32 dtype;

    __device__ __forceinline__ float at(u64 channel, float absent) const {
        if (values == nullptr) return absent;
        if (dtype == 0) return static_cast<const float*>(values)[channel];
        const u16 bits = static_cast<const u16*>(values)[channel];
        return dtype == 1 ? to_float(bits_as<bf16>(bits)) : to_float(bits_as<f16>(bits));
    }
};

// The model of a block, and how many of its rows are real.
struct Model {
    const i64* counts;  // samples of each model, null where all are real
    u64 positions;      // rows of a sample

    __device__ __forceinline__ u64 rows(u64 all) const {
        return counts == nullptr ? all : u64(counts[blockIdx.z]) * positions;
    }
};

// As CombineMoments, but that a sample of nothing leaves every bit as it is.
struct CombineParts {
    __device__ __forceinline__ Moments operator()(const Moments& a, const Moments& b) const {
        return b.count == 0 ? a : CombineMoments{}(a, b);
    }
};

// ReLU that keeps NaN.
__device__ __forceinline__ float rectified(float x) { return x < 0 ? 0 : x; }

// What a thread walks over: V channels of every blockDim.y-th row of the block's part.
template <int V> struct Walk {
    u32 channel;
    bool valid;
    u64 begin, end;

    __device__ __forceinline__ Walk(u64 rows, u32 channels, u64 rows_per_part) {
        channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
        valid = channel < channels;
        const u64 first = blockIdx.y * rows_per_part;
        end = first + rows_per_part < rows ? first + rows_per_part : rows;
        begin = valid ? first + threadIdx.y : end;
    }
};

template <int V, class T>
__device__ __forceinline__ void partial_statistics(Moments* partials, const T* input, Model model, u64 rows,
                                                   u32 channels, u64 rows_per_part, Moments* scratch) {
    input += blockIdx.z * rows * channels;
    partials += u64(blockIdx.z) * gridDim.y * channels;
    const Walk<V> walk(model.rows(rows), channels, rows_per_part);
    const u32 step = blockDim.y;
    Moments moments[V] = {};
    for (u64 row = walk.begin; row < walk.end; row += CHUNK * step) {
        const u64 left = divide_up<u64>(walk.end - row, step);
        const u32 count = left < CHUNK ? left : CHUNK;
        const float share = 1.0f / count;
        Vector<T, V> x[CHUNK];
#pragma unroll
        for (u32 k = 0; k < CHUNK; ++k) {
            if (k < count) x[k] = load<V>(input + (row + k * step) * channels + walk.channel);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
            Moments chunk = {float(count), 0, 0};
#pragma unroll
            for (u32 k = 0; k < CHUNK; ++k) chunk.mean += k < count ? to_float(x[k][i]) : 0;
            chunk.mean *= share;
#pragma unroll
            for (u32 k = 0; k < CHUNK; ++k) {
                const float distance = k < count ? to_float(x[k][i]) - chunk.mean : 0;
                chunk.deviations = fmaf(distance, distance, chunk.deviations);
            }
            moments[i] = CombineMoments{}(moments[i], chunk);
        }
    }
    reduce_slices(moments, CombineParts{}, scratch);
    if (threadIdx.y == 0 && walk.valid) {
#pragma unroll
        for (int i = 0; i < V; ++i) partials[u64(blockIdx.y) * channels + walk.channel + i] = moments[i];
    }
}

template <int V, class T>
__device__ __forceinline__ void apply(T* __restrict__ output, const T* __restrict__ input, const float* mean,
                                      const float* scale, Parameter weight, Parameter bias, bool relu, Model model,
                                      u64 rows, u32 channels, u64 rows_per_part) {
    const Walk<V> walk(rows, channels, rows_per_part);
    if (!walk.valid) return;
    input += blockIdx.z * rows * channels;
    output += blockIdx.z * rows * channels;
    const u64 real = model.rows(rows);
    float center[V], slope[V], offset[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const u64 channel = u64(blockIdx.z) * channels + walk.channel + i;
        center[i] = mean[channel];
        slope[i] = scale[channel] * weight.at(channel, 1);
        offset[i] = bias.at(channel, 0);
    }
#pragma unroll(V == WIDE ? 4 : 1)
    for (u64 row = walk.begin; row < walk.end; row += blockDim.y) {
        const u64 at = row * channels + walk.channel;
        float values[V];
        load_as_float(values, input + at);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            values[i] = fmaf(values[i] - center[i], slope[i], offset[i]);
            if (relu) values[i] = rectified(values[i]);
            if (row >= real) values[i] = 0;
        }
        store_from_float(output + at, values);
    }
}

// partials (parts, channels): sums of dy (x - mean) and of dy.
template <int V, class T>
__device__ __forceinline__ void partial_sums(Pair* partials, const T* __restrict__ input,
                                             const T* __restrict__ output_gradient, const float* mean,
                                             const float* scale, Parameter weight, Parameter bias, bool relu,
                                             Model model, u64 rows, u32 channels, u64 rows_per_part, Pair* scratch) {
    input += blockIdx.z * rows * channels;
    output_gradient += blockIdx.z * rows * channels;
    partials += u64(blockIdx.z) * gridDim.y * channels;
    const Walk<V> walk(model.rows(rows), channels, rows_per_part);
    float center[V] = {}, slope[V] = {}, offset[V] = {};
#pragma unroll
    for (int i = 0; walk.valid && i < V; ++i) {
        const u64 channel = u64(blockIdx.z) * channels + walk.channel + i;
        center[i] = mean[channel];
        if (!relu) continue;
        slope[i] = scale[channel] * weight.at(channel, 1);
        offset[i] = bias.at(channel, 0);
    }
    Pair sums[V] = {};
#pragma unroll(V == WIDE ? 4 : 1)
    for (u64 row = walk.begin; row < walk.end; row += blockDim.y) {
        const u64 at = row * channels + walk.channel;
        float values[V], gradients[V];
        load_as_float(values, input + at);
        load_as_float(gradients, output_gradient + at);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float distance = values[i] - center[i];
            const float gradient = relu && !(fmaf(distance, slope[i], offset[i]) > 0) ? 0 : gradients[i];
            sums[i].a = fmaf(distance, gradient, sums[i].a);
            sums[i].b += gradient;
        }
    }
    reduce_slices(sums, Sum{}, scratch);
    if (threadIdx.y == 0 && walk.valid) {
#pragma unroll
        for (int i = 0; i < V; ++i) partials[u64(blockIdx.y) * channels + walk.channel + i] = sums[i];
    }
}

// `along` and `total` are dw and db; null where the statistics are constants.
template <int V, class T>
__device__ __forceinline__ void input_gradient(T* __restrict__ gradient, const T* __restrict__ input,
                                               const T* __restrict__ output_gradient, const float* mean,
                                               const float* scale, Parameter weight, Parameter bias, bool relu,
                                               const float* along, const float* total, Model model, u64 rows,
                                               u32 channels, u64 rows_per_part) {
    const Walk<V> walk(rows, channels, rows_per_part);
    if (!walk.valid) return;
    gradient += blockIdx.z * rows * channels;
    input += blockIdx.z * rows * channels;
    output_gradient += blockIdx.z * rows * channels;
    const u64 real = model.rows(rows);
    const float share = 1.0f / float(real);
    float center[V], slope[V], tilt[V], offset[V], shift[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const u64 channel = u64(blockIdx.z) * channels + walk.channel + i;
        shift[i] = bias.at(channel, 0);
        center[i] = mean[channel];
        slope[i] = scale[channel] * weight.at(channel, 1);
        tilt[i] = along == nullptr ? 0 : along[channel] * share * scale[channel];
        offset[i] = total == nullptr ? 0 : total[channel] * share;
    }
#pragma unroll(V == WIDE ? 4 : 1)
    for (u64 row = walk.begin; row < walk.end; row += blockDim.y) {
        const u64 at = row * channels + walk.channel;
        float values[V], gradients[V];
        load_as_float(values, input + at);
        load_as_float(gradients, output_gradient + at);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float distance = values[i] - center[i];
            if (relu && !(fmaf(distance, slope[i], shift[i]) > 0)) gradients[i] = 0;
            values[i] = row < real ? (gradients[i] - offset[i] - distance * tilt[i]) * slope[i] : 0;
        }
        store_from_float(gradient + at, values);
    }
}

}  // namespace

#define KERNEL_OF(name) extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_##name
// `body<V>(…)` for as many channels of a thread as divide their number.
#define FOR_CHANNELS(body, ...)  \
    if (channels % WIDE == 0) {  \
        body<WIDE>(__VA_ARGS__); \
    } else {                     \
        body<1>(__VA_ARGS__);    \
    }
#define INSTANCES(suffix, T)                                                                                       \
    KERNEL_OF(partial_statistics_##suffix)                                                                         \
    (Moments * partials, const T* input, const i64* counts, u64 positions, u64 rows, u32 channels,                 \
     u64 rows_per_part) {                                                                                          \
        SHARED_ARRAY(Moments, scratch, [WIDE * THREADS]);                                                          \
        const Model model = {counts, positions};                                                                   \
        FOR_CHANNELS(partial_statistics, partials, input, model, rows, channels, rows_per_part, scratch)           \
    }                                                                                                              \
    KERNEL_OF(apply_##suffix)                                                                                      \
    (T * output, const T* input, const float* mean, const float* scale, const void* weight, u32 weight_dtype,      \
     const void* bias, u32 bias_dtype, u32 relu, const i64* counts, u64 positions, u64 rows, u32 channels,         \
     u64 rows_per_part) {                                                                                          \
        const Parameter w = {weight, weight_dtype}, b = {bias, bias_dtype};                                        \
        const Model model = {counts, positions};                                                                   \
        FOR_CHANNELS(apply, output, input, mean, scale, w, b, relu != 0, model, rows, channels, rows_per_part)     \
    }                                                                                                              \
    KERNEL_OF(partial_sums_##suffix)                                                                               \
    (Pair * partials, const T* input, const T* output_gradient, const float* mean, const float* scale,             \
     const void* weight, u32 weight_dtype, const void* bias, u32 bias_dtype, u32 relu, const i64* counts,          \
     u64 positions, u64 rows, u32 channels, u64 rows_per_part) {                                                   \
        SHARED_ARRAY(Pair, scratch, [WIDE * THREADS]);                                                             \
        const Parameter w = {weight, weight_dtype}, b = {bias, bias_dtype};                                        \
        const Model model = {counts, positions};                                                                   \
        FOR_CHANNELS(partial_sums, partials, input, output_gradient, mean, scale, w, b, relu != 0, model, rows,    \
                     channels, rows_per_part, scratch)                                                             \
    }                                                                                                              \
    KERNEL_OF(input_gradient_##suffix)                                                                             \
    (T * gradient, const T* input, const T* output_gradient, const float* mean, const float* scale,                \
     const void* weight, u32 weight_dtype, const void* bias, u32 bias_dtype, u32 relu, const float* along,         \
     const float* total, const i64* counts, u64 positions, u64 rows, u32 channels, u64 rows_per_part) {            \
        const Parameter w = {weight, weight_dtype}, b = {bias, bias_dtype};                                        \
        const Model model = {counts, positions};                                                                   \
        FOR_CHANNELS(input_gradient, gradient, input, output_gradient, mean, scale, w, b, relu != 0, along, total, \
                     model, rows, channels, rows_per_part)                                                         \
    }                                                                                                              \
    /* Running statistics: old + momentum (new - old), so that what has converged stays. */                        \
    KERNEL_OF(update_##suffix)                                                                                     \
    (T * mean, T * variance, const T* old_mean, const T* old_variance, const float* batch_mean,                    \
     const float* batch_variance, float momentum, u32 channels) {                                                  \
        const u32 channel = blockIdx.x * THREADS + threadIdx.x;                                                    \
        if (channel >= channels) return;                                                                           \
        const float center = to_float(old_mean[channel]), spread = to_float(old_variance[channel]);                \
        mean[channel] = from_float<T>(fmaf(momentum, batch_mean[channel] - center, center));                       \
        variance[channel] = from_float<T>(fmaf(momentum, batch_variance[channel] - spread, spread));               \
    }
FOR_EACH_FLOAT(INSTANCES)

// mean, scale and unbiased variance (models, channels) from partials (models, parts, channels).
KERNEL_OF(finish_statistics)
(float* mean, float* scale, float* unbiased, const Moments* partials, u32 parts, u32 channels, float eps) {
    SHARED_ARRAY(Moments, scratch, [COLUMNS * SLICES]);
    u64 channel = blockIdx.x * COLUMNS + threadIdx.x;
    const bool valid = channel < channels;
    Moments all = {};
    const Moments* own = partials + u64(blockIdx.z) * parts * channels + channel;
    reduce_parts(all, own, parts, channels, valid, CombineParts{}, scratch);
    if (threadIdx.y > 0 || !valid) return;
    channel += u64(blockIdx.z) * channels;
    mean[channel] = all.mean;
    scale[channel] = 1.0f / sqrtf(all.variance() + eps);
    unbiased[channel] = all.deviations / (all.count - 1);
}

// dw and db (models, channels) from partials (models, parts, channels).
KERNEL_OF(finish_sums)
(float* weight_gradient, float* bias_gradient, const Pair* partials, const float* scale, u32 parts, u32 channels) {
    SHARED_ARRAY(Pair, scratch, [COLUMNS * SLICES]);
    u64 channel = blockIdx.x * COLUMNS + threadIdx.x;
    const bool valid = channel < channels;
    Pair all = {};
    reduce_parts(all, partials + u64(blockIdx.z) * parts * channels + channel, parts, channels, valid, Sum{}, scratch);
    if (threadIdx.y > 0 || !valid) return;
    channel += u64(blockIdx.z) * channels;
    weight_gradient[channel] = all.a * scale[channel];
    bias_gradient[channel] = all.b;
}

KERNEL_OF(inverse_deviation)(float* scale, const float* variance, float eps, u32 channels) {
    const u32 channel = blockIdx.x * THREADS + threadIdx.x;
    if (channel < channels) scale[channel] = 1.0f / sqrtf(variance[channel] + eps);
}

KERNELS(batch_norm, KERNEL_FLOATS(batch_norm_partial_statistics), KERNEL_FLOATS(batch_norm_apply),
        KERNEL_FLOATS(batch_norm_partial_sums), KERNEL_FLOATS(batch_norm_input_gradient),
        KERNEL_FLOATS(batch_norm_update), KERNEL(batch_norm_finish_statistics), KERNEL(batch_norm_finish_sums),
        KERNEL(batch_norm_inverse_deviation))
