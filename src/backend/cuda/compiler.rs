//! NVIDIA's run-time compiler (NVRTC), which makes code for a GPU of a source. Separate from the
//! driver because it needs neither a GPU nor a driver, and has to be found: in a toolkit, or where
//! PyTorch's packages put it.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

use libloading::Library;

use super::driver::{Numbers, Source};
use super::sources::whole;
use crate::error::{Error, Result};

/// Folders that are looked into before all others, separated as in `PATH`.
pub const FOLDERS_VARIABLE: &str = "TINY_SD_CUDA_LIBS";

/// By which names the system may know it; the newest first.
const NAMES: &[&str] = if cfg!(windows) {
    &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
} else {
    &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
};
/// How its file begins, and that of the part that it loads by name.
const PREFIXES: [&str; 2] = if cfg!(windows) {
    ["nvrtc64_", "nvrtc-builtins64_"]
} else {
    ["libnvrtc.so", "libnvrtc-builtins.so"]
};
/// Folders that are looked into; systems have some dozens.
const MAX_FOLDERS: usize = 256;

/// The compiler, loaded.
pub struct Compiler {
    library: Library,
    /// What it loads by name later on, which is found because it is there already.
    #[allow(dead_code, reason = "it must stay loaded")]
    beside: Vec<Library>,
    place: String,
    version: (i32, i32),
    architectures: Vec<i32>,
}

type Handle = *mut c_void;

/// What is compiled to.
struct Target {
    name: String,
    /// The code of that very kind of GPU, and not what a driver translates.
    is_exact: bool,
}

impl Compiler {
    /// Finds one whose code a driver of CUDA `most_major` takes, or any, for a compute capability,
    /// or any: best one that knows it.
    ///
    /// # Errors
    /// If there is none, with what to do.
    pub fn find(most_major: Option<i32>, architecture: Option<i32>) -> Result<Self> {
        let fits = |major: i32| most_major.is_none_or(|most| major <= most);
        let (mut too_new, mut translated, mut useless) = (None, None, None);
        let named = NAMES.iter().map(PathBuf::from);
        for path in in_folders(&given_folders()).chain(named).chain(in_folders(&usual_folders())) {
            match Self::open(&path) {
                None => {}
                Some(compiler) if !fits(compiler.version.0) => {
                    too_new = too_new.or(Some(compiler));
                }
                Some(compiler) => match architecture.map(|wanted| compiler.target(wanted)) {
                    None | Some(Some(Target { is_exact: true, .. })) => return Ok(compiler),
                    Some(Some(_)) => translated = translated.or(Some(compiler)),
                    Some(None) => useless = useless.or(Some(compiler)),
                },
            }
        }
        if let Some(compiler) = translated {
            return Ok(compiler);
        }
        if let (Some(compiler), Some(wanted)) = (useless, architecture) {
            return Err(compiler.too_new_for(wanted));
        }
        Err(Error::usage(match (too_new, most_major) {
            (Some(compiler), Some(most)) => format!(
                "NVIDIA's run-time compiler in {} is of CUDA {}, newer than the driver's CUDA \
                 {most}: update the driver, or pip install nvidia-cuda-nvrtc-cu{most}",
                compiler.place, compiler.version.0
            ),
            _ => format!(
                "NVIDIA's run-time compiler ({}) is not there: it comes with the CUDA toolkit, \
                 with PyTorch, or by pip install nvidia-cuda-nvrtc; {FOLDERS_VARIABLE} names \
                 folders to look into",
                NAMES[0]
            ),
        }))
    }

    /// The library at a path, or by a name that the system looks for.
    fn open(path: &Path) -> Option<Self> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let beside = folder.map(|folder| files(folder, PREFIXES[1])).unwrap_or_default();
        // SAFETY: NVIDIA's libraries run no code when they are loaded that could be in the way.
        let load = |path: &PathBuf| unsafe { Library::new(path) }.ok();
        let beside: Vec<_> = beside.iter().filter_map(load).collect();
        let library = load(&path.to_path_buf())?;
        let place = match folder {
            Some(_) => path.display().to_string(),
            None => loaded_from(PREFIXES[0]).unwrap_or_else(|| path.display().to_string()),
        };
        let mut found = Self { library, beside, place, version: (0, 0), architectures: vec![] };
        found.version = found.ask_version()?;
        found.architectures = found.ask_architectures()?;
        Some(found)
    }

    /// Where it was found.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Its version of CUDA, major and minor.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles a source for a compute capability, such as 90 for 9.0: to the code of this GPU, or,
    /// if it is newer than the compiler, to a form that the driver translates.
    ///
    /// # Errors
    /// If the compiler refuses: its log.
    pub fn compile(&self, source: Source, numbers: Numbers, architecture: i32) -> Result<Vec<u8>> {
        let target = self.target(architecture);
        let Target { name: target, is_exact } =
            target.ok_or_else(|| self.too_new_for(architecture))?;
        let program = Program::new(self, &whole(source), source.name)?;
        let options = [
            format!("--gpu-architecture={target}"),
            format!("-DDTYPE={}", numbers.code()),
            "--fmad=true".into(),
        ];
        program.compile(&options).map_err(|error| error.context(&target))?;
        program.code(is_exact)
    }

    /// What it compiles to for a GPU; none if the GPU is too old for it.
    fn target(&self, architecture: i32) -> Option<Target> {
        let older = *self.architectures.iter().filter(|known| **known <= architecture).max()?;
        let is_exact = older == architecture;
        let kind = if is_exact { "sm" } else { "compute" };
        Some(Target { name: format!("{kind}_{older}"), is_exact })
    }

    fn too_new_for(&self, architecture: i32) -> Error {
        let (major, minor) = (architecture / 10, architecture % 10);
        Error::usage(format!(
            "NVIDIA's run-time compiler in {} makes no code for compute capability \
             {major}.{minor}; an older one does: pip install nvidia-cuda-nvrtc-cu12",
            self.place
        ))
    }

    fn ask_version(&self) -> Option<(i32, i32)> {
        type Ask = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the signature is NVRTC's; both places are there.
        let status = unsafe {
            let ask = self.library.get::<Ask>(b"nvrtcVersion\0").ok()?;
            ask(&raw mut major, &raw mut minor)
        };
        (status == 0).then_some((major, minor))
    }

    fn ask_architectures(&self) -> Option<Vec<i32>> {
        type Ask = unsafe extern "C" fn(*mut c_int) -> c_int;
        let mut count = 0;
        // SAFETY: the signatures are NVRTC's; the list has as many places as it says.
        unsafe {
            let ask = self.library.get::<Ask>(b"nvrtcGetNumSupportedArchs\0").ok()?;
            if ask(&raw mut count) != 0 {
                return None;
            }
            let mut list = vec![0; usize::try_from(count).ok()?];
            let ask = self.library.get::<Ask>(b"nvrtcGetSupportedArchs\0").ok()?;
            (ask(list.as_mut_ptr()) == 0).then_some(list)
        }
    }
}

/// A source that is being compiled.
struct Program<'a> {
    library: &'a Library,
    handle: Handle,
}

impl<'a> Program<'a> {
    fn new(compiler: &'a Compiler, text: &str, name: &str) -> Result<Self> {
        type Create = unsafe extern "C" fn(
            *mut Handle,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        let [text, name] = [c_string(text)?, c_string(name)?];
        let (library, mut handle) = (&compiler.library, null_mut());
        // SAFETY: the signature is NVRTC's, which copies both texts; there are no headers.
        let status = unsafe {
            let create = symbol::<Create>(library, "nvrtcCreateProgram")?;
            create(&raw mut handle, text.as_ptr(), name.as_ptr(), 0, null(), null())
        };
        match status {
            0 => Ok(Self { library, handle }),
            status => Err(Error::other(format!("NVRTC takes no program (error {status})"))),
        }
    }

    fn compile(&self, options: &[String]) -> Result<()> {
        type Compile = unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int;
        let options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>>>()?;
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the signature is NVRTC's; there are as many options as it is told.
        let status = unsafe {
            let compile = symbol::<Compile>(self.library, "nvrtcCompileProgram")?;
            compile(self.handle, pointers.len() as c_int, pointers.as_ptr())
        };
        if status == 0 {
            return Ok(());
        }
        let log = self.bytes("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").unwrap_or_default();
        let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
        Err(Error::other(format!("NVRTC (error {status}): {}", log.trim())))
    }

    fn code(&self, is_for_one_gpu: bool) -> Result<Vec<u8>> {
        match is_for_one_gpu {
            true => self.bytes("nvrtcGetCUBINSize", "nvrtcGetCUBIN"),
            false => self.bytes("nvrtcGetPTXSize", "nvrtcGetPTX"),
        }
    }

    /// What one function gives as many bytes of as another says.
    fn bytes(&self, size_name: &str, bytes_name: &str) -> Result<Vec<u8>> {
        type Size = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
        type Bytes = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;
        let mut size = 0;
        // SAFETY: the signatures are NVRTC's; the buffer is as long as it says.
        let (status, bytes) = unsafe {
            let status = symbol::<Size>(self.library, size_name)?(self.handle, &raw mut size);
            let mut bytes = vec![0_u8; if status == 0 { size } else { 0 }];
            let get = symbol::<Bytes>(self.library, bytes_name)?;
            let status =
                if status == 0 { get(self.handle, bytes.as_mut_ptr().cast()) } else { status };
            (status, bytes)
        };
        match status {
            0 => Ok(bytes),
            status => Err(Error::other(format!("NVRTC: {bytes_name}: error {status}"))),
        }
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        type Destroy = unsafe extern "C" fn(*mut Handle) -> c_int;
        // SAFETY: the signature is NVRTC's; nobody has the handle any more.
        unsafe {
            if let Ok(destroy) = symbol::<Destroy>(self.library, "nvrtcDestroyProgram") {
                destroy(&raw mut self.handle);
            }
        }
    }
}

/// # Safety
/// The function must have this signature.
unsafe fn symbol<'a, T>(library: &'a Library, name: &str) -> Result<libloading::Symbol<'a, T>> {
    // SAFETY: as the caller says.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found.map_err(|_| Error::other(format!("NVRTC has no {name}: it is too old")))
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::other("a zero byte in the text of a kernel"))
}

/// Files of a folder whose names begin so, the newest version first.
fn files(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_it = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // Of some there are two, of which one is for programs that link it.
        name.starts_with(prefix) && !name.contains(".alt.")
    };
    let mut found: Vec<_> = entries.map(|entry| entry.path()).filter(is_it).collect();
    found.sort_by(|a, b| b.cmp(a));
    found
}

fn in_folders(folders: &[PathBuf]) -> impl Iterator<Item = PathBuf> {
    folders.iter().flat_map(|folder| files(folder, PREFIXES[0])).collect::<Vec<_>>().into_iter()
}

fn given_folders() -> Vec<PathBuf> {
    let given = std::env::var_os(FOLDERS_VARIABLE);
    given.iter().flat_map(std::env::split_paths).take(MAX_FOLDERS).collect()
}

/// Where toolkits and Python's packages have it.
fn usual_folders() -> Vec<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let roots = ["CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"].into_iter().filter_map(set);
    let roots = roots.chain(["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from));
    let mut folders: Vec<_> = roots
        .flat_map(|root| ["lib64", "targets/x86_64-linux/lib", "lib", "bin"].map(|l| root.join(l)))
        .collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An environment of Python is where its interpreter is.
    let of_interpreters = std::env::split_paths(&path)
        .filter(|folder| {
            ["python3", "python", "python.exe"].iter().any(|p| folder.join(p).exists())
        })
        .filter_map(|folder| folder.parent().map(Path::to_path_buf));
    let home = set("HOME").map(|home| home.join(".local"));
    let environments = set("VIRTUAL_ENV").into_iter().chain(of_interpreters).chain(home);
    environments.for_each(|prefix| folders.extend(of_packages(&prefix)));
    folders.truncate(MAX_FOLDERS);
    folders
}

/// The libraries of NVIDIA's packages in an environment of Python.
fn of_packages(prefix: &Path) -> Vec<PathBuf> {
    let children = |folder: &Path| {
        let mut found: Vec<_> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
        found.sort();
        found
    };
    let pythons = children(&prefix.join("lib")).into_iter().filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python"))
    });
    let packages = pythons
        .flat_map(|python| ["site-packages", "dist-packages"].map(|name| python.join(name)))
        .chain([prefix.join("Lib/site-packages")]);
    packages
        .flat_map(|folder| children(&folder.join("nvidia")))
        .flat_map(|package| ["lib", "bin", "bin/x86_64"].map(|name| package.join(name)))
        .filter(|folder| folder.is_dir())
        .collect()
}

/// Where a library that this process has loaded lies, where the system says it.
pub(super) fn loaded_from(prefix: &str) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = |line: &str| Some(line.get(line.find('/')?..)?.to_owned());
    let is_it = |path: &String| {
        Path::new(path).file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix))
    };
    maps.lines().filter_map(path).find(is_it)
}
