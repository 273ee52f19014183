//! What a recording consisted of, to find out whether replaying it would have been right. Separate
//! from the session because only tests and `compare` look at it.

use std::collections::HashMap;

use super::op::{Call, Id, Op, Operand};

/// The calls of one recording, with ids as places: equal for equal work on other buffers.
pub struct Transcript {
    inputs: HashMap<Id, usize>,
    first: Id,
    calls: Vec<(Op, Vec<(Place, Operand)>)>,
    before: Option<Box<Transcript>>,
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    Input(usize),
    Local(u64),
    Outside(u64),
}

impl Transcript {
    /// Nothing recorded yet; what is made from now on begins with `first`.
    pub fn new(inputs: &[Id], first: Id, before: Option<Transcript>) -> Self {
        let inputs = inputs.iter().enumerate().map(|(n, id)| (*id, n)).collect();
        // Only one step back: the recording before compared itself with its own.
        let before = before.map(|mut before| {
            before.before = None;
            Box::new(before)
        });
        Self { inputs, first, calls: Vec::new(), before }
    }

    /// Adds a call.
    pub fn add(&mut self, call: &Call) {
        let place = |operand: &Operand| {
            let place = match (self.inputs.get(&operand.id), operand.id.0.checked_sub(self.first.0))
            {
                (Some(n), _) => Place::Input(*n),
                (None, Some(local)) => Place::Local(local),
                (None, None) => Place::Outside(operand.id.0),
            };
            (place, Operand { id: Id(0), layout: operand.layout.clone() })
        };
        let args = call.args.iter().map(place).collect();
        self.calls.push((call.op.clone(), args));
    }

    /// The first call that differs from the recording before, in words.
    pub fn difference(&mut self) -> Option<String> {
        let before = self.before.take()?;
        let number = (0..self.calls.len().max(before.calls.len()))
            .find(|&n| self.calls.get(n) != before.calls.get(n))?;
        let name = |calls: &[(Op, Vec<(Place, Operand)>)]| match calls.get(number) {
            Some((op, args)) => format!("{op:?} of {args:?}"),
            None => "nothing".to_string(),
        };
        Some(format!(
            "call {number} is {} and was {}: what varies must be an input",
            name(&self.calls),
            name(&before.calls)
        ))
    }
}
