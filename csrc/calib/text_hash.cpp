#include "calib/text_hash.h"

namespace qcore::calib {
namespace {

constexpr uint32_t kFirst = 0xcc9e2d51u;
constexpr uint32_t kSecond = 0x1b873593u;

uint32_t rotate(uint32_t value, int by) { return (value << by) | (value >> (32 - by)); }

uint32_t scrambled(uint32_t word) { return rotate(word * kFirst, 15) * kSecond; }

uint32_t byte_at(const char* data, size_t at) { return static_cast<unsigned char>(data[at]); }

}  // namespace

uint32_t murmur3_32(const char* data, size_t size, uint32_t seed) {
  uint32_t hash = seed;
  size_t at = 0;
  for (; at + 4 <= size; at += 4) {
    const uint32_t word = byte_at(data, at) | byte_at(data, at + 1) << 8 |
                          byte_at(data, at + 2) << 16 | byte_at(data, at + 3) << 24;
    hash = rotate(hash ^ scrambled(word), 13) * 5 + 0xe6546b64u;
  }
  uint32_t rest = 0;
  for (size_t i = size; i > at; --i) rest = rest << 8 | byte_at(data, i - 1);
  hash ^= scrambled(rest) ^ static_cast<uint32_t>(size);
  hash = (hash ^ (hash >> 16)) * 0x85ebca6bu;
  hash = (hash ^ (hash >> 13)) * 0xc2b2ae35u;
  return hash ^ (hash >> 16);
}

}  // namespace qcore::calib
