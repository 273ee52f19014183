//! Writing pictures so that each file appears whole or not at all. Separate because it is the
//! only place that changes the disk, and the one that an interruption must not cut in half.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use tempfile::NamedTempFile;

use super::output::{Target, before_suffix};
use super::surroundings::At;
use crate::error::{Error, Result};

/// How many names after a taken one are tried.
const MAX_NAMES_TRIED: usize = 10_000;

/// How many symbolic links are followed, as Linux does.
const MAX_LINKS: usize = 40;

/// Held while a temporary file exists.
static TEMPORARY_FILE: Mutex<()> = Mutex::new(());

/// Files that go with the run: as many as there are pictures under way.
static PASSING_FILES: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// How temporary files are named. Whoever holds the lock of a batch's folder may remove what
/// another batch left there.
const BATCH_PREFIX: &str = ".tiny-sd-batch-";
const PREFIX: &str = ".tiny-sd-";
const SUFFIX: &str = ".part";

fn passing_files() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    PASSING_FILES.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Names a file that goes with the run.
pub(super) fn add_passing_file(path: &Path) {
    passing_files().insert(path.to_owned());
}

/// Removes a file that was to go with the run.
pub(super) fn remove_passing_file(path: &Path) {
    passing_files().remove(path);
    // Whoever removed it before wanted the same.
    let _ = fs::remove_file(path);
}

/// Removes all files that go with the run.
pub(super) fn remove_passing_files() {
    for path in std::mem::take(&mut *passing_files()) {
        let _ = fs::remove_file(path);
    }
}

/// Waits until no temporary file exists, and lets none be made while the guard lives.
pub(super) fn no_temporary_file() -> MutexGuard<'static, ()> {
    // A panic elsewhere has unwound its temporary file away.
    TEMPORARY_FILE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What is at a path, symbolic links followed.
pub(super) fn at(path: &Path) -> At {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => At::Folder,
        Ok(metadata) if metadata.is_file() => At::File,
        Ok(_) => At::Device,
        Err(_) => At::Nothing,
    }
}

/// Finds out whether a picture could be written there, before an hour is spent on it; leaves
/// nothing behind.
///
/// # Errors
/// If the folder is missing or nothing can be created in it, or the file cannot be replaced.
pub(super) fn check_writable(target: &Target) -> Result<()> {
    let (Target::Replace(path) | Target::Fresh(path)) = target else { return check_stdout() };
    let path = match target {
        Target::Replace(_) => end_of_links(path)?,
        Target::Stdout | Target::Fresh(_) => path.clone(),
    };
    match (target, at(&path)) {
        (Target::Replace(_), At::Device) => return Ok(()),
        (Target::Replace(_), At::Folder) => return Err(failed(&path, &"it is a folder")),
        (Target::Replace(_), At::File) => {
            // By its permissions the file may be protected although its folder is not.
            File::options().write(true).open(&path).map_err(|error| failed(&path, &error))?;
        }
        (Target::Stdout | Target::Fresh(_), _) | (Target::Replace(_), At::Nothing) => {}
    }
    let folder = folder_of(&path);
    if at(folder) != At::Folder {
        return Err(failed(&path, &format!("there is no folder {}", folder.display())));
    }
    let _one_at_a_time = no_temporary_file();
    temporary_file(&path, PREFIX).map(drop)
}

/// Rust opens `/dev/null` for reading and writing where a process starts without a standard output;
/// a shell's `> /dev/null` is for writing only, and means it.
#[cfg(target_os = "linux")]
fn check_stdout() -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    const DEV_NULL: u64 = 0x103;
    const READ_WRITE: u32 = 0o2;
    let device = fs::metadata("/proc/self/fd/1").map(|metadata| metadata.rdev()).ok();
    let info = fs::read_to_string("/proc/self/fdinfo/1").unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    if device == Some(DEV_NULL) && flags.is_some_and(|flags| flags & 0o3 == READ_WRITE) {
        return Err(Error::other("standard output is closed (-o -): the picture would be lost"));
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn check_stdout() -> Result<()> {
    Ok(())
}

/// Writes a whole picture; gives the path that it got, `None` for standard output.
///
/// # Errors
/// If it cannot be written; then no file is left, and what was there before still is.
pub(super) fn write(target: &Target, bytes: &[u8]) -> Result<Option<PathBuf>> {
    match target {
        Target::Stdout => {
            let mut stdout = io::stdout().lock();
            let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
            written.map_err(|error| match error.kind() {
                ErrorKind::BrokenPipe => {
                    Error::other("standard output was closed before the picture was written")
                }
                _ => Error::other(format!("standard output: {error}")),
            })?;
            Ok(None)
        }
        Target::Replace(path) => {
            let end = end_of_links(path)?;
            match at(&end) {
                At::Device => File::options()
                    .write(true)
                    .open(&end)
                    .and_then(|mut device| device.write_all(bytes))
                    .map_err(|error| failed(path, &error))?,
                At::Nothing | At::File | At::Folder => replace(&end, bytes)?,
            }
            Ok(Some(path.clone()))
        }
        Target::Fresh(path) => write_fresh(path, bytes).map(Some),
    }
}

/// Finds out whether a batch could write a picture there; makes its folder.
///
/// # Errors
/// If not.
pub(super) fn check_batch_place(root: &Path, path: &Path) -> Result<()> {
    let folder = folder_of(path);
    let is_link = |path: &&Path| fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
    let below = folder.ancestors().take_while(|ancestor| *ancestor != root);
    if let Some(link) = below.filter(|ancestor| *ancestor != Path::new("")).find(is_link) {
        let link = link.display();
        return Err(failed(path, &format!("{link} is a link, which may lead out of --out-dir")));
    }
    fs::create_dir_all(folder).map_err(|error| failed(path, &error))?;
    if at(path) == At::Folder {
        return Err(failed(path, &"it is a folder"));
    }
    let _one_at_a_time = no_temporary_file();
    temporary_file(path, BATCH_PREFIX).map(drop)
}

/// Writes a whole picture of a batch in the place of whatever is there.
///
/// # Errors
/// If it cannot be written; then what was there before still is.
pub(super) fn write_in_batch(path: &Path, bytes: &[u8]) -> Result<()> {
    let _one_at_a_time = no_temporary_file();
    let file = filled(path, bytes, BATCH_PREFIX)?;
    file.persist(path).map_err(|error| failed(path, &error.error))?;
    Ok(())
}

/// Removes what a batch that was killed left in a folder that is locked now.
pub(super) fn remove_leftovers(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(BATCH_PREFIX) && name.ends_with(SUFFIX) {
            // It costs some bytes on the disk and nothing else.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let _one_at_a_time = no_temporary_file();
    let file = filled(path, bytes, PREFIX)?;
    if let Ok(old) = fs::metadata(path) {
        // Somebody chose these; a file system without them is no reason to lose the picture.
        let _ = file.as_file().set_permissions(old.permissions());
    }
    file.persist(path).map_err(|error| failed(path, &error.error))?;
    Ok(())
}

/// Two runs that want the same name at the same time get two names: the operating system decides
/// which is taken, not a look beforehand.
fn write_fresh(path: &Path, bytes: &[u8]) -> Result<PathBuf> {
    let _one_at_a_time = no_temporary_file();
    let mut file = filled(path, bytes, PREFIX)?;
    for number in 0..=MAX_NAMES_TRIED {
        let name = match number {
            0 => path.to_owned(),
            _ => before_suffix(path, &format!("-{number}")),
        };
        match file.persist_noclobber(&name) {
            Ok(_) => return Ok(name),
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => file = error.file,
            Err(error) => return Err(failed(&name, &error.error)),
        }
    }
    Err(failed(path, &format!("taken, and so are the {MAX_NAMES_TRIED} names after it")))
}

fn filled(path: &Path, bytes: &[u8], prefix: &str) -> Result<NamedTempFile> {
    let mut file = temporary_file(path, prefix)?;
    // Some file systems say only here that they are full.
    let file_itself = file.as_file_mut();
    let written = file_itself.write_all(bytes).and_then(|()| file_itself.sync_all());
    written.map_err(|error| failed(path, &error))?;
    Ok(file)
}

/// A file beside `path`, with the permissions of any new file: tempfile would make it 0600.
fn temporary_file(path: &Path, prefix: &str) -> Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).suffix(SUFFIX);
    if let Some(permissions) = new_file_permissions() {
        builder.permissions(permissions);
    }
    builder.tempfile_in(folder_of(path)).map_err(|error| {
        let folder = folder_of(path).display().to_string();
        let text = error.to_string();
        // tempfile adds the name of the temporary file, which says nothing to the user.
        let reason = text.split_once(" at path ").map_or(text.as_str(), |(reason, _)| reason);
        failed(path, &format!("cannot create a file in {folder}: {reason}"))
    })
}

#[cfg(unix)]
fn new_file_permissions() -> Option<Permissions> {
    use std::os::unix::fs::PermissionsExt;
    // The umask takes away what the user does not want.
    Some(Permissions::from_mode(0o666))
}

#[cfg(not(unix))]
fn new_file_permissions() -> Option<Permissions> {
    None
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// The path that a chain of symbolic links ends at, whether or not anything is there: renaming
/// onto a link would replace the link.
fn end_of_links(path: &Path) -> Result<PathBuf> {
    let mut end = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&end) {
            Ok(next) => end = folder_of(&end).join(next),
            Err(_) => return Ok(end),
        }
    }
    Err(failed(path, &"too many symbolic links"))
}

fn failed(path: &Path, why: &dyn std::fmt::Display) -> Error {
    Error::other(format!("cannot write {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn names(folder: &TempDir) -> Vec<String> {
        let entries = fs::read_dir(folder.path()).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries.map(|e| name(e).into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_plain_name_is_replaced_and_a_fresh_one_never_is() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a.png");
        for bytes in [b"one", b"two"] {
            let target = Target::Replace(path.clone());
            check_writable(&target).unwrap();
            assert_eq!(write(&target, bytes).unwrap(), Some(path.clone()));
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
        for (bytes, name) in [(b"3", "a-1.png"), (b"4", "a-2.png")] {
            let target = Target::Fresh(path.clone());
            check_writable(&target).unwrap();
            let written = write(&target, bytes).unwrap().unwrap();
            assert_eq!(written, folder.path().join(name));
            assert_eq!(fs::read(written).unwrap(), bytes);
        }
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(&folder), ["a-1.png", "a-2.png", "a.png"]);
    }

    #[test]
    fn many_writers_of_one_fresh_name_get_a_name_each() {
        let folder = TempDir::new().unwrap();
        let target = Target::Fresh(folder.path().join("x.png"));
        std::thread::scope(|scope| {
            for byte in 0..8_u8 {
                let target = &target;
                scope.spawn(move || write(target, &[byte]).unwrap());
            }
        });
        let read = |name: &String| fs::read(folder.path().join(name)).unwrap();
        let mut contents: Vec<_> = names(&folder).iter().flat_map(read).collect();
        contents.sort_unstable();
        assert_eq!(contents, (0..8).collect::<Vec<u8>>());
    }

    #[test]
    fn what_cannot_be_written_is_an_error_that_says_why_and_leaves_nothing() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        for (path, expected) in [
            (folder.path().join("no/x.png"), "there is no folder"),
            (file.join("x.png"), "there is no folder"),
        ] {
            for target in [Target::Replace(path.clone()), Target::Fresh(path.clone())] {
                let error = check_writable(&target).unwrap_err();
                assert_eq!(error.kind(), crate::error::Kind::Other);
                assert!(error.to_string().contains(expected), "{error}");
                assert!(write(&target, b"x").is_err());
            }
        }
        let target = Target::Replace(folder.path().to_owned());
        assert!(check_writable(&target).unwrap_err().to_string().ends_with("it is a folder"));
        let error = write(&target, b"x").unwrap_err().to_string();
        assert!(!error.contains(".part"), "{error}");
        assert_eq!(names(&folder), ["file"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_devices_written_to_and_permissions_are_those_of_any_file() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = TempDir::new().unwrap();
        let [plain, target, link, dangling] =
            ["plain", "target.png", "link.png", "dangling.png"].map(|n| folder.path().join(n));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;

        fs::write(&plain, "made by the system").unwrap();
        write(&Target::Replace(target.clone()), b"1").unwrap();
        assert_eq!(mode(&target), mode(&plain));

        fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
        symlink("target.png", &link).unwrap();
        check_writable(&Target::Replace(link.clone())).unwrap();
        write(&Target::Replace(link.clone()), b"2").unwrap();
        assert_eq!((fs::read(&target).unwrap(), mode(&target)), (b"2".to_vec(), 0o640));
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());

        symlink("new.png", &dangling).unwrap();
        write(&Target::Replace(dangling.clone()), b"3").unwrap();
        assert_eq!(fs::read(folder.path().join("new.png")).unwrap(), b"3");

        let [a, b] = ["a.png", "b.png"].map(|name| folder.path().join(name));
        symlink(&a, &b).unwrap();
        symlink(&b, &a).unwrap();
        let error = check_writable(&Target::Replace(a)).unwrap_err();
        assert!(error.to_string().ends_with("too many symbolic links"), "{error}");

        let null = Target::Replace("/dev/null".into());
        check_writable(&null).unwrap();
        write(&null, b"4").unwrap();
        assert_eq!(at(Path::new("/dev/null")), At::Device);
    }
}
