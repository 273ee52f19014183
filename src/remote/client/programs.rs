//! A session's programs: what the worker knows is replayed, what it does not is recorded. Separate
//! from the session because only this decides when a recording begins, ends and goes.

use std::collections::VecDeque;

use candle_core::Layout;

use super::{Session, State};
use crate::backend::Meta;
use crate::error::{Error, Result};
use crate::remote::message::{MAX_PROGRAMS, Message};
use crate::remote::op::{Call, Id, Op, Operand};
use crate::remote::transcript::Transcript;

/// A result of a program: its buffer, and which view of it is meant.
#[derive(Debug, Clone)]
pub struct Output {
    /// The buffer.
    pub meta: Meta,
    /// The view.
    pub layout: Layout,
}

/// What [`Session::begin_program`] found.
pub enum Begun {
    /// The program is known and was replayed: the ids of its results, and what they are.
    Replayed(Vec<(Id, Output)>),
    /// Run it now; [`Session::end_program`] ends the recording.
    Recording,
}

impl Session {
    /// Replays the program of `key` on `inputs`, or begins to record it.
    ///
    /// # Errors
    /// If the session is over, or a program is being recorded already.
    pub fn begin_program(&self, key: &str, inputs: Vec<Id>) -> Result<Begun> {
        let mut state = self.ready()?;
        if state.programs.recording.is_some() {
            return Err(Error::other("a program cannot be recorded within another"));
        }
        let known = state.programs.known.iter().position(|program| program.key == key);
        let known = known.and_then(|place| state.programs.known.remove(place));
        if let Some(Program { number: program, transcript: Some(before), .. }) = known {
            self.send(&mut state, &Message::DropProgram { program })?;
            return self.record(&mut state, key, inputs, Some(before));
        }
        if let Some(program) = known {
            let message = Message::Replay { program: program.number, inputs };
            let Id(first) = self.send(&mut state, &message)?;
            state.statistics.replays += 1;
            let outputs = program.outputs.iter().cloned().enumerate();
            let outputs = outputs.map(|(i, output)| (Id(first + i as u64), output)).collect();
            state.programs.known.push_back(program);
            return Ok(Begun::Replayed(outputs));
        }
        if state.programs.known.len() >= MAX_PROGRAMS
            && let Some(Program { number: program, .. }) = state.programs.known.pop_front()
        {
            self.send(&mut state, &Message::DropProgram { program })?;
        }
        self.record(&mut state, key, inputs, None)
    }

    fn record(
        &self,
        state: &mut State,
        key: &str,
        inputs: Vec<Id>,
        before: Option<Transcript>,
    ) -> Result<Begun> {
        let number = state.programs.next;
        state.programs.next += 1;
        let are_checked = state.programs.are_checked;
        let transcript =
            are_checked.then(|| Transcript::new(&inputs, state.numbering.next(), before));
        let key = key.to_string();
        state.programs.recording = Some(Program { key, number, outputs: vec![], transcript });
        self.send(state, &Message::BeginProgram { program: number, inputs })?;
        Ok(Begun::Recording)
    }

    /// From now on programs are not replayed: each call records anew, and one that differs from the
    /// recording before is an error naming the op. For tests: a replay would have been stale.
    pub fn check_programs(&self) {
        self.lock().programs.are_checked = true;
    }

    /// Ends the recording: the program's results are these.
    ///
    /// # Errors
    /// If the session is over, or nothing is being recorded.
    pub fn end_program(&self, outputs: Vec<(Id, Output)>) -> Result<()> {
        let mut state = self.ready()?;
        let Some(mut program) = state.programs.recording.take() else {
            return Err(Error::other("no program is being recorded"));
        };
        let (ids, outputs) = outputs.into_iter().unzip();
        program.outputs = outputs;
        self.send(&mut state, &Message::EndProgram { outputs: ids })?;
        let differs = program.transcript.as_mut().and_then(|transcript| transcript.difference());
        let key = program.key.clone();
        state.programs.known.push_back(program);
        match differs {
            Some(difference) => Err(Error::other(format!("program {key}: {difference}"))),
            None => Ok(()),
        }
    }

    /// The recording failed: both sides forget it.
    pub fn abort_program(&self) {
        let mut state = self.lock();
        if state.programs.recording.take().is_some() && state.failure.is_none() {
            // Both sides began it, so it can be aborted.
            let _ = self.send(&mut state, &Message::AbortProgram);
        }
    }

    /// Forgets every program, so that the next call of each records it anew.
    pub fn forget_programs(&self) {
        let mut state = self.lock();
        while let Some(Program { number: program, .. }) = state.programs.known.pop_front() {
            if state.failure.is_none() {
                // Both sides know it, so it can be dropped.
                let _ = self.send(&mut state, &Message::DropProgram { program });
            }
        }
    }
}

/// The programs of a session.
#[derive(Default)]
pub(super) struct Programs {
    next: u64,
    /// Least recently used first.
    known: VecDeque<Program>,
    recording: Option<Program>,
    /// Every call records anew and is compared with the recording before.
    are_checked: bool,
}

struct Program {
    key: String,
    number: u64,
    outputs: Vec<Output>,
    /// What was recorded, where programs are checked.
    transcript: Option<Transcript>,
}

impl Programs {
    /// Notes a call, where recordings are compared.
    pub(super) fn add<'a>(
        &mut self,
        op: &Op,
        args: impl Iterator<Item = (Id, Option<&'a Layout>)>,
    ) {
        let recording = self.recording.as_mut();
        if let Some(transcript) = recording.and_then(|program| program.transcript.as_mut()) {
            let args = args.map(|(id, layout)| Operand { id, layout: layout.cloned() }).collect();
            transcript.add(&Call { op: op.clone(), args });
        }
    }
}
