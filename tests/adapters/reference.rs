//! A plain f64 Llama over merged weights, which shares only the reader of adapters with the server.

use std::collections::HashMap;

use quiver::arch::Module;
use quiver::lora::weights::AdapterWeights;
use safetensors::SafeTensors;

use crate::{fixture, tiny_model};

/// Dense f64 tensors with their shapes, by name.
pub struct Tensors(HashMap<String, (Vec<usize>, Vec<f64>)>);

impl Tensors {
    /// Reads a safetensors file of f32 (or i64) tensors.
    pub fn open(path: &std::path::Path) -> Self {
        let data = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&data).unwrap();
        let wide = |t: safetensors::tensor::TensorView| {
            let numbers = match t.dtype() {
                safetensors::Dtype::F32 => {
                    t.data().chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap()) as f64).collect()
                }
                safetensors::Dtype::I64 => {
                    t.data().chunks(8).map(|c| i64::from_le_bytes(c.try_into().unwrap()) as f64).collect()
                }
                other => panic!("unexpected dtype {other}"),
            };
            (t.shape().to_vec(), numbers)
        };
        Self(file.tensors().into_iter().map(|(name, t)| (name, wide(t))).collect())
    }

    pub fn get(&self, name: &str) -> &[f64] {
        &self.0.get(name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

/// `x [rows, k]` times `w [n, k]` transposed, plus `bias [n]`.
fn linear(x: &[f64], w: &[f64], bias: Option<&Vec<f64>>, k: usize) -> Vec<f64> {
    let n = w.len() / k;
    let mut y = Vec::with_capacity(x.len() / k * n);
    for row in x.chunks(k) {
        for (j, w) in w.chunks(k).enumerate() {
            y.push(row.iter().zip(w).map(|(a, b)| a * b).sum::<f64>() + bias.map_or(0.0, |b| b[j]));
        }
    }
    y
}

fn norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    x.chunks(weight.len())
        .flat_map(|row| {
            let scale = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64 + eps).sqrt();
            row.iter().zip(weight).map(move |(v, w)| v * scale * w).collect::<Vec<_>>()
        })
        .collect()
}

/// Rotates `[t, heads, d]` by position, halves against halves (Hugging Face's order).
fn rope(x: &mut [f64], heads: usize, d: usize, theta: f64) {
    for (t, row) in x.chunks_mut(heads * d).enumerate() {
        for head in row.chunks_mut(d) {
            for i in 0..d / 2 {
                let angle = t as f64 * theta.powf(-2.0 * i as f64 / d as f64);
                let (a, b) = (head[i], head[i + d / 2]);
                head[i] = a * angle.cos() - b * angle.sin();
                head[i + d / 2] = b * angle.cos() + a * angle.sin();
            }
        }
    }
}

/// Logits `[24, vocab]` of the tiny base for its `input_ids`, with an adapter merged into its weights.
pub fn logits(weights: &AdapterWeights) -> Vec<f64> {
    let model = tiny_model();
    let mut base = Tensors::open(&fixture("base/model.safetensors"));
    let ids = Tensors::open(&fixture("base/expected.safetensors")).get("input_ids").to_vec();
    let mut bias = HashMap::new();
    for m in &weights.modules {
        let (n, k) = m.module.shape(&model);
        let path = m.module.path(m.layer);
        let (a, b) = (m.a.to_f32(), m.b.to_f32());
        let w = &mut base.0.get_mut(&format!("{path}.weight")).unwrap().1;
        for i in 0..n {
            for r in 0..m.rank {
                for j in 0..k {
                    w[i * k + j] += m.scale as f64 * b[i * m.rank + r] as f64 * a[r * k + j] as f64;
                }
            }
        }
        if let Some(values) = &m.bias {
            bias.insert(path, values.to_f32().iter().map(|v| *v as f64 * m.scale as f64).collect::<Vec<f64>>());
        }
    }
    let apply = |x: &[f64], module: Module, layer: usize| {
        let path = module.path(layer);
        linear(x, base.get(&format!("{path}.weight")), bias.get(&path), module.shape(&model).1)
    };

    let (h, d, eps) = (model.hidden_size, model.head_dim, model.rms_norm_eps as f64);
    let embedding = base.get("model.embed_tokens.weight");
    let mut x: Vec<f64> = ids.iter().flat_map(|id| embedding[*id as usize * h..][..h].to_vec()).collect();
    for layer in 0..model.num_layers {
        let weight = |name: &str| base.get(&format!("model.layers.{layer}.{name}.weight"));
        let y = norm(&x, weight("input_layernorm"), eps);
        let (mut q, mut k) = (apply(&y, Module::Q, layer), apply(&y, Module::K, layer));
        let v = apply(&y, Module::V, layer);
        rope(&mut q, model.num_heads, d, model.rope_theta as f64);
        rope(&mut k, model.num_kv_heads, d, model.rope_theta as f64);
        let mut mixed = vec![0.0; q.len()];
        for t in 0..ids.len() {
            for head in 0..model.num_heads {
                let kv = head / (model.num_heads / model.num_kv_heads);
                let at = |s: usize| (s * model.num_kv_heads + kv) * d;
                let q = &q[(t * model.num_heads + head) * d..][..d];
                let scores: Vec<f64> = (0..=t)
                    .map(|s| q.iter().zip(&k[at(s)..][..d]).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt())
                    .map(f64::exp)
                    .collect();
                let total: f64 = scores.iter().sum();
                for (s, score) in scores.iter().enumerate() {
                    for i in 0..d {
                        mixed[(t * model.num_heads + head) * d + i] += score / total * v[at(s) + i];
                    }
                }
            }
        }
        x.iter_mut().zip(apply(&mixed, Module::O, layer)).for_each(|(x, y)| *x += y);
        let y = norm(&x, weight("post_attention_layernorm"), eps);
        let (gate, up) = (apply(&y, Module::Gate, layer), apply(&y, Module::Up, layer));
        let act: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        x.iter_mut().zip(apply(&act, Module::Down, layer)).for_each(|(x, y)| *x += y);
    }
    apply(&norm(&x, base.get("model.norm.weight"), eps), Module::LmHead, model.num_layers)
}
