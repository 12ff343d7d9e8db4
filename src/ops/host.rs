//! Memory of the machine that this runs on.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// Bytes of memory that a process may still take: what the system calls available, or what is left up to the lowest limit of this
/// process's cgroups. None where the system does not tell.
pub fn free_memory() -> Option<u64> {
    free_on_host(Path::new("/"))
}

/// `root` is that of the file system; another one in tests.
fn free_on_host(root: &Path) -> Option<u64> {
    let available = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|t| kilobytes(&t, "MemAvailable:"));
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    available.into_iter().chain(groups.lines().filter_map(|line| left_in(root, line))).min()
}

fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// What is left in the cgroup that a line of `/proc/self/cgroup` names and in all above it. Files that the page cache holds
/// can be dropped, so they do not count as used.
fn left_in(root: &Path, line: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?);
    let (mount, limit, used, cached) = match controllers {
        "" => ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
        c if c.split(',').any(|c| c == "memory") => {
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        }
        _ => return None,
    };
    let number = |p: PathBuf| fs::read_to_string(p).ok()?.trim().parse::<u64>().ok();
    // A path that leads out of what this process sees of the hierarchy begins with `..`.
    let path: PathBuf = Path::new(path).components().filter(|c| matches!(c, Component::Normal(_))).collect();
    let left = |dir: &Path| {
        let dir = root.join(mount).join(dir);
        // `max`, or a file that is not there: no limit here.
        let (limit, used) = (number(dir.join(limit))?, number(dir.join(used))?);
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let cached = stat.lines().find_map(|l| l.strip_prefix(cached)?.trim().parse::<u64>().ok()).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    };
    path.ancestors().filter_map(left).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file system of these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    4000 kB\n");

    #[test]
    fn without_a_limit_the_system_says_what_is_available() {
        assert_eq!(free_on_host(root(&[MEMINFO]).path()), Some(4000 * 1024));
        assert_eq!(free_on_host(root(&[]).path()), None);
        let unlimited = [MEMINFO, ("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/memory.max", "max\n")];
        assert_eq!(free_on_host(root(&unlimited).path()), Some(4000 * 1024));
        assert!(free_memory().is_none_or(|free| free > 1 << 20));
    }

    #[test]
    fn the_lowest_limit_of_all_cgroups_above_counts() {
        let files = |current: &'static str| {
            [
                MEMINFO,
                ("proc/self/cgroup", "0::/job/step\n"),
                ("sys/fs/cgroup/job/step/memory.max", "max\n"),
                ("sys/fs/cgroup/job/step/memory.current", "300000\n"),
                ("sys/fs/cgroup/job/memory.max", "1000000\n"),
                ("sys/fs/cgroup/job/memory.current", current),
                ("sys/fs/cgroup/job/memory.stat", "anon 1\ninactive_file 100000\nactive_file 7\n"),
            ]
        };
        assert_eq!(free_on_host(root(&files("400000\n")).path()), Some(700_000));
        assert_eq!(free_on_host(root(&files("1200000\n")).path()), Some(0));
    }

    #[test]
    fn the_first_version_of_cgroups_is_read_too() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "5:cpu,cpuacct:/other\n4:memory:/slurm/job\n"),
            // Inside a container the path of the host is not there, but the container's own limit is.
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "500000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "cache 9\ntotal_inactive_file 50000\n"),
        ];
        assert_eq!(free_on_host(root(&files).path()), Some(1_550_000));
    }
}
