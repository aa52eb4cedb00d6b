// One item of attention_backward over the lanes of one instruction set. Included after lanes_exp.h
// and tile_product.h.
//
// The five products of a tile of rows, with S the scores, P the softmax and G the gradient of the
// output, are products of tile_product.h: S = Q Kᵀ, dP = G Vᵀ, dQ = dS K, dK += dSᵀ Q, dV += Pᵀ G.
// The softmax between them works along whole rows.
#pragma once

#include "kernels/attention_backward/attention_backward_backends.h"

namespace {

using qcore::kernels::AttentionBackwardArgs;
using qcore::kernels::AttentionBackwardItem;
using qcore::kernels::kAttentionBackwardKeys;
using qcore::kernels::kAttentionBackwardRows;
using qcore::kernels::whole_strips;

constexpr float kNoScore = -__FLT_MAX__;

// Workspace. A panel is strips of 16 outputs, each (steps, 16); see tile.h.
struct Space {
  int64_t keys;       // of the item, in whole strips
  int64_t width;      // head_dim, in whole strips
  float* k_by_key;    // panel: outputs are keys, steps entries of the head
  float* v_by_key;    // panel, the same
  float* k_by_entry;  // panel: outputs are entries, steps keys
  float* k_gradient;  // (keys, width)
  float* v_gradient;  // (keys, width)
  float* p;           // (rows, keys): scores, then P
  float* ds;          // (rows, keys): dP, then dS
  float* q;           // (rows, width): q · scale
  float* gradient;    // (rows, width): of the output
  float* q_by_entry;  // panel: outputs are entries, steps rows
  float* gradient_by_entry;
  float* q_gradient;  // (rows, width)
  float* turned;      // (some keys, rows): P or dS transposed

  Space(const AttentionBackwardArgs& args, int64_t n_tokens, float* memory)
      : keys(whole_strips(n_tokens)),
        width(whole_strips(args.head_dim)),
        k_by_key(memory),
        v_by_key(k_by_key + keys * width),
        k_by_entry(v_by_key + keys * width),
        k_gradient(k_by_entry + keys * width),
        v_gradient(k_gradient + keys * width),
        p(v_gradient + keys * width),
        ds(p + kAttentionBackwardRows * keys),
        q(ds + kAttentionBackwardRows * keys),
        gradient(q + kAttentionBackwardRows * width),
        q_by_entry(gradient + kAttentionBackwardRows * width),
        gradient_by_entry(q_by_entry + kAttentionBackwardRows * width),
        q_gradient(gradient_by_entry + kAttentionBackwardRows * width),
        turned(q_gradient + kAttentionBackwardRows * width) {}
};

// Rows [first, first + count) of an item and the keys that some of them see, in whole strips.
struct RowTile {
  const AttentionBackwardArgs& args;
  const AttentionBackwardItem& item;
  int64_t first;
  int64_t count;
  int64_t group;
  int64_t first_key;
  int64_t last_key;

  RowTile(const AttentionBackwardArgs& call, const AttentionBackwardItem& work, int64_t row,
          int64_t rows)
      : args(call),
        item(work),
        first(row),
        count(rows),
        group(call.n_heads / call.n_kv_heads),
        first_key(first_seen(0) / kStripWidth * kStripWidth),
        last_key(whole_strips(query(rows - 1) + 1)) {}

  int64_t query(int64_t r) const { return (first + r) / group; }
  int64_t first_seen(int64_t r) const {
    const int64_t begin = query(r) + 1 - args.window;
    return args.window > 0 && begin > 0 ? begin : 0;
  }
  // Where row r lies in a matrix of all heads, `stride` elements between tokens.
  int64_t offset(int64_t r, int64_t stride) const {
    const int64_t head = item.kv_head * group + (first + r) % group;
    return (item.first_token + query(r)) * stride + head * args.head_dim;
  }
};

// (rows, width of the head) -> the panel whose outputs are rows; `to` is zero where there are none.
void turn_into_outputs(const float* from, int64_t stride, int64_t rows, int64_t columns,
                       float* to) {
  for (int64_t r = 0; r < whole_strips(rows); ++r) {
    float* lane = to + r / kStripWidth * columns * kStripWidth + r % kStripWidth;
    for (int64_t c = 0; c < columns; ++c) {
      lane[c * kStripWidth] = r < rows ? from[r * stride + c] : 0.0f;
    }
  }
}

// (rows, columns) -> the panel whose steps are rows; `steps` lines a strip have room.
void lay_out_steps(const float* from, int64_t stride, int64_t rows, int64_t columns, int64_t steps,
                   float* to) {
  for (int64_t c = 0; c < columns; c += Lanes32::kLanes) {
    float* line = to + c / kStripWidth * steps * kStripWidth + c % kStripWidth;
    for (int64_t r = 0; r < rows; ++r) {
      Lanes32::store(line + r * kStripWidth,
                     Lanes32::load_first(from + r * stride + c, columns - c));
    }
    for (int64_t r = rows; r < steps; ++r) Lanes32::store(line + r * kStripWidth, Lanes32::zero());
  }
  // The second half of a last strip, where vectors are half a strip.
  for (int64_t c = (columns + Lanes32::kLanes - 1) / Lanes32::kLanes * Lanes32::kLanes;
       c < whole_strips(columns); c += Lanes32::kLanes) {
    float* line = to + c / kStripWidth * steps * kStripWidth + c % kStripWidth;
    for (int64_t r = 0; r < steps; ++r) Lanes32::store(line + r * kStripWidth, Lanes32::zero());
  }
}

void load_rows(const RowTile& tile, const Space& space) {
  const AttentionBackwardArgs& args = tile.args;
  const Lanes32::F scale = Lanes32::spread(args.scale);
  for (int64_t r = 0; r < tile.count; ++r) {
    const float* q = args.q + tile.offset(r, args.stride);
    const float* gradient = args.out_gradient + tile.offset(r, args.out_gradient_stride);
    for (int64_t d = 0; d < space.width; d += Lanes32::kLanes) {
      const int64_t left = args.head_dim - d < 0 ? 0 : args.head_dim - d;
      Lanes32::store(space.q + r * space.width + d, Lanes32::load_first(q + d, left) * scale);
      Lanes32::store(space.gradient + r * space.width + d, Lanes32::load_first(gradient + d, left));
    }
  }
  const int64_t steps = kAttentionBackwardRows;
  lay_out_steps(space.q, space.width, tile.count, space.width, steps, space.q_by_entry);
  lay_out_steps(space.gradient, space.width, tile.count, space.width, steps,
                space.gradient_by_entry);
}

// y (rows, keys) = x · panelᵀ over the keys of the tile.
void multiply_by_key(const RowTile& tile, const Space& space, const float* x, const float* panel,
                     float* y) {
  TileArgs product;
  product.x = reinterpret_cast<const uint8_t*>(x);
  product.x_stride_bytes = space.width * int64_t{sizeof(float)};
  product.rows = tile.count;
  product.strip_stride = tile.args.head_dim * kStripWidth;
  product.panel = reinterpret_cast<const uint32_t*>(panel) +
                  tile.first_key / kStripWidth * product.strip_stride;
  product.steps = tile.args.head_dim;
  product.outputs = tile.last_key - tile.first_key;
  product.y = y + tile.first_key;
  product.y_stride = space.keys;
  tile_product<FloatStep>(product);
}

// Scores and dP of one row -> P and dS (before it meets `scale`).
void gradient_of_scores(const RowTile& tile, int64_t r, float* scores, float* dp) {
  using L = Lanes32;
  const L::F cap = L::spread(tile.args.softcap);
  const bool capped = tile.args.softcap > 0.0f;
  for (int64_t j = tile.first_key; j < tile.first_seen(r); ++j) scores[j] = kNoScore;
  for (int64_t j = tile.query(r) + 1; j < tile.last_key; ++j) scores[j] = kNoScore;
  L::F top = L::spread(kNoScore);
  for (int64_t j = tile.first_key; j < tile.last_key; j += L::kLanes) {
    L::F score = L::load(scores + j);
    if (capped) {
      const L::F bent = tanh32(score * L::spread(1.0f / tile.args.softcap)) * cap;
      score = L::select(L::less(L::spread(kNoScore), score), bent, score);
      L::store(scores + j, score);
    }
    top = L::max(score, top);
  }
  const L::F largest = L::spread(L::largest(top));
  L::F total = L::zero();
  L::F weighted = L::zero();
  for (int64_t j = tile.first_key; j < tile.last_key; j += L::kLanes) {
    const L::F e = exp32(L::load(scores + j) - largest);
    total = total + e;
    weighted = L::fma(e, L::load(dp + j), weighted);
  }
  float sum = 0.0f;
  float weighted_sum = 0.0f;
  for (int lane = 0; lane < L::kLanes; ++lane) {
    sum += total[lane];
    weighted_sum += weighted[lane];
  }
  const L::F share = L::spread(1.0f / sum);
  const L::F mean = L::spread(weighted_sum / sum);
  for (int64_t j = tile.first_key; j < tile.last_key; j += L::kLanes) {
    const L::F score = L::load(scores + j);
    const L::F p = exp32(score - largest) * share;
    L::F ds = p * (L::load(dp + j) - mean);
    if (capped) {
      // Keys that are not seen have p = 0; their score must not make the factor infinite.
      const L::F bent = L::max(score, L::zero() - cap) / cap;
      ds = ds * (L::spread(1.0f) - bent * bent);
    }
    L::store(scores + j, p);
    L::store(dp + j, ds);
  }
}

// Keys [first, first + count) of (rows, keys) -> (count, rows), rows kAttentionBackwardRows apart.
void transpose_keys(const float* from, int64_t stride, int64_t rows, int64_t count, float* to) {
  constexpr int kSide = Simd::kLanes;
  for (int64_t r = 0; r < rows; r += kSide) {
    for (int64_t c = 0; c < count; c += kSide) {
      Simd::F square[kSide];
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        square[i] = r + i < rows ? Simd::load(from + (r + i) * stride + c) : Simd::zero();
      }
      Simd::transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        Simd::store(to + (c + i) * kAttentionBackwardRows + r, square[i]);
      }
    }
  }
}

// sums (keys, width) += weightsᵀ · x, x as a panel whose steps are rows.
void add_by_key(const RowTile& tile, const Space& space, const float* weights, const float* panel,
                float* sums) {
  TileArgs product;
  product.x = reinterpret_cast<const uint8_t*>(space.turned);
  product.x_stride_bytes = kAttentionBackwardRows * int64_t{sizeof(float)};
  product.panel = reinterpret_cast<const uint32_t*>(panel);
  product.strip_stride = kAttentionBackwardRows * kStripWidth;
  product.steps = tile.count;
  product.outputs = space.width;
  product.y_stride = space.width;
  product.resume = true;
  for (int64_t key = tile.first_key; key < tile.last_key; key += kAttentionBackwardKeys) {
    const int64_t left = tile.last_key - key;
    product.rows = left < kAttentionBackwardKeys ? left : kAttentionBackwardKeys;
    transpose_keys(weights + key, space.keys, tile.count, product.rows, space.turned);
    product.y = sums + key * space.width;
    tile_product<FloatStep>(product);
  }
}

void store_q_gradient(const RowTile& tile, const Space& space) {
  TileArgs product;
  product.x = reinterpret_cast<const uint8_t*>(space.ds + tile.first_key);
  product.x_stride_bytes = space.keys * int64_t{sizeof(float)};
  product.rows = tile.count;
  product.panel =
      reinterpret_cast<const uint32_t*>(space.k_by_entry) + tile.first_key * kStripWidth;
  product.strip_stride = space.keys * kStripWidth;
  product.steps = tile.last_key - tile.first_key;
  product.outputs = space.width;
  product.y = space.q_gradient;
  product.y_stride = space.width;
  tile_product<FloatStep>(product);
  const AttentionBackwardArgs& args = tile.args;
  const Lanes32::F scale = Lanes32::spread(args.scale);
  for (int64_t r = 0; r < tile.count; ++r) {
    float* out = args.q_gradient + tile.offset(r, args.gradient_stride);
    for (int64_t d = 0; d < args.head_dim; d += Lanes32::kLanes) {
      Lanes32::store_first(out + d, Lanes32::load(space.q_gradient + r * space.width + d) * scale,
                           args.head_dim - d);
    }
  }
}

void store_by_key(const AttentionBackwardArgs& args, const AttentionBackwardItem& item,
                  const Space& space, const float* sums, float* out) {
  for (int64_t j = 0; j < item.n_tokens; ++j) {
    float* row = out + (item.first_token + j) * args.gradient_stride + item.kv_head * args.head_dim;
    for (int64_t d = 0; d < args.head_dim; d += Lanes32::kLanes) {
      Lanes32::store_first(row + d, Lanes32::load(sums + j * space.width + d), args.head_dim - d);
    }
  }
}

void gradient_of_item(const AttentionBackwardArgs& args, const AttentionBackwardItem& item,
                      float* memory) {
  const Space space(args, item.n_tokens, memory);
  const int64_t at = item.first_token * args.stride + item.kv_head * args.head_dim;
  turn_into_outputs(args.k + at, args.stride, item.n_tokens, args.head_dim, space.k_by_key);
  turn_into_outputs(args.v + at, args.stride, item.n_tokens, args.head_dim, space.v_by_key);
  lay_out_steps(args.k + at, args.stride, item.n_tokens, args.head_dim, space.keys,
                space.k_by_entry);
  for (int64_t i = 0; i < space.keys * space.width; ++i) {
    space.k_gradient[i] = 0.0f;
    space.v_gradient[i] = 0.0f;
  }
  const int64_t rows = item.n_tokens * (args.n_heads / args.n_kv_heads);
  for (int64_t row = 0; row < rows; row += kAttentionBackwardRows) {
    const int64_t left = rows - row;
    const RowTile tile(args, item, row,
                       left < kAttentionBackwardRows ? left : kAttentionBackwardRows);
    load_rows(tile, space);
    multiply_by_key(tile, space, space.q, space.k_by_key, space.p);
    multiply_by_key(tile, space, space.gradient, space.v_by_key, space.ds);
    for (int64_t r = 0; r < tile.count; ++r) {
      gradient_of_scores(tile, r, space.p + r * space.keys, space.ds + r * space.keys);
    }
    store_q_gradient(tile, space);
    add_by_key(tile, space, space.ds, space.q_by_entry, space.k_gradient);
    add_by_key(tile, space, space.p, space.gradient_by_entry, space.v_gradient);
  }
  store_by_key(args, item, space, space.k_gradient, args.k_gradient);
  store_by_key(args, item, space, space.v_gradient, args.v_gradient);
}

}  // namespace
