//! How many threads kernels get by default: one for each physical core. Separate because it is
//! a matter of the operating system. Two threads of one core share its multipliers and its caches,
//! so that the second one makes products no faster.

use std::collections::BTreeSet;
use std::path::Path;

/// CPUs of one machine that are looked at, at most.
const MAX_CPUS: usize = 1 << 14;

/// Physical cores that this process may use, but no more than its quota; all that it may use where
/// the system does not say what a core is.
pub fn physical() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = count(Path::new("/proc/self/status"), Path::new("/sys/devices/system/cpu"));
    cores.unwrap_or(allowed).clamp(1, allowed)
}

/// Of the CPUs that `status` allows: how many groups of siblings `topology` knows. `None` if either
/// is not there or not understood.
fn count(status: &Path, topology: &Path) -> Option<usize> {
    let status = std::fs::read_to_string(status).ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let siblings = |cpu: usize| {
        let list = topology.join(format!("cpu{cpu}/topology/thread_siblings_list"));
        list_of(&std::fs::read_to_string(list).ok()?)
    };
    // An empty set of siblings would be no core, and not this one's.
    let cores: BTreeSet<Vec<usize>> =
        list_of(allowed)?.into_iter().map(siblings).collect::<Option<_>>()?;
    Some(cores.len()).filter(|&count| count > 0)
}

/// A list such as `0-3,8`.
fn list_of(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MAX_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_count_once_and_only_where_the_process_may_run() {
        let check = |allowed: &str, siblings: &[&str], expected: Option<usize>| {
            let folder = tempfile::tempdir().unwrap();
            let status = folder.path().join("status");
            std::fs::write(&status, format!("Name:\tx\nCpus_allowed_list:\t{allowed}\n")).unwrap();
            for (cpu, siblings) in siblings.iter().enumerate() {
                let topology = folder.path().join(format!("cpu{cpu}/topology"));
                std::fs::create_dir_all(&topology).unwrap();
                std::fs::write(topology.join("thread_siblings_list"), siblings).unwrap();
            }
            assert_eq!(count(&status, folder.path()), expected, "{allowed} {siblings:?}");
        };
        check("0-1", &["0\n", "1\n"], Some(2));
        check("0-3", &["0,2\n", "1,3\n", "0,2\n", "1,3\n"], Some(2));
        check("0-3", &["0-1", "0-1", "2-3", "2-3"], Some(2));
        check("0,2", &["0,2\n", "1,3\n", "0,2\n", "1,3\n"], Some(1));
        check("3", &["0,2\n", "1,3\n", "0,2\n", "1,3\n"], Some(1));
        // What cannot be right is not guessed at.
        check("0-2", &["0", "1"], None);
        check("", &["0"], None);
        check("0-99999999999", &["0"], None);
        check("0", &["x"], None);
        assert_eq!(count(Path::new("/nonexistent"), Path::new("/")), None);
    }

    #[test]
    fn there_is_at_least_one_core_and_no_more_than_the_process_may_use() {
        let allowed = std::thread::available_parallelism().map_or(1, usize::from);
        assert!((1..=allowed).contains(&physical()));
    }
}
