//! The program: parse, run, one line for an error, exit code.

use std::process::ExitCode;

use tiny_sd::cli::{self, Request};

fn main() -> ExitCode {
    let outcome = cli::parse(std::env::args_os(), &mut cli::Process).and_then(|request| {
        match request {
            Request::Show(help) => cli::show(&help),
            Request::Print(text) => cli::print(&text)?,
            Request::Work(job) => cli::work(&job)?,
            Request::Compare(job) => return cli::compare(&job),
            Request::Explain(job) => cli::explain(&job)?,
            Request::Tell(job) => cli::tell(&job)?,
            Request::Models(job) => cli::models(&job)?,
            Request::Devices(job) => cli::list_devices(job)?,
            Request::Schedulers(job) => cli::list_schedulers(job)?,
            Request::Verify(job) => return cli::verify(&job, &mut cli::open),
            Request::Batch(job) => return cli::batch(&job),
            Request::Grid(job) => cli::grid(&job)?,
            Request::Paint(job) => cli::run(&job, &mut cli::open)?,
        }
        Ok(ExitCode::SUCCESS)
    });
    outcome.unwrap_or_else(|error| ExitCode::from(cli::report(&error)))
}
