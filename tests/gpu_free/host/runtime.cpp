// The threads of a block as fibres, the order in which they run, and what they may not do.
//
// A warp that waits for nobody else runs on, so warps drift as far apart as barriers allow. What CUDA leaves undefined
// ends the process with a line: a barrier that some threads skip, a shuffle whose mask lacks a lane that calls it or
// names one that does not, a shuffle from a lane outside the mask.
// Under ThreadSanitizer a switch of fibres orders nothing; only barriers do. A shuffle moves a register and orders
// no memory, as CUDA says. Blocks follow one another: races between blocks are the PTX interpreter's part.
// This file is compiled without a sanitizer: the kernel's accesses are watched, not the bookkeeping.
// -D SANITIZER_ADDRESS, -D SANITIZER_THREAD: which one is to be told of the fibres.
#include "fibres.h"

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#if defined(SANITIZER_THREAD)
#include <sanitizer/tsan_interface.h>
#else  // the annotations of the other build do nothing
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
constexpr unsigned __tsan_switch_to_fiber_no_sync = 1;
#endif
#if defined(SANITIZER_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

extern "C" char __start_block_shared[] __attribute__((weak));  // what cuda_host.h makes of __shared__
extern "C" char __stop_block_shared[] __attribute__((weak));

namespace fibres {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr size_t STACK = 256 * 1024;

enum class State { ready, at_warp, at_block, done };

struct Place {
    const char* file = "";
    int line = 0;
};

struct Fibre {
    ucontext_t context;
    uint3 thread;
    unsigned number;  // in the block
    State state = State::done;
    Place place;      // where it waits
    unsigned mask;    // of the lanes that it waits for
    unsigned source;  // lane that it reads in a shuffle
    uint64_t value, received;
    char* waits_on[WARP];
    char keys[2];     // ThreadSanitizer orders by addresses; one is used again only when the other has been passed
    bool odd = false; // which key the next warp barrier uses
    void* stack;
    void* sanitizer;

    unsigned lane() const { return number % WARP; }
};

// Forward, backward, or drawn anew at every step.
class Order {
  public:
    explicit Order(int64_t kind) : kind_(kind), random_(static_cast<uint64_t>(kind)) {}
    size_t pick(size_t count) { return kind_ == 0 ? 0 : kind_ == 1 ? count - 1 : random_() % count; }

  private:
    int64_t kind_;
    std::mt19937_64 random_;
};

class Block {
  public:
    explicit Block(dim3 size) {
        fibres_ = std::vector<Fibre>(size.x * size.y * size.z);
        for (unsigned number = 0; number < fibres_.size(); ++number) {
            Fibre& fibre = fibres_[number];
            fibre.number = number;
            fibre.thread = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
            fibre.sanitizer = __tsan_create_fiber(0);
            fibre.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (fibre.stack == MAP_FAILED) fail("no memory for %zu stacks", fibres_.size());
        }
    }

    ~Block() {
        for (Fibre& fibre : fibres_) {
            __tsan_destroy_fiber(fibre.sanitizer);
            munmap(fibre.stack, STACK);
        }
    }

    // Run one block from beginning to end.
    void run(Launch launch, void* const* arguments, Order& order) {
        launch_ = launch;
        arguments_ = arguments;
        order_ = &order;
        if (__start_block_shared) poison(__start_block_shared, __stop_block_shared);
        __tsan_release(&begin_);
        for (Fibre& fibre : fibres_) {
            fibre.state = State::ready;
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack;
            fibre.context.uc_stack.ss_size = STACK;
            fibre.context.uc_link = nullptr;
            makecontext(&fibre.context, &Block::enter, 0);
        }
        const unsigned warps = static_cast<unsigned>((fibres_.size() + WARP - 1) / WARP);
        for (;;) {
            std::vector<unsigned> waiting(warps);  // that may still move before the next barrier
            for (unsigned warp = 0; warp < warps; ++warp) waiting[warp] = warp;
            while (!waiting.empty()) {
                const size_t at = order_->pick(waiting.size());
                if (!step(waiting[at])) waiting.erase(waiting.begin() + static_cast<long>(at));
            }
            if (finished()) break;
            release_block();
        }
        __tsan_acquire(&end_);
    }

    // Called by a fibre: wait in `state`, and let others run.
    void wait(State state, Place place) {
        Fibre& fibre = *current_;
        fibre.place = place;
        fibre.state = state;
        leave(fibre);
    }

    Fibre& current() { return *current_; }
    char* barrier_key() { return &barrier_keys_[odd_]; }

    static inline std::unique_ptr<Block> running;  // used again: a fibre is costly under ThreadSanitizer

  private:
    // Let one fibre of a warp run, or all that wait for one another go on. False where nothing of the warp can move.
    bool step(unsigned warp) {
        unsigned ready[WARP], count = 0;
        const unsigned first = warp * WARP;
        const unsigned last = std::min<unsigned>(first + WARP, static_cast<unsigned>(fibres_.size()));
        for (unsigned number = first; number < last; ++number) {
            if (fibres_[number].state == State::ready) ready[count++] = number;
        }
        if (count) {
            resume(fibres_[ready[order_->pick(count)]]);
            return true;
        }
        for (unsigned number = first; number < last; ++number) {
            if (fibres_[number].state == State::at_warp && release_warp(first, last, fibres_[number])) return true;
        }
        return false;
    }

    bool release_warp(unsigned first, unsigned last, const Fibre& one) {
        const Place place = one.place;
        const unsigned mask = one.mask;
        for (unsigned lane = 0; lane < WARP; ++lane) {
            if (!(mask >> lane & 1)) continue;
            const Fibre* other = first + lane < last ? &fibres_[first + lane] : nullptr;
            if (!other || other->state != State::at_warp) return false;  // `finished` says so if it never comes
            if (other->place.line != place.line || other->mask != mask) {
                fail("%s:%d: lane %u waits with mask %08x, lane %u at line %d with mask %08x", place.file, place.line,
                     one.lane(), mask, lane, other->place.line, other->mask);
            }
        }
        for (unsigned lane = 0; lane < WARP; ++lane) {
            if (!(mask >> lane & 1)) continue;
            Fibre& fibre = fibres_[first + lane];
            if (!(mask >> fibre.source & 1)) {
                fail("%s:%d: lane %u reads lane %u, which mask %08x leaves out", place.file, place.line, lane,
                     fibre.source, mask);
            }
            fibre.received = fibres_[first + fibre.source].value;
            for (unsigned peer = 0; peer < WARP; ++peer) {
                Fibre& other = fibres_[first + peer];
                fibre.waits_on[peer] = mask >> peer & 1 ? &other.keys[other.odd] : nullptr;
            }
        }
        for (unsigned lane = 0; lane < WARP; ++lane) {
            if (mask >> lane & 1) fibres_[first + lane].state = State::ready;
        }
        return true;
    }

    bool finished() {
        bool all = true;
        for (const Fibre& fibre : fibres_) {
            if (fibre.state == State::at_warp) {
                fail("%s:%d: thread %u waits with mask %08x for a lane that never comes", fibre.place.file,
                     fibre.place.line, fibre.number, fibre.mask);
            }
            all = all && fibre.state == State::done;
        }
        return all;
    }

    void release_block() {
        const Fibre& first = *std::find_if(fibres_.begin(), fibres_.end(), [](const Fibre& f) { return f.state == State::at_block; });
        for (Fibre& fibre : fibres_) {
            if (fibre.state == State::done) {
                fail("%s:%d: thread %u waits at a barrier; thread %u has returned", first.place.file, first.place.line,
                     first.number, fibre.number);
            }
            if (fibre.place.line != first.place.line) {
                fail("%s:%d: thread %u waits at this barrier, thread %u at that of line %d", first.place.file,
                     first.place.line, first.number, fibre.number, fibre.place.line);
            }
        }
        for (Fibre& fibre : fibres_) fibre.state = State::ready;
        odd_ = !odd_;
    }

    // Bytes that are NaN in every float type: what is read of them before it is written shows.
    static void poison(char* from, const char* to) {
        for (volatile char* byte = from; byte != to; ++byte) *byte = static_cast<char>(0xff);
    }

    void resume(Fibre& fibre) {
        void* fake_stack = nullptr;
        current_ = &fibre;
        thread_index = fibre.thread;
        __sanitizer_start_switch_fiber(&fake_stack, fibre.stack, STACK);
        __tsan_switch_to_fiber(fibre.sanitizer, __tsan_switch_to_fiber_no_sync);
        swapcontext(&context_, &fibre.context);
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
    }

    void leave(Fibre& fibre) {
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(fibre.state == State::done ? nullptr : &fake_stack, stack_, stack_size_);
        __tsan_switch_to_fiber(scheduler_, __tsan_switch_to_fiber_no_sync);
        swapcontext(&fibre.context, &context_);
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
    }

    static void enter() {
        Block& block = *running;
        __sanitizer_finish_switch_fiber(nullptr, &block.stack_, &block.stack_size_);
        __tsan_acquire(&block.begin_);
        block.launch_(block.arguments_);
        __tsan_release(&block.end_);
        Fibre& fibre = *block.current_;
        fibre.state = State::done;
        block.leave(fibre);
    }

    Launch launch_;
    void* const* arguments_;
    Order* order_;
    std::vector<Fibre> fibres_;
    ucontext_t context_;  // of the scheduler, as what follows
    void* scheduler_ = __tsan_get_current_fiber();
    const void* stack_ = nullptr;
    size_t stack_size_ = 0;
    Fibre* current_ = nullptr;
    char begin_ = 0, end_ = 0;   // keys of ThreadSanitizer: two, or who comes late would be ordered after who is done
    char barrier_keys_[2] = {};  // used in turn, as a fibre's
    bool odd_ = false;
};

void wait_for_lanes(Fibre& fibre, const char* file, int line, unsigned mask) {
    if (!(mask >> fibre.lane() & 1)) fail("%s:%d: mask %08x lacks lane %u, which calls", file, line, mask, fibre.lane());
    fibre.mask = mask;
    Block::running->wait(State::at_warp, {file, line});
}

// The lane that a shuffle reads; its own where the move leaves the segment of `width` lanes.
unsigned source_lane(Move move, unsigned lane, unsigned operand, unsigned width) {
    const unsigned segment = lane & ~(width - 1), offset = lane - segment;
    switch (move) {
        case Move::index: return segment + operand % width;
        case Move::up: return operand <= offset ? lane - operand : lane;
        case Move::down: return offset + operand < width ? lane + operand : lane;
        default: return (lane ^ operand) < segment + width ? lane ^ operand : lane;
    }
}

}  // namespace

void block_barrier(const char* file, int line) {
    char* key = Block::running->barrier_key();
    __tsan_release(key);
    Block::running->wait(State::at_block, {file, line});
    __tsan_acquire(key);
}

void warp_barrier(const char* file, int line, unsigned mask) {
    Fibre& fibre = Block::running->current();
    fibre.source = fibre.lane();
    fibre.odd = !fibre.odd;
    __tsan_release(&fibre.keys[fibre.odd]);
    wait_for_lanes(fibre, file, line, mask);
    for (char* key : fibre.waits_on) {
        if (key) __tsan_acquire(key);
    }
}

uint64_t exchange(const char* file, int line, Move move, unsigned mask, uint64_t bits, unsigned operand, unsigned width) {
    Fibre& fibre = Block::running->current();
    fibre.value = bits;
    fibre.source = source_lane(move, fibre.lane(), operand, width);
    wait_for_lanes(fibre, file, line, mask);
    return fibre.received;
}

void run_blocks(Launch launch, void* const* arguments, int64_t order_kind) {
    static dim3 made_for(0, 0, 0);
    const dim3 size = block_size, grid = grid_size;
    if (size.x != made_for.x || size.y != made_for.y || size.z != made_for.z) {
        Block::running = std::make_unique<Block>(size);
        made_for = size;
    }
    Order order(order_kind);
    std::vector<unsigned> numbers(grid.x * grid.y * grid.z);
    for (unsigned number = 0; number < numbers.size(); ++number) numbers[number] = number;
    while (!numbers.empty()) {
        const size_t at = order.pick(numbers.size());
        const unsigned number = numbers[at];
        numbers.erase(numbers.begin() + static_cast<long>(at));
        block_index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
        Block::running->run(launch, arguments, order);
    }
}

}  // namespace fibres
