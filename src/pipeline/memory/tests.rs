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
    assert!(free_memory(&Device::Cpu).unwrap().is_none_or(|free| free > 1 << 20));
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
