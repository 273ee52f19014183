//! Whose turn it is on the device: sessions of one worker run their ops one at a time, in the order
//! in which they asked, so that none starves and each knows how long it waited for the others.
//! Separate because a mutex would let whoever holds it take it again, past those who wait.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A lock that is taken in the order of asking. Untaken, it costs two atomic additions.
#[derive(Debug, Default)]
pub struct Turns {
    /// The number that the next to ask gets.
    next: AtomicU64,
    /// The number whose turn it is.
    current: AtomicU64,
    /// Held only by those who wait, and by who wakes them.
    lock: Mutex<()>,
    changed: Condvar,
}

/// A turn, until it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    /// How long others were before this one.
    pub waited: Duration,
}

impl Turns {
    /// Waits for a turn.
    pub fn take(&self) -> Turn<'_> {
        let mine = self.next.fetch_add(1, Ordering::SeqCst);
        let waited = match self.current.load(Ordering::SeqCst) == mine {
            true => Duration::ZERO,
            false => self.wait_for(mine),
        };
        Turn { turns: self, waited }
    }

    #[cold]
    fn wait_for(&self, mine: u64) -> Duration {
        let began = Instant::now();
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |_: &mut ()| self.current.load(Ordering::SeqCst) != mine;
        drop(self.changed.wait_while(guard, waits).unwrap_or_else(PoisonError::into_inner));
        began.elapsed()
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let next = self.turns.current.fetch_add(1, Ordering::SeqCst) + 1;
        // Who asks after this looks at `current` after it was raised.
        if self.turns.next.load(Ordering::SeqCst) != next {
            // Under the lock: who looked before it was raised sleeps by now.
            let _guard = self.turns.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.turns.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use candle_core::DType;

    use super::*;
    use crate::backend::cpu;
    use crate::error::{Error, Result};
    use crate::remote::disk_library::{self, DiskLibrary};
    use crate::remote::executor::{Arrivals, Executor, Limits, Shared};
    use crate::remote::message::{Message, Reply};
    use crate::remote::op::{Call, Id, Op};

    #[test]
    fn one_at_a_time_and_all_get_their_turns() {
        const ROUNDS: usize = 2000;
        let (turns, inside) = (Turns::default(), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..ROUNDS {
                        let turn = turns.take();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
        });
        assert_eq!(turns.current.load(Ordering::SeqCst), 4 * ROUNDS as u64);
        assert_eq!(turns.take().waited, Duration::ZERO);
    }

    #[test]
    fn who_asked_first_comes_first_and_knows_how_long_it_waited() {
        let turns = Turns::default();
        let (tell, order) = channel();
        let (turns, tell) = (&turns, &tell);
        std::thread::scope(|scope| {
            let held = turns.take();
            for name in 0..3 {
                let asked = turns.next.load(Ordering::SeqCst);
                scope.spawn(move || {
                    let turn = turns.take();
                    tell.send((name, turn.waited)).unwrap();
                });
                while turns.next.load(Ordering::SeqCst) == asked {
                    std::thread::yield_now();
                }
            }
            drop(held);
        });
        let order: Vec<_> = order.try_iter().collect();
        assert_eq!(order.iter().map(|(name, _)| *name).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(order.iter().all(|(_, waited)| *waited > Duration::ZERO));
    }

    #[test]
    fn a_panic_ends_a_turn() {
        let turns = Turns::default();
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _turn = turns.take();
            panic!("in a kernel");
        }));
        assert!(panic.is_err());
        assert_eq!(turns.take().waited, Duration::ZERO);
    }

    struct Nothing;

    impl Arrivals for Nothing {
        fn take(&self, _: u64) -> Result<Vec<u8>> {
            Err(Error::other("nothing arrives"))
        }
    }

    #[test]
    fn an_op_waits_for_its_sessions_turn_and_says_how_long() {
        let device = cpu::Device::with_threads(1).unwrap();
        let shared = Arc::new(Shared::<cpu::Storage>::new(device, 1 << 20));
        let library = DiskLibrary::in_memory(disk_library::Limits::new(1 << 20)).session();
        let limits = Limits { memory_bytes: 1 << 20, buffers: 10 };
        let mut executor = Executor::new(shared.clone(), library, Arc::new(Nothing), limits);
        let queued_us = |executor: &mut Executor<cpu::Storage>, id| {
            let op = Op::Zeros { dtype: DType::F32, dims: vec![1] };
            let call = Message::Call(Call { op, args: vec![] });
            executor.run(Id(id), call, &mut |_| Ok(())).unwrap();
            let mut queued_us = None;
            let mut reply = |reply| {
                if let Reply::Done(progress) = reply {
                    queued_us = Some(progress.queued_us);
                }
                Ok(())
            };
            executor.run(Id(id + 1), Message::Mark, &mut reply).unwrap();
            queued_us.unwrap()
        };
        assert_eq!(queued_us(&mut executor, 0), 0);
        let held = shared.turns.take();
        let waited = std::thread::scope(|scope| {
            let running = scope.spawn(|| queued_us(&mut executor, 1));
            // The op has asked for a turn; it is not its own for at least this long.
            while shared.turns.next.load(Ordering::SeqCst) < 3 {
                std::thread::yield_now();
            }
            let asked = Instant::now();
            while asked.elapsed() < Duration::from_millis(2) {
                std::thread::yield_now();
            }
            drop(held);
            running.join().unwrap()
        });
        assert!(waited >= 2000, "{waited} us");
    }
}
