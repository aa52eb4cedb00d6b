// Texts that say nearly the same: MinHash and locality-sensitive hashing (Broder 1997; Leskovec,
// Rajaraman and Ullman, Mining of Massive Datasets, chapter 3), confirmed on the shingles.
//
// A shingle is a run of 5 words, or of 8 characters where most letters are of scripts written
// without spaces; a shorter text is one shingle. Shingles are kept as 32-bit hashes. Two texts are
// near duplicates when the Jaccard similarity of their shingles is at least 0.8; groups are the
// connected components.
//
// Two texts are compared when one of 32 bands of 4 MinHash values is equal: at similarity 0.8 all
// but one pair in 10^7 are. In a band each text is compared with the first 16 that share its
// value, so a crowd of texts that are alike but no duplicates costs no more than its size.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace qcore::calib {

// Sorted distinct hashes of the shingles of a text: UTF-8, words parted by single spaces.
std::vector<uint32_t> shingles_of(std::string_view text);

// |a ∩ b| / |a ∪ b| of sorted distinct values; 0 when both are empty.
double jaccard(const uint32_t* a, int64_t size_a, const uint32_t* b, int64_t size_b);

// Memory: 256 bytes a text and 4 bytes a shingle. Results depend on the texts, the seed and the
// ranks alone.
class NearDuplicates {
 public:
  static constexpr int kBands = 32;
  static constexpr int kRows = 4;
  static constexpr int kHashes = kBands * kRows;
  static constexpr double kSimilar = 0.8;

  explicit NearDuplicates(uint64_t seed);

  void add(const std::vector<std::string_view>& texts);

  int64_t size() const { return static_cast<int64_t>(begins_.size()) - 1; }

  // For each text the member of its group with the smallest rank. ranks: (size,), a permutation of
  // 0 .. size - 1; it decides who stands first in a band. Throws ArgumentError when it is none.
  std::vector<int64_t> groups(const std::vector<int64_t>& ranks) const;

 private:
  using Keys = uint64_t[kBands];
  void keys_of(const std::vector<uint32_t>& shingles, uint64_t* keys) const;
  bool similar(int64_t a, int64_t b) const;

  std::vector<uint32_t> factors_, shifts_;  // (kHashes,): hash i of x is factor x + shift mod 2^32
  std::vector<uint64_t> keys_;              // (size, kBands)
  std::vector<uint32_t> shingles_;          // all texts' shingles, one after the other
  std::vector<int64_t> begins_;             // (size + 1,): where those of a text begin
};

}  // namespace qcore::calib
