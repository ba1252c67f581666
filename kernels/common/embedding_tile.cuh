// Cross-scale embeddings as products over a tile of the image in shared memory: what is staged, which rows, columns and
// terms the products of each kernel have, and how a warp takes them from the tile.
//
// Rows of the products are groups: `group` output positions side by side, so that a group's windows begin at a multiple
// of 16 bytes in the staged tile, wherever ldmatrix may read (a stem of 3 channels and stride 4 in 16 bits: 2 positions
// of 24 bytes). A row of windows is one run of memory there, and the tile itself is the matrix: nothing is unfolded.
//
// Columns of a kernel are its channels for one position of the group (a strip for each position), or, where that wastes
// less, those of all positions together (joint): 2 x 12 channels fill 3 tiles of 8 columns, 12 would fill 12 of 16.
// Terms of a strip are the run of each row of its windows, from the 16 bytes in which it begins to those in which it
// ends, weights being zero where the run has more than the window. Taken as they are the image's values there meet
// zeros, so an infinity or a NaN reaches its neighbours within the group and 16 bytes too.
//
// Strips are cut into pieces of at most 4 tiles of columns. A step is 16 terms.
#pragma once
#include "common/embedding.cuh"
#include "common/mma.cuh"

// Of a block: rows of the products, and warps.
constexpr u32 TILE_GROUPS = 128, TILE_WARPS = 8, TILE_THREADS = 32 * TILE_WARPS;
constexpr u32 STEP = 16;            // terms
constexpr u32 FRAGMENT = STEP * 8;  // elements of a step's tile of columns
constexpr u32 MOST_SCALED_CHANNELS = 16;
constexpr u32 MOST_GROUP = 16;  // positions

// How pixels lie in memory and what they stand for. As `Pixels` in src/ops/cross_scale_embedding/gpu.
struct Pixels {
    u32 type;            // of memory: 0 as the result, 1 f32, 2 u8
    u32 channels_first;  // (batch, channel, y, x), else (batch, y, x, channel)
    u32 scaled;          // value * scale + shift, for each channel
    float scale[MOST_SCALED_CHANNELS], shift[MOST_SCALED_CHANNELS];

    // Which element of memory it is.
    __device__ __forceinline__ u64 place(const Embedding& e, u32 image, u32 y, u32 x, u32 channel) const {
        const u64 line = u64(image) * (channels_first ? e.channels : 1) + (channels_first ? channel : 0);
        const u64 pixel = (line * e.height + y) * e.width + x;
        return channels_first ? pixel : pixel * e.channels + channel;
    }
    // Elements from a channel to the next, and from a pixel of a row to the next.
    __device__ __forceinline__ u64 plane(const Embedding& e) const {
        return channels_first ? u64(e.height) * e.width : 1;
    }
    __device__ __forceinline__ u32 across(const Embedding& e) const { return channels_first ? 1 : e.channels; }
    // What a stored value stands for.
    __device__ __forceinline__ float value(float stored, u32 channel) const {
        return scaled ? fmaf(stored, scale[channel], shift[channel]) : stored;
    }
};

// Pixels as the products take them: channels last, in their type.
struct PlainPixels {
    static constexpr u32 type = 0;

    __device__ __forceinline__ u64 place(const Embedding& e, u32 image, u32 y, u32 x, u32 channel) const {
        return ((u64(image) * e.height + y) * e.width + x) * e.channels + channel;
    }
    __device__ __forceinline__ u64 plane(const Embedding&) const { return 1; }
    __device__ __forceinline__ u32 across(const Embedding& e) const { return e.channels; }
    __device__ __forceinline__ float value(float stored, u32) const { return stored; }
};

// How a layer is cut. As `Tiling` in src/ops/cross_scale_embedding/tiling.rs.
struct Tiling {
    u32 group;                           // positions
    u32 images, rows, columns;           // of a block: images, rows of positions, groups of a row
    u32 slice_channels, channel_slices;  // channels staged at a time; all, or a multiple of 16
    u32 band, bands;                     // rows of the largest window staged at a time
    u32 tile_rows, pitch;                // of each image of the tile, and chunks of 16 bytes of a row
    u32 swizzle;                         // 7, or 0 where groups are an odd number of chunks apart
    u32 split, rounds;                   // pieces, the first, whose terms 4 warps share; a quarter of the others
    u32 run;                             // elements that are copied at once as they are, or 0
    u32 joint[MOST_KERNELS], tiles[MOST_KERNELS];  // of a kernel: one strip for the group; tiles of a piece

    __device__ __forceinline__ u32 groups() const { return images * rows * columns; }
    __device__ __forceinline__ u32 slices() const { return channel_slices * bands; }
    __device__ __forceinline__ u32 tile_chunks() const { return divide_up(images * tile_rows * pitch, 8u) * 8; }
    // Where a chunk stands, so that equal chunks of neighbouring groups lie in different banks.
    __device__ __forceinline__ u32 place(u32 chunk) const { return chunk ^ (chunk >> 3 & swizzle); }
};

// Some columns of a kernel with all of its terms.
struct Piece {
    u32 kernel, position, positions;  // the strip's first position in the group, and how many it has
    u32 column, columns;              // the piece's first, and how many the strip has
    u32 tiles;
    u32 side, out, first;          // of the kernel
    u32 inset;                     // rows of the largest window above the kernel's
    u32 start, front, row_chunks;  // of a row: its first chunk in the tile, elements before its first term, chunks
    u32 steps;                     // of a slice of channels
    u64 fragments;                 // before the piece's own, of all slices
};

// Calls `f(piece)` with the first piece of every strip and the number of its pieces until it returns true.
template <class T, class F> __device__ __forceinline__ void for_each_strip(const Embedding& e, const Tiling& t, F f) {
    constexpr u32 CHUNK = 16 / sizeof(T);
    const u32 largest = (e.sides[0] - e.stride) / 2;
    u64 fragments = 0;
#pragma unroll 1
    for (u32 i = 0; i < e.kernels; ++i) {
        Piece piece;
        piece.kernel = i;
        piece.side = e.sides[i];
        piece.out = e.outs[i];
        piece.first = e.firsts[i];
        piece.tiles = t.tiles[i];
        piece.inset = largest - (piece.side - e.stride) / 2;
        piece.positions = t.joint[i] ? t.group : 1;
        piece.column = 0;
        piece.columns = piece.positions * piece.out;
        const u32 pieces = divide_up(piece.columns, piece.tiles * 8);
#pragma unroll 1
        for (piece.position = 0; piece.position < t.group; piece.position += piece.positions) {
            const u32 begin = (piece.inset + piece.position * e.stride) * t.slice_channels;
            const u32 length = (piece.side + (piece.positions - 1) * e.stride) * t.slice_channels;
            piece.start = begin / CHUNK;
            piece.front = begin % CHUNK;
            piece.row_chunks = divide_up(piece.front + length, CHUNK);
            piece.steps = divide_up(piece.side * piece.row_chunks * CHUNK, STEP);
            piece.fragments = fragments;
            if (f(piece, pieces)) return;
            fragments += u64(pieces) * t.channel_slices * piece.steps * piece.tiles;
        }
    }
}

// Piece `number` of all; one without tiles where there are fewer.
template <class T>
__device__ __forceinline__ void find_piece(Piece& piece, const Embedding& e, const Tiling& t, u32 number) {
    piece.tiles = 0;
    for_each_strip<T>(e, t, [&](const Piece& strip, u32 pieces) {
        if (number >= pieces) {
            number -= pieces;
            return false;
        }
        piece = strip;
        piece.column = number * strip.tiles * 8;
        piece.fragments += u64(number) * t.channel_slices * strip.steps * strip.tiles;
        return true;
    });
}

// Where the block's groups are.
struct TilePlace {
    u32 image, row, column;  // of the block's first group; columns in groups

    __device__ __forceinline__ TilePlace(const Embedding& e, const Tiling& t, u32 tile) {
        const u32 across = divide_up(divide_up(e.columns(), t.group), t.columns), down = divide_up(e.rows(), t.rows);
        column = tile % across * t.columns;
        row = tile / across % down * t.rows;
        image = tile / across / down * t.images;
    }
};

// One group of the block.
struct Group {
    u32 image, row, column;  // in the block
    bool inside;             // of the block and the map

    __device__ __forceinline__ Group(const Embedding& e, const Tiling& t, const TilePlace& at, u32 number) {
        image = number / (t.rows * t.columns);
        row = number / t.columns % t.rows;
        column = number % t.columns;
        inside = image < t.images && at.image + image < e.batch && at.row + row < e.rows() &&
                 (at.column + column) * t.group < e.columns();
    }
    // First chunk of the group's largest window in the tile; somewhere in the tile where the block has no such group.
    template <class T> __device__ __forceinline__ u32 chunk(const Embedding& e, const Tiling& t) const {
        const u32 step = t.group * e.stride * t.slice_channels * u32(sizeof(T)) / 16;
        return image < t.images ? (image * t.tile_rows + row * e.stride) * t.pitch + column * step : 0;
    }
    // A position of the group, counted in the batch; `inside` where the map has it.
    __device__ __forceinline__ u64 position(const Embedding& e, const Tiling& t, const TilePlace& at, u32 of_group,
                                            bool& valid) const {
        const u32 x = (at.column + column) * t.group + of_group;
        valid = inside && x < e.columns();
        return (u64(at.image + image) * e.rows() + at.row + row) * e.columns() + x;
    }
};

// One pixel's channel from memory, as it counts.
template <class T>
__device__ __forceinline__ float pixel_value(const void* input, const Embedding& e, const Pixels& p, u32 image, u32 y,
                                             u32 x, u32 channel) {
    const u64 at = p.place(e, image, y, x, channel);
    const float value = p.type == 0   ? to_float(static_cast<const T*>(input)[at])
                        : p.type == 1 ? static_cast<const float*>(input)[at]
                                      : to_float(static_cast<const u8*>(input)[at]);
    return p.value(value, channel);
}

// A chunk's worth of neighbours of a row of the tile from (x, channel) on, as they count; `channels` are staged of each
// pixel, from `first_channel` on. Zeros outside of the map. `Stored` is what lies in memory.
template <class Stored, u32 CHUNK, class Format>
__device__ __forceinline__ void load_pixels(float (&values)[CHUNK], const void* input, const Embedding& e,
                                            const Format& p, u32 image, u32 y, u32 x, u32 channel, u32 first_channel,
                                            u32 channels) {
    const u32 across = p.across(e);
    const u64 plane = p.plane(e);
    const Stored* row = static_cast<const Stored*>(input) + p.place(e, image, y, 0, first_channel);
#pragma unroll
    for (u32 j = 0; j < CHUNK; ++j) {
        const bool inside = x < e.width && first_channel + channel < e.channels;
        values[j] = inside ? p.value(to_float(row[x * across + channel * plane]), first_channel + channel) : 0;
        if (++channel == channels) channel = 0, ++x;
    }
}

// Begins to copy 16, 8 or 4 bytes, zeros where none are valid.
__device__ __forceinline__ void copy_run(void* to, const void* from, u32 bytes, u32 valid) {
    if (bytes == 16) {
        async_copy<16>(to, from, valid);
    } else if (bytes == 8) {
        async_copy<8>(to, from, valid);
    } else {
        async_copy<4>(to, from, valid);
    }
}

// Stages the rows from `first_row` on of the largest windows, `rows` of them beyond those of one row of positions, and
// a slice of channels; zeros outside of the map. Complete after `async_commit`, `async_wait` and a barrier.
template <class T, u32 THREADS, class Format>
__device__ __forceinline__ void stage_pixels(T* tile, const void* input, const Embedding& e, const Tiling& t,
                                             const Format& p, const TilePlace& at, u32 channel_slice, u32 first_row,
                                             u32 rows) {
    constexpr u32 CHUNK = 16 / sizeof(T);
    const u32 margin = (e.sides[0] - e.stride) / 2, first_channel = channel_slice * t.slice_channels;
    const u32 origin_y = at.row * e.stride + first_row - margin;  // these wrap around above and left of the map
    const u32 origin_x = at.column * t.group * e.stride - margin;
    const bool whole = t.channel_slices == 1 && t.slice_channels == e.channels;
    const Divisor by_pitch(t.pitch), by_rows(rows), by_channels(t.slice_channels);
    for (u32 i = linear_thread(); i < t.images * rows * t.pitch; i += THREADS) {
        u32 chunk, row;
        const u32 block_image = by_rows.divide(by_pitch.divide(i, chunk), row);
        T* to = tile + t.place((block_image * rows + row) * t.pitch + chunk) * CHUNK;
        const u32 image = at.image + block_image, y = origin_y + row;
        const bool row_inside = image < e.batch && y < e.height;
        if (t.run == 0) {
            float values[CHUNK] = {};
            if (row_inside) {
                u32 channel;
                const u32 x = origin_x + by_channels.divide(chunk * CHUNK, channel);
                const auto load = [&](auto stored) {
                    load_pixels<decltype(stored)>(values, input, e, p, image, y, x, channel, first_channel,
                                                  t.slice_channels);
                };
                if (p.type == 2) {
                    load(u8());
                } else if (sizeof(T) == 2 && p.type == 1) {
                    load(float());
                } else {
                    load(T());
                }
            }
            store_from_float(to, values);
            continue;
        }
        // A run lies in the row where it is staged whole, else in a pixel's channels, as a chunk does.
        u32 channel;
        const u32 x = origin_x + by_channels.divide(chunk * CHUNK, channel);
        const u32 along = whole ? origin_x * e.channels + chunk * CHUNK : first_channel + channel;
        const u32 end = !row_inside ? 0 : whole ? e.width * e.channels : x < e.width ? e.channels : 0;
        const T* line = static_cast<const T*>(input) + (u64(image) * e.height + y) * e.width * e.channels;
        if (!whole) line += u64(x) * e.channels;
        const u32 bytes = t.run * u32(sizeof(T));
#pragma unroll 1
        for (u32 j = 0; j < CHUNK; j += t.run) {
            const bool inside = along + j < end;
            copy_run(to + j, inside ? line + (along + j) : static_cast<const T*>(input), bytes, inside ? bytes : 0);
        }
    }
}
