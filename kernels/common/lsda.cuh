// What both directions of long/short-distance attention share: which tokens form a group, their way between memory and
// tiles, and the logits.
#pragma once
#include "common/philox.cuh"
#include "common/warp_product.cuh"

// As the arguments of src/ops/lsda/gpu.rs.
struct Problem {
    u32 batch, height, width, heads, head_width;
    u32 group[2], interval[2], origin[2];  // along y and x
    u32 lines[2];                          // rows and columns of groups: regions times phases
    u32 tokens;                            // of the largest group
    u32 blocks;                            // for each head

    __device__ __forceinline__ u64 groups() const { return u64(batch) * lines[0] * lines[1]; }
    __device__ __forceinline__ u32 table_rows() const { return (2 * group[0] - 1) * (2 * group[1] - 1); }
    // Elements of q, k or v of a token.
    __device__ __forceinline__ u64 channels() const { return u64(heads) * head_width; }
};

// Positions first, first + interval, …, `count` of them: one axis of a group.
struct Line {
    u32 first, count;
};

__device__ __forceinline__ Line line_of(const Problem& problem, u32 axis, u32 number) {
    const u32 group = problem.group[axis], interval = problem.interval[axis], origin = problem.origin[axis];
    const u32 extent = axis == 0 ? problem.height : problem.width;
    const u32 base = number / interval * (group * interval) + number % interval;
    const u32 before = origin > base ? divide_up(origin - base, interval) : 0;  // steps that fall before the map
    const u32 skipped = before < group ? before : group;
    const u32 start = base + skipped * interval;
    const u32 first = start > origin ? start - origin : 0;
    const u32 inside = extent > first ? divide_up(extent - first, interval) : 0;
    return {first, inside < group - skipped ? inside : group - skipped};
}

// A group of one image. Past the last group: no tokens.
struct Group {
    u64 image;
    Line rows, columns;

    __device__ __forceinline__ u32 count() const { return rows.count * columns.count; }
};

__device__ __forceinline__ Group group_of(const Problem& problem, u64 number) {
    if (number >= problem.groups()) return {0, {0, 0}, {0, 0}};
    const u64 line = number / problem.lines[1];
    const u32 column = u32(number % problem.lines[1]), row = u32(line % problem.lines[0]);
    return {line / problem.lines[0], line_of(problem, 0, row), line_of(problem, 1, column)};
}

// Tiles of queries and keys. A warp for 16 queries; what a wide head costs in shared memory and registers is saved in
// tokens.
template <class T, u32 D> struct Tiling {
    static constexpr u32 TOKENS = D * sizeof(T) >= 256 ? 32 : 64;
    static constexpr u32 WARPS = TOKENS / 16, THREADS = 32 * WARPS;
};

// The part of a block that works on one group: groups of up to 16 or 32 tokens share a block of four warps.
template <class T, u32 D> struct Slot {
    u32 rows;    // lines of its tiles: the tokens of the largest group in whole 16s, at most TOKENS
    u32 count;   // slots of a block
    u32 number;  // this thread's, `count` or more where it has none
    u32 thread, threads;

    __device__ __forceinline__ explicit Slot(const Problem& problem) {
        constexpr u32 TOKENS = Tiling<T, D>::TOKENS;
        const u32 padded = divide_up(problem.tokens, 16u) * 16;
        rows = padded < TOKENS ? padded : TOKENS;
        count = TOKENS / rows;
        threads = rows * 2;
        number = threadIdx.x / threads;
        thread = threadIdx.x % threads;
    }

    // First row of this warp in a tile.
    __device__ __forceinline__ u32 warp_row() const { return thread / 32 * 16; }
    __device__ __forceinline__ bool active() const { return number < count; }
    // Tokens of which numbers and positions are kept: those of the largest group, in whole tiles.
    __device__ __forceinline__ u32 capacity(const Problem& problem) const {
        return divide_up(problem.tokens, rows) * rows;
    }
};

// Where the tokens of a slot's group are. A token's position is y (2 G_w − 1) + x with (y, x) local: the table row for
// a query and a key is the difference of their positions + `centre`.
struct Tokens {
    u32* number;  // in the image, row-major
    i32* position;

    __device__ __forceinline__ void find(const Problem& problem, const Group& group, u32 capacity, u32 thread,
                                         u32 threads) const {
#pragma unroll 1
        for (u32 i = thread; i < capacity; i += threads) {
            const bool inside = i < group.count();
            const u32 y = inside ? i / group.columns.count : 0, x = inside ? i % group.columns.count : 0;
            const u32 row = group.rows.first + y * problem.interval[0];
            number[i] = row * problem.width + group.columns.first + x * problem.interval[1];
            position[i] = i32(y * (2 * problem.group[1] - 1) + x);
        }
    }
};

__device__ __forceinline__ i32 centre(const Problem& problem) { return i32(problem.table_rows() / 2); }

// The factor that makes e^x = 2^(x · LOG2_E).
constexpr float LOG2_E = 1.4426950408889634f;

// The column of the bias table for one head, for logits in base 2.
template <class T>
__device__ __forceinline__ void load_table(float* table, const T* bias, const Problem& problem, u32 head, u32 threads) {
    if (bias == nullptr) return;
#pragma unroll 1
    for (u32 row = threadIdx.x; row < problem.table_rows(); row += threads) {
        table[row] = to_float(bias[u64(row) * problem.heads + head]) * LOG2_E;
    }
}

// Begins to copy `count` tokens' `width` elements to the first lines of a tile; zeros to its other lines up to `rows`,
// and to the columns from `width` to D. Token n's elements begin at source + number[n] stride.
template <class T, u32 D>
__device__ __forceinline__ void load_tokens(T* tile, const T* source, u64 stride, const u32* number, u32 count,
                                            u32 width, const Slot<T, D>& slot) {
    using Tile = SharedTile<T, 16, D>;
    const bool vectors = width % Tile::CHUNK == 0;
#pragma unroll 1
    for (u32 i = slot.thread; i < slot.rows * Tile::CHUNKS; i += slot.threads) {
        const u32 row = i / Tile::CHUNKS, column = i % Tile::CHUNKS * Tile::CHUNK;
        const bool inside = row < count && column < width;
        const T* from = inside ? source + number[row] * stride + column : source;
        T* to = tile + Tile::offset(row, i % Tile::CHUNKS);
        if (vectors) {
            async_copy<16>(to, from, inside ? 16 : 0);
        } else {
            Vector<T, Tile::CHUNK> elements;
#pragma unroll
            for (u32 e = 0; e < Tile::CHUNK; ++e) {
                elements[e] = inside && column + e < width ? from[e] : from_float<T>(0);
            }
            store(to, elements);
        }
    }
}

// Copies the warp's 16 lines from `row` on of a tile to the tokens that they belong to. Call __syncwarp before.
template <class T, u32 D>
__device__ __forceinline__ void store_tokens(T* target, u64 stride, const u32* number, const T* tile, u32 row,
                                             u32 count, u32 width) {
    using Tile = SharedTile<T, 16, D>;
    const bool vectors = width % Tile::CHUNK == 0;
#pragma unroll 1
    for (u32 i = lane(); i < 16 * Tile::CHUNKS; i += 32) {
        const u32 line = row + i / Tile::CHUNKS, column = i % Tile::CHUNKS * Tile::CHUNK;
        if (line >= count || column >= width) continue;
        T* to = target + number[line] * stride + column;
        const Vector<T, Tile::CHUNK> elements = load<Tile::CHUNK>(tile + Tile::offset(line, i % Tile::CHUNKS));
        if (vectors) {
            store(to, elements);
        } else {
#pragma unroll
            for (u32 e = 0; e < Tile::CHUNK; ++e) {
                if (column + e < width) to[e] = elements[e];
            }
        }
    }
}

// The bias of the pairs in a tile of queries against a tile of keys; positions from the tiles' first tokens on.
struct PairBias {
    const float* table;
    bool there;
    const i32 *query_position, *key_position;
    i32 centre;
};

// The warp's logits in base 2, from the products q · k in `sums`: −∞ from key `keys` on.
template <u32 N>
__device__ __forceinline__ void finish_logits(float (&sums)[N][4], const PairBias& bias, u32 row, u32 keys,
                                              float scale) {
    const u32 lane = warp_product::fresh_lane(), first = row + lane / 4;
    const i32 query[2] = {bias.query_position[first] + bias.centre, bias.query_position[first + 8] + bias.centre};
#pragma unroll
    for (u32 n = 0; n < N; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 key = n * 8 + lane % 4 * 2 + i % 2;
            if (key < keys) {
                sums[n][i] *= scale;
                if (bias.there) sums[n][i] += bias.table[query[i / 2] - bias.key_position[key]];
            } else {
                sums[n][i] = -INFINITY;
            }
        }
    }
}

// The largest logit of each of a lane's two rows, over the row.
template <u32 N> __device__ __forceinline__ float row_max(const float (&logits)[N][4], u32 half) {
    float largest = -INFINITY;
#pragma unroll
    for (u32 n = 0; n < N; ++n) largest = Max{}(Max{}(largest, logits[n][half * 2]), logits[n][half * 2 + 1]);
    return warp_max<4>(largest);
}

// What to subtract from logits before exp2: their maximum, or 0 where all of them are −∞.
__device__ __forceinline__ float shift_of(float largest) { return largest == -INFINITY ? 0 : largest; }

// Dropout of probabilities, as an argument of both kernels. A number of 16 bits decides on a pair, so that a block of
// Philox serves eight of them. For a query with the number t in its image and the key in place k of its group:
//
//   block  ((image heads + head) tokens of an image + t) 4 ceil(tokens of a group / 32) + k / 32 * 4 + k % 8 / 2
//   word   k / 8 % 4, its lower half where k is even
//
// In the places of a warp's product a lane then needs whole blocks. src/ops/lsda/dropout.rs draws the same numbers.
struct Dropout {
    RandomStream stream;
    u32 threshold;  // of 65536: the smallest number that keeps; 0 where there is no dropout
    float scale;    // of what is kept

    __device__ __forceinline__ bool there() const { return threshold > 0; }

    // Finds the stream's number, for all threads after a barrier.
    __device__ __forceinline__ void resolve(u64* number) const {
        if (there() && threadIdx.x == 0) *number = stream.resolve().stream;
    }

    // What a lane keeps of a tile of the warp's 16 queries and 8 N keys: bit 16 h + 2 n + i for sums[n][2 h + i].
    // `first` is the number of the head's first query, `tokens` those of the tile's queries from the warp's row on, `key`
    // the first key's place in the group, a multiple of 32, and `keys` how many there are.
    template <u32 N>
    __device__ __forceinline__ u32 kept(const Problem& problem, const u64* number, u64 first, const u32* tokens,
                                        u32 key, u32 keys) const {
        const Philox generator{{stream.key[0], stream.key[1]}, *number};
        const u64 blocks = divide_up(problem.tokens, 32u) * 4;
        const u32 lane = warp_product::fresh_lane();
        u32 bits = 0;
#pragma unroll 1
        for (u32 part = 0; part < N / 2; ++part) {
            const u32 half = part % 2, n = part / 2 * 4;
            if (n * 8 >= keys) break;
            const u64 row = first + tokens[lane / 4 + half * 8];
            const uint4 words = generator.block(row * blocks + (key + n * 8) / 32 * 4 + lane % 4);
            const u32 low = half * 16 + n * 2;
            bits |= (pair(words.x) | pair(words.y) << 2 | pair(words.z) << 4 | pair(words.w) << 6) << low;
        }
        return bits;
    }

    // Multiplies by 0 what is not kept, and the rest by `scale`.
    template <u32 N> static __device__ __forceinline__ void apply(float (&sums)[N][4], u32 bits, float scale) {
#pragma unroll
        for (u32 e = 0; e < N * 4; ++e) {
            sums[e / 4][e % 4] = (bits >> (e % 4 / 2 * 16 + e / 4 * 2 + e % 2) & 1) ? sums[e / 4][e % 4] * scale : 0;
        }
    }

  private:
    __device__ __forceinline__ u32 pair(u32 word) const {
        return u32((word & 0xFFFFu) >= threshold) | u32(word >> 16 >= threshold) << 1;
    }
};
static_assert(sizeof(Dropout) == 64);
// What the number of the dropout's stream takes of shared memory, with its alignment.
constexpr u32 STREAM_BYTES = 16;
