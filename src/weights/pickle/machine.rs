//! The stack machine that reads `data.pkl`: the part of pickle's protocol 2 that `torch.save`
//! writes for a state_dict. Opcodes as in CPython's `pickletools`; what they build as in
//! `torch/_utils.py` and `torch/serialization.py`. Separate because it sees nothing but bytes.
//!
//! Nothing is ever run. A global is on the list of `globals.rs` or an error; "calling" one of them
//! makes a dictionary or a description of a tensor. All values live in one arena and refer to each
//! other by number, so that neither depth nor cycles nor sharing in the file cost stack or copies.

use std::collections::HashMap;

use candle_core::DType;

use super::super::{MAX_RANK, MAX_TENSORS, shown};
use super::globals::{Global, allowed};
use super::input::{Input, damaged};
use crate::error::{Error, Result};

/// Largest data.pkl, in bytes. That of an SDXL UNet has 300,000.
const MAX_PICKLE_LEN: usize = 16 << 20;
/// Most values on the stack. Python writes dictionaries in batches of 1,000.
const MAX_STACK: usize = 65_536;
/// Most remembered values, and most tuples, lists, dictionaries, storages and tensors.
const MAX_OBJECTS: usize = 1 << 20;
/// Longest key of a storage, in bytes. It is a number.
const MAX_KEY_LEN: usize = 64;

/// A tensor as the pickle describes it: a view of a storage.
#[derive(Debug, Clone)]
pub(super) struct StoredTensor<'p> {
    pub(super) storage: Storage<'p>,
    /// Of the first element in the storage, in elements.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// As many as dimensions, in elements.
    pub(super) stride: Vec<usize>,
}

/// A storage: an entry `data/KEY` of the archive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'p> {
    pub(super) dtype: DType,
    pub(super) key: &'p str,
    /// Its length in elements.
    pub(super) elements: usize,
}

/// The tensors of a pickled state_dict with their names, in the order of the file.
///
/// # Errors
/// If the pickle is damaged, uses what state_dicts do not, asks for a global that is not allowed,
/// or its top is anything but a dictionary of tensors.
pub(super) fn state_dict(pickle: &[u8]) -> Result<Vec<(&str, StoredTensor<'_>)>> {
    if pickle.len() > MAX_PICKLE_LEN {
        return Err(Error::model(format!(
            "data.pkl has {} bytes, more than the {MAX_PICKLE_LEN} that tensors need",
            pickle.len()
        )));
    }
    let mut machine = Machine::new(pickle);
    let top = machine.run()?;
    machine.tensors_of(top)
}

#[derive(Debug, Clone, Copy)]
enum Value<'p> {
    None,
    Bool,
    Int(i64),
    Float,
    Text(&'p str),
    Global(Global),
    /// An index into the arena.
    Object(usize),
}

#[derive(Debug)]
enum Object<'p> {
    Tuple(Vec<Value<'p>>),
    /// What is in it is of no use here.
    List,
    Dict(Vec<(Value<'p>, Value<'p>)>),
    Storage(Storage<'p>),
    Tensor(StoredTensor<'p>),
}

struct Machine<'p> {
    input: Input<'p>,
    stack: Vec<Value<'p>>,
    /// Heights of the stack at the marks that are open.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'p>>,
    objects: Vec<Object<'p>>,
}

impl<'p> Machine<'p> {
    fn new(pickle: &'p [u8]) -> Self {
        let input = Input::new(pickle);
        Self { input, stack: vec![], marks: vec![], memo: HashMap::new(), objects: vec![] }
    }

    /// Runs to the end, which each turn comes at least one byte closer to.
    fn run(&mut self) -> Result<Value<'p>> {
        loop {
            let at = self.input.position();
            let opcode = self.input.byte()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode).map_err(|error| error.context(format!("data.pkl, byte {at}")))?;
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => self.protocol(),
            b'N' => self.push(Value::None),
            0x88 | 0x89 => self.push(Value::Bool),
            b'K' => self.input.array().and_then(|[n]| self.push(Value::Int(n.into()))),
            b'M' => {
                let n = u16::from_le_bytes(self.input.array()?);
                self.push(Value::Int(n.into()))
            }
            b'J' => {
                let n = i32::from_le_bytes(self.input.array()?);
                self.push(Value::Int(n.into()))
            }
            0x8a => {
                let n = self.input.long()?;
                self.push(Value::Int(n))
            }
            b'G' => self.input.array::<8>().and_then(|_| self.push(Value::Float)),
            b'X' => {
                let text = self.input.text()?;
                self.push(Value::Text(text))
            }
            b'c' => {
                let global = allowed(self.input.line()?, self.input.line()?)?;
                self.push(Value::Global(global))
            }
            b'(' => self.mark(),
            b')' => self.make(Object::Tuple(vec![])),
            0x85 => self.tuple_of(1),
            0x86 => self.tuple_of(2),
            0x87 => self.tuple_of(3),
            b't' => {
                let items = self.pop_to_mark()?;
                self.make(Object::Tuple(items))
            }
            b']' => self.make(Object::List),
            b'a' => self.pop().map(drop).and_then(|()| self.list()),
            b'e' => self.pop_to_mark().map(drop).and_then(|()| self.list()),
            b'}' => self.make(Object::Dict(vec![])),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.dict()?.push((key, value));
                Ok(())
            }
            b'u' => self.set_items(),
            b'q' => self.input.array().and_then(|[n]| self.put(n.into())),
            b'r' => self.input.array().and_then(|n| self.put(u32::from_le_bytes(n))),
            b'h' => self.input.array().and_then(|[n]| self.get(n.into())),
            b'j' => self.input.array().and_then(|n| self.get(u32::from_le_bytes(n))),
            b'Q' => self.persistent_id(),
            b'R' => self.reduce(),
            b'b' => self.build(),
            other => Err(Error::model(format!(
                "opcode 0x{other:02x} is not one that torch.save writes: the file is damaged, or \
                 holds more than tensors"
            ))),
        }
    }

    fn protocol(&mut self) -> Result<()> {
        match self.input.byte()? {
            2 => Ok(()),
            other => Err(Error::model(format!(
                "pickle protocol {other}, but torch.save writes 2 unless told otherwise: save it \
                 again, or use a safetensors version"
            ))),
        }
    }

    fn push(&mut self, value: Value<'p>) -> Result<()> {
        if self.stack.len() >= MAX_STACK {
            return Err(Error::model(format!("more than {MAX_STACK} values on the stack")));
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value<'p>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.pop().filter(|_| self.stack.len() >= floor).ok_or_else(|| damaged("a value"))
    }

    fn mark(&mut self) -> Result<()> {
        if self.marks.len() >= MAX_STACK {
            return Err(Error::model(format!("more than {MAX_STACK} marks")));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value<'p>>> {
        let height = self.marks.pop().ok_or_else(|| damaged("a mark"))?;
        // `pop` goes no lower than the last mark, so the stack is at least that high.
        Ok(self.stack.split_off(height.min(self.stack.len())))
    }

    fn make(&mut self, object: Object<'p>) -> Result<()> {
        if self.objects.len() >= MAX_OBJECTS {
            return Err(Error::model(format!("more than {MAX_OBJECTS} objects")));
        }
        self.objects.push(object);
        self.push(Value::Object(self.objects.len() - 1))
    }

    fn tuple_of(&mut self, len: usize) -> Result<()> {
        let mut items = Vec::with_capacity(len);
        for _ in 0..len {
            items.push(self.pop()?);
        }
        items.reverse();
        self.make(Object::Tuple(items))
    }

    fn put(&mut self, slot: u32) -> Result<()> {
        let value = self.pop()?;
        if self.memo.len() >= MAX_OBJECTS {
            return Err(Error::model(format!("more than {MAX_OBJECTS} values to remember")));
        }
        self.memo.insert(slot, value);
        self.push(value)
    }

    fn get(&mut self, slot: u32) -> Result<()> {
        let value = self.memo.get(&slot).copied().ok_or_else(|| damaged("a remembered value"))?;
        self.push(value)
    }

    fn object(&self, value: Value<'p>) -> Option<&Object<'p>> {
        let Value::Object(index) = value else { return None };
        self.objects.get(index)
    }

    /// The list that appending leaves on the stack.
    fn list(&mut self) -> Result<()> {
        let top = self.pop()?;
        let Some(Object::List) = self.object(top) else { return Err(damaged("a list")) };
        self.push(top)
    }

    /// The dictionary on top of the stack, which stays there.
    fn dict(&mut self) -> Result<&mut Vec<(Value<'p>, Value<'p>)>> {
        let top = self.pop()?;
        self.push(top)?;
        let Value::Object(index) = top else { return Err(damaged("a dictionary")) };
        let Some(Object::Dict(items)) = self.objects.get_mut(index) else {
            return Err(damaged("a dictionary"));
        };
        Ok(items)
    }

    fn set_items(&mut self) -> Result<()> {
        let items = self.pop_to_mark()?;
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(damaged("a value for each key"));
        }
        self.dict()?.extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    /// A storage: ('storage', class, key, device, number of elements).
    fn persistent_id(&mut self) -> Result<()> {
        let id = self.pop()?;
        let Some(Object::Tuple(items)) = self.object(id) else {
            return Err(damaged("the description of a storage"));
        };
        let &[
            Value::Text("storage"),
            Value::Global(Global::Storage(dtype)),
            Value::Text(key),
            Value::Text(_device),
            Value::Int(elements),
        ] = items.as_slice()
        else {
            return Err(damaged("the description of a storage"));
        };
        if key.len() > MAX_KEY_LEN {
            return Err(damaged("a number for the key of a storage"));
        }
        self.make(Object::Storage(Storage { dtype, key, elements: size(elements)? }))
    }

    fn reduce(&mut self) -> Result<()> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let Some(Object::Tuple(arguments)) = self.object(arguments) else {
            return Err(damaged("a tuple of arguments"));
        };
        let object = if let Value::Global(Global::RebuildTensor) = callable {
            Object::Tensor(self.rebuild(arguments)?)
        } else if matches!(callable, Value::Global(Global::OrderedDict)) && arguments.is_empty() {
            Object::Dict(vec![])
        } else {
            return Err(damaged("something that makes an OrderedDict or a tensor"));
        };
        self.make(object)
    }

    /// `torch._utils._rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad,
    /// backward_hooks, metadata=None)`.
    fn rebuild(&self, arguments: &[Value<'p>]) -> Result<StoredTensor<'p>> {
        let &[storage, Value::Int(offset), shape, stride, Value::Bool, _hooks, ref rest @ ..] =
            arguments
        else {
            return Err(damaged("the arguments of a tensor"));
        };
        let Some(&Object::Storage(storage)) = self.object(storage) else {
            return Err(damaged("the storage of a tensor"));
        };
        if !matches!(rest, [] | [Value::None]) {
            return Err(Error::model("a tensor has metadata, such as a conjugate or negative bit"));
        }
        let (shape, stride) = (self.sizes(shape)?, self.sizes(stride)?);
        if shape.len() != stride.len() {
            return Err(damaged("a stride for each dimension"));
        }
        Ok(StoredTensor { storage, offset: size(offset)?, shape, stride })
    }

    fn sizes(&self, value: Value<'p>) -> Result<Vec<usize>> {
        let Some(Object::Tuple(items)) = self.object(value) else {
            return Err(damaged("the size or stride of a tensor"));
        };
        if items.len() > MAX_RANK {
            return Err(Error::model(format!(
                "a tensor has {} dimensions, more than {MAX_RANK}",
                items.len()
            )));
        }
        let size_of = |item: &Value<'p>| {
            let Value::Int(n) = *item else { return Err(damaged("whole numbers")) };
            size(n)
        };
        items.iter().map(size_of).collect()
    }

    /// Attributes of an OrderedDict: `nn.Module.state_dict` has `_metadata`, the versions of its
    /// modules, which inference has no use for.
    fn build(&mut self) -> Result<()> {
        let state = self.pop()?;
        if !matches!(self.object(state), Some(Object::Dict(_))) {
            return Err(damaged("the attributes of a dictionary"));
        }
        self.dict().map(drop)
    }

    fn tensors_of(&mut self, top: Value<'p>) -> Result<Vec<(&'p str, StoredTensor<'p>)>> {
        let Some(Object::Dict(items)) = self.object(top) else {
            return Err(Error::model("its top is not a dictionary of tensors (a state_dict)"));
        };
        if items.len() > MAX_TENSORS {
            return Err(Error::model(format!("more than {MAX_TENSORS} tensors")));
        }
        let mut tensors = Vec::with_capacity(items.len());
        for &(key, value) in items {
            let Value::Text(name) = key else {
                return Err(Error::model("a key of the state_dict is not a name"));
            };
            let Some(Object::Tensor(tensor)) = self.object(value) else {
                return Err(Error::model(format!(
                    "{} is not a tensor: this is not a state_dict, but holds more, such as a \
                     training checkpoint; save the state_dict alone",
                    shown(name)
                )));
            };
            tensors.push((name, tensor.clone()));
        }
        Ok(tensors)
    }
}

fn size(n: i64) -> Result<usize> {
    usize::try_from(n).map_err(|_| damaged(&format!("a size, not {n}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The start of every pickle that torch writes.
    fn pickle(parts: &[&[u8]]) -> Vec<u8> {
        [b"\x80\x02".as_slice(), &parts.concat(), b"."].concat()
    }

    #[test]
    fn what_state_dicts_do_not_have_is_an_error() {
        let check = |parts: &[&[u8]], expected: &str| {
            let error = state_dict(&pickle(parts)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        assert!(state_dict(&pickle(&[b"}"])).unwrap().is_empty());
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
        check(&[b"\x8a\x09123456789"], "a whole number of 9 bytes");
    }

    #[test]
    fn depth_cycles_and_floods_end_in_an_error() {
        let check = |parts: &[&[u8]], expected: &str| {
            let error = state_dict(&pickle(parts)).unwrap_err().to_string();
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
        let tensors = state_dict(&bytes).unwrap();
        let [("a", found)] = tensors.as_slice() else { panic!("{tensors:?}") };
        assert_eq!((found.storage.dtype, found.storage.key), (DType::F32, "0"));
        assert_eq!((found.storage.elements, found.offset), (2, 3));
        assert_eq!((&*found.shape, &*found.stride), (&[1, 2][..], &[256, 1][..]));
        let check = |size, stride, offset, rest, expected: &str| {
            let error = state_dict(&tensor(size, stride, offset, rest)).unwrap_err().to_string();
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
}
