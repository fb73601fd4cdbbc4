//! The values that a job trains, in few flat buffers, so that clipping and the optimiser run over few big tensors.

use candle_core::{DType, Device, Tensor};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::SeedableRng;

use super::init::{self, PairInit};
use crate::arch::ModelConfig;
use crate::arch::{Module, Site};
use crate::lora::weights::{AdapterWeights, FloatVec, ModuleWeights};
use crate::train::spec::{JobSpec, OptimizerKind};
use crate::{Error, Result};

/// Smaller tensors keep f32 moments, as in bitsandbytes.
const MIN_8BIT: usize = 4096;

/// The trained values of one job, f32.
pub struct TrainableParams {
    /// By layer, then in the order of [`Site`].
    pub sites: Vec<SiteParams>,
    /// The buffers that the sites' tensors are cut from.
    pub groups: Vec<ParamGroup>,
    /// Rank of every pair.
    pub rank: usize,
    /// Factor of every delta.
    pub scale: f32,
}

/// Modules with the same input in one decoder block.
pub struct SiteParams {
    pub layer: usize,
    pub site: Site,
    /// Input features.
    pub k: usize,
    /// `A [modules · rank, k]`, the modules' stacked.
    pub a: ParamLocation,
    /// AdaLoRA's `E [modules · rank, 1]`, which the rows of A are multiplied by.
    pub e: Option<ParamLocation>,
    /// In the order of the fused output row.
    pub modules: Vec<ModuleParams>,
}

/// One module.
pub struct ModuleParams {
    pub module: Module,
    /// Its first column in the site's output.
    pub offset: usize,
    /// Output features.
    pub n: usize,
    /// `B [n, rank]`.
    pub b: ParamLocation,
    /// DoRA's norms of the changed weight's rows `[n]`.
    pub magnitude: Option<ParamLocation>,
}

/// Where a tensor lies in the groups.
#[derive(Debug, Clone, Copy)]
pub struct ParamLocation {
    group: usize,
    offset: usize,
    /// Rows and columns.
    pub shape: (usize, usize),
}

/// Values that the optimiser treats alike.
pub struct ParamGroup {
    /// `[n]` f32.
    pub values: Tensor,
    /// `[n]` f32: sums over the passes of a step.
    pub grads: Tensor,
    /// Whether they have LoRA+'s rate.
    pub fast: bool,
    /// Whether their moments have 8 bits.
    pub eight_bits: bool,
}

/// PairInit values of the groups to be.
#[derive(Default)]
struct ParamGroups(Vec<(bool, bool, Vec<f32>)>);

impl ParamGroups {
    /// Adds a tensor, in the group for its kind and for moments of a tensor of `each` values.
    fn add(
        &mut self,
        fast: bool,
        each: usize,
        optimizer: OptimizerKind,
        shape: (usize, usize),
        values: Vec<f32>,
    ) -> ParamLocation {
        let eight_bits = optimizer != OptimizerKind::Adamw && each >= MIN_8BIT;
        let group = self.0.iter().position(|g| (g.0, g.1) == (fast, eight_bits)).unwrap_or_else(|| {
            self.0.push((fast, eight_bits, Vec::new()));
            self.0.len() - 1
        });
        let flat = &mut self.0[group].2;
        let offset = flat.len();
        flat.extend(values);
        ParamLocation { group, offset, shape }
    }
}

impl TrainableParams {
    /// New values as the settings say, or those of the adapter to continue from. Modules of `spec` that `from` lacks start
    /// new. DoRA's magnitudes that it lacks are zero until [`super::dora::DoraNorms::start`] sets them. Errors: `from` has modules that `spec`
    /// does not train, other ranks, or biases.
    pub fn new(spec: &JobSpec, model: &ModelConfig, from: Option<&AdapterWeights>, device: &Device) -> Result<Self> {
        let lora = &spec.lora;
        let rank = lora.adalora.as_ref().map_or(lora.r, |ada| ada.init_r);
        let scale = match &lora.adalora {
            Some(ada) => lora.alpha / (ada.init_r as f32 + 1e-5),
            None if lora.use_rslora => lora.alpha / (rank as f32).sqrt(),
            None => lora.alpha / rank as f32,
        };
        let continued =
            |layer: usize, module: Module| from?.modules.iter().find(|m| (m.layer, m.module) == (layer, module));
        if let Some(from) = from {
            check_from(from, spec, rank)?;
        }
        let optimizer = spec.optimizer.kind;
        let initial = if lora.adalora.is_some() { PairInit::AdaLora } else { PairInit::Lora(lora.init) };
        let mut rng = Pcg64::seed_from_u64(spec.seed);
        let mut layout = ParamGroups::default();
        let mut sites = Vec::new();
        for (layer, site) in (0..model.num_layers).flat_map(|layer| Site::ALL.map(|site| (layer, site))) {
            let modules: Vec<Module> =
                site.modules().iter().copied().filter(|m| lora.target_modules.contains(m)).collect();
            let Some(first) = modules.first().filter(|_| site != Site::Head) else { continue };
            let k = first.shape(model).1;
            let mut pairs = Vec::new();
            for module in &modules {
                pairs.push(match continued(layer, *module) {
                    Some(weights) => (weights.a.to_f32(), rescaled(weights, scale)),
                    None => init::pair(initial, rank, module.shape(model), &mut rng)?,
                });
            }
            let rows = modules.len() * rank;
            let a = pairs.iter().flat_map(|(a, _)| a.iter().copied()).collect();
            let a = layout.add(false, rank * k, optimizer, (rows, k), a);
            let e = lora.adalora.is_some().then(|| layout.add(false, rank, optimizer, (rows, 1), vec![0.0; rows]));
            let mut params = Vec::new();
            for (module, (_, b)) in modules.into_iter().zip(pairs) {
                let n = module.shape(model).0;
                let b = layout.add(true, n * rank, optimizer, (n, rank), b);
                let magnitude = lora.use_dora.then(|| {
                    let values = continued(layer, module).and_then(|m| m.magnitude.as_ref().map(FloatVec::to_f32));
                    layout.add(true, n, optimizer, (n, 1), values.unwrap_or_else(|| vec![0.0; n]))
                });
                params.push(ModuleParams { module, offset: module.offset(model), n, b, magnitude });
            }
            sites.push(SiteParams { layer, site, k, a, e, modules: params });
        }
        if sites.is_empty() {
            return Err(
                Error::invalid("target_modules names no linear layer of a decoder block").param("target_modules")
            );
        }
        let group = |(fast, eight_bits, values): (bool, bool, Vec<f32>)| -> Result<ParamGroup> {
            let n = values.len();
            let values = Tensor::from_vec(values, n, device)?;
            let grads = Tensor::zeros(n, DType::F32, device)?;
            Ok(ParamGroup { values, grads, fast, eight_bits })
        };
        let groups = layout.0.into_iter().map(group).collect::<Result<_>>()?;
        Ok(Self { sites, groups, rank, scale })
    }

    /// How many values are trained.
    pub fn count(&self) -> usize {
        self.groups.iter().map(|g| g.values.elem_count()).sum()
    }

    /// A tensor's values: a view, which sees what happens to them.
    pub fn value(&self, place: &ParamLocation) -> Result<Tensor> {
        cut(&self.groups[place.group].values, place)
    }

    /// A tensor's part of others that lie as the groups do.
    pub fn cut(&self, groups: &[Tensor], place: &ParamLocation) -> Result<Tensor> {
        cut(&groups[place.group], place)
    }

    /// The gradient of a tensor, likewise.
    pub fn grad(&self, place: &ParamLocation) -> Result<Tensor> {
        cut(&self.groups[place.group].grads, place)
    }

    /// Puts new values, of the place's shape, where a tensor lies.
    pub fn set_value(&self, place: &ParamLocation, values: &Tensor) -> Result<()> {
        Ok(self.groups[place.group].values.slice_set(&values.flatten_all()?, 0, place.offset)?)
    }

    /// The same with a gradient.
    pub fn set_grad(&self, place: &ParamLocation, grad: &Tensor) -> Result<()> {
        Ok(self.groups[place.group].grads.slice_set(&grad.flatten_all()?, 0, place.offset)?)
    }

    /// Makes all gradients zero.
    pub fn clear_grads(&self) -> Result<()> {
        self.groups.iter().try_for_each(|g| Ok(g.grads.zero_set()?))
    }
}

fn cut(flat: &Tensor, place: &ParamLocation) -> Result<Tensor> {
    let (rows, columns) = place.shape;
    Ok(flat.narrow(0, place.offset, rows * columns)?.reshape(place.shape)?)
}

/// B times what its adapter's scale is more than ours.
fn rescaled(weights: &ModuleWeights, scale: f32) -> Vec<f32> {
    let ratio = weights.scale / scale;
    weights.b.to_f32().into_iter().map(|b| b * ratio).collect()
}

fn check_from(from: &AdapterWeights, spec: &JobSpec, rank: usize) -> Result<()> {
    let refused =
        |why: String| Err(Error::invalid(format!("cannot continue from that adapter: {why}")).param("from_checkpoint"));
    if spec.lora.adalora.is_some() {
        return refused("AdaLoRA starts from new values".into());
    }
    for m in &from.modules {
        let path = m.module.path(m.layer);
        if !spec.lora.target_modules.contains(&m.module) || m.module == Module::LmHead {
            return refused(format!("it changes {path}, which target_modules does not name"));
        }
        if m.rank != rank {
            return refused(format!("{path} has rank {}, and r is {rank}", m.rank));
        }
        if m.magnitude.is_some() && !spec.lora.use_dora {
            return refused("it is a DoRA, and use_dora is false".into());
        }
        if m.bias.is_some() {
            return refused(format!("{path} has a bias, which is not trained here"));
        }
    }
    Ok(())
}
