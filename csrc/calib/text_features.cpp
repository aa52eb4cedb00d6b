#include "calib/text_features.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "calib/text_hash.h"

namespace qcore::calib {
namespace {

constexpr size_t kShortest = 3;
constexpr size_t kLongest = 5;
constexpr uint32_t kSignBit = 1u << 31;

}  // namespace

void text_features(std::string_view text, int16_t* out) {
  std::vector<int32_t> counts(kFeatures);
  for (size_t at = 0; at < text.size(); ++at) {
    if ((static_cast<unsigned char>(text[at]) & 0xc0u) == 0x80u) continue;
    for (size_t run = kShortest; run <= kLongest && at + run <= text.size(); ++run) {
      const uint32_t hash = murmur3_32(text.data() + at, run, static_cast<uint32_t>(run));
      counts[hash % kFeatures] += (hash & kSignBit) != 0 ? -1 : 1;
    }
  }
  double norm = 0.0;  // of the roots: the sum of the counts' sizes
  for (const int32_t count : counts) norm += std::abs(static_cast<double>(count));
  const double scale = norm > 0.0 ? kFeatureLength / std::sqrt(norm) : 0.0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const double root = std::sqrt(std::abs(static_cast<double>(counts[i])));
    out[i] = static_cast<int16_t>(std::lround(std::copysign(root, counts[i]) * scale));
  }
}

}  // namespace qcore::calib
