// Counter-based random numbers, Philox 4x32-10 (Salmon et al., SC 2011): the numbers of src/random.rs, bit for bit.
#pragma once
#include "common/kernel.cuh"

// One stream of numbers, addressed by index.
struct Philox {
    u32 key[2];
    u64 stream;

    // The four words of block `index` of stream `number`.
    __device__ __forceinline__ uint4 block_at(u64 index, u64 number) const {
        u32 x = u32(index), y = u32(index >> 32), z = u32(number), w = u32(number >> 32);
        u32 k0 = key[0], k1 = key[1];
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const u64 low = u64(x) * 0xD2511F53u, high = u64(z) * 0xCD9E8D57u;
            x = u32(high >> 32) ^ y ^ k0;
            z = u32(low >> 32) ^ w ^ k1;
            y = u32(high);
            w = u32(low);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        uint4 words;
        words.x = x, words.y = y, words.z = z, words.w = w;
        return words;
    }

    // Words 4 `index` to 4 `index` + 3.
    __device__ __forceinline__ uint4 block(u64 index) const { return block_at(index, stream); }

    // An independent stream, numbered within this one.
    __device__ __forceinline__ Philox fork(u64 index) const {
        const uint4 words = block_at(index, ~u64(0) - stream);
        return {{key[0], key[1]}, u64(words.y) << 32 | words.x};
    }

    // Number `index`: 32 uniform bits.
    __device__ __forceinline__ u32 bits(u64 index) const {
        const uint4 words = block(index / 4);
        const u32 word = u32(index % 4);
        return word == 0 ? words.x : word == 1 ? words.y : word == 2 ? words.z : words.w;
    }

    // Number `index`, uniform in [0, 1), with 24 bits.
    __device__ __forceinline__ float uniform(u64 index) const { return unit(bits(index)); }

    // A word as a number in [0, 1).
    static __device__ __forceinline__ float unit(u32 word) { return float(word >> 8) * (1.0f / 16777216.0f); }
};

// A kernel parameter that names a stream. 56 bytes:
//
//   bytes   0   4   8       16    24     28        32                56
//           key[2]  stream  cell  depth  reserved  forks[0..3]
//
// A captured graph repeats its arguments at every replay. Where `cell` is not null, the stream's number is therefore
// read from there when the kernel runs, and the host changes it between replays. Either way the stream is then forked
// `depth` times, by forks[0], forks[1], …
struct RandomStream {
    u32 key[2];
    u64 stream;
    const u64* cell;
    u32 depth;
    u32 reserved;
    u64 forks[3];

    __device__ __forceinline__ Philox resolve() const {
        Philox generator{{key[0], key[1]}, cell ? *cell : stream};
#pragma unroll
        for (u32 i = 0; i < 3; ++i) {
            if (i < depth) generator = generator.fork(forks[i]);
        }
        return generator;
    }
};
static_assert(sizeof(RandomStream) == 56 && alignof(RandomStream) == 8);
