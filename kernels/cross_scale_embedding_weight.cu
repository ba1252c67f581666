// Cross-scale embedding, gradients of the weights and biases. With windows as in common/embedding.cuh and dy the output's
// gradient:
//
//   dw_i(f, c, t) = sum over positions (b, o) of dy(b, o, first_i + f) x(b, h_i(o, t), c)
//   dbias_i(f) = sum over positions (b, o) of dy(b, o, first_i + f)
//
// Tiling: as products they are the forward pass with sums and terms exchanged (common/embedding_tile.cuh): rows are the
// terms of a strip, 16 in a step, columns its channels, and the sum goes over the groups. A unit is up to 4 steps by a
// piece of up to 4 tiles of columns, the 64 sums of each lane of a warp. A block of 16 warps has up to 16 units of one
// kernel and one slice of channels; it walks over the tiles of positions of its part, one in use while the next is on its
// way, and stages of each the rows of pixels under its units' windows, once for all of them, and its columns of dy, as
// (group, column), zeros where the map has no such position. A step of 16 groups takes the windows by a transposing
// ldmatrix where they lie, and so dy. Further blocks sum columns of dy for the bias. Every part stores its sums in f32;
// a second kernel adds, for every weight, those of all positions of the group and parts, in this order.
// bf16 and f16 run on tensor cores, f32 by fused multiply-adds. The sums of all kernels are more than the registers of a
// multiprocessor (0.5 MB for the stem below), so blocks share them out, and each stages the rows that its own need.
// Images that are not stored as the products take them are normalised before (cross_scale_embedding_backward.cu): the
// conversion would be done again for each block.
// As in the forward pass zeros meet pixels beside a window, here of dy too, so an infinity or a NaN in the image reaches
// its neighbours within the group and 16 bytes, and the taps of positions beyond the map in the last tiles.
//
// FLOPs: 2 positions sum_i s_i^2 C out_i, and those of the products that are not useful. Of CrossFormer-S in bf16, in
// brackets for windows that every tile of 128 terms by 32 columns (64 from 8 channels on) gathers for itself, and the
// bytes from the second-level cache for each position:
//
//   map             channels                           useful           bytes
//   224 x 224 x 3   48, 24, 12, 12 of 4, 8, 16, 32     81 % ( 38 %)     1.3 kB ( 11 kB)
//   56 x 56 x 96    96, 96 of 2, 4                     82 % ( 75 %)     4.8 kB ( 12 kB)
//   28 x 28 x 192   192, 192                           88 % (100 %)    16.5 kB ( 35 kB)
//   14 x 14 x 384   384, 384                           77 % (100 %)    57.2 kB (138 kB)
//
// The stem loses terms beside the windows of 2 positions, which start at other bytes of 16; the others groups of the last
// step of a tile (49 of 64 in the last layer).
// Bytes from device memory: x and dy about once; 8 for each sum of a part, as many as weights packed for the forward.
// On an H200 the stem at batch 256 is 85 GFLOP, 108 us at 790 TFLOP/s; 231 MB once and 54 MB of partial sums, 66 us at
// 4.3 TB/s.
//
// tensor cores: cross_scale_embedding_weight_gradient_bf16, cross_scale_embedding_weight_gradient_f16

#include "common/kernel.cuh"

#include "common/embedding_tile.cuh"

namespace {

// As in src/ops/cross_scale_embedding/tiling/weights.rs.
constexpr u32 WARPS = 16, THREADS = 32 * WARPS;
constexpr u32 DOWN = 4, MOST_TILES = 4;  // steps and tiles of a unit
constexpr u32 MOST_GROUPS = 256, MOST_COLUMNS = WARPS * MOST_TILES * 8;
constexpr u32 BIAS_COLUMNS = 32;
// Columns that no position of the group has.
constexpr u32 ABSENT = ~0u;

// How the work is shared out. As `Split` in src/ops/cross_scale_embedding/tiling/weights.rs.
struct Split {
    u32 tiles, part;                              // tiles of positions: of all, and of a part
    u32 buffer;                                   // chunks of what is staged at a time
    u32 run;                                      // elements of dy that are copied at once, or 0
    u32 units[MOST_KERNELS], each[MOST_KERNELS];  // of a kernel in a slice of channels, and of its blocks at most

    __device__ __forceinline__ u32 blocks(u32 kernel) const { return divide_up(units[kernel], each[kernel]); }
};

// What a warp sums.
struct Unit {
    Piece piece;
    u32 first, steps;  // of the piece
    u32 tile;          // of the kernel's, counted over its strips

    __device__ __forceinline__ u32 first_row(u32 step_chunks) const { return first * step_chunks / piece.row_chunks; }
    __device__ __forceinline__ u32 end_row(u32 step_chunks) const {
        return min(divide_up((first + steps) * step_chunks, piece.row_chunks), piece.side);
    }
};

// Unit `number` of a kernel: strips, then pieces, then steps.
template <class T>
__device__ __forceinline__ void find_unit(Unit& unit, const Embedding& e, const Tiling& t, u32 kernel, u32 number) {
    u32 tile = 0;
    for_each_strip<T>(e, t, [&](const Piece& strip, u32 pieces) {
        if (strip.kernel != kernel) return false;
        const u32 down = divide_up(strip.steps, DOWN);
        if (number >= pieces * down) {
            number -= pieces * down;
            tile += pieces * strip.tiles;
            return false;
        }
        const u32 piece = number / down, part = number % down;
        unit.piece = strip;
        unit.piece.column = piece * strip.tiles * 8;
        unit.piece.fragments += u64(piece) * t.channel_slices * strip.steps * strip.tiles;
        unit.first = part * strip.steps / down;
        unit.steps = (part + 1) * strip.steps / down - unit.first;
        unit.tile = tile + piece * strip.tiles;
        return true;
    });
}

// What the threads of a block look up.
struct Tables {
    Unit units[WARPS];
    u32 offsets[MOST_COLUMNS];  // of a column of the block: elements of dy from a group's first, or ABSENT
    u16 bases[MOST_GROUPS];     // of a group: first chunk of its windows in the tile
    u8 positions[MOST_COLUMNS];
};

// A lane's sums, and where it reads their terms: in the matrix that it addresses for ldmatrix, else in rows g and g + 8.
template <class T> struct Sums {
    static constexpr u32 PLACES = sizeof(T) == 2 ? DOWN : 2 * DOWN;

    float sums[DOWN][MOST_TILES][4];
    u32 places[PLACES];  // chunks
};

template <class T> struct WeightGradient {
    static constexpr bool TENSOR = sizeof(T) == 2;
    static constexpr u32 CHUNK = 16 / sizeof(T), STEP_CHUNKS = STEP / CHUNK, TILE_CHUNKS = 8 / CHUNK;
    static constexpr u32 PLACES = Sums<T>::PLACES;

    const T *input, *gradient;
    const Embedding& e;
    const Tiling& t;
    const Split& split;
    Tables& tables;
    T* staged;  // two buffers by turns, of pixels and, behind them, dy

    // Of the block.
    u32 slice, units;
    u32 first_row, rows;      // of the largest window, and how many are staged of each image
    u32 first_tile, columns;  // of dy
    u32 pixel_chunks, pitch;  // chunks of the pixels, and of a row of dy: an odd number, so that banks differ
    u32 steps;                // of 16 groups

    // Finds the units of block `block` of a kernel.
    __device__ __forceinline__ void begin(Sums<T>& product, u32 kernel, u32 block) {
        const u32 blocks = split.blocks(kernel), all = split.units[kernel], each = split.each[kernel];
        slice = block / blocks;
        const u32 first = block % blocks * each;
        units = min(each, all - first);
        if (lane() == 0 && warp() < units) find_unit<T>(tables.units[warp()], e, t, kernel, first + warp());
        __syncthreads();
        const Unit &front = tables.units[0], &back = tables.units[units - 1];
        u32 end_row = 0;
        first_row = front.piece.side;
#pragma unroll 1
        for (u32 i = 0; i < units; ++i) {
            first_row = min(first_row, tables.units[i].first_row(STEP_CHUNKS));
            end_row = max(end_row, tables.units[i].end_row(STEP_CHUNKS));
        }
        rows = (t.rows - 1) * e.stride + end_row - first_row;
        first_tile = front.tile;
        columns = (back.tile + back.piece.tiles - first_tile) * 8;
        pixel_chunks = divide_up(t.images * rows * t.pitch, 8u) * 8;
        pitch = columns / CHUNK | 1;
        steps = divide_up(t.groups(), 16u);
        fill_tables(front.piece);
        if (warp() < units) find_places(product, tables.units[warp()]);
        first_row += front.piece.inset;
    }

    __device__ __forceinline__ void fill_tables(const Piece& piece) const {
        const u32 group_chunks = t.group * e.stride * t.slice_channels / CHUNK;
        for (u32 i = linear_thread(); i < steps * 16; i += THREADS) {
            const u32 row = i / t.columns, image = row / t.rows;
            const u32 line = image * rows + row % t.rows * e.stride;
            tables.bases[i] = u16(i < t.groups() ? line * t.pitch + i % t.columns * group_chunks : 0);
        }
        const u32 strip = divide_up(piece.columns, piece.tiles * 8) * piece.tiles * 8;
        for (u32 i = linear_thread(); i < columns; i += THREADS) {
            const u32 column = first_tile * 8 + i, of_strip = column % strip;
            const u32 position = column / strip * piece.positions + of_strip / piece.out;
            const u32 offset = position * e.out_channels + piece.first + of_strip % piece.out;
            tables.offsets[i] = of_strip < piece.columns ? offset : ABSENT;
            tables.positions[i] = u8(position);
        }
    }

    // Steps beyond the unit's are those of its first chunk; nobody stores their sums.
    __device__ __forceinline__ void find_places(Sums<T>& product, const Unit& unit) const {
        const Piece& piece = unit.piece;
#pragma unroll
        for (u32 i = 0; i < PLACES; ++i) {
            const u32 of_step = TENSOR ? lane() / 8 % 2 : i % 2 * 2 + lane() / 16;
            const u32 chunk = (unit.first + (TENSOR ? i : i / 2)) * STEP_CHUNKS + of_step;
            const bool inside = chunk < min((unit.first + unit.steps) * STEP_CHUNKS, piece.side * piece.row_chunks);
            const u32 used = inside ? chunk : unit.first * STEP_CHUNKS;
            product.places[i] = (used / piece.row_chunks - first_row) * t.pitch + piece.start + used % piece.row_chunks;
        }
    }

    __device__ __forceinline__ T* buffer(u32 tile) const { return staged + tile % 2 * split.buffer * CHUNK; }

    // Begins to stage a tile of positions.
    __device__ __forceinline__ void stage(u32 tile) const {
        const TilePlace at(e, t, tile);
        stage_pixels<T, THREADS>(buffer(tile), input, e, t, PlainPixels(), at, slice, first_row, rows);
        T* to = buffer(tile) + pixel_chunks * CHUNK;
        const u32 across = columns / CHUNK;
        for (u32 i = linear_thread(); i < steps * 16 * across; i += THREADS) {
            const u32 number = i / across, first = i % across * CHUNK;
            const Group group(e, t, at, number);
            bool inside;
            const T* from = gradient + group.position(e, t, at, 0, inside) * e.out_channels;
            const u32 left = inside ? e.columns() - (at.column + group.column) * t.group : 0;  // positions
            T* chunk = to + number * pitch * CHUNK + first;
            const auto there = [&](u32 column) {
                return tables.offsets[column] != ABSENT && tables.positions[column] < left;
            };
            if (split.run == 0) {
                Vector<T, CHUNK> values;
#pragma unroll
                for (u32 j = 0; j < CHUNK; ++j) {
                    values[j] = there(first + j) ? from[tables.offsets[first + j]] : from_float<T>(0);
                }
                store(chunk, values);
                continue;
            }
#pragma unroll 1
            for (u32 j = 0; j < CHUNK; j += split.run) {
                const bool valid = there(first + j);
                const u32 bytes = split.run * u32(sizeof(T));
                copy_run(chunk + j, valid ? from + tables.offsets[first + j] : gradient, bytes, valid ? bytes : 0);
            }
        }
    }

    // Adds the products of a tile of positions, for TILES tiles of columns from chunk `column` of dy on.
    template <u32 TILES> __device__ __forceinline__ void accumulate(Sums<T>& product, const T* tile, u32 column) const {
        const T* gradients = tile + (pixel_chunks + column) * CHUNK;
        const u32 swizzle = t.swizzle;
        if constexpr (TENSOR) {
            gradients += lane() % 16 * pitch * CHUNK;
            const u16* bases = tables.bases + lane() / 16 * 8 + lane() % 8;
#pragma unroll 1
            for (u32 step = 0; step < steps; ++step) {
                u32 a[DOWN][4], b[TILES][2];
                const u32 base = bases[step * 16];
#pragma unroll
                for (u32 i = 0; i < DOWN; ++i) {
                    const u32 chunk = base + product.places[i];
                    ldmatrix_x4_transposed(a[i], tile + (chunk ^ (chunk >> 3 & swizzle)) * CHUNK);
                }
                const T* from = gradients + step * 16 * pitch * CHUNK;
#pragma unroll
                for (u32 j = 0; j + 1 < TILES; j += 2) {
                    u32 pair[4];
                    ldmatrix_x4_transposed(pair, from + (j + lane() / 16) * CHUNK);
                    b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
                }
                if constexpr (TILES % 2 == 1) ldmatrix_x2_transposed(b[TILES - 1], from + (TILES - 1) * CHUNK);
#pragma unroll
                for (u32 i = 0; i < DOWN; ++i) {
#pragma unroll
                    for (u32 j = 0; j < TILES; ++j) mma_m16n8k16<T>(product.sums[i][j], a[i], b[j]);
                }
            }
        } else {
            gradients += lane() % 4 * 2;
            tile += lane() / 4 % 4;
#pragma unroll 1
            for (u32 group = 0; group < t.groups(); ++group) {
                const T* windows = tile + tables.bases[group] * CHUNK;
                Vector<T, 2> b[TILES];
#pragma unroll
                for (u32 j = 0; j < TILES; ++j) b[j] = load<2>(gradients + group * pitch * CHUNK + j * 8);
#pragma unroll
                for (u32 i = 0; i < PLACES; ++i) {
                    const float a = windows[product.places[i] * CHUNK];
#pragma unroll
                    for (u32 j = 0; j < TILES; ++j) {
                        float* to = product.sums[i / 2][j] + i % 2 * 2;
                        to[0] = fmaf(a, b[j][0], to[0]);
                        to[1] = fmaf(a, b[j][1], to[1]);
                    }
                }
            }
        }
    }

    // The unit's share of a tile of positions.
    __device__ __forceinline__ void accumulate(Sums<T>& product, const T* tile, const Unit& unit) const {
        const u32 column = (unit.tile - first_tile) * TILE_CHUNKS;
        switch (unit.piece.tiles) {
            case 1:
                accumulate<1>(product, tile, column);
                break;
            case 2:
                accumulate<2>(product, tile, column);
                break;
            case 3:
                accumulate<3>(product, tile, column);
                break;
            default:
                accumulate<4>(product, tile, column);
        }
    }

    // Stores the sums of tiles [first, end) of positions at their fragments.
    __device__ __forceinline__ void run(Sums<T>& product, float* partials, u32 first, u32 end) const {
        const Unit& unit = tables.units[warp()];
        const bool busy = warp() < units;
#pragma unroll
        for (auto& row : product.sums) {
#pragma unroll
            for (auto& fragment : row) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
        }
        __syncthreads();  // the tables are there
#pragma unroll 1
        for (u32 tile = first; tile <= end; ++tile) {
            async_wait<0>();
            __syncthreads();  // the tile before is there, and no warp needs the one before that
            if (tile < end) stage(tile);
            async_commit();
            if (tile > first && busy) accumulate(product, buffer(tile - 1), unit);
        }
        if (!busy) return;
        partials += (unit.piece.fragments + (u64(slice) * unit.piece.steps + unit.first) * unit.piece.tiles) * FRAGMENT;
#pragma unroll
        for (u32 i = 0; i < DOWN; ++i) {
#pragma unroll
            for (u32 j = 0; j < MOST_TILES; ++j) {
                if (i >= unit.steps || j >= unit.piece.tiles) continue;
                float* to = partials + (i * unit.piece.tiles + j) * FRAGMENT + lane() * 4;
                store(to, bits_as<Vector<float, 4>>(product.sums[i][j]));
            }
        }
    }
};

// Elements of a part's sums: `fragments` of the weights, then the biases.
__device__ __forceinline__ u64 part_size(u64 fragments, const Embedding& e) {
    return fragments + divide_up(e.out_channels, 4u) * 4;
}

// Sums 32 columns of dy over the positions of a part, a column in every 16th thread.
template <class T>
__device__ __forceinline__ void bias_gradient(float* sums, const T* gradient, const Embedding& e, u32 block,
                                              float* shared) {
    const u32 column = block * BIAS_COLUMNS + lane(), parts = gridDim.y;
    const u32 first = u32(u64(e.positions()) * blockIdx.y / parts),
              end = u32(u64(e.positions()) * (blockIdx.y + 1) / parts);
    float sum = 0;
    if (column < e.out_channels) {
        for (u32 row = first + warp(); row < end; row += WARPS)
            sum += to_float(gradient[u64(row) * e.out_channels + column]);
    }
    shared[linear_thread()] = sum;
    __syncthreads();
    if (warp() > 0 || column >= e.out_channels) return;
    for (u32 i = 1; i < WARPS; ++i) sum += shared[i * BIAS_COLUMNS + lane()];
    sums[column] = sum;
}

// A part of the tiles for each blockIdx.y. Blocks along x: kernels, of each the slices of channels, of each the units;
// then columns of the bias.
template <class T>
__device__ __forceinline__ void weight_gradient(float* partials, u64 fragments, const T* input, const T* gradient,
                                                const Embedding& e, const Tiling& t, const Split& split, Tables& tables,
                                                unsigned char* shared) {
    partials += blockIdx.y * part_size(fragments, e);
    u32 block = blockIdx.x;
    const u32 kernel = e.find(block, [&](u32 i) { return split.blocks(i) * t.channel_slices; });
    if (kernel == e.kernels) {
        bias_gradient(partials + fragments, gradient, e, block, reinterpret_cast<float*>(shared));
        return;
    }
    WeightGradient<T> work{input, gradient, e, t, split, tables, reinterpret_cast<T*>(shared)};
    Sums<T> product;
    work.begin(product, kernel, block);
    const u32 first = blockIdx.y * split.part;
    work.run(product, partials, first, min(first + split.part, split.tiles));
}

// Adds the parts, in order, for the weight and the bias of the kernel of blockIdx.y.
template <class T>
__device__ __forceinline__ void add_parts(const PerKernel<T>& weight_gradients, const PerKernel<T>& bias_gradients,
                                          const float* partials, u64 fragments, u32 parts, const Embedding& e,
                                          const Tiling& t, Piece* strips) {
    constexpr u32 CHUNK = 16 / sizeof(T);
    const u32 kernel = blockIdx.y, side = e.sides[kernel], out = e.outs[kernel];
    if (linear_thread() == 0) {
        for_each_strip<T>(e, t, [&](const Piece& strip, u32) {
            if (strip.kernel == kernel) strips[strip.position / strip.positions] = strip;
            return strip.kernel > kernel;
        });
    }
    __syncthreads();
    const u64 weights = u64(out) * e.depth(kernel), size = part_size(fragments, e);
    const auto sum_of = [&](float sum, const float* partial) {
#pragma unroll 4
        for (u32 part = 0; part < parts; ++part) sum += partial[part * size];
        return sum;
    };
    T *weight_gradient = weight_gradients[kernel], *bias_gradient = bias_gradients[kernel];
    for (u64 i = grid_thread(); i < weights + out; i += grid_threads()) {
        const u32 f = u32(i % out), term = u32(i / out);
        if (i >= weights) {
            bias_gradient[f] = from_float<T>(sum_of(0, partials + fragments + e.firsts[kernel] + f));
            continue;
        }
        const u32 tap = term / e.channels, channel = term % e.channels, ty = tap / side, tx = tap % side;
        float sum = 0;
#pragma unroll 1
        for (u32 position = 0; position < t.group; ++position) {
            const Piece& strip = strips[t.joint[kernel] ? 0 : position];
            const u32 of_strip = position - strip.position, column = of_strip * out + f, piece = strip.tiles * 8;
            const u32 along = (of_strip * e.stride + tx) * t.slice_channels + channel % t.slice_channels;
            const u32 run = ty * strip.row_chunks * CHUNK + strip.front + along;
            const u64 slice = u64(column / piece) * t.channel_slices + channel / t.slice_channels;
            const u64 fragment = (slice * strip.steps + run / STEP) * strip.tiles + column % piece / 8;
            const u32 lane = run % 8 * 4 + column % 8 / 2, element = run % STEP / 8 * 2 + column % 2;
            sum = sum_of(sum, partials + (strip.fragments + fragment) * FRAGMENT + lane * 4 + element);
        }
        weight_gradient[(u64(f) * e.channels + channel) * side * side + tap] = from_float<T>(sum);
    }
}

}  // namespace

#define INSTANCES(suffix, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) cross_scale_embedding_weight_gradient_##suffix(         \
        float* partials, u64 fragments, const T* input, const T* gradient, Embedding embedding, Tiling tiling,       \
        const __grid_constant__ Split split) {                                                                       \
        DYNAMIC_SHARED(shared);                                                                                      \
        SHARED_ARRAY(Tables, tables, [1]);                                                                           \
        weight_gradient<T>(partials, fragments, input, gradient, embedding, tiling, split, *tables, shared);         \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) cross_scale_embedding_add_parts_##suffix(                      \
        PerKernel<T> weight_gradients, PerKernel<T> bias_gradients, const float* partials, u64 fragments, u32 parts, \
        Embedding embedding, Tiling tiling) {                                                                        \
        SHARED_ARRAY(Piece, strips, [MOST_GROUP]);                                                                   \
        add_parts<T>(weight_gradients, bias_gradients, partials, fragments, parts, embedding, tiling, strips);       \
    }
FOR_EACH_FLOAT(INSTANCES)

KERNELS(cross_scale_embedding_weight, KERNEL_FLOATS(cross_scale_embedding_weight_gradient),
        KERNEL_FLOATS(cross_scale_embedding_add_parts))
