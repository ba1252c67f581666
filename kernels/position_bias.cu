// Dynamic position bias, forward and backward: a network from the offset of two tokens to one bias per head, for all
// offsets of a group. With p units and the offsets (dy, dx) of a row:
//
//   h_0 = W_0 (dy, dx) + b_0
//   z_l = (h_l - mean h_l) / sqrt(variance h_l + eps)    r_l = relu(scale_l z_l + shift_l)    h_l+1 = W_l+1 r_l + b_l+1
//
// for l = 0, 1, 2; with `residual` h_1 and h_2 have their h_l added. The row's biases are h_3. Backward, g_l the gradient
// of h_l and m_l = W_l+1^T g_l+1 where r_l > 0, else 0:
//
//   g_l = (n - mean n - z_l mean (n z_l)) / sqrt(variance h_l + eps), n = scale_l m_l, with `residual` + g_l+1
//   dW_l+1 = sum over rows g_l+1 r_l^T    db_l+1 = sum g_l+1    dscale_l = sum m_l z_l    dshift_l = sum m_l
//
// All networks of a launch have the same p and heads, and groups of their own: grid y counts networks, those of the
// blocks of a stage. Their addresses come by value.
// Tiling: a warp for each row, a lane for every 32nd unit; a block's warps take rows side by side, a network's blocks
// stride over its rows. Weights lie in shared memory as f32, in rows of odd length, so that lanes reading down a column
// of W and along a row of it both meet 32 banks; weights that do not fit are read where they are. Everything is computed
// in f32. The table is rounded to the type in which attention reads it, which may be narrower than the parameters'.
// The backward pass recomputes the activations, and its blocks add the products of their rows, in order, to sums of
// their own in device memory; the block of a network that is last to finish adds these up, in order, so that it does not
// matter which one that is.
// FLOPs of a row: 2 (2 p^2 + 2 p + p heads) forward; 4 (3 p^2 + 2 p + p heads) backward, which repeats all layers but the
// last and has no gradient for offsets.
// Bytes: the parameters once per block of 8 rows and heads values per row; backward also 4 bytes per parameter and
// block, twice.
// Roofline: the six tables of CrossFormer-S's third stage (p = 24, 12 heads, 169 rows) are 3.0 MFLOP and 0.1 MB from
// memory: 0.02 us at 4.3 TB/s of an H200, and as little in arithmetic. Neither binds, but latency: that of one launch,
// of staging the weights, and of three short products one after the other for one row.

#include "common/kernel.cuh"

#include "common/convert.cuh"
#include "common/reduce.cuh"

// Tensors in the order of src/ops/position_bias/mod.rs: W_0, b_0, then scale, shift, W, b of each layer.
constexpr u32 TENSORS = 14;
template <class T> struct Parameters {
    T* tensors[TENSORS];
};

// Networks of a launch, at most.
constexpr u32 MOST = 32;
template <class T> using Networks = Array<Parameters<T>, MOST>;
// Null where a network's table has no gradient.
template <class T> using Tables = Array<T*, MOST>;
struct Group {
    u32 height, width;
};
using Groups = Array<Group, MOST>;

// What the networks have in common, as `Description` in src/ops/position_bias/gpu.rs.
struct Description {
    u32 width, heads, residual, staged;
    float eps;
};

struct Network : Description {
    u32 group_height, group_width;

    __device__ __forceinline__ Network(const Description& description, const Group& group)
        : Description(description), group_height(group.height), group_width(group.width) {}

    __device__ __forceinline__ u32 columns() const { return 2 * group_width - 1; }
    // Of the table: at most 65535 squared.
    __device__ __forceinline__ u32 rows() const { return (2 * group_height - 1) * columns(); }
    // Units after a layer.
    __device__ __forceinline__ u32 out(u32 layer) const { return layer == 2 ? heads : width; }
    // Elements of a tensor.
    __device__ __forceinline__ u32 elements(u32 tensor) const {
        if (tensor < 2) return tensor == 0 ? 2 * width : width;
        const u32 layer = (tensor - 2) / 4, kind = (tensor - 2) % 4;
        return kind == 2 ? out(layer) * width : kind == 3 ? out(layer) : width;
    }
    // Elements of all tensors before one.
    __device__ __forceinline__ u64 before(u32 tensor) const {
        u64 sum = 0;
        for (u32 i = 0; i < tensor; ++i) sum += elements(i);
        return sum;
    }
    // The offset of two tokens in an axis.
    __device__ __forceinline__ float offset(u32 row, u32 axis) const {
        return axis == 0 ? float(i32(row / columns()) - i32(group_height - 1))
                         : float(i32(row % columns()) - i32(group_width - 1));
    }
    // Floats from a row of a staged weight to the next.
    __device__ __forceinline__ u32 pitch() const { return width | 1; }
};

// A weight (out, in), staged or not.
template <class T> struct Weight {
    const float* staged;
    const T* values;
    u32 width, pitch;

    __device__ __forceinline__ float operator()(u32 out, u32 in) const {
        return staged != nullptr ? staged[out * pitch + in] : to_float(values[u64(out) * width + in]);
    }
};

// A row's activations and gradients in shared memory, each of `width` values but the last, of `heads`.
struct Row {
    float* values;
    u32 width;

    __device__ __forceinline__ float* input() const { return values; }  // h_l
    __device__ __forceinline__ float* rectified(u32 layer) const { return values + (1 + layer) * width; }
    __device__ __forceinline__ float* normalised(u32 layer) const { return values + (4 + layer) * width; }
    __device__ __forceinline__ float* masked(u32 layer) const { return values + (7 + layer) * width; }
    __device__ __forceinline__ float* gradient(u32 layer) const { return values + (10 + layer) * width; }
};

template <class T> struct Pass {
    const Parameters<const T>& parameters;
    const Network& network;
    float* shared;

    __device__ __forceinline__ Weight<T> weight(u32 layer) const {
        const float* staged = network.staged ? shared + layer * network.width * network.pitch() : nullptr;
        return {staged, parameters.tensors[4 + 4 * layer], network.width, network.pitch()};
    }

    // The row of warp `warp`: all of it backward, forward only h_l and r_l.
    __device__ __forceinline__ Row row(u32 warp, bool backward) const {
        const u32 weights = network.staged ? (2 * network.width + network.heads) * network.pitch() : 0;
        const u32 row = backward ? 13 * network.width + network.heads : 4 * network.width;
        return {shared + weights + warp * row, network.width};
    }

    // Copies the weights to shared memory. Complete after a barrier.
    __device__ __forceinline__ void stage() const {
        if (!network.staged) return;
#pragma unroll
        for (u32 layer = 0; layer < 3; ++layer) {
            float* to = shared + layer * network.width * network.pitch();
            const T* from = parameters.tensors[4 + 4 * layer];
            for (u32 i = linear_thread(); i < network.out(layer) * network.width; i += block_threads()) {
                to[i / network.width * network.pitch() + i % network.width] = to_float(from[i]);
            }
        }
    }

    __device__ __forceinline__ void project(const Row& row, u32 number) const {
        const T *weight = parameters.tensors[0], *bias = parameters.tensors[1];
        const float dy = network.offset(number, 0), dx = network.offset(number, 1);
#pragma unroll 1
        for (u32 i = lane(); i < network.width; i += 32) {
            row.input()[i] =
                fmaf(to_float(weight[2 * i + 1]), dx, fmaf(to_float(weight[2 * i]), dy, to_float(bias[i])));
        }
    }

    // r_l and, where it is to be kept, z_l of h_l; gives 1 / sqrt(variance + eps). Each lane touches its own units alone.
    template <bool KEEP, u32 LAYER> __device__ __forceinline__ float normalise(const Row& row) const {
        const float share = 1.0f / float(network.width);
        const float* input = row.input();
        float sum = 0, squares = 0;
#pragma unroll 1
        for (u32 i = lane(); i < network.width; i += 32) sum += input[i];
        const float mean = warp_sum(sum) * share;
#pragma unroll 1
        for (u32 i = lane(); i < network.width; i += 32) squares += (input[i] - mean) * (input[i] - mean);
        const float inverse = 1.0f / sqrtf(warp_sum(squares) * share + network.eps);
        const T *scale = parameters.tensors[2 + 4 * LAYER], *shift = parameters.tensors[3 + 4 * LAYER];
#pragma unroll 1
        for (u32 i = lane(); i < network.width; i += 32) {
            const float normalised = (input[i] - mean) * inverse;
            const float value = fmaf(to_float(scale[i]), normalised, to_float(shift[i]));
            if (KEEP) row.normalised(LAYER)[i] = normalised;
            row.rectified(LAYER)[i] = value <= 0 ? 0 : value;  // a NaN stays
        }
        return inverse;
    }

    // h_l+1 of r_l, given to `store(unit, value)`.
    template <u32 LAYER, class Store> __device__ __forceinline__ void affine(const Row& row, Store store) const {
        const Weight<T> weight = this->weight(LAYER);
        const T* bias = parameters.tensors[5 + 4 * LAYER];
        const float* input = row.rectified(LAYER);
#pragma unroll 1
        for (u32 out = lane(); out < network.out(LAYER); out += 32) {
            float sum = to_float(bias[out]);
            for (u32 i = 0; i < network.width; ++i) sum = fmaf(weight(out, i), input[i], sum);
            store(out, sum);
        }
    }

    // One of the first two layers, h_l to h_l+1.
    template <bool KEEP, u32 LAYER> __device__ __forceinline__ float hidden_layer(const Row& row) const {
        const float inverse = normalise<KEEP, LAYER>(row);
        __syncthreads();
        float* input = row.input();
        affine<LAYER>(row, [&](u32 i, float value) { input[i] = network.residual ? input[i] + value : value; });
        return inverse;
    }

    // g_l and m_l of g_l+1.
    template <u32 LAYER> __device__ __forceinline__ void layer_backward(const Row& row, float inverse) const {
        const u32 width = network.width;
        const float share = 1.0f / float(width);
        const Weight<T> weight = this->weight(LAYER);
        const T* scale = parameters.tensors[2 + 4 * LAYER];
        const float *next = row.gradient(LAYER + 1), *normalised = row.normalised(LAYER);
        float sum = 0, correlation = 0;
#pragma unroll 1
        for (u32 i = lane(); i < width; i += 32) {
            float gradient = 0;
            for (u32 out = 0; out < network.out(LAYER); ++out) gradient = fmaf(weight(out, i), next[out], gradient);
            gradient = row.rectified(LAYER)[i] > 0 ? gradient : 0;
            row.masked(LAYER)[i] = gradient;
            sum += gradient * to_float(scale[i]);
            correlation += gradient * to_float(scale[i]) * normalised[i];
        }
        sum = warp_sum(sum) * share;
        correlation = warp_sum(correlation) * share;
#pragma unroll 1
        for (u32 i = lane(); i < width; i += 32) {
            const float scaled = row.masked(LAYER)[i] * to_float(scale[i]);
            const float gradient = (scaled - sum - normalised[i] * correlation) * inverse;
            row.gradient(LAYER)[i] = network.residual && LAYER < 2 ? gradient + next[i] : gradient;
        }
        __syncthreads();
    }
};

template <class T, class U>
__device__ void forward(U* table, const Parameters<const T>& parameters, const Network& network, float* shared) {
    const Pass<T> pass{parameters, network, shared};
    const Row row = pass.row(warp(), false);
    const u32 warps = block_threads() / 32;
    if (blockIdx.x * warps >= network.rows()) return;
    pass.stage();
    // Every warp of the block takes part in its barriers, the last rows' idle ones too.
    for (u32 first = blockIdx.x * warps; first < network.rows(); first += gridDim.x * warps) {
        const u32 number = first + warp();
        pass.project(row, number);
        pass.template hidden_layer<false, 0>(row);
        pass.template hidden_layer<false, 1>(row);
        pass.template normalise<false, 2>(row);
        __syncthreads();
        pass.template affine<2>(row, [&](u32 head, float value) {
            if (number < network.rows()) table[u64(number) * network.heads + head] = from_float<U>(value);
        });
        __syncthreads();
    }
}

// Adds what the block's first `count` rows, from number `first` on, give to the gradients of all parameters. `fresh`
// where these are the block's first.
template <class T>
__device__ __forceinline__ void add_products(float* sums, const Pass<T>& pass, u32 first, u32 count, bool fresh) {
    const Network& network = pass.network;
    const u32 width = network.width;
    const auto add = [&](u32 elements, auto product) {
        for (u32 i = linear_thread(); i < elements; i += block_threads()) {
            float sum = 0;
#pragma unroll 1
            for (u32 row = 0; row < count; ++row) sum += product(pass.row(row, true), row, i);
            sums[i] = fresh ? sum : sums[i] + sum;
        }
        sums += elements;
    };
    add(2 * width, [&](Row row, u32 n, u32 i) { return row.gradient(0)[i / 2] * network.offset(first + n, i % 2); });
    add(width, [&](Row row, u32, u32 i) { return row.gradient(0)[i]; });
#pragma unroll 1
    for (u32 layer = 0; layer < 3; ++layer) {
        add(width, [&](Row row, u32, u32 i) { return row.masked(layer)[i] * row.normalised(layer)[i]; });
        add(width, [&](Row row, u32, u32 i) { return row.masked(layer)[i]; });
        add(network.out(layer) * width,
            [&](Row row, u32, u32 i) { return row.gradient(layer + 1)[i / width] * row.rectified(layer)[i % width]; });
        add(network.out(layer), [&](Row row, u32, u32 i) { return row.gradient(layer + 1)[i]; });
    }
}

// Adds the sums of `blocks` blocks, in order. All threads of a block.
template <class T>
__device__ __forceinline__ void add_partials(const Parameters<T>& gradients, const float* partials, u32 blocks,
                                             const Network& network) {
    const u64 size = network.before(TENSORS);
#pragma unroll 1
    for (u32 tensor = 0; tensor < TENSORS; ++tensor) {
        T* gradient = gradients.tensors[tensor];
        for (u32 i = linear_thread(); i < network.elements(tensor); i += block_threads()) {
            float sum = 0;
#pragma unroll 4
            for (u32 block = 0; block < blocks; ++block) sum += partials[block * size + i];
            gradient[i] = from_float<T>(sum);
        }
        partials += network.elements(tensor);
    }
}

// `partials` has gridDim.x sums of all parameters; `arrivals`, 0 before and after, counts the blocks that have theirs.
template <class T, class U>
__device__ void backward(const Parameters<T>& gradients, float* partials, u32* arrivals, const U* table_gradient,
                         const Parameters<const T>& parameters, const Network& network, float* shared) {
    SHARED_ARRAY(u32, arrived, [1]);
    const Pass<T> pass{parameters, network, shared};
    const Row row = pass.row(warp(), true);
    const u32 warps = block_threads() / 32, needed = divide_up(network.rows(), warps);
    const u32 blocks = needed < gridDim.x ? needed : gridDim.x;
    if (table_gradient == nullptr || blockIdx.x >= blocks) return;
    float* sums = partials + blockIdx.x * network.before(TENSORS);
    pass.stage();
    bool fresh = true;
    for (u32 first = blockIdx.x * warps; first < network.rows(); first += blocks * warps) {
        const u32 number = first + warp(), left = network.rows() - first;
        pass.project(row, number);
        const float inverse_0 = pass.template hidden_layer<true, 0>(row);
        const float inverse_1 = pass.template hidden_layer<true, 1>(row);
        const float inverse_2 = pass.template normalise<true, 2>(row);
#pragma unroll 1
        for (u32 head = lane(); head < network.heads; head += 32) {
            row.gradient(3)[head] =
                number < network.rows() ? to_float(table_gradient[u64(number) * network.heads + head]) : 0;
        }
        __syncthreads();
        pass.template layer_backward<2>(row, inverse_2);
        pass.template layer_backward<1>(row, inverse_1);
        pass.template layer_backward<0>(row, inverse_0);
        add_products(sums, pass, first, left < warps ? left : warps, fresh);
        fresh = false;
        __syncthreads();
    }
    __threadfence();  // the sums are there for whoever counts this block
    __syncthreads();
    if (linear_thread() == 0) arrived[0] = atomicAdd(arrivals, 1u);
    __syncthreads();
    if (arrived[0] + 1 < blocks) return;
    __threadfence();
    if (linear_thread() == 0) *arrivals = 0;
    add_partials(gradients, partials, blocks, network);
}

// T is the type of parameters, U that of tables.
#define POSITION_BIAS(suffix, T, U)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 2) position_bias_forward_##suffix(                               \
        const __grid_constant__ Tables<U> tables, u32* arrivals, const __grid_constant__ Networks<const T> parameters, \
        const __grid_constant__ Groups groups, Description description) {                                              \
        DYNAMIC_SHARED(shared);                                                                                        \
        const u32 number = blockIdx.y;                                                                                 \
        if (arrivals != nullptr && blockIdx.x == 0 && linear_thread() == 0) arrivals[number] = 0;                      \
        forward<T, U>(tables[number], parameters[number], Network(description, groups[number]),                        \
                      reinterpret_cast<float*>(shared));                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) position_bias_backward_##suffix(                              \
        const __grid_constant__ Networks<T> gradients, float* partials, u32* arrivals,                                 \
        const __grid_constant__ Tables<const U> table_gradients, const __grid_constant__ Networks<const T> parameters, \
        const __grid_constant__ Groups groups, Description description) {                                              \
        DYNAMIC_SHARED(shared);                                                                                        \
        const u32 number = blockIdx.y;                                                                                 \
        const Network network(description, groups[number]);                                                            \
        backward<T, U>(gradients[number], partials + u64(number) * gridDim.x * network.before(TENSORS),                \
                       arrivals + number, table_gradients[number], parameters[number], network,                        \
                       reinterpret_cast<float*>(shared));                                                              \
    }
POSITION_BIAS(f32, f32, f32)
POSITION_BIAS(bf16, bf16, bf16)
POSITION_BIAS(f16, f16, f16)
POSITION_BIAS(f32_bf16, f32, bf16)
POSITION_BIAS(f32_f16, f32, f16)

#define ENTRIES(name) KERNEL_FLOATS(name), KERNEL(name##_f32_bf16), KERNEL(name##_f32_f16)
KERNELS(position_bias, ENTRIES(position_bias_forward), ENTRIES(position_bias_backward))
