//! The parameters of a job: all trained values and their gradients, in a few flat buffers. Clipping and the optimiser then run
//! over few large tensors.

use candle_core::{DType, Device, Tensor};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::SeedableRng;

use super::init::{self, PairInit};
use crate::arch::{ModelConfig, Module, Site};
use crate::lora::weights::{AdapterWeights, FloatVec, ModuleWeights};
use crate::train::spec::{JobSpec, OptimizerKind};
use crate::{Error, Result};

/// Tensors with fewer values keep f32 moments, as in bitsandbytes.
const MIN_8BIT: usize = 4096;

/// Values and gradients of everything one job trains, f32.
pub struct TrainableParams {
    /// Ordered by layer, then as in [`Site`].
    pub sites: Vec<SiteParams>,
    /// The buffers that hold the tensors of all sites.
    pub groups: Vec<ParamGroup>,
    /// Rank of every pair.
    pub rank: usize,
    /// Scale of every delta.
    pub scale: f32,
}

/// The trained modules of one site of a decoder block. They share an input.
pub struct SiteParams {
    pub layer: usize,
    pub site: Site,
    /// Input features.
    pub k: usize,
    /// `A [modules · rank, k]`: the A of each module, stacked.
    pub a: ParamLocation,
    /// AdaLoRA's `E [modules · rank, 1]`, a factor of each row of A.
    pub e: Option<ParamLocation>,
    /// In the order of their columns in the site's output.
    pub modules: Vec<ModuleParams>,
}

/// The parameters of one module besides its A.
pub struct ModuleParams {
    pub module: Module,
    /// First column in the site's output.
    pub offset: usize,
    /// Output features.
    pub n: usize,
    /// `B [n, rank]`.
    pub b: ParamLocation,
    /// DoRA's magnitude `[n, 1]`.
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

/// Parameters with the same optimiser settings.
pub struct ParamGroup {
    /// `[n]` f32.
    pub values: Tensor,
    /// `[n]` f32: gradients, summed over the passes of an optimiser step.
    pub grads: Tensor,
    /// Whether the learning rate is multiplied by LoRA+'s ratio.
    pub lora_plus: bool,
    /// Whether the moments have 8 bits.
    pub eight_bits: bool,
}

impl TrainableParams {
    /// Initial values as `spec` says, or the values of the adapter to continue from. Modules of `spec` that `from` lacks get
    /// initial values. DoRA magnitudes that it lacks are zero until [`super::DoraNorms::start`] sets them.
    ///
    /// # Errors
    /// `Invalid`: `from` has modules that `spec` does not train, another rank, or biases; `spec` names no module.
    pub fn new(spec: &JobSpec, model: &ModelConfig, from: Option<&AdapterWeights>, device: &Device) -> Result<Self> {
        let lora = &spec.lora;
        let rank = lora.adalora.as_ref().map_or(lora.r, |ada| ada.init_r);
        let scale = match &lora.adalora {
            Some(ada) => lora.alpha / (ada.init_r as f32 + 1e-5),
            None if lora.use_rslora => lora.alpha / (rank as f32).sqrt(),
            None => lora.alpha / rank as f32,
        };
        if let Some(from) = from {
            check_continued(from, spec, rank)?;
        }
        let rng = Pcg64::seed_from_u64(spec.seed);
        let mut builder = ParamsBuilder { spec, model, from, rank, scale, rng, groups: Vec::new() };
        let mut sites = Vec::new();
        for (layer, site) in (0..model.num_layers).flat_map(|layer| Site::ALL.map(|site| (layer, site))) {
            sites.extend(builder.site(layer, site)?);
        }
        if sites.is_empty() {
            return Err(Error::invalid("target_modules names no module of a decoder block").param("target_modules"));
        }
        let groups = builder.groups.into_iter().map(|group| group.upload(device)).collect::<Result<_>>()?;
        Ok(Self { sites, groups, rank, scale })
    }

    /// Number of trained values.
    pub fn count(&self) -> usize {
        self.groups.iter().map(|g| g.values.elem_count()).sum()
    }

    /// The values of a tensor: a view, which sees later changes.
    pub fn value(&self, location: &ParamLocation) -> Result<Tensor> {
        location.of(&self.groups[location.group].values)
    }

    /// The gradient of a tensor: a view, which sees later changes.
    pub fn grad(&self, location: &ParamLocation) -> Result<Tensor> {
        location.of(&self.groups[location.group].grads)
    }

    /// The part of a tensor in `groups`, which are buffers laid out like those of the parameters.
    pub(super) fn view(&self, groups: &[Tensor], location: &ParamLocation) -> Result<Tensor> {
        location.of(&groups[location.group])
    }

    /// Overwrites the values of a tensor. `values` has as many elements as the tensor.
    pub fn set_value(&self, location: &ParamLocation, values: &Tensor) -> Result<()> {
        Ok(self.groups[location.group].values.slice_set(&values.flatten_all()?, 0, location.offset)?)
    }

    /// Overwrites the gradient of a tensor. `grad` has as many elements as the tensor.
    pub fn set_grad(&self, location: &ParamLocation, grad: &Tensor) -> Result<()> {
        Ok(self.groups[location.group].grads.slice_set(&grad.flatten_all()?, 0, location.offset)?)
    }

    /// Sets all gradients to zero.
    pub fn clear_grads(&self) -> Result<()> {
        self.groups.iter().try_for_each(|g| Ok(g.grads.zero_set()?))
    }
}

impl ParamLocation {
    /// The tensor as a view of its group's buffer.
    fn of(&self, buffer: &Tensor) -> Result<Tensor> {
        let (rows, columns) = self.shape;
        Ok(buffer.narrow(0, self.offset, rows * columns)?.reshape(self.shape)?)
    }
}

/// Makes the initial values of a job, site by site.
struct ParamsBuilder<'a> {
    spec: &'a JobSpec,
    model: &'a ModelConfig,
    from: Option<&'a AdapterWeights>,
    rank: usize,
    scale: f32,
    rng: Pcg64,
    groups: Vec<GroupValues>,
}

/// The initial values of a [`ParamGroup`].
struct GroupValues {
    lora_plus: bool,
    eight_bits: bool,
    values: Vec<f32>,
}

impl<'a> ParamsBuilder<'a> {
    /// The parameters of one site; `None` if no module of it is trained.
    fn site(&mut self, layer: usize, site: Site) -> Result<Option<SiteParams>> {
        let (rank, lora) = (self.rank, &self.spec.lora);
        let modules = site.modules().iter().copied().filter(|m| lora.target_modules.contains(m)).collect::<Vec<_>>();
        let Some(first) = modules.first().filter(|_| site != Site::Head) else { return Ok(None) };
        let k = first.shape(self.model).1;
        let pairs = modules.iter().map(|module| self.pair(layer, *module)).collect::<Result<Vec<_>>>()?;
        let rows = modules.len() * rank;
        let a = pairs.iter().flat_map(|(a, _)| a.iter().copied()).collect();
        let a = self.add(false, rank * k, (rows, k), a);
        let e = lora.adalora.is_some().then(|| self.add(false, rank, (rows, 1), vec![0.0; rows]));
        let modules = modules.into_iter().zip(pairs).map(|(module, (_, b))| self.module(layer, module, b)).collect();
        Ok(Some(SiteParams { layer, site, k, a, e, modules }))
    }

    /// A and B of one module, row-major.
    fn pair(&mut self, layer: usize, module: Module) -> Result<(Vec<f32>, Vec<f32>)> {
        let lora = &self.spec.lora;
        let distribution = if lora.adalora.is_some() { PairInit::AdaLora } else { PairInit::Lora(lora.init) };
        match self.continued(layer, module) {
            Some(weights) => Ok((weights.a.to_f32(), rescaled_b(weights, self.scale))),
            None => init::pair(distribution, self.rank, module.shape(self.model), &mut self.rng),
        }
    }

    fn module(&mut self, layer: usize, module: Module, b: Vec<f32>) -> ModuleParams {
        let (rank, n) = (self.rank, module.shape(self.model).0);
        let b = self.add(true, n * rank, (n, rank), b);
        let magnitude = self.spec.lora.use_dora.then(|| {
            let values = self.continued(layer, module).and_then(|m| m.magnitude.as_ref().map(FloatVec::to_f32));
            self.add(true, n, (n, 1), values.unwrap_or_else(|| vec![0.0; n]))
        });
        ModuleParams { module, offset: module.offset(self.model), n, b, magnitude }
    }

    /// A module of the adapter to continue from.
    fn continued(&self, layer: usize, module: Module) -> Option<&'a ModuleWeights> {
        self.from?.modules.iter().find(|m| (m.layer, m.module) == (layer, module))
    }

    /// Adds a tensor to the group with its optimiser settings. `module_values` is the number of its values that belong to one
    /// module.
    fn add(&mut self, lora_plus: bool, module_values: usize, shape: (usize, usize), values: Vec<f32>) -> ParamLocation {
        let eight_bits = self.spec.optimizer.kind != OptimizerKind::Adamw && module_values >= MIN_8BIT;
        let same = |g: &GroupValues| (g.lora_plus, g.eight_bits) == (lora_plus, eight_bits);
        let group = self.groups.iter().position(same).unwrap_or_else(|| {
            self.groups.push(GroupValues { lora_plus, eight_bits, values: Vec::new() });
            self.groups.len() - 1
        });
        let buffer = &mut self.groups[group].values;
        let offset = buffer.len();
        buffer.extend(values);
        ParamLocation { group, offset, shape }
    }
}

impl GroupValues {
    fn upload(self, device: &Device) -> Result<ParamGroup> {
        let n = self.values.len();
        Ok(ParamGroup {
            values: Tensor::from_vec(self.values, n, device)?,
            grads: Tensor::zeros(n, DType::F32, device)?,
            lora_plus: self.lora_plus,
            eight_bits: self.eight_bits,
        })
    }
}

/// B of an adapter with another scale, such that the delta under `scale` is the same.
fn rescaled_b(weights: &ModuleWeights, scale: f32) -> Vec<f32> {
    let ratio = weights.scale / scale;
    weights.b.to_f32().into_iter().map(|b| b * ratio).collect()
}

/// Checks that a job with these settings can continue from an adapter.
fn check_continued(from: &AdapterWeights, spec: &JobSpec, rank: usize) -> Result<()> {
    let refused =
        |why: String| Err(Error::invalid(format!("cannot continue from that adapter: {why}")).param("from_checkpoint"));
    if spec.lora.adalora.is_some() {
        return refused("AdaLoRA starts from initial values".into());
    }
    for m in &from.modules {
        let path = m.module.path(m.layer);
        if !spec.lora.target_modules.contains(&m.module) || m.module == Module::LmHead {
            return refused(format!("it has {path}, which target_modules does not name"));
        }
        if m.rank != rank {
            return refused(format!("{path} has rank {}, and r is {rank}", m.rank));
        }
        if m.magnitude.is_some() && !spec.lora.use_dora {
            return refused("it is a DoRA, and use_dora is false".into());
        }
        if m.bias.is_some() {
            return refused(format!("{path} has a bias, which cannot be trained"));
        }
    }
    Ok(())
}
