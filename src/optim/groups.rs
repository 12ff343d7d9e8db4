//! Parameter groups: which learning rate and weight decay each trained parameter gets.
//!
//! A recipe's `param_groups` are tried in order and the first match wins; the rest forms the group [`REST`] with the
//! stage's values, which are also what a group has that states none of its own. The optimizer's own weight decay spares biases
//! and norms (tensors of fewer than two dimensions), as is usual; a group that states `weight_decay` means all that it matches.

use crate::bail;
use crate::error::{Context, Result};
use crate::spec::pattern::Patterns;
use crate::spec::{ParamGroup, Scheduler};
use std::collections::BTreeMap;

/// Name of the group of everything that no entry of `param_groups` takes.
pub const REST: &str = "default";

/// A set of parameters with one peak learning rate.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// As the recipe calls it; default: its first pattern.
    pub name: String,
    /// Peak learning rate; the schedule scales it.
    pub lr: f64,
    /// Its own schedule, if it is not the stage's.
    pub scheduler: Option<Scheduler>,
    /// Its own layer-wise decay, if it is not the stage's; see [`Groups::decay_layers`].
    pub layer_decay: Option<f64>,
    /// Lowest and highest [`Member::factor`].
    pub factors: [f64; 2],
    /// Number of parameter tensors.
    pub tensors: usize,
    /// Number of parameters.
    pub elements: usize,
}

impl Group {
    /// Without parameters.
    fn named(name: String, lr: f64) -> Self {
        Self { name, lr, scheduler: None, layer_decay: None, factors: [1.0; 2], tensors: 0, elements: 0 }
    }

    /// Lowest and highest peak learning rate of its parameters.
    pub fn peaks(&self) -> [f64; 2] {
        self.factors.map(|factor| factor * self.lr)
    }
}

/// What the optimizer knows about one parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Index into [`Groups::list`].
    pub group: usize,
    /// Of its group's learning rate.
    pub factor: f64,
    /// Decoupled; 0 for biases and norms unless their group states one.
    pub weight_decay: f64,
    /// The parameter's shape.
    pub shape: Vec<usize>,
}

/// The groups in the recipe's order, the rest last, and each parameter's place in them.
#[derive(Debug, Clone, PartialEq)]
pub struct Groups {
    list: Vec<Group>,
    members: BTreeMap<String, Member>,
}

impl Groups {
    /// Sorts `trained` (name → shape) into groups. `lr` is the stage's peak, `weight_decay` the optimizer's.
    /// Errors name a group that matches nothing and two groups of one name.
    pub fn resolve(
        param_groups: &[ParamGroup],
        lr: f64,
        weight_decay: f64,
        trained: &BTreeMap<String, Vec<usize>>,
    ) -> Result<Self> {
        let names: Vec<String> = trained.keys().cloned().collect();
        let mut list = Vec::with_capacity(param_groups.len() + 1);
        let mut patterns = Vec::with_capacity(param_groups.len());
        for (i, g) in param_groups.iter().enumerate() {
            let what = || format!("param_groups[{i}]");
            patterns.push(Patterns::new(&g.r#match, &names).with_context(what)?);
            let name = g.name.clone().or_else(|| g.r#match.first().cloned()).unwrap_or_else(what);
            if name == REST || list.iter().any(|other: &Group| other.name == name) {
                bail!("param_groups[{i}]: the name `{name}` is taken"; "give the group another `name`");
            }
            let (scheduler, layer_decay) = (g.lr_scheduler.clone(), g.layer_decay);
            list.push(Group { lr: g.lr.unwrap_or(lr), scheduler, layer_decay, ..Group::named(name, lr) });
        }
        list.push(Group::named(REST.into(), lr));

        let mut members = BTreeMap::new();
        for (name, shape) in trained {
            let group = patterns.iter().position(|p| p.matches(name)).unwrap_or(param_groups.len());
            let stated = param_groups.get(group).and_then(|g| g.weight_decay);
            let spared = if shape.len() < 2 { 0.0 } else { weight_decay };
            list[group].tensors += 1;
            list[group].elements += shape.iter().product::<usize>();
            let (weight_decay, shape) = (stated.unwrap_or(spared), shape.clone());
            members.insert(name.clone(), Member { group, factor: 1.0, weight_decay, shape });
        }
        if let Some(i) = list[..param_groups.len()].iter().position(|g| g.tensors == 0) {
            bail!(
                "param_groups[{i}] (`{}`) is left with no parameter: an earlier group takes all that it matches", list[i].name;
                "the first match wins; put the narrower group first"
            );
        }
        if list.last().is_some_and(|g| g.tensors == 0) {
            list.pop();
        }
        Ok(Self { list, members })
    }

    /// Splits groups by what the learning rates of their members are multiplied by (name → factor; 1 if it is not there): what
    /// has another factor forms a group of its own behind the one it comes from, called e.g. `default ×16`.
    pub fn multiplied(self, factors: &BTreeMap<String, f64>) -> Result<Self> {
        let factor = |name: &str| factors.get(name).copied().unwrap_or(1.0);
        let mut out = Self { list: Vec::new(), members: BTreeMap::new() };
        for (i, group) in self.list.iter().enumerate() {
            let members: Vec<_> = self.members.iter().filter(|(_, m)| m.group == i).collect();
            let mut own: Vec<f64> = members.iter().map(|(name, _)| factor(name)).collect();
            own.sort_by(|a, b| (*a != 1.0).cmp(&(*b != 1.0)).then(a.total_cmp(b)));
            own.dedup();
            for f in own {
                let name = if f == 1.0 { group.name.clone() } else { format!("{} ×{f}", group.name) };
                if self.list.iter().any(|g| f != 1.0 && g.name == name) {
                    bail!("param_groups: the name `{name}` is taken"; "give the group another `name`");
                }
                let mut split = Group { name, lr: group.lr * f, tensors: 0, elements: 0, ..group.clone() };
                for (name, m) in members.iter().filter(|(name, _)| factor(name) == f) {
                    split.tensors += 1;
                    split.elements += m.shape.iter().product::<usize>();
                    out.members.insert((*name).clone(), Member { group: out.list.len(), ..(*m).clone() });
                }
                out.list.push(split);
            }
        }
        out.measure();
        Ok(out)
    }

    /// Lets learning rates fall layer by layer, in the groups that state a decay, and in the others by the stage's, if it has one: the
    /// lower a layer of a pretrained backbone stands, the less it moves. A decay that reaches no layer is an error.
    ///
    /// As BEiT does it (Bao et al. 2022; `LayerDecayValueAssigner` of microsoft/unilm), and timm's `layer_decay`: with decay d, a
    /// parameter at distance k from the top gets lr·dᵏ. `distances`: k by name, 0 where a name is not there.
    pub fn decay_layers(mut self, stage: Option<f64>, distances: &BTreeMap<String, usize>) -> Result<Self> {
        let from_top = |name: &str| distances.get(name).copied().unwrap_or(0);
        let reached =
            |group: usize, this: &Self| this.members.iter().any(|(name, m)| m.group == group && from_top(name) > 0);
        let own = |g: &Group| g.layer_decay.is_some();
        let hint = "it is for layers and embeddings of `vision.` and `language.`; drop it";
        if let Some(i) = (0..self.list.len()).find(|i| own(&self.list[*i]) && !reached(*i, &self)) {
            bail!("param_groups: `{}` has layer_decay, but no parameter in a layer", self.list[i].name; "{hint}")
        }
        if stage.is_some() && !(0..self.list.len()).any(|i| !own(&self.list[i]) && reached(i, &self)) {
            bail!("layer_decay: no parameter in a layer takes the stage's"; "{hint}")
        }
        for (name, m) in &mut self.members {
            if let Some(decay) = self.list[m.group].layer_decay.or(stage) {
                m.factor *= decay.powi(from_top(name) as i32);
            }
        }
        self.measure();
        Ok(self)
    }

    /// Notes each group's lowest and highest factor.
    fn measure(&mut self) {
        for (i, g) in self.list.iter_mut().enumerate() {
            let factors = || self.members.values().filter(|m| m.group == i).map(|m| m.factor);
            g.factors = [factors().fold(f64::INFINITY, f64::min), factors().fold(0.0, f64::max)];
        }
    }

    /// The groups that have parameters, in the recipe's order; [`REST`] last.
    pub fn list(&self) -> &[Group] {
        &self.list
    }

    /// Every trained parameter by name.
    pub fn members(&self) -> &BTreeMap<String, Member> {
        &self.members
    }

    /// The entry of one parameter; the error says that it is not trained.
    pub fn member(&self, name: &str) -> Result<&Member> {
        match self.members.get(name) {
            Some(m) => Ok(m),
            None => bail!("`{name}` is not among the trained parameters of the optimizer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trained() -> BTreeMap<String, Vec<usize>> {
        [
            ("language.layers.0.self_attn.q_proj.lora_A.sft.weight", vec![4, 8]),
            ("language.layers.0.self_attn.q_proj.lora_B.sft.weight", vec![8, 4]),
            ("projector.linear_1.bias", vec![8]),
            ("projector.linear_1.weight", vec![8, 6]),
        ]
        .into_iter()
        .map(|(n, s)| (n.to_string(), s))
        .collect()
    }

    fn group(pattern: &str, lr: Option<f64>, weight_decay: Option<f64>) -> ParamGroup {
        ParamGroup { r#match: vec![pattern.into()], lr, weight_decay, ..Default::default() }
    }

    #[test]
    fn the_first_match_wins_and_the_rest_has_the_stage_values() {
        let g = Groups::resolve(&[group("projector.*", Some(2e-5), None)], 2e-4, 0.1, &trained()).unwrap();
        let names: Vec<_> = g.list().iter().map(|g| (g.name.as_str(), g.lr, g.tensors, g.elements)).collect();
        assert_eq!(names, [("projector.*", 2e-5, 2, 56), (REST, 2e-4, 2, 64)]);
        assert_eq!(g.member("projector.linear_1.weight").unwrap().weight_decay, 0.1);
        assert_eq!(g.member("projector.linear_1.bias").unwrap().weight_decay, 0.0);
        assert!(g.member("vision.x").unwrap_err().cause().contains("vision.x"));
    }

    #[test]
    fn what_has_a_multiple_of_its_groups_learning_rate_is_a_group_of_its_own() {
        let resolve = |groups: &[ParamGroup]| Groups::resolve(groups, 2e-4, 0.1, &trained()).unwrap();
        let b = "language.layers.0.self_attn.q_proj.lora_B.sft.weight";
        let factors = BTreeMap::from([(b.to_string(), 16.0)]);
        let g = resolve(&[group("projector.*", Some(2e-5), None)]).multiplied(&factors).unwrap();
        let names: Vec<_> = g.list().iter().map(|g| (g.name.as_str(), g.lr, g.tensors, g.elements)).collect();
        assert_eq!(names, [("projector.*", 2e-5, 2, 56), (REST, 2e-4, 1, 32), ("default ×16", 16.0 * 2e-4, 1, 32)]);
        assert_eq!((g.member(b).unwrap().group, g.member(b).unwrap().weight_decay), (2, 0.1));
        assert_eq!(g.member("language.layers.0.self_attn.q_proj.lora_A.sft.weight").unwrap().group, 1);
        // A group that has nothing else takes the place of the one it comes from.
        let g = resolve(&[group("*lora_B*", Some(1e-3), Some(0.0))]).multiplied(&factors).unwrap();
        let names: Vec<_> = g.list().iter().map(|g| (g.name.as_str(), g.lr)).collect();
        assert_eq!(names, [("*lora_B* ×16", 1.6e-2), (REST, 2e-4)]);
        assert_eq!(g.member(b).unwrap().weight_decay, 0.0);
        let taken = ParamGroup { name: Some("default ×16".into()), ..group("projector.*", None, None) };
        assert!(resolve(&[taken]).multiplied(&factors).unwrap_err().cause().contains("`default ×16` is taken"));
        assert_eq!(resolve(&[]).multiplied(&BTreeMap::new()).unwrap(), resolve(&[]));
    }

    #[test]
    fn a_group_that_states_decay_means_biases_too() {
        let g = Groups::resolve(&[group("projector.*", None, Some(0.3))], 1e-3, 0.1, &trained()).unwrap();
        assert_eq!(g.member("projector.linear_1.bias").unwrap().weight_decay, 0.3);
        assert_eq!(g.list()[0].lr, 1e-3);
    }

    #[test]
    fn rates_fall_layer_by_layer() {
        let names =
            ["language.embed_tokens.weight", "language.layers.0.a", "language.layers.1.a", "language.norm.weight"];
        let trained: BTreeMap<String, Vec<usize>> =
            names.iter().chain(&["projector.linear_1.weight"]).map(|n| (n.to_string(), vec![2, 2])).collect();
        let distances = names.iter().zip([3, 2, 1, 0]).map(|(n, k)| (n.to_string(), k)).collect();
        let resolve = |groups: &[ParamGroup], stage| {
            Groups::resolve(groups, 1e-3, 0.0, &trained).unwrap().decay_layers(stage, &distances)
        };
        let g = resolve(&[group("projector.*", Some(1e-2), None)], Some(0.5)).unwrap();
        let factors: Vec<f64> = names.iter().map(|n| g.member(n).unwrap().factor).collect();
        assert_eq!(factors, [0.125, 0.25, 0.5, 1.0]);
        assert_eq!((g.list()[0].peaks(), g.list()[1].peaks()), ([1e-2; 2], [1.25e-4, 1e-3]));
        // A group's own decay goes before the stage's; 1 is none.
        let low = ParamGroup { layer_decay: Some(1.0), ..group("language.layers[0].*", None, None) };
        let g = resolve(&[low], Some(0.5)).unwrap();
        assert_eq!(g.list()[0].factors, [1.0; 2]);
        assert_eq!(g.list()[1].factors, [0.125, 1.0]);
        // What reaches no layer is an error.
        let none = ParamGroup { layer_decay: Some(0.9), ..group("projector.*", None, None) };
        let e = resolve(&[none], None).unwrap_err();
        assert!(e.cause().contains("`projector.*` has layer_decay"), "{e}");
        let all = ParamGroup { layer_decay: Some(0.9), ..group("language.*", None, None) };
        let e = resolve(&[all], Some(0.5)).unwrap_err();
        assert!(e.cause().contains("takes the stage's"), "{e}");
    }

    #[test]
    fn no_empty_rest_group() {
        let g = Groups::resolve(&[group("*", None, None)], 1e-3, 0.0, &trained()).unwrap();
        assert_eq!(g.list().len(), 1);
    }

    #[test]
    fn useless_groups_are_errors() {
        let e = Groups::resolve(&[group("projectr.*", None, None)], 1e-3, 0.0, &trained()).unwrap_err();
        assert!(e.cause().contains("param_groups[0]") && e.cause().contains("projectr.*"), "{e}");
        let shadowed = [group("projector.*", None, None), group("projector.linear_1.*", None, None)];
        let e = Groups::resolve(&shadowed, 1e-3, 0.0, &trained()).unwrap_err();
        assert!(e.cause().contains("param_groups[1]"), "{e}");
        let twice = [group("projector.*", None, None), group("projector.*", None, None)];
        let e = Groups::resolve(&twice, 1e-3, 0.0, &trained()).unwrap_err();
        assert!(e.cause().contains("is taken"), "{e}");
    }
}
