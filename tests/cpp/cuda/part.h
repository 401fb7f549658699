// Parts of a suite: PUNICA_TEST_PART=2/16 runs every 16th case, from number 2 on (counted from 0). compute-sanitizer
// takes minutes for what takes seconds without it; parts run beside each other and each has an end in sight.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

// Called once a case, in the same order in every part.
inline bool in_part() {
  static int number = 0, part = 0, parts = 0;
  if (parts == 0) {
    const char* text = std::getenv("PUNICA_TEST_PART");
    if (text == nullptr) {
      parts = 1;
    } else if (std::sscanf(text, "%d/%d", &part, &parts) != 2 || parts < 1 || part < 0 || part >= parts) {
      std::printf("FAILED: PUNICA_TEST_PART is \"%s\", expected NUMBER/COUNT with NUMBER in [0, COUNT)\n", text);
      std::exit(1);
    }
  }
  return number++ % parts == part;
}

// PUNICA_TEST_GARBAGE=0: a small suite without malformed tables, of which memcheck alone has something to say.
inline bool with_garbage() {
  static const bool value = [] {
    const char* text = std::getenv("PUNICA_TEST_GARBAGE");
    return text == nullptr || std::string(text) != "0";
  }();
  return value;
}

// With PUNICA_TEST_VERBOSE in the environment: prints each case before it runs, and the seconds so far.
inline void announce(const std::string& name) {
  static const bool verbose = std::getenv("PUNICA_TEST_VERBOSE") != nullptr;
  static const auto begin = std::chrono::steady_clock::now();
  if (!verbose) return;
  std::printf("%8.3f %s\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(),
              name.c_str());
  std::fflush(stdout);
}
