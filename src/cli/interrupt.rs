//! Ctrl-C and SIGTERM: the first asks the run to stop, the second does not wait for it. Separate
//! because a signal belongs to the process, not to a run.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::files;
use crate::error::{Error, Kind, Result};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// From now on a signal sets a flag instead of ending the process.
///
/// # Errors
/// If the operating system refuses.
pub(super) fn install(is_quiet: bool) -> Result<()> {
    static INSTALLED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    let handler = move || on_signal(is_quiet);
    let install = || ctrlc::set_handler(handler).map_err(|error| error.to_string());
    let installed = INSTALLED.get_or_init(install);
    installed.clone().map_err(|error| Error::other(format!("cannot watch for Ctrl-C: {error}")))
}

/// Set once a signal has come.
pub(super) fn flag() -> &'static AtomicBool {
    &REQUESTED
}

/// # Errors
/// [`Error::interrupted`] once a signal has come.
pub(super) fn check() -> Result<()> {
    if REQUESTED.load(Ordering::Relaxed) { Err(Error::interrupted()) } else { Ok(()) }
}

fn on_signal(is_quiet: bool) {
    if REQUESTED.swap(true, Ordering::Relaxed) {
        // Writing a picture takes milliseconds; ended in the middle, it would leave its
        // temporary file.
        let _no_half_written_file = files::no_temporary_file();
        files::remove_passing_files();
        std::process::exit(Kind::Interrupted.exit_code().into());
    }
    if !is_quiet {
        let _ = writeln!(std::io::stderr(), "stopping; Ctrl-C again stops at once");
    }
}
