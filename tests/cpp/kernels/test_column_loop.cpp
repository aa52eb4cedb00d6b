// column_loop and quadratic_form: every backend gives the bytes of the plain code on awkward
// shapes, and the forms are those of float64.
#include "kernels/column_loop/column_loop.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "base/backend.h"
#include "check.h"
#include "kernels/numbers.h"
#include "kernels/quadratic_form/quadratic_form.h"
#include "quant/spec.h"

using namespace qcore;
using namespace qcore::kernels;

namespace {

struct Shape {
  int64_t strips;
  int64_t columns;
  int64_t group_size;
};

// One below and above a panel of 8, a tile of two strips and a pass of 128 columns; then short last
// groups.
const Shape kShapes[] = {{1, 1, 1},     {1, 13, 1},    {2, 21, 7},    {3, 16, 8},
                         {1, 36, 9},    {8, 36, 12},   {5, 254, 127}, {2, 384, 128},
                         {3, 258, 129}, {1, 300, 300}, {4, 320, 64},  {9, 32, 16},
                         {2, 17, 16},   {3, 300, 128}, {1, 95, 32},   {2, 5, 8}};

struct Result {
  std::vector<uint8_t> codes;
  std::vector<float> scales, zeros, errors;
  std::vector<double> losses;

  bool operator==(const Result& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
    };
    return same(codes, other.codes) && same(scales, other.scales) && same(zeros, other.zeros) &&
           same(errors, other.errors) && same(losses, other.losses);
  }
};

// An upper triangle with a diagonal that stays away from zero, in panels.
std::vector<float> panels_of(const PanelLayout& layout, int64_t columns, test::Numbers& numbers) {
  const int64_t groups = (columns + layout.group_size - 1) / layout.group_size;
  std::vector<float> panels(static_cast<size_t>(layout.panel(groups, 0)));
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = layout.first_row(j / layout.group_size); i <= j; ++i) {
      panels[static_cast<size_t>(layout.at(i, j))] =
          i < j ? 0.3f * numbers.next() : 1.0f + 0.5f * numbers.next();
    }
  }
  return panels;
}

Result run(const ColumnLoopArgs& problem, Backend backend) {
  const int64_t lanes = problem.n_strips * kStripRows;
  const int64_t groups = group_count(problem.in_features, problem.group_size);
  Result out;
  out.codes.resize(static_cast<size_t>(problem.in_features * lanes));
  out.errors.resize(out.codes.size());
  out.scales.resize(static_cast<size_t>(groups * lanes));
  out.zeros.resize(out.scales.size());
  std::vector<float> scratch(
      static_cast<size_t>(3 * PanelLayout{problem.group_size}.width() * lanes), 1e30f);
  ColumnLoopArgs args = problem;
  args.codes = out.codes.data();
  args.errors = out.errors.data();
  args.scales = out.scales.data();
  args.zeros = out.zeros.data();
  args.scratch = scratch.data();
  out.losses.assign(static_cast<size_t>(2 * lanes), 1e30);
  args.losses = args.damping == nullptr ? nullptr : out.losses.data();
  column_loop(args, backend);
  return out;
}

// Subnormal scales, groups of zeros and negative zeros included.
void every_backend_gives_the_bytes_of_the_plain_code() {
  test::Numbers numbers;
  for (const Shape& shape : kShapes) {
    const int64_t columns = shape.columns;
    std::vector<float> weight = numbers.vector(shape.strips * columns * kStripRows);
    for (int64_t i = 0; i < columns * kStripRows; ++i) {
      if (i % kStripRows == 3) weight[static_cast<size_t>(i)] = i % 2 == 0 ? 0.0f : -0.0f;
      if (i % kStripRows == 5) weight[static_cast<size_t>(i)] *= 1e-9f;
    }
    const std::vector<float> r = panels_of(PanelLayout{shape.group_size}, columns, numbers);
    const std::vector<float> h = panels_of(PanelLayout{shape.group_size, true}, columns, numbers);
    std::vector<float> importance = numbers.vector(columns);
    for (float& value : importance) value *= value;
    const std::vector<float> damping = numbers.vector(columns);
    ColumnLoopArgs problem;
    problem.weight = weight.data();
    problem.column_weights = importance.data();
    problem.n_strips = shape.strips;
    problem.in_features = columns;
    problem.group_size = shape.group_size;
    for (const int bits : kCodeBits) {
      for (const bool symmetric : {false, true}) {
        for (const GridRule rule : {GridRule::kMinMax, GridRule::kWeighted, GridRule::kClipped}) {
          for (const Dtype dtype : {Dtype::kFloat16, Dtype::kBfloat16, Dtype::kFloat32}) {
            problem.bits = bits;
            problem.symmetric = symmetric;
            problem.signed_scales = bits != 3;
            problem.scale_dtype = dtype;
            problem.rule = rule;
            problem.r = rule == GridRule::kClipped ? nullptr : r.data();
            // With and without losses.
            problem.damping = problem.r == nullptr || bits == 8 ? nullptr : damping.data();
            problem.hessian = rule == GridRule::kClipped ? h.data() : nullptr;
            const Result expected = run(problem, Backend::kRef);
            for (const Backend backend : available_backends()) {
              CHECK(column_loop_backend(backend) == backend);
              CHECK(run(problem, backend) == expected);
            }
          }
        }
      }
    }
  }
}

// ‖e R‖² and Σ_j damping_j e_j² of the errors e that the loop leaves.
void losses_are_those_of_float64() {
  test::Numbers numbers;
  for (const Shape& shape : kShapes) {
    const PanelLayout layout{shape.group_size};
    const int64_t columns = shape.columns;
    const std::vector<float> weight = numbers.vector(shape.strips * columns * kStripRows);
    const std::vector<float> r = panels_of(layout, columns, numbers);
    std::vector<float> damping = numbers.vector(columns);
    for (float& value : damping) value *= value;
    ColumnLoopArgs problem;
    problem.weight = weight.data();
    problem.r = r.data();
    problem.damping = damping.data();
    problem.n_strips = shape.strips;
    problem.in_features = columns;
    problem.group_size = shape.group_size;
    const Result found = run(problem, Backend::kRef);
    for (int64_t row = 0; row < shape.strips * kStripRows; ++row) {
      const int64_t first = row / kStripRows * columns * kStripRows + row % kStripRows;
      const auto error = [&](int64_t j) {
        return static_cast<double>(found.errors[static_cast<size_t>(first + j * kStripRows)]);
      };
      double sums[2] = {};
      double size = 0.0;
      for (int64_t j = 0; j < columns; ++j) {
        double component = 0.0;
        double terms = 0.0;
        for (int64_t i = 0; i <= j; ++i) {
          const double term = error(i) * r[static_cast<size_t>(layout.at(i, j))];
          component += term;
          terms += std::fabs(term);
        }
        sums[0] += component * component;
        sums[1] += damping[static_cast<size_t>(j)] * error(j) * error(j);
        size += terms * terms;
      }
      const auto at = static_cast<size_t>(row / kStripRows * 2 * kStripRows + row % kStripRows);
      // A component takes j + 1 roundings, its square and a sum over a panel 9.
      CHECK_NEAR(found.losses[at], sums[0], static_cast<double>(2 * columns + 9) * 0x1p-24 * size);
      CHECK_NEAR(found.losses[at + kStripRows], sums[1], 11.0 * 0x1p-24 * sums[1]);
    }
  }
}

void forms_are_those_of_float64() {
  test::Numbers numbers;
  for (const int64_t strips : {1, 2, 3, 8}) {
    for (const int64_t n : {0, 1, 7, 8, 9, 127, 128, 129, 300}) {
      const PanelLayout layout{kFormGroup};
      const std::vector<float> d = numbers.vector(strips * n * kStripRows);
      const std::vector<float> h = panels_of(layout, n, numbers);
      std::vector<float> scratch(static_cast<size_t>(strips * kFormGroup * kStripRows), 1e30f);
      const auto form = [&](Backend backend) {
        std::vector<double> out(static_cast<size_t>(strips * kStripRows), 1e30);
        QuadraticFormArgs args{d.data(), h.data(), scratch.data(), out.data(), strips, n};
        quadratic_form(args, backend);
        return out;
      };
      const std::vector<double> plain = form(Backend::kRef);
      for (const Backend backend : available_backends()) CHECK(form(backend) == plain);
      for (int64_t row = 0; row < strips * kStripRows; ++row) {
        const float* x = d.data() + row / kStripRows * n * kStripRows + row % kStripRows;
        double exact = 0.0;
        double size = 0.0;
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t i = 0; i <= j; ++i) {
            const double term = static_cast<double>(x[i * kStripRows]) * x[j * kStripRows] *
                                h[static_cast<size_t>(layout.at(i, j))] * (i < j ? 2.0 : 1.0);
            exact += term;
            size += std::fabs(term);
          }
        }
        CHECK_NEAR(plain[static_cast<size_t>(row)], exact, static_cast<double>(n) * 0x1p-24 * size);
      }
    }
  }
}

}  // namespace

int main() {
  every_backend_gives_the_bytes_of_the_plain_code();
  losses_are_those_of_float64();
  forms_are_those_of_float64();
  return qcore::test::report();
}
