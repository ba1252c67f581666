//! Exponential moving averages of a model's parameters.

use rayon::prelude::*;

use super::device::{Column, DeviceStep, Table};
use super::state_problems;
use crate::cpu::{Float, parallel};
use crate::driver::seam::Address;
use crate::gpu::{Kernel, Signature};
use crate::nn::{Parameter, Parameters, StateDict};
use crate::{DType, Error, Result, Tensor};

/// state or null, decay, 1 − decay, then the table: count, first block, averages, values, elements
type AverageArguments = (Address, f32, f32, u32, Column<u32>, Column<u64>, Column<u64>, Column<u64>);
const AVERAGE: Kernel<AverageArguments> = Kernel::new("training", "average", &[]);

pub(super) static KERNELS: &[Signature] = &[AVERAGE.signature()];

/// An average over the course of training of every weight and statistic, for use in their place at evaluation.
///
/// Starts at the values that the parameters have when it is made.
///
/// ```
/// use gridgrad::nn::{Initializer, Scope};
/// use gridgrad::train::Ema;
/// use gridgrad::{DType, Tensor};
/// let scope = Scope::new(0, DType::F64);
/// let weight = scope.parameter("weight", [1], Initializer::Constant(0.0))?;
/// let mut average = Ema::new(scope.parameters(), 0.75)?;
/// weight.set(&Tensor::new(&[1.0f64], [1])?)?;
/// average.update()?;
/// assert_eq!(average.state_dict()["weight"].item()?, 0.25);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub struct Ema {
    decay: f64,
    entries: Vec<(Parameter, Tensor)>,
}

impl Ema {
    /// An average that keeps `decay` of itself at every update.
    ///
    /// # Errors
    /// `Config` where `decay` is outside \[0, 1\], `DType` where a parameter is neither `f32` nor `f64`.
    pub fn new(parameters: &Parameters, decay: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&decay) {
            return Err(Error::Config(format!("ema_decay is {decay}, expected a number from 0 to 1")));
        }
        let entry = |parameter: Parameter| match parameter.tensor().dtype() {
            DType::F32 | DType::F64 => {
                let average = parameter.tensor().detach();
                Ok((parameter, average))
            }
            got => Err(Error::DType { op: "Ema", got, expected: "f32 or f64".into() }),
        };
        Ok(Ema { decay, entries: parameters.iter().map(entry).collect::<Result<_>>()? })
    }

    /// average ← decay · average + (1 − decay) · value, to be called after every step.
    ///
    /// # Errors
    /// None that a parameter list can cause: dtypes were compared when this was made.
    pub fn update(&mut self) -> Result<()> {
        fn blend<T: Float>(average: &mut Tensor, value: &Tensor, decay: f64) -> Result<()> {
            let (keep, rest) = (T::from_f64(decay), T::from_f64(1.0 - decay));
            parallel::update(average.data_mut::<T>()?, value.data::<T>()?, move |average, value| {
                *average = keep * *average + rest * value;
            });
            Ok(())
        }
        let decay = self.decay;
        if self.entries.iter().any(|(_, average)| average.gpu().is_some()) {
            return self.update_on_device(None);
        }
        self.entries.par_iter_mut().try_for_each(|(parameter, average)| match average.dtype() {
            DType::F64 => blend::<f64>(average, &parameter.tensor(), decay),
            _ => blend::<f32>(average, &parameter.tensor(), decay),
        })
    }

    /// Runs `body` with the averages in the model, and then puts the model's own values back, also after a panic.
    pub fn with_averages<R>(&mut self, body: impl FnOnce() -> R) -> R {
        struct SwapBack<'a>(&'a mut Ema);
        impl Drop for SwapBack<'_> {
            fn drop(&mut self) {
                self.0.swap();
            }
        }
        self.swap();
        let _swap_back = SwapBack(self);
        body()
    }

    /// Exchanges the averages and the model's values.
    fn swap(&mut self) {
        self.entries.iter_mut().for_each(|(parameter, average)| parameter.swap(average));
    }

    /// Addresses that an update reads and writes on a GPU.
    pub(super) fn addresses(&self) -> Vec<u64> {
        let averages = self.entries.iter().map(|(_, average)| average);
        averages.filter_map(|average| average.address().ok()).map(|address| address.0).collect()
    }

    /// All averages in one launch; where `step` is given, only if the device has applied that step.
    pub(super) fn update_on_device(&mut self, step: Option<&DeviceStep>) -> Result<()> {
        let Some(gpu) = self.entries.iter().find_map(|(_, average)| average.gpu()) else { return Ok(()) };
        let averages =
            self.entries.iter_mut().map(|(_, average)| Ok(average.address_mut()?.0)).collect::<Result<Vec<u64>>>()?;
        let values: Vec<Tensor> = self.entries.iter().map(|(parameter, _)| parameter.tensor()).collect();
        let state = step.map_or(Address::NULL, DeviceStep::state);
        let (keep, rest) = (self.decay as f32, (1.0 - self.decay) as f32);
        for part in Table::new(values.iter())?.parts() {
            let (averages, elements) = (part.column(&averages), part.elements);
            let arguments = (state, keep, rest, part.count, part.first_block, averages, part.addresses, elements);
            AVERAGE.launch(gpu, "", part.geometry(), arguments)?;
        }
        Ok(())
    }

    /// The averages, by the parameters' names: weights that a model can load.
    pub fn state_dict(&self) -> StateDict {
        self.entries.iter().map(|(parameter, average)| (parameter.name().to_owned(), average.clone())).collect()
    }

    /// Goes on from `state`. Nothing changes unless everything fits.
    ///
    /// # Errors
    /// [`Error::StateDict`], listing every tensor that is missing, surplus, or of another shape or dtype.
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        let problems = state_problems(&self.state_dict(), state);
        if !problems.is_empty() {
            return Err(Error::StateDict(problems));
        }
        for (parameter, average) in &mut self.entries {
            if let Some(loaded) = state.get(parameter.name()) {
                average.overwrite(loaded)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Initializer, Scope};

    fn model(dtype: DType) -> (Scope, Parameter) {
        let scope = Scope::new(0, dtype);
        let weight = scope.parameter("weight", [3], Initializer::Constant(1.0)).unwrap();
        scope.statistic("mean", [2], Initializer::Constant(0.0)).unwrap();
        (scope, weight)
    }

    #[test]
    fn averages_follow_the_formula_and_swap_in_and_out() {
        for dtype in [DType::F32, DType::F64] {
            let (scope, weight) = model(dtype);
            let mut ema = Ema::new(scope.parameters(), 0.75).unwrap();
            for value in [5.0, 9.0] {
                weight.set(&Tensor::full([3], value, dtype).unwrap()).unwrap();
                ema.update().unwrap();
            }
            // ¾ (¾ · 1 + ¼ · 5) + ¼ · 9
            let inside = ema.with_averages(|| weight.tensor().to_f64_vec().unwrap());
            assert_eq!(inside, [3.75; 3]);
            assert_eq!(weight.tensor().to_f64_vec().unwrap(), [9.0; 3]);
            assert_eq!(ema.state_dict()["weight"].to_f64_vec().unwrap(), [3.75; 3]);
            assert!(ema.state_dict().contains_key("mean"));
        }
    }

    #[test]
    fn a_panic_inside_leaves_the_model_as_it_was() {
        let (scope, weight) = model(DType::F32);
        let mut ema = Ema::new(scope.parameters(), 0.5).unwrap();
        weight.set(&Tensor::full([3], 2.0, DType::F32).unwrap()).unwrap();
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ema.with_averages(|| panic!("meant"))));
        assert!(panic.is_err());
        assert_eq!(weight.tensor().to_f64_vec().unwrap(), [2.0; 3]);
    }

    #[test]
    fn state_dicts_that_do_not_fit_and_decays_that_cannot_be_are_refused() {
        let (scope, _) = model(DType::F32);
        assert!(matches!(Ema::new(scope.parameters(), 1.5), Err(Error::Config(_))));
        let mut ema = Ema::new(scope.parameters(), 0.5).unwrap();
        let mut state = ema.state_dict();
        state.insert("weight".into(), Tensor::zeros([3], DType::F64).unwrap());
        let message = ema.load_state_dict(&state).unwrap_err().to_string();
        assert!(message.contains("weight is f64, expected f32"), "{message}");
        state.insert("weight".into(), Tensor::full([3], 7.0, DType::F32).unwrap());
        ema.load_state_dict(&state).unwrap();
        assert_eq!(ema.state_dict()["weight"].to_f64_vec().unwrap(), [7.0; 3]);
    }
}
