// Launch a kernel as its launcher would, on buffers of exactly the size asked for: cases from stdin, outputs to stdout.
//
// The format is the one that host.py writes. An input that the kernel wrote to ends the process with a line.
#include "fibres.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace fibres {
namespace {

constexpr size_t ALIGNMENT = 256;  // what cudaMalloc gives
constexpr int CHECK_FAILED = 70;   // exit status

void read(void* to, size_t size) {
    if (std::fread(to, 1, size, stdin) != size) fail("the request ends early");
}

int64_t read_number() {
    int64_t number;
    read(&number, sizeof number);
    return number;
}

dim3 read_size() {
    dim3 size;
    size.x = static_cast<unsigned>(read_number());
    size.y = static_cast<unsigned>(read_number());
    size.z = static_cast<unsigned>(read_number());
    return size;
}

enum class Role : int64_t { scalar, input, output };

// A scalar, or a buffer of exactly the size asked for.
struct Argument {
    Role role = static_cast<Role>(read_number());
    size_t offset = static_cast<size_t>(read_number());  // bytes
    size_t size = static_cast<size_t>(read_number());
    int scalar = 0;
    std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
    void* data = nullptr;      // what the kernel gets
    std::vector<char> before;  // of an input

    Argument() {
        if (role == Role::scalar) {
            read(&scalar, sizeof scalar);
            return;
        }
        void* allocated = nullptr;
        if (posix_memalign(&allocated, ALIGNMENT, offset + size)) fail("no memory for %zu bytes", size);
        memory.reset(static_cast<char*>(allocated));
        char* bytes = memory.get() + offset;
        read(bytes, size);
        if (role == Role::input) before.assign(bytes, bytes + size);
        data = bytes;
    }

    void* address() { return role == Role::scalar ? static_cast<void*>(&scalar) : &data; }
};

void run_case(Launch launch, size_t parameters) {
    grid_size = read_size();
    block_size = read_size();
    const int64_t order = read_number();
    std::vector<Argument> arguments(static_cast<size_t>(read_number()));
    if (arguments.size() != parameters) fail("%zu arguments for %zu parameters", arguments.size(), parameters);
    std::vector<void*> addresses;
    for (Argument& argument : arguments) addresses.push_back(argument.address());

    run_blocks(launch, addresses.data(), order);
    for (const Argument& argument : arguments) {
        if (argument.role == Role::input && std::memcmp(argument.before.data(), argument.data, argument.size) != 0) {
            fail("an input was written to");
        }
        if (argument.role == Role::output) std::fwrite(argument.data, 1, argument.size, stdout);
    }
}

}  // namespace

void fail(const char* format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    std::fputs("host check: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
    std::_Exit(CHECK_FAILED);
}

int serve(Launch launch, size_t parameters) {
    for (int64_t cases = read_number(); cases > 0; --cases) run_case(launch, parameters);
    return 0;
}

}  // namespace fibres
