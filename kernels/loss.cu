// Cross entropy of a softmax with class labels or soft targets, forward and backward.
//
//   w_i = keep t_i + spread                   smoothed target; t is 1 at the label for labels
//   loss = sum_i w_i (-ln p_i)                -ln p_i = ln sum_j exp(x_j - max x) - (x_i - max x); w = 0 counts as 0
//   dx_i = (p_i sum_j w_j - w_i) scale,  dt_i = keep (-ln p_i) scale
//
// A row whose label is the ignored one has loss and gradient 0 and does not count; one whose label is not a class has
// loss and gradient NaN: the host never sees device labels, so it cannot refuse them.
//
// Tiling: a group of 1 to 32 threads, or a block for many classes, for each row, which stays in the caches between the
// passes: largest logit; sum of exponentials; with soft targets their product. Loads are 16 bytes where the number of
// classes allows. A block adds up the losses of its rows in f64, `finish` those of the blocks in order.
// Bytes: forward reads every logit (and soft target) once from device memory, backward again and writes a gradient of
// each. About 5 FLOPs per element: bound by memory.

#include "common/kernel.cuh"

#include "common/rows.cuh"

namespace {

constexpr u32 THREADS = 256;

// Losses of some rows, and how many of these count.
struct Total {
    double loss;
    u64 count;
    __device__ __forceinline__ Total operator+(const Total& other) const {
        return {loss + other.loss, count + other.count};
    }
};

struct Statistics {
    float largest, log_sum;
    __device__ __forceinline__ float surprise(float x) const { return log_sum - (x - largest); }
    __device__ __forceinline__ float probability(float x) const { return expf(x - largest - log_sum); }
};

enum class Row { Counts, Ignored, Invalid };

// Labels of rows; null with soft targets.
struct Labels {
    const i64* labels;
    u32 has_ignored;
    i64 ignored;

    __device__ __forceinline__ Row kind(u64 row, u32 classes) const {
        if (labels == nullptr) return Row::Counts;
        const i64 label = labels[row];
        if (has_ignored != 0 && label == ignored) return Row::Ignored;
        return label >= 0 && label < classes ? Row::Counts : Row::Invalid;
    }
};

// The smoothed target keep t + spread.
struct Smoothing {
    float keep, spread;
    __device__ __forceinline__ float operator()(float target) const { return fmaf(keep, target, spread); }
};

template <int N> struct Width {
    static constexpr int VALUE = N;
};

// body(Width<N>, at) for N neighbouring classes at a time: as many as one load takes where that divides the classes.
template <class T, class Body> __device__ __forceinline__ void each(u32 classes, u32 lanes, Body body) {
    const u32 lane = threadIdx.x % lanes;
    if (classes % WIDEST<T> == 0) {
        for (u32 at = lane * WIDEST<T>; at < classes; at += lanes * WIDEST<T>) body(Width<WIDEST<T>>{}, at);
    } else {
        for (u32 at = lane; at < classes; at += lanes) body(Width<1>{}, at);
    }
}

// sum over the group of term(x_i)
template <class T, class Term>
__device__ __forceinline__ float sum_of(const T* x, u32 classes, u32 lanes, float* scratch, Term term) {
    float sum = 0;
    each<T>(classes, lanes, [&](auto width, u32 at) {
        float values[decltype(width)::VALUE];
        load_as_float(values, x + at);
#pragma unroll
        for (float value : values) sum += term(value);
    });
    return group_sum(sum, lanes, scratch);
}

// `extent` is the number of classes, or 0 for groups without a row.
template <class T>
__device__ __forceinline__ Statistics statistics_of(const T* x, u32 extent, u32 lanes, float* scratch) {
    float largest = -INFINITY;
    each<T>(extent, lanes, [&](auto width, u32 at) {
        float values[decltype(width)::VALUE];
        load_as_float(values, x + at);
#pragma unroll
        for (float value : values) largest = fmaxf(largest, value);
    });
    largest = group_reduce(largest, -INFINITY, Max{}, lanes, scratch);
    const float sum = sum_of(x, extent, lanes, scratch, [&](float value) { return expf(value - largest); });
    return {largest, logf(sum)};
}

template <class T>
__device__ __forceinline__ float soft_loss(const T* x, const T* soft, u32 extent, u32 lanes, Statistics statistics,
                                           Smoothing smoothing, float* scratch) {
    float sum = 0;
    each<T>(extent, lanes, [&](auto width, u32 at) {
        constexpr int N = decltype(width)::VALUE;
        float values[N], targets[N];
        load_as_float(values, x + at);
        load_as_float(targets, soft + at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float weight = smoothing(targets[i]);
            sum += weight == 0 ? 0 : weight * statistics.surprise(values[i]);
        }
    });
    return group_sum(sum, lanes, scratch);
}

// The whole group takes part; what rows without a label in the classes get is of no use.
template <class T>
__device__ __forceinline__ float label_loss(const T* x, i64 label, u32 extent, u32 lanes, Statistics statistics,
                                            Smoothing smoothing, float* scratch) {
    float all = 0;
    if (smoothing.spread != 0) {
        all = sum_of(x, extent, lanes, scratch, [&](float value) { return statistics.surprise(value); });
    }
    if (label < 0 || label >= extent) return NAN;
    const float own = smoothing.keep * statistics.surprise(to_float(x[label]));
    return smoothing.spread == 0 ? own : fmaf(smoothing.spread, all, own);
}

// Either `losses` (rows) or `totals` (blocks) is null.
template <class T>
__device__ __forceinline__ void forward(T* losses, Total* totals, Statistics* saved, const T* logits, Labels labels,
                                        const T* soft, u64 rows, u32 classes, u32 lanes, Smoothing smoothing) {
    SHARED_ARRAY(float, scratch, [REDUCTION_SCRATCH]);
    SHARED_ARRAY(Total, total_scratch, [REDUCTION_SCRATCH]);
    Total total = {};
    for (RowWalk walk(rows, lanes); walk.more(); walk.next()) {
        const u64 row = walk.row(), start = row * classes;
        const u32 extent = walk.valid() ? classes : 0;
        const Statistics statistics = statistics_of(logits + start, extent, lanes, scratch);
        float loss;
        if (soft != nullptr) {
            loss = soft_loss(logits + start, soft + start, extent, lanes, statistics, smoothing, scratch);
        } else {
            const i64 label = walk.valid() ? labels.labels[row] : -1;
            loss = label_loss(logits + start, label, extent, lanes, statistics, smoothing, scratch);
        }
        if (!walk.valid() || threadIdx.x % lanes != 0) continue;
        saved[row] = statistics;
        const Row kind = labels.kind(row, classes);
        if (kind == Row::Ignored) loss = 0;
        if (kind == Row::Invalid) loss = NAN;
        if (losses != nullptr) losses[row] = from_float<T>(loss);
        total = total + Total{loss, kind != Row::Ignored};
    }
    if (totals == nullptr) return;
    total = block_reduce(total, Total{}, Sum{}, total_scratch);
    if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// The loss of all rows, and the factor of each in it: 1, or 1 / count of the mean.
template <class T>
__device__ __forceinline__ void finish(T* loss, float* share, const Total* totals, u32 blocks, u32 mean) {
    SHARED_ARRAY(Total, scratch, [REDUCTION_SCRATCH]);
    Total total = {};
    for (u32 block = threadIdx.x; block < blocks; block += THREADS) total = total + totals[block];
    total = block_reduce(total, Total{}, Sum{}, scratch);
    if (threadIdx.x > 0) return;
    const double count = mean != 0 ? double(total.count) : 1.0;
    *loss = from_float<T>(float(total.loss / count));
    *share = float(1.0 / count);
}

// `gradient` (1, or rows where every_row is set) is that of the loss; `share` may be null for 1. Either of
// logits_gradient and soft_gradient may be null.
template <class T>
__device__ __forceinline__ void backward(T* logits_gradient, T* soft_gradient, const T* logits, Labels labels,
                                         const T* soft, const Statistics* saved, const T* gradient, u32 every_row,
                                         const float* share, u64 rows, u32 classes, u32 lanes, Smoothing smoothing) {
    SHARED_ARRAY(float, scratch, [REDUCTION_SCRATCH]);
    const float factor = share == nullptr ? 1 : *share;
    for (RowWalk walk(rows, lanes); walk.more(); walk.next()) {
        const u64 row = walk.row(), start = row * classes;
        const u32 extent = walk.valid() ? classes : 0;
        const float targets =
            soft == nullptr ? 1 : sum_of(soft + start, extent, lanes, scratch, [](float value) { return value; });
        if (!walk.valid()) continue;
        const float total = fmaf(smoothing.keep, targets, smoothing.spread * classes);
        const Statistics statistics = saved[row];
        const Row kind = labels.kind(row, classes);
        const float scale = kind == Row::Invalid ? NAN : to_float(gradient[every_row != 0 ? row : 0]) * factor;
        const i64 label = soft == nullptr ? labels.labels[row] : -1;
        each<T>(extent, lanes, [&](auto width, u32 at) {
            constexpr int N = decltype(width)::VALUE;
            float values[N], others[N];
            load_as_float(values, logits + start + at);
            if (soft != nullptr) load_as_float(others, soft + start + at);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float x = values[i], target = soft != nullptr ? others[i] : float(label == i64(at) + i);
                values[i] = kind == Row::Ignored ? 0 : (statistics.probability(x) * total - smoothing(target)) * scale;
                others[i] = smoothing.keep * statistics.surprise(x) * scale;
            }
            if (logits_gradient != nullptr) store_from_float(logits_gradient + start + at, values);
            if (soft_gradient != nullptr) store_from_float(soft_gradient + start + at, others);
        });
    }
}

// The smoothed targets of labels in full, 0 in ignored rows.
template <class T>
__device__ __forceinline__ void weights(T* output, Labels labels, u64 rows, u32 classes, Smoothing smoothing) {
    for (u64 i = grid_thread(); i < rows * classes; i += grid_threads()) {
        const u64 row = i / classes;
        const Row kind = labels.kind(row, classes);
        const float weight = smoothing(labels.labels[row] == i64(i % classes));
        output[i] = from_float<T>(kind == Row::Counts ? weight : kind == Row::Ignored ? 0 : NAN);
    }
}

}  // namespace

#define KERNEL_OF(name) extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_##name
#define INSTANCES(suffix, T)                                                                                          \
    KERNEL_OF(forward_##suffix)                                                                                       \
    (T * losses, Total * totals, Statistics * saved, const T* logits, const i64* labels, const T* soft, u64 rows,     \
     u32 classes, u32 lanes, float keep, float spread, u32 has_ignored, u64 ignored) {                                \
        forward(losses, totals, saved, logits, Labels{labels, has_ignored, i64(ignored)}, soft, rows, classes, lanes, \
                Smoothing{keep, spread});                                                                             \
    }                                                                                                                 \
    KERNEL_OF(finish_##suffix)(T * loss, float* share, const Total* totals, u32 blocks, u32 mean) {                   \
        finish(loss, share, totals, blocks, mean);                                                                    \
    }                                                                                                                 \
    KERNEL_OF(backward_##suffix)                                                                                      \
    (T * logits_gradient, T * soft_gradient, const T* logits, const i64* labels, const T* soft,                       \
     const Statistics* saved, const T* gradient, u32 every_row, const float* share, u64 rows, u32 classes, u32 lanes, \
     float keep, float spread, u32 has_ignored, u64 ignored) {                                                        \
        backward(logits_gradient, soft_gradient, logits, Labels{labels, has_ignored, i64(ignored)}, soft, saved,      \
                 gradient, every_row, share, rows, classes, lanes, Smoothing{keep, spread});                          \
    }                                                                                                                 \
    KERNEL_OF(weights_##suffix)                                                                                       \
    (T * output, const i64* labels, u64 rows, u32 classes, float keep, float spread, u32 has_ignored, u64 ignored) {  \
        weights(output, Labels{labels, has_ignored, i64(ignored)}, rows, classes, Smoothing{keep, spread});           \
    }
FOR_EACH_FLOAT(INSTANCES)

KERNELS(loss, KERNEL_FLOATS(cross_entropy_forward), KERNEL_FLOATS(cross_entropy_finish),
        KERNEL_FLOATS(cross_entropy_backward), KERNEL_FLOATS(cross_entropy_weights))
