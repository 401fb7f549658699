// What a caller sets once for many calls; both matter to the CUDA backend alone.
#pragma once

namespace punica::bindings {

bool checks();       // of the process; PUNICA_CHECK=1 sets it at the start
bool early_reads();  // of this thread

}  // namespace punica::bindings
