// The CPUs that a control group leaves to the process, from files written here.
#include "base/cpu_count.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>

#include "check.h"

using namespace qcore;
namespace fs = std::filesystem;

namespace {

// A folder in the place of /sys/fs/cgroup.
struct Groups {
  fs::path root = fs::temp_directory_path() / ("qcore-cgroup-" + std::to_string(getpid()));
  Groups() { fs::create_directories(root); }
  ~Groups() { fs::remove_all(root); }

  void put(const std::string& file, const std::string& text) const {
    fs::create_directories((root / file).parent_path());
    std::ofstream(root / file) << text;
  }
  double cpus(const std::string& membership) const {
    return cgroup_cpus(membership, root.string());
  }
};

void no_files_mean_no_limit() {
  const Groups groups;
  CHECK(std::isinf(groups.cpus("")));
  CHECK(std::isinf(groups.cpus("0::/a/b\n")));
}

void version_2_takes_the_least_of_the_groups_around() {
  const Groups groups;
  groups.put("a/cpu.max", "150000 100000\n");
  groups.put("a/b/cpu.max", "max 100000\n");
  CHECK(groups.cpus("0::/a/b\n") == 1.5);
  CHECK(groups.cpus("12:cpu:/x\n0::/a\n") == 1.5);
  CHECK(std::isinf(groups.cpus("0::/\n")));
  groups.put("cpu.max", "50000 100000\n");
  CHECK(groups.cpus("0::/a/b\n") == 0.5);
  CHECK(groups.cpus("0::/\n") == 0.5);
}

void version_1_is_read_at_the_mount() {
  const Groups groups;
  groups.put("cpu/cpu.cfs_period_us", "100000\n");
  groups.put("cpu/cpu.cfs_quota_us", "-1\n");
  CHECK(std::isinf(groups.cpus("4:cpu,cpuacct:/docker/1\n")));
  groups.put("cpu/cpu.cfs_quota_us", "400000\n");
  CHECK(groups.cpus("4:cpu,cpuacct:/docker/1\n") == 4.0);
}

void broken_files_mean_no_limit() {
  const Groups groups;
  for (const char* text : {"", "x y", "100000", "0 100000", "100000 0"}) {
    groups.put("cpu.max", text);
    CHECK(std::isinf(groups.cpus("0::/\n")));
  }
}

}  // namespace

int main() {
  no_files_mean_no_limit();
  version_2_takes_the_least_of_the_groups_around();
  version_1_is_read_at_the_mount();
  broken_files_mean_no_limit();
  CHECK(usable_cpus() >= 1);
  return qcore::test::report();
}
