//! The machine on pickles that no torch has written, byte by byte. Separate because there are as
//! many ways to be wrong as opcodes.

use super::*;

/// The start of every pickle that torch writes.
fn pickle(parts: &[&[u8]]) -> Vec<u8> {
    [b"\x80\x02".as_slice(), &parts.concat(), b"."].concat()
}

/// All of a state_dict, if all of it are tensors.
fn tensors(pickle: &[u8]) -> Result<Vec<(&str, StoredTensor<'_>)>> {
    state_dict(pickle)?.into_iter().map(|(name, tensor)| Ok((name, tensor?))).collect()
}

#[test]
fn what_state_dicts_do_not_have_is_an_error() {
    let check = |parts: &[&[u8]], expected: &str| {
        let error = tensors(&pickle(parts)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    assert!(tensors(&pickle(&[b"}"])).unwrap().is_empty());
    check(&[b"N"], "top is not a dictionary");
    check(&[b""], "expected a value");
    check(&[b"(N"], "top is not a dictionary");
    check(&[b"(\x85"], "byte 3: expected a value");
    check(&[b"t"], "expected a mark");
    check(&[b"h\x05"], "expected a remembered value");
    check(&[b"\x93"], "opcode 0x93");
    check(&[b"}K\x01Ns"], "a key of the state_dict is not a name");
    check(&[b"}(K\x01u"], "expected a value for each key");
    check(&[b"N(NNu"], "expected a dictionary");
    check(&[b"NNa"], "expected a list");
    check(&[b"}Nb"], "expected the attributes of a dictionary");
    check(&[b"N}b"], "expected a dictionary");
    check(&[b"NQ"], "expected the description of a storage");
    check(&[b"ctorch\nFloatStorage\n)R"], "expected something that makes");
    check(&[b"ccollections\nOrderedDict\nNR"], "expected a tuple of arguments");
    check(&[b"ctorch._utils\n_rebuild_tensor_v2\n)R"], "expected the arguments of a tensor");
    check(&[b"cos\nsystem\n"], "asks for \"os.system\"");
    check(&[b"c__builtin__\neval\x1b[2J\n"], "asks for \"__builtin__.eval\\u{1b}[2J\"");
    check(&[b"ctorch\nFloatStorage "], "expected a line");
    check(&[b"c", &[b'a'; 300], b"\nb\n"], "expected a line");
    check(&[b"X\xff\xff\xff\xffabc"], "ends too early");
    check(&[b"X\x01\0\0\0\xff"], "expected text in UTF-8");
}

#[test]
fn depth_cycles_and_floods_end_in_an_error() {
    let check = |parts: &[&[u8]], expected: &str| {
        let error = tensors(&pickle(parts)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    // A dictionary that holds itself, and a tuple half a million deep.
    check(&[b"}q\0X\x01\0\0\0ah\0s"], "\"a\" is not a tensor");
    check(&[b"N", &vec![0x85; 500_000]], "top is not a dictionary");
    check(&[b"N", &vec![0x85; MAX_OBJECTS + 1]], "objects");
    check(&[&vec![b'('; MAX_STACK + 1]], "marks");
    check(&[&vec![b'N'; MAX_STACK + 1]], "values on the stack");
    let put = |slot: u32| [b"r".as_slice(), &slot.to_le_bytes()].concat();
    let puts: Vec<u8> = (0..=MAX_OBJECTS as u32).flat_map(put).collect();
    check(&[b"N", &puts], "values to remember");
    check(&[&vec![b'N'; MAX_PICKLE_LEN]], "more than the");
}

/// A tensor of two f32 with this size, stride and offset, as opcodes.
fn tensor(size: &[u8], stride: &[u8], offset: &[u8], rest: &[u8]) -> Vec<u8> {
    let head: &[u8] = b"}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((";
    let storage = b"X\x07\0\0\0storagectorch\nFloatStorage\n\
        X\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ";
    let hooks: &[u8] = b"\x89ccollections\nOrderedDict\n)R";
    pickle(&[head, storage, offset, size, stride, hooks, rest, b"tRs"])
}

#[test]
fn a_tensor_is_what_its_arguments_say() {
    let bytes = tensor(b"K\x01K\x02\x86", b"M\0\x01\x8a\x01\x01\x86", b"J\x03\0\0\0", b"");
    let found = tensors(&bytes).unwrap();
    let [("a", found)] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((found.storage.dtype, found.storage.key), (DType::F32, "0"));
    assert_eq!((found.storage.elements, found.offset), (2, 3));
    assert_eq!((&*found.shape, &*found.stride), (&[1, 2][..], &[256, 1][..]));
    let check = |size, stride, offset, rest, expected: &str| {
        let error = tensors(&tensor(size, stride, offset, rest)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(b")", b")", b"\x8a\x01\xff", b"", "expected a size, not -1");
    check(b")", b"K\x01\x85", b"K\0", b"", "expected a stride for each dimension");
    check(b"N\x85", b")", b"K\0", b"", "expected whole numbers");
    check(b"N", b")", b"K\0", b"", "expected the size or stride");
    check(b")", b")", b"N", b"", "expected the arguments of a tensor");
    check(b")", b")", b"K\0", b"}", "a tensor has metadata");
    check(b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t", b")", b"K\0", b"", "9 dim");
}

#[test]
fn what_is_none_of_ours_is_a_placeholder_and_is_never_made() {
    let storage: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n\
        FloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQK\0))\x89}tR";
    let state = [b"X\x0a\0\0\0state_dict}X\x01\0\0\0a".as_slice(), storage, b"ss"].concat();
    // As pytorch_lightning leaves them: a class, an instance with its attributes, a function's
    // result with items, a list that is appended to, a number of nine bytes.
    for other in [
        b"cos\nsystem\n".as_slice(),
        b"cos\nsystem\nX\x02\0\0\0ls\x85R",
        b"cpl.callbacks\nModelCheckpoint\n)\x81}X\x01\0\0\0bK\x01sb",
        b"ccollections\ndefaultdict\nc__builtin__\ndict\n\x85RK\x01K\x02s(K\x03K\x04u",
        b"](K\x01cnumpy\ndtype\ne",
        b"cnumpy\ndtype\nK\x01aN0",
        b"\x8a\x09123456789(NN1",
    ] {
        let bytes = pickle(&[b"}X\x05\0\0\0other", other, b"s", &state]);
        let found = tensors(&bytes).unwrap();
        assert_eq!((found.len(), found[0].0), (1, "a"), "{other:?}");
        // The same in the state_dict's place is refused by its name, and only there.
        if other.starts_with(b"cos") {
            let bytes = pickle(&[b"}X\x01\0\0\0a", storage, b"sX\x01\0\0\0b", other, b"s"]);
            let found = state_dict(&bytes).unwrap();
            assert!(found[0].1.is_ok());
            let reason = found[1].1.as_ref().unwrap_err().to_string();
            assert!(reason.contains("asks for \"os.system\""), "{reason}");
        }
    }
    // A state_dict that holds itself, and one that is no dictionary.
    let itself = pickle(&[b"}q\0X\x0a\0\0\0state_dicth\0s"]);
    let error = tensors(&itself).unwrap_err().to_string();
    assert!(error.contains("\"state_dict\" is not a tensor"), "{error}");
    let error = tensors(&pickle(&[b"}X\x0a\0\0\0state_dictNs"])).unwrap_err().to_string();
    assert!(error.contains("\"state_dict\" is not a tensor"), "{error}");
}
