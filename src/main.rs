//! The program: parse, run, one line for an error, exit code.

use std::process::ExitCode;

use tiny_sd::cli::{self, Request};

fn main() -> ExitCode {
    let outcome = cli::parse(std::env::args_os(), &mut cli::Process).and_then(|request| {
        match request {
            Request::Show(help) => cli::show(&help),
            Request::Work(job) => cli::work(&job)?,
            Request::Paint(job) => cli::run(&job, &mut cli::open)?,
        }
        Ok(())
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(cli::report(&error)),
    }
}
