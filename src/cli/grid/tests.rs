//! Tests of command lines with `--grid`. Separate from the code because they are as long.

use super::super::job::tests::{Fake, job_of, parse_words};
use super::*;
use crate::error::Kind;

fn grid_of(words: &str) -> GridJob {
    match parse_words(words, &mut Fake::default()) {
        Ok(Request::Grid(grid)) => *grid,
        other => panic!("{words:?} gave {other:?}"),
    }
}

#[test]
fn each_cell_is_the_single_command_row_by_row() {
    let check = |words: &str, cells: &[&str]| {
        let found = grid_of(words);
        let expected: Vec<_> = cells.iter().map(|words| job_of(words)).collect();
        assert_eq!(found.cells, expected, "{words}");
    };
    check(
        "x|--grid|steps=3,4|guidance=5,7",
        &["x|--steps|3|-g|5", "x|--steps|4|-g|5", "x|--steps|3|-g|7", "x|--steps|4|-g|7"],
    );
    // The seed that nobody gave is drawn once.
    check(
        "--prompt|x|--grid|scheduler=euler,DDIM",
        &["x|-s|7|--scheduler|euler", "x|-s|7|--scheduler|ddim"],
    );
    check(
        "x|-s|9|--steps|2|--grid|seed=1-2|--grid|clip-skip=0,1",
        &[
            "x|--steps|2|-s|1",
            "x|--steps|2|-s|2",
            "x|--steps|2|-s|1|--clip-skip|1",
            "x|--steps|2|-s|2|--clip-skip|1",
        ],
    );
    check(
        "a red fox|-n|red|--grid|prompt-sr=red,\"big, blue\"|-o|-",
        &["a red fox|-n|red|-o|-", "a big, blue fox|-n|big, blue|-o|-"],
    );
}

#[test]
fn a_prompt_of_standard_input_is_read_once() {
    let mut fake = Fake { stdin: Some(b"a fox\n".to_vec()), ..Fake::default() };
    let Ok(Request::Grid(grid)) = parse_words("--grid|steps=3,4", &mut fake) else {
        panic!("no grid")
    };
    assert!(grid.cells.iter().all(|cell| cell.prompt == "a fox"));
}

#[test]
fn what_makes_no_sheet_is_refused_with_the_reason() {
    let long = format!("x{}|--grid|prompt-sr=x,y1-y2,z,u,v,w", " word".repeat(12_000));
    for (words, expected) in [
        ("x|--grid", "a value is required"),
        ("--grid|steps=1,2|a fox", "the prompt goes before --grid"),
        ("x|--grid|width=1,2", "\"width\" is no axis (known: steps, guidance-scale"),
        ("x|--grid|steps=1,2|seed=1|--grid|seed=2", "--grid has 3 axes; one goes to the right"),
        ("x|--grid|steps=1,2|steps=3", "--grid: both axes are steps"),
        ("x|--grid|steps=1-17|seed=1-17", "--grid: 17x17 are 289 pictures, at most 256"),
        ("x|--grid|steps=1|--count|2", "--count 2 asks for more; --grid seed=1-2 shows"),
        ("x|--grid|strength=0.1,1", "--strength says how far from an image it goes: give --image"),
        ("x|--grid|prompt-sr=red,blue", "neither prompt has its first value, \"red\""),
        ("x|--grid|steps=1|-o|-|--json", "--json prints events on standard output"),
        ("x|--grid|seed=1-5|steps=1-5|-W|2048|-H|2048", "more than 67108864: fewer values"),
        ("x|--grid|seed=1-9|-W|2048|-H|64|-o|a.webp", "a WebP's sides end at 16384"),
        ("compare|x|--grid|steps=1|--against|mock", "--grid: compare looks at one picture"),
        ("explain|x|--grid|steps=1", "--grid: explain is about one picture"),
        ("batch|x|--out-dir|y|--grid|steps=1", "unexpected argument '--grid'"),
        (&long, "bytes in the sheet's record, at most 524288: fewer values"),
    ] {
        let error = parse_words(words, &mut Fake::default()).unwrap_err();
        let message = error.to_string();
        assert_eq!(error.kind(), Kind::Usage, "{message}");
        assert!(message.contains(expected) && !message.contains('\n'), "{message}");
    }
}
