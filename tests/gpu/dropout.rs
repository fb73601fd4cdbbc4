//! Dropout on a GPU against the CPU half: the same values become zero.

use quiver::ops::dropout::dropout;

use crate::common::{ROUNDED, assert_close, both, random, values};

#[test]
fn masks_equal_the_cpus() {
    for (t, n) in [(1, 1), (3, 7), (33, 576), (2, 14336)] {
        let x = both(&random(1, t * n), (t, n));
        for (p, seed) in [(0.0, 1), (0.1, 2), (0.5, u64::MAX), (0.9, 3)] {
            let [want, got] = [0, 1].map(|i| dropout(&x[i], p, seed).unwrap());
            assert_close(&got, &want, ROUNDED, &format!("[{t}, {n}], {p}"));
            let zeros = |x| values(x).into_iter().map(|v| v == 0.0).collect::<Vec<_>>();
            assert!(zeros(&got) == zeros(&want), "[{t}, {n}], {p}");
        }
    }
}
