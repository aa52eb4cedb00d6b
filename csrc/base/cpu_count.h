// How many CPUs this process may use.
#pragma once

#include <string>

namespace qcore {

// CPUs of the affinity mask, and no more than the control group's quota, rounded up: a container
// that is given 2 of 64 CPUs is stopped for most of each period when 64 threads run. At least 1.
int usable_cpus();

// CPUs that the control group of this process may use at a time, infinity without a limit.
//
//   membership  text of /proc/self/cgroup
//   root        where control groups are mounted, "/sys/fs/cgroup"
//
// Reads `cpu.max` (version 2) of the group and of all groups around it, or `cpu.cfs_quota_us` and
// `cpu.cfs_period_us` (version 1) of the mounted group. Files that are missing mean no limit.
double cgroup_cpus(const std::string& membership, const std::string& root);

}  // namespace qcore
