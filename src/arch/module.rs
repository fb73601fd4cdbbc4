//! Modules, the linear layers that adapters can target, and sites, the fused linears that contain them.

use serde::{Deserialize, Serialize};

use super::ModelConfig;

/// A linear layer of the decoder that an adapter can target, named as in PEFT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Module {
    #[serde(rename = "q_proj")]
    Q,
    #[serde(rename = "k_proj")]
    K,
    #[serde(rename = "v_proj")]
    V,
    #[serde(rename = "o_proj")]
    O,
    #[serde(rename = "gate_proj")]
    Gate,
    #[serde(rename = "up_proj")]
    Up,
    #[serde(rename = "down_proj")]
    Down,
    #[serde(rename = "lm_head")]
    LmHead,
}

impl Module {
    /// The modules of one decoder block.
    pub const BLOCK: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Output and input features `(n, k)`: the weight is `[n, k]`.
    pub fn shape(self, model: &ModelConfig) -> (usize, usize) {
        let (heads, kv) = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim);
        match self {
            Self::Q => (heads, model.hidden_size),
            Self::K | Self::V => (kv, model.hidden_size),
            Self::O => (model.hidden_size, heads),
            Self::Gate | Self::Up => (model.intermediate_size, model.hidden_size),
            Self::Down => (model.hidden_size, model.intermediate_size),
            Self::LmHead => (model.vocab_size, model.hidden_size),
        }
    }

    /// The site that contains the module.
    pub fn site(self) -> Site {
        match self {
            Self::Q | Self::K | Self::V => Site::Qkv,
            Self::O => Site::O,
            Self::Gate | Self::Up => Site::GateUp,
            Self::Down => Site::Down,
            Self::LmHead => Site::Head,
        }
    }

    /// The first column of the module in the output row of its site.
    pub fn offset(self, model: &ModelConfig) -> usize {
        match self {
            Self::K => Self::Q.shape(model).0,
            Self::V => Self::Q.shape(model).0 + Self::K.shape(model).0,
            Self::Up => Self::Gate.shape(model).0,
            _ => 0,
        }
    }

    /// The module's path in Hugging Face's Llama, which PEFT matches. The path of the head has no layer.
    pub fn path(self, layer: usize) -> String {
        let name = match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
            Self::LmHead => return "lm_head".into(),
        };
        format!("model.layers.{layer}.{name}")
    }
}

/// A fused linear layer of the base: the modules that share an input. In the order of a decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// q, k and v stacked.
    Qkv = 0,
    O = 1,
    /// gate and up stacked.
    GateUp = 2,
    Down = 3,
    /// The output head, once per model.
    Head = 4,
}

impl Site {
    /// All sites, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Qkv, Self::O, Self::GateUp, Self::Down, Self::Head];

    /// The modules of the site, in the order of the output row.
    pub fn modules(self) -> &'static [Module] {
        match self {
            Self::Qkv => &[Module::Q, Module::K, Module::V],
            Self::O => &[Module::O],
            Self::GateUp => &[Module::Gate, Module::Up],
            Self::Down => &[Module::Down],
            Self::Head => &[Module::LmHead],
        }
    }

    /// Output and input features `(n, k)`: the stacked weight is `[n, k]`.
    pub fn shape(self, model: &ModelConfig) -> (usize, usize) {
        let modules = self.modules();
        (modules.iter().map(|module| module.shape(model).0).sum(), modules[0].shape(model).1)
    }
}
