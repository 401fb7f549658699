// What a caller sets once for many calls; both matter to the CUDA backend alone.
#pragma once

namespace punica::bindings {

bool checks();       // of the process; PUNICA_CHECK=1 sets it at the start
bool early_reads();  // of this thread

// Hands the one warning of the process to the caller's language, to what set_on_checks_skipped() was given.
void warn_checks_skipped();

}  // namespace punica::bindings
