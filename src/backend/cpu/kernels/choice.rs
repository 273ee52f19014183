//! Which of the compiled kernels run: the best that the processor has, or what the environment
//! names. Separate from the instruction sets themselves because a process decides it once, before
//! its first kernel.

use std::sync::OnceLock;

use super::simd::Isa;
use crate::error::{Error, Result};

/// The environment variable that names a path.
const VARIABLE: &str = "TINY_SD_ISA";

/// A way through the kernels. Each gives pictures of its own bits: products are rounded in other
/// ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// AVX-512 F with products of bf16 in hardware.
    Avx512Bf16,
    /// AVX-512 F.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// NEON, which every 64-bit ARM processor has.
    Neon,
    /// What every processor of the target has.
    Portable,
}

impl Path {
    const ALL: [Self; 5] = [Path::Avx512Bf16, Path::Avx512, Path::Avx2, Path::Neon, Path::Portable];

    /// As the environment and records of pictures call it.
    pub fn name(self) -> &'static str {
        match self {
            Path::Avx512Bf16 => "avx512bf16",
            Path::Avx512 => "avx512",
            Path::Avx2 => "avx2",
            Path::Neon => "neon",
            Path::Portable => "portable",
        }
    }

    /// The instructions of its loops.
    pub fn isa(self) -> Isa {
        match self {
            Path::Avx512Bf16 | Path::Avx512 => Isa::Avx512,
            Path::Avx2 => Isa::Avx2,
            Path::Neon => Isa::Neon,
            Path::Portable => Isa::Portable,
        }
    }

    /// Whether products of bf16 are of pairs as they are, summed in f32.
    pub fn multiplies_bf16(self) -> bool {
        match self {
            Path::Avx512Bf16 => true,
            Path::Avx512 | Path::Avx2 | Path::Neon | Path::Portable => false,
        }
    }

    fn is_available(self) -> bool {
        let has_bf16 = match self {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 => is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            Path::Avx512Bf16 => false,
            Path::Avx512 | Path::Avx2 | Path::Neon | Path::Portable => true,
        };
        has_bf16 && Isa::available().contains(&self.isa())
    }
}

/// The paths that this processor can run, best first.
pub fn available() -> impl Iterator<Item = Path> {
    Path::ALL.into_iter().filter(|path| path.is_available())
}

/// The path that a value of the variable names, if this processor has it.
fn parse(value: &str) -> Result<Path> {
    let here: Vec<&str> = available().map(Path::name).collect();
    available().find(|path| path.name() == value).ok_or_else(|| {
        let here = here.join(", ");
        let message = match Path::ALL.iter().any(|path| path.name() == value) {
            true => format!("{VARIABLE} {value}: this processor has only {here}"),
            false => format!("{VARIABLE} {value:?}: not one of {here}, which this processor has"),
        };
        Error::usage(message)
    })
}

/// The choice, made once; what is wrong with the environment, with the best path instead.
fn choice() -> &'static (Path, Result<()>) {
    static CHOICE: OnceLock<(Path, Result<()>)> = OnceLock::new();
    CHOICE.get_or_init(|| {
        let best = available().next().unwrap_or(Path::Portable);
        let value = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
        match value.map(|value| parse(&value.to_string_lossy())) {
            None => (best, Ok(())),
            Some(Ok(path)) => (path, Ok(())),
            Some(Err(error)) => (best, Err(error)),
        }
    })
}

/// The path of this process.
pub fn chosen() -> Path {
    choice().0
}

/// Whether the environment names no path, or one that this processor has.
///
/// # Errors
/// If it does not: a wrong request.
pub fn check() -> Result<()> {
    choice().1.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_path_is_named_as_it_is_printed_or_refused_with_those_that_are_here() {
        assert!(available().any(|path| path == Path::Portable));
        for path in Path::ALL {
            match parse(path.name()) {
                Ok(found) => assert!(found == path && path.is_available()),
                Err(error) => {
                    assert!(!path.is_available() && error.kind() == Kind::Usage);
                    assert!(error.to_string().contains("has only"), "{error}");
                }
            }
        }
        for wrong in ["avx", "AVX2", "avx2 ", "sse", "auto"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("{wrong:?}")) && error.contains("portable"), "{error}");
        }
    }
}
