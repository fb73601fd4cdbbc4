//! Pools the hidden states of a prompt into one vector, an embedding of the prompt.

use std::ops::Range;

use super::request::Pooling;
use crate::{Error, Result};

/// The pooled hidden states of one sequence's prompt, summed while its rows run. Rows are added in the order of their positions
/// and in f64, so the result does not depend on how the prompt was cut into chunks.
#[derive(Debug)]
pub(super) struct PooledPrompt {
    prompt_len: usize,
    /// The first position that is pooled.
    first: usize,
    /// The next position that is pooled. The ones from `first` to here are in `sum`, also after a preemption.
    next: usize,
    /// Sum of the hidden states so far `[hidden]`; empty before the first.
    sum: Vec<f64>,
}

impl PooledPrompt {
    /// Nothing of a prompt of `prompt_len` tokens is pooled yet.
    pub(super) fn new(pooling: Pooling, prompt_len: usize) -> Self {
        let first = match pooling {
            Pooling::Mean => 0,
            Pooling::Last => prompt_len.saturating_sub(1),
        };
        Self { prompt_len, first, next: first, sum: Vec::new() }
    }

    /// The next position whose hidden state is needed; the end of the prompt if there is none.
    pub(super) fn next(&self) -> usize {
        self.next
    }

    /// The subrange of `positions` whose hidden states are still needed.
    pub(super) fn needed(&self, positions: Range<usize>) -> Range<usize> {
        let start = positions.start.max(self.next);
        start..positions.end.min(self.prompt_len).max(start)
    }

    /// Adds the hidden states of the next positions. Returns the pooled vector `[hidden]` once the prompt is complete. Errors: a
    /// value that is NaN or infinite.
    pub(super) fn add(&mut self, rows: &[Vec<f32>]) -> Result<Option<Vec<f32>>> {
        for row in rows {
            if !row.iter().all(|value| value.is_finite()) {
                return Err(Error::internal("the model gave a hidden state that is NaN or infinite"));
            }
            self.sum.resize(row.len(), 0.0);
            self.sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        self.next += rows.len();
        let complete = !rows.is_empty() && self.next == self.prompt_len;
        let count = (self.next - self.first) as f64;
        Ok(complete.then(|| self.sum.iter().map(|sum| (sum / count) as f32).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pools rows of `(position, 1)` in chunks that end at `ends`.
    fn pool(pooling: Pooling, ends: &[usize]) -> Vec<Vec<f32>> {
        let mut pooled = PooledPrompt::new(pooling, 5);
        let mut start = 0;
        let mut results = Vec::new();
        for &end in ends {
            let rows: Vec<_> = pooled.needed(start..end).map(|position| vec![position as f32, 1.0]).collect();
            results.extend(pooled.add(&rows).unwrap());
            start = end;
        }
        results
    }

    #[test]
    fn chunks_give_one_result() {
        for ends in [&[5][..], &[1, 4, 5], &[2, 5, 6, 7]] {
            assert_eq!(pool(Pooling::Mean, ends), [[2.0, 1.0]]);
            assert_eq!(pool(Pooling::Last, ends), [[4.0, 1.0]]);
        }
        assert!(pool(Pooling::Mean, &[4]).is_empty());
    }

    #[test]
    fn rows_that_run_again_count_once() {
        let mut pooled = PooledPrompt::new(Pooling::Mean, 3);
        assert_eq!(pooled.add(&[vec![3.0], vec![6.0]]).unwrap(), None);
        assert_eq!((pooled.needed(0..3), pooled.next()), (2..3, 2));
        assert_eq!(pooled.add(&[vec![0.0]]).unwrap(), Some(vec![3.0]));
        assert_eq!((pooled.needed(0..3), pooled.needed(3..4)), (3..3, 3..3));
    }

    #[test]
    fn a_value_that_is_not_finite_is_an_error() {
        let mut pooled = PooledPrompt::new(Pooling::Last, 1);
        assert!(pooled.add(&[vec![f32::NAN]]).unwrap_err().message.contains("NaN"));
    }
}
