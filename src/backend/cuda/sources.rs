//! The kernels' sources, which are in the program, and their headers put in where they are named.
//! Separate because this is the one list of files.

use super::driver::Source;

macro_rules! text {
    ($name:literal) => {
        include_str!(concat!("kernels/", $name))
    };
}

/// Copies, casts, chosen rows, constants.
pub(super) const COPY: Source = Source { name: "copy.cu", text: text!("copy.cu") };
/// What looks at one place at a time.
pub(super) const ELEMENT: Source = Source { name: "element.cu", text: text!("element.cu") };
/// Normalisation.
pub(super) const NORM: Source = Source { name: "norm.cu", text: text!("norm.cu") };
/// Convolutions and linear layers.
pub(super) const CONV2D: Source = Source { name: "conv2d.cu", text: text!("conv2d.cu") };
/// Attention.
pub(super) const ATTENTION: Source = Source { name: "attention.cu", text: text!("attention.cu") };

/// Products of matrices that lie in any way.
pub(super) const MATMUL: Source = Source { name: "matmul.cu", text: text!("matmul.cu") };

/// All sources.
pub const ALL: [Source; 6] = [COPY, ELEMENT, NORM, CONV2D, ATTENTION, MATMUL];

const HEADERS: [(&str, &str); 7] = [
    ("common.cuh", text!("common.cuh")),
    ("flash.cuh", text!("flash.cuh")),
    ("heads.cuh", text!("heads.cuh")),
    ("plain_tile.cuh", text!("plain_tile.cuh")),
    ("tensor.cuh", text!("tensor.cuh")),
    ("tensor_tile.cuh", text!("tensor_tile.cuh")),
    ("window.cuh", text!("window.cuh")),
];

/// A source as one text: the compiler of a machine without a toolkit finds no files.
pub fn whole(source: Source) -> String {
    let mut text = String::new();
    put(source.text, &mut text);
    text
}

fn put(source: &str, text: &mut String) {
    for line in source.lines() {
        let name = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        match HEADERS.iter().find(|header| Some(header.0) == name) {
            Some((_, header)) => put(header, text),
            None => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_source_names_a_file_but_the_emulator_of_tests() {
        for source in ALL {
            let text = whole(source);
            let names = text.lines().filter(|line| line.starts_with("#include"));
            let others: Vec<_> = names.filter(|line| !line.contains("emulator.h")).collect();
            assert!(others.is_empty(), "{}: {others:?}", source.name);
        }
    }
}
