//! All kernels of the crate: whether they are as they are called, what they take of a multiprocessor, and what their
//! launches move and compute.
//!
//! ```
//! use gridgrad::kernels;
//! let forward = kernels::cost("softmax_forward").unwrap();
//! let work = forward.work(&[("rows", 49.0), ("width", 49.0), ("s", 2.0)])?;
//! assert_eq!(work.bytes, 2.0 * 49.0 * 49.0 * 2.0);
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod cost;
mod formula;
mod occupancy;

use crate::driver::{fatbin, image};
use crate::gpu::{Gpu, Signature};
use crate::{Device, Error, Result};

pub use cost::{Cost, Costs, Work};
pub use formula::Formula;
pub use occupancy::{MULTIPROCESSORS, Multiprocessor, Occupancy};

/// A kernel: what it is called, what it was compiled to, and what its launches cost.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Stem of its file in `kernels/`.
    pub module: &'static str,
    /// Its name without the instance.
    pub name: &'static str,
    /// Bytes and FLOPs of a launch.
    pub cost: Cost,
    /// What the names in the formulas stand for, beside `s`, the bytes of an element.
    pub names: &'static [(&'static str, &'static str)],
    /// Each instance with its machine code's figures; those are missing where the crate was built without nvcc.
    pub instances: Vec<Instance>,
}

/// A kernel for one dtype or case.
#[derive(Clone, Debug)]
pub struct Instance {
    /// The kernel's name with the suffix of the instance.
    pub name: String,
    /// One entry for each architecture that there is machine code for.
    pub code: Vec<Code>,
}

/// What machine code takes of a multiprocessor.
#[derive(Clone, Debug, PartialEq)]
pub struct Code {
    /// 90 for compute capability 9.0.
    pub architecture: u32,
    /// Of a thread.
    pub registers: u32,
    /// Static shared memory of a block, in bytes.
    pub shared: u32,
    /// Threads of the largest block that it may be launched with; `None` where the code does not say.
    pub threads: Option<u32>,
    /// With the largest block and static shared memory alone; `None` where the largest block is not known.
    pub occupancy: Option<Occupancy>,
}

/// Every kernel, read from the code in this program; no GPU is asked.
///
/// # Errors
/// Where that code is damaged.
pub fn all() -> Result<Vec<Kernel>> {
    let mut modules = std::collections::HashMap::new();
    for (module, image) in image::images() {
        let damaged = |reason: String| Error::format(format!("kernels/{module}.fatbin"), reason);
        modules.insert(module, fatbin::resources(image).map_err(damaged)?);
    }
    let missing = |name: &str| Error::Config(format!("kernel {name} has no entry among the costs of its room"));
    signatures()
        .map(|signature @ Signature { module, name, .. }| {
            let (names, cost) = find_cost(name).ok_or_else(|| missing(name))?;
            let resources = modules.get(module).map_or(&[][..], Vec::as_slice);
            let instance = |name: String| {
                let code = resources.iter().filter(|found| found.kernel == name).map(Code::new).collect();
                Instance { name, code }
            };
            let instances = full_names(&signature).into_iter().map(instance).collect();
            Ok(Kernel { module, name, cost: *cost, names, instances })
        })
        .collect()
}

impl Code {
    fn new(resources: &fatbin::Resources) -> Self {
        let fatbin::Resources { architecture, registers, shared, threads, .. } = *resources;
        let card = MULTIPROCESSORS.into_iter().find(|card| card.architecture == architecture);
        let occupancy = card.zip(threads).map(|(card, threads)| card.occupancy(threads, registers, shared.into()));
        Code { architecture, registers, shared, threads, occupancy }
    }
}

/// Bytes and FLOPs of a kernel, by its name without the instance.
pub fn cost(kernel: &str) -> Option<Cost> {
    find_cost(kernel).map(|(_, cost)| *cost)
}

type Names = &'static [(&'static str, &'static str)];

fn find_cost(kernel: &str) -> Option<(Names, &'static Cost)> {
    costs().find_map(|room| Some((room.names, room.kernels.iter().find(|cost| cost.kernel == kernel)?)))
}

fn costs() -> impl Iterator<Item = &'static Costs> {
    crate::ops::gpu::costs().chain([&crate::train::GPU_COSTS])
}

/// A kernel's names with the suffixes of its instances.
fn full_names(signature: &Signature) -> Vec<String> {
    match signature.instances {
        [] => vec![signature.name.to_owned()],
        instances => instances.iter().map(|instance| format!("{}_{instance}", signature.name)).collect(),
    }
}

fn signatures() -> impl Iterator<Item = Signature> {
    crate::ops::gpu::kernels().chain(crate::train::gpu_kernels())
}

/// Loads every kernel on `device` and compares the parameters that it was compiled with to those that it is called with.
/// Returns the number of kernels, each dtype counted; none on the processor, which has no kernels.
///
/// # Errors
/// Where this machine or this build does not offer the device, has no code for it, or a kernel is not as it is called.
///
/// ```
/// use gridgrad::{Device, check_kernels};
/// assert_eq!(check_kernels(Device::Cpu)?, 0);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn check_kernels(device: Device) -> Result<usize> {
    if device == Device::Cpu {
        return Ok(0);
    }
    let gpu = Gpu::open(device)?;
    signatures().try_fold(0, |count, signature| {
        gpu.check(signature)?;
        Ok(count + signature.instances.len().max(1))
    })
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kernel_has_the_parameters_that_it_is_called_with() {
        assert_eq!(check_kernels(Device::Emulated).unwrap(), crate::driver::emulator::kernel_names().len());
    }

    #[test]
    fn no_kernel_is_without_a_caller() {
        let called: BTreeSet<String> = signatures().flat_map(|signature| full_names(&signature)).collect();
        let compiled: BTreeSet<String> = crate::driver::emulator::kernel_names().into_iter().collect();
        assert_eq!(compiled.difference(&called).collect::<Vec<_>>(), Vec::<&String>::new());
    }
}

#[cfg(test)]
mod cost_tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kernel_has_one_cost_and_every_cost_a_kernel() {
        let kernels: BTreeSet<&str> = signatures().map(|signature| signature.name).collect();
        let costs: Vec<&str> = costs().flat_map(|room| room.kernels).map(|cost| cost.kernel).collect();
        let distinct: BTreeSet<&str> = costs.iter().copied().collect();
        assert_eq!(costs.len(), distinct.len(), "a kernel has two costs");
        let (without, stale): (Vec<_>, Vec<_>) =
            (kernels.difference(&distinct).collect(), distinct.difference(&kernels).collect());
        assert!(without.is_empty() && stale.is_empty(), "without a cost: {without:?}; without a kernel: {stale:?}");
    }

    #[test]
    fn formulas_are_of_explained_names_and_positive() {
        for room in costs() {
            let mut extents: Vec<(&str, f64)> = room.names.iter().map(|&(name, _)| (name, 3.0)).collect();
            assert!(extents.iter().all(|(name, _)| *name != "s"), "s is the bytes of an element everywhere");
            extents.push(("s", 2.0));
            for cost in room.kernels {
                let work = cost.work(&extents).unwrap();
                assert!(work.bytes > 0.0 && work.flops >= 0.0, "{}: {work:?}", cost.kernel);
                if let Some(shared) = cost.shared {
                    assert!(shared.evaluate(&extents).unwrap() > 0.0, "{}", cost.kernel);
                }
            }
            for (name, _) in room.names {
                let uses = |formula: Formula| formula.names().contains(name);
                let used = |cost: &Cost| uses(cost.bytes) || uses(cost.flops) || cost.shared.is_some_and(uses);
                assert!(room.kernels.iter().any(used), "nothing names '{name}'");
            }
        }
    }

    #[test]
    fn all_instances_of_all_kernels_are_listed_with_their_code() {
        let kernels = all().unwrap();
        assert_eq!(kernels.len(), signatures().count());
        let architectures =
            |instance: &Instance| instance.code.iter().map(|code| code.architecture).collect::<Vec<_>>();
        let first = architectures(&kernels[0].instances[0]);
        assert_eq!(first.is_empty(), !crate::driver::kernels_built());
        for instance in kernels.iter().flat_map(|kernel| &kernel.instances) {
            assert_eq!(architectures(instance), first, "{}", instance.name);
            for code in &instance.code {
                assert!((1..=255).contains(&code.registers) && code.shared <= 48 << 10, "{}: {code:?}", instance.name);
            }
        }
    }
}
