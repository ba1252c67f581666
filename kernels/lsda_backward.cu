// Long/short-distance attention with a position bias, backward. With S the logits, P their softmax and dO the gradient
// of the output, for each group and head:
//
//   dV = (P ∘ M)ᵀ dO   dP = dO Vᵀ ∘ M   dS = P ∘ (dP − rowsum(P ∘ dP))   dQ = dS K / sqrt d   dK = dSᵀ Q / sqrt d
//   dT[y_i − y_j, x_i − x_j] = the sum of dS_ij over images, groups and pairs
//
// where M is 1, or the factors of dropout, which are drawn again: 32 bits in a register of each lane.
//
// tensor cores: lsda_backward_bf16, lsda_backward_f16
// Tiling: as forward (lsda_forward.cu). S and P are computed again from q, k and T; nothing of them was saved. P and dS
// pass through shared memory, rounded to the storage type, since the gradients of keys sum over queries, which lie in
// other warps; dQ takes dS from there too, so that its registers are free.
// A group of one tile (up to 64 tokens, 32 for 256-byte heads) is read once: 5 products. Larger groups take two passes,
// the first for each query's maximum, sum and rowsum(P ∘ dP): 7 products. Queries stream by the tile of keys, whose dK
// and dV are parked in shared memory between them, in device memory where there is no room; dQ is added up in f32 in
// device memory, always by the same thread and in the order of the keys.
// The table's gradient: where all groups have one tile, each thread adds up its dS of groups of equal shape in shared
// memory, and it goes to the warp's table there when the shape changes (at once for larger groups and heads of 128): one
// query at a time, whose keys all have different rows. The tables of a block are added in order, and those of the blocks
// of a head by `lsda_table_gradient`. Every order is fixed.
//   useful part of the products, 49 tokens: as forward; 59 % of dV, dK and dQ
// Bytes: 7 values per token, head and channel (q, k, v, dO, dq, dk, dv). FLOPs: 10 N d per token and head: at N = 49 35
// per byte in 2-byte types, 57 with the padding, where an H200 has 180 (4.3 TB/s, 790 TFLOP/s): bound by memory.
// Roofline: CrossFormer-S, first stage, batch 256 in bf16 (802,816 tokens, 3 heads of 32): 1.08 GB, 251 us; 38 GFLOP, or
// 61 with the padding, 77 us. Memory binds, 3.2 times over.

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

// Sums of a thread in shared memory, THREADS apart so that the banks are all different.
template <u32 THREADS, u32 N> __device__ __forceinline__ void park(float* parked, const float (&sums)[N][4]) {
#pragma unroll
    for (u32 e = 0; e < N * 4; ++e) parked[e * THREADS + threadIdx.x] = sums[e / 4][e % 4];
}

template <u32 THREADS, u32 N> __device__ __forceinline__ void fetch(float (&sums)[N][4], const float* parked) {
#pragma unroll
    for (u32 e = 0; e < N * 4; ++e) sums[e / 4][e % 4] = parked[e * THREADS + threadIdx.x];
}

template <u32 N> __device__ __forceinline__ void multiply(float (&sums)[N][4], float factor) {
#pragma unroll
    for (u32 e = 0; e < N * 4; ++e) sums[e / 4][e % 4] *= factor;
}

template <class T, u32 D>
__device__ void lsda_backward(T* qkv_grad, float* tables, float* query_sums, float* parking, const T* qkv,
                              const T* bias, const T* grad, const Problem& problem, const Dropout& dropout) {
    constexpr u32 TILE = Tiling<T, D>::TOKENS, WARPS = Tiling<T, D>::WARPS, THREADS = Tiling<T, D>::THREADS;
    constexpr u32 COLUMNS = D == 16 || D * sizeof(T) == 512 ? 16 : 32;  // of dQ at once, as registers allow
    // Whether dS is added up over groups: where all have one tile, and wide heads leave room.
    const bool keep = bias != nullptr && D < 128 && problem.tokens <= TILE;
    DYNAMIC_SHARED(memory);
    const Slot<T, D> slot(problem);
    const u32 mine = slot.active() ? slot.number : 0;
    const u32 tile_size = slot.rows * D, pairs_size = slot.rows * TILE, slot_size = 4 * tile_size + 2 * pairs_size;
    const u32 capacity = slot.capacity(problem), row = slot.warp_row();
    T* query = reinterpret_cast<T*>(memory) + mine * slot_size;
    T *key = query + tile_size, *value = key + tile_size, *output_grad = value + tile_size;
    T *weights_tile = output_grad + tile_size, *grads_tile = weights_tile + pairs_size;
    u64* stream = reinterpret_cast<u64*>(reinterpret_cast<T*>(memory) + slot.count * slot_size);
    u32* numbers = reinterpret_cast<u32*>(stream) + STREAM_BYTES / 4 + mine * 5 * capacity;
    const Tokens tokens{numbers, reinterpret_cast<i32*>(numbers + capacity)};
    float* kept = reinterpret_cast<float*>(numbers + 2 * capacity);
    float* table = reinterpret_cast<float*>(numbers + (slot.count - mine) * 5 * capacity);
    float* table_grads = table + (bias ? problem.table_rows() : 0);
    float* table_grad = table_grads + warp() * problem.table_rows();
    // Sums of each thread that outlive a tile: dS where it is kept, dV and dK of groups of several tiles.
    const u64 parked_size = keep ? TILE * TILE : 2 * TILE * D;
    float* parked =
        parking ? parking + blockIdx.x * parked_size : table_grads + (bias ? WARPS * problem.table_rows() : 0);

    const u32 head = blockIdx.x % problem.heads, width = problem.head_width;
    const u64 channels = problem.channels(), image_tokens = u64(problem.height) * problem.width;
    const float scale = 1 / sqrtf(float(width));
    load_table(table, bias, problem, head, THREADS);
    dropout.resolve(stream);
    if (bias) {
        for (u32 i = threadIdx.x; i < WARPS * problem.table_rows(); i += THREADS) table_grads[i] = 0;
    }

    PairBias pair_bias{table, bias != nullptr, tokens.position, tokens.position, centre(problem)};
    float* staging = reinterpret_cast<float*>(weights_tile);
    u32 summed[2] = {0, 0};  // the shape of the groups whose dS is kept
#pragma unroll 1
    for (u64 first = u64(blockIdx.x / problem.heads) * slot.count;; first += u64(problem.blocks) * slot.count) {
        const bool after = first >= problem.groups();
        if (after && !keep) break;
        const Group group = slot.active() && !after ? group_of(problem, first + slot.number) : Group{0, {0, 0}, {0, 0}};
        const u32 count = group.count(), tiles = count > TILE ? divide_up(count, TILE) : 1;
        const u64 first_token = group.image * image_tokens * problem.heads + head;
        const u64 first_value = first_token * width;
        const u64 first_query = first_value + 2 * group.image * image_tokens * channels;
        // Pointers that live through all products would take registers: they are computed at each use.
        const auto offset = [](u64 elements) { return warp_product::fresh(elements); };
        const auto of_group = [&](auto* tensor) { return tensor + offset(first_value); };
        const auto query_of = [&](auto* tensor) { return tensor + offset(first_query); };
        __syncthreads();  // no warp needs anything of the last group
        if (keep) {
            if (after || group.rows.count != summed[0] || group.columns.count != summed[1]) {
                const u32 count = summed[0] * summed[1];
                float sums[TILE / 8][4];
                pair_bias.query_position = pair_bias.key_position = tokens.position;
                if (row < count) {
                    fetch<THREADS>(sums, parked);
                    fold<TILE>(table_grad, staging, sums, row, count, count, pair_bias);
                }
                clear(sums);
                park<THREADS>(parked, sums);
            }
            if (after) break;
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
                    u32 kept_bits = 0;
                    if (busy && dropout.there()) {
                        const u64 first = (group.image * problem.heads + head) * image_tokens;
                        kept_bits = dropout.kept<TILE / 8>(problem, stream, first, query_numbers + row, j * TILE, keys);
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
                        if (dropout.there()) Dropout::apply(grads, kept_bits, dropout.scale);
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
                            if (dropout.there()) Dropout::apply(weights, kept_bits, dropout.scale);
                        }
                    }
                    if (pass == 0) continue;
                    if (bias && !keep) {
                        if (busy) fold<TILE>(table_grad, staging, grads, row, queries, keys, pair_bias);
                        __syncthreads();  // no warp needs its staging, which lies in the tiles of others
                    } else if (keep && busy) {
#pragma unroll
                        for (u32 e = 0; e < TILE / 2; ++e) parked[e * THREADS + threadIdx.x] += grads[e / 4][e % 4];
                    }
                    if (busy) {
                        store_sums<T, TILE>(weights_tile, row, 0, weights);
                        store_sums<T, TILE>(grads_tile, row, 0, grads);
                    }
                    __syncthreads();
                    // dV, then dK: what is done goes out by the warp's lines of the values, which nobody needs any more.
                    if (slot.active() && row < keys) {
#pragma unroll 1
                        for (u32 part = 2; part > 0; --part) {
                            const bool of_values = part == 2;
                            const T *pairs = of_values ? weights_tile : grads_tile,
                                    *tile = of_values ? output_grad : query;
                            float* of_part = of_values ? parked : parked + TILE * D;
                            float sums[D / 8][4];
                            if (i == 0) {
                                clear(sums);
                            } else {
                                fetch<THREADS>(sums, of_part);
                            }
                            multiply_transposed<T, D, TILE>(sums, pairs, row, tile, queries);
                            if (i + 1 == tiles) {
                                multiply(sums, of_values ? 1 : scale);
                                __syncwarp();
                                store_sums<T, D>(value, row, 0, sums);
                                __syncwarp();
                                store_tokens<T, D>(query_of(qkv_grad) + part * channels, 3 * channels, key_numbers,
                                                   value, row, keys, width);
                            } else {
                                park<THREADS>(of_part, sums);
                            }
                        }
                    }
                    __syncthreads();
                    if (!busy) continue;
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
                        multiply_rows<T, D, TILE>(query_grad, grads_tile, row, key, column, keys);
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
            }
        }
    }
    if (bias == nullptr) return;
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

// Warps of a multiprocessor for which the compiler is to leave registers: 168 each, or all 255.
template <class T, u32 D> constexpr u32 WARPS_WANTED = sizeof(T) == 2 && D <= 32 ? 12 : 8;

#define INSTANCE(suffix, T, D)                                                                                    \
    extern "C" __global__ void __launch_bounds__(Tiling<T, D>::THREADS, WARPS_WANTED<T, D> / Tiling<T, D>::WARPS) \
        lsda_backward_##suffix##_##D(T* qkv_grad, float* tables, float* query_sums, float* parking, const T* qkv, \
                                     const T* bias, const T* grad, const __grid_constant__ Problem problem,       \
                                     const __grid_constant__ Dropout dropout) {                                   \
        lsda_backward<T, D>(qkv_grad, tables, query_sums, parking, qkv, bias, grad, problem, dropout);            \
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
