//! AdaLoRA (Zhang et al., 2023) as PEFT does it: `ΔW = s·B·(E ⊙ A)`, and a budget of ranks that shrinks to `target_r` a module
//! and goes where entries matter most, by a smoothed `|value · gradient|` and its uncertainty.

use candle_core::{DType, Tensor};

use super::params::{ParamLocation, SiteParams, TrainableParams};
use crate::train::spec::{AdaLoraConfig, LoraConfig};
use crate::{Error, Result};

/// Shares ranks out.
pub struct RankAllocator {
    config: AdaLoraConfig,
    /// Optimiser steps in all.
    steps: usize,
    /// Per group of the parameters, smoothed `|value · gradient|` and how far it strays, `[n]` f32 each.
    importance: Vec<[Tensor; 2]>,
}

/// What can be said of the settings alone.
pub fn check(ada: &AdaLoraConfig, lora: &LoraConfig) -> Result<()> {
    let refused = |why: String, field: &str| Err(Error::invalid(why).param(format!("adalora.{field}")));
    if lora.use_dora || lora.use_rslora {
        return refused("AdaLoRA cannot be joined with DoRA or rsLoRA".into(), "init_r");
    }
    if ada.init_r == 0 || ada.target_r == 0 || ada.target_r > ada.init_r {
        return refused(
            format!("target_r {} must be at least 1 and at most init_r, {}", ada.target_r, ada.init_r),
            "target_r",
        );
    }
    if ada.delta_t == 0 {
        return refused("deltaT is 0; it must be at least 1".into(), "deltaT");
    }
    for (name, beta) in [("beta1", ada.beta1), ("beta2", ada.beta2)] {
        if !(beta > 0.0 && beta < 1.0) {
            return refused(format!("{name} is {beta}; it must be between 0 and 1"), name);
        }
    }
    if !(ada.orth_reg_weight.is_finite() && ada.orth_reg_weight >= 0.0) {
        return refused(
            format!("orth_reg_weight is {}; it must not be negative", ada.orth_reg_weight),
            "orth_reg_weight",
        );
    }
    Ok(())
}

impl RankAllocator {
    /// Errors: `tinit` and `tfinal` leave no step of `steps` to share ranks out.
    pub fn new(config: &AdaLoraConfig, steps: usize, params: &TrainableParams) -> Result<Self> {
        if config.tinit + config.tfinal >= steps {
            return Err(Error::invalid(format!(
                "tinit {} and tfinal {} must leave steps between them, of {steps} in all",
                config.tinit, config.tfinal
            ))
            .param("adalora.tinit"));
        }
        let importance = params.groups.iter().map(|g| Ok([g.grads.zeros_like()?, g.grads.zeros_like()?]));
        Ok(Self { config: config.clone(), steps, importance: importance.collect::<Result<_>>()? })
    }

    /// What a state needs of it, by name.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = |(i, [ipt, unc]): (usize, &[Tensor; 2])| {
            [(format!("importance.{i}"), ipt.clone()), (format!("uncertainty.{i}"), unc.clone())]
        };
        self.importance.iter().enumerate().flat_map(named).collect()
    }

    /// Turns the gradients of `E ⊙ A` that passes gave into those of A and E, and adds those of the penalty that keeps A's
    /// rows and B's columns orthonormal: `weight` times the mean of `‖A·Aᵀ - I‖` and `‖Bᵀ·B - I‖` (Frobenius) over all.
    pub fn finish_gradients(&self, params: &TrainableParams) -> Result<()> {
        let matrices = 2 * params.sites.iter().map(|site| site.modules.len()).sum::<usize>();
        let weight = f64::from(self.config.orth_reg_weight) / matrices as f64;
        for site in &params.sites {
            let (a, product) = (params.value(&site.a)?, params.grad(&site.a)?.copy()?);
            let e = value_of_e(params, site)?;
            params.set_grad(e_of(site)?, &(&product * &a)?.sum_keepdim(1)?)?;
            let mut da = Vec::new();
            for (i, part) in site.modules.iter().enumerate() {
                let a = a.narrow(0, i * params.rank, params.rank)?;
                let along = orthogonal(&a.matmul(&a.t()?)?, weight)?;
                da.push(along.matmul(&a)?);
                let b = params.value(&part.b)?;
                let along = orthogonal(&b.t()?.matmul(&b)?, weight)?;
                params.set_grad(&part.b, &(params.grad(&part.b)? + b.matmul(&along)?)?)?;
            }
            params.set_grad(&site.a, &(product.broadcast_mul(&e)? + Tensor::cat(&da, 0)?)?)?;
        }
        Ok(())
    }

    /// After optimiser step `step` (from 0), whose gradients were multiplied by `clip`: updates importance, and makes E zero
    /// where the budget has no rank left. `kept` says which ranks have one, site by site.
    pub fn allocate(
        &mut self,
        params: &TrainableParams,
        step: usize,
        clip: f32,
        kept: &mut Option<Vec<Vec<bool>>>,
    ) -> Result<()> {
        let (total, last) = (params.sites.iter().map(|s| s.a.shape.0).sum::<usize>(), self.steps - self.config.tfinal);
        if step < last {
            self.observe(params, clip)?;
        }
        if step <= last {
            let (budget, due) = self.budget(step, total, params);
            // A budget of all ranks masks none.
            if (due || step == last) && budget < total {
                *kept = Some(self.choose(params, total - budget)?);
            } else {
                return Ok(());
            }
        }
        let Some(kept) = kept else { return Ok(()) };
        for (site, kept) in params.sites.iter().zip(kept) {
            let mask: Vec<f32> = kept.iter().map(|&kept| f32::from(u8::from(kept))).collect();
            let e = value_of_e(params, site)?;
            let mask = Tensor::from_vec(mask, e.shape(), e.device())?;
            params.set_value(e_of(site)?, &(e * mask)?)?;
        }
        Ok(())
    }

    fn observe(&mut self, params: &TrainableParams, clip: f32) -> Result<()> {
        let (beta1, beta2) = (f64::from(self.config.beta1), f64::from(self.config.beta2));
        for (group, [importance, uncertainty]) in params.groups.iter().zip(&mut self.importance) {
            let now = ((&group.values * &group.grads)? * f64::from(clip))?.abs()?;
            *importance = ((&*importance * beta1)? + (&now * (1.0 - beta1))?)?;
            let strays = (now - &*importance)?.abs()?;
            *uncertainty = ((&*uncertainty * beta2)? + (strays * (1.0 - beta2))?)?;
        }
        Ok(())
    }

    /// Ranks left after a step, and whether they are shared out at it.
    fn budget(&self, step: usize, total: usize, params: &TrainableParams) -> (usize, bool) {
        let AdaLoraConfig { tinit, tfinal, delta_t, target_r, .. } = self.config;
        let target = target_r * params.sites.iter().map(|site| site.modules.len()).sum::<usize>();
        if step <= tinit {
            return (total, false);
        }
        let left = 1.0 - (step - tinit) as f64 / (self.steps - tfinal - tinit) as f64;
        let budget = (total - target) as f64 * left.powi(3) + target as f64;
        (budget as usize, step.is_multiple_of(delta_t))
    }

    /// Which ranks stay when the `drop` least important ones go, and those that are no better.
    fn choose(&self, params: &TrainableParams, drop: usize) -> Result<Vec<Vec<bool>>> {
        let scores = self.importance.iter().map(|[importance, uncertainty]| Ok((importance * uncertainty)?));
        let scores = scores.collect::<Result<Vec<_>>>()?;
        let score = |place: &ParamLocation| params.cut(&scores, place);
        let mut sites = Vec::new();
        for site in &params.sites {
            let own = (score(e_of(site)?)?.flatten_all()? + score(&site.a)?.mean(1)?)?;
            let columns = site.modules.iter().map(|part| Ok(score(&part.b)?.mean(0)?)).collect::<Result<Vec<_>>>()?;
            sites.push((own + Tensor::cat(&columns, 0)?)?.to_dtype(DType::F32)?.to_vec1::<f32>()?);
        }
        let mut sorted: Vec<f32> = sites.iter().flatten().copied().collect();
        sorted.sort_unstable_by(f32::total_cmp);
        let threshold = sorted[drop - 1];
        Ok(sites.into_iter().map(|site| site.into_iter().map(|score| score > threshold).collect()).collect())
    }
}

/// The gradient of `weight · ‖gram - I‖` with respect to `gram`, twice over, as `gram` is a square.
fn orthogonal(gram: &Tensor, weight: f64) -> Result<Tensor> {
    let off = (gram - Tensor::eye(gram.dims()[0], gram.dtype(), gram.device())?)?;
    // Where there is nothing to correct, no division by zero.
    let norm = (off.sqr()?.sum_all()?.sqrt()? + 1e-30)?;
    Ok((off.broadcast_div(&norm)? * (2.0 * weight))?)
}

fn e_of(site: &SiteParams) -> Result<&ParamLocation> {
    site.e.as_ref().ok_or_else(|| Error::internal("AdaLoRA without E"))
}

fn value_of_e(params: &TrainableParams, site: &SiteParams) -> Result<Tensor> {
    params.value(e_of(site)?)
}
