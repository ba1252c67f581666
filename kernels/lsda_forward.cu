// Long/short-distance attention with a position bias, forward (CrossFormer, section 3.2).
//
//   o_i = sum_j m_ij p_ij v_j,   p_i = softmax_j(q_i · k_j / sqrt d + T[y_i - y_j, x_i - x_j])
//
// over the tokens j of i's group, with m = 1, or in dropout 0 or 1 / (1 - rate).
// Tokens are found by index in the projection's layout (batch, token, 3, head, d), and written so. A group's tokens are
// the same for all heads; a unit of work is a group and a head.
//
// tensor cores: lsda_forward_bf16, lsda_forward_f16
// Tiling: a warp has 16 queries, a block of four 64, against tiles of 64 keys (32 by 32 for 256-byte heads). A group of
// up to 64 tokens, 49 in the models, is one tile: Q, K and V are read once, and nothing else but the output written.
// Larger groups stream over tiles of keys with a running maximum and sum, so that memory on chip does not grow with
// them; K and V are then read once for every 64 queries, from the second-level cache. Groups of up to 16 or 32 tokens
// share a block, 4 or 2 of them. A block keeps to one head, whose column of T it holds, and strides over the groups.
//   useful part of the products, 49 tokens: 77 % (64 rows) · 88 % (56 columns; 64 for p v) = 67 % of q k, 59 % of p v
//   16: 100 %, 25: 61 %, 36: 56 %, 64: 100 %, 196: 77 %, 256: 100 % of q k
// Two groups of 49 in 112 rows would make 88 % of the rows useful, but the warp between them needs the keys of both; it
// would save time only where products bind, and below they do not.
// Bytes: 4 values per token, head and channel (q, k, v, o). FLOPs: 4 N d per token and head for groups of N: at N = 49
// 24.5 per byte in 2-byte types, 40 with the padding, where an H200 has 180 (4.3 TB/s, 790 TFLOP/s): bound by memory.
// Roofline: CrossFormer-S, first stage, batch 256 in bf16 (802,816 tokens, 3 heads of 32): 617 MB, 143 us; 15 GFLOP, or
// 24 with the padding, 31 us. Memory binds, 4.7 times over. Dropout adds 25 million blocks of Philox of some 40 integer
// instructions: 70 us at 64 a cycle and multiprocessor, beside the copies.

#include "common/lsda.cuh"

// Queries of one tile: running maximum and sum of each of the lane's two rows, and the weighted sum of values.
template <u32 D> struct Running {
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    float output[D / 8][4];

    // Turns logits into weights relative to the new maximum, and rescales what came before.
    template <u32 N> __device__ __forceinline__ void weigh(float (&logits)[N][4]) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float next = Max{}(largest[half], row_max(logits, half));
            const float shift = shift_of(next), rescale = exp2f(largest[half] - shift);
            float added = 0;
#pragma unroll
            for (u32 n = 0; n < N; ++n) {
#pragma unroll
                for (u32 i = half * 2; i < half * 2 + 2; ++i) {
                    logits[n][i] = exp2f(logits[n][i] - shift);
                    added += logits[n][i];
                }
            }
            largest[half] = next;
            sum[half] = fmaf(sum[half], rescale, warp_sum<4>(added));
#pragma unroll
            for (u32 c = 0; c < D / 8; ++c) {
                output[c][half * 2] *= rescale;
                output[c][half * 2 + 1] *= rescale;
            }
        }
    }

    __device__ __forceinline__ void normalise(float scale) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float share = scale / sum[half];
#pragma unroll
            for (u32 c = 0; c < D / 8; ++c) {
                output[c][half * 2] *= share;
                output[c][half * 2 + 1] *= share;
            }
        }
    }
};

template <class T, u32 D>
__device__ void lsda_forward(T* output, const T* qkv, const T* bias, const Problem& problem, const Dropout& dropout) {
    constexpr u32 TILE = Tiling<T, D>::TOKENS, THREADS = Tiling<T, D>::THREADS;
    DYNAMIC_SHARED(memory);
    const Slot<T, D> slot(problem);
    const u32 tile_size = slot.rows * D, capacity = slot.capacity(problem);
    T* query = reinterpret_cast<T*>(memory) + (slot.active() ? slot.number : 0) * 3 * tile_size;
    T* key = query + tile_size;
    T* value = key + tile_size;
    u64* stream = reinterpret_cast<u64*>(reinterpret_cast<T*>(memory) + slot.count * 3 * tile_size);
    u32* numbers = reinterpret_cast<u32*>(stream) + STREAM_BYTES / 4;
    float* table = reinterpret_cast<float*>(numbers + slot.count * 2 * capacity);
    numbers += (slot.active() ? slot.number : 0) * 2 * capacity;
    const Tokens tokens{numbers, reinterpret_cast<i32*>(numbers + capacity)};

    const u32 head = blockIdx.x % problem.heads, width = problem.head_width, row = slot.warp_row();
    const u64 channels = problem.channels(), image_tokens = u64(problem.height) * problem.width;
    const float scale = LOG2_E / sqrtf(float(width));
    load_table(table, bias, problem, head, THREADS);
    dropout.resolve(stream);

    for (u64 first = u64(blockIdx.x / problem.heads) * slot.count; first < problem.groups();
         first += u64(problem.blocks) * slot.count) {
        const Group group = slot.active() ? group_of(problem, first + slot.number) : Group{0, {0, 0}, {0, 0}};
        const u32 count = group.count(), tiles = count > TILE ? divide_up(count, TILE) : 1;
        const T* source = qkv + (group.image * image_tokens * 3 * problem.heads + head) * width;
        T* target = output + (group.image * image_tokens * problem.heads + head) * width;
        __syncthreads();  // warps still write the tokens of the last group
        if (slot.active()) tokens.find(problem, group, capacity, slot.thread, slot.threads);

        for (u32 i = 0; i < tiles; ++i) {
            const u32 queries = count - i * TILE < TILE ? count - i * TILE : TILE;
            const bool busy = slot.active() && row < queries;
            Running<D> running;
            clear(running.output);
            for (u32 j = 0; j < tiles; ++j) {
                const u32 keys = count - j * TILE < TILE ? count - j * TILE : TILE;
                __syncthreads();  // the tokens are there, and no warp needs the last tiles
                if (slot.active()) {
                    const u32* key_numbers = numbers + j * TILE;
                    if (j == 0) {
                        load_tokens<T, D>(query, source, 3 * channels, numbers + i * TILE, queries, width, slot);
                    }
                    load_tokens<T, D>(key, source + channels, 3 * channels, key_numbers, keys, width, slot);
                    async_commit();
                    load_tokens<T, D>(value, source + 2 * channels, 3 * channels, key_numbers, keys, width, slot);
                    async_commit();
                }
                u32 kept = 0;
                if (busy && dropout.there()) {
                    const u64 first_query = (group.image * problem.heads + head) * image_tokens;
                    kept =
                        dropout.kept<TILE / 8>(problem, stream, first_query, numbers + i * TILE + row, j * TILE, keys);
                }
                async_wait<1>();
                __syncthreads();
                float logits[TILE / 8][4];
                if (busy) {
                    clear(logits);
                    multiply_by_transposed<T, D>(logits, query, row, key, keys);
                    const PairBias pair_bias{table, bias != nullptr, tokens.position + i * TILE,
                                             tokens.position + j * TILE, centre(problem)};
                    finish_logits(logits, pair_bias, row, keys, scale);
                    running.weigh(logits);
                    if (dropout.there()) Dropout::apply(logits, kept, 1.0f);
                }
                async_wait<0>();
                __syncthreads();
                if (busy) multiply_registers<T, D>(running.output, logits, value, 0, keys);
            }
            if (busy) {
                running.normalise(dropout.there() ? dropout.scale : 1);
                store_sums<T, D>(query, row, 0, running.output);  // in place of the warp's own queries
                __syncwarp();
                store_tokens<T, D>(target, channels, numbers + i * TILE, query, row, queries, width);
            }
        }
    }
}

// Warps of a multiprocessor for which the compiler is to leave registers: 128 each, 168, or all 255.
template <class T, u32 D> constexpr u32 WARPS_WANTED = D == 128 ? 8 : sizeof(T) == 2 && D == 32 ? 16 : 12;

#define INSTANCE(suffix, T, D)                                                                                       \
    extern "C" __global__ void __launch_bounds__(Tiling<T, D>::THREADS, WARPS_WANTED<T, D> / Tiling<T, D>::WARPS)    \
        lsda_forward_##suffix##_##D(T* output, const T* qkv, const T* bias, const __grid_constant__ Problem problem, \
                                    const __grid_constant__ Dropout dropout) {                                       \
        lsda_forward<T, D>(output, qkv, bias, problem, dropout);                                                     \
    }
#define WIDTHS(suffix, T) \
    INSTANCE(suffix, T, 16) INSTANCE(suffix, T, 32) INSTANCE(suffix, T, 64) INSTANCE(suffix, T, 128)
FOR_EACH_FLOAT(WIDTHS)

#define ENTRIES(suffix)                                                                                         \
    KERNEL(lsda_forward_##suffix##_16), KERNEL(lsda_forward_##suffix##_32), KERNEL(lsda_forward_##suffix##_64), \
        KERNEL(lsda_forward_##suffix##_128)
KERNELS(lsda_forward, ENTRIES(f32), ENTRIES(bf16), ENTRIES(f16))
