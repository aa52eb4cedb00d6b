#include "calib/near_duplicates.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/parallel.h"
#include "calib/text_hash.h"

namespace qcore::calib {
namespace {

constexpr size_t kWords = 5;
constexpr size_t kCharacters = 8;
// Texts of a band that each further one is compared with.
constexpr int64_t kMostCompared = 16;
// Pairs that are compared together.
constexpr int64_t kPairBlock = 64;
// Texts that one thread turns into shingles at a time.
constexpr int64_t kTextBlock = 16;

struct Range {
  uint32_t first, last;
};
// Scripts that are written without spaces: Thai to Lao, Myanmar, Khmer, Kana to Han, and the Han of
// the compatibility and supplementary planes.
constexpr Range kUnspaced[] = {{0x0e00, 0x0eff},  {0x1000, 0x109f}, {0x1780, 0x17ff},
                               {0x3040, 0x30ff},  {0x3400, 0x9fff}, {0xf900, 0xfaff},
                               {0x20000, 0x3ffff}};

bool is_unspaced(uint32_t character) {
  return std::any_of(std::begin(kUnspaced), std::end(kUnspaced), [&](const Range& range) {
    return range.first <= character && character <= range.last;
  });
}

bool begins_character(char byte) { return (static_cast<unsigned char>(byte) & 0xc0u) != 0x80u; }

// The character that begins at `at`; what is no UTF-8 gives some number.
uint32_t character_at(std::string_view text, size_t at) {
  const uint32_t lead = static_cast<unsigned char>(text[at]);
  if (lead < 0x80) return lead;
  uint32_t value = lead < 0xe0 ? lead & 0x1fu : lead < 0xf0 ? lead & 0x0fu : lead & 0x07u;
  for (++at; at < text.size() && !begins_character(text[at]); ++at) {
    value = value << 6 | (static_cast<unsigned char>(text[at]) & 0x3fu);
  }
  return value;
}

// Where the pieces begin that shingles are runs of, and the end of the text.
std::vector<size_t> pieces_of(std::string_view text, bool words) {
  std::vector<size_t> begins;
  for (size_t at = 0; at < text.size(); ++at) {
    const bool begins_here = words ? at == 0 || text[at - 1] == ' ' : begins_character(text[at]);
    if (begins_here) begins.push_back(at);
  }
  begins.push_back(words ? text.size() + 1 : text.size());  // as if a space followed
  return begins;
}

bool mostly_unspaced(std::string_view text) {
  int64_t unspaced = 0;
  int64_t others = 0;
  for (size_t at = 0; at < text.size(); ++at) {
    if (!begins_character(text[at]) || text[at] == ' ') continue;
    ++(is_unspaced(character_at(text, at)) ? unspaced : others);
  }
  return unspaced > others;
}

// SplitMix64 (Steele, Lea and Flood 2014).
uint64_t next_random(uint64_t& state) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t value = state;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

int64_t root_of(std::vector<int64_t>& parents, int64_t text) {
  while (parents[static_cast<size_t>(text)] != text) {
    int64_t& parent = parents[static_cast<size_t>(text)];
    parent = parents[static_cast<size_t>(parent)];
    text = parent;
  }
  return text;
}

void require_permutation(const std::vector<int64_t>& ranks, int64_t size) {
  std::vector<bool> seen(static_cast<size_t>(size));
  bool good = static_cast<int64_t>(ranks.size()) == size;
  for (size_t i = 0; good && i < ranks.size(); ++i) {
    good = ranks[i] >= 0 && ranks[i] < size && !seen[static_cast<size_t>(ranks[i])];
    if (good) seen[static_cast<size_t>(ranks[i])] = true;
  }
  if (!good) {
    throw ArgumentError(message("NearDuplicates.groups: ranks are no permutation of 0 to ",
                                size - 1, ". Give each text its place."));
  }
}

}  // namespace

std::vector<uint32_t> shingles_of(std::string_view text) {
  const bool words = !mostly_unspaced(text);
  const size_t run = words ? kWords : kCharacters;
  const std::vector<size_t> begins = pieces_of(text, words);
  const size_t pieces = begins.size() - 1;
  std::vector<uint32_t> hashes;
  if (text.empty()) return hashes;
  if (pieces < run) return {murmur3_32(text.data(), text.size(), 0)};
  hashes.reserve(pieces - run + 1);
  for (size_t i = 0; i + run <= pieces; ++i) {
    const size_t end = begins[i + run] - (words ? 1 : 0);
    hashes.push_back(murmur3_32(text.data() + begins[i], end - begins[i], 0));
  }
  std::sort(hashes.begin(), hashes.end());
  hashes.erase(std::unique(hashes.begin(), hashes.end()), hashes.end());
  return hashes;
}

double jaccard(const uint32_t* a, int64_t size_a, const uint32_t* b, int64_t size_b) {
  int64_t i = 0;
  int64_t j = 0;
  int64_t shared = 0;
  while (i < size_a && j < size_b) {
    const uint32_t left = a[i];
    const uint32_t right = b[j];
    shared += left == right ? 1 : 0;
    i += left <= right ? 1 : 0;
    j += right <= left ? 1 : 0;
  }
  const int64_t all = size_a + size_b - shared;
  return all == 0 ? 0.0 : static_cast<double>(shared) / static_cast<double>(all);
}

NearDuplicates::NearDuplicates(uint64_t seed) : begins_{0} {
  uint64_t state = seed;
  for (int i = 0; i < kHashes; ++i) {
    const uint64_t drawn = next_random(state);
    factors_.push_back(static_cast<uint32_t>(drawn) | 1u);  // odd: a permutation of 32 bits
    shifts_.push_back(static_cast<uint32_t>(drawn >> 32));
  }
}

void NearDuplicates::keys_of(const std::vector<uint32_t>& shingles, uint64_t* keys) const {
  uint32_t least[kHashes];
  std::fill(std::begin(least), std::end(least), 0xffffffffu);
  for (const uint32_t shingle : shingles) {
    for (size_t i = 0; i < kHashes; ++i) {
      least[i] = std::min(least[i], shingle * factors_[i] + shifts_[i]);
    }
  }
  for (int band = 0; band < kBands; ++band) {
    uint64_t key = 0;
    for (int row = 0; row < kRows; ++row) {
      uint64_t state = key ^ least[band * kRows + row];
      key = next_random(state);
    }
    keys[band] = key;
  }
}

void NearDuplicates::add(const std::vector<std::string_view>& texts) {
  const auto count = static_cast<int64_t>(texts.size());
  const auto before = keys_.size();
  std::vector<std::vector<uint32_t>> found(texts.size());
  keys_.resize(before + texts.size() * kBands);
  parallel_blocks(count, kTextBlock, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const auto text = static_cast<size_t>(i);
      found[text] = shingles_of(texts[text]);
      keys_of(found[text], keys_.data() + before + text * kBands);
    }
  });
  for (const std::vector<uint32_t>& shingles : found) {
    shingles_.insert(shingles_.end(), shingles.begin(), shingles.end());
    begins_.push_back(static_cast<int64_t>(shingles_.size()));
  }
}

bool NearDuplicates::similar(int64_t a, int64_t b) const {
  const int64_t* begins = begins_.data();
  const int64_t size_a = begins[a + 1] - begins[a];
  const int64_t size_b = begins[b + 1] - begins[b];
  const auto smaller = static_cast<double>(std::min(size_a, size_b));
  if (smaller < kSimilar * static_cast<double>(std::max(size_a, size_b))) return false;
  return jaccard(shingles_.data() + begins[a], size_a, shingles_.data() + begins[b], size_b) >=
         kSimilar;
}

std::vector<int64_t> NearDuplicates::groups(const std::vector<int64_t>& ranks) const {
  require_permutation(ranks, size());
  std::vector<int64_t> by_rank(ranks.size());
  for (size_t i = 0; i < ranks.size(); ++i) {
    by_rank[static_cast<size_t>(ranks[i])] = static_cast<int64_t>(i);
  }
  std::vector<int64_t> parents(ranks.size());  // of ranks; a root is the smallest of its group
  std::iota(parents.begin(), parents.end(), 0);
  std::vector<std::pair<uint64_t, int64_t>> band(ranks.size());  // (key, rank)
  std::vector<std::pair<int64_t, int64_t>> pairs;
  std::vector<char> alike;
  for (size_t which = 0; which < kBands; ++which) {
    for (size_t rank = 0; rank < by_rank.size(); ++rank) {
      const auto text = static_cast<size_t>(by_rank[rank]);
      band[rank] = {keys_[text * kBands + which], static_cast<int64_t>(rank)};
    }
    std::sort(band.begin(), band.end());
    pairs.clear();
    for (size_t first = 0, at = 0; at < band.size(); ++at) {
      if (band[at].first != band[first].first) first = at;
      const size_t end = std::min(at, first + static_cast<size_t>(kMostCompared));
      for (size_t other = first; other < end; ++other) {
        const int64_t a = band[other].second;
        const int64_t b = band[at].second;
        if (root_of(parents, a) != root_of(parents, b)) pairs.emplace_back(a, b);
      }
    }
    alike.assign(pairs.size(), 0);
    parallel_blocks(static_cast<int64_t>(pairs.size()), kPairBlock, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const auto& pair = pairs[static_cast<size_t>(i)];
        alike[static_cast<size_t>(i)] = similar(by_rank[static_cast<size_t>(pair.first)],
                                                by_rank[static_cast<size_t>(pair.second)])
                                            ? 1
                                            : 0;
      }
    });
    for (size_t i = 0; i < pairs.size(); ++i) {
      if (alike[i] == 0) continue;
      const int64_t a = root_of(parents, pairs[i].first);
      const int64_t b = root_of(parents, pairs[i].second);
      parents[static_cast<size_t>(std::max(a, b))] = std::min(a, b);
    }
    poll_interrupt();
  }
  std::vector<int64_t> found(ranks.size());
  for (size_t i = 0; i < ranks.size(); ++i) {
    found[i] = by_rank[static_cast<size_t>(root_of(parents, ranks[i]))];
  }
  return found;
}

}  // namespace qcore::calib
