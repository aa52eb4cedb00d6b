// What a text is about, for comparing texts: hashed character n-grams.
#pragma once

#include <cstdint>
#include <string_view>

namespace qcore::calib {

constexpr int64_t kFeatures = 4096;
// A feature vector has this length, so that products of two are whole numbers below 2^30.
constexpr double kFeatureLength = 16384.0;

// out (kFeatures,) int16, overwritten: counts of the runs of 3 to 5 bytes that begin at a
// character, by murmur3 to bins with a sign; the root of their size; scaled to kFeatureLength in
// the Euclidean norm and rounded. Zeros for a text of less than 3 bytes.
void text_features(std::string_view text, int16_t* out);

}  // namespace qcore::calib
