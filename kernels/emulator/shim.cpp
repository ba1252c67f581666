// The running thread, and the functions that the compiler's checks call. They report through the Rust side, so that no
// sanitizer's runtime is linked; they are weak, so that one may be.

#include "emulator/shim.h"

#include <stdio.h>

extern "C" {

__thread gridgrad_thread* gridgrad_current __attribute__((tls_model("initial-exec"))) = nullptr;

// Where this OS thread keeps which fiber it runs.
gridgrad_thread** gridgrad_current_slot() { return &gridgrad_current; }

}  // extern "C"

namespace {

// What the checks pass, as the compilers document it by their runtime's interface.
struct Location {
    const char* file;
    unsigned line, column;
};
struct Type {
    unsigned short kind, info;
    char name[1];  // quoted
};
struct TypeMismatch {
    Location location;
    const Type* type;
    unsigned char log2_alignment, check;
};
struct OutOfBounds {
    Location location;
    const Type *array, *index;
};
struct Arithmetic {
    Location location;
    const Type* type;
};

template <class... Values> [[noreturn]] void report(const Location& location, const char* format, Values... values) {
    char reason[256];
    snprintf(reason, sizeof reason, format, values...);
    gridgrad_fault(gridgrad_current, reason, location.file, location.line);
}

}  // namespace

#define CHECK(name) extern "C" [[noreturn]] __attribute__((weak)) void __ubsan_handle_##name##_abort

CHECK(type_mismatch_v1)(TypeMismatch* data, uintptr_t pointer) {
    static const char* const what[] = {"load of", "store to", "reference to"};
    const char* access = data->check < 3 ? what[data->check] : "use of";
    report(data->location, "misaligned %s %s at address %#zx, which must be a multiple of %u", access, data->type->name,
           static_cast<size_t>(pointer), 1u << data->log2_alignment);
}
CHECK(out_of_bounds)(OutOfBounds* data, uintptr_t index) {
    report(data->location, "index %lld out of range of %s", static_cast<long long>(index), data->array->name);
}
CHECK(shift_out_of_bounds)(OutOfBounds* data, uintptr_t, uintptr_t by) {
    report(data->location, "shift of %s by %lld bits", data->array->name, static_cast<long long>(by));
}
CHECK(divrem_overflow)(Arithmetic* data, uintptr_t, uintptr_t) {
    report(data->location, "division by zero or overflowing division of %s", data->type->name);
}
CHECK(add_overflow)(Arithmetic* data, uintptr_t, uintptr_t) {
    report(data->location, "overflowing addition of %s", data->type->name);
}
CHECK(sub_overflow)(Arithmetic* data, uintptr_t, uintptr_t) {
    report(data->location, "overflowing subtraction of %s", data->type->name);
}
CHECK(mul_overflow)(Arithmetic* data, uintptr_t, uintptr_t) {
    report(data->location, "overflowing multiplication of %s", data->type->name);
}
CHECK(negate_overflow)(Arithmetic* data, uintptr_t) {
    report(data->location, "overflowing negation of %s", data->type->name);
}
