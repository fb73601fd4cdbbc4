//! Rotary embedding of whole rows on a GPU, forwards and backwards.

use candle_core::Tensor;
use quiver::ops::rope::{RopeTable, apply_rope, apply_rope_backward};

use crate::common::{ROUNDED, assert_close, both, device, random};

type Rope = fn(&Tensor, usize, &[u32], &RopeTable) -> quiver::Result<()>;

#[test]
fn rotations_equal_the_cpu_and_go_back() {
    for (heads, spare, dim, t) in [(1, 0, 2, 3), (6, 2, 12, 5), (5, 1, 64, 33), (40, 8, 128, 70)] {
        let width = (heads + spare) * dim;
        let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / dim as f32)).collect();
        let positions: Vec<u32> = (0..t as u32).map(|i| i * 97 % 3000).collect();
        let start = random(1, t * width);
        for back in [false, true] {
            let (rotate, undo) = if back {
                (apply_rope_backward as Rope, apply_rope as Rope)
            } else {
                (apply_rope as Rope, apply_rope_backward as Rope)
            };
            let x = both(&start, (t, width));
            for x in &x {
                let table = RopeTable::new(&inv_freq, 3000, x.device()).unwrap();
                rotate(x, heads, &positions, &table).unwrap();
            }
            assert_close(&x[1], &x[0], ROUNDED, &format!("{heads} heads of {dim}, back: {back}"));
            let table = RopeTable::new(&inv_freq, 3000, &device()).unwrap();
            undo(&x[1], heads, &positions, &table).unwrap();
            assert_close(&x[1], &both(&start, (t, width))[1], 2.0 * ROUNDED, "there and back");
        }
    }
}
