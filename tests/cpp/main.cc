// Runs the tests with the instruction set that PUNICA_ISA names, or exits with 77 (skipped) where this CPU lacks it.
#include <gtest/gtest.h>

#include <cstdio>

#include "punica/cpu.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  punica::cpu::Isa isa;
  if (const punica::Status status = punica::cpu::active_isa(&isa); !status.ok()) {
    std::fprintf(stderr, "skipped: %s\n", status.message().c_str());
    return 77;
  }
  std::printf("instruction set: %s\n", punica::cpu::isa_name(isa));
  return RUN_ALL_TESTS();
}
