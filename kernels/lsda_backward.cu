// Long/short-distance attention with a position bias, backward. With S the logits, P their softmax and dO the gradient
// of the output, for each group and head:
//
//   dV = Pᵀ dO    dP = dO Vᵀ    dS = P ∘ (dP − rowsum(P ∘ dP))    dQ = dS K / sqrt d    dK = dSᵀ Q / sqrt d
//   dT[y_i − y_j, x_i − x_j] = the sum of dS_ij over images, groups and pairs
//
// tensor cores: lsda_backward_bf16, lsda_backward_f16
// Tiling: as forward (lsda_forward.cu). S and P are computed again from q, k and T; nothing of them was saved. P and dS
// pass through shared memory, since the gradients of keys sum over queries, which lie in other warps; both are rounded
// to the storage type there.
// A group of one tile (up to 64 tokens, 32 for 256-byte heads) is read once: 5 products. Larger groups take two passes,
// the first for each query's maximum, sum and rowsum(P ∘ dP): 7 products. Then dK and dV stay in registers while queries
// stream by; dQ is added up in f32 in device memory, always by the same thread and in the order of the keys.
// The table's gradient: dS of groups of equal shape is added up in registers, group after group, and goes to the warp's
// table in shared memory when the shape changes (at once for larger groups and heads of 128): one query at a time,
// whose keys all have different rows. The tables of
// a block are added in order, and those of the blocks of a head by `lsda_table_gradient`. Every order is fixed.
//   useful part of the products, 49 tokens: as forward; 59 % of dV, dK and dQ
// Bytes: 7 values per token, head and channel (q, k, v, dO, dq, dk, dv). FLOPs: 10 N d per token and head: at N = 49 35
// per byte in 2-byte types, 57 with the padding, where an H200 has 180 (4.3 TB/s, 790 TFLOP/s): bound by memory.

#include "common/lsda.cuh"

// Of the lane's two rows: the largest logit, the sum of weights relative to it, and that of weights times gradients.
struct Statistics {
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, dot[2] = {0, 0};

    // Takes in a tile, and turns its logits into weights relative to the new maximum.
    template <u32 N> __device__ __forceinline__ void add(float (&logits)[N][4], const float (&grads)[N][4]) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float next = Max{}(largest[half], row_max(logits, half));
            const float rescale = exp2f(largest[half] - shift_of(next));
            largest[half] = next;
            weigh(logits, half);
            float added = 0, added_dot = 0;
#pragma unroll
            for (u32 n = 0; n < N; ++n) {
#pragma unroll
                for (u32 i = half * 2; i < half * 2 + 2; ++i) {
                    added += logits[n][i];
                    added_dot = fmaf(logits[n][i], grads[n][i], added_dot);
                }
            }
            sum[half] = fmaf(sum[half], rescale, warp_sum<4>(added));
            dot[half] = fmaf(dot[half], rescale, warp_sum<4>(added_dot));
        }
    }

    template <u32 N> __device__ __forceinline__ void weigh(float (&logits)[N][4], u32 half) const {
        const float shift = shift_of(largest[half]);
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            logits[n][half * 2] = exp2f(logits[n][half * 2] - shift);
            logits[n][half * 2 + 1] = exp2f(logits[n][half * 2 + 1] - shift);
        }
    }

    // Turns weights into probabilities, 0 in rows from `queries` on, and gradients of probabilities into those of logits.
    template <u32 N>
    __device__ __forceinline__ void finish(float (&weights)[N][4], float (&grads)[N][4], u32 row, u32 queries) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float share = row + half * 8 + warp_product::fresh_lane() / 4 < queries ? 1 / sum[half] : 0;
            const float mean = dot[half] * share;
#pragma unroll
            for (u32 n = 0; n < N; ++n) {
#pragma unroll
                for (u32 i = half * 2; i < half * 2 + 2; ++i) {
                    weights[n][i] *= share;
                    grads[n][i] = weights[n][i] * (grads[n][i] - mean);
                }
            }
        }
    }

    // `kept` has three values for each token of a tile.
    __device__ __forceinline__ void save(float* kept, u32 row) const {
        const u32 lane = warp_product::fresh_lane();
        if (lane % 4 != 0) return;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float* values = kept + (row + half * 8 + lane / 4) * 3;
            values[0] = largest[half];
            values[1] = sum[half];
            values[2] = dot[half];
        }
    }

    __device__ __forceinline__ void restore(const float* kept, u32 row) {
        const u32 lane = warp_product::fresh_lane();
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float* values = kept + (row + half * 8 + lane / 4) * 3;
            largest[half] = values[0];
            sum[half] = values[1];
            dot[half] = values[2];
        }
    }
};

// Adds the warp's 16 rows of `sums` to its table. `staging` is the slot's tile of TILE columns.
template <u32 TILE>
__device__ __forceinline__ void fold(float* table, float* staging, const float (&sums)[TILE / 8][4], u32 row,
                                     u32 queries, u32 keys, const PairBias& bias) {
    using Tile = SharedTile<float, 16, TILE>;
    store_sums<float, TILE>(staging, row, 0, sums);
    __syncwarp();
#pragma unroll 1
    for (u32 line = row; line < row + 16 && line < queries; ++line) {
        const i32 query = bias.query_position[line] + bias.centre;
#pragma unroll 1
        for (u32 key = lane(); key < keys; key += 32) {
            table[query - bias.key_position[key]] += staging[Tile::offset(line, key / 4) + key % 4];
        }
        __syncwarp();
    }
}

// Sums of f32 in device memory, in the places of a warp's product: each thread reads and writes its own.
struct PartialSums {
    float* data;
    u64 stride;
    const u32* number;
    u32 row, count, width, lane;

    template <class F> __device__ __forceinline__ void at(u32 column, u32 i, F f) const {
        const u32 line = row + lane / 4 + i / 2 * 8;
        column += lane % 4 * 2 + i % 2;
        if (line < count && column < width) f(data[number[line] * stride + column]);
    }
};

template <class T, u32 D>
__device__ void lsda_backward(T* qkv_grad, float* tables, float* query_sums, const T* qkv, const T* bias, const T* grad,
                              const Problem& problem) {
    constexpr u32 TILE = Tiling<T, D>::TOKENS, WARPS = Tiling<T, D>::WARPS, THREADS = Tiling<T, D>::THREADS;
    constexpr u32 COLUMNS = D == 16 || D * sizeof(T) == 512 ? 16 : 32;  // of dQ at once, as registers allow
    constexpr bool KEEP = D < 128;  // dS of group after group in registers, of which wide heads leave too few
    DYNAMIC_SHARED(memory);
    const Slot<T, D> slot(problem);
    const u32 mine = slot.active() ? slot.number : 0;
    const u32 tile_size = slot.rows * D, pairs_size = slot.rows * TILE, slot_size = 4 * tile_size + 2 * pairs_size;
    const u32 capacity = slot.capacity(problem), row = slot.warp_row();
    T* query = reinterpret_cast<T*>(memory) + mine * slot_size;
    T *key = query + tile_size, *value = key + tile_size, *output_grad = value + tile_size;
    T *weights_tile = output_grad + tile_size, *grads_tile = weights_tile + pairs_size;
    u32* numbers = reinterpret_cast<u32*>(reinterpret_cast<T*>(memory) + slot.count * slot_size) + mine * 5 * capacity;
    const Tokens tokens{numbers, reinterpret_cast<i32*>(numbers + capacity)};
    float* kept = reinterpret_cast<float*>(numbers + 2 * capacity);
    float* table = reinterpret_cast<float*>(numbers + (slot.count - mine) * 5 * capacity);
    float* table_grads = table + problem.table_rows();
    float* table_grad = table_grads + warp() * problem.table_rows();

    const u32 head = blockIdx.x % problem.heads, width = problem.head_width;
    const u64 channels = problem.channels(), image_tokens = u64(problem.height) * problem.width;
    const float scale = 1 / sqrtf(float(width));
    load_table(table, bias, problem, head, THREADS);
    if (bias) {
        for (u32 i = threadIdx.x; i < WARPS * problem.table_rows(); i += THREADS) table_grads[i] = 0;
    }

    PairBias pair_bias{table, bias != nullptr, tokens.position, tokens.position, centre(problem)};
    float* staging = reinterpret_cast<float*>(weights_tile);
    float score_sums[TILE / 8][4];  // of groups of one tile that have the shape `summed`
    clear(score_sums);
    u32 summed[2] = {0, 0};
    const auto fold_summed = [&] {
        const u32 count = summed[0] * summed[1];
        pair_bias.query_position = pair_bias.key_position = tokens.position;
        if (count <= TILE && row < count) fold<TILE>(table_grad, staging, score_sums, row, count, count, pair_bias);
        clear(score_sums);
    };

#pragma unroll 1
    for (u64 first = u64(blockIdx.x / problem.heads) * slot.count; first < problem.groups();
         first += u64(problem.blocks) * slot.count) {
        const Group group = slot.active() ? group_of(problem, first + slot.number) : Group{0, {0, 0}, {0, 0}};
        const u32 count = group.count(), tiles = count > TILE ? divide_up(count, TILE) : 1;
        const u64 first_token = group.image * image_tokens * problem.heads + head;
        const u64 first_value = first_token * width;
        const u64 first_query = first_value + 2 * group.image * image_tokens * channels;
        // Wide heads have no registers for pointers that live through all products: they are computed at each use.
        const auto offset = [](u64 elements) { return KEEP ? elements : warp_product::fresh(elements); };
        const auto of_group = [&](auto* tensor) { return tensor + offset(first_value); };
        const auto query_of = [&](auto* tensor) { return tensor + offset(first_query); };
        __syncthreads();  // no warp needs anything of the last group
        if (KEEP && bias) {
            if (group.rows.count != summed[0] || group.columns.count != summed[1]) fold_summed();
            summed[0] = group.rows.count;
            summed[1] = group.columns.count;
            __syncthreads();
        }
        if (slot.active()) tokens.find(problem, group, capacity, slot.thread, slot.threads);

#pragma unroll 1
        for (u32 pass = tiles > 1 ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
            for (u32 j = 0; j < tiles; ++j) {
                const u32 keys = count - j * TILE < TILE ? count - j * TILE : TILE;
                const u32* key_numbers = numbers + j * TILE;
                float key_grad[D / 8][4], value_grad[D / 8][4];
                clear(key_grad);
                clear(value_grad);
#pragma unroll 1
                for (u32 i = 0; i < tiles; ++i) {
                    const u32 queries = count - i * TILE < TILE ? count - i * TILE : TILE;
                    const u32* query_numbers = numbers + i * TILE;
                    const bool busy = slot.active() && row < queries;
                    __syncthreads();  // the tokens are there, and no warp needs the last tiles
                    if (slot.active()) {
                        load_tokens<T, D>(query, query_of(qkv), 3 * channels, query_numbers, queries, width, slot);
                        if (i == 0) {
                            load_tokens<T, D>(key, query_of(qkv) + channels, 3 * channels, key_numbers, keys, width,
                                              slot);
                        }
                        async_commit();
                        load_tokens<T, D>(output_grad, of_group(grad), channels, query_numbers, queries, width, slot);
                        if (i == 0) {
                            load_tokens<T, D>(value, query_of(qkv) + 2 * channels, 3 * channels, key_numbers, keys,
                                              width, slot);
                        }
                        async_commit();
                    }
                    async_wait<1>();
                    __syncthreads();
                    float weights[TILE / 8][4], grads[TILE / 8][4];
                    if (busy) {
                        clear(weights);
                        multiply_by_transposed<T, D>(weights, query, row, key, keys);
                        pair_bias.query_position = tokens.position + i * TILE;
                        pair_bias.key_position = tokens.position + j * TILE;
                        finish_logits(weights, pair_bias, row, keys, scale * LOG2_E);
                    }
                    async_wait<0>();
                    __syncthreads();
                    if (busy) {
                        clear(grads);
                        multiply_by_transposed<T, D>(grads, output_grad, row, value, keys);
                        Statistics statistics;
                        if (tiles > 1 && (pass == 1 || j > 0)) statistics.restore(kept + i * TILE * 3, row);
                        if (pass == 0 || tiles == 1) {
                            statistics.add(weights, grads);
                        } else {
                            statistics.weigh(weights, 0);
                            statistics.weigh(weights, 1);
                        }
                        if (pass == 0) {
                            __syncwarp();  // all lanes have the values that are replaced
                            statistics.save(kept + i * TILE * 3, row);
                        } else {
                            statistics.finish(weights, grads, row, queries);
                            store_sums<T, TILE>(weights_tile, row, 0, weights);
                            store_sums<T, TILE>(grads_tile, row, 0, grads);
                        }
                    }
                    if (pass == 0) continue;
                    __syncthreads();
                    if (slot.active() && row < keys) {
                        multiply_transposed<T, D, TILE>(value_grad, weights_tile, row, output_grad, queries);
                        multiply_transposed<T, D, TILE>(key_grad, grads_tile, row, query, queries);
                    }
                    __syncthreads();
                    if (!busy) continue;
                    if (bias && (tiles > 1 || !KEEP)) {
                        fold<TILE>(table_grad, staging, grads, row, queries, keys, pair_bias);
                    } else if (bias) {
#pragma unroll
                        for (u32 e = 0; e < TILE / 2; ++e) score_sums[e / 4][e % 4] += grads[e / 4][e % 4];
                    }
#pragma unroll 1
                    for (u32 column = 0; column < D; column += COLUMNS) {
                        const PartialSums partial{
                            of_group(query_sums),      channels, query_numbers, row, queries, width,
                            warp_product::fresh_lane()};
                        float query_grad[COLUMNS / 8][4];
                        clear(query_grad);
                        if (j > 0) {
#pragma unroll
                            for (u32 e = 0; e < COLUMNS / 2; ++e) {
                                float& sum = query_grad[e / 4][e % 4];
                                partial.at(column + e / 4 * 8, e % 4, [&](const float& before) { sum = before; });
                            }
                        }
                        multiply_registers<T, D>(query_grad, grads, key, column, keys);
                        const bool last = j + 1 == tiles;
#pragma unroll
                        for (u32 e = 0; e < COLUMNS / 2; ++e) {
                            float& sum = query_grad[e / 4][e % 4];
                            if (last) {
                                sum *= scale;
                            } else {
                                partial.at(column + e / 4 * 8, e % 4, [&](float& now) { now = sum; });
                            }
                        }
                        // In place of the queries, which nobody needs any more.
                        if (last) store_sums<T, D>(query, row, column, query_grad);
                    }
                    if (j + 1 == tiles) {
                        __syncwarp();
                        store_tokens<T, D>(query_of(qkv_grad), 3 * channels, query_numbers, query, row, queries, width);
                    }
                }
                if (pass == 0) continue;
                __syncthreads();  // no warp needs the keys and values
                if (!slot.active() || row >= keys) continue;
#pragma unroll
                for (u32 e = 0; e < D / 2; ++e) key_grad[e / 4][e % 4] *= scale;
                store_sums<T, D>(key, row, 0, key_grad);
                store_sums<T, D>(value, row, 0, value_grad);
                __syncwarp();
                store_tokens<T, D>(query_of(qkv_grad) + channels, 3 * channels, key_numbers, key, row, keys, width);
                store_tokens<T, D>(query_of(qkv_grad) + 2 * channels, 3 * channels, key_numbers, value, row, keys,
                                   width);
            }
        }
    }
    if (bias == nullptr) return;
    __syncthreads();
    if (KEEP) fold_summed();
    __syncthreads();
    for (u32 i = threadIdx.x; i < problem.table_rows(); i += THREADS) {
        float sum = 0;
        for (u32 w = 0; w < WARPS; ++w) sum += table_grads[w * problem.table_rows() + i];
        tables[u64(blockIdx.x) * problem.table_rows() + i] = sum;
    }
}

// The sum of the blocks' tables, (blocks, heads, rows) to (rows, heads). A warp takes every 8th block for 32 rows.
constexpr u32 PARTS = 8;

template <class T> __device__ void lsda_table_gradient(T* table_grad, const float* tables, u32 rows, u32 heads,
                                                       u32 blocks) {
    SHARED_ARRAY(float, sums, [PARTS][32]);
    const u32 across = divide_up(rows, 32u), part = threadIdx.x / 32;
    const u32 head = blockIdx.x / across, row = blockIdx.x % across * 32 + lane();
    float sum = 0;
    for (u32 block = part; row < rows && block < blocks; block += PARTS) {
        sum += tables[(u64(block) * heads + head) * rows + row];
    }
    sums[part][lane()] = sum;
    __syncthreads();
    if (part > 0 || row >= rows) return;
    for (u32 other = 1; other < PARTS; ++other) sum += sums[other][lane()];
    table_grad[u64(row) * heads + head] = from_float<T>(sum);
}

#define INSTANCE(suffix, T, D)                                                                                   \
    extern "C" __global__ void __launch_bounds__(Tiling<T, D>::THREADS, D == 128 ? 4 : 2)                        \
        lsda_backward_##suffix##_##D(T* qkv_grad, float* tables, float* query_sums, const T* qkv, const T* bias, \
                                     const T* grad, Problem problem) {                                           \
        lsda_backward<T, D>(qkv_grad, tables, query_sums, qkv, bias, grad, problem);                             \
    }
#define INSTANCES(suffix, T)                                                                                \
    INSTANCE(suffix, T, 16)                                                                                 \
    INSTANCE(suffix, T, 32)                                                                                 \
    INSTANCE(suffix, T, 64)                                                                                 \
    INSTANCE(suffix, T, 128)                                                                                \
    extern "C" __global__ void __launch_bounds__(32 * PARTS)                                                \
        lsda_table_gradient_##suffix(T* table_grad, const float* tables, u32 rows, u32 heads, u32 blocks) { \
        lsda_table_gradient<T>(table_grad, tables, rows, heads, blocks);                                    \
    }
FOR_EACH_FLOAT(INSTANCES)

#define ENTRIES(suffix)                                                                                            \
    KERNEL(lsda_backward_##suffix##_16), KERNEL(lsda_backward_##suffix##_32), KERNEL(lsda_backward_##suffix##_64), \
        KERNEL(lsda_backward_##suffix##_128), KERNEL(lsda_table_gradient_##suffix)
KERNELS(lsda_backward, ENTRIES(f32), ENTRIES(bf16), ENTRIES(f16))
