// Parts of a suite, for what takes seconds without compute-sanitizer and minutes under it.
//
// PUNICA_TEST_PART=2/16 runs every 16th case, from number 2 on (counted from 0). PUNICA_TEST_QUEUE names a file that
// processes share (sanitize.py makes it): a byte for each case, 0 until a process takes it and writes
// PUNICA_TEST_WORKER, its number from 1 to 254, there; so that none waits for another. After PUNICA_TEST_SECONDS a
// process takes no more cases: it ends by itself, and the tool sums up what it saw.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

class Cases {
 public:
  static Cases& get() {
    static Cases cases;
    return cases;
  }

  bool next() {
    const int number = count_++;
    if (number >= kMost) stop("too many cases");
    if (number % parts_ != part_ || (limit_ >= 0 && seconds() > limit_)) return false;
    if (queue_ != nullptr) {
      uint8_t nobody = 0;
      if (!std::atomic_ref(queue_[number]).compare_exchange_strong(nobody, worker_)) return false;
    }
    ++taken_;
    current_ = number;
    return true;
  }

  // At the end of a suite: how many there were. A file's last four bytes get that.
  void finish() const {
    if (queue_ != nullptr) std::atomic_ref(*reinterpret_cast<uint32_t*>(queue_ + kMost)).store(count_);
    std::printf("%8.3f took %d of %d cases\n", seconds(), taken_, count_);
    std::fflush(stdout);
  }

  // Since PUNICA_TEST_BEGAN, in seconds since 1970, or since the first case.
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count() - began_;
  }
  int current() const { return current_; }
  // Whether others of the queue took all cases.
  bool idle() const { return queue_ != nullptr && taken_ == 0; }

  static constexpr int kMost = 1 << 14;

 private:
  Cases() {
    if (const char* text = std::getenv("PUNICA_TEST_PART")) {
      if (std::sscanf(text, "%d/%d", &part_, &parts_) != 2 || parts_ < 1 || part_ < 0 || part_ >= parts_) {
        stop("PUNICA_TEST_PART must be NUMBER/COUNT with NUMBER in [0, COUNT)");
      }
    }
    if (const char* text = std::getenv("PUNICA_TEST_SECONDS")) limit_ = std::atof(text);
    const char* const began = std::getenv("PUNICA_TEST_BEGAN");
    began_ = began != nullptr ? std::atof(began) : seconds();
    const char* const path = std::getenv("PUNICA_TEST_QUEUE");
    if (path == nullptr) return;
    const char* const worker = std::getenv("PUNICA_TEST_WORKER");
    const int number = worker == nullptr ? 0 : std::atoi(worker);
    if (number < 1 || number > 254) stop("PUNICA_TEST_WORKER must be from 1 to 254");
    worker_ = static_cast<uint8_t>(number);
    const int file = open(path, O_RDWR);
    void* const memory = file < 0 ? MAP_FAILED : mmap(nullptr, kMost + 4, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED || lseek(file, 0, SEEK_END) < kMost + 4) stop("PUNICA_TEST_QUEUE is no such file");
    close(file);
    queue_ = static_cast<uint8_t*>(memory);
  }
  [[noreturn]] static void stop(const char* why) {
    std::printf("FAILED: %s\n", why);
    std::exit(1);
  }

  int part_ = 0, parts_ = 1, count_ = 0, taken_ = 0, current_ = -1;
  double limit_ = -1, began_ = 0;
  uint8_t worker_ = 0;
  uint8_t* queue_ = nullptr;
};

// Called once a case, in the same order in every process.
inline bool in_part() { return Cases::get().next(); }

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
  if (!verbose) return;
  std::printf("%8.3f case %d: %s\n", Cases::get().seconds(), Cases::get().current(), name.c_str());
  std::fflush(stdout);
}
