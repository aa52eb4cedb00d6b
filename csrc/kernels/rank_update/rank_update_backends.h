// What each backend of rank_update offers to rank_update.cpp.
#pragma once

#include "kernels/rank_update/rank_update.h"

namespace qcore::kernels {

void rank_update_ref(const RankUpdateArgs& args);
void rank_update_avx2(const RankUpdateArgs& args);
void rank_update_avx512(const RankUpdateArgs& args);

}  // namespace qcore::kernels
