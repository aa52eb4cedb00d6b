// Texts on whatever CPU this is: the published hashes, bytes that are no UTF-8, groups on any
// threads.
#include "calib/near_duplicates.h"

#include <string>

#include "base/error.h"
#include "base/parallel.h"
#include "calib/text_features.h"
#include "calib/text_hash.h"
#include "check.h"

using namespace qcore;
using calib::NearDuplicates;

namespace {

uint32_t hash_of(const std::string& text, uint32_t seed) {
  return calib::murmur3_32(text.data(), text.size(), seed);
}

// A text of `words` words, the word at `changed` another one.
std::string text_of(int number, int words, int changed) {
  std::string text;
  for (int i = 0; i < words; ++i) {
    text += (i == 0 ? "w" : " w") + std::to_string(i == changed ? -1 : 1000 * number + i);
  }
  return text;
}

void hashes_are_the_published_ones() {
  CHECK(hash_of("", 0) == 0);
  CHECK(hash_of("", 1) == 0x514e28b7u);
  CHECK(hash_of("test", 0) == 0xba6bd213u);
  CHECK(hash_of("Hello, world!", 0) == 0xc0363e43u);
}

// Every beginning of a text in which characters of 2 to 4 bytes are cut, and every single byte.
void any_bytes_are_taken() {
  const std::string text = "a \xc3\xa9 \xe6\x97\xa5\xe6\x9c\xac\xe8\xaa\x9e \xf0\xa0\x80\x80 \xff";
  int16_t features[calib::kFeatures];
  for (size_t size = 0; size <= text.size(); ++size) {
    const std::string cut = text.substr(0, size);
    CHECK(calib::shingles_of(cut).empty() == cut.empty());
    calib::text_features(cut, features);
  }
  for (int byte = 0; byte < 256; ++byte) {
    CHECK(calib::shingles_of(std::string(40, static_cast<char>(byte))).size() >= 1);
  }
}

void groups_do_not_depend_on_threads() {
  std::vector<std::string> texts;
  for (int number = 0; number < 60; ++number) {
    for (const int changed : {-1, 0, 50}) texts.push_back(text_of(number, 100, changed));
  }
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  std::vector<int64_t> ranks(texts.size());
  for (size_t i = 0; i < ranks.size(); ++i) ranks[i] = static_cast<int64_t>(ranks.size() - 1 - i);
  for (const int threads : {1, 2, 4}) {
    set_threads(threads);
    NearDuplicates finder(7);
    finder.add({views.begin(), views.begin() + 11});
    finder.add({views.begin() + 11, views.end()});
    const std::vector<int64_t> groups = finder.groups(ranks);
    for (size_t i = 0; i < groups.size(); ++i) {
      CHECK(groups[i] == static_cast<int64_t>(i / 3 * 3 + 2));  // the last has the smallest rank
    }
    CHECK_THROWS(finder.groups({0, 1}), ArgumentError);
  }
}

}  // namespace

int main() {
  hashes_are_the_published_ones();
  any_bytes_are_taken();
  groups_do_not_depend_on_threads();
  CHECK(calib::jaccard(nullptr, 0, nullptr, 0) == 0.0);
  return test::report();
}
