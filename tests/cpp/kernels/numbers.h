// Numbers for the kernels' tests, the same on every machine.
#pragma once

#include <cstdint>
#include <vector>

namespace qcore::test {

// In [-1, 1), from a linear congruential generator (Knuth, MMIX).
class Numbers {
 public:
  float next() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }

  std::vector<float> vector(int64_t count, float size = 1.0f) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = size * next();
    return values;
  }

 private:
  uint64_t state_ = 1;
};

}  // namespace qcore::test
