//! The stack machine that reads `data.pkl`: the part of pickle's protocol 2 that `torch.save`
//! writes for a state_dict. Opcodes as in CPython's `pickletools`; what they build as in
//! `torch/_utils.py` and `torch/serialization.py`. Separate because it sees nothing but bytes.
//!
//! Nothing is ever run. "Calling" a global on the list of `globals.rs` makes a dictionary or a
//! description of a tensor; any other stays a placeholder, and so does all that would be made of
//! it: the callbacks and optimizers of a training checkpoint are passed over so. All values live in
//! one arena and refer to each other by number, so that neither depth nor cycles nor sharing in the
//! file cost stack or copies.

use std::collections::HashMap;

use candle_core::DType;

use super::super::{MAX_RANK, MAX_TENSORS, shown};
use super::globals::{Global, Known, global, refusal};
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
/// The key under which training checkpoints have their tensors.
const STATE_DICT: &str = "state_dict";
/// The key under which AUTOMATIC1111's embeddings have theirs.
const STRING_TO_PARAM: &str = "string_to_param";
/// Most state_dicts within each other.
const MAX_NESTED: usize = 4;

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

/// What a state_dict has under a name; an error says why it is no tensor, or none that is read.
pub(super) type Entry<'p> = (&'p str, Result<StoredTensor<'p>>);

/// The tensors of a pickled state_dict with their names, in the order of the file: of the
/// dictionary at its top, or of the one that this has as `state_dict` or `string_to_param`.
///
/// # Errors
/// If the pickle is damaged, uses what state_dicts do not, or there is no such dictionary.
pub(super) fn state_dict(pickle: &[u8]) -> Result<Vec<Entry<'_>>> {
    if pickle.len() > MAX_PICKLE_LEN {
        return Err(Error::model(format!(
            "data.pkl has {} bytes, more than the {MAX_PICKLE_LEN} that tensors need",
            pickle.len()
        )));
    }
    let mut machine = Machine::new(pickle);
    let top = machine.run()?;
    let dict = machine.state_dict(top);
    machine.entries_of(dict)
}

#[derive(Debug, Clone, Copy)]
enum Value<'p> {
    None,
    Bool,
    Int(i64),
    /// A number that no tensor has.
    Number,
    Text(&'p str),
    Global(Global<'p>),
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
                self.push(n.map_or(Value::Number, Value::Int))
            }
            b'G' => self.input.array::<8>().and_then(|_| self.push(Value::Number)),
            b'X' => {
                let text = self.input.text()?;
                self.push(Value::Text(text))
            }
            b'c' => {
                let global = global(self.input.line()?, self.input.line()?);
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
                self.set_items(&[[key, value]])
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                let (pairs, rest) = items.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err(damaged("a value for each key"));
                }
                self.set_items(pairs)
            }
            b'0' => self.pop().map(drop),
            b'1' => self.pop_to_mark().map(drop),
            b'q' => self.input.array().and_then(|[n]| self.put(n.into())),
            b'r' => self.input.array().and_then(|n| self.put(u32::from_le_bytes(n))),
            b'h' => self.input.array().and_then(|[n]| self.get(n.into())),
            b'j' => self.input.array().and_then(|n| self.get(u32::from_le_bytes(n))),
            b'Q' => self.persistent_id(),
            b'R' => self.reduce(),
            0x81 => self.new_object(),
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

    /// What is on top of the stack, and stays there.
    fn top(&mut self) -> Result<Value<'p>> {
        let top = self.pop()?;
        self.push(top)?;
        Ok(top)
    }

    /// What is appended is of no use here; it was appended to a list, or to what is none of ours.
    fn list(&mut self) -> Result<()> {
        match self.top()? {
            Value::Global(Global::Placeholder { .. }) => Ok(()),
            top => match self.object(top) {
                Some(Object::List) => Ok(()),
                _ => Err(damaged("a list")),
            },
        }
    }

    /// Puts items into the dictionary on top of the stack; what is none of ours takes anything.
    fn set_items(&mut self, pairs: &[[Value<'p>; 2]]) -> Result<()> {
        let index = match self.top()? {
            Value::Global(Global::Placeholder { .. }) => return Ok(()),
            Value::Object(index) => index,
            _ => return Err(damaged("a dictionary")),
        };
        let Some(Object::Dict(items)) = self.objects.get_mut(index) else {
            return Err(damaged("a dictionary"));
        };
        items.extend(pairs.iter().map(|&[key, value]| (key, value)));
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
            Value::Global(class),
            Value::Text(key),
            Value::Text(_device),
            Value::Int(elements),
        ] = items.as_slice()
        else {
            return Err(damaged("the description of a storage"));
        };
        let dtype = match class {
            Global::Known(Known::Storage(dtype)) => dtype,
            Global::Placeholder { .. } => return self.push(Value::Global(class)),
            Global::Known(Known::OrderedDict | Known::RebuildTensor) => {
                return Err(damaged("the description of a storage"));
            }
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
        let object = match callable {
            // Whatever it would make, it is not made.
            Value::Global(Global::Placeholder { .. }) => return self.push(callable),
            Value::Global(Global::Known(Known::RebuildTensor)) => match arguments.first() {
                Some(&Value::Global(unread @ Global::Placeholder { .. })) => {
                    return self.push(Value::Global(unread));
                }
                _ => Object::Tensor(self.rebuild(arguments)?),
            },
            Value::Global(Global::Known(Known::OrderedDict)) if arguments.is_empty() => {
                Object::Dict(vec![])
            }
            _ => return Err(damaged("something that makes an OrderedDict or a tensor")),
        };
        self.make(object)
    }

    /// An instance of a class: all classes on the list are made by calling them.
    fn new_object(&mut self) -> Result<()> {
        let (_arguments, class) = (self.pop()?, self.pop()?);
        match class {
            Value::Global(Global::Placeholder { .. }) => self.push(class),
            _ => Err(damaged("a class that is none of tensors'")),
        }
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
        if let Value::Global(Global::Placeholder { .. }) = self.top()? {
            return Ok(());
        }
        if !matches!(self.object(state), Some(Object::Dict(_))) {
            return Err(damaged("the attributes of a dictionary"));
        }
        self.set_items(&[])
    }

    /// The dictionary of tensors in what the pickle holds.
    fn state_dict(&self, top: Value<'p>) -> Value<'p> {
        let mut dict = top;
        for _ in 0..MAX_NESTED {
            let Some(Object::Dict(items)) = self.object(dict) else { break };
            let is_it = |(key, value): &&(Value<'p>, Value<'p>)| {
                matches!(key, Value::Text(STATE_DICT | STRING_TO_PARAM))
                    && matches!(self.object(*value), Some(Object::Dict(_)))
            };
            match items.iter().find(is_it) {
                Some((_, inner)) => dict = *inner,
                None => break,
            }
        }
        dict
    }

    fn entries_of(&self, dict: Value<'p>) -> Result<Vec<Entry<'p>>> {
        if let Value::Global(Global::Placeholder { module, name }) = dict {
            return Err(refusal(module, name));
        }
        let Some(Object::Dict(items)) = self.object(dict) else {
            return Err(Error::model("its top is not a dictionary of tensors (a state_dict)"));
        };
        if items.len() > MAX_TENSORS {
            return Err(Error::model(format!("more than {MAX_TENSORS} tensors")));
        }
        let mut entries = Vec::with_capacity(items.len());
        for &(key, value) in items {
            let Value::Text(name) = key else {
                return Err(Error::model("a key of the state_dict is not a name"));
            };
            entries.push((name, self.tensor_of(name, value)));
        }
        Ok(entries)
    }

    fn tensor_of(&self, name: &str, value: Value<'p>) -> Result<StoredTensor<'p>> {
        match (value, self.object(value)) {
            (_, Some(Object::Tensor(tensor))) => Ok(tensor.clone()),
            (Value::Global(Global::Placeholder { module, name }), _) => Err(refusal(module, name)),
            _ => Err(Error::model(format!(
                "{} is not a tensor: this is not a state_dict, but holds more, such as a \
                 training checkpoint; save the state_dict alone",
                shown(name)
            ))),
        }
    }
}

fn size(n: i64) -> Result<usize> {
    usize::try_from(n).map_err(|_| damaged(&format!("a size, not {n}")))
}

#[cfg(test)]
mod tests;
