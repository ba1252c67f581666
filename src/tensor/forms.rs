//! What ops have made of a tensor's values for their own use, such as a weight in the order in which a product reads it.
//!
//! A network that answers, without gradients, prepares each of its weights once. Forms lie with the values: tensors that
//! share these share them, and whoever writes to the values drops them.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use super::Tensor;
use super::storage::Storage;
use crate::autograd;

/// Values of a weight in their compute type, and the tensor that they are all of, if there is one.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a, T> {
    pub values: &'a [T],
    pub tensor: Option<&'a Tensor>,
}

impl<'a, T> Weight<'a, T> {
    pub fn of(tensor: &'a Tensor, values: &'a [T]) -> Self {
        Weight { values, tensor: Some(tensor) }
    }

    /// [`Tensor::form`], where there is a tensor.
    pub fn form<K, V>(&self, key: K, make: impl FnOnce() -> V) -> Arc<V>
    where
        K: Clone + PartialEq + Send + 'static,
        V: Send + Sync + 'static,
    {
        match self.tensor {
            Some(tensor) => tensor.form(key, make),
            None => Arc::new(make()),
        }
    }
}

impl<'a, T> From<&'a [T]> for Weight<'a, T> {
    fn from(values: &'a [T]) -> Self {
        Weight { values, tensor: None }
    }
}

type Form = Arc<dyn Any + Send + Sync>;

/// Forms of one tensor's values, each under a key of its op's own type. A form that was asked for once is not kept yet: only its
/// key is there.
#[derive(Default)]
pub(crate) struct Forms(Mutex<Vec<(Box<dyn Any + Send>, Option<Form>)>>);

/// What [`Forms`] know of a key.
enum Known<V> {
    Form(Arc<V>),
    /// It was asked for before.
    Key,
    Nothing,
}

impl Forms {
    fn entries(&self) -> std::sync::MutexGuard<'_, Vec<(Box<dyn Any + Send>, Option<Form>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of `key`, which is known from now on.
    fn ask<K: PartialEq + Send + 'static, V: Send + Sync + 'static>(&self, key: K) -> Known<V> {
        let mut entries = self.entries();
        match entries.iter().find(|(known, _)| known.downcast_ref() == Some(&key)) {
            Some((_, form)) => {
                let form = form.as_ref().and_then(|form| Arc::clone(form).downcast().ok());
                form.map_or(Known::Key, Known::Form)
            }
            None => {
                entries.push((Box::new(key), None));
                Known::Nothing
            }
        }
    }

    fn keep<K: PartialEq + 'static, V: Send + Sync + 'static>(&self, key: &K, form: &Arc<V>) {
        let mut entries = self.entries();
        if let Some((_, kept)) = entries.iter_mut().find(|(known, _)| known.downcast_ref() == Some(key)) {
            *kept = Some(Arc::clone(form) as Form);
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Tensor {
    /// What `make` makes of this tensor's values. Inside of [`no_grad`](autograd::no_grad), what is made a second time is kept
    /// for all later ones, until someone writes to the values or uses them outside: training, which writes to its weights after
    /// each step, would only hold them twice.
    ///
    /// The key names, by its type and value, how the form is made.
    pub(crate) fn form<K, V>(&self, key: K, make: impl FnOnce() -> V) -> Arc<V>
    where
        K: Clone + PartialEq + Send + 'static,
        V: Send + Sync + 'static,
    {
        let Storage::Host(_, forms) = &*self.0.storage else { return Arc::new(make()) };
        if !autograd::answers() {
            // Training goes on after an evaluation, and will write to the values soon.
            forms.entries().clear();
            return Arc::new(make());
        }
        match forms.ask(key.clone()) {
            Known::Form(form) => form,
            Known::Nothing => Arc::new(make()),
            Known::Key => {
                // Made without the lock: others may make the same at the same time.
                let form = Arc::new(make());
                forms.keep(&key, &form);
                form
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{Backward, Function};
    use crate::{DType, Result};

    #[derive(Clone, PartialEq)]
    struct Doubled(usize);

    /// The tensor's first value as the form has it, and whether it was made for this call.
    fn doubled(tensor: &Tensor, key: usize) -> Result<(f32, bool)> {
        let values = tensor.data::<f32>()?;
        let mut made = false;
        let form = tensor.form(Doubled(key), || {
            made = true;
            2.0 * values[0]
        });
        Ok((*form, made))
    }

    fn of_three_times(tensor: &Tensor, key: usize) -> Result<[(f32, bool); 3]> {
        Ok([doubled(tensor, key)?, doubled(tensor, key)?, doubled(tensor, key)?])
    }

    #[test]
    fn a_form_is_kept_for_answers_until_the_values_are_written_to() -> Result<()> {
        let mut weight = Tensor::ones([3], DType::F32)?.variable()?;
        assert_eq!(of_three_times(&weight, 0)?, [(2.0, true); 3], "nothing is kept where gradients may be asked for");
        autograd::no_grad(|| -> Result<()> {
            assert_eq!(of_three_times(&weight, 0)?, [(2.0, true), (2.0, true), (2.0, false)]);
            assert_eq!(doubled(&weight, 1)?, (2.0, true), "another key");
            assert_eq!(doubled(&weight.reshape([1, 3])?, 0)?, (2.0, false), "the same values");
            weight.data_mut::<f32>()?[0] = 4.0;
            assert_eq!(of_three_times(&weight, 0)?, [(8.0, true), (8.0, true), (8.0, false)]);
            // A copy that replaces shared values has no forms; the other tensor keeps its own.
            let shared = weight.clone();
            weight.data_mut::<f32>()?[0] = 5.0;
            assert_eq!(doubled(&weight, 0)?, (10.0, true));
            assert_eq!(doubled(&shared, 0)?, (8.0, false));
            assert_eq!(of_three_times(&weight, 0)?[2], (10.0, false));
            Ok(())
        })?;
        assert_eq!(doubled(&weight, 0)?, (10.0, true), "training");
        let kept = autograd::no_grad(|| of_three_times(&weight, 0))?;
        assert_eq!(kept, [(10.0, true), (10.0, true), (10.0, false)], "training has dropped what was kept");
        Ok(())
    }

    #[test]
    fn values_exchanged_or_overwritten_never_meet_the_forms_of_others() -> Result<()> {
        let (mut a, mut b) = (Tensor::ones([1], DType::F32)?, Tensor::full([1], 3.0, DType::F32)?);
        autograd::no_grad(|| -> Result<()> {
            assert_eq!((of_three_times(&a, 0)?[2], of_three_times(&b, 0)?[2]), ((2.0, false), (6.0, false)));
            a.swap_values(&mut b);
            assert_eq!((doubled(&a, 0)?, doubled(&b, 0)?), ((6.0, false), (2.0, false)));
            a.overwrite(&Tensor::full([1], 7.0, DType::F32)?)?;
            assert_eq!(doubled(&a, 0)?, (14.0, true));
            Ok(())
        })
    }

    struct Probe(Tensor);

    impl Function for Probe {
        fn name(&self) -> &'static str {
            "probe"
        }

        fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
            assert_eq!(of_three_times(&self.0, 0)?, [(2.0, true); 3]);
            Ok(vec![Some(backward.grad().clone())])
        }
    }

    #[test]
    fn a_backward_rule_keeps_nothing() -> Result<()> {
        let weight = Tensor::ones([1], DType::F32)?.variable()?;
        let output = autograd::record(weight.detach(), &[&weight], |_| Probe(weight.clone()));
        output.sum_all()?.backward()?;
        Ok(())
    }
}
