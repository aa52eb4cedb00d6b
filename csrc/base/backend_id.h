// The names of the instruction sets, without anything else: files that are compiled for one of them
// may include this.
#pragma once

namespace qcore {

// From plainest to fastest. kAvx512 needs F, BW, VL, DQ, VNNI and BF16.
enum class Backend { kRef = 0, kAvx2 = 1, kAvx512 = 2 };

}  // namespace qcore
