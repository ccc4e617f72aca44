// What a kernel's thread may ask of the others, and what a launch is; runtime.cpp makes the threads.
//
// A thread of a block is a fibre of one CPU thread: it runs until it has to wait for others.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include <vector_types.h>

namespace fibres {

constexpr unsigned WARP = 32;

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

enum class Move { index, up, down, exclusive_or };

void block_barrier(const char* file, int line);
void warp_barrier(const char* file, int line, unsigned mask = 0xffffffffu);

// Give `bits` to the lanes of `mask`, and return those of the lane that `operand` leads to.
uint64_t exchange(const char* file, int line, Move move, unsigned mask, uint64_t bits, unsigned operand, unsigned width);

template <class T>
T shuffle(const char* file, int line, Move move, unsigned mask, T value, unsigned operand, unsigned width = WARP) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(file, line, move, mask, bits, operand, width);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A kernel that takes its arguments as cuLaunchKernel gives them: one address for each.
using Launch = void (*)(void* const* arguments);

// Run every block of the grid, one after another; the order of lanes, warps and blocks: 0 forward, 1 backward, or a seed.
void run_blocks(Launch launch, void* const* arguments, int64_t order);

// End the process with a line.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Run the cases on stdin, write their outputs to stdout, and return the process's exit status.
int serve(Launch launch, size_t parameters);

template <auto KERNEL, class... Types, size_t... Index>
int serve_kernel(void (*)(Types...), std::index_sequence<Index...>) {
    const Launch launch = [](void* const* arguments) { KERNEL(*static_cast<std::remove_const_t<Types>*>(arguments[Index])...); };
    return serve(launch, sizeof...(Types));
}

template <auto KERNEL, class... Types>
int serve_kernel(void (*kernel)(Types...)) {
    return serve_kernel<KERNEL>(kernel, std::index_sequence_for<Types...>{});
}

}  // namespace fibres
