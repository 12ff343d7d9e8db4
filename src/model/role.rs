//! What a parameter is in the model. Freezing, layer decay, counting, initial values and export ask this, never its name.

use std::sync::Arc;

/// A part of the whole model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Vision,
    Projector,
    Language,
}

/// Where a parameter stands in its part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Embeddings, and what stands between them and the layers.
    Below,
    /// A layer of the stack, counted from 0.
    Layer(usize),
    /// Behind the layers, or in a part without such a stack.
    Above,
}

/// How a parameter begins where no file gives its values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Zeros,
    Ones,
    /// Normal around 0 with this deviation.
    Normal(f64),
    /// Uniform between ± this.
    Uniform(f64),
}

/// What a parameter is.
#[derive(Debug, Clone, PartialEq)]
pub struct Role {
    pub part: Part,
    pub level: Level,
    /// The adapter that it belongs to.
    pub adapter: Option<Arc<str>>,
    pub init: Init,
    /// Does the gradient reach it through visual tokens alone?
    pub sees: bool,
}

impl Role {
    /// The adapter's name.
    pub fn adapter(&self) -> Option<&str> {
        self.adapter.as_deref()
    }

    /// How far it stands from the top of a backbone of which `depth` layers run: layer i, from 0, is `depth` − i away, embeddings
    /// `depth` + 1, everything else 0.
    pub fn from_top(&self, depth: usize) -> usize {
        match self.level {
            Level::Below => depth + 1,
            Level::Layer(i) => depth.saturating_sub(i),
            Level::Above => 0,
        }
    }

    /// Is it one of the pretrained ones: no adapter's and no projector's?
    pub fn is_backbone(&self) -> bool {
        self.part != Part::Projector && self.adapter.is_none()
    }
}

/// How the linear layers of a module begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linears {
    /// Weights normal with deviation 0.02 (HF's `initializer_range`), biases 0: backbones, BERT.
    Pretrained,
    /// Weights and biases uniform in ±1/√in (PyTorch's `nn.Linear`, Kaiming with a = √5). A bias takes its own length: it does not know
    /// its layer's input, and is small either way.
    Torch,
    /// Weights as [`Linears::Torch`], biases 0: adapters.
    Adapter,
    /// All 0: what is added to a stream begins as nothing.
    Zero,
}

impl Linears {
    /// Deviation of what stands beside layers of backbones: embeddings, queries, soft tokens.
    pub const DEVIATION: f64 = 0.02;

    /// Of a weight `[out, in]`, by its width in.
    pub fn weight(self, d_in: usize) -> Init {
        match self {
            Self::Pretrained => Init::Normal(Self::DEVIATION),
            Self::Torch | Self::Adapter => Init::Uniform(1.0 / (d_in.max(1) as f64).sqrt()),
            Self::Zero => Init::Zeros,
        }
    }

    /// Of a bias `[out]`.
    pub fn bias(self, d_out: usize) -> Init {
        match self {
            Self::Torch => Init::Uniform(1.0 / (d_out.max(1) as f64).sqrt()),
            Self::Pretrained | Self::Adapter | Self::Zero => Init::Zeros,
        }
    }
}

/// A module that is being built: how the names of its parameters begin, and what they are.
#[derive(Debug, Clone)]
pub struct Scope {
    name: String,
    part: Part,
    level: Level,
    adapter: Option<Arc<str>>,
    linears: Linears,
    sees: bool,
}

impl Scope {
    fn new(name: &str, part: Part, linears: Linears) -> Self {
        let sees = part != Part::Language;
        Self { name: name.into(), part, level: Level::Above, adapter: None, linears, sees }
    }

    /// The tower.
    pub fn vision() -> Self {
        Self::new("vision", Part::Vision, Linears::Pretrained)
    }

    /// The projector.
    pub fn projector() -> Self {
        Self::new("projector", Part::Projector, Linears::Torch)
    }

    /// The language model.
    pub fn language() -> Self {
        Self::new("language", Part::Language, Linears::Pretrained)
    }

    /// The module of a parameter that is there: where an adapter is grafted on it, without that of its own.
    pub fn of(name: &str, role: &Role) -> Self {
        Self {
            name: name.into(),
            part: role.part,
            level: role.level,
            adapter: role.adapter.clone(),
            linears: Linears::Adapter,
            sees: role.sees,
        }
    }

    /// A module inside.
    pub fn at(&self, module: &str) -> Self {
        Self { name: format!("{}.{module}", self.name), ..self.clone() }
    }

    /// Layer `i` of the stack that is called `stack`.
    pub fn layer(&self, stack: &str, i: usize) -> Self {
        Self { level: Level::Layer(i), ..self.at(&format!("{stack}.{i}")) }
    }

    /// The same, below the layers.
    pub fn below(&self) -> Self {
        Self { level: Level::Below, ..self.clone() }
    }

    /// Parameters of this kind of the adapter called `adapter`, in here.
    pub fn adapter(&self, kind: &str, adapter: &str) -> Self {
        let linears = Linears::Adapter;
        Self { adapter: Some(adapter.into()), linears, ..self.at(&format!("{kind}.{adapter}")) }
    }

    /// The same, with linear layers that begin otherwise.
    pub fn with(&self, linears: Linears) -> Self {
        Self { linears, ..self.clone() }
    }

    /// The same, reached through visual tokens alone.
    pub fn seeing(&self) -> Self {
        Self { sees: true, ..self.clone() }
    }

    /// How names begin, without the dot.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How linear layers begin.
    pub fn linears(&self) -> Linears {
        self.linears
    }

    /// Of a parameter in here.
    pub fn role(&self, init: Init) -> Role {
        Role { part: self.part, level: self.level, adapter: self.adapter.clone(), init, sees: self.sees }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BEiT's assignment for a model of 12 layers: `decay ** (12 + 1 - id)`, ids 0 for embeddings, i + 1 for layer i, 13 behind.
    #[test]
    fn distances_are_beits() {
        let of = Scope::vision();
        let id = |scope: Scope| 13 - scope.role(Init::Zeros).from_top(12);
        assert_eq!(id(of.below().at("embeddings")), 0);
        assert_eq!(id(of.layer("encoder.layers", 0).at("mlp.fc1")), 1);
        assert_eq!(id(of.layer("encoder.layers", 11).at("mlp.fc1").adapter("lora_A", "sft")), 12);
        assert_eq!(id(of.at("post_layernorm")), 13);
        assert_eq!(id(Scope::language().adapter("prefix", "soft")), 13);
    }

    #[test]
    fn a_scope_names_its_modules_and_an_adapter_keeps_the_level_of_its_layer() {
        let layer = Scope::language().layer("layers", 3).at("self_attn.q_proj");
        let lora = Scope::of(layer.name(), &layer.role(Init::Ones)).adapter("lora_B", "sft");
        assert_eq!(lora.name(), "language.layers.3.self_attn.q_proj.lora_B.sft");
        let role = lora.role(Linears::Zero.weight(4));
        assert_eq!(
            (role.part, role.level, role.adapter(), role.init),
            (Part::Language, Level::Layer(3), Some("sft"), Init::Zeros)
        );
        assert!(
            !role.is_backbone()
                && layer.role(Init::Ones).is_backbone()
                && !Scope::projector().role(Init::Ones).is_backbone()
        );
    }

    /// PyTorch's `nn.Linear` and PEFT's A in ±1/√in, HF's deviation of 0.02; what an adapter adds begins as nothing.
    #[test]
    fn linear_layers_begin_as_those_of_others() {
        let of = |l: Linears| (l.weight(100), l.bias(25));
        assert_eq!(of(Linears::Torch), (Init::Uniform(0.1), Init::Uniform(0.2)));
        assert_eq!(of(Linears::Adapter), (Init::Uniform(0.1), Init::Zeros));
        assert_eq!(of(Linears::Pretrained), (Init::Normal(0.02), Init::Zeros));
        assert_eq!(of(Linears::Zero), (Init::Zeros, Init::Zeros));
        assert_eq!(Scope::projector().linears(), Linears::Torch);
        let up = Scope::projector().adapter("bottleneck", "norm_tune").at("up");
        assert_eq!((up.linears(), up.name()), (Linears::Adapter, "projector.bottleneck.norm_tune.up"));
    }
}
