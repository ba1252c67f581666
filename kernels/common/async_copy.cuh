// Copies from global to shared memory that run beside the computation (cp.async, sm_80).
//
// A thread issues copies, closes a group of them, and waits until all but the latest N of its groups have come; what
// other threads have copied is there after a barrier that follows their waits. The emulator keeps to the latest moment
// that this allows: from issue to wait the destination holds NaNs, so that a wait or a barrier that is missing shows.
#pragma once
#include "common/index.cuh"

#ifndef __CUDACC__
namespace async_copy_detail {

struct Copy {
    void* shared;
    const void* global;
    u32 bytes, valid;
    u64 group;
};

// What a thread has issued and not waited for.
struct Queue {
    u64 run = 0;
    u64 group = 0;  // the one that is open
    std::vector<Copy> copies;

    // Completes all groups before `end`.
    void complete(u64 end) {
        size_t done = 0;
        for (; done < copies.size() && copies[done].group < end; ++done) {
            const Copy& copy = copies[done];
            memset(copy.shared, 0, copy.bytes);
            memcpy(copy.shared, copy.global, copy.valid);
        }
        copies.erase(copies.begin(), copies.begin() + done);
    }
};

// The running thread's queue. What a block left behind is forgotten: its memory may be gone.
inline Queue& queue() {
    static thread_local std::vector<Queue> queues(1024);
    Queue& queue = queues[linear_thread()];
    if (queue.run != gridgrad_current->block->run) {
        queue.run = gridgrad_current->block->run;
        queue.group = 0;
        queue.copies.clear();
    }
    return queue;
}

template <u32 BYTES> struct alignas(BYTES) Word {
    unsigned char bytes[BYTES];
};

}  // namespace async_copy_detail
#endif

// Where a copy of 16 bytes leaves its data on the way: smaller ones always pass L1.
enum class CopyCache { L2, L1AndL2 };

// Begins to copy BYTES (4, 8 or 16), of which those after the first `valid` become zeros; with none valid, `global` is
// not read. Both addresses are multiples of BYTES.
template <u32 BYTES, CopyCache CACHE = CopyCache::L2>
__device__ __forceinline__ void async_copy(void* shared, const void* global, u32 valid = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#ifdef __CUDACC__
    if constexpr (BYTES == 16 && CACHE == CopyCache::L2) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "n"(BYTES), "r"(valid)
                     : "memory");
    }
#else
    using Word = async_copy_detail::Word<BYTES>;
    if (valid > 0) {
        // Touched where the copy is issued, so that an address out of bounds or misaligned is reported here.
        const Word& source = *static_cast<const Word*>(global);
        [[maybe_unused]] volatile unsigned char last = source.bytes[valid - 1];
    }
    Word poison;
    memset(poison.bytes, 0xFF, BYTES);
    *static_cast<Word*>(shared) = poison;
    async_copy_detail::Queue& queue = async_copy_detail::queue();
    queue.copies.push_back({shared, global, BYTES, valid, queue.group});
#endif
}

// Closes the group of the copies since the last one, of none perhaps.
__device__ __forceinline__ void async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    ++async_copy_detail::queue().group;
#endif
}

// Waits until at most the latest PENDING groups are under way.
template <u32 PENDING> __device__ __forceinline__ void async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
    async_copy_detail::Queue& queue = async_copy_detail::queue();
    if (queue.group > PENDING) queue.complete(queue.group - PENDING);
#endif
}
