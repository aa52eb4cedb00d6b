// What each backend of column_loop offers to column_loop.cpp, and the candidates they share.
#pragma once

#include "kernels/column_loop/column_loop.h"
#include "quant/spec.h"

namespace qcore::kernels {

void column_loop_ref(const ColumnLoopArgs& args);
void column_loop_avx2(const ColumnLoopArgs& args);
void column_loop_avx512(const ColumnLoopArgs& args);

namespace {

static inline int64_t n_groups(const ColumnLoopArgs& args) {
  return group_count(args.in_features, args.group_size);
}

// Columns of a group.
static inline int64_t columns_of(const ColumnLoopArgs& args, int64_t group) {
  const int64_t left = args.in_features - group * args.group_size;
  return left < args.group_size ? left : args.group_size;
}

// Shares of the range that kWeighted tries, largest first: a tie keeps the larger. 4 and 3 bits as
// measured in docs/algorithms/gptq.md, which also says how those of the other widths were chosen.
constexpr int kMostShares = 5;
struct ShareList {
  int count;
  float shares[kMostShares];
};
static inline ShareList shares_of(int bits) {
  switch (bits) {
    case 2:
      return ShareList{5, {1.0f, 0.84f, 0.68f, 0.52f, 0.36f}};
    case 3:
      return ShareList{5, {1.0f, 0.88f, 0.76f, 0.64f, 0.52f}};
    case 4:
      return ShareList{4, {1.0f, 0.92f, 0.84f, 0.76f, 0.0f}};
    case 5:
      return ShareList{4, {1.0f, 0.96f, 0.92f, 0.88f, 0.0f}};
    case 6:
      return ShareList{4, {1.0f, 0.98f, 0.96f, 0.94f, 0.0f}};
    default:
      return ShareList{4, {1.0f, 0.995f, 0.99f, 0.98f, 0.0f}};
  }
}

constexpr int kMostCandidates = kMostShares * kMostShares;  // the range itself among them

constexpr int kRefits = 2;
constexpr int kClipSteps = 10;
static inline float clip_share(int step) { return 1.0f - static_cast<float>(step) / 20.0f; }

}  // namespace
}  // namespace qcore::kernels
