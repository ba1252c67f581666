//! Parameters, their names, and the list of all of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use super::{Initializer, StateDict};
use crate::driver::seam::Address;
use crate::ops::concat;
use crate::random::Philox;
use crate::tensor::{Element, Shape};
use crate::{DType, Device, Error, Result, Tensor};

/// What a named tensor of a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Learned by the optimizer.
    Weight,
    /// Kept with the model and updated by its layers: running statistics.
    Statistic,
}

/// A named tensor of a model. Clones share the value.
///
/// ```
/// use gridgrad::nn::{Initializer, Scope};
/// use gridgrad::{DType, Tensor};
/// let gamma = Scope::new(0, DType::F32).child("norm").parameter("weight", [2], Initializer::Constant(1.0))?;
/// gamma.set(&Tensor::new(&[2.0f32, 3.0], [2])?)?;
/// assert_eq!((gamma.name(), gamma.tensor().to_vec::<f32>()?), ("norm.weight", vec![2.0, 3.0]));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone)]
pub struct Parameter(Arc<Inner>);

struct Inner {
    name: String,
    role: Role,
    value: RwLock<Tensor>,
    version: AtomicU64,
}

impl Parameter {
    /// The name in the state dict: layer names and the tensor's own, joined by dots.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What it is for.
    pub fn role(&self) -> Role {
        self.0.role
    }

    /// The present value: a variable of the tape for weights.
    pub fn tensor(&self) -> Tensor {
        self.0.value.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The present value as `dtype`: in mixed precision layers compute in the dtype of their input, and the gradient
    /// comes back in the parameter's own. Inside of [`no_grad`](crate::autograd::no_grad) a converted value in the host's
    /// memory is kept from the second time on, until the parameter changes.
    ///
    /// # Errors
    /// Where the device has no room for the converted value.
    pub fn tensor_as(&self, dtype: DType) -> Result<Tensor> {
        /// A value in this dtype.
        #[derive(Clone, PartialEq)]
        struct Converted(DType);

        let value = self.tensor();
        if value.dtype() == dtype {
            return Ok(value);
        }
        match &*value.form(Converted(dtype), || value.cast(dtype)) {
            Ok(converted) => Ok(converted.clone()),
            // What a device refuses is not kept, so this refuses again, with its own words.
            Err(_) => value.cast(dtype),
        }
    }

    /// Extents, axes as in PyTorch.
    pub fn shape(&self) -> Shape {
        self.tensor().shape().clone()
    }

    /// Replaces the value, keeping its identity on the tape and its device.
    ///
    /// # Errors
    /// Where shape or dtype differ from the present value's, or a device refuses the copy.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        if value.shape() != &self.shape() {
            let message = format!("value of shape {} for {} of shape {}", value.shape(), self.name(), self.shape());
            return Err(Error::shape("Parameter::set", message));
        }
        value.expect_dtype("Parameter::set", self.tensor().dtype())?;
        self.write().overwrite(value)
    }

    /// Moves the value to `device`, keeping its identity on the tape.
    ///
    /// # Errors
    /// As [`Tensor::to_device`].
    pub fn to_device(&self, device: Device) -> Result<()> {
        self.write().move_to(device)
    }

    /// Exchanges the values with those of `other`, of the same shape, dtype and device.
    pub(crate) fn swap(&self, other: &mut Tensor) {
        self.write().swap_values(other);
    }

    /// A number that every change of the value makes larger, but not the changes by repetitions of a recorded graph
    /// ([`replays`](crate::gpu::replays)).
    pub(crate) fn version(&self) -> u64 {
        self.0.version.load(Ordering::Acquire)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tensor> {
        let guard = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
        self.0.version.fetch_add(1, Ordering::AcqRel);
        guard
    }

    /// The address of the value in device memory, to be changed in place by a kernel.
    ///
    /// # Errors
    /// Where the value is on the host, or is shared and the device has no room for a copy.
    pub(crate) fn address_mut(&self) -> Result<Address> {
        self.write().address_mut()
    }

    /// Changes the values in place.
    ///
    /// # Errors
    /// Where `T` is not the element type, or the value is not in the host's memory.
    pub fn update<T: Element>(&self, change: impl FnOnce(&mut [T])) -> Result<()> {
        self.write().data_mut::<T>().map(change)
    }
}

impl std::fmt::Debug for Parameter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name(), self.shape())
    }
}

/// All named tensors of a model, in the order in which its layers made them. Clones share the list.
///
/// ```
/// use gridgrad::DType;
/// use gridgrad::nn::{Linear, Scope};
/// let scope = Scope::new(0, DType::F32);
/// Linear::new(&scope.child("head"), 8, 3, true)?;
/// let parameters = scope.parameters();
/// assert_eq!(parameters.count(), 8 * 3 + 3);
/// let mut state = parameters.state_dict();
/// parameters.load_state_dict(&state)?;
/// state.remove("head.bias");
/// assert!(parameters.load_state_dict(&state).unwrap_err().to_string().contains("missing: head.bias (3)"));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Parameters(Arc<Mutex<Vec<Parameter>>>);

impl Parameters {
    fn list(&self) -> MutexGuard<'_, Vec<Parameter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    pub fn iter(&self) -> std::vec::IntoIter<Parameter> {
        self.list().clone().into_iter()
    }

    /// Those that an optimizer learns.
    pub fn weights(&self) -> impl Iterator<Item = Parameter> {
        self.iter().filter(|parameter| parameter.role() == Role::Weight)
    }

    /// The one of this name.
    pub fn get(&self, name: &str) -> Option<Parameter> {
        self.iter().find(|parameter| parameter.name() == name)
    }

    /// Moves all of them to `device`.
    ///
    /// # Errors
    /// As [`Tensor::to_device`]; some may have moved then.
    pub fn to_device(&self, device: Device) -> Result<()> {
        self.iter().try_for_each(|parameter| parameter.to_device(device))
    }

    /// Number of learned values.
    pub fn count(&self) -> usize {
        self.weights().map(|parameter| parameter.shape().elements()).sum()
    }

    /// The present values by name. The tensors share memory with the parameters until these are updated.
    pub fn state_dict(&self) -> StateDict {
        self.iter().map(|parameter| (parameter.name().to_owned(), parameter.tensor().detach())).collect()
    }

    /// Sets every value from `state`, in the model's dtype. Nothing changes unless everything fits.
    ///
    /// # Errors
    /// [`Error::StateDict`], listing every missing, surplus or misshapen tensor.
    pub fn load_state_dict(&self, state: &StateDict) -> Result<()> {
        let parameters: Vec<Parameter> = self.iter().collect();
        let mut problems = Vec::new();
        for parameter in &parameters {
            match state.get(parameter.name()) {
                None => problems.push(format!("missing: {} {}", parameter.name(), parameter.shape())),
                Some(value) if *value.shape() != parameter.shape() => problems.push(format!(
                    "misshapen: {} is {}, the model has {}",
                    parameter.name(),
                    value.shape(),
                    parameter.shape()
                )),
                Some(value) if !value.dtype().is_float() => {
                    problems.push(format!("not floating point: {} is {}", parameter.name(), value.dtype()));
                }
                Some(_) => {}
            }
        }
        let known: std::collections::HashSet<&str> = parameters.iter().map(Parameter::name).collect();
        let surplus = state.iter().filter(|(name, _)| !known.contains(name.as_str()));
        problems.extend(surplus.map(|(name, value)| format!("surplus: {name} {}", value.shape())));
        if !problems.is_empty() {
            return Err(Error::StateDict(problems));
        }
        for parameter in &parameters {
            if let Some(value) = state.get(parameter.name()) {
                parameter.set(&value.cast(parameter.tensor().dtype())?)?;
            }
        }
        Ok(())
    }
}

/// Where a layer makes its parameters: a prefix for names, the seed of first values, and the dtype.
///
/// A first value depends on the seed and the parameter's full name alone, so a layer that is added or removed does not
/// change the others.
///
/// ```
/// use gridgrad::DType;
/// use gridgrad::nn::{LayerNorm, Scope};
/// let block = Scope::new(0, DType::F32).child("layers.0.blocks.1");
/// LayerNorm::new(&block.child("norm1"), 8, 1e-5)?;
/// assert!(block.parameters().get("layers.0.blocks.1.norm1.weight").is_some());
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone)]
pub struct Scope {
    prefix: String,
    /// One, or of each model those of its seed.
    streams: Arc<[Philox]>,
    model_axis: bool,
    dtype: DType,
    parameters: Parameters,
}

impl Scope {
    /// The root of a new model.
    pub fn new(seed: u64, dtype: DType) -> Self {
        Self::of_seeds(&[seed], false, dtype)
    }

    /// The root of several models of one architecture: every parameter has a leading axis (models, …), along which each
    /// model has the bits of its own seed.
    pub fn each(seeds: &[u64], dtype: DType) -> Self {
        Self::of_seeds(seeds, true, dtype)
    }

    fn of_seeds(seeds: &[u64], model_axis: bool, dtype: DType) -> Self {
        let streams = seeds.iter().map(|&seed| Philox::new(seed).stream("init")).collect();
        Scope { prefix: String::new(), streams, model_axis, dtype, parameters: Parameters::default() }
    }

    /// The scope of a part: `name` may hold several levels, joined by dots.
    pub fn child(&self, name: impl std::fmt::Display) -> Self {
        Scope { prefix: self.full_name(&name.to_string()), ..self.clone() }
    }

    /// Makes a parameter.
    ///
    /// # Errors
    /// Where the name is taken or the shape too large.
    pub fn parameter(&self, name: &str, shape: impl Into<Shape>, initializer: Initializer) -> Result<Parameter> {
        self.make(name, shape.into(), initializer, Role::Weight)
    }

    /// Makes a tensor that is kept with the model but not learned.
    ///
    /// # Errors
    /// Where the name is taken or the shape too large.
    pub fn statistic(&self, name: &str, shape: impl Into<Shape>, initializer: Initializer) -> Result<Parameter> {
        self.make(name, shape.into(), initializer, Role::Statistic)
    }

    /// All parameters made in this model so far.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The element type of parameters.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    fn make(&self, name: &str, shape: Shape, initializer: Initializer, role: Role) -> Result<Parameter> {
        let name = self.full_name(name);
        let draw = |stream: &Philox| initializer.draw(&shape, self.dtype, stream.stream(&name));
        let drawn = self.streams.iter().map(draw).collect::<Result<Vec<Tensor>>>()?;
        let value = match &drawn[..] {
            [only] if !self.model_axis => only.clone(),
            all => concat(&all.iter().collect::<Vec<_>>(), 0)?.reshape([&[all.len()], &shape[..]].concat())?,
        };
        let value = if role == Role::Weight { value.variable()? } else { value };
        let mut list = self.parameters.list();
        if list.iter().any(|parameter| parameter.name() == name) {
            return Err(Error::Config(format!("two parameters are named {name}")));
        }
        let parameter =
            Parameter(Arc::new(Inner { name, role, value: RwLock::new(value), version: AtomicU64::new(0) }));
        list.push(parameter.clone());
        Ok(parameter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> (Scope, Parameter, Parameter) {
        let scope = Scope::new(1, DType::F32);
        let a = scope.parameter("a", [2], Initializer::Constant(1.0)).unwrap();
        let b = scope.child("part").parameter("b", [3, 2], Initializer::DEFAULT).unwrap();
        (scope, a, b)
    }

    #[test]
    fn a_state_dict_that_does_not_fit_lists_everything_and_changes_nothing() {
        let (scope, a, _) = two();
        let mut state = scope.parameters().state_dict();
        state.insert("a".into(), Tensor::zeros([2], DType::F32).unwrap());
        state.insert("part.b".into(), Tensor::zeros([2, 3], DType::F32).unwrap());
        state.insert("extra".into(), Tensor::zeros([1], DType::F32).unwrap());
        let message = scope.parameters().load_state_dict(&state).unwrap_err().to_string();
        assert!(message.contains("misshapen: part.b is (2, 3), the model has (3, 2)"), "{message}");
        assert!(message.contains("surplus: extra (1)"), "{message}");
        assert_eq!(a.tensor().to_vec::<f32>().unwrap(), [1.0, 1.0]);
        state.clear();
        let message = scope.parameters().load_state_dict(&state).unwrap_err().to_string();
        assert!(message.contains("missing: a (2)") && message.contains("missing: part.b (3, 2)"), "{message}");
    }

    #[test]
    fn a_converted_value_is_kept_for_answers_until_the_parameter_changes() {
        let (_, a, _) = two();
        let converted = || a.tensor_as(DType::Bf16).unwrap();
        let place = |tensor: &Tensor| tensor.raw_bytes().unwrap().as_ptr();
        crate::autograd::no_grad(|| {
            let _first = converted();
            let (second, third) = (converted(), converted());
            assert_eq!(place(&second), place(&third), "the same values");
            assert_eq!(third.to_f64_vec().unwrap(), [1.0, 1.0]);
            a.set(&Tensor::new(&[2.0f32, 3.0], [2]).unwrap()).unwrap();
            for _ in 0..3 {
                assert_eq!(converted().to_f64_vec().unwrap(), [2.0, 3.0]);
            }
        });
        let (one, other) = (converted(), converted());
        assert_ne!(place(&one), place(&other), "training");
        assert!(one.requires_grad());
    }

    #[test]
    fn updates_keep_identity_and_leave_saved_tensors_alone() {
        let (_, a, _) = two();
        let (before, id) = (a.tensor(), a.tensor().id());
        a.update::<f32>(|values| values[0] = 9.0).unwrap();
        assert_eq!(a.tensor().id(), id);
        assert_eq!(before.to_vec::<f32>().unwrap(), [1.0, 1.0]);
        assert_eq!(a.tensor().to_vec::<f32>().unwrap(), [9.0, 1.0]);
    }

    #[test]
    fn every_way_to_change_a_value_changes_its_version() {
        let (scope, a, b) = two();
        let mut seen = vec![a.version()];
        let mut changed = |what: &str| {
            assert!(a.version() > *seen.last().unwrap(), "{what}");
            seen.push(a.version());
        };
        a.set(&Tensor::zeros([2], DType::F32).unwrap()).unwrap();
        changed("set");
        a.update::<f32>(|values| values[0] = 1.0).unwrap();
        changed("update");
        a.swap(&mut Tensor::ones([2], DType::F32).unwrap());
        changed("swap");
        a.to_device(Device::Cpu).unwrap();
        changed("to_device");
        let _ = a.address_mut();
        changed("address_mut");
        scope.parameters().load_state_dict(&scope.parameters().state_dict()).unwrap();
        changed("load_state_dict");
        let _ = (a.tensor(), a.shape(), scope.parameters().count());
        assert_eq!((a.version(), b.version()), (*seen.last().unwrap(), 1));
    }

    #[test]
    fn names_are_unique_and_first_values_depend_on_them_alone() {
        let (scope, _, b) = two();
        assert!(scope.parameter("a", [1], Initializer::Constant(0.0)).is_err());
        let alone = Scope::new(1, DType::F32).parameter("part.b", [3, 2], Initializer::DEFAULT).unwrap();
        assert_eq!(alone.tensor().to_vec::<f32>().unwrap(), b.tensor().to_vec::<f32>().unwrap());
    }
}
