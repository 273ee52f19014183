//! What the meaning of a command line depends on beside its own text, and the process as it is.
//! Separate so that arguments become jobs without effects, and tests bring their own surroundings.

use std::collections::hash_map::RandomState;
use std::ffi::OsString;
use std::hash::{BuildHasher, Hasher};
use std::io::{IsTerminal, Read};
use std::path::Path;

use super::files;

/// What the meaning of a command line depends on beside its text (and whether `--model` is a
/// folder): looked at, never changed.
pub trait Surroundings {
    /// Somebody would have to type the prompt.
    fn stdin_is_terminal(&self) -> bool;
    /// Bytes written to standard output would land on a screen.
    fn stdout_is_terminal(&self) -> bool;
    /// What is said on the way would land on a screen.
    fn stderr_is_terminal(&self) -> bool;
    /// Standard input to its end, or one byte more than `limit`.
    ///
    /// # Errors
    /// If reading fails.
    fn read_stdin(&mut self, limit: usize) -> std::io::Result<Vec<u8>>;
    /// What is at a path.
    fn at(&self, path: &Path) -> At;
    /// A file to its end, or one byte more than `limit`.
    ///
    /// # Errors
    /// If it cannot be read.
    fn read_file(&self, path: &Path, limit: usize) -> std::io::Result<Vec<u8>>;
    /// A variable of the environment.
    fn variable(&self, name: &str) -> Option<OsString>;
    /// A seed that nobody can guess and anybody can type.
    fn random_seed(&mut self) -> u64;
}

/// What is at a path, symbolic links followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Nothing, or nothing that can be seen.
    Nothing,
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A device, a pipe or a socket.
    Device,
}

/// The process's own standard streams, disk and randomness.
#[derive(Debug, Clone, Copy, Default)]
pub struct Process;

impl Surroundings for Process {
    fn stdin_is_terminal(&self) -> bool {
        std::io::stdin().is_terminal()
    }

    fn stdout_is_terminal(&self) -> bool {
        std::io::stdout().is_terminal()
    }

    fn stderr_is_terminal(&self) -> bool {
        std::io::stderr().is_terminal()
    }

    fn read_stdin(&mut self, limit: usize) -> std::io::Result<Vec<u8>> {
        read_up_to(std::io::stdin().lock(), limit)
    }

    fn read_file(&self, path: &Path, limit: usize) -> std::io::Result<Vec<u8>> {
        read_up_to(std::fs::File::open(path)?, limit)
    }

    fn at(&self, path: &Path) -> At {
        files::at(path)
    }

    fn variable(&self, name: &str) -> Option<OsString> {
        std::env::var_os(name)
    }

    /// 32 bits, as other tools have them. The keys of std's hash maps come from the operating
    /// system's randomness, which spares a dependency.
    fn random_seed(&mut self) -> u64 {
        RandomState::new().build_hasher().finish() >> 32
    }
}

/// One byte more than `limit` says that there is more.
fn read_up_to(from: impl Read, limit: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    from.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Nothing is a terminal, standard input holds `stdin`, `there` exist, random is 7.
    #[derive(Default)]
    pub struct Fake {
        pub stdin: Option<Vec<u8>>,
        pub stdout_is_terminal: bool,
        pub stderr_is_terminal: bool,
        pub there: Vec<(&'static str, At)>,
        pub files: Vec<(&'static str, Vec<u8>)>,
        pub variables: Vec<(&'static str, &'static str)>,
    }

    impl Surroundings for Fake {
        fn stdin_is_terminal(&self) -> bool {
            self.stdin.is_none()
        }

        fn stdout_is_terminal(&self) -> bool {
            self.stdout_is_terminal
        }

        fn stderr_is_terminal(&self) -> bool {
            self.stderr_is_terminal
        }

        fn read_stdin(&mut self, limit: usize) -> std::io::Result<Vec<u8>> {
            let bytes = self.stdin.take().expect("read once, and only where there is something");
            Ok(bytes.into_iter().take(limit + 1).collect())
        }

        fn at(&self, path: &Path) -> At {
            let found = self.there.iter().find(|(name, _)| Path::new(name) == path);
            found.map_or(At::Nothing, |(_, at)| *at)
        }

        fn read_file(&self, path: &Path, limit: usize) -> std::io::Result<Vec<u8>> {
            let found = self.files.iter().find(|(name, _)| Path::new(name) == path);
            let (_, bytes) = found.ok_or(std::io::ErrorKind::NotFound)?;
            Ok(bytes.iter().copied().take(limit + 1).collect())
        }

        fn variable(&self, name: &str) -> Option<OsString> {
            let found = self.variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| value.into())
        }

        fn random_seed(&mut self) -> u64 {
            7
        }
    }
}
