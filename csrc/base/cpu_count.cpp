#include "base/cpu_count.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>
#include <thread>

namespace qcore {
namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// "max 100000" or "200000 100000": microseconds of CPU time in each period. A version 1 file says
// -1 for no limit.
double cpus_of(const std::string& quota_and_period) {
  std::istringstream words(quota_and_period);
  double quota = 0.0;
  double period = 0.0;
  if (!(words >> quota >> period) || quota <= 0.0 || period <= 0.0) return kNoLimit;
  return quota / period;
}

// The group of version 2, "" for the root or none: the line "0::/path".
std::string unified_group(const std::string& membership) {
  std::istringstream lines(membership);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("0::/", 0) == 0) return line.substr(3) == "/" ? "" : line.substr(3);
  }
  return "";
}

int affinity_cpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

double cgroup_cpus(const std::string& membership, const std::string& root) {
  double least = cpus_of(text_of(root + "/cpu/cpu.cfs_quota_us") + " " +
                         text_of(root + "/cpu/cpu.cfs_period_us"));
  for (std::string group = unified_group(membership);; group.erase(group.rfind('/'))) {
    least = std::min(least, cpus_of(text_of(root + group + "/cpu.max")));
    if (group.empty()) return least;
  }
}

int usable_cpus() {
  const double quota = cgroup_cpus(text_of("/proc/self/cgroup"), "/sys/fs/cgroup");
  const double cpus = std::min(static_cast<double>(affinity_cpus()), std::ceil(quota));
  return std::max(1, static_cast<int>(cpus));
}

}  // namespace qcore
