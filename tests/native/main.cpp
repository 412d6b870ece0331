// native_tests [--tier NAME] [TEST...]: tests of the kernels that need no Python; all of them where none is
// named. Prints what failed and exits with 1; a stray access ends the process with what was being tested.
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <chrono>

#include "running.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace testing {
namespace {

char current[400] = "nothing yet";
std::vector<const gossamer::Tier*> chosen;

void say_what_was_tested() {
    fprintf(stderr, "while testing: %s\n", current);
    fflush(stderr);
}

void stray_access(int number) {
    const char text[] = "stopped while testing: ";
    if (write(2, text, sizeof text - 1) > 0 && write(2, current, strlen(current)) > 0 &&
        write(2, "\n", 1) > 0) {
    }
    signal(number, SIG_DFL);
    raise(number);
}

void watch_for_stray_accesses() {
    signal(SIGABRT, stray_access);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_set_death_callback(say_what_was_tested);  // which reports accesses better than we can
#else
    signal(SIGSEGV, stray_access);
    signal(SIGBUS, stray_access);
#endif
}

struct Test {
    const char* name;
    void (*run)();
};

constexpr Test kTests[] = {
    {"types", test_types},
    {"tiers", test_tiers},
    {"products", test_products},
    {"tiles", test_tiles},
    {"exact", test_exact_sums},
    {"threads", test_threads},
    {"damage", test_damage},
    {"programs", test_programs},
    {"lies", test_lying_programs},
    {"decoder", test_decoder},
    {"compression", test_compression},
    {"far", test_far_weights},
    {"far-rows", test_far_rows},
};

bool choose_tier(const char* name) {
    int count;
    const gossamer::Tier* all = gossamer::tiers(&count);
    auto choose = [&](const gossamer::Tier& tier) {
        if ((!name || strcmp(tier.name, name) == 0) && tier.runs_here()) chosen.push_back(&tier);
    };
    for (int i = 0; i < count; i++) choose(all[i]);
#if defined(GOSSAMER_X86)
    choose(emulated_tiles());
#endif
    return !chosen.empty();
}

}  // namespace

void describe(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(current, sizeof current, format, arguments);
    va_end(arguments);
}

void fail(const char* file, int line, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    say_what_was_tested();
    _exit(1);
}

const std::vector<const gossamer::Tier*>& tiers_under_test() { return chosen; }

}  // namespace testing

// UndefinedBehaviorSanitizer stops by a signal, and so says what was tested.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

int main(int count, char** arguments) {
    using namespace testing;
    const char* tier = nullptr;
    std::vector<const char*> names;
    for (int i = 1; i < count; i++) {
        if (strcmp(arguments[i], "--tier") == 0 && i + 1 < count)
            tier = arguments[++i];
        else
            names.push_back(arguments[i]);
    }
    if (!choose_tier(tier)) {
        fprintf(stderr, "no instruction set %s here\n", tier);
        return 2;
    }
    for (const char* name : names) {
        bool known = false;
        for (const Test& test : kTests) known |= strcmp(test.name, name) == 0;
        if (known) continue;
        fprintf(stderr, "no test %s; there are:", name);
        for (const Test& test : kTests) fprintf(stderr, " %s", test.name);
        fprintf(stderr, "\n");
        return 2;
    }
    watch_for_stray_accesses();
    printf("tiers:");
    for (const gossamer::Tier* t : chosen) printf(" %s", t->name);
    printf("\n");
    for (const Test& test : kTests) {
        bool wanted = names.empty();
        for (const char* name : names) wanted |= strcmp(test.name, name) == 0;
        if (!wanted) continue;
        describe("%s", test.name);
        const auto start = std::chrono::steady_clock::now();
        test.run();
        const double seconds =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        printf("%-11s passed in %5.1f s\n", test.name, seconds);
        fflush(stdout);
    }
}
