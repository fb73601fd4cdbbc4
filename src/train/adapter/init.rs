//! Initial values of a pair, from the same distributions as in PEFT.

use rand::RngExt;
use rand_pcg::Pcg64;

use crate::train::spec::LoraInit;
use crate::{Error, Result};

/// Distribution of a pair's initial values.
#[derive(Debug, Clone, Copy)]
pub enum PairInit {
    /// As chosen in the job's [`LoraConfig`](crate::train::spec::LoraConfig).
    Lora(LoraInit),
    /// A and B normal with deviation 0.02. The delta is zero because AdaLoRA's E is.
    AdaLora,
}

/// `A [rank, k]` and `B [n, rank]`, row-major, for a module `[n, k]`. Errors: orthogonal values with an odd rank.
pub fn pair(initial: PairInit, rank: usize, (n, k): (usize, usize), rng: &mut Pcg64) -> Result<(Vec<f32>, Vec<f32>)> {
    Ok(match initial {
        PairInit::Lora(LoraInit::Default) => {
            let bound = 1.0 / (k as f32).sqrt();
            ((0..rank * k).map(|_| rng.random_range(-bound..=bound)).collect(), vec![0.0; n * rank])
        }
        PairInit::Lora(LoraInit::Gaussian) => (normal(rng, rank * k, 1.0 / rank as f64), vec![0.0; n * rank]),
        PairInit::Lora(LoraInit::Orthogonal) => orthogonal(rank, (n, k), rng)?,
        PairInit::AdaLora => (normal(rng, rank * k, 0.02), normal(rng, n * rank, 0.02)),
    })
}

/// Normal values with mean 0 (Box-Muller).
fn normal(rng: &mut Pcg64, count: usize, deviation: f64) -> Vec<f32> {
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // In (0, 1], for the logarithm.
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt() * deviation;
        let (sin, cos) = (std::f64::consts::TAU * rng.random::<f64>()).sin_cos();
        values.extend([(radius * cos) as f32, (radius * sin) as f32]);
    }
    values.truncate(count);
    values
}

/// A from random combinations of the even rows of an orthonormal matrix, B from its odd rows. Their product is zero, and
/// both have gradients from the first step on.
fn orthogonal(rank: usize, (n, k): (usize, usize), rng: &mut Pcg64) -> Result<(Vec<f32>, Vec<f32>)> {
    if !rank.is_multiple_of(2) {
        return Err(Error::invalid(format!("orthogonal initial values need an even rank, and r is {rank}")).param("r"));
    }
    let mut basis: Vec<Vec<f64>> = Vec::with_capacity(rank);
    while basis.len() < rank {
        let mut row: Vec<f64> = normal(rng, rank, 1.0).into_iter().map(f64::from).collect();
        // Two rounds of Gram-Schmidt: one leaves rounding errors.
        for other in basis.iter().chain(&basis) {
            let along: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
        }
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        // A row that the others nearly span is drawn again.
        if length > 1e-3 {
            row.iter_mut().for_each(|x| *x /= length);
            basis.push(row);
        }
    }
    // `[features, rank]`: each row a combination of every second basis row.
    let mut combine = |features: usize, first: usize| -> Vec<f32> {
        let half: Vec<&Vec<f64>> = basis.iter().skip(first).step_by(2).collect();
        let weights = normal(rng, features * half.len(), 0.1);
        let row = |weights: &[f32]| {
            let of = |j: usize| weights.iter().zip(&half).map(|(w, row)| f64::from(*w) * row[j]).sum::<f64>() as f32;
            (0..rank).map(of).collect::<Vec<_>>()
        };
        weights.chunks(half.len()).flat_map(row).collect()
    };
    let transposed = combine(k, 0);
    let a = (0..rank * k).map(|i| transposed[i % k * rank + i / k]).collect();
    Ok((a, combine(n, 1)))
}

#[cfg(test)]
mod tests {
    use rand_pcg::rand_core::SeedableRng;

    use super::*;

    fn moments(values: &[f32]) -> (f64, f64) {
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64;
        let square = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / values.len() as f64;
        (mean, (square - mean * mean).sqrt())
    }

    #[test]
    fn pairs_have_the_distributions_of_peft() {
        let mut rng = Pcg64::seed_from_u64(1);
        let (rank, n, k) = (16, 48, 400);
        let mut draw = |initial| pair(initial, rank, (n, k), &mut rng).unwrap();
        let (a, b) = draw(PairInit::Lora(LoraInit::Default));
        assert_eq!((a.len(), b.len()), (rank * k, n * rank));
        let (mean, deviation) = moments(&a);
        assert!(
            a.iter().all(|x| x.abs() <= 0.05) && mean.abs() < 2e-3 && (deviation - 0.05 / 3f64.sqrt()).abs() < 1e-3
        );
        assert!(b.iter().all(|x| *x == 0.0));
        let (a, b) = draw(PairInit::Lora(LoraInit::Gaussian));
        assert!((moments(&a).1 - 1.0 / 16.0).abs() < 2e-3 && b.iter().all(|x| *x == 0.0));
        let (a, b) = draw(PairInit::AdaLora);
        assert!((moments(&a).1 - 0.02).abs() < 1e-3 && (moments(&b).1 - 0.02).abs() < 3e-3);
    }

    #[test]
    fn orthogonal_pairs_are_not_zero_and_their_product_is() {
        let mut rng = Pcg64::seed_from_u64(2);
        let (rank, n, k) = (6, 10, 30);
        let (a, b) = pair(PairInit::Lora(LoraInit::Orthogonal), rank, (n, k), &mut rng).unwrap();
        for i in 0..n {
            for j in 0..k {
                let product: f32 = (0..rank).map(|r| b[i * rank + r] * a[r * k + j]).sum();
                assert!(product.abs() < 1e-6, "{product}");
            }
        }
        // Combinations of half the rows have half the variance of the weights, whose deviation is 0.1.
        for values in [&a, &b] {
            assert!((moments(values).1 - 0.1 / 2f64.sqrt()).abs() < 0.02, "{:?}", moments(values));
        }
        assert!(pair(PairInit::Lora(LoraInit::Orthogonal), 5, (n, k), &mut rng).is_err());
    }
}
