//! The examples of each optimiser step. They depend only on the seed and the step, so a resumed job needs no more than the
//! number of steps done.

use rand::seq::SliceRandom;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::SeedableRng;

use super::Example;
use crate::train::spec::JobSpec;
use crate::{Error, Result};

/// The training examples of a job and their order.
pub(in crate::train) struct ExampleOrder {
    /// Cut to `max_length`, with at least one token to train on each.
    pub(in crate::train) examples: Vec<Example>,
    /// Indices of the examples of each row: one, or several with packing.
    rows: Vec<Vec<usize>>,
    batch_size: usize,
    accumulation: usize,
    seed: u64,
    /// The last used epoch and its order of rows.
    shuffled: Option<(usize, Vec<usize>)>,
}

impl ExampleOrder {
    /// Cuts and packs the examples. Errors: `batch_size`, `gradient_accumulation` or `max_length` is 0; there is no token to
    /// train on.
    pub(in crate::train) fn new(spec: &JobSpec, examples: Vec<Example>) -> Result<Self> {
        for (name, value) in [
            ("batch_size", spec.batch_size),
            ("gradient_accumulation", spec.gradient_accumulation),
            ("max_length", spec.max_length),
        ] {
            if value == 0 {
                return Err(Error::invalid(format!("{name} is 0; it must be at least 1")).param(name));
            }
        }
        let examples = cut_examples(examples, spec.max_length);
        if examples.is_empty() {
            return Err(Error::invalid(format!(
                "no example has a token to train on within max_length, {} tokens",
                spec.max_length
            ))
            .param("training_file"));
        }
        let rows = if spec.packing {
            pack(&examples, spec.max_length)
        } else {
            (0..examples.len()).map(|i| vec![i]).collect()
        };
        Ok(Self {
            examples,
            rows,
            batch_size: spec.batch_size,
            accumulation: spec.gradient_accumulation,
            seed: spec.seed,
            shuffled: None,
        })
    }

    /// Optimiser steps of an epoch. The last one may have fewer rows than the others.
    pub(in crate::train) fn steps_per_epoch(&self) -> usize {
        self.rows.len().div_ceil(self.batch_size * self.accumulation)
    }

    /// The indices of the examples of step `step` (from 0), pass by pass.
    pub(in crate::train) fn step_passes(&mut self, step: usize) -> Vec<Vec<usize>> {
        let (epoch, within) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        if self.shuffled.as_ref().is_none_or(|(shuffled, _)| *shuffled != epoch) {
            let mut order: Vec<usize> = (0..self.rows.len()).collect();
            // Each epoch has its own random numbers.
            let seed = self.seed.wrapping_add((epoch as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            order.shuffle(&mut Pcg64::seed_from_u64(seed));
            self.shuffled = Some((epoch, order));
        }
        let order = self.shuffled.as_ref().map_or(&[][..], |(_, order)| order);
        let size = self.batch_size * self.accumulation;
        let rows = &order[within * size..order.len().min((within + 1) * size)];
        let examples = |rows: &[usize]| rows.iter().flat_map(|&row| self.rows[row].iter().copied()).collect();
        rows.chunks(self.batch_size).map(examples).collect()
    }
}

/// Cuts examples to `max_length`, and drops those without a token to train on.
pub(in crate::train) fn cut_examples(mut examples: Vec<Example>, max_length: usize) -> Vec<Example> {
    for example in &mut examples {
        example.tokens.truncate(max_length);
        example.trained.truncate(max_length);
    }
    examples.retain(|e| e.trained.iter().skip(1).any(|trained| *trained));
    examples
}

/// Packs examples into rows of at most `max_length` tokens, the longest example first, each into the fullest row with room (best
/// fit decreasing).
fn pack(examples: &[Example], max_length: usize) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> = (0..examples.len()).collect();
    longest_first.sort_by_key(|&i| std::cmp::Reverse(examples[i].tokens.len()));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Room and index of each row that is not full.
    let mut room = std::collections::BTreeSet::new();
    for i in longest_first {
        let len = examples[i].tokens.len();
        let fitting = room.range((len, 0)..).next().copied();
        let (left, row) = fitting.unwrap_or((max_length, rows.len()));
        room.remove(&(left, row));
        if row == rows.len() {
            rows.push(Vec::new());
        }
        rows[row].push(i);
        room.insert((left - len, row));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::testing::spec;

    fn examples(lengths: &[usize]) -> Vec<Example> {
        let example = |&n: &usize| Example { tokens: vec![n as u32; n], trained: vec![true; n] };
        lengths.iter().map(example).collect()
    }

    #[test]
    fn each_epoch_has_every_example_once_in_a_new_order() {
        let spec = JobSpec { batch_size: 2, gradient_accumulation: 3, ..spec() };
        let mut order = ExampleOrder::new(&spec, examples(&[5; 14])).unwrap();
        assert_eq!(order.steps_per_epoch(), 3);
        let mut epochs = Vec::new();
        for epoch in 0..2 {
            let steps: Vec<_> = (0..3).map(|i| order.step_passes(epoch * 3 + i)).collect();
            let shape = |w: &Vec<Vec<usize>>| w.iter().map(Vec::len).collect::<Vec<_>>();
            assert_eq!(steps.iter().map(shape).collect::<Vec<_>>(), [vec![2, 2, 2], vec![2, 2, 2], vec![2]]);
            let all: Vec<usize> = steps.into_iter().flatten().flatten().collect();
            let mut sorted = all.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..14).collect::<Vec<_>>());
            epochs.push(all);
        }
        assert_ne!(epochs[0], epochs[1]);
        let again = ExampleOrder::new(&spec, examples(&[5; 14])).unwrap().step_passes(4);
        assert_eq!(again, order.step_passes(4));
    }

    #[test]
    fn packing_fills_rows_and_loses_nothing() {
        let spec = JobSpec { packing: true, max_length: 10, ..spec() };
        let order = ExampleOrder::new(&spec, examples(&[3, 7, 10, 2, 5, 5, 6, 12, 4])).unwrap();
        let tokens = |row: &Vec<usize>| row.iter().map(|&i| order.examples[i].tokens.len()).sum::<usize>();
        assert_eq!(order.rows.iter().map(tokens).collect::<Vec<_>>(), [10, 10, 10, 10, 10, 2]);
        let mut all: Vec<usize> = order.rows.iter().flatten().copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..9).collect::<Vec<_>>());
    }

    #[test]
    fn examples_without_tokens_to_train_on_are_dropped() {
        let mut some = examples(&[5, 5, 1]);
        some[0].trained = vec![true, false, false, false, true];
        let spec = JobSpec { max_length: 4, ..spec() };
        let order = ExampleOrder::new(&spec, some.clone()).unwrap();
        assert_eq!(order.examples.len(), 1);
        some.remove(1);
        let error = ExampleOrder::new(&spec, some).err().expect("nothing to train on");
        assert!(error.message.contains("no example has a token to train on"), "{error}");
        assert!(ExampleOrder::new(&JobSpec { batch_size: 0, ..spec }, examples(&[5])).is_err());
    }
}
