//! Where this user's caches are. Separate because weights, digests and kernels have one each, and
//! none knows the others.

use std::path::PathBuf;

/// The folder `name` of tiny-sd's caches: under `XDG_CACHE_HOME`, else `~/.cache`. None if there is
/// no home folder.
pub fn of_user(name: &str) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("tiny-sd").join(name))
}
