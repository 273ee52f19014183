//! `tiny-sd devices`: what this machine can compute on, and why not. Separate because its product
//! is text on standard output, and nothing is loaded for it but libraries.

use std::ffi::OsString;

use clap::{CommandFactory, FromArgMatches, Parser};
use serde_json::{Value, json};

use super::command::usage;
use super::job::Request;
use super::print;
use crate::backend::cpu;
use crate::backend::cuda::compiler::Compiler;
use crate::backend::cuda::kernel_cache::KernelCache;
use crate::backend::cuda::nvidia::{Found, Nvidia, driver_version};
use crate::error::{Error, Result};

/// How the list is printed.
#[derive(Debug, Parser)]
#[command(
    name = "tiny-sd devices",
    about = "Lists what this machine has for --device, and why something cannot be used.",
    after_help = AFTER_HELP
)]
struct DevicesArgs {
    /// A line of JSON for each device instead of text
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
An NVIDIA GPU needs its driver, and for the first start NVIDIA's run-time compiler (NVRTC): of the
CUDA toolkit, of PyTorch's packages, or by pip install nvidia-cuda-nvrtc. What is compiled once is
kept in the folder that is listed. TINY_SD_CUDA_LIBS names folders that are looked into first.

Examples:
  tiny-sd devices
  tiny-sd devices --json | jq -r 'select(.usable) | .device'
  tiny-sd \"a fox\" --device cuda
  tiny-sd worker --device cuda:1";

/// How the list is to be printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicesJob {
    is_json: bool,
}

/// Its flags.
pub(super) fn command() -> clap::Command {
    DevicesArgs::command()
}

/// Parses what follows `tiny-sd devices`.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse(flags: impl Iterator<Item = OsString>) -> Result<Request> {
    let words = std::iter::once("tiny-sd devices".into()).chain(flags);
    let args = command()
        .try_get_matches_from(words)
        .and_then(|matches| DevicesArgs::from_arg_matches(&matches));
    match args {
        Ok(DevicesArgs { json }) => Ok(Request::Devices(DevicesJob { is_json: json })),
        Err(error) if !error.use_stderr() => Ok(Request::Show(error)),
        Err(error) => Err(usage(&error)),
    }
}

/// Lists the devices of this machine on standard output.
///
/// # Errors
/// If `TINY_SD_ISA` names kernels that this processor has not, or it cannot be written.
pub fn list_devices(job: DevicesJob) -> Result<()> {
    cpu::check_kernel_path()?;
    let devices = [vec![processor()], gpus()].concat();
    print(&devices.iter().map(|device| device.told(job.is_json)).collect::<String>())
}

/// A device, or why there is none.
#[derive(Debug, Clone)]
struct Device {
    /// As `--device` takes it.
    name: String,
    /// Lines about it.
    text: Vec<String>,
    /// The same, for programs.
    fields: Value,
    /// Why it cannot be used.
    problem: Option<String>,
}

impl Device {
    fn told(&self, is_json: bool) -> String {
        if is_json {
            let mut fields = self.fields.clone();
            fields["kind"] = json!("device");
            fields["device"] = json!(self.name);
            fields["usable"] = json!(self.problem.is_none());
            fields["problem"] = json!(self.problem);
            return format!("{fields}\n");
        }
        let problem = self.problem.iter().map(|problem| format!("cannot be used: {problem}"));
        let lines = self.text.iter().cloned().chain(problem).enumerate();
        let line = |(index, line): (usize, String)| {
            format!("{:8}  {line}\n", if index == 0 { &*self.name } else { "" })
        };
        lines.map(line).collect()
    }
}

fn processor() -> Device {
    let threads = cpu::Settings::default().effective_threads();
    let paths = cpu::kernel_paths();
    let plural = if threads == 1 { "" } else { "s" };
    Device {
        name: "cpu".into(),
        text: vec![format!(
            "{threads} thread{plural}, kernels {} (of {})",
            cpu::kernel_path(),
            paths.join(", ")
        )],
        fields: json!({
            "threads": threads,
            "kernels": cpu::kernel_path(),
            "kernel_paths": paths,
        }),
        problem: None,
    }
}

fn gpus() -> Vec<Device> {
    let none = |name: String, error: &Error| Device {
        name,
        text: vec![],
        fields: json!({}),
        problem: Some(error.to_string()),
    };
    let found = driver_version().and_then(|driver| Ok((driver, Nvidia::list()?)));
    let (driver, gpus) = match found {
        Err(error) => return vec![none("cuda".into(), &error)],
        Ok((_, gpus)) if gpus.is_empty() => {
            return vec![none("cuda".into(), &Error::usage("the driver has no GPU"))];
        }
        Ok(found) => found,
    };
    let described = |(ordinal, gpu): (usize, &Result<Found>)| match gpu {
        Ok(gpu) => {
            let (major, minor) = gpu.capability;
            let compiler = Compiler::find(Some(driver.0.0), Some(major * 10 + minor));
            described(gpu, &driver, &compiler)
        }
        Err(error) => none(format!("cuda:{ordinal}"), error),
    };
    gpus.iter().enumerate().map(described).collect()
}

type Driver = ((i32, i32), Option<String>);

fn described(gpu: &Found, driver: &Driver, compiler: &Result<Compiler>) -> Device {
    let ((driver_major, driver_minor), driver_place) = driver;
    let cache = KernelCache::of_user();
    let kept = cache.folder().map(|folder| folder.display().to_string());
    let (major, minor) = gpu.capability;
    let compiler_text = match compiler {
        Ok(found) => {
            let (major, minor) = found.version();
            format!("compiler: NVRTC {major}.{minor}, {}", found.place())
        }
        Err(error) => format!("compiler: {error}; kernels that were compiled before are used"),
    };
    let place = driver_place.as_deref().unwrap_or("where the system has it");
    Device {
        name: format!("cuda:{}", gpu.ordinal),
        text: vec![
            format!(
                "{}, {:.1} GiB of memory ({:.1} free), compute capability {major}.{minor}, \
                 {} multiprocessors",
                gpu.name,
                gibibytes(gpu.memory_bytes),
                gibibytes(gpu.free_bytes),
                gpu.multiprocessors,
            ),
            format!("driver: CUDA {driver_major}.{driver_minor}, {place}"),
            compiler_text,
            format!("compiled kernels: {}", kept.as_deref().unwrap_or("not kept: no home folder")),
        ],
        fields: json!({
            "name": gpu.name,
            "memory_bytes": gpu.memory_bytes,
            "free_bytes": gpu.free_bytes,
            "compute_capability": format!("{major}.{minor}"),
            "multiprocessors": gpu.multiprocessors,
            "driver": format!("{driver_major}.{driver_minor}"),
            "driver_path": driver_place,
            "compiler": compiler.as_ref().ok().map(|found| {
                let (major, minor) = found.version();
                format!("{major}.{minor}")
            }),
            "compiler_path": compiler.as_ref().ok().map(Compiler::place),
            "compiler_problem": compiler.as_ref().err().map(ToString::to_string),
            "kernel_cache": kept,
        }),
        problem: None,
    }
}

fn gibibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::job::tests::{Fake, parse_words};

    #[test]
    fn the_command_takes_json_and_nothing_else() {
        let mut fake = Fake::default();
        for (words, is_json) in [("devices", false), ("devices|--json", true)] {
            match parse_words(words, &mut fake) {
                Ok(Request::Devices(job)) => assert_eq!(job.is_json, is_json),
                other => panic!("{words}: {other:?}"),
            }
        }
        for (words, expected) in [
            ("devices|cpu", "unexpected argument 'cpu'"),
            ("device", "did you mean \"tiny-sd devices\"?"),
        ] {
            let error = parse_words(words, &mut fake).unwrap_err().to_string();
            assert!(error.contains(expected), "{words}: {error}");
        }
    }

    #[test]
    fn a_gpu_is_told_with_what_it_lacks() {
        let gpu = Found {
            ordinal: 1,
            name: "GPU".into(),
            capability: (9, 0),
            memory_bytes: 3 << 30,
            free_bytes: 1 << 30,
            multiprocessors: 7,
        };
        let driver = ((13, 1), Some("/lib/libcuda.so.1".into()));
        let told = |is_json| {
            let device = described(&gpu, &driver, &Err(Error::usage("no compiler")));
            device.told(is_json)
        };
        let text = told(false);
        for part in [
            "cuda:1    GPU, 3.0 GiB of memory (1.0 free), compute capability 9.0, 7 mult",
            "\n          driver: CUDA 13.1, /lib/libcuda.so.1\n",
            "\n          compiler: no compiler; kernels that were compiled before are used\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let value: Value = serde_json::from_str(&told(true)).unwrap();
        assert_eq!(value["device"], "cuda:1");
        assert_eq!(value["usable"], true);
        assert_eq!(value["memory_bytes"], 3_u64 << 30);
        assert_eq!(value["compiler_problem"], "no compiler");
    }
}
