//! Constraints on a sequence's tokens, such as a grammar, and the masks of tokens that they allow.
//!
//! The engine knows a constraint only as a [`TokenConstraint`]; `text::grammar` implements one. After each token, a thread of a
//! small pool advances the constraint and computes the next mask, while the engine thread runs the next step. The engine waits
//! for the mask only when it samples the sequence, and not longer than [`MASK_TIMEOUT`].

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use crate::{Error, Result};

/// Most threads that compute masks.
const MAX_THREADS: usize = 8;

/// Stack of a thread that computes masks or compiles grammars. Parsers recurse as deeply as a grammar's rules name each other; only
/// the part that is used takes memory.
pub(crate) const STACK_BYTES: usize = 128 << 20;

/// How long a step waits for a mask. Without it, the sequence is left out of the step, so that one expensive grammar does not hold
/// up the others. A mask usually takes less than a millisecond.
pub(super) const MASK_TIMEOUT: Duration = Duration::from_millis(20);

/// The tokens that may come next: a bit for each id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `id % 32` of word `id / 32`. Ids beyond the last word are not allowed.
    words: Vec<u32>,
}

impl TokenMask {
    /// The mask with these bits: bit `id % 32` of word `id / 32` is set if the token is allowed.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// The bits, as [`TokenMask::from_words`] takes them.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether a token is allowed.
    pub fn allows(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Whether a token that is not in `ids` is allowed.
    pub fn allows_other_than(&self, ids: &[u32]) -> bool {
        self.words.iter().enumerate().any(|(i, word)| {
            let here = ids.iter().filter(|id| **id as usize / 32 == i);
            here.fold(*word, |word, id| word & !(1 << (id % 32))) != 0
        })
    }

    /// Removes the tokens that `other` does not allow.
    fn intersect(&mut self, other: &Self) {
        self.words.truncate(other.words.len());
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word &= other);
    }
}

impl FromIterator<u32> for TokenMask {
    /// Allows these ids, and no others.
    fn from_iter<T: IntoIterator<Item = u32>>(ids: T) -> Self {
        let mut words = Vec::new();
        for id in ids {
            let word = id as usize / 32;
            words.resize(words.len().max(word + 1), 0);
            words[word] |= 1 << (id % 32);
        }
        Self { words }
    }
}

/// Decides which tokens a sequence may generate, from the tokens that it has generated so far.
pub trait TokenConstraint: Send {
    /// The tokens that may come next, at least one. Errors fail the sequence.
    fn compute_mask(&mut self) -> Result<TokenMask>;

    /// Advances by a token that the last mask allowed. Returns whether the output is complete: no token can follow. It is not
    /// called with a token that ends the sequence.
    fn accept(&mut self, token: u32) -> Result<bool>;
}

/// `allowed_token_ids`, alone or together with another constraint.
pub(super) struct AllowedTokens {
    allowed: TokenMask,
    inner: Option<Box<dyn TokenConstraint>>,
}

impl AllowedTokens {
    pub(super) fn new(ids: &[u32], inner: Option<Box<dyn TokenConstraint>>) -> Self {
        Self { allowed: ids.iter().copied().collect(), inner }
    }
}

impl TokenConstraint for AllowedTokens {
    fn compute_mask(&mut self) -> Result<TokenMask> {
        let Some(inner) = &mut self.inner else { return Ok(self.allowed.clone()) };
        let mut mask = inner.compute_mask()?;
        mask.intersect(&self.allowed);
        if !mask.allows_other_than(&[]) {
            let message = "`allowed_token_ids` has no token that the grammar or schema allows next";
            return Err(Error::invalid(message).param("allowed_token_ids"));
        }
        Ok(mask)
    }

    fn accept(&mut self, token: u32) -> Result<bool> {
        self.inner.as_mut().map_or(Ok(false), |inner| inner.accept(token))
    }
}

/// The state of a sequence's constraint before its next token.
pub(super) enum NextMask {
    /// A thread of the pool computes it, and sends one of the other states.
    Computing(Receiver<Self>),
    /// The mask of the next token.
    Ready { constraint: Box<dyn TokenConstraint>, mask: TokenMask },
    /// The output is complete.
    Complete,
    /// The constraint has failed.
    Failed(Error),
}

impl NextMask {
    /// Starts to compute the first mask.
    pub(super) fn start(mut constraint: Box<dyn TokenConstraint>) -> Self {
        Self::compute(move || {
            let mask = constraint.compute_mask()?;
            Ok(Self::Ready { constraint, mask })
        })
    }

    /// Starts to compute the mask after `token`. Has an effect only on [`NextMask::Ready`].
    pub(super) fn accept(&mut self, token: u32) {
        *self = match std::mem::replace(self, Self::Complete) {
            Self::Ready { mut constraint, .. } => Self::compute(move || {
                if constraint.accept(token)? {
                    return Ok(Self::Complete);
                }
                let mask = constraint.compute_mask()?;
                Ok(Self::Ready { constraint, mask })
            }),
            other => other,
        }
    }

    /// Waits until the state is no longer [`NextMask::Computing`], but at most for `timeout`.
    pub(super) fn wait(&mut self, timeout: Duration) {
        let Self::Computing(next) = self else { return };
        match next.recv_timeout(timeout) {
            Ok(next) => *self = next,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => *self = Self::Failed(failed()),
        }
    }

    /// The mask, if it is ready.
    pub(super) fn mask(&self) -> Option<&TokenMask> {
        match self {
            Self::Ready { mask, .. } => Some(mask),
            _ => None,
        }
    }

    fn compute(work: impl FnOnce() -> Result<Self> + Send + 'static) -> Self {
        let (sender, next) = channel();
        submit(Box::new(move || {
            let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(failed()));
            // If nobody receives it, the sequence has ended.
            let _ = sender.send(result.unwrap_or_else(Self::Failed));
        }));
        Self::Computing(next)
    }
}

fn failed() -> Error {
    Error::internal("a token constraint failed; see the server's log")
}

type Job = Box<dyn FnOnce() + Send>;

/// Runs a job on a thread of the pool, which is started by the first call.
fn submit(job: Job) {
    static POOL: OnceLock<Sender<Job>> = OnceLock::new();
    let jobs = POOL.get_or_init(|| {
        let (sender, jobs) = channel::<Job>();
        let jobs = Arc::new(Mutex::new(jobs));
        for i in 0..thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS) {
            let jobs = jobs.clone();
            let work = move || {
                // The lock is held while this thread waits for a job, and not while it runs the job.
                while let Ok(job) = { jobs.lock().unwrap_or_else(PoisonError::into_inner).recv() } {
                    job();
                }
            };
            if let Err(error) = thread::Builder::new().name(format!("mask-{i}")).stack_size(STACK_BYTES).spawn(work) {
                tracing::error!(%error, "a thread that computes token masks cannot be started");
            }
        }
        sender
    });
    // Without a thread the job is dropped, and with it its sender: the sequence fails.
    let _ = jobs.send(job);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Allows the digits that are larger than the last one; 9 completes the output. Panics after 5, and fails after 6.
    struct Rising(u32);

    impl TokenConstraint for Rising {
        fn compute_mask(&mut self) -> Result<TokenMask> {
            match self.0 {
                5 => panic!("as the test wants"),
                6 => Err(Error::invalid("six")),
                last => Ok((last + 1..10).collect()),
            }
        }

        fn accept(&mut self, token: u32) -> Result<bool> {
            self.0 = token;
            Ok(token == 9)
        }
    }

    fn after(tokens: &[u32], constraint: impl TokenConstraint + 'static) -> NextMask {
        let mut next = NextMask::start(Box::new(constraint));
        next.wait(Duration::MAX);
        for &token in tokens {
            assert!(next.mask().is_some_and(|mask| mask.allows(token)), "{token} is not allowed");
            next.accept(token);
            next.wait(Duration::MAX);
        }
        next
    }

    #[test]
    fn masks_follow_the_tokens() {
        assert_eq!(after(&[], Rising(0)).mask(), Some(&(1..10).collect()));
        assert_eq!(after(&[3, 7], Rising(0)).mask(), Some(&[8, 9].into_iter().collect()));
        assert!(matches!(after(&[3, 9], Rising(0)), NextMask::Complete));
        assert!(matches!(after(&[6], Rising(0)), NextMask::Failed(error) if error.to_string() == "six"));
        assert!(matches!(after(&[5], Rising(0)), NextMask::Failed(_)), "a panic fails the sequence alone");
        assert!(after(&[1], Rising(0)).mask().is_some(), "the pool lives on after a panic");
    }

    #[test]
    fn allowed_ids_narrow_another_constraint() {
        let only = |ids: &[u32]| AllowedTokens::new(ids, None);
        assert_eq!(after(&[40, 2, 40], only(&[2, 40])).mask(), Some(&[2, 40].into_iter().collect()));
        let both = || AllowedTokens::new(&[0, 4, 8, 70], Some(Box::new(Rising(0))));
        assert_eq!(after(&[], both()).mask(), Some(&[4, 8].into_iter().collect()));
        assert!(
            matches!(after(&[8], both()), NextMask::Failed(error) if error.param.as_deref() == Some("allowed_token_ids"))
        );
    }

    #[test]
    fn masks_are_bits_by_id() {
        let mask: TokenMask = [0, 31, 33].into_iter().collect();
        assert_eq!(mask.words(), [1 << 31 | 1, 2]);
        assert_eq!((0..100).filter(|id| mask.allows(*id)).collect::<Vec<_>>(), [0, 31, 33]);
        assert!(mask.allows_other_than(&[0, 31, 99]) && !mask.allows_other_than(&[0, 31, 33]));
    }
}
