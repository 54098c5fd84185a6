// What the stand-ins for CUDA's headers and instructions need of the fibers in shim.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace shim {

unsigned lane();

// Waits until the lanes of `mask` that are alive have come here with their values.
struct Met {
    const std::uint64_t* values;  // by lane
    unsigned lanes;               // that came
};
Met meet(const char* instruction, unsigned mask, std::uint64_t value);

// An instruction that a warp executes as one. When all 32 lanes have come with their operands, `act` gets these by lane, and
// only then do the lanes go on.
using Act = void (*)(void* const* operands);
void together(const char* instruction, void* operands, Act act);

// Ends the launch, for something that CUDA leaves undefined.
[[noreturn]] void mistake(const std::string& text);

// NaN, and nothing for valgrind
void poison(void* p, std::size_t bytes);
bool in_shared_memory(const void* p, std::size_t bytes);
unsigned random_number();

// What an instruction keeps for the running thread, empty at its start.
std::shared_ptr<void>& of_this_thread();

// An element for each of `slots` places, every element in equally many: in a random order that depends on the key and
// LLMCORE_SHIM_SEED alone.
std::vector<unsigned> scrambled(std::vector<unsigned> key, unsigned slots, unsigned elements);

}  // namespace shim
