//! NVIDIA's compiler takes every kernel for every kind of GPU, which needs no GPU. Separate because
//! it is skipped, by name, where there is no compiler.

use tiny_sd::backend::cuda::compiler::Compiler;
use tiny_sd::backend::cuda::driver::Numbers;
use tiny_sd::backend::cuda::sources::ALL;

#[test]
#[ignore = "needs NVIDIA's run-time compiler: pip install nvidia-cuda-nvrtc"]
fn every_kernel_compiles_for_each_kind_of_gpu() {
    let compiler = Compiler::find(None, None).unwrap();
    println!("NVRTC {:?}, {}", compiler.version(), compiler.place());
    for architecture in [75, 80, 90, 120] {
        for source in ALL {
            for numbers in [Numbers::F32, Numbers::F16, Numbers::Bf16] {
                let code = compiler.compile(source, numbers, architecture);
                let code = code.unwrap_or_else(|error| panic!("{}: {error}", source.name));
                assert!(code.starts_with(b"\x7fELF"), "{} sm_{architecture}", source.name);
            }
        }
    }
    // Of a GPU that it does not know it makes what a driver translates.
    let code = compiler.compile(ALL[0], Numbers::F32, 999).unwrap();
    assert!(code.windows(7).any(|word| word == b".target") && code.ends_with(&[0]));
    let error = compiler.compile(ALL[0], Numbers::F32, 30).unwrap_err().to_string();
    assert!(error.contains("compute capability 3.0"), "{error}");
}
