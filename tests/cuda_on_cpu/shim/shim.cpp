// The fibers behind cuda_runtime.h and threads.h: a scheduler that runs the threads of a block in a random order.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, bytes) 0
#endif
#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#else
#define VALGRIND_STACK_REGISTER(begin, end) 0
#define VALGRIND_MAKE_MEM_UNDEFINED(p, bytes) 0
#define VALGRIND_MAKE_MEM_NOACCESS(p, bytes) 0
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {
namespace {

constexpr std::size_t stack_bytes = 256 * 1024;
constexpr unsigned max_threads = 1024;
constexpr int shared_limit = 48 * 1024, shared_limit_opt_in = 227 * 1024;
constexpr int multiprocessors = 1;  // so that few rows already make a program stride

constexpr std::size_t global_alignment = 256;

unsigned seed() {
    const char* const text = std::getenv("LLMCORE_SHIM_SEED");
    return text == nullptr ? 1u : unsigned(std::atoi(text));
}

// Memory of exactly this size, so that AddressSanitizer sees who reads past it.
char* poisoned(std::size_t bytes, std::size_t alignment) {
    void* data = nullptr;
    if (posix_memalign(&data, std::max(alignment, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
    poison(data, bytes);
    return static_cast<char*>(data);
}

// A shared array. Half the time its address is a multiple of its alignment and of no more, as it may be on a card.
struct SharedArray {
    std::size_t bytes, alignment, gap;
    char *const start, *const data;

    SharedArray(std::size_t bytes, std::size_t alignment)
        : bytes(bytes), alignment(alignment), gap(random_number() % 2 == 0 ? alignment : 0),
          start(poisoned(gap + bytes, 2 * alignment)), data(start + gap) {
        (void)ASAN_POISON_MEMORY_REGION(start, gap);
        (void)VALGRIND_MAKE_MEM_NOACCESS(start, gap);
    }
    ~SharedArray() { std::free(start); }
    SharedArray(const SharedArray&) = delete;
    SharedArray& operator=(const SharedArray&) = delete;

    bool holds(const void* p, std::size_t count) const {
        return p >= data && static_cast<const char*>(p) + count <= data + bytes;
    }
};

// The lanes of a mask on their way to one instruction. Values of two meetings are kept: a lane that is quick to come to
// the next one must not overwrite what a slow lane has yet to read.
struct Meeting {
    const char* instruction = nullptr;
    Act act = nullptr;  // for an instruction that a warp executes as one
    unsigned mask = 0, arrived = 0, generation = 0, lanes[2] = {};
    std::uint64_t values[2][32] = {};
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    void* fake_stack = nullptr;  // AddressSanitizer's
    uint3 index{};
    unsigned number = 0;
    const char* waits_for = nullptr;
    std::shared_ptr<void> kept;  // of_this_thread()
    bool done = false;

    Fiber() { (void)VALGRIND_STACK_REGISTER(stack.get(), stack.get() + stack_bytes); }
};

struct Block {
    std::vector<Fiber*> fibers, ready;
    std::map<unsigned, std::map<unsigned, Meeting>> warps;  // by warp, then by mask
    std::vector<unsigned> priorities;                           // by warp; of equals all fibers are alike
    std::map<const void*, std::unique_ptr<SharedArray>> arrays;
    std::size_t dynamic_bytes = 0;
    unsigned alive = 0, at_barrier = 0;
    std::string mistake;
};

std::mutex one_launch;
std::mt19937 random_order(seed());
std::vector<std::unique_ptr<Fiber>> pool;
std::map<const void*, int> limits;
cudaError_t last_error = cudaSuccess;

ucontext_t scheduler;
Block* block = nullptr;
Fiber* running = nullptr;
const std::function<void()>* body_of_kernel = nullptr;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
void* scheduler_fake_stack = nullptr;
#endif

void to_scheduler() {
    Fiber* const self = running;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
    swapcontext(&self->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(Fiber* fiber) {
    running = fiber;
    threadIdx = fiber->index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack.get(), stack_bytes);
#endif
    swapcontext(&scheduler, &fiber->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void make_ready(Fiber* fiber) {
    fiber->waits_for = nullptr;
    block->ready.push_back(fiber);
}

const char at_syncthreads[] = "__syncthreads";
const char at_dynamic = 0;  // tags dynamic shared memory

void open_barrier_if_complete() {
    if (block->at_barrier == 0 || block->at_barrier < block->alive) return;
    block->at_barrier = 0;
    for (Fiber* fiber : block->fibers) {
        if (!fiber->done && fiber->waits_for == at_syncthreads) make_ready(fiber);
    }
}

constexpr unsigned whole_warp = 0xffffffffu;

std::string hexadecimal(unsigned bits) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", bits);
    return text;
}

unsigned alive_lanes(unsigned warp) {
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < 32 && warp * 32 + lane < block->fibers.size(); ++lane) {
        if (!block->fibers[warp * 32 + lane]->done) lanes |= 1u << lane;
    }
    return lanes;
}

void close_if_complete(unsigned warp, Meeting& meeting) {
    if (meeting.arrived == 0 || (meeting.mask & alive_lanes(warp) & ~meeting.arrived) != 0) return;
    const unsigned slot = meeting.generation % 2;
    meeting.lanes[slot] = meeting.arrived;
    if (meeting.act != nullptr) {
        if (meeting.arrived != whole_warp) {
            block->mistake = std::string(meeting.instruction) + " by the lanes " + hexadecimal(meeting.arrived) +
                             " alone; a warp executes it as one";
        } else {
            void* operands[32];
            for (unsigned lane = 0; lane < 32; ++lane) {
                operands[lane] = reinterpret_cast<void*>(std::uintptr_t(meeting.values[slot][lane]));
            }
            meeting.act(operands);
        }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        Fiber* const fiber = meeting.arrived >> lane & 1 ? block->fibers[warp * 32 + lane] : nullptr;
        if (fiber != nullptr && fiber->waits_for != nullptr) make_ready(fiber);
    }
    meeting.arrived = 0;
    ++meeting.generation;
}

Met meet(const char* instruction, unsigned mask, std::uint64_t value, Act act) {
    const unsigned warp = running->number / 32;
    Meeting& meeting = block->warps[warp][mask];
    if ((mask >> lane() & 1) == 0) {
        mistake(std::string(instruction) + " by lane " + std::to_string(lane()) + ", which its mask leaves out");
    }
    if (meeting.arrived != 0 && std::strcmp(meeting.instruction, instruction) != 0) {
        mistake(std::string("lanes of one mask meet at ") + meeting.instruction + " and " + instruction);
    }
    if (meeting.arrived != 0 && meeting.act != act) {
        mistake(std::string("lanes of one warp meet at two kinds of ") + instruction);
    }
    meeting.instruction = instruction;
    meeting.act = act;
    meeting.mask = mask;
    const unsigned slot = meeting.generation % 2;
    meeting.values[slot][lane()] = value;
    meeting.arrived |= 1u << lane();
    running->waits_for = instruction;
    close_if_complete(warp, meeting);
    to_scheduler();
    return {meeting.values[slot], meeting.lanes[slot]};
}

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*body_of_kernel)();
    running->done = true;
    --block->alive;
    open_barrier_if_complete();
    const unsigned warp = running->number / 32;
    for (auto& [mask, meeting] : block->warps[warp]) close_if_complete(warp, meeting);
    to_scheduler();
}

[[noreturn]] void stop(const std::string& mistake) {
    const std::string where = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                              std::to_string(blockIdx.z) + "): ";
    block = nullptr;
    throw std::runtime_error(where + mistake + ".");
}

std::string deadlock() {
    std::map<std::string, unsigned> waiting;
    for (const Fiber* fiber : block->fibers) {
        if (!fiber->done) ++waiting[fiber->waits_for];
    }
    std::string text = "deadlock: of " + std::to_string(block->fibers.size()) + " threads";
    for (const auto& [what, count] : waiting) text += ", " + std::to_string(count) + " wait at " + what;
    return text;
}

// Half the blocks run any fiber that can run, the others the warp of the highest priority as far as it comes, with a change
// of priorities now and then: some mistakes need a warp that is far ahead of another. (Burckhardt et al., "A Randomized
// Scheduler with Probabilistic Guarantees of Finding Bugs", ASPLOS 2010.)
Fiber* choose() {
    std::vector<Fiber*>& ready = block->ready;
    std::size_t chosen = random_order() % ready.size();
    if (!block->priorities.empty()) {
        if (random_order() % 256 == 0) block->priorities[random_order() % block->priorities.size()] = random_order();
        for (std::size_t i = 0; i < ready.size(); ++i) {
            if (block->priorities[ready[i]->number / 32] > block->priorities[ready[chosen]->number / 32]) chosen = i;
        }
    }
    std::swap(ready[chosen], ready.back());
    Fiber* const fiber = ready.back();
    ready.pop_back();
    return fiber;
}

void run_block(unsigned threads, std::size_t shared_bytes) {
    Block here;
    block = &here;
    here.dynamic_bytes = shared_bytes;
    here.alive = threads;
    if (random_order() % 2 == 0) {
        for (unsigned warp = 0; warp * 32 < threads; ++warp) here.priorities.push_back(random_order());
    }
    while (pool.size() < threads) pool.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < threads; ++i) {
        Fiber* const fiber = pool[i].get();
        fiber->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fiber->number = i;
        fiber->waits_for = nullptr;
        fiber->kept = nullptr;
        fiber->done = false;
        fiber->fake_stack = nullptr;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = stack_bytes;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, run_fiber, 0);
        here.fibers.push_back(fiber);
        here.ready.push_back(fiber);
    }
    while (here.alive > 0) {
        if (!here.mistake.empty()) stop(here.mistake);
        if (here.ready.empty()) stop(deadlock());
        to_fiber(choose());
    }
    block = nullptr;
}

}  // namespace

void launch(const void* kernel, dim3 grid, dim3 block_, std::size_t shared_bytes, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(one_launch);
    const std::uint64_t threads = std::uint64_t(block_.x) * block_.y * block_.z;
    const auto limit = limits.find(kernel);
    if (threads == 0 || threads > max_threads || block_.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    if (shared_bytes > std::size_t(limit == limits.end() ? shared_limit : limit->second)) {
        last_error = cudaErrorInvalidValue;
        return;
    }
    gridDim = grid;
    blockDim = block_;
    body_of_kernel = &body;
    std::vector<std::uint64_t> order(std::uint64_t(grid.x) * grid.y * grid.z);
    for (std::uint64_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_order);
    for (const std::uint64_t i : order) {
        blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        run_block(unsigned(threads), shared_bytes);
    }
}

void* shared_array(const void* tag, std::size_t bytes, std::size_t alignment) {
    std::unique_ptr<SharedArray>& array = block->arrays[tag];
    if (array == nullptr) array = std::make_unique<SharedArray>(bytes, alignment);
    if (array->alignment < alignment) mistake("dynamic shared memory is used first as a type of lesser alignment");
    return array->data;
}

void* dynamic_shared(std::size_t alignment) { return shared_array(&at_dynamic, block->dynamic_bytes, alignment); }

void syncthreads() {
    ++block->at_barrier;
    running->waits_for = at_syncthreads;
    open_barrier_if_complete();
    to_scheduler();
}

unsigned lane() { return running->number % 32; }

Met meet(const char* instruction, unsigned mask, std::uint64_t value) { return meet(instruction, mask, value, nullptr); }

void together(const char* instruction, void* operands, Act act) {
    meet(instruction, whole_warp, std::uint64_t(reinterpret_cast<std::uintptr_t>(operands)), act);
}

void mistake(const std::string& text) {
    block->mistake = text;
    for (;;) to_scheduler();
}

void poison(void* p, std::size_t bytes) {
    std::memset(p, 0xff, bytes);
    (void)VALGRIND_MAKE_MEM_UNDEFINED(p, bytes);
}

bool in_shared_memory(const void* p, std::size_t bytes) {
    return std::any_of(block->arrays.begin(), block->arrays.end(),
                       [&](const auto& array) { return array.second->holds(p, bytes); });
}

unsigned random_number() { return unsigned(random_order()); }

std::shared_ptr<void>& of_this_thread() { return running->kept; }

std::vector<unsigned> scrambled(std::vector<unsigned> key, unsigned slots, unsigned elements) {
    key.push_back(seed());
    std::seed_seq sequence(key.begin(), key.end());
    std::mt19937 order(sequence);
    std::vector<unsigned> result(slots);
    for (unsigned i = 0; i < slots; ++i) result[i] = i % elements;
    std::shuffle(result.begin(), result.end(), order);
    return result;
}

cudaError_t set_shared_limit(const void* kernel, int bytes) {
    if (bytes < 0 || bytes > shared_limit_opt_in) return cudaErrorInvalidValue;
    limits[kernel] = bytes;
    return cudaSuccess;
}

}  // namespace shim

cudaError_t cudaGetLastError() {
    const cudaError_t error = shim::last_error;
    shim::last_error = cudaSuccess;
    return error;
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
    }
    return "unrecognized error code";
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? shim::multiprocessors : shim::shared_limit_opt_in;
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** p, std::size_t bytes, cudaStream_t) {
    *p = shim::poisoned(bytes, shim::global_alignment);
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* p, cudaStream_t) {
    std::free(p);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
    std::memset(p, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, int, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
