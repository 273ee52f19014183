//! Who is served and who waits for it: sessions run up to a number, as many again wait in the order
//! in which they came, and beyond that the worker is busy. Separate because it decides without
//! sockets and clocks.

use std::collections::VecDeque;

/// The sessions that run and the clients that wait.
#[derive(Debug)]
pub struct Queue {
    max_running: usize,
    max_waiting: usize,
    running: usize,
    waiting: VecDeque<Ticket>,
    next: u64,
}

/// A client that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// What becomes of a client that comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Its session runs; [`Queue::finished`] must follow.
    Run,
    /// It waits; [`Queue::start`] or [`Queue::leave`] must follow.
    Wait(Ticket),
    /// There is no place, not even to wait.
    Busy,
}

impl Queue {
    /// Nobody is there.
    pub fn new(max_running: usize, max_waiting: usize) -> Self {
        Self { max_running, max_waiting, running: 0, waiting: VecDeque::new(), next: 0 }
    }

    /// How many sessions run.
    pub fn running(&self) -> usize {
        self.running
    }

    /// How many clients wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// A client comes. It does not overtake those who wait.
    pub fn enter(&mut self) -> Entry {
        if self.running < self.max_running && self.waiting.is_empty() {
            self.running += 1;
            return Entry::Run;
        }
        if self.waiting.len() >= self.max_waiting {
            return Entry::Busy;
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        self.waiting.push_back(ticket);
        Entry::Wait(ticket)
    }

    /// How many clients wait before this one; `None` if it does not wait.
    pub fn ahead(&self, ticket: Ticket) -> Option<usize> {
        self.waiting.iter().position(|waiting| *waiting == ticket)
    }

    /// Begins the session of a client that waited, if it is its turn; [`Queue::finished`] must
    /// follow then.
    pub fn start(&mut self, ticket: Ticket) -> bool {
        let is_next = self.running < self.max_running && self.waiting.front() == Some(&ticket);
        if is_next {
            self.waiting.pop_front();
            self.running += 1;
        }
        is_next
    }

    /// A client waits no longer.
    pub fn leave(&mut self, ticket: Ticket) {
        self.waiting.retain(|waiting| *waiting != ticket);
    }

    /// A session has ended.
    pub fn finished(&mut self) {
        self.running = self.running.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(queue: &mut Queue) -> Ticket {
        match queue.enter() {
            Entry::Wait(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_came_first_is_served_first_and_nobody_overtakes() {
        let mut queue = Queue::new(1, 2);
        assert_eq!(queue.enter(), Entry::Run);
        let (first, second) = (ticket(&mut queue), ticket(&mut queue));
        assert_eq!(queue.enter(), Entry::Busy);
        assert_eq!([queue.ahead(first), queue.ahead(second)], [Some(0), Some(1)]);
        assert!(!queue.start(first));
        queue.finished();
        assert!(!queue.start(second));
        // A place is free, but it is somebody's.
        let third = {
            queue.leave(second);
            ticket(&mut queue)
        };
        assert!(queue.start(first));
        assert_eq!((queue.ahead(first), queue.ahead(third)), (None, Some(0)));
        assert_eq!((queue.running(), queue.waiting()), (1, 1));
    }

    #[test]
    fn without_places_to_wait_the_worker_is_busy_at_once() {
        let mut queue = Queue::new(1, 0);
        assert_eq!([queue.enter(), queue.enter()], [Entry::Run, Entry::Busy]);
        queue.finished();
        assert_eq!(queue.enter(), Entry::Run);
    }
}
