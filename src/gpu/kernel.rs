//! Typed kernels: a name, the instances it is compiled for, and the types of its arguments.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError};

use super::Gpu;
use crate::driver::seam::{Argument, Arguments, Function};
use crate::{Error, Result};

pub(crate) use crate::driver::seam::Geometry;

/// The suffixes of a kernel that takes every floating-point type of the GPU.
pub(crate) const FLOATS: &[&str] = &["f32", "bf16", "f16"];

/// Loaded kernels, by name and instance.
pub(super) type Functions = HashMap<(&'static str, &'static str), Arc<Function>>;

/// The arguments of a kernel: a tuple of [`Argument`]s.
pub(crate) trait ArgumentList {
    /// Bytes of each.
    const SIZES: &'static [usize];
    /// By value, in order.
    fn arguments(&self) -> Arguments;
}

macro_rules! argument_list {
    ($($name:ident)+) => {
        #[allow(non_snake_case, reason = "the macro's names serve as types and as variables")]
        impl<$($name: Argument),+> ArgumentList for ($($name,)+) {
            const SIZES: &'static [usize] = &[$($name::SIZE),+];
            fn arguments(&self) -> Arguments {
                let ($($name,)+) = self;
                let mut arguments = Arguments::new();
                $(arguments.push(*$name);)+
                arguments
            }
        }
    };
}
macro_rules! argument_lists {
    ($first:ident $($rest:ident)*) => {
        argument_list!($first $($rest)*);
        argument_lists!($($rest)*);
    };
    () => {};
}
argument_lists!(A B C D E F G H I J K L M N O P Q R S T U V W X);

/// What a kernel's compiled form must look like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Signature {
    /// Stem of its file in `kernels/`.
    pub module: &'static str,
    /// Its name without the instance.
    pub name: &'static str,
    /// Suffixes of the names under which it is compiled; empty where there is one without a suffix.
    pub instances: &'static [&'static str],
    /// Bytes of each parameter.
    pub sizes: &'static [usize],
}

/// A kernel of `kernels/<module>.cu` that takes the arguments `A`.
///
/// The function `<name>_<instance>` is looked up at the first launch, and the sizes of its parameters are compared with
/// those of `A` then.
pub(crate) struct Kernel<A> {
    module: &'static str,
    name: &'static str,
    instances: &'static [&'static str],
    arguments: PhantomData<fn(A)>,
}

impl<A: ArgumentList> Kernel<A> {
    /// A kernel compiled for every suffix of `instances`, or without a suffix where there is none.
    pub const fn new(module: &'static str, name: &'static str, instances: &'static [&'static str]) -> Self {
        Kernel { module, name, instances, arguments: PhantomData }
    }

    /// For the list of all kernels.
    pub const fn signature(&self) -> Signature {
        Signature { module: self.module, name: self.name, instances: self.instances, sizes: A::SIZES }
    }

    /// Launches `instance` ("" where the kernel has no suffixes). A grid without blocks is no launch.
    ///
    /// # Errors
    /// Where the kernel has no such instance, is not what this signature says, or the device refuses.
    pub fn launch(&self, gpu: &Gpu, instance: &str, geometry: Geometry, arguments: A) -> Result<()> {
        let function = gpu.function(self.signature(), instance)?;
        if geometry.grid.contains(&0) || geometry.block.contains(&0) {
            return Ok(());
        }
        crate::driver::launch(&*gpu.driver(), &function, geometry, &arguments.arguments())
    }
}

impl Gpu {
    /// The compiled kernel, compared with its signature when it is first asked for.
    fn function(&self, signature: Signature, instance: &str) -> Result<Arc<Function>> {
        let Signature { module, name, instances, sizes } = signature;
        let refuse = |kernel: String, reason: String| Error::Kernel { device: self.device(), kernel, reason };
        let instance = match instances.iter().find(|known| **known == instance) {
            Some(known) => *known,
            None if instances.is_empty() && instance.is_empty() => "",
            None => {
                let known = instances.join(", ");
                return Err(refuse(name.into(), format!("it is not made for {instance}; there is {known}")));
            }
        };
        let driver = self.driver();
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(&(name, instance)) {
            return Ok(Arc::clone(function));
        }
        let full_name = if instance.is_empty() { name.to_owned() } else { format!("{name}_{instance}") };
        let function = Arc::new(driver.load(module, &full_name)?);
        if function.parameters != sizes {
            let reason = format!(
                "compiled with parameters of {:?} bytes, called with {sizes:?}; build the crate again from clean",
                function.parameters
            );
            return Err(refuse(full_name, reason));
        }
        functions.insert((name, instance), Arc::clone(&function));
        Ok(function)
    }

    /// Looks up every instance of `signature` and compares its parameters.
    ///
    /// # Errors
    /// Where one is missing or takes other parameters.
    pub fn check(&self, signature: Signature) -> Result<()> {
        let instances = if signature.instances.is_empty() { &[""] } else { signature.instances };
        instances.iter().try_for_each(|instance| self.function(signature, instance).map(drop))
    }
}

impl Geometry {
    /// One-dimensional: enough blocks of `threads` for `items`, one thread each.
    pub fn for_items(items: usize, threads: u32) -> Self {
        Self::blocks(items.div_ceil(threads as usize), threads)
    }

    /// `blocks` blocks of `threads` along x, at most 2³¹ − 1: kernels that may get more work stride over the grid.
    pub fn blocks(blocks: usize, threads: u32) -> Self {
        let blocks = blocks.min(i32::MAX as usize) as u32;
        Geometry { grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0 }
    }

    /// The same with dynamic shared memory.
    pub fn with_shared(self, bytes: usize) -> Self {
        Geometry { shared: bytes.min(u32::MAX as usize) as u32, ..self }
    }
}
