// What a training step does besides the model: measures, the norm of the gradient with clipping and loss scaling, the
// optimizer, and averages of the weights. No host is asked in between: decisions are taken on the device and kept in a
// StepState.
//
//   gradient_squares  partial_b = sum of g^2 over block b's piece of all gradients, in f64
//   finish_step       norm = sqrt(sum_b partial_b) / (loss scale * samples); decides whether the step is applied
//   adamw             m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
//                     p = (1 - lr decay) p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//   sgd               d = g + decay p, u = momentum u + d, p = p - lr u (Nesterov: p - lr (d + momentum u))
//   average           a = decay a + (1 - decay) p
//
// Tiling: one launch for all tensors of a model. Their addresses come by value in tables of MOST rows; a block takes
// PIECE elements of one tensor and finds it by bisection in the table of first blocks. Sums run over threads in a fixed
// tree and over blocks in order.
// Bytes per element: adamw reads 16 and writes 12, sgd 12 and 8, average 8 and 4, gradient_squares reads 4. Bound by
// memory.

#include "common/kernel.cuh"

#include "common/reduce.cuh"

constexpr u32 THREADS = 256;
// Elements of a block.
constexpr u32 PIECE = 4096;
// Rows of a table: with all columns, just under the 32,764 bytes of parameters that a launch may have.
constexpr u32 MOST = 512;
// Rows of the report, which the host reads once in a while.
constexpr u32 REPORTS = 64;

// Written by the host before every step.
struct StepInputs {
    // Number of the step's random stream: see RandomStream.
    u64 stream;
    double lr;
};

struct StepReport {
    double loss;
    double norm;
    double loss_scale;
    u32 correct, among_five;
    // 0 applied, 1 skipped because scaled gradients overflowed, 2 refused because loss or gradient is not finite
    u32 status;
    u32 reserved;
};
static_assert(sizeof(StepReport) == 40);

// Kept on the device from step to step. src/train/device/mod.rs has the same layout.
struct StepState {
    // Of the step under way.
    double loss;
    u32 correct, among_five;
    // Of the last step that finished.
    double gradient_scale;
    double lr;
    // 1 - b1^t and sqrt(1 - b2^t).
    double correction, root_correction;
    double loss_scale;
    // Steps that were applied, and steps that finished.
    u64 applied, finished;
    u32 apply;
    // Sticky: no step is applied any more.
    u32 failed;
    // Applied steps since the loss scale last changed.
    u32 good;
    u32 reserved;
    StepReport reports[REPORTS];
};
static_assert(sizeof(StepState) == 88 + REPORTS * sizeof(StepReport));

using Addresses = Array<u64, MOST>;
using Blocks = Array<u32, MOST>;
using Rates = Array<float, MOST>;

// A piece of one tensor.
struct Piece {
    u32 tensor;
    u64 first, end;
};

__device__ __forceinline__ Piece piece_of_block(u32 count, const Blocks& first_block, const Addresses& elements) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (first_block[int(middle)] <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    const u64 first = u64(blockIdx.x - first_block[int(low)]) * PIECE;
    const u64 end = first + PIECE < elements[int(low)] ? first + PIECE : elements[int(low)];
    return {low, first, end};
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gradient_squares(double* partials, u32 count, const __grid_constant__ Blocks first_block,
                     const __grid_constant__ Addresses gradient, const __grid_constant__ Addresses elements) {
    SHARED_ARRAY(double, sums, [THREADS / 32]);
    const Piece piece = piece_of_block(count, first_block, elements);
    const float* g = reinterpret_cast<const float*>(gradient[int(piece.tensor)]);
    double sum = 0;
    for (u64 i = piece.first + threadIdx.x; i < piece.end; i += THREADS) {
        sum += double(g[i]) * double(g[i]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0;
        for (u32 warp = 0; warp < THREADS / 32; ++warp) total += sums[warp];
        partials[blockIdx.x] = total;
    }
}

// Adds a batch's loss, and for how many of its rows the label is the largest logit or among the five largest: of equal
// logits the first counts as larger, a logit that is not a number is never right. A warp for each row.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_measures(StepState* state, const float* loss, const float* logits, const i64* labels, u32 rows, u32 classes) {
    const u32 lane = threadIdx.x % 32, row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (blockIdx.x == 0 && threadIdx.x == 0) state->loss += double(*loss);
    if (row >= rows) return;
    const float* x = logits + u64(row) * classes;
    const u32 label = u32(labels[row]);
    const float own = x[label];
    u32 rank = 0;
    for (u32 i = lane; i < classes; i += 32) {
        const float value = x[i];
        rank += value != value || value > own || (value == own && i < label);
    }
    rank = warp_sum(rank);
    if (lane == 0 && own == own) {
        if (rank == 0) atomicAdd(&state->correct, 1u);
        if (rank < 5) atomicAdd(&state->among_five, 1u);
    }
}

__device__ inline bool is_finite(double value) { return value - value == 0; }

// Grows after `interval` good steps, shrinks after an overflow; stays within what f16 can use.
__device__ inline void adapt_loss_scale(StepState* state, bool overflow, u32 interval) {
    if (overflow) {
        state->loss_scale = state->loss_scale > 1 ? state->loss_scale / 2 : 1;
        state->good = 0;
    } else if (++state->good == interval) {
        state->loss_scale = state->loss_scale < 16777216 ? state->loss_scale * 2 : 16777216;
        state->good = 0;
    }
}

// One block. `interval` is 0 where the loss is not scaled, `clip_norm` 0 where gradients are not clipped.
extern "C" __global__ void __launch_bounds__(THREADS)
    finish_step(StepState* state, const StepInputs* inputs, const double* partials, u32 blocks, double samples,
                double clip_norm, double beta1, double beta2, u32 interval) {
    SHARED_ARRAY(double, sums, [THREADS]);
    double sum = 0;
    for (u32 i = threadIdx.x; i < blocks; i += THREADS) sum += partials[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    double squares = 0;
    for (u32 i = 0; i < THREADS; ++i) squares += sums[i];
    const double divisor = state->loss_scale * samples, norm = sqrt(squares) / divisor;
    const bool overflow = !is_finite(norm), skipped = overflow && interval > 0 && is_finite(state->loss);
    if (!is_finite(state->loss) || (overflow && !skipped)) state->failed = 1;
    state->apply = !state->failed && !skipped;

    StepReport& report = state->reports[state->finished % REPORTS];
    report = {state->loss,
              norm,
              state->loss_scale,
              state->correct,
              state->among_five,
              state->failed ? 2u : skipped ? 1u : 0u,
              0};
    ++state->finished;
    state->loss = 0;
    state->correct = state->among_five = 0;
    if (state->failed) return;
    if (state->apply) {
        const double clip = clip_norm > 0 ? fmin(clip_norm / (norm + 1e-6), 1.0) : 1.0;
        ++state->applied;
        state->gradient_scale = clip / divisor;
        state->lr = inputs->lr;
        state->correction = 1 - pow(beta1, double(state->applied));
        state->root_correction = sqrt(1 - pow(beta2, double(state->applied)));
    }
    if (interval > 0) adapt_loss_scale(state, skipped, interval);
}

// The same for a step that is applied in any case, with a gradient scale that the host gives.
extern "C" __global__ void __launch_bounds__(32)
    apply_step(StepState* state, const StepInputs* inputs, double gradient_scale, double beta1, double beta2) {
    if (threadIdx.x != 0) return;
    state->apply = 1;
    ++state->applied;
    state->gradient_scale = gradient_scale;
    state->lr = inputs->lr;
    state->correction = 1 - pow(beta1, double(state->applied));
    state->root_correction = sqrt(1 - pow(beta2, double(state->applied)));
}

// The gradient of the scaled loss with respect to the loss.
extern "C" __global__ void __launch_bounds__(32) loss_gradient(float* gradient, const StepState* state) {
    if (threadIdx.x == 0) *gradient = float(state->loss_scale);
}

// Six blocks of a multiprocessor suffice to saturate memory, and leave registers for the table's rows.
extern "C" __global__ void __launch_bounds__(THREADS, 6)
    adamw(const StepState* state, float beta1, float beta1_rest, float beta2, float beta2_rest, float eps, u32 count,
          const __grid_constant__ Blocks first_block, const __grid_constant__ Addresses value,
          const __grid_constant__ Addresses gradient, const __grid_constant__ Addresses mean,
          const __grid_constant__ Addresses square, const __grid_constant__ Addresses elements,
          const __grid_constant__ Rates decay, const __grid_constant__ Rates lr_scale) {
    if (!state->apply) return;
    const Piece piece = piece_of_block(count, first_block, elements);
    const int tensor = int(piece.tensor);
    float* p = reinterpret_cast<float*>(value[tensor]);
    float* m = reinterpret_cast<float*>(mean[tensor]);
    float* v = reinterpret_cast<float*>(square[tensor]);
    const float* gradients = reinterpret_cast<const float*>(gradient[tensor]);
    const double lr = state->lr * double(lr_scale[tensor]);
    const float keep = float(1 - lr * double(decay[tensor])), step_size = float(lr / state->correction);
    const float root_scale = float(1 / state->root_correction), scale = float(state->gradient_scale);
    for (u64 i = piece.first + threadIdx.x; i < piece.end; i += THREADS) {
        const float g = gradients[i] * scale;
        m[i] = beta1 * m[i] + beta1_rest * g;
        v[i] = beta2 * v[i] + beta2_rest * (g * g);
        p[i] = keep * p[i] - step_size * m[i] / (sqrtf(v[i]) * root_scale + eps);
    }
}

// Without momentum `buffer` is not read.
extern "C" __global__ void __launch_bounds__(THREADS)
    sgd(const StepState* state, float momentum, u32 nesterov, u32 count, const __grid_constant__ Blocks first_block,
        const __grid_constant__ Addresses value, const __grid_constant__ Addresses gradient,
        const __grid_constant__ Addresses buffer, const __grid_constant__ Addresses elements,
        const __grid_constant__ Rates decay, const __grid_constant__ Rates lr_scale) {
    if (!state->apply) return;
    const Piece piece = piece_of_block(count, first_block, elements);
    const int tensor = int(piece.tensor);
    float* p = reinterpret_cast<float*>(value[tensor]);
    float* u = reinterpret_cast<float*>(buffer[tensor]);
    const float* gradients = reinterpret_cast<const float*>(gradient[tensor]);
    const float lr = float(state->lr * double(lr_scale[tensor])), scale = float(state->gradient_scale);
    for (u64 i = piece.first + threadIdx.x; i < piece.end; i += THREADS) {
        const float d = gradients[i] * scale + decay[tensor] * p[i];
        float step = d;
        if (momentum > 0) {
            u[i] = momentum * u[i] + d;
            step = nesterov ? d + momentum * u[i] : u[i];
        }
        p[i] -= lr * step;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    average(const StepState* state, float keep, float rest, u32 count, const __grid_constant__ Blocks first_block,
            const __grid_constant__ Addresses averages, const __grid_constant__ Addresses value,
            const __grid_constant__ Addresses elements) {
    if (state && !state->apply) return;
    const Piece piece = piece_of_block(count, first_block, elements);
    float* a = reinterpret_cast<float*>(averages[int(piece.tensor)]);
    const float* p = reinterpret_cast<const float*>(value[int(piece.tensor)]);
    for (u64 i = piece.first + threadIdx.x; i < piece.end; i += THREADS) {
        a[i] = keep * a[i] + rest * p[i];
    }
}

KERNELS(training, KERNEL(gradient_squares), KERNEL(add_measures), KERNEL(finish_step), KERNEL(apply_step),
        KERNEL(loss_gradient), KERNEL(adamw), KERNEL(sgd), KERNEL(average))
