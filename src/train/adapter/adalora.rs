//! AdaLoRA (Zhang et al., 2023) as in PEFT: `ΔW = s·B·(E ⊙ A)`, with a budget of ranks that shrinks to `target_r` a module on
//! average. Ranks stay where they matter most, by a smoothed `|value · gradient|` times its uncertainty.

use candle_core::{DType, Tensor};

use super::params::{ParamLocation, SiteParams, TrainableParams};
use crate::train::spec::{AdaLoraConfig, LoraConfig};
use crate::{Error, Result};

/// Decides which ranks of which modules stay.
pub struct RankAllocator {
    config: AdaLoraConfig,
    /// Number of optimiser steps of the job.
    steps: usize,
    /// For each parameter group, `[importance, uncertainty]`: the smoothed `|value · gradient|` and its smoothed deviation,
    /// `[n]` f32 each.
    importance: Vec<[Tensor; 2]>,
}

/// Checks the settings on their own. Errors: `Invalid`, with the field.
pub fn check(ada: &AdaLoraConfig, lora: &LoraConfig) -> Result<()> {
    let refused = |why: String, field: &str| Err(Error::invalid(why).param(format!("adalora.{field}")));
    if lora.use_dora || lora.use_rslora {
        return refused("AdaLoRA cannot be combined with DoRA or rsLoRA".into(), "init_r");
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
    /// An allocator for a job of `steps` optimiser steps. Errors: `tinit` and `tfinal` leave no step in which to remove ranks.
    pub fn new(config: &AdaLoraConfig, steps: usize, params: &TrainableParams) -> Result<Self> {
        if config.tinit + config.tfinal >= steps {
            return Err(Error::invalid(format!(
                "tinit {} and tfinal {} must add up to fewer than the {steps} optimiser steps of the job",
                config.tinit, config.tfinal
            ))
            .param("adalora.tinit"));
        }
        let importance = params.groups.iter().map(|g| Ok([g.grads.zeros_like()?, g.grads.zeros_like()?]));
        Ok(Self { config: config.clone(), steps, importance: importance.collect::<Result<_>>()? })
    }

    /// The tensors to save in a job's state, by name.
    pub(in crate::train) fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = |(i, [importance, uncertainty]): (usize, &[Tensor; 2])| {
            [(format!("importance.{i}"), importance.clone()), (format!("uncertainty.{i}"), uncertainty.clone())]
        };
        self.importance.iter().enumerate().flat_map(named).collect()
    }

    /// Completes the gradients of a step: turns those of `E ⊙ A` into those of A and E, and adds those of the penalty that keeps
    /// the rows of A and the columns of B orthonormal. The penalty is `orth_reg_weight` times the mean of `‖A·Aᵀ - I‖` and
    /// `‖Bᵀ·B - I‖` (Frobenius norms) over all modules.
    pub fn finish_gradients(&self, params: &TrainableParams) -> Result<()> {
        let matrices = 2 * params.sites.iter().map(|site| site.modules.len()).sum::<usize>();
        let weight = f64::from(self.config.orth_reg_weight) / matrices as f64;
        for site in &params.sites {
            let (a, product) = (params.value(&site.a)?, params.grad(&site.a)?.copy()?);
            let e = value_of_e(params, site)?;
            params.set_grad(e_of(site)?, &(&product * &a)?.sum_keepdim(1)?)?;
            let mut da = Vec::new();
            for (i, module) in site.modules.iter().enumerate() {
                let a = a.narrow(0, i * params.rank, params.rank)?;
                let dgram = penalty_backward(&a.matmul(&a.t()?)?, weight)?;
                da.push(dgram.matmul(&a)?);
                let b = params.value(&module.b)?;
                let dgram = penalty_backward(&b.t()?.matmul(&b)?, weight)?;
                params.set_grad(&module.b, &(params.grad(&module.b)? + b.matmul(&dgram)?)?)?;
            }
            params.set_grad(&site.a, &(product.broadcast_mul(&e)? + Tensor::cat(&da, 0)?)?)?;
        }
        Ok(())
    }

    /// Updates the importance after optimiser step `step` (from 0), whose gradients were multiplied by `clip`, and sets E to
    /// zero for removed ranks. `kept` says which ranks are left, site by site; it is `None` until the first are removed.
    pub fn allocate(
        &mut self,
        params: &TrainableParams,
        step: usize,
        clip: f32,
        kept: &mut Option<Vec<Vec<bool>>>,
    ) -> Result<()> {
        let total = params.sites.iter().map(|s| s.a.shape.0).sum::<usize>();
        let last = self.steps - self.config.tfinal;
        if step < last {
            self.observe(params, clip)?;
        }
        if step <= last {
            let (budget, due) = self.budget(step, total, params);
            if budget >= total || !(due || step == last) {
                return Ok(());
            }
            *kept = Some(self.choose(params, total - budget)?);
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

    /// Updates importance and uncertainty with the gradients of a step.
    fn observe(&mut self, params: &TrainableParams, clip: f32) -> Result<()> {
        let (beta1, beta2) = (f64::from(self.config.beta1), f64::from(self.config.beta2));
        for (group, [importance, uncertainty]) in params.groups.iter().zip(&mut self.importance) {
            let now = ((&group.values * &group.grads)? * f64::from(clip))?.abs()?;
            *importance = ((&*importance * beta1)? + (&now * (1.0 - beta1))?)?;
            let deviation = (now - &*importance)?.abs()?;
            *uncertainty = ((&*uncertainty * beta2)? + (deviation * (1.0 - beta2))?)?;
        }
        Ok(())
    }

    /// The number of ranks left after a step, and whether ranks are allocated at it.
    fn budget(&self, step: usize, total: usize, params: &TrainableParams) -> (usize, bool) {
        let AdaLoraConfig { tinit, tfinal, delta_t, target_r, .. } = self.config;
        let target = target_r * params.sites.iter().map(|site| site.modules.len()).sum::<usize>();
        if step <= tinit {
            return (total, false);
        }
        let remaining = 1.0 - (step - tinit) as f64 / (self.steps - tfinal - tinit) as f64;
        let budget = (total - target) as f64 * remaining.powi(3) + target as f64;
        (budget as usize, step.is_multiple_of(delta_t))
    }

    /// Which ranks stay, site by site, when the `drop` least important ones are removed. Ranks as important as the last removed
    /// one are removed too.
    fn choose(&self, params: &TrainableParams, drop: usize) -> Result<Vec<Vec<bool>>> {
        let scores = self.importance.iter().map(|[importance, uncertainty]| Ok((importance * uncertainty)?));
        let scores = scores.collect::<Result<Vec<_>>>()?;
        let score = |location: &ParamLocation| params.view(&scores, location);
        let mut sites = Vec::new();
        for site in &params.sites {
            let own = (score(e_of(site)?)?.flatten_all()? + score(&site.a)?.mean(1)?)?;
            let columns =
                site.modules.iter().map(|module| Ok(score(&module.b)?.mean(0)?)).collect::<Result<Vec<_>>>()?;
            sites.push((own + Tensor::cat(&columns, 0)?)?.to_dtype(DType::F32)?.to_vec1::<f32>()?);
        }
        let mut sorted: Vec<f32> = sites.iter().flatten().copied().collect();
        sorted.sort_unstable_by(f32::total_cmp);
        let threshold = sorted[drop - 1];
        Ok(sites.into_iter().map(|site| site.into_iter().map(|score| score > threshold).collect()).collect())
    }
}

/// Twice the gradient of `weight · ‖gram - I‖` with respect to `gram`: `gram` is a product of a matrix with itself.
fn penalty_backward(gram: &Tensor, weight: f64) -> Result<Tensor> {
    let off = (gram - Tensor::eye(gram.dims()[0], gram.dtype(), gram.device())?)?;
    // No division by zero where the matrix is orthonormal.
    let norm = (off.sqr()?.sum_all()?.sqrt()? + 1e-30)?;
    Ok((off.broadcast_div(&norm)? * (2.0 * weight))?)
}

fn e_of(site: &SiteParams) -> Result<&ParamLocation> {
    site.e.as_ref().ok_or_else(|| Error::internal("a site of an AdaLoRA has no E"))
}

fn value_of_e(params: &TrainableParams, site: &SiteParams) -> Result<Tensor> {
    params.value(e_of(site)?)
}
